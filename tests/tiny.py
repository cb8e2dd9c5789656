"""Tiny pipelines of stock diffusers classes, built from configs, with tokenizers made here: one a family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

T, TOKENS, WIDTH = 20, 12, 16
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.'-"


def clip_tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer whose tokens are letters."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    files = {"vocab": str(folder / "vocab.json"), "merges": str(folder / "merges.txt")}
    return CLIPTokenizer(**files, model_max_length=TOKENS)


def clip_text(tokenizer: Any, projection: int | None = None) -> Any:
    """A text encoder of one layer; with a projection where a width is given."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=projection or WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModel if projection is None else CLIPTextModelWithProjection)(config)


def autoencoder(channels: int = 1, latents: int = 4) -> Any:
    """8x8 images to 4x4 latents."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        latent_channels=latents,
        norm_num_groups=2,
        sample_size=8,
    )


def unet(**options: Any) -> Any:
    """A conditional U-Net of 4x4 latents."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 8),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=4,
        **{"cross_attention_dim": WIDTH, **options},
    )


def stable_diffusion(folder: Path, channels: int = 1, **scheduler: Any) -> Path:
    """A Stable Diffusion pipeline of 8x8 images, T = 20; `scheduler` such as prediction_type="v_prediction"."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = clip_tokenizer(folder.parent / f"{folder.name}-tokenizer")
        component = unet()
        schedule = DDIMScheduler(num_train_timesteps=T, beta_end=0.3, clip_sample=False, steps_offset=1, **scheduler)
        parts = {"vae": autoencoder(channels), "text_encoder": clip_text(tokenizer), "tokenizer": tokenizer}
        pipeline = StableDiffusionPipeline(
            **parts,
            unet=component,
            scheduler=schedule,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder)
    return folder


def stable_diffusion_xl(folder: Path, channels: int = 1, **unet_options: Any) -> Path:
    """A Stable Diffusion XL pipeline of 8x8 images, T = 20, with two text encoders."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizers = [clip_tokenizer(folder.parent / f"{folder.name}-tokenizer-{i}") for i in (1, 2)]
        added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
        sizes = {"projection_class_embeddings_input_dim": 6 * 4 + 12, "cross_attention_dim": 2 * WIDTH}
        component = unet(**{**added, **sizes, **unet_options})
        pipeline = StableDiffusionXLPipeline(
            vae=autoencoder(channels),
            text_encoder=clip_text(tokenizers[0]),
            text_encoder_2=clip_text(tokenizers[1], projection=12),
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
            unet=component,
            scheduler=EulerDiscreteScheduler(num_train_timesteps=T, beta_end=0.3),
            add_watermarker=False,
        )
    pipeline.save_pretrained(folder)
    return folder


def dit(folder: Path, channels: int = 1, classes: int = 1000, learned_variance: bool = True) -> Path:
    """A DiT pipeline of 8x8 images, T = 20; its classes 1 and 2 are named "one" and "two, deux"."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=4,
            in_channels=4,
            out_channels=8 if learned_variance else 4,
            num_layers=2,
            sample_size=4,
            patch_size=2,
            num_embeds_ada_norm=classes,
            norm_num_groups=4,
        )
        schedule = DDIMScheduler(num_train_timesteps=T, beta_end=0.3, clip_sample=False)
        pipeline = DiTPipeline(transformer=transformer, vae=autoencoder(channels), scheduler=schedule)
    pipeline.save_pretrained(folder)
    index = folder / "model_index.json"  # where names stand on the hub; they are not saved
    index.write_text(json.dumps({**json.loads(index.read_text()), "id2label": {"1": "one", "2": "two, deux"}}))
    return folder
