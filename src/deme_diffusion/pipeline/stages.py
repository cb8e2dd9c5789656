"""What each stage does: from the folders of its inputs to its own. Everything that needs torch begins here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from deme_diffusion.artefacts import Store
from deme_diffusion.config import SamplerSettings
from deme_diffusion.data.splits import Split, SplitName, load_splits
from deme_diffusion.decouple.step import Job
from deme_diffusion.decouple.train import train
from deme_diffusion.division import from_runs, reported, whole
from deme_diffusion.evaluate import cost
from deme_diffusion.evaluate.extractor import load_extractor, train_extractor
from deme_diffusion.evaluate.features import features_of, real_pixels
from deme_diffusion.evaluate.objectives import FixedNoiseObjective, FrechetObjective
from deme_diffusion.evaluate.sample import IMAGES, sample_pixels, sample_to
from deme_diffusion.evaluate.scores import score_images
from deme_diffusion.files import append_jsonl, part_of, read_jsonl, write_bytes, write_json, write_text
from deme_diffusion.merge.apply import Merger, write_pipeline
from deme_diffusion.merge.search import Trial, best, candidates, score
from deme_diffusion.models import projection
from deme_diffusion.models.denoiser import Denoiser
from deme_diffusion.models.ensemble import RoutedEnsemble
from deme_diffusion.models.families import family
from deme_diffusion.models.objective import FixedNoise
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.inputs import Input
from deme_diffusion.pipeline.node import Node, Served
from deme_diffusion.report.card import model_card
from deme_diffusion.report.figures import sample_grid
from deme_diffusion.rng import seed_of

log = logging.getLogger(__name__)
METRICS, COSTS, SEARCH, TRIALS = "metrics.json", "cost.json", "search.json", "search.jsonl"
PREVIEW_IMAGES = 64


class Stages:
    """The stages of one graph; what several of them open (splits, the base) is opened once."""

    def __init__(self, graph: Graph, store: Store) -> None:
        self.graph, self.recipe, self.store = graph, graph.recipe, store

    def make(self, node: Node) -> Callable[[Path], Mapping[str, Any] | None]:
        """The function that fills a stage's folder."""
        stage: Callable[[Node, Path], Mapping[str, Any] | None] = getattr(self, f"_{node.stage}")
        return lambda folder: stage(node, folder)

    # -- what stages share -------------------------------------------------------------------------

    def folder(self, part: Node | Input) -> Path:
        """Where an input lies."""
        return part.folder if isinstance(part, Input) else self.store.folder(part.key)

    @cached_property
    def splits(self) -> dict[SplitName, Split]:
        """The three splits."""
        return load_splits(self.recipe.data)

    @cached_property
    def denoiser(self) -> Denoiser:
        """The base behind its family's interface, on the device that `runtime.device` names."""
        denoiser = family(self.recipe.model.family).load(self.folder(self.graph.base))
        denoiser.module.to(self.device).eval()
        return denoiser

    @property
    def device(self) -> torch.device:
        """`auto`: CUDA where there is any."""
        name = self.recipe.runtime.device
        return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)

    def component(self, part: Node | Input) -> nn.Module:
        """One model's component, its projections folded."""
        module = self.denoiser.component_from(self.folder(part))
        return projection.fold_into(module, self.component_folder(part)).to(self.device)

    def component_folder(self, part: Node | Input) -> Path:
        """Where a model's component lies."""
        return part_of(self.folder(part), self.denoiser.component)

    def module(self, served: Served) -> nn.Module:
        """A row's model, ready to run."""
        if not served.ensemble:
            return self.component(served.parts[0])
        loaders = [lambda part=part: self.component(part) for part in served.parts]
        resident = self.recipe.runtime.resident_experts
        return RoutedEnsemble(loaders, self.graph.division, self.denoiser.index, resident=resident).to(self.device)

    def fixed_noise(self, split: SplitName, ranges: list[list[list[int]]]) -> FixedNoise:
        """The fixed-noise loss on a split."""
        batch_size = self.recipe.runtime.sample_batch_size
        return FixedNoise(self.denoiser, self.splits[split], ranges, self.recipe.evaluate.loss, batch_size)

    # -- training ----------------------------------------------------------------------------------

    def _pretrain(self, node: Node, folder: Path) -> Mapping[str, Any]:
        from diffusers import DDPMPipeline

        from deme_diffusion.models.ddpm import DDPM

        settings = self.recipe.pretrain
        seed = _seed(node)
        denoiser = DDPM.from_scratch(settings, out_seed=seed)
        everything = whole(denoiser.num_train_timesteps)
        job = Job("base", settings, everything, settings.total_steps, settings.learning_rate, seed)
        results = self._train(denoiser, job, folder)
        module = denoiser.component_from(folder)
        DDPMPipeline(unet=module, scheduler=denoiser.scheduler).save_pretrained(folder)
        return results

    def _decouple(self, node: Node, folder: Path) -> Mapping[str, Any]:
        settings, what = self.recipe.decouple, node.arguments
        seed = _seed(node) if not what["copy"] else seed_of(_seed(node), "copy", what["copy"])
        job = Job(
            node.label,
            settings,
            what["subset"],
            what["steps"],
            what["learning_rate"],
            seed,
            global_prob=settings.global_prob,
            consistency_weight=settings.consistency_weight,
            projection=settings.projection,
        )
        return self._train(self.denoiser, job, folder)

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
        return train_extractor(train_split, search_split, self.recipe.extractor, seed=_seed(node), out=folder)

    # -- merging -----------------------------------------------------------------------------------

    def _merger(self, node: Node, method: str = "task_arithmetic") -> Merger:
        experts = [self.component_folder(part) for part in _experts(node)]
        return Merger(self.component_folder(self.graph.base), experts, method)

    def _search(self, node: Node, folder: Path) -> Mapping[str, Any]:
        settings, seed = self.recipe.merge, seed_of(_seed(node), "search")
        with self._merger(node) as merger:
            shell = self.component(self.graph.base)

            def materialise(weights: Sequence[float]) -> nn.Module:
                shell.load_state_dict(merger.state(weights))
                return shell

            loaders = [lambda part=part: self.component(part) for part in _experts(node)]
            noise = self.fixed_noise("search", _ranges(node))
            loss = FixedNoiseObjective(noise, self.denoiser.module, loaders, materialise)
            extractor = load_extractor(self.folder(self.graph.extractor))
            metric = FrechetObjective(
                self.denoiser,
                materialise,
                self.splits["search"],
                extractor,
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
        card: dict[str, Any] = {
            "recipe": self.recipe.name,
            "description": self.recipe.description,
            "weights": {"merged": weights},
        }
        card |= {"demonstration": self.recipe.demonstration, "base_model": self.graph.base.label}
        write_text(folder / "README.md", model_card(card))
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

    # -- measuring ---------------------------------------------------------------------------------

    def _sample(self, node: Node, folder: Path) -> Mapping[str, Any]:
        sampler: SamplerSettings = node.arguments["sampler"]
        served: Served = node.arguments["served"]
        count = self.recipe.evaluate.num_images
        batch_size = self.recipe.runtime.sample_batch_size
        sample_to(
            folder, self.denoiser, self.module(served), sampler, seed=_seed(node), count=count, batch_size=batch_size
        )
        return {"images": count}

    def _evaluate(self, node: Node, folder: Path) -> None:
        served: Served = node.arguments["served"]
        extractor = load_extractor(self.folder(self.graph.extractor))
        settings = self.recipe.evaluate
        reference = features_of(real_pixels(self.splits["report"]), extractor)
        result: dict[str, Any] = {"reference_images": len(reference), "images": {}, "losses": None}
        for name in node.arguments["samples"]:
            pixels = np.load(self.folder(node.parents[name]) / IMAGES)
            result["images"][name] = score_images(reference, features_of(pixels, extractor), settings.neighbours)
        if served.parts:
            noise = self.fixed_noise("report", _ranges(node))
            losses = noise.losses(self.module(served))
            points = [len(noise.split) * noise.settings.draws for _ in losses]
            result["losses"] = {"ranges": losses, "overall": noise.overall(losses), "points": points}
        else:  # the real training images, scored as if they had been generated
            real = real_pixels(self.splits["train"])[: settings.num_images]
            result["images"]["real"] = score_images(reference, features_of(real, extractor), settings.neighbours)
            result["images"]["real"]["n"] = len(real)
        write_json(folder / METRICS, result)

    def _cost(self, node: Node, folder: Path) -> None:
        sampler: SamplerSettings = node.arguments["sampler"]
        batch_size = 16
        rows = {}
        for served in node.arguments["models"]:
            module = self.module(served)
            milliseconds, spread = cost.latency(self.denoiser, module, sampler, batch_size)
            memory = cost.peak_memory(self.denoiser, module, sampler, batch_size)
            single = self.component(served.parts[0])
            rows[served.name] = {
                "parameters": sum(p.numel() for p in single.parameters()) * len(served.parts),
                "latency": milliseconds,
                "latency_spread": spread,
                "peak_memory": memory,
                "disk": cost.disk([self.component_folder(part) for part in served.parts]),
            }
        threads = torch.get_num_threads()
        write_json(
            folder / COSTS, {"models": rows, "batch_size": batch_size, "threads": threads, "repeats": cost.REPEATS}
        )


def _seed(node: Node) -> int:
    assert node.key.seed is not None, f"{node.label} has no seed"
    return node.key.seed


def _experts(node: Node) -> list[Node | Input]:
    return [node.parents[f"expert {i}"] for i in range(node.arguments["experts"])]


def _ranges(node: Node) -> list[list[list[int]]]:
    ranges: Any = node.key.settings["ranges"]
    assert all(len(from_runs(runs)) for runs in ranges)
    return list(ranges)


def _short(weights: Sequence[float]) -> str:
    return "(" + ", ".join(f"{w:.3f}" for w in weights) + ")"
