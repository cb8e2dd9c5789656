"""What somebody asks of a merge of checkpoints, checked as far as that goes without opening one. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from deme_diffusion.config import MergeSettings, MethodOptions
from deme_diffusion.errors import UserError, nearest
from deme_diffusion.merging.selection import Kept, MergeWeights
from deme_diffusion.merging.table import Method, method

DTYPES: tuple[str, ...] = get_args(get_args(MergeSettings.model_fields["dtype"].annotation)[0])


@dataclass(frozen=True)
class Request:
    """A base, N experts, where the merged model goes, and how they are merged; `source` says whose the weights are."""

    base: Path
    experts: tuple[Path, ...]
    out: Path
    method: Method
    options: MethodOptions
    weights: MergeWeights
    source: str
    component: str | None = None
    dtype: str | None = None
    max_shard_size: str | None = None
    fisher: tuple[Path, ...] = ()
    full_hash: bool = False


def requested(
    base: str | Path,
    experts: Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    weights_for: Mapping[str, Sequence[float]] | None = None,
    keep: Mapping[str, Kept] | None = None,
    method_name: str = "task_arithmetic",
    options: Mapping[str, Any] | None = None,
    component: str | None = None,
    dtype: str | None = None,
    max_shard_size: str | None = None,
    fisher: Sequence[str | Path] = (),
    full_hash: bool = False,
) -> Request:
    """The request. Raises UserError for what cannot be merged so, whatever the checkpoints hold."""
    row, parents = method(method_name, key="method"), [Path(path) for path in experts]
    if not parents:
        raise UserError("no experts: a merge takes a base and at least one expert")
    row.check(len(parents))
    if not row.weighted and (weights is not None or weights_for):
        raise UserError(f"weights: method {row.name} takes none; leave them out, or use task_arithmetic")
    _check_fisher(row, len(fisher), len(parents))
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}{nearest(dtype, DTYPES)}")
    values = row.default_weights(len(parents)) if weights is None else [float(w) for w in weights]
    rules = {pattern: tuple(float(w) for w in given) for pattern, given in (weights_for or {}).items()}
    selection = MergeWeights(tuple(values), rules, dict(keep or {})).check_values(len(parents))
    _check_out(Path(out), [Path(base), *parents, *map(Path, fisher)])
    return Request(
        Path(base),
        tuple(parents),
        Path(out),
        row,
        _options(row, options or {}),
        selection,
        f"default of {row.name}" if weights is None else "given",
        component,
        dtype,
        max_shard_size,
        tuple(map(Path, fisher)),
        full_hash,
    )


def parse_options(texts: Iterable[str]) -> dict[str, Any]:
    """A method's options as KEY=VALUE each, the values in YAML. Raises UserError."""
    options = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (key and equals and value):
            raise UserError(f"{text}: an option of the method as KEY=VALUE is expected, as density=0.2")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"{text}: {value!r} is no value; a number is expected, as density=0.2") from None
    return options


def _options(row: Method, given: Mapping[str, Any]) -> MethodOptions:
    """Its options, resolved. The values are checked after the names, of which there may be a nearer one."""
    for name in given:
        if name not in row.options:
            takes = f"takes {', '.join(row.options)}" if row.options else "takes no options"
            raise UserError(f"{name}: method {row.name} {takes}{nearest(name, row.options)}")
    try:
        return row.resolved(MethodOptions(**given))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(map(str, problem["loc"]))
        raise UserError(f"{place}: {problem['msg']} (given: {problem['input']!r})") from None


def _check_fisher(row: Method, files: int, experts: int) -> None:
    if files and not row.fisher:
        raise UserError(f"fisher: method {row.name} takes no Fisher information; use method fisher")
    if row.fisher and files != experts:
        raise UserError(
            f"fisher: {files} files given for {experts} experts; method fisher takes one an expert, in their order "
            "(deme fisher makes them)"
        )


def _check_out(out: Path, parents: Sequence[Path]) -> None:
    """No merge may write over, into, or above what it reads."""
    mine = out.absolute().resolve()
    for parent in parents:
        theirs = parent.absolute().resolve()
        if mine == theirs or mine in theirs.parents or theirs in mine.parents:
            relation = "is" if mine == theirs else "holds" if mine in theirs.parents else "lies in"
            raise UserError(f"out: {out} {relation} {parent}, which is merged; choose another place")
