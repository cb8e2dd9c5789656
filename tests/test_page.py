"""The page's parts: its order and story, losses against the base, stages, and what it may weigh."""

from __future__ import annotations

import base64
import html
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deme_diffusion.report.album import MOST_BYTES, SVG, Album
from deme_diffusion.report.card import DEMONSTRATION
from deme_diffusion.report.glossary import words_of
from deme_diffusion.report.page import render_page
from deme_diffusion.report.page.losses import losses_section
from deme_diffusion.report.page.merging import MOST_CELLS, patterns_section, vectors_section
from deme_diffusion.report.page.pictures import curves_section
from deme_diffusion.report.page.results import table_section
from deme_diffusion.report.page.stages import provenance_lines, provenance_section, stages_section
from deme_diffusion.report.page.story import story
from deme_diffusion.report.words import seeds_said, sentences, two_parts
from pages import EVIL, content, figure, losses, picture

ORDER = ["table", "samples", "losses", "curves", "weights", "division", "figures", "ablations-0"]
ORDER += ["protocol", "provenance"]
MINUS = "\N{MINUS SIGN}"


@pytest.fixture
def run(tmp_path: Path) -> dict[str, Any]:
    return content(tmp_path)


def sources(text: str) -> list[tuple[str, bytes]]:
    """Every embedded image: its kind and bytes."""
    found = re.findall(r'src="data:([\w/+]+);base64,([^"]+)"', text)
    return [(kind, base64.b64decode(data, validate=True)) for kind, data in found]


# ---------------------------------------------------------------- what it says
def test_the_sections_tell_the_run_in_order(run: dict[str, Any], tmp_path: Path) -> None:
    text = render_page(run, tmp_path)
    assert re.findall(r'<section[^>]* id="([\w-]+)"', text) == ORDER
    assert re.findall(r'<li><a href="#([\w-]+)">', text) == ORDER


def test_the_story_is_the_run_s() -> None:
    division = {"subsets": [[[0, 6]], [[6, 12]]], "num_train_timesteps": 12}
    stages = [{"stage": "decouple", "label": f"expert {i} [", "steps": 300, "seconds": 9.0} for i in range(2)]
    search = {"method": "least_squares", "objective": "FD", "trials": [{}] * 9}
    run = {"base_model": "google/ddpm", "division": division, "stages": stages, "weights": {"merged": [0.5, 1.0]}}
    assert story({**run, "search": search}) == [
        "From the base google/ddpm, 2 experts were finetuned on the timesteps [0,6) and [6,12) of T = 12, 300 optimizer"
        " steps each.",
        "Their task vectors were merged by task arithmetic into one model of the base's architecture, size and cost,"
        " with the weights 0.5, 1, the best of 9 trials by FD (search: least squares).",
    ]
    assert story(run)[1].endswith("with the weights 0.5, 1 given beforehand.")
    del stages[1]["seconds"]
    assert story(run)[0].startswith("From the base google/ddpm, 2 experts are being finetuned on")
    assert story({}) == []


def test_the_report_split_is_named_only_where_everything_was_measured_on_it(run: dict[str, Any]) -> None:
    assert "report split" in story(run)[2]
    run["table"][0]["metrics"]["loss"]["protocol"]["split"] = "search"
    assert len(story(run)) == 2


def test_losses_are_told_against_the_base_in_percent() -> None:
    rows = [
        {"model": "base", "metrics": {"loss": figure(0.3, None), **losses(0.2, 0.05)}},
        {"model": "merged", "metrics": losses(0.19, 0.06, spread=0.002)},
        {"model": "training images", "metrics": {"FD": figure(1.0, None)}},
    ]
    album = Album()
    section = losses_section(rows, album)  # type: ignore[arg-type]
    assert section is not None and section["spread"]
    assert section["models"] == [("", "base"), ("ours", "merged, Δ %")]
    assert [line["cells"] for line in section["lines"]] == [
        [("", False, "0.200", ""), ("ours", False, f"{MINUS}5.0", "1.0")],
        [("", False, "0.0500", ""), ("ours", False, "+20.0", "4.0")],
    ]
    assert f"merged {MINUS}5.0 ± 1.0 % on [0,6), +20.0 ± 4.0 % on [6,12)" in section["alt"]
    assert b"merged" in base64.b64decode(album.images[0].src.partition(",")[2])
    assert losses_section(rows[1:], album) is None and losses_section(rows[:1], album) is None  # type: ignore[arg-type]


def test_a_single_seed_s_losses_have_no_spread() -> None:
    rows = [{"model": name, "metrics": losses(0.2, 0.05)} for name in ("base", "merged")]
    section = losses_section(rows, Album())  # type: ignore[arg-type]
    assert section is not None and not section["spread"] and "no spread is known" in section["said"]


def test_stages_have_a_state_by_what_is_known_of_them() -> None:
    known = [{"seconds": 2.0}, {"seconds": 130.0, "reused": True}, {}, {"state": "running", "seconds": 1.0}]
    section = stages_section({"stages": [{"stage": "sample", "digest": "0", **one} for one in known]})
    assert section is not None
    assert [stage["state"] for stage in section["stages"]] == ["done", "reused", "waiting", "running"]
    assert section["said"] == (
        "2 of 4 stages are there, 1 running, 1 waiting; making them took 2 min 12 s in all: 2.0 s for the 1 that the"
        " last command made, 2 min 10 s for the 1 that it found in the store."
    )


def test_what_made_the_stages_is_told_once_for_each_value() -> None:
    one = {"python": "3.11", "versions": {"torch": "2.9", "numpy": None}, "gpus": None}
    other = {"python": "3.12", "versions": {"torch": "2.9", "numpy": None}, "gpus": ["H100, 80 GiB"], "git": None}
    assert list(provenance_lines([one, other, one])) == [
        ("python", "3.11; 3.12"),
        ("versions", "torch 2.9"),
        ("gpus", "H100, 80 GiB"),
    ]
    groups = [{"stages": 12, "processor": "A"}, {"stages": 1, "processor": "B"}]
    assert provenance_section(groups) == [
        {"title": "12 stages", "lines": [("processor", "A")]},
        {"title": "1 stage", "lines": [("processor", "B")]},
    ]
    assert provenance_section(groups[:1]) == [{"title": "", "lines": [("processor", "A")]}]
    many = [{"platform": f"machine {i}"} for i in range(9)]
    assert list(provenance_lines(many)) == [("platform", "machine 0; machine 1; machine 2; machine 3 and 5 more")]


def test_progress_comes_first_on_a_page_that_refreshes(run: dict[str, Any], tmp_path: Path) -> None:
    live, finished = render_page(run, tmp_path, refresh=7), render_page(run, tmp_path)
    assert '<meta http-equiv="refresh" content="7">' in live and 'http-equiv="refresh"' not in finished
    assert re.findall(r'<section[^>]* id="([\w-]+)"', live) == ["progress", *ORDER]
    assert '<tr class="running"><th scope="row">sample &lt;script&gt;' in live


def test_the_story_says_what_the_merged_model_is_and_what_was_noise() -> None:
    search = {"method": "least_squares", "objective": "FD, 1000 images", "trials": [{}] * 9, "source": "one-hot 1"}
    lost = "the search's gain (FD 2.5 to 2.4 on 1000 images) did not carry over to the report split"
    lines = ["merge weights: 0, 1, by one-hot 1: merged is expert 1 alone", lost]
    run = {"weights": {"merged": [0.0, 1.0]}, "search": search, "weights_found": lines, "lost_gains": [lost]}
    assert story(run) == [
        "Their task vectors were merged by task arithmetic into one model of the base's architecture, size and cost,"
        " with the weights that were the best of 9 trials by FD, 1,000 images (search: least squares): one-hot 1, tried"
        " by every search.",
        "Merge weights: 0, 1, by one-hot 1: merged is expert 1 alone. The search's gain (FD 2.5 to 2.4 on 1,000 images)"
        " did not carry over to the report split.",
    ]
    assert story({**run, "search": {**search, "source": "grid"}})[0].endswith("(search: least squares): grid.")
    long = f"merge weights: {', '.join(['0.123'] * 100)}, given"
    said = story({**run, "weights_found": [long, lost]})[1]
    assert said.startswith("The weights of 1 more merges are in their merge.json. The search's gain")


def test_sections_of_one_training_seed_say_so_where_the_table_has_several(run: dict[str, Any], tmp_path: Path) -> None:
    said = "(training seed 0; the table is over 0, 1, 2)"
    assert said not in render_page(run, tmp_path)
    square = [[1, 0.5], [0.5, 1]]
    model = {"norms": [1, 1], "relative_norms": [0.1, None], "parameters": 4, "cosines": square, "overlaps": square}
    merge = {"statistics": {"groups": {}, "model": model}}
    text = render_page({**run, "seeds": [0, 1, 2], "merge": merge}, tmp_path)
    for name in ("samples", "curves", "weights", "figures"):
        section = text.partition(f'<section id="{name}">')[2].partition("</section>")[0]
        assert said in section, name
    assert text.partition('<section id="weights">')[2].partition("</section>")[0].count(said) == 3
    assert said in text.partition("<nav")[0], "the story"
    assert seeds_said({"seeds": range(7)}) == "training seed 0; the table is over 7 seeds"


def test_projections_explain_why_norms_differ_from_the_figure_s(run: dict[str, Any]) -> None:
    one = {"parameters": 4, "norms": [1], "relative_norms": [None], "cosines": [[1]], "overlaps": [[1]]}
    merge = {"statistics": {"groups": {"conv_in": one}, "model": one}}
    assert (plain := vectors_section({**run, "merge": merge})) and plain["apart"] == ""
    merge["statistics"]["groups"]["projection"] = one
    found = vectors_section({**run, "merge": merge})
    assert found and found["apart"].startswith(" Projections are counted apart; the figures below have them folded in")
    found = vectors_section({"merge": merge})
    assert found and found["apart"] == " Projections are counted apart."


def spread_said(seeds: int, samplings: int, **protocol: Any) -> list[str]:
    told = {"mean": 1.0, "spread": 0.1, "n": 9, "seeds": list(range(seeds)), "protocol": protocol}
    if samplings:
        told["protocol"]["seeds"] = f"{seeds} training x {samplings} sampling"
    section = table_section([{"model": "base", "metrics": {"FD": told}}])  # type: ignore[typeddict-item]
    assert section is not None
    return list(section["spreads"])


def test_the_note_says_what_the_spread_is_over() -> None:
    assert spread_said(3, 2) == [
        "± is the standard deviation over 3 training seeds, each the mean over its 2 sampling seeds."
    ]
    assert spread_said(3, 1) == ["± is the standard deviation over 3 training seeds."]
    (one,) = spread_said(1, 2)
    assert one.startswith("± is the standard deviation over 2 sampling seeds of one training: what sampling alone")
    assert spread_said(1, 0, statistic="median, half the range") == [
        "Of times: median ± half the range of the repeats."
    ]


def test_losses_by_range_are_told_once(run: dict[str, Any], tmp_path: Path) -> None:
    results = render_page(run, tmp_path).partition('id="table"')[2].partition("</section>")[0]
    assert ">loss <" in results and "loss [0,6)" not in results and 'href="#losses"' in results
    alone = [row for row in run["table"] if row["model"] == "base"]
    without = render_page({**run, "table": alone}, tmp_path).partition('id="table"')[2].partition("</section>")[0]
    assert "loss [0,6)" in without and 'href="#losses"' not in without


def test_a_demonstration_is_said_once(run: dict[str, Any], tmp_path: Path) -> None:
    head = render_page(run, tmp_path).partition("<nav")[0]
    assert ">demonstration</span>" in head and DEMONSTRATION in head
    told = render_page({**run, "description": "A demonstration, not evidence."}, tmp_path)
    assert ">demonstration</span>" in told and DEMONSTRATION not in told


# ---------------------------------------------------------------- what is heard
def alts(text: str) -> list[str]:
    return [html.unescape(alt) for alt in re.findall(r'<img[^>]* alt="([^"]*)"', text)]


def test_alternative_texts_tell_numbers(run: dict[str, Any], tmp_path: Path) -> None:
    told = alts(render_page(run, tmp_path))
    weights = next(alt for alt in told if alt.startswith("Merge weights"))
    assert "merged 0.4 for [0,6), 0.1 for [6,12); " in weights
    curves = next(alt for alt in told if alt.startswith("training loss against"))
    assert f"expert 0 {EVIL} from 0.2 to 0.004 at step 49; " in curves
    assert "Which of the 12 timesteps each expert is trained on: expert 0 on [0,6); expert 1 on [6,12)" in told


def test_validation_losses_are_drawn_as_changes_and_their_first_values_told() -> None:
    series = {"expert 0": [[0, 0.2], [10, 0.19]], "expert 1": [[0, float("nan")], [5, 0.001], [10, 0.00101]], "new": []}
    album = Album()
    section = curves_section({"curves": {"training loss": series, "validation loss": series}}, album)
    assert [one["said"].partition(",")[0] for one in section] == ["against optimizer steps"] * 2
    told = f"expert 0 0.2, {MINUS}5.0 % at step 10; expert 1 0.001, +1.0 % at step 10; new"
    assert section[1]["alt"] == f"validation loss first, and its change in % by optimizer steps: {told}"
    drawn = base64.b64decode(section[1]["image"].src.partition(",")[2])
    assert b"<!-- change since the first value (%) -->" in drawn
    zero = curves_section({"curves": {"validation loss": {"expert 0": [[0, 0.0], [1, 0.5]]}}}, album)
    assert zero[0]["said"] == "against optimizer steps", "of 0 there is no share"


def test_only_the_words_that_occur_are_explained(run: dict[str, Any], tmp_path: Path) -> None:
    words = dict(words_of(run))
    there = ["base", "all-timesteps", "ensemble", "merged", "loss", "FD", "recall", "digits-cnn"]
    assert list(words) == [*there, "subset", "timestep range", "θ", "τ_i", "w_i"]
    assert "before merge" in words["ensemble"] and "KID" not in words
    text = render_page(run, tmp_path)
    assert all(f"<dt>{word}</dt>" in text for word in words)
    assert words_of({}) == [] and "<summary>Words" not in render_page({**run, "table": []}, tmp_path)


def test_alternative_texts_of_many_end() -> None:
    names = [f"[{100 * i},{100 * i + 100})" for i in range(100)]
    division = {"subsets": [[[100 * i, 100 * i + 100]] for i in range(100)], "num_train_timesteps": 10_000}
    route = [[100 * i, 100 * i + 100, i] for i in range(100)]
    series = {f"expert {i}": [[0, 0.5], [1, 0.1 * i]] for i in range(100)}
    weights = {"merged": [i / 100 for i in range(100)], **{f"x{i}": [0.5] * 100 for i in range(9)}}
    run = {"division": {**division, "route": route}, "curves": {"training loss": series}, "weights": weights}
    values = {f"loss {name}": figure(0.2 + i / 1000, None) for i, name in enumerate(names)}
    table = [{"model": model, "metrics": values} for model in ("base", "all-timesteps", "merged")]
    table[2]["metrics"] = {**values, "loss [4200,4300)": figure(0.1, None)}
    told = alts(render_page({**run, "table": table}))
    assert len(told) == 4 and all(100 < len(alt) < 450 for alt in told)
    assert "merged 100 weights from 0 to 0.99, sum 49.5; " in told[2]
    assert "merged 0 % on [0,100), " in told[0] and "% on [4200,4300)" in told[0] and "of 100 ranges" in told[0]


def test_captions_are_parted_at_the_ends_of_sentences() -> None:
    text = "In [0,1000) 22% of 3.5 conflict (Li et al. 2018. No end). τ_i is 0.5. Others would. The last one."
    first = ["In [0,1000) 22% of 3.5 conflict (Li et al. 2018. No end).", "τ_i is 0.5."]
    assert sentences(text) == [*first, "Others would.", "The last one."]
    assert two_parts(text) == (text, ""), "too little to fold"
    assert two_parts("The finding.\nHow\nit was made.") == ("The finding.", "How it was made.")
    long = [f"Sentence {i} {'x' * 200}." for i in range(5)]
    assert two_parts(" ".join(long)) == (" ".join(long[:2]), " ".join(long[2:]))


# ---------------------------------------------------------------- figures
SECRET = "the secret of another folder"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"svg": "../../etc/passwd"}, "'../../etc/passwd' is no svg in the folder figures"),
        ({"svg": "figures/../secret.svg"}, "is no svg in the folder figures"),
        ({"png": "secret.png"}, "is no png in the folder figures"),
        ({"svg": "figures/link.svg"}, "'figures/link.svg' is a link, or no file"),
        ({"svg": "figures/loop.svg"}, "is a link, or no file"),
        ({"svg": "figures/folder.svg"}, "is a link, or no file"),
        ({"svg": "figures/plane.npz"}, "is no svg"),
        ({"svg": f"figures/{'x' * 999}.svg"}, "is left out"),
        ({"svg": None}, "its svg is no name of a file"),
        ({"png": ["figures/plane.png"]}, "its png is no name"),
        ({"width": None}, "no inches"),
        ({"height": "3"}, "no inches"),
        ({"width": float("nan")}, "no inches"),
        ({"width": 1e9}, "no inches"),
        ({"data": 3}, "its data are no names"),
        ({"title": 3}, "it has no kind, name, title, caption and alt"),
        ({"kind": ["plane"]}, "it has no kind"),
    ],
)
def test_a_crafted_index_embeds_nothing_else(run: dict[str, Any], tmp_path: Path, change: Any, said: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    good, bad = picture(folder, "vectors"), {**picture(folder, "plane"), **change}
    for path in (tmp_path / "secret.svg", folder / "secret.svg", folder / "secret.png"):
        path.write_text(f"<svg>{SECRET}</svg>")
    (folder / "figures/link.svg").symlink_to(tmp_path / "secret.svg")
    (folder / "figures/loop.svg").symlink_to("loop.svg")
    (folder / "figures/folder.svg").mkdir()
    text = render_page({"recipe": "r", "figures": [bad, good, None, "plane"]}, folder)
    embedded = sources(text)
    assert len(embedded) == 1 and SECRET.encode() not in embedded[0][1]
    assert said in html.unescape(text) and html.unescape(text).count("is left out") == 3
    assert "--figure plane" in text, "it is told how it is made"


def test_figures_of_a_folder_that_is_a_link_are_left_out(tmp_path: Path) -> None:
    (elsewhere := tmp_path / "elsewhere").mkdir()
    one = picture(elsewhere, "plane")
    (folder := tmp_path / "run").mkdir()
    (folder / "figures").symlink_to(elsewhere / "figures")
    assert not sources(render_page({"recipe": "r", "figures": [one]}, folder))
    (tmp_path / "alias").symlink_to(elsewhere)  # the run itself may be called by another name
    assert len(sources(render_page({"recipe": "r", "figures": [one]}, tmp_path / "alias"))) == 1


def test_half_a_character_in_an_index_can_be_written(tmp_path: Path) -> None:
    one = {**picture(tmp_path, "plane"), "title": "half \ud800"}
    assert "half ?" in render_page({"recipe": "r", "figures": [one]}, tmp_path)


def test_samples_that_the_grids_show_are_not_shown_again(run: dict[str, Any], tmp_path: Path) -> None:
    again = {**picture(tmp_path, "trajectory"), "name": "samples", "caption": "Pixels differ by 1.99."}
    text = render_page({**run, "figures": [again]}, tmp_path)
    assert "trajectory.svg" not in text and "Pixels differ by 1.99." in text.partition('id="losses"')[0]
    assert "--figure trajectory" not in text
    assert "figures/trajectory.svg" in render_page({**run, "figures": [again], "grids": {}}, tmp_path)


def test_figures_are_shown_in_the_paper_s_order_and_missing_ones_say_how(run: dict[str, Any], tmp_path: Path) -> None:
    run["figures"] = [picture(tmp_path, kind) for kind in ("plane", "similarity", "plane")]
    text = render_page(run, tmp_path / "x y").partition('id="figures"')[2].partition("</section>")[0]
    titles = [title.partition(" ")[0] for title in re.findall(r"<h3>(.*)</h3>", text)]
    assert titles == ["similarity", "plane", "plane"]
    assert "Not drawn yet: What finetuning changes in the activations, Loss landscape around the base" in text
    assert "x y&#39; --figure activations --figure landscape --figure vectors --figure trajectory</pre>" in text
    assert "similarity.svg is missing" in text  # the folder is another one, where no picture lies
    nothing = render_page({**run, "figures": []}, Path("runs/digits"))
    assert "<pre>deme analyze runs/digits</pre>" in nothing


def test_a_small_svg_is_shown_and_a_large_one_is_not(run: dict[str, Any], tmp_path: Path) -> None:
    run |= {"figures": [picture(tmp_path, "plane"), picture(tmp_path, "vectors", padding=400_000)]}
    kinds = [kind for kind, _ in sources(render_page(run, tmp_path).partition('id="figures"')[2])[:2]]
    assert kinds == [SVG, "image/png"]


# ---------------------------------------------------------------- what it weighs
def test_a_hundred_experts_and_five_hundred_trials_take_little(tmp_path: Path) -> None:
    weights = [i / 100 for i in range(100)]
    trials = [{"weights": weights, "source": f"trial {i}", "value": i / 7} for i in range(500)]
    division = {"subsets": [[[10 * i, 10 * i + 10]] for i in range(100)], "num_train_timesteps": 1000,
                "route": [[10 * i, 10 * i + 10, i] for i in range(100)]}  # fmt: skip
    run = {"recipe": "r", "weights": {"merged": weights}, "division": division,
           "search": {"method": "tpe", "objective": "FD", "trials": trials}}  # fmt: skip
    text = render_page(run, tmp_path)
    assert len(re.findall(r"<th scope=.row.>trial \d", text)) == 200
    assert "300 trials more are in the search's search.json" in text
    assert text.count("<td>") < MOST_CELLS + 2_000 and len(text) < 1_500_000 and len(sources(text)) == 2
    rules = {f"layer.{i}.*": [0.5] * 100 for i in range(300)}
    listed = patterns_section({"merge": {"weights": {"rules": rules}}})
    assert len(listed["patterns"]) == 200 and listed["left_out"] == 100


def test_huge_figures_and_grids_stay_within_the_budget(run: dict[str, Any], tmp_path: Path) -> None:
    run["figures"] = [picture(tmp_path, kind, padding=10**6, side=900) for kind in ("plane", "vectors", "landscape")]
    photos = np.random.default_rng(0).integers(0, 256, (64, 128, 128, 3), np.uint8)
    for name in ("base", "merged"):
        np.save(tmp_path / f"{name}.npy", photos)
    assert sum(path.stat().st_size for path in tmp_path.glob("figures/*.png")) > MOST_BYTES
    text = render_page(run, tmp_path)
    assert len(text.encode()) <= MOST_BYTES
    assert "To keep this page small, 3 images are shown smaller or left out" in text
    assert text.count("shown smaller to save room: ") == 3
    images = [Image.open(io.BytesIO(data)) for kind, data in sources(text) if kind != SVG]
    assert {image.width for image in images} == {500, 1000, 807}


@pytest.mark.parametrize("most", [500_000, 10_000])
def test_grids_shrink_together_and_images_go_last(tmp_path: Path, most: int) -> None:
    photos = np.random.default_rng(0).integers(0, 256, (64, 128, 128, 3), np.uint8)
    for name in ("base", "merged"):
        np.save(tmp_path / f"{name}.npy", photos)
    run = {"recipe": "r", "grids": {"base": "base.npy", "merged": "merged.npy"}}
    text = render_page(run, tmp_path, most_bytes=most)
    sizes = [Image.open(io.BytesIO(data)).size for _, data in sources(text)]
    if most < 50_000:  # the page's own text
        assert not sizes and text.count("left out to save room") == 2
        return
    assert len(text.encode()) <= most and len(sizes) == 2 and len(set(sizes)) == 1
    (count,) = set(re.findall(r"the first (\d+)", text))
    assert sizes[0] == (8 * 101 - 1, int(count) // 8 * 101 - 1)


def test_a_page_that_is_small_enough_is_whole(run: dict[str, Any], tmp_path: Path) -> None:
    assert "To keep this page small" not in render_page(run, tmp_path)


def test_nothing_is_drawn_for_a_page_without_drawings() -> None:
    code = (
        "import sys; from deme_diffusion.report.page import render_page;"
        "render_page({'recipe': 'r', 'table': [], 'figures': []});"
        "sys.exit('matplotlib.figure' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
