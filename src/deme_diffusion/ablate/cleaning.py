"""Bytes to clean text: encodings, wrongly decoded UTF-8, line ends, characters that no plan needs."""

from __future__ import annotations

import html
import re
from pathlib import Path

from deme_diffusion.errors import UserError

MAX_LINE = 2**20
"""Characters of the longest line that is read."""
MAX_FILE = 2**26
"""Bytes of the largest file that is read."""

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
"""Controls (a name must not steer the terminal that shows it) and surrogates, which no file can hold."""
ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")


def _byte_of() -> dict[str, int]:
    """The byte behind each character of a text that was read as cp1252 (Latin-1 where cp1252 has none)."""
    table = {chr(byte): byte for byte in range(0x80, 0x100)}
    for byte in range(0x80, 0xA0):
        table.setdefault(bytes([byte]).decode("cp1252", errors="ignore") or chr(byte), byte)
    return table


BYTE = _byte_of()
_TAIL = "[" + re.escape("".join(char for char, byte in BYTE.items() if byte < 0xC0)) + "]"
# Of two-byte sequences only Latin-1, Greek and Cyrillic: É before a closing quote is French, not a broken ɔ.
MOJIBAKE = re.compile(f"[ÂÃÎÏÐÑ]{_TAIL}|[à-ï]{_TAIL}{{2}}|[ð-ô]{_TAIL}{{3}}")


def repaired(text: str) -> str:
    """UTF-8 that was read as cp1252 is read again; what does not fit together stays."""
    return MOJIBAKE.sub(_read_again, text)


def _read_again(found: re.Match[str]) -> str:
    try:
        return bytes(BYTE[char] for char in found[0]).decode("utf-8")
    except UnicodeDecodeError:
        return found[0]


def clean(text: str) -> str:
    """The text as every reader takes it: `\\n` between lines, plain blanks, no control characters."""
    lines = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if lines.isascii():
        return CONTROL.sub(" ", lines)
    return CONTROL.sub(" ", repaired(lines).replace("\xa0", " ").replace("\u202f", " "))


def one_line(text: str) -> str:
    """A name or an entry: in one line, without control characters or blanks at its ends."""
    return re.sub(r"[^\S ]+", " ", CONTROL.sub(" ", text)).strip()


def unescaped(text: str) -> str:
    """HTML entities decoded (those that end in a semicolon)."""
    return ENTITY.sub(lambda found: html.unescape(found[0]), text) if "&" in text else text


def text_of(path: Path) -> str:
    """A file's text. Raises UserError for what is missing, no file, too large, or no text."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; a plan is one document")
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if not path.is_file():
        raise UserError(f"{path}: not a file")
    if path.stat().st_size > MAX_FILE:
        raise UserError(f"{path}: {path.stat().st_size >> 20} MB; a plan of at most {MAX_FILE >> 20} MB is read")
    try:
        return decoded(path.read_bytes(), str(path))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error


def decoded(data: bytes, where: str) -> str:
    """UTF-8, UTF-16 with a mark, or else Windows' cp1252."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        encodings = ["utf-16"]
    else:
        encodings = ["utf-8-sig", "cp1252"]
    for encoding in encodings:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\x00" in text or (encoding == "cp1252" and CONTROL.search(text)):
            break
        return text
    raise UserError(f"{where}: not a text document")


def check_lines(text: str, where: str) -> None:
    """Raises UserError for a line that no author wrote."""
    if len(text) <= MAX_LINE:
        return
    for number, line in enumerate(text.split("\n"), 1):
        if len(line) > MAX_LINE:
            raise UserError(f"{where}, line {number}: {len(line):,} characters; lines of at most 1 MB are read")
