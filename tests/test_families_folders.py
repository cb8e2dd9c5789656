"""Families on a discrete schedule: the folders that they read and leave, and bad ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deme_diffusion.config import ModelSettings
from deme_diffusion.errors import UserError
from deme_diffusion.models.components import fitting_family
from deme_diffusion.models.ddpm import DDPM
from deme_diffusion.models.denoiser import Prompt
from deme_diffusion.models.families import family
from families import (
    EXTRA,
    KINDS,
    LONG,
    MADE,
    batch,
    copied,
    generated,
    made_pipelines,  # noqa: F401  (a fixture)
    opened,
    rewritten,
    stock,
)

# --- folders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MADE)
def test_an_expert_reloads_into_the_stock_pipeline(pipelines: dict[str, Path], name: str, tmp_path: Path) -> None:
    denoiser, folder = opened(pipelines, name), copied(pipelines, name, tmp_path)
    student = denoiser.student()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.01)
    student.save_pretrained(tmp_path / "expert" / denoiser.component)
    expert = denoiser.component_from(tmp_path / "expert")
    assert not expert.training
    shutil.copytree(tmp_path / "expert" / denoiser.component, folder / denoiser.component, dirs_exist_ok=True)
    pipeline = stock(folder, KINDS[name], **EXTRA.get(name, {}))
    for key, value in getattr(pipeline, denoiser.component).state_dict().items():
        assert torch.equal(value, student.state_dict()[key]) and torch.equal(value, expert.state_dict()[key])
    named = {"class_labels": [7]} if name == "dit" else {"prompt": "a dog"}
    generator = torch.Generator().manual_seed(1)
    made = pipeline(**named, num_inference_steps=3, generator=generator, output_type="pt").images
    sampler = type(pipeline.scheduler)
    ours = generated(denoiser, [7 if name == "dit" else "a dog"], [1], sampler, module=expert)
    torch.testing.assert_close(ours, made * 2 - 1, rtol=0, atol=2e-6)


def test_a_dit_of_the_hub_has_another_class_in_its_config(pipelines: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(pipelines, "dit", tmp_path)
    legacy = {"_class_name": "Transformer2DModel", "attention_type": "default", "cross_attention_dim": None}
    rewritten(folder / "transformer" / "config.json", **legacy)
    rewritten(folder / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    denoiser: Any = family("dit").load(folder)
    assert torch.equal(generated(denoiser, [7], [1]), generated(opened(pipelines, "dit"), [7], [1]))


def test_a_safety_checker_is_neither_run_nor_needed(pipelines: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(pipelines, "sd", tmp_path)
    parts = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True,
             "feature_extractor": ["transformers", "CLIPImageProcessor"]}  # fmt: skip
    rewritten(folder / "model_index.json", **parts)
    denoiser: Any = family("stable_diffusion").load(folder)
    assert denoiser.pipeline.safety_checker is None
    assert torch.equal(generated(denoiser, ["a"], [1]), generated(opened(pipelines, "sd"), ["a"], [1]))


@pytest.mark.parametrize("name", MADE)
def test_loading_encoding_and_sampling_say_nothing(
    pipelines: dict[str, Path], name: str, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    denoiser = opened(pipelines, name)
    asked: list[Prompt] = [LONG] if name != "dit" else [7]
    denoiser.encode_prompts({"caption": [LONG], "label": torch.tensor([7])})
    denoiser.truncated([LONG])
    generated(denoiser, asked, [1])
    assert capfd.readouterr() == ("", "")
    assert not [warning for warning in recwarn if issubclass(warning.category, FutureWarning)]


def test_other_parts_are_dropped_and_loaded_again(pipelines: dict[str, Path]) -> None:
    denoiser = opened(pipelines, "sd")
    first = denoiser.encode_captions(["a dog"])["encoder_hidden_states"]
    denoiser.release()
    assert "pipeline" not in vars(denoiser)
    denoiser.release()
    assert torch.equal(denoiser.encode_captions(["a dog"])["encoder_hidden_states"], first)


# --- bad input ------------------------------------------------------------------------------------------------------


def without(*parts: str) -> Callable[[Path], None]:
    """Removes these parts."""
    return lambda folder: [shutil.rmtree(folder / part) for part in parts] and None


def renamed(part: str, before: str, after: str) -> Callable[[Path], None]:
    """Renames a file of a part."""
    return lambda folder: (folder / part / before).rename(folder / part / after) and None


def config(part: str, **values: Any) -> Callable[[Path], None]:
    """Changes the config of a part."""
    return lambda folder: rewritten(folder / part / "config.json", **values)


WEIGHTS, ENCODER = "diffusion_pytorch_model.safetensors", "model.safetensors"
BAD: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "no scheduler": ("dit", without("scheduler"), "no scheduler, which family dit needs"),
    "no text encoder": ("sd", without("text_encoder"), "no text_encoder, which family stable_diffusion needs"),
    "nothing beside": (
        "sdxl",
        without("vae", "text_encoder_2", "tokenizer"),
        "no vae, text_encoder_2, tokenizer, which family stable_diffusion_xl needs",
    ),
    "no unet": ("sd", without("unet"), "no config.json; a diffusers component folder is expected"),
    "a variant": (
        "sd",
        renamed("unet", WEIGHTS, "diffusion_pytorch_model.fp16.safetensors"),
        f"only as variant fp16, .* rename diffusion_pytorch_model.fp16.safetensors to {WEIGHTS}",
    ),
    "a shard of a variant": (
        "dit",
        renamed("transformer", WEIGHTS, "diffusion_pytorch_model.fp16-00001-of-00002.safetensors"),
        "only as variant fp16",
    ),
    "an encoder's variant": (
        "sdxl",
        renamed("text_encoder_2", ENCODER, "model.fp16.safetensors"),
        "text_encoder_2: the weights are there only as variant fp16",
    ),
    "a pickled encoder": ("sd", renamed("text_encoder", ENCODER, "pytorch_model.bin"), "pickled checkpoint"),
    "inpainting": ("sd", config("unet", in_channels=9), "9 input channels for latents of 4: a U-Net for inpainting"),
    "variance": ("sd", config("unet", out_channels=8), "8 output channels for latents of 4"),
    "distilled": ("sd", config("unet", time_cond_proj_dim=8), "time_cond_proj_dim asks for a condition"),
    "no size": ("sd", config("unet", sample_size=None), "config.json has no sample_size"),
    "refiner": (
        "sdxl",
        config("unet", projection_class_embeddings_input_dim=5 * 4 + 12),
        "the SDXL refiner takes five",
    ),
    "channels": ("dit", config("transformer", out_channels=12), "12 output channels for 4 input channels"),
    "continuous": ("dit", config("transformer", norm_type="layer_norm"), "norm_type 'layer_norm'"),
    "prediction": (
        "sd",
        lambda folder: rewritten(folder / "scheduler" / "scheduler_config.json", prediction_type="velocity"),
        "prediction_type 'velocity' is none of",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folders_are_one_line(pipelines: dict[str, Path], tmp_path: Path, case: str) -> None:
    name, spoil, said = BAD[case]
    spoil(folder := copied(pipelines, name, tmp_path))
    with pytest.raises(UserError, match=said) as raised:
        family(MADE[name][0]).load(folder)
    assert "\n" not in str(raised.value) and len(str(raised.value).replace(str(tmp_path), "")) < 300


@pytest.mark.parametrize("name", MADE)
def test_a_model_of_another_family_names_the_one_that_fits(
    pipelines: dict[str, Path], pico_pipeline: Path, name: str
) -> None:
    own = MADE[name][0]
    assert fitting_family(pipelines[name]) == own
    for other in {"ddpm", *(made for made, _ in MADE.values())} - {own}:
        with pytest.raises(UserError, match=f"{own} fits it"):
            family(other).load(pipelines[name])
    with pytest.raises(UserError, match="ddpm fits it"):
        family(own).load(pico_pipeline)
    assert isinstance(family("ddpm").load(pico_pipeline), DDPM)


def test_a_pipeline_that_diffusers_cannot_load_is_one_line(pipelines: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(pipelines, "sd", tmp_path)
    (folder / "text_encoder" / "config.json").write_text('{"model_type": "clip_text_model", "hidden_size": 3}')
    denoiser: Any = family("stable_diffusion").load(folder)
    with pytest.raises(UserError, match=r"no StableDiffusionPipeline that diffusers loads: .*hidden size") as raised:
        denoiser.encode_captions(["a"])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "part", "what"),
    [("sd", "vae", "the autoencoder"), ("sd", "text_encoder", "a text encoder"), ("sdxl", "text_encoder_2", "a text")],
)
def test_encoders_that_overflow_in_float16(
    pipelines: dict[str, Path], tmp_path: Path, name: str, part: str, what: str
) -> None:
    folder = copied(pipelines, name, tmp_path)
    spoiled = getattr(stock(folder, KINDS[name]), part)
    with torch.no_grad():
        for parameter in spoiled.parameters():
            parameter.mul_(3e4)
    spoiled.save_pretrained(folder / part)
    wide: Any = family(MADE[name][0]).load(folder)
    narrow: Any = family(MADE[name][0]).load(folder)
    narrow.configure(ModelSettings.model_validate({"encoder_dtype": "float16"}))
    if part != "vae":  # whose numbers are too large for float32 as well
        wide.encoded(batch(wide))
    with pytest.raises(UserError, match=f"{what}.* not finite in float16; use bfloat16 or float32"):
        narrow.encoded(batch(narrow))
