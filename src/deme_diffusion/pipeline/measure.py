"""The stages that measure: sampling, features, scores and losses, cost."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from deme_diffusion.config import SamplerSettings
from deme_diffusion.data.sources import SplitName
from deme_diffusion.evaluation import cost
from deme_diffusion.evaluation.extractor import load_extractor
from deme_diffusion.evaluation.features import features_of, real_pixels
from deme_diffusion.evaluation.sample import IMAGES, sample_to
from deme_diffusion.evaluation.scores import score_images
from deme_diffusion.files import write_json, write_npy
from deme_diffusion.pipeline.inputs import Input
from deme_diffusion.pipeline.node import COSTS, METRICS, Node, Served
from deme_diffusion.pipeline.workbench import Workbench, ranges_of_node, seed_of_node

FEATURES = "features.npy"


class Measuring(Workbench):
    """Each method `_<stage>` fills the folder of one stage."""

    def _sample(self, node: Node, folder: Path) -> Mapping[str, Any]:
        sampler: SamplerSettings = node.arguments["sampler"]
        served: Served = node.arguments["served"]
        count = self.recipe.evaluate.num_images
        batch_size = self.recipe.runtime.sample_batch_size
        sample_to(
            folder,
            self.denoiser,
            self.module(served),
            sampler,
            seed=seed_of_node(node),
            count=count,
            batch_size=batch_size,
        )
        return {"images": count}

    def _features(self, node: Node, folder: Path) -> Mapping[str, Any]:
        """Features (n, d) of one set of images; a real split's first `distinct` rows show no image twice."""
        extractor = load_extractor(self.folder(self.graph.extractor))
        split: SplitName | None = node.arguments["split"]
        if split is None:
            pixels = np.load(self.folder(node.parents["images"]) / IMAGES)
        else:
            pixels = real_pixels(self.splits[split])[: node.arguments["count"]]
        write_npy(folder / FEATURES, features_of(pixels, extractor))
        distinct = len(pixels) if split is None else min(len(pixels), len(self.splits[split]))
        return {"images": len(pixels), "distinct": distinct}

    def _evaluate(self, node: Node, folder: Path) -> None:
        served: Served = node.arguments["served"]
        reference, distinct = self._cached(node.parents["reference"])
        scores = {}
        for name in node.arguments["samples"]:
            features, _ = self._cached(node.parents[name])
            scores[name] = score_images(
                reference, features, neighbours=self.recipe.evaluate.neighbours, manifold=reference[:distinct]
            )
        result: dict[str, Any] = {"reference_images": len(reference), "manifold_images": distinct, "images": scores}
        if served.parts:
            noise = self.fixed_noise("report", ranges_of_node(node))
            losses = noise.losses(self.module(served))
            points = [len(noise.split) * noise.settings.draws for _ in losses]
            result["losses"] = {"ranges": losses, "overall": noise.overall(losses), "points": points}
        write_json(folder / METRICS, result)

    def _cached(self, features: Node | Input) -> tuple[npt.NDArray[np.float32], int]:
        """A features stage's array, and how many of its first rows are distinct images."""
        artefact = self.store.find(features.key) if isinstance(features, Node) else None
        assert artefact is not None, "features come before what is measured on them"
        return np.load(artefact.path(FEATURES)), int(artefact.results["distinct"])

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
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.machine()
        protocol = {"batch": batch_size, "threads": torch.get_num_threads(), "device": device}
        write_json(folder / COSTS, {"models": rows, "protocol": protocol, "repeats": cost.REPEATS})
