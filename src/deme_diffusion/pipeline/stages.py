"""What each stage does: from the folders of its inputs to its own. Everything that needs torch begins here."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deme_diffusion.artefacts import WORK
from deme_diffusion.config import Recipe
from deme_diffusion.decoupling.initial import start_of
from deme_diffusion.decoupling.step import Job
from deme_diffusion.decoupling.switches import switched
from deme_diffusion.decoupling.train import train
from deme_diffusion.division import reported, whole
from deme_diffusion.evaluation import fisher
from deme_diffusion.evaluation.extractors.classifier import train_extractor
from deme_diffusion.evaluation.sample import sample_pixels
from deme_diffusion.files import part_of, write_bytes, write_text
from deme_diffusion.lora import base_record
from deme_diffusion.merging import record
from deme_diffusion.merging.checkpoints import MODEL_INDEX, locate
from deme_diffusion.merging.lora_write import readme, write_lora
from deme_diffusion.merging.selection import MergeWeights
from deme_diffusion.merging.write import write_into
from deme_diffusion.models import projection
from deme_diffusion.models.denoiser import Denoiser
from deme_diffusion.models.lora import LowRank
from deme_diffusion.models.objective import FixedNoise
from deme_diffusion.pipeline.analysing import Analysing
from deme_diffusion.pipeline.inputs import TRAINED_ON, Input, trained_on
from deme_diffusion.pipeline.merges import HowToMerge
from deme_diffusion.pipeline.node import Node
from deme_diffusion.pipeline.preparing import Preparing
from deme_diffusion.pipeline.searching import SEARCH, experts_of
from deme_diffusion.pipeline.workbench import seed_of_node
from deme_diffusion.processes import is_main
from deme_diffusion.report.card import expert_card, model_card
from deme_diffusion.report.figures import sample_grid
from deme_diffusion.report.lora_card import lora_card
from deme_diffusion.report.usage import usage
from deme_diffusion.rng import seed_of
from deme_diffusion.weight_files import read_json
from deme_diffusion.weights import Weights

log = logging.getLogger(__name__)
PREVIEW_IMAGES = 64


class Stages(Analysing, Preparing):
    """Each method `_<stage>` fills the folder of one stage: here those that train and merge."""

    def make(self, node: Node) -> Callable[[Path], Mapping[str, Any] | None]:
        """The function that fills a stage's folder."""
        stage: Callable[[Node, Path], Mapping[str, Any] | None] = getattr(self, f"_{node.stage}")

        def made(folder: Path) -> Mapping[str, Any] | None:
            with switched(self.recipe.runtime):
                return stage(node, folder)

        return made

    # -- training ----------------------------------------------------------------------------------

    def _pretrain(self, node: Node, folder: Path) -> Mapping[str, Any]:
        from diffusers import DDPMPipeline

        from deme_diffusion.models.ddpm import DDPM

        settings = self.recipe.pretrain
        denoiser = DDPM.from_scratch(settings, out_seed=seed_of_node(node))
        results = self._train(denoiser, job_of(self.recipe, node), folder)
        if not is_main():
            return results
        # Into the module made here, not one read from the folder: diffusers would write the folder's path into config.
        denoiser.module.load_state_dict(denoiser.component_from(folder).state_dict())
        DDPMPipeline(unet=denoiser.module, scheduler=denoiser.scheduler).save_pretrained(folder)
        write_text(folder / TRAINED_ON, trained_on(self.recipe.data, self.graph.images))
        return results

    def _decouple(self, node: Node, folder: Path) -> Mapping[str, Any]:
        start = start_of(self.recipe.decouple, seed_of_node(node), self.folder(self.graph.base))
        job = replace(job_of(self.recipe, node), start=start)
        if job.lora is not None:
            job = replace(job, lora=replace(job.lora, base=self._base_record()))
        results = self._train(self.denoiser, job, folder)
        if is_main() and job.lora is not None:
            averaged = (folder / "raw").is_dir()
            card = lora_card(node.label, self._loadable(), self.denoiser.component, averaged=averaged)
            write_text(folder / "README.md", card)
        elif is_main():
            name, kind = self.denoiser.component, type(self.denoiser.module).__name__
            projected, averaged = (folder / name / projection.FILE).is_file(), (folder / "raw").is_dir()
            card = expert_card(node.label, self.graph.base.label, name, kind, projected=projected, averaged=averaged)
            write_text(folder / "README.md", card)
        return results

    def _loadable(self) -> str:
        """By what stock diffusers loads the base, or where it lies: the run's folder has a link to it."""
        label = self.graph.base.label
        given = isinstance(self.graph.base, Input) and not label.startswith("packaged:")
        return label.split("@")[0] if given else "path/to/the/run/base"

    def _base_record(self) -> dict[str, Any]:
        """What a LoRA says of the model that it is for."""
        with Weights(self.component_folder(self.graph.base)) as base:
            return base_record(base, full_hash=True)

    def _train(self, denoiser: Denoiser, job: Job, folder: Path) -> Mapping[str, Any]:
        ranges = reported(job.subset, denoiser.num_train_timesteps)
        loss, batch_size = self.recipe.evaluate.loss, self.recipe.runtime.sample_batch_size
        validation = FixedNoise(denoiser, self.encoded["search"], ranges, loss, batch_size)

        def preview(module: nn.Module, path: Path) -> None:
            sampler = self.recipe.merge.sampler
            count, size = PREVIEW_IMAGES, min(PREVIEW_IMAGES, batch_size)
            prompts = self.searched_by(count)
            pixels = sample_pixels(denoiser, module, sampler, seed=0, count=count, batch_size=size, prompts=prompts)
            write_bytes(path, sample_grid(pixels, columns=8, scale=4))

        return train(
            denoiser,
            self.encoded["train"],
            job,
            folder,
            runtime=self.recipe.runtime,
            validation=validation,
            preview=preview,
        )

    def _extractor(self, node: Node, folder: Path) -> Mapping[str, Any]:
        train_split, search_split = self.splits["train"], self.splits["search"]
        write_text(folder / TRAINED_ON, trained_on(self.recipe.data, self.graph.images))
        settings, seed = self.recipe.extractor, seed_of_node(node)
        return train_extractor(train_split, search_split, settings, seed=seed, out=folder, device=self.device)

    # -- merging -----------------------------------------------------------------------------------

    def _fisher(self, node: Node, folder: Path) -> None:
        """Of the weights and projections as they were trained: D is a parameter of its own, on unfolded weights."""
        expert, what = node.parents["expert"], node.arguments
        if self.lora(expert) is not None:
            module = self.dense(expert)
        else:
            module = projection.attach(
                self.denoiser.component_from(self.folder(expert)), projection.load(self.component_folder(expert))
            )
        fisher.write_fisher(
            folder,
            self.denoiser,
            module.float().to(self.device).eval(),
            self.encoded["train"],
            what["subset"],
            samples=what["samples"],
            seed=seed_of_node(node),
            expert=expert.digest,
        )

    def _merge(self, node: Node, folder: Path) -> Mapping[str, Any]:
        how: HowToMerge = node.arguments["how"]
        weights, found = self.weights_of(node)
        recipe = {"method": how.method.name, "experts": [part.digest for part in experts_of(node)], **found}
        dtype = None if how.dtype is None else getattr(torch, how.dtype)
        base = locate(self.folder(self.graph.base), self.denoiser.component, what="base")
        whole = emptied(folder / WORK / ".merged")  # hidden: half of it could look like a model
        if self.recipe.decouple.lora_rank is not None and not how.fuse:
            return self._merge_loras(node, weights, recipe, dtype, folder) | found
        with self._merger(node) as merger:
            seen, size = record.statistics_of(merger), how.max_shard_size
            write_into(merger, weights, base, whole, dtype=dtype, max_shard_size=size, recipe=recipe, observe=seen)
            if unfolded := list(merger.unfolded(weights)):  # stock diffusers does not read it: the cards must say so
                found = {**found, "projection": {"component": self.denoiser.component, "places": unfolded}}
            kept = record.record(
                merger,
                weights,
                source=self._source(node, weights),
                shards=sorted(file.name for file in part_of(whole, self.denoiser.component).glob("*.safetensors")),
                dtype=dtype,
                statistics=seen,
                score=self._scores(node),
            )
            for note in merger.notes:
                log.warning("%s: %s", node.label, note)
        record.write(whole, kept)
        # Runs that share this artefact have other recipes: a run's own card, with its table, is model_card.md.
        card = {"recipe": f"merge {node.digest}", "weights": {"merged": list(weights.values)}, "merge": kept}
        about = {"base_model": self.graph.base.label, "projection": found.get("projection")}
        about |= usage(self.recipe, settled=False)
        write_text(whole / "README.md", model_card({**card, **about}))
        take_over(whole, folder, last=MODEL_INDEX)
        told = weights.as_dict()
        return {"weights": told.pop("values"), **told, **found}

    def _merge_loras(
        self, node: Node, weights: MergeWeights, recipe: Mapping[str, Any], dtype: torch.dtype | None, folder: Path
    ) -> dict[str, Any]:
        """LoRA experts become one LoRA for the base."""
        how: HowToMerge = node.arguments["how"]
        with self._merger(node) as merger:
            for note in merger.notes:
                log.warning("%s: %s", node.label, note)
            source, score = self._source(node, weights), self._scores(node)
            kept = write_lora(
                merger, weights, folder, source=source, rank=how.lora_rank, dtype=dtype, recipe=recipe, score=score
            )
        record.write(folder, kept)
        write_text(folder / "README.md", readme(kept, self._loadable()))
        told = weights.as_dict()
        return {"weights": told.pop("values"), **told, "lora": kept["lora"]}

    def weights_of(self, node: Node) -> tuple[MergeWeights, dict[str, Any]]:
        """The weights of a merge stage, and how they were found."""
        search, how = node.parents.get("search"), node.arguments["how"]
        if search is None:
            return how.weights(tuple(node.key.settings["weights"])), {}  # type: ignore[arg-type]
        artefact = self.store.find(search.key) if isinstance(search, Node) else None
        assert artefact is not None, "a merge runs after its search"
        found = {key: artefact.results[key] for key in ("source", "value", "objective")}
        rules = {pattern: tuple(values) for pattern, values in artefact.results.get("rules", {}).items()}
        return how.weights(tuple(artefact.results["weights"]), rules), found

    def _source(self, node: Node, weights: MergeWeights) -> str:
        """Whose the weights of a merge are."""
        row = node.arguments["how"].method
        if isinstance(search := node.parents.get("search"), Node):
            found = read_json(self.folder(search) / SEARCH)
            by, source = str(found["method"]), str(found["source"])
            return f"search: {source if source.startswith(by) else f'{by}, {source}'}"
        default = list(weights.values) == row.default_weights(len(weights.values))
        return f"default of {row.name}" if default else "by SNR" if self.recipe.merge.weighting == "snr" else "given"

    def _scores(self, node: Node) -> dict[str, Any] | None:
        """Of a search: what it lowered, at w = 0 and at the weights that it found."""
        if not isinstance(search := node.parents.get("search"), Node):
            return None
        found = read_json(self.folder(search) / SEARCH)
        return {"objective": found["objective"], "before": found["value_before"], "after": found["value"]}


def job_of(recipe: Recipe, node: Node) -> Job:
    """What the training of a stage is: the base, an expert or a control."""
    if node.stage == "pretrain":
        pretrain = recipe.pretrain
        everything = whole(pretrain.scheduler.num_train_timesteps)
        return Job("base", pretrain, everything, pretrain.total_steps, pretrain.learning_rate, seed_of_node(node))
    settings, what, rank = recipe.decouple, node.arguments, recipe.decouple.lora_rank
    seed = seed_of_node(node) if not what["copy"] else seed_of(seed_of_node(node), "copy", what["copy"])
    return Job(
        node.label,
        settings,
        what["subset"],
        what["steps"],
        what["learning_rate"],
        seed,
        global_prob=settings.global_prob,
        consistency_weight=settings.consistency_weight,
        projection=settings.projection,
        projection_axes=settings.projection_axes,
        timestep_sampling=settings.timestep_sampling,
        antithetic=settings.antithetic,
        teacher=settings.teacher,
        teacher_update_steps=settings.teacher_update_steps,
        teacher_dtype=settings.teacher_dtype,
        multi_task=settings.multi_task,
        multi_task_clusters=settings.multi_task_clusters,
        multi_task_division=settings.multi_task_division,
        multi_task_update_steps=settings.multi_task_update_steps,
        lora=None if rank is None else LowRank(rank, settings.lora_alpha, settings.lora_targets),
    )


def emptied(folder: Path) -> Path:
    """The folder, without what an interrupted attempt left there."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def take_over(whole: Path, folder: Path, *, last: str) -> None:
    """Move a finished model into an artefact's folder; the file without which it is none goes first and comes last."""
    (folder / last).unlink(missing_ok=True)
    for part in sorted(whole.iterdir(), key=lambda part: part.name == last):
        target = folder / part.name
        if target.is_dir():
            shutil.rmtree(target)
        part.replace(target)
    whole.rmdir()
