"""The shipped text-to-image base: stock files, small, no held-out image seen, and it draws what it is asked for."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from deme_diffusion.config import Recipe
from deme_diffusion.data.sources import WORDINGS, WORDS
from deme_diffusion.errors import UserError
from deme_diffusion.evaluation.extractors.classifier import load_classifier
from deme_diffusion.pipeline.inputs import ASSETS, TRAINED_ON, check_unseen, resolve
from deme_diffusion.recipes import load
from test_cli import NO_NETWORK_NO_TORCH, outside

NAME = "captioned-digits"
BASE = ASSETS / f"{NAME}-base"
CAPTIONS = [wording.format(word) for wording in WORDINGS for word in WORDS]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load(NAME).recipe


@pytest.fixture(scope="module")
def pipeline() -> Any:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(BASE, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_all_that_ships_of_it_is_at_most_8_mb() -> None:
    files = [file for folder in ASSETS.glob(f"{NAME}-*") for file in folder.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".txt", ".yaml"}
    assert sum(file.stat().st_size for file in files) <= 8e6


def test_the_files_hold_no_path_of_the_machine_that_made_them() -> None:
    for file in BASE.rglob("*.json"):
        assert "_name_or_path" not in file.read_text(), file


def test_it_is_what_stock_diffusers_loads_by_its_index(pipeline: Any) -> None:
    from diffusers import DiffusionPipeline

    found = DiffusionPipeline.from_pretrained(BASE, local_files_only=True)
    assert type(found) is type(pipeline)
    assert found.scheduler.config.num_train_timesteps == 1000
    assert 1e5 < sum(p.numel() for p in found.unet.parameters()) < 1e6


def test_every_word_of_the_captions_is_one_token(pipeline: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BASE / "tokenizer")
    for caption in CAPTIONS:
        assert tokenizer.tokenize(caption) == [f"{word}</w>" for word in caption.split()]
        assert len(tokenizer(caption).input_ids) <= tokenizer.model_max_length == pipeline.tokenizer.model_max_length
    assert tokenizer.unk_token_id not in tokenizer("été 7 ?").input_ids[1:-1], "all bytes are letters"


def test_the_tokenizer_is_there_in_the_older_form_too(pipeline: Any) -> None:
    from transformers import CLIPTokenizer

    folder = BASE / "tokenizer"
    merges = [tuple(line.split()) for line in (folder / "merges.txt").read_text().splitlines()[1:]]
    older = CLIPTokenizer(vocab=json.loads((folder / "vocab.json").read_text()), merges=merges)
    for prompt in (*CAPTIONS, "nobody taught it THIS, ever"):
        assert older(prompt).input_ids == pipeline.tokenizer(prompt).input_ids


def test_the_autoencoder_gives_images_back(pipeline: Any, recipe: Recipe) -> None:
    from deme_diffusion.data.splits import load_splits

    images = load_splits(recipe.data)["report"].images(range(64))
    with torch.no_grad():
        latents = pipeline.vae.encode(images).latent_dist.mode()
        again = pipeline.vae.decode(latents).sample
    assert latents.shape == (64, 2, 4, 4)
    assert float((latents * pipeline.vae.config.scaling_factor).std()) == pytest.approx(1, abs=0.1)
    assert float((again - images).square().mean()) < 0.02 * float(images.var())


def test_it_never_saw_what_the_recipe_holds_out(recipe: Recipe) -> None:
    held_out = recipe.data.search_fraction + recipe.data.report_fraction
    assert yaml.safe_load((BASE / TRAINED_ON).read_text()) == {"source": "digits", "held_out": held_out}
    base = resolve(f"packaged:{BASE.name}", None, key="model.pretrained", needs=("model_index.json",), download=False)
    check_unseen(base, recipe.data, "digits", key="model.pretrained")
    more = recipe.data.model_copy(update={"report_fraction": 0.5})
    with pytest.raises(UserError, match=r"was trained on all but 0\.4 of digits"):
        check_unseen(base, more, "digits", key="model.pretrained")


def test_the_dry_run_tells_of_every_stage_without_torch(tmp_path: Path) -> None:
    done = outside("run", NAME, "--dry-run", script=NO_NETWORK_NO_TORCH, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    for stage in ("cache", "expert 3", "all-timesteps", "weights", "merged"):
        assert stage in done.stdout, stage
    assert not list(tmp_path.iterdir())


def test_it_draws_the_digit_it_is_asked_for(pipeline: Any) -> None:
    prompts = CAPTIONS[::3]  # 20 of them, each digit twice
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    asked: dict[str, Any] = {"num_inference_steps": 10, "guidance_scale": 2.0, "output_type": "np"}
    images = pipeline(prompts, generator=generators, **asked).images
    pixels = np.rint(images * 255).astype(np.uint8)
    classifier = load_classifier(ASSETS / "digits-cnn")
    with torch.no_grad():
        found = classifier.outputs(classifier.inputs(pixels))[1].argmax(1)
    wanted = torch.tensor([WORDS.index(next(word for word in p.split() if word in WORDS)) for p in prompts])
    assert pixels.shape == (len(prompts), 8, 8, 1)
    assert int((found == wanted).sum()) >= 0.9 * len(prompts)
