"""Exponential moving average of the weights (Karras et al. 2022 use one; schedule as in diffusers' scripts)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from deme_diffusion.config import TrainSettings


class Ema:
    """diffusers' `EMAModel` over a list of parameters; its weights are only ever seen inside `with ema.weights()`.

    `offload` holds it in CPU memory: it then follows copies of the parameters there.
    """

    def __init__(self, parameters: list[nn.Parameter], settings: TrainSettings, *, offload: bool = False) -> None:
        self.parameters, self.offload = parameters, offload
        self._followed = [_on_the_host(p) for p in parameters] if offload else parameters
        self.model = EMAModel(
            self._followed,
            decay=settings.ema_max_decay,
            use_ema_warmup=True,
            inv_gamma=settings.ema_inv_gamma,
            power=settings.ema_power,
            foreach=True,
        )

    def step(self) -> None:
        """Follow the parameters after an update."""
        if self.offload:
            for copy, parameter in zip(self._followed, self.parameters, strict=True):
                copy.data.copy_(parameter.data)
        self.model.step(self._followed)

    @contextmanager
    def weights(self) -> Iterator[None]:
        """The averaged weights stand in the parameters; on leaving, the raw ones are back, to the bit."""
        raw = [p.detach().cpu() if self.offload else p.detach() for p in self.parameters]
        raw = [value.clone() for value in raw]
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


def _on_the_host(parameter: nn.Parameter) -> nn.Parameter:
    copy = parameter.detach().to("cpu", copy=True)
    return nn.Parameter(copy.pin_memory() if torch.cuda.is_available() else copy)
