"""What a run's stages left, in words: whose the merge weights are, what a search lowered, what was asked. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deme_diffusion.artefacts import Store
from deme_diffusion.merging.selection import MergeWeights
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.merges import HowToMerge, degenerate
from deme_diffusion.pipeline.node import MERGE, PROMPTS, SIMILARITY, Node
from deme_diffusion.report.cells import Figure, Row, metric_names
from deme_diffusion.report.usage import usage
from deme_diffusion.weight_files import read_json

Found = Mapping[str, Any]
REPORT = "report"
"""The split that the table is measured on."""


def weights_lines(graph: Graph, store: Store) -> list[str]:
    """A line for each seed's `merged`: its weights, whose they are, and whether it is then a merge at all."""
    lines = []
    for seed, merged in graph.merged.items():
        how, search = merged.arguments["how"], graph.searches.get(seed)
        if search is None:
            said = _not_searched(graph, seed, how, [float(w) for w in merged.key.settings["weights"]])  # type: ignore[attr-defined]
        else:
            found = read_json(store.folder(search.key) / "search.json")
            weights = how.weights(tuple(found["weights"]), found.get("rules"))
            said = f"{_listed(weights)}, by {found['source']}{degenerate(weights, how.method.name)}"
        method = "" if how.method.name == "task_arithmetic" else f" of {how.what}"
        lines.append(f"merge weights{method}{_which(graph, seed)}: {said}")
    return lines


def _not_searched(graph: Graph, seed: int, how: HowToMerge, values: list[float]) -> str:
    """Weights that are given, or the method's own: `merged` and the row `merged-uniform` are then one model."""
    uniform = next(served.parts[0] for served in graph.served[seed] if served.name == "merged-uniform")
    same = ": merged and merged-uniform are the same model" if uniform is graph.merged[seed] else ""
    if not how.method.weighted:
        return f"none; {how.method.name} takes none{same}"
    if values != how.method.default_weights(len(values)):
        whose = "by SNR" if graph.recipe.merge.weighting == "snr" else "given"
        return f"{_listed(how.weights(tuple(values)))}, {whose}{same}"
    more = f" and others for {len(how.rules)} patterns" if how.rules else ""
    return f"{values[0]:.3g} each{more}, default of {how.method.name}{same}"


def _listed(weights: MergeWeights) -> str:
    more = f" and others for {len(weights.rules)} patterns" if weights.rules else ""
    return ", ".join(f"{w:.3g}" for w in weights.values) + more


def _which(graph: Graph, seed: int) -> str:
    return f" (seed {seed})" if len(graph.recipe.seeds) > 1 else ""


# -- what one stage made ---------------------------------------------------------------------------


def of_stage(store: Store, node: Node) -> dict[str, Any]:
    """What a search or a merge that is done came to: weights, whose they are, and of a search its value before, after.

    Of a similarity: its file, and what it says of pairs. Empty for other stages.
    """
    artefact = store.find(node.key)
    if artefact is not None and node.stage == "similarity":
        return {"file": str(artefact.path(SIMILARITY)), **artefact.results}
    if artefact is None or node.stage not in ("search", "merge"):
        return {}
    search = node if node.stage == "search" else node.parents.get("search")
    searched = store.find(search.key) if isinstance(search, Node) else None
    names = ("source", "value", "value_before", "objective")
    told = {name: searched.results[name] for name in names} if searched else {}
    weights = [(name, value) for name, value in artefact.results.items() if name in ("weights", "rules", "keep")]
    return {**dict(weights), **(told or {"source": read_json(artefact.path(MERGE))["weights_source"]})}


def line_of(found: Found) -> str:
    """The same for people."""
    if "conflicting" in found:
        return _similarity_line(found)
    listed = _listed(MergeWeights(tuple(found["weights"]), found.get("rules", {})))
    if "value" not in found:
        return f"weights {listed} ({found['source']})"
    return f"weights {listed}, by {found['source']}: {found['objective']}: {_from_to(found)}"


def _similarity_line(found: Found) -> str:
    pairs = f"{_share(found, 'conflicting')} of pairs conflict on these {found['num_images']} images and their noise"
    told = f"{found['determined']} of {found['bins']} bins told from noise"
    beyond = f"of expected gradients {_share(found, 'expected')} ({told})" if "expected" in found else ""
    means = f"mean cosine {found['mean']:.3f}, of neighbours {found['neighbours']:.3f}, error {found['error']:.3f}"
    return f"{found['file']}: {pairs}; {beyond or f'of expected gradients not determined ({told})'}; {means}"


def _share(found: Found, name: str) -> str:
    """A share of pairs, and its bounds where the sketch leaves any."""
    share, least, most = (found[f"{name}{end}"] for end in ("", "_least", "_most"))
    return f"{share:.1%}" + (f" ({least:.1%} to {most:.1%})" if least < most else "")


def _from_to(found: Found) -> str:
    """Two values in as many digits as tell them apart, where they differ."""
    values = (found["value_before"], found["value"])
    pairs = ([f"{value:.{digits}g}" for value in values] for digits in range(4, 18))
    first = f"{values[0]:.4g}"
    before, after = next((pair for pair in pairs if pair[0] != pair[1]), (first, first))
    return f"{before} to {after}"


# -- a gain that was noise -------------------------------------------------------------------------


def lost_gains(graph: Graph, store: Store, rows: Sequence[Row]) -> list[str]:
    """A line for each search that lowered FD on the search split where `merged` has no lower FD on the report split."""
    lines = []
    for seed, search in graph.searches.items():
        found = read_json(store.folder(search.key) / "search.json")
        if line := lost_gain(found, rows, seed, graph.recipe.merge.num_images):
            lines.append(line + _which(graph, seed))
    return lines


def lost_gain(found: Found, rows: Sequence[Row], seed: int, num_images: int) -> str:
    """That line; '' where the search found nothing, or where its gain is there with every sampler of the table."""
    if not found["value"] < found["value_before"]:
        return ""
    measured = dict(_measured(rows, seed))
    lost = [sampler for sampler, (base, merged) in measured.items() if not merged < base]
    if not lost:
        return ""
    with_some = f" with {', '.join(lost)}" if len(lost) < len(measured) else ""
    gain = f"FD {_from_to(found)} on {num_images} images, {len(found['trials'])} trials"
    return f"the search's gain ({gain}) did not carry over to the report split{with_some}"


def _measured(rows: Sequence[Row], seed: int) -> Iterator[tuple[str, tuple[float, float]]]:
    """Sampler -> FD of base and merged on the report split, of one training seed."""
    models = {row["model"]: row["metrics"] for row in rows}
    for metric in metric_names(rows):
        figures = [models.get(name, {}).get(metric) for name in ("base", "merged")]
        if not metric.startswith("FD(") or not all(f and f["protocol"].get("split") == REPORT for f in figures):
            continue
        base, merged = (_of_seed(figure, seed) for figure in figures if figure)
        if base is not None and merged is not None:
            yield metric.rpartition(" ")[2], (base, merged)


def _of_seed(figure: Figure, seed: int) -> float | None:
    values = figure.get("values")
    return figure["mean"] if values is None or seed not in figure["seeds"] else values[figure["seeds"].index(seed)]


# -- prompts --------------------------------------------------------------------------------------


def asked(graph: Graph, store: Store, seed: int, most: int) -> dict[str, Any]:
    """What the first images of the grids were asked for by, and how the merged model is asked."""
    node = graph.samples.get(("base", seed))
    seen = store.glimpse(node.key) if node else None
    prompts: list[Any] = []
    if seen is not None and seen.path(PROMPTS).is_file():
        prompts = json.loads(seen.path(PROMPTS).read_text())[:most]
    return {**usage(graph.recipe, prompts), **({"prompts": prompts} if prompts else {})}
