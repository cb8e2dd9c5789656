"""Which diffusers schedulers can sample, and with which settings: known before anything runs, and without torch."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path

from deme_diffusion.config import SamplerSettings
from deme_diffusion.errors import UserError, nearest

UNUSABLE = {
    "EDMEulerScheduler": "its noise levels and scalings are those of EDM models, not a schedule of betas",
    "DPMSolverSDEScheduler": "it draws noise without generators, so an image would depend on more than its seed",
}
"""Listed by diffusers as exchangeable; each reason is shown to the user."""
PNDM_STEPS = 4


def check_sampler(sampler: SamplerSettings, num_timesteps: int, *, key: str) -> None:
    """Raises UserError for a sampler that diffusers does not have, settings that it would ignore, too many steps."""
    name, steps = sampler.name, sampler.num_inference_steps
    if name not in names():
        raise UserError(f"{key}: {name!r} is no sampler of diffusers for discrete schedules{_hint(name)}")
    if name in UNUSABLE:
        raise UserError(f"{key}: {name} cannot be used: {UNUSABLE[name]}")
    if steps > num_timesteps:
        raise UserError(f"{key}: {steps} steps of {name}, but the model has {num_timesteps} timesteps")
    if sampler.eta and "eta" not in parameters(name, "step"):
        raise UserError(f"{key}: {name} has no eta, given as {sampler.eta:g}; leave it 0, or take DDIMScheduler")
    options, spacing = parameters(name, "__init__"), sampler.timestep_spacing
    if spacing and "timestep_spacing" not in options:
        raise UserError(f"{key}: {name} has no timestep_spacing, given as {spacing}; leave it null")
    if "solver_order" in options and spacing != "trailing" and steps == num_timesteps:
        # diffusers rounds the steps onto the timesteps, two of them onto one, and a multistep solver divides by 0.
        raise UserError(f"{key}: {steps} steps of {name}, which takes at most {steps - 1} of {num_timesteps} timesteps")
    if name == "PNDMScheduler" and steps < PNDM_STEPS:
        raise UserError(f"{key}: {steps} steps of {name}, which begins with Runge-Kutta and takes {PNDM_STEPS} or more")


def _hint(name: str) -> str:
    """The name that this one is the beginning of (`DDIM`), or the nearest one."""
    begun = sorted((known for known in names() if known.lower().startswith(name.lower())), key=len)
    return f"; did you mean {begun[0]!r}?" if name and begun else nearest(name, names())


@cache
def names() -> tuple[str, ...]:
    """Samplers that exchange on one noise schedule of betas, as diffusers lists them."""
    # Read from the source: importing diffusers would import torch.
    listed = re.findall(
        r"^    (\w+Scheduler) = \d+$", (_schedulers() / "scheduling_utils.py").read_text(), re.MULTILINE
    )
    return tuple(listed)


@cache
def parameters(name: str, method: str) -> frozenset[str]:
    """Parameters of a method of a diffusers scheduler, read from its source."""
    for file in sorted(_schedulers().glob("scheduling_*.py")):
        pattern = rf"^class {name}\(.*?^    def {method}\((.*?)^    \)"
        if found := re.search(pattern, file.read_text(), re.MULTILINE | re.DOTALL):
            return frozenset(re.findall(r"^        (\w+)", found[1], re.MULTILINE))
    return frozenset()


def _schedulers() -> Path:
    spec = importlib.util.find_spec("diffusers")
    assert spec is not None and spec.origin is not None, "diffusers is a dependency"
    return Path(spec.origin).parent / "schedulers"
