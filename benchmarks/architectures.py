"""What `train_step.py` times beside recipes: each family's tiny model of the tests, and real sizes with random weights.

Either way a step sees latents and embeddings that are there already, as from a cache.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deme_diffusion.config import DecoupleSettings
from deme_diffusion.decoupling.step import Job
from deme_diffusion.division import Runs
from deme_diffusion.files import write_json
from deme_diffusion.models.denoiser import Condition, Denoiser
from deme_diffusion.models.lora import LowRank
from deme_diffusion.models.precision import held_in

TESTS = Path(__file__).resolve().parent.parent / "tests"
SD1: dict[str, Any] = {"cross_attention_dim": 768}
"""Of `UNet2DConditionModel`; diffusers' defaults are Stable Diffusion 1.x's else (859,520,964 parameters)."""
SDXL: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
"""Stable Diffusion XL's (2,567,463,684 parameters)."""


@dataclass(frozen=True)
class Latents:
    """Latents and embeddings (n, ...) in place of a split."""

    latent: torch.Tensor
    condition: Condition

    def __len__(self) -> int:
        return len(self.latent)

    def training_batch(self, positions: Sequence[int], **options: Any) -> dict[str, Any]:
        """The rows at these positions; nothing is drawn."""
        rows = torch.tensor(list(positions))
        return {"latent": self.latent[rows], "condition": {key: value[rows] for key, value in self.condition.items()}}


def tiny(name: str, dtype: torch.dtype, count: int = 64) -> tuple[Denoiser, Latents]:
    """A family's tiny model of the tests, and digits that its encoders have encoded."""
    sys.path.insert(0, str(TESTS))
    import every_family

    denoiser = every_family.opened(name, None if dtype == torch.float32 else dtype)
    with torch.no_grad():
        found = denoiser.encoded(every_family.split_of(name, count=count).view_batch(0))
    return denoiser, Latents(found["latent"], found["condition"])


def random_weights(
    name: str, resolution: int, dtype: torch.dtype, folder: Path, count: int = 32
) -> tuple[Denoiser, Latents]:
    """The architecture `sd1` or `sdxl` with random weights in `dtype`, and random latents and embeddings for it."""
    denoiser = ARCHITECTURES[name](resolution, folder)
    held_in(denoiser.module, dtype)
    draw = torch.Generator().manual_seed(0)
    condition = {
        key: torch.randn(value.shape, generator=draw).to(dtype) for key, value in denoiser.placeholder(count).items()
    }
    return denoiser, Latents(torch.randn((count, *denoiser.sample_shape), generator=draw), condition)


def _sd1(resolution: int, folder: Path) -> Denoiser:
    from deme_diffusion.models.stable_diffusion import StableDiffusion

    return StableDiffusion(_texts(folder), _unet(resolution, SD1), _schedule())


def _sdxl(resolution: int, folder: Path) -> Denoiser:
    from deme_diffusion.models.stable_diffusion_xl import StableDiffusionXL

    return StableDiffusionXL(_texts(folder), _unet(resolution, SDXL), _schedule())


ARCHITECTURES: dict[str, Callable[[int, Path], Denoiser]] = {"sd1": _sd1, "sdxl": _sdxl}


def _unet(resolution: int, options: dict[str, Any]) -> Any:
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DConditionModel(sample_size=resolution // 8, **options)


def _schedule() -> Any:
    from diffusers import DDPMScheduler

    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)


def _texts(folder: Path) -> Path:
    """What a pipeline folder says of its text encoders and autoencoder, which are not there."""
    for part, width in (("text_encoder", 768), ("text_encoder_2", 1280)):
        config = {"max_position_embeddings": 77, "hidden_size": width, "projection_dim": width}
        (folder / part).mkdir()
        write_json(folder / part / "config.json", config)
    (folder / "vae").mkdir()
    write_json(folder / "vae" / "config.json", {"block_out_channels": [128, 256, 512, 512], "latent_channels": 4})
    return folder


def job(denoiser: Denoiser, *, steps: int, batch: int, dtype: torch.dtype, rank: int | None) -> Job:
    """An expert of the first of four ranges, whole or as LoRA of a rank, in the model's precision."""
    mixed: Any = "no" if dtype == torch.float32 else "bf16" if dtype == torch.bfloat16 else "fp16"
    projection: Any = "residual" if rank is None else "none"
    settings = DecoupleSettings(
        train_batch_size=batch, mixed_precision=mixed, learning_rate=1e-5, lora_rank=rank, projection=projection
    )
    subset: Runs = [[0, denoiser.num_train_timesteps // 4]]
    return Job(
        "expert 0",
        settings,
        subset,
        steps,
        settings.learning_rate,
        0,
        global_prob=settings.global_prob,
        consistency_weight=settings.consistency_weight,
        projection=projection,
        lora=None if rank is None else LowRank(rank),
    )
