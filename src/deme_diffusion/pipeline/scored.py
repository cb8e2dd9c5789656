"""The stages of the CLIP score: a small CLIP of the recipe's captions, and how well sets of images fit their words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from deme_diffusion.errors import UserError
from deme_diffusion.evaluation.clip.score import ClipScorer, load_clip, summary
from deme_diffusion.evaluation.clip.train import train_clip
from deme_diffusion.evaluation.extractors.base import Pixels
from deme_diffusion.evaluation.features import in_batches, real_between
from deme_diffusion.evaluation.sample import IMAGES
from deme_diffusion.files import write_npy, write_text
from deme_diffusion.pipeline.inputs import TRAINED_ON, trained_on
from deme_diffusion.pipeline.node import Node
from deme_diffusion.pipeline.prompted import Prompted, of_split
from deme_diffusion.pipeline.workbench import seed_of_node

SCORES = "scores.npy"


class Scored(Prompted):
    """Each method `_<stage>` fills the folder of one stage."""

    @cached_property
    def scorer(self) -> ClipScorer:
        """The recipe's CLIP, on the device that `runtime.device` names."""
        clip = self.graph.clip
        assert clip is not None, "only a recipe with a CLIP score has stages that ask for it"
        folder, key = self.folder(clip), (clip.digest, str(self.device))
        return self.shared.get("clip", key, lambda: load_clip(folder, device=self.device))

    def _clip(self, node: Node, folder: Path) -> Mapping[str, Any]:
        settings, seed = self.recipe.clip, seed_of_node(node)
        write_text(folder / TRAINED_ON, trained_on(self.recipe.data, self.graph.images))
        train, held_out = (self.captioned(name) for name in ("train", "search"))
        return train_clip(train, held_out, settings, seed=seed, out=folder, device=self.device)

    def _clip_score(self, node: Node, folder: Path) -> Mapping[str, Any]:
        """A score an image, and what they come to over those with words: mean, standard error, by category too."""
        if node.arguments["real"]:
            split = self.captioned("train")
            count = min(self.recipe.evaluate.num_images, len(split) * split.settings.views)
            texts, categories = [str(text) for text in of_split(split, range(count))], list[str]()
            size = self.scorer.batch_size
            batches: Iterator[Pixels] = (real_between(split, i, min(i + size, count)) for i in range(0, count, size))
        else:
            images = np.load(self.folder(node.parents["images"]) / IMAGES, mmap_mode="c")
            texts, categories = self.texts(len(images)), self.categories(len(images))
            batches = in_batches(images, self.scorer.batch_size)
        scores, cut = self.scorer.scores(batches, texts)
        write_npy(folder / SCORES, scores)
        worded = np.array([bool(text.strip()) for text in texts])
        if not worded.any():
            raise UserError("evaluate.clip_score: no image was asked for by words, which it is compared with")
        named = [category for category, has in zip(categories, worded, strict=True) if has] if categories else []
        told = {"texts_cut": cut, "wordless": int((~worded).sum()), "preprocessing": self.scorer.preprocessing}
        return {**summary(scores[worded], named), **told}
