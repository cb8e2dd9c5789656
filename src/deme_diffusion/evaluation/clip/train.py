"""A small CLIP (Radford et al. 2021) of a recipe's own images and captions, saved as stock transformers loads it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import log_softmax

from deme_diffusion.config import ClipSettings
from deme_diffusion.data.splits import Split, to_pixels
from deme_diffusion.errors import UserError
from deme_diffusion.evaluation.clip.score import ClipScorer, load_clip
from deme_diffusion.evaluation.clip.tokenizer import made_tokenizer
from deme_diffusion.evaluation.features import in_batches
from deme_diffusion.rng import image_at, seed_of, uniforms

WIDTH, LAYERS, HEADS = 64, 3, 4
"""Of both towers."""
CELLS, LARGEST = 4, 32
"""An image is seen as so many patches along a side, at most by so many pixels."""
HELD_OUT = 2000
"""Images that retrieval is measured on, at most."""


def train_clip(
    train: Split,
    held_out: Split,
    settings: ClipSettings,
    *,
    seed: int,
    out: Path,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> dict[str, Any]:
    """Train on images (augmented as `data.augment` says) and their captions; write the model; return how it retrieves.

    Raises UserError where images have no captions.
    """
    found = {position: captions_of(train, position) for position in range(len(train))}
    captions = {position: texts for position, texts in found.items() if texts}
    if not captions:
        raise UserError("clip: no image of the train split has a caption with words in it")
    tokenizer = made_tokenizer(itertools.chain.from_iterable(captions.values()))
    side = side_of(train.shape)
    processor = made_processor(side)
    model = fresh_model(settings, tokenizer, side, seed=seed).to(device).train()
    scorer = ClipScorer(model, processor, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.1, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=settings.total_steps)
    for step in range(settings.total_steps):
        images, texts, sets = batch_of(train, captions, settings.train_batch_size, seed=seed, step=step)
        loss = contrastive_loss(*_embedded(scorer, images, texts), model.logit_scale.exp(), positives(texts, sets))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))  # as published: beyond it training is unstable
    model.eval()
    for part in (model, processor, tokenizer):
        part.save_pretrained(out)
    return retrieval(load_clip(out, device), held_out)


def fresh_model(settings: ClipSettings, tokenizer: Any, side: int, *, seed: int) -> Any:
    """A `CLIPModel` of two small towers, initialised by the seed; images are `side` x `side`."""
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS}
    tower |= {"num_attention_heads": HEADS}
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = {**tower, **special, "vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    vision = {**tower, "image_size": side, "patch_size": side // CELLS}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=settings.embedding)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "clip"))
        return CLIPModel(config)


def made_processor(side: int) -> Any:
    """The image processor: to `side` x `side`, to three channels in [-1, 1]."""
    from transformers import CLIPImageProcessorPil

    size = {"height": side, "width": side}
    half = [0.5, 0.5, 0.5]
    return CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False, image_mean=half, image_std=half)


def side_of(shape: Sequence[int]) -> int:
    """Pixels along a side of what the model sees of images (c, h, w): their own, in whole patches."""
    return max(CELLS, min(LARGEST, max(shape[1:])) // CELLS * CELLS)


def captions_of(split: Split, position: int) -> list[str]:
    """All captions of an image, each once; those that are empty are none."""
    split.caption(position, 0)  # or it is told that there are none
    return [text for text in dict.fromkeys(split.source.captions(split.indices[position])) if text.strip()]


def batch_of(
    split: Split, captions: Mapping[int, Sequence[str]], size: int, *, seed: int, step: int
) -> tuple[torch.Tensor, list[str], list[Sequence[str]]]:
    """Images of one step, one of the captions of each, and all captions of each; keyed by seed and step."""
    positions = list(captions)
    picked = [positions[image_at(seed, step * size + i, len(positions))] for i in range(size)]
    images = split.training_images(picked, seed=seed, purpose="clip", step=step, first=0)
    draws = uniforms(seed, "clip caption", step, 0, size)[:, 0]
    sets = [captions[position] for position in picked]
    return images, [each[int(u * len(each))] for each, u in zip(sets, draws, strict=True)], sets


def positives(texts: Sequence[str], sets: Sequence[Sequence[str]]) -> torch.Tensor:
    """(images, texts) booleans: whether a text is a caption of the image, be it drawn for it or for another one."""
    return torch.from_numpy(np.array([[text in own for text in texts] for own in map(set, sets)]))


def contrastive_loss(
    images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor, matching: torch.Tensor
) -> torch.Tensor:
    """InfoNCE both ways between embeddings (n, d) of length 1; of several matches each is as good an answer.

    Mean over images of -1/|P| sum_{j in P} log softmax_j(scale <image, text_j>), and of texts alike (Radford et al.
    2021; several positives as Khosla et al. 2020, their L_out).
    """
    logits, wanted = scale * images @ texts.T, matching.to(images)
    by_image = -(log_softmax(logits, 1) * wanted).sum(1) / wanted.sum(1)
    by_text = -(log_softmax(logits, 0) * wanted).sum(0) / wanted.sum(0)
    return (by_image.mean() + by_text.mean()) / 2


def _embedded(scorer: ClipScorer, images: torch.Tensor, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """As the scorer does it, with gradients: pixels through its processor, so that training sees what scoring does."""
    return scorer.embed_images(to_pixels(images)), scorer.embed_texts(texts)


def retrieval(scorer: ClipScorer, split: Split) -> dict[str, float]:
    """Over held-out images and their distinct captions: whether the nearest caption is the image's, and back."""
    found = {position: set(captions_of(split, position)) for position in range(min(HELD_OUT, len(split)))}
    positions = [position for position, own in found.items() if own]
    if not positions:
        raise UserError("clip: no image of the search split has a caption with words in it")
    sets = [found[position] for position in positions]
    texts = sorted(set().union(*sets))
    pixels = to_pixels(split.images(positions))
    images = torch.cat([scorer.of_images(batch) for batch in in_batches(pixels, scorer.batch_size)])
    chunks = [texts[i : i + scorer.batch_size] for i in range(0, len(texts), scorer.batch_size)]
    cosines = images @ torch.cat([scorer.of_texts(chunk) for chunk in chunks]).T
    right = [texts[int(i)] in own for i, own in zip(cosines.argmax(1), sets, strict=True)]
    back = [text in sets[int(i)] for i, text in zip(cosines.argmax(0), texts, strict=True)]
    return {"image_to_text": float(np.mean(right)), "text_to_image": float(np.mean(back)), "held_out": len(positions)}
