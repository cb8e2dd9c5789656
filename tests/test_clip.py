"""The CLIP score against transformers by hand, and a small CLIP trained on captions, which stock transformers loads."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from deme_diffusion.config import ClipSettings
from deme_diffusion.data.sources import WORDS, Digits, SplitName
from deme_diffusion.data.splits import Split, to_pixels
from deme_diffusion.errors import UserError
from deme_diffusion.evaluation.clip.score import ClipScorer, load_clip, summary
from deme_diffusion.evaluation.clip.tokenizer import made_tokenizer
from deme_diffusion.evaluation.clip.train import (
    contrastive_loss,
    fresh_model,
    made_processor,
    positives,
    retrieval,
    train_clip,
)
from deme_diffusion.pipeline.asking import given_clip

CAPTIONS = ["a handwritten five", "the digit six", "seven, by hand"]
SETTINGS = ClipSettings(total_steps=90, train_batch_size=48, learning_rate=4e-3)
Splits = dict[SplitName, Split]


@pytest.fixture(scope="module")
def captioned() -> Splits:
    from deme_diffusion.config import DataSettings
    from deme_diffusion.data.splits import load_splits

    return {name: replace(split, carries="text") for name, split in load_splits(DataSettings()).items()}


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of images of 16 x 16, as transformers saves it."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = made_tokenizer(CAPTIONS)
    for part in (fresh_model(ClipSettings(), tokenizer, 16, seed=0), made_processor(16), tokenizer):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(captioned: Splits, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("trained")
    return folder, train_clip(captioned["train"], captioned["search"], SETTINGS, seed=0, out=folder)


def images(count: int = 3, size: int = 20, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, channels), dtype=np.uint8)


# the score


def test_the_score_is_transformers_by_hand(untrained: Path) -> None:
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    pixels, texts = images(), CAPTIONS
    model = CLIPModel.from_pretrained(untrained).eval()
    processor = CLIPImageProcessorPil.from_pretrained(untrained)
    tokens = CLIPTokenizer.from_pretrained(untrained)(texts, padding=True, return_tensors="pt")
    seen = processor([Image.fromarray(image) for image in pixels], return_tensors="pt")
    with torch.no_grad():
        answer = model(**tokens, **seen)
    cosines = (answer.logits_per_image / model.logit_scale.exp().detach()).diagonal().double().numpy()
    scorer = load_clip(untrained)
    scores, cut = scorer.scores(iter([pixels[:2], pixels[2:]]), texts)
    np.testing.assert_allclose(scores, 100 * cosines, atol=1e-4)
    assert cosines.min() > 0
    assert cut == 0
    with torch.no_grad():
        scorer.model.visual_projection.weight.neg_()
    assert scorer.scores(iter([pixels]), texts)[0].tolist() == [0, 0, 0], "a cosine below 0 counts nothing"


def test_grey_images_are_their_three_channels(untrained: Path) -> None:
    scorer, grey = load_clip(untrained), images(channels=1)
    assert torch.equal(scorer.of_images(grey), scorer.of_images(np.repeat(grey, 3, axis=3)))


def test_long_texts_are_cut_and_counted(untrained: Path, caplog: pytest.LogCaptureFixture) -> None:
    scorer = load_clip(untrained)
    longer = " ".join(["six"] * 40)
    with caplog.at_level(logging.WARNING):
        scores, cut = scorer.scores(iter([images(2)]), [longer, "six"])
    assert cut == 1
    assert "1 of 2 texts are cut at 6 tokens" in caplog.text
    shorter = " ".join(["six"] * scorer.most_tokens)
    assert scores[0] == pytest.approx(scorer.scores(iter([images(1)]), [shorter])[0][0], abs=1e-4)
    assert "text cut at 6 tokens" in scorer.preprocessing


def test_a_summary_has_the_standard_error_of_all_and_of_each_category() -> None:
    told = summary(np.array([10.0, 20.0, 30.0, 40.0]), ["b", "a", "b", "a"])
    assert told["CLIP"] == 25
    assert told["standard_error"] == pytest.approx(np.std([10, 20, 30, 40], ddof=1) / 2)
    assert {name: (one["CLIP"], one["n"]) for name, one in told["categories"].items()} == {"a": (30, 2), "b": (20, 2)}
    assert summary(np.array([3.0]))["standard_error"] is None


# a folder that is none


def test_what_is_no_clip_is_one_line(untrained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(untrained, folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    refused(folder, "has no safetensors; pickles are never loaded")
    (folder / "model.safetensors").write_bytes(weights)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    refused(folder, "is no CLIP of transformers (model_type bert)")
    config["text_config"]["hidden_size"] = 32
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"no CLIP: \d+ weights are missing, or of another shape, as "):
        load_clip(folder)
    (folder / "preprocessor_config.json").unlink()
    refused(folder, "has no preprocessor_config.json")


def refused(folder: Path, said: str) -> None:
    with pytest.raises(UserError) as error:
        given_clip(ClipSettings(pretrained=str(folder)), download=True)
    assert said in str(error.value)
    assert str(error.value).startswith("clip.pretrained: ")


# training


def test_one_match_each_is_transformers_own_loss(untrained: Path) -> None:
    from transformers import CLIPModel

    scorer, model = load_clip(untrained), CLIPModel.from_pretrained(untrained).eval()
    tokens = scorer.tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    seen = scorer.processor(list(images()), return_tensors="pt", input_data_format="channels_last")
    expected = model(**tokens, **seen, return_loss=True).loss
    both = scorer.embed_images(images()), scorer.embed_texts(CAPTIONS)
    torch.testing.assert_close(
        contrastive_loss(*both, model.logit_scale.exp(), torch.eye(3, dtype=torch.bool)), expected
    )


def test_several_matches_are_as_good_as_each_other() -> None:
    image, text = torch.eye(3), torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 0, 1]])
    matching = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])
    rows = [[-math.log(math.e / (2 * math.e + 1))] * 2, [math.log(3)] * 2, [-math.log(math.e / (math.e + 2))]]
    columns = [(math.log(math.e + 2) * 2 - 1) / 2] * 2 + [math.log(math.e + 2) - 1]
    by_image = sum(sum(row) / len(row) for row in rows) / 3
    found = contrastive_loss(image, text, torch.tensor(1.0), matching)
    assert float(found) == pytest.approx((by_image + sum(columns) / 3) / 2, abs=1e-6)


def test_images_without_words_are_left_out(captioned: Splits, tmp_path: Path) -> None:
    class Some(Digits):
        def captions(self, index: int) -> Sequence[str]:
            return ["  "] if index % 2 else super().captions(index)

    some: Splits = {name: replace(split, source=Some()) for name, split in captioned.items()}
    few = SETTINGS.model_copy(update={"total_steps": 2, "train_batch_size": 8})
    told = train_clip(some["train"], some["search"], few, seed=0, out=tmp_path)
    assert told["held_out"] == sum(index % 2 == 0 for index in some["search"].indices)

    class Silent(Digits):
        def captions(self, index: int) -> Sequence[str]:
            return [""]

    with pytest.raises(UserError, match="no image of the train split has a caption with words"):
        train_clip(replace(some["train"], source=Silent()), some["search"], few, seed=0, out=tmp_path)


def test_a_caption_that_an_image_shares_is_its_own_too() -> None:
    sets = [["five", "a five"], ["a five", "five"], ["six"]]
    assert positives(["a five", "five", "six"], sets).tolist() == [[True, True, False], [True, True, False],
                                                                   [False, False, True]]  # fmt: skip


def test_words_are_tokens_and_unknown_ones_letters(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    made = made_tokenizer(CAPTIONS)
    made.save_pretrained(tmp_path)
    stock = AutoTokenizer.from_pretrained(tmp_path)
    assert stock.convert_ids_to_tokens(stock("A handwritten  five")["input_ids"]) == [
        "<|startoftext|>",
        "a</w>",
        "handwritten</w>",
        "five</w>",
        "<|endoftext|>",
    ]
    zebra = stock.convert_ids_to_tokens(stock("zebra é")["input_ids"])[1:-1]
    assert "".join(zebra[:-2]) == "zebra</w>"
    assert stock.model_max_length == 6, "the longest caption, its begin and its end"
    assert made_tokenizer(reversed(CAPTIONS)).get_vocab() == made.get_vocab()


def test_training_tells_digits_apart_and_transformers_loads_it(
    trained: tuple[Path, dict[str, Any]], captioned: Splits
) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    folder, told = trained
    assert told["image_to_text"] > 0.3, "of ten digits in as many wordings"
    assert told == retrieval(load_clip(folder), captioned["search"])
    report = captioned["report"]
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    tokens = tokenizer([f"a handwritten {word}" for word in WORDS], padding=True, return_tensors="pt")
    scorer = load_clip(folder)
    pixels = np.repeat(to_pixels(report.images(range(200))), 3, axis=3)
    seen = scorer.processor(list(pixels), return_tensors="pt", input_data_format="channels_last")
    with torch.no_grad():
        found = model(**tokens, **seen).logits_per_image.argmax(1)
    assert float((found == report.labels(range(200))).float().mean()) > 0.3


def test_training_is_a_function_of_the_seed(captioned: Splits, tmp_path: Path) -> None:
    few = SETTINGS.model_copy(update={"total_steps": 3, "train_batch_size": 8})
    weights = list[bytes]()
    for seed, name in ((0, "a"), (0, "b"), (1, "c")):
        torch.manual_seed(len(weights))
        train_clip(captioned["train"], captioned["search"], few, seed=seed, out=tmp_path / name)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_a_scorer_refuses_numbers_that_are_none(untrained: Path) -> None:
    scorer: ClipScorer = load_clip(untrained)
    with torch.no_grad():
        scorer.model.visual_projection.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="clip: it answers NaN or infinity"):
        scorer.scores(iter([images(1)]), ["six"])
