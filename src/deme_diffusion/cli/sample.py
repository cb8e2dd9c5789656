"""`deme sample`: the images that the table is measured on, or images of any model by their seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deme_diffusion.cli import show
from deme_diffusion.cli.command import app
from deme_diffusion.cli.options import AsJson, DryRun, Jobs, Out, Overrides, opened
from deme_diffusion.cli.stages import make
from deme_diffusion.errors import UserError

if TYPE_CHECKING:
    from deme_diffusion.evaluation.export import Format
    from deme_diffusion.pipeline.graph import Graph
    from deme_diffusion.pipeline.node import Node
    from deme_diffusion.pipeline.run import Run
    from deme_diffusion.pipeline.sampling import Samples
    from deme_diffusion.pipeline.sampling_choice import SamplerChoice


class _Format(StrEnum):
    png = "png"
    npy = "npy"


class _Spacing(StrEnum):
    leading = "leading"
    linspace = "linspace"
    trailing = "trailing"


_SEEDS = (
    "Seeds of the images, as 0,1,5-9. Seed s gives the image that the stock diffusers pipeline gives in float32 with "
    "batch 1 and generator=torch.Generator().manual_seed(s), whatever the batch here.  [the table's images]"
)


@app.command()
def sample(
    recipe: Annotated[
        str, typer.Argument(help="As elsewhere, or the folder of a diffusers pipeline, as RUN/merged or the base.")
    ],
    overrides: Overrides = None,
    model: Annotated[
        str | None, typer.Option(help="base, all-timesteps, ensemble, merged, expert-0, ...  [merged]")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help=_SEEDS)] = None,
    sampler: Annotated[
        str | None, typer.Option(help="A diffusers scheduler by class name.  [the first of evaluate.samplers]")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Its num_inference_steps.  [as in the recipe]")] = None,
    eta: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="DDIM's eta.  [as in the recipe]")] = None,
    spacing: Annotated[_Spacing | None, typer.Option(help="Its timestep_spacing.  [as in the recipe]")] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0.0, help="Its guidance_scale, of a model with prompts.  [as in the recipe]")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="What the images are asked for by: a text for all, or a file (.txt, .csv, .jsonl, .tsv) whose prompt "
            "s is that of seed s, counted round; numbers of classes where it takes classes.  [the table's prompts]"
        ),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Where the images go; grows when run again.  [RUN/images/MODEL-SAMPLER]")
    ] = None,
    format: Annotated[
        _Format | None, typer.Option(help="PNG files named by seed, or one images.npy with seeds.json.  [png]")
    ] = None,
    grid: Annotated[bool, typer.Option("--grid", help="Also the first 64 in one picture, grid.png.")] = False,
    out: Out = None,
    jobs: Jobs = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Sample the images that the table is measured on; with --seeds or --images, write images of one model."""
    asked = _Asked(
        model, seeds, sampler, steps, eta, spacing, guidance, prompts, images, format, grid, dry_run, as_json
    )
    from deme_diffusion.pipeline.sampling import is_pipeline

    if is_pipeline(recipe):
        _refuse({"--model": model, "--out": out, "--jobs": jobs}, f"{recipe} is a plain pipeline, of one model")
        _pipeline_images(recipe, overrides or [], asked)
        return
    run = opened(recipe, overrides, out, jobs, dry_run=dry_run)
    if seeds is None and images is None:
        _table_images(run, asked)
    else:
        _run_images(run, asked)


@dataclass(frozen=True)
class _Asked:
    """The options, as they were given."""

    model: str | None
    seeds: str | None
    sampler: str | None
    steps: int | None
    eta: float | None
    spacing: _Spacing | None
    guidance: float | None
    prompts: str | None
    images: Path | None
    format: _Format | None
    grid: bool
    dry_run: bool
    as_json: bool

    @property
    def choice(self) -> SamplerChoice:
        from deme_diffusion.pipeline.sampling_choice import SamplerChoice

        spacing = None if self.spacing is None else self.spacing.value
        return SamplerChoice(self.sampler, self.steps, self.eta, spacing, self.guidance)

    @property
    def listed(self) -> list[int] | None:
        from deme_diffusion.evaluation.export import parse_seeds

        return None if self.seeds is None else parse_seeds(self.seeds)

    @property
    def kind(self) -> Format:
        return "npy" if self.format == _Format.npy else "png"


def _table_images(run: Run, asked: _Asked) -> None:
    """No seeds, no folder: the stages that sample for the table."""
    from deme_diffusion.pipeline.sampling import measured, model_named

    names = ("sampler", "steps", "eta", "spacing", "guidance", "prompts", "format")
    given = {f"--{name}": getattr(asked, name) for name in names}
    _refuse({**given, "--grid": asked.grid or None}, "it is for --seeds or --images")

    def stages(graph: Graph) -> list[Node]:
        return measured(graph, None if asked.model is None else model_named(graph, asked.model))

    make(run, stages, asked.dry_run, asked.as_json)


def _run_images(run: Run, asked: _Asked) -> None:
    """One model's images: of the seeds, or those that the table was measured on."""
    from deme_diffusion.pipeline import sampling

    if asked.seeds is None:
        _refuse({"--prompts": asked.prompts}, "the table's images have their own; give --seeds")
    if not asked.dry_run:
        run.settle(sampling.stages_of(sampling.model_named(run.graph, asked.model)))
    served, seeds = sampling.model_named(run.graph, asked.model), asked.listed
    sampler = sampling.of_run(run, served, asked.choice, asked.images, asked.kind, asked.prompts)
    stage = sampling.measured_by(run, served, sampler.sampler) if seeds is None else None
    sampler.images.check(seeds)
    if asked.dry_run:
        show.plan(run, [stage] if stage else sampling.stages_of(served), asked.as_json)
    elif seeds is None:
        assert stage is not None, "found, or refused"
        _show(sampler.copy(run, stage, grid=asked.grid), asked.as_json)
    else:
        _show(sampler.make(seeds, grid=asked.grid), asked.as_json)


def _pipeline_images(folder: str, overrides: Sequence[str], asked: _Asked) -> None:
    """Images of a pipeline that no recipe speaks of."""
    from deme_diffusion.pipeline.sampling import of_pipeline
    from deme_diffusion.recipes import defaults

    seeds = asked.listed
    if seeds is None or asked.images is None:
        raise UserError(f"{folder}: a plain pipeline, whose images need --seeds and --images")
    other = next((text for text in overrides if not text.startswith("runtime.")), None)
    if other:
        raise UserError(f"{other}: {folder} is a plain pipeline, which takes runtime.KEY=VALUE only")
    sampler = of_pipeline(Path(folder), defaults(overrides), asked.choice, asked.images, asked.kind, asked.prompts)
    sampler.images.check(seeds)
    if asked.dry_run:
        show.say(f"to do: {len(seeds)} images by {sampler.sampler.label} into {asked.images}")
        return
    _show(sampler.make(seeds, grid=asked.grid), asked.as_json)


def _refuse(given: Mapping[str, object], why: str) -> None:
    """Options that would be ignored are wrong input."""
    name = next((name for name, value in given.items() if value is not None), None)
    if name:
        raise UserError(f"{name}: {why}")


def _show(samples: Samples, in_json: bool) -> None:
    if in_json:
        files = [str(file) for file in samples.files]
        show.as_json({**vars(samples), "folder": str(samples.folder), "files": files})
        return
    show.say(f"{len(samples.seeds)} images of {samples.model} by {samples.sampler}: {samples.folder}")
