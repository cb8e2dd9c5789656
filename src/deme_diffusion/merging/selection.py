"""Which weights a parameter is merged with: one an expert, others by pattern, or one model's tensor. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
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
        self.check_values(num_experts)
        for pattern in (*self.rules, *self.keep):
            if not any(fnmatchcase(key, pattern) for key in keys):
                raise UserError(f"{pattern}: matches no parameter{_nearest(pattern, keys)}")
        return self

    def check_values(self, num_experts: int) -> MergeWeights:
        """The same: as much of `check` as needs no parameters' names."""
        named = {f"weights_for {pattern}": values for pattern, values in self.rules.items()}
        for name, values in {"weights": self.values, **named}.items():
            if len(values) != num_experts:
                raise UserError(f"{name}: {len(values)} given for {num_experts} experts")
            if not all(math.isfinite(w) for w in values):
                raise UserError(f"{name}: {list(values)}; a weight is a finite number")
        for pattern, who in self.keep.items():
            if who != "base" and not (type(who) is int and 0 <= who < num_experts):  # True is no expert
                raise UserError(f"keep {pattern}={who}: base, or an expert from 0 to {num_experts - 1}")
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


def parse_weights(text: str, what: str = "--weights") -> tuple[float, ...]:
    """Numbers between commas, as 0.1,0.5. Raises UserError for one that is none."""
    return tuple(_number(part.strip(), f"{what} {text}") for part in text.split(","))


def parse_rules(texts: Iterable[str], what: str = "--weights-for") -> dict[str, tuple[float, ...]]:
    """PATTERN=W,W,... each; of the same pattern twice, the last one stands. Raises UserError."""
    rules: dict[str, tuple[float, ...]] = {}
    for text in texts:
        pattern, values = _halves(text, what, "down_blocks.*=0.2,0.1")
        rules.pop(pattern, None)  # what is said last counts last
        rules[pattern] = parse_weights(values, f"{what} {pattern}:")
    return rules


def parse_keep(texts: Iterable[str], what: str = "--keep") -> dict[str, Kept]:
    """PATTERN=base or PATTERN=I each; of the same pattern twice, the last one stands. Raises UserError."""
    keep: dict[str, Kept] = {}
    for text in texts:
        pattern, who = _halves(text, what, "conv_out.*=base")
        if who != "base" and not (who.isascii() and who.isdigit()):
            raise UserError(f"{what} {text}: base, or an expert's number counted from 0, not {who!r}")
        keep.pop(pattern, None)
        keep[pattern] = "base" if who == "base" else int(who)
    return keep


def _number(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"{where}: {text!r} is no number; a weight an expert is expected, as 0.1,0.5") from None
    if not math.isfinite(value):
        raise UserError(f"{where}: {text!r} is not finite; a weight is a number, as 0.5")
    return value


def _halves(text: str, what: str, example: str) -> tuple[str, str]:
    pattern, equals, value = (part.strip() for part in text.rpartition("="))
    if not (pattern and equals and value):
        raise UserError(f"{what} {text}: PATTERN=VALUE is expected, as {example}")
    return pattern, value


def _nearest(pattern: str, keys: Sequence[str]) -> str:
    """Help by whole parameters and by all that their names begin with."""
    stems = {".".join(key.split(".")[:i]) + ".*" for key in keys for i in range(1, key.count(".") + 1)}
    return nearest(pattern, [*sorted(stems), *keys])
