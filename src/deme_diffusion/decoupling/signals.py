"""Stopping between two steps."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SAME_STOP = 1.0
"""Seconds in which further signals are the same wish: one to a process group reaches a worker twice."""


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set, so that the loop stops between steps; a second one kills as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    first = math.inf

    def request(number: int, frame: Any) -> None:
        nonlocal first
        if time.monotonic() > first + SAME_STOP:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        first = min(first, time.monotonic())
        stop.set()

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
