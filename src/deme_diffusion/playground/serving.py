"""From a run to a server that stays up until Ctrl-C: checks first, then the port, then the models."""

from __future__ import annotations

import errno
import importlib.util
import logging
import shlex
import socket
import webbrowser
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from deme_diffusion.errors import UserError
from deme_diffusion.playground.ready import check_ready

if TYPE_CHECKING:
    from deme_diffusion.pipeline.run import Run

log = logging.getLogger(__name__)
NEEDS = ("starlette", "uvicorn")
BACKLOG = 64


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


def url_of(listening: socket.socket, host: str) -> str:
    """The address to open: of a server of the whole network, this machine's own."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{shown}]' if ':' in shown else shown}:{listening.getsockname()[1]}"


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

    `words` are the command that makes the run, but for the folder `out` that was asked for.
    """
    check_installed()
    check_ready(run, shlex.join([*words, *(["--out", str(out)] if out else [])]))
    with bound(host, port) as listening:
        import torch

        from deme_diffusion.pipeline.workers import threads_of
        from deme_diffusion.playground.guard import is_loopback
        from deme_diffusion.playground.server import make_app
        from deme_diffusion.playground.session import Session
        from deme_diffusion.playground.worker import Worker

        session = Session(run, words)
        worker = Worker(lambda: torch.set_num_threads(threads_of(run.recipe.runtime, alone=True)))
        try:
            app = make_app(session, worker, host=host, images=images)
            if not is_loopback(host):
                log.warning(
                    "anybody who reaches this machine can use the playground and save models into %s", run.folder
                )
            log.info("Ctrl-C ends the playground")
            say(url_of(listening, host))
            if open_browser:
                webbrowser.open(url_of(listening, host))
            _serve(app, listening, worker.stop)
        finally:
            worker.close()
            session.close()


def _serve(app: object, listening: socket.socket, closing: Callable[[], None]) -> None:
    """Answer until SIGINT or SIGTERM, which end it well."""
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            """Requests that are still answered end first, or they would be waited for."""
            closing()
            super().handle_exit(sig, frame)

    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=2,
    )
    with suppress(KeyboardInterrupt):  # uvicorn raises the signal again when all is closed
        Server(config).run(sockets=[listening])
