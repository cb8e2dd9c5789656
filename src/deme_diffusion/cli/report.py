"""The page of a run again, live while it goes on, of several runs side by side; the merged model ready to upload."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deme_diffusion.cli import show
from deme_diffusion.cli.command import app
from deme_diffusion.cli.options import AsJson, opened
from deme_diffusion.errors import UserError, nearest

if TYPE_CHECKING:
    from deme_diffusion.pipeline.run import Run

EVERY = 5


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders; several are shown side by side.")],
    out: Annotated[Path | None, typer.Option(help="The page's file; needed with several runs.")] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Write the page again and again while the run goes on.")
    ] = False,
    every: Annotated[int | None, typer.Option(min=1, help=f"Seconds between two pages of --watch.  [{EVERY}]")] = None,
    export: Annotated[
        Path | None, typer.Option(help="Put the merged model with its card into this new folder, ready to upload.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the table and page of a finished run again, or, of RUN/ablations/PLAN, those of an experiment."""
    _check_page(out)
    if every is not None and not watch:
        raise UserError(f"--every {every}: says nothing without --watch")
    asked = [name for name, given in {"--watch": watch, "--export": export, "--out": out}.items() if given]
    if len(runs) > 1:
        _side_by_side(runs, out, [name for name in asked if name != "--out"], as_json)
        return
    (named,) = runs
    if watch and (others := [*asked[1:], *(["--json"] if as_json else [])]):
        raise UserError(f"--watch and {others[0]}: the one while the run goes on, the other once it has ended")
    if export is not None and out is not None:
        raise UserError("--export and --out: the one is a folder with a card, the other a page; ask for one at a time")
    if _is_experiment(Path(named)):
        _experiment(named, asked, as_json)
        return
    run = _run(named)
    if watch:
        _watch(run, every or EVERY)
        return
    _check_finished(run)
    run.stages = run.recorded()
    if export is not None:
        _export(run, export, as_json)
        return
    show.table(run, as_json)
    if out is not None:
        _page_at(run, out, as_json)


def _run(named: str) -> Run:
    """The run of a folder, or of a recipe's name in `runs`. UserError where there is none, with the nearest folder."""
    from deme_diffusion.pipeline.run import RUN, RUNS
    from deme_diffusion.recipes import packaged

    path = Path(named)
    if not path.exists() and named not in packaged():
        raise UserError(f"{named}: no such run folder{_nearest(path)}")
    run = opened(named, None, None, dry_run=True, beside=True)
    if not run.folder.is_dir() and run.folder.parent == RUNS:
        raise UserError(f"{run.folder}: no such run folder{_nearest(run.folder)}; it begins with: deme run {named}")
    if not (run.folder / RUN).is_file():
        raise UserError(f"{run.folder}: no {RUN} in it, so no run has begun there; first: deme run {_quoted(run)}")
    return run


def _nearest(folder: Path) -> str:
    """A hint at the run folder beside it whose name is nearest."""
    beside = folder.parent
    names = [one.name for one in beside.iterdir() if (one / "recipe.yaml").is_file()] if beside.is_dir() else []
    hint = nearest(folder.name, names)
    return hint or (f"; beside it there {_are(names)}" if names else "")


def _are(names: Sequence[str]) -> str:
    named = sorted(names)
    more = f" and {len(named) - 4} more" if len(named) > 5 else ""
    return f"{'is' if len(named) == 1 else 'are'} {', '.join(named[:4] if more else named)}{more}"


def _quoted(run: Run) -> str:
    return shlex.quote(str(run.folder))


def _check_finished(run: Run) -> None:
    """Refuse a run whose table is not measured; figures may be missing."""
    from deme_diffusion.pipeline.run import ABLATIONS, RECORD

    unfinished = [node.label for node in run.required() if run.store.status(node.key) != "done"]
    if unfinished:
        count, first = len(unfinished), unfinished[0]
        said = f"{count} stages are not done ({first}, ...)" if count > 1 else f"a stage is not done ({first})"
        found = [str(file.parent) for file in sorted(run.folder.glob(f"{ABLATIONS}/*/{RECORD}"))]
        more = f"; of its ablations: deme report {found[0]}" if found else ""
        raise UserError(f"{run.folder}: {said}; first: deme run {_quoted(run)}{more}")


def _is_experiment(folder: Path) -> bool:
    from deme_diffusion.pipeline.run import RECORD, is_experiment

    return (folder / RECORD).is_file() or is_experiment(folder)


def _experiment(named: str, asked: Sequence[str], as_json: bool) -> None:
    if asked:
        raise UserError(f"{asked[0]}: of a run, and {named} is an experiment; its tables again: deme report {named}")
    from deme_diffusion.cli.ablate import say_again

    say_again(Path(named), as_json)


def _page_at(run: Run, out: Path, as_json: bool) -> None:
    """The page in another place as well; nothing is said beside JSON."""
    from deme_diffusion.files import write_text

    write_text(out, (run.folder / "report.html").read_text(encoding="utf-8"))
    if not as_json:
        show.say(out)


def _check_page(out: Path | None) -> None:
    if out is not None and out.is_dir():
        raise UserError(f"--out {out}: a folder, where the page's file is asked for, as {out / 'report.html'}")


def _watch(run: Run, every: int) -> None:
    from deme_diffusion.pipeline.watching import STILL, watch

    show.say(f"{run.folder / 'report.html'} (Ctrl-C ends the watching, not the run)")
    said = {
        "final": "the run has ended: the page is final",
        "interrupted": "watching ended; the run goes on where it is",
        "still": f"nothing runs, no stage was at work for {STILL / 60:.0f} min; to go on: deme run {_quoted(run)}",
    }
    show.say(said[watch(run, every)])


def _side_by_side(names: Sequence[str], out: Path | None, refused: Sequence[str], as_json: bool) -> None:
    from deme_diffusion.files import write_text
    from deme_diffusion.report.compare import MOST_RUNS, comparison
    from deme_diffusion.report.compare_page import render_comparison

    if refused:
        raise UserError(f"{refused[0]}: of one run, and {len(names)} are given")
    if out is None and not as_json:
        raise UserError(f"--out is needed with {len(names)} runs: the file of the page that shows them side by side")
    if len(names) > MOST_RUNS:
        raise UserError(f"{len(names)} runs: a page holds at most {MOST_RUNS} side by side")
    runs = _several(names)
    contents = [run.content(run.rows()) for run in runs]
    if out is not None:
        write_text(out, render_comparison(contents))
    if as_json:
        show.as_json(comparison(contents))
    elif out is not None:
        show.say(*(f"{run['name']}: {run['verdict']}" for run in comparison(contents)["runs"]), out)


def _several(names: Sequence[str]) -> list[Run]:
    """The runs, each finished. UserError where one is an experiment, or named twice."""
    from deme_diffusion.pipeline.run import is_experiment

    runs: list[Run] = []
    for named in names:
        if _is_experiment(Path(named)):
            baseline = Path(named).resolve().parent.parent if is_experiment(Path(named)) else None
            more = f"; its baseline is the run {baseline}" if baseline else ""
            raise UserError(f"{named}: an experiment, no run; its page by itself: deme report {named}{more}")
        run = _run(named)
        if any(run.folder.resolve() == other.folder.resolve() for other in runs):
            raise UserError(f"{named}: named twice; several runs are compared with one another")
        _check_finished(run)
        run.stages = run.recorded()
        runs.append(run)
    return runs


def _export(run: Run, out: Path, as_json: bool) -> None:
    from deme_diffusion.pipeline.exporting import export_merged

    made = export_merged(run, out)
    if as_json:
        show.as_json({"folder": str(made.folder), "files": made.files, "linked": made.linked})
        return
    show.say(made.folder)
    if made.linked:
        count, link = len(made.linked), "a hard link" if len(made.linked) == 1 else "hard links"
        show.say(f"{count} weight files are {link} into the run's store: replace them, never edit them in place")
    show.say(f"upload: hf upload OWNER/NAME {shlex.quote(str(made.folder))}")
