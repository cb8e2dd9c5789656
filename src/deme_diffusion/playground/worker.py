"""One thread that owns the models. Of requests with one tag the newest counts: it ends those that it drops."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from deme_diffusion.errors import MachineError, UserError

MOST_WAITING = 16
Tag = Hashable


class Superseded(Exception):
    """A newer request took the place of this one, or the worker is closing."""


class Ticket:
    """What a piece of work is told (whether it is still wanted) and tells (how far it is)."""

    def __init__(self) -> None:
        self._dropped = threading.Event()
        self.progress: tuple[str, int, int] = ("waiting", 0, 0)

    def drop(self) -> None:
        """It is not wanted any more."""
        self._dropped.set()

    def tell(self, doing: str, done: int, total: int) -> None:
        """So much is done. Raises Superseded where it is not wanted any more."""
        if self._dropped.is_set():
            raise Superseded
        self.progress = (doing, done, total)


Work = Callable[[Ticket], Any]


@dataclass(frozen=True, eq=False)
class _Job:
    tag: Tag
    work: Work
    ticket: Ticket = field(default_factory=Ticket)
    future: Future[Any] = field(default_factory=Future)

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self.work(self.ticket))
        except BaseException as error:
            self.future.set_exception(error)

    def end(self) -> None:
        """Of one that waits: it never runs."""
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(Superseded())


class Worker:
    """Runs one piece of work at a time, in the order in which they came; `first` runs before all of them."""

    def __init__(self, first: Callable[[], object] = lambda: None) -> None:
        self._waiting: deque[_Job] = deque()
        self._running: _Job | None = None
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._loop, args=(first,), name="deme-play", daemon=True)
        self._thread.start()

    def submit(self, tag: Tag, work: Work, drops: Collection[Tag] = ()) -> Future[Any]:
        """What the work will give. Work with a tag that it `drops` is not wanted any more: it ends in Superseded.

        Raises UserError where too much waits already, MachineError once the worker is closed.
        """
        job = _Job(tag, work)
        with self._changed:
            self._drop(drops)
            if self._closed:
                raise MachineError("the playground is closing")
            if len(self._waiting) >= MOST_WAITING:
                raise UserError(f"{MOST_WAITING} requests are waiting already; wait until some have finished")
            self._waiting.append(job)
            self._changed.notify()
        return job.future

    def progress(self, tag: Tag) -> tuple[str, int, int] | None:
        """How far the newest work with this tag is: what it does, steps done, steps in all."""
        with self._changed:
            jobs = [*([self._running] if self._running else []), *self._waiting]
        return next((job.ticket.progress for job in reversed(jobs) if job.tag == tag), None)

    def stop(self) -> None:
        """End what runs at its next step, and what waits at once."""
        with self._changed:
            self._closed = True
            self._drop(None)
            self._changed.notify()

    def close(self, timeout: float = 10.0) -> None:
        """The same, and wait so many seconds for the thread."""
        self.stop()
        self._thread.join(timeout)

    def _drop(self, tags: Collection[Tag] | None) -> None:
        """Drop work with these tags; None is all."""
        for job in [job for job in self._waiting if tags is None or job.tag in tags]:
            self._waiting.remove(job)
            job.end()
        if self._running is not None and (tags is None or self._running.tag in tags):
            self._running.ticket.drop()

    def _loop(self, first: Callable[[], object]) -> None:
        first()
        while (job := self._next()) is not None:
            job.run()
            with self._changed:
                self._running = None

    def _next(self) -> _Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting)
            self._running = self._waiting.popleft() if self._waiting else None
            return self._running
