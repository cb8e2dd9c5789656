"""The division of a recipe: by its settings, the base's schedule, and gradients where they were compared. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from deme_diffusion.artefacts import Store
from deme_diffusion.config import Recipe, TrainSettings
from deme_diffusion.division import Division, uniform
from deme_diffusion.divisions import DIVISIONS, Facts, Similarity
from deme_diffusion.errors import UserError
from deme_diffusion.evaluation.samplers import OF_FLOWS
from deme_diffusion.files import part_of
from deme_diffusion.pipeline.inputs import SCHEDULER, Input, timesteps_of
from deme_diffusion.pipeline.node import SIMILARITY, Node
from deme_diffusion.schedule import (
    UNBOUNDED,
    check_weighting,
    flow_sigmas,
    in_sigma,
    prediction_of,
    signal_to_noise,
)
from deme_diffusion.similarity_file import read_similarity
from deme_diffusion.weight_files import read_json

MOST_RUNS = 3
"""Of a subset that is told by its sigmas."""
BY_GRADIENTS = "gradient_similarity"


def compares(recipe: Recipe) -> bool:
    """Whether the division needs the base's gradients, and no file holds their similarities."""
    settings = recipe.decouple
    return settings.division == BY_GRADIENTS and settings.similarity_file is None and settings.num_ranges > 1


def compared_in(store: Store | None, node: Node | None) -> Path | None:
    """The similarities that a stage left in a store; None where it was not made yet."""
    done = store is not None and node is not None and store.status(node.key) == "done"
    return store.folder(node.key) / SIMILARITY if done and store and node else None


def division_of(recipe: Recipe, base: Node | Input, compared: Path | None) -> Division:
    """The recipe's division of the base's timesteps; a uniform one while it waits for gradients to be compared.

    Raises UserError when N does not fit, or a similarity file is none.
    """
    settings, timesteps = recipe.decouple, timesteps_in(recipe, base)
    if settings.num_ranges == 1:
        return uniform(1, timesteps)
    similarity: Similarity | None = None
    if settings.division == BY_GRADIENTS:
        if settings.similarity_file is not None:
            similarity = read_similarity(Path(settings.similarity_file).expanduser(), timesteps)
        elif compared is not None:
            similarity = read_similarity(compared, timesteps, key="similarity")
        else:
            return _to_come(recipe, timesteps)
    facts = Facts(timesteps, lambda: snr_of(recipe, base), similarity)
    return DIVISIONS[settings.division](settings, facts)


def _to_come(recipe: Recipe, timesteps: int) -> Division:
    """What stands for a division by gradients that were not compared yet, where there are bins enough for it."""
    ranges, bins = recipe.decouple.num_ranges, recipe.similarity.bins
    uniform(bins, timesteps, key="similarity.bins")
    if bins < ranges:
        raise UserError(f"similarity.bins: {bins}; decouple.num_ranges={ranges} ranges need as many bins, or more")
    return uniform(ranges, timesteps)


def timesteps_in(recipe: Recipe, base: Node | Input) -> int:
    """T."""
    return recipe.pretrain.scheduler.num_train_timesteps if isinstance(base, Node) else timesteps_of(base)


def snr_of(recipe: Recipe, base: Node | Input) -> npt.NDArray[np.float64]:
    """(T,) SNR of the base's schedule; of a hub model that a dry run has not downloaded, diffusers' default."""
    config, where = schedule_of(recipe, base)
    return signal_to_noise(config, where=where)


def schedule_of(recipe: Recipe, base: Node | Input) -> tuple[Mapping[str, Any], str]:
    """The scheduler's configuration of a base, and where it stands."""
    if isinstance(base, Node):
        return recipe.pretrain.scheduler.model_dump(), "pretrain.scheduler"
    if base.path is None:
        return ({"_class_name": OF_FLOWS[0]} if recipe.model.flow else {}), "scheduler"
    file = part_of(base.path, "scheduler") / SCHEDULER
    return read_json(file), str(file)


def check_weightings(recipe: Recipe, base: Node | Input) -> None:
    """Raises UserError for a loss weighting that has no finite weight in the base's schedule."""
    trained: dict[str, TrainSettings] = {"decouple": recipe.decouple}
    trained |= {"pretrain": recipe.pretrain} if isinstance(base, Node) else {}
    for name, settings in trained.items():
        if settings.loss_weighting in UNBOUNDED:
            predicts = prediction_of(schedule_of(recipe, base)[0])
            check_weighting(settings.loss_weighting, snr_of(recipe, base), predicts, key=f"{name}.loss_weighting")


def in_sigmas(recipe: Recipe, base: Node | Input, division: Division) -> list[str]:
    """Each expert's subset by its sigmas, where the family matches flows and the base is on this machine; else none."""
    if not recipe.model.flow or isinstance(base, Node) or base.path is None:
        return []
    config, where = schedule_of(recipe, base)
    sigmas = flow_sigmas(config, where=where)
    subsets = [division.subset(i) for i in range(division.num_experts)]
    return [in_sigma(sigmas, runs) if len(runs) <= MOST_RUNS else f"{len(runs)} runs" for runs in subsets]


def remarks(recipe: Recipe, base: Node | Input, division: Division) -> list[str]:
    """What a reader should know of a division that is as the settings say, and perhaps not as they were meant."""
    settings, sizes = recipe.decouple, division.member.sum(axis=1)
    named = [f"expert {i} {sigmas}" for i, sigmas in enumerate(in_sigmas(recipe, base, division))]
    said = [f"in sigma: {', '.join(named)}"] if named else []
    if sizes.min() == 1 < sizes.max():
        alone = ", ".join(map(str, np.flatnonzero(sizes == 1)))
        said.append(f"division={settings.division}: of expert {alone}, the subset is one timestep")
    asked = settings.division == "overlapping" and settings.overlap > 0 and division.num_experts > 1
    if asked and (division.member.sum(axis=0) == 1).all():
        said.append(f"decouple.overlap={settings.overlap:g} of {sizes.min()} timesteps is none: nothing overlaps")
    return said


def inner_edges(division: Division) -> tuple[int, ...]:
    """The N - 1 timesteps at which a new range begins, of a division into contiguous ranges."""
    return tuple(division.subset(index)[0][0] for index in range(1, division.num_experts))
