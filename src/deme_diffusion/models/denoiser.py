"""The interface between the method and a model family: everything else speaks of x_t, t and predictions only.

A family is one small file that subclasses `Denoiser` and adds a row to `families.FAMILIES`. Modules are passed in
explicitly, so that the same lines run the student, the teacher, a merged model and the routed ensemble.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from deme_diffusion.weights import state_digest

Condition = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Noised:
    """A training batch: x_t (b, ...), t (b,) in 0..T-1, target (b, ...) as the model predicts it, and conditions."""

    x_t: torch.Tensor
    t: torch.Tensor
    target: torch.Tensor
    condition: Condition


class Denoiser(ABC):
    """A pretrained model of one family: `module` is the component that is trained, `scheduler` the checkpoint's own."""

    component: ClassVar[str]
    """Name of the trained part in the diffusers pipeline: `unet` or `transformer`."""

    module: nn.Module
    scheduler: Any

    @classmethod
    @abstractmethod
    def load(cls, folder: Path) -> Denoiser:
        """The model of a diffusers pipeline folder. Raises UserError when it is not of this family, or pickled."""

    @abstractmethod
    def component_from(self, folder: Path) -> nn.Module:
        """The component in `folder/<component>`, in eval mode: an expert's or a merged model's."""

    @abstractmethod
    def noised(self, batch: dict[str, Any], t: torch.Tensor, noise: torch.Tensor) -> Noised:
        """The forward process: what the model sees at t, and what it should answer."""

    @abstractmethod
    def predict(self, module: nn.Module, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        """The prediction (b, ...) of any module with the component's forward."""

    @abstractmethod
    def index(self, timestep: torch.Tensor) -> torch.Tensor:
        """What a forward gets as timestep -> the index 0..T-1 that divisions speak of (int64, same shape)."""

    @abstractmethod
    def snr(self) -> torch.Tensor:
        """Signal-to-noise ratio of each t, (T,) float64."""

    @property
    @abstractmethod
    def sample_shape(self) -> tuple[int, ...]:
        """Shape (c, h, w) of one sample as the component sees it."""

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

    def trainable(self, module: nn.Module) -> list[nn.Parameter]:
        """The parameters that training changes: all of them here, the adapters' in a LoRA family."""
        return list(module.parameters())

    @contextmanager
    def teacher(self, dtype: torch.dtype | None = None) -> Iterator[nn.Module]:
        """The frozen pretrained model itself (students are copies), or a copy in another precision.

        The copy stands in for the model, which waits in CPU memory. On leaving, the teacher's bits are checked to be
        the same.
        """
        module = self.module if dtype is None else copy.deepcopy(self.module).to(dtype)
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
        student = copy.deepcopy(self.module).requires_grad_(True)
        return student if next(student.parameters()).dtype == torch.float64 else student.float()
