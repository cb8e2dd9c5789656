"""What a page may ask, checked: finite weights, sizes within bounds, nothing that is not asked for. No torch."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deme_diffusion.errors import UserError

MOST_IMAGES, MOST_WEIGHT, MOST_EXPERTS, MOST_STEPS = 256, 100.0, 1000, 100_000
LARGEST_SEED = 2**53 - 1
"""That a page can tell from its neighbours; torch takes larger ones."""
MOST_BYTES = 1 << 16
"""Of a request's body."""
Weight = Annotated[float, Field(ge=-MOST_WEIGHT, le=MOST_WEIGHT, allow_inf_nan=False)]


class Asked(BaseModel):
    """What every request holds: whose it is (a page's own name for itself), and of which server the page is."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    page: str = Field(pattern=r"^[a-z0-9]{1,32}$")
    server: str = Field(max_length=64)


class AskedWeights(Asked):
    """One weight an expert; `by_layer`: with those by layer that a search found."""

    weights: tuple[Weight, ...] = Field(min_length=1, max_length=MOST_EXPERTS)
    by_layer: bool = False


class AskedSamples(AskedWeights):
    """Images of base and merged model, an image for each of so many seeds; `known` names a base that the page shows."""

    sampler: str = Field(max_length=200)
    steps: int = Field(ge=1, le=MOST_STEPS)
    images: int = Field(ge=1, le=MOST_IMAGES)
    seed: int = Field(ge=0, le=LARGEST_SEED - MOST_IMAGES)
    known: str = Field("", max_length=64)


class AskedLoss(AskedWeights):
    """The fixed-noise loss of base and merged model."""


class AskedSave(AskedWeights):
    """The merged model on the disk, under a name."""

    name: str = Field(max_length=1000)


A = TypeVar("A", bound=Asked)


def parse(kind: type[A], body: bytes) -> A:
    """The request in a body of JSON. Raises UserError in one line: where, and what is wrong."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        where = ".".join(map(str, wrong["loc"]))
        raise UserError(f"{where}: {wrong['msg']}" if where else wrong["msg"]) from None
