"""Processes that make stages, pinned to devices: what is sent to them, and what they keep open."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme_diffusion import processes
from deme_diffusion.artefacts import Store
from deme_diffusion.config import FIGURES, Recipe, RuntimeSettings
from deme_diffusion.errors import MachineError, UserError
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.node import Node

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from deme_diffusion.pipeline.stages import Stages

OPEN = 4
"""Most graphs that a process keeps open; what equal inputs give is opened once whichever they are."""
GRACE = 60.0
"""Seconds in which a stage that is stopped may write its checkpoint, once another process died."""
DIED = "a process of ours died (out of memory?); lower runtime.jobs or batch sizes, and run again to go on"


class Opened:
    """The stages of the graphs that one process works on: the last few, which share splits, base and extractor."""

    def __init__(self, store: Store) -> None:
        from deme_diffusion.pipeline.workbench import Shared

        self.store, self.shared = store, Shared()
        self.stages: OrderedDict[Any, Stages] = OrderedDict()

    def of(self, graph: Graph) -> Stages:
        """The stages of a graph that this process holds."""
        return self._kept(graph, lambda: graph)

    def of_recipe(self, text: str) -> Stages:
        """The stages of a recipe in JSON, as another process sent it."""
        return self._kept(text, lambda: _graph(text))

    def _kept(self, key: Any, graph: Any) -> Stages:
        from deme_diffusion.pipeline.stages import Stages

        if key not in self.stages:
            self.stages[key] = Stages(graph(), self.store, self.shared)
        self.stages.move_to_end(key)
        while len(self.stages) > OPEN:
            self.stages.popitem(last=False)
        return self.stages[key]


def _graph(text: str) -> Graph:
    graph = Graph(Recipe.model_validate_json(text), download=True, drawn=())
    graph.fishers()  # which the parent may have asked for, whatever the recipe's method or division
    graph.compared()
    for name in FIGURES:
        with suppress(UserError):  # of a figure that nobody asked for, whatever is wrong with it
            graph.figure(name)
    return graph


def threads_of(runtime: RuntimeSettings, *, alone: bool = False) -> int:
    """CPU threads of a process: by the recipe alone, not by how many stages are left, or last bits would differ."""
    wanted = runtime.threads or int(os.environ.get("OMP_NUM_THREADS") or 0)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return wanted or max(1, cores // (1 if alone else runtime.jobs * processes.on_this_machine()))


class Pool:
    """K processes, started when the first stage comes; `close` ends them."""

    def __init__(self, store: Store, runtime: RuntimeSettings) -> None:
        self.store, self.runtime = store, runtime
        self.executor: ProcessPoolExecutor | None = None
        self.environment = _Environment(runtime)
        self.busy = multiprocessing.get_context("spawn").RawArray("i", runtime.jobs)  # ids of processes making a stage
        self.recipes: dict[Graph, str] = {}

    def make(self, graph: Graph, node: Node) -> Future[None]:
        """Make a stage in one of the processes; where one of them died meanwhile, that is what the stage ends with."""
        try:
            return self._started().submit(_run_one, self._recipe(graph), node.digest)
        except BrokenProcessPool as error:
            failed: Future[None] = Future()
            failed.set_exception(error)
            return failed

    def check(self, graphs: Iterable[tuple[Graph, Sequence[Node]]]) -> list[Exception | None]:
        """The look ahead (`preflight`) for some graphs: what is wrong with each, None where nothing is.

        Where a process dies of it each is looked at alone: the graph whose process dies again is at fault.
        """
        asked = [(self._recipe(graph), [node.digest for node in nodes]) for graph, nodes in graphs]
        try:
            return self._started().submit(_check, asked).result()
        except BrokenProcessPool:
            return [self._checked_alone(one) for one in asked]

    def _checked_alone(self, asked: tuple[str, Sequence[str]]) -> Exception | None:
        if self._broken():
            self.close()
        try:
            return self._started().submit(_check, [asked]).result()[0]
        except BrokenProcessPool:
            return MachineError(DIED)

    def close(self) -> None:
        """End the processes once they are done, or once one died; the next stage would start new ones."""
        if self.executor is not None:
            workers = self._workers()
            closing = threading.Thread(target=self.executor.shutdown)
            closing.start()
            while closing.is_alive():
                closing.join(0.1)
                self._kill_broken(workers)
            self._kill_broken(workers)
            self.environment.restore()
        self.executor = None

    def _kill_broken(self, workers: Sequence[BaseProcess]) -> None:
        """End what the death of a process leaves, which no SIGTERM ends while idle; the busy checkpoint first."""
        if not self._broken():
            return
        deadline = time.monotonic() + GRACE
        while any(w.pid in self.busy and w.is_alive() for w in workers) and time.monotonic() < deadline:
            time.sleep(0.05)
        for worker in workers:
            worker.kill()

    def _broken(self) -> bool:
        return bool(getattr(self.executor, "_broken", False))

    def _workers(self) -> list[BaseProcess]:
        return list((getattr(self.executor, "_processes", None) or {}).values())

    def stop(self, running: Iterable[Future[Any]]) -> None:
        """Ask the processes to checkpoint and stop, and wait for them."""
        running = list(running)
        for process in self._workers():
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, signal.SIGTERM)
        for future in running:
            future.cancel()
        wait(running, timeout=60)

    def _recipe(self, graph: Graph) -> str:
        if graph not in self.recipes:
            self.recipes[graph] = graph.pinned().model_dump_json()
        return self.recipes[graph]

    def _started(self) -> ProcessPoolExecutor:
        if self.executor is None:
            self.environment.set()
            context = multiprocessing.get_context("spawn")
            numbers = context.Queue()
            for number in range(self.runtime.jobs):
                numbers.put(number)
            self.executor = ProcessPoolExecutor(
                self.runtime.jobs,
                mp_context=context,
                initializer=_start_worker,
                initargs=(str(self.store.root), numbers, self.busy, logging.getLogger().getEffectiveLevel()),
            )
        return self.executor


class _Environment:
    """What the worker processes inherit: it must be set before they start, or before torch is imported there."""

    def __init__(self, runtime: RuntimeSettings) -> None:
        # glibc hands large blocks back to the system whenever they are freed; on a CPU the page faults of getting
        # them again are 7% of a training step.
        keep = {name: os.environ.get(name, str(2**30)) for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")}
        self.values = {"OMP_NUM_THREADS": str(threads_of(runtime)), **keep}
        self.before = dict[str, str | None]()

    def set(self) -> None:
        """Set what is inherited."""
        self.before = {key: os.environ.get(key) for key in self.values}
        os.environ.update(self.values)

    def restore(self) -> None:
        """As it was before."""
        for key, value in self.before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


# -- in a worker ----------------------------------------------------------------------------------

_opened: Opened | None = None
_root = ""
_busy = _stopping = False
_busy_ids: Any = [0]
_place = 0


def _start_worker(root: str, numbers: Any, busy_ids: Any, level: int) -> None:
    """What a worker is, before its first job opens a graph; on a machine with several GPUs it sees one of them."""
    global _root, _busy_ids, _place
    _root, _busy_ids = root, busy_ids
    _place = number = numbers.get()
    os.environ["TQDM_POSITION"] = str(number)  # a line of the terminal for each process's progress bar
    devices = _visible_devices()
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
    logging.basicConfig(level=level, stream=sys.stderr, format="%(message)s", force=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)


def _stages(recipe: str) -> Stages:
    """The worker's stages of a recipe: in a job, since of what an initializer raises the parent learns nothing."""
    global _opened
    _opened = _opened or Opened(Store(Path(_root)))
    return _opened.of_recipe(recipe)


def _visible_devices() -> list[str]:
    """CUDA devices of this process, found without importing torch (which would fix the choice)."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [device for device in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if device]
    driver = Path("/proc/driver/nvidia/gpus")
    return [str(i) for i in range(len(list(driver.iterdir())))] if driver.is_dir() else []


def _interrupt(number: int, frame: Any) -> None:
    """Ends the stage that is being made; an idle process waits for the pool to end it, without a traceback.

    It must not die: the pool would take that for a crash, and kill the others before their checkpoints.
    """
    global _stopping
    again, _stopping = _stopping, True
    if _busy and not again:  # a second one, as a process group gets, must not break into what ends the stage
        raise KeyboardInterrupt


def checked(stages: Stages, nodes: Sequence[Node]) -> Exception | None:
    """What `preflight` finds wrong with the stages of a graph that are left to do."""
    from deme_diffusion.pipeline import preflight

    try:
        preflight.check(stages, nodes)
    except Exception as error:
        return error
    return None


def _check(asked: Sequence[tuple[str, Sequence[str]]]) -> list[Exception | None]:
    """The look ahead, in a worker, which keeps what it opens for the stages that it will make."""
    found = []
    for recipe, digests in asked:
        stages = _stages(recipe)
        found.append(checked(stages, [stages.graph.node(digest) for digest in digests]))
    return found


def _run_one(recipe: str, digest: str) -> None:
    global _busy
    _busy, _busy_ids[_place] = True, os.getpid()
    try:
        if _stopping:
            raise KeyboardInterrupt
        stages = _stages(recipe)
        node = stages.graph.node(digest)
        stages.store.produce(node.key, stages.make(node))
    finally:
        _busy, _busy_ids[_place] = False, 0
