"""Runs a graph's stages here: one after another, or in K processes pinned to devices. Run again is resume.

Under `accelerate launch` or `torchrun` the main process does so, and `together` calls the others into the trainings.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme_diffusion import processes
from deme_diffusion.artefacts import Artefact, Store
from deme_diffusion.config import Recipe, RuntimeSettings
from deme_diffusion.errors import Interrupted, MachineError
from deme_diffusion.merging.search import noise_warning
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.node import Node

if TYPE_CHECKING:
    from deme_diffusion.pipeline.together import Channel

log = logging.getLogger(__name__)
Finished = Callable[[Node, Artefact, bool], None]
TRAININGS = ("pretrain", "extractor", "decouple")
"""Stages before the first of which `preflight` looks for what would stop the run later."""


def run_stages(graph: Graph, store: Store, nodes: Sequence[Node], *, finished: Finished) -> None:
    """Make every stage that is not done, parents first; `finished(node, artefact, reused)` follows each.

    Raises Interrupted when a signal stopped a stage that can go on, and whatever a stage raises.
    """
    if graph.recipe.runtime.deterministic:  # before CUDA starts, here or in a worker
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if processes.count() == 1:
        _run(graph, store, nodes, finished, None)
        return
    from deme_diffusion.pipeline import together

    channel = together.joined(graph.recipe.runtime)
    if not processes.is_main():
        together.follow(channel, graph, store)
        return
    with channel.leading():
        _run(graph, store, nodes, finished, channel)


def _run(graph: Graph, store: Store, nodes: Sequence[Node], finished: Finished, channel: Channel | None) -> None:
    waiting = []
    for node in nodes:
        artefact = store.find(node.key)
        if artefact is None:
            waiting.append(node)
        else:
            finished(node, artefact, True)
    log.info("%d of %d stages are done already", len(nodes) - len(waiting), len(nodes))
    _warn_of_noise(graph, waiting)
    shared = [node for node in waiting if not node.exclusive]
    alone = [node for node in waiting if node.exclusive]
    jobs = min(graph.recipe.runtime.jobs, len(shared))
    if jobs > 1:
        _run_in_processes(graph, store, shared, jobs, finished)
    else:
        _run_here(graph, store, shared, finished, channel)
    _run_here(graph, store, alone, finished, channel)


def _warn_of_noise(graph: Graph, waiting: Sequence[Node]) -> None:
    """Before any training: what a search that is left to do will find may be noise."""
    counts = [node.arguments["experts"] for node in waiting if node.stage == "search"]
    if counts and (warning := noise_warning(max(counts), graph.recipe.merge)):
        log.warning("%s", warning)


def _run_here(graph: Graph, store: Store, nodes: Sequence[Node], finished: Finished, channel: Channel | None) -> None:
    if not nodes:
        return
    import torch

    from deme_diffusion.pipeline import preflight
    from deme_diffusion.pipeline.stages import Stages

    stages = Stages(graph, store)
    first = next((i for i, node in enumerate(nodes) if node.stage in TRAININGS), None)
    for i, node in enumerate(nodes):
        torch.set_num_threads(threads_of(graph.recipe.runtime, alone=node.exclusive))
        if i == first:
            preflight.check(stages, nodes[i:])
        log.info("%s", node.label)
        make = stages.make(node) if channel is None else channel.shared(node, stages.make(node))
        finished(node, store.produce(node.key, make), False)


def _run_in_processes(graph: Graph, store: Store, nodes: Sequence[Node], jobs: int, finished: Finished) -> None:
    """Whatever is ready goes to a free process, the longest training first."""
    missing = {node.digest: node for node in nodes}
    running: dict[Future[float], Node] = {}
    unchecked = any(node.stage in TRAININGS for node in nodes)
    with _environment(graph.recipe.runtime), _pool(graph, store, jobs) as pool:
        try:
            while missing or running:
                if unchecked and not any(node.stage == "data" for node in (*missing.values(), *running.values())):
                    pool.submit(_check, list(missing)).result()
                    unchecked = False
                ready = [n for n in missing.values() if not _parents_in(n, missing, running)]
                for node in sorted(ready, key=lambda n: -n.steps)[: jobs - len(running)]:
                    log.info("%s", node.label)
                    running[pool.submit(_run_one, node.digest)] = missing.pop(node.digest)
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    node = running.pop(future)
                    future.result()
                    artefact = store.find(node.key)
                    assert artefact is not None, f"{node.label} finished without an artefact"
                    finished(node, artefact, False)
        except BaseException as error:
            _stop(pool, running)
            if isinstance(error, KeyboardInterrupt):
                raise Interrupted("stopped; stages that were training have written checkpoints") from None
            if isinstance(error, BrokenProcessPool):
                why = (
                    "a process of ours died (out of memory?); lower runtime.jobs or batch sizes, and run again to go on"
                )
                raise MachineError(why) from None
            raise


def threads_of(runtime: RuntimeSettings, *, alone: bool = False) -> int:
    """CPU threads of a process: by the recipe alone, not by how many stages are left, or last bits would differ."""
    wanted = runtime.threads or int(os.environ.get("OMP_NUM_THREADS") or 0)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return wanted or max(1, cores // (1 if alone else runtime.jobs * processes.on_this_machine()))


def _parents_in(node: Node, missing: dict[str, Node], running: dict[Future[float], Node]) -> bool:
    unfinished = {*missing, *(other.digest for other in running.values())}
    return any(parent.digest in unfinished for parent in node.parents.values())


def _stop(pool: ProcessPoolExecutor, running: dict[Future[float], Node]) -> None:
    """Ask the processes to checkpoint and stop, and wait for them."""
    for process in getattr(pool, "_processes", {}).values():
        if process.is_alive():
            os.kill(process.pid, signal.SIGTERM)
    for future in running:
        future.cancel()
    wait(running, timeout=60)


class _environment:
    """What the worker processes inherit: it must be set before they start, or before torch is imported there."""

    def __init__(self, runtime: RuntimeSettings) -> None:
        # glibc hands large blocks back to the system whenever they are freed; on a CPU the page faults of getting
        # them again are 7% of a training step.
        keep = {name: os.environ.get(name, str(2**30)) for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")}
        self.values = {"OMP_NUM_THREADS": str(threads_of(runtime)), **keep}
        self.before = dict[str, str | None]()

    def __enter__(self) -> None:
        self.before = {key: os.environ.get(key) for key in self.values}
        os.environ.update(self.values)

    def __exit__(self, *error: object) -> None:
        for key, value in self.before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def _pool(graph: Graph, store: Store, jobs: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    numbers = context.Queue()
    for number in range(jobs):
        numbers.put(number)
    level = logging.getLogger().getEffectiveLevel()
    arguments = (graph.pinned().model_dump(mode="json"), str(store.root), numbers, level)
    return ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker, initargs=arguments)


_worker: Any = None
_opens: tuple[dict[str, Any], str] = ({}, "")
_busy = _stopping = False


def _start_worker(recipe: dict[str, Any], root: str, numbers: Any, level: int) -> None:
    """What a worker is, before its first job opens the graph; on a machine with several GPUs it sees one of them."""
    global _opens
    _opens = recipe, root
    number = numbers.get()
    os.environ["TQDM_POSITION"] = str(number)  # a line of the terminal for each process's progress bar
    devices = _visible_devices()
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
    logging.basicConfig(level=level, stream=sys.stderr, format="%(message)s", force=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)


def _open() -> Any:
    """The worker's stages, opened once: in a job, since of what an initializer raises the parent learns nothing."""
    global _worker
    if _worker is None:
        from deme_diffusion.pipeline.stages import Stages

        recipe, root = _opens
        graph = Graph(Recipe.model_validate(recipe), download=True)
        graph.fishers()  # which the parent may have asked for, whatever the recipe's method
        _worker = Stages(graph, Store(Path(root)))
    return _worker


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


def _check(digests: Sequence[str]) -> None:
    """The look ahead, in a worker, which keeps what it opens for the stages that it will make."""
    from deme_diffusion.pipeline import preflight

    stages = _open()
    preflight.check(stages, [stages.graph.node(digest) for digest in digests])


def _run_one(digest: str) -> float:
    global _busy
    started = time.perf_counter()
    _busy = True
    try:
        if _stopping:
            raise KeyboardInterrupt
        stages = _open()
        node = stages.graph.node(digest)
        stages.store.produce(node.key, stages.make(node))
    finally:
        _busy = False
    return time.perf_counter() - started
