"""The searches on objectives that are worked out: they find the minimum, keep to bounds and budget, and go on."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deme_diffusion.config import MergeSettings
from deme_diffusion.errors import UserError
from deme_diffusion.files import read_jsonl
from deme_diffusion.merging.search import (
    REST,
    Array,
    Budget,
    Candidate,
    Given,
    Journal,
    Rules,
    Space,
    best,
    best_so_far,
    candidates,
    check_search,
    least_squares_weights,
    needed,
    noise_warning,
    proposed,
    reserved,
    score,
    shaped_by_loss,
    shaping,
)
from deme_diffusion.merging.selection import MergeWeights
from deme_diffusion.merging.table import method

SEARCHES = ("grid", "least_squares", "gradient", "cma_es", "tpe")
TARGET = (0.3, -0.7, 1.4)


class Interrupt(Exception):
    """A signal."""


class Residual:
    """|| r(w) ||^2 with r(w) = X w - y + bend (X w)^2: linear in w where bend is 0. Stops at the `stop`-th question."""

    def __init__(self, bend: float = 0.0, stop: int | None = None) -> None:
        draw = np.random.default_rng(0)
        self.x = np.linalg.qr(draw.normal(size=(12, 3)))[0] * np.array([1.0, 1.5, 2.0])
        self.bend, self.y = bend, np.zeros(12)
        self.y = self._at(np.array(TARGET))[0]
        self.stop, self.asked, self.cost = stop, list[tuple[str, Any]](), 0.0

    def _count(self, kind: str, weights: Any, cost: float) -> None:
        if len(self.asked) == self.stop:
            raise Interrupt
        self.asked.append((kind, weights))
        self.cost += cost

    def _at(self, w: Array) -> tuple[Array, Array]:
        line = self.x @ w
        return line - self.y + self.bend * line**2, self.x * (1 + 2 * self.bend * line)[:, None]

    def value(self, weights: Given) -> float:
        rows = _rows(weights)
        self._count("value", rows, 1.0)
        return float(np.mean([np.sum(self._at(np.array(row))[0] ** 2) for row in rows.values()]))

    def gradient_cost(self, step: int | None = None) -> float:
        return 3.0

    def gradient(self, weights: Given, step: int | None = None) -> tuple[float, Rules]:
        rows, value, found = _rows(weights), 0.0, {}
        self._count("gradient", (rows, step), 3.0)
        for pattern, row in rows.items():
            residual, jacobian = self._at(np.array(row))
            value += float(residual @ residual) / len(rows)
            found[pattern] = tuple(2 * jacobian.T @ residual / len(rows))
        return value, found

    def equations_cost(self) -> float:
        return 4.0

    def normal_equations(self, at: Given | None = None) -> tuple[Array, Array]:
        w = np.zeros(3) if at is None else np.array(MergeWeights.of(at).values)
        self._count("normal equations", tuple(w), 4.0)
        residual, jacobian = self._at(w)
        return jacobian.T @ jacobian, jacobian.T @ (jacobian @ w - residual)


def _rows(weights: Given) -> dict[str, tuple[float, ...]]:
    given = MergeWeights.of(weights)
    return dict(given.rules) or {REST: given.values}


def settings_of(search: str, **changes: Any) -> MergeSettings:
    few = {"grid_values": (0.0, 1.0), "gradient_steps": 12, "ridge": 0.0, "start": "zero", "objective": "loss"}
    return MergeSettings.model_validate({"search": search, **few, **changes})


def found(path: Path, objective: Any, settings: MergeSettings, space: Space | None = None) -> list[Candidate]:
    """What one search proposes, by a journal at that path."""
    budget = Budget(settings.max_evaluations - reserved(Space(3), settings))
    journal = Journal(path, "loss", objective, budget)
    return list(proposed(settings, lambda: journal, lambda: journal, space or Space(3, settings.bounds), 0))


def best_of(objective: Residual, proposals: list[Candidate]) -> Candidate:
    return min(proposals, key=lambda c: objective.value(c.merge_weights))


# finding


@pytest.mark.parametrize(
    "search, changes, within",
    [
        ("least_squares", {"scales": [1.0]}, 1e-9),
        ("gradient", {"gradient_steps": 80, "max_evaluations": 1000}, 0.02),
        ("gradient", {"start": "least_squares"}, 1e-9),
        ("cma_es", {"sigma": 0.5, "max_evaluations": 200}, 0.1),
        ("cma_es", {"start": "least_squares", "max_evaluations": 30}, 1e-9),
        ("tpe", {"start": "uniform"}, 0.6),
    ],
)
def test_minimum_is_found_outside_of_0_to_1(
    search: str, changes: dict[str, Any], within: float, tmp_path: Path
) -> None:
    objective = Residual()
    proposals = found(tmp_path / "search.jsonl", objective, settings_of(search, **changes))
    np.testing.assert_allclose(best_of(objective, proposals).weights, TARGET, atol=within)


def test_gauss_newton_stays_where_the_model_is_linear_and_gets_nearer_where_it_bends(tmp_path: Path) -> None:
    once = settings_of("least_squares", scales=[1.0], gauss_newton_rounds=1)
    straight = found(tmp_path / "straight", Residual(), once)[0]
    np.testing.assert_allclose(straight.weights, TARGET, atol=1e-9)
    losses = []
    for rounds in range(3):
        settings, objective = once.model_copy(update={"gauss_newton_rounds": rounds}), Residual(bend=0.2)
        proposal = found(tmp_path / f"{rounds}", objective, settings)[0]
        losses.append(objective.value(proposal.merge_weights))
        assert proposal.source == f"least squares{f', {rounds} Gauss-Newton' if rounds else ''} x 1"
    assert losses[0] > 3 * losses[1] > 9 * losses[2]


def test_gauss_newton_round_that_raises_the_loss_is_not_taken(tmp_path: Path) -> None:
    class Misled(Residual):
        def normal_equations(self, at: Given | None = None) -> tuple[Array, Array]:
            a, b = super().normal_equations(at)
            return (a, b) if at is None else (a, 5 * b)

    settings = settings_of("least_squares", scales=[1.0], gauss_newton_rounds=2)
    objective = Misled()
    proposal = found(tmp_path / "search.jsonl", objective, settings)[0]
    np.testing.assert_allclose(proposal.weights, TARGET, atol=1e-9)
    assert proposal.source == "least squares x 1"
    assert [kind for kind, _ in objective.asked].count("normal equations") == 2  # the second round is not begun


@pytest.mark.parametrize("search", ["cma_es", "tpe"])
def test_one_expert_alone_can_be_searched_for(search: str, tmp_path: Path) -> None:
    class Parabola:
        def value(self, weights: Given) -> float:
            return (MergeWeights.of(weights).values[0] - 0.6) ** 2

    settings = settings_of(search)
    journal = Journal(tmp_path / "search.jsonl", "loss", Parabola(), Budget(60))
    proposals = list(proposed(settings, lambda: journal, lambda: journal, Space(1), 0))
    assert min(abs(c.weights[0] - 0.6) for c in proposals) < 0.05


def test_every_group_of_a_layer_wise_gradient_is_led_to_the_minimum(tmp_path: Path) -> None:
    space = Space(3, None, ("a.*", "b.*"), (0.25, 0.75))
    settings = settings_of("gradient", gradient_steps=80, max_evaluations=1000)
    proposal = found(tmp_path / "search.jsonl", Residual(), settings, space)[0]
    assert set(proposal.rules) == {"a.*", "b.*"}
    for row in (*proposal.rules.values(), proposal.weights):
        np.testing.assert_allclose(row, TARGET, atol=0.02)


# going on


@pytest.mark.parametrize("search", SEARCHES)
def test_search_that_stopped_anywhere_ends_as_one_that_never_did(search: str, tmp_path: Path) -> None:
    settings = settings_of(search, gauss_newton_rounds=1, start="least_squares", max_evaluations=40, gradient_steps=4)
    objective = Residual(bend=0.1)
    whole = found(tmp_path / "whole.jsonl", objective, settings)
    finished = _finished(tmp_path / "whole.jsonl", Residual(bend=0.1), settings)
    count = len(read_jsonl(tmp_path / "whole.jsonl"))
    assert count >= (4 if search in ("grid", "least_squares") else 7)
    for stop in range(count):
        path = tmp_path / f"{stop}.jsonl"
        with pytest.raises(Interrupt):
            _finished(path, Residual(bend=0.1, stop=stop), settings)
        with path.open("a") as file:
            file.write('{"objective": "lo')  # a kill in the middle of a line
        second = Residual(bend=0.1)
        assert _finished(path, second, settings) == finished
        assert len(second.asked) == count - stop
        assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert whole == found(tmp_path / "whole.jsonl", Residual(stop=0), settings)


def _finished(path: Path, objective: Residual, settings: MergeSettings) -> list[Candidate]:
    """What FD would judge."""
    budget = Budget(settings.max_evaluations - reserved(Space(3), settings))
    journal = Journal(path, "loss", objective, budget)
    return candidates(3, settings, lambda: journal, lambda: journal)


def test_searches_that_share_a_file_do_not_take_each_others_answers(tmp_path: Path) -> None:
    first, second = Residual(), Residual(bend=0.5)
    one, other = (Journal(tmp_path / "x", name, of) for name, of in (("a", first), ("b", second)))
    assert one.value([1.0, 0.0, 0.0]) != other.value([1.0, 0.0, 0.0])
    assert one.value((1, 0, 0)) == one.value(MergeWeights((1.0, 0.0, 0.0)))
    assert len(first.asked) == len(second.asked) == 1
    assert one.value(MergeWeights((1.0, 0.0, 0.0), {"a.*": (0.0, 0.0, 1.0)})) != one.value([1.0, 0.0, 0.0])


def test_best_so_far_is_there_while_a_search_runs(tmp_path: Path) -> None:
    path = tmp_path / "search.jsonl"
    assert best_so_far(path) == {}
    journal = Journal(path, "loss", Residual())
    rules = MergeWeights((0.0, 0.0, 0.0), {"a.*": TARGET})
    for weights in ([0.0, 0.0, 0.0], rules, [1.0, 1.0, 1.0]):
        journal.value(weights)
    journal.normal_equations()
    assert MergeWeights.from_dict(best_so_far(path)["loss"]["weights"]) == rules


# limits


@pytest.mark.parametrize("search", ["gradient", "cma_es", "tpe"])
@pytest.mark.parametrize("limit", [30, 37, 50])
def test_no_search_asks_for_more_than_its_budget(search: str, limit: int, tmp_path: Path) -> None:
    for start in ("zero", "least_squares"):
        objective = Residual()
        settings = settings_of(search, max_evaluations=limit, start=start, gradient_steps=100)
        found(tmp_path / start, objective, settings)
        assert objective.cost <= limit - reserved(Space(3), settings)
        assert objective.cost > (limit - reserved(Space(3), settings)) / 2


@pytest.mark.parametrize("search", SEARCHES)
def test_bounds_hold_for_every_proposal_and_every_question(search: str, tmp_path: Path) -> None:
    objective = Residual()
    settings = settings_of(
        search, bounds=(0.1, 0.9), max_evaluations=40, gradient_learning_rate=1.0, scales=[0.01, 9.0]
    )
    proposals = found(tmp_path / "search.jsonl", objective, settings)
    assert all(0.1 <= w <= 0.9 for c in proposals for w in c.weights)
    asked = [row for kind, rows in objective.asked if kind == "value" for row in rows[REST]]
    assert all(0.1 <= w <= 0.9 for w in asked)


def test_only_the_finalists_of_another_objective_are_left_to_fd(tmp_path: Path) -> None:
    settings = settings_of("grid", grid_values=(0.0, 0.5, 1.0), finalists=2)
    objective = Residual()
    judged = candidates(3, settings, lambda: objective)
    always = [c.weights for c in judged[:5]]
    by_loss = [c for c in found(tmp_path / "x", Residual(), settings) if c.weights not in always]
    by_loss.sort(key=lambda c: Residual().value(c.merge_weights))
    assert [c.weights for c in judged[5:]] == [c.weights for c in by_loss[:2]]
    by_fd = settings.model_copy(update={"objective": "fd"})
    assert len(candidates(3, by_fd, lambda: objective)) == 1 + 27  # uniform beside the grid


@pytest.mark.parametrize(
    "search, package",
    [("cma_es", "cmaes"), ("tpe", "optuna")],
)
def test_missing_package_is_told_in_one_line(search: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec

    def gone(name: str, *rest: Any) -> Any:
        return None if name == package else there(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", gone)
    with pytest.raises(
        UserError, match=rf"{search} needs the package {package}; pip install 'deme-diffusion\[search\]'"
    ):
        check_search(4, MergeSettings(search=search))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings, method, message",
    [
        ({"search": "gradient"}, "ties", "gradient: it needs derivatives, which are known for method task_arithmetic"),
        ({"search": "least_squares"}, "tsv", "least_squares: it needs derivatives"),
        ({"search": "cma_es", "max_evaluations": 10}, "ties", "more than merge.max_evaluations=10"),
        ({"search": "least_squares", "gauss_newton_rounds": 2, "max_evaluations": 15}, "task_arithmetic", "more than"),
        ({"search": "cma_es", "granularity": "block"}, "ties", "merge.granularity=block: merge.search=cma_es has one"),
    ],
)
def test_search_that_cannot_be_made_is_refused_before_anything_runs(
    settings: dict[str, Any], method: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_search(4, MergeSettings.model_validate(settings), method)
    check_search(4, MergeSettings(search="grid", grid_values=(0.0, 1.0)), "ties")


@pytest.mark.parametrize(
    ("settings", "candidates"),
    [
        ({"search": "cma_es", "num_images": 100, "max_evaluations": 119}, 119),
        ({"search": "grid", "num_images": 999, "grid_values": (0.0, 0.25, 0.5)}, 81 + 4),  # with the experts alone
        ({"search": "cma_es", "num_images": 1000, "max_evaluations": 119}, None),
        ({"search": "tpe", "num_images": 100, "max_evaluations": 20}, None),
        ({"search": "cma_es", "num_images": 100, "objective": "loss"}, None),
        ({"search": "least_squares", "num_images": 100}, None),
        ({"search": "none", "num_images": 100}, None),
    ],
)
def test_least_of_many_fds_on_few_images_is_warned_of(settings: dict[str, Any], candidates: int | None) -> None:
    said = noise_warning(4, MergeSettings.model_validate(settings))
    assert (said is None) == (candidates is None)
    if said and candidates:
        assert f"FD on {settings['num_images']} images follows the sampling noise" in said
        assert f"the least of up to {candidates};" in said


def test_method_with_weights_of_its_own_begins_there_and_they_are_tried(tmp_path: Path) -> None:
    settings = settings_of("cma_es", start="least_squares", max_evaluations=30)
    objective = Residual()
    space = Space(3, None, default=(1.0, 1.0, 1.0))
    judged = candidates(3, settings, lambda: Journal(tmp_path / "x", "loss", objective, Budget(20)), space=space)
    assert any(c.weights == [1.0, 1.0, 1.0] and c.source == "the method's own" for c in judged)
    assert objective.asked[0] == ("value", {REST: (1.0, 1.0, 1.0)})


# keys


def test_a_search_is_keyed_by_what_shapes_it() -> None:
    assert shaping(MergeSettings()) == {}
    idle = {"gradient_steps": 7, "sigma": 0.5, "finalists": 9, "max_evaluations": 99, "objective": "loss"}
    assert shaping(MergeSettings.model_validate({"grid_values": [0.0], **idle})) == {}
    given = {
        "gauss_newton_rounds": 1,
        "bounds": [0.0, 1.0],
        "objective": "relative_loss",
        "ridge": 0.1,
        "scales": [1.0],
    }
    plain = json.loads(json.dumps(given))
    assert shaping(MergeSettings.model_validate(given)) == plain
    sampled = {"search": "cma_es", "start": "zero", "sigma": 0.5, "finalists": 9, "max_evaluations": 99}
    assert shaping(MergeSettings.model_validate({**sampled, "ridge": 0.1})) == {
        k: v for k, v in sampled.items() if k != "finalists"
    }
    assert shaping(MergeSettings.model_validate({**sampled, "objective": "loss"})) == {**sampled, "objective": "loss"}


def test_key_of_a_search_holds_no_more_than_it_uses() -> None:
    form = {"ridge": 0.5, "gauss_newton_rounds": 1}

    def key(search: str, method: str = "task_arithmetic", **given: Any) -> dict[str, Any]:
        return shaping(MergeSettings.model_validate({"search": search, **given}), method)

    assert key("cma_es", "ties", **form, start="uniform") == {"search": "cma_es"}
    assert key("cma_es", **form, start="uniform") == {"search": "cma_es", "start": "uniform"}
    assert key("cma_es", **form) == {"search": "cma_es", **form}
    assert key("least_squares", start="zero", **form) == form
    for search, given, name, loss in (
        ("grid", {}, "task_arithmetic", False),
        ("grid", {"objective": "loss"}, "ties", True),
        ("tpe", {"start": "zero"}, "task_arithmetic", False),
        ("tpe", {}, "ties", False),
        ("tpe", {}, "task_arithmetic", True),
        ("gradient", {"start": "zero"}, "task_arithmetic", True),
        ("least_squares", {}, "task_arithmetic", True),
    ):
        assert shaped_by_loss(MergeSettings.model_validate({"search": search, **given}), name) == loss  # type: ignore[dict-item]


def test_candidate_of_groups_carries_rules_and_their_mean() -> None:
    space = Space(2, None, ("a.*", "b.*"), (0.25, 0.75))
    candidate = space.candidate(np.array([[1.0, 0.0], [0.0, 2.0]]), "here")
    assert candidate.weights == [0.25, 1.5]
    assert MergeWeights.from_dict(candidate.merge_weights.as_dict()) == candidate.merge_weights
    assert candidate.merge_weights.at("b.weight") == (0.0, 2.0)
    rest = Space(2, None, (REST, "b.*"), (0.0, 1.0)).candidate(np.array([[1.0, 0.0], [0.0, 2.0]]), "here")
    assert (rest.weights, dict(rest.rules)) == ([1.0, 0.0], {"b.*": (0.0, 2.0)})


@pytest.mark.parametrize("search", ["cma_es", "tpe"])
def test_weights_that_make_no_model_are_passed_over(search: str, tmp_path: Path) -> None:
    class Half(Residual):
        def value(self, weights: Given) -> float:
            value = super().value(weights)
            first = MergeWeights.of(weights).values[0]
            if first < -0.05:
                raise UserError("the merged tensor is not finite")
            return float("nan") if first > 0.5 else value

    proposals = found(tmp_path / "search.jsonl", Half(), settings_of(search))
    assert 20 < len(proposals) < 110
    assert all(-0.05 <= c.weights[0] <= 0.5 for c in proposals)
    assert found(tmp_path / "there", Half(), settings_of(search, bounds=(-2.0, -1.0))) == []
    records = read_jsonl(tmp_path / "there")
    assert {(record["answer"], record["reason"]) for record in records} == {(None, "the merged tensor is not finite")}


# what cannot be used


class Broken(Residual):
    """No model beyond a first weight of 0.4, and no number below -0.4."""

    def _check(self, weights: Given) -> float:
        rows = [row[0] for row in _rows(weights).values()]
        if max(rows) > 0.4:
            raise UserError("the merged tensor is not finite")
        return float("nan") if min(rows) < -0.4 else 0.0

    def value(self, weights: Given) -> float:
        return super().value(weights) + self._check(weights)

    def gradient(self, weights: Given, step: int | None = None) -> tuple[float, Rules]:
        value, rows = super().gradient(weights, step)
        return value + self._check(weights), rows


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("objective", ["loss", "fd"])
def test_a_candidate_that_cannot_be_used_ends_no_search(search: str, objective: str, tmp_path: Path) -> None:
    settings = settings_of(
        search,
        objective=objective,
        grid_values=(0.0, 0.3, 2.0),
        scales=[0.2, -3.0, 9.0],
        gradient_learning_rate=3.0,
        max_evaluations=60,
    )
    journal = Journal(tmp_path / "x", "FD", Broken(), Budget(50))
    trials = list(score(candidates(3, settings, lambda: journal, lambda: journal), journal))
    own = [t for t in trials if len(set(t.weights)) == 3 or t.weights == [0.3] * 3]
    # A descent whose first step leads to no model ends where it began, which is tried anyway.
    assert search == "gradient" or any(t.value < 1e9 for t in own)
    assert best(trials).value < 1e9
    records = read_jsonl(tmp_path / "x")
    unusable = [record for record in records if record["answer"] is None]
    assert {record["reason"] for record in unusable} <= {"the merged tensor is not finite", "it is no number"}
    assert len(unusable) >= 1
    for trial in trials:
        assert (trial.as_dict()["value"] is None) == (trial.value == float("inf")) == ("reason" in trial.as_dict())
        if trial.weights[0] == 1.0:
            assert trial.as_dict()["reason"] == "the merged tensor is not finite"
    again = Journal(tmp_path / "x", "FD", Broken(stop=0), Budget(50))
    assert list(score(candidates(3, settings, lambda: again, lambda: again), again)) == trials
    assert json.loads((tmp_path / "x").read_text().splitlines()[0], parse_constant=lambda word: pytest.fail(word))


def test_what_could_not_be_answered_is_asked_anew_once_it_is_forgotten(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "x", "FD", Broken())
    journal.value([0.0, 0.0, 0.0])
    for _ in range(2):
        with pytest.raises(UserError, match="not finite"):
            journal.value([1.0, 0.0, 0.0])
    journal.forget()
    mended = Residual()
    assert Journal(tmp_path / "x", "FD", mended).value([1.0, 0.0, 0.0]) == Residual().value([1.0, 0.0, 0.0])
    assert [record["answer"] is None for record in read_jsonl(tmp_path / "x")] == [False, False]


# the budget


OWN = (
    {"search": "grid"},
    {"search": "grid", "objective": "fd"},
    {"search": "least_squares", "gauss_newton_rounds": 1},
    {"search": "least_squares"},
    {"search": "gradient", "start": "zero"},
    {"search": "gradient", "start": "least_squares", "gauss_newton_rounds": 1},
    *({"search": search, "start": start} for search in ("cma_es", "tpe") for start in ("zero", "least_squares")),
    {"search": "cma_es", "method": "ties"},
    {"search": "tpe", "method": "slerp", "objective": "fd", "start": "least_squares"},
    {"search": "tpe", "fixed": True},
)


@pytest.mark.parametrize("given", OWN, ids=lambda given: "-".join(map(str, given.values())))
def test_what_a_search_needs_is_enough_for_a_proposal_of_its_own_and_less_is_refused(
    given: dict[str, Any], tmp_path: Path
) -> None:
    changes = dict(given)
    row, fixed = method(changes.pop("method", "task_arithmetic")), changes.pop("fixed", False)
    space = Space.of(row, 3, None, fixed=fixed)
    settings = settings_of(**changes)
    count = needed(space, settings)
    enough, less = (settings.model_copy(update={"max_evaluations": n}) for n in (count, count - 1))
    objective = Residual(bend=0.1)
    journal = Journal(tmp_path / "x", "loss", objective, Budget(count - reserved(space, settings)))
    judged = candidates(3, enough, lambda: journal, lambda: journal, space=space)
    tried = [c.source for c in candidates(3, settings_of("none"), _never, space=space)]
    assert [c.source for c in judged[: len(tried)]] == tried
    assert len(judged) > len(tried)
    with pytest.raises(UserError, match=f"more than merge.max_evaluations={count - 1}"):
        candidates(3, less, _never, space=space)


def _never() -> Any:
    raise AssertionError("it was asked")


def test_advice_of_a_search_that_needs_too_much_is_its_own() -> None:
    for search, advice in (("grid", "fewer grid_values"), ("least_squares", "fewer scales"), ("tpe", "start=zero")):
        with pytest.raises(UserError, match=advice):
            check_search(4, MergeSettings.model_validate({"search": search, "max_evaluations": 5}))
    with pytest.raises(UserError, match="=5; raise the limit"):
        check_search(4, MergeSettings.model_validate({"search": "tpe", "max_evaluations": 5}), "ties")


# bounds


def test_least_squares_within_bounds_is_the_least_there_and_not_the_free_one_clipped() -> None:
    draw = np.random.default_rng(0)
    clipped_worse = 0
    for _ in range(40):
        x = draw.normal(size=(30, 1)) + 0.5 * draw.normal(size=(30, 3))
        y = x @ draw.normal(0.25, 0.8, size=3) + draw.normal(size=30)
        a, b = x.T @ x, x.T @ y
        w = least_squares_weights(a, b, 0.0, (0.0, 1.0))
        slope = a @ w - b
        assert ((w >= 0) & (w <= 1)).all()
        at = [
            (slope[i] >= -1e-7) if w[i] == 0 else (slope[i] <= 1e-7) if w[i] == 1 else abs(slope[i]) < 1e-7
            for i in range(3)
        ]
        assert all(at)  # Karush, Kuhn and Tucker
        clipped = np.clip(np.linalg.solve(a, b), 0.0, 1.0)
        clipped_worse += clipped @ a @ clipped - 2 * b @ clipped > w @ a @ w - 2 * b @ w + 1e-6
    assert clipped_worse > 5
    free = least_squares_weights(a, b, 0.1)
    assert (least_squares_weights(a, b, 0.1, (-99.0, 99.0)) == free).all()
    assert least_squares_weights(np.zeros((2, 2)), np.zeros(2), 0.0, (0.1, 1.0)).tolist() == [0.1, 0.1]


def test_grid_that_bounds_change_says_so(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level("INFO")
    found(tmp_path / "x", Residual(), settings_of("grid", bounds=(0.1, 2.0)))
    assert "merge.bounds=[0.1, 2.0] makes grid_values [0.1, 1.0]" in caplog.text


@pytest.mark.parametrize("name", ["grid_values", "scales"])
def test_a_grid_or_scales_of_nothing_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        MergeSettings.model_validate({name: []})


def test_gradient_leaves_both_its_ends_to_fd(tmp_path: Path) -> None:
    proposals = found(tmp_path / "x", Residual(), settings_of("gradient", start="uniform"))
    assert [c.source for c in proposals] == ["gradient", "gradient, start"]


def test_best_so_far_is_told_every_few_evaluations(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level("INFO")
    found(tmp_path / "x", Residual(), settings_of("tpe", max_evaluations=40))
    assert "loss: 10 evaluations, best so far" in caplog.text
