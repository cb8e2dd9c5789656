"""Threads that hand work on in lines of bounded length, and end together whatever happens to one of them. No torch."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Ended(Exception):
    """A line was closed: another thread has failed, or the work was given up."""


class Line(Generic[T]):
    """A bounded queue between two threads, which either may close for both."""

    def __init__(self, size: int) -> None:
        self._items, self._size, self._closed, self._changed = deque[T](), size, False, threading.Condition()

    def put(self, item: T) -> None:
        """Wait for room; raises Ended once the line is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._items) < self._size)
            if self._closed:
                raise Ended
            self._items.append(item)
            self._changed.notify_all()

    def get(self) -> T:
        """Wait for an item; raises Ended once the line is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or bool(self._items))
            if self._closed:
                raise Ended
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    def close(self) -> None:
        """Wake everybody who waits, to end."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class Worker(threading.Thread):
    """A thread whose error is kept for the one that waits for it, and ends the others."""

    def __init__(self, work: Callable[[], None], lines: Sequence[Line[Any]]) -> None:
        super().__init__(daemon=True)
        self.error: BaseException | None = None
        self._work, self._lines = work, lines

    def run(self) -> None:
        try:
            self._work()
        except Ended:
            pass
        except BaseException as error:
            self.error = error
            for line in self._lines:
                line.close()

    def close(self) -> None:
        """Make it end, and wait until it has."""
        for line in self._lines:
            line.close()
        self.join()


@contextmanager
def running(*workers: Worker) -> Iterator[None]:
    """The workers at work; at the end of the block all have ended, and the first error of theirs is raised."""
    for worker in workers:
        worker.start()
    ended = False
    try:
        yield
    except Ended:
        ended = True
    finally:
        for worker in workers:
            worker.close()
    for worker in workers:
        if worker.error is not None:
            raise worker.error
    assert not ended, "a line is closed by an error only"
