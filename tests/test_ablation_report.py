"""Verdicts of ablations: the paired interval by hand, a sentence for every outcome, tables that drop nothing, pages."""

import copy
import csv
import io
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image
from rich.console import Console

from ablations import DDIM, DDPM, FD, RECALL, ablation, arm, costs, experiment, figure, published, sampled
from deme_diffusion.division import Division, uniform
from deme_diffusion.report.ablation import rich_tables, verdicts, write_ablation
from deme_diffusion.report.ablation_effects import columns_of, compare
from deme_diffusion.report.ablation_text import to_csv, to_markdown
from deme_diffusion.report.cells import direction, ratio, signed
from deme_diffusion.report.page import render_page
from deme_diffusion.report.paired import holm, margin_of, p_value

ONE = "FD(digits-cnn) DDIM-20"


def only(content: dict[str, Any]) -> str:
    """The sentence of an experiment with one ablation."""
    (verdict,) = verdicts(content)
    return verdict.sentence


def with_fd(*values: float, label: str = "another", **more: Any) -> dict[str, Any]:
    """An arm measured by FD with one sampler."""
    return arm(label, metrics={DDIM: sampled(values), **costs(1.0, latency=1.0)}, **more)


def one_sampler(*ablations: dict[str, Any], **more: Any) -> dict[str, Any]:
    """An experiment whose baseline has FD with one sampler: 7.4, 7.5, 7.6."""
    content = experiment(*ablations, **more)
    del content["baseline"]["metrics"][DDPM]
    return content


# ---------------------------------------------------------------- statistics


def test_worked_example_of_the_paired_interval() -> None:
    # Differences 0.6, 0.8, 1.0: mean 0.8, s = 0.2, t(0.975; 2) = 4.302653, so the margin is 4.302653 * 0.2 / sqrt(3).
    by_hand = 4.302653 * 0.2 / math.sqrt(3)
    assert by_hand == pytest.approx(0.496828, abs=1e-6)
    content = one_sampler(ablation(with_fd(8.0, 8.3, 8.6), action="REMOVE", ablated_part="consistency loss"))
    (effect,) = verdicts(content)[0].arms[0].effects
    assert (effect.difference, effect.margin) == (pytest.approx(0.8), pytest.approx(by_hand, abs=1e-6))
    assert effect.p == pytest.approx(0.02021, abs=1e-5)  # t = 0.8 / (0.2 / sqrt(3)) = 6.928, and F(t; 2) in closed form
    assert effect.p == pytest.approx(1 - 6.928203 / math.sqrt(2 + 6.928203**2), abs=1e-7)
    assert only(content) == f'Removing "consistency loss" costs 0.80 ± 0.50 {ONE} (3 seeds).'
    assert "| 8.30 ± 0.30 | +0.80 ± 0.50 |" in to_markdown(content, verdicts(content))


def test_pairing_sees_what_the_spread_of_the_seeds_hides() -> None:
    unpaired = {**sampled([8.0, 8.3, 8.6])}
    del unpaired["values"]
    ours, theirs = {DDIM: sampled([8.05, 7.05, 9.06])}, {DDIM: sampled([8.0, 7.0, 9.0])}
    assert compare(DDIM, ours, theirs).outcome == "worse"
    loose = compare(DDIM, {DDIM: unpaired}, theirs)
    assert (loose.outcome, loose.p) == ("none", None)
    assert loose.margin == pytest.approx(math.hypot(0.3, 1.0))


def test_seeds_that_differ_are_not_paired() -> None:
    shifted = {**sampled([8.0, 8.3, 8.6]), "seeds": [1, 2, 3]}
    assert compare(DDIM, {DDIM: shifted}, {DDIM: sampled([7.4, 7.5, 7.6])}).p is None


def test_all_differences_alike_leave_no_doubt_and_none_at_all_leave_every() -> None:
    assert (margin_of([0.5, 0.5]), p_value([0.5, 0.5]), p_value([0.0, 0.0])) == (0.0, 0.0, 1.0)


def test_holm_stops_at_the_first_that_stands() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == [True, False, False, True]  # 0.03 > 0.05 / 2, though 0.04 < 0.05
    assert holm([]) == []


# ---------------------------------------------------------------- sentences


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([8.0, 8.3, 8.6], f"costs 0.80 ± 0.50 {ONE} (3 seeds)"),
        ([6.8, 6.7, 6.6], f"improves {ONE} by 0.80 ± 0.50 (3 seeds)"),
        ([7.3, 7.5, 7.62], f"makes no difference that 3 seeds can show ({ONE} \N{MINUS SIGN}0.03 ± 0.16)"),
        ([7.4, 7.5, 7.6], "gives the baseline's figures exactly, as the same model would"),
    ],
)
def test_what_a_removal_does(values: list[float], said: str) -> None:
    assert only(one_sampler(ablation(with_fd(*values), action="REMOVE"))) == f'Removing "timestep division" {said}.'


def test_higher_is_better_for_recall() -> None:
    asked = [{"asked": "recall", "columns": ["recall"], "reason": ""}]
    for values, said in (([0.51, 0.52, 0.54], "costs 0.097 ± 0.014 recall"), ([0.71, 0.72, 0.74], "improves recall")):
        one = ablation(arm("x", metrics={RECALL: sampled(values)}), action="ADD", metrics=asked)
        assert said in only(experiment(one))


def test_one_seed_concludes_nothing_and_shows_the_figures() -> None:
    content = one_sampler(ablation(with_fd(8.31, label="A"), with_fd(7.9, label="B")), seeds=[0])
    content["baseline"]["metrics"][DDIM] = sampled(7.51)
    said = f'one seed: nothing can be concluded ({ONE} "A" 8.31, "B" 7.90 against 7.51)'
    assert only(content) == f'Replacing "timestep division": {said}.'
    content["ablations"][0]["arms"].pop()
    assert f"nothing can be concluded ({ONE} 8.31 against 7.51)" in only(content)
    assert verdicts(content)[0].comparisons == 0


def test_what_is_asked_first_is_said_first() -> None:
    asked = [FD, {"asked": "recall", "columns": ["recall"], "reason": ""}]
    metrics = {DDIM: sampled([6.8, 6.7, 6.6]), RECALL: sampled([0.51, 0.52, 0.54])}
    for order in (asked, asked[::-1]):
        content = one_sampler(ablation(arm("x", metrics=metrics), metrics=order))
        said = only(content)
        assert (said.index("improves FD") < said.index("costs 0.097")) == (order == asked)


def test_the_best_replacement_is_named_and_ties_are_not_broken() -> None:
    clear = [with_fd(6.4, 6.5, 6.6 + 0.001, label="A"), with_fd(7.0, 7.1, 7.2 + 0.001, label="B")]
    worse = with_fd(8.0, 8.1, 8.2 + 0.001, label="C")
    said = only(one_sampler(ablation(*reversed(clear), worse)))
    assert said.startswith(
        f'Replacing "timestep division": best is "A", which improves {ONE} by 1.000 ± 0.001 (3 seeds)'
    )
    assert f'"B" improves {ONE} by 0.400' in said and f'"C" costs 0.600 ± 0.001 {ONE}' in said
    tied = with_fd(6.5, 6.4, 6.62, label="A'")
    said = only(one_sampler(ablation(clear[0], tied)))
    assert '"A" and "A\'" are best, and 3 seeds cannot tell them apart' in said


def test_no_best_where_nothing_improves() -> None:
    said = only(one_sampler(ablation(with_fd(8.0, 8.1, 8.3, label="A"), with_fd(7.3, 7.5, 7.62, label="B"))))
    assert "best" not in said
    assert said.index('"A" costs') < said.index('"B" makes no difference that 3 seeds can show')


def test_each_sampler_is_named_with_what_holds_in_it() -> None:
    merging, division = published()["ablations"]
    said = only(experiment(division))
    assert (
        f"improves {DDIM} by 0.49 ± 0.03 (3 seeds) and makes no difference that 3 seeds can show ({DDPM} 0.00" in said
    )
    assert f"costs 0.63 ± 0.14 {DDIM} and 0.98 ± 0.07 DDPM-50" in said
    assert f"({DDPM} +0.03 ± 0.29 and recall DDIM-20 \N{MINUS SIGN}0.010 ± 0.025)" in only(experiment(merging))


def test_a_run_without_merging_weighs_quality_against_cost() -> None:
    content = experiment(published()["ablations"][0])
    said = only(content)
    assert said.startswith(f'Removing "Model merging technique" costs 0.82 ± 0.09 {DDIM} (3 seeds)')
    assert said.endswith(
        "it needs 4.0x the parameters, 4.2x the disk, 2.3x the peak memory, 4.0x the load time; latency 0.98x."
    )
    text = to_markdown(content, verdicts(content))
    for shown in ("| 654,276 (4.0x) |", "(4.2x)", "(2.3x)", "45.2 ± 0.4 (4.0x)", "4.02 ± 0.12 (0.98x)"):
        assert shown in text


def test_costs_are_shown_only_where_asked_or_changed() -> None:
    plain = one_sampler(ablation(with_fd(8.0, 8.3, 8.6)))
    assert "parameters" not in to_markdown(plain, verdicts(plain)).split("## Protocols")[0]
    asked = [{"asked": "inference speed", "columns": ["latency (ms)"], "reason": ""}]
    quick = arm("fewer steps", metrics={DDIM: sampled([8.0, 8.3, 8.6]), **costs(latency=0.5)})
    content = one_sampler(ablation(quick, metrics=asked))
    assert f"costs 0.80 ± 0.50 {ONE} (3 seeds); it serves at latency 0.50x." in only(content)


def test_what_did_not_run_is_told_with_the_rest() -> None:
    said = only(experiment(published()["ablations"][1]))
    assert said.endswith(
        '"random assignment" failed; "uniform" is what the baseline does already;'
        ' "by phase of the moon" could not be carried out.'
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"status": "failed", "error": "out of memory"}, "failed, so nothing can be concluded: out of memory."),
        ({"status": "same_as_baseline", "reason": "it is off"}, "is what the baseline does already: it is off."),
        ({"status": "not_executable", "reason": "no such part"}, "was not carried out: no such part."),
        ({"status": "missing"}, "has not been run yet."),
    ],
)
def test_an_ablation_without_a_finished_arm_says_why(given: dict[str, Any], said: str) -> None:
    assert only(experiment(ablation(arm("x", **given), action="REMOVE"))) == f'Removing "timestep division" {said}'


def test_nothing_is_compared_that_was_measured_otherwise() -> None:
    content = one_sampler(ablation(with_fd(8.0, 8.3, 8.6)))
    content["ablations"][0]["arms"][0]["metrics"][DDIM]["protocol"]["extractor"] = "inception 2a"
    said = "measured with another extractor than the baseline"
    assert said in only(content) and "nothing can be concluded" in only(content)
    assert f"- n/a (another, {DDIM}): {said}" in to_markdown(content, verdicts(content))


def test_another_sampler_is_the_arms_change_and_is_told() -> None:
    content = one_sampler(ablation(with_fd(8.0, 8.3, 8.6, label="fewer steps")))
    content["ablations"][0]["arms"][0]["metrics"][DDIM]["protocol"]["steps"] = 5
    assert "costs 0.80 ± 0.50" in only(content)
    assert f"- fewer steps, {DDIM}: steps 5 instead of 20" in to_markdown(content, verdicts(content))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_figures_that_are_no_numbers_compare_to_nothing(value: float) -> None:
    broken = {**sampled([8.0, 8.3, 8.6]), "mean": value}
    effect = compare(DDIM, {DDIM: broken}, {DDIM: sampled([7.4, 7.5, 7.6])})
    assert (effect.outcome, effect.reason) == ("n/a", "the arm's value is not finite")


def test_a_baseline_without_figures_concludes_nothing() -> None:
    content = one_sampler(ablation(with_fd(8.0, 8.3, 8.6)))
    content["baseline"]["metrics"] = {}
    assert "nothing can be concluded (the baseline has no such figure)" in only(content)


def test_many_comparisons_are_counted_and_corrected() -> None:
    arms = [with_fd(8.0 + i / 100, 8.3, 8.6, label=f"arm {i}") for i in range(11)]
    arms.append(with_fd(9.4, 9.5, 9.6001, label="clear"))
    content = one_sampler(ablation(*arms))
    (verdict,) = verdicts(content)
    assert verdict.comparisons == 12
    assert verdict.sentence.endswith("(12 comparisons, each at 95%).")
    assert [a.label for a in verdict.arms if a.effects[0].survives] == ["clear"]
    text = to_markdown(content, [verdict])
    assert f'of them {DDIM} of "clear" (Ablation of the division) still does.' in text
    assert "Holm" not in to_markdown(one_sampler(ablation(arms[0])), verdicts(one_sampler(ablation(arms[0]))))


# ---------------------------------------------------------------- columns


def test_columns_are_what_is_asked_and_fd_where_nothing_can_be_given() -> None:
    content = experiment(ablation(with_fd(8.0, 8.3, 8.6)))
    given = content["ablations"][0]
    clip = {"asked": "CLIP Score", "columns": [], "reason": "digits has no captions"}
    assert columns_of(content, given).quality == (DDIM, DDPM)
    none = columns_of(content, {**given, "metrics": [clip]})
    assert (none.quality, none.missing) == ((DDIM, DDPM), (("CLIP Score", "digits has no captions"),))
    assert columns_of(content, {**given, "metrics": []}).quality == (DDIM, DDPM)
    loss = columns_of(content, {**given, "metrics": [{"asked": "loss", "columns": ["loss"], "reason": ""}, FD]})
    assert (loss.quality, loss.primary) == (("loss", DDIM, DDPM), ("loss",))


def test_losses_by_range_are_in_the_table_and_the_overall_one_in_the_sentence() -> None:
    metrics = {name: figure([0.08, 0.0802, 0.0801]) for name in ("loss", "loss [0,250)", "loss [250,500)")}
    asked = [{"asked": "loss", "columns": ["loss"], "reason": ""}]
    content = experiment(ablation(arm("x", metrics=metrics), metrics=asked))
    content["baseline"]["metrics"] |= {n: figure([0.07, 0.0702, 0.0702]) for n in ("loss [0,250)", "loss [250,500)")}
    assert verdicts(content)[0].columns.quality == tuple(metrics)
    start = 'Replacing "timestep division" by "x"'
    assert only(content) == f"{start} improves loss by 0.00110 ± 0.00025 (3 seeds)."


def test_a_metric_that_the_recipe_cannot_give_is_not_applicable_with_its_reason() -> None:
    content = published()
    assert "- CLIP Score: n/a (digits has no captions)" in to_markdown(content, verdicts(content))


# ---------------------------------------------------------------- files


def test_everything_that_was_planned_is_in_the_markdown() -> None:
    content = published()
    text = to_markdown(content, verdicts(content))
    for said in (
        "| base |",
        "| baseline |",
        "| overlapping ranges | decouple.division=overlapping | 7.01 ± 0.10 | \N{MINUS SIGN}0.49 ± 0.03 |",
        "| random assignment | decouple.num_ranges=2 | failed: MachineError: out of memory |",
        "- uniform: the same as the baseline: the recipe's division is uniform",
        "- by phase of the moon: not executable: no division fits (nearest: log-SNR, uniform)",
        "- line 7: no action",
        "Training steps: 4,800, 7,200 for independent runs (0.67 of it).",
    ):
        assert said in text
    widths = {line.count(" |") for line in text.splitlines() if line.startswith("| ") and "DDIM" in line}
    rows = [line.count(" |") for line in text.splitlines() if line.startswith(("| random", "| overlapping"))]
    assert set(rows) <= widths


def test_csv_has_full_precision_and_every_arm() -> None:
    content = published()
    lines = list(csv.DictReader(io.StringIO(to_csv(content, verdicts(content)))))
    assert {line["arm"] for line in lines} == {"base", "baseline", "removed", "overlapping ranges", "random boundaries",
                                               "random assignment", "uniform", "by phase of the moon"}  # fmt: skip
    (line,) = [line for line in lines if line["arm"] == "overlapping ranges" and line["metric"] == DDIM]
    effect = verdicts(content)[1].arms[0].of(DDIM)
    assert effect is not None
    assert (float(line["difference"]), float(line["margin"])) == (effect.difference, effect.margin)
    assert json.loads(line["change"]) == {"decouple.division": "overlapping"}
    assert [line["reason"] for line in lines if line["status"] == "failed"] == ["MachineError: out of memory"]
    (parameters,) = [line for line in lines if line["arm"] == "removed" and line["metric"] == "parameters"]
    assert float(parameters["times_baseline"]) == 4.0


def test_the_terminal_has_the_same_cells_within_80_columns() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    for table in rich_tables(published()):
        console.print(table)
    text = console.export_text()
    for said in ("8.32 ± 0.13", "+0.82 ± 0.09", "654,276 (4.0x)", "failed: MachineError: out of memory", "nearest:"):
        assert said in text
    assert max(map(len, text.splitlines())) <= 80


def test_all_files_are_written_and_the_sentences_returned(tmp_path: Path) -> None:
    content = published()
    assert write_ablation(tmp_path, content) == [one.sentence for one in verdicts(content)]
    assert {path.name for path in tmp_path.iterdir()} == {"ablation.md", "ablation.csv", "effects.svg", "effects.png",
                                                          "report.html"}  # fmt: skip
    ElementTree.fromstring((tmp_path / "effects.svg").read_bytes())
    with Image.open(tmp_path / "effects.png") as picture:
        assert picture.size[0] > 1000
    first = (tmp_path / "effects.svg").read_bytes()
    write_ablation(tmp_path, json.loads(json.dumps(content)))
    assert (tmp_path / "effects.svg").read_bytes() == first


def test_an_experiment_of_which_nothing_ran_still_has_all_files(tmp_path: Path) -> None:
    content = experiment(ablation(arm("x", status="not_executable", reason="no such part"), part=None))
    assert "no such part" in write_ablation(tmp_path, content)[0]
    assert "no such part" in (tmp_path / "report.html").read_text()


# ---------------------------------------------------------------- the page


class Tags(HTMLParser):
    """Every tag and attribute of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


HOSTILE = '<script>alert(1)</script>"><img src=x onerror=alert(2)>{{ 7 * 7 }}\x1b[31m| $x$ **b**'


def hostile(content: dict[str, Any]) -> dict[str, Any]:
    """Every text of the plan replaced by an attack."""
    content = copy.deepcopy(content)
    for key in ("plan", "discussion", "recipe"):
        content[key] = HOSTILE
    for one in content["ablations"]:
        one |= {"name": HOSTILE, "ablated_part": HOSTILE}
        one["metrics"].append({"asked": HOSTILE, "columns": [], "reason": HOSTILE})
        for given in one["arms"]:
            given |= {"label": HOSTILE, "replacement": HOSTILE, "reason": HOSTILE, "nearest": [HOSTILE]}
            given["error"] = HOSTILE if given["status"] == "failed" else None
    content["problems"] = [{"line": 1, "what": HOSTILE}]
    return content


def test_text_of_a_plan_stays_text_everywhere(tmp_path: Path) -> None:
    content = hostile(published())
    sentences = write_ablation(tmp_path, content)
    page = Tags((tmp_path / "report.html").read_text())
    assert "<script>alert(1)</script>" in page.text and "{{ 7 * 7 }}" in page.text
    assert not [tag for tag, _ in page.tags if tag == "script"]
    sources = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert sources and all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    ElementTree.fromstring((tmp_path / "effects.svg").read_bytes())
    text = (tmp_path / "ablation.md").read_text()
    assert "<script" not in text and "<img" not in text
    assert not any("\x1b" in said for said in (*sentences, text))
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(*rich_tables(content))
    assert "\x1b" not in console.export_text(styles=False)


def test_a_run_page_has_a_section_for_each_experiment() -> None:
    page = Tags(render_page({"recipe": "digits", "ablations": [published(), experiment(plan="second")]}))
    assert "Ablations: gpt-4o" in page.text and "Ablations: second" in page.text
    assert verdicts(published())[0].sentence in page.text
    assert "failed: MachineError: out of memory" in page.text
    assert "Ablations" not in Tags(render_page({"recipe": "digits"})).text


def test_arms_that_change_the_division_are_drawn_beside_the_baseline() -> None:
    content = published()
    pictures = [a.get("alt") or "" for tag, a in Tags(render_page({"ablations": [content]})).tags if tag == "img"]
    assert not any("division of the timesteps" in alt for alt in pictures)
    halves = uniform(2, 1000)
    both = Division(member=halves.member | halves.member[::-1], route=halves.route)
    content["ablations"][1]["arms"][0]["division"] = both.as_dict()
    pictures = [a.get("alt") or "" for tag, a in Tags(render_page({"ablations": [content]})).tags if tag == "img"]
    drawn = [alt.removeprefix("The division of the timesteps of ") for alt in pictures if "of the timesteps of" in alt]
    assert drawn == ["baseline", "overlapping ranges"]


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize(
    ("value", "said"), [(4.0, "4.0x"), (0.98, "0.98x"), (12.3, "12x"), (1.0, "1.00x"), (1.09, "1.09x"), (9.97, "10x")]
)
def test_ratios_read_well(value: float, said: str) -> None:
    assert ratio(value) == said


def test_differences_have_signs_but_zero_has_none() -> None:
    assert [signed(v, None, 2) for v in (0.8, -0.034, -0.001, 0.0)] == ["+0.80", "\N{MINUS SIGN}0.03", "0.00", "0.00"]
    assert signed(-1234.5, 10.0, 1) == "\N{MINUS SIGN}1,234.5 ± 10.0"


def test_less_time_to_load_is_better() -> None:
    assert direction("load time (ms)") == "lower"
