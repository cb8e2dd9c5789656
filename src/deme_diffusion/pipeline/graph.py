"""Which stages a recipe consists of, and the digest of each: known before anything runs, and without torch."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from deme_diffusion.artefacts import Store
from deme_diffusion.config import FigureName, Recipe
from deme_diffusion.division import whole
from deme_diffusion.errors import UserError
from deme_diffusion.evaluation.samplers import check_sampler, sampler_options
from deme_diffusion.pipeline import asking, extractors, figures, images, merges
from deme_diffusion.pipeline.dividing import check_weightings, inner_edges, schedule_of
from deme_diffusion.pipeline.inputs import Input
from deme_diffusion.pipeline.measured import Measured
from deme_diffusion.pipeline.node import Node, Served
from deme_diffusion.report.cells import REAL_IMAGES

log = logging.getLogger(__name__)


class Graph(Measured):
    """All stages of a recipe. Attributes name the ones that the run folder and the sub-commands speak of.

    A division by gradients is a function of what the stage `similarity` left in the `store`, `provisional` before.
    `drawn`: the figures whose stages are there from the beginning; None: the recipe's.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        download: bool = False,
        store: Store | None = None,
        drawn: Sequence[FigureName] | None = None,
    ) -> None:
        super().__init__()
        merges.check(recipe)
        self.recipe = recipe
        self.asking = asking.asking(recipe, download=download)  # first: files that are missing cost no download
        self.source = images.source_of(recipe.data, download=download)
        self.images = images.identity(recipe.data, self.source)
        self.data = self._data()
        self.base = self._base(download)
        self.cache = self._cache()
        self.extractor = self._extractor(download)
        given = self.extractor if isinstance(self.extractor, Input) else None
        self.published = extractors.published(recipe, given)
        self.clip = self._clip(download)
        self._divide(store)
        self.loss_ranges = self._loss_ranges()
        samplers = {f"evaluate.samplers.{i}": sampler for i, sampler in enumerate(recipe.evaluate.samplers)}
        for key, sampler in {**samplers, "merge.sampler": recipe.merge.sampler}.items():
            check_sampler(sampler, self.division.num_timesteps, key=key, family=recipe.model.family)
            sampler_options(sampler, schedule_of(recipe, self.base)[0], key=key, family=recipe.model.family)
        check_weightings(recipe, self.base)
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
        self.cost = self.cost_of(self.served[recipe.seeds[0]])
        self.figures: dict[FigureName, list[Node]] = {}
        self.unkeyed: dict[FigureName, UserError] = {}
        for name in recipe.analyze.figures if drawn is None else drawn:
            self.figure(name)

    def figure(self, name: FigureName) -> list[Node]:
        """The stages of one of the paper's figures; of one that the recipe leaves out they come into the graph here."""
        if name not in self.figures:
            self.figures[name] = figures.stages(self, name)
        return self.figures[name]

    def keyed(self, names: Sequence[FigureName]) -> list[FigureName]:
        """Those of these figures that can be told by their digests; why the others cannot, as where experts that
        `analyze.experts` names have moved away, is told once."""
        before = dict(self.unkeyed)
        for name in names:
            try:
                self.figure(name)
                self.unkeyed.pop(name, None)
            except UserError as error:
                self.unkeyed[name] = error
        if new := [name for name in names if name in self.unkeyed and name not in before]:
            said = "; ".join(dict.fromkeys(str(self.unkeyed[name]) for name in new))
            log.warning("not shown of the figures: %s: %s", ", ".join(new), said)
        return [name for name in names if name not in self.unkeyed]

    def add_figure(
        self,
        name: FigureName,
        label: str,
        covered: Mapping[str, Any],
        parents: Mapping[str, Node | Input],
        seed: int | None,
        images: int,
    ) -> Node:
        """A stage of a figure by what shapes it (`pipeline.figures`)."""
        return self._add(name, label, covered, parents, seed, images=images)

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

    @property
    def outcome(self) -> str:
        """Name of the row that a recipe is about: the merged model, or the ensemble where nothing is merged."""
        return "ensemble" if self.recipe.merge.method == "none" else "merged"

    def pinned(self) -> Recipe:
        """The recipe for other processes: hub inputs at their commits, a division by gradients at its edges."""
        parts = {"model": self.base, "extractor": self.extractor, "data": self.source, "clip": self.clip}
        commits = {name: part.commit for name, part in parts.items() if isinstance(part, Input) and part.commit}
        pinned = {name: getattr(self.recipe, name).model_copy(update={"revision": c}) for name, c in commits.items()}
        decouple = self.recipe.decouple
        if decouple.division == "gradient_similarity" and not self.provisional:
            edges = {"division": "explicit", "edges": inner_edges(self.division), "similarity_file": None}
            pinned["decouple"] = decouple.model_copy(update=edges)
        return self.recipe.model_copy(update=pinned)


def shown(recipe: Recipe, *, store: Store | None, download: bool = False) -> Graph:
    """The graph of those who compute no figure: those that cannot be told any more are left out (`Graph.keyed`)."""
    graph = Graph(recipe, download=download, store=store, drawn=())
    graph.keyed(recipe.analyze.figures)
    return graph
