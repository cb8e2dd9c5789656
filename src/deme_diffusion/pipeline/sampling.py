"""Images of any model of a run, or of a plain pipeline folder, by a list of seeds. Imports torch only to sample."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from deme_diffusion.config import Recipe, RuntimeSettings, SamplerSettings
from deme_diffusion.errors import UserError, nearest
from deme_diffusion.evaluation.export import CURSOR, GRID, IMAGES, Format, ImageFolder
from deme_diffusion.evaluation.samplers import check_sampler
from deme_diffusion.files import canonical_digest, part_of, write_bytes
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.inputs import resolve, timesteps_of
from deme_diffusion.pipeline.node import Node, Served
from deme_diffusion.pipeline.run import Run
from deme_diffusion.pipeline.workers import threads_of
from deme_diffusion.processes import is_main
from deme_diffusion.recipes import RESOLVED
from deme_diffusion.report.figures import sample_grid

if TYPE_CHECKING:
    from torch import nn

    from deme_diffusion.models.denoiser import Denoiser

log = logging.getLogger(__name__)
GRID_IMAGES, GRID_PIXELS = 64, 32
PIPELINE = "model_index.json"
Opened = tuple["Denoiser", "nn.Module"]


@dataclass(frozen=True)
class SamplerChoice:
    """What was asked of the sampler; None leaves it as the recipe has it."""

    name: str | None = None
    num_inference_steps: int | None = None
    eta: float | None = None
    timestep_spacing: str | None = None

    def of(self, listed: Sequence[SamplerSettings], num_timesteps: int) -> SamplerSettings:
        """The first sampler of that name (or at all) in the list, changed as asked; a new one where none is listed.

        Raises UserError where diffusers has none such, or it would ignore a setting.
        """
        named = [sampler for sampler in listed if self.name in (None, sampler.name)]
        steps = listed[0].num_inference_steps if listed else min(50, num_timesteps)
        start = named[0].model_dump() if named else {"num_inference_steps": steps}
        changes = {key: value for key, value in vars(self).items() if value is not None}
        try:
            sampler = SamplerSettings.model_validate({**start, **changes})
        except ValidationError as error:
            wrong = error.errors(include_url=False)[0]
            raise UserError(f"--sampler: {wrong['loc'][0]}: {wrong['msg']} (given: {wrong['input']!r})") from None
        check_sampler(sampler, num_timesteps, key="--sampler")
        return sampler


@dataclass(frozen=True)
class Samples:
    """Images that were made: the folder, the seed of each, and the files in the same order (one array with npy)."""

    folder: Path
    model: str
    sampler: str
    seeds: list[int]
    files: list[Path]


def models_of(graph: Graph) -> dict[str, Served]:
    """Every model of a run by its name, of the first training seed: the table's rows, and the experts alone."""
    seed = graph.recipe.seeds[0]
    experts = {f"expert-{i}": Served(f"expert-{i}", (node,)) for i, node in enumerate(graph.experts[seed])}
    return {served.name: served for served in graph.served[seed]} | experts


def model_named(graph: Graph, name: str | None) -> Served:
    """The model of that name; None is `merged`, or the ensemble where nothing is merged. UserError with the nearest."""
    models = models_of(graph)
    name = name or ("merged" if "merged" in models else "ensemble")
    if name not in models:
        raise UserError(f"--model {name}: the run has {', '.join(models)}{nearest(name, models)}")
    return models[name]


def measured(graph: Graph, served: Served | None = None) -> list[Node]:
    """The stages that sample what the table is measured on: all, or those of one model."""
    nodes = list(graph.of_stage("sample"))
    return nodes if served is None else [node for node in nodes if _same(node.arguments["served"], served)]


def _same(one: Served, other: Served) -> bool:
    digests = [[part.digest for part in served.parts] for served in (one, other)]
    return digests[0] == digests[1] and one.ensemble == other.ensemble


@dataclass(frozen=True)
class Sampling:
    """Images of one model by one sampler, into one folder: checked before anything is computed, then made.

    `prepare` makes the model's stages, in every process of a launch; `opened` loads it, in the main one.
    """

    images: ImageFolder
    sampler: SamplerSettings
    runtime: RuntimeSettings
    prepare: Callable[[], object]
    opened: Callable[[], Opened]

    def make(self, seeds: Sequence[int], *, grid: bool = False) -> Samples:
        """An image for each seed; those that are there already are not made again."""
        self.images.check(seeds)
        self.prepare()
        if is_main():
            _sample_into(self.images, seeds, self.sampler, self.runtime, self.opened)
        return self._made(seeds, grid)

    def copy(self, run: Run, stage: Node, *, grid: bool = False) -> Samples:
        """The images of a sampling stage, which is made first where it is not; named by their seeds."""
        import numpy as np

        from deme_diffusion.evaluation.sample import image_seeds

        assert stage.key.seed is not None, "sampling has a seed"
        seeds = image_seeds(stage.key.seed, 0, run.recipe.evaluate.num_images)
        self.images.check(seeds)
        run.execute([stage])
        if is_main():
            self.images.begin(seeds)
            self.images.copy(seeds, np.load(run.store.folder(stage.key) / IMAGES, mmap_mode="r"))
        return self._made(seeds, grid)

    def _made(self, seeds: Sequence[int], grid: bool) -> Samples:
        if grid and is_main():
            pixels = self.images.read(seeds[:GRID_IMAGES])
            columns, scale = math.ceil(math.sqrt(len(pixels))), max(1, GRID_PIXELS // pixels.shape[2])
            write_bytes(self.images.path / GRID, sample_grid(pixels, columns=columns, scale=scale))
        model = str(self.images.protocol["model"])
        return Samples(self.images.path, model, self.sampler.label, list(seeds), self.images.files(seeds))


def of_run(run: Run, served: Served, choice: SamplerChoice, images: Path | None, format: Format) -> Sampling:
    """Images of a model of a run. Raises UserError for a sampler that is not to be had."""
    sampler = choice.of(run.recipe.evaluate.samplers, run.graph.division.num_timesteps)
    digest = served.parts[0].digest
    if served.ensemble:
        parts = [part.digest for part in served.parts]
        digest = canonical_digest({"parts": parts, "route": run.graph.division.as_dict()["route"]})[:16]
    folder = images or run.folder / "images" / f"{served.name}-{sampler.label}"

    def opened() -> Opened:
        from deme_diffusion.pipeline.workbench import Workbench

        bench = Workbench(run.graph, run.store)
        return bench.denoiser, bench.module(served)

    target = ImageFolder(folder, format, _protocol(served.name, digest, sampler))
    return Sampling(target, sampler, run.recipe.runtime, lambda: run.execute(stages_of(served)), opened)


def stages_of(served: Served) -> list[Node]:
    """What must be done before a model can sample."""
    return [part for part in served.parts if isinstance(part, Node)]


def measured_by(run: Run, served: Served, sampler: SamplerSettings) -> Node:
    """The stage that samples what the table is measured on. UserError where this model and sampler have none."""
    found = [node for node in measured(run.graph, served) if node.arguments["sampler"] == sampler]
    if not found:
        have = ", ".join(listed.label for listed in run.recipe.evaluate.samplers)
        rows = ", ".join(row.name for row in run.graph.served[run.recipe.seeds[0]])
        raise UserError(
            f"the table has no images of {served.name} by {sampler.label}, only of {rows} by {have}; give --seeds"
        )
    return found[0]


def is_pipeline(reference: str) -> bool:
    """Whether this is the folder of a diffusers pipeline, and no run's."""
    path = Path(reference)
    return (path / PIPELINE).is_file() and not (path / RESOLVED).is_file()


def of_pipeline(folder: Path, recipe: Recipe, choice: SamplerChoice, images: Path, format: Format) -> Sampling:
    """Images of a plain pipeline folder; of the recipe only the family and `runtime` matter."""
    found = resolve(str(folder), None, key="sample", needs=(PIPELINE,), download=False)
    sampler = choice.of([], timesteps_of(found))
    runtime = recipe.runtime

    def opened() -> Opened:
        from deme_diffusion.models import projection
        from deme_diffusion.models.devices import device_of
        from deme_diffusion.models.families import family

        device = device_of(runtime.device)
        denoiser = family(recipe.model.family).load(folder)
        module = projection.fold_into(denoiser.component_from(folder), part_of(folder, denoiser.component))
        return denoiser, module.to(device)

    target = ImageFolder(images, format, _protocol(folder.resolve().name, found.digest, sampler))
    return Sampling(target, sampler, runtime, lambda: None, opened)


def _protocol(model: str, digest: str, sampler: SamplerSettings) -> dict[str, Any]:
    return {"model": model, "model_digest": digest, "sampler": sampler.model_dump(mode="json")}


def _sample_into(
    images: ImageFolder,
    seeds: Sequence[int],
    sampler: SamplerSettings,
    runtime: RuntimeSettings,
    opened: Callable[[], Opened],
) -> None:
    import torch

    from deme_diffusion.evaluation.sample import make_scheduler, sample_batch, sample_seeds_to

    todo = list(seeds) if images.format == "npy" else images.missing(seeds)
    log.info("%d of %d images are to be sampled", len(todo), len(seeds))
    if not todo:
        images.begin(seeds)
        return
    torch.set_num_threads(threads_of(runtime, alone=True))
    denoiser, module = opened()
    make_scheduler(denoiser, sampler)
    images.begin(seeds)  # only now: a model or sampler that is refused leaves nothing behind
    size = runtime.sample_batch_size
    if images.format == "npy":
        sample_seeds_to(images.path, denoiser, module, sampler, seeds, batch_size=size, cursor_name=CURSOR)
        return
    for first in range(0, len(todo), size):
        batch = todo[first : first + size]
        images.write(batch, sample_batch(denoiser, module, sampler, batch))
