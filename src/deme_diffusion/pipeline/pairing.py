"""The experts of a division into two ranges as one stock pipeline that changes between them. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deme_diffusion.artefacts import Artefact
from deme_diffusion.errors import UserError
from deme_diffusion.files import building, part_of, require_space, visible_files, write_json
from deme_diffusion.lora_files import find_lora
from deme_diffusion.merging.checkpoints import MODEL_INDEX, parts
from deme_diffusion.merging.pairs import BOUNDARY, HIGH, LOW, boundary_ratio, check_family
from deme_diffusion.pipeline.dividing import schedule_of
from deme_diffusion.pipeline.exporting import put
from deme_diffusion.pipeline.inputs import Input
from deme_diffusion.pipeline.node import MERGE
from deme_diffusion.pipeline.run import Run
from deme_diffusion.schedule import flow_sigmas
from deme_diffusion.weight_files import PROJECTIONS, read_json

RECORD = "pair.json"


@dataclass(frozen=True)
class Pair:
    """The folder, where it changes from one expert to the other, and which files are hard links."""

    folder: Path
    boundary_ratio: float
    record: dict[str, Any]
    linked: list[str]


def export_pair(run: Run, out: Path) -> Pair:
    """Put the first seed's two experts with the base's other parts into a new folder that stock diffusers loads.

    Large files are hard links where that can be, else copies. Raises UserError where there is no such pair: another
    family or division, experts that are not done, or no whole stock models.
    """
    check_family(run.recipe.model.family)
    if out.exists() or out.is_symlink():
        raise UserError(f"--out {out}: it exists already; name a new folder")
    base = run.graph.base
    assert isinstance(base, Input), "a family with a pair is not trained from scratch"
    if base.path is None:
        raise UserError(f"{base.label}: not on this machine, and a pair needs its parts; first: deme run {run.folder}")
    config, where = schedule_of(run.recipe, base)
    ratio = boundary_ratio(run.graph.division, config, where=where)
    experts = _experts(run)
    own = part_of(base.folder, HIGH)
    made = [(expert, name) for expert, name in zip(experts, (LOW, HIGH), strict=True) if not _is_whole(expert)]
    sources = [(base.folder / name, name) for name in parts(base.folder) if name not in (LOW, HIGH)]
    sources += [
        (part_of(expert.folder, HIGH), name)
        for expert, name in zip(experts, (LOW, HIGH), strict=True)
        if (expert, name) not in made
    ]
    files = [(file, Path(name) / file.relative_to(folder)) for folder, name in sources for file in _files(folder)]
    sizes = [file.stat().st_size for file, _ in files] + len(made) * [file.stat().st_size for file in _files(own)]
    require_space(out, sum(sizes))
    record = _record(run, base, experts, ratio, config)
    with building(out) as folder:
        linked = [name.as_posix() for file, name in files if put(file, folder / name)]
        for expert, name in made:
            _write_whole(own, expert, folder / name)
        write_json(folder / MODEL_INDEX, _index(read_json(base.folder / MODEL_INDEX), ratio))
        write_json(folder / RECORD, record)
    return Pair(out, ratio, record, linked)


def _files(folder: Path) -> list[Path]:
    return list(visible_files(folder)) if folder.is_dir() else []


def _experts(run: Run) -> list[Artefact]:
    """The two experts of the first seed, whole stock models each."""
    found = []
    for node in run.graph.experts[run.recipe.seeds[0]]:
        artefact = run.store.find(node.key)
        if artefact is None:
            raise UserError(f"{run.folder}: {node.label} is not done; first: deme decouple {run.folder}")
        found.append(artefact)
    return found


def _is_whole(expert: Artefact) -> bool:
    """Whether an expert's folder holds a stock component: neither a LoRA nor one with projections beside it."""
    return find_lora(expert.folder) is None and not (part_of(expert.folder, HIGH) / PROJECTIONS).is_file()


def _write_whole(base: Path, expert: Artefact, out: Path) -> None:
    """An expert as a stock component: its LoRA fused, its projections folded. UserError where they do not fold."""
    from deme_diffusion.merging.perform import performed
    from deme_diffusion.merging.request import requested

    adapted = find_lora(expert.folder) is not None
    source = expert.folder if adapted else part_of(expert.folder, HIGH)
    performed(requested(base, [source], out, weights=[1.0], fuse=adapted))
    if (out / PROJECTIONS).is_file():
        raise UserError(f"{expert.folder}: projections that do not fold, which no pair holds; use projection=none")
    (out / MERGE).unlink()


def _index(base: dict[str, Any], ratio: float) -> dict[str, Any]:
    """The base's model_index.json with a second transformer of the same class."""
    return {**base, LOW: base[HIGH], BOUNDARY: ratio}


def _record(run: Run, base: Input, experts: list[Artefact], ratio: float, config: Any) -> dict[str, Any]:
    """What the folder was made of: provenance by digest, and the boundary in every unit."""
    division, edge = run.graph.division, run.graph.division.served(1)[0][0]
    return {
        "base": {"digest": base.digest, **({"hub": base.label} if base.commit else {})},
        "experts": [
            {"part": name, "stage": expert.folder.name, "timesteps": division.served(i)}
            for i, (expert, name) in enumerate(zip(experts, (LOW, HIGH), strict=True))
        ],
        "num_train_timesteps": division.num_timesteps,
        "first_timestep_of_transformer": edge,
        "first_sigma_of_transformer": float(flow_sigmas(config)[edge]),
        BOUNDARY: ratio,
    }
