"""The stages of the paper's figures: what each is made of, and the settings that shape it. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme_diffusion.config import FIGURES, FigureName, Recipe, SamplerSettings
from deme_diffusion.config.analysis import RADII
from deme_diffusion.division import Runs, from_runs, name_of, whole
from deme_diffusion.errors import UserError, nearest
from deme_diffusion.evaluation.samplers import check_sampler, sampler_options
from deme_diffusion.pipeline import elsewhere
from deme_diffusion.pipeline.dividing import schedule_of
from deme_diffusion.pipeline.inputs import Input
from deme_diffusion.pipeline.node import Node

if TYPE_CHECKING:
    from deme_diffusion.pipeline.graph import Graph

SHAPING: Mapping[FigureName, Sequence[str]] = {
    "similarity": (),  # by the section `similarity`
    "activations": ("split", "num_images", "draws"),
    "landscape": ("split", "num_images", "draws", "directions", "landscape_points"),
    "plane": ("split", "num_images", "draws", "plane_points"),
    "vectors": (),
    "trajectory": ("trajectory_images",),
}
"""The settings of `analyze` in the key of each figure's stage."""
LOSSES = ("activations", "landscape", "plane")
"""Figures that look at images; these give points of the fixed-noise loss to each cell, or model."""


def named(names: Sequence[str] | None, recipe: Recipe) -> list[FigureName]:
    """The figures of these names in the page's order; where none is named, those of the recipe, or else all."""
    for name in names or ():
        if name not in FIGURES:
            raise UserError(f"figure {name!r}: there are {', '.join(FIGURES)}{nearest(name, FIGURES)}")
    wanted: Collection[str] = names or recipe.analyze.figures or FIGURES
    return [name for name in FIGURES if name in wanted]


def overrides_for(experts: Sequence[str | Path] | None, merged: str | Path | None) -> list[str]:
    """The KEY=VALUE overrides that name models trained elsewhere."""
    for option, folder in [*(("--expert", folder) for folder in experts or ()), ("--merged", merged)]:
        if folder is not None and not str(folder).strip():
            raise UserError(f"{option} {str(folder)!r}: empty; {elsewhere.EXPECTED}")
    folders = [str(Path(folder).expanduser().absolute()) for folder in experts or ()]
    found = [f"analyze.experts={json.dumps(folders, ensure_ascii=False)}"] if folders else []
    there = None if merged is None else json.dumps(str(Path(merged).expanduser().absolute()), ensure_ascii=False)
    return found if there is None else [*found, f"analyze.merged={there}"]


def experts_of(graph: Graph) -> list[Node | Input]:
    """The experts of the figures: those of the first training seed, or those that `analyze.experts` names."""
    given, wanted = graph.recipe.analyze.experts, graph.recipe.decouple.num_ranges
    if given is None:
        return list(graph.experts[graph.recipe.seeds[0]])
    if len(given) != wanted:
        raise UserError(f"analyze.experts: {len(given)} folders for decouple.num_ranges={wanted}; one for each range")
    found = [(f"analyze.experts.{i}", folder) for i, folder in enumerate(given)]
    return [elsewhere.given(folder, graph.base, graph.recipe, key=key) for key, folder in found]


def merged_of(graph: Graph) -> Node | Input | None:
    """The merged model of the figures; None where there is none."""
    settings = graph.recipe.analyze
    if settings.merged is not None:
        return elsewhere.given(settings.merged, graph.base, graph.recipe, key="analyze.merged")
    return None if settings.experts is not None else graph.merged.get(graph.recipe.seeds[0])


def stages(graph: Graph, name: FigureName) -> list[Node]:
    """The stages that give the data of one figure; only the similarity of gradients has several. New ones come into
    the graph."""
    if name == "similarity":
        found = [graph.similarity_within(subset) for subset in similarity_subsets(graph)]
        return list(dict.fromkeys(found))
    return [MAKERS[name](graph)]


def similarity_subsets(graph: Graph) -> list[Runs]:
    """Where gradients are compared: [0, T) first. Raises UserError for a range that is none."""
    total, within = graph.division.num_timesteps, graph.recipe.analyze.similarity_within
    if within == "whole":
        return [whole(total)]
    if within == "ranges":
        subsets = [graph.division.subset(i) for i in range(graph.division.num_experts)]
        return [whole(total), *(subset for subset in subsets if subset != whole(total) and len(from_runs(subset)) > 1)]
    for lo, hi in within:
        if not 0 <= lo < hi - 1 < total:
            raise UserError(f"analyze.similarity_within: [{lo}, {hi}): two timesteps or more of [0, {total}) expected")
    return [whole(total), *([[lo, hi]] for lo, hi in within if [[lo, hi]] != whole(total))]


# -- stages ---------------------------------------------------------------------------------------


def _landscape(graph: Graph) -> Node:
    along = graph.recipe.analyze.directions == "task_vectors"
    covered = {"ranges": graph.loss_ranges, **(_named_by(graph) if along else graph.waiting_for_ranges())}
    radius = graph.recipe.analyze.landscape_radius
    covered |= {} if radius in (None, RADII[graph.recipe.analyze.directions]) else {"landscape_radius": radius}
    parents = _data(graph) | (_experts(graph) if along else {})
    return _stage(graph, "landscape", "loss landscape", covered, parents)


def _plane(graph: Graph) -> Node:
    experts, pair = graph.recipe.decouple.num_ranges, plane_experts(graph)
    covered = {"ranges": graph.loss_ranges, **_named_by(graph)}
    covered |= {} if pair == (0, experts - 1) else {"experts": list(pair)}
    label = (
        f"loss on the plane of task vectors {pair[0]} and {pair[1]}" if experts > 1 else "loss along the task vector"
    )
    return _stage(graph, "plane", label, covered, _data(graph) | _experts(graph) | _merged(graph))


def plane_experts(graph: Graph) -> tuple[int, int]:
    """The two experts whose task vectors span the plane. Raises UserError for one that there is not."""
    given, experts = graph.recipe.analyze.plane_experts, graph.recipe.decouple.num_ranges
    for index in given or ():
        if not 0 <= index < experts:
            raise UserError(f"analyze.plane_experts: {index}; an expert from 0 to {experts - 1}")
    return given or (0, experts - 1)


def _activations(graph: Graph) -> Node:
    covered, division = {"subsets": _subsets(graph), **graph.waiting()}, graph.division
    if any(division.served(i) != division.subset(i) for i in range(division.num_experts)):
        covered |= {"route": division.as_dict()["route"]}
    parents = _data(graph) | _experts(graph) | _merged(graph)
    return _stage(graph, "activations", "activation differences", covered, parents)


def _vectors(graph: Graph) -> Node:
    parents = {"base": graph.base, **_experts(graph)}
    return _stage(graph, "vectors", "entries of the task vectors", _named_by(graph), parents)


def _trajectory(graph: Graph) -> Node:
    sampler = figure_sampler(graph)
    family, schedule = graph.recipe.model.family, schedule_of(graph.recipe, graph.base)[0]
    check_sampler(sampler, graph.division.num_timesteps, key="analyze.sampler", family=family)
    sampler_options(sampler, schedule, key="analyze.sampler", family=family)
    covered = {"sampler": sampler.changed(), "route": graph.division.as_dict()["route"], **_named_by(graph)}
    covered |= graph.asking.covered
    if graph.asking.protocol is not None:  # which of its prompts are asked for
        covered["num_images"] = graph.recipe.evaluate.num_images
    parents: dict[str, Node | Input] = {"base": graph.base, **_experts(graph), **_merged(graph), **graph.asked()}
    images = graph.recipe.analyze.trajectory_images
    work = len([name for name in parents if name in ("base", "merged")]) + 1  # and the ensemble
    node_work = images * sampler.num_inference_steps * work
    return _stage(graph, "trajectory", "grids and trajectory", covered, parents, images=node_work)


MAKERS: Mapping[str, Callable[[Graph], Node]] = {
    "activations": _activations,
    "landscape": _landscape,
    "plane": _plane,
    "vectors": _vectors,
    "trajectory": _trajectory,
}


def figure_sampler(graph: Graph) -> SamplerSettings:
    """The sampler of grids and trajectory."""
    return graph.recipe.analyze.sampler or graph.recipe.evaluate.samplers[0]


def _stage(
    graph: Graph,
    name: FigureName,
    label: str,
    covered: Mapping[str, Any],
    parents: Mapping[str, Node | Input],
    images: int = 0,
) -> Node:
    settings = graph.recipe.analyze
    shaping = {key: value for key, value in settings.changed().items() if key in SHAPING[name]}
    seed = None if name == "vectors" else settings.seed
    return graph.add_figure(name, label, {**shaping, **covered}, parents, seed, images=images)


def _data(graph: Graph) -> dict[str, Node | Input]:
    return {"base": graph.base, "data": graph.data, **graph.cached()}


def _experts(graph: Graph) -> dict[str, Node | Input]:
    return {f"expert {i}": expert for i, expert in enumerate(experts_of(graph))}


def _merged(graph: Graph) -> dict[str, Node | Input]:
    merged = merged_of(graph)
    return {} if merged is None else {"merged": merged}


def _subsets(graph: Graph) -> list[Runs]:
    return [graph.division.subset(i) for i in range(graph.division.num_experts)]


def _named_by(graph: Graph) -> dict[str, Any]:
    """What names experts that were trained elsewhere; a training of ours has its subset in its own key."""
    return graph.waiting() | ({} if graph.recipe.analyze.experts is None else {"subsets": _subsets(graph)})


def names_of_experts(graph: Graph) -> list[str]:
    """How figures name the experts: by number and subset."""
    return [f"expert {i} {name_of(subset)}" for i, subset in enumerate(_subsets(graph))]
