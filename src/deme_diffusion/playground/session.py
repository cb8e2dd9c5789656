"""The models of a run, opened to be played with: merged in memory, sampled, measured. No web, one thread at a time."""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from deme_diffusion.config import SamplerSettings
from deme_diffusion.errors import UserError
from deme_diffusion.evaluation import fisher
from deme_diffusion.evaluation.export import Pixels
from deme_diffusion.evaluation.sample import make_scheduler, sample_batch
from deme_diffusion.merging.apply import Merger
from deme_diffusion.merging.selection import MergeWeights
from deme_diffusion.merging.vectors import computable
from deme_diffusion.models import projection
from deme_diffusion.models.objective import FixedNoise
from deme_diffusion.pipeline.run import Run
from deme_diffusion.pipeline.stages import Stages
from deme_diffusion.playground.ready import how_of, parts_of
from deme_diffusion.playground.worker import Ticket

KEPT_SETS, KEPT_BYTES = 64, 1 << 28
"""Of images that are remembered: a slider moved back, or the base beside all merged models."""
LOSS_IMAGES = 256
"""Of the search split, at most, that the fixed-noise loss is taken on: an answer while one waits."""


@dataclass(frozen=True)
class Merged:
    """What the module in memory holds: by which weights, and how long the merge took.

    `change`: ||theta_merged - theta|| / ||theta||, projections folded in. `unfolded`: places of projections that fold
    into no weight.
    """

    weights: MergeWeights
    seconds: float
    change: float
    unfolded: list[str]


@dataclass(frozen=True)
class Preset:
    """Weights with a name; `rules` are those by pattern that a search found."""

    name: str
    what: str
    values: tuple[float, ...]
    by_layer: bool = False


class Session:
    """An opened run; `words` are the command that makes it. Raises UserError where its models cannot be merged."""

    def __init__(self, run: Run, words: Sequence[str] = ()) -> None:
        self.words = [*words] or ["deme", "run", str(run.folder)]
        self.run, self.graph, self.recipe = run, run.graph, run.recipe
        self.seed = run.recipe.seeds[0]
        self.stages, self.how = Stages(run.graph, run.store), how_of(run.graph)
        base, *rest = (part for part in parts_of(run.graph))
        count = run.recipe.decouple.num_ranges
        self.experts, informed = rest[:count], rest[count:]
        self.merger = Merger(
            self.stages.component_folder(base),
            [self.stages.component_folder(part) for part in self.experts],
            self.how.method.name,
            self.how.options,
            [self.stages.folder(part) / fisher.FILE for part in informed],
        )
        self.shell: nn.Module = self.stages.component(self.graph.base)  # every merged model is loaded into it
        self.rules: dict[str, tuple[float, ...]] = {}
        self.presets = self._presets()
        self._merged: Merged | None = None
        self._images: OrderedDict[str, tuple[Pixels, float]] = OrderedDict()
        self._base_losses: list[float] = []

    @property
    def training(self) -> str:
        """Whose experts these are, of several trainings."""
        return f"training seed {self.seed} of {', '.join(map(str, self.recipe.seeds))}"

    def close(self) -> None:
        """Close the files."""
        self.merger.close()

    # -- weights -----------------------------------------------------------------------------------

    def _presets(self) -> list[Preset]:
        """Base, the method's own weights, those of `merged`, each expert alone; of a method without weights, one."""
        count = len(self.experts)
        uniform = tuple(self.how.method.default_weights(count))
        if not self.how.method.weighted:
            return [Preset("merged", f"{self.how.method.name} takes no weights", uniform)]
        presets = [Preset("base", "every weight 0", (0.0,) * count), Preset("uniform", "the method's own", uniform)]
        presets += self._found()
        one_hots = [tuple(float(i == j) for j in range(count)) for i in range(count)]
        return presets + [Preset(f"expert {i}", "this one alone", hot) for i, hot in enumerate(one_hots)]

    def _found(self) -> list[Preset]:
        """The weights of the run's own merged model, where they are known."""
        node, search = self.graph.merged.get(self.seed), self.graph.searches.get(self.seed)
        if node is None or (search is not None and self.run.store.status(search.key) != "done"):
            return []
        weights, told = self.stages.weights_of(node)
        self.rules = {pattern: row for pattern, row in weights.rules.items() if pattern not in self.how.rules}
        by_layer = " by layer" if self.rules else ""
        what = f"found by the search{by_layer} ({told['source']})" if told else "the run's own"
        return [Preset("merged", what, weights.values, bool(self.rules))]

    def weights(self, values: Sequence[float], by_layer: bool = False) -> MergeWeights:
        """The weights of a merge, as the recipe has it beside: one an expert, with those by layer that a search found.

        Raises UserError for a count that is not N, one that is not finite, or any where the method takes none.
        """
        if not self.how.method.weighted and tuple(values) != self.presets[0].values:
            raise UserError(f"weights: method {self.how.method.name} takes none")
        return self.merger.check(self.how.weights(tuple(values), self.rules if by_layer else None))

    # -- models ------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype | None:
        """What the merged weights are stored in, where the recipe says it: the model in memory is the one saved."""
        return None if self.how.dtype is None else getattr(torch, self.how.dtype)

    def merge(self, weights: MergeWeights, ticket: Ticket) -> Merged:
        """Load the merged model into `shell`, unless it is there."""
        if self._merged is not None and self._merged.weights == weights:
            return self._merged
        begun, keys, state = time.perf_counter(), self.merger.keys(), {}
        change, size = 0.0, 0.0
        for i, key in enumerate(keys):
            ticket.tell("merging", i, len(keys))
            state[key] = tensor = self.merger.tensor(key, weights, self.dtype)
            if tensor.is_floating_point():
                base = computable(self.merger.base.tensor(key)).double()
                change += float((computable(tensor).double() - base).square().sum())
                size += float(base.square().sum())
        unfolded = self.merger.unfolded(weights)
        self._merged = None  # half of it may be loaded when this fails
        self.shell.load_state_dict(state)
        projection.attach(self.shell, unfolded)
        seconds = time.perf_counter() - begun
        self._merged = Merged(weights, seconds, (change / size) ** 0.5 if size else 0.0, list(unfolded))
        return self._merged

    def _module(self, weights: MergeWeights | None, ticket: Ticket) -> nn.Module:
        """The merged model; None is the base."""
        if weights is None:
            return self.stages.denoiser.module
        self.merge(weights, ticket)
        return self.shell

    # -- images ------------------------------------------------------------------------------------

    def sample(
        self, weights: MergeWeights | None, sampler: SamplerSettings, seeds: Sequence[int], ticket: Ticket
    ) -> tuple[Pixels, float]:
        """(n, h, w, c) uint8 of the merged model, or of the base (None), and the seconds that they took.

        An image a seed, as of `deme sample --seeds`.
        """
        of = None if weights is None else weights.as_dict()
        key = json.dumps([of, sampler.model_dump(mode="json"), list(seeds)])
        if key not in self._images:
            module = self._module(weights, ticket)
            begun = time.perf_counter()
            what = "sampling the base" if weights is None else "sampling the merged model"
            pixels = self._sample(module, what, sampler, seeds, ticket)
            self._images[key] = pixels, time.perf_counter() - begun
        self._images.move_to_end(key)
        self._forget()
        return self._images[key]

    def _forget(self) -> None:
        """Let go of the sets that were not looked at for longest; base and merged model stay."""
        while len(kept := self._images) > 2 and (
            len(kept) > KEPT_SETS or sum(pixels.nbytes for pixels, _ in kept.values()) > KEPT_BYTES
        ):
            kept.popitem(last=False)

    def _sample(
        self, module: nn.Module, what: str, sampler: SamplerSettings, seeds: Sequence[int], ticket: Ticket
    ) -> Pixels:
        denoiser, size = self.stages.denoiser, self.recipe.runtime.sample_batch_size
        batches = [seeds[first : first + size] for first in range(0, len(seeds), size)]
        steps = len(make_scheduler(denoiser, sampler).timesteps) * len(batches)
        watched = _Watched(module, ticket, what, steps, shared=module is denoiser.module)
        asked = [(batch, self.stages.asked_at(batch)) for batch in batches]
        return np.concatenate([sample_batch(denoiser, watched, sampler, batch, prompts=by) for batch, by in asked])

    # -- losses ------------------------------------------------------------------------------------

    @cached_property
    def noise(self) -> FixedNoise:
        """The fixed-noise loss on the search split: weights chosen by it leave the report split untouched."""
        settings, split = self.recipe.evaluate.loss, self.stages.encoded["search"]
        images = min(LOSS_IMAGES, settings.num_images or len(split), len(split))
        settings = settings.model_copy(update={"num_images": images})
        size = self.recipe.runtime.sample_batch_size
        return FixedNoise(self.stages.denoiser, split, self.graph.loss_ranges, settings, size)

    def losses(self, weights: MergeWeights, ticket: Ticket) -> dict[str, Any]:
        """Of base and merged model: the fixed-noise loss in each range and over all of them."""
        noise = self.noise
        batches = noise.settings.draws * -(-noise.num_images // noise.batch_size)
        total = batches * (2 * len(noise.ranges) - len(self._base_losses))
        base = _Watched(self.stages.denoiser.module, ticket, "measuring the base's loss", total)
        for runs in noise.ranges[len(self._base_losses) :]:  # those that were measured stay, whatever comes between
            self._base_losses += replace(noise, ranges=[runs]).losses(base)
        module = self._module(weights, ticket)
        merged = noise.losses(_Watched(module, ticket, "measuring the merged model's loss", total, done=base.done))
        overall = [noise.overall(self._base_losses), noise.overall(merged)]
        points = {"images": noise.num_images, "draws": noise.settings.draws}
        return {"base": [*self._base_losses], "merged": merged, "overall": overall, **points}


class _Watched(nn.Module):
    """A module that tells of each forward pass, and ends before one that is not wanted any more."""

    def __init__(
        self, module: nn.Module, ticket: Ticket, doing: str, total: int, *, done: int = 0, shared: bool = False
    ) -> None:
        super().__init__()
        self.module, self.done, self._ticket, self._doing, self._total = module, done, ticket, doing, total
        self._shared = shared

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._ticket.tell(self._doing, min(self.done, self._total), self._total, shared=self._shared)
        self.done += 1
        return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """What a stock pipeline asks its component for, such as its config: the module's own."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):
                raise
            return getattr(super().__getattr__("module"), name)
