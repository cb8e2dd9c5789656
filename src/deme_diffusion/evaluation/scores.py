"""All image metrics of one set of samples against one reference."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from deme_diffusion.evaluation.metrics import frechet_distance, kernel_distance, precision_recall, statistics

Features = npt.NDArray[np.float32]
PREPROCESSING = "8-bit, to [-1, 1], not resized"
"""What happens to images before the extractor; part of every image metric's protocol."""

MOST_NEIGHBOURS_IMAGES = 10_000
"""Precision and recall take all pairs of images: beyond this many of a set they are taken on the first ones."""


def score_images(
    reference: Features, generated: Features, *, neighbours: int, manifold: Features | None = None
) -> dict[str, float]:
    """FD and KID of features (n, d) against the reference's (m, d); precision and recall against the manifold's (k, d).

    The manifold holds distinct real images (all of the reference by default): among augmented views of one image, the
    nearest neighbours are that image again.
    """
    manifold = reference if manifold is None else manifold
    precision, recall = precision_recall(
        manifold[:MOST_NEIGHBOURS_IMAGES], generated[:MOST_NEIGHBOURS_IMAGES], neighbours=neighbours
    )
    return {
        "FD": frechet_distance(statistics(generated), statistics(reference)),
        "KID": kernel_distance(reference, generated)[0],
        "precision": precision,
        "recall": recall,
        "n": len(generated),
    }
