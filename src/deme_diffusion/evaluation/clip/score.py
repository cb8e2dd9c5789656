"""CLIP score (Hessel et al. 2021, with w = 100): how well images fit the words that they were asked for by."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from deme_diffusion.errors import UserError
from deme_diffusion.evaluation.extractors.base import Pixels, repeated
from deme_diffusion.evaluation.extractors.vision import described, quiet

log = logging.getLogger(__name__)
Scores = npt.NDArray[np.float64]
BATCH = 64


class ClipScorer:
    """A CLIP of transformers with tokenizer and image processor from beside it, on PIL and NumPy (no torchvision)."""

    batch_size = BATCH

    def __init__(self, model: Any, processor: Any, tokenizer: Any) -> None:
        self.model, self.processor, self.tokenizer = model, processor, tokenizer
        self.most_tokens = int(model.config.text_config.max_position_embeddings)
        self.preprocessing = f"{described(processor)}; text cut at {self.most_tokens} tokens"

    @torch.no_grad()
    def of_images(self, pixels: Pixels) -> torch.Tensor:
        """uint8 (n, h, w, c) -> embeddings (n, d) of length 1."""
        return self.embed_images(pixels)

    @torch.no_grad()
    def of_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Embeddings (n, d) of length 1; what is longer than the model takes is cut."""
        return self.embed_texts(texts)

    def embed_images(self, pixels: Pixels) -> torch.Tensor:
        """`of_images` with gradients."""
        images = list(repeated(pixels, 3))
        values = self.processor(images=images, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        first = next(self.model.parameters())
        return _unit(self.model.get_image_features(pixel_values=values.to(first.device, first.dtype)))

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """`of_texts` with gradients."""
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.most_tokens, return_tensors="pt"
        )
        device = next(self.model.parameters()).device
        ids, mask = tokens["input_ids"].to(device), tokens["attention_mask"].to(device)
        return _unit(self.model.get_text_features(input_ids=ids, attention_mask=mask))

    def cut(self, texts: Sequence[str]) -> int:
        """How many texts are longer than the model takes."""
        return sum(len(ids) > self.most_tokens for ids in self.tokenizer(list(texts), verbose=False)["input_ids"])

    def scores(self, batches: Iterable[Pixels], texts: Sequence[str]) -> tuple[Scores, int]:
        """100 max(cos(image, its text), 0) of each image, in the order of the batches; and how many texts were cut.

        Raises UserError where the model answers NaN or infinity.
        """
        found: list[npt.NDArray[np.float64]] = []
        first = 0
        for pixels in batches:
            words = texts[first : first + len(pixels)]
            cosines = (self.of_images(pixels) * self.of_texts(words)).sum(1)
            found.append(cosines.double().cpu().numpy())
            first += len(pixels)
        assert first == len(texts), "a text an image"
        scores = 100 * np.concatenate(found).clip(min=0)
        if not np.isfinite(scores).all():
            raise UserError("clip: it answers NaN or infinity; its weights are not whole")
        cut = self.cut(texts)
        if cut:
            log.warning("CLIP score: %d of %d texts are cut at %d tokens", cut, len(texts), self.most_tokens)
        return scores, cut


def summary(scores: Scores, categories: Sequence[str] = ()) -> dict[str, Any]:
    """Mean, its standard error over images, and n; the same of each category."""
    told: dict[str, Any] = _told(scores)
    if categories:
        names = np.array(categories)
        told["categories"] = {str(name): _told(scores[names == name]) for name in np.unique(names)}
    return told


def _told(scores: Scores) -> dict[str, Any]:
    n = len(scores)
    error = float(scores.std(ddof=1) / n**0.5) if n > 1 else None
    return {"CLIP": float(scores.mean()), "standard_error": error, "n": n}


def _unit(found: Any) -> torch.Tensor:
    """Embeddings of length 1, in float32, of what a CLIP gives: a tensor before transformers 5, in an output since."""
    features: torch.Tensor = found if isinstance(found, torch.Tensor) else found.pooler_output
    return torch.nn.functional.normalize(features.float(), dim=1)


def load_clip(folder: Path, device: torch.device = torch.device("cpu")) -> ClipScorer:  # noqa: B008
    """The CLIP of a local transformers folder. Raises UserError where it is none, or holds no whole safetensors."""
    import transformers

    pil = {"backend": "pil"} if int(transformers.__version__.split(".")[0]) >= 5 else {"use_fast": False}
    with quiet():
        with _refusing(folder, "its preprocessor_config.json cannot be used"):
            processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True, **pil)
        with _refusing(folder, "its tokenizer cannot be used"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        with _refusing(folder, "its config.json and weights cannot be loaded"):
            model, found = transformers.CLIPModel.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        wrong = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
        if wrong:
            raise UserError(f"{folder}: no CLIP: {len(wrong)} weights are missing, or of another shape, as {wrong[0]}")
        scorer = ClipScorer(model.float().eval().to(device), processor, tokenizer)
        with _refusing(folder, "it cannot run on an image and a text"):
            scorer.of_images(np.zeros((1, 32, 32, 3), dtype=np.uint8))
            scorer.of_texts(["a text"])
    return scorer


@contextmanager
def _refusing(folder: Path, what: str) -> Iterator[None]:
    """As UserError the dozen kinds of errors by which transformers says that a folder is broken, or of another kind."""
    try:
        yield
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        reason = f"{type(error).__name__}: {shorten(reason, 150, placeholder=' ...')}"
        raise UserError(f"{folder}: no CLIP of transformers: {what} ({reason})") from None
