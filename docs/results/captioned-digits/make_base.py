"""Makes the base that recipe captioned-digits begins with: a tiny Stable Diffusion of stock classes, on 8x8 digits.

    OMP_NUM_THREADS=1 python docs/results/captioned-digits/make_base.py OUT [--steps N]

In order: a small CLIP, of which the tokenizer and the text tower stay; an autoencoder, 8x8x1 to 4x4x2; the U-Net,
trained by the package's own loop on all timesteps. Only the recipe's train split is seen, and all is keyed by one seed.
Run again, it goes on where it was interrupted: parts that are there stay, the U-Net from its last checkpoint. The
pipeline is in OUT/base.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from deme_diffusion import recipes
from deme_diffusion.config import ClipSettings, DataSettings, LossSettings, RuntimeSettings, TrainSettings
from deme_diffusion.data.sources import WORDINGS, WORDS
from deme_diffusion.data.splits import Split, load_splits
from deme_diffusion.decoupling.step import Job
from deme_diffusion.decoupling.train import train
from deme_diffusion.division import reported, whole
from deme_diffusion.evaluation.clip.train import train_clip
from deme_diffusion.files import write_text
from deme_diffusion.models.objective import FixedNoise
from deme_diffusion.models.stable_diffusion import StableDiffusion
from deme_diffusion.pipeline.inputs import TRAINED_ON, trained_on
from deme_diffusion.rng import image_at, normals, seed_of

log = logging.getLogger("make_base")
SEED, BATCH, LATENTS, AUTOENCODER_STEPS = 0, 128, 2, 3000
CLIP_SEED = 1
"""Not the seed of the CLIP that scores the images: no model is to be judged by its own text encoder."""
KL_WEIGHT = 1e-5
"""Beside the squared error of a pixel; with 1e-3 one of the two channels stays empty."""


def seeded(purpose: str, make: Callable[[], Any]) -> Any:
    """A module whose initial weights are keyed by the purpose."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(SEED, purpose))
        return make()


# -- the autoencoder -----------------------------------------------------------------------------------


def make_autoencoder() -> AutoencoderKL:
    """8x8x1 to 4x4x2."""
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        latent_channels=LATENTS,
        norm_num_groups=8,
        sample_size=8,
        mid_block_add_attention=False,
    )


def autoencoder_loss(vae: AutoencoderKL, split: Split, step: int) -> torch.Tensor:
    """Squared error and KL divergence of a batch of augmented images, a pixel."""
    picked = [image_at(SEED, step * BATCH + i, len(split)) for i in range(BATCH)]
    image = split.training_images(picked, seed=SEED, purpose="autoencoder", step=step, first=0)
    posterior = vae.encode(image).latent_dist
    noise = torch.from_numpy(normals(SEED, "autoencoder", step, 0, BATCH, tuple(posterior.mean.shape[1:])))
    again = vae.decode(posterior.mean + posterior.std * noise).sample
    return (again - image).square().mean() + KL_WEIGHT * posterior.kl().mean() / image[0].numel()


def train_autoencoder(split: Split) -> AutoencoderKL:
    """AdamW with one cycle of the learning rate."""
    vae = seeded("autoencoder", make_autoencoder).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=AUTOENCODER_STEPS)
    for step in range(AUTOENCODER_STEPS):
        loss = autoencoder_loss(vae, split, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 250 == 0:
            log.info("autoencoder: step %d/%d, loss %.4f", step + 1, AUTOENCODER_STEPS, float(loss.detach()))
    return vae.eval().requires_grad_(False)


def scale_latents(vae: AutoencoderKL, split: Split, held_out: Split) -> None:
    """Set the scale that gives the latents unit variance; say how well held-out images come back."""
    latents = torch.cat([vae.encode(view).latent_dist.mode() for view in split.views()])
    vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))
    images = torch.cat(list(held_out.views()))
    error = float((vae.decode(vae.encode(images).latent_dist.mode()).sample - images).square().mean())
    variance = float(images.var())
    log.info("autoencoder: squared error %.5f of held-out images, whose variance is %.3f", error, variance)


# -- the pipeline --------------------------------------------------------------------------------------


def make_unet(width: int) -> UNet2DConditionModel:
    """About half a million parameters, conditioned on text of this width."""
    return UNet2DConditionModel(
        sample_size=4,
        in_channels=LATENTS,
        out_channels=LATENTS,
        layers_per_block=1,
        block_out_channels=(32, 48),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def text_tower(clip: CLIPModel) -> CLIPTextModel:
    """The text encoder as a model of its own."""
    tower = CLIPTextModel(clip.config.text_config)
    tower.load_state_dict(clip.text_model.state_dict())
    return tower.eval()


def assembled(unet: Any, vae: Any, text_encoder: Any, tokenizer: Any) -> StableDiffusionPipeline:
    """The stock pipeline, on Stable Diffusion's schedule."""
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = DDIMScheduler(**schedule, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    parts = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "unet": unet, "scheduler": scheduler}
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def as_published(folder: Path) -> None:
    """Text encoder and tokenizer in the form of published checkpoints, which transformers before 5 reads as well.

    Keys begin with `text_model.`; vocab.json and merges.txt lie beside tokenizer.json, which holds both.
    """
    file, tokenizer = folder / "text_encoder" / "model.safetensors", folder / "tokenizer"
    state = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})
    model = json.loads((tokenizer / "tokenizer.json").read_text())["model"]
    write_text(tokenizer / "vocab.json", json.dumps(model["vocab"], ensure_ascii=False))
    merges = [" ".join(pair) for pair in model["merges"]]
    write_text(tokenizer / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]))


# -- the U-Net -----------------------------------------------------------------------------------------


class Encoded:
    """A split whose batches hold latents and text embeddings; there are few captions, so each is encoded once."""

    def __init__(self, split: Split, denoiser: StableDiffusion) -> None:
        self.split, self.denoiser, self.name = split, denoiser, split.name
        captions = ["", *(wording.format(word) for wording in WORDINGS for word in WORDS)]
        self.number = {caption: i for i, caption in enumerate(captions)}
        self.states = denoiser.encode_captions(captions)["encoder_hidden_states"]

    def __len__(self) -> int:
        return len(self.split)

    def training_batch(self, positions: Sequence[int], **keyed: Any) -> dict[str, Any]:
        """Augmented anew at every step."""
        return self.encoded(self.split.training_batch(positions, **keyed))

    def view_batch(self, view: int, start: int = 0, stop: int | None = None) -> dict[str, Any]:
        """The held-out views of the recipe."""
        return self.encoded(self.split.view_batch(view, start, stop))

    def encoded(self, batch: dict[str, Any]) -> dict[str, Any]:
        """`latent` (b, 2, 4, 4) and `condition`."""
        states = self.states[[self.number[caption] for caption in batch["caption"]]]
        return {"latent": self.denoiser.encode_images(batch["image"]), "condition": {"encoder_hidden_states": states}}


def train_unet(start: Path, folder: Path, splits: dict[str, Split], steps: int) -> None:
    """All timesteps, no teacher, no projection; each caption is left out with probability 0.1."""
    denoiser = StableDiffusion.load(start)
    settings = TrainSettings(
        learning_rate=1e-3,
        train_batch_size=BATCH,
        lr_scheduler="cosine",
        lr_warmup_steps=500,
        proportion_empty_prompts=0.1,
        ema_max_decay=0.999,
        validation_steps=500,
    )
    everything = whole(denoiser.num_train_timesteps)
    ranges = reported(everything, denoiser.num_train_timesteps)
    job = Job("base", settings, everything, steps, settings.learning_rate, SEED)
    validation = FixedNoise(denoiser, Encoded(splits["search"], denoiser), ranges, LossSettings())
    runtime = RuntimeSettings(device="cpu", threads=1, logging_steps=250)
    train(denoiser, Encoded(splits["train"], denoiser), job, folder, runtime=runtime, validation=validation)


# -- all of it -----------------------------------------------------------------------------------------


def make_start(out: Path, splits: dict[str, Split]) -> None:
    """OUT/start: the pipeline with an untrained U-Net."""
    clip_folder, vae_folder = out / "clip", out / "vae"
    if not clip_folder.is_dir():
        log.info(
            "clip: %s", train_clip(splits["train"], splits["search"], ClipSettings(), seed=CLIP_SEED, out=clip_folder)
        )
    if not vae_folder.is_dir():
        vae = train_autoencoder(splits["train"])
        scale_latents(vae, splits["train"], splits["search"])
        vae.save_pretrained(vae_folder)
    tower = text_tower(CLIPModel.from_pretrained(clip_folder))
    unet = seeded("unet", lambda: make_unet(tower.config.hidden_size))
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
    assembled(unet, AutoencoderKL.from_pretrained(vae_folder), tower, tokenizer).save_pretrained(out / "start")


def finish(out: Path, data: DataSettings) -> None:
    """OUT/base: the pipeline with the trained U-Net."""
    parts = StableDiffusionPipeline.from_pretrained(out / "start")
    vae = make_autoencoder()  # modules made here: those read from a folder would write its path into their configs
    vae.register_to_config(scaling_factor=parts.vae.config.scaling_factor)
    vae.load_state_dict(parts.vae.state_dict())
    unet = make_unet(parts.text_encoder.config.hidden_size)
    unet.load_state_dict(load_file(out / "trained" / "unet" / "diffusion_pytorch_model.safetensors"))
    assembled(unet, vae, parts.text_encoder, parts.tokenizer).save_pretrained(out / "base")
    as_published(out / "base")
    write_text(out / "base" / TRAINED_ON, trained_on(data, data.source))


def main() -> None:
    """The parts, the U-Net, the whole."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=14_000, help="of the U-Net")
    asked = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    data = recipes.load("captioned-digits").recipe.data
    splits: dict[str, Split] = {
        name: Split(name, split.source, split.indices, data, "text") for name, split in load_splits(data).items()
    }
    if not (asked.out / "start" / "model_index.json").is_file():
        make_start(asked.out, splits)
    train_unet(asked.out / "start", asked.out / "trained", splits, asked.steps)
    finish(asked.out, data)


if __name__ == "__main__":
    main()
