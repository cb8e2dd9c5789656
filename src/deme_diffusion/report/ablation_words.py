"""Words that verdicts are made of: quotations, lists, names of metrics, and what serving a model costs."""

from collections.abc import Sequence

from deme_diffusion.report.ablation_effects import ArmEffects, plain_text, score_of
from deme_diffusion.report.cells import ratio

MOST_TEXT = 70
SHORT_COSTS = {"parameters": "parameters", "disk (MB)": "disk", "peak memory (MB)": "peak memory"}
SHORT_COSTS |= {"load time (ms)": "load time", "latency (ms)": "latency"}
SAME, TIMED = 0.005, ("latency (ms)",)
MORE = 1.05
"""A cost at least so many times the baseline's is needed; below, it is only stated."""


def quoted(text: object) -> str:
    """A plan's words as a quotation in one line."""
    return f'"{plain_text(text, MOST_TEXT)}"'


def listed(parts: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else list(parts))


def abbreviated(metrics: Sequence[str]) -> list[str]:
    """Names for a list in a sentence: a score is named once, then only its samplers."""
    named: list[str] = []
    for before, metric in zip(("", *metrics), metrics, strict=False):
        score = score_of(metric)
        named.append(metric.removeprefix(f"{score} ") if before and score == score_of(before) != metric else metric)
    return named


def serving(arm: ArmEffects, who: str) -> str:
    """`it needs 4.0x the parameters, 4.2x the disk; latency 0.98x`; '' where no cost of serving is asked or changed."""
    changed = {name: value for name, value in arm.ratios.items() if abs(value - 1) >= SAME or name in TIMED}
    needed = [f"{ratio(value)} the {SHORT_COSTS[name]}" for name, value in changed.items() if value >= MORE]
    rest = [f"{SHORT_COSTS[name]} {ratio(value)}" for name, value in changed.items() if value < MORE]
    if needed:
        return "; ".join([f"{who} needs {', '.join(needed)}", *([", ".join(rest)] if rest else [])])
    return f"{who} serves at {', '.join(rest)}" if rest else ""
