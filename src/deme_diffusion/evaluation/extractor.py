"""A small classifier trained on the recipe's own labels, whose penultimate layer is the feature space of a metric."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from deme_diffusion.config import ExtractorSettings
from deme_diffusion.data.augment import augmented
from deme_diffusion.data.splits import Split
from deme_diffusion.errors import UserError
from deme_diffusion.files import write_json
from deme_diffusion.rng import image_at, seed_of
from deme_diffusion.weights import load_state, save_state

WEIGHTS, CONFIG = "extractor.safetensors", "config.json"


class SmallClassifier(nn.Module):
    """Three convolutions, a mean over space and a linear layer: (b, c, h, w) in [-1, 1] -> features, then logits."""

    def __init__(self, in_channels: int, channels: int, features: int, classes: int) -> None:
        super().__init__()
        self.config = {"in_channels": in_channels, "channels": channels, "features": features, "classes": classes}
        self.first = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        self.third = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1)
        self.embed = nn.Linear(8 * channels, features)
        self.classify = nn.Linear(features, classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(b, features): what a metric is measured in."""
        hidden = F.silu(self.third(F.silu(self.second(F.silu(self.first(images))))))
        # A 2 x 2 grid keeps where strokes are, which a mean over all space would lose.
        return F.silu(self.embed(F.adaptive_avg_pool2d(hidden, 2).flatten(1)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.classify(self.features(images))
        return logits


def train_extractor(
    train: Split, held_out: Split, settings: ExtractorSettings, *, seed: int, out: Path
) -> dict[str, Any]:
    """Train on the train split (augmented as `data.augment` says), write config and weights, return the accuracies.

    Raises UserError when the images have no labels.
    """
    labels = train.labels(list(range(len(train))))
    images = train.images(list(range(len(train))))
    torch.manual_seed(seed_of(seed, "extractor"))
    model = SmallClassifier(images.shape[1], settings.channels, settings.features, int(labels.max()) + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=settings.total_steps)
    for step in range(settings.total_steps):
        first = step * settings.train_batch_size
        picked = [image_at(seed, first + i, len(train)) for i in range(settings.train_batch_size)]
        batch = augmented(images[picked], train.settings.augment, seed=seed, purpose="extractor", step=step, first=0)
        loss = F.cross_entropy(model(batch), labels[picked], label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    save_state(out / WEIGHTS, model.state_dict())
    write_json(out / CONFIG, {"class": "SmallClassifier", **model.config})
    return {"train_accuracy": accuracy(model, train), "held_out_accuracy": accuracy(model, held_out)}


@torch.no_grad()
def accuracy(model: SmallClassifier, split: Split) -> float:
    """Share of a split's unaugmented images that are classified right."""
    everything = list(range(len(split)))
    predicted = model.eval()(split.images(everything)).argmax(1)
    return float((predicted == split.labels(everything)).double().mean())


def load_extractor(folder: Path) -> SmallClassifier:
    """The classifier of a folder that `train_extractor` wrote. Raises UserError for anything else."""
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError):
        raise UserError(f"extractor {folder}: no readable {CONFIG} in it") from None
    if not isinstance(config, dict) or config.pop("class", None) != "SmallClassifier":
        raise UserError(f"extractor {folder}: {CONFIG} is not that of a SmallClassifier")
    try:
        model = SmallClassifier(**config)
    except (TypeError, ValueError) as error:
        raise UserError(f"extractor {folder}: {CONFIG} is wrong ({error})") from None
    try:
        model.load_state_dict(load_state(folder / WEIGHTS))
    except RuntimeError as error:
        raise UserError(f"extractor {folder}: weights do not fit its config ({str(error).splitlines()[0]})") from None
    return model.eval().requires_grad_(False)
