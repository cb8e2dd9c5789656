"""The playground's server: the page, and what it asks; one worker thread owns the models."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from deme_diffusion.errors import MachineError, UserError
from deme_diffusion.playground import answers, asking
from deme_diffusion.playground.guard import Guard
from deme_diffusion.playground.saving import check_name, save
from deme_diffusion.playground.session import Session
from deme_diffusion.playground.worker import Superseded, Work, Worker

log = logging.getLogger(__name__)
PAGE = Path(__file__).parent / "page"
FILES = {"/": "play.html", "/play.css": "play.css", "/play.js": "play.js"}
Endpoint = Callable[[Request], Awaitable[Any]]


def make_app(session: Session, worker: Worker, *, host: str, images: int) -> Starlette:
    """The application; `host` is the address it is served at, `images` how many a page shows at first."""
    playground = Playground(session, worker, answers.facts(session, images))
    routes = [Route(path, partial(_file, PAGE / name)) for path, name in FILES.items()]
    routes += [
        Route("/api/facts", answered(playground.facts)),
        Route("/api/progress", answered(playground.progress)),
        Route("/api/samples", answered(playground.samples), methods=["POST"]),
        Route("/api/loss", answered(playground.loss), methods=["POST"]),
        Route("/api/save", answered(playground.save), methods=["POST"]),
    ]
    return Starlette(routes=routes, middleware=[Middleware(Guard, host=host)])


class Playground:
    """What can be asked. Of a page's requests for samples, and for losses, the newest counts."""

    def __init__(self, session: Session, worker: Worker, told: dict[str, Any]) -> None:
        self.session, self.worker, self.told = session, worker, told

    async def facts(self, request: Request) -> dict[str, Any]:
        """What the page is built from."""
        return self.told

    async def progress(self, request: Request) -> dict[str, Any]:
        """How far a page's request is."""
        found = self.worker.progress((request.query_params.get("page", ""), request.query_params.get("kind", "")))
        return {} if found is None else dict(zip(("doing", "done", "total"), found, strict=True))

    async def samples(self, request: Request) -> Any:
        """Images of base and merged model."""
        asked = asking.parse(asking.AskedSamples, await body(request))
        tag, loss = (asked.page, "samples"), (asked.page, "loss")
        return await self._done(tag, lambda ticket: answers.samples(self.session, asked, ticket), tag, loss)

    async def loss(self, request: Request) -> Any:
        """The fixed-noise loss of base and merged model."""
        asked = asking.parse(asking.AskedLoss, await body(request))
        weights, tag = self.session.weights(asked.weights, asked.by_layer), (asked.page, "loss")
        return await self._done(tag, lambda ticket: self.session.losses(weights, ticket), tag)

    async def save(self, request: Request) -> dict[str, Any]:
        """Write the merged model: nothing takes the place of this."""
        asked = asking.parse(asking.AskedSave, await body(request))
        weights, name = self.session.weights(asked.weights, asked.by_layer), check_name(asked.name)
        saved = await self._done((asked.page, "save"), lambda ticket: save(self.session, name, weights))
        return {"folder": str(saved.folder), "unfolded": saved.unfolded}

    async def _done(self, tag: tuple[str, str], work: Work, *drops: tuple[str, str]) -> Any:
        return await asyncio.wrap_future(self.worker.submit(tag, work, drops))


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
            return JSONResponse(await endpoint(request))
        except (Superseded, ClientDisconnect):
            return JSONResponse({"superseded": True})  # no failure: a browser would report one in its console
        except UserError as error:
            return _failed(str(error), 400)
        except (MachineError, OSError) as error:
            return _failed(str(error), 500)
        except Exception as error:
            log.exception("%s: a request failed", request.url.path)
            return _failed(f"{type(error).__name__}: {error}", 500)

    return answer


def _failed(line: str, status: int) -> JSONResponse:
    return JSONResponse({"error": " ".join(line.split())[:1000]}, status)


async def _file(path: Path, request: Request) -> Response:
    return FileResponse(path)
