"""Which stages a recipe consists of, and the digest of each: known before anything runs, and without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deme_diffusion.config import MergeSettings, Recipe, SamplerSettings, TrainSettings
from deme_diffusion.data.sources import SplitName
from deme_diffusion.division import DIVISIONS, Division, Runs, name_of, whole
from deme_diffusion.evaluation.samplers import check_sampler
from deme_diffusion.merging.search import check_search, shaped_by_loss, shaping
from deme_diffusion.pipeline import extractors, images, merges
from deme_diffusion.pipeline.inputs import Input, check_unseen, component_of, resolve, timesteps_of
from deme_diffusion.pipeline.node import Node, Served, Vertices
from deme_diffusion.report.cells import REAL_IMAGES

SERVING = ("device", "compile", "channels_last", "threads", "resident_experts")
"""Settings of `runtime` that change what serving costs."""


class Graph(Vertices):
    """All stages of a recipe. Attributes name the ones that the run folder and the sub-commands speak of."""

    def __init__(self, recipe: Recipe, *, download: bool = False) -> None:
        super().__init__()
        merges.check(recipe)
        self.recipe = recipe
        self.source = images.source_of(recipe.data, download=download)
        self.images = images.identity(recipe.data, self.source)
        self.data = self._data()
        self.base = self._base(download)
        self.extractor = self._extractor(download)
        given = self.extractor if isinstance(self.extractor, Input) else None
        self.published = extractors.published(recipe, given)
        self.division = make_division(recipe, self.base)
        samplers = {f"evaluate.samplers.{i}": sampler for i, sampler in enumerate(recipe.evaluate.samplers)}
        for key, sampler in {**samplers, "merge.sampler": recipe.merge.sampler}.items():
            check_sampler(sampler, self.division.num_timesteps, key=key)
        self.experts: dict[int, list[Node]] = {}
        self.searches: dict[int, Node] = {}
        self.merged: dict[int, Node] = {}
        self.evaluations: list[tuple[str, int, Node]] = []
        self.served: dict[int, list[Served]] = {seed: self._models(seed) for seed in recipe.seeds}
        self.samples: dict[tuple[str, int], Node] = {}
        for seed, models in self.served.items():
            for served in models:
                self._evaluated(served, seed)
        self._evaluated(Served(REAL_IMAGES, ()), recipe.seeds[0])
        self.cost = self._cost()

    # -- stages ------------------------------------------------------------------------------------

    def _covered(self, settings: Mapping[str, Any], parents: Mapping[str, Node | Input]) -> Mapping[str, Any]:
        """What a key covers: of a stage that looks at images, also how it sees them."""
        seen = images.seen(self.recipe.data) if "data" in parents else {}
        return {**settings, "data": seen} if seen else settings

    def _data(self) -> Node | Input:
        """The embedded images as they are; all others are indexed first."""
        settings = self.recipe.data
        if settings.source == "digits":
            return self.source
        label = f"index of {self.source.label}"
        return self._add("data", label, images.indexed(settings), {"source": self.source}, None)

    def _base(self, download: bool) -> Node | Input:
        model, settings = self.recipe.model, self.recipe.pretrain
        if model.pretrained is not None:
            key, needs = "model.pretrained", ("model_index.json",)
            base = resolve(model.pretrained, model.revision, key=key, needs=needs, download=download)
            if base.path is not None:
                component_of(base.path)
            check_unseen(base, self.recipe.data, self.images, key=key)
            return base
        covered = settings.changed() | _validated(self.recipe, settings)
        parents = {"data": self.data}
        return self._add("pretrain", "base", covered, parents, self.recipe.seeds[0], steps=settings.total_steps)

    def _extractor(self, download: bool) -> Node | Input:
        if found := extractors.given(self.recipe.extractor, download=download):
            check_unseen(found, self.recipe.data, self.images, key=extractors.KEY)
            return found
        covered = {k: v for k, v in self.recipe.extractor.changed().items() if k != "pretrained"}
        return self._add("extractor", "extractor", covered, {"data": self.data}, self.recipe.seeds[0])

    def _decouple(self, label: str, subset: Runs, steps: int, learning_rate: float, seed: int, copy: int = 0) -> Node:
        """A training by what shapes it: its subset, steps and rate; not its index nor the division's name."""
        settings = self.recipe.decouple
        names = ("num_ranges", "division", "total_steps", "range_steps", "range_learning_rates", "learning_rate")
        covered = {k: v for k, v in settings.changed().items() if k not in names}
        covered |= {"subset": subset, "steps": steps, "learning_rate": learning_rate}
        covered |= _validated(self.recipe, settings) | ({"copy": copy} if copy else {})
        arguments = {"subset": subset, "steps": steps, "learning_rate": learning_rate, "copy": copy}
        parents = {"base": self.base, "data": self.data}
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
        covered |= {"ranges": _served_ranges(self.division)}
        parents = {"base": self.base, "data": self.data, "extractor": self.extractor, **_numbered(experts)}
        parents |= self.informed(how, experts, seed)
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
        parents = {"expert": expert, "data": self.data}
        return self._add("fisher", f"Fisher of {expert.label}", covered, parents, seed, arguments=arguments)

    def fishers(self) -> list[Node]:
        """The Fisher information of all experts; where no merge needs it, the stages come into the graph here."""
        return [self.fisher(expert, seed) for seed, experts in self.experts.items() for expert in experts]

    def _named(self, label: str, seed: int) -> str:
        return label if len(self.recipe.seeds) == 1 else f"{label} (seed {seed})"

    # -- the models of the table -------------------------------------------------------------------

    def _models(self, seed: int) -> list[Served]:
        settings, merge = self.recipe.decouple, self.recipe.merge
        n, controls = settings.num_ranges, self.recipe.evaluate.controls
        models = [Served("base", (self.base,))]
        everything = whole(self.division.num_timesteps)
        if "all-timesteps" in controls:
            control = self._decouple("all-timesteps", everything, settings.budget, settings.learning_rate, seed)
            models.append(Served("all-timesteps", (control,)))
            if "all-timesteps-searched" in controls:
                models.append(
                    Served("all-timesteps-searched", (self._searched("all-timesteps-searched", [control], seed),))
                )
        if "soup" in controls:
            copies = [
                self._decouple(f"soup copy {i}", everything, settings.steps_of(i), settings.learning_rate, seed, i + 1)
                for i in range(n)
            ]
            models.append(Served("soup", (self._searched("soup", copies, seed),)))
        experts = [self._expert(i, seed) for i in range(n)]
        self.experts[seed] = experts
        models.append(Served("ensemble", tuple(experts), ensemble=True))
        if merge.method != "none":
            plain = merges.how(merge, n, uniform=True)
            uniform = self._merge("merged-uniform", experts, seed, plain.method.default_weights(n), plain)
            models.append(Served("merged-uniform", (uniform,)))
            self.merged[seed] = self._searched("merged", experts, seed)
            models.append(Served("merged", (self.merged[seed],)))
        return models

    def _expert(self, index: int, seed: int) -> Node:
        subset = self.division.subset(index)
        label = f"expert {index} {name_of(subset)}"
        return self._decouple(label, subset, self.recipe.decouple.steps_of(index), self._rate(index), seed)

    def _searched(self, label: str, experts: Sequence[Node], seed: int) -> Node:
        """Merged as the recipe says, by weights that are given, its method's default, or found by its search.

        A control of one training has one task vector, which it scales, whatever the method (`merges.how`).
        """
        merge = self.recipe.merge
        how = merges.how(merge, len(experts), alone=label == "all-timesteps-searched")
        if merge.search == "none":
            given = merge.weights if merge.weights and len(merge.weights) == len(experts) else None
            return self._merge(label, experts, seed, given or how.method.default_weights(len(experts)), how)
        check_search(len(experts), merge, how.method.name, fixed=how.fixed)
        search = self._search(label, experts, seed, merge, how)
        if label == "merged":
            self.searches[seed] = search
        return self._merge(label, experts, seed, search, how)

    # -- measuring ---------------------------------------------------------------------------------

    def _evaluated(self, served: Served, seed: int) -> None:
        settings = self.recipe.evaluate
        features: dict[str, Node | Input] = {}
        for sampler in settings.samplers if served.parts else ():
            for number in range(settings.sampling_seeds):
                node = self._sample(served, sampler, seed * settings.sampling_seeds + number, seed)
                features[f"{sampler.label}/{number}"] = self._features(node.label.removeprefix("sample "), node)
                self.samples.setdefault((served.name, seed), node)
        if not served.parts:  # real training images, scored as if they had been generated
            features["real"] = self._features("training images", None, "train", settings.num_images)
        covered: dict[str, Any] = {name: getattr(settings, name) for name in ("neighbours", "density_neighbours")}
        parents: dict[str, Node | Input] = {"reference": self._features("report split", None, "report"), **features}
        parents |= {"published": self.published} if self.published else {}
        if served.parts:
            covered |= {"ranges": _served_ranges(self.division), "loss": settings.loss.changed()}
            parents |= {"data": self.data, **_model_parents(served, self.base)}
        arguments = {"served": served, "samples": list(features)}
        label = self._named(f"evaluate {served.name}", seed)
        self.evaluations.append(
            (served.name, seed, self._add("evaluate", label, covered, parents, None, arguments=arguments))
        )

    def _features(
        self, label: str, images: Node | None, split: SplitName | None = None, count: int | None = None
    ) -> Node:
        """The features of sampled images, or of (the first `count` views of) a real split."""
        parents: dict[str, Node | Input] = {"extractor": self.extractor, "data": self.data}
        covered: dict[str, Any] = {}
        if images is not None:
            parents = {"extractor": self.extractor, "images": images}
        else:
            covered = {"split": split} | ({"count": count} if count else {})
        arguments = {"split": split, "count": count}
        return self._add("features", f"features of {label}", covered, parents, None, arguments=arguments)

    def _sample(self, served: Served, sampler: SamplerSettings, sampling_seed: int, seed: int) -> Node:
        count = self.recipe.evaluate.num_images
        covered: dict[str, Any] = {"sampler": sampler.changed(), "num_images": count}
        covered |= {"route": self.division.as_dict()["route"]} if served.ensemble else {}
        label = self._named(f"sample {served.name} {sampler.label} #{sampling_seed}", seed)
        return self._add(
            "sample",
            label,
            covered,
            _model_parents(served, self.base),
            sampling_seed,
            arguments={"served": served, "sampler": sampler},
            images=count * sampler.num_inference_steps,
        )

    def _cost(self) -> Node:
        models = self.served[self.recipe.seeds[0]]
        parents: dict[str, Node | Input] = {"base": self.base}
        for served in models:
            parents |= {f"{served.name}/{i}": part for i, part in enumerate(served.parts)}
        sampler = self.recipe.evaluate.samplers[0]
        covered: dict[str, Any] = {"sampler": sampler.changed(), "models": [served.name for served in models]}
        runtime = self.recipe.runtime.changed()  # it changes what is measured here, as it does nowhere else
        covered |= {name: runtime[name] for name in SERVING if name in runtime}
        arguments = {"models": models, "sampler": sampler}
        # Timings mean nothing beside another training.
        return self._add("cost", "cost of serving", covered, parents, None, arguments=arguments, exclusive=True)

    @property
    def extractor_name(self) -> str:
        """What a metric is named by."""
        return extractors.extractor_name(self.recipe)

    def pinned(self) -> Recipe:
        """The recipe with what is on the hub pinned to its commits: what other processes must open."""
        parts = {"model": self.base, "extractor": self.extractor, "data": self.source}
        commits = {name: part.commit for name, part in parts.items() if isinstance(part, Input) and part.commit}
        pinned = {name: getattr(self.recipe, name).model_copy(update={"revision": c}) for name, c in commits.items()}
        return self.recipe.model_copy(update=pinned)


def make_division(recipe: Recipe, base: Node | Input) -> Division:
    """The recipe's division of the base's timesteps. Raises UserError when N does not fit into T."""
    scheduler = recipe.pretrain.scheduler
    timesteps = scheduler.num_train_timesteps if isinstance(base, Node) else timesteps_of(base)
    return DIVISIONS[recipe.decouple.division](recipe.decouple.num_ranges, timesteps)


def _validated(recipe: Recipe, settings: TrainSettings) -> dict[str, Any]:
    """The validation loss shapes a result only where it picks the weights or stops the training."""
    loss = recipe.evaluate.loss.changed()
    return {"loss": loss} if loss and (settings.keep == "best" or settings.early_stopping) else {}


def _served_ranges(division: Division) -> list[Runs]:
    return [division.served(i) for i in range(division.num_experts)]


def _numbered(experts: Sequence[Node]) -> dict[str, Node | Input]:
    return {f"expert {i}": expert for i, expert in enumerate(experts)}


def _model_parents(served: Served, base: Node | Input) -> dict[str, Node | Input]:
    return {"base": base, **{f"model {i}": part for i, part in enumerate(served.parts)}}
