"""Two models' figures of one metric compared seed by seed: the paired differences, their interval and their p-value."""

import math
import statistics
from collections.abc import Sequence

from deme_diffusion.report.cells import Figure

ALIKE = 1e-9
"""Differences whose deviation is a smaller share of their mean differ by rounding alone."""


def paired_differences(ours: Figure, theirs: Figure) -> list[float] | None:
    """Ours minus theirs for each seed that both have a value of, in our order; None where they are fewer than two."""
    mine, others = _by_seed(ours), _by_seed(theirs)
    common = [seed for seed in mine if seed in others]
    return [mine[seed] - others[seed] for seed in common] if len(common) > 1 else None


def _by_seed(figure: Figure) -> dict[int, float]:
    values = figure.get("values") or []
    return dict(zip(figure["seeds"], values, strict=True)) if len(values) == len(figure["seeds"]) else {}


def all_alike(differences: Sequence[float]) -> bool:
    """Whether n >= 2 differences are one number: a few seeds of a metric in whole steps may agree by chance."""
    return statistics.stdev(differences) <= ALIKE * abs(statistics.fmean(differences))


def margin_of(differences: Sequence[float]) -> float | None:
    """Half the 95% interval of the mean of n >= 2 paired differences, by Student's t: t s / sqrt(n).

    None where all are alike: a spread of 0 is none that seeds have shown.
    """
    if all_alike(differences):
        return None
    from scipy.special import stdtrit  # here, since it takes a fifth of a second, and one seed never comes this far

    n = len(differences)
    return float(stdtrit(n - 1, 0.975)) * statistics.stdev(differences) / math.sqrt(n)


def p_value(differences: Sequence[float]) -> float | None:
    """Two-sided p of n >= 2 paired differences under Student's t; None where all are alike."""
    if all_alike(differences):
        return None
    from scipy.special import stdtr

    n, mean, deviation = len(differences), statistics.fmean(differences), statistics.stdev(differences)
    return 2 * float(stdtr(n - 1, -abs(mean) * math.sqrt(n) / deviation))


def holm(p_values: Sequence[float], level: float = 0.05) -> list[bool]:
    """Which hypotheses fall when all are tested together (Holm 1979): the k-th least p against level / (m - k + 1)."""
    fallen = [False] * len(p_values)
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if p_values[index] > level / (len(p_values) - rank):
            break
        fallen[index] = True
    return fallen
