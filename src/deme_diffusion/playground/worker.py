"""One thread that owns the models. Of requests with one tag the newest counts: it ends those that it drops."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Collection, Hashable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from deme_diffusion.errors import MachineError, UserError

log = logging.getLogger(__name__)
MOST_WAITING = 16
Tag = Hashable
Progress = tuple[str, int, int]
"""What is done, steps done, steps in all (0 where nobody knows)."""


class Superseded(Exception):
    """A newer request took the place of this one, nobody waits for it any more, or the worker is closing."""


class Ticket:
    """What a piece of work is told (whether it is still wanted) and tells (how far it is)."""

    def __init__(self) -> None:
        self._dropped, self._shared_only = threading.Event(), threading.Event()
        self.progress: Progress = ("waiting", 0, 0)

    def drop(self, *, but_shared: bool = False) -> None:
        """It is not wanted any more; `but_shared`: except for what a newer piece of work needs as well."""
        (self._shared_only if but_shared else self._dropped).set()

    def tell(self, doing: str, done: int, total: int, *, shared: bool = False) -> None:
        """So much is done; `shared` is what newer work may need. Raises Superseded where it is not wanted any more."""
        if self._dropped.is_set() or (self._shared_only.is_set() and not shared):
            raise Superseded
        self.progress = (doing, done, total)


Work = Callable[[Ticket], Any]


@dataclass(frozen=True, eq=False)
class _Job:
    tag: Tag
    work: Work
    shared: Hashable | None
    lasting: bool
    ticket: Ticket = field(default_factory=Ticket)
    future: Future[Any] = field(default_factory=Future)

    def run(self) -> None:
        with suppress(InvalidStateError):  # it was dropped, which its future told at once
            try:
                result = self.work(self.ticket)
            except BaseException as error:
                self.future.set_exception(error)
            else:
                self.future.set_result(result)

    def end(self, *, but_shared: bool = False) -> None:
        """It is not wanted any more: whoever waits for it is told now; where it runs, it ends at its next step.

        What lasts and runs tells itself, since it may be done by then.
        """
        self.ticket.drop(but_shared=but_shared)
        with suppress(InvalidStateError):
            if self.lasting and self.future.running():
                return
            self.future.set_exception(Superseded())


class Worker:
    """Runs one piece of work at a time, in the order in which they came; `first` runs before all of them."""

    gave_up = False
    """Whether work that lasts was ended all the same when the worker was closed."""

    def __init__(self, first: Callable[[], object] = lambda: None) -> None:
        self._waiting: deque[_Job] = deque()
        self._running: _Job | None = None
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._loop, args=(first,), name="deme-play", daemon=True)
        self._thread.start()

    def submit(
        self,
        tag: Tag,
        work: Work,
        drops: Collection[Tag] = (),
        *,
        shared: Hashable | None = None,
        lasting: bool = False,
    ) -> Future[Any]:
        """What the work will give. Work with a tag that it `drops` is not wanted any more: it ends in Superseded.

        What runs with the same `shared` first ends the part that both need. Work that is `lasting` goes before what
        waits, and `stop` lets it end. Raises UserError where too much waits already, MachineError once the worker is
        closed.
        """
        job = _Job(tag, work, shared, lasting)
        with self._changed:
            if self._closed:
                raise MachineError("the playground is closing")
            self._drop(lambda other: other.tag in drops, shared)
            if len(self._waiting) >= MOST_WAITING:
                raise UserError(f"{MOST_WAITING} requests are waiting already; wait until some have finished")
            at = sum(other.lasting for other in self._waiting) if lasting else len(self._waiting)
            self._waiting.insert(at, job)
            self._changed.notify()
        return job.future

    def drop(self, tags: Collection[Tag]) -> None:
        """Work with these tags is not wanted any more."""
        with self._changed:
            self._drop(lambda job: job.tag in tags)

    def abandon(self, future: Future[Any]) -> None:
        """Nobody waits for this any more; nor, where it was the newest with its tag, for what it left to be ended."""
        with self._changed:
            tags = [job.tag for job in self._jobs() if job.future is future]
            self._drop(lambda job: job.future is future or (job.tag in tags and job.future.done()))

    def progress(self, tag: Tag) -> Progress | None:
        """How far the newest work with this tag is; of what waits, how far that is which it waits for."""
        with self._changed:
            jobs, running = self._jobs(), self._running
        job = next((job for job in reversed(jobs) if job.tag == tag and not job.future.done()), None)
        if job is None or job is running or running is None:
            return None if job is None else job.ticket.progress
        doing, done, total = running.ticket.progress
        return f"waiting: {doing}", done, total

    @property
    def busy(self) -> bool:
        """Whether something runs or waits."""
        with self._changed:
            return bool(self._jobs())

    def stop(self) -> bool:
        """Take no more; end what runs at its next step, and what waits at once. Returns: whether work that lasts,
        which is let end, is left."""
        with self._changed:
            self._closed = True
            self._drop(lambda job: not job.lasting)
            self._changed.notify()
            return any(job.lasting for job in self._jobs())

    def close(self, timeout: float = 10.0) -> bool:
        """End all, also what lasts, and wait so many seconds for the thread. Returns: whether it has ended."""
        with self._changed:
            self._closed = True
            lasting = [job.future for job in self._jobs() if job.lasting]
            self._drop(lambda job: True)
            self._changed.notify()
        self._thread.join(timeout)
        self.gave_up |= any(not future.done() or future.cancelled() or future.exception() for future in lasting)
        return not self._thread.is_alive()

    def _jobs(self) -> list[_Job]:
        return [*([self._running] if self._running else []), *self._waiting]

    def _drop(self, wanted: Callable[[_Job], bool], shared: Hashable | None = None) -> None:
        for job in filter(wanted, self._jobs()):
            if job is self._running:
                job.end(but_shared=shared is not None and job.shared == shared)
            else:
                self._waiting.remove(job)
                job.end()

    def _loop(self, first: Callable[[], object]) -> None:
        try:
            first()
        except Exception:
            log.exception("the playground's worker goes on without its first step")
        while (job := self._next()) is not None:
            job.run()
            with self._changed:
                self._running = None

    def _next(self) -> _Job | None:
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._closed or self._waiting)
                self._running = self._waiting.popleft() if self._waiting else None
                if self._running is None or self._running.future.set_running_or_notify_cancel():
                    return self._running
