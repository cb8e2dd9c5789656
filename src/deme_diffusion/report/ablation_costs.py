"""What serving an arm costs as multiples of the baseline's; of times only what their spread lets one tell."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from deme_diffusion.report.cells import Figure

LATENCY, LOAD = "latency (ms)", "load time (ms)"
COSTS = ("parameters", "disk (MB)", "peak memory (MB)", LOAD, LATENCY)
SIZES, TIMES = ("parameters", "disk (MB)"), (LATENCY, LOAD)
SAME = 0.005
"""A size that differs by a smaller share is the same: a file's header has room for a few words more."""
TWICE = ("HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete")  # of second order: 2 n - 1 steps of the model
UNSURE = ("PNDM",)  # it begins with more steps or not, by the checkpoint's configuration

Metrics = Mapping[str, Figure]


@dataclass(frozen=True)
class ServingCosts:
    """Multiples of the baseline's, by metric; `untold`: times whose difference may be noise.

    `alike`: with the baseline's parameters, disk and sampler, so that its times say nothing of the arm.
    """

    ratios: Mapping[str, float] = field(default_factory=dict)
    untold: tuple[str, ...] = ()
    alike: bool = False


def serving_costs(
    arm: Metrics, baseline: Metrics, costs: Sequence[str], comparable: Callable[[Figure, Figure], bool]
) -> ServingCosts:
    """Those of some `costs` that both have and that may be compared."""
    sized = not same_size(arm, baseline)
    differs = {LATENCY: sized or not same_sampler(arm, baseline), LOAD: sized}
    ratios, untold = dict[str, float](), list[str]()
    for name in costs:
        ours, theirs = arm.get(name), baseline.get(name)
        if not ours or not theirs or ours["mean"] is None or not theirs["mean"] or not comparable(ours, theirs):
            continue
        if name not in TIMES:
            ratios[name] = ours["mean"] / theirs["mean"]
        elif differs[name]:
            times = _told_apart(ours, theirs, per_image=name == LATENCY)
            ratios |= {name: times} if times else {}
            untold += [] if times else [name]
    return ServingCosts(ratios, tuple(untold), not any(differs.values()))


def same_size(arm: Metrics, baseline: Metrics) -> bool:
    """Whether two models have as many parameters and bytes on disk, as far as both are known."""
    pairs = [(ours["mean"], theirs["mean"]) for name in SIZES if (ours := arm.get(name))
             and (theirs := baseline.get(name))]  # fmt: skip
    return all(a is None or not b or abs(a / b - 1) < SAME for a, b in pairs)


def same_sampler(arm: Metrics, baseline: Metrics) -> bool:
    """Whether two latencies, where both are known, are of one sampler with as many steps."""
    return LATENCY not in arm or LATENCY not in baseline or _sampler(arm[LATENCY]) == _sampler(baseline[LATENCY])


def _sampler(figure: Figure) -> str:
    return str(figure["protocol"].get("sampler", ""))


def _told_apart(ours: Figure, theirs: Figure, *, per_image: bool) -> float | None:
    """The ratio of two times, of an image's rather than a step's; None within the sum of their half-ranges."""
    times = (1, 1)
    if per_image and _sampler(ours) != _sampler(theirs):
        steps = (steps_of(_sampler(ours)), steps_of(_sampler(theirs)))
        if not steps[0] or not steps[1]:
            return None
        times = (steps[0], steps[1])
    (a, half_a), (b, half_b) = (
        (n * figure["mean"], n * figure["spread"]) if figure["mean"] is not None and figure["spread"] is not None
        else (0.0, 0.0) for n, figure in zip(times, (ours, theirs), strict=True)
    )  # fmt: skip
    return a / b if a and b and abs(a - b) > half_a + half_b else None


def steps_of(label: str) -> int | None:
    """How often an image passes the model, by a sampler's label (`DDIM-20`, `DDIM-20-eta0.5`); None if not known."""
    found = re.match(r"([A-Za-z]\w*)-(\d+)(?:-|$)", label)
    if found is None or found[1] in UNSURE:
        return None
    return 2 * int(found[2]) - 1 if found[1] in TWICE else int(found[2])
