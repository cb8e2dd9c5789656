"""An experiment: a baseline and arms that differ from it by the stated change, their stages made together. No torch."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deme_diffusion.ablate import folder as folders
from deme_diffusion.ablate.arms import Arm, Resolved
from deme_diffusion.ablate.plan import Plan
from deme_diffusion.artefacts import Artefact
from deme_diffusion.config import Recipe
from deme_diffusion.errors import UserError
from deme_diffusion.pipeline.engine import Engine
from deme_diffusion.pipeline.estimate import WAITS
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.node import Node
from deme_diffusion.pipeline.run import Run

log = logging.getLogger(__name__)
WORTH_TELLING = 1.0
"""Seconds of a stage that a line is written of; of every training there is one."""
NOTED_EVERY = 3.0
"""Seconds between two notes of the stages that are done: of thousands, writing them takes longer than making one."""


@dataclass(eq=False)
class Case:
    """The baseline, or what arms of equal change run: its stages, and why one of them failed."""

    recipe: Recipe
    graph: Graph
    error: str = ""
    targets: list[Node] = field(init=False)
    needed: list[Node] = field(init=False)

    def __post_init__(self) -> None:
        self.open(self.graph)

    def open(self, graph: Graph) -> None:
        """Take over a graph: the stages that measure the base and the outcome, and what they need."""
        self.graph, self.targets = graph, graph.measured(self.rows)
        # The division is made by the similarity, which is no parent of what is trained on the subsets.
        self.needed = graph.needed([*self.targets, *([graph.similarity] if graph.similarity else [])])

    @property
    def rows(self) -> list[str]:
        """Rows of the table that are measured."""
        return ["base", self.graph.outcome]

    @property
    def steps(self) -> int:
        """Training steps of it alone."""
        return sum(node.steps for node in self.needed)

    @property
    def digests(self) -> set[str]:
        """What it measures, by content."""
        return {node.digest for node in self.targets}


@dataclass(frozen=True)
class Trial:
    """An arm of the plan with the case that it runs (None where it is not to run) and its folder's name.

    `error`: why an arm that could be run has no case, as what it starts from could not be fetched.
    """

    arm: Arm
    slug: str
    case: Case | None = None
    error: str = ""

    @property
    def reason(self) -> str:
        """What is to be said of the arm now: once the gradients were compared, its division no longer waits."""
        waits = WAITS if self.case and self.case.graph.provisional else ""
        return "; ".join(filter(None, (self.arm.reason, waits)))


@dataclass(frozen=True)
class Part:
    """An ablation with its arms."""

    resolved: Resolved
    trials: tuple[Trial, ...]


@dataclass
class Experiment:
    """An opened experiment. `stages`: what is known of each stage by its digest, as it is found done or finishes.

    `begun`: its folder is this experiment's; `noted`: when the stages were last written there.
    """

    plan: Plan
    name: str
    run: Run
    baseline: Case
    parts: list[Part]
    source: Path | None = None
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    begun: bool = False
    noted: float = field(default_factory=time.monotonic)

    @property
    def folder(self) -> Path:
        """Where it lies: in the run folder of its baseline."""
        return self.run.folder / folders.ABLATIONS / self.name

    @property
    def trials(self) -> list[Trial]:
        """All arms."""
        return [trial for part in self.parts for trial in part.trials]

    @property
    def ready(self) -> list[Trial]:
        """The arms that are to run."""
        return [trial for trial in self.trials if trial.case]

    @property
    def cases(self) -> list[Case]:
        """The baseline and every different case."""
        return list(dict.fromkeys([self.baseline, *(trial.case for trial in self.ready if trial.case)]))

    @property
    def union(self) -> dict[str, tuple[Graph, Node]]:
        """Every stage once, by its digest."""
        return {node.digest: (case.graph, node) for case in reversed(self.cases) for node in case.needed}

    def steps(self) -> dict[str, int]:
        """Training steps as they are made, `shared`, and of `independent` runs of the baseline and each arm."""
        alone = self.baseline.steps + sum(trial.case.steps for trial in self.ready if trial.case)
        return {"shared": sum(node.steps for _, node in self.union.values()), "independent": alone}

    def trained(self) -> dict[str, int]:
        """The same of the trainings that are done: where arms failed, or were interrupted, fewer."""
        cases = [self.baseline, *(trial.case for trial in self.ready if trial.case)]
        alone = sum(self.steps_done(case.needed) for case in cases)
        return {"shared": self.steps_done(node for _, node in self.union.values()), "independent": alone}

    def steps_done(self, nodes: Iterable[Node]) -> int:
        """Training steps of the stages that are done."""
        return sum(node.steps for node in nodes if node.steps and self.run.store.status(node.key) == "done")

    def seconds(self) -> dict[str, float]:
        """The same of the seconds that stages took, whenever that was."""
        alone = [self.baseline, *(trial.case for trial in self.ready if trial.case)]
        each = sum(self.spent(case.needed) for case in alone)
        return {"shared": self.spent(node for _, node in self.union.values()), "independent": each}

    def spent(self, nodes: Iterable[Node]) -> float:
        """Seconds that some stages took."""
        each = (float(self.stages.get(node.digest, {}).get("seconds", 0.0)) for node in nodes)
        return round(sum(each), 2)

    # -- running -----------------------------------------------------------------------------------

    def execute(self) -> None:
        """Make what is not done of all arms and the baseline, each stage once; an arm that fails notes why.

        Raises what the baseline raises, without which there is nothing to compare; Interrupted, to be resumed.
        """
        self.run.prepare()
        folders.begin(self)
        self.begun = True
        with Engine(self.run.store, self.run.recipe.runtime, self._finished) as engine:
            try:
                self._compare_gradients(engine)
                engine.run([(case.graph, case.needed) for case in self._possible()])
            finally:
                for case in self._possible():
                    if error := engine.error_of(case.graph, case.needed):
                        case.error = told(error)
                folders.note(self)
        folders.link_arms(self)

    def _possible(self) -> list[Case]:
        return [case for case in self.cases if not case.error]

    def _compare_gradients(self, engine: Engine) -> None:
        """Divisions by gradients need the similarity of gradients first, and are known then."""
        waiting = [case for case in self.cases if case.graph.provisional]
        if not waiting:
            return
        compared = [(case.graph, [case.graph.similarity]) for case in waiting if case.graph.similarity]
        asked = [(graph, graph.needed(nodes)) for graph, nodes in compared]
        known = {node.digest for _, nodes in asked for node in nodes}
        ours = [node for node in self.baseline.needed if node.digest in known]  # without which there is no baseline
        engine.run(asked if self.baseline in waiting else [(self.baseline.graph, ours), *asked])
        for case, (graph, nodes) in zip(waiting, asked, strict=True):
            if error := engine.error_of(graph, nodes):
                case.error = told(error)
                continue
            try:
                case.open(Graph(case.recipe, store=self.run.store, drawn=()))
            except UserError as error:  # so many subsets cannot be cut there
                case.error = told(error)
        folders.note(self)

    def _finished(self, node: Node, artefact: Artefact, reused: bool) -> None:
        self.stages[node.digest] = {"seconds": round(artefact.seconds, 2), "reused": reused, "steps": node.steps}
        if any(known.digest == node.digest for known in self.run.graph.nodes):
            self.run.note(node, artefact, reused)  # so that its folder is known to hold results
        if not reused:
            worth = node.steps or artefact.seconds >= WORTH_TELLING
            log.log(logging.INFO if worth else logging.DEBUG, "%s: done in %.1f s", self._said(node), artefact.seconds)
        if not reused and time.monotonic() - self.noted > NOTED_EVERY:
            folders.note(self)
            self.noted = time.monotonic()

    def _said(self, node: Node) -> str:
        graph, _ = self.union.get(node.digest, (self.baseline.graph, node))
        return f"{graph.recipe.name}: {node.label}"


def told(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    ours = type(error).__name__ in ("UserError", "MachineError")
    return text if ours and text else f"{type(error).__name__}: {text}"
