"""From a run to a server that stays up until Ctrl-C: checks first, then the port, then the models."""

from __future__ import annotations

import asyncio
import errno
import importlib.util
import logging
import os
import secrets
import socket
import sys
import webbrowser
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from deme_diffusion.errors import Stopped, UserError
from deme_diffusion.playground.ready import check_ready

if TYPE_CHECKING:
    from deme_diffusion.pipeline.run import Run
    from deme_diffusion.playground.worker import Worker

log = logging.getLogger(__name__)
NEEDS = ("starlette", "uvicorn")
BACKLOG, POLL, PATIENCE = 64, 0.1, 10.0
"""Connections that wait; seconds between two looks at what is let end, and until a step that goes on is left alone."""


def check_installed() -> None:
    """Raises UserError without the extra `ui`."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"the playground needs {' and '.join(missing)}: pip install 'deme-diffusion[ui]'")


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 is any free one. Raises UserError where it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(BACKLOG)
        except OSError:
            listening.close()
            raise
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"--port {port}: taken; give another one, or 0 for any that is free") from None
        reason = f"--host {host} --port {port}: cannot be listened at: {error.strerror or error}"
        raise UserError(reason) from None
    return listening


def url_of(listening: socket.socket, host: str, token: str | None = None) -> str:
    """The address to open: of a server of the whole network, by this machine's name; with the token, if any."""
    shown = socket.gethostname() if host in ("0.0.0.0", "::") else host
    address = f"http://{f'[{shown}]' if ':' in shown else shown}:{listening.getsockname()[1]}"
    return address if token is None else f"{address}/?token={token}"


def play(
    run: Run,
    *,
    host: str,
    port: int,
    images: int,
    words: Sequence[str],
    out: Path | None = None,
    open_browser: bool = False,
    say: Callable[[str], None],
) -> None:
    """Serve the playground of a run until Ctrl-C; its address is told once it answers.

    `words` are the command that makes the run, but for the folder `out` that was asked for. Raises Stopped when a model
    was being saved, and a second Ctrl-C gave it up.
    """
    check_installed()
    check_ready(run, [*words, *(["--out", str(out)] if out else [])])
    with bound(host, port) as listening:
        import torch

        from deme_diffusion.pipeline.workers import threads_of
        from deme_diffusion.playground.guard import is_loopback
        from deme_diffusion.playground.server import make_app
        from deme_diffusion.playground.session import Session
        from deme_diffusion.playground.worker import Worker

        session, token = Session(run, words), None if is_loopback(host) else secrets.token_urlsafe(16)
        worker, ended = Worker(lambda: torch.set_num_threads(threads_of(run.recipe.runtime, alone=True))), False
        try:
            app = make_app(session, worker, host=host, images=images, token=token)
            if token is not None:
                log.warning("whoever has this address can use the playground and save models into %s", run.folder)
            log.info("Ctrl-C ends the playground")
            say(address := url_of(listening, host, token))
            if open_browser:
                webbrowser.open(address)
            serve(app, listening, worker)
        finally:
            if ended := worker.close(PATIENCE):
                session.close()
    _leave(worker, ended)


def _leave(worker: Worker, ended: bool) -> None:
    """End the process: at once where a thread is still within a step, since torch's do not end with the interpreter."""
    rest = "nothing of it is left" if ended else "the next one of that name removes what is left of it"
    said = f"a save was given up; {rest}"
    if ended and worker.gave_up:
        raise Stopped(said)
    if not ended:
        if worker.gave_up:
            log.error("deme: interrupted: %s", said)
        logging.shutdown()
        sys.stdout.flush()
        os._exit(130 if worker.gave_up else 0)


def serve(app: object, listening: socket.socket, worker: Worker) -> None:
    """Answer until SIGINT or SIGTERM, which end it well: the first one waits for a model that is being saved."""
    import uvicorn

    class Server(uvicorn.Server):
        leaving: asyncio.Task[None] | None = None

        async def serve(self, sockets: list[socket.socket] | None = None) -> None:
            self.loop = asyncio.get_running_loop()
            await super().serve(sockets)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            """Of a signal, whatever the thread is just doing: locks are taken later, in the loop."""
            self.loop.call_soon_threadsafe(self.leave)

        def leave(self) -> None:
            if self.leaving is not None:
                self.should_exit = self.force_exit = True
            else:
                self.leaving = asyncio.create_task(self.wait())

        async def wait(self) -> None:
            """Requests that are still answered end first, or they would be waited for."""
            if worker.stop():
                log.warning("waiting for the save to finish; Ctrl-C again gives up")
                while worker.busy:
                    await asyncio.sleep(POLL)
            self.should_exit = True

    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        lifespan="off",
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=2,
    )
    with suppress(KeyboardInterrupt):
        Server(config).run(sockets=[listening])
