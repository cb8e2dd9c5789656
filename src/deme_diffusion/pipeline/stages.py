"""What each stage does: from the folders of its inputs to its own. Everything that needs torch begins here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from deme_diffusion.config import Recipe
from deme_diffusion.data.index import make_index
from deme_diffusion.decoupling.step import Job
from deme_diffusion.decoupling.switches import switched
from deme_diffusion.decoupling.train import train
from deme_diffusion.division import reported, whole
from deme_diffusion.evaluation.extractors.classifier import train_extractor
from deme_diffusion.evaluation.objectives import FixedNoiseObjective, FrechetObjective
from deme_diffusion.evaluation.sample import sample_pixels
from deme_diffusion.files import append_jsonl, read_jsonl, write_bytes, write_json, write_text
from deme_diffusion.merging.apply import Merger, write_pipeline
from deme_diffusion.merging.search import Trial, best, candidates, score
from deme_diffusion.models.denoiser import Denoiser
from deme_diffusion.models.objective import FixedNoise
from deme_diffusion.pipeline.inputs import TRAINED_ON, Input, trained_on
from deme_diffusion.pipeline.measure import Measuring
from deme_diffusion.pipeline.node import Node
from deme_diffusion.pipeline.workbench import ranges_of_node, seed_of_node
from deme_diffusion.processes import is_main
from deme_diffusion.report.card import model_card
from deme_diffusion.report.figures import sample_grid
from deme_diffusion.rng import seed_of

log = logging.getLogger(__name__)
SEARCH, TRIALS = "search.json", "search.jsonl"
PREVIEW_IMAGES = 64


class Stages(Measuring):
    """Each method `_<stage>` fills the folder of one stage: here those that train and merge."""

    def make(self, node: Node) -> Callable[[Path], Mapping[str, Any] | None]:
        """The function that fills a stage's folder."""
        stage: Callable[[Node, Path], Mapping[str, Any] | None] = getattr(self, f"_{node.stage}")

        def made(folder: Path) -> Mapping[str, Any] | None:
            with switched(self.recipe.runtime):
                return stage(node, folder)

        return made

    def _data(self, node: Node, folder: Path) -> Mapping[str, Any]:
        limit = self.recipe.runtime.cache_images_gb * 1e9
        return make_index(self.recipe.data, folder, commit=self.graph.source.commit, limit=limit)

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
        return self._train(self.denoiser, job_of(self.recipe, node), folder)

    def _train(self, denoiser: Denoiser, job: Job, folder: Path) -> Mapping[str, Any]:
        ranges = reported(job.subset, denoiser.num_train_timesteps)
        loss, batch_size = self.recipe.evaluate.loss, self.recipe.runtime.sample_batch_size
        validation = FixedNoise(denoiser, self.splits["search"], ranges, loss, batch_size)

        def preview(module: nn.Module, path: Path) -> None:
            sampler = self.recipe.merge.sampler
            pixels = sample_pixels(denoiser, module, sampler, seed=0, count=PREVIEW_IMAGES, batch_size=PREVIEW_IMAGES)
            write_bytes(path, sample_grid(pixels, columns=8, scale=4))

        return train(
            denoiser,
            self.splits["train"],
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

    def _merger(self, node: Node, method: str = "task_arithmetic") -> Merger:
        experts = [self.component_folder(part) for part in _experts(node)]
        return Merger(self.component_folder(self.graph.base), experts, method)

    def _search(self, node: Node, folder: Path) -> Mapping[str, Any]:
        settings, seed = self.recipe.merge, seed_of(seed_of_node(node), "search")
        with self._merger(node) as merger:
            shell = self.component(self.graph.base)

            def materialise(weights: Sequence[float]) -> nn.Module:
                return merger.into(shell, weights)

            loaders = [lambda part=part: self.component(part) for part in _experts(node)]
            noise = self.fixed_noise("search", ranges_of_node(node))
            loss = FixedNoiseObjective(noise, self.denoiser.module, loaders, materialise)
            metric = FrechetObjective(
                self.denoiser,
                materialise,
                self.splits["search"],
                self.extractor,
                settings.sampler,
                seed,
                settings.num_images,
                self.recipe.runtime.sample_batch_size,
            )
            proposals = candidates(node.arguments["experts"], settings, lambda: loss)
            known = [Trial(**record) for record in read_jsonl(folder / TRIALS)]
            trials: list[Trial] = []
            for trial in score(proposals, metric, known):
                if trial not in known:
                    append_jsonl(folder / TRIALS, vars(trial))
                trials.append(trial)
                log.info("%s: %s %s -> %.4f", node.label, trial.source, _short(trial.weights), trial.value)
        chosen = best(trials)
        objective = (
            f"FD({self.graph.extractor_name}) {settings.sampler.label}, {settings.num_images} images, search split"
        )
        result = {"weights": chosen.weights, "source": chosen.source, "value": chosen.value, "objective": objective}
        write_json(folder / SEARCH, {**result, "method": settings.search, "trials": [vars(t) for t in trials]})
        return result

    def _merge(self, node: Node, folder: Path) -> Mapping[str, Any]:
        weights, found = self.weights_of(node)
        recipe = {"method": node.arguments["method"], "experts": [part.digest for part in _experts(node)], **found}
        with self._merger(node, node.arguments["method"]) as merger:
            base = self.folder(self.graph.base)
            write_pipeline(merger, weights, base, self.denoiser.component, folder, recipe=recipe)
            if unfolded := list(merger.unfolded(weights)):  # stock diffusers does not read it: the cards must say so
                found = {**found, "projection": {"component": self.denoiser.component, "places": unfolded}}
        # Runs that share this artefact have other recipes: a run's own card, with its table, is model_card.md.
        card = {"recipe": f"merge {node.digest}", "weights": {"merged": weights}, "base_model": self.graph.base.label}
        write_text(folder / "README.md", model_card({**card, "projection": found.get("projection")}))
        return {"weights": weights, **found}

    def weights_of(self, node: Node) -> tuple[list[float], dict[str, Any]]:
        """The weights of a merge stage, and how they were found."""
        search = node.parents.get("search")
        if search is None:
            return list(node.key.settings["weights"]), {}  # type: ignore[call-overload]
        artefact = self.store.find(search.key) if isinstance(search, Node) else None
        assert artefact is not None, "a merge runs after its search"
        found = {key: artefact.results[key] for key in ("source", "value", "objective")}
        return list(artefact.results["weights"]), found


def job_of(recipe: Recipe, node: Node) -> Job:
    """What the training of a stage is: the base, an expert or a control."""
    if node.stage == "pretrain":
        pretrain = recipe.pretrain
        everything = whole(pretrain.scheduler.num_train_timesteps)
        return Job("base", pretrain, everything, pretrain.total_steps, pretrain.learning_rate, seed_of_node(node))
    settings, what = recipe.decouple, node.arguments
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
        timestep_sampling=settings.timestep_sampling,
        antithetic=settings.antithetic,
        teacher=settings.teacher,
        teacher_update_steps=settings.teacher_update_steps,
        teacher_dtype=settings.teacher_dtype,
    )


def _experts(node: Node) -> list[Node | Input]:
    return [node.parents[f"expert {i}"] for i in range(node.arguments["experts"])]


def _short(weights: Sequence[float]) -> str:
    return "(" + ", ".join(f"{w:.3f}" for w in weights) + ")"
