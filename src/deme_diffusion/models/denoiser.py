"""The interface between the method and a model family: everything else speaks of x_t, t and predictions only.

A family is one small file that subclasses `Denoiser` and adds a row to `families.FAMILIES`. Modules are passed in
explicitly, so that the same lines run the student, the teacher, a merged model and the routed ensemble.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from deme_diffusion.config import ModelSettings
from deme_diffusion.models.lora import parameters_of as adapter_parameters
from deme_diffusion.models.precision import computes_in, held_in, widened
from deme_diffusion.weights import state_digest

Condition = dict[str, torch.Tensor]
Takes = Literal["nothing", "class", "text"]
Prompt = str | int | None
"""What an image is asked for by: a caption, a class (-1 is none), or nothing."""


@dataclass(frozen=True)
class Noised:
    """A training batch: x_t (b, ...), t (b,) in 0..T-1, target (b, ...) as the model predicts it, and conditions."""

    x_t: torch.Tensor
    t: torch.Tensor
    target: torch.Tensor
    condition: Condition

    def as_type(self, dtype: torch.dtype) -> Noised:
        """With x_t and conditions as a module takes them that is held in `dtype`; classes stay whole numbers."""
        condition = {key: value.to(dtype) if value.is_floating_point() else value
                     for key, value in self.condition.items()}  # fmt: skip
        return replace(self, x_t=self.x_t.to(dtype), condition=condition)


def on_device(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device; strings and numbers as they are."""
    if isinstance(batch, dict):
        return {key: on_device(value, device) for key, value in batch.items()}
    return batch.to(device, non_blocking=True) if isinstance(batch, torch.Tensor) else batch


class Denoiser(ABC):
    """A pretrained model of one family: `module` is the component that is trained, `scheduler` the checkpoint's own."""

    component: ClassVar[str]
    """Name of the trained part in the diffusers pipeline: `unet` or `transformer`."""
    takes: ClassVar[Takes] = "nothing"
    """What the model is conditioned on, and so what a batch carries beside images: `label` or `caption`."""

    module: nn.Module
    scheduler: Any

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, dtype: torch.dtype | None = None) -> Denoiser:
        """The model of a diffusers pipeline folder, held in `dtype` (None: float32).

        Raises UserError when it is not of this family, or pickled.
        """

    def configure(self, settings: ModelSettings) -> None:  # noqa: B027 - nothing to configure is the common case
        """Take over what a recipe says of the model beside its files: the encoders' precision, the density of t."""

    @abstractmethod
    def component_from(self, folder: Path) -> nn.Module:
        """The component in `folder/<component>`, in eval mode: an expert's or a merged model's."""

    @abstractmethod
    def noised(self, batch: dict[str, Any], t: torch.Tensor, noise: torch.Tensor) -> Noised:
        """The forward process: what the model sees at t, and what it should answer.

        `batch` is a split's: `image` (b, c, h, w) in [-1, 1], with `label` (b,) or `caption` (b strings) where the
        family takes them; or, encoded beforehand, `latent` and `condition` (`data.encoded`).
        """

    @abstractmethod
    def predict(self, module: nn.Module, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        """The prediction (b, ...) of any module with the component's forward."""

    def answer(self, module: nn.Module, noised: Noised) -> torch.Tensor:
        """`predict` on a batch, in the type that the module is held in: `noised` is in float32, whatever that is."""
        given = noised.as_type(computes_in(module))
        return self.predict(module, given.x_t, given.t, given.condition)

    @abstractmethod
    def index(self, timestep: torch.Tensor) -> torch.Tensor:
        """What a forward gets as timestep -> the index 0..T-1 that divisions speak of (int64, same shape)."""

    def index_of_step(self, timestep: torch.Tensor) -> torch.Tensor:
        """What a scheduler lists among its timesteps -> the index: what a forward gets, in most pipelines."""
        return self.index(timestep)

    @abstractmethod
    def snr(self) -> torch.Tensor:
        """Signal-to-noise ratio of each t, (T,) float64."""

    @property
    @abstractmethod
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample as x_t: (c, h, w), of a video's latents (c, f, h, w)."""

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape (c, h, w) of an image that the model is trained on and makes: of a latent model, before the encoder."""
        return self.sample_shape

    def placeholder(self, count: int) -> Condition:
        """Zeros (count, ...) of the shapes that `predict` takes as condition: what sizes and timings are taken on."""
        return {}

    @property
    def num_train_timesteps(self) -> int:
        """T."""
        return int(self.scheduler.config.num_train_timesteps)

    @property
    def prediction_type(self) -> str:
        """`epsilon`, `v_prediction` or `sample`, as the checkpoint's scheduler says."""
        return str(self.scheduler.config.prediction_type)

    def timesteps(self, subset: npt.NDArray[np.int64], u: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """The family's density of t restricted to `subset`: (b,) uniform numbers in [0, 1) -> (b,) timesteps.

        Uniform here; a flow-matching family overrides it by its own density.
        """
        return np.asarray(subset[(u * len(subset)).astype(np.int64)])

    def mass(self, subset: npt.NDArray[np.int64]) -> float:
        """Probability of a subset under the family's density of t: what its mean loss weighs in the overall one."""
        return len(subset) / self.num_train_timesteps

    def trainable(self, module: nn.Module) -> list[nn.Parameter]:
        """The parameters that training changes: the adapters', where there are any in the module, else all of them."""
        return adapter_parameters(module) or list(module.parameters())

    @contextmanager
    def teacher(self, dtype: torch.dtype | None = None) -> Iterator[nn.Module]:
        """The frozen pretrained model itself (students are copies), or a copy in another precision.

        The copy stands in for the model, which waits in CPU memory. On leaving, the teacher's bits are checked to be
        the same.
        """
        module = self.module if dtype is None else held_in(copy.deepcopy(self.module), dtype)
        module.requires_grad_(False).eval()
        before, device = state_digest(module.state_dict()), next(module.parameters()).device
        if module is not self.module:
            self.module.cpu()
        try:
            yield module
        finally:
            self.module.to(device)
        assert state_digest(module.state_dict()) == before, "the teacher's weights were changed during training"

    def student(self) -> nn.Module:
        """A trainable copy of the pretrained module: float32 master weights, whatever precision it computes in.

        Double precision stays double, which tests compare in.
        """
        return widened(copy.deepcopy(self.module).requires_grad_(True))
