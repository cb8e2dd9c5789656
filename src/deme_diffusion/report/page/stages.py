"""The stages of a run with state, steps and time; what it was made by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

STATES = ("done", "reused", "running", "waiting", "failed")
"""What a stage may be; one that tells no `state` is done, reused or waiting by its seconds."""
FINISHED = ("done", "reused")
MOST_VALUES = 4  # of a run whose stages were made by many versions or on many machines


def stages_section(run: Mapping[str, Any]) -> dict[str, Any] | None:
    """Every stage, and a sentence on all of them."""
    stages = [_stage(given) for given in run.get("stages") or ()]
    return {"stages": stages, "said": _said(stages)} if stages else None


def state_of(given: Mapping[str, Any]) -> str:
    """One of `STATES`."""
    waiting = given.get("seconds") is None
    return given.get("state") or ("waiting" if waiting else "reused" if given.get("reused") else "done")


def _stage(given: Mapping[str, Any]) -> dict[str, Any]:
    known = given.get("seconds")
    return {
        "label": given.get("label") or given["stage"],
        "state": state_of(given),
        "steps": given.get("progress") or (f"{given['steps']:,}" if given.get("steps") else ""),
        "time": "" if known is None else seconds(known),
        "seconds": known or 0.0,
        "digest": str(given.get("digest") or ""),
    }


def _said(stages: list[dict[str, Any]]) -> str:
    """`12 of 30 stages are there, 1 running; making them took 4 min 05 s in all: 3 min ... found in the store.`"""
    count = Counter(stage["state"] for stage in stages)
    there = count["done"] + count["reused"]
    parts = [f"{there} of {len(stages)} stages are there"]
    parts += [f"{count[state]} {state}" for state in ("running", "waiting", "failed") if count[state]]
    took = {state: sum(stage["seconds"] for stage in stages if stage["state"] == state) for state in FINISHED}
    own, found = (f"{seconds(took[state])} for the {count[state]} that" for state in FINISHED)
    split = f": {own} the last command made, {found} it found in the store" if count["reused"] else ""
    return f"{', '.join(parts)}; making them took {seconds(sum(took.values()))} in all{split}."


def seconds(value: float) -> str:
    """Seconds for people: 4.2 s, 3 min 05 s, 2 h 10 min."""
    if value < 100:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def provenance_section(given: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What made the run, for each machine and software by itself where their stages are counted."""
    several = [given] if isinstance(given, Mapping) else list(given)
    groups = [[one] for one in several[:MOST_VALUES]] if all("stages" in one for one in several) else [several]
    more = len(several) - MOST_VALUES if len(groups) == MOST_VALUES else 0
    made = []
    for group in groups:
        count = group[0].get("stages") if group and len(groups) > 1 else None
        lines = list(provenance_lines([{k: v for k, v in one.items() if k != "stages"} for one in group]))
        title = "" if count is None else f"{count} stage{'s' if count != 1 else ''}"
        made += [{"title": title, "lines": lines}] if lines else []
    return made + ([{"title": f"and {more} more", "lines": []}] if more > 0 else [])


def provenance_lines(given: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """What made the run, or each of its stages: a name and its values; what could not be found out is left out."""
    several = [given] if isinstance(given, Mapping) else given
    for name in dict.fromkeys(name for one in several for name in one):
        told = [text for text in dict.fromkeys(_told(one.get(name)) for one in several) if text]
        if told:
            more = f" and {len(told) - MOST_VALUES} more" if len(told) > MOST_VALUES else ""
            yield name.replace("_", " "), "; ".join(told[:MOST_VALUES]) + more


def _told(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {inner}" for key, inner in value.items() if inner is not None)
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)
