"""Runs functions of `launched.py` in several processes, as torchrun would, forked from one that has torch in memory.

    python tests/launch.py CALLS.json RESULTS.json

A call is {"function", "arguments", "processes", "stop"}: `stop`, a glob and a number, sends all of them SIGTERM once so
many paths match. A result holds each process's exit status, and what it wrote to stdout and stderr.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import launched

PATIENCE = 90.0


def launch(call: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """One call in its processes."""
    count, started = call.get("processes", 2), time.monotonic()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        if (child := os.fork()) == 0:
            _become(rank, count, port, folder)
            _run(call)
        children.append(child)
    if "stop" in call:
        pattern, wanted = call["stop"]
        _wait_until(lambda: len(list(Path.cwd().glob(pattern))) >= wanted)
        for child in children:
            os.kill(child, signal.SIGTERM)
    statuses = [_status(child) for child in children]
    said = [[(folder / f"{stream}{rank}").read_text() for stream in ("out", "err")] for rank in range(count)]
    print(call["function"], call["arguments"][:1], round(time.monotonic() - started, 1), file=sys.stderr)
    return [{"status": s, "out": out, "err": err} for s, (out, err) in zip(statuses, said, strict=True)]


def _become(rank: int, count: int, port: int, folder: Path) -> None:
    for descriptor, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{stream}{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), descriptor)
    if count > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}


def _run(call: dict[str, Any]) -> None:
    status = 1
    try:
        getattr(launched, call["function"])(*call["arguments"])
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else bool(end.code)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _status(child: int) -> int | None:
    """The exit status; None for a process that has to be killed."""
    ended: list[int] = []

    def over() -> bool:
        found, status = os.waitpid(child, os.WNOHANG)
        ended.extend([os.waitstatus_to_exitcode(status)] * bool(found))
        return bool(found)

    if not _wait_until(over):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return ended[0] if ended else None


def _wait_until(holds: Any) -> bool:
    deadline = time.monotonic() + PATIENCE
    while not (met := holds()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return met


if __name__ == "__main__":
    calls, results = Path(sys.argv[1]), Path(sys.argv[2])
    os.chdir(calls.parent)
    results.write_text(json.dumps([launch(call, calls.parent) for call in json.loads(calls.read_text())]))
