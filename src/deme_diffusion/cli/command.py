"""The command itself: its root options, and how errors become one line and an exit status."""

from __future__ import annotations

import logging
import signal
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from deme_diffusion.errors import Interrupted, MachineError, Stopped, UserError
from deme_diffusion.processes import is_main

_UsageError: Any = typer.BadParameter.__mro__[1]  # click's, wherever this typer has it from


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        """As usual, but an interruption is ours to tell: typer would exit without a word."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted("nothing is lost") from None


app = typer.Typer(
    cls=_Commands,
    name="deme",
    help="Decouple a diffusion model into experts on timestep ranges, merge them into one model of the same cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(version("deme-diffusion"))
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Log warnings only.")] = False,
) -> None:
    level = logging.DEBUG if verbose else logging.WARNING if quiet or not is_main() else logging.INFO
    logging.basicConfig(level=level, stream=sys.stderr, format="%(message)s", force=True)
    for noisy in ("matplotlib", "filelock", "urllib3", "httpx", "asyncio", "torch", "diffusers", "huggingface_hub"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def main() -> None:
    """The entry point: errors become one line and an exit status."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        sys.exit(app(standalone_mode=False))
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # a bare `deme`: the message is the help
            print(error.format_message(), file=sys.stderr)
            sys.exit(2)
        _fail(f"{error.format_message()} ({_asked(error)} --help tells more)", 2)
    except UserError as error:
        _fail(str(error), 2)
    except (Interrupted, KeyboardInterrupt) as error:
        again = "" if isinstance(error, Stopped) else "; run the same command again to go on"
        _fail(f"interrupted: {str(error) or 'nothing is lost'}{again}", 130)
    except MachineError as error:
        _fail(str(error), 1)
    except OSError as error:
        _fail(f"{error.filename or 'the machine'}: {error.strerror or error}", 1)
    except Exception as error:
        if type(error).__name__ not in ("MemoryError", "OutOfMemoryError"):  # the latter is torch's, not imported here
            raise
        _fail("out of memory: lower decouple.train_batch_size or runtime.sample_batch_size, and run again to go on", 1)


def _asked(error: Any) -> str:
    """The sub-command that a usage error is about, as `deme merge`."""
    context, words = getattr(error, "ctx", None), list[str]()
    while context is not None and context.parent is not None:
        words, context = [str(context.info_name), *words], context.parent
    return " ".join(["deme", *words])


def _terminated(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _fail(line: str, status: int) -> None:
    if is_main() or status == 1:  # what the user did wrong, or stopped, every process of a launch would say
        print(f"deme: {' '.join(line.split())}", file=sys.stderr)
    sys.exit(status)
