"""Tiny pipelines of the flow-matching families, of stock diffusers classes, with tokenizers made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tiny import LETTERS, WIDTH, autoencoder, clip_text, clip_tokenizer

T = 20
SEQUENCE = 10
"""Tokens of T5 that the tests ask for."""


def t5_tokenizer() -> Any:
    """A T5 tokenizer whose tokens are letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *LETTERS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", "isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def t5_text(tokenizer: Any, kind: str = "T5", width: int = WIDTH) -> Any:
    """An encoder of one layer: `T5` or `UMT5`."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=4,
        d_ff=width,
        num_layers=1,
        num_heads=2,
        relative_attention_num_buckets=8,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return getattr(transformers, f"{kind}EncoderModel")(config)


def stable_diffusion_3(folder: Path, **scheduler: Any) -> Path:
    """SD3 on 8x8 images of one channel, T = 20, shift 3."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip, t5 = clip_tokenizer(folder.parent / f"{folder.name}-tokenizer"), t5_tokenizer()
        transformer = SD3Transformer2DModel(
            sample_size=4,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=2 * WIDTH,
            caption_projection_dim=16,
            pooled_projection_dim=2 * WIDTH,
            out_channels=4,
            pos_embed_max_size=8,
        )
        pipeline = StableDiffusion3Pipeline(
            transformer=_jittered(transformer),
            scheduler=FlowMatchEulerDiscreteScheduler(**{"num_train_timesteps": T, "shift": 3.0, **scheduler}),
            vae=shifted_autoencoder(),
            text_encoder=clip_text(clip, WIDTH),
            tokenizer=clip,
            text_encoder_2=clip_text(clip, WIDTH),
            tokenizer_2=clip,
            text_encoder_3=t5_text(t5, width=2 * WIDTH),
            tokenizer_3=t5,
        )
    return saved(pipeline, folder)


def flux(folder: Path, *, dev: bool = True, **scheduler: Any) -> Path:
    """Flux on 8x8 images of one channel, T = 20: dev-like (guidance embedded, shifted by size), or schnell-like."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip, t5 = clip_tokenizer(folder.parent / f"{folder.name}-tokenizer"), t5_tokenizer()
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            guidance_embeds=dev,
            axes_dims_rope=(4, 2, 2),
        )
        own = {"num_train_timesteps": T, "use_dynamic_shifting": dev, "shift": 3.0 if dev else 1.0}
        pipeline = FluxPipeline(
            transformer=_jittered(transformer),
            scheduler=FlowMatchEulerDiscreteScheduler(**{**own, **scheduler}),
            vae=shifted_autoencoder(),
            text_encoder=clip_text(clip),
            tokenizer=clip,
            text_encoder_2=t5_text(t5),
            tokenizer_2=t5,
        )
    return saved(pipeline, folder)


def wan(folder: Path, **scheduler: Any) -> Path:
    """Wan on 16x16 images of three channels (latents 2x2), T = 20, flow shift 3, UniPC as Wan's own."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    own = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0, "num_train_timesteps": T}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = t5_tokenizer()
        transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=WIDTH,
            freq_dim=8,
            ffn_dim=16,
            num_layers=2,
            rope_max_seq_len=32,
        )
        vae = AutoencoderKLWan(
            base_dim=3,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.5, 0.8, 1.1, 2.0],
        )
        pipeline = WanPipeline(
            transformer=_jittered(transformer),
            scheduler=UniPCMultistepScheduler(**{**own, **scheduler}),
            vae=vae,
            text_encoder=t5_text(tokenizer, "UMT5"),
            tokenizer=tokenizer,
        )
    return saved(pipeline, folder)


def saved(pipeline: Any, folder: Path) -> Path:
    """The pipeline in a folder."""
    pipeline.save_pretrained(folder)
    return folder


def shifted_autoencoder() -> Any:
    """8x8 images to 4x4 latents, shifted and scaled as SD3's and Flux's are."""
    vae = autoencoder()
    vae.register_to_config(shift_factor=0.1, scaling_factor=1.5, force_upcast=False)
    return vae


def _jittered(transformer: Any) -> Any:
    """Every weight off 0, so that nothing that is passed on is without effect."""
    generator = torch.Generator().manual_seed(1)
    for parameter in transformer.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return transformer
