"""Which arm of several improves most, and whether the seeds tell it from the others: only then is it the best."""

from collections.abc import Sequence
from dataclasses import dataclass

from deme_diffusion.report.ablation_effects import ArmEffects, Effect, compare

DIFFER = ("worse", "better", "changed")
BY_WEIGHT = ("better", "worse", "changed", "none", "alike", "one seed", "identical")
RANK = {outcome: rank for rank, outcome in enumerate(BY_WEIGHT)}
UNTOLD = ("none", "identical", "alike", "one seed", "n/a")


@dataclass(frozen=True)
class Top:
    """The arm that improves a metric most. `won`: the primary metrics in which it is better than the baseline and than
    every other arm; `untold`: the arms that the seeds do not tell from it in the metric that it improves.
    """

    arm: ArmEffects
    won: tuple[str, ...]
    untold: tuple[ArmEffects, ...]


def top_of(arms: Sequence[ArmEffects], primary: Sequence[str]) -> Top | None:
    """The top by the first primary metric that any arm improves; None where none improves any."""
    for metric in primary:
        improved = [(-abs(effect.difference), i) for i, arm in enumerate(arms)
                    if (effect := arm.of(metric)) and effect.outcome == "better" and effect.difference]  # fmt: skip
        if improved:
            top = arms[min(improved)[1]]
            others = [arm for arm in arms if arm is not top]
            won = tuple(name for name in primary if _wins(top, others, name))
            return Top(top, won, tuple(arm for arm in others if _against(arm, top, metric) in UNTOLD))
    return None


def _wins(top: ArmEffects, others: Sequence[ArmEffects], metric: str) -> bool:
    effect = top.of(metric)
    against = {_against(arm, top, metric) for arm in others} - {None}
    return effect is not None and effect.outcome == "better" and against == {"worse"}


def _against(arm: ArmEffects, other: ArmEffects, metric: str) -> str | None:
    """How an arm's figure is to another arm's over their paired seeds; an arm without one is no rival: None."""
    effect = arm.of(metric)
    if effect is None or effect.difference is None:
        return None
    return compare(metric, arm.metrics, other.metrics).outcome


def least_rank(effects: Sequence[Effect]) -> int:
    """The first in order of weight of what some effects show."""
    return min((RANK.get(effect.outcome, len(RANK)) for effect in effects), default=len(RANK))
