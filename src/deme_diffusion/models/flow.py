"""What flow-matching families share: sigmas by index, the forward process, the density of t, sizes of images.

Index i in 0..T-1 ascends in noise: sigma_i is the scheduler's i-th smallest. A subset of indices is a set of sigmas:
i stands for [sigma_i, sigma_{i+1}), the first from 0 on, the last with 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from deme_diffusion.config import ModelSettings
from deme_diffusion.density import index_density
from deme_diffusion.errors import UserError
from deme_diffusion.files import part_of
from deme_diffusion.models.components import longer
from deme_diffusion.models.denoiser import Condition, Noised, Prompt, Takes
from deme_diffusion.models.latent import LatentDenoiser
from deme_diffusion.models.precision import computes_in
from deme_diffusion.schedule import FLOW_PREDICTION, flow_edges, flow_sigmas, is_flow
from deme_diffusion.weight_files import read_json


class FlowDenoiser(LatentDenoiser):
    """Rectified flow: x_t = (1 - sigma) x_0 + sigma eps, and the model predicts eps - x_0 (Esser et al. 2024)."""

    component: ClassVar[str] = "transformer"
    takes: ClassVar[Takes] = "text"
    timestep_scale: ClassVar[float] = 1.0
    """A forward gets T sigma times this."""
    scheme: ClassVar[Literal["uniform", "logit_normal"]] = "uniform"
    """The density of t in diffusers' training script of the family, whose weighting of losses may be another."""
    patch: ClassVar[int] = 2
    """Latents along a side of one token."""
    text_tokens: ClassVar[int]
    """Tokens of T5 that the stock pipeline encodes where it is not told otherwise."""

    settings = ModelSettings()
    _scheduler: Any = None

    @classmethod
    def scheduler_of(cls, folder: Path) -> Any:
        """The checkpoint's own scheduler. UserError where it is none of flow matching."""
        import diffusers

        file = part_of(folder, "scheduler") / "scheduler_config.json"
        config = read_json(file)
        kind = str(config.get("_class_name"))
        if not is_flow(config) or not hasattr(diffusers, kind):
            raise UserError(f"{file}: a {kind} without flow sigmas, but family {cls.family} matches flows")
        flow_sigmas(config, where=str(file))
        return getattr(diffusers, kind).from_pretrained(file.parent)

    @classmethod
    def check_config(cls, folder: Path, config: dict[str, Any]) -> None:
        where, given, taken = part_of(folder, cls.component), config.get("in_channels"), cls.channels_in(folder)
        if given is not None and taken is not None and given != taken:
            raise UserError(
                f"{where}: {given} input channels where latents give {taken}: a model for inpainting, control or given "
                f"images; family {cls.family} trains text-to-image models"
            )

    @classmethod
    def channels_in(cls, folder: Path) -> int | None:
        """Channels that the autoencoder's latents give the component; None where its config does not say."""
        latents = read_json(part_of(folder, cls.autoencoder) / "config.json").get("latent_channels")
        return None if latents is None else int(latents)

    def configure(self, settings: ModelSettings) -> None:
        super().configure(settings)
        self.settings = settings
        self.__dict__.pop("density", None)

    # -- sigmas ------------------------------------------------------------------------------------

    @cached_property
    def sigmas(self) -> npt.NDArray[np.float64]:
        """(T,) ascending."""
        return flow_sigmas(self.scheduler.config)

    @cached_property
    def edges(self) -> npt.NDArray[np.float64]:
        """(T,) ascending: index i begins at this T sigma (`schedule.flow_edges`)."""
        return flow_edges(self.sigmas)

    def _table(self, name: str, device: torch.device) -> torch.Tensor:
        """`sigmas` or `edges` as a tensor (T,) float64; made anew, since memory is also estimated on fake tensors."""
        return torch.from_numpy(getattr(self, name)).to(device, non_blocking=True)

    def index(self, timestep: torch.Tensor) -> torch.Tensor:
        asked = timestep.double() / self.timestep_scale
        if self._steps is not None and timestep.dtype in (torch.bfloat16, torch.float16):
            # Rounded by the pipeline, by up to 4 in 1000 in bfloat16: the sampler's own step, which is close by.
            steps = self._steps.to(asked)
            asked = steps[(asked.unsqueeze(-1) - steps).abs().argmin(-1)]
        return self.index_of_step(asked)

    @contextmanager
    def _standing_in(self, module: nn.Module, scheduler: Any) -> Iterator[Any]:
        with super()._standing_in(module, scheduler) as pipeline:
            self._scheduler = scheduler
            try:
                yield pipeline
            finally:
                self._scheduler = None

    @property
    def _steps(self) -> torch.Tensor | None:
        """The timesteps of the sampler that samples; None outside of sampling."""
        return None if self._scheduler is None else self._scheduler.timesteps

    def index_of_step(self, timestep: torch.Tensor) -> torch.Tensor:
        edges = self._table("edges", timestep.device)
        return (torch.bucketize(timestep.to(edges.dtype), edges, right=True) - 1).clamp(min=0)

    def asked_at(self, t: torch.Tensor) -> torch.Tensor:
        """Indices (b,) -> what the forward gets as timestep, (b,) float32."""
        return (self._table("sigmas", t.device)[t] * self.num_train_timesteps).float() * self.timestep_scale

    def snr(self) -> torch.Tensor:
        return torch.from_numpy(np.square((1 - self.sigmas) / self.sigmas))

    @property
    def prediction_type(self) -> str:
        """`flow_prediction`: eps - x_0."""
        return FLOW_PREDICTION

    def diffused(self, clean: torch.Tensor, condition: Condition, t: torch.Tensor, noise: torch.Tensor) -> Noised:
        """x_t = (1 - sigma) x_0 + sigma eps, target eps - x_0; a sample's sigma is its t's."""
        sigma = self._table("sigmas", t.device)[t].to(clean.dtype).view(-1, *[1] * (clean.ndim - 1))
        return Noised((1 - sigma) * clean + sigma * noise, t, noise - clean, condition)

    # -- the density of t --------------------------------------------------------------------------

    @cached_property
    def density(self) -> npt.NDArray[np.float64]:
        """(T,) probability of each index under `model.weighting_scheme`; sums to 1."""
        said = self.settings
        scheme = self.scheme if said.weighting_scheme == "family" else said.weighting_scheme
        return index_density(
            scheme, self.num_train_timesteps, mean=said.logit_mean, std=said.logit_std, scale=said.mode_scale
        )

    def timesteps(self, subset: npt.NDArray[np.int64], u: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """By the inverse of the distribution function within `subset`. UserError where that has no probability."""
        density = self.density[subset]
        if density.min() == density.max() > 0:
            return super().timesteps(subset, u)
        reached = np.cumsum(density)
        if not reached[-1] > 0:
            raise UserError(
                f"model.weighting_scheme: the density of t is 0 on [{subset[0]},{subset[-1] + 1}); take a wider one"
            )
        last = int(np.flatnonzero(density)[-1])
        return np.asarray(subset[np.minimum(np.searchsorted(reached, u * reached[-1], side="right"), last)])

    def mass(self, subset: npt.NDArray[np.int64]) -> float:
        return float(self.density[subset].sum())

    # -- sizes -------------------------------------------------------------------------------------

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of an image: `model.resolution`, else as the checkpoint says. UserError where none fits."""
        side, step = self.settings.resolution, self.downscaling * self.patch
        height, width = (side, side) if side else self.own_pixels
        if height % step or width % step:
            near = max(step, round(height / step) * step)
            raise UserError(
                f"model.resolution: {height} is no multiple of {step}, as {self.kind} needs; did you mean {near}?"
            )
        return height, width

    @property
    def own_pixels(self) -> tuple[int, int]:
        """Height and width where the recipe says nothing."""
        raise NotImplementedError

    @property
    def sample_shape(self) -> tuple[int, ...]:
        height, width = self.pixels
        return (self.latent_channels, height // self.downscaling, width // self.downscaling)

    @property
    def latent_channels(self) -> int:
        """Channels of one latent."""
        config: Any = self.module.config
        return int(config.in_channels)

    @property
    def max_sequence_length(self) -> int:
        """Tokens of T5: `model.max_sequence_length`, else as many as the stock pipeline takes."""
        return self.settings.max_sequence_length or self.text_tokens

    def cut_by(self, tokenizer: Any, captions: Sequence[str]) -> list[bool]:
        """Of each caption, whether T5's tokenizer cuts it."""
        return longer(tokenizer, captions, self.max_sequence_length)

    def asked(self, prompts: Sequence[Prompt], guidance_scale: float | None) -> dict[str, Any]:
        height, width = self.pixels
        size = {"height": height, "width": width, "max_sequence_length": self.max_sequence_length}
        return {**super().asked(prompts, guidance_scale), **size}

    def in_precision(self, **condition: torch.Tensor) -> Condition:
        """A condition in what the model computes in. UserError where it is not finite."""
        dtype = computes_in(self.module)
        return {name: self.finite(value, "a text encoder").to(dtype) for name, value in condition.items()}
