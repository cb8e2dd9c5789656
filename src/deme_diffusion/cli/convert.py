"""`deme convert`: checkpoints of others into this layout, and back to the paper's public code."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deme_diffusion.cli import show
from deme_diffusion.cli.command import app
from deme_diffusion.cli.options import AsJson
from deme_diffusion.errors import UserError

_HELP = """Turn pickled weights, the public code's included, into safetensors; code in them is never run.

A state dict becomes a component's folder, which `deme merge` takes as --expert; a pipeline's folder a whole pipeline:

\b
  deme convert expert.pt --like PIPELINE --out expert
  deme convert old_pipeline --out pipeline

Channel-wise projections of the public code (adapter_list.i.weight in a state dict) go into projection.safetensors
beside the weights, which stock diffusers does not read and a merge does; --to-public writes them back.
"""


@app.command(help=_HELP)
def convert(
    checkpoint: Annotated[
        Path, typer.Argument(help="A state dict (.bin, .pt, .pth, .ckpt, .safetensors), a component or a pipeline.")
    ],
    like: Annotated[
        Path | None, typer.Option(metavar="BASE", help="The pipeline or component that a state dict must fit.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The folder to make, with safetensors only.")] = None,
    to_public: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a .bin for the paper's public code instead.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Turn pickled weights, the public code's included, into safetensors; code in them is never run."""
    if (out is None) == (to_public is None):
        raise UserError("deme convert: give --out DIR, or --to-public FILE")
    if to_public and like:
        raise UserError("deme convert: --like goes with --out; a model that is written back has its own config")
    if not checkpoint.exists():
        raise UserError(f"{checkpoint}: no such file or folder")
    from deme_diffusion.models import conversion

    done = (
        conversion.convert(checkpoint, out, like) if out else conversion.write_public(checkpoint, to_public or Path())
    )
    if as_json:
        show.as_json({"out": str(done.out), "projections": done.projections, "notes": done.notes})
        return
    show.say(*done.notes, done.out)
