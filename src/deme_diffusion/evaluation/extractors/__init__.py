"""Feature spaces that a metric is measured in: classifiers of ours, the FID Inception network, vision models."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from deme_diffusion.evaluation.extractors.base import Extractor

Kind = Literal["classifier", "inception", "transformers"]


def load_extractor(path: Path, kind: Kind = "classifier") -> Extractor:
    """The extractor of a folder (`inception`: of a file), in eval mode, on the CPU. Raises UserError for another."""
    extractor: Extractor
    if kind == "inception":
        from deme_diffusion.evaluation.extractors.inception import load_inception

        extractor = load_inception(path)
    elif kind == "transformers":
        from deme_diffusion.evaluation.extractors.vision import load_vision_model

        extractor = load_vision_model(path)
    else:
        from deme_diffusion.evaluation.extractors.classifier import load_classifier

        extractor = load_classifier(path)
    return extractor.eval().requires_grad_(False)


__all__ = ["Extractor", "Kind", "load_extractor"]
