"""A small classifier trained on the recipe's own labels, whose penultimate layer is the feature space of a metric."""

from __future__ import annotations

import itertools
import json
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from deme_diffusion.config import ExtractorSettings
from deme_diffusion.data.splits import Split, to_model_range
from deme_diffusion.errors import UserError
from deme_diffusion.evaluation.extractors.base import Extractor, Pixels, repeated
from deme_diffusion.files import write_json
from deme_diffusion.rng import image_at, seed_of
from deme_diffusion.weights import load_state, save_state

WEIGHTS, CONFIG = "extractor.safetensors", "config.json"
WIDEST = 8
"""Stages double the width, up to so many times `channels`."""


class Classifier(Extractor):
    """Convolutions, a mean over a grid and two linear layers: (b, c, h, w) in [-1, 1] -> features, then logits.

    Images of another size than `size` (h, w) are resized to it; null takes them as they are.
    """

    def __init__(self, in_channels: int, size: tuple[int, int] | None, **shape: int) -> None:
        super().__init__()
        self.config: dict[str, Any] = {"in_channels": in_channels, **shape}
        self.channels, self.dimension, self.size = in_channels, shape["features"], size
        resized = "not resized" if size is None else f"antialiased bilinear to {size[0]}x{size[1]}"
        self.preprocessing = f"8-bit, to [-1, 1], {resized}"
        if size is not None:
            self.config["size"] = list(size)

    embed: nn.Linear
    classify: nn.Linear

    @abstractmethod
    def trunk(self, images: torch.Tensor) -> torch.Tensor:
        """(b, c, h, w) -> (b, c', h', w')."""

    def inputs(self, pixels: Pixels) -> torch.Tensor:
        """float32 (n, c, h, w) in [-1, 1]."""
        images = to_model_range(repeated(pixels, self.channels))
        if self.size is None or images.shape[2:] == self.size:
            return images
        return F.interpolate(images, self.size, mode="bilinear", align_corners=False, antialias=True)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(b, features): what a metric is measured in."""
        # A 2 x 2 grid keeps where strokes are, which a mean over all space would lose.
        hidden = self.trunk(images)
        strict = hidden.is_cuda and torch.are_deterministic_algorithms_enabled()
        cells = quarter_means(hidden) if strict else F.adaptive_avg_pool2d(hidden, 2)
        return F.silu(self.embed(cells.flatten(1)))

    def outputs(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (n, d) and the logits of the recipe's classes."""
        features = self.features(inputs)
        return features, self.classify(features)


def quarter_means(hidden: torch.Tensor) -> torch.Tensor:
    """(b, c, h, w) -> (b, c, 2, 2): adaptive pooling, but for last bits, whose gradient on a GPU is deterministic."""
    rows, columns = ((slice(0, (n + 1) // 2), slice(n // 2, n)) for n in hidden.shape[2:])
    means = [hidden[:, :, row, column].mean((2, 3)) for row in rows for column in columns]
    return torch.stack(means, 2).reshape(*hidden.shape[:2], 2, 2)


class SmallClassifier(Classifier):
    """Three convolutions, the second of which halves the resolution: for images of 8 x 8."""

    def __init__(
        self, in_channels: int, channels: int, features: int, classes: int, size: tuple[int, int] | None = None
    ) -> None:
        super().__init__(in_channels, size, channels=channels, features=features, classes=classes)
        self.first = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        self.third = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1)
        self.embed = nn.Linear(8 * channels, features)
        self.classify = nn.Linear(features, classes)

    def trunk(self, images: torch.Tensor) -> torch.Tensor:
        """(b, c, h, w) -> (b, 2 channels, h / 2, w / 2)."""
        return F.silu(self.third(F.silu(self.second(F.silu(self.first(images))))))


class StagedClassifier(Classifier):
    """A convolution at full resolution, then `stages` times two that halve it, with batch normalisation."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        features: int,
        classes: int,
        stages: int,
        size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(in_channels, size, channels=channels, features=features, classes=classes, stages=stages)
        widths = [channels * min(2**i, WIDEST) for i in range(stages + 1)]
        self.first = nn.Sequential(*_normed(in_channels, widths[0], 1))
        self.stages = nn.Sequential(
            *(
                nn.Sequential(*_normed(here, wider, 2), *_normed(wider, wider, 1))
                for here, wider in itertools.pairwise(widths)
            )
        )
        self.embed = nn.Linear(4 * widths[-1], features)
        self.classify = nn.Linear(features, classes)

    def trunk(self, images: torch.Tensor) -> torch.Tensor:
        """(b, c, h, w) -> (b, c', h / 2^stages, w / 2^stages)."""
        hidden: torch.Tensor = self.stages(self.first(images))
        return hidden


def _normed(channels: int, out: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(out), nn.SiLU()]


CLASSES: Mapping[str, type[SmallClassifier] | type[StagedClassifier]] = {
    "SmallClassifier": SmallClassifier,
    "StagedClassifier": StagedClassifier,
}


def train_extractor(
    train: Split,
    held_out: Split,
    settings: ExtractorSettings,
    *,
    seed: int,
    out: Path,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> dict[str, Any]:
    """Train on the train split (augmented as `data.augment` says), write config and weights, return the accuracies.

    Raises UserError when the images have no labels, or are too small for `extractor.stages`.
    """
    labels = train.labels(list(range(len(train))))
    torch.manual_seed(seed_of(seed, "extractor"))
    model = _fresh(train, settings, int(labels.max()) + 1).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=settings.total_steps)
    for step in range(settings.total_steps):
        first = step * settings.train_batch_size
        picked = [image_at(seed, first + i, len(train)) for i in range(settings.train_batch_size)]
        batch = train.training_images(picked, seed=seed, purpose="extractor", step=step, first=0).to(device)
        _, logits = model.outputs(batch)
        loss = F.cross_entropy(logits, labels[picked].to(device), label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    save_state(out / WEIGHTS, model.state_dict())
    write_json(out / CONFIG, {"class": type(model).__name__, **model.config})
    return {"train_accuracy": accuracy(model, train), "held_out_accuracy": accuracy(model, held_out)}


def check_stages(settings: ExtractorSettings, height: int, width: int) -> None:
    """Raises UserError where images are too small to be halved so often."""
    least = 2 ** (settings.stages + 1)
    if settings.stages > 1 and min(height, width) < least:
        raise UserError(
            f"extractor.stages={settings.stages} needs images of {least} pixels or more, these are {height}x{width}"
        )


def _fresh(train: Split, settings: ExtractorSettings, classes: int) -> Classifier:
    in_channels, height, width = train.shape
    check_stages(settings, height, width)
    shape = {"channels": settings.channels, "features": settings.features, "classes": classes}
    if settings.stages == 1:
        return SmallClassifier(in_channels, size=(height, width), **shape)
    return StagedClassifier(in_channels, size=(height, width), stages=settings.stages, **shape)


@torch.no_grad()
def accuracy(model: Classifier, split: Split, batch_size: int = 1024) -> float:
    """Share of a split's unaugmented images that are classified right."""
    model.eval()
    device, right = next(model.parameters()).device, 0
    for start in range(0, len(split), batch_size):
        positions = range(start, min(start + batch_size, len(split)))
        _, logits = model.outputs(split.images(positions).to(device))
        right += int((logits.argmax(1).cpu() == split.labels(positions)).sum())
    return right / len(split)


def load_classifier(folder: Path) -> Classifier:
    """The classifier of a folder that `train_extractor` wrote. Raises UserError for anything else."""
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError):
        raise UserError(f"extractor {folder}: no readable {CONFIG} in it") from None
    kind = CLASSES.get(str(config.pop("class", None))) if isinstance(config, dict) else None
    if kind is None:
        raise UserError(f"extractor {folder}: {CONFIG} is not that of a {' or '.join(CLASSES)}")
    try:
        size = config.pop("size", None)
        model = kind(**config, size=None if size is None else (int(size[0]), int(size[1])))
    except (TypeError, ValueError, IndexError) as error:
        raise UserError(f"extractor {folder}: {CONFIG} is wrong ({error})") from None
    try:
        model.load_state_dict(load_state(folder / WEIGHTS))
    except RuntimeError as error:
        raise UserError(f"extractor {folder}: weights do not fit its config ({str(error).splitlines()[0]})") from None
    return model
