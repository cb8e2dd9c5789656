"""Several runs side by side, as data: what differs in the recipes, what each found, and what may be compared."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from deme_diffusion.division import names_of
from deme_diffusion.report.cells import Figure, Row, compact, direction, metric_names
from deme_diffusion.report.page.losses import PREFIX
from deme_diffusion.report.paired import margin_of, paired_differences
from deme_diffusion.report.verdict import verdict

MOST_RUNS = 8
TIMES = ("latency", "load time")
"""Metrics that say something of a machine, and are compared on the same one only."""
UNTOLD = ("name", "description", "demonstration")
"""Settings of a recipe that are no difference between two."""
Run = Mapping[str, Any]


def comparison(runs: Sequence[Run]) -> dict[str, Any]:
    """The comparison as plain JSON; `runs` are the contents of their pages (`Evidence.content`), with table."""
    labels = names(runs)
    return {
        "runs": [_run(run, label) for run, label in zip(runs, labels, strict=True)],
        "settings": differing(runs),
        "metrics": [line(runs, metric) for metric in _metrics(runs)],
        "weights": [dict(run.get("weights") or {}) for run in runs],
    }


def names(runs: Sequence[Run]) -> list[str]:
    """How the runs are called: by their folders, with as much of the path as tells them apart."""
    parts = [Path(run["folder"]).absolute().parts for run in runs]
    for depth in range(1, max(map(len, parts)) + 1):
        told = ["/".join(part[-depth:]) for part in parts]
        if len(set(told)) == len(told):
            return told
    return [f"{name} ({i})" for i, name in enumerate(told, 1)]


def _run(run: Run, label: str) -> dict[str, Any]:
    said = verdict(run["table"])
    return {
        "name": label,
        "recipe": run["recipe"],
        "folder": run["folder"],
        "outcome": run["outcome"],
        "ranges": names_of(run["division"]["subsets"]),
        "verdict": said.sentence,
        "helps": said.helps,
        "command": run["command"],
        "rerun": run["rerun"],
    }


# -- recipes --------------------------------------------------------------------------------------


def differing(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The settings that are not equal in all runs: `key`, and a value for each run (None where it has no such key)."""
    flat = [dict(_settings(yaml.safe_load(run["recipe_yaml"]))) for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings if key not in UNTOLD)
    values = ((key, [settings.get(key) for settings in flat]) for key in keys)
    return [{"key": key, "values": told} for key, told in values if len(set(map(compact, told))) > 1]


def _settings(value: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys; sections in lists by their number."""
    for name, inner in value.items():
        key = f"{above}{name}"
        if isinstance(inner, list) and inner and all(isinstance(one, Mapping) for one in inner):
            inner = {str(i): one for i, one in enumerate(inner)}
        if isinstance(inner, Mapping) and inner:
            yield from _settings(inner, f"{key}.")
        else:
            yield key, inner


# -- the table ------------------------------------------------------------------------------------


def _metrics(runs: Sequence[Run]) -> list[str]:
    """Those of base and outcome, in order of appearance; losses of single ranges are told by themselves."""
    found = dict.fromkeys(metric for run in runs for metric in metric_names([row for row in ends(run) if row]))
    return [metric for metric in found if not metric.startswith(PREFIX)]


def ends(run: Run) -> tuple[Row | None, Row | None]:
    """The rows of the base and of what the run is about."""
    rows = {row["model"]: row for row in run["table"]}
    return rows.get("base"), rows.get(run["outcome"])


def line(runs: Sequence[Run], metric: str) -> dict[str, Any]:
    """One metric in every run: base, outcome, their difference; and why the runs are not compared in it, if so."""
    pairs = [tuple(row["metrics"].get(metric) if row else None for row in ends(run)) for run in runs]
    cells = [{"base": base, "outcome": outcome, "difference": difference(base, outcome)} for base, outcome in pairs]
    return {"metric": metric, "better": direction(metric), "unlike": unlike(runs, metric), "runs": cells}


def difference(base: Figure | None, outcome: Figure | None) -> dict[str, float | None] | None:
    """outcome - base, and half the 95% interval of paired seeds where there are several that differ."""
    if base is None or outcome is None or base["mean"] is None or outcome["mean"] is None:
        return None
    pairs = paired_differences(outcome, base)
    margin = margin_of(pairs) if pairs else None
    mean = outcome["mean"] - base["mean"]
    return {"mean": mean if math.isfinite(mean) else None, "margin": margin}


def unlike(runs: Sequence[Run], metric: str) -> dict[str, list[Any]]:
    """Fields of a metric's protocol that are not equal in the runs that have it, with each run's value."""
    protocols = [protocol_of(run, metric) for run in runs]
    known = [protocol for protocol in protocols if protocol is not None]
    fields = dict.fromkeys(field for protocol in known for field in protocol)
    different = [field for field in fields if len({compact(protocol.get(field)) for protocol in known}) > 1]
    found = {field: [None if one is None else one.get(field) for one in protocols] for field in different}
    return found | (_machines(runs, protocols) if metric.startswith(TIMES) and len(known) > 1 else {})


def _machines(runs: Sequence[Run], protocols: Sequence[Mapping[str, Any] | None]) -> dict[str, list[Any]]:
    """Where times were taken, unless all are known to be of the same machine."""
    told = [
        None if one is None else run.get("cost_machine") or "unknown" for run, one in zip(runs, protocols, strict=True)
    ]
    machines = set(told) - {None}
    return {} if len(machines) == 1 and "unknown" not in machines else {"machine": told}


def protocol_of(run: Run, metric: str) -> dict[str, Any] | None:
    """How a run measured a metric: of the outcome, else of the base; None where it did not."""
    figures = [figure for row in reversed(ends(run)) if row and (figure := row["metrics"].get(metric))]
    return next((figure["protocol"] for figure in figures if figure["mean"] is not None), None)
