"""What the many comparisons of an experiment mean taken together."""

from collections.abc import Sequence

from deme_diffusion.report.ablation_effects import plain_text
from deme_diffusion.report.ablation_sentences import MANY, AblationVerdict
from deme_diffusion.report.ablation_words import quoted

MOST_NAME = 60


def together(found: Sequence[AblationVerdict]) -> str:
    """What many comparisons mean taken together; '' where they are few."""
    count = sum(one.comparisons for one in found)
    if count <= MANY:
        return ""
    kept = [
        f"{effect.metric} of {quoted(arm.label)} ({plain_text(one.name, MOST_NAME)})"
        for one in found
        for arm in one.arms
        for effect in arm.effects
        if effect.survives
    ]
    by_chance = (
        f"{count} comparisons, each with a 95% interval of its own: about {max(1, round(0.05 * count))} would show"
    )
    more = f" and {len(kept) - MANY} more" if len(kept) > MANY else ""
    held = f"{', '.join(kept[:MANY])}{more} still {'do' if len(kept) > 1 else 'does'}" if kept else "none does"
    return f"{by_chance} a difference by chance alone; after Holm's correction over all of them {held}."
