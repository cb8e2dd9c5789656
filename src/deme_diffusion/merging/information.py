"""Files of Fisher information: one an expert, of the base's architecture."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from deme_diffusion.digests import artefact_of
from deme_diffusion.errors import UserError
from deme_diffusion.merging.vectors import computable
from deme_diffusion.weight_files import FISHER_METADATA, PROJECTION_KEY
from deme_diffusion.weights import Weights


class Information(Weights):
    """A file of Fisher information: Weights whose tensors hold no negative entry, which is looked at as they are read.

    `about`: what the metadata of `deme fisher` say, None in a file of others.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.about, self._checked = _about([handle.metadata() for handle in self._handles.values()]), set[str]()

    def tensor(self, key: str) -> torch.Tensor:
        """One tensor, read now. Raises UserError for a negative entry: a square has none."""
        tensor = super().tensor(key)
        if key not in self._checked:
            if tensor.numel() and bool(computable(tensor).min() < 0):
                raise UserError(f"{self.path}: {key} has a negative entry, so it is no Fisher information")
            self._checked.add(key)
        return tensor


def _about(metadata: Sequence[Mapping[str, str] | None]) -> dict[str, Any] | None:
    try:
        found = json.loads(next(told[FISHER_METADATA] for told in metadata if told and FISHER_METADATA in told))
    except (StopIteration, ValueError):
        return None
    return found if isinstance(found, dict) else None


def check_information(
    files: Sequence[Information],
    base: Weights,
    experts: Sequence[Weights],
    projections: Mapping[str, Sequence[int]],
) -> Iterator[str]:
    """What to tell the user of them. Raises UserError unless each has the base's floating parameters and no others.

    `projections`: name -> shape of the D that are merged; F of them may be missing. Where it is known whom a file is
    about, and which experts are merged, it must be the expert of the same place.
    """
    if not files:
        return
    for file in files:
        _check_keys(file, base, projections)
    _check_order(files, experts)
    for file in files:
        if file.about is None:
            yield f"{file.path}: nothing says that it is Fisher information (no {FISHER_METADATA} in its metadata)"
        if not set(file.keys()).issuperset(projections):
            yield f"{file.path}: says nothing of projections; there every entry counts alike"


def _check_keys(file: Information, base: Weights, projections: Mapping[str, Sequence[int]]) -> None:
    have, keys = set(file.keys()), base.keys()
    lacking = [key for key in keys if base.dtype(key).is_floating_point and key not in have]
    extra = sorted(key for key in have.difference(keys) if not key.startswith(PROJECTION_KEY))
    if lacking or extra:
        of = f"lacks {lacking[0]}" if lacking else f"has {extra[0]}, which the base lacks"
        raise UserError(f"{file.path}: Fisher information of another model: {of}")
    shapes = {**{key: base.shape(key) for key in keys}, **projections}
    for key in sorted(have.intersection(shapes)):
        if (shape := file.shape(key)) != (merged := tuple(shapes[key])):
            whose = "the expert's" if key in projections else "the base's"
            raise UserError(f"{file.path}: {key} has shape {shape}, {whose} is {merged}")


def _check_order(files: Sequence[Information], experts: Sequence[Weights]) -> None:
    """By the digest of the expert's artefact: that of a model which no stage of ours made is not known."""
    whose = [None if file.about is None else file.about.get("expert") for file in files]
    known = [artefact_of(expert.path) for expert in experts]
    for i, (file, of, own) in enumerate(zip(files, whose, known, strict=True)):
        if of is None or own is None or of == own:
            continue
        theirs = f"of expert {j} ({experts[j].path})" if (j := _index(known, of)) is not None else f"of another ({of})"
        mine = f"; expert {i}'s is {files[k].path}" if (k := _index(whose, own)) is not None else ""
        raise UserError(f"{file.path}: Fisher information {theirs}, not of expert {i} ({experts[i].path}){mine}")


def _index(values: Sequence[object], wanted: object) -> int | None:
    return next((i for i, value in enumerate(values) if value == wanted), None)
