"""The method from Python: a function for the whole run and one for each of its parts, which share the run's folder.

Each takes what the command takes: a recipe (packaged name, YAML path or run folder) and KEY=VALUE overrides. What one
has made costs the others nothing. Recipes with `runtime.jobs` above 1 start processes, so a script needs the usual
`if __name__ == "__main__"`. All raise UserError for wrong input, MachineError when the machine fails, and Interrupted
after a signal, whereupon the same call goes on. Progress is told through logging. Nothing here imports torch before it
is called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from deme_diffusion.results import Expert, Figure, Merged, MergedCheckpoint, Result

if TYPE_CHECKING:
    import torch
    from torch import nn

    from deme_diffusion.pipeline.run import Run
    from deme_diffusion.pipeline.sampling import Samples
    from deme_diffusion.report.tables import Row

Reference = str | Path
Spacing = Literal["leading", "linspace", "trailing"]


def run(recipe: Reference, *overrides: str, out: Reference | None = None) -> Result:
    """Run a whole recipe: experts, merge, table and page; run again to resume.

    Returns: the run's folder, the merged pipeline, the table and what it shows.
    Raises: UserError, MachineError, Interrupted, as everything here.
    """
    whole = _opened(recipe, overrides, out)
    whole.execute()
    table, verdict = whole.report()
    return Result(whole.folder, whole.merged if whole.merged.exists() else None, table, verdict)


def decouple(recipe: Reference, *overrides: str, out: Reference | None = None) -> list[Expert]:
    """Train the experts of a recipe (Sec. 3.1, 3.2), and its base where that is to be trained from scratch.

    Returns: the experts of every training seed, in the order of their timesteps.
    Raises: UserError, MachineError, Interrupted.
    """
    from deme_diffusion.division import name_of

    whole = _opened(recipe, overrides, out)
    whole.execute(lambda graph: [node for nodes in graph.experts.values() for node in nodes])
    experts = [(seed, i, node) for seed, nodes in whole.graph.experts.items() for i, node in enumerate(nodes)]
    subset = whole.graph.division.subset
    return [Expert(seed, i, name_of(subset(i)), whole.store.folder(node.key)) for seed, i, node in experts]


def merge(recipe: Reference, *overrides: str, out: Reference | None = None) -> list[Merged]:
    """Merge the experts of a recipe into one model of the base's size (Eq. 8), training and searching what is not done.

    Returns: the merged pipeline of every training seed, with its weights.
    Raises: UserError, also where the recipe merges nothing; MachineError, Interrupted.
    """
    from deme_diffusion.errors import UserError

    whole = _opened(recipe, overrides, out)
    if not whole.graph.merged:
        raise UserError("merge.method: none, so there is nothing to merge; leave it out, or serve the ensemble")
    whole.execute(lambda graph: list(graph.merged.values()))
    results = []
    for seed, node in whole.graph.merged.items():
        artefact = whole.store.find(node.key)
        assert artefact is not None, "it was made just now"
        found = artefact.results
        rules = {pattern: tuple(values) for pattern, values in found.get("rules", {}).items()}
        source = str(found.get("source", "the recipe"))
        results.append(Merged(seed, artefact.folder, tuple(found["weights"]), source, rules))
    return results


def merge_checkpoints(
    base: Reference,
    experts: Sequence[Reference],
    out: Reference,
    *,
    weights: Sequence[float] | None = None,
    weights_for: Mapping[str, Sequence[float]] | None = None,
    keep: Mapping[str, Literal["base"] | int] | None = None,
    method: str = "task_arithmetic",
    component: str | None = None,
    dtype: Literal["float32", "float16", "bfloat16"] | torch.dtype | None = None,
    max_shard_size: str | None = None,
    fisher: Sequence[Reference] = (),
    full_hash: bool = False,
    link: bool = False,
    lora_rank: int | None = None,
    fuse: bool = False,
    options: Mapping[str, float | int | str] | None = None,
    **more: float | int | str,
) -> MergedCheckpoint:
    """Merge any checkpoints of one architecture without a recipe, streamed: `deme merge --base`.

    Base and experts are diffusers pipelines or component folders, or safetensors files; `out` becomes what the base is.
    `weights_for` and `keep` are by glob pattern of parameter names, and the last match wins; `options` are the
    method's, as {"density": 0.2}, or say density=0.2. `fisher` is a file an expert, of method fisher. `full_hash` reads
    parents whose digest is not known. `link` shares the disk space of a pipeline's unchanged parts with the base, by
    hard links: never edit them in place. Experts may be LoRAs for the base, and become one: exactly where the method is
    linear, or at `lora_rank` with its error in the record; `fuse` writes the whole model. What is None is as the
    method, or the base, has it.

    Returns: where the merged model lies, and what happened, as merge.json tells it.
    Raises: UserError, also where `out` exists already; MachineError. Nothing is left under `out` then.
    """
    from deme_diffusion.merging.request import joined, requested

    request = requested(
        base,
        experts,
        out,
        weights=weights,
        weights_for=weights_for,
        keep=keep,
        method_name=method,
        options=joined(options, more),
        component=component,
        dtype=dtype,
        max_shard_size=max_shard_size,
        fisher=fisher,
        full_hash=full_hash,
        link=link,
        lora_rank=lora_rank,
        fuse=fuse,
    )
    from deme_diffusion.merging.perform import performed  # torch: only once the request makes sense

    record = performed(request)
    return MergedCheckpoint(request.out, request.weights.values, tuple(record["notes"]), record)


def evaluate(recipe: Reference, *overrides: str, out: Reference | None = None) -> list[Row]:
    """Measure every model of a recipe's table, making what is not done; the table and page go into the run's folder.

    Returns: a row a model: its name, and for each metric mean, spread, n and protocol.
    Raises: UserError, MachineError, Interrupted.
    """
    whole = _opened(recipe, overrides, out)
    whole.execute(lambda graph: [*graph.of_stage("evaluate"), graph.cost])
    return whole.report()[0]


def analyze(
    recipe: Reference,
    *overrides: str,
    figures: Sequence[str] | None = None,
    experts: Sequence[Reference] | None = None,
    merged: Reference | None = None,
    out: Reference | None = None,
) -> list[Figure]:
    """Draw the paper's figures for a recipe, computing what is not there.

    `figures`: of similarity, activations, landscape, plane, vectors, trajectory; None: those of `analyze.figures`, or
    all where that is empty. `experts` (a folder for each range, in their order) and `merged` are models trained
    elsewhere: pipelines, or the folders of their components.

    Returns: the pictures, in the order of the page. Raises: UserError, MachineError, Interrupted.
    """
    from deme_diffusion.pipeline.figures import named, overrides_for

    whole = _opened(recipe, [*overrides, *overrides_for(experts, merged)], out)
    names = named(figures, whole.recipe)
    whole.analyze(names)
    drawn = whole.draw(names)
    whole.renew()
    if whole.failure is not None:
        raise whole.failure
    return [Figure.of(picture, whole.folder) for picture in drawn]


def sample(
    recipe: Reference,
    *overrides: str,
    seeds: Sequence[int],
    model: str | None = None,
    sampler: str | None = None,
    num_inference_steps: int | None = None,
    eta: float | None = None,
    timestep_spacing: Spacing | None = None,
    guidance_scale: float | None = None,
    prompts: str | None = None,
    images: Reference | None = None,
    format: Literal["png", "npy"] = "png",
    grid: bool = False,
    out: Reference | None = None,
) -> Samples:
    """Images of one model of a run (`merged` by default; `base`, `ensemble`, `expert-0`, ...), one a seed.

    An image depends on its seed alone, and is that of the stock pipeline with `torch.Generator().manual_seed(seed)`.
    What is None of the sampler is as in the recipe's `evaluate.samplers`. `images` is the folder they go to,
    RUN/images/MODEL-SAMPLER by default; those that are there already are not made again. `prompts`, of a model that
    takes some: a text for all images, or a file (.txt, .csv, .jsonl, .tsv) whose prompt s is that of seed s, counted
    round; None: the table's.

    Returns: the folder, and the files in the order of the seeds.
    Raises: UserError, also for a folder that holds anything else; MachineError, Interrupted.
    """
    from deme_diffusion.evaluation.export import check_seeds
    from deme_diffusion.pipeline import sampling
    from deme_diffusion.pipeline.sampling_choice import SamplerChoice

    whole = _opened(recipe, overrides, out)
    choice = SamplerChoice(sampler, num_inference_steps, eta, timestep_spacing, guidance_scale)
    whole.settle(sampling.stages_of(sampling.model_named(whole.graph, model)))
    served = sampling.model_named(whole.graph, model)
    one = sampling.of_run(whole, served, choice, None if images is None else Path(images), format, prompts)
    return one.make(check_seeds(seeds), grid=grid)


def attach_projection(component: nn.Module, folder: str | Path) -> nn.Module:
    """Make the projections saved in a pipeline's or a component's folder act on the loaded component, and return it.

    Only models merged with `decouple.projection=block`, or with `projection_axes` other than channel, have any. Raises
    UserError where the folder has none, they do not fit the component, or some are attached already.
    """
    from deme_diffusion.models.projection import attach_projection as attach

    return attach(component, folder)


def _opened(recipe: Reference, overrides: Sequence[str], out: Reference | None) -> Run:
    from deme_diffusion.pipeline.run import open_run
    from deme_diffusion.recipes import load

    return open_run(load(str(recipe), overrides), out=None if out is None else Path(out))
