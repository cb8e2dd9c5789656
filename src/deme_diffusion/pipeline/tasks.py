"""Which stages of several graphs are left to make, and which of them can start: what an engine works off. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.node import Node

Wanted = Sequence[tuple[Graph, Sequence[Node]]]
"""Graphs, each with stages of it, parents first."""


@dataclass(frozen=True)
class Task:
    """A stage with the graph that makes it."""

    graph: Graph
    node: Node


@dataclass
class Queue:
    """What is left to make, what is being made, and what was when a process died."""

    missing: dict[str, Task]
    running: dict[Future[None], Task] = field(default_factory=dict)
    suspects: set[str] = field(default_factory=set)

    def ready(self, jobs: int) -> list[Task]:
        """What can start now in so many processes; a suspect does so alone, to learn which of them was the cause."""
        unfinished = {*self.missing, *(task.node.digest for task in self.running.values())}
        if self.suspects & {task.node.digest for task in self.running.values()}:
            return []
        found = [t for t in self.missing.values() if not any(p.digest in unfinished for p in t.node.parents.values())]
        found.sort(key=lambda task: -task.node.steps)
        calm = [task for task in found if task.node.digest not in self.suspects]
        return calm[: jobs - len(self.running)] if calm or self.running else found[:1]

    def put_back(self) -> bool:
        """After a process died: whether a suspect was running alone, and so was the cause.

        The first time it may as well have been a process that was idle.
        """
        back = {task.node.digest: task for task in self.running.values()}
        again = len(back) == 1 and set(back) <= self.suspects
        self.missing |= back
        self.suspects |= set(back)
        self.running.clear()
        return again


def once(waiting: Wanted) -> list[Task]:
    """Every stage once, parents first: equal keys are one stage, whichever graph names it."""
    tasks: dict[str, Task] = {}
    for graph, nodes in waiting:
        for node in nodes:
            tasks.setdefault(node.digest, Task(graph, node))
    return list(tasks.values())


def wanted_by(wanted: Wanted) -> dict[str, set[Graph]]:
    """Which graphs want each stage, by its digest."""
    found: dict[str, set[Graph]] = {}
    for graph, nodes in wanted:
        for node in nodes:
            found.setdefault(node.digest, set()).add(graph)
    return found
