"""How much of what a grid finds the other searches find, and in how much of its time.

    python benchmarks/search.py [RECIPE] [KEY=VALUE ...] [--out RUN] [--repeats 3] [--grid FILE] [--searches a,b]

The objective is the fixed-noise loss on the search split. The grid takes 5 values a weight; all of its points are
evaluated, in as many parts as there are searches to time, in alternation with them. Each search starts from nothing;
its time holds all that it asks, and the loss on all points of what it proposes. `recovered` is its part of the grid's
improvement over w = 0, above 100% where it finds better. `evaluations` are of the loss on all points or, of normal
equations and gradients, their worth in forward passes: N + 1 for the equations, 3 for a gradient. Rows named `default`
are the recipe's own settings, others are tuned, as their names say. Experts that are not in RUN are trained first.

`--grid` keeps the grid's values in a file, for the search and the values that they are of. With such a file few of its
points are evaluated: w = 0 and the best, which must come out the same, and some to reckon the time from. The exit
status is 1 where a search misses what it is held to.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deme_diffusion import api
from deme_diffusion.files import canonical_digest
from deme_diffusion.merging.search import Candidate, proposed
from deme_diffusion.pipeline.run import open_run
from deme_diffusion.pipeline.searching import Asked
from deme_diffusion.pipeline.stages import Stages
from deme_diffusion.recipes import load

VALUES, RESERVE = (0.0, 0.25, 0.5, 0.75, 1.0), 100
MOST_TIME, LEAST_FOUND = 2.0, 95.0
RECKONED = 9
"""Points of the grid that its time is reckoned from where its values are known."""


@dataclass(frozen=True)
class Row:
    """A search of the table: its settings, and what it is held to (% of the grid's time, evaluations)."""

    name: str
    settings: tuple[str, ...]
    most_time: float | None = None
    most_evaluations: int | None = None
    quick: bool = True


ROWS = (
    Row("least_squares, default", ("search=least_squares",), MOST_TIME),
    Row("gradient, default", ("search=gradient",), MOST_TIME),
    Row("least_squares, scale 1 alone", ("search=least_squares", "scales=[1.0]"), MOST_TIME),
    Row("least_squares, 1 Gauss-Newton round", ("search=least_squares", "scales=[1.0]", "gauss_newton_rounds=1")),
    Row("gradient from 0, 12 steps", ("search=gradient", "start=zero", "gradient_steps=12"), MOST_TIME),
    Row("cma_es from least squares", ("search=cma_es",), None, 60, quick=False),
    Row("cma_es cold", ("search=cma_es", "start=zero"), None, 150, quick=False),
    Row("tpe from least squares", ("search=tpe",), None, 60, quick=False),
)


@dataclass(frozen=True)
class Found:
    """What one search found: the loss, its weights, seconds, evaluations of the loss or their worth."""

    value: float
    weights: list[float]
    seconds: float
    evaluations: float


@dataclass
class Grid:
    """The grid's points with their losses, as far as they are known, and the seconds of those evaluated now."""

    points: list[Candidate]
    values: dict[int, float]
    seconds: list[float]
    known: bool

    @property
    def best(self) -> int:
        """The point of the least loss."""
        return min(self.values, key=self.values.__getitem__)

    @property
    def zero(self) -> int:
        """w = 0."""
        return next(i for i, point in enumerate(self.points) if not any(point.weights))

    @property
    def whole(self) -> float:
        """Seconds of all points: measured, or reckoned from those that were evaluated now."""
        return statistics.mean(self.seconds) * len(self.points)


class Bench:
    """The experts of one run and what is asked of them."""

    def __init__(self, recipe: str, overrides: Sequence[str], out: Path) -> None:
        self.recipe, self.overrides, self.out = recipe, list(overrides), out
        api.decouple(recipe, *overrides, out=out)

    @contextmanager
    def asked(self, settings: Sequence[str], evaluations: int) -> Iterator[Asked]:
        """A search's questions, with an empty journal and everything loaded that does not depend on the weights."""
        changes = [f"merge.{each}" for each in ("objective=loss", "max_evaluations=100000", *settings)]
        run = open_run(load(self.recipe, [*self.overrides, *changes]), out=self.out)
        stages, node = Stages(run.graph, run.store), next(iter(run.graph.searches.values()))
        with tempfile.TemporaryDirectory() as folder, stages._merger(node) as merger:
            asked = Asked(stages, node, merger, Path(folder) / "search.jsonl")
            asked.budget.limit = evaluations
            for runs in asked.loss.objective.noise.ranges:  # the first look at an image reads it
                list(asked.loss.objective.noise.batches(runs, stages.device))
            asked.materialise([0.0] * asked.experts)
            yield asked

    def search(self, row: Row) -> Found:
        """One search from an empty journal."""
        with self.asked(row.settings, row.most_evaluations or RESERVE) as asked:
            started = time.perf_counter()
            tried = list(proposed(asked.settings, lambda: asked.loss, lambda: asked.loss, asked.space, asked.seed))
            value, best = min(((asked.loss.value(c.merge_weights), c) for c in tried), key=lambda pair: pair[0])
            return Found(value, best.weights, time.perf_counter() - started, asked.budget.spent)

    @contextmanager
    def grid(self, file: Path | None) -> Iterator[tuple[Grid, Callable[[int, int], None]]]:
        """The grid, and what evaluates a part of it. Exits where a file is of another search or other values."""
        with self.asked(["search=grid", f"grid_values={list(VALUES)}"], 10**6) as asked:
            points = list(proposed(asked.settings, lambda: asked.loss, lambda: asked.loss, asked.space, asked.seed))
            covered = {"search": asked.node.digest, "values": list(VALUES)}
            of = canonical_digest(covered)
            kept = json.loads(file.read_text()) if file and file.is_file() else None
            if kept and kept.get("of") != of:
                sys.exit(f"{file}: a grid of another search, or of other values; give another file")
            values = {i: float(value) for i, value in enumerate(kept["values"])} if kept else {}
            grid = Grid(points, values, [], bool(kept))
            todo = _some(grid) if kept else list(range(len(points)))

            def evaluate(part: int, parts: int) -> None:
                for i in todo[part::parts]:
                    started = time.perf_counter()
                    value = asked.loss.value(points[i].merge_weights)
                    grid.seconds.append(time.perf_counter() - started)
                    if value != grid.values.setdefault(i, value):
                        sys.exit(f"{file}: {points[i].weights}: {grid.values[i]} there, {value} now; remove the file")

            yield grid, evaluate
            if file and not kept:
                file.write_text(json.dumps({"of": of, "values": [grid.values[i] for i in range(len(points))]}))


def _some(grid: Grid) -> list[int]:
    """w = 0, the best, and others all over the grid."""
    step = max(1, len(grid.points) // RECKONED)
    return list(dict.fromkeys([grid.zero, grid.best, *range(0, len(grid.points), step)]))


def line(row: Row, results: list[Found], grid: Grid) -> tuple[str, bool]:
    """A row of the table, and whether it keeps what it is held to."""
    base = grid.values[grid.zero]
    recovered = 100 * (base - results[0].value) / (base - grid.values[grid.best])
    seconds = [result.seconds for result in results]
    share = 100 * statistics.median(seconds) / grid.whole
    kept = recovered >= LEAST_FOUND
    kept &= row.most_time is None or share <= row.most_time
    kept &= row.most_evaluations is None or results[0].evaluations <= row.most_evaluations
    held = [f"{LEAST_FOUND:g}%", *([] if row.most_time is None else [f"{row.most_time:g}% of the time"])]
    held += [] if row.most_evaluations is None else [f"{row.most_evaluations} evaluations"]
    spread = f" ({min(seconds):.2f} to {max(seconds):.2f})" if len(seconds) > 1 else ""
    cells = [
        f"{recovered:.1f}%",
        f"{share:.2f}%",
        f"{statistics.median(seconds):.2f}{spread}",
        f"{results[0].evaluations:.1f}",
        " ".join(f"{w:.3f}" for w in results[0].weights),
        f"{', '.join(held)}: {'kept' if kept else 'MISSED'}",
    ]
    return f"| {row.name} | {' | '.join(cells)} |", kept


def described(grid: Grid) -> str:
    """What the grid found, and how its time is known."""
    count, base, best = len(grid.points), grid.values[grid.zero], grid.points[grid.best].weights
    how = f"reckoned from {len(grid.seconds)} evaluations now" if grid.known else "all measured in this run"
    found = f"{grid.values[grid.best]:.6f} at {best}" if grid.values[grid.best] < base else "nothing better"
    return (
        f"loss {base:.6f} at w = 0; {len(VALUES)} values a weight, {count} points: {found} in {grid.whole:.0f} s, {how}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="digits")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, default=Path("runs/search-benchmark"), help="the run with the experts")
    parser.add_argument("--repeats", type=int, default=3, help="of the quick searches, for their time")
    parser.add_argument("--grid", type=Path, help="where the grid's values are kept")
    parser.add_argument("--searches", default="", help="parts of names, between commas; all where none is given")
    options: Any = parser.parse_intermixed_args()

    bench = Bench(options.recipe, options.overrides, options.out)
    rows = [row for row in ROWS if any(part in row.name for part in options.searches.split(","))]
    if not rows:
        sys.exit(f"--searches {options.searches}: no such search; parts of {', '.join(row.name for row in ROWS)}")
    repeats = [row for number in range(options.repeats) for row in rows if row.quick or not number]
    results: dict[str, list[Found]] = {row.name: [] for row in rows}
    with bench.grid(options.grid) as (grid, evaluate):
        for number, row in enumerate(repeats):
            evaluate(number, len(repeats))
            results[row.name].append(bench.search(row))
    print(f"{options.recipe}: {described(grid)}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    if not grid.values[grid.best] < grid.values[grid.zero]:
        sys.exit("the grid finds nothing better than w = 0, so that there is nothing to recover")
    print("| search | recovered | of the grid's time | seconds (least to most) | evaluations or their worth | weights "
          "| held to |")  # fmt: skip
    print("| --- | ---: | ---: | ---: | ---: | --- | --- |")
    lines = [line(row, results[row.name], grid) for row in rows]
    print(*(text for text, _ in lines), sep="\n")
    sys.exit(0 if all(kept for _, kept in lines) else 1)


if __name__ == "__main__":
    main()
