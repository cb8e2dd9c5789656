"""Classes of images as the data set has them, and as a class-conditional model counts them. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from deme_diffusion.errors import UserError, nearest


@dataclass(frozen=True)
class Classes:
    """Of each label 0, 1, ... the number that the data set has for it, which counts `names` where it names them."""

    numbers: Sequence[int]
    names: Sequence[str] = ()


def in_model(found: Classes, *, count: int, names: Mapping[str, int], model: str, data: str) -> npt.NDArray[np.int64]:
    """Label -> class of a model that has `count`, some by name: numbers stay, names are looked up.

    Names that are numbers are numbers. Names that the model does not have are taken in alphabetical order (or in the
    data set's own) where there are exactly `count`. Raises UserError otherwise, and for a number out of range.
    """
    numbers, called = list(found.numbers), [found.names[i].strip() for i in found.numbers if found.names]
    if called and all(name.isdecimal() for name in called):
        numbers = [int(name) for name in called]
    elif called and all(name in names for name in called):
        numbers = [names[name] for name in called]
    elif called and len(found.names) != count:
        name = next(name for name in called if name not in names)
        raise UserError(
            f"data: {data}: {model} has no class named {name!r}{nearest(name, names)}; number its labels 0 to "
            f"{count - 1} as the model does, or name them as id2label in its model_index.json does"
        )
    if numbers and max(numbers) >= count:
        raise UserError(f"data: {data}: label {max(numbers)}, but {model} knows classes 0 to {count - 1}")
    return np.array(numbers, np.int64)
