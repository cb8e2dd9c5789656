"""How long a training waits for its batches, and what is said where that is long."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

from deme_diffusion.data.loading import Batch

log = logging.getLogger(__name__)
MOST = 0.05
"""Share of the time above which it is told."""
SETTLED = 60.0
"""Seconds before which it is not: caches are still cold, and a short training does not matter."""


class Waited:
    """Counts the seconds that a training's loop waits for its steps' micro-batches.

    Without loader workers the batches are made in that time. The first one does not count: workers start with it.
    """

    def __init__(self, name: str, workers: int) -> None:
        self.name, self.workers = name, workers
        self.seconds, self._started, self._told = 0.0, 0.0, False

    def over(self, batches: Iterator[list[Batch]]) -> Iterator[list[Batch]]:
        """The same batches. They are not kept: loader workers end when the loop lets go of them, by an error too."""
        if (first := next(batches, None)) is None:
            return
        self._started = time.perf_counter()
        yield first
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self.seconds += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    @property
    def share(self) -> float:
        """Of the time since the first batch."""
        return self.seconds / max(time.perf_counter() - self._started, 1e-9) if self._started else 0.0

    def tell(self) -> None:
        """Warn, once, of a training that waits for more than `MOST` of its time."""
        settled = self._started and time.perf_counter() - self._started >= SETTLED
        if self._told or not settled or self.share <= MOST:
            return
        self._told = True
        more = f"raise runtime.dataloader_num_workers (now {self.workers})"
        if not self.workers:
            more = "it makes them itself; runtime.dataloader_num_workers=1 or more makes them ahead, on other cores"
        log.warning("%s: %.0f%% of the time is spent waiting for batches; %s", self.name, 100 * self.share, more)
