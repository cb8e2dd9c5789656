"""Values in JSON, as people and language models write it: single quotes, Python's names, commas too many."""

from __future__ import annotations

import json
import re
from typing import Any

DECODER = json.JSONDecoder(strict=False)
TOKEN = re.compile(
    r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'|“[^“”]*”|[\"'“]|\b(?:True|False|None)\b|,(?=\s*[}\]])", re.DOTALL
)
NAMES = {"True": "true", "False": "false", "None": "null"}
MAX_TEXT = 2**20


class NotParsedError(ValueError):
    """A text that is no JSON, however much one forgives."""


def parsed(text: str) -> Any:
    """The value of a text. Raises NotParsedError with the place."""
    value, end = parsed_at(text.strip())
    if end != len(text.strip()):
        raise NotParsedError(f"more text after it, column {end + 1}")
    return value


def parsed_at(text: str, begin: int = 0) -> tuple[Any, int]:
    """The value at `begin`, and where it ends; a forgiven text is taken to its end. Raises NotParsedError."""
    try:
        return DECODER.raw_decode(text, begin)
    except RecursionError:
        raise NotParsedError("nested too deeply") from None
    except ValueError as error:
        reason = _reason(error)
    if len(text) > MAX_TEXT:
        raise NotParsedError(reason)
    try:
        return DECODER.decode(forgiven(text[begin:])), len(text)
    except (ValueError, RecursionError):
        raise NotParsedError(reason) from None


def _reason(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(':')}, column {error.colno}"
    return "a number of too many digits"


def forgiven(text: str) -> str:
    """Python's literals, smart quotes and trailing commas as JSON. Raises ValueError for a string that never ends."""
    return TOKEN.sub(_as_json, text)


def _as_json(found: re.Match[str]) -> str:
    token = found[0]
    if token == ",":
        return ""
    if token in NAMES:
        return NAMES[token]
    if len(token) == 1:
        raise ValueError("a string that never ends")
    if token[0] == '"':
        return token
    inner = token[1:-1]
    return '"' + re.sub(r"\\(.)|\"", lambda each: _escape(each[0]), inner, flags=re.DOTALL) + '"'


def _escape(pair: str) -> str:
    """`\\'` needs no escape in JSON, a bare quote does."""
    return "'" if pair == "\\'" else '\\"' if pair == '"' else pair
