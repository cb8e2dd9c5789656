"""How a recipe merges N experts: all but the weights that a search finds, checked before anything runs. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from deme_diffusion.config import MergeSettings, MethodOptions, Recipe
from deme_diffusion.division import Division
from deme_diffusion.errors import UserError
from deme_diffusion.merging.selection import Kept, MergeWeights
from deme_diffusion.merging.table import LINEAR, Method, method

SAID = ("method", "options", "weights_for", "keep", "dtype", "max_shard_size", "fisher_samples", "lora_rank", "fuse")
"""Settings that `HowToMerge`, and the stages beside a merge, say in their own way."""
SNR_LIMIT = 5.0
"""Of an SNR that weighs a range: gamma of Min-SNR as its paper has it."""
KEEPS_ONE = ("task_arithmetic", "slerp", "fisher")
"""Methods that give an expert itself for a weight of 1 on it and 0 on the others."""
Rules = Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class HowToMerge:
    """Method and its options, weights by pattern, tensors of one model, and how the result is stored."""

    method: Method
    options: MethodOptions = field(default_factory=MethodOptions)
    rules: Rules = field(default_factory=dict)
    keep: Mapping[str, Kept] = field(default_factory=dict)
    dtype: str | None = None
    max_shard_size: str | None = None
    lora_rank: int | None = None
    fuse: bool = False

    @property
    def model(self) -> dict[str, Any]:
        """What shapes the merged model beside its weights, where it is not the default: for the key of a stage."""
        resolved, own = self.method.resolved(self.options).model_dump(), self.method.defaults
        options = {name: resolved[name] for name in own if resolved[name] != own[name]}
        named = {} if self.method.name == "task_arithmetic" else {"method": self.method.name}
        # As pairs: of two patterns that match, the last one counts, and a digest knows no order of keys.
        rules = [[pattern, list(map(float, values))] for pattern, values in self.rules.items()]
        rest = {"options": options, "weights_for": rules, "keep": [list(pair) for pair in self.keep.items()]}
        return named | {name: value for name, value in rest.items() if value}

    @property
    def covered(self) -> dict[str, Any]:
        """`model`, and how it is stored."""
        rest = {"dtype": self.dtype, "max_shard_size": self.max_shard_size, "lora_rank": self.lora_rank}
        rest |= {"fuse": self.fuse or None}
        return self.model | {name: value for name, value in rest.items() if value is not None}

    @property
    def cut(self) -> dict[str, Any]:
        """What is lost where LoRAs are merged into one, for the key of a search; empty where nothing is."""
        if self.fuse or (self.lora_rank is None and self.method.name in LINEAR):
            return {}
        return {"lora": {"rank": self.lora_rank}}

    @property
    def what(self) -> str:
        """The method with the options that are not its own default, for people: `ties (density 0.5)`."""
        options = self.model.get("options", {})
        said = ", ".join(f"{name} {value}" for name, value in options.items())
        return f"{self.method.name} ({said})" if said else self.method.name

    def weights(self, values: tuple[float, ...], found: Rules | None = None) -> MergeWeights:
        """The weights of a merge: rules that were found by a search come before those of the recipe, which win.

        The last of several patterns that match counts, so the recipe's come after all found ones, in their own order.
        """
        first = {pattern: row for pattern, row in (found or {}).items() if pattern not in self.rules}
        return MergeWeights(values, {**first, **self.rules}, self.keep)

    @property
    def fixed(self) -> bool:
        """Whether some parameters are what the recipe says, so that the model at w = 0 is not the base."""
        return bool(self.rules or self.keep)


def how(settings: MergeSettings, num_experts: int, *, uniform: bool = False, alone: bool = False) -> HowToMerge:
    """How a recipe merges so many experts. `uniform` leaves out weights by pattern.

    `alone` is for a control of one model: its one task vector is scaled (Eq. 8) whatever the method, since most methods
    leave nothing of the weight of one, and what the recipe says of experts does not speak of it. Method `none` is that
    of the controls as well. Raises UserError for a number of experts that the method does not take, and for options
    that are not its own.
    """
    row = method("task_arithmetic" if alone or settings.method == "none" else settings.method)
    row.check(num_experts)
    keep = {pattern: who for pattern, who in settings.keep.items() if who == "base" or not alone}
    return HowToMerge(
        row,
        settings.options if settings.method == row.name else MethodOptions(),
        {} if uniform or alone else settings.weights_for,
        keep,
        settings.dtype,
        settings.max_shard_size,
        settings.lora_rank,
        settings.fuse,
    )


def snr_weights(division: Division, snr: npt.NDArray[np.float64], method: Method) -> list[float]:
    """Weights (N,) by the (T,) SNR: w_i is the share of sum_t min(SNR(t), 5) in the timesteps that expert i serves.

    That is the share of Min-SNR's weights of the clean image's error (Hang et al. 2023). Their sum is that of the
    method's default weights: 1, or N where those are 1 each.
    """
    shares = np.minimum(snr, SNR_LIMIT)
    served = [math.fsum(shares[division.route == i]) for i in range(division.num_experts)]
    scale = math.fsum(method.default_weights(len(served))) / math.fsum(served)
    return [round(value * scale, 12) for value in served]  # the last bits are the machine's, and go into a digest


def degenerate(weights: MergeWeights, method_name: str) -> str:
    """What a reader must know when a search chose none, or one, of the experts; '' where that is not so.

    Of one expert with weight 1 only some methods make that expert: others trim it, or change its singular values.
    """
    used = [i for i, w in enumerate(weights.values) if w]
    if weights.rules or weights.keep:
        return ""
    if not used:
        return ": merged is the base itself"
    alone = len(used) == 1 and weights.values[used[0]] == 1.0 and method_name in KEEPS_ONE
    return f": merged is expert {used[0]} alone" if alone else ""


def check(recipe: Recipe) -> None:
    """Raises UserError for what `merge` says and its method, or the number of experts, does not allow."""
    settings, experts = recipe.merge, recipe.decouple.num_ranges
    for pattern, values in settings.weights_for.items():
        if len(values) != experts:
            raise UserError(
                f"merge.weights_for: {pattern}: {len(values)} weights for decouple.num_ranges={experts} experts"
            )
    for pattern, who in settings.keep.items():
        if who != "base" and not 0 <= who < experts:
            raise UserError(f"merge.keep: {pattern}: expert {who}; base, or one from 0 to {experts - 1}")
    if settings.method != "none":
        _check_method(settings, experts)


def _check_method(settings: MergeSettings, experts: int) -> None:
    row = method(settings.method)
    row.check(experts)
    try:
        row.resolved(settings.options)
    except UserError as error:
        raise UserError(f"merge.options.{error}") from None
    if row.weighted:
        return
    if settings.search != "none":
        raise UserError(f"merge.search={settings.search}: method {settings.method} takes no weights; use search=none")
    if settings.weighting == "snr":
        raise UserError(f"merge.weighting=snr: method {settings.method} takes no weights; use weighting=uniform")
    for name in ("weights", "weights_for"):
        if getattr(settings, name):
            raise UserError(f"merge.{name}: method {settings.method} takes no weights; leave it out")
