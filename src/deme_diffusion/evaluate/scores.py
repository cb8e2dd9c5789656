"""All image metrics of one set of samples against one reference."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from deme_diffusion.evaluate.metrics import frechet_distance, kernel_distance, precision_recall, statistics

MOST_NEIGHBOURS_IMAGES = 10_000
"""Precision and recall take all pairs of images: beyond this many of a set they are taken on the first ones."""


def score_images(
    reference: npt.NDArray[np.float32], generated: npt.NDArray[np.float32], neighbours: int
) -> dict[str, float]:
    """FD, KID, precision and recall of features (n, d) against the reference's (m, d)."""
    precision, recall = precision_recall(
        reference[:MOST_NEIGHBOURS_IMAGES], generated[:MOST_NEIGHBOURS_IMAGES], neighbours=neighbours
    )
    return {
        "FD": frechet_distance(statistics(generated), statistics(reference)),
        "KID": kernel_distance(reference, generated)[0],
        "precision": precision,
        "recall": recall,
        "n": len(generated),
    }
