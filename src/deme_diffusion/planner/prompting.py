"""The prompts: Jinja templates in files that a user may replace, and what may stand in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, UndefinedError
from jinja2.sandbox import SandboxedEnvironment

from deme_diffusion.errors import UserError, nearest

PACKAGED = Path(__file__).parent / "prompts"
VARIABLES = {
    "system.md": ("count",),
    "user.md": ("paper", "parts", "recipe", "done", "count"),
    "repair.md": ("usable", "problems"),
}
"""What each prompt may use."""
MOST_CHARACTERS = 400_000
"""A longer paper fits no model's context."""


class Prompts:
    """The three prompts, each from the user's folder where it is there, else the packaged one."""

    def __init__(self, folder: Path | None = None) -> None:
        if folder is not None and not any((folder / name).is_file() for name in VARIABLES):
            raise UserError(f"--prompts {folder}: none of {', '.join(VARIABLES)} is there")
        self._files = {
            name: folder / name if folder and (folder / name).is_file() else PACKAGED / name for name in VARIABLES
        }
        self._environment = SandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        self._texts = {name: read_text_file(path) for name, path in self._files.items()}

    def render(self, name: str, **values: Any) -> str:
        """A prompt with its values. Raises UserError for a template that is wrong, by file, line and nearest name."""
        try:
            return self._environment.from_string(self._texts[name]).render(**values).strip()
        except TemplateSyntaxError as error:
            raise UserError(f"{self._files[name]}: line {error.lineno}: {error.message}") from None
        except UndefinedError as error:
            raise UserError(f"{self._files[name]}: {_unknown(str(error.message), name)}") from None
        except (TemplateError, ArithmeticError, TypeError, ValueError, LookupError) as error:
            raise UserError(f"{self._files[name]}: {' '.join(str(error).split())}") from None


def read_paper(path: Path | None) -> str:
    """The method's text: the user's, or the packaged summary."""
    text = read_text_file(path or PACKAGED / "paper.md").strip()
    if not text:
        raise UserError(f"{path}: an empty file; --paper takes the method as text or Markdown")
    if len(text) > MOST_CHARACTERS:
        raise UserError(f"{path}: {len(text):,} characters; at most {MOST_CHARACTERS:,} are sent")
    return text


def read_text_file(path: Path) -> str:
    """A file's text. Raises UserError where there is none, or it is no UTF-8 (a PDF is none)."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: no text in UTF-8; a PDF is to be converted first") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if "\0" in text:
        raise UserError(f"{path}: binary data, not text")
    return text


def _unknown(message: str, name: str) -> str:
    wrong = message.split("'")[1] if message.count("'") >= 2 else ""
    return f"{message}{nearest(wrong, VARIABLES[name])}; it may use {', '.join(VARIABLES[name])}"
