"""Which weights a parameter is merged with: one an expert, others by pattern, or one model's tensor. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from deme_diffusion.errors import UserError, nearest

Kept = Literal["base"] | int


@dataclass(frozen=True)
class MergeWeights:
    """w_1 ... w_N; `rules` (pattern -> weights) and `keep` (pattern -> base or an expert's index) go before them.

    A pattern is a glob on parameter names, in which `*` spans dots. Of several that match, the last one counts; `keep`
    goes before `rules`.
    """

    values: tuple[float, ...]
    rules: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    keep: Mapping[str, Kept] = field(default_factory=dict)

    @classmethod
    def of(cls, weights: MergeWeights | Sequence[float]) -> MergeWeights:
        """The same, or one weight an expert."""
        return weights if isinstance(weights, MergeWeights) else cls(tuple(float(w) for w in weights))

    def at(self, key: str) -> tuple[float, ...]:
        """The weights of one parameter."""
        return next((w for pattern, w in reversed(list(self.rules.items())) if fnmatchcase(key, pattern)), self.values)

    def kept(self, key: str) -> Kept | None:
        """Whose tensor the parameter is; None where it is merged."""
        return next((who for pattern, who in reversed(list(self.keep.items())) if fnmatchcase(key, pattern)), None)

    def check(self, keys: Sequence[str], num_experts: int) -> MergeWeights:
        """The same. Raises UserError for a count that is not N, an expert that is none, a pattern without a match."""
        for name, values in [("weights", self.values), *self.rules.items()]:
            if len(values) != num_experts:
                raise UserError(f"{name}: {len(values)} given for {num_experts} experts")
        for pattern, who in self.keep.items():
            if who != "base" and not 0 <= who < num_experts:
                raise UserError(f"keep {pattern}={who}: base, or an expert from 0 to {num_experts - 1}")
        for pattern in (*self.rules, *self.keep):
            if not any(fnmatchcase(key, pattern) for key in keys):
                raise UserError(f"{pattern}: matches no parameter{_nearest(pattern, keys)}")
        return self

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        rules = {pattern: list(values) for pattern, values in self.rules.items()}
        rest = {"rules": rules, "keep": dict(self.keep)}
        return {"values": list(self.values), **{name: value for name, value in rest.items() if value}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MergeWeights:
        """What `as_dict` gave."""
        rules = {pattern: tuple(given) for pattern, given in values.get("rules", {}).items()}
        return cls(tuple(values["values"]), rules, values.get("keep", {}))


def _nearest(pattern: str, keys: Sequence[str]) -> str:
    """Help by whole parameters and by all that their names begin with."""
    stems = {".".join(key.split(".")[:i]) + ".*" for key in keys for i in range(1, key.count(".") + 1)}
    return nearest(pattern, [*sorted(stems), *keys])
