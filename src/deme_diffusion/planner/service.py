"""A language model behind an OpenAI-compatible address: where it is, its key, retries, time limits, clear errors."""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from deme_diffusion.errors import MachineError, UserError

if TYPE_CHECKING:
    import openai
    from tenacity import RetryCallState

log = logging.getLogger(__name__)
Message = dict[str, str]
PUBLIC = "https://api.openai.com/v1"
MISSING = "--model needs the packages openai and tenacity: pip install 'deme-diffusion[lm]'"
NO_KEY = "none"
"""What a local server is sent that asks for no key."""
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
"""Seconds before the first retry, doubled each time; no wait is longer, whatever a server asks for."""
MOST_BYTES = 8_000_000
"""A chat completion that is longer is not read to its end."""
QUOTA = ("insufficient_quota", "billing_hard_limit_reached")
"""Codes of a status 429 that no waiting helps."""


@dataclass(frozen=True)
class Service:
    """Whom to ask and how long to wait: `timeout` seconds an attempt, and `retries` more of them."""

    model: str
    base_url: str
    key: str = field(repr=False)
    key_name: str = "OPENAI_API_KEY"
    timeout: float = 120.0
    retries: int = 4

    def ask(self, messages: Sequence[Message]) -> dict[str, Any]:
        """The service's chat completion, as its JSON says it.

        Raises UserError for a refused key, model or request; MachineError where the service fails for good.
        """
        import openai
        import tenacity

        trying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(worth_retrying),
            wait=_wait,
            stop=tenacity.stop_after_attempt(self.retries + 1),
            before_sleep=self._say,
            reraise=True,
        )
        try:
            with self._client() as client:
                return trying(self._attempt, client, list(messages))
        except openai.OpenAIError as error:
            raise self._explained(error) from None  # its request holds the key

    def hide(self, value: Any) -> Any:
        """The value without the key, wherever a server may have put it."""
        if isinstance(value, str):
            return value.replace(self.key, "[key]") if len(self.key) > len(NO_KEY) else value
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(one) for key, one in value.items()}
        return [self.hide(one) for one in value] if isinstance(value, list | tuple) else value

    def _client(self) -> openai.OpenAI:
        import openai

        for name in ("openai", "httpx", "httpx2", "httpcore", "httpcore2"):
            logging.getLogger(name).setLevel(logging.WARNING)  # whatever --verbose or OPENAI_LOG say
        # A proxy of the environment knows nothing of a server on this machine.
        http = openai.DefaultHttpxClient(trust_env=not is_local(self.base_url))
        return openai.OpenAI(
            api_key=self.key, base_url=self.base_url, timeout=self.timeout, max_retries=0, http_client=http
        )

    def _attempt(self, client: openai.OpenAI, messages: list[Any]) -> dict[str, Any]:
        import openai

        deadline, read = time.monotonic() + self.timeout, bytearray()
        # As a stream of bytes, since a client's time limit is for each read, and knows no size.
        create = client.chat.completions.with_streaming_response.create
        with create(model=self.model, messages=messages) as response:
            for piece in _pieces(response):
                read += piece
                if len(read) > MOST_BYTES:
                    raise MachineError(f"{self.base_url}: an answer of over {MOST_BYTES / 1e6:g} MB, not read further")
                if time.monotonic() > deadline:
                    raise openai.APITimeoutError(request=response.http_request)
        return self._completion(bytes(read))

    def _completion(self, body: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(body.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            start = self._line(body[:80].decode("utf-8", "replace"))
            raise MachineError(
                f"{self.base_url}: answers no JSON object but {start!r}; is it an OpenAI-compatible one?"
            )
        if isinstance(answer.get("error"), dict) and not answer.get("choices"):
            raise MachineError(f"{self.base_url}: {self._line(str(answer['error'].get('message', 'an error')))}")
        return answer

    def _say(self, state: RetryCallState) -> None:
        assert state.outcome is not None and state.next_action is not None
        why, seconds = self._said(state.outcome.exception()), state.next_action.sleep
        log.warning("%s: %s; again in %.1f s (%d of %d)", self.base_url, why, seconds, state.attempt_number,
                    self.retries)  # fmt: skip

    def _said(self, error: BaseException | None) -> str:
        """What an error that may pass was, in a few words."""
        import openai

        if isinstance(error, openai.APITimeoutError):
            return f"no answer within {self.timeout:g} s"
        if isinstance(error, openai.APIStatusError):
            words = re.sub(r"^Error code: \d+( - )?", "", str(error.message)) or str(error.body or "without a word")
            return f"status {error.status_code}: {self._line(words)}"
        cause = _root(error)
        return f"cannot be reached: {self._line(str(getattr(cause, 'strerror', None) or cause))}"

    def _explained(self, error: openai.OpenAIError) -> Exception:
        """The error for the command line: the user's where another key, name or address helps."""
        import openai

        what = f"{self.base_url}: {self._said(error)}"
        if isinstance(error, openai.APIStatusError):
            if error.status_code in (401, 403):
                key = "no key was sent" if self.key == NO_KEY else "the key was refused"
                return UserError(f"{what}; {key}: set {self.key_name}, or name its variable with --key-env")
            if error.status_code in (400, 404, 405, 413, 422):
                return UserError(f"{what}; look at --model {self.model} and --base-url")
        if isinstance(_root(error), socket.gaierror):
            return UserError(f"{what}; look at --base-url")
        tries = f" ({self.retries + 1} attempts)" if self.retries and worth_retrying(error) else ""
        return MachineError(what + tries)

    def _line(self, text: str) -> str:
        """One short line of a server's words, without the key."""
        text = " ".join(str(self.hide(text)).split())
        return text if len(text) <= 300 else f"{text[:299]}…"


def find_service(
    model: str, base_url: str | None, *, key_name: str = "OPENAI_API_KEY", timeout: float = 120.0, retries: int = 4
) -> Service:
    """The service at an address (else OPENAI_BASE_URL, else OpenAI's own), its key from the environment.

    Raises UserError for an address that is none, and where one that is not local has no key or no encryption.
    """
    try:
        import openai  # noqa: F401
        import tenacity  # noqa: F401
    except ImportError:
        raise UserError(MISSING) from None
    address = checked_address(base_url or os.environ.get("OPENAI_BASE_URL") or PUBLIC)
    key = os.environ.get(key_name, "").strip()
    if not key:
        if not is_local(address):
            raise UserError(f"{key_name} is not set: {address} wants a key in the environment (--key-env NAME)")
        key = NO_KEY
    if not re.fullmatch(r"[!-~]+", key):
        raise UserError(f"{key_name} holds what no key holds (blanks or other than ASCII)")
    if key != NO_KEY and urlsplit(address).scheme == "http" and not is_local(address):
        raise UserError(f"--base-url {address}: http:// sends the key for all to read; name an https:// address")
    if not model.strip():
        raise UserError("--model: the name is empty")
    return Service(model, address, key, key_name, timeout, retries)


def checked_address(address: str) -> str:
    """The address without a trailing slash. Raises UserError unless it is http(s)://host[:port][/path]."""
    try:
        parts = urlsplit(address.strip())
        host, port = parts.hostname, parts.port
    except ValueError:
        raise UserError("--base-url: no address, as https://host/v1") from None
    if parts.username or parts.password or parts.query or parts.fragment:  # not repeated: it may be a secret
        raise UserError("--base-url: only https://host[:port]/path; a key belongs into the environment (--key-env)")
    if parts.scheme not in ("http", "https") or not host or port == 0 or re.search(r"\s", address.strip()):
        raise UserError(f"--base-url {address}: no address, as https://host/v1 or http://localhost:8000/v1")
    return address.strip().rstrip("/")


def is_local(address: str) -> bool:
    """Whether the address is this machine's or a private network's, where servers often want no key."""
    host = urlsplit(address).hostname or ""
    try:
        number = ipaddress.ip_address(host)
    except ValueError:
        return "." not in host or host.endswith((".local", ".localhost", ".internal", ".lan"))
    return number.is_loopback or number.is_private


def worth_retrying(error: BaseException) -> bool:
    """Status 408, 409, 429 (but no spent quota) and 5xx, time-outs, broken connections."""
    import openai

    if isinstance(error, openai.RateLimitError):
        return error.code not in QUOTA and error.type not in QUOTA
    if isinstance(error, openai.APIStatusError):
        return error.status_code in (408, 409, 425) or error.status_code >= 500
    return isinstance(error, openai.APIConnectionError)


def _pieces(response: Any) -> Iterator[bytes]:
    """The bytes of an answer; what breaks on the way is an error of the connection, as before its first byte."""
    import openai

    try:
        yield from response.iter_bytes()
    except Exception as error:  # the client's own transport's, which it wraps only until the answer begins
        kind = openai.APITimeoutError if "Timeout" in type(error).__name__ else openai.APIConnectionError
        raise kind(request=response.http_request) from error


def _wait(state: RetryCallState) -> float:
    """Seconds before the next attempt: what the server asks for, else twice the last."""
    error = state.outcome.exception() if state.outcome else None
    asked = retry_after(getattr(getattr(error, "response", None), "headers", {}))
    backing_off = FIRST_WAIT * 2.0 ** (state.attempt_number - 1)
    return float(min(LONGEST_WAIT, backing_off if asked is None else asked))


def retry_after(headers: Mapping[str, str], now: Callable[[], float] = time.time) -> float | None:
    """Seconds that the header Retry-After asks for, as a number or a date; None where there is none."""
    text = headers.get("retry-after", "")
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - now()
        except (ValueError, TypeError):
            return None
    return max(0.0, seconds) if seconds < float("inf") else None


def _root(error: BaseException | None) -> BaseException | None:
    """The first cause of an error."""
    while error is not None and (deeper := error.__cause__ or error.__context__) is not None:
        error = deeper
    return error
