"""Which diffusers schedulers can sample, and with which settings: known before anything runs, and without torch."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from deme_diffusion.config import FLOW, SamplerSettings
from deme_diffusion.errors import UserError, nearest
from deme_diffusion.schedule import FLOW_PREDICTION, flow_shift, is_flow

UNUSABLE = {
    "EDMEulerScheduler": "its noise levels and scalings are those of EDM models, not a schedule of betas",
    "DPMSolverSDEScheduler": "it draws noise without generators, so an image would depend on more than its seed",
}
"""Listed by diffusers as exchangeable; each reason is shown to the user."""
PNDM_STEPS = 4


OF_FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
"""For flow matching alone; others solve both, with flow sigmas or without."""
OFFSETS = {"stable_diffusion": 1}
"""`steps_offset` that a family's stock pipeline sets, whatever the config of its scheduler says."""
GIVES_MU = "flux"
"""The family whose stock pipeline tells every scheduler a shift by the size of images."""


def check_sampler(sampler: SamplerSettings, num_timesteps: int, *, key: str, family: str | None = None) -> None:
    """Raises UserError for a sampler that diffusers does not have, settings that it would ignore, too many steps.

    `family` None: a sampler of either kind, for a schedule of betas or for flow matching.
    """
    name, steps = sampler.name, sampler.num_inference_steps
    _check_name(name, key, family)
    flow = name in OF_FLOWS or family in FLOW
    if steps > num_timesteps:
        raise UserError(f"{key}: {steps} steps of {name}, but the model has {num_timesteps} timesteps")
    if sampler.eta and "eta" not in parameters(name, "step"):
        instead = "" if flow else ", or take DDIMScheduler"
        raise UserError(f"{key}: {name} has no eta, given as {sampler.eta:g}; leave it 0{instead}")
    options, spacing = parameters(name, "__init__"), sampler.timestep_spacing
    if spacing and (flow or "timestep_spacing" not in options):
        reason = "spaces its steps by sigmas" if flow else "has no timestep_spacing"
        raise UserError(f"{key}: {name} {reason}, given timestep_spacing={spacing}; leave it null")
    if "solver_order" in options and spacing != "trailing" and steps == num_timesteps and not flow:
        # diffusers rounds the steps onto the timesteps, two of them onto one, and a multistep solver divides by 0.
        raise UserError(f"{key}: {steps} steps of {name}, which takes at most {steps - 1} of {num_timesteps} timesteps")
    if name == "PNDMScheduler" and steps < PNDM_STEPS:
        raise UserError(f"{key}: {steps} steps of {name}, which begins with Runge-Kutta and takes {PNDM_STEPS} or more")


def _check_name(name: str, key: str, family: str | None) -> None:
    known = flow_names() if family in FLOW else names() if family else (*names(), *OF_FLOWS)
    if name in UNUSABLE:
        raise UserError(f"{key}: {name} cannot be used: {UNUSABLE[name]}")
    if name in known:
        return
    if family in FLOW and name in names():
        near = OF_FLOWS["Heun" in name]
        raise UserError(f"{key}: {name} samples on a schedule of betas, and family {family} matches flows; take {near}")
    if name in OF_FLOWS:
        near = name.removeprefix("FlowMatch")
        raise UserError(f"{key}: {name} is for flow matching, and family {family} has a schedule of betas; take {near}")
    kind = "flow matching" if family in FLOW else "discrete schedules"
    raise UserError(f"{key}: {name!r} is no sampler of diffusers for {kind}{_hint(name, known)}")


def sampler_options(
    sampler: SamplerSettings, config: Mapping[str, Any], *, key: str = "sampler", family: str | None = None
) -> dict[str, Any]:
    """What `from_config` of a sampler's class must be told beside the checkpoint's scheduler config.

    Raises UserError for one that cannot step on that schedule, or that begins beyond its timesteps.
    """
    name, options = sampler.name, dict[str, Any]()
    if sampler.timestep_spacing is not None:
        options["timestep_spacing"] = sampler.timestep_spacing
    _check_first(sampler, config, key, family)
    if name == "DPMSolverSinglestepScheduler":
        options["lower_order_final"] = True  # diffusers turns it on in any case, with a warning at every batch
    return options | (_flow_options(name, config, key, family) if is_flow(config) else {})


def _check_first(sampler: SamplerSettings, config: Mapping[str, Any], key: str, family: str | None) -> None:
    """Raises UserError where `steps_offset`, added to steps that are spaced from 0, leads beyond the timesteps."""
    name, steps = sampler.name, sampler.num_inference_steps
    own, total = parameters(name, "__init__"), int(config.get("num_train_timesteps", 0))
    offset = int(OFFSETS.get(family or "", config.get("steps_offset", 0)))
    if not offset or not total or not {"steps_offset", "timestep_spacing"} <= own:
        return
    inherited = {key: value for key, value in config.items() if key not in config.get("_use_default_values", ())}
    spacing = sampler.timestep_spacing or inherited.get("timestep_spacing") or default_spacing(name)

    def beyond(steps: int) -> bool:
        more = int("solver_order" in own)  # these space one step more, and leave out timestep 0
        return (steps - 1 + more) * (total // (steps + more)) + offset >= total

    if spacing == "leading" and beyond(steps):
        most = next((fewer for fewer in range(steps - 1, 0, -1) if not beyond(fewer)), None)
        fewer = "" if most is None else f"at most {most} steps, or "
        raise UserError(
            f"{key}: {steps} steps of {name} begin beyond the model's {total} timesteps, since its scheduler has "
            f"steps_offset {offset}; take {fewer}timestep_spacing=trailing"
        )


def _flow_options(name: str, config: Mapping[str, Any], key: str, family: str | None) -> dict[str, Any]:
    own, sized = parameters(name, "__init__"), bool(config.get("use_dynamic_shifting", False))
    # The stock pipeline passes mu, which these assert to be meant, or do not know.
    if (sized or family == GIVES_MU) and "mu" not in parameters(name, "set_timesteps"):
        raise UserError(f"{key}: {name} cannot shift its sigmas by the size of images; take {OF_FLOWS[0]}")
    asserts = name not in OF_FLOWS and name != "UniPCMultistepScheduler"
    if family == GIVES_MU and not sized and asserts:
        raise UserError(f"{key}: {name} takes no fixed shift in the pipeline of {family}; take {OF_FLOWS[0]}")
    if name in OF_FLOWS:
        return {"shift": flow_shift(config)}
    assert "use_flow_sigmas" in own, f"{name} was checked"
    return {"use_flow_sigmas": True, "flow_shift": flow_shift(config), "prediction_type": FLOW_PREDICTION}


def _hint(name: str, known: tuple[str, ...]) -> str:
    """The name that this one is the beginning of (`DDIM`), or the nearest one."""
    begun = sorted((other for other in known if other.lower().startswith(name.lower())), key=len)
    return f"; did you mean {begun[0]!r}?" if name and begun else nearest(name, known)


@cache
def flow_names() -> tuple[str, ...]:
    """Samplers of flow matching: diffusers' own two, and the general solvers that take flow sigmas."""
    return (*OF_FLOWS, *(name for name in names() if "use_flow_sigmas" in parameters(name, "__init__")))


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
    found = _method(name, method)
    return frozenset(arg.arg for arg in (*found.args, *found.kwonlyargs)) if found else frozenset()


def default_spacing(name: str) -> str | None:
    """How a diffusers scheduler spaces its steps where nothing says so, read from its source."""
    found = _method(name, "__init__")
    if found is None:
        return None
    names = [arg.arg for arg in found.args][-len(found.defaults) :]
    value = dict(zip(names, found.defaults, strict=True)).get("timestep_spacing")
    return str(value.value) if isinstance(value, ast.Constant) else None


@cache
def _method(name: str, method: str) -> ast.arguments | None:
    for file in sorted(_schedulers().glob("scheduling_*.py")):
        if f"\nclass {name}(" in (source := file.read_text()):
            kinds = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == name)
            found = (node for node in next(kinds).body if isinstance(node, ast.FunctionDef) and node.name == method)
            return next((node.args for node in found), None)
    return None


def _schedulers() -> Path:
    spec = importlib.util.find_spec("diffusers")
    assert spec is not None and spec.origin is not None, "diffusers is a dependency"
    return Path(spec.origin).parent / "schedulers"
