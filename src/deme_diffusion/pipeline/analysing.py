"""The stages of the paper's figures: from models and images to one .npz each (`figure_file`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deme_diffusion.analysis.activations import write_activations
from deme_diffusion.analysis.landscape import write_landscape
from deme_diffusion.analysis.models import Load
from deme_diffusion.analysis.plane import write_plane
from deme_diffusion.analysis.similarity import write_similarity
from deme_diffusion.analysis.trajectory import write_trajectory
from deme_diffusion.analysis.vectors import write_vectors
from deme_diffusion.artefacts import WORK
from deme_diffusion.config import LossSettings
from deme_diffusion.division import Runs
from deme_diffusion.models.objective import FixedNoise
from deme_diffusion.pipeline.figures import figure_sampler, names_of_experts, plane_experts
from deme_diffusion.pipeline.inputs import Input
from deme_diffusion.pipeline.node import SIMILARITY, Node, Served, figure_file
from deme_diffusion.pipeline.searching import Searching


class Analysing(Searching):
    """Each method `_<stage>` fills the folder of one stage."""

    def _similarity(self, node: Node, folder: Path) -> Mapping[str, Any]:
        settings, batch_size = self.recipe.similarity, self.recipe.decouple.train_batch_size
        return write_similarity(
            folder / SIMILARITY,
            self.denoiser,
            self.encoded["train"],
            settings,
            subset=node.arguments["subset"],
            batch_size=batch_size,
            checkpointing=self.recipe.runtime.gradient_checkpointing,
            partial=folder / WORK,
        )

    def _landscape(self, node: Node, folder: Path) -> Mapping[str, Any]:
        experts = self._loads(node)  # none, nor names, of random directions
        return write_landscape(
            folder / figure_file(node),
            self._figure_noise(self.graph.loss_ranges),
            self.denoiser.module,
            experts,
            self.recipe.analyze,
            names=names_of_experts(self.graph) if experts else [],
            partial=folder / WORK,
        )

    def _plane(self, node: Node, folder: Path) -> Mapping[str, Any]:
        return write_plane(
            folder / figure_file(node),
            self._figure_noise(self.graph.loss_ranges),
            self.denoiser.module,
            self._loads(node),
            self._merged_load(node),
            self.recipe.analyze,
            pair=plane_experts(self.graph),
            names=names_of_experts(self.graph),
            partial=folder / WORK,
        )

    def _activations(self, node: Node, folder: Path) -> Mapping[str, Any]:
        division = self.graph.division
        return write_activations(
            folder / figure_file(node),
            self._figure_noise([division.subset(i) for i in range(division.num_experts)]),
            self.denoiser.module,
            self._loads(node),
            self._merged_load(node),
            self.recipe.analyze,
            served=[division.served(i) for i in range(division.num_experts)],
            names=names_of_experts(self.graph),
        )

    def _vectors(self, node: Node, folder: Path) -> Mapping[str, Any]:
        base = self.component_folder(self.graph.base)
        experts = [self.component_folder(part) for part in self._parts(node)]
        return write_vectors(folder / figure_file(node), base, experts, names=names_of_experts(self.graph))

    def _trajectory(self, node: Node, folder: Path) -> Mapping[str, Any]:
        parts, merged = self._parts(node), node.parents.get("merged")
        served = [Served("base", (self.graph.base,)), Served("ensemble", tuple(parts), ensemble=True)]
        served += [Served("merged", (merged,))] if merged else []
        return write_trajectory(
            folder / figure_file(node),
            self.denoiser,
            {one.name: lambda one=one: self.module(one) for one in served},  # type: ignore[misc]
            self.graph.division,
            figure_sampler(self.graph),
            self.recipe.analyze,
            names=names_of_experts(self.graph),
            batch_size=self.recipe.runtime.sample_batch_size,
            prompts=self.asked_at(range(self.recipe.analyze.trajectory_images)),
        )

    # -- what they are made of ---------------------------------------------------------------------

    def _parts(self, node: Node) -> list[Node | Input]:
        """The experts among a stage's inputs, in their order."""
        experts = {int(name.split()[1]): part for name, part in node.parents.items() if name.startswith("expert ")}
        return [experts[i] for i in sorted(experts)]

    def _loads(self, node: Node) -> Sequence[Load]:
        return [lambda part=part: self.dense(part) for part in self._parts(node)]  # type: ignore[misc]

    def _merged_load(self, node: Node) -> Load | None:
        merged = node.parents.get("merged")
        return None if merged is None else lambda: self.dense(merged)

    def _figure_noise(self, ranges: list[Runs]) -> FixedNoise:
        settings = self.recipe.analyze
        loss = LossSettings(num_images=settings.num_images, draws=settings.draws, seed=settings.seed)
        return FixedNoise(
            self.denoiser, self.encoded[settings.split], ranges, loss, self.recipe.runtime.sample_batch_size
        )
