"""The playground's server: the page, and what it asks; one worker thread owns the models."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from functools import partial, wraps
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from deme_diffusion.errors import MachineError, UserError
from deme_diffusion.playground import answers, asking
from deme_diffusion.playground.guard import Guard
from deme_diffusion.playground.saving import check_name, free_name, save
from deme_diffusion.playground.session import Session
from deme_diffusion.playground.worker import Superseded, Ticket, Worker

log = logging.getLogger(__name__)
PAGE = Path(__file__).parent / "page"
FILES = {"/": "play.html", "/play.css": "play.css", "/play.js": "play.js"}
KINDS = ("samples", "loss", "save")
Endpoint = Callable[[Request], Awaitable[Any]]
A = TypeVar("A", bound=asking.Asked)


class Elsewhere(Exception):
    """A page of another server asks, one that listened at this address before."""


def make_app(session: Session, worker: Worker, *, host: str, images: int, token: str | None = None) -> Starlette:
    """The application; `host` is the address it is served at, `images` how many a page shows at first.

    With a `token` only who knows it is answered.
    """
    playground = Playground(session, worker, answers.facts(session, images))
    routes = [Route(path, partial(_file, PAGE / name)) for path, name in FILES.items()]
    routes += [
        Route("/api/facts", answered(playground.facts)),
        Route("/api/progress", answered(playground.progress)),
        Route("/api/samples", answered(playground.samples), methods=["POST"]),
        Route("/api/loss", answered(playground.loss), methods=["POST"]),
        Route("/api/save", answered(playground.save), methods=["POST"]),
        Route("/api/stop", answered(playground.stop), methods=["POST"]),
    ]
    return Starlette(routes=routes, middleware=[Middleware(Guard, host=host, token=token)])


class Playground:
    """What can be asked. Of a page's requests for samples, and for losses, the newest counts.

    Every request names the server that its page is of: another one at the same address has other models.
    """

    def __init__(self, session: Session, worker: Worker, told: dict[str, Any]) -> None:
        self.session, self.worker, self.told, self.id = session, worker, told, secrets.token_hex(8)

    async def facts(self, request: Request) -> dict[str, Any]:
        """What the page is built from."""
        return {**self.told, "server": self.id, "save_as": free_name(self.session.run.folder)}

    async def progress(self, request: Request) -> dict[str, Any]:
        """How far a page's requests are: kind -> what is done, steps done, steps in all."""
        self._ours(request.query_params.get("server"))
        page = request.query_params.get("page", "")
        found = {kind: self.worker.progress((page, kind)) for kind in KINDS}
        return {kind: told for kind, told in found.items() if told is not None}

    async def samples(self, request: Request) -> Any:
        """Images of base and merged model."""
        asked = await self._parsed(asking.AskedSamples, request)
        wanted, tag = answers.wanted(self.session, asked), (asked.page, "samples")

        def work(ticket: Ticket) -> bytes:
            return answers.packed(answers.samples(self.session, wanted, ticket))

        future = self.worker.submit(tag, work, [tag, (asked.page, "loss")], shared=wanted.key)
        return await self._while_waited_for(request, future)

    async def loss(self, request: Request) -> Any:
        """The fixed-noise loss of base and merged model."""
        asked = await self._parsed(asking.AskedLoss, request)
        weights, tag = self.session.weights(asked.weights, asked.by_layer), (asked.page, "loss")

        def work(ticket: Ticket) -> bytes:
            return answers.packed(self.session.losses(weights, ticket))

        return await self._while_waited_for(request, self.worker.submit(tag, work, [tag]))

    async def save(self, request: Request) -> dict[str, Any]:
        """Write the merged model: it goes first, and on though its page is closed."""
        asked = await self._parsed(asking.AskedSave, request)
        weights, name = self.session.weights(asked.weights, asked.by_layer), check_name(asked.name)
        tag, session = (asked.page, "save"), self.session
        future = self.worker.submit(tag, lambda ticket: save(session, name, weights, ticket), lasting=True)
        saved = await asyncio.wrap_future(future)
        told = {"folder": str(saved.folder.absolute()), "unfolded": saved.unfolded}
        return {**told, "next": free_name(session.run.folder, name)}

    async def stop(self, request: Request) -> dict[str, Any]:
        """End all that a page asked for; nothing stays of a model that is half written."""
        asked = await self._parsed(asking.Asked, request)
        self.worker.drop([(asked.page, kind) for kind in KINDS])
        return {}

    async def _parsed(self, kind: type[A], request: Request) -> A:
        asked = asking.parse(kind, await body(request))
        self._ours(asked.server)
        return asked

    def _ours(self, server: str | None) -> None:
        if server != self.id:
            raise Elsewhere("another run is served here now, or this one again: reload the page")

    async def _while_waited_for(self, request: Request, future: Future[Any]) -> Any:
        """What the work gives; it is ended when the page has gone away."""
        answer, gone = asyncio.wrap_future(future), asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                self.worker.abandon(future)
            return await answer
        finally:
            gone.cancel()


async def _gone(request: Request) -> None:
    """Return when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def body(request: Request) -> bytes:
    """The body of a request. Raises UserError for one that no page of ours sends."""
    read = b""
    async for part in request.stream():
        read += part
        if len(read) > asking.MOST_BYTES:
            raise UserError(f"a request of more than {asking.MOST_BYTES} bytes")
    return read


def answered(endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
    """The endpoint with its errors as one line each; whatever happens, the server stays up."""

    @wraps(endpoint)
    async def answer(request: Request) -> Response:
        try:
            told = await endpoint(request)
            return Response(told, media_type="application/json") if isinstance(told, bytes) else JSONResponse(told)
        except (Superseded, ClientDisconnect, asyncio.CancelledError):  # the last one: the server ends
            return JSONResponse({"superseded": True})  # no failure: a browser would report one in its console
        except Elsewhere as error:
            return _failed(str(error), 409, reload=True)
        except UserError as error:
            return _failed(str(error), 400)
        except (MachineError, OSError) as error:
            return _failed(str(error), 500)
        except Exception as error:
            log.exception("%s: a request failed", request.url.path)
            return _failed(f"{type(error).__name__}: {error}", 500)

    return answer


def _failed(line: str, status: int, **more: bool) -> JSONResponse:
    return JSONResponse({"error": " ".join(line.split())[:1000], **more}, status)


async def _file(path: Path, request: Request) -> Response:
    return FileResponse(path)
