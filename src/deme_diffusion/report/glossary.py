"""What the words of a table mean, in a line each: its rows, its metrics, and the signs of a merge."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deme_diffusion.report.cells import REAL_IMAGES, Figure, Row, metric_names

ROWS = {
    "base": "the pretrained model",
    "all-timesteps": "the control: one model finetuned on every timestep with the whole budget and the same techniques",
    "all-timesteps-searched": "the same, its own task vector's weight searched alike",
    "soup": "the control: as many copies as experts, all finetuned on all timesteps and merged alike",
    "ensemble": "at each timestep the expert that serves it (the paper's “before merge”)",
    "merged-uniform": "the experts merged with the weights 1/N",
    "merged": "the experts merged with the weights that were chosen",
    REAL_IMAGES: "real ones scored like samples: what a perfect copy of the training set gets",
}
METRICS = {
    "loss": "the denoising loss on fixed noise, averaged over all timesteps or over those of a range",
    "FD": "Fréchet distance between Gaussians fitted to the features of samples and of real images",
    "KID": "kernel distance between the same two sets of features",
    "IS": "inception score: how surely, and how evenly, the extractor's classes are told in the samples",
    "precision": "the share of samples that lie near a real image",
    "recall": "the share of real images that lie near a sample",
    "density": "how many neighbourhoods of real images a sample lies in, relative to the expected number",
    "CLIP": "CLIP score: how well an image fits its prompt, 100 max(cosine, 0) between a CLIP's embeddings of both",
    "coverage": "the share of real images with a sample in their neighbourhood",
    "latency": "milliseconds of sampling a batch, divided by the steps; text encoding and decoding, where a model has"
    " them, are in it",
}
EXTRACTORS = {
    "digits-cnn": "a small classifier of 8x8 digits that comes with deme-diffusion",
    "inception": "the Inception network of the usual FID",
}
SIGNS = {
    "θ": "the parameters of the base",
    "τ_i": "the task vector of expert i: its parameters less the base's",
    "w_i": "the weight of τ_i in the merge",
}
ARROWS = {"lower": " ↓", "higher": " ↑", None: ""}
BEST = (
    "↓ lower is better, ↑ higher is better; bold: the best model, whether or not the seeds can tell it from the next;"
    " of times only where the ranges of their repeats do not overlap."
)
SUBSET = "the timesteps that one expert is trained on; often one timestep range"
RANGE = "[a,b) are the timesteps a to b - 1; timestep 0 has the least noise"
Words = list[tuple[str, str]]


def words_of(run: Mapping[str, Any]) -> Words:
    """The words that a run's page uses, each with what it means."""
    rows: Sequence[Row] = run.get("table") or []
    return [*row_words(rows), *metric_words(rows), *_signs(run)]


def row_words(rows: Sequence[Row]) -> Words:
    """The models of a table that have a meaning of their own."""
    present = {row["model"] for row in rows}
    return [(model, said) for model, said in ROWS.items() if model in present]


def metric_words(rows: Sequence[Row]) -> Words:
    """The metrics of a table, and the extractors in their names."""
    names = metric_names(rows)
    first = dict.fromkeys(re.split(r"[ (]", name, maxsplit=1)[0] for name in names)
    found = [(word, METRICS[word]) for word in METRICS if word in first]
    found += [(name, f"the feature extractor: {said}") for name, said in _extractors(names)]
    return [*found, *((name, "the CLIP that the score is taken by") for name in _clips(names))]


def _clips(names: Sequence[str]) -> list[str]:
    scored = (re.match(r"CLIP\(([^)]+)\)", name) for name in names)
    return list(dict.fromkeys(found[1] for found in scored if found))


def _extractors(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    scored = (re.match(r"(?:FD|KID|IS)\(([^)]+)\)", name) for name in names)
    for name in dict.fromkeys(found[1] for found in scored if found):
        yield name, EXTRACTORS.get(name, "the network whose features of samples and real images are compared")


def _signs(run: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if run.get("division") or run.get("weights"):
        yield "subset", SUBSET
        yield "timestep range", RANGE
    if run.get("weights"):
        yield from SIGNS.items()


def spreads_said(rows: Sequence[Row]) -> Iterator[str]:
    """What ± is, by the figures that have one."""
    figures = [figure for row in rows for figure in row["metrics"].values() if figure["spread"] is not None]
    measured = [figure for figure in figures if "statistic" not in figure["protocol"]]
    trainings = max((len(figure["seeds"]) for figure in measured), default=0)
    samplings = max((_samplings(figure) for figure in measured), default=1)
    each = f", each the mean over its {samplings} sampling seeds" if samplings > 1 else ""
    if trainings > 1:
        yield f"± is the standard deviation over {trainings} training seeds{each}."
    elif trainings and samplings > 1:
        yield (
            f"± is the standard deviation over {samplings} sampling seeds of one training: what sampling alone makes of"
            " it, and nothing about another training."
        )
    elif trainings:
        yield "± is the standard deviation over seeds."
    if len(measured) < len(figures):
        yield "Of times: median ± half the range of the repeats."


def _samplings(figure: Figure) -> int:
    """Sampling seeds of each training: `3 training x 2 sampling`."""
    found = re.search(r"(\d+) sampling", str(figure["protocol"].get("seeds", "")))
    return int(found[1]) if found else 1
