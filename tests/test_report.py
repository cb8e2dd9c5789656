"""Tables, verdict, figures, page and card: unlike protocols refused, honest sentences, one safe file."""

import base64
import csv
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from PIL import Image
from rich.console import Console

from deme_diffusion.division import names_of
from deme_diffusion.errors import UserError
from deme_diffusion.report.card import fenced, model_card
from deme_diffusion.report.cells import cells, decimals_for, direction
from deme_diffusion.report.figures import curves, division_picture, sample_grid, thinned, weights_bars
from deme_diffusion.report.page import render_page, write_page
from deme_diffusion.report.tables import (
    Figure,
    Row,
    check_protocols,
    markdown,
    merge_tables,
    read_table,
    rich_table,
    to_csv,
    write_table,
)
from deme_diffusion.report.verdict import verdict

FD = "FD(digits-cnn) DDIM-50"
DDIM = {"extractor": "digits-cnn", "sampler": "DDIM", "steps": 50, "n": 2000, "split": "report"}


CLIP = "CLIP(small) DDIM-50"


def figure(mean: float | None, spread: float | None = None, seeds: tuple[int, ...] = (0, 1, 2), **more: Any) -> Figure:
    made: dict[str, Any] = {"mean": mean, "spread": spread, "n": 2000, "seeds": list(seeds), "protocol": DDIM, **more}
    return made  # type: ignore[return-value]


def row(model: str, **metrics: Figure) -> Row:
    return {"model": model, "metrics": {FD if name == "fd" else name: f for name, f in metrics.items()}}


def fd_rows(seeds: tuple[int, ...] = (0, 1, 2), **models: tuple[float, float | None]) -> list[Row]:
    return [row(name.replace("_", "-"), fd=figure(mean, spread, seeds)) for name, (mean, spread) in models.items()]


@pytest.fixture
def rows() -> list[Row]:
    protocol: dict[str, Any] = {"split": "report"}
    loss = [figure(m, s, n=899, protocol=protocol) for m, s in ((0.0812, 0.0003), (0.0798, 0.0002))]
    return [
        row("base", loss=loss[0], fd=figure(6.34, 0.12), parameters=figure(163569, protocol={})),
        row("merged", loss=loss[1], fd=figure(5.9, 0.1), parameters=figure(163569, protocol={})),
        row("training images", fd=figure(1.5, 0.02, protocol={**DDIM, "sampler": None, "steps": None})),
    ]


# ---------------------------------------------------------------- tables
def test_unlike_protocols_are_refused_with_metric_models_and_field() -> None:
    unlike = [row("base", fd=figure(6.0)), row("merged", fd=figure(5.0, protocol={**DDIM, "steps": 100}))]
    with pytest.raises(UserError) as caught:
        check_protocols(unlike)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in (FD, "'base'", "'merged'", "steps", "50", "100"))
    with pytest.raises(UserError, match="steps"):
        merge_tables([unlike[:1], unlike[1:]])


def test_a_missing_field_is_a_difference_but_tuples_and_real_images_are_not() -> None:
    short = {key: value for key, value in DDIM.items() if key != "split"}
    with pytest.raises(UserError, match="split"):
        check_protocols([row("base", fd=figure(6.0)), row("merged", fd=figure(5.0, protocol=short))])
    one, other = {"size": (8, 8)}, {"size": [8, 8]}
    check_protocols([row("base", fd=figure(6.0, protocol=one)), row("merged", fd=figure(5.0, protocol=other))])
    check_protocols(
        [row("training images", fd=figure(1.0, protocol={**DDIM, "steps": 0})), row("base", fd=figure(6.0))]
    )
    with pytest.raises(UserError, match="extractor"):
        check_protocols(
            [row("training images", fd=figure(1.0, protocol={**DDIM, "extractor": "x"})), row("base", fd=figure(6.0))]
        )


def test_markdown_is_as_written_here(rows: list[Row]) -> None:
    assert markdown(rows) == (
        "| model | loss | FD(digits-cnn) DDIM-50 | parameters |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| base | 0.0812 ± 0.0003 | 6.34 ± 0.12 | 163,569 |\n"
        "| merged | **0.0798 ± 0.0002** | **5.90 ± 0.10** | 163,569 |\n"
        "| training images |  | 1.50 ± 0.02 |  |\n"
        "\n"
        "- loss: n 899; seeds 0, 1, 2; split report\n"
        "- FD(digits-cnn) DDIM-50: extractor digits-cnn; sampler DDIM; steps 50; n 2,000; seeds 0, 1, 2; split report\n"
    )


@pytest.mark.parametrize(
    "metric", ["recall(digits-cnn) DDIM-50", "precision x", "loss [0,250)", "peak memory (MB)", "KID"]
)
def test_the_best_value_is_bold_in_the_right_direction(metric: str) -> None:
    line = cells([row("base", **{metric: figure(0.5)}), row("merged", **{metric: figure(0.7)})])[metric]
    assert [cell.best for cell in line] == (
        [False, True] if metric.startswith(("recall", "precision")) else [True, False]
    )


def test_nothing_is_bold_without_a_direction_or_a_difference() -> None:
    table = [row("base", x=figure(1.0), loss=figure(0.50001)), row("merged", x=figure(2.0), loss=figure(0.50002))]
    assert direction("x") is None
    assert not any(cell.best for line in cells(table).values() for cell in line)


@pytest.mark.parametrize(
    ("means", "spreads", "decimals"),
    [
        ([0.0812], [0.0003], 4),
        ([6.34, 10.8], [0.12], 2),
        ([163569], [], 0),
        ([123.4], [0.05], 2),
        ([6.0], [1e-9], 4),
        ([2.12, 2.11, 2.22], [1e-5, 0.04, 0.12], 2),
    ],
)
def test_digits_are_sensible(means: list[float], spreads: list[float], decimals: int) -> None:
    assert decimals_for(means, spreads) == decimals


def test_a_figure_that_does_not_apply_says_why() -> None:
    text = markdown([row("ensemble", loss=figure(None, reason="no <single> model")), row("base", loss=figure(0.5))])
    assert "| ensemble | n/a |" in text
    assert "- n/a (ensemble, loss): no &lt;single> model" in text


def test_columns_are_chosen_in_order_and_unknown_ones_refused(rows: list[Row]) -> None:
    assert markdown(rows, ["parameters", "loss"]).startswith("| model | parameters | loss |\n")
    with pytest.raises(UserError, match=r"'lost'.*loss"):
        markdown(rows, ["lost"])


def test_a_name_cannot_break_the_markdown_table() -> None:
    first = markdown([row("a|b\n<i>[x](y)", loss=figure(0.5))]).splitlines()[2]
    assert first.startswith("| a\\|b &lt;i>[x]\\(y) | 0.500 |")


def test_csv_parses_back_at_full_precision(rows: list[Row]) -> None:
    rows[0]["metrics"]["loss"]["mean"] = 0.1 + 0.2
    lines = list(csv.DictReader(io.StringIO(to_csv(rows))))
    assert [(line["model"], line["metric"]) for line in lines] == [(r["model"], m) for r in rows for m in r["metrics"]]
    assert float(lines[0]["mean"]) == 0.1 + 0.2
    assert json.loads(lines[1]["protocol"]) == DDIM and json.loads(lines[1]["seeds"]) == [0, 1, 2]
    assert lines[2]["spread"] == ""


def test_json_round_trip_and_files_agree(rows: list[Row], tmp_path: Path) -> None:
    write_table(rows, tmp_path)
    assert read_table(tmp_path / "table.json") == json.loads(json.dumps(rows))
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == markdown(rows)
    assert (tmp_path / "table.csv").read_text(encoding="utf-8") == to_csv(rows)


def test_nothing_is_written_when_protocols_differ(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        write_table([row("base", fd=figure(6.0)), row("merged", fd=figure(5.0, protocol={}))], tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (None, "no such table"),
        ("{", "not JSON"),
        ("{}", "list of rows"),
        ('[{"metrics": {}}]', 'row 0: no "model"'),
        ('[{"model": "base"}]', 'no "metrics"'),
        ('[{"model": "base", "metrics": {"FD": {"mean": "6"}}}]', "metric 'FD': \"mean\""),
    ],
)
def test_a_bad_table_is_named_in_one_line(text: str | None, part: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_table(path)
    assert part in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_merging_keeps_equal_rows_once_and_labels_clashing_ones() -> None:
    base = row("base", fd=figure(6.0))
    tables = [[base, row("merged", fd=figure(5.0))], [base, row("merged", fd=figure(5.5))]]
    assert [r["model"] for r in merge_tables(tables)] == ["base", "merged (1)", "merged (2)"]
    assert [r["model"] for r in merge_tables(tables, ["p=0", "p=0.3"])] == ["base", "merged (p=0)", "merged (p=0.3)"]


def test_the_terminal_table_turns_when_metrics_outnumber_models(rows: list[Row]) -> None:
    def printed(table: list[Row], columns: list[str] | None = None, width: int | None = None) -> list[str]:
        console = Console(file=io.StringIO(), width=120)
        console.print(rich_table(table, columns, width))
        return str(console.file.getvalue()).splitlines()  # type: ignore[attr-defined]

    rows[0]["model"] = "[red]base"  # a name is not markup
    turned, straight = printed(rows[:2]), printed(rows, ["loss"])
    assert "[red]base" in turned[0] and "loss" in turned[2] and "0.0798 ± 0.0002" in turned[2]
    assert "loss" in straight[0] and "[red]base" in straight[2]
    narrow = "\n".join(printed(rows, width=44))
    assert "±" not in narrow and "0.0798" in narrow and "too narrow" in narrow and "too narrow" not in "".join(turned)


def test_empty_tables_print() -> None:
    assert rich_table([], width=5).row_count == 0 and rich_table([row("base")], width=5).row_count == 0
    assert markdown([]) == "| model |\n| --- |\n"


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_a_narrow_terminal_loses_no_model(width: int) -> None:
    models = [f"m{i}" for i in range(8)]
    table = [row(m, loss=figure(0.07 + i / 997, 0.001), fd=figure(i + 1.5, 0.1)) for i, m in enumerate(models)]
    for r in table:
        r["metrics"] |= {f"x{i}": figure(163569.0) for i in range(8)}
    console = Console(file=io.StringIO(), width=width)
    console.print(rich_table(table, width=width))
    text = str(console.file.getvalue())  # type: ignore[attr-defined]
    assert all(m in text for m in models)
    assert ("7.50 ± 0.10" in text) == (width == 200)


# ---------------------------------------------------------------- verdict
def test_it_helps_only_beyond_the_spread_of_base_and_best_control() -> None:
    result = verdict(fd_rows(base=(6.4, 0.05), all_timesteps=(6.2, 0.05), soup=(6.3, 0.05), merged=(5.9, 0.1)))
    assert result.helps is True
    assert result.sentence == (
        f"merged has lower {FD} than base (5.90 ± 0.10 against 6.40 ± 0.05), and than all-timesteps (6.20 ± 0.05). "
        "So here decouple-then-merge helps."
    )
    base, control = result.comparisons
    assert (base.other, control.other) == ("base", "all-timesteps")
    assert base.difference == pytest.approx(-0.5) and base.margin == pytest.approx((0.01 + 0.0025) ** 0.5)


def test_a_gain_that_the_control_shares_is_no_gain() -> None:
    result = verdict(fd_rows(base=(6.4, 0.05), all_timesteps=(5.85, 0.08), merged=(5.9, 0.1)))
    assert result.helps is False
    assert result.sentence.startswith(
        f"merged has lower {FD} than base (5.90 ± 0.10 against 6.40 ± 0.05), but not than all-timesteps (5.85 ± 0.08): "
        "no difference that 3 seeds can show."
    )
    assert result.sentence.endswith("not shown to help here.")


def test_a_better_control_and_a_worse_merged_model_are_said_plainly() -> None:
    better = verdict(fd_rows(base=(6.4, 0.05), soup=(5.0, 0.08), merged=(5.9, 0.1)))
    assert "but not than soup (5.00 ± 0.08), which is lower." in better.sentence and better.helps is False
    worse = verdict(fd_rows(base=(6.4, 0.05), soup=(6.1, 0.08), merged=(6.9, 0.1)))
    assert f"merged has higher {FD} than base" in worse.sentence and "soup (6.10 ± 0.08) is lower" in worse.sentence
    assert worse.helps is False


def clip_rows(fd: tuple[float, float] | None = None, **models: float) -> list[Row]:
    """CLIP scores of models, and the FDs of base and merged beside."""
    made = [row(name.replace("_", "-"), **{CLIP: figure(mean, 0.05)}) for name, mean in models.items()]
    for one, mean in zip((made[0], made[-1]), fd or (), strict=False):
        one["metrics"][FD] = figure(mean, 0.05)
    return made


def test_without_fd_a_higher_clip_score_is_the_better_one() -> None:
    better = verdict(clip_rows(base=29.9, soup=30.0, all_timesteps=29.7, merged=30.5))
    assert better.helps is True
    assert better.sentence.startswith(
        f"merged has higher {CLIP} than base (30.50 ± 0.05 against 29.90 ± 0.05), and than "
    )
    assert "soup (30.00 ± 0.05)" in better.sentence, "the best control is the highest"
    worse = verdict(clip_rows(base=29.9, soup=30.6, merged=30.3))
    assert worse.helps is False
    assert "but not than soup (30.60 ± 0.05), which is higher." in worse.sentence


def test_a_gain_in_fd_is_none_where_images_fit_their_prompts_less() -> None:
    kept = verdict(clip_rows(fd=(6.4, 5.9), base=29.9, merged=29.95))
    assert [c.metric for c in kept.comparisons] == [FD]
    assert f"have no difference in {CLIP}" in kept.sentence
    fell = verdict(clip_rows(fd=(6.4, 5.9), base=29.9, merged=28.0))
    assert fell.helps is False
    assert fell.sentence.endswith("not shown to help here: images fit their prompts less than base's.")


def few_rows(kid: dict[str, float], clip: dict[str, float] | None = None, **fd: float) -> list[Row]:
    """FD of 200 images against 244 in 2,048 features, and what is told beside."""
    few = {**DDIM, "reference": 244, "features": 2048}
    made = [row(name, fd=figure(mean, 0.05, n=200, protocol=few)) for name, mean in fd.items()]
    for one in made:
        for column, means in ((FD.replace("FD", "KID"), kid), (CLIP, clip or {})):
            if one["model"] in means:
                one["metrics"][column] = figure(means[one["model"]], 0.001, n=200)
    return made


def test_fd_of_no_more_images_than_features_decides_nothing() -> None:
    fd = {"base": 90.0, "soup": 88.0, "merged": 50.0}
    alone = verdict(few_rows({}, **fd))
    assert alone.helps is None and alone.comparisons == []
    biased = "FD of 200 images against 244 in 2,048 features is mostly bias"
    assert alone.sentence == f"{biased}, so nothing can be concluded."
    by_kid = verdict(few_rows({"base": 0.030, "soup": 0.020, "merged": 0.028}, **fd))
    assert by_kid.helps is False and {c.metric for c in by_kid.comparisons} == {FD.replace("FD", "KID")}
    assert by_kid.sentence.startswith(f"{biased}: KID decides. ")
    by_clip = verdict(few_rows({}, {"base": 29.9, "soup": 29.8, "merged": 30.5}, **fd))
    assert by_clip.helps is True and ": CLIP decides." in by_clip.sentence
    fell = verdict(few_rows({"base": 0.03, "soup": 0.03, "merged": 0.01}, {"base": 30.0, "merged": 28.0}, **fd))
    assert fell.helps is False and fell.sentence.endswith("images fit their prompts less than base's.")


def test_kid_decides_only_where_fd_cannot() -> None:
    rows = fd_rows(base=(6.4, 0.05), soup=(6.3, 0.05), merged=(5.9, 0.05))
    before = verdict(rows)
    for one in rows:
        one["metrics"][FD.replace("FD", "KID")] = figure(0.03 if one["model"] == "base" else 0.09, 0.001)
    assert verdict(rows) == before


def test_standard_errors_are_told_and_have_a_column_of_their_own() -> None:
    rows = [row("base", **{CLIP: figure(30.0, error=0.041)}), row("merged", **{CLIP: figure(30.1, error=0.052)})]
    assert "standard error over images 0.041 to 0.052" in markdown(rows)
    header, first, _ = to_csv(rows).splitlines()
    assert header.endswith(",reason,standard_error")
    assert first.endswith(",0.041")
    assert "standard_error" not in to_csv([row("base", fd=figure(6.0))])


def test_seeds_are_paired_where_each_has_a_value() -> None:
    """Worked by hand: differences -0.3, -0.2, -0.4; s = 0.1; 95% margin = 4.3027 x 0.1 / sqrt(3) = 0.2484."""
    rows = fd_rows(base=(6.0, 1.0), all_timesteps=(6.1, 1.0), merged=(5.7, 1.0))
    values = ([5.0, 6.0, 7.0], [5.2, 6.0, 7.1], [4.7, 5.8, 6.6])
    for r, each in zip(rows, values, strict=True):
        r["metrics"][FD]["values"] = each
    base = verdict(rows).comparisons[0]
    assert base.margin == pytest.approx(0.24841, abs=1e-4)
    assert base.outcome == "lower", "paired, the seeds tell what their spread alone would hide"
    rows[2]["metrics"][FD]["seeds"] = [3, 4, 5]
    assert verdict(rows).comparisons[0].margin == pytest.approx(2**0.5), "other seeds are no pairs"


def test_a_difference_within_the_spread_is_none() -> None:
    result = verdict(fd_rows(base=(6.4, 0.3), all_timesteps=(6.5, 0.3), merged=(6.2, 0.3)))
    assert result.helps is False
    assert [c.outcome for c in result.comparisons] == ["within", "within"]
    assert "no difference in" in result.sentence and "that 3 seeds can show" in result.sentence


@pytest.mark.parametrize("spread", [None, 0.0])
def test_one_seed_concludes_nothing(spread: float | None) -> None:
    result = verdict(fd_rows(seeds=(0,), base=(6.4, spread), all_timesteps=(6.2, spread), merged=(1.0, spread)))
    assert result.helps is None
    assert result.sentence.endswith(
        "merged scored better than base and all-timesteps. Nothing can be concluded from one training seed."
    )
    assert "against base's 6.40" in result.sentence
    assert {c.margin for c in result.comparisons} == {None}


def test_one_seed_s_means_are_told_in_words_that_claim_nothing() -> None:
    def said(*merged: float) -> str:
        rows = fd_rows((0,), base=(6.4, None), soup=(6.2, None), merged=(merged[0], None))
        for r, mean in zip(rows, (6.4, 6.2, merged[-1]), strict=True):
            r["metrics"].update({"FD(digits-cnn) DDPM-100": figure(mean, None, (0,))} if len(merged) > 1 else {})
        return re.findall(r"merged scored .*?\.(?= Nothing)", verdict(rows).sentence)[0]

    assert said(6.3) == "merged scored better than base, worse than soup."
    assert said(6.9, 6.5) == "merged scored worse than base and soup by both samplers."
    assert said(6.9, 6.1) == "merged scored now better, now worse than base and soup."
    assert said(6.4001) == "merged scored the same as base, worse than soup."


def test_times_are_bold_only_where_their_repeats_do_not_overlap() -> None:
    def best(second: float, **protocol: str) -> list[bool]:
        times = (figure(9.5, 0.3, protocol=protocol), figure(second, 0.1, protocol=protocol))
        rows = [row(name, **{"load time (ms)": time}) for name, time in zip(("base", "merged"), times, strict=True)]
        return [cell.best for cell in cells(rows)["load time (ms)"]]

    assert best(9.8, statistic="median, half the range") == [False, False]
    assert best(10.0, statistic="median, half the range") == [True, False]
    assert best(9.8) == [True, False], "of seeds the note says what bold is"


def test_every_fd_column_has_to_agree() -> None:
    rows = fd_rows(base=(6.4, 0.05), soup=(6.2, 0.05), merged=(5.9, 0.05))
    for r, mean in zip(rows, (6.4, 6.2, 6.2), strict=True):
        r["metrics"]["FD(digits-cnn) DDPM-100"] = figure(mean, 0.05)
    result = verdict(rows)
    assert result.helps is False and len(result.comparisons) == 4
    assert verdict([{**r, "metrics": {FD: r["metrics"][FD]}} for r in rows]).helps is True


def test_without_a_control_or_a_merged_model_it_cannot_tell() -> None:
    alone = verdict(fd_rows(base=(6.4, 0.05), merged=(5.9, 0.1)))
    assert alone.helps is None and "Without a control" in alone.sentence
    nothing = verdict(fd_rows(base=(6.4, 0.05)))
    assert nothing.helps is None and not nothing.comparisons and "nothing can be concluded" in nothing.sentence


# ---------------------------------------------------------------- figures
@pytest.mark.parametrize(("channels", "n", "size"), [(1, 5, (52, 34)), (3, 4, (52, 34)), (3, 2, (34, 16))])
def test_a_grid_is_nearest_upscaled_in_order(channels: int, n: int, size: tuple[int, int]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (n, 8, 8, channels), dtype=np.uint8)
    picture = Image.open(io.BytesIO(sample_grid(images, columns=3, scale=2)))
    assert picture.format == "PNG" and picture.size == size
    pixels = np.asarray(picture)
    assert np.array_equal(pixels[:16:2, :16:2], np.broadcast_to(images[0], (8, 8, 3)))
    assert np.array_equal(pixels[:16, 18:34], np.broadcast_to(images[1], (8, 8, 3)).repeat(2, 0).repeat(2, 1))


def test_a_grid_refuses_what_is_not_images() -> None:
    for bad in (np.zeros((2, 8, 8, 1), np.float32), np.zeros((2, 8, 8), np.uint8), np.zeros((0, 8, 8, 1), np.uint8)):
        with pytest.raises(UserError, match="uint8 images"):
            sample_grid(bad, 2, 1)  # type: ignore[arg-type]


def svg_size(data: bytes) -> tuple[float, float]:
    root = ElementTree.fromstring(data)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    return width, height


def test_svgs_are_valid_repeatable_and_take_the_page_s_ink() -> None:
    lines = {"a $x$ <b>": [(0, 1.0), (1, 0.5), (2, float("nan"))], "empty": []}
    member = np.repeat(np.eye(3, dtype=bool), 4, axis=1)
    made = [
        curves(lines, "loss"),
        division_picture(member, member.argmax(0)),
        weights_bars({"merged": [0.1, -0.2, 0.5], "merged-uniform": [1 / 3] * 3}, ["[0,4)", "[4,8)", "[8,12)"]),
    ]
    assert all(width > 300 and height > 100 for width, height in map(svg_size, made))
    assert all(b"currentColor" in svg and b"prefers-color-scheme" in svg and b"#010203" not in svg for svg in made)
    assert curves(lines, "loss") == made[0]


def test_a_division_is_drawn_run_by_run() -> None:
    def shapes(member: np.ndarray[Any, Any]) -> int:
        return division_picture(member, member.argmax(0)).count(b"z\n")

    plain, holes = np.ones((1, 12), bool), np.array([[True, False] * 6])
    assert shapes(holes) > shapes(plain)
    with pytest.raises(UserError, match="route"):
        division_picture(plain, np.zeros(5, int))


def test_weights_must_fit_the_subsets() -> None:
    with pytest.raises(UserError, match="'merged' has 1 merge weights for 2 subsets"):
        weights_bars({"merged": [0.5]}, ["a", "b"])


def test_long_curves_are_means_of_pieces() -> None:
    steps, values = thinned([(i, float(i % 2)) for i in range(1000)], most=100)
    assert len(steps) == 100 and set(values) == {0.5} and steps[0] == 4.5
    assert thinned([(0, 1.0), (1, float("inf"))])[0].tolist() == [0.0]


# ---------------------------------------------------------------- page and card
@pytest.fixture
def run(rows: list[Row], tmp_path: Path) -> dict[str, Any]:
    evil = "<script>alert(1)</script>"
    np.save(tmp_path / "base.npy", np.full((4, 8, 8, 1), 7, np.uint8))
    series = {f"expert 0 {evil}": [[0, 0.2], [10, 0.1]]}
    return {
        "recipe": evil,
        "description": f"</p>{evil}",
        "demonstration": True,
        "command": f"deme run {evil}",
        "recipe_yaml": f"name: '{evil}'\n```\n",
        "table": [*rows, row(f'"onload="x{evil}', loss=figure(None, reason=evil))],
        "stages": [{"stage": "decouple", "label": evil, "digest": evil * 2, "seconds": 125.4, "reused": True}],
        "provenance": {evil: evil, "torch": "2.9"},
        "division": {"subsets": [[[0, 6]], [[6, 12]]], "route": [[0, 6, 0], [6, 12, 1]], "num_train_timesteps": 12},
        "weights": {"merged": [0.4, 0.1], evil: [0.5, 0.5]},
        "search": {
            "method": "grid",
            "objective": f"FD {evil}",
            "trials": [
                {"weights": [0, 0], "source": "zero", "value": 6.5},
                {"weights": [0.4, 0.1], "source": evil, "value": 6.1},
            ],
        },
        "curves": {"training loss": series, f"validation {evil}": series},
        "grids": {evil: "base.npy", "lost": "no.npy"},
        "merged_path": f'runs/"{evil}',
    }


class Reader(HTMLParser):
    """Collects tags, and every attribute that a browser would fetch or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.alts: list[str | None] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        self.alts += [dict(attrs).get("alt")] if tag == "img" else []


def test_everything_textual_stays_text(run: dict[str, Any], tmp_path: Path) -> None:
    text = write_page(tmp_path, run).read_text(encoding="utf-8")
    page = Reader(text)
    assert "<script" not in text and text.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 15
    assert not page.handlers and not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*https?:""", text) and "url(" not in text


def test_trials_with_weights_by_layer_say_so(run: dict[str, Any], tmp_path: Path) -> None:
    assert "by layer" not in render_page(run, tmp_path)
    run["search"]["trials"][0]["rules"] = {"conv_in.*": [0.5, 0.0]}
    assert render_page(run, tmp_path).count('<th scope="row">zero, by layer') == 1


def test_images_are_embedded_and_decode(run: dict[str, Any], tmp_path: Path) -> None:
    page = Reader(render_page(run, tmp_path))
    kinds = []
    for address in (address for address in page.addresses if not address.startswith("#")):
        kind, data = re.fullmatch(r"data:image/(png|svg\+xml);base64,(.+)", address).groups()  # type: ignore[union-attr]
        raw = base64.b64decode(data, validate=True)
        kinds.append(kind)
        assert Image.open(io.BytesIO(raw)).format == "PNG" if kind == "png" else svg_size(raw)
    assert sorted(kinds) == ["png", "svg+xml", "svg+xml", "svg+xml", "svg+xml"]
    assert len(page.alts) == 5 and all(page.alts)


def test_the_page_says_what_the_run_says(run: dict[str, Any], tmp_path: Path) -> None:
    text = render_page(run, tmp_path)
    assert ">demonstration</span>" in text and "Without a control" in text and "2 min 05 s" in text
    assert '<tr class="best"><th scope="row">&lt;script' in text and ">6.100</td>" in text
    assert "<b>5.90</b><span> ± 0.10</span>" in text and "FD(digits-cnn) DDIM-50: extractor digits-cnn" in text
    assert "cannot be shown (no.npy" in text
    assert "demonstration</span>" not in render_page({**run, "demonstration": False}, tmp_path)


def test_the_page_shows_the_best_trials_and_folds_the_others(run: dict[str, Any], tmp_path: Path) -> None:
    trials = [{"weights": [0.1, i / 100], "source": f"trial {i:02d}", "value": 9.0 - i / 10} for i in range(14)]
    lost = "the search's gain <b> did not carry over to the report split"
    text = render_page({**run, "search": {**run["search"], "trials": trials}, "lost_gains": [lost]}, tmp_path)
    shown, folded = text.partition("<summary>4 more trials</summary>")[::2]
    assert re.findall(r"trial \d\d", shown) == [f"trial {i:02d}" for i in range(13, 3, -1)]
    assert re.findall(r"trial \d\d", folded) == [f"trial {i:02d}" for i in range(3, -1, -1)]
    assert text.count("(chosen)") == 1 and "trial 13 (chosen)</th>" in shown
    assert "The search&#39;s gain &lt;b&gt; did not carry over to the report split." in text
    few = render_page(run, tmp_path)
    assert "more trials" not in few and few.count("(chosen)") == 1


def test_any_key_may_be_missing(run: dict[str, Any], tmp_path: Path) -> None:
    sections = {
        "table": 'id="table"',
        "grids": 'id="samples"',
        "curves": 'id="curves"',
        "division": 'id="division"',
        "stages": "<h3>Stages",
        "provenance": "<h3>Versions",
        "merged_path": "<h3>Load",
        "command": "<h3>Run again",
        "recipe_yaml": "<details>",
        "search": "<h3>How they were found",
    }
    whole = render_page(run, tmp_path)
    for key in run:
        less = render_page({k: v for k, v in run.items() if k != key}, tmp_path)
        if key in sections:
            assert sections[key] in whole and sections[key] not in less, key
    assert "<section" not in render_page({}) and "<section" not in render_page(dict.fromkeys(run))


class Trap:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickled_grid_is_never_loaded(run: dict[str, Any], tmp_path: Path) -> None:
    trap = np.array([Trap(tmp_path / "sprung")], dtype=object)
    np.save(tmp_path / "base.npy", trap, allow_pickle=True)
    text = render_page(run, tmp_path)
    assert "image/png" not in text and "cannot be shown (base.npy" in text
    assert not (tmp_path / "sprung").exists()


def test_the_page_refuses_unlike_protocols(run: dict[str, Any]) -> None:
    run["table"][1]["metrics"][FD]["protocol"] = {**DDIM, "n": 100}
    with pytest.raises(UserError, match=re.escape(FD)):
        render_page(run)


def test_the_card_is_yaml_then_markdown(run: dict[str, Any]) -> None:
    card = model_card({**run, "base_model_hub": "google/ddpm-church-256"})
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "diffusers"
    assert yaml.safe_load(front)["base_model"] == "google/ddpm-church-256"
    parts = ("demonstration", verdict(run["table"]).sentence, "| merged | 0.4 | 0.1 |", "[6,12)", "2410.06664")
    assert all(part in body for part in parts)
    assert "from_pretrained(" in body and "| FD(digits-cnn) DDIM-50 ↓ | 6.34 ± 0.12 | **5.90 ± 0.10** |" in body
    assert body.index(verdict(run["table"]).sentence) < body.index("## Results")
    assert "base_model" not in model_card({**run, "base_model": "/data/mine"}).split("---\n")[1]


def test_a_card_of_nothing_is_still_a_card() -> None:
    card = model_card({})
    assert card.startswith("---\nlibrary_name: diffusers\n") and "## Use" in card and "## Results" not in card


def test_fences() -> None:
    assert fenced("a\n```\nb", "yaml") == "````yaml\na\n```\nb\n````"


def test_subsets_have_the_same_names_on_the_card_as_in_tables_and_logs() -> None:
    subsets = [[[0, 1], [2, 3], [4, 6]], [[0, 1], [2, 3], [4, 6], [8, 9]]]
    assert names_of(subsets) == ["[0,1)+[2,3)+[4,6)", "#1 5 timesteps in 4 runs"]
    card = model_card({"weights": {"merged": [0.5, 0.5]}, "division": {"subsets": subsets}})
    assert "| model | [0,1)+[2,3)+[4,6) | #1 5 timesteps in 4 runs |" in card


def test_seeds_that_differ_alike_conclude_nothing() -> None:
    rows = fd_rows(base=(6.0, 0.1), merged=(5.5, 0.1))
    for one in rows:
        mean = one["metrics"][FD]["mean"]
        one["metrics"][FD]["values"] = [mean - 0.1, mean, mean + 0.1]
    found = verdict(rows)
    assert (found.helps, found.comparisons[0].margin, found.comparisons[0].outcome) == (None, None, "alike")
    assert found.sentence == (
        f"merged has {FD} 5.50 ± 0.10 against base's 6.00 ± 0.10. "
        f"All 3 seeds differ alike in {FD}, which gives no interval to conclude from."
    )


def test_drawing_imports_no_torch() -> None:
    names = ", ".join(f"deme_diffusion.report.{name}" for name in ("tables", "verdict", "figures", "page", "card"))
    code = f"import sys, {names}; sys.exit('torch' in sys.modules or 'matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
