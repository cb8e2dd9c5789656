"""`deme plan`: the next ablation plan of a recipe, by what was measured, or asked of a language model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deme_diffusion.cli import show
from deme_diffusion.cli.command import app
from deme_diffusion.cli.options import Overrides
from deme_diffusion.errors import UserError

if TYPE_CHECKING:
    from deme_diffusion.ablate.plan import Plan
    from deme_diffusion.config import Recipe

log = logging.getLogger(__name__)
_RECIPE = "Name of a packaged recipe, a YAML path, or a run folder: the baseline that is ablated."
_RUNS = "Folder whose ablations (ablation.json) are read: arms done on this baseline are dropped, others are evidence."
_OUT = "The plan as Markdown, for deme ablate.  [stdout; with --model also RUNS/plans/RECIPE-MODEL.md]"
_MODEL = "Ask this language model (extra lm) instead of ranking offline; request and answer are kept beside the plan."
_URL = "Any OpenAI-compatible address, as http://localhost:8000/v1.  [OPENAI_BASE_URL, else OpenAI's]"
_KEY = "Environment variable that holds the key; local addresses need none.  [OPENAI_API_KEY]"
_PROMPTS = "Folder with system.md, user.md, repair.md (Jinja) to use in place of the packaged ones."


@app.command()
def plan(
    recipe: Annotated[str, typer.Option(help=_RECIPE)],
    overrides: Overrides = None,
    count: Annotated[int, typer.Option(min=1, help="Ablations that the plan holds at most.")] = 5,
    runs: Annotated[Path | None, typer.Option(help=f"{_RUNS}  [runs]")] = None,
    out: Annotated[Path | None, typer.Option(help=_OUT)] = None,
    html: Annotated[Path | None, typer.Option(help="Also the page with reasoning and plan in two boxes.")] = None,
    model: Annotated[str | None, typer.Option(help=_MODEL)] = None,
    base_url: Annotated[str | None, typer.Option(help=_URL)] = None,
    key_env: Annotated[str | None, typer.Option(metavar="NAME", help=_KEY)] = None,
    paper: Annotated[Path | None, typer.Option(help="The method's text for the model.  [a packaged summary]")] = None,
    prompts: Annotated[Path | None, typer.Option(help=_PROMPTS)] = None,
    timeout: Annotated[float | None, typer.Option(min=0.1, help="Seconds for one answer.  [120]")] = None,
    retries: Annotated[int | None, typer.Option(min=0, help="Attempts after a first that failed.  [4]")] = None,
) -> None:
    """Write the next ablation plan, which deme ablate runs entirely.

    Offline it ranks what the parts table allows and no ablation on disk has done, by measured effect, novelty and
    training steps, and says its reasons. With --model a language model proposes, and each entry is checked.
    """
    from deme_diffusion.clean_up import PLANS
    from deme_diffusion.planner.offline import propose
    from deme_diffusion.recipes import load

    wanted = load(recipe, overrides or []).recipe
    asking = {"--base-url": base_url, "--key-env": key_env, "--paper": paper, "--prompts": prompts,
              "--timeout": timeout, "--retries": retries}  # fmt: skip
    folder = _runs(runs)
    _check_free({"--out": out, "--html": html})
    if model is not None:
        at = out or _free(folder / PLANS, f"{wanted.name}-{model}")
        _check_record_free(at)
        made = _asked(model, asking, wanted, folder, at, count)
        _write(made, wanted, at, html, printed=out is None)
        return
    _refuse(asking)
    proposed = propose(wanted, folder, count)
    if proposed is None:
        show.say(f"{wanted.name}: every ablation that the parts table allows is done; there is nothing to plan")
        return
    _write(proposed, wanted, out, html)


def _asked(model: str, asking: Mapping[str, Any], recipe: Recipe, runs: Path, at: Path, count: int) -> Plan:
    """The plan of a language model."""
    from deme_diffusion.planner.dialogue import ask_for_plan
    from deme_diffusion.planner.prompting import Prompts, read_paper
    from deme_diffusion.planner.service import find_service

    names = {"--key-env": "key_name", "--timeout": "timeout", "--retries": "retries"}
    given = {name: asking[option] for option, name in names.items() if asking[option] is not None}
    service = find_service(model, asking["--base-url"], **given)
    prompts, paper = Prompts(asking["--prompts"]), read_paper(asking["--paper"])
    return ask_for_plan(service, recipe, runs, at, paper=paper, prompts=prompts, count=count)


def _write(plan: Plan, recipe: Recipe, out: Path | None, html: Path | None, *, printed: bool = False) -> None:
    """The plan to its files, or to stdout; nothing is written that does not read as the plan it is."""
    from deme_diffusion.ablate.writing import to_html
    from deme_diffusion.files import write_text
    from deme_diffusion.planner.checked import markdown_of

    title = f"Ablation plan for {recipe.name}"
    text, page = markdown_of(plan, recipe, title), to_html(plan, title)
    written = [(path, content) for path, content in ((out, text), (html, page)) if path is not None]
    for path, content in written:
        write_text(path, content)
    paths = [str(path) for path, _ in written]
    if out is None or printed:
        for name in paths:
            log.info("%s", name)
        show.say(text.rstrip())
    else:
        show.say(*paths)


def _runs(given: Path | None) -> Path:
    if given is not None and not given.is_dir():
        raise UserError(f"--runs {given}: no such folder")
    return given or Path("runs")


def _check_free(files: Mapping[str, Path | None]) -> None:
    """What is there may be the plan of results on disk, or an answer that was paid for."""
    for option, path in files.items():
        if path is not None and path.exists():
            raise UserError(f"{option} {path}: exists already; give a name that is free")


def _check_record_free(plan: Path) -> None:
    """An answer that left no plan was paid for as well."""
    from deme_diffusion.planner.dialogue import record_paths

    path = next((path for path in record_paths(plan) if path.exists()), None)
    if path:
        raise UserError(f"--out {plan}: {path.name} of an earlier call lies beside it; give a name that is free")


def _free(folder: Path, name: str) -> Path:
    """A free name for a plan, made of the letters that every disk takes."""
    stem = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in name).strip(".-")[:100]
    names = (stem if number == 1 else f"{stem}-{number}" for number in range(1, 10**6))
    taken = (".md", ".request.json", ".answer.json")
    return next(folder / f"{one}.md" for one in names if not any((folder / f"{one}{end}").exists() for end in taken))


def _refuse(asking: Mapping[str, Any]) -> None:
    """Options that would be ignored are wrong input."""
    name = next((name for name, value in asking.items() if value is not None), None)
    if name:
        raise UserError(f"{name}: it is for --model; without it nobody is asked")
