"""The rows of a run's table, from what the evaluate and cost stages left. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from deme_diffusion.artefacts import Store
from deme_diffusion.config import SamplerSettings
from deme_diffusion.division import names_of
from deme_diffusion.evaluation.metrics import mean_and_spread
from deme_diffusion.evaluation.scores import MOST_NEIGHBOURS_IMAGES, PUBLISHED, SPLITS
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.node import COSTS, METRICS, Node
from deme_diffusion.report.cells import REAL_IMAGES, Figure, Row

NAMED = ("FD", PUBLISHED, "KID", "IS")
"""Scores that are named by the extractor."""
SCORES = (*NAMED, "precision", "recall", "density", "coverage")
CLIP = "CLIP"
MEGABYTE = 1e6


def rows(graph: Graph, store: Store, extractor: str, names: Sequence[str] | None = None) -> list[Row]:
    """One row a model, in the order of the table, or of some names; the score of real training images last."""
    evaluations = [each for each in graph.evaluations if names is None or each[0] in names]
    cost = graph.cost if names is None else graph.measured(names)[-1]
    return _rows(graph, store, extractor, evaluations, _read(store, cost, COSTS))


def rows_so_far(graph: Graph, store: Store, extractor: str) -> list[Row]:
    """The rows of the models that are measured by now in every seed; without what serving costs before that is."""
    missing = {name for name, _, node in graph.evaluations if store.find(node.key) is None}
    evaluations = [each for each in graph.evaluations if each[0] not in missing]
    costs = _read(store, graph.cost, COSTS) if store.find(graph.cost.key) else {"models": {}}
    return _rows(graph, store, extractor, evaluations, costs)


def _rows(
    graph: Graph, store: Store, extractor: str, evaluations: Sequence[tuple[str, int, Node]], costs: dict[str, Any]
) -> list[Row]:
    measured: dict[str, dict[int, dict[str, Any]]] = {}
    for name, seed, node in evaluations:
        measured.setdefault(name, {})[seed] = _read(store, node, METRICS)
    result: list[Row] = []
    for name, by_seed in measured.items():
        metrics: dict[str, Figure] = {}
        if name == "base":  # no training seed touches it, and its loss draws nothing: one value, no spread
            metrics |= _losses(graph, dict([next(iter(by_seed.items()))]))
        elif name != REAL_IMAGES:
            metrics |= _losses(graph, by_seed)
        metrics |= _image_scores(graph, by_seed, extractor)
        if name == REAL_IMAGES and not graph.asking.measures_real_fd:
            metrics |= _not_compared(graph, result)
        if name in costs["models"]:
            metrics |= _costs(graph, costs, name)
        result.append({"model": name, "metrics": metrics})
    return result


def _not_compared(graph: Graph, models: Sequence[Row]) -> dict[str, Figure]:
    """Empty cells of real training images, where models are compared with images of another kind and size."""
    reference, figures = graph.asking.reference, models[0]["metrics"] if models else {}
    if reference is None:
        return {}
    reason = f"training images are of another kind and size than the reference {reference.label}"
    return {
        name: {"mean": None, "spread": None, "n": 0, "seeds": one["seeds"], "protocol": {}, "reason": reason}
        for name, one in figures.items()
        if name.startswith(SCORES)
    }


def _read(store: Store, node: Node, name: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((store.folder(node.key) / name).read_text())
    return values


def _losses(graph: Graph, by_seed: dict[int, dict[str, Any]]) -> dict[str, Figure]:
    """The fixed-noise loss overall and per range: the same points for every model and seed."""
    losses = [measured["losses"] for measured in by_seed.values()]
    names = [f"loss {name}" for name in names_of(graph.loss_ranges)]
    points = losses[0]["points"]
    figures = {"loss": _loss_figure(graph, [loss["overall"] for loss in losses], by_seed, sum(points))}
    for i, name in enumerate(names):
        figures[name] = _loss_figure(graph, [loss["ranges"][i] for loss in losses], by_seed, points[i])
    return figures


def _loss_figure(graph: Graph, values: list[float], by_seed: dict[int, Any], points: int) -> Figure:
    loss = graph.recipe.evaluate.loss
    protocol = {"loss": "fixed noise", "draws": loss.draws, "seed": loss.seed, "n": points, "split": "report"}
    protocol["data"] = f"{graph.recipe.data.source} {graph.data.digest}"
    return _figure(values, points, list(by_seed), protocol)


def _image_scores(graph: Graph, by_seed: dict[int, dict[str, Any]], extractor: str) -> dict[str, Figure]:
    settings, figures = graph.recipe.evaluate, dict[str, Figure]()
    first = next(iter(by_seed.values()))
    measured: dict[str, Any] = next(iter(first["images"].values()), {})  # by its extractor: not all have classes
    for sampler in settings.samplers:
        protocol = _sampled_by(graph, sampler)
        if "real" in first.get("clip", {}):
            protocol["prompts"] = "the captions of each"
        compared = {"extractor": f"{extractor} {graph.extractor.digest}", "preprocessing": first.get("preprocessing")}
        for score in (score for score in SCORES if score in measured):
            values, count = _values(by_seed, sampler.label, score)
            name = _score_name(graph, score, extractor)
            told = {**compared, **protocol, **_compared_with(graph, first, score), **_few(first, score, count)}
            figure = _figure(values, count, list(by_seed), told)
            if count != settings.num_images:  # all of these metrics depend on n, and there are only so many real images
                reason = f"{count:,} images and views, fewer than the {settings.num_images:,} of the models"
                figure |= {"mean": None, "spread": None, "reason": reason}
            figures[f"{name} {sampler.label}"] = figure
        if "clip" in first:
            figures[f"{CLIP}({graph.clip_name}) {sampler.label}"] = _clip_score(graph, by_seed, sampler, protocol)
    return figures


def _sampled_by(graph: Graph, sampler: SamplerSettings) -> dict[str, Any]:
    """How the images of one column were made."""
    settings, asking = graph.recipe.evaluate, graph.asking
    told = {
        "sampler": sampler.name,
        "steps": sampler.num_inference_steps,
        "eta": sampler.eta,
        "n": settings.num_images,
        "data": f"{graph.recipe.data.source} {graph.data.digest}",
        "seeds": f"{len(graph.recipe.seeds)} training x {settings.sampling_seeds} sampling",
    }
    if asking.takes == "nothing":
        return told
    guidance = "the pipeline's own" if sampler.guidance_scale is None else sampler.guidance_scale
    prompts = "report split" if asking.prompts is None else f"{asking.settings.protocol} {asking.prompts.digest}"
    return {**told, "guidance": guidance, "prompts": prompts}


def _clip_score(
    graph: Graph, by_seed: dict[int, dict[str, Any]], sampler: SamplerSettings, protocol: dict[str, Any]
) -> Figure:
    """100 max(cos, 0), a mean over images, which does not depend on how many there are; and its standard error."""
    assert graph.clip is not None, "measured"
    values, count = _values(by_seed, sampler.label, CLIP, of="clip")
    first = next(iter(next(iter(by_seed.values()))["clip"].values()))
    told = {key: value for key, value in protocol.items() if key != "n"}
    told |= {"clip": f"{graph.clip_name} {graph.clip.digest}", "preprocessing": first["preprocessing"]}
    told |= {"texts cut": first["texts_cut"]} if first["texts_cut"] else {}
    figure = _figure(values, count, list(by_seed), told)
    if count > 1:
        errors, _ = _values(by_seed, sampler.label, "standard_error", of="clip")
        # Seeds share the prompts, so that their errors are not independent: the mean of them, not one of the mean.
        figure["error"] = sum(errors) / len(errors)
    return figure


def _score_name(graph: Graph, score: str, extractor: str) -> str:
    if score == PUBLISHED and graph.published:
        return f"FD({extractor}, {graph.published.label})"
    return f"{score}({extractor})" if score in NAMED else score


def _compared_with(graph: Graph, first: dict[str, Any], score: str) -> dict[str, Any]:
    """What a score is taken against: the part of its protocol that differs between scores."""
    settings = graph.recipe.evaluate
    if score == "IS":
        return {"splits": SPLITS}
    if score == PUBLISHED and graph.published:
        return {"reference": f"{graph.published.label} {graph.published.digest}"}
    against: dict[str, Any] = {"split": "report", "reference": first["reference_images"]}
    if graph.asking.reference is not None and graph.asking.protocol is not None:
        protocol = graph.asking.protocol
        size = "as large as generated ones" if protocol.side is None else f"at most {protocol.side} pixels a side"
        found = (
            f"{first['reference_images']:,} images of {graph.asking.reference.label} {graph.asking.reference.digest}"
        )
        against = {"reference": f"{found}, {protocol.fit}, {size}"}
    if score in NAMED:
        return against
    neighbours = settings.neighbours if score in ("precision", "recall") else settings.density_neighbours
    n, manifold = (min(size, MOST_NEIGHBOURS_IMAGES) for size in (settings.num_images, first["manifold_images"]))
    return {**against, "neighbours": neighbours, "manifold": manifold, "n": n}


def _few(first: dict[str, Any], score: str, count: int) -> dict[str, int]:
    """The extractor's features, where FD is of images on either side that are no more than they: it is mostly bias."""
    features = int(first.get("features", 0))
    fewest = min(count, int(first["reference_images"])) if score == "FD" else count
    return {"features": features} if score in ("FD", PUBLISHED) and fewest <= features else {}


def _values(
    by_seed: dict[int, dict[str, Any]], sampler: str, score: str, of: str = "images"
) -> tuple[list[float], int]:
    """A value for each training seed (mean over its sampling seeds); with one training seed, its sampling seeds'."""
    found = []
    for measured in by_seed.values():
        sets = [s for name, s in measured[of].items() if name in ("real",) or name.rpartition("/")[0] == sampler]
        found.append([float(images[score]) for images in sets])
        count = int(sets[0]["n"])
    return (found[0] if len(found) == 1 else [sum(v) / len(v) for v in found]), count


def _step_of(graph: Graph) -> str:
    """What a latency is of: where there are encoders and a decoder, they are in it."""
    takes, parts = graph.asking.takes, {"text": "text, steps and decoding", "class": "steps and decoding"}
    return f"step; the whole pipeline ({parts[takes]}) over its steps" if takes in parts else "step"


def _costs(graph: Graph, costs: dict[str, Any], name: str) -> dict[str, Figure]:
    cost, protocol = costs["models"][name], costs["protocol"]
    seeds = [graph.recipe.seeds[0]]
    timing = {
        **protocol,
        "sampler": graph.recipe.evaluate.samplers[0].label,
        "per": _step_of(graph),
        "statistic": "median, half the range",
    }
    latency: Figure = {
        "mean": cost["latency"],
        "spread": cost["latency_spread"],
        "n": costs["repeats"],
        "seeds": seeds,
        "protocol": timing,
    }
    load: Figure = {
        "mean": cost["load"],
        "spread": cost["load_spread"],
        "n": costs["loads"],
        "seeds": seeds,
        "protocol": {
            "device": protocol["device"],
            "threads": protocol["threads"],
            "from": "weight files in the page cache",
            "statistic": timing["statistic"],
        },
    }
    return {
        "parameters": _figure([cost["parameters"]], 1, seeds, {"counted": "kept to serve"}),
        "latency (ms)": latency,
        "load time (ms)": load,
        "peak memory (MB)": _figure(
            [cost["peak_memory"] / MEGABYTE], 1, seeds, {"batch": protocol["batch"], "counted": "tensors"}
        ),
        "disk (MB)": _figure([cost["disk"] / MEGABYTE], 1, seeds, {"counted": "weight files"}),
    }


def _figure(values: Sequence[float], n: int, seeds: list[int], protocol: dict[str, Any]) -> Figure:
    mean, spread = mean_and_spread(values)
    figure: Figure = {"mean": mean, "spread": spread, "n": n, "seeds": seeds, "protocol": protocol}
    return figure | {"values": list(values)} if len(values) == len(seeds) > 1 else figure
