"""What the stages of one graph share: folders, splits, the base, and models as they are served; opened once each."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from deme_diffusion.artefacts import Store
from deme_diffusion.data.classes import Classes, in_model
from deme_diffusion.data.encoded import EncodedSplit, check_shards, open_cache
from deme_diffusion.data.sources import SplitName
from deme_diffusion.data.splits import Split, load_splits
from deme_diffusion.decoupling.switches import laid_out
from deme_diffusion.division import from_runs
from deme_diffusion.files import part_of
from deme_diffusion.lora import Lora, read_lora
from deme_diffusion.lora_files import LORA_NAME
from deme_diffusion.models import projection
from deme_diffusion.models.adapters import SwitchedEnsemble
from deme_diffusion.models.denoiser import Denoiser
from deme_diffusion.models.devices import device_of
from deme_diffusion.models.ensemble import RoutedEnsemble
from deme_diffusion.models.families import family
from deme_diffusion.models.latent import LatentDenoiser
from deme_diffusion.models.lora import attach, fused
from deme_diffusion.models.objective import FixedNoise
from deme_diffusion.pipeline import images
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.inputs import Input
from deme_diffusion.pipeline.node import Node, Served
from deme_diffusion.weight_files import read_json

T = TypeVar("T")


class Shared:
    """What graphs with equal inputs open once in a process: the last few of each kind, by what they depend on."""

    def __init__(self, most: int = 2) -> None:
        self.most, self.held = most, dict[str, OrderedDict[Hashable, Any]]()

    def get(self, kind: str, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gave for this key, or gives now."""
        held = self.held.setdefault(kind, OrderedDict())
        if key not in held:
            held[key] = make()
        held.move_to_end(key)
        while len(held) > self.most:
            held.popitem(last=False)
        value: T = held[key]
        return value


class Workbench:
    """One graph and its store."""

    def __init__(self, graph: Graph, store: Store, shared: Shared | None = None) -> None:
        self.graph, self.recipe, self.store, self.shared = graph, graph.recipe, store, shared or Shared()

    def folder(self, part: Node | Input) -> Path:
        """Where an input lies."""
        return part.folder if isinstance(part, Input) else self.store.folder(part.key)

    @cached_property
    def splits(self) -> dict[SplitName, Split]:
        """The three splits."""
        data = self.graph.data
        folder = self.folder(data) if isinstance(data, Node) else None
        settings, commit = self.recipe.data, self.graph.source.commit
        key = (settings.model_dump_json(), data.digest)
        splits = self.shared.get("splits", key, lambda: load_splits(settings, folder, commit))
        splits = {name: replace(split, carries=self.recipe.model.takes) for name, split in splits.items()}
        images.check_fit(splits["train"].shape, self._taken, self.recipe.data)
        images.check_prompts(splits, self.recipe.model.takes)
        images.check_enough({name: len(split) for name, split in splits.items()}, self.recipe.evaluate)
        if self.recipe.model.takes == "class":
            classes = self._classes(splits["train"].source.classes)
            splits = {name: replace(split, classes=classes) for name, split in splits.items()}
        return splits

    def _classes(self, found: Classes) -> npt.NDArray[np.int64]:
        """Label -> the base's class. Raises UserError where it has none."""
        denoiser, data = self.denoiser, self.recipe.data
        assert isinstance(denoiser, LatentDenoiser), "what takes classes denoises latents"
        known: dict[str, Any] = {"count": denoiser.num_classes, "names": denoiser.class_names}
        return in_model(found, **known, model=self.graph.base.label, data=data.path or data.source)

    @property
    def encoded(self) -> Mapping[SplitName, Any]:
        """The splits as trainings and losses read them: encoded beforehand where the recipe has a cache."""
        cache = self.graph.cache
        if cache is None:
            return self.splits
        key = (cache.digest, str(self.folder(cache)), self.graph.base.digest)  # the base's, for it counts classes
        return self.shared.get("encoded", key, lambda: self._opened(cache))

    def _opened(self, cache: Node | Input) -> Mapping[SplitName, EncodedSplit]:
        if isinstance(cache, Input):  # nobody's manifest vouches for it
            check_shards(cache.folder)
        return open_cache(self.folder(cache), self.splits)

    @property
    def _taken(self) -> tuple[int, ...]:
        """(c, h, w) of what the base takes, be it made or still to be made."""
        unet = self.recipe.pretrain.unet
        made = isinstance(self.graph.base, Input)
        return self.denoiser.image_shape if made else (unet.in_channels, unet.sample_size, unet.sample_size)

    @cached_property
    def denoiser(self) -> Denoiser:
        """The base behind its family's interface, on the device that `runtime.device` names."""
        key = (self.recipe.model.model_dump_json(), self.graph.base.digest, str(self.device))
        return self.shared.get("denoiser", key, self._load_denoiser)

    def _load_denoiser(self) -> Denoiser:
        settings = self.recipe.model
        dtype = None if settings.dtype == "float32" else getattr(torch, settings.dtype)
        denoiser = family(settings.family).load(self.folder(self.graph.base), dtype)
        denoiser.configure(settings)
        projection.refuse_beside(part_of(self.folder(self.graph.base), denoiser.component))
        denoiser.module.to(self.device).eval()
        return denoiser

    @property
    def device(self) -> torch.device:
        """Where this graph's models run."""
        return device_of(self.recipe.runtime.device)

    def component(self, part: Node | Input) -> nn.Module:
        """One model's component with its projections: folded where that is exact, attached where it is not.

        Of a LoRA it is the base's with the adapter in it, as stock diffusers loads it.
        """
        if (lora := self.lora(part)) is not None:
            return laid_out(attach(self._bare(), lora).to(self.device), self.recipe.runtime)
        module = self.denoiser.component_from(self.folder(part))
        module = projection.fold_into(module, self.component_folder(part)).to(self.device)
        return laid_out(module, self.recipe.runtime)

    def dense(self, part: Node | Input) -> nn.Module:
        """`component` under the base's own names: of a LoRA in float32, its change added to the weights."""
        lora = self.lora(part)
        return self.component(part) if lora is None else fused(self._bare(), lora).to(self.device)

    def loaders(self, served: Served) -> list[Callable[[], nn.Module]]:
        """What is loaded to serve a row's model: each expert, or of LoRAs one base with all of them."""
        if served.ensemble and any(map(self.lora, served.parts)):
            return [partial(self.module, served)]
        return [partial(self.component, part) for part in served.parts]

    def _counted(self, served: Served) -> int:
        """Parameters kept to serve a row's model; of LoRAs the base's count once."""
        loras = [lora for part in served.parts if (lora := self.lora(part)) is not None]
        own = [sum(f.down.numel() + f.up.numel() for f in lora.layers.values()) for lora in loras]
        if loras:
            return sum(own) + sum(p.numel() for p in self.denoiser.module.parameters())
        single = self.component(served.parts[0])
        return (sum(p.numel() for p in single.parameters()) + projection.extra_parameters(single)) * len(served.parts)

    def _stored(self, served: Served) -> list[Path]:
        """Folders with the weight files that serve a row's model."""
        base = [self.component_folder(self.graph.base)] if any(map(self.lora, served.parts)) else []
        return base + [self.component_folder(part) for part in served.parts]

    def component_folder(self, part: Node | Input) -> Path:
        """Where a model's component lies; of a LoRA, what is loaded into the base's."""
        folder = self.folder(part)
        return folder if self._is_lora(part) else part_of(folder, self.denoiser.component)

    def _is_lora(self, part: Node | Input) -> bool:
        """Only what we trained or merged is one: in a base that was given such a file may lie by chance."""
        made = isinstance(part, Node) and part.stage in ("decouple", "merge")
        return made and (self.folder(part) / LORA_NAME).is_file()

    def lora(self, part: Node | Input) -> Lora | None:
        """What a model is beside the base, where it is a LoRA for it."""
        if not self._is_lora(part):
            return None
        config = read_json(part_of(self.folder(self.graph.base), self.denoiser.component) / "config.json")
        return read_lora(self.folder(part), self.denoiser.component, config)

    def _bare(self) -> nn.Module:
        """The base's component, anew."""
        return self.denoiser.component_from(self.folder(self.graph.base))

    def module(self, served: Served) -> nn.Module:
        """A row's model, ready to run."""
        if not served.ensemble:
            return self.component(served.parts[0])
        loras = [self.lora(part) for part in served.parts]
        if whole := [lora for lora in loras if lora is not None]:
            assert len(whole) == len(loras), "all of a recipe's experts are trained alike"
            base = laid_out(self._bare().to(self.device), self.recipe.runtime)
            return SwitchedEnsemble(base, whole, self.graph.division, self.denoiser.index).to(self.device)
        loaders = [lambda part=part: self.component(part) for part in served.parts]
        resident = self.recipe.runtime.resident_experts
        return RoutedEnsemble(loaders, self.graph.division, self.denoiser.index, resident=resident).to(self.device)

    def fixed_noise(self, split: SplitName, ranges: list[list[list[int]]]) -> FixedNoise:
        """The fixed-noise loss on a split."""
        batch_size = self.recipe.runtime.sample_batch_size
        return FixedNoise(self.denoiser, self.encoded[split], ranges, self.recipe.evaluate.loss, batch_size)


def seed_of_node(node: Node) -> int:
    """The seed in a stage's key."""
    assert node.key.seed is not None, f"{node.label} has no seed"
    return node.key.seed


def ranges_of_node(node: Node) -> list[list[list[int]]]:
    """The ranges in a stage's key."""
    ranges: Any = node.key.settings["ranges"]
    assert all(len(from_runs(runs)) for runs in ranges)
    return list(ranges)
