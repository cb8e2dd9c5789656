"""How much of what a grid finds the other searches find, and in how much of its time.

    python benchmarks/search.py [RECIPE] [KEY=VALUE ...] [--out RUN] [--repeats 3] [--grid FILE] [--searches a,b]

The objective is the fixed-noise loss on the search split. The grid takes 5 values a weight. Each search starts from
nothing; its time holds all that it asks, and the loss on all points of what it proposes. `recovered` is its part of the
grid's improvement over w = 0, above 100% where it finds better. Experts that are not in RUN are trained first. `--grid`
keeps the grid's values in a file: where they are there already, its time is reckoned from a few evaluations made now.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deme_diffusion import api
from deme_diffusion.merging.search import Candidate, proposed
from deme_diffusion.pipeline.run import open_run
from deme_diffusion.pipeline.searching import Asked
from deme_diffusion.pipeline.stages import Stages
from deme_diffusion.recipes import load

VALUES, RESERVE = (0.0, 0.25, 0.5, 0.75, 1.0), 100
MOST_TIME, LEAST_FOUND = 2.0, 95.0


@dataclass(frozen=True)
class Row:
    """A search of the table: its settings, and what it is held to (% of the grid's time, evaluations)."""

    name: str
    settings: tuple[str, ...]
    most_time: float | None = None
    most_evaluations: int | None = None
    quick: bool = True


ROWS = (
    Row("least_squares", ("search=least_squares", "scales=[1.0]"), MOST_TIME),
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

    def grid(self, file: Path | None) -> tuple[Found, float]:
        """The grid's best, and the loss at w = 0."""
        known = json.loads(file.read_text()) if file and file.is_file() else {}
        with self.asked(["search=grid", f"grid_values={list(VALUES)}"], 10**6) as asked:
            points = list(proposed(asked.settings, lambda: asked.loss, lambda: asked.loss, asked.space, asked.seed))
            if known:
                each = statistics.median(_seconds(asked, point) for point in points[:: len(points) // 9])
                return Found(known["value"], known["weights"], each * len(points), len(points)), known["base"]
            started = time.perf_counter()
            values = [asked.loss.value(point.merge_weights) for point in points]
            seconds = time.perf_counter() - started
        best = min(range(len(points)), key=values.__getitem__)
        found = Found(values[best], points[best].weights, seconds, len(points))
        base = values[[point.weights for point in points].index([0.0] * len(points[0].weights))]
        if file:
            file.write_text(json.dumps({"value": found.value, "weights": found.weights, "base": base}))
        return found, base


def _seconds(asked: Asked, point: Candidate) -> float:
    started = time.perf_counter()
    asked.loss.value(point.merge_weights)
    return time.perf_counter() - started


def line(row: Row, results: list[Found], grid: Found, base: float) -> str:
    """A row of the table, and whether it keeps what it is held to."""
    recovered = 100 * (base - results[0].value) / (base - grid.value)
    share = 100 * statistics.median(result.seconds for result in results) / grid.seconds
    kept = recovered >= LEAST_FOUND
    kept &= row.most_time is None or share <= row.most_time
    kept &= row.most_evaluations is None or results[0].evaluations <= row.most_evaluations
    held = [f"{LEAST_FOUND:g}%", *([] if row.most_time is None else [f"{row.most_time:g}% of the time"])]
    held += [] if row.most_evaluations is None else [f"{row.most_evaluations} evaluations"]
    cells = [
        f"{recovered:.1f}%",
        f"{share:.2f}%",
        f"{statistics.median(result.seconds for result in results):.2f}",
        f"{results[0].evaluations:.1f}",
        " ".join(f"{w:.3f}" for w in results[0].weights),
        f"{', '.join(held)}: {'kept' if kept else 'MISSED'}",
    ]
    return f"| {row.name} | {' | '.join(cells)} |"


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
    grid, base = bench.grid(options.grid)
    found = f"{len(VALUES)} values a weight, {grid.evaluations:.0f} points: {grid.value:.6f} at {grid.weights}"
    print(f"{options.recipe}: loss {base:.6f} at w = 0; {found} in {grid.seconds:.0f} s")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| search | recovered | of the grid's time | seconds | evaluations | weights | held to |")
    print("| --- | ---: | ---: | ---: | ---: | --- | --- |")
    for row in ROWS:
        if any(part in row.name for part in options.searches.split(",")):
            results = [bench.search(row) for _ in range(options.repeats if row.quick else 1)]
            print(line(row, results, grid, base), flush=True)


if __name__ == "__main__":
    main()
