"""Verdicts of ablations: the paired interval by hand, a sentence for every outcome, tables that drop nothing, pages."""

import copy
import csv
import io
import json
import math
import statistics
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image
from rich.console import Console

from ablations import DDIM, DDPM, FD, RECALL, ablation, arm, costs, experiment, figure, published, sampled
from deme_diffusion.division import Division, uniform
from deme_diffusion.report import ablation_page, figures
from deme_diffusion.report.ablation import rich_tables, verdicts, write_ablation
from deme_diffusion.report.ablation_costs import steps_of
from deme_diffusion.report.ablation_effects import columns_of, compare, score_of
from deme_diffusion.report.ablation_text import to_csv, to_markdown
from deme_diffusion.report.album import Album
from deme_diffusion.report.cells import difference_said, direction, ratio, signed
from deme_diffusion.report.figures import division_picture
from deme_diffusion.report.page import render_page
from deme_diffusion.report.paired import holm, margin_of, p_value

ONE = "FD(digits-cnn) DDIM-20"
SCORE = "FD(digits-cnn)"


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
    assert (loose.outcome, loose.margin, loose.p) == ("n/a", None, None)
    assert "no two seeds with values in common" in loose.reason


def test_only_the_seeds_of_both_are_compared() -> None:
    theirs = {DDIM: sampled([7.4, 7.5, 7.6])}
    shifted = {**sampled([8.3, 8.6, 99.0]), "seeds": [1, 2, 3]}  # of seeds 1 and 2: 8.3 - 7.5 and 8.6 - 7.6
    effect = compare(DDIM, {DDIM: shifted}, theirs)
    assert (effect.seeds, effect.difference) == (2, pytest.approx(0.9))
    assert effect.margin == pytest.approx(12.706205 * statistics.stdev([0.8, 1.0]) / math.sqrt(2), abs=1e-5)
    assert compare(DDIM, {DDIM: {**shifted, "seeds": [2, 3, 4]}}, theirs).outcome == "n/a"


@pytest.mark.parametrize("differences", [[0.5, 0.5], [0.62 - 0.61, 0.61 - 0.60], [0.0, 0.0]])
def test_differences_that_are_all_alike_have_no_interval(differences: list[float]) -> None:
    assert (margin_of(differences), p_value(differences)) == (None, None)


def test_seeds_that_differ_alike_by_chance_are_no_finding() -> None:
    recall = arm("x", metrics={RECALL: sampled([0.60, 0.61, 0.62])})
    asked = [{"asked": "recall", "columns": ["recall"], "reason": ""}]
    content = experiment(ablation(recall, action="REMOVE", metrics=asked))
    (verdict,) = verdicts(content)
    (effect,) = verdict.arms[0].effects
    assert (effect.outcome, effect.margin, effect.p, effect.survives) == ("alike", None, None, False)
    assert verdict.comparisons == 0
    said = f"gives no interval, as all 3 seeds differ alike ({RECALL} \N{MINUS SIGN}0.010)"
    assert verdict.sentence == f'Removing "timestep division" {said}.'
    assert "| 0.610 ± 0.010 | \N{MINUS SIGN}0.010 |" in to_markdown(content, [verdict])


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


def test_one_seed_with_an_equal_value_is_not_the_same_model() -> None:
    asked = [{"asked": "recall", "columns": ["recall"], "reason": ""}]
    given = arm("x", metrics={RECALL: sampled(0.61), DDIM: sampled(7.9), "loss": figure(0.0812)})
    content = experiment(ablation(given, action="REMOVE", metrics=asked), seeds=[0])
    content["baseline"]["metrics"] |= {RECALL: sampled(0.61), DDIM: sampled(7.5), "loss": figure(0.0812)}
    assert f"one seed: nothing can be concluded ({RECALL} 0.610 against 0.610)." in only(content)
    given["metrics"][DDIM] = sampled(7.5)
    assert "gives the baseline's figures exactly, as the same model would" in only(content)


def test_seeds_with_equal_values_of_a_score_are_not_the_same_model() -> None:
    asked = [{"asked": "recall", "columns": ["recall"], "reason": ""}]
    given = arm("x", metrics={RECALL: sampled([0.61, 0.62, 0.63]), DDIM: sampled([7.9, 8.0, 8.1])})
    assert f"leaves {RECALL} exactly as it is." in only(experiment(ablation(given, action="REMOVE", metrics=asked)))


def test_fd_is_said_first_in_whatever_order_it_is_asked() -> None:
    asked = [FD, {"asked": "recall", "columns": ["recall"], "reason": ""}]
    metrics = {DDIM: sampled([6.8, 6.7, 6.6]), RECALL: sampled([0.51, 0.52, 0.54])}
    for order in (asked, asked[::-1]):
        content = one_sampler(ablation(arm("x", metrics=metrics), metrics=order))
        said = only(content)
        assert said.index("improves FD") < said.index("costs 0.097")


def test_the_best_replacement_is_named_and_ties_are_not_broken() -> None:
    clear = [with_fd(6.4, 6.5, 6.6 + 0.001, label="A"), with_fd(7.0, 7.101, 7.2 + 0.001, label="B")]
    worse = with_fd(8.0, 8.102, 8.2 + 0.001, label="C")
    said = only(one_sampler(ablation(*reversed(clear), worse)))
    assert said.startswith(
        f'Replacing "timestep division": best is "A", which improves {ONE} by 0.9997 ± 0.0014 (3 seeds)'
    )
    assert f'"B" improves {ONE} by 0.399' in said and f'"C" costs 0.6010 ± 0.0025 {ONE}' in said
    tied = with_fd(6.5, 6.4, 6.62, label="A'")
    said = only(one_sampler(ablation(clear[0], tied)))
    assert "best" not in said and '"A" improves' in said and '3 seeds cannot tell "A\'" from it; "A\'" improves' in said


def test_an_arm_is_not_best_while_the_seeds_cannot_tell_another_from_it() -> None:
    unsure = with_fd(5.0, 9.1, 6.4, label="unsure")  # no difference to the baseline shown, and none to A either
    said = only(one_sampler(ablation(with_fd(6.4, 6.5, 6.601, label="A"), unsure)))
    assert "best" not in said
    assert f'"A" improves {ONE} by' in said and '; 3 seeds cannot tell "unsure" from it;' in said


def both_samplers(label: str, ddim: list[float], ddpm: list[float]) -> dict[str, Any]:
    """An arm measured with both samplers."""
    return arm(label, metrics={DDIM: sampled(ddim), DDPM: sampled(ddpm, "DDPMScheduler", 50)})


@pytest.mark.parametrize(
    ("ddpm", "said"),
    [
        ([4.0, 4.2, 4.101], 'best is "A", which improves'),
        ([6.0, 6.2, 6.101], f'best in {DDIM} is "A", which improves'),  # worse than the baseline in the other
        ([5.0, 5.2, 5.101], f'best in {DDIM} is "A", which improves'),  # as good as the baseline in the other
    ],
)
def test_best_is_said_of_the_samplers_in_which_it_holds(ddpm: list[float], said: str) -> None:
    arms = both_samplers("A", [6.4, 6.5, 6.601], ddpm), both_samplers("B", [7.0, 7.101, 7.2], [7.0, 7.201, 7.102])
    assert f'Replacing "timestep division": {said}' in only(experiment(ablation(*arms)))


def test_no_best_where_nothing_improves() -> None:
    said = only(one_sampler(ablation(with_fd(8.0, 8.1, 8.3, label="A"), with_fd(7.3, 7.5, 7.62, label="B"))))
    assert "best" not in said
    assert said.index('"A" costs') < said.index('"B" makes no difference that 3 seeds can show')


def test_each_sampler_is_named_with_what_holds_in_it() -> None:
    merging, division = published()["ablations"]
    said = only(experiment(division))
    assert (
        f"improves {DDIM} by 0.493 ± 0.029 (3 seeds) and makes no difference that 3 seeds can show ({DDPM} 0.00" in said
    )
    assert f"costs 0.63 ± 0.14 {DDIM} and 0.983 ± 0.072 DDPM-50" in said
    assert f"({DDPM} +0.03 ± 0.29 and recall DDIM-20 \N{MINUS SIGN}0.010 ± 0.025)" in only(experiment(merging))


def test_a_run_without_merging_weighs_quality_against_cost() -> None:
    content = experiment(published()["ablations"][0])
    said = only(content)
    assert said.startswith(f'Removing "Model merging technique" costs 0.821 ± 0.092 {DDIM} (3 seeds)')
    assert said.endswith(
        "it needs 4.0x the parameters, 4.2x the disk, 2.3x the peak memory, 4.0x the load time;"
        " latency per image not told apart."
    )
    text = to_markdown(content, verdicts(content))
    for shown in ("| 654,276 (4.0x) |", "(4.2x)", "(2.3x)", "45.2 ± 0.4 (4.0x)", "| 4.02 ± 0.12 |"):
        assert shown in text


def test_costs_are_shown_only_where_asked_or_changed() -> None:
    plain = one_sampler(ablation(with_fd(8.0, 8.3, 8.6)))
    assert "parameters" not in to_markdown(plain, verdicts(plain)).split("## Protocols")[0]
    asked = [{"asked": "inference speed", "columns": ["latency (ms)"], "reason": ""}]
    quick = arm("fewer steps", metrics={DDIM: sampled([8.0, 8.3, 8.6]), **costs(latency=1.01, sampler="DDIM-10")})
    content = one_sampler(ablation(quick, metrics=asked))
    assert f"costs 0.80 ± 0.50 {ONE} (3 seeds); it serves at latency per image 0.51x." in only(content)
    assert "| 4.14 ± 0.12 (0.51x per image) |" in to_markdown(content, verdicts(content))
    content["ablations"][0]["metrics"] = [FD]  # another number of steps is a cost that nobody needs to ask for
    assert "it serves at latency per image 0.51x." in only(content)


def test_noise_in_times_is_no_cost() -> None:
    slow = costs(latency=1.2)  # 4.92 ± 0.12 against 4.1 ± 0.12, of the same architecture
    slow["load time (ms)"]["mean"] *= 1.5
    asked = [{"asked": "inference speed", "columns": ["latency (ms)"], "reason": ""}]
    content = one_sampler(ablation(arm("x", metrics={DDIM: sampled([8.0, 8.3, 8.6]), **slow}), metrics=asked))
    said = "it has no cost of serving to tell: parameters, disk and sampler are the baseline's."
    assert only(content).endswith(f"(3 seeds); {said}")
    text = to_markdown(content, verdicts(content))
    assert "| 4.92 ± 0.12 |" in text and "1.2x" not in text and "1.5x" not in text
    larger = {DDIM: sampled([8.0, 8.3, 8.6]), **costs(4.0, latency=1.05)}  # 4.305 - 4.1 < 0.12 + 0.12
    content = one_sampler(ablation(arm("x", metrics=larger)))
    assert only(content).endswith("4.0x the load time; latency per image not told apart.")
    larger |= {"latency (ms)": {**larger["latency (ms)"], "mean": 4.1 + 0.25}}
    content = one_sampler(ablation(arm("x", metrics=larger)))
    assert only(content).endswith("4.0x the load time, 1.06x the latency per image.")


@pytest.mark.parametrize(
    ("label", "steps"),
    [("DDIM-20", 20), ("DDIM-20-eta0.5-trailing", 20), ("HeunDiscrete-10", 19), ("PNDM-50", None), ("", None)],
)
def test_steps_of_a_sampler_by_its_label(label: str, steps: int | None) -> None:
    assert steps_of(label) == steps


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
    assert f"0.50 {SCORE} with DDIM-5 in place of DDIM-20 (3 seeds)" in only(content)
    text = to_markdown(content, verdicts(content))
    assert "| 8.30 ± 0.30\\* | +0.80 ± 0.50 |" in text
    assert text.index("8.30") < text.index("\\* sampled by DDIM-5 in place of DDIM-20\n")
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(*rich_tables(content))
    assert "\n* sampled by DDIM-5 in place of DDIM-20\n" in console.export_text()


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


def losses(*overall: float, first: list[float]) -> dict[str, Any]:
    """An arm measured by FD, the loss and the loss of a range."""
    return {DDIM: sampled([7.3, 7.5, 7.62]), "loss": figure(overall), "loss [0,250)": figure(first)}


LOSS = {"asked": "loss", "columns": ["loss"], "reason": ""}


def test_no_arm_is_without_difference_of_which_the_table_shows_one() -> None:
    given = arm("0.9", metrics=losses(0.08122, 0.08129, 0.08111, first=[0.0698, 0.07001, 0.0700]))
    for arms in ([given], [given, with_fd(7.3, 7.5, 7.62, label="0.5")]):
        content = one_sampler(ablation(*arms, metrics=[LOSS, FD]))
        content["baseline"]["metrics"]["loss [0,250)"] = figure([0.07, 0.0702, 0.0702])
        said = only(content)
        assert "differs only in loss [0,250) (better by 0.000197 ± 0.000014)" in said
        assert f"and makes no other difference that 3 seeds can show ({ONE} \N{MINUS SIGN}0.03 ± 0.16 and loss" in said


def test_the_loss_is_told_of_each_of_several_arms_where_it_is_asked() -> None:
    better = losses(0.0801, 0.0802, 0.08001, first=[0.07, 0.07, 0.07])
    said = only(one_sampler(ablation(arm("A", metrics=better), with_fd(8.0, 8.3, 8.6, label="B"), metrics=[LOSS, FD])))
    assert '"A" improves loss by 0.001097 ± 0.000014' in said and f"({ONE} \N{MINUS SIGN}0.03 ± 0.16)" in said
    assert f'"B" costs 0.80 ± 0.50 {ONE}' in said


def test_of_many_arms_three_are_told_and_costs_of_those_with_other_parameters() -> None:
    arms = [arm(f"arm {i}", metrics={DDIM: sampled([7.3, 7.5, 7.62]), **costs(latency=2.0)}) for i in range(8)]
    arms[5]["metrics"] |= costs(4.0)
    said = only(one_sampler(ablation(*arms)))
    assert said.count("makes no difference") == 3
    assert "; 5 more in the table, without a difference that 3 seeds can show;" in said
    assert said.count("needs") == 1 and '"arm 5" needs 4.0x the parameters' in said


@pytest.mark.parametrize("values", [[8.31], [8.0, 8.3, 8.6]])
def test_the_one_finished_arm_of_several_is_named(values: list[float]) -> None:
    content = one_sampler(ablation(with_fd(*values, label="small"), arm("huge", status="failed", error="x")))
    if len(values) == 1:
        content["baseline"]["metrics"][DDIM] = sampled(7.51)
    assert ('"small" 8.31 against 7.51' if len(values) == 1 else ': "small" costs 0.80') in only(content)


def test_one_seed_with_another_sampler_names_it() -> None:
    one = arm("6 steps", metrics={DDIM: sampled(8.31, "DPMSolverMultistepScheduler", 6)})
    content = one_sampler(ablation(one), seeds=[0])
    content["baseline"]["metrics"][DDIM] = sampled(7.51)
    assert "8.31 with DPM-Solver++-6 against 7.51" in only(content)


def test_differences_have_digits_of_their_own() -> None:
    assert difference_said(0.0000213, 0.0000018) == "+0.0000213 ± 0.0000018"
    assert difference_said(43.53 - 42.57, None) == "+0.96"
    assert difference_said(-0.0000213, None) == "\N{MINUS SIGN}0.000021"
    assert [difference_said(0.0, None), difference_said(0.2, 140.0)] == ["0", "0 ± 140"]


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
    assert (loss.quality, loss.primary) == (("loss", DDIM, DDPM), (DDIM, DDPM))


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


@pytest.mark.parametrize(
    ("metric", "score"),
    [
        ("FD(digits-cnn, lsun x) DDIM-20", "FD(digits-cnn, lsun x)"),
        ("recall DDIM-20", "recall"),
        ("loss", "loss"),
        ("loss [0,250)", "loss"),
        ("loss #0 250 timesteps in 190 runs", "loss"),
    ],
)
def test_a_metric_is_a_score_and_a_sampler_or_range(metric: str, score: str) -> None:
    assert score_of(metric) == score


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("start", ["=", "+", "-", "@"])
def test_no_text_of_the_csv_is_a_formula(start: str) -> None:
    given = with_fd(6.8, 6.7, 6.6, label=f"{start}2+3")
    content = one_sampler(ablation(given, name=f"{start}SUM(A1)"))
    lines = list(csv.DictReader(io.StringIO(to_csv(content, verdicts(content)))))
    (line,) = [line for line in lines if line["arm"] == f"'{start}2+3" and line["metric"] == DDIM]
    assert line["ablation"] == f"'{start}SUM(A1)"
    assert float(line["difference"]) == pytest.approx(-0.8)


def test_everything_that_was_planned_is_in_the_markdown() -> None:
    content = published()
    text = to_markdown(content, verdicts(content))
    for said in (
        "| base |",
        "| baseline |",
        "| overlapping ranges | decouple.division=overlapping | 7.01 ± 0.10 | \N{MINUS SIGN}0.493 ± 0.029 |",
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
    for said in ("8.32 ± 0.13", "+0.821 ± 0.092", "654,276 (4.0x)", "failed: MachineError: out of memory", "nearest:"):
        assert said in text
    assert max(map(len, text.splitlines())) <= 80


def test_reasons_are_as_wide_as_the_terminal_where_no_arm_ran() -> None:
    reason = "no setting of a recipe is an attention map, and none comes near it"
    content = experiment(ablation(arm("x", status="not_executable", reason=reason), name="Ablation"))
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(*rich_tables(content))
    assert f"x: not executable: {reason}\n" in console.export_text()


def test_samplers_are_named_in_the_change_and_settings_break_after_their_signs(tmp_path: Path) -> None:
    given = with_fd(8.0, 8.3, 8.6, change={"evaluate.samplers": [
        {"name": "DPMSolverMultistepScheduler", "num_inference_steps": 20, "eta": 0.0, "timestep_spacing": None}
    ]})  # fmt: skip
    content = one_sampler(ablation(given))
    said = "evaluate.samplers=[DPMSolverMultistepScheduler-20]"
    assert "DPMSolverMultistepScheduler-20" in to_markdown(content, verdicts(content))
    write_ablation(tmp_path, content)
    page = (tmp_path / "report.html").read_text()
    assert said.replace(".", ".<wbr>").replace("=", "=<wbr>") in page


def test_versions_are_pairs_on_the_page() -> None:
    given = {"python": "3.11", "versions": {"torch": "2.9", "numpy": None}, "git": None}
    page = render_page({"recipe": "digits", "provenance": given})
    assert "<dt>versions</dt><dd>torch 2.9</dd>" in page
    assert "<dt>python</dt><dd>3.11</dd>" in page and "<dt>git</dt>" not in page


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


@pytest.mark.parametrize("text", ["[bold red]x", "[/]", "a :warning:", "[link=file:///x]y[/link]"])
def test_markup_in_a_plan_is_text_in_the_terminal(text: str) -> None:
    content = one_sampler(ablation(with_fd(8.0, 8.3, 8.6, label=text), name=text))
    console = Console(width=100, file=io.StringIO())
    console.print(*rich_tables(content))
    assert console.file.getvalue().count(text) == 4  # type: ignore[attr-defined]


def test_equal_divisions_are_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def counted(member: Any, route: Any) -> bytes:
        drawn.append(len(member))
        return division_picture(member, route)

    monkeypatch.setattr(figures, "division_picture", counted)
    arms = [arm("halves", division=uniform(2, 997)), arm("thirds", division=uniform(3, 997))]
    content = experiment(*(ablation(*arms, name=f"ablation {i}") for i in range(4)))
    content["baseline"]["division"] = uniform(4, 997).as_dict()
    parts = ablation_page.ablation_section(content, Album())["parts"]
    assert [len(part["divisions"]) for part in parts] == [3, 3, 3, 3]
    assert sorted(drawn) == [2, 3, 4]


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
