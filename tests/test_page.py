"""The page's parts: its order and story, losses against the base, stages, and what it may weigh."""

from __future__ import annotations

import base64
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
from deme_diffusion.report.page import render_page
from deme_diffusion.report.page.losses import losses_section
from deme_diffusion.report.page.stages import provenance_lines, stages_section
from deme_diffusion.report.page.story import story
from pages import content, figure, losses, picture

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
        "2 of 4 stages are there (1 reused), 1 running, 1 waiting; making them took 2 min 12 s in all."
    )


def test_what_made_the_stages_is_told_once_for_each_value() -> None:
    one = {"python": "3.11", "versions": {"torch": "2.9", "numpy": None}, "gpus": None}
    other = {"python": "3.12", "versions": {"torch": "2.9", "numpy": None}, "gpus": ["H100, 80 GiB"], "git": None}
    assert list(provenance_lines([one, other, one])) == [
        ("python", "3.11; 3.12"),
        ("versions", "torch 2.9"),
        ("gpus", "H100, 80 GiB"),
    ]
    many = [{"platform": f"machine {i}"} for i in range(9)]
    assert list(provenance_lines(many)) == [("platform", "machine 0; machine 1; machine 2; machine 3 and 5 more")]


def test_progress_comes_first_on_a_page_that_refreshes(run: dict[str, Any], tmp_path: Path) -> None:
    live, finished = render_page(run, tmp_path, refresh=7), render_page(run, tmp_path)
    assert '<meta http-equiv="refresh" content="7">' in live and 'http-equiv="refresh"' not in finished
    assert re.findall(r'<section[^>]* id="([\w-]+)"', live) == ["progress", *ORDER]
    assert '<tr class="running"><th scope="row">sample &lt;script&gt;' in live


# ---------------------------------------------------------------- figures
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
