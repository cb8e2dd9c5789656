"""Plans about models that take text: LoRA, text dropout, guidance, what plays no part, and the CLIP score."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from deme_diffusion.ablate.metrics import metric_of
from deme_diffusion.ablate.plan import Ablation, Action
from deme_diffusion.ablate.reading import read_plan
from deme_diffusion.ablate.resolve import resolve
from deme_diffusion.config import Recipe
from deme_diffusion.recipes import changed, load

DIGITS, TEXT, LORA = (load(name).recipe for name in ("digits", "sd14-coco30k", "sdxl-lora"))
NONE_OF_LORA = {"decouple.lora_rank": None}


def changes(part: str, action: Action, *texts: str, recipe: Recipe = TEXT) -> list[tuple[str, dict[str, Any]]]:
    """Status and change of each arm."""
    return [(arm.status, dict(arm.change)) for arm in resolve(Ablation("", part, action, list(texts)), recipe).arms]


def only(part: str, action: Action, *texts: str, recipe: Recipe = TEXT) -> dict[str, Any]:
    ((status, change),) = changes(part, action, *texts, recipe=recipe)
    assert status == "ready", resolve(Ablation("", part, action, list(texts)), recipe)
    return change


@pytest.mark.parametrize("part", ["full fine-tuning", "Full-parameter finetuning of each expert", "LoRA"])
@pytest.mark.parametrize(("text", "rank"), [("LoRA", 16), ("LoRA of rank 8", 8), ("low-rank adapters, r = 64", 64)])
def test_full_finetuning_is_replaced_by_lora(part: str, text: str, rank: int) -> None:
    assert only(part, "REPLACE", text) == {"decouple.lora_rank": rank, "decouple.projection": "none"}


def test_lora_is_removed_and_ranks_are_arms() -> None:
    assert only("LoRA", "REMOVE", recipe=LORA) == NONE_OF_LORA
    assert only("LoRA", "REPLACE", "full finetuning", recipe=LORA) == NONE_OF_LORA
    found = changes("LoRA rank", "REPLACE", "4, 16, 64", recipe=LORA)
    assert [change["decouple.lora_rank"] for _, change in found] == [4, 16, 64]
    assert only("LoRA rank", "REPLACE", "half", recipe=LORA) == {"decouple.lora_rank": 16}
    assert changes("LoRA", "REMOVE", recipe=TEXT)[0][0] == "same_as_baseline"
    reduced = changed(LORA, {"merge.lora_rank": 8, "decouple.lora_alpha": 64.0})
    full = only("LoRA", "REMOVE", recipe=reduced)
    assert full == NONE_OF_LORA | {"merge.lora_rank": None, "decouple.lora_alpha": None}


def test_a_lora_of_a_family_that_loads_none_is_fused() -> None:
    assert only("LoRA", "ADD", "LoRA of rank 2", recipe=DIGITS) == {
        "decouple.lora_rank": 2,
        "decouple.projection": "none",
        "merge.fuse": True,
    }


@pytest.mark.parametrize(
    ("part", "action", "text", "share"),
    [
        ("Text dropout", "REMOVE", None, 0.0),
        ("caption dropout for classifier-free guidance", "REMOVE", None, 0.0),
        ("Caption dropout", "REPLACE", "0.2", 0.2),
        ("Prompt dropout rate", "REPLACE", "5%", 0.05),
    ],
)
def test_text_dropout_is_a_setting_of_the_training(part: str, action: Action, text: str | None, share: float) -> None:
    assert only(part, action, *([text] if text else [])) == {"decouple.proportion_empty_prompts": share}


def test_text_dropout_is_added_where_there_is_none() -> None:
    plain = changed(TEXT, {"decouple.proportion_empty_prompts": 0.0})
    assert only("Text dropout", "ADD", recipe=plain) == {"decouple.proportion_empty_prompts": 0.1}


@pytest.mark.parametrize(
    ("text", "scales"),
    [("3, 5, 10", [3.0, 5.0, 10.0]), ("w = 3.0", [3.0]), ("no guidance", [1.0]), ("half", [3.75])],
)
def test_guidance_is_of_the_first_sampler(text: str, scales: list[float]) -> None:
    found = changes("Classifier-free guidance scale", "REPLACE", text)
    assert [status for status, _ in found] == ["ready"] * len(scales)
    first = [change["evaluate.samplers"][0] for _, change in found]
    assert [sampler["guidance_scale"] for sampler in first] == scales
    assert {sampler["name"] for sampler in first} == {"PNDMScheduler"}


@pytest.mark.parametrize(
    ("part", "action", "text"),
    [("Guidance scale", "REPLACE", "3"), ("Text dropout", "REPLACE", "0.2"), ("caption dropout", "ADD", None)],
)
def test_without_prompts_there_is_nothing_to_guide(part: str, action: Action, text: str | None) -> None:
    (arm,) = resolve(Ablation("", part, action, [text] if text else []), DIGITS).arms
    assert arm.status == "not_executable" and "takes no prompts" in arm.reason


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("Caching of latents", "the model is the same"),
        ("precomputed text embeddings", "the model is the same"),
        ("VAE latent space", "the autoencoder stays"),
        ("CLIP text encoder", "only the denoiser is finetuned"),
        ("Negative prompt", "classifier-free"),
    ],
)
def test_what_plays_no_part_is_answered(part: str, said: str) -> None:
    (arm,) = resolve(Ablation("", part, "REMOVE"), TEXT).arms
    assert arm.status == "not_executable" and said in arm.reason


@pytest.mark.parametrize(
    "asked",
    ["CLIP Score", "CLIP", "CLIPScore (ViT-g/14)", "text-image alignment", "prompt adherence", "CLIP similarity"],
)
def test_the_clip_score_is_measured_or_told_how(asked: str) -> None:
    assert metric_of(asked, TEXT).columns == ("CLIP",)
    off = metric_of(asked, changed(TEXT, {"evaluate.clip_score": False, "evaluate.prompts.images": "coco"}))
    assert off.columns == () and "set evaluate.clip_score=true" in off.reason
    assert "takes no text" in metric_of(asked, DIGITS).reason


def test_other_metrics_that_name_clip_are_still_others() -> None:
    assert metric_of("CLIP-FID", TEXT).columns == ()
    assert metric_of("CLIP score and FID", TEXT).columns == ("FD", "CLIP")
    assert metric_of("TIFA", TEXT).columns == () and "CLIP score is nearest" in metric_of("TIFA", TEXT).reason


@pytest.mark.skipif("DEME_TEST_DATA" not in os.environ, reason="DEME_TEST_DATA names no folder with plans/")
def test_the_published_plan_asks_a_text_recipe_for_its_clip_score() -> None:
    (path,) = (Path(os.environ["DEME_TEST_DATA"]) / "plans").glob("*.md")
    plan = read_plan(path)
    assert len(plan.ablations) == 2
    for ablation in plan.ablations:
        resolved = resolve(ablation, TEXT)
        assert {m.asked: m.columns for m in resolved.metrics} == {"FID": ("FD",), "CLIP Score": ("CLIP",)}
        assert {arm.status for arm in resolved.arms} == {"ready"}
