"""The merged model of a finished run in a folder of its own, with its card: ready to upload. No torch."""

from __future__ import annotations

import io
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from deme_diffusion.artefacts import Artefact
from deme_diffusion.errors import UserError
from deme_diffusion.files import building, explained, require_space, write_bytes, write_json, write_text
from deme_diffusion.pipeline.evidence import IMAGES
from deme_diffusion.pipeline.node import MERGE
from deme_diffusion.pipeline.run import Run
from deme_diffusion.recipes import RESOLVED
from deme_diffusion.report.card import model_card
from deme_diffusion.report.figures import reduced, sample_grid
from deme_diffusion.weight_files import read_json

CARD, SAMPLES = "README.md", "samples.png"
COMMAND = f"deme run {RESOLVED}"
"""How the card says that the model was made: by its recipe, which stands there, wherever the run lies."""
LINKED = 2**20
"""Bytes from which a file is linked rather than copied: what is smaller, people edit in place."""
COLUMNS, SHOWN, SIDE, GAP = 8, 64, 128, 24
"""Of the grids of samples: images in a row and in all, the most pixels of each, and pixels between the two grids."""


@dataclass(frozen=True)
class Exported:
    """The folder, the files in it, and which of them are hard links into the store: never edit those in place."""

    folder: Path
    files: list[str]
    linked: list[str]


def export_merged(run: Run, out: Path) -> Exported:
    """Put the first seed's merged pipeline, card, `merge.json` and samples beside the base's into a new folder.

    Large files are hard links where that can be, else copies; no link leads into the store by its name, which a
    clean-up may empty. Raises UserError where there is no such model, or `out` exists or lies where a run would.
    """
    _check_place(run, out)
    artefact, content = _merged(run), run.content(run.rows())
    names = sorted(name for name in artefact.manifest["files"] if name not in (CARD, MERGE))
    require_space(out, sum(artefact.path(name).stat().st_size for name in names))
    with building(out) as folder:
        linked = [name for name in names if put(artefact.path(name), folder / name)]
        if MERGE in artefact.manifest["files"]:
            write_json(folder / MERGE, _without_places(read_json(artefact.path(MERGE))))
        shown = _samples(run)
        if shown is not None:
            write_bytes(folder / SAMPLES, shown)
        here = {"merged_path": f"OWNER/{out.name}", "base_path": "PATH/TO/THE/BASE", "command": COMMAND}
        write_text(folder / CARD, model_card({**content, **here}, samples=SAMPLES if shown else None))
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return Exported(out, files, linked)


def _without_places(record: dict[str, Any]) -> dict[str, Any]:
    """merge.json with its parents by digest alone: where they lie on this machine is nobody's business elsewhere."""
    base, experts = record["base"], record["experts"]
    parents = [{key: value for key, value in parent.items() if key != "path"} for parent in (base, *experts)]
    return {**record, "base": parents[0], "experts": parents[1:]}


def _check_place(run: Run, out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise UserError(f"--export {out}: it exists already; name a new folder")
    runs, parents = run.folder.resolve().parent, list((Path.cwd() / out).resolve().parents)
    if run.store.root.resolve() in parents:
        raise UserError(f"--export {out}: within the store, which deme clean empties; choose a folder elsewhere")
    if parents[0] == runs:  # deme clean would ask it what it needs
        raise UserError(
            f"--export {out}: among the runs, where every folder is one; as {run.folder / 'upload'} it may be"
        )


def _merged(run: Run) -> Artefact:
    node = run.graph.merged.get(run.recipe.seeds[0])
    if node is None:
        raise UserError(f"{run.folder}: merge.method=none merges nothing, so there is no model to export")
    artefact = run.store.find(node.key)
    if artefact is None:
        raise UserError(f"{run.folder}: {node.label} is not done; first: deme run {run.folder}")
    return artefact


def put(file: Path, at: Path) -> bool:
    """Bring a file to a place, and say whether it is a hard link; a copy where it is small, or there can be none."""
    with explained("write", at):
        at.parent.mkdir(parents=True, exist_ok=True)
        if file.stat().st_size >= LINKED:
            try:
                os.link(file.resolve(), at)
            except OSError:  # another disk, or one without links
                pass
            else:
                return True
        shutil.copyfile(file, at)
    return False


def _samples(run: Run) -> bytes | None:
    """The first images of base and merged model, the same seeds, side by side; None where they were not sampled."""
    import numpy as np

    seed, grids = run.recipe.seeds[0], []
    for name in ("base", "merged"):
        node = run.graph.samples.get((name, seed))
        artefact = None if node is None else run.store.find(node.key)
        if artefact is None:
            return None
        images = np.load(artefact.path(IMAGES), mmap_mode="r")[:SHOWN]
        grids.append(_grid(np.array(images)))
    high, wide = max(grid.height for grid in grids), sum(grid.width for grid in grids) + GAP
    both = Image.new("RGB", (wide, high), "white")
    both.paste(grids[0], (0, 0))
    both.paste(grids[1], (grids[0].width + GAP, 0))
    out = io.BytesIO()
    both.save(out, format="PNG", optimize=True)
    return out.getvalue()


def _grid(images: Any) -> Image.Image:
    small = reduced(images, SIDE) if images.shape[2] > SIDE else images
    return Image.open(io.BytesIO(sample_grid(small, COLUMNS, scale=max(1, SIDE // (2 * small.shape[2])))))
