"""Files of Fisher information: one an expert, of the base's architecture."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from deme_diffusion.errors import UserError
from deme_diffusion.merging.table import Method
from deme_diffusion.weights import Weights

PROJECTION = "projection."
"""Before a place's name: its D as a parameter, in errors, statistics and files of Fisher information."""


def check_count(row: Method, given: int, num_experts: int) -> None:
    """Raises UserError unless a method gets one file an expert if it takes any, and none if not."""
    if given and not row.fisher:
        raise UserError(f"method {row.name} takes no Fisher information; use method=fisher")
    if row.fisher and given != num_experts:
        raise UserError(
            f"method {row.name}: {given} files of Fisher information for {num_experts} experts; "
            "`deme fisher` makes one an expert, from its own timestep range"
        )


def check_information(information: Weights, base: Weights, projections: Collection[str]) -> Iterator[str]:
    """What to tell the user of one file. Raises UserError unless it has the base's floating parameters and no others.

    `projections` are the names of the D that are merged; F of them may be missing.
    """
    have, keys = set(information.keys()), base.keys()
    lacking = [key for key in keys if base.dtype(key).is_floating_point and key not in have]
    extra = sorted(key for key in have.difference(keys) if not key.startswith(PROJECTION))
    if lacking or extra:
        of = f"lacks {lacking[0]}" if lacking else f"has {extra[0]}, which the base lacks"
        raise UserError(f"{information.path}: Fisher information of another model: {of}")
    for key in have.intersection(keys):
        if (shape := information.shape(key)) != base.shape(key):
            raise UserError(f"{information.path}: {key} has shape {shape}, the base's is {base.shape(key)}")
    if not have.issuperset(projections):
        yield f"{information.path}: says nothing of projections; there every entry counts alike"
