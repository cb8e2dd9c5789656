"""A run that goes on in another process, seen from beside: its page from what is on disk, again and again. No torch.

Nothing is locked, hashed, mended or computed; files that are being written are read as far as they are whole.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from deme_diffusion.artefacts import WORK, Onlooker
from deme_diffusion.errors import MachineError, UserError
from deme_diffusion.pipeline import table
from deme_diffusion.pipeline.evidence import LOSSES, RUN, Evidence, held, noted
from deme_diffusion.pipeline.graph import shown
from deme_diffusion.pipeline.node import Node
from deme_diffusion.pipeline.run import Run
from deme_diffusion.report.page import write_page

log = logging.getLogger(__name__)
CELLS, SAMPLED, TRIALS = f"{WORK}/cells.jsonl", f"{WORK}/sampled.json", "search.jsonl"
"""What stages under way write (`analysis.grid`, `evaluation.sample`, `pipeline.searching`)."""
QUIET = 120.0
"""Seconds without a word after which a stage is told to be silent: its process may have ended."""
STILL = 600.0
"""Seconds without a word from any stage, and without a lock, after which nothing is under way."""
PATIENCE = 5
"""Rounds in a row that may fail: files are replaced while they are read."""
SHARE = 0.2
"""Of the time, at most, that is spent on the page: the run needs the cores."""
Ended = Literal["final", "still", "interrupted"]
"""How a watching ends: the run has ended, nothing is under way, Ctrl-C."""


@dataclass
class Tail:
    """The whole lines of a file that grows, as far as they have been read; one that shrank is read anew."""

    path: Path
    at: int = 0
    records: list[dict[str, Any]] = field(default_factory=list)

    def read(self) -> list[dict[str, Any]]:
        """All records by now; a line that is no JSON object is passed over."""
        with suppress(OSError), self.path.open("rb") as file:
            if self.path.stat().st_size < self.at:
                self.at, self.records = 0, []
            file.seek(self.at)
            new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            self.at += len(whole)
            self.records += _records(whole)
        return self.records


def _records(lines: bytes) -> Iterator[dict[str, Any]]:
    for line in lines.splitlines():
        with suppress(ValueError):
            if isinstance(record := json.loads(line), dict):
                yield record


@dataclass
class Watched(Evidence):
    """A run from beside. `every` is the page's seconds between two loads, None once it does not change any more.

    `still`: nothing is under way, though not all is there.
    """

    every: int | None = None
    still: bool = False
    tails: dict[Path, Tail] = field(default_factory=dict)

    def write(self) -> bool:
        """Write the page as it is now; whether it will not change any more."""
        with suppress(UserError):
            self.stages = noted(self.folder)
        if self.graph.provisional:
            self.graph = shown(self.recipe, store=self.store)
        missing = {node.digest: node for node in self.graph.nodes if self.store.find(node.key) is None}
        lacking = missing.keys() & {node.digest for node in self.required()}
        ended = not missing or (not lacking and bool(held(self.folder).get("finished")))
        self.still = not ended and self._is_still(list(missing.values()))
        whole = ended or (self.still and not lacking)
        content = self.content(table.rows_so_far(self.graph, self.store, self.graph.extractor_name))
        if not whole:
            content["stages"].sort(key=lambda entry: entry["state"] != "running")  # in sight, of a hundred
            content |= {"unfinished": True, "written": f"{datetime.now():%H:%M:%S}"}
            if not self.merged.exists():
                del content["merged_path"]
        write_page(self.folder.absolute(), content, refresh=None if ended or self.still else self.every)
        return ended or self.still

    def _is_still(self, missing: list[Node]) -> bool:
        """Whether nobody is at work on what is missing, by locks and times."""
        assert isinstance(self.store, Onlooker)
        begun = [self.store.folder(node.key) for node in missing if self.store.status(node.key) == "partial"]
        latest = max(_time_of(self.folder / RUN), *map(_last_written, begun), 0.0)
        return time.time() - latest > STILL and not any(self.store.is_held(node.key) for node in missing)

    def entry(self, node: Node) -> dict[str, Any]:
        """A stage with its state: done, running or waiting."""
        entry = super().entry(node)
        there = self.store.status(node.key)
        state = {"done": "done", "partial": "waiting" if self.still else "running", "missing": "waiting"}[there]
        told = self._progress(node) if there == "partial" else ""
        if state != "done":  # what an earlier attempt took is nothing
            entry["seconds"] = self._elapsed(node) if there == "partial" else None
        return {**entry, "steps": node.steps, "state": state, "progress": told}

    def _progress(self, node: Node) -> str:
        """How far a stage is, `340 of 600 steps`, and that it is silent where it is."""
        folder = self.store.folder(node.key)
        silent = time.time() - _last_written(folder)
        said = [part for part in (self._counted(node, folder), f"silent for {silent / 60:.0f} min") if part]
        return ", ".join(said if silent > QUIET else said[:-1])

    def _counted(self, node: Node, folder: Path) -> str:
        if node.steps:
            records = self.tail(folder / LOSSES)
            return f"{records[-1]['step'] if records else 0:,} of {node.steps:,} steps"
        if node.stage == "sample":
            return f"{_sampled(folder / SAMPLED):,} of {self.recipe.evaluate.num_images:,} images"
        if node.stage == "search":
            return f"{len(self.tail(folder / TRIALS)):,} evaluations"
        if cells := self.tail(folder / CELLS):
            axes = [len(cells[0].get(axis, ())) for axis in ("a", "b")]
            return f"{len(cells) - 1:,} of {axes[0] * axes[1]:,} cells"
        return ""

    def _elapsed(self, node: Node) -> float:
        """Seconds of a stage under way up to its last sign of life, earlier attempts included."""
        clock, before = self.store.folder(node.key) / WORK / "seconds.json", 0.0
        try:
            before = float(json.loads(clock.read_bytes())["seconds"])
            return before + max(0.0, _last_written(clock.parent.parent) - clock.stat().st_mtime)
        except (OSError, ValueError, KeyError, TypeError):
            return before

    def tail(self, path: Path) -> list[dict[str, Any]]:
        """The records of a journal that may grow."""
        return self.tails.setdefault(path, Tail(path)).read()

    def points(self, journal: Path, loss: str) -> list[list[float]]:
        """(step, loss) of each line that is there."""
        return [[record["step"], record[loss]] for record in self.tail(journal) if {"step", loss} <= record.keys()]

    def search_of(self, search: Node) -> dict[str, Any] | None:
        """What a search found, or the values that it has by now."""
        if (found := super().search_of(search)) is not None:
            return found
        told = [r for r in self.tail(self.store.folder(search.key) / TRIALS) if _is_value(r)]
        names = [record["objective"] for record in told]
        name = "FD" if "FD" in names else next(iter(names), "")
        trials = [
            {"source": f"evaluation {i}", "weights": record["values"], "value": record["answer"]}
            for i, record in enumerate(told, 1)
            if record["objective"] == name
        ]
        settings = self.recipe.merge
        return {"method": settings.search, "objective": name, "trials": trials, "unfinished": True} if trials else None


def _is_value(record: dict[str, Any]) -> bool:
    return record.get("kind") == "value" and isinstance(record.get("answer"), int | float) and "values" in record


def _last_written(folder: Path) -> float:
    """When anything in a folder was written last, in seconds since the epoch."""
    with suppress(OSError):  # what goes away meanwhile
        return max(map(_time_of, (folder, *folder.rglob("*"))))
    return _time_of(folder)


def _time_of(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _sampled(cursor: Path) -> int:
    try:
        return int(json.loads(cursor.read_bytes())["done"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


# -- again and again ------------------------------------------------------------------------------


def watched(run: Run, every: int | None = None) -> Watched:
    """The run as it is seen from beside."""
    store = Onlooker(run.store.root)
    graph = shown(run.recipe, store=store) if run.graph.provisional else run.graph
    return Watched(run.recipe, run.folder, store, graph, run.command, every=every)


def watch(run: Run, every: int, sleep: Callable[[float], None] = time.sleep) -> Ended:
    """Write the run's page every so many seconds until it is final, nothing is under way, or Ctrl-C; which it was.

    Raises what keeps the page from being written several times in a row.
    """
    seen, failed = watched(run, every), 0
    try:
        while True:
            start = time.monotonic()
            try:
                if seen.write():
                    return "still" if seen.still else "final"
                failed = 0
            except (UserError, MachineError, OSError, ValueError, KeyError) as error:
                failed += 1
                log.debug("not written: %s", error)
                if failed == PATIENCE:
                    raise
            took = time.monotonic() - start
            sleep(max(every, took / SHARE - took))
    except KeyboardInterrupt:
        seen.every = None  # a page that nobody writes any more need not be loaded again
        seen.write()
        return "interrupted"
