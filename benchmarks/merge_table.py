"""Every merge method and every search on one recipe's experts: report-split loss and FD, with spread over its seeds.

    python benchmarks/merge_table.py [RECIPE] [KEY=VALUE ...] [--methods a,b] [--searches a,b] [--objectives fd,loss]
        [--runs DIR] [--out DIR]

An arm is the recipe with one change; all share the experts, so that the trainings are done once. Methods stand with
their own default weights (no search), searches with task arithmetic. A method that takes N experts only (slerp: two)
gets a division into N ranges, beside task arithmetic on the same experts. Prints the table, and each search's weights;
`--out` also writes it as table.json, .md and .csv.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from deme_diffusion import evaluate, merge
from deme_diffusion.merging.table import METHODS
from deme_diffusion.recipes import load
from deme_diffusion.report.cells import REAL_IMAGES, Row, metric_names
from deme_diffusion.report.tables import markdown, write_table

SEARCHES = ("least_squares", "gradient", "grid", "cma_es", "tpe")
OBJECTIVES = ("fd", "loss", "relative_loss")
BY_LOSS = ("least_squares", "gradient")
"""Searches whose proposals come from the loss, whatever the objective."""
SHOWN = ("loss", "FD(", "precision", "recall")


@dataclass(frozen=True)
class Arm:
    """A row of the table: its name, and the settings that it changes."""

    name: str
    changes: tuple[str, ...]
    weights: bool = False


def arms(num_ranges: int, methods: list[str], searches: list[str], objectives: list[str]) -> Iterator[Arm]:
    """Every method by its default weights, then every search."""
    for name in methods:
        fixed = METHODS[name].experts
        changes = (f"merge.method={name}", "merge.search=none")
        if fixed in (None, num_ranges):
            yield Arm(name, changes)
            continue
        division = f"decouple.num_ranges={fixed}"
        yield Arm(f"task_arithmetic (N = {fixed})", ("merge.search=none", division))
        yield Arm(f"{name} (N = {fixed})", (*changes, division))
    for search in searches:
        for objective in objectives[:1] if search in BY_LOSS else objectives:
            name = search if search in BY_LOSS else f"{search} on {objective}"
            yield Arm(name, (f"merge.search={search}", f"merge.objective={objective}"), weights=True)


def names_of(text: str, known: Collection[str], what: str) -> list[str]:
    """Names between commas; one that is none ends the benchmark before anything is trained."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            sys.exit(f"{what}: {name}: no such name; one of {', '.join(known)}")
    return names


def measured(recipe: str, changes: list[str], arm: Arm, runs: Path) -> list[Row]:
    """The rows of one arm: the experts before the merge, and the merged model under the arm's name."""
    rows = evaluate(recipe, *changes, *arm.changes, out=runs / arm.name.replace(" ", ""))
    return [{**row, "model": arm.name} if row["model"] == "merged" else row for row in rows]


def weights_of(recipe: str, changes: list[str], arm: Arm, runs: Path) -> list[str]:
    """What each training seed's search chose, a line a seed."""
    found = merge(recipe, *changes, *arm.changes, out=runs / arm.name.replace(" ", ""))
    return [f"- {arm.name}, seed {m.seed}: ({', '.join(f'{w:.3f}' for w in m.weights)}) by {m.source}" for m in found]


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="digits-full")
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--searches", default=",".join(SEARCHES))
    parser.add_argument("--objectives", default="fd,loss")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    logging.basicConfig(level="INFO", format="%(message)s")
    changes = ["evaluate.controls=[]", *given.changes]
    methods = names_of(given.methods, METHODS, "--methods")
    searches = names_of(given.searches, SEARCHES, "--searches")
    objectives = names_of(given.objectives, OBJECTIVES, "--objectives")
    ranges = load(given.recipe, changes).recipe.decouple.num_ranges
    chosen = arms(ranges, methods, searches, objectives)
    table: dict[str, Row] = {}
    lines: list[str] = []
    for arm in chosen:
        for row in measured(given.recipe, changes, arm, given.runs):
            if arm.name == row["model"] or (row["model"] in ("base", "ensemble", REAL_IMAGES) and "(N" not in arm.name):
                table.setdefault(row["model"], row)
        lines += weights_of(given.recipe, changes, arm, given.runs) if arm.weights else []
    rows = [row for name, row in table.items() if name != REAL_IMAGES]
    rows += [table[REAL_IMAGES]] if REAL_IMAGES in table else []  # none where every arm is of another division
    shown = [name for name in metric_names(rows) if name.startswith(SHOWN) and "[" not in name]
    print(markdown(rows, shown), *lines, sep="\n")
    if given.out:
        write_table(rows, given.out)


if __name__ == "__main__":
    main()
