"""Every evaluation of a search on disk as it finishes: none is made twice, and a search that stopped replays them.

A search is plain deterministic code that asks the journal. Run again it asks the same questions, and gets the answers
that are there at once, so it ends as one that was never interrupted.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deme_diffusion.errors import UserError
from deme_diffusion.files import append_jsonl, read_jsonl, write_text
from deme_diffusion.merging.search.objective import Array, Given, Rules, finite
from deme_diffusion.merging.selection import MergeWeights

log = logging.getLogger(__name__)
SAID_EVERY = 10
"""Evaluations of an objective after which the best of them is told."""


class Budget:
    """Evaluations that a search may still make; what the journal knew already counts as well, once."""

    def __init__(self, limit: float) -> None:
        self.limit, self.spent = limit, 0.0

    def affords(self, evaluations: float) -> bool:
        """Whether so many more stay within the limit."""
        return self.spent + evaluations <= self.limit + 1e-9


class Journal:
    """An objective behind a file of its answers: the same interface, each question answered once.

    Several objectives may share the file (each has its `name`) and the budget. Weights that make no model, or of which
    no number comes, are answered by null and a reason; asked for them it raises UserError, again as at first.
    """

    def __init__(self, path: Path, name: str, objective: Any, budget: Budget | None = None) -> None:
        self.path, self.name, self.objective = path, name, objective
        self.budget = budget or Budget(float("inf"))
        self._known = {_key(record): record for record in read_jsonl(path) if record.get("objective") == name}
        self._asked: set[str] = set()
        values = [record for record in self._known.values() if usable(record)]
        self._values, self._best = len(values), min(values, key=lambda record: record["answer"], default=None)

    def value(self, weights: Given) -> float:
        """The objective's value."""
        return float(self._ask("value", weights, None, lambda: float(self.objective.value(weights)), 1.0))

    def gradient(self, weights: Given, step: int | None = None) -> tuple[float, Rules]:
        """The objective's value and gradient, on the points of a step or on all."""

        def ask() -> Any:
            value, rows = self.objective.gradient(weights, step)
            return [value, {pattern: list(map(float, row)) for pattern, row in rows.items()}]

        value, rows = self._ask("gradient", weights, step, ask, self.gradient_cost(step))
        return value, {pattern: tuple(row) for pattern, row in rows.items()}

    def normal_equations(self, at: Given | None = None) -> tuple[Array, Array]:
        """The objective's normal equations."""

        def ask() -> Any:
            return [part.tolist() for part in self.objective.normal_equations(at)]

        a, b = self._ask("normal equations", () if at is None else at, None, ask, self.equations_cost())
        return np.array(a, dtype=np.float64), np.array(b, dtype=np.float64)

    def gradient_cost(self, step: int | None = None) -> float:
        """The objective's."""
        return float(self.objective.gradient_cost(step))

    def equations_cost(self) -> float:
        """The objective's."""
        return float(self.objective.equations_cost())

    def affords(self, evaluations: float) -> bool:
        """Whether the budget does."""
        return self.budget.affords(evaluations)

    def forget(self) -> None:
        """Ask anew, next time, for what could not be answered."""
        records = [record for record in read_jsonl(self.path) if record["answer"] is not None]
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in records))

    def _ask(self, kind: str, weights: Given, step: int | None, ask: Callable[[], Any], cost: float) -> Any:
        record: dict[str, Any] = {"objective": self.name, "kind": kind, **MergeWeights.of(weights).as_dict()}
        record |= {} if step is None else {"step": step}
        key = _key(record)
        if key not in self._asked:
            self._asked.add(key)
            self.budget.spent += cost
        if key not in self._known:
            record |= _answered(ask)
            append_jsonl(self.path, record)
            self._known[key] = record
            self._tell(record)
        answer = self._known[key]["answer"]
        if answer is None or not finite(answer):
            raise UserError(self._known[key].get("reason", f"{self.name}: it is no number"))
        return answer

    def _tell(self, record: dict[str, Any]) -> None:
        """The best so far, every few evaluations."""
        if record["kind"] != "value" or not usable(record):
            return
        self._values += 1
        self._best = min(self._best or record, record, key=lambda each: each["answer"])
        if self._values % SAID_EVERY == 0:
            weights = ", ".join(f"{w:.3f}" for w in self._best["values"])
            best, limit = self._best["answer"], self.budget.limit
            log.info("%s: %d evaluations, best so far %.6g at (%s)%s", self.name, self._values, best, weights,
                     f", of at most {limit:g}" if math.isfinite(limit) else "")  # fmt: skip


def _answered(ask: Callable[[], Any]) -> dict[str, Any]:
    """The answer, or null and why there is none."""
    try:
        answer = ask()
    except ValueError as error:  # UserError, and what numpy says of a matrix that holds no numbers
        return {"answer": None, "reason": " ".join(str(error).split())}
    return {"answer": answer} if finite(answer) else {"answer": None, "reason": "it is no number"}


def usable(record: Mapping[str, Any]) -> bool:
    """Whether a line holds the value of weights that a merge may be given: of the recipe's merge, and a number."""
    return record.get("kind") == "value" and "keep" not in record and finite(record.get("answer"))


def best_so_far(path: Path) -> dict[str, Any]:
    """Objective -> {weights (as `MergeWeights.as_dict`), value} of the least value in a file, finished or not."""
    found: dict[str, Any] = {}
    for record in read_jsonl(path):
        if not usable(record):
            continue
        name, value = record["objective"], record["answer"]
        if value < found.get(name, {"value": float("inf")})["value"]:
            parts = {part: record[part] for part in ("values", "rules") if part in record}
            found[name] = {"weights": parts, "value": value}
    return found


def _key(record: dict[str, Any]) -> str:
    """What was asked, in a form that survives the file: numbers come back to the bit, and rules in their order."""
    return json.dumps({k: v for k, v in record.items() if k not in ("answer", "reason")})
