"""The diagonal Fisher information of one expert on its own timesteps, which the Fisher merge weighs its weights by.

The denoiser answers with the mean of a Gaussian of unit variance, so that the log-likelihood of a sample is
-1/2 || target - eps_theta(x_t, t) ||^2 up to a constant, and F = E (grad_theta of it)^2 over the train split's images,
t uniform in the expert's subset, and noise (Matena and Raffel 2022, Sec. 3.2; the empirical Fisher).
"""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import nn
from torch.func import functional_call, grad, vmap

from deme_diffusion.data.splits import Split
from deme_diffusion.division import Runs, from_runs
from deme_diffusion.models import projection
from deme_diffusion.models.denoiser import Condition, Denoiser, Noised, on_device
from deme_diffusion.models.precision import computes_in
from deme_diffusion.rng import image_at, normals, uniforms
from deme_diffusion.weight_files import FISHER_METADATA, PROJECTION_KEY
from deme_diffusion.weights import State, load_state, save_state

log = logging.getLogger(__name__)
FILE = "fisher.safetensors"
MOST_BYTES, MOST_SAMPLES = 5e8, 32
"""Per-sample gradients that are held at once."""
SAVE_SECONDS = 60.0
"""Between two saves of the sums, from which an interrupted stage goes on."""


def write_fisher(
    folder: Path,
    denoiser: Denoiser,
    module: nn.Module,
    split: Split,
    subset: Runs,
    *,
    samples: int,
    seed: int,
    expert: str,
) -> None:
    """Leave `fisher.safetensors` in a folder: F by the component's keys, and `projection.<place>` for every D attached.

    Goes on from the sums in `folder/work`. `expert` is the digest of whom it is about, for the metadata.
    """
    partial = folder / "work" / FILE
    sums, done = _saved(partial)
    last = time.monotonic()
    for found, stop in sums_of(denoiser, module, split, subset, samples=samples, seed=seed, sums=sums, done=done):
        sums = found
        if time.monotonic() - last > SAVE_SECONDS and stop < samples:
            save_state(partial, sums, {"samples": str(stop)})
            log.info("%d of %d samples", stop, samples)
            last = time.monotonic()
    about = {"subset": subset, "samples": samples, "seed": seed, "expert": expert}
    mean = {key: (total / samples).float() for key, total in sums.items()}
    save_state(folder / FILE, mean, {FISHER_METADATA: json.dumps(about, sort_keys=True)})


def sums_of(
    denoiser: Denoiser,
    module: nn.Module,
    split: Split,
    subset: Runs,
    *,
    samples: int,
    seed: int,
    sums: State | None = None,
    done: int = 0,
) -> Iterator[tuple[State, int]]:
    """(sums of squared gradients, samples in them) after each chunk, going on after the first `done` samples.

    Sums in the module's own precision: of 512 terms, none negative, float32 loses at most 3e-5 of a sum.
    """
    device = next(module.parameters()).device
    sums = {key: value.to(device) for key, value in (sums or {}).items()}
    chunk = chunk_of(module)
    for first in range(done, samples, chunk):
        stop = min(first + chunk, samples)
        noised = points(denoiser, split, subset, seed, first, stop, device)
        for key, value in squared_gradients(denoiser, module, noised):
            sums[key] = sums[key] + value if key in sums else value
        yield sums, stop


def points(
    denoiser: Denoiser, split: Split, subset: Runs, seed: int, first: int, stop: int, device: torch.device
) -> Noised:
    """Samples [first, stop): images as training sees them, t uniform in the subset, noise; each keyed by its index."""
    count = stop - first
    picked = [image_at(seed, index, len(split)) for index in range(first, stop)]
    batch = split.training_batch(picked, seed=seed, purpose="fisher", step=0, first=first)
    u = uniforms(seed, "fisher-t", 0, first, count)[:, 0]
    t = torch.from_numpy(denoiser.timesteps(from_runs(subset), u))
    noise = torch.from_numpy(normals(seed, "fisher-noise", 0, first, count, denoiser.sample_shape))
    return denoiser.noised(on_device(batch, device), t.to(device), noise.to(device))


def squared_gradients(denoiser: Denoiser, module: nn.Module, noised: Noised) -> Iterator[tuple[str, torch.Tensor]]:
    """Key -> sum over the samples of (grad of 1/2 || target - eps_theta(x_t, t) ||^2)^2, shaped as the parameter."""
    names = _names(module)
    tensors = {name: tensor.detach() for name, tensor in _tensors(module) if name in names}
    noised = noised.as_type(computes_in(module))

    def loss(
        tensors: State, x_t: torch.Tensor, t: torch.Tensor, target: torch.Tensor, condition: Condition
    ) -> torch.Tensor:
        def student(*inputs: Any, **options: Any) -> Any:
            return functional_call(module, tensors, inputs, options)

        one = {key: value[None] for key, value in condition.items()}
        prediction = denoiser.predict(cast(nn.Module, student), x_t[None], t[None], one)
        return 0.5 * (target[None] - prediction).square().sum()

    each: Callable[..., State] = vmap(grad(loss), in_dims=(None, 0, 0, 0, 0))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # attention runs sample by sample
        gradients = each(tensors, noised.x_t, noised.t, noised.target, noised.condition)
    for name, key in names.items():
        yield key, gradients.pop(name).square().sum(0)


def chunk_of(module: nn.Module) -> int:
    """How many samples' gradients are held at once: of one sample they are as large as the model."""
    held = sum(tensor.numel() * tensor.element_size() for _, tensor in _tensors(module))
    return max(1, min(MOST_SAMPLES, int(MOST_BYTES // held)))


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _names(module: nn.Module) -> dict[str, str]:
    """Name in the module -> key in the file, of all that was trained."""
    matrices = {projection.buffer_of(place): f"{PROJECTION_KEY}{place}" for place in projection.attached(module)}
    return {name: name for name, _ in module.named_parameters()} | matrices


def _saved(path: Path) -> tuple[State, int]:
    """The sums of an interrupted stage, and how many samples they hold."""
    if not path.is_file():
        return {}, 0
    with safe_open(path, framework="numpy") as file:
        done = int(file.metadata()["samples"])
    return load_state(path), done
