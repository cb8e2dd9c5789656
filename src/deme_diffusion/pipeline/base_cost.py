"""What one image costs a base and the parts around it: by the configs of its folder, or of its hub name. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deme_diffusion.config import ModelSettings
from deme_diffusion.files import part_of
from deme_diffusion.pipeline.cost_parts import FLOAT, Cost, Encoders
from deme_diffusion.pipeline.encoder_cost import downscaling, encoders, text_encoder
from deme_diffusion.pipeline.facts import known
from deme_diffusion.pipeline.inputs import component_of, weight_bytes
from deme_diffusion.pipeline.transformer_cost import dit_cost, flux_cost, sd3_cost, wan_cost
from deme_diffusion.pipeline.unet_cost import condition_unet_cost, size_of, unet_cost
from deme_diffusion.weight_files import read_json

Config = Mapping[str, Any]
T5_TOKENS = {"stable_diffusion_3": 256, "flux": 512, "wan": 512}
"""Tokens of T5 that the stock pipeline of a family takes."""
WAN_PIXELS = (480, 832)
"""What the stock pipeline of Wan samples."""
CLIP_TOKENS = 77


@dataclass(frozen=True)
class Configs:
    """The config.json of the trained component, of the autoencoder, of the text encoders in order."""

    component: Config
    vae: Config | None = None
    texts: tuple[Config, ...] = field(default=())


def known_configs(name: str) -> Configs | None:
    """Of a hub name; None where nothing is known of it."""
    facts = known()
    model = facts["models"].get(name, {})
    if "unet" in model:
        return Configs({"_class_name": "UNet2DModel", **facts["unets"][model["unet"]]})
    if "pipeline" not in model:
        return None
    parts = facts["pipelines"][model["pipeline"]]
    texts = tuple(facts["texts"][text] for text in parts["texts"])
    return Configs(facts["components"][parts["component"]], facts["vaes"][parts["vae"]], texts)


def folder_configs(base: Path) -> Configs:
    """Of a pipeline's folder."""
    component = read_json(component_of(base) / "config.json")
    beside = [
        part_of(base, name) / "config.json" for name in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    ]
    vae, *texts = (read_json(file) if file.is_file() else None for file in beside)
    return Configs(component, vae, tuple(text for text in texts if text))


def base_cost(settings: ModelSettings, configs: Configs) -> Cost | None:
    """The component's cost, with that of the parts around it; None where the component cannot be counted."""
    config, vae = configs.component, configs.vae
    size = latent_size(settings, config, vae)
    counted = component_cost(config, size=size, tokens=text_tokens(settings, configs), frames=frames_of(settings, vae))
    return None if counted is None else surrounded(settings, configs, counted)


def surrounded(settings: ModelSettings, configs: Configs, cost: Cost) -> Cost:
    """The cost with that of autoencoder and text encoders, of a family that has them."""
    if configs.vae is None or not settings.latent:
        return cost
    *_, height, width = cost.shape
    return replace(cost, encoders=_encoders(settings, configs, (height, width)))


def _encoders(settings: ModelSettings, configs: Configs, latents: tuple[int, int]) -> Encoders:
    assert configs.vae is not None, "a family of latents has one"
    return encoders(configs.vae, configs.texts, settings.family, latents, t5_tokens(settings))


def component_cost(
    config: Config, *, size: tuple[int, int] | None = None, tokens: int = CLIP_TOKENS, frames: int = 1
) -> Cost | None:
    """What one image costs a component by its config.json; None for a class or options that no count here knows.

    `size`: height and width of its latents (None: the config's), `tokens` of text, `frames` of latents.
    """
    kind = config.get("_class_name")
    sized = config if size is None else {**config, "sample_size": size}
    if kind == "UNet2DModel":
        return unet_cost(config)
    if kind == "UNet2DConditionModel":
        return condition_unet_cost(sized, tokens)
    if kind in ("DiTTransformer2DModel", "Transformer2DModel") and config.get("norm_type") in (None, "ada_norm_zero"):
        return dit_cost(sized)
    if kind == "SD3Transformer2DModel":
        return sd3_cost(sized, tokens)
    if kind == "FluxTransformer2DModel" and size is not None:
        return flux_cost(config, tokens, size)
    if kind == "WanTransformer3DModel" and size is not None:
        return wan_cost(config, tokens, frames, size)
    return None


def latent_size(settings: ModelSettings, config: Config, vae: Config | None) -> tuple[int, int] | None:
    """Height and width of the latents, as `model.resolution` or the checkpoint says; None where neither does."""
    scale = downscaling(vae) if vae else 8
    if settings.resolution is not None:
        return settings.resolution // scale, settings.resolution // scale
    if settings.family == "wan":
        return WAN_PIXELS[0] // scale, WAN_PIXELS[1] // scale
    if settings.family == "flux":
        side = int((vae or {}).get("sample_size") or 1024) // scale
        return side, side
    return size_of(config) if config.get("sample_size") else None


def frames_of(settings: ModelSettings, vae: Config | None) -> int:
    """Frames of latents that a video of so many frames becomes."""
    return 1 + (settings.num_frames - 1) // int((vae or {}).get("scale_factor_temporal") or 4)


def t5_tokens(settings: ModelSettings) -> int:
    """Tokens of T5."""
    return settings.max_sequence_length or T5_TOKENS.get(settings.family, 512)


def text_tokens(settings: ModelSettings, configs: Configs) -> int:
    """Tokens of text that the component attends to."""
    longest = t5_tokens(settings)
    if settings.family in ("flux", "wan"):
        return longest
    clip = text_encoder(configs.texts[0]).tokens if configs.texts else CLIP_TOKENS
    return clip + longest if settings.family == "stable_diffusion_3" else clip


def rough_cost(settings: ModelSettings, base: Path, configs: Configs) -> Cost:
    """For an architecture that cannot be counted: most parameters sit at low resolution, at a quarter of the pixels."""
    config = configs.component
    parameters = sum(weight_bytes(file) for file in component_of(base).glob("*.safetensors")) // FLOAT
    height, width = latent_size(settings, config, configs.vae) or (32, 32)
    shape = (int(config.get("in_channels") or 3), height, width)
    return surrounded(settings, configs, Cost(parameters, 2.0 * parameters * height * width / 4, 0, 0, 0, shape))
