"""Who may ask: pages of this server only, under names that are this machine's."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    return host in LOCAL or (_address(host) is not None and ipaddress.ip_address(host).is_loopback)


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


class Guard:
    """Refuses foreign names of the machine (DNS rebinding), and changes that another site's page asks for.

    A server of the whole network is asked under any of its addresses: a foreign name never is one.
    """

    def __init__(self, app: ASGIApp, host: str) -> None:
        self.app, self.open = app, not is_loopback(host)
        self.names: Collection[str] = LOCAL | {host.lower()} | ({socket.gethostname().lower()} if self.open else set())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # no websocket, no lifespan of ours
            return
        headers = Headers(scope=scope)
        wrong = self._wrong(scope["method"], headers)

        async def protected(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        answer = self.app if wrong is None else JSONResponse({"error": wrong[1]}, wrong[0])
        await answer(scope, receive, protected)

    def _wrong(self, method: str, headers: Headers) -> tuple[int, str] | None:
        """Status and reason, of a request that is refused."""
        host = headers.get("host", "")
        name = _name(host)
        if name not in self.names and not (self.open and _address(name)):
            return 421, f"this server is not {host[:100]!r}; open it by the address that deme play printed"
        if method in ("GET", "HEAD"):
            return None
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return 415, "a request is JSON: content-type application/json"
        return None if _same_origin(host, headers) else (403, "a request comes from this server's own page")


def _name(host: str) -> str:
    """The name in a Host header, without port and brackets; '' of one that is none."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _same_origin(host: str, headers: Headers) -> bool:
    """Browsers say where a request comes from in at least one of two ways; neither may be foreign."""
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    told = [site == "same-origin"] if site is not None else []
    told += [origin == f"http://{host}"] if origin is not None else []
    return bool(told) and all(told)
