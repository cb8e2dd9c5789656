"""A run's content with everything that a page shows, every text of which is hostile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ablations import published
from deme_diffusion.config import FIGURES

EVIL = "<script>alert(1)</script>"
SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 70 32" width="7in" height="3.2in">'
    '<rect width="70" height="32" fill="#0072B2"/>{}</svg>'
)
RANGES = ("[0,6)", "[6,12)")


def figure(mean: float | None, spread: float | None, **protocol: Any) -> dict[str, Any]:
    """A cell of three seeds, or of one without a spread."""
    seeds = [0, 1, 2] if spread is not None else [0]
    return {"mean": mean, "spread": spread, "n": 2000, "seeds": seeds, "protocol": {"split": "report", **protocol}}


def losses(*means: float, spread: float | None = None) -> dict[str, Any]:
    """The loss on each range."""
    return {f"loss {name}": figure(mean, spread) for name, mean in zip(RANGES, means, strict=True)}


def table() -> list[dict[str, Any]]:
    """Base, control, ensemble and merged, and one model of a hostile name."""
    values = {"base": 6.3, "all-timesteps": 6.1, "ensemble": 6.2, "merged": 5.9, f'"onload="x{EVIL}': 7.0}
    rows = []
    for i, (model, mean) in enumerate(values.items()):
        spread = None if model == "base" else 0.001
        metrics = {"loss": figure(0.1, None), **losses(0.2 - i / 100, 0.02 + i / 1000, spread=spread)}
        metrics |= {f"{score} {sampler}": figure(mean, 0.1, sampler=sampler) for score in ("FD(digits-cnn)", "recall")
                    for sampler in ("DDIM-20", "DDPM-50")}  # fmt: skip
        rows.append({"model": model, "metrics": metrics})
    return rows


def picture(folder: Path, kind: str, padding: int = 0, side: int = 64) -> dict[str, Any]:
    """A figure on disk, its SVG as heavy as asked for."""
    (folder / "figures").mkdir(exist_ok=True)
    (folder / f"figures/{kind}.svg").write_text(SVG.format(f"<!--{'x' * padding}-->"))
    noise = np.random.default_rng(0).integers(0, 256, (side, 2 * side, 3), np.uint8)
    Image.fromarray(noise).save(folder / f"figures/{kind}.png")
    said = {"title": f"{kind} {EVIL}", "caption": f"Cosine 0.12. {EVIL}", "alt": f"A blue field {EVIL}"}
    files = {"svg": f"figures/{kind}.svg", "png": f"figures/{kind}.png", "data": [f"figures/{kind}.npz"]}
    return {"kind": kind, "name": kind, "width": 7.0, "height": 3.2, **said, **files}


def stages() -> list[dict[str, Any]]:
    """Two experts, the control, and stages in other states."""
    made = {"stage": "decouple", "digest": "0123456789abcdef", "seconds": 125.4, "reused": False, "steps": 600}
    labels = (f"expert 0 {RANGES[0]}", f"expert 1 {RANGES[1]}")
    return [
        *({**made, "label": label} for label in labels),
        {**made, "label": "all-timesteps", "steps": 1200, "reused": True},
        {"stage": "sample", "digest": EVIL, "label": f"sample {EVIL}", "state": "running"},
        {"stage": "evaluate", "digest": "b" * 16, "label": "evaluate merged"},
    ]


def content(folder: Path, kinds: tuple[str, ...] = FIGURES) -> dict[str, Any]:
    """A run in this folder, with the figures of these kinds."""
    for name in ("base", "merged"):
        np.save(folder / f"{name}.npy", np.random.default_rng(1).integers(0, 256, (64, 8, 8, 1), np.uint8))
    series = {f"expert {i} {EVIL}": [[step, 0.2 / (step + i + 1)] for step in range(50)] for i in range(6)}
    return {
        "recipe": EVIL,
        "description": f"</p>{EVIL}",
        "demonstration": True,
        "command": f"deme run {EVIL} " + "decouple.num_ranges=2 " * 12,
        "recipe_yaml": f"name: '{EVIL}'\nlong: {'y' * 300}\n",
        "table": table(),
        "stages": stages(),
        "provenance": {"python": "3.11", EVIL: EVIL, "gpus": ["NVIDIA H100, 81559 MiB"], "git": None},
        "division": {"subsets": [[[0, 6]], [[6, 12]]], "route": [[0, 6, 0], [6, 12, 1]], "num_train_timesteps": 12},
        "weights": {"merged": [0.4, 0.1], f"merged {EVIL}": [0.5, 0.5]},
        "search": {
            "method": "grid",
            "objective": f"FD {EVIL}",
            "trials": [{"weights": [0.4, i / 100], "source": f"trial {i} {EVIL}", "value": 6 + i} for i in range(14)],
        },
        "curves": {"training loss": series, f"validation {EVIL}": series},
        "grids": {"base": "base.npy", "merged": "merged.npy", EVIL: "<img src=x onerror=alert(1)>.npy"},
        "base_model": f"hub/{EVIL}",
        "merged_path": f'runs/"{EVIL}/{"long" * 40}',
        "ablations": [{**published(), "plan": EVIL, "discussion": f"Why? {EVIL}"}],
        "figures": [picture(folder, kind) for kind in kinds],
    }
