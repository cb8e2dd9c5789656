"""Exponential moving average of the weights (Karras et al. 2022 use one; schedule as in diffusers' scripts)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from deme_diffusion.config import TrainSettings


class Ema:
    """diffusers' `EMAModel` over a list of parameters; its weights are only ever seen inside `with ema.weights()`."""

    def __init__(self, parameters: list[nn.Parameter], settings: TrainSettings) -> None:
        self.parameters = parameters
        self.model = EMAModel(
            parameters,
            decay=settings.ema_max_decay,
            use_ema_warmup=True,
            inv_gamma=settings.ema_inv_gamma,
            power=settings.ema_power,
            foreach=True,
        )

    def step(self) -> None:
        """Follow the parameters after an update."""
        self.model.step(self.parameters)

    @contextmanager
    def weights(self) -> Iterator[None]:
        """The averaged weights stand in the parameters; on leaving, the raw ones are back, to the bit."""
        raw = [parameter.detach().clone() for parameter in self.parameters]
        self.model.copy_to(self.parameters)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self.parameters, raw, strict=True):
                    parameter.copy_(value)

    def state(self) -> dict[str, torch.Tensor]:
        """Averaged parameters by position."""
        return {str(i): value for i, value in enumerate(self.model.shadow_params)}

    def restore(self, state: dict[str, torch.Tensor], steps: int) -> None:
        """The inverse of `state`, after `steps` updates."""
        with torch.no_grad():
            for i, shadow in enumerate(self.model.shadow_params):
                shadow.copy_(state[str(i)])
        self.model.optimization_step = steps
