"""The offline planner: what is done, what was measured, the ranking by it, and a plan that `deme ablate` runs whole."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import test_cli
from deme_diffusion.ablate import read_plan
from deme_diffusion.ablate.opening import compared, open_experiment
from deme_diffusion.ablate.reading import read_text
from deme_diffusion.ablate.resolve import resolve
from deme_diffusion.config import Recipe
from deme_diffusion.planner import ranking
from deme_diffusion.planner.candidates import asked, in_words, missing
from deme_diffusion.planner.evidence import Measured, read_evidence
from deme_diffusion.planner.offline import propose
from deme_diffusion.planner.ranking import Candidate, choose, score, standing
from deme_diffusion.recipes import Loaded, changed, to_yaml
from deme_diffusion.report.ablation_effects import Effect
from test_cli import Deme, write_recipe

deme = test_cli.deme  # the fixture
TIES = {"merge.method": "ties", "merge.search": "none"}
NO_CONSISTENCY = {"decouple.consistency_weight": 0.0}


def figure(values: Sequence[float]) -> dict[str, Any]:
    mean = sum(values) / len(values)
    spread = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5 if len(values) > 1 else None
    found = {"mean": mean, "spread": spread, "n": 16, "seeds": list(range(len(values))), "protocol": {}}
    return found | ({"values": list(values)} if len(values) > 1 else {})


def arm(change: dict[str, Any], values: Sequence[float], *, status: str = "done", label: str = "arm") -> dict[str, Any]:
    done = status == "done"
    return {
        "replacement": label,
        "label": label,
        "change": change,
        "status": status,
        "error": None if done else "out of luck",
        "metrics": {"FD(x) DDIM-2": figure(values)} if done else {},
    }


def write_ablations(
    folder: Path,
    recipe: Recipe,
    arms: dict[str, list[dict[str, Any]]],
    baseline: Sequence[float] = (10.0, 10.2),
    seeds: Sequence[int] = (),
) -> Path:
    """An experiment's folder as `deme ablate` leaves it, with arms by part."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(to_yaml(compared(recipe)))
    content = {
        "recipe": recipe.name,
        "seeds": list(seeds or range(len(baseline))),
        "baseline": {"metrics": {"FD(x) DDIM-2": figure(baseline)}},
        "ablations": [{"name": part, "part": part, "arms": of_part} for part, of_part in arms.items()],
    }
    (folder / "ablation.json").write_text(json.dumps(content))
    return folder


def measured(relative: float, margin: float | None, *, same: bool = True, part: str = "p") -> Measured:
    effect = Effect("FD", "none", 10 * relative, None if margin is None else 10 * margin, 3)
    return Measured("r", same, part, "arm", {}, "done", (0, 1, 2), "t", "", effect, 10.0)


def candidate(part: str, *, cost: float = 0.0, name: str = "x") -> Candidate:
    return Candidate(part, "REPLACE", name, frozenset([f"{part} {name}"]), int(100 * cost), cost)


# the score


def test_the_score_is_size_times_novelty_over_cost_as_worked_by_hand() -> None:
    known = standing("p", [measured(0.4, 0.3)])
    # reliability .16 / (.16 + .09) = .64; size (.05 + .64 x .4) / 1.64; novelty 1/2; cost 1
    assert known.size == pytest.approx((0.05 + 0.256) / 1.64)
    assert score(candidate("p", cost=1.0), known) == pytest.approx((0.05 + 0.256) / 1.64 / 2 / 2)
    assert score(candidate("q"), standing("q", [measured(0.4, 0.3)])) == ranking.PRIOR


def test_an_effect_counts_by_its_interval_its_baseline_and_its_seeds() -> None:
    sizes = [
        standing("p", [one]).size
        for one in (measured(0.4, 0.0), measured(0.4, 0.1), measured(0.4, 0.1, same=False), measured(0.4, 2.0))
    ]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
    assert standing("p", [measured(0.4, None)]).size == pytest.approx((0.05 + 0.25 * 0.4) / 1.25)
    assert standing("p", [measured(0.0, 0.001)]).size == pytest.approx(0.025, rel=1e-3)  # measured to do nothing
    assert standing("p", [measured(50.0, 0.0)]).size <= 1.0  # a ruined model is no better an argument than a bad one


def test_the_choice_takes_no_arm_twice_and_spreads_over_parts() -> None:
    twice = Candidate("a", "REPLACE", "both", frozenset(["a x", "a y"]), 0, 0.0)
    dear = candidate("a", name="dear", cost=9.0)
    chosen = choose([twice, candidate("a"), dear, candidate("b", cost=0.5)], [], 4)
    assert [[c.replacement for c in choice.candidates] for choice in chosen] == [["both"], ["x"], ["dear"]]
    assert [choice.part for choice in chosen] == ["a", "b", "a"]
    failing = replace(candidate("a"), failed="why")
    assert choose([failing, candidate("b", cost=0.5)], [], 1)[0].part == "b"


def test_a_choice_that_cannot_be_run_is_left_out() -> None:
    chosen = choose([candidate("a"), candidate("b")], [], 2, lambda choice: choice if choice.part == "b" else None)
    assert [choice.part for choice in chosen] == ["b"]


# what is on disk


def test_done_is_the_same_baseline_with_as_many_seeds_and_all_else_is_evidence(
    tmp_path: Path, pico_recipe: Recipe
) -> None:
    two = pico_recipe.model_copy(update={"seeds": (0, 1)})
    other = changed(two, {"decouple.learning_rate": 0.5})
    write_ablations(tmp_path / "pico/ablations/a", pico_recipe, {"merge method": [arm(TIES, [11.0, 11.2])]})
    write_ablations(tmp_path / "z/ablations/a", other, {"consistency loss": [arm(NO_CONSISTENCY, [15.0, 15.5])]})
    found = read_evidence(tmp_path, two)
    assert [(one.part, one.same) for one in found] == [("merge method", True), ("consistency loss", False)]
    assert found[0].effect and found[0].effect.difference == pytest.approx(1.0)
    assert found[0].relative == pytest.approx(1.0 / 10.1)

    names = {(one.part, one.replacement) for one in missing(two, found)}
    assert ("merge method", "TIES") not in names and ("consistency loss", None) in names
    three = pico_recipe.model_copy(update={"seeds": (0, 1, 2)})
    assert ("merge method", "TIES") in {(o.part, o.replacement) for o in missing(three, read_evidence(tmp_path, three))}


def test_done_is_with_the_recipes_own_seeds(tmp_path: Path, pico_recipe: Recipe) -> None:
    write_ablations(
        tmp_path / "a", pico_recipe, {"merge method": [arm(TIES, [11.0, 11.2, 11.4])]}, [10.0] * 3, (5, 6, 7)
    )

    def ties(*seeds: int) -> bool:
        recipe = pico_recipe.model_copy(update={"seeds": seeds})
        return any(one.replacement == "TIES" for one in missing(recipe, read_evidence(tmp_path, recipe)))

    assert ties(0, 1) and ties(5, 8) and not ties(7, 5)
    write_ablations(tmp_path / "b", pico_recipe, {"merge method": [arm(TIES, [11.0, 11.2])]})
    assert not ties(0, 1) and not ties(5, 6), "more seeds of one do not hide the other"


def test_other_baselines_of_one_name_are_told_apart(tmp_path: Path, pico_recipe: Recipe) -> None:
    for rate in (0.1, 0.2):
        other = changed(pico_recipe, {"decouple.learning_rate": rate})
        write_ablations(tmp_path / str(rate), other, {"merge method": [arm(TIES, [11.0])]}, baseline=[10.0])
        write_ablations(tmp_path / f"{rate} again", other, {"merge method": [arm(TIES, [11.0])]}, baseline=[10.0])
    assert [one.same for one in read_evidence(tmp_path, pico_recipe)] == [False, False]


def test_changes_that_cannot_be_run_are_counted(pico_recipe: Recipe, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        missing(pico_recipe, [])
    assert "changes of the table cannot be run on pico" in caplog.text
    assert "cannot be run on pico: " in caplog.text


def test_names_seeds_controls_and_runtime_make_no_other_baseline(tmp_path: Path, pico_recipe: Recipe) -> None:
    alike = changed(pico_recipe, {"name": "other", "runtime.jobs": 2, "evaluate.controls": ["soup"]})
    write_ablations(tmp_path / "a", alike, {"merge method": [arm(TIES, [11.0])]}, baseline=[10.0])
    assert [one.same for one in read_evidence(tmp_path, pico_recipe)] == [True]


def test_a_failed_arm_stays_to_be_done_and_says_why(tmp_path: Path, pico_recipe: Recipe) -> None:
    write_ablations(tmp_path / "a", pico_recipe, {"merge method": [arm(TIES, [], status="failed")]})
    (ties,) = (one for one in missing(pico_recipe, read_evidence(tmp_path, pico_recipe)) if one.replacement == "TIES")
    assert ties.failed == "out of luck"
    assert score(ties, standing("merge method", [])) == ranking.PRIOR * ranking.FAILED


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"ablations": 3}', "\0", '{"baseline": {"metrics": 1}, "ablations": [1]}']
)
def test_a_broken_file_is_said_and_left_out(
    tmp_path: Path, pico_recipe: Recipe, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    write_ablations(tmp_path / "good", pico_recipe, {"merge method": [arm(TIES, [11.0])]}, baseline=[10.0])
    write_ablations(tmp_path / "bad", pico_recipe, {})
    (tmp_path / "bad" / "ablation.json").write_text(text)
    (tmp_path / "store" / "x").mkdir(parents=True)
    (tmp_path / "store" / "x" / "ablation.json").write_text("never opened")
    with caplog.at_level(logging.WARNING):
        assert [one.label for one in read_evidence(tmp_path, pico_recipe)] == ["arm"]
    assert "bad/ablation.json" in caplog.text and "store" not in caplog.text


# the plan


def test_the_ranking_changes_after_an_ablation_was_run(tmp_path: Path, pico_recipe: Recipe) -> None:
    before = propose(pico_recipe, tmp_path, 4)
    assert before is not None
    parts = [one.ablated_part for one in before.ablations]
    assert "merge method" in parts and "consistency loss" not in parts  # merging trains nothing

    nothing = [arm({"merge.method": m, "merge.search": "none"}, [10.0, 10.21], label=m) for m in ("ties", "average")]
    much = [arm(NO_CONSISTENCY, [15.0, 15.3], label="removed")]
    write_ablations(tmp_path / "a", pico_recipe, {"merge method": nothing, "consistency loss": much})
    after = propose(pico_recipe, tmp_path, 4)
    assert after is not None
    first = after.ablations[0]
    assert (first.ablated_part, first.action) == ("consistency loss", "REPLACE")  # its removal is done
    assert "merge method" not in [one.ablated_part for one in after.ablations]
    assert "removed: FD(x) DDIM-2 +5.05 ± 0.635 of 10.1, with 2 seeds" in after.discussion
    assert "0 arms were measured on it" in before.discussion and "3 arms were measured on it" in after.discussion


def test_everything_in_the_plan_is_ready_and_every_part_has_its_turn(tmp_path: Path, pico_recipe: Recipe) -> None:
    plan = propose(pico_recipe, tmp_path, 1000)
    assert plan is not None
    arms = [a for ablation in plan.ablations for a in resolve(ablation, pico_recipe).arms]
    assert len(arms) > 40 and {a.status for a in arms} == {"ready"}
    assert all(m.columns for ablation in plan.ablations for m in resolve(ablation, pico_recipe).metrics)
    able = {part.name for part, *_ in in_words(pico_recipe)}
    assert {one.ablated_part for one in plan.ablations} <= able
    assert {"merging", "division", "consistency loss", "merge weights"} <= {one.ablated_part for one in plan.ablations}


def test_costs_are_the_training_steps_that_an_arm_adds(pico_recipe: Recipe) -> None:
    two = pico_recipe.model_copy(update={"seeds": (0, 1)})
    costs = {(one.part, one.replacement): (one.steps, one.cost) for one in missing(two, [])}
    assert costs["merge method", "TIES"] == costs["merging", None] == (0, 0.0)
    assert costs["consistency loss", None] == (8, 1.0)  # two seeds of four steps
    assert costs["training length", "half"] == (4, 0.5)


# the command


def test_the_command_writes_a_plan_that_ablate_runs_whole_and_its_page(
    deme: Deme, tmp_path: Path, pico_values: dict[str, Any], pico_recipe: Recipe
) -> None:
    write_recipe(tmp_path, pico_values)
    printed = deme("plan", "--recipe", "pico.yaml", "--count", 3)
    assert printed.status == 0 and printed.out.count("\n### ") == 3
    done = deme("plan", "--recipe", "pico.yaml", "--count", 3, "--out", "next.md", "--html", "next.html")
    assert (done.status, done.out.split()) == (0, ["next.md", "next.html"])
    assert (tmp_path / "next.md").read_text().strip() == printed.out.strip()
    plan = read_plan("next.md")
    assert len(plan.ablations) == 3 and not plan.problems
    opened = open_experiment(plan, "next", Loaded(pico_recipe, {}), download=False)
    assert opened.trials and all(trial.case for trial in opened.trials)
    assert (tmp_path / "next.html").read_text().count('class="trajectory-box') == 2
    assert "exists already" in deme("plan", "--recipe", "pico.yaml", "--out", "next.md").refusal


def test_where_everything_is_done_it_says_so_and_writes_nothing(
    deme: Deme, tmp_path: Path, pico_values: dict[str, Any], pico_recipe: Recipe
) -> None:
    write_recipe(tmp_path, pico_values)
    arms = []
    for part, action, replacement in in_words(pico_recipe):
        found = resolve(asked(part.name, action, [replacement] if replacement else []), pico_recipe).arms
        arms += [arm(dict(a.change), [10.0], label=str(i)) for i, a in enumerate(found) if a.status == "ready"]
    write_ablations(tmp_path / "runs" / "pico" / "ablations" / "all", pico_recipe, {"x": arms}, baseline=[10.0])
    done = deme("plan", "--recipe", "pico.yaml", "--out", "next.md")
    assert (done.status, done.out.count("\n")) == (0, 1) and "nothing to plan" in done.out
    assert not (tmp_path / "next.md").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--recipe", "digit"], "did you mean 'digits'"),
        (["--recipe", "digits", "--runs", "nowhere"], "--runs nowhere: no such folder"),
        (["--recipe", "digits", "--paper", "x.md"], "--paper: it is for --model"),
        (["--recipe", "digits", "--retries", "0"], "--retries: it is for --model"),
        (["--recipe", "digits", "--count", "0"], "--count"),
        (["--recipe", "digits", "decouple.num_rnges=2"], "did you mean 'num_ranges'"),
        ([], "--recipe"),
    ],
)
def test_bad_input_is_one_line(deme: Deme, words: list[str], said: str) -> None:
    assert said in deme("plan", *words).refusal


def test_offline_it_needs_no_network_no_torch_and_no_client(tmp_path: Path) -> None:
    watch = test_cli.NO_NETWORK_NO_TORCH.replace(
        '("torch", "diffusers")', '("torch", "diffusers", "openai", "tenacity")'
    )
    words = [sys.executable, "-c", watch, "plan", "--recipe", "digits"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("# Ablation plan for digits")


def test_what_a_real_run_has_done_leaves_the_next_plan(deme: Deme, tmp_path: Path, pico_values: dict[str, Any]) -> None:
    pico_values["evaluate"]["num_images"] = 8
    write_recipe(tmp_path, pico_values)
    assert deme("plan", "--recipe", "pico.yaml", "--count", 1, "--out", "first.md").status == 0
    assert deme("ablate", "first.md", "--recipe", "pico.yaml").status == 0
    again = deme("plan", "--recipe", "pico.yaml", "--count", 1)
    assert again.status == 0 and "1 arm was measured on it and 0 on other baselines" in again.out
    first, second = read_plan(tmp_path / "first.md").ablations, read_text(again.out).ablations
    assert first and second and first != second
    other = deme("plan", "--recipe", "pico.yaml", "decouple.learning_rate=0.01", "--count", 1)
    assert "0 arms were measured on it and 1 on other baselines" in other.out
