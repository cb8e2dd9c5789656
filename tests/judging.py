"""The corpus of `plans/wordings.jsonl`: what the matcher makes of it, against what a careful expert expects."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deme_diffusion.ablate.arms import Arm
from deme_diffusion.ablate.plan import Ablation
from deme_diffusion.ablate.resolve import resolve
from deme_diffusion.config import Recipe

CORPUS = Path(__file__).parent / "plans" / "wordings.jsonl"


@dataclass(frozen=True)
class Judged:
    """Arms that are as expected; changes expected that no arm makes; arms that nobody expects."""

    right: int
    missed: list[tuple[str, Any]]
    wrong: list[tuple[str, Mapping[str, Any]]]


def judged(recipe: Recipe) -> Judged:
    """All entries together; an arm counts once."""
    right, missed, wrong = 0, list[tuple[str, Any]](), list[tuple[str, Mapping[str, Any]]]()
    for entry in entries():
        left = [arm for arm in _arms(entry, recipe) if arm.status != "not_executable"]
        for expected in entry["expect"]:
            if expected["change"] is None:
                continue
            hit = next((arm for arm in left if _as_expected(recipe, arm, expected["change"])), None)
            if hit is None:
                missed.append((entry["ablated_part"], expected["replacement"]))
                continue
            left = [arm for arm in left if arm is not hit]
            right += 1
        wrong += [(entry["ablated_part"], arm.change) for arm in left]
    return Judged(right, missed, wrong)


def entries() -> Iterator[dict[str, Any]]:
    """The corpus, an ablation each."""
    for line in CORPUS.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)


def _arms(entry: Mapping[str, Any], recipe: Recipe) -> tuple[Arm, ...]:
    replacement, metrics = list(entry["replacement"] or []), list(entry["metrics"] or [])
    ablation = Ablation(entry["name"], entry["ablated_part"], entry["action"], replacement, metrics)
    return resolve(ablation, recipe).arms


def _as_expected(recipe: Recipe, arm: Arm, change: Mapping[str, Any]) -> bool:
    return all(_same(_value(recipe, arm, path), value) for path, value in change.items())


def _value(recipe: Recipe, arm: Arm, path: str) -> Any:
    """What the arm's recipe has at a path; `steps` and `evaluate.samplers` are of its first sampler."""
    if path in ("steps", "evaluate.samplers"):
        first = (arm.change.get("evaluate.samplers") or [{}])[0]
        return first.get("num_inference_steps" if path == "steps" else "name")
    value: Any = recipe.model_dump(mode="json")
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return arm.change.get(path, value)


def _same(value: Any, expected: Any) -> bool:
    numbers = isinstance(value, int | float) and isinstance(expected, int | float)
    if numbers and not isinstance(value, bool):
        return abs(value - expected) <= 1e-6 * max(1.0, abs(expected))
    if isinstance(value, list | tuple) and isinstance(expected, list | tuple):
        return list(value) == list(expected)
    return bool(value == expected)
