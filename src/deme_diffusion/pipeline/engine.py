"""Runs the stages of graphs here: one after another, or in K processes pinned to devices. Run again is resume.

One graph is a run, whose first failure ends it. Several are an experiment: what their stages share is made once, and
where one fails, all that does not depend on it goes on. Under `accelerate launch` or `torchrun` the main process runs
the stages, and `together` calls the others into the trainings.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TYPE_CHECKING

from deme_diffusion import processes
from deme_diffusion.artefacts import Artefact, Store
from deme_diffusion.config import RuntimeSettings
from deme_diffusion.errors import Interrupted, MachineError, UserError
from deme_diffusion.merging.search import noise_warning
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.node import Node
from deme_diffusion.pipeline.tasks import Queue, Task, Wanted, once, wanted_by
from deme_diffusion.pipeline.workers import DIED, Opened, Pool, checked, threads_of

if TYPE_CHECKING:
    from deme_diffusion.pipeline.together import Channel

log = logging.getLogger(__name__)
Finished = Callable[[Node, Artefact, bool], None]
TRAININGS = ("pretrain", "extractor", "decouple")
"""Stages before the first of which `preflight` looks for what would stop the run later."""


def run_stages(
    graph: Graph, store: Store, nodes: Sequence[Node], *, finished: Finished, spared: Collection[str] = ()
) -> dict[str, Exception]:
    """Make every stage that is not done, parents first; `finished(node, artefact, reused)` follows each.

    Where one of the digests `spared` fails, all others are made all the same. Returns: label -> error of those.
    Raises Interrupted when a signal stopped a stage that can go on, and whatever another stage raises.
    """
    if processes.count() == 1:
        with Engine(store, graph.recipe.runtime, finished) as engine:
            return engine.run([(graph, nodes)], spared)
    from deme_diffusion.pipeline import together

    channel = together.joined(graph.recipe.runtime)
    if not processes.is_main():
        together.follow(channel, graph, store)
        return {}
    with channel.leading(), Engine(store, graph.recipe.runtime, finished, channel=channel) as engine:
        return engine.run([(graph, nodes)], spared)


class Engine:
    """Makes the stages of graphs in one store, by the settings of one runtime; a context, which its processes end with.

    What fails of the first graph ends it all, but for stages that are spared. Of these and of the other graphs it is
    noted, and what depends on it left: `error_of` tells.
    """

    def __init__(
        self, store: Store, runtime: RuntimeSettings, finished: Finished, *, channel: Channel | None = None
    ) -> None:
        self.store, self.runtime, self.finished, self.channel = store, runtime, finished, channel
        self.several, self.essential, self.spared = False, set[str](), set[str]()
        self.failures: dict[str, Exception] = {}
        self.refused: dict[Graph, Exception] = {}
        self.wanted: dict[str, set[Graph]] = {}
        self.lost: set[Graph] = set()
        self.told: set[str] = set()
        self.opened: Opened | None = None
        self.pool = Pool(store, runtime)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.close()

    def run(self, wanted: Wanted, spared: Collection[str] = ()) -> dict[str, Exception]:
        """Make what is not done: a stage of several graphs once, the longest training first, exclusive ones last.

        Returns: label -> error of the stages with the digests `spared`.
        """
        if any(graph.recipe.runtime.deterministic for graph, _ in wanted):  # before CUDA starts, here or in a worker
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        self.several, self.spared = len(wanted) > 1, set(spared)
        self.essential = {node.digest for node in wanted[0][1]} - self.spared
        self.wanted, self.lost = wanted_by(wanted), set[Graph]()
        for digest in {node.digest for _, nodes in wanted for node in nodes}:
            self.failures.pop(digest, None)  # what failed in an earlier run() is tried again
        waiting = self._waiting(wanted)
        self._make([task for task in once(waiting) if task.node.stage == "data"])
        waiting = self._looked_ahead(waiting)
        tasks = [task for task in once(waiting) if task.node.stage != "data"]
        self._make([task for task in tasks if not task.node.exclusive])
        alone = [task for task in tasks if task.node.exclusive]
        if alone:  # nothing is beside them
            self.pool.close()
            self._make_here(alone)
        found = {node.label: self.failures.get(node.digest) for _, nodes in wanted for node in nodes}
        return {label: error for label, error in found.items() if error is not None}

    def error_of(self, graph: Graph, nodes: Sequence[Node]) -> Exception | None:
        """Why some stages of a graph could not be made, None where they could."""
        return self.refused.get(graph) or next((e for n in nodes if (e := self.failures.get(n.digest))), None)

    def _begun(self, graph: Graph, node: Node) -> None:
        """A line for each stage of a run; of an experiment, which has hundreds, for each training."""
        level = logging.INFO if node.steps or not self.several else logging.DEBUG
        log.log(level, "%s", self._said(graph, node))

    def _said(self, graph: Graph, node: Node) -> str:
        return f"{graph.recipe.name}: {node.label}" if self.several else node.label

    def _waiting(self, wanted: Wanted) -> list[tuple[Graph, list[Node]]]:
        """What is left to do of each graph; what is done is told, once for all."""
        found: dict[str, Artefact | None] = {}
        for _, nodes in wanted:
            for node in nodes:
                if node.digest not in found:
                    found[node.digest] = artefact = self.store.find(node.key)
                    if artefact is not None:
                        self._tell(node, artefact, True)
        done = sum(artefact is not None for artefact in found.values())
        log.info("%d of %d stages are done already", done, len(found))
        waiting = [(graph, [node for node in nodes if found[node.digest] is None]) for graph, nodes in wanted]
        _warn_of_noise(*next(iter(waiting), (None, [])))
        return waiting

    def _tell(self, node: Node, artefact: Artefact, reused: bool) -> None:
        if node.digest not in self.told:  # of a second run() what the first one made is nothing new
            self.told.add(node.digest)
            self.finished(node, artefact, reused)

    # -- before the first training -----------------------------------------------------------------

    def _looked_ahead(self, waiting: list[tuple[Graph, list[Node]]]) -> list[tuple[Graph, list[Node]]]:
        """The graphs in which `preflight` finds nothing wrong."""
        left = [(graph, [n for n in nodes if n.stage != "data" and not n.exclusive]) for graph, nodes in waiting]
        checks = [(graph, nodes) for graph, nodes in left if any(node.stage in TRAININGS for node in nodes)]
        checks = [(graph, nodes) for graph, nodes in checks if not self._depends_on_failed(nodes)]
        if not checks:
            return waiting
        if self._jobs([node for _, nodes in left for node in nodes]) > 1:
            with self._stopping({}):
                errors = self.pool.check(checks)
        else:
            errors = [checked(self._open().of(graph), nodes) for graph, nodes in checks]
        for (graph, _), error in zip(checks, errors, strict=True):
            if error is not None:
                self.refused[graph] = self._noted(error, graph.recipe.name, fatal=graph is waiting[0][0])
                self.lost.add(graph)
        return [(graph, nodes) for graph, nodes in waiting if graph not in self.refused]

    def _depends_on_failed(self, nodes: Sequence[Node]) -> bool:
        return any(parent.digest in self.failures for node in nodes for parent in node.parents.values())

    def _open(self) -> Opened:
        self.opened = self.opened or Opened(self.store)
        return self.opened

    def _jobs(self, nodes: Sequence[Node]) -> int:
        return min(self.runtime.jobs, len({node.digest for node in nodes}))

    # -- making ------------------------------------------------------------------------------------

    def _make(self, tasks: Sequence[Task]) -> None:
        if self._jobs([task.node for task in tasks]) > 1:
            self._make_in_processes(tasks)
        else:
            self._make_here(tasks)

    def _make_here(self, tasks: Sequence[Task]) -> None:
        if not tasks:
            return
        import torch

        for node, stages in ((task.node, self._open().of(task.graph)) for task in tasks):
            if self._left(node) or self._unneeded(node):
                continue
            torch.set_num_threads(threads_of(stages.recipe.runtime, alone=node.exclusive))
            self._begun(stages.graph, node)
            make = stages.make(node) if self.channel is None else self.channel.shared(node, stages.make(node))
            try:
                artefact = self.store.produce(node.key, make)
            except Exception as error:
                self._failed(stages.graph, node, error)
            else:
                self._tell(node, artefact, False)

    def _make_in_processes(self, tasks: Sequence[Task]) -> None:
        """Whatever is ready goes to a free process, the longest training first."""
        queue = Queue({task.node.digest: task for task in tasks})
        with self._stopping(queue.running):
            while queue.missing or queue.running:
                for task in [t for t in queue.missing.values() if self._left(t.node) or self._unneeded(t.node)]:
                    del queue.missing[task.node.digest]
                for task in queue.ready(self.runtime.jobs):
                    self._begun(task.graph, task.node)
                    queue.running[self.pool.make(task.graph, task.node)] = task
                    del queue.missing[task.node.digest]
                for future in wait(queue.running, return_when=FIRST_COMPLETED).done:
                    if future in queue.running:
                        self._ended(future, queue)

    def _ended(self, future: Future[None], queue: Queue) -> None:
        graph, node = queue.running[future].graph, queue.running[future].node
        try:
            future.result()
        except BrokenProcessPool:
            if not (self.several or self.spared):
                raise
            self.pool.close()
            if queue.put_back():
                self._failed(graph, node, MachineError(DIED))
                del queue.missing[node.digest]
            return
        except Exception as error:
            self._failed(graph, node, error)
        else:
            artefact = self.store.find(node.key)
            assert artefact is not None, f"{node.label} finished without an artefact"
            self._tell(node, artefact, False)
        del queue.running[future]

    # -- failing -----------------------------------------------------------------------------------

    def _failed(self, graph: Graph, node: Node, error: Exception) -> None:
        fatal = node.digest in self.essential
        self.failures[node.digest] = self._noted(error, self._said(graph, node), fatal=fatal)
        if node.digest not in self.spared:
            self.lost |= self.wanted.get(node.digest, set())

    def _noted(self, error: Exception, label: str, *, fatal: bool) -> Exception:
        """The error, logged; raised where it ends everything."""
        if fatal or isinstance(error, Interrupted):
            raise error
        expected = isinstance(error, UserError | MachineError)
        log.error("%s failed: %s", label, " ".join(str(error).split()), exc_info=None if expected else error)
        return error

    def _left(self, node: Node) -> bool:
        """Whether a stage is not to be made, since it needs one that failed: then it failed for the same reason."""
        errors = (self.failures.get(parent.digest) for parent in node.parents.values())
        error = next((error for error in errors if error), None)
        if error is not None:
            if node.digest in self.essential:
                raise error
            self.failures[node.digest] = error
        return error is not None

    def _unneeded(self, node: Node) -> bool:
        """Whether nothing needs a stage any more: every graph that wants it has another that failed."""
        return self.wanted[node.digest] <= self.lost

    @contextmanager
    def _stopping(self, running: dict[Future[None], Task]) -> Iterator[None]:
        """Whatever ends the block ends what the processes are at, with checkpoints."""
        try:
            yield
        except BaseException as error:
            self.pool.stop(running)
            if isinstance(error, KeyboardInterrupt):
                raise Interrupted("stopped; stages that were training have written checkpoints") from None
            if isinstance(error, BrokenProcessPool):
                raise MachineError(DIED) from None
            raise


def _warn_of_noise(graph: Graph | None, waiting: Sequence[Node]) -> None:
    """Before any training: what a search that is left to do will find may be noise."""
    counts = [node.arguments["experts"] for node in waiting if node.stage == "search"]
    if graph and counts and (warning := noise_warning(max(counts), graph.recipe.merge)):
        log.warning("%s", warning)
