"""The stages that make models: data, base, extractor, trainings, searches, merges; each by its digest. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from deme_diffusion.artefacts import Store
from deme_diffusion.config import MergeSettings, ModelSettings, Recipe, TrainSettings
from deme_diffusion.division import Division, Runs, name_of, whole
from deme_diffusion.files import canonical_digest
from deme_diffusion.merging.search import check_search, shaped_by_loss, shaping
from deme_diffusion.pipeline import caching, dividing, extractors, images, merges
from deme_diffusion.pipeline.inputs import Input, check_average, check_unseen, component_of, resolve
from deme_diffusion.pipeline.node import Node, Vertices

SPLITTING = ("num_ranges", "division", "overlap", "division_seed", "edges", "similarity_file", "total_steps",
             "range_steps", "range_learning_rates", "learning_rate")  # fmt: skip
"""Settings of `decouple` that a training knows as its subset, steps and learning rate."""
WAITING = "division of"
"""In the keys of stages that hold a placeholder instead of a subset."""


class Models(Vertices):
    """What a recipe makes models by. Which of them there are, and how they are measured, is the graph's."""

    recipe: Recipe
    source: Input
    images: str
    data: Node | Input
    base: Node | Input
    extractor: Node | Input
    cache: Node | Input | None
    """The latents and text embeddings that trainings and losses read; None where they encode anew, or need not."""
    division: Division
    similarity: Node | None
    """The comparison of gradients that the division is made by, of which it is a function once that is done."""
    provisional: bool
    """The division waits for the similarity: subsets are placeholders, and what is made by them has keys of its own."""
    remarks: list[str]
    """What a reader should know of the division."""
    experts: dict[int, list[Node]]
    searches: dict[int, Node]

    def _covered(self, settings: Mapping[str, Any], parents: Mapping[str, Node | Input]) -> Mapping[str, Any]:
        """What a key covers: of a stage that looks at images, also how it sees them."""
        seen = images.seen(self.recipe.data) if "data" in parents else {}
        return {**settings, "data": seen} if seen else settings

    def _data(self) -> Node | Input:
        """The embedded images as they are; all others are indexed first."""
        settings = self.recipe.data
        if settings.source == "digits":
            return self.source
        covered = images.indexed(settings, self.recipe.model.takes)
        return self._add("data", f"index of {self.source.label}", covered, {"source": self.source}, None)

    def _base(self, download: bool) -> Node | Input:
        model, settings = self.recipe.model, self.recipe.pretrain
        if model.pretrained is not None:
            key, needs = "model.pretrained", ("model_index.json",)
            base = resolve(model.pretrained, model.revision, key=key, needs=needs, download=download)
            if base.path is not None:
                component_of(base.path)
                if self.recipe.decouple.init == "ema":
                    check_average(base.path)
            check_unseen(base, self.recipe.data, self.images, key=key)
            return shaped(base, model)
        covered = settings.effective() | _validated(self.recipe, settings)
        parents = {"data": self.data}
        return self._add("pretrain", "base", covered, parents, self.recipe.seeds[0], steps=settings.total_steps)

    def _cache(self) -> Node | Input | None:
        if not caching.kept(self.recipe):
            return None
        assert isinstance(self.base, Input), "checked by the settings: latent models are not trained from scratch"
        parents = {"encoders": caching.encoders(self.base, self.recipe.model), "data": self.data}
        covered = caching.covered(self.recipe)
        if self.recipe.cache.folder is None:
            return self._add("cache", "cache of latents", covered, parents, None)
        return caching.given(self.recipe, self._key("cache", covered, parents, None))

    def cached(self) -> dict[str, Node | Input]:
        """The parent of every stage that reads `encoded`."""
        return {} if self.cache is None else {"cache": self.cache}

    def _extractor(self, download: bool) -> Node | Input:
        if found := extractors.given(self.recipe.extractor, download=download):
            check_unseen(found, self.recipe.data, self.images, key=extractors.KEY)
            return found
        covered = {k: v for k, v in self.recipe.extractor.changed().items() if k != "pretrained"}
        return self._add("extractor", "extractor", covered, {"data": self.data}, self.recipe.seeds[0])

    def _decouple(self, label: str, subset: Runs, steps: int, learning_rate: float, seed: int, copy: int = 0) -> Node:
        """A training by what shapes it: its subset, steps and rate; not its index nor the division's name."""
        settings = self.recipe.decouple
        covered = {k: v for k, v in settings.effective().items() if k not in SPLITTING}
        covered |= {"subset": subset, "steps": steps, "learning_rate": learning_rate}
        covered |= {} if subset == whole(self.division.num_timesteps) else self.waiting()
        covered |= _validated(self.recipe, settings) | ({"copy": copy} if copy else {})
        arguments = {"subset": subset, "steps": steps, "learning_rate": learning_rate, "copy": copy}
        parents = {"base": self.base, "data": self.data, **self.cached()}
        return self._add("decouple", self._named(label, seed), covered, parents, seed, arguments=arguments, steps=steps)

    def _rate(self, index: int) -> float:
        rates = self.recipe.decouple.range_learning_rates
        return self.recipe.decouple.learning_rate if rates is None else rates[index]

    def _search(
        self, label: str, experts: Sequence[Node], seed: int, settings: MergeSettings, how: merges.HowToMerge
    ) -> Node:
        loss = self.recipe.evaluate.loss.changed()
        covered = shaping(settings, how.method.name) | how.model
        covered |= {"loss": loss} if loss and shaped_by_loss(settings, how.method.name) else {}
        covered |= {"ranges": served_ranges(self.division), **self.waiting()}
        covered |= how.cut if self.recipe.decouple.lora_rank is not None else {}
        parents = {"base": self.base, "data": self.data, "extractor": self.extractor, **_numbered(experts)}
        parents |= self.informed(how, experts, seed) | self.cached()
        label = self._named(f"{label} weights", seed)
        return self._add("search", label, covered, parents, seed, arguments={"experts": len(experts), "how": how})

    def _merge(
        self, label: str, experts: Sequence[Node], seed: int, weights: Sequence[float] | Node, how: merges.HowToMerge
    ) -> Node:
        parents = {"base": self.base, **_numbered(experts), **self.informed(how, experts, seed)}
        covered = how.covered
        if isinstance(weights, Node):
            parents["search"] = weights
        else:
            covered["weights"] = [float(w) for w in weights]
        arguments = {"experts": len(experts), "how": how}
        return self._add("merge", self._named(label, seed), covered, parents, None, arguments=arguments)

    def informed(self, how: merges.HowToMerge, experts: Sequence[Node], seed: int) -> dict[str, Node | Input]:
        """Parents of a merge whose method needs the Fisher information of every expert; else none."""
        if not how.method.fisher:
            return {}
        return {f"fisher {i}": self.fisher(expert, seed) for i, expert in enumerate(experts)}

    def fisher(self, expert: Node, seed: int) -> Node:
        """The diagonal Fisher information of one training, on its own timesteps: made where somebody asks."""
        merge = self.recipe.merge
        covered = {key: value for key, value in merge.changed().items() if key == "fisher_samples"}
        arguments = {"subset": expert.arguments["subset"], "samples": merge.fisher_samples}
        parents = {"expert": expert, "data": self.data, **self.cached()}
        return self._add("fisher", f"Fisher of {expert.label}", covered, parents, seed, arguments=arguments)

    def compared(self) -> Node:
        """The similarity of the base's gradients; where no division needs it, the stage comes into the graph here."""
        return self.similarity_within(None)

    def similarity_within(self, subset: Runs | None) -> Node:
        """The same within a subset of the timesteps, in as many bins or as it has timesteps; None is all of [0, T)."""
        settings = self.recipe.similarity
        covered = {key: value for key, value in settings.changed().items() if key != "seed"}
        label = f"similarity of gradients in {settings.bins} bins"
        everything = subset is None or subset == whole(self.division.num_timesteps)
        if subset is not None and not everything:
            covered, label = covered | {"within": subset} | self.waiting(), f"{label} of {name_of(subset)}"
        parents = {"base": self.base, "data": self.data, **self.cached()}
        arguments = {"subset": None if everything else subset}
        return self._add("similarity", label, covered, parents, settings.seed, arguments=arguments)

    def _divide(self, store: Store | None) -> None:
        """Set the division; `provisional` where it is by gradients that were not compared yet, and a uniform one."""
        self.similarity = self.compared() if dividing.compares(self.recipe) else None
        found = dividing.compared_in(store, self.similarity)
        self.provisional = self.similarity is not None and found is None
        self.division = dividing.division_of(self.recipe, self.base, found)
        self.remarks = dividing.remarks(self.recipe, self.base, self.division)

    def waiting(self) -> dict[str, Any]:
        """What sets keys apart that hold a placeholder."""
        return {WAITING: self.similarity.digest} if self.provisional and self.similarity else {}

    def waits(self, nodes: Sequence[Node]) -> bool:
        """Whether some of these stages, or what they need, wait for the division."""
        return any(WAITING in node.key.settings for node in self.needed(nodes))

    def fishers(self) -> list[Node]:
        """The Fisher information of all experts; where no merge needs it, the stages come into the graph here."""
        return [self.fisher(expert, seed) for seed, experts in self.experts.items() for expert in experts]

    def _named(self, label: str, seed: int) -> str:
        return label if len(self.recipe.seeds) == 1 else f"{label} (seed {seed})"

    def _expert(self, index: int, seed: int) -> Node:
        subset = self.division.subset(index)
        label = f"expert {index} {'of a division to come' if self.provisional else name_of(subset)}"
        return self._decouple(label, subset, self.recipe.decouple.steps_of(index), self._rate(index), seed)

    def _searched(self, label: str, experts: Sequence[Node], seed: int) -> Node:
        """Merged as the recipe says, by weights that are given, its method's default, or found by its search.

        A control of one training has one task vector, which it scales, whatever the method (`merges.how`).
        """
        merge = self.recipe.merge
        how = merges.how(merge, len(experts), alone=label == "all-timesteps-searched")
        if merge.search == "none":
            given: Sequence[float] | None = None
            if merge.weights and len(merge.weights) == len(experts):
                given = merge.weights
            if merge.weighting == "snr" and label == "merged":
                given = merges.snr_weights(self.division, dividing.snr_of(self.recipe, self.base), how.method)
            return self._merge(label, experts, seed, given or how.method.default_weights(len(experts)), how)
        check_search(len(experts), merge, how.method.name, fixed=how.fixed)
        search = self._search(label, experts, seed, merge, how)
        if label == "merged":
            self.searches[seed] = search
        return self._merge(label, experts, seed, search, how)


def shaped(base: Input, settings: ModelSettings) -> Input:
    """The base with what a recipe says of it beside its files in its digest; as it is where that is the default."""
    said = settings.shaping()
    return replace(base, digest=canonical_digest({"base": base.digest, **said})[:16]) if said else base


def _validated(recipe: Recipe, settings: TrainSettings) -> dict[str, Any]:
    """The validation loss shapes a result only where it picks the weights or stops the training."""
    loss = recipe.evaluate.loss.changed()
    return {"loss": loss} if loss and (settings.keep == "best" or settings.early_stopping) else {}


def served_ranges(division: Division) -> list[Runs]:
    """The timesteps that each expert serves."""
    return [division.served(i) for i in range(division.num_experts)]


def _numbered(experts: Sequence[Node]) -> dict[str, Node | Input]:
    return {f"expert {i}": expert for i, expert in enumerate(experts)}
