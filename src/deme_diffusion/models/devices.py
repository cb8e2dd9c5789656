"""Where models run: what `runtime.device` names, checked against what torch sees."""

from __future__ import annotations

import torch

from deme_diffusion.errors import UserError


def device_of(name: str) -> torch.device:
    """The device that `runtime.device` names; `auto` is CUDA where there is any, else the CPU (never a Mac's GPU).

    Raises UserError for `cuda` where torch sees no GPU.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        built = "is a CPU build" if torch.version.cuda is None else f"is built for CUDA {torch.version.cuda}"
        raise UserError(f"runtime.device: cuda, but torch {torch.__version__} {built} and sees no GPU; use auto or cpu")
    return torch.device(name)
