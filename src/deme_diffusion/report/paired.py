"""Two models' figures of one metric compared seed by seed: the paired differences, their interval and their p-value."""

import math
import statistics
from collections.abc import Sequence

from scipy.special import stdtr, stdtrit

from deme_diffusion.report.cells import Figure


def paired_differences(ours: Figure, theirs: Figure) -> list[float] | None:
    """Ours minus theirs for each seed; None unless both have values of the same two or more seeds."""
    mine, others = ours.get("values"), theirs.get("values")
    if not mine or not others or ours["seeds"] != theirs["seeds"] or not 2 <= len(mine) == len(others):
        return None
    return [a - b for a, b in zip(mine, others, strict=True)]


def margin_of(differences: Sequence[float]) -> float:
    """Half the 95% interval of the mean of n >= 2 paired differences, by Student's t: t s / sqrt(n)."""
    n = len(differences)
    return float(stdtrit(n - 1, 0.975)) * statistics.stdev(differences) / math.sqrt(n)


def p_value(differences: Sequence[float]) -> float:
    """Two-sided p of n >= 2 paired differences under Student's t; 1 where all are 0, 0 where all are another number."""
    n, mean, deviation = len(differences), statistics.fmean(differences), statistics.stdev(differences)
    if deviation == 0:
        return 1.0 if mean == 0 else 0.0
    return 2 * float(stdtr(n - 1, -abs(mean) * math.sqrt(n) / deviation))


def holm(p_values: Sequence[float], level: float = 0.05) -> list[bool]:
    """Which hypotheses fall when all are tested together (Holm 1979): the k-th least p against level / (m - k + 1)."""
    fallen = [False] * len(p_values)
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if p_values[index] > level / (len(p_values) - rank):
            break
        fallen[index] = True
    return fallen
