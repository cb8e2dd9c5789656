"""Any vision model of transformers as a feature space: DINOv2 by its class token, CLIP by its image embedding."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch

from deme_diffusion.errors import UserError
from deme_diffusion.evaluation.extractors.base import Extractor, Pixels, repeated

BATCH = 64


class VisionModel(Extractor):
    """A transformers model and the image processor that lies beside it, on PIL and NumPy (no torchvision)."""

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__()
        self.model, self.processor = model, processor
        self.preprocessing = described(processor)
        with torch.no_grad():
            features, _ = self.outputs(self.inputs(np.zeros((1, 32, 32, 3), dtype=np.uint8)))
        self.dimension = features.shape[1]

    def batch_size(self, pixels: Pixels) -> int:
        """All images are of one size to the network."""
        return BATCH

    def inputs(self, pixels: Pixels) -> torch.Tensor:
        """float32 (n, 3, h', w') as the image processor makes it."""
        images = list(repeated(pixels, 3))
        values: torch.Tensor = self.processor(images=images, return_tensors="pt", input_data_format="channels_last")[
            "pixel_values"
        ]
        return values

    def outputs(self, inputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The image embedding (CLIP), else the pooled output, else the first token; no classes."""
        if hasattr(self.model, "get_image_features"):
            found = self.model.get_image_features(pixel_values=inputs)
        else:
            found = self.model(pixel_values=inputs)
        if isinstance(found, torch.Tensor):  # get_image_features before transformers 5
            return found.flatten(1), None
        pooled = [getattr(found, name, None) for name in ("image_embeds", "pooler_output")]
        features = next((value for value in pooled if value is not None), None)
        return (found.last_hidden_state[:, 0] if features is None else features).flatten(1), None


def described(processor: Any) -> str:
    """What an image processor does, in a line: `BitImageProcessor: shortest_edge 256 (resample 3), crop 224x224`."""
    values = processor.to_dict()
    name = str(values.get("image_processor_type", type(processor).__name__))
    parts = []
    if values.get("do_resize"):
        size = " ".join(f"{key} {value}" for key, value in dict(values["size"]).items() if value is not None)
        parts.append(f"{size} (resample {int(values['resample'])})")
    if values.get("do_center_crop"):
        crop = dict(values["crop_size"])
        parts.append(f"crop {crop['height']}x{crop['width']}")
    if values.get("do_normalize"):
        mean, deviation = ([round(float(v), 3) for v in values[key]] for key in ("image_mean", "image_std"))
        parts.append(f"mean {mean} deviation {deviation}")
    return f"8-bit, {name}: {', '.join(parts)}"


def load_vision_model(folder: Path) -> VisionModel:
    """The model of a local transformers folder. Raises UserError unless it takes images and holds safetensors."""
    try:
        import transformers
    except ImportError:
        raise UserError(MISSING) from None
    pil = {"backend": "pil"} if int(transformers.__version__.split(".")[0]) >= 5 else {"use_fast": False}
    with quiet():
        with _refusing(folder, "its preprocessor_config.json cannot be used"):
            processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True, **pil)
        with _refusing(folder, "its config.json and weights cannot be loaded"):
            architecture = _projecting(folder) or "AutoModel"
            model, found = getattr(transformers, architecture).from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        # Which transformers would make up at random, telling no more than a warning.
        wrong = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
        if wrong:
            what = f"{len(wrong)} weights of its model are missing, or of another shape, as {wrong[0]}"
            raise UserError(f"{folder}: no vision model of transformers: {what}")
        with _refusing(folder, "its model cannot run on an image as its preprocessor_config.json makes it"):
            return VisionModel(model.float().eval(), processor)


@contextmanager
def _refusing(folder: Path, what: str) -> Iterator[None]:
    """As UserError the dozen kinds of errors by which transformers says that a folder is broken, or of another kind."""
    try:
        yield
    except ZeroDivisionError:
        raise UserError(f"{folder}: no vision model of transformers: {what} (a size or a count in it is 0)") from None
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        reason = f"{type(error).__name__}: {shorten(reason, 150, placeholder=' ...')}"
        raise UserError(f"{folder}: no vision model of transformers: {what} ({reason})") from None


def _projecting(folder: Path) -> str | None:
    """`CLIPVisionModelWithProjection` and its like, whose projection AutoModel would leave out."""
    names = json.loads((folder / "config.json").read_text()).get("architectures") or [""]
    return str(names[0]) if str(names[0]).endswith("VisionModelWithProjection") else None


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bar, and the warnings of heads that no features need."""
    from transformers.utils import logging as said

    level = said.get_verbosity()
    said.set_verbosity_error()
    said.disable_progress_bar()
    try:
        yield
    finally:
        said.set_verbosity(level)
        said.enable_progress_bar()


MISSING = "extractor.kind transformers needs the package transformers: pip install 'deme-diffusion[features]'"
