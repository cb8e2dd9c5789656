"""One run in the several processes of a launch (`accelerate launch`, `torchrun`): the main one leads.

It goes through the stages as if it were alone; the others only wait to be called into a training. What it tells them
goes through the launch's key-value store, which never blocks: a message can be left whoever hangs, or has died.
"""

from __future__ import annotations

import json
import logging
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from deme_diffusion import processes
from deme_diffusion.artefacts import Store
from deme_diffusion.config import RuntimeSettings
from deme_diffusion.decoupling.setup import PATIENCE, on_cpu
from deme_diffusion.errors import Interrupted, MachineError, UserError
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.node import Node

log = logging.getLogger(__name__)
Make = Callable[[Path], Mapping[str, Any] | None]
TRAININGS = ("pretrain", "decouple")
"""Stages that all processes make; the others are the main one's."""
LEARN_WHY = 10.0
"""Seconds in which a process whose training broke learns that the main one's did too, and that it need say nothing."""
STAY = 2.0
"""Seconds that a failed main process waits for the others to read so: those in a collective hear it by its end."""
ACKNOWLEDGED = "acknowledged"
_launched: list[int] = []


class Channel:
    """Numbered messages from the main process to all others."""

    def __init__(self, store: Any) -> None:
        self.store, self.number = store, 0
        self.stopped: float | None = None
        """When this process was told to stop (a follower waits a little for what the main one makes of it)."""

    def tell(self, **message: Any) -> None:
        """Leave a message for all."""
        self.store.set(f"message {self.number}", json.dumps(message))
        self.number += 1

    def next(self, *, within: float | None = None) -> dict[str, Any]:
        """The next message; `{"end": 1}` where the main process is gone, or has said nothing for so many seconds."""
        started = time.monotonic()
        while not self._there():
            deadlines = [(started, within), (self.stopped, LEARN_WHY)]
            if any(since is not None and most is not None and time.monotonic() > since + most
                   for since, most in deadlines):  # fmt: skip
                return {"end": 1, "silent": True}
            time.sleep(0.05)
        message: dict[str, Any] = json.loads(self.store.get(f"message {self.number}"))
        self.number += 1
        return message

    def _there(self) -> bool:
        try:
            return bool(self.store.check([f"message {self.number}"]))
        except RuntimeError as error:  # the store went with the main process that held it
            raise SystemExit(1) from error

    @contextmanager
    def leading(self) -> Iterator[None]:
        """The main process's work: whatever ends it ends the others as well, with the same exit status."""
        try:
            yield
        except BaseException as error:
            self._end(_status(error))
            if _broken_off(error):
                raise MachineError("another process of this launch ended; what it said stands above") from error
            raise
        self._end(0)

    def shared(self, node: Node, make: Make) -> Make:
        """A training's `make` that calls the other processes in; any other stage's as it is."""
        if node.stage not in TRAININGS:
            return make

        def made(folder: Path) -> Mapping[str, Any] | None:
            self.tell(train=node.digest)
            return make(folder)

        return made

    def _end(self, status: int) -> None:
        """Say so, and stay until the others have read it: the store may go with this process."""
        self.tell(end=status)
        deadline = time.monotonic() + (STAY if status else LEARN_WHY)
        name = f"{ACKNOWLEDGED} {self.number}"
        while self.store.add(name, 0) < processes.count() - 1 and time.monotonic() < deadline:
            time.sleep(0.02)

    def acknowledge(self) -> None:
        """Tell the main process that its end was heard."""
        self.store.add(f"{ACKNOWLEDGED} {self.number}", 1)


def joined(runtime: RuntimeSettings) -> Channel:
    """This process takes part in the launch; the same channel again when a process runs several recipes."""
    if runtime.jobs > 1:
        raise UserError(
            f"runtime.jobs={runtime.jobs}: each training runs in all {processes.count()} processes of this launch; "
            "use jobs=1, or start deme plainly"
        )
    PartialState(cpu=on_cpu(runtime.device), backend=None, timeout=PATIENCE)
    if not dist.is_initialized() or dist.get_world_size() != processes.count():
        raise MachineError("the launcher's processes do not find each other; start them with torchrun")
    _launched.append(0)  # every process counts its runs alike
    return Channel(PrefixStore(f"deme run {len(_launched)}", _get_default_store()))


def follow(channel: Channel, graph: Graph, store: Store) -> None:
    """Train when the main process calls, until it ends. Raises SystemExit with its status when that is not 0."""
    from deme_diffusion.pipeline.stages import Stages
    from deme_diffusion.pipeline.workers import threads_of

    stages = Stages(graph, store)
    with _patient_with_signals(channel):
        message = channel.next()
        while "end" not in message:
            node = graph.node(message["train"])
            torch.set_num_threads(threads_of(graph.recipe.runtime))
            try:
                stages.make(node)(store.folder(node.key))
                message = channel.next()
            except Exception as error:
                message = _reason(channel, error)
        channel.acknowledge()
    if message["end"]:
        raise SystemExit(message["end"])


def _reason(channel: Channel, error: Exception) -> dict[str, Any]:
    """How the main process ended, when it did; else this process's own error is the one to tell."""
    # These are raised in all processes or in none, and the main one may be writing a long checkpoint.
    agreed = isinstance(error, Interrupted | MachineError | UserError)
    while "end" not in (message := channel.next(within=None if agreed else LEARN_WHY)):
        pass
    if message.get("silent"):
        log.error("process %d of %d failed", processes.rank(), processes.count(), exc_info=error)
    return message


@contextmanager
def _patient_with_signals(channel: Channel) -> Iterator[None]:
    """Signals come to all processes at once, and only the main one decides: between two steps, after a checkpoint."""

    def note(number: int, frame: Any) -> None:
        channel.stopped = time.monotonic()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _status(error: BaseException) -> int:
    """The exit status that the command gives an error."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    return 2 if isinstance(error, UserError) else 130 if isinstance(error, Interrupted | KeyboardInterrupt) else 1


def _broken_off(error: BaseException) -> bool:
    """Whether it says no more than that another process is gone."""
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo" in str(error))
