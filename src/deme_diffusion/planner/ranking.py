"""Which of the missing arms to run next: a score of measured effect, novelty and cost, and the choice by it.

    score(arm) = size(part) x novelty(part) / (1 + cost(arm))

- size: what the part is expected to change, as a share of the baseline's FD (of its loss where there is no FD):
  (PRIOR + sum_k v_k s_k) / (1 + sum_k v_k) over the part's measured arms k, with s_k = |difference| / baseline, at
  most 1, and v_k = a_k r_k. a_k is 1 on the same baseline and OTHER on another; the reliability r_k is
  s^2 / (s^2 + m^2) with s = max(s_k, PRIOR) and m half the 95% interval (its share of the baseline), ONE_SEED where
  there is none. So a part that is measured to matter rises, one that is measured to do nothing falls, and what noise
  hides changes little.
- novelty: 1 / (1 + sum_k a_k + arms of the part that this plan holds already).
- cost: training steps that the arm adds to the baseline's, as a share of what the baseline trains; 0 for what only
  merges, searches or samples anew.
An arm that failed before counts FAILED, and one that only changes how images are sampled for the table MEASURING: it
says nothing of the method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from deme_diffusion.ablate.plan import Action
from deme_diffusion.planner.evidence import Measured

PRIOR, OTHER, ONE_SEED, FAILED, MEASURING = 0.05, 0.5, 0.25, 0.5, 0.5
ARMS_AN_ABLATION, NEAR = 3, 0.5
"""Replacements that one ablation holds at most: the best ones, of no less than this share of the best score."""


@dataclass(frozen=True)
class Standing:
    """What is known of a part: its expected `size`, how much was measured of it (`seen`), and by which arms."""

    size: float = PRIOR
    seen: float = 0.0
    arms: tuple[Measured, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """A removal, or one replacement or addition, that is missing. `steps` it adds, a share `cost` of the baseline's."""

    part: str
    action: Action
    replacement: str | None
    targets: frozenset[str]
    steps: int
    cost: float
    failed: str = ""
    only_measuring: bool = False


@dataclass(frozen=True)
class Choice:
    """An ablation of the next plan: candidates of one part and action, the score of the best, what is behind it."""

    part: str
    action: Action
    candidates: tuple[Candidate, ...]
    score: float
    novelty: float
    standing: Standing = field(default_factory=Standing)

    @property
    def steps(self) -> int:
        """Training steps that its arms add."""
        return sum(candidate.steps for candidate in self.candidates)


def reliability(one: Measured) -> float:
    """How much a measured effect says, in (0, 1]: by its interval against its size; 0 where nothing was compared."""
    if one.relative is None:
        return 0.0
    if one.relative_margin is None:
        return ONE_SEED
    size = max(min(one.relative, 1.0), PRIOR)
    return size**2 / (size**2 + one.relative_margin**2)


def standing(part: str, evidence: Iterable[Measured]) -> Standing:
    """What the measured arms of a part say of it."""
    arms = tuple(one for one in evidence if one.part == part and one.status == "done")
    nearness = [1.0 if one.same else OTHER for one in arms]
    votes = [near * reliability(one) for near, one in zip(nearness, arms, strict=True)]
    sizes = [min(one.relative or 0.0, 1.0) for one in arms]
    size = (PRIOR + sum(v * s for v, s in zip(votes, sizes, strict=True))) / (1 + sum(votes))
    return Standing(size, sum(nearness), arms)


def score(candidate: Candidate, known: Standing, planned: int = 0) -> float:
    """The score of an arm, after `planned` arms of its part are in the plan."""
    worth = known.size * novelty(known, planned) / (1 + candidate.cost)
    return worth * (FAILED if candidate.failed else 1) * (MEASURING if candidate.only_measuring else 1)


def novelty(known: Standing, planned: int = 0) -> float:
    """1 for a part of which nothing was measured and nothing is planned."""
    return 1 / (1 + known.seen + planned)


def choose(
    candidates: Sequence[Candidate],
    evidence: Sequence[Measured],
    count: int,
    usable: Callable[[Choice], Choice | None] = lambda choice: choice,
) -> list[Choice]:
    """The best `count` ablations, one after the other, each with up to ARMS_AN_ABLATION candidates.

    `usable` may refuse a choice, or reduce it to what can be run. Equal scores stay in the parts table's order.
    """
    known = {one.part: standing(one.part, evidence) for one in candidates}
    left, planned, chosen = list(candidates), dict.fromkeys(known, 0), list[Choice]()
    while left and len(chosen) < count:
        best = max(left, key=lambda one: score(one, known[one.part], planned[one.part]))
        group = _group(best, left, known[best.part])
        fresh = novelty(known[best.part], planned[best.part])
        value = score(best, known[best.part], planned[best.part])
        choice = usable(Choice(best.part, best.action, tuple(group), value, fresh, known[best.part]))
        left = [one for one in left if one not in group]
        if choice:
            chosen.append(choice)
            planned[best.part] += len(choice.candidates)
            covered = frozenset[str]().union(*(one.targets for one in choice.candidates))
            left = [one for one in left if not one.targets & covered]
    return chosen


def _group(best: Candidate, left: Sequence[Candidate], known: Standing) -> list[Candidate]:
    """The best candidates of one part and action, no arm twice."""
    group, covered = [best], best.targets
    least = NEAR * score(best, known)
    for one in sorted(left, key=lambda one: -score(one, known)):
        alike = (one.part, one.action) == (best.part, best.action) and score(one, known) >= least
        if alike and not one.targets & covered and len(group) < ARMS_AN_ABLATION:
            group.append(one)
            covered |= one.targets
    return group
