"""`deme merge`: the experts of a recipe, or any checkpoints of one architecture."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deme_diffusion.cli import show_merge
from deme_diffusion.cli.command import app
from deme_diffusion.cli.options import AsJson, Jobs
from deme_diffusion.cli.stages import merges, no_merge, one_stage
from deme_diffusion.config import MethodOptions
from deme_diffusion.errors import Stopped, UserError
from deme_diffusion.merging.pairs import experts_of
from deme_diffusion.merging.request import DTYPES, parse_options, requested
from deme_diffusion.merging.selection import parse_keep, parse_rules, parse_weights
from deme_diffusion.merging.table import METHODS

if TYPE_CHECKING:
    from deme_diffusion.merging.request import Request


_METHODS = "\n".join(f"  {row.name:<16} {row.what}" for row in METHODS.values())
_HELP = f"""Merge the experts of a recipe, or any checkpoints of one architecture.

With a recipe; what is not trained or searched yet is made first:

\b
  deme merge digits merge.method=ties merge.search=none

Without one: pipelines or component folders of diffusers, or safetensors files.

\b
  deme merge --base sd --expert a --expert b --weights 0.3,0.5 --out merged
  deme merge --base sd --expert a --expert b --method ties density=0.3 --out merged

LoRAs for one base are merged into one LoRA, exactly where the method is linear:

\b
  deme merge --base sd --expert lora-a --expert lora-b --out merged-lora

Methods (--methods tells their options and sources), tau_i = theta_i - theta:

\b
{_METHODS}
"""
_ARGUMENT = re.compile(r"(weights|weights_for|keep|dtype|max_shard_size|lora_rank|fuse|link)(?=[: ])")
_PATHS = "A diffusers pipeline or component folder, or a .safetensors file"
_EXPERTS = "The same, finetuned from it; or a LoRA for it, a folder or file. Repeatable."
_FOR = "Other weights for the parameters that match a glob, as 'down_blocks.*=0.2,0.1'. Repeatable; the last wins."
_KEEP = "Parameters taken unmerged from one model, as 'conv_out.*=base', or =0 for the first expert. Repeatable."
_PAIR = "Instead of --expert: a pipeline of two, transformer_2 (low noise, the first) and transformer (high noise)."
_LINK = "Share the disk space of the unchanged parts with the base, by hard links: never edit them in place."
_RANK = "Of LoRAs: the merged one's rank, by SVD; its error is told.  [the sum of their ranks]"
_FUSE = "Of LoRAs: write the whole merged model, as the base is, instead of one LoRA for it."
# What a recipe's merge calls the same thing.
_IN_A_RECIPE = {
    "--expert": "a recipe trains its own",
    "--pair": "a recipe trains its own experts",
    "--weights": "merge.search=none 'merge.weights=[...]' says it",
    "--weights-for": "'merge.weights_for={\"down_blocks.*\": [...]}' says it",
    "--keep": "'merge.keep={\"conv_out.*\": base}' says it",
    "--method": "merge.method=... says it",
    "--component": "a recipe merges its model's denoiser",
    "--dtype": "merge.dtype=... says it",
    "--max-shard-size": "merge.max_shard_size=... says it",
    "--fisher": "merge.method=fisher makes what it needs",
    "--full-hash": "a recipe's parents have their digests",
    "--link": "the store keeps copies",
    "--lora-rank": "merge.lora_rank=... says it",
    "--fuse": "merge.fuse=true says it",
}


def _methods(wanted: bool) -> None:
    if wanted:
        show_merge.methods()
        raise typer.Exit


@app.command(help=_HELP)
def merge(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="A packaged recipe, a YAML path, or a run folder.")
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings of the recipe; with --base, the method's options."),
    ] = None,
    base: Annotated[Path | None, typer.Option(help=f"{_PATHS}.")] = None,
    expert: Annotated[list[Path] | None, typer.Option(help=_EXPERTS)] = None,
    pair: Annotated[Path | None, typer.Option(help=_PAIR)] = None,
    out: Annotated[
        Path | None, typer.Option(help="The run folder [runs/RECIPE]; with --base, where the merged model goes.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="W,W,...", help="One an expert, in their order.  [the method's default]")
    ] = None,
    weights_for: Annotated[list[str] | None, typer.Option(metavar="PATTERN=W,W,...", help=_FOR)] = None,
    keep: Annotated[list[str] | None, typer.Option(metavar="PATTERN=WHOSE", help=_KEEP)] = None,
    method: Annotated[str | None, typer.Option(help="One of the methods above.  [task_arithmetic]")] = None,
    component: Annotated[
        str | None, typer.Option(help="The part of the pipelines that is merged.  [unet or transformer]")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="|".join(DTYPES), help="Of the merged weights.  [the base's]")
    ] = None,
    max_shard_size: Annotated[str | None, typer.Option(help="As 5GB.  [sharded like the base]")] = None,
    fisher: Annotated[
        list[Path] | None, typer.Option(help="Of method fisher: a file an expert, in their order. Repeatable.")
    ] = None,
    full_hash: Annotated[
        bool, typer.Option("--full-hash", help="Read the parents once more for their sha256, and remember it.")
    ] = False,
    link: Annotated[bool, typer.Option("--link", help=_LINK)] = False,
    lora_rank: Annotated[int | None, typer.Option(min=1, help=_RANK)] = None,
    fuse: Annotated[bool, typer.Option("--fuse", help=_FUSE)] = False,
    jobs: Jobs = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would run; with --base, check all but the values. Then stop.")
    ] = False,
    as_json: AsJson = False,
    methods: Annotated[
        bool, typer.Option("--methods", help="List the methods and exit.", callback=_methods, is_eager=True)
    ] = False,
) -> None:
    """Merge the experts of a recipe, or any checkpoints of one architecture."""
    words = [*([recipe] if recipe is not None else []), *(changes or [])]
    mine = {
        "--expert": expert,
        "--pair": pair,
        "--weights": weights,
        "--weights-for": weights_for,
        "--keep": keep,
        "--method": method,
        "--component": component,
        "--dtype": dtype,
        "--max-shard-size": max_shard_size,
        "--fisher": fisher,
        "--full-hash": full_hash,
        "--link": link,
        "--lora-rank": lora_rank,
        "--fuse": fuse,
    }
    if base is None:
        _check_recipe(words, mine)
        one_stage("merge", merges, words[0], words[1:], out, jobs, dry_run, as_json, idle=no_merge)
        return
    experts = _experts(base, expert or [], pair)
    out = _check_checkpoints(words, experts, out, jobs)
    with _options_named():
        request = requested(
            base,
            experts,
            out,
            weights=None if weights is None else parse_weights(weights),
            weights_for=parse_rules(weights_for or []),
            keep=parse_keep(keep or []),
            method_name=method or "task_arithmetic",
            options=parse_options(words),
            component=component,
            dtype=dtype,
            max_shard_size=max_shard_size,
            fisher=fisher or [],
            full_hash=full_hash,
            link=link,
            lora_rank=lora_rank,
            fuse=fuse,
        )
        _checkpoints(request, dry_run, as_json)


@contextmanager
def _options_named() -> Iterator[None]:
    """What Python calls an argument in a UserError is said as it is on the command line."""
    try:
        yield
    except UserError as error:
        found, text = _ARGUMENT.match(str(error)), str(error)
        option = f"--{found[0].replace('_', '-')}" if found else ""
        raise UserError(option + text[found.end() :] if found and option not in text else text) from None


def _check_recipe(words: Sequence[str], given: Mapping[str, object]) -> None:
    """Without --base: a recipe, and none of the options of the other way."""
    name = next((name for name, value in given.items() if value), None)
    if name and not words:
        raise UserError(f"{name} without --base: say --base DIR --expert DIR ... --out DIR, or name a recipe")
    if name:
        raise UserError(f"{name}: it is for --base; with the recipe {words[0]} {_IN_A_RECIPE[name]}")
    if not words:
        raise UserError("nothing to merge: name a recipe, or say --base DIR --expert DIR ... --out DIR")


def _experts(base: Path, given: list[Path], pair: Path | None) -> list[Path]:
    """The experts with --base: those that are named, or the two of a pair."""
    if pair is None:
        return given
    if given:
        raise UserError("--pair and --expert: a pair is two experts already; say --expert PAIR/transformer_2 for one")
    return list(experts_of(pair, base))


def _check_checkpoints(words: Sequence[str], experts: Sequence[Path], out: Path | None, jobs: int | None) -> Path:
    """With --base: no recipe, some experts, and an --out, which is returned."""
    recipe = next((word for word in words if "=" not in word), None)
    if recipe in MethodOptions.model_fields:
        raise UserError(f"{recipe}: an option of the method without its value; say {recipe}=..., without spaces")
    if recipe is not None:
        raise UserError(
            f"{recipe}: a recipe and --base do not go together; leave out one of them (an option of the method is "
            "KEY=VALUE, an expert --expert DIR)"
        )
    if not experts:
        raise UserError("--base without --expert: say --expert DIR for each model that was finetuned from it")
    if out is None:
        raise UserError("--base without --out: say where the merged model goes, as --out merged")
    if jobs is not None:
        raise UserError("--jobs: it is for a recipe; checkpoints are merged by one process")
    return out


def _checkpoints(request: Request, dry_run: bool, as_json: bool) -> None:
    """Merge them, or say what would be done."""
    from deme_diffusion.merging import perform

    try:
        told = perform.planned(request) if dry_run else perform.performed(request)
    except KeyboardInterrupt:
        raise Stopped("nothing was written") from None
    if dry_run:
        show_merge.plan(told, as_json)
    else:
        show_merge.done(told, request.out, as_json)
