"""Draws samples.png: eight images a caption of a run's base and of its merged model, by stock diffusers alone.

python docs/results/captioned-digits/draw_samples.py RUN [FILE]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw, ImageFont

import deme_diffusion
from deme_diffusion.evaluation.extractors.classifier import load_classifier

CAPTIONS = (
    "a handwritten zero",
    "the digit one",
    "a picture of the number two",
    "three",
    "a small grey four drawn by hand",
    "the numeral five in pencil",
    "a photo of the number six",
    "a scan of the number seven written by hand in grey ink",
    "a handwritten eight",
    "the digit nine",
)
DRAWN, EACH, SCALE, GAP, TEXT = 8, 100, 4, 4, 340
SIDE = 8 * SCALE + GAP
CLASSIFIER = Path(deme_diffusion.__file__).parent / "assets" / "digits-cnn"


def sampled(model: Path) -> np.ndarray[Any, Any]:
    """(captions, EACH, 8, 8) uint8: seeds 0, 1, ..., the same for every caption and model."""
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    prompts = [caption for caption in CAPTIONS for _ in range(EACH)]
    generators = [torch.Generator().manual_seed(i % EACH) for i in range(len(prompts))]
    asked: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 1.5, "output_type": "np"}
    images = pipeline(prompts, generator=generators, **asked).images
    return np.rint(images[..., 0] * 255).astype(np.uint8).reshape(len(CAPTIONS), EACH, 8, 8)


def right(images: np.ndarray[Any, Any]) -> int:
    """How many of the images (10, n, 8, 8) the classifier takes for the digit of their row."""
    classifier = load_classifier(CLASSIFIER)
    with torch.no_grad():
        logits = classifier.outputs(classifier.inputs(images.reshape(-1, 8, 8, 1)))[1]
    found = logits.argmax(1).numpy().reshape(images.shape[:2])
    return int((found == np.arange(10)[:, None]).sum())


def main(run: Path, file: Path) -> None:
    """A row a caption: its words, the base's images, the merged model's with the same seeds."""
    models = [sampled(run / name) for name in ("base", "merged")]
    for name, images in zip(("base", "merged"), models, strict=True):
        print(f"{name}: {right(images)} of {images.shape[0] * images.shape[1]} images show their caption's digit")
    wide = DRAWN * SIDE + 4 * GAP
    sheet = Image.new("L", (TEXT + wide * len(models), SIDE * (len(CAPTIONS) + 1)), 255)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for k, name in enumerate(("base", "merged")):
        draw.text((TEXT + k * wide, SIDE // 2), name, fill=0, font=font, anchor="lm")
    for i, caption in enumerate(CAPTIONS):
        top = SIDE * (i + 1)
        draw.text((GAP, top + SIDE // 2), caption, fill=0, font=font, anchor="lm")
        for k, images in enumerate(models):
            for j, pixels in enumerate(images[i, :DRAWN]):
                tile = pixels.repeat(SCALE, axis=0).repeat(SCALE, axis=1)
                sheet.paste(Image.fromarray(tile), (TEXT + k * wide + j * SIDE, top))
    sheet.save(file, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parent / "samples.png")
