"""Do timesteps agree? Cosine similarities of the pretrained model's gradients over bins of timesteps (Fig. 1a).

The gradient of a bin is that of the denoising loss (Eq. 2) on some images of the train split. All bins see the same
images and noise: only t differs. So cosines are what a batch of training would see, and larger than the expected
gradients': of those speak the products of gradients on different groups of the images. Gradients are not kept but
sketched (`sketch`), and the sketches lie in a file: memory is that of one gradient, whatever the number of bins.
"""

from __future__ import annotations

import itertools
import logging
import math
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

from deme_diffusion.analysis.sketch import Matrix, Sketches, sketch_into
from deme_diffusion.config import SimilaritySettings
from deme_diffusion.data.splits import Split
from deme_diffusion.decoupling.switches import checkpoint_gradients
from deme_diffusion.division import Runs, from_runs, name_of, to_runs, whole
from deme_diffusion.errors import UserError
from deme_diffusion.figure_file import write_figure
from deme_diffusion.models.denoiser import Denoiser, Noised, on_device
from deme_diffusion.models.objective import denoising_loss
from deme_diffusion.rng import image_at, normals, uniforms

log = logging.getLogger(__name__)
Timesteps = npt.NDArray[np.int64]
Vector = npt.NDArray[np.float64]
GROUPS = 8
"""Of the images, each with images, noise and timesteps of its own: what they agree about is no noise."""
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

    Arrays: `cosine` (K, K), `edges` (K + 1,) of the bins, `norms` (K,) of the gradients; `cross` (K, K), the mean inner
    products of gradients on two different groups of the images, over those norms: unbiased for the expected gradients;
    `cross_error` (K,), the standard error of its diagonal; `sketch`, `error`; meta: what they were taken on, and what
    follows. Goes on from what is in the folder `partial`. A batch of at most `MOST_AT_ONCE`, and activations that are
    computed anew (`checkpointing`), save memory and change results by rounding alone. Returns: `summary`. Raises
    UserError where a gradient is not finite.
    """
    timesteps = _timesteps(subset, denoiser.num_train_timesteps)
    edges = bins_of(len(timesteps), settings.bins)
    bins = [timesteps[lo:hi] for lo, hi in itertools.pairwise(edges)]
    module = denoiser.student().eval()
    if checkpointing:
        checkpoint_gradients(module)
    gradients = Gradients(denoiser, module, split, settings, min(batch_size, MOST_AT_ONCE))
    header = _protocol(gradients, timesteps)
    with nullcontext(partial) if partial else tempfile.TemporaryDirectory() as folder:
        sketches = Sketches(Path(folder), len(bins), gradients.groups, header["sketch"], header)
        gradients.fill(sketches, bins)
        cosine, cross = sketches.compared()
    errors = np.array([error for _, error in sketches.squares])
    told = summary(cosine, cross, errors, 0.0 if header["exact"] else header["sketch"] ** -0.5)
    edges += timesteps[0] if header["edges"] == "timestep" else 0
    arrays: dict[str, Any] = {"cosine": cosine, "cross": cross, "cross_error": errors, "edges": edges}
    arrays |= {"norms": sketches.norms, "sketch": settings.sketch, "error": told["error"]}
    write_figure(path, "similarity", {**header, **told}, **arrays)
    return {**told, "num_images": gradients.num_images}


def _protocol(gradients: Gradients, timesteps: Timesteps) -> dict[str, Any]:
    """What the gradients were taken on, in plain values."""
    own, size = to_runs(timesteps), min(gradients.settings.sketch, gradients.count)
    return {
        "name": name_of(own),
        "subset": own,
        "T": gradients.denoiser.num_train_timesteps,
        "edges": "timestep" if len(own) == 1 else "position in the subset",
        "split": gradients.split.name,
        "split_images": len(gradients.split),
        "num_images": gradients.num_images,
        "groups": len(gradients.groups),
        "batch": gradients.batch_size,
        "seed": gradients.settings.seed,
        "parameters": gradients.count,
        "sketch": size,
        "exact": size == gradients.count,
    }


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


def summary(cosine: Matrix, cross: Matrix, cross_error: Vector, error: float) -> dict[str, float]:
    """Of `cosine` its `shares`; how many of the `bins` are `determined`; `error` of a cosine near 0 by the sketch.

    A bin is determined where its expected gradient's squared norm is above two standard errors. Of pairs of such bins,
    where there are any: `expected`, the share whose expected gradients conflict, and its bounds as in `shares`.
    """
    squares = np.diagonal(cross)
    known = squares > 2 * cross_error
    told = {**shares(cosine, error), "error": error, "bins": len(cosine), "determined": int(np.count_nonzero(known))}
    if told["determined"] > 1:
        norms = np.sqrt(squares[known])
        told |= _below(cross[np.ix_(known, known)] / np.outer(norms, norms), error, "expected")
    return told


def shares(cosine: Matrix, error: float) -> dict[str, float]:
    """Of the pairs of bins: the share that conflicts (cosine below 0) and mean cosines of all and of neighbours.

    A sketch can turn a pair whose cosine is within two of its errors of 0: the share is `conflicting_least` if it did
    for all that are below 0, `conflicting_most` if for all above.
    """
    bins = len(cosine)
    if bins < 2:
        return {"conflicting": 0.0, "conflicting_least": 0.0, "conflicting_most": 0.0, "mean": 1.0, "neighbours": 1.0}
    mean = (float(cosine.sum(dtype=np.float64)) - bins) / (bins * (bins - 1))
    neighbours = float(np.diagonal(cosine, 1).mean(dtype=np.float64))
    return {**_below(cosine, error, "conflicting"), "mean": mean, "neighbours": neighbours}


def _below(cosine: Matrix, error: float, name: str) -> dict[str, float]:
    """The share of pairs below 0, and its bounds at two errors."""
    off, doubt = cosine[~np.eye(len(cosine), dtype=bool)], min(2 * error, 1.0)
    limits = {name: 0.0, f"{name}_least": -doubt, f"{name}_most": doubt}
    return {told: float(np.count_nonzero(off < limit)) / len(off) for told, limit in limits.items()}


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

    @property
    def num_images(self) -> int:
        """As many as are asked for and the split has: none is seen twice."""
        return min(self.settings.num_images, len(self.split))

    @property
    def groups(self) -> list[int]:
        """Images of each group: they are in as many groups as `GROUPS`, of nearly one size."""
        count = min(GROUPS, self.num_images)
        return [self.num_images // count + (i < self.num_images % count) for i in range(count)]

    def points(self, timesteps: Timesteps, group: int) -> Iterator[Noised]:
        """A bin's batches on one group: images as training sees them, t stratified in the bin, for each group anew.

        So the groups are independent of each other.
        """
        seed, size = self.settings.seed, self.groups[group]
        device = next(self.denoiser.module.parameters()).device
        first = sum(self.groups[:group])
        for start in range(first, first + size, self.batch_size):
            end = min(start + self.batch_size, first + size)
            picked = [image_at(seed, index, len(self.split)) for index in range(start, end)]
            batch = self.split.training_batch(picked, seed=seed, purpose="similarity", step=0, first=start)
            u = uniforms(seed, "similarity-t", 0, start, end - start)[:, 0] + np.arange(start, end) - first
            t = torch.from_numpy(self.denoiser.timesteps(timesteps, u / size))
            shape = self.denoiser.sample_shape
            noise = torch.from_numpy(normals(seed, "similarity-noise", 0, start, len(picked), shape))
            yield self.denoiser.noised(on_device(batch, device), t.to(device), noise.to(device))

    def add(self, total: list[torch.Tensor], batches: Iterator[Noised]) -> None:
        """Add to `total` the gradient summed over samples: a tensor for each trainable parameter."""
        parameters = self.parameters
        for noised in batches:
            loss = denoising_loss(self.denoiser.answer(self.module, noised), noised.target).sum()
            for held, found in zip(total, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
                if found is not None:
                    held += found

    def put(self, sketches: Sketches, timesteps: Timesteps) -> None:
        """The next bin. A sketch is linear: a group's is what it adds to that of the groups before."""
        total = [torch.zeros_like(p) for p in self.parameters]
        before, norm = np.zeros(sketches.shape[2]), 0.0
        for group in range(len(self.groups)):
            self.add(total, self.points(timesteps, group))
            sketch = np.empty_like(before)
            norm = sketch_into(sketch, total, self.settings.seed)
            if not math.isfinite(norm):
                raise UserError(f"similarity: bin {name_of(to_runs(timesteps))}: {self._broken()}")
            before -= sketch
            sketches.put(group, np.negative(before, out=before))
            before = sketch
        sketches.close_bin(norm / self.num_images)

    def _broken(self) -> str:
        """Why a gradient is not finite."""
        if not all(bool(parameter.isfinite().all()) for parameter in self.module.parameters()):
            return "its gradient is not finite, since weights of the model (model.pretrained) are not"
        return "its gradient is not finite, though the model's weights are: it overflows there, or images are broken"

    def fill(self, sketches: Sketches, bins: Sequence[Timesteps]) -> None:
        """Sketch the bins that are not there yet; whatever ends it, those that are done are kept."""
        if self.num_images < self.settings.num_images:
            log.warning(
                "similarity.num_images: %d; all %d images of the %s split are taken, none of them twice",
                self.settings.num_images,
                self.num_images,
                self.split.name,
            )
        last, where = time.monotonic(), name_of(to_runs(np.concatenate(bins)))
        try:
            for own in bins[sketches.done :]:
                self.put(sketches, own)
                if time.monotonic() - last > SAVE_SECONDS:
                    log.info("gradients in %s: %d of %d bins", where, sketches.done, len(bins))
                    sketches.save()
                    last = time.monotonic()
        finally:
            sketches.save()
