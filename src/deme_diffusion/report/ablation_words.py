"""Words that verdicts are made of: quotations, lists, names of metrics, and what serving a model costs."""

from collections.abc import Sequence

from deme_diffusion.report.ablation_costs import LATENCY, LOAD, SAME
from deme_diffusion.report.ablation_effects import ArmEffects, plain_text, score_of
from deme_diffusion.report.cells import ratio

MOST_TEXT, MOST_NAMED = 70, 4
SHORT_COSTS = {"parameters": "parameters", "disk (MB)": "disk", "peak memory (MB)": "peak memory"}
SHORT_COSTS |= {LOAD: "load time", LATENCY: "latency per image"}
MORE = 1.05
"""A cost at least so many times the baseline's is needed; below, it is only stated."""


def quoted(text: object) -> str:
    """A plan's words as a quotation in one line."""
    return f'"{plain_text(text, MOST_TEXT)}"'


def listed(parts: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else list(parts))


def shortened(names: Sequence[str], most: int) -> list[str]:
    """The first names, and how many more there are."""
    return [*names[:most], *([f"{len(names) - most} more"] if len(names) > most else [])]


def abbreviated(metrics: Sequence[str]) -> list[str]:
    """Names for a list in a sentence: a score is named once, then only its samplers."""
    named: list[str] = []
    for before, metric in zip(("", *metrics), metrics, strict=False):
        score = score_of(metric)
        named.append(metric.removeprefix(f"{score} ") if before and score == score_of(before) != metric else metric)
    return named


def serving(arm: ArmEffects, who: str) -> str:
    """`it needs 4.0x the parameters, 4.2x the disk; latency per image not told apart`; '' where no cost changed."""
    costs = arm.serving
    changed = {name: value for name, value in costs.ratios.items() if abs(value - 1) >= SAME}
    needed = [f"{ratio(value)} the {SHORT_COSTS[name]}" for name, value in changed.items() if value >= MORE]
    rest = [f"{SHORT_COSTS[name]} {ratio(value)}" for name, value in changed.items() if value < MORE]
    untold = f"{listed([SHORT_COSTS[name] for name in costs.untold])} not told apart" if costs.untold else ""
    if needed:
        return "; ".join(part for part in (f"{who} needs {', '.join(needed)}", ", ".join(rest), untold) if part)
    if rest:
        return "; ".join(part for part in (f"{who} serves at {', '.join(rest)}", untold) if part)
    return f"{who} has {untold} from the baseline's" if untold else ""


def nothing_to_tell(arms: Sequence[ArmEffects], *, alone: bool) -> str:
    """What is said of arms that are served as the baseline is, where costs are asked; '' of none."""
    alike = [quoted(arm.label) for arm in arms if arm.serving.alike and not serving(arm, "")]
    if not alike:
        return ""
    who = "it has" if alone else f"{listed(shortened(alike, MOST_NAMED))} {'has' if len(alike) == 1 else 'have'}"
    return f"{who} no cost of serving to tell: parameters, disk and sampler are the baseline's"
