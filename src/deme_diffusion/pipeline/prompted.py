"""What each image is asked for by: the captions of the search split in a search, those of the table in the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from deme_diffusion.data.sources import SplitName
from deme_diffusion.data.splits import Split
from deme_diffusion.evaluation.sample import Prompts
from deme_diffusion.models.denoiser import Prompt
from deme_diffusion.pipeline.workbench import Workbench
from deme_diffusion.rng import uniforms


class Prompted(Workbench):
    """Prompts as numbers of images know them: whatever samples the same image asks for it by the same words."""

    def searched_by(self, count: int) -> Prompts:
        """Of the first `count` images of a search, or of a preview: from the search split, which no table shows."""
        return None if self._idle else of_split(self.splits["search"], range(count))

    def asked_by(self, count: int) -> Prompts:
        """Of the images of a table: the report split's, or a protocol's."""
        return self.asked_at(range(count))

    def asked_at(self, numbers: Sequence[int]) -> Prompts:
        """Of these images of a table, counted round beyond its last one."""
        if self._idle:
            return None
        asking = self.graph.asking
        if asking.protocol is None:
            return of_split(self.splits["report"], numbers, asking.settings.seed)
        chosen = asking.chosen(self.recipe.evaluate.num_images)
        found: list[str] | list[int] = chosen.places if asking.takes == "class" else chosen.texts
        return [found[number % len(found)] for number in numbers]

    def texts(self, count: int) -> list[str]:
        """What the first `count` images of a table are to show, in words, whatever the model was asked by."""
        asking = self.graph.asking
        if asking.protocol is not None:
            return asking.chosen(count).texts
        return [str(prompt) for prompt in self.asked_by(count) or ()]

    def categories(self, count: int) -> list[str]:
        """Of the first `count` images of a table, where the protocol's prompts have categories; else none."""
        asking = self.graph.asking
        found = asking.chosen(count).categories if asking.protocol else []
        return found if any(found) else []

    def captioned(self, name: SplitName) -> Split:
        """A split whose batches hold captions, whatever the model takes."""
        return replace(self.splits[name], carries="text")

    @property
    def _idle(self) -> bool:
        return self.recipe.model.takes == "nothing"


def of_split(split: Split, numbers: Sequence[int], seed: int = 0) -> list[Prompt]:
    """Image i is asked for by the caption (one of several, keyed by i) or the class of the split's image i % n."""
    positions = [number % len(split) for number in numbers]
    draws = np.array([uniforms(seed, f"prompt {split.name}", 0, number, 1)[0, 0] for number in numbers])
    found = split.prompts(positions, draws)
    return list(found["caption"]) if "caption" in found else [int(label) for label in found["label"]]
