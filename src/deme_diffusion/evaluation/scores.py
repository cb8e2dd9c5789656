"""All image metrics of one set of samples against one reference, and statistics that others published. No torch."""

from __future__ import annotations

import functools
import logging
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from deme_diffusion.errors import UserError
from deme_diffusion.evaluation.manifold import manifold_scores
from deme_diffusion.evaluation.metrics import (
    Statistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    statistics,
)
from deme_diffusion.files import replacing

log = logging.getLogger(__name__)
Features = npt.NDArray[np.float32]
STATISTICS = "statistics.npz"
PUBLISHED = "FD published"
SPLITS = 10
"""Of the Inception score, as published."""
MOST_NEIGHBOURS_IMAGES = 10_000
"""Precision, recall, density, coverage take all pairs of images: beyond this many of a set, those of the first ones."""


def score_images(
    reference: Features,
    generated: Features,
    *,
    neighbours: int,
    density_neighbours: int = 5,
    manifold: Features | None = None,
    fitted: Statistics | None = None,
    published: Statistics | None = None,
    logits: Features | None = None,
) -> dict[str, float]:
    """FD, KID of features (n, d) against the reference's (m, d); precision to coverage against the manifold's (k, d).

    The manifold holds distinct real images (all of the reference by default): among augmented views of one image, the
    nearest neighbours are that image again. `fitted` are the reference's statistics, where they are known already. With
    `published` statistics there is a second FD, with class `logits` (n, c) an Inception score.
    """
    manifold = reference if manifold is None else manifold
    own, fitted = statistics(generated), fitted or statistics(reference)
    for what, n in (("the generated", own.n), ("the reference", fitted.n)):
        if n is not None and n <= own.mean.size:
            _warn_few(what, n, own.mean.size)
    scores: dict[str, float] = {"FD": frechet_distance(own, fitted)}
    if published is not None:
        scores[PUBLISHED] = frechet_distance(own, published)
    scores["KID"] = kernel_distance(reference, generated)[0]
    scores |= manifold_scores(
        manifold[:MOST_NEIGHBOURS_IMAGES],
        generated[:MOST_NEIGHBOURS_IMAGES],
        neighbours=neighbours,
        density_neighbours=density_neighbours,
    )
    if logits is not None:
        scores["IS"], scores["IS deviation"] = inception_score(logits, splits=SPLITS)
    return scores | {"n": len(generated)}


@functools.cache
def _warn_few(what: str, n: int, d: int) -> None:
    """Once for each size: a covariance of n <= d images is singular."""
    log.warning("FD: %s images are %d for features of dimension %d; with so few it is very biased", what, n, d)


def save_statistics(folder: Path, fitted: Statistics) -> None:
    """Beside the features that they were fitted to."""
    with replacing(folder / STATISTICS) as file:
        np.savez(file, mu=fitted.mean, sigma=fitted.covariance, n=np.asarray(fitted.n))


def load_statistics(folder: Path) -> Statistics:
    """What `save_statistics` left."""
    with np.load(folder / STATISTICS) as stored:
        return Statistics(mean=stored["mu"], covariance=stored["sigma"], n=int(stored["n"]))


def published_statistics(file: Path, *, key: str, dimension: int | None = None) -> Statistics:
    """`mu` (d,) and `sigma` (d, d) of an .npz as clean-fid, pytorch-fid and EDM publish them.

    Raises UserError, which begins with `key`, where they are not there, not of this form, or not of `dimension`.
    """
    arrays = _arrays(file, key)
    if missing := [name for name in ("mu", "sigma") if name not in arrays]:
        raise UserError(f"{key}: {file} has no {missing[0]}; it has {', '.join(sorted(arrays)) or 'nothing'}")
    try:
        mean, covariance = (np.asarray(arrays[name], dtype=np.float64) for name in ("mu", "sigma"))
        found = Statistics(mean=mean, covariance=covariance, n=None)
    except (ValueError, TypeError) as error:
        raise UserError(f"{key}: {file}: {error}") from None
    if not np.allclose(covariance, covariance.T, rtol=1e-4, atol=1e-6 * float(np.abs(covariance).max())):
        raise UserError(f"{key}: {file}: sigma is not symmetric, so it is no covariance")
    if dimension is not None and mean.size != dimension:
        raise UserError(
            f"{key}: {file} is of another protocol: its statistics have dimension {mean.size}, "
            f"the extractor's features {dimension}"
        )
    return found


def _arrays(file: Path, key: str) -> dict[str, Any]:
    try:
        loaded = np.load(file, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise UserError(f"{key}: {file} is one array; an .npz with mu and sigma is expected")
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except UserError:
        raise
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{key}: {file}: no readable .npz of plain arrays ({reason})") from None
