"""A LoRA seen as the whole model that it makes of its base: dense tensors theta + s B A, each computed when read."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from deme_diffusion.errors import UserError
from deme_diffusion.lora import Factors, Lora, base_record, check_base, check_fits, read_lora
from deme_diffusion.lora_files import find_lora
from deme_diffusion.merging.checkpoints import DENOISERS
from deme_diffusion.merging.parents import read_config
from deme_diffusion.weights import Entry, Weights, load_state

SMALL = 2**26
"""Bytes of a base that is hashed without being asked, to compare it with what a LoRA says of its own."""


class LoraWeights(Weights):
    """The reader of a LoRA, with the names, order and shapes of its base's; what it leaves alone is the base's.

    Raises UserError where the LoRA is another base's. Adapted tensors are in float32 or wider, whatever the base is in.
    """

    def __init__(self, path: Path, base: Weights) -> None:
        config = read_config(base.path) if base.path.is_dir() else {}
        self.base, self.path, self._stack = base, path, ExitStack()
        self.lora: Lora = read_lora(path, _component(path, base, config), config)
        self.files = [self.lora.file]
        of = str(base.path)
        check_fits(self.lora, {key: base.shape(key) for key in base.keys()}, of)  # noqa: SIM118 - Weights is no mapping
        untold = check_base(self.lora, record_of(base), base)
        self.notes = (*self.lora.notes, *filter(None, [untold]))

    def keys(self) -> list[str]:
        return self.base.keys()

    def factors(self, key: str) -> Factors | None:
        """What changes a parameter; None where nothing does."""
        layer, _, kind = key.rpartition(".")
        return self.lora.layers.get(layer) if kind == "weight" else None

    def tensor(self, key: str) -> torch.Tensor:
        base, own = self.base.tensor(key), self.factors(key)
        return base if own is None else base.to(self.dtype(key)) + own.delta().to(self.dtype(key))

    def entry(self, key: str) -> Entry:
        """Where the base's tensor lies: right of one that the LoRA leaves alone."""
        return self.base.entry(key)

    def shape(self, key: str) -> tuple[int, ...]:
        return self.base.shape(key)

    def dtype(self, key: str) -> torch.dtype:
        own = self.base.dtype(key)
        return own if self.factors(key) is None else torch.promote_types(own, torch.float32)

    def layout(self) -> dict[str, list[str]]:
        return self.base.layout()


def opened(path: Path, base: Weights) -> Weights:
    """The reader of an expert: of a whole model, or of a LoRA for the base."""
    return LoraWeights(path, base) if find_lora(path) else Weights(path)


def all_loras(readers: Sequence[Weights]) -> list[LoraWeights] | None:
    """The readers, where every one is a LoRA's."""
    found = [reader for reader in readers if isinstance(reader, LoraWeights)]
    return found if len(found) == len(readers) else None


def record_of(base: Weights, *, full_hash: bool = False) -> dict[str, Any]:
    """What a LoRA for this base says of it; a big one is hashed only where that is asked for."""
    small = sum(file.stat().st_size for file in base.files) <= SMALL
    return base_record(base, full_hash=full_hash or small)


def component_of(config: dict[str, Any]) -> str:
    """The name that a pipeline has for a component of this config."""
    return DENOISERS[0] if str(config.get("_class_name", "")).startswith("UNet") else DENOISERS[1]


def _component(path: Path, base: Weights, config: dict[str, Any]) -> str:
    """Of a base that is a bare file, without a config, what the LoRA's names begin with."""
    if config:
        return component_of(config)
    file = find_lora(path)
    begins = {key.split(".")[0] for key in load_state(file)} if file else set()
    found = next((name for name in DENOISERS if name in begins), None)
    if found is None:
        raise UserError(f"{path}: not known what of {base.path} it is for: give a folder with a config.json as base")
    return found
