"""Every model family by its name in `model.family`."""

from __future__ import annotations

from deme_diffusion.errors import UserError, nearest
from deme_diffusion.models.ddpm import DDPM
from deme_diffusion.models.denoiser import Denoiser

FAMILIES: dict[str, type[Denoiser]] = {"ddpm": DDPM}


def family(name: str) -> type[Denoiser]:
    """The family of that name. Raises UserError with the nearest name."""
    if name not in FAMILIES:
        raise UserError(f"model.family: unknown family {name!r}{nearest(name, FAMILIES)}")
    return FAMILIES[name]
