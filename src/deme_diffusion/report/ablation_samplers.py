"""Samplers that arms change: their short names, and which figures were sampled otherwise than the baseline's."""

from collections.abc import Mapping
from typing import Any

from deme_diffusion.report.cells import Figure

SPOKEN = {"DPMSolverMultistep": "DPM-Solver++", "DPMSolverSinglestep": "DPM-Solver++ (singlestep)"}
"""Names of the field where the class's says less."""


def sampler_of(figure: Figure) -> str:
    """The sampler of a figure's protocol, `DDIM-20`; '' of a figure that nothing samples."""
    protocol = figure["protocol"]
    if "sampler" not in protocol or "steps" not in protocol:
        return ""
    name = str(protocol["sampler"]).removesuffix("Scheduler")
    eta = f"-eta{protocol['eta']:g}" if protocol.get("eta") else ""
    return f"{SPOKEN.get(name, name)}-{protocol['steps']}{eta}"


def resampled(ours: Figure | None, theirs: Figure | None) -> tuple[str, str] | None:
    """Our sampler and theirs where both are known and differ: ours then stands under the name of theirs."""
    if ours is None or theirs is None:
        return None
    pair = (sampler_of(ours), sampler_of(theirs))
    return pair if all(pair) and pair[0] != pair[1] else None


def samplers_said(value: Any) -> str | None:
    """A setting's list of samplers as `[DDIMScheduler-20, DDPMScheduler-50]`; None of any other value."""
    if not isinstance(value, list | tuple) or not value or not all(map(_is_sampler, value)):
        return None
    return f"[{', '.join(map(_said, value))}]"


def _is_sampler(value: Any) -> bool:
    return isinstance(value, Mapping) and {"name", "num_inference_steps"} <= value.keys()


def _said(sampler: Mapping[str, Any]) -> str:
    eta = f"-eta{sampler['eta']}" if sampler.get("eta") else ""
    spacing = f"-{sampler['timestep_spacing']}" if sampler.get("timestep_spacing") else ""
    return f"{sampler['name']}-{sampler['num_inference_steps']}{eta}{spacing}"
