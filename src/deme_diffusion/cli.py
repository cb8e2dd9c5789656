"""The command `deme`: thin sub-commands. Results go to stdout, progress and logs to stderr.

Exit status: 0 done; 1 a failure of the machine or ours; 2 the user's input is wrong; 130 interrupted, run again.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from deme_diffusion.errors import Interrupted, MachineError, UserError

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

RecipeArgument = Annotated[str, typer.Argument(help="Name of a packaged recipe, a YAML path, or a run folder.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, as decouple.num_ranges=2.")
]
Out = Annotated[Path | None, typer.Option(help="Run folder; artefacts go into `store` beside it.  [runs/RECIPE]")]
Jobs = Annotated[int | None, typer.Option(min=1, help="Stages to run at once, each in its own process.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would run and stop; no network, no torch.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


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
    level = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
    logging.basicConfig(level=level, stream=sys.stderr, format="%(message)s", force=True)
    for noisy in ("matplotlib", "filelock", "urllib3", "httpx", "asyncio", "torch", "diffusers", "huggingface_hub"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """List the recipes that ship, a line each."""
    from deme_diffusion.recipes import packaged

    shipped = packaged()
    if as_json:
        print(json.dumps(shipped, indent=2))
        return
    for name, description in shipped.items():
        print(f"{name:<16} {description}")


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Out = None,
    jobs: Jobs = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Run a whole recipe: experts, merge, table and page. Running it again resumes; what is done costs nothing."""
    opened = _open(recipe, overrides, out, jobs, dry_run)
    if dry_run:
        _show_plan(opened, as_json)
        return
    opened.execute()
    _show_table(opened, as_json)


def _one_stage(name: str, help_text: str, targets: Callable[[Any], Sequence[Any]], *presets: str) -> None:
    """Register a sub-command that makes some stages of a recipe and what they need."""

    def command(
        recipe: RecipeArgument,
        overrides: Overrides = None,
        out: Out = None,
        jobs: Jobs = None,
        dry_run: DryRun = False,
        as_json: AsJson = False,
    ) -> None:
        opened = _open(recipe, [*presets, *(overrides or [])], out, jobs, dry_run)
        _run_targets(opened, list(targets(opened.graph)), dry_run, as_json)

    app.command(name, help=help_text)(command)


_one_stage(
    "pretrain",
    "Train the recipe's base from scratch, by its `pretrain` section.",
    lambda graph: graph.of_stage("pretrain"),
    "model.pretrained=null",
)
_one_stage(
    "extractor",
    "Train the classifier that serves as feature extractor.",
    lambda graph: graph.of_stage("extractor"),
    "extractor.pretrained=null",
)


@app.command()
def decouple(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    expert: Annotated[int | None, typer.Option(min=0, help="Only this expert, counted from 0.")] = None,
    out: Out = None,
    jobs: Jobs = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Train the experts, all or one."""
    opened = _open(recipe, overrides, out, jobs, dry_run)
    count = opened.recipe.decouple.num_ranges
    if expert is not None and expert >= count:
        raise UserError(f"--expert {expert}: the recipe has {count} experts, 0 to {count - 1}")
    experts = [e for all_of in opened.graph.experts.values() for i, e in enumerate(all_of) if expert in (None, i)]
    _run_targets(opened, experts, dry_run, as_json)


_one_stage("search", "Search the merge weights.", lambda graph: graph.of_stage("search"))
_one_stage("merge", "Merge the experts into one model.", lambda graph: graph.of_stage("merge"))
_one_stage("sample", "Sample the images that the table is measured on.", lambda graph: graph.of_stage("sample"))
_one_stage("evaluate", "Measure every model of the table.", lambda graph: [*graph.of_stage("evaluate"), graph.cost])


@app.command()
def report(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")], as_json: AsJson = False
) -> None:
    """Write the table and page of a finished run again."""
    opened = _open(str(run_folder), None, None, None, dry_run=True)
    unfinished = [node.label for node in opened.graph.nodes if opened.store.status(node.key) != "done"]
    if unfinished:
        raise UserError(
            f"{run_folder}: {len(unfinished)} stages are not done ({unfinished[0]}, ...); first: deme run {run_folder}"
        )
    opened.stages = opened.recorded()
    _show_table(opened, as_json)


@app.command()
def clean(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would go.")] = False,
    runs: Annotated[Path, typer.Option(help="The folder that holds runs and store.")] = Path("runs"),
) -> None:
    """Remove stages that no run refers to."""
    from deme_diffusion.artefacts import Store, referenced
    from deme_diffusion.artefacts import clean as clean_store

    if not runs.is_dir():
        raise UserError(f"{runs}: no such folder")
    removed = clean_store(Store(runs / "store"), referenced(runs), dry_run)
    for path, size in removed:
        print(f"{'would remove' if dry_run else 'removed'} {path} ({size / 1e6:.1f} MB)")
    print(f"{len(removed)} stages, {sum(size for _, size in removed) / 1e6:.1f} MB")


# -- what the commands share ----------------------------------------------------------------------


def _open(recipe: str, overrides: Sequence[str] | None, out: Path | None, jobs: int | None, dry_run: bool) -> Any:
    from deme_diffusion.pipeline.run import open_run
    from deme_diffusion.recipes import load

    changes = [*(overrides or []), *([f"runtime.jobs={jobs}"] if jobs else [])]
    return open_run(load(recipe, changes), out=out, command=_command_line(), download=not dry_run)


def _command_line() -> str:
    return " ".join(["deme", *sys.argv[1:]])


def _run_targets(opened: Any, targets: Sequence[Any], dry_run: bool, as_json: bool) -> None:
    if dry_run:
        _show_plan(opened, as_json, {node.digest for node in opened.graph.needed(targets)})
        return
    opened.execute(targets)
    made = [{"label": n.label, "stage": n.stage, "folder": str(opened.store.folder(n.key))} for n in targets]
    if as_json:
        print(json.dumps(made, indent=2))
        return
    for entry in made:
        print(f"{entry['label']:<32} {entry['folder']}")


def _show_plan(opened: Any, as_json: bool, only: set[str] | None = None) -> None:
    from deme_diffusion.pipeline.estimate import plan
    from deme_diffusion.recipes import to_yaml

    planned = plan(opened, only)
    if as_json:
        print(json.dumps({**planned, "settings": opened.recipe.model_dump(mode="json")}, indent=2))
        return
    print(to_yaml(opened.recipe))
    for stage in planned["stages"]:
        steps = f"{stage['steps']:>8,} steps" if stage["steps"] else ""
        print(f"{stage['status']:<8} {stage['stage']:<10} {stage['digest']}  {stage['label']:<36} {steps}")
    print(f"run folder: {planned['folder']}")
    if planned["download"]:
        print(f"to download: {planned['download']}")
    time = (
        "unknown before the base is here" if planned["seconds"] is None else f"about {planned['seconds'] / 60:.0f} min"
    )
    disk = "unknown" if planned["disk_bytes"] is None else f"about {planned['disk_bytes'] / 1e6:.0f} MB"
    print(f"to do: {planned['steps']:,} steps; {time} on this machine's cores (a rough estimate); disk: {disk}")


def _show_table(opened: Any, as_json: bool) -> None:
    rows, said = opened.report()
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    from rich.console import Console

    from deme_diffusion.report.tables import rich_table

    console = Console(width=None if sys.stdout.isatty() else 160)  # a pipe has no width of its own
    console.print(rich_table(rows, width=console.width))
    print("\n".join([*opened.weights_found(), said.sentence]))
    for path in (opened.merged, opened.folder / "report.html"):
        if path.exists():
            print(path)


def main() -> None:
    """The entry point: errors become one line and an exit status."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        sys.exit(app(standalone_mode=False))
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # a bare `deme`: the message is the help
            print(error.format_message(), file=sys.stderr)
            sys.exit(2)
        _fail(f"{error.format_message()} (deme --help tells more)", 2)
    except UserError as error:
        _fail(str(error), 2)
    except (Interrupted, KeyboardInterrupt) as error:
        _fail(f"interrupted: {str(error) or 'nothing is lost'}; run the same command again to go on", 130)
    except MachineError as error:
        _fail(str(error), 1)
    except OSError as error:
        _fail(f"{error.filename or 'the machine'}: {error.strerror or error}", 1)
    except Exception as error:
        if type(error).__name__ not in ("MemoryError", "OutOfMemoryError"):  # the latter is torch's, not imported here
            raise
        _fail("out of memory: lower decouple.train_batch_size or runtime.sample_batch_size, and run again to go on", 1)


def _terminated(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _fail(line: str, status: int) -> None:
    print(f"deme: {' '.join(line.split())}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
