"""The models that a merge reads: a base and N experts, opened and checked, and where their projections fold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from deme_diffusion.errors import UserError
from deme_diffusion.merging.information import Information, check_information
from deme_diffusion.merging.lora_weights import LoraWeights, opened
from deme_diffusion.merging.parents import check_config, check_model, check_same
from deme_diffusion.merging.table import Method
from deme_diffusion.models import projection
from deme_diffusion.models.placement import folding
from deme_diffusion.weight_files import PROJECTION_KEY
from deme_diffusion.weights import Weights


class Parents:
    """A base and N experts, opened and checked before a byte is merged; a `with` closes the files.

    `base` and `experts` are component folders or safetensors files (`checkpoints.locate` finds them), `fisher` the
    files of the Fisher method, one an expert. `notes` are to be told to the user; that an expert equals the base is
    known once the merged model is written.
    """

    def __init__(self, base: Path, experts: Sequence[Path], row: Method, fisher: Sequence[Path]) -> None:
        if not experts:
            raise UserError("no experts: a merge takes a base and at least one expert")
        row.check(len(experts))
        self.row, self._stack, self.notes = row, ExitStack(), list[str]()
        try:
            self._open(base, experts, fisher)
        except BaseException:
            self._stack.close()
            raise

    def close(self) -> None:
        """Close the files."""
        self._stack.close()

    def _open(self, base: Path, experts: Sequence[Path], fisher: Sequence[Path]) -> None:
        self.base = self._stack.enter_context(Weights(base))
        check_model(self.base, self.base)
        self.experts = [self._stack.enter_context(opened(path, self.base)) for path in experts]
        for expert in self.experts:
            if isinstance(expert, LoraWeights):
                self.notes += expert.notes
                continue
            check_model(expert, self.base)
            check_same(self.base, expert)
            self.notes += check_config(base, expert.path)
            self._note_dtypes(expert)
        projection.refuse_beside(folder_of(base))
        self.matrices = [projection.load(folder_of(path)) for path in experts]
        self._place(experts)
        self.row.check_fisher(len(fisher), len(experts))
        self.fisher = [self._stack.enter_context(Information(path)) for path in fisher]
        shapes = {f"{PROJECTION_KEY}{place}": each.shape for own in self.matrices for place, each in own.items()}
        self.notes += check_information(self.fisher, self.base, self.experts, shapes)

    def _note_dtypes(self, expert: Weights) -> None:
        differ = [key for key in self.keys() if self.base.dtype(key) != expert.dtype(key)]
        if differ:
            key = differ[0]
            self.notes.append(
                f"{expert.path}: {len(differ)} of {len(self.keys())} tensors have another dtype than the base's "
                f"({key}: {short(expert.dtype(key))}, the base's {short(self.base.dtype(key))}); merged in float32"
            )

    def _place(self, experts: Sequence[Path]) -> None:
        """Which places act on each operation, an operation's own before its block's, and which fold into none."""
        shapes = {key: self.base.shape(key) for key in self.keys()}
        for path, matrices in zip(experts, self.matrices, strict=True):
            projection.check_fits(matrices, shapes, folder_of(path) / projection.FILE, str(self.base.path))
        names = {name for matrices in self.matrices for name in matrices}
        self._onto: dict[str, list[str]] = {}
        self.unfolded_places: list[str] = []
        for place, onto in folding(names, shapes).items():
            for operation in onto:
                self._onto.setdefault(operation, []).append(place)
            if not onto:
                self.unfolded_places.append(place)

    def folding(self, key: str) -> Sequence[str]:
        """The places whose D fold into a parameter, in the order in which they act."""
        return self._onto.get(key.rpartition(".")[0], ())

    def moved(self, key: str) -> bool:
        """Whether some expert may have another tensor than the base: not where all are LoRAs that leave it alone."""
        loras = (isinstance(own, LoraWeights) and own.factors(key) is None for own in self.experts)
        return not all(loras)

    def lies_whole(self, key: str) -> bool:
        """Whether every model's tensor lies in a file; of a LoRA's it is the product that does not."""
        return not any(isinstance(own, LoraWeights) and own.factors(key) is not None for own in self.experts)

    def keys(self) -> list[str]:
        """Names of the parameters and buffers."""
        return self.base.keys()

    def projections(self) -> Iterator[tuple[str, torch.Tensor, list[torch.Tensor]]]:
        """Name, base (0) and D_i of every place as a parameter of its own; 0 where an expert has none."""
        for place in sorted({place for own in self.matrices for place in own}):
            zeros = torch.zeros_like(next(own[place] for own in self.matrices if place in own))
            yield f"{PROJECTION_KEY}{place}", zeros, [own.get(place, zeros) for own in self.matrices]

    def note_equal(self, equal: Sequence[bool]) -> None:
        """Keep for the user which experts were found to be the base."""
        found = [f"{own.path}: equals the base" for own, same in zip(self.experts, equal, strict=True) if same]
        self.notes += [note for note in found if note not in self.notes]


def folder_of(path: Path) -> Path:
    """Where a checkpoint's projections lie: beside its weights."""
    return path if path.is_dir() else path.parent


def short(dtype: torch.dtype) -> str:
    """A dtype's name."""
    return str(dtype).removeprefix("torch.")
