"""Who may ask: pages of this server only, under names that are this machine's; from afar, who has the token."""

from __future__ import annotations

import hashlib
import ipaddress
import secrets
import socket
from collections.abc import Collection
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, RedirectResponse, Response
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
NO_TOKEN = "open the address that deme play printed, with the token in it"


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

    A server of the whole network is asked under any of its addresses: a foreign name never is one. With a `token`, the
    address `/?token=...` gives a browser a cookie, without which nothing is answered.
    """

    def __init__(self, app: ASGIApp, host: str, token: str | None = None) -> None:
        self.app, self.open, self.token = app, not is_loopback(host), token
        self.names: Collection[str] = LOCAL | {host.lower()} | ({socket.gethostname().lower()} if self.open else set())
        # Cookies know no port: two servers of a machine need two names.
        self.cookie = f"deme_play_{hashlib.sha256((token or '').encode()).hexdigest()[:8]}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # no websocket, no lifespan of ours
            return

        async def protected(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self._answer(scope)(scope, receive, protected)

    def _answer(self, scope: Scope) -> ASGIApp:
        headers = Headers(scope=scope)
        if wrong := self._wrong(scope["method"], headers):
            return JSONResponse({"error": wrong[1]}, wrong[0])
        if self.token is None or self._same(_cookie(headers, self.cookie)):
            return self.app
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[-1]
        return self._let_in() if scope["path"] == "/" and self._same(given) else JSONResponse({"error": NO_TOKEN}, 401)

    def _same(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), str(self.token).encode())

    def _let_in(self) -> Response:
        """The token out of the address bar and into a cookie."""
        answer = RedirectResponse("/", 303)
        answer.set_cookie(self.cookie, str(self.token), httponly=True, samesite="lax")
        return answer

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


def _cookie(headers: Headers, name: str) -> str:
    """The value of a cookie; '' where there is none."""
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(name)
    except CookieError:
        return ""
    return found.value if found else ""


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
