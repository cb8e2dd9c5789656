"""Do timesteps agree? Cosine similarities of the pretrained model's gradients over bins of timesteps (Fig. 1a).

The gradient of a bin is that of the denoising loss (Eq. 2) on some images of the train split. All bins see the same
images and noise: only t differs. Gradients are not kept but sketched to `sketch` dimensions (CountSketch: Charikar et
al. 2002; each entry is added, with a random sign, to a random place), which keeps inner products: a cosine c of two
sketches has a standard deviation of about (1 - c^2) / sqrt(sketch), whatever the size of the model.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from deme_diffusion.config import SimilaritySettings
from deme_diffusion.data.splits import Split
from deme_diffusion.decoupling.switches import checkpoint_gradients
from deme_diffusion.division import from_runs, uniform
from deme_diffusion.files import replacing
from deme_diffusion.models.denoiser import Denoiser, Noised
from deme_diffusion.models.objective import denoising_loss
from deme_diffusion.rng import image_at, normals, uniforms, words

log = logging.getLogger(__name__)
Array = npt.NDArray[np.float64]
PARTIAL = "sketches.npz"
CHUNK = 1 << 20
"""Entries of a gradient that are sketched at once."""
MOST_AT_ONCE = 16
"""Samples in a forward pass, which is in float32 whatever a training computes in: more would be no faster."""
SAVE_SECONDS = 60.0
"""Between two saves of the bins that are done, from which an interrupted stage goes on."""


def write_similarity(
    path: Path,
    denoiser: Denoiser,
    split: Split,
    settings: SimilaritySettings,
    *,
    batch_size: int,
    checkpointing: bool = False,
    partial: Path | None = None,
) -> dict[str, float]:
    """Leave a .npz: `cosine` (K, K), `edges` (K + 1,) of the bins, `norms` (K,) of the gradients, `sketch`, `error`.

    Goes on from what is in the folder `partial`. A batch of at most `MOST_AT_ONCE`, and activations that are computed
    anew (`checkpointing`), save memory and change results by rounding alone. Returns: the share of pairs that conflict
    (cosine below 0), the mean cosine of pairs and of neighbours, and the error, which is 0 where the sketch is as large
    as the model.
    """
    bins = uniform(settings.bins, denoiser.num_train_timesteps, key="similarity.bins")
    module = denoiser.student().eval()
    if checkpointing:
        checkpoint_gradients(module)
    batch_size = min(batch_size, MOST_AT_ONCE)
    parameters = denoiser.trainable(module)
    count = sum(p.numel() for p in parameters)
    size = min(settings.sketch, count)
    sketches, norms, done = _begun(partial, settings.bins, size)
    last = time.monotonic()
    for k in range(done, settings.bins):
        gradient = gradient_of(denoiser, module, points(denoiser, split, bins.subset(k), settings, batch_size))
        sketches[k], norm = sketch_of(gradient, settings.sketch, settings.seed)
        norms[k] = norm / settings.num_images
        log.info("gradients of %d of %d bins", k + 1, settings.bins)
        if partial is not None and time.monotonic() - last > SAVE_SECONDS:
            _save(partial / PARTIAL, sketches=sketches, norms=norms, done=np.int64(k + 1))
            last = time.monotonic()
    cosine, error = cosines(sketches), 0.0 if count <= settings.sketch else size**-0.5
    edges = np.array([0, *(bins.subset(k)[0][1] for k in range(settings.bins))])
    _save(path, cosine=cosine, edges=edges, norms=norms, sketch=np.int64(settings.sketch), error=np.float64(error))
    return {**summary(cosine), "error": error}


def summary(cosine: Array) -> dict[str, float]:
    """Of the pairs of bins: the share that conflicts (cosine below 0), and mean cosines of all and of neighbours."""
    pairs = cosine[np.triu_indices(len(cosine), 1)]
    if not len(pairs):
        return {"conflicting": 0.0, "mean": 1.0, "neighbours": 1.0}
    neighbours = np.diagonal(cosine, 1)
    means = {"mean": float(pairs.mean()), "neighbours": float(neighbours.mean())}
    return {"conflicting": float((pairs < 0).mean()), **means}


def cosines(vectors: Array) -> Array:
    """(K, d) -> (K, K), exactly symmetric with a diagonal of 1; a vector of zeros is orthogonal to all others."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
    product: Array = np.clip(unit @ unit.T, -1.0, 1.0)
    product = (product + product.T) / 2
    np.fill_diagonal(product, 1.0)
    return product


# -- gradients ------------------------------------------------------------------------------------


def points(
    denoiser: Denoiser, split: Split, subset: Sequence[Sequence[int]], settings: SimilaritySettings, batch_size: int
) -> Iterator[Noised]:
    """A bin's batches: images as training sees them, noise (both alike for all bins), t stratified in the bin."""
    device = next(denoiser.module.parameters()).device
    count, seed = settings.num_images, settings.seed
    timesteps = from_runs([list(run) for run in subset])
    for first in range(0, count, batch_size):
        stop = min(first + batch_size, count)
        picked = [image_at(seed, index, len(split)) for index in range(first, stop)]
        images = split.training_images(picked, seed=seed, purpose="similarity", step=0, first=first)
        u = (np.arange(first, stop) + uniforms(seed, "similarity-t", 0, first, stop - first)[:, 0]) / count
        t = torch.from_numpy(denoiser.timesteps(timesteps, u))
        noise = normals(seed, "similarity-noise", 0, first, stop - first, tuple(images.shape[1:]))
        yield denoiser.noised({"image": images.to(device)}, t.to(device), torch.from_numpy(noise).to(device))


def gradient_of(denoiser: Denoiser, module: nn.Module, batches: Iterator[Noised]) -> list[torch.Tensor]:
    """The gradient of the denoising loss, summed over the samples: a tensor for each trainable parameter."""
    parameters = denoiser.trainable(module)
    total = [torch.zeros_like(p) for p in parameters]
    for noised in batches:
        prediction = denoiser.predict(module, noised.x_t, noised.t, noised.condition)
        loss = denoising_loss(prediction, noised.target).sum()
        for held, found in zip(total, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            if found is not None:
                held += found
    return total


# -- sketches -------------------------------------------------------------------------------------


def sketch_of(gradient: Sequence[torch.Tensor], size: int, seed: int) -> tuple[Array, float]:
    """(the gradient in `size` dimensions, its norm): itself, where it has no more entries."""
    count = sum(tensor.numel() for tensor in gradient)
    exact, squares, first = count <= size, 0.0, 0
    sketch = np.zeros(min(size, count))
    for values in _chunks(gradient):
        if exact:
            sketch[first : first + len(values)] = values
        else:
            place, sign = _hashed(seed, first, len(values), size)
            sketch += np.bincount(place, weights=values * sign, minlength=size)
        squares += float(values @ values)
        first += len(values)
    return sketch, squares**0.5


def _chunks(gradient: Sequence[torch.Tensor]) -> Iterator[Array]:
    for tensor in gradient:
        flat = tensor.detach().flatten()
        for first in range(0, len(flat), CHUNK):
            yield flat[first : first + CHUNK].double().cpu().numpy()


def _hashed(seed: int, first: int, count: int, size: int) -> tuple[npt.NDArray[np.int64], Array]:
    """Place and sign of the entries first, first + 1, ...: a function of the entry alone."""
    drawn = words(seed, "similarity sketch", first=first, count=count).view(np.uint32).astype(np.int64)
    return (drawn >> 1) % np.int64(size), np.where(drawn & 1, -1.0, 1.0)


# -- files ----------------------------------------------------------------------------------------


def _begun(partial: Path | None, bins: int, size: int) -> tuple[Array, Array, int]:
    """Sketches and norms of an interrupted stage, and how many bins they hold."""
    file = None if partial is None else partial / PARTIAL
    if file is None or not file.is_file():
        return np.zeros((bins, size)), np.zeros(bins), 0
    with np.load(file, allow_pickle=False) as saved:
        return saved["sketches"], saved["norms"], int(saved["done"])


def _save(path: Path, **arrays: Any) -> None:
    with replacing(path) as file:
        np.savez(file, **arrays)
