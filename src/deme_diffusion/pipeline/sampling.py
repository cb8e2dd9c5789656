"""Images of any model of a run, or of a plain pipeline folder, by a list of seeds. Imports torch only to sample."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme_diffusion.config import TAKES, Recipe, RuntimeSettings, SamplerSettings
from deme_diffusion.errors import UserError, nearest
from deme_diffusion.evaluation.export import CURSOR, GRID, IMAGES, Format, ImageFolder, Prompt
from deme_diffusion.files import canonical_digest, part_of, write_bytes
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.inputs import resolve, timesteps_of
from deme_diffusion.pipeline.node import Node, Served
from deme_diffusion.pipeline.run import Run
from deme_diffusion.pipeline.sampling_choice import PIPELINE, SamplerChoice, by_seed, family_of, given_prompts
from deme_diffusion.pipeline.workers import threads_of
from deme_diffusion.processes import is_main
from deme_diffusion.recipes import RESOLVED
from deme_diffusion.report.figures import sample_grid

if TYPE_CHECKING:
    from torch import nn

    from deme_diffusion.models.denoiser import Denoiser

log = logging.getLogger(__name__)
GRID_IMAGES, GRID_PIXELS = 64, 32
Opened = tuple["Denoiser", "nn.Module"]
Asked = Callable[[Sequence[int]], "list[Prompt] | None"]
"""Seeds -> what their images are asked for by; None where the model takes nothing."""


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

    `prepare` makes the model's stages, in every process of a launch; `opened` loads it, in the main one. `asked`: what
    each seed's image is asked for by, known once the stages are made.
    """

    images: ImageFolder
    sampler: SamplerSettings
    runtime: RuntimeSettings
    prepare: Callable[[], object]
    opened: Callable[[], Opened]
    asked: Asked = lambda seeds: None

    def make(self, seeds: Sequence[int], *, grid: bool = False) -> Samples:
        """An image for each seed; those that are there already are not made again."""
        self.images.check(seeds)
        self.prepare()
        if is_main():
            _sample_into(self, seeds)
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
            self.images.begin(seeds, self.asked(range(len(seeds))))
            self.images.copy(seeds, np.load(run.store.folder(stage.key) / IMAGES, mmap_mode="r"))
        return self._made(seeds, grid)

    def _made(self, seeds: Sequence[int], grid: bool) -> Samples:
        if grid and is_main():
            pixels = self.images.read(seeds[:GRID_IMAGES])
            columns, scale = math.ceil(math.sqrt(len(pixels))), max(1, GRID_PIXELS // pixels.shape[2])
            write_bytes(self.images.path / GRID, sample_grid(pixels, columns=columns, scale=scale))
        model = str(self.images.protocol["model"])
        return Samples(self.images.path, model, self.sampler.label, list(seeds), self.images.files(seeds))


def of_run(
    run: Run,
    served: Served,
    choice: SamplerChoice,
    images: Path | None,
    format: Format,
    prompts: str | None = None,
) -> Sampling:
    """Images of a model of a run, asked for by `prompts` (a text or a file), or else as the table's images are.

    Raises UserError for a sampler that is not to be had, and prompts that the model does not take.
    """
    model = run.recipe.model
    sampler = choice.of(run.recipe.evaluate.samplers, run.graph.division.num_timesteps, model.family)
    given = None if prompts is None else given_prompts(prompts, model.family)
    digest = served.parts[0].digest
    if served.ensemble:
        parts = [part.digest for part in served.parts]
        digest = canonical_digest({"parts": parts, "route": run.graph.division.as_dict()["route"]})[:16]
    folder = images or run.folder / "images" / f"{served.name}-{sampler.label}"

    def opened() -> Opened:
        from deme_diffusion.pipeline.workbench import Workbench

        bench = Workbench(run.graph, run.store)
        return bench.denoiser, bench.module(served)

    def asked(seeds: Sequence[int]) -> list[Prompt] | None:
        from deme_diffusion.pipeline.prompted import Prompted

        found = by_seed(given, seeds) if given else Prompted(run.graph, run.store).asked_at(seeds)
        return None if found is None else list(found)

    nodes = stages_of(served)
    if given is None and run.graph.asking.takes != "nothing":
        nodes += [part for part in run.graph.asked().values() if isinstance(part, Node)]
    target = ImageFolder(folder, format, _protocol(served.name, digest, sampler))
    return Sampling(target, sampler, run.recipe.runtime, lambda: run.execute(nodes), opened, asked)


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


def of_pipeline(
    folder: Path, recipe: Recipe, choice: SamplerChoice, images: Path, format: Format, prompts: str | None = None
) -> Sampling:
    """Images of a plain pipeline folder; of the recipe only `runtime` matters. UserError where it needs prompts."""
    found = resolve(str(folder), None, key="sample", needs=(PIPELINE,), download=False)
    name = family_of(folder)
    sampler = choice.of([], timesteps_of(found), name)
    if prompts is None and TAKES[name] != "nothing":
        raise UserError(f"{folder}: a pipeline that takes {TAKES[name]}, whose images need --prompts: a text or a file")
    given = None if prompts is None else given_prompts(prompts, name)
    runtime = recipe.runtime

    def opened() -> Opened:
        from deme_diffusion.models import projection
        from deme_diffusion.models.devices import device_of
        from deme_diffusion.models.families import family

        device = device_of(runtime.device)
        denoiser = family(name).load(folder)
        module = projection.fold_into(denoiser.component_from(folder), part_of(folder, denoiser.component))
        return denoiser, module.to(device)

    target = ImageFolder(images, format, _protocol(folder.resolve().name, found.digest, sampler))
    return Sampling(
        target, sampler, runtime, lambda: None, opened, lambda seeds: by_seed(given, seeds) if given else None
    )


def _protocol(model: str, digest: str, sampler: SamplerSettings) -> dict[str, Any]:
    return {"model": model, "model_digest": digest, "sampler": sampler.model_dump(mode="json")}


def _sample_into(one: Sampling, seeds: Sequence[int]) -> None:
    import torch

    from deme_diffusion.evaluation.sample import make_scheduler, sample_batch, sample_seeds_to

    images, sampler, asked = one.images, one.sampler, one.asked(seeds)
    images.check(seeds, asked)
    todo = list(seeds) if images.format == "npy" else images.missing(seeds)
    log.info("%d of %d images are to be sampled", len(todo), len(seeds))
    if not todo:
        images.begin(seeds, asked)
        return
    torch.set_num_threads(threads_of(one.runtime, alone=True))
    denoiser, module = one.opened()
    make_scheduler(denoiser, sampler)
    size = one.runtime.sample_batch_size
    known = dict(zip(seeds, asked or (), strict=False))
    prompts = None if asked is None else [known[seed] for seed in todo]
    if images.format == "npy":
        options: dict[str, Any] = {"batch_size": size, "prompts": prompts, "cursor_name": CURSOR}
        options["begin"] = lambda: images.begin(seeds, asked)
        sample_seeds_to(images.path, denoiser, module, sampler, seeds, **options)
        return
    for first in range(0, len(todo), size):
        batch = todo[first : first + size]
        wanted = None if prompts is None else prompts[first : first + size]
        made = sample_batch(denoiser, module, sampler, batch, prompts=wanted)
        if not first:  # only now: what is refused leaves nothing behind
            images.begin(seeds, asked)
        images.write(batch, made)
