"""What a training starts from: the pretrained weights, their average beside them, or weights made anew.

All trainings of one seed start from the same weights, whatever their subset: a merge adds task vectors, which speak of
one model only if they set out from one point. Random weights are therefore keyed by the seed alone. The teacher stays
the pretrained model, and task vectors stay differences to the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from deme_diffusion.config import DecoupleSettings
from deme_diffusion.errors import UserError
from deme_diffusion.models.denoiser import Denoiser
from deme_diffusion.rng import generator, seed_of
from deme_diffusion.weight_files import AVERAGED
from deme_diffusion.weights import Weights


@dataclass(frozen=True)
class Start:
    """`kind` is `decouple.init`; `share`: of the layers made anew, by `seed`; `folder`: a pipeline with an average."""

    kind: Literal["pretrained", "ema", "partly_random", "random"] = "pretrained"
    share: float = 0.0
    seed: int = 0
    folder: Path | None = None


PRETRAINED = Start()


def start_of(settings: DecoupleSettings, seed: int, base: Path) -> Start:
    """The start of every training of a seed, from the pipeline folder `base`."""
    if settings.init == "pretrained":
        return PRETRAINED
    share = settings.init_random_share if settings.init == "partly_random" else 1.0
    return Start(settings.init, share, seed, base)


def started(denoiser: Denoiser, start: Start = PRETRAINED) -> nn.Module:
    """A trainable copy of the pretrained component, with the weights that a training starts from.

    Raises UserError for `ema` where the pipeline has no average, or one of another model.
    """
    student = denoiser.student()
    if start.kind == "ema":
        assert start.folder is not None, "an average lies beside a pipeline's component"
        _load_average(student, start.folder / f"{denoiser.component}{AVERAGED}")
    elif start.kind != "pretrained":
        _make_anew(student, start.share, start.seed)
    return student


@torch.no_grad()
def _load_average(student: nn.Module, folder: Path) -> None:
    """Into the student, from a component folder as diffusers' `EMAModel.save_pretrained` leaves it."""
    own = student.state_dict()
    with Weights(folder) as average:
        keys = set(average.keys())
        differ = sorted(keys.symmetric_difference(own))
        differ += [key for key in own if key in keys and average.shape(key) != tuple(own[key].shape)]
        if differ:
            raise UserError(f"{folder}: not the average of the component beside it: {differ[0]} differs")
        for key, tensor in own.items():
            tensor.copy_(average.tensor(key))


@torch.no_grad()
def _make_anew(student: nn.Module, share: float, seed: int) -> None:
    """A share of the layers becomes a new module's of the same config; a larger share holds a smaller one's layers."""
    layers = layers_of(student)
    order = generator(seed, "initial layers").permutation(len(layers))
    names = list(layers)
    fresh = layers_of(fresh_like(student, seed))
    for index in order[: round(share * len(names))]:
        name = names[index]
        for key, parameter in layers[name].items():
            parameter.copy_(fresh[name][key])


def layers_of(module: nn.Module) -> dict[str, Mapping[str, nn.Parameter]]:
    """Name -> the parameters of its own, of every module that has any."""
    parts = {name: dict(part.named_parameters(recurse=False)) for name, part in module.named_modules()}
    return {name: own for name, own in parts.items() if own}


def fresh_like(module: nn.Module, seed: int) -> nn.Module:
    """A newly initialised module of the same class and config, on the CPU; global generators are left as they were."""
    kind: Any = type(module)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(seed, "initial weights"))  # `torch.manual_seed` is a GPU's too
        fresh: nn.Module = kind.from_config(module.config)
    return fresh
