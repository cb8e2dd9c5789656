"""The stages that measure: sampling, features, scores and losses, cost."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deme_diffusion.artefacts import Artefact
from deme_diffusion.config import SamplerSettings
from deme_diffusion.data.sources import SplitName
from deme_diffusion.evaluation import cost
from deme_diffusion.evaluation.extractors import Extractor, load_extractor
from deme_diffusion.evaluation.features import Extracted, extract, extract_real, in_batches
from deme_diffusion.evaluation.metrics import Statistics, statistics
from deme_diffusion.evaluation.protocols import reference_files
from deme_diffusion.evaluation.reducing import reference_batches, size_at
from deme_diffusion.evaluation.sample import IMAGES, sample_to
from deme_diffusion.evaluation.scores import load_statistics, published_statistics, save_statistics, score_images
from deme_diffusion.files import write_json, write_npy
from deme_diffusion.pipeline.extractors import STATISTICS_KEY
from deme_diffusion.pipeline.inputs import Input
from deme_diffusion.pipeline.node import COSTS, METRICS, PROMPTS, Node, Served
from deme_diffusion.pipeline.scored import Scored
from deme_diffusion.pipeline.workbench import ranges_of_node, seed_of_node

FEATURES, LOGITS = "features.npy", "logits.npy"


class Measuring(Scored):
    """Each method `_<stage>` fills the folder of one stage."""

    @cached_property
    def extractor(self) -> Extractor:
        """The recipe's extractor, on the device that `runtime.device` names."""
        folder, kind = self.folder(self.graph.extractor), self.recipe.extractor.kind
        key = (kind, self.graph.extractor.digest, str(self.device))
        return self.shared.get("extractor", key, lambda: load_extractor(folder, kind).to(self.device))

    def _sample(self, node: Node, folder: Path) -> Mapping[str, Any]:
        sampler: SamplerSettings = node.arguments["sampler"]
        served: Served = node.arguments["served"]
        count, protocol = self.recipe.evaluate.num_images, self.graph.asking.protocol
        batch_size = self.recipe.runtime.sample_batch_size
        prompts = self.asked_by(count)
        if prompts is not None:
            write_json(folder / PROMPTS, list(prompts))
        sample_to(
            folder,
            self.denoiser,
            self.module(served),
            sampler,
            seed=seed_of_node(node),
            count=count,
            batch_size=batch_size,
            prompts=prompts,
            side=protocol.side if protocol else None,
        )
        return {"images": count}

    def _features(self, node: Node, folder: Path) -> Mapping[str, Any]:
        """Features (n, d) of one set of images; a real split's first `distinct` rows show no image twice."""
        split: SplitName | None = node.arguments["split"]
        if "reference" in node.arguments:
            found = self._reference_features(node)
            save_statistics(folder, statistics(found.features))
        elif split is None:
            file = self.folder(node.parents["images"]) / IMAGES
            pixels = np.load(file, mmap_mode="c")  # torch warns of read-only arrays
            found = extract(in_batches(pixels, self.extractor.batch_size(pixels)), self.extractor)
        else:
            found = extract_real(self.splits[split], self.extractor, node.arguments["count"])
            save_statistics(folder, statistics(found.features))
        write_npy(folder / FEATURES, found.features)
        if found.logits is not None:
            write_npy(folder / LOGITS, found.logits)
        n = len(found.features)
        distinct = n if split is None else min(n, len(self.splits[split]))
        return {"images": n, "distinct": distinct, "preprocessing": self.extractor.preprocessing}

    def _reference_features(self, node: Node) -> Extracted:
        """Of a protocol's real images, as large as the images that are compared with them."""
        how, files = node.arguments["reference"], reference_files(self.folder(node.parents["reference"]))
        channels, *size = self.denoiser.image_shape
        shape = (channels, *size_at(tuple(size), how["side"]))
        return extract(reference_batches(files, shape, how["fit"]), self.extractor)

    def _evaluate(self, node: Node, folder: Path) -> None:
        served: Served = node.arguments["served"]
        result: dict[str, Any] = {"images": {}} if "reference" not in node.parents else self._compared(node)
        if clips := node.arguments["clips"]:
            result["clip"] = {
                name.removeprefix("clip "): dict(self._cached(node.parents[name]).results) for name in clips
            }
        if served.parts:
            noise = self.fixed_noise("report", ranges_of_node(node))
            losses = noise.losses(self.module(served))
            points = [noise.num_images * noise.settings.draws for _ in losses]
            result["losses"] = {"ranges": losses, "overall": noise.overall(losses), "points": points}
        write_json(folder / METRICS, result)

    def _compared(self, node: Node) -> dict[str, Any]:
        """What each set of images scores against the reference."""
        settings, source = self.recipe.evaluate, self._cached(node.parents["reference"])
        reference, distinct = np.load(source.path(FEATURES)), int(source.results["distinct"])
        fitted, published = load_statistics(source.folder), self._published(reference.shape[1])
        scores = {}
        for name in node.arguments["samples"]:
            generated = self._cached(node.parents[name])
            logits = generated.path(LOGITS)
            scores[name] = score_images(
                reference,
                np.load(generated.path(FEATURES)),
                neighbours=settings.neighbours,
                density_neighbours=settings.density_neighbours,
                manifold=reference[:distinct],
                fitted=fitted,
                published=published,
                logits=np.load(logits) if logits.exists() else None,
            )
        sizes = {"reference_images": len(reference), "features": reference.shape[1], "manifold_images": distinct}
        told = {**sizes, "images": scores}
        return {**told, "preprocessing": source.results["preprocessing"]}

    def _cached(self, features: Node | Input) -> Artefact:
        """What a features stage left."""
        artefact = self.store.find(features.key) if isinstance(features, Node) else None
        assert artefact is not None, "features come before what is measured on them"
        return artefact

    def _published(self, dimension: int) -> Statistics | None:
        """The statistics of `evaluate.reference_statistics`."""
        file = self.graph.published
        return published_statistics(file.folder, key=STATISTICS_KEY, dimension=dimension) if file else None

    def _cost(self, node: Node, folder: Path) -> None:
        sampler: SamplerSettings = node.arguments["sampler"]
        batch_size = self.graph.served_batch
        rows = {}
        for served in node.arguments["models"]:
            load, load_spread = cost.load_time(self.loaders(served))
            module = self.module(served)
            milliseconds, spread = cost.latency(self.denoiser, module, sampler, batch_size)
            memory = cost.peak_memory(self.denoiser, module, sampler, batch_size)
            rows[served.name] = {
                "parameters": self._counted(served),
                "latency": milliseconds,
                "latency_spread": spread,
                "load": load,
                "load_spread": load_spread,
                "peak_memory": memory,
                "disk": cost.disk(self._stored(served)),
            }
            del module  # before the next one is made
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.machine()
        protocol = {"batch": batch_size, "threads": torch.get_num_threads(), "device": device}
        write_json(folder / COSTS, {"models": rows, "protocol": protocol, "repeats": cost.REPEATS, "loads": cost.LOADS})
