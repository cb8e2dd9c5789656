"""A run: the run folder with resolved recipe, links, table and page; the whole graph, or some of its stages."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deme_diffusion.artefacts import Artefact, Store, try_lock
from deme_diffusion.config import FIGURES, AnalyzeSettings, FigureName
from deme_diffusion.errors import MachineError, UserError
from deme_diffusion.files import canonical_digest, link, write_json, write_text
from deme_diffusion.pipeline import table
from deme_diffusion.pipeline.engine import run_stages
from deme_diffusion.pipeline.evidence import (
    ABLATIONS,
    ASKED,
    RECORD,
    RUN,
    Evidence,
    figures_asked,
    first_command,
    held,
    noted,
)
from deme_diffusion.pipeline.graph import Graph, shown
from deme_diffusion.pipeline.node import Node
from deme_diffusion.processes import is_main
from deme_diffusion.recipes import RESOLVED, Loaded, load, to_yaml
from deme_diffusion.report.card import model_card
from deme_diffusion.report.page import write_page
from deme_diffusion.report.tables import Row, write_table
from deme_diffusion.report.verdict import Verdict, verdict

__all__ = ["ABLATIONS", "ASKED_FOR", "RECORD", "RUN", "RUNS", "STORE", "Run", "is_experiment", "open_run"]

log = logging.getLogger(__name__)
RUNS, STORE = Path("runs"), "store"
LOCK, PATIENCE = ".run", 10.0
"""Held while `run.json` is written, and waited for so many seconds."""
ASKED_FOR = ("fisher", *FIGURES)
"""Stages that sub-commands make, whether or not the recipe needs them."""
DRAWN = AnalyzeSettings.model_fields.keys() - {"experts", "merged"}
"""Settings of `analyze` that another command may change in a run folder: figures are results of no model."""
Targets = Sequence[Node] | Callable[[Graph], Sequence[Node]]


class Run(Evidence):
    """An opened run that can go on: its stages, made and noted, and the evidence written into its folder.

    `resumed`: it was opened by its folder; `whole`: all of it was asked for here; `ended`: when that had its table.
    `asked`: figures that were asked for by name; `failure`: which figures could not be made, and why.
    """

    resumed: bool = False
    whole: bool = False
    ended: str | None = None
    asked: frozenset[FigureName] = frozenset()
    failure: MachineError | None = None

    def execute(self, targets: Targets | None = None) -> list[Node]:
        """Make the targets (all stages by default) and what they need; note each in `run.json` as it finishes.

        A function of the graph gives targets that may wait for the division, which makes `graph` another one. Returns:
        the targets.
        """
        wanted = self._wanted(targets)
        self.whole = targets is None
        self.prepare()
        if self.graph.waits(wanted):
            assert not isinstance(targets, Sequence), "what waits for the division has other stages afterwards"
            self._divide()
            wanted = self._wanted(targets)
            self._note()
        for said in self.graph.remarks if is_main() else ():
            log.warning("%s", said)
        nodes = self.graph.needed(wanted)
        last = self._figures_to_make() if targets is None else []
        first = [node for node in nodes if node not in last]
        self._make(first, spared=self._figures_to_make() if self.asked else ())
        if is_main():
            self.link()
        if last:
            self._make(last, spared=last)
        return wanted

    def analyze(self, names: Sequence[FigureName]) -> None:
        """Make these figures; where some cannot be, all others are, and `failure` tells why."""
        self.asked |= frozenset(names)
        self.execute(lambda graph: [node for name in names for node in graph.figure(name)])

    def _figures_to_make(self) -> list[Node]:
        """The stages that only figures need, of those that are not done."""
        required = {node.digest for node in self.required()}
        others = [node for node in self.graph.nodes if node.digest not in required]
        return [node for node in others if self.store.status(node.key) != "done"]

    def _make(self, nodes: Sequence[Node], spared: Sequence[Node]) -> None:
        """Make stages; what fails of the spared ones, which are figures, costs nothing else."""
        lost = {node.digest for node in spared}
        errors = run_stages(self.graph, self.store, nodes, finished=self.finished, spared=lost)
        if errors:
            said = "; ".join(f"{label}: {' '.join(str(error).split())}" for label, error in errors.items())
            self.failure = MachineError(f"the figures are not complete, all else is: {said}")

    def settle(self, nodes: Sequence[Node]) -> None:
        """Where these stages wait for the division, make it; they are of another graph afterwards."""
        if self.graph.waits(nodes):
            self.prepare()
            self._divide()

    def _wanted(self, targets: Targets | None) -> list[Node]:
        found = targets(self.graph) if callable(targets) else targets
        return list(self.graph.nodes if found is None else found)

    def _divide(self) -> None:
        """Compare the gradients that the division is made by, and open the graph again."""
        assert self.graph.similarity is not None, "only a division by gradients waits"
        nodes = self.graph.needed([self.graph.similarity])
        run_stages(self.graph, self.store, nodes, finished=self.finished)
        self.graph = Graph(self.recipe, download=True, store=self.store)
        if self.graph.provisional:
            raise MachineError("the similarity of gradients was taken away after it was made; run again")

    def prepare(self) -> None:
        """Make the folder: the resolved recipe, and all stages by name. Raises UserError where another recipe's is."""
        self.folder.mkdir(parents=True, exist_ok=True)
        resolved = self.folder / RESOLVED
        if resolved.exists():
            there = load(str(self.folder), as_it_stands=True).recipe
            changed = _first_difference(
                there.model_dump(mode="json", exclude={"runtime": True, "analyze": DRAWN}),
                self.recipe.model_dump(mode="json"),
            )
            if changed and self._has_results():
                raise UserError(f"{self.folder}: holds another recipe ({changed}); choose another folder with --out")
        if not is_main():
            return
        with suppress(UserError):  # what this command does not make keeps its seconds
            self.stages = self.recorded()
        write_text(resolved, to_yaml(self.recipe))
        self._note()

    def _has_results(self) -> bool:
        """Whether more than the index of this folder's images was made: else a corrected recipe may take its place."""
        try:
            return any("seconds" in entry and entry.get("stage") != "data" for entry in self.recorded().values())
        except UserError:
            return True

    def _note(self) -> None:
        with try_lock(self.folder / LOCK, timeout=PATIENCE):  # two commands at once must not lose what the other noted
            write_json(self.folder / RUN, self._record())

    def _record(self) -> dict[str, Any]:
        # Every stage is named before it exists, so that a clean-up beside a run takes nothing away from it.
        there: dict[str, dict[str, Any]] = {}
        with suppress(UserError):
            there = self.recorded()
        known = [{"stage": node.stage, "digest": node.digest, "label": node.label} for node in self.graph.nodes]
        here = {node.digest for node in self.graph.nodes}  # and what was once made beside the graph, since asked for
        known += [e for digest, e in there.items() if e.get("stage") in ASKED_FOR and digest not in here]
        stages = [{**there.get(e["digest"], {}), **self.stages.get(e["digest"], {}), **e} for e in known]
        return {"recipe": self.recipe.name, **self._told(), "stages": stages}

    def _told(self) -> dict[str, Any]:
        """What `run.json` says beside stages: only a whole run changes it, for no other command makes the table."""
        there = held(self.folder)
        command, finished = first_command(there), there.get("finished")
        if self.whole:
            command, finished = (command if self.resumed else "") or self.command or command, self.ended
        told = {"command": command, **({"finished": str(finished)} if finished else {})}
        asked = [name for name in FIGURES if name in self.asked or name in figures_asked(there)]
        return {**told, **({ASKED: asked} if asked else {})}

    def finished(self, node: Node, artefact: Artefact, reused: bool) -> None:
        """Note a stage that is done in `run.json`."""
        how = "done already" if reused else f"done in {artefact.seconds:.1f} s"
        log.log(logging.DEBUG if reused else logging.INFO, "%s: %s", node.label, how)
        self.note(node, artefact, reused)

    def note(self, node: Node, artefact: Artefact, reused: bool) -> None:
        """The same without a word."""
        self.stages[node.digest] = {"seconds": round(artefact.seconds, 2), "reused": reused, "steps": node.steps}
        self._note()

    def recorded(self) -> dict[str, dict[str, Any]]:
        """Seconds and steps of the stages as the last run noted them."""
        return noted(self.folder)

    def link(self) -> None:
        """`base`, `experts/<i>` and `merged` beside the table; with several seeds `experts-seed<s>/<i>` and so on."""
        base = self.graph.base
        self._link_to(self.store.folder(base.key) if isinstance(base, Node) else base.folder, "base")
        for seed, experts in self.graph.experts.items():
            for i, expert in enumerate(experts):
                self._link_to(self.store.folder(expert.key), f"experts{self.suffix(seed)}/{i}")
            if seed in self.graph.merged:
                self._link_to(self.store.folder(self.graph.merged[seed].key), f"merged{self.suffix(seed)}")

    def _link_to(self, target: Path, name: str) -> None:
        if target.exists():
            link(target, self.folder / name)

    def rows(self) -> list[Row]:
        """The table, once all that it needs is done."""
        return table.rows(self.graph, self.store, self.graph.extractor_name)

    def report(self) -> tuple[list[Row], Verdict]:
        """Table (JSON, markdown, CSV), page and model card from what the stages left; computes nothing anew."""
        rows = self.rows()
        if not is_main():
            return rows, verdict(rows)
        write_table(rows, self.folder)
        content = self.content(rows)
        write_text(self.folder / "model_card.md", model_card(content))
        write_page(self.folder.absolute(), content)
        if self.whole:
            self.ended = datetime.now(UTC).isoformat(timespec="seconds")
            self._note()
        return rows, verdict(rows)

    def renew(self) -> None:
        """Write table and page again where all that they need is there, so that they show what was made beside."""
        if is_main() and all(self.store.status(node.key) == "done" for node in self.required()):
            self.stages = self.recorded()
            self.report()


def _first_difference(there: dict[str, Any], here: dict[str, Any], above: str = "") -> str:
    """`key is X there, Y here` for the first setting of `there` that differs; '' where none does."""
    for key, value in there.items():
        if isinstance(value, dict) and isinstance(here[key], dict):
            if deeper := _first_difference(value, here[key], f"{above}{key}."):
                return deeper
        elif value != here[key]:
            return f"{above}{key} is {value!r} there, {here[key]!r} here"
    return ""


def is_experiment(folder: Path) -> bool:
    """Whether a folder is one that `deme ablate` made for a plan."""
    return folder.resolve().parent.name == ABLATIONS and (folder / "arms").is_dir()


def open_run(
    loaded: Loaded, *, out: Path | None = None, command: str = "", download: bool = True, beside: bool = False
) -> Run:
    """The run of a recipe in `out`, the folder it came from, or `runs/<recipe>` (`+<digest8>` with overrides).

    `beside`: of one who computes no figure; those whose models are gone are left out.
    """
    recipe, folder = loaded.recipe, out or loaded.folder
    if folder is None:
        changes = {key: value for key, value in loaded.overrides.items() if not key.startswith("runtime.")}
        suffix = f"+{canonical_digest(changes)[:8]}" if changes else ""
        folder = RUNS / f"{recipe.name}{suffix}"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder}: a file, where a run needs a folder")
    if is_experiment(folder):  # a run there would write over what names the arms' stages
        said = f"its baseline is the run {folder.resolve().parent.parent}; its tables again: deme report {folder}"
        raise UserError(f"{folder}: an experiment, no run; {said}")
    store = Store(folder.parent / STORE)
    graph = (shown if beside else Graph)(recipe, download=download, store=store)
    run = Run(recipe, folder, store, graph, command)
    run.resumed = loaded.folder is not None
    return run
