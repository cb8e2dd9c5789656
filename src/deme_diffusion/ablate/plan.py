"""What a plan is, whatever document it came from: a discussion, ablations, and the entries that could not be read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Action = Literal["REMOVE", "REPLACE", "ADD"]
ACTIONS: tuple[Action, ...] = get_args(Action)


@dataclass(frozen=True)
class Ablation:
    """One ablation as its author wrote it.

    `replacement` and `metrics` are free text, an entry each. `change` is what the YAML form may say exactly, as config
    path -> value, for every arm; `changes` the same for single replacements, by their text.
    """

    name: str
    ablated_part: str
    action: Action
    replacement: list[str] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)
    change: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    line: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Problem:
    """An entry that could not be read: the line where it begins, and why."""

    line: int
    what: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.what}"


@dataclass(frozen=True)
class Plan:
    """A plan; `ablations` are those that could be read, in their order."""

    discussion: str = ""
    ablations: list[Ablation] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list, compare=False)
