"""Do timesteps agree? Cosine similarities of the pretrained model's gradients over bins of timesteps (Fig. 1a).

The gradient of a bin is that of the denoising loss (Eq. 2) on some images of the train split. All bins see the same
images and noise: only t differs. Gradients are not kept but sketched (`sketch`), and the sketches lie in a file: memory
is that of one gradient, whatever the number of bins.
"""

from __future__ import annotations

import itertools
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from deme_diffusion.analysis.sketch import Array, Matrix, Sketches, sketch_into
from deme_diffusion.config import SimilaritySettings
from deme_diffusion.data.splits import Split
from deme_diffusion.decoupling.switches import checkpoint_gradients
from deme_diffusion.division import Runs, from_runs, name_of, to_runs, whole
from deme_diffusion.errors import UserError
from deme_diffusion.figure_file import write_figure
from deme_diffusion.models.denoiser import Denoiser, Noised
from deme_diffusion.models.objective import denoising_loss
from deme_diffusion.rng import image_at, normals, uniforms

log = logging.getLogger(__name__)
Timesteps = npt.NDArray[np.int64]
MOST_AT_ONCE = 16
"""Samples in a forward pass, which is in float32 whatever a training computes in: more would be no faster."""
SAVE_SECONDS = 10.0
"""Between two saves of the bins that are done, from which an interrupted stage goes on."""


def write_similarity(
    path: Path,
    denoiser: Denoiser,
    split: Split,
    settings: SimilaritySettings,
    *,
    subset: Runs | None = None,
    batch_size: int,
    checkpointing: bool = False,
    partial: Path | None = None,
) -> dict[str, float]:
    """Leave the figure `similarity` of a subset's timesteps (None: all) in K bins, `bins` or as many as they are.

    Arrays: `cosine` (K, K), `edges` (K + 1,) of the bins, `norms` (K,) of the gradients, `agreement` (K,) between the
    gradients of two halves of the images, `sketch`, `error`; meta: what they were taken on, and what follows. Goes on
    from what is in the folder `partial`. A batch of at most `MOST_AT_ONCE`, and activations that are computed anew
    (`checkpointing`), save memory and change results by rounding alone. Returns: of `shares`; the median `agreement`;
    and `error`, the standard deviation of a cosine near 0, which is 0 where the sketch is as large as the model.
    """
    timesteps = _timesteps(subset, denoiser.num_train_timesteps)
    edges = bins_of(len(timesteps), settings.bins)
    bins = [timesteps[lo:hi] for lo, hi in itertools.pairwise(edges)]
    module = denoiser.student().eval()
    if checkpointing:
        checkpoint_gradients(module)
    gradients = Gradients(denoiser, module, split, settings, min(batch_size, MOST_AT_ONCE))
    size = min(settings.sketch, gradients.count)
    error = 0.0 if gradients.count <= settings.sketch else size**-0.5
    with nullcontext(partial) if partial else tempfile.TemporaryDirectory() as folder:
        sketches = Sketches(Path(folder), len(bins), size)
        gradients.fill(sketches, bins)
        halves = [shares(sketches.cosines(half), error)["conflicting"] for half in (0, 1) if settings.num_images > 1]
        cosine = sketches.cosines(0, 1)
    told = {**shares(cosine, error), "error": error}
    if halves:
        told["agreement"] = float(np.median(sketches.agreements))
    own = to_runs(timesteps)
    meta: dict[str, Any] = {
        "name": name_of(own),
        "subset": own,
        "T": denoiser.num_train_timesteps,
        "edges": "timestep" if len(own) == 1 else "position in the subset",
        "split": split.name,
        "num_images": settings.num_images,
        "batch": gradients.batch_size,
        "seed": settings.seed,
        "parameters": gradients.count,
        "sketch": size,
        **told,
        "conflicting_halves": halves,
    }
    numbers = {"norms": sketches.norms, "agreement": sketches.agreements, "sketch": settings.sketch, "error": error}
    edges += timesteps[0] if len(own) == 1 else 0
    write_figure(path, "similarity", meta, cosine=cosine, edges=edges, **numbers)
    return told


def _timesteps(subset: Runs | None, total: int) -> Timesteps:
    """The subset's timesteps, ascending. Raises UserError where there are none, or some are outside [0, T)."""
    timesteps = np.unique(from_runs(whole(total) if subset is None else subset))
    if not len(timesteps) or timesteps[0] < 0 or timesteps[-1] >= total:
        raise UserError(f"similarity: {name_of(subset or [])}: timesteps of [0, {total}) expected")
    return timesteps


def bins_of(count: int, bins: int) -> Timesteps:
    """(K + 1,) the edges of K = min(bins, count) equal bins of so many timesteps, as `division.uniform` cuts them."""
    bins = min(bins, count)
    return -(-np.arange(bins + 1, dtype=np.int64) * count // bins)


def shares(cosine: Matrix, error: float) -> dict[str, float]:
    """Of the pairs of bins: the share that conflicts (cosine below 0) and mean cosines of all and of neighbours.

    A sketch can turn a pair whose cosine is within two of its errors of 0: the share is `conflicting_least` if it did
    for all that are below 0, `conflicting_most` if for all above.
    """
    bins = len(cosine)
    pairs = bins * (bins - 1)
    if not pairs:
        return {"conflicting": 0.0, "conflicting_least": 0.0, "conflicting_most": 0.0, "mean": 1.0, "neighbours": 1.0}
    doubt = min(2 * error, 1.0)
    below = [float(np.count_nonzero(cosine < limit)) / pairs for limit in (0.0, -doubt, doubt)]
    named = dict(zip(("conflicting", "conflicting_least", "conflicting_most"), below, strict=True))
    mean = (float(cosine.sum(dtype=np.float64)) - bins) / pairs
    return {**named, "mean": mean, "neighbours": float(np.diagonal(cosine, 1).mean(dtype=np.float64))}


# -- gradients ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gradients:
    """Of a module's denoising loss, on the same images and noise wherever t is."""

    denoiser: Denoiser
    module: nn.Module
    split: Split
    settings: SimilaritySettings
    batch_size: int

    @property
    def parameters(self) -> list[nn.Parameter]:
        return self.denoiser.trainable(self.module)

    @property
    def count(self) -> int:
        """Entries of a gradient."""
        return sum(p.numel() for p in self.parameters)

    def points(self, timesteps: Timesteps, first: int, stop: int) -> Iterator[Noised]:
        """A bin's batches, from one sample to another: images as training sees them, t stratified in the bin."""
        count, seed = self.settings.num_images, self.settings.seed
        device = next(self.denoiser.module.parameters()).device
        for start in range(first, stop, self.batch_size):
            end = min(start + self.batch_size, stop)
            picked = [image_at(seed, index, len(self.split)) for index in range(start, end)]
            images = self.split.training_images(picked, seed=seed, purpose="similarity", step=0, first=start)
            u = uniforms(seed, "similarity-t", 0, start, end - start)[:, 0] + strata(count)[start:end]
            t = torch.from_numpy(self.denoiser.timesteps(timesteps, u / count))
            noise = torch.from_numpy(normals(seed, "similarity-noise", 0, start, len(picked), tuple(images.shape[1:])))
            yield self.denoiser.noised({"image": images.to(device)}, t.to(device), noise.to(device))

    def add(self, total: list[torch.Tensor], batches: Iterator[Noised]) -> None:
        """Add to `total` the gradient summed over samples: a tensor for each trainable parameter."""
        parameters = self.parameters
        for noised in batches:
            prediction = self.denoiser.predict(self.module, noised.x_t, noised.t, noised.condition)
            loss = denoising_loss(prediction, noised.target).sum()
            for held, found in zip(total, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
                if found is not None:
                    held += found

    def halves(self, timesteps: Timesteps, size: int) -> tuple[Array, float]:
        """(2, size) sketches of a bin's gradient on each half of the images, and the norm of the mean over all."""
        count = self.settings.num_images
        middle = (count + 1) // 2
        total = [torch.zeros_like(p) for p in self.parameters]
        halves, norm = np.zeros((2, size)), 0.0
        for sketch, first, stop in zip(halves, (0, middle), (middle, count), strict=True):
            self.add(total, self.points(timesteps, first, stop))
            norm = sketch_into(sketch, total, self.settings.seed)
        halves[1] -= halves[0]  # a sketch is linear, so that memory for a second gradient is saved
        return halves, norm / count

    def fill(self, sketches: Sketches, bins: Sequence[Timesteps]) -> None:
        """Sketch the bins that are not there yet; whatever ends it, those that are done are kept."""
        last = time.monotonic()
        try:
            for own in bins[sketches.done :]:
                sketches.append(*self.halves(own, sketches.shape[2]))
                log.info("gradients of %d of %d bins", sketches.done, len(bins))
                if time.monotonic() - last > SAVE_SECONDS:
                    sketches.save()
                    last = time.monotonic()
        finally:
            sketches.save()


def strata(count: int) -> Timesteps:
    """0, 2, ..., 1, 3, ...: so many strata in an order in which each half of them covers the bin."""
    return np.concatenate([np.arange(0, count, 2), np.arange(1, count, 2)])
