"""What somebody asks of a merge of checkpoints, checked as far as that goes without opening one. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import yaml
from pydantic import ValidationError

from deme_diffusion.config import MergeSettings, MethodOptions
from deme_diffusion.errors import UserError, nearest
from deme_diffusion.lora_files import find_lora
from deme_diffusion.merging.selection import Kept, MergeWeights
from deme_diffusion.merging.table import Method, method

if TYPE_CHECKING:
    import torch

ARGUMENTS = (
    *("weights", "weights_for", "keep", "method", "component"),
    *("dtype", "max_shard_size", "fisher", "full_hash", "link", "lora_rank", "fuse"),
)
"""Beside a method's options: a misspelt name may mean one of them."""
_SHORT = {"float16": ("fp16", "f16", "half"), "bfloat16": ("bf16",), "float32": ("fp32", "f32", "float", "full")}
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
    link: bool = False
    lora_rank: int | None = None
    fuse: bool = False

    @property
    def lora(self) -> bool:
        """Whether LoRAs are merged into one LoRA: all experts are such, and nothing asks for a whole model."""
        return not self.fuse and all(find_lora(path) for path in self.experts)


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
    dtype: str | torch.dtype | None = None,
    max_shard_size: str | None = None,
    fisher: Sequence[str | Path] = (),
    full_hash: bool = False,
    link: bool = False,
    lora_rank: int | None = None,
    fuse: bool = False,
) -> Request:
    """The request. Raises UserError for what cannot be merged so, whatever the checkpoints hold."""
    row, parents, files = method(method_name, key="method"), _paths("experts", experts), _paths("fisher", fisher)
    start, target = _path("base", base), _path("out", out)
    if not parents:
        raise UserError("no experts: a merge takes a base and at least one expert")
    row.check(len(parents))
    if not row.weighted and (weights is not None or weights_for):
        raise UserError(f"weights: method {row.name} takes none; leave them out, or use task_arithmetic")
    row.check_fisher(len(files), len(parents))
    values = row.default_weights(len(parents)) if weights is None else _numbers("weights", weights)
    rules = {p: tuple(_numbers(f"weights_for {p}", given)) for p, given in _mapping("weights_for", weights_for).items()}
    kept = {pattern: _whose(who) for pattern, who in _mapping("keep", keep).items()}
    selection = MergeWeights(tuple(values), rules, kept).check_values(len(parents))
    _check_out(target, [start, *parents, *files])
    _check_loras(parents, target, lora_rank, fuse, {"max_shard_size": max_shard_size, "link": link})
    return Request(
        start,
        tuple(parents),
        target,
        row,
        _options(row, options or {}),
        selection,
        f"default of {row.name}" if weights is None else "given",
        component,
        None if dtype is None else _dtype(dtype),
        max_shard_size,
        tuple(files),
        full_hash,
        link,
        lora_rank,
        fuse,
    )


def _check_loras(experts: Sequence[Path], out: Path, rank: int | None, fuse: bool, whole: Mapping[str, object]) -> None:
    """Raises UserError for what is said of LoRAs and of no other experts, or the other way round."""
    loras = [path for path in experts if find_lora(path)]
    name = "fuse" if fuse else "lora_rank"
    if (fuse or rank is not None) and len(loras) < len(experts):
        other = next(path for path in experts if path not in loras)
        raise UserError(f"{name}: it is for LoRAs, and {other} is none; leave it out")
    if rank is not None and (fuse or rank < 1):
        why = "a whole model has no rank" if fuse else "a rank is 1 or more"
        raise UserError(f"lora_rank: {rank}: {why}; leave {'one of lora_rank and fuse' if fuse else 'it'} out")
    if loras and len(loras) == len(experts) and not fuse:
        if said := [key for key, value in whole.items() if value]:
            raise UserError(f"{said[0]}: LoRAs are merged into one LoRA, a small file; leave it out, or say fuse")
        if out.suffix == ".safetensors":
            raise UserError(f"out: {out}: a merged LoRA lies in a folder, with its record; give a folder")


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


def joined(options: object, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """A method's options, given as a mapping, as keywords, or as both. Raises UserError."""
    if options is not None and not isinstance(options, Mapping):
        raise UserError(f"options: {options!r}; the method's options are expected, as {{'density': 0.2}}")
    if twice := sorted(set(options or {}) & set(keywords)):
        raise UserError(f"{twice[0]}: given in options and by itself; leave one out")
    return {**(options or {}), **keywords}


def _options(row: Method, given: Mapping[str, Any]) -> MethodOptions:
    """Its options, resolved. The values are checked after the names, of which there may be a nearer one."""
    for name in given:
        if name not in row.options:
            if name in ARGUMENTS:  # on the command line alone: Python takes it for the argument that it is
                raise UserError(f"{name}: no option of a method; say --{name.replace('_', '-')}")
            takes = f"takes {', '.join(row.options)}" if row.options else "takes no options"
            raise UserError(f"{name}: method {row.name} {takes}{nearest(name, [*row.options, *ARGUMENTS])}")
    try:
        return row.resolved(MethodOptions(**given))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(map(str, problem["loc"]))
        means = MethodOptions.model_fields[place].description if place in MethodOptions.model_fields else None
        told = f"; {place} is the {means}" if means else ""
        raise UserError(f"{place}: {problem['msg']} (given: {problem['input']!r}){told}") from None


# -- what Python lets through ----------------------------------------------------------------------


def _path(name: str, given: object) -> Path:
    if not isinstance(given, str | PathLike):
        raise UserError(f"{name}: {given!r} is no path")
    return Path(given)


def _paths(name: str, given: object) -> list[Path]:
    if isinstance(given, str | PathLike) or not isinstance(given, Iterable):
        raise UserError(f"{name}: {str(given)!r}; a list of paths is expected, as ['{given}']")
    return [_path(name, path) for path in given]


def _numbers(name: str, given: object) -> list[float]:
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise UserError(f"{name}: {given!r}; a number an expert is expected, as [0.3, 0.5]")
    try:
        return [float(w) for w in given]
    except (TypeError, ValueError):
        raise UserError(f"{name}: {given!r}; numbers are expected, as [0.3, 0.5]") from None


def _mapping(name: str, given: object) -> Mapping[str, Any]:
    if given is not None and not isinstance(given, Mapping):
        raise UserError(f"{name}: {given!r}; patterns with what they give are expected, as {{'conv_out.*': ...}}")
    return given or {}


def _whose(who: Any) -> Any:
    """Numbers of NumPy become ours; what is none stays, to be refused."""
    return int(who) if isinstance(who, Integral) and not isinstance(who, bool) else who


def _dtype(given: object) -> str:
    """A name, or torch's own dtype."""
    name = str(given).removeprefix("torch.")
    if name not in DTYPES:
        meant = next((f"; did you mean {full!r}?" for full, short in _SHORT.items() if name.lower() in short), None)
        raise UserError(f"dtype: {given!r} is not one of {', '.join(DTYPES)}{meant or nearest(name, DTYPES)}")
    return name


def _check_out(out: Path, parents: Sequence[Path]) -> None:
    """No merge may write over, into, or above what it reads."""
    mine = out.absolute().resolve()
    for parent in parents:
        theirs = parent.absolute().resolve()
        if mine == theirs or mine in theirs.parents or theirs in mine.parents:
            relation = "is" if mine == theirs else "holds" if mine in theirs.parents else "lies in"
            raise UserError(f"out: {out} {relation} {parent}, which is merged; choose another place")
