"""Contents of `ablation.json` for tests, as the experiment writes them: metrics with values, arms of every status."""

import statistics
from collections.abc import Sequence
from typing import Any

from deme_diffusion.division import Division, uniform

DDIM, DDPM = "FD(digits-cnn) DDIM-20", "FD(digits-cnn) DDPM-50"
RECALL = "recall DDIM-20"
FD = {"asked": "FID", "columns": ["FD"], "reason": ""}
CLIP = {"asked": "CLIP Score", "columns": [], "reason": "digits has no captions"}


def figure(values: float | Sequence[float], **protocol: Any) -> dict[str, Any]:
    """A figure of one value, or of several seeds."""
    values = [values] if isinstance(values, int | float) else list(values)
    spread = statistics.stdev(values) if len(values) > 1 else None
    made = {"mean": statistics.fmean(values), "spread": spread, "n": 500, "seeds": list(range(len(values)))}
    return {**made, "protocol": protocol} | ({"values": values} if len(values) > 1 else {})


def sampled(values: float | Sequence[float], sampler: str = "DDIMScheduler", steps: int = 20) -> dict[str, Any]:
    """A figure of sampled images."""
    return figure(values, extractor="digits-cnn 1f", sampler=sampler, steps=steps, n=500, split="report")


def costs(times: float = 1.0, latency: float = 0.98, sampler: str = "DDIM-20") -> dict[str, Any]:
    """Costs of serving a model `times` as large; a step of it takes `latency` times the baseline's 4.1 ms."""
    machine = {"device": "x86_64", "threads": 1}
    made = {
        "parameters": figure(163_569 * times, counted="kept to serve"),
        "latency (ms)": {**figure(4.1 * latency, **machine, sampler=sampler, per="step"), "spread": 0.12},
        "peak memory (MB)": figure(2.6 * (1 + 0.43 * (times - 1)), counted="tensors"),
        "disk (MB)": figure(0.66 * (times if times == 1 else 1.05 * times), counted="weight files"),
        "load time (ms)": {**figure(11.3 * times, **machine), "spread": 0.4},
    }
    return {name: {**one, "seeds": [0]} for name, one in made.items()}


def arm(label: str, *, status: str = "done", division: Division | None = None, **more: Any) -> dict[str, Any]:
    """An arm; `metrics` and what else is said of it in `more`."""
    given = {"replacement": label, "label": label, "status": status, "reason": "", "nearest": [], "error": None}
    given |= {"change": {"decouple.num_ranges": 2}, "score": 0.9, "folder": None}
    if status == "done":
        made = (division or uniform(4, 1000)).as_dict()
        given |= {"model": "merged", "metrics": {}, "division": made, "steps": 1200, "seconds": 61.5}
    return {**given, **more}


def ablation(*arms: dict[str, Any], **more: Any) -> dict[str, Any]:
    """An ablation of the division with these arms."""
    given = {"name": "Ablation of the division", "ablated_part": "timestep division", "action": "REPLACE"}
    return {**given, "part": "division", "metrics": [FD], "score": 0.9, "arms": list(arms), **more}


def experiment(*ablations: dict[str, Any], **more: Any) -> dict[str, Any]:
    """An experiment with a baseline of 3 seeds."""
    baseline = {DDIM: sampled([7.4, 7.5, 7.6]), DDPM: sampled([5.0, 5.2, 5.1], "DDPMScheduler", 50)}
    baseline |= {RECALL: sampled([0.61, 0.62, 0.63]), "loss": figure([0.0812, 0.0813, 0.0811]), **costs(latency=1.0)}
    base = {DDIM: sampled([8.0, 8.2, 8.1]), "loss": figure(0.083), **costs(latency=1.0)}
    given = {
        "recipe": "digits",
        "plan": "gpt-4o",
        "discussion": "Why these.",
        "command": "deme ablate gpt-4o.md --recipe digits --seeds 3",
        "seeds": [0, 1, 2],
        "outcome": "merged",
        "baseline": {
            "change": {},
            "metrics": baseline,
            "model": "merged-0",
            "division": uniform(4, 1000).as_dict(),
            "steps": 2400,
            "seconds": 130.0,
        },
        "base": {"metrics": base},
        "ablations": list(ablations),
        "problems": [{"line": 7, "what": "no action"}],
        "steps": {"shared": 4800, "independent": 7200},
        "seconds": {"shared": 300.0, "independent": 500.0},
        "provenance": {"deme-diffusion": "0.3"},
    }
    return {**given, **more}


def published() -> dict[str, Any]:
    """The plan's question about merging, and a division replaced in every way an arm can end."""
    more = {
        DDIM: sampled([8.2, 8.3, 8.4 + 0.0643]),
        DDPM: sampled([5.1, 5.1, 5.2], "DDPMScheduler", 50),
        RECALL: sampled([0.60, 0.62, 0.61]),
        **costs(4.0),
    }
    removal = ablation(
        arm("removed", replacement=None, change={"merge.method": "none"}, metrics=more, model="ensemble", steps=2400),
        name="Ablation of Model Merging",
        ablated_part="Model merging technique",
        action="REMOVE",
        part="merging step",
        metrics=[FD, CLIP, {"asked": "recall", "columns": ["recall"], "reason": ""}],
    )
    better = {DDIM: sampled([6.9, 7.02, 7.1]), DDPM: sampled([5.0, 5.1, 5.2], "DDPMScheduler", 50), **costs()}
    worse = {DDIM: sampled([8.0, 8.2, 8.2]), DDPM: sampled([6.0, 6.2, 6.05], "DDPMScheduler", 50), **costs()}
    division = ablation(
        arm("overlapping ranges", metrics=better, change={"decouple.division": "overlapping"}),
        arm("random boundaries", metrics=worse, change={"decouple.division": "random_boundaries"}),
        arm("random assignment", status="failed", error="MachineError: out of memory"),
        arm("uniform", status="same_as_baseline", reason="the recipe's division is uniform"),
        arm("by phase of the moon", status="not_executable", reason="no division fits", nearest=["log-SNR", "uniform"]),
        metrics=[FD, CLIP],
    )
    return experiment(removal, division)
