"""The YAML front matter of a model card, as model hubs read it: what the model is, its base, its measured results."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from deme_diffusion.report.cells import Figure, direction
from deme_diffusion.report.usage import task_of

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
TAGS = ["diffusers", "diffusion", "model-merging", "decouple-then-merge", "deme-diffusion"]
TYPES = {"KID": "kid", "IS": "inception-score", "CLIP": "clip_score"}
"""Hub names of metrics; others are named by their first word."""
COSTS = ("parameters", "latency", "load time", "peak memory", "disk")
LICENSE = "# license: set it before you publish; the base model's terms apply to this one too"
Run = Mapping[str, Any]


def front_matter(run: Run) -> str:
    """The block between the dashes; the licence is the user's to state, so that it is a comment."""
    front: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": task_of(run)}
    if base := _hub_name(run.get("base_model_hub")):
        front |= {"base_model": base, "base_model_relation": "adapter" if run.get("lora") else "finetune"}
    if data := _hub_data(run):
        front["datasets"] = [data]
    front["tags"] = [*TAGS, *run.get("tags", ()), *(["lora"] if run.get("lora") else [])]
    if results := list(_results(run)):
        front["model-index"] = [{"name": str(run.get("recipe") or "merged"), "results": results}]
    text = yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=100)
    return f"---\n{text}{LICENSE}\n---"


def _hub_name(value: object) -> str | None:
    return value if isinstance(value, str) and HUB_NAME.fullmatch(value) else None


def _recipe(run: Run) -> dict[str, Any]:
    """The recipe's plain values; none where they cannot be read."""
    with contextlib.suppress(yaml.YAMLError):
        values = yaml.safe_load(run.get("recipe_yaml") or "")
        return values if isinstance(values, dict) else {}
    return {}


def _hub_data(run: Run) -> str | None:
    data = _recipe(run).get("data") or {}
    return _hub_name(data.get("path")) if data.get("source") == "hub" else None


def _results(run: Run) -> Iterator[dict[str, Any]]:
    """The merged model's losses and scores, by the split that they were taken on."""
    rows = (row for row in run.get("table") or () if row["model"] == "merged")
    merged: Mapping[str, Figure] = next((row["metrics"] for row in rows), {})
    by_split: dict[str | None, list[dict[str, Any]]] = {}
    for name, figure in merged.items():
        if direction(name) and not name.startswith(COSTS) and _finite(figure):
            by_split.setdefault(figure["protocol"].get("split"), []).append(_metric(name, figure))
    source = (_recipe(run).get("data") or {}).get("source") or "images"
    data = _hub_data(run) or source
    for split, metrics in by_split.items():
        dataset = {"type": data, "name": data if split is None else f"{data}, {split} split"}
        where = {} if split is None else {"split": split}
        yield {"task": {"type": task_of(run)}, "dataset": {**dataset, **where}, "metrics": metrics}


def _finite(figure: Figure) -> bool:
    return figure["mean"] is not None and math.isfinite(figure["mean"])


def _metric(name: str, figure: Figure) -> dict[str, Any]:
    """One value: with its spread and number of images, where they are known, as the metric's arguments."""
    told = {"spread": _rounded(figure["spread"]), "n": figure["n"] if figure["n"] > 1 else None}
    known = {key: value for key, value in told.items() if value is not None}
    metric = {"type": _type(name), "name": name, "value": _rounded(figure["mean"])}
    return {**metric, "args": known} if known else metric


def _rounded(value: float | None) -> float | None:
    """Six significant digits, which is more than any of these metrics has."""
    return value if value is None or isinstance(value, int) else float(f"{value:.6g}")


def _type(name: str) -> str:
    """`fid` only of the Inception network that the name stands for."""
    word = re.split(r"[ (]", name, maxsplit=1)[0]
    if word == "FD":
        return "fid" if name.startswith("FD(inception") else "frechet-distance"
    return TYPES.get(word, word.lower())
