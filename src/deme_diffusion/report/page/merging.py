"""Merge weights, how they were found, task vectors, and the division that they belong to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from deme_diffusion.division import names_of
from deme_diffusion.report.album import Album
from deme_diffusion.report.card import patterns
from deme_diffusion.report.cells import decimals_for, direction
from deme_diffusion.report.words import MOST_NAMED, bounded, grouped

BEST_TRIALS, MOST_TRIALS, MOST_CELLS = 10, 500, 20_000
"""Trials of a search that the page shows, and those that it holds: the others are folded, or in search.json alone.

Of many experts, as many as have so many weights.
"""
Run = Mapping[str, Any]


def _names(run: Run, count: int) -> list[str]:
    """The subsets by their ranges where the division is known, else w_0, w_1 ..."""
    names = names_of((run.get("division") or {}).get("subsets", []))
    return names if len(names) == count else [f"w_{i}" for i in range(count)]


def weights_section(run: Run, album: Album) -> dict[str, Any] | None:
    """The weights as bars and as numbers."""
    weights: Mapping[str, list[float]] = run.get("weights") or {}
    if not weights:
        return None
    from deme_diffusion.report.figures import weights_bars

    names = _names(run, max(map(len, weights.values())))
    image = album.svg(weights_bars(weights, names))
    return {"names": names, "values": weights, "image": image, "alt": _weights_told(weights, names)}


def _weights_told(weights: Mapping[str, Sequence[float]], names: Sequence[str]) -> str:
    """The bars as numbers, of many experts the least and greatest."""
    told = []
    for label, values in weights.items():
        if len(values) <= MOST_NAMED:
            each = ", ".join(f"{value:.3g} for {name}" for name, value in zip(names, values, strict=True))
        else:
            each = f"{len(values)} weights from {min(values):.3g} to {max(values):.3g}, sum {math.fsum(values):.3g}"
        told.append(f"{label} {each}")
    return f"Merge weights by subset of the timesteps: {bounded(told)}"


def search_section(run: Run) -> dict[str, Any] | None:
    """The search's trials, the best first (lowest, unless the objective is known to be better when higher)."""
    search = run.get("search")
    if not search or not search.get("trials"):
        return None
    trials = search["trials"]
    sign = -1 if direction(search["objective"]) == "higher" else 1
    worth = [math.inf if trial["value"] is None else sign * trial["value"] for trial in trials]
    order = sorted(range(len(trials)), key=lambda i: worth[i])  # of equals the first was chosen
    names = _names(run, max(len(trial["weights"]) for trial in trials))
    decimals = 1 + decimals_for(trial["value"] for trial in trials if trial["value"] is not None)
    most = max(BEST_TRIALS, min(MOST_TRIALS, MOST_CELLS // len(names)))
    rows = [{**trials[i], "said": _said(trials[i]["value"], decimals)} for i in order[:most]]
    more = {"unfinished": False, "folded": rows[BEST_TRIALS:], "left_out": len(trials) - len(rows)}
    words = {"method": str(search["method"]).replace("_", " "), "objective": grouped(search["objective"])}
    return {**more, **search, **words, "names": names, "shown": rows[:BEST_TRIALS]}


def _said(value: float | None, decimals: int) -> str:
    """A trial's value; weights of which none comes are unusable."""
    return "unusable" if value is None else f"{value:.{decimals}f}"


def patterns_section(run: Run) -> dict[str, Any]:
    """Weights of parameters that have their own, as many as the page holds; how many more there are."""
    listed = patterns(run)
    most = MOST_CELLS // max(1, max((len(said.split(",")) for _, said in listed), default=1))
    return {"patterns": listed[:most], "left_out": max(0, len(listed) - most)}


def vectors_section(run: Run) -> dict[str, Any] | None:
    """The task vectors by layer group, from merge.json: relative norms in %, means over pairs of cosine and overlap."""
    seen = (run.get("merge") or {}).get("statistics")
    if not seen:
        return None
    rows = []
    for group, one in {**seen["groups"], "all of the model": seen["model"]}.items():
        norms = ["-" if norm is None else f"{100 * norm:.3g}" for norm in one["relative_norms"]]
        alike = (_off_diagonal(one["cosines"]), _off_diagonal(one["overlaps"]))
        label = "projections (their θ is 0)" if group == "projection" else group
        rows.append((label, f"{one['parameters']:,}", norms, *alike))
    return {"names": _names(run, len(seen["model"]["norms"])), "rows": rows, "apart": _apart(run)}


def _apart(run: Run) -> str:
    """Why these norms are not those of the figure `vectors`, where there are projections."""
    if "projection" not in run["merge"]["statistics"]["groups"]:
        return ""
    drawn = [one.get("kind") for one in run.get("figures") or () if isinstance(one, Mapping)]
    beside = "; the figures below have them folded in, and so other norms" if "vectors" in drawn else ""
    return f" Projections are counted apart{beside}."


def _off_diagonal(matrix: Sequence[Sequence[float | None]]) -> str:
    """The mean over pairs; those of a task vector that is 0 have no value."""
    pairs = [value for i, row in enumerate(matrix) for value in row[:i] if value is not None]
    return f"{sum(pairs) / len(pairs):.3f}" if pairs else "-"


def division_section(run: Run, album: Album) -> dict[str, Any] | None:
    """Which timesteps each expert is trained on, as bands."""
    division = run.get("division")
    if not division:
        return None
    from deme_diffusion.report.figures import division_picture, division_tables

    picture, total = division_picture(*division_tables(division)), division["num_train_timesteps"]
    told = bounded(f"expert {i} on {name}" for i, name in enumerate(names_of(division["subsets"])))
    alt = f"Which of the {total:,} timesteps each expert is trained on: {told}"
    return {"image": album.svg(picture), "alt": alt}
