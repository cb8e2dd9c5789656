"""Every model family by its name in `model.family`; each is imported when it is asked for."""

from __future__ import annotations

from importlib import import_module

from deme_diffusion.errors import UserError, nearest
from deme_diffusion.models.denoiser import Denoiser

FAMILIES: dict[str, str] = {
    "ddpm": "ddpm.DDPM",
    "stable_diffusion": "stable_diffusion.StableDiffusion",
    "stable_diffusion_xl": "stable_diffusion_xl.StableDiffusionXL",
    "dit": "dit.DiT",
    "stable_diffusion_3": "stable_diffusion_3.StableDiffusion3",
    "flux": "flux.Flux",
    "wan": "wan.Wan",
}


def family(name: str) -> type[Denoiser]:
    """The family of that name. Raises UserError with the nearest name."""
    if name not in FAMILIES:
        raise UserError(f"model.family: unknown family {name!r}{nearest(name, FAMILIES)}")
    module, kind = FAMILIES[name].split(".")
    found: type[Denoiser] = getattr(import_module(f"deme_diffusion.models.{module}"), kind)
    return found
