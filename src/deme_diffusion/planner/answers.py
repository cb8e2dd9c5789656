"""What a language model answered: the plan in it, recovered line by line, and which of its entries can be run."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deme_diffusion.ablate.plan import Ablation, Plan
from deme_diffusion.ablate.reading import read_text
from deme_diffusion.ablate.resolve import resolve
from deme_diffusion.config import Recipe
from deme_diffusion.errors import MachineError, UserError
from deme_diffusion.planner.candidates import Baseline, ready
from deme_diffusion.planner.evidence import what_matters
from deme_diffusion.recipes import changed

log = logging.getLogger(__name__)
KEYS = ("ablated_part", "action", "name", "replacement")
MOST_ENTRIES = 100
"""Ablations of one answer that are looked at."""
MOST_TEXT, MOST_BROKEN, LONGEST = 200_000, 1000, 50_000
"""To stay quick: characters of an answer that are read; braces that may open no object; characters of an object."""
_THOUGHTS = re.compile(r"<(think|thinking|reasoning)>.*?(</\1>|\Z)", re.DOTALL | re.IGNORECASE)
_FENCE = re.compile(r"^[ \t]*```[\w-]*[ \t]*$", re.MULTILINE)


@dataclass(frozen=True)
class Entry:
    """An entry of an answer that cannot be run: how it reads, and why not."""

    entry: str
    error: str


@dataclass(frozen=True)
class Judged:
    """The entries that can be run, and those that cannot, as they stand in the answer."""

    discussion: str
    usable: list[Ablation]
    unusable: list[Entry]


def content_of(answer: dict[str, Any], where: str) -> str:
    """The text of a chat completion's first choice. Raises MachineError where it has none."""
    choices = answer.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    message = first.get("message") if isinstance(first, dict) else None
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list):  # parts, as some services have it
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    if not isinstance(content, str) or not content.strip():
        refusal = message.get("refusal") if isinstance(message, dict) else None
        why = f"the model declines: {str(refusal)[:200]}" if refusal else "the answer has no text in choices[0].message"
        raise MachineError(f"{where}: {why}")
    return content.encode("utf-8", "replace").decode()  # half of a surrogate pair is no text


def read_answer(text: str) -> Plan:
    """The plan in an answer: as any plan document, or else from the JSON objects that stand anywhere in it.

    Never raises. Exact changes (`set`) are taken away: what a model says is free text, whose meaning the table decides.
    """
    text = _FENCE.sub("", _THOUGHTS.sub("", text))
    if len(text) > MOST_TEXT:
        log.warning("the answer has %d characters; what comes after the first %d is not read", len(text), MOST_TEXT)
        text = text[:MOST_TEXT]
    document, objects = _read(text) or Plan(), _read(_as_lines(text)) or Plan()
    # An array over many lines, among words, may look like Markdown; only the document tells of its broken lines.
    as_objects = objects.ablations != document.ablations and len(objects.ablations) >= len(document.ablations)
    best, discussion = objects if as_objects else document, document.discussion
    plain = [replace(ablation, change={}, changes={}) for ablation in best.ablations[:MOST_ENTRIES]]
    lines = text.splitlines()
    problems = [one for one in best.problems if not _prose(lines[one.line - 1] if one.line <= len(lines) else "")]
    return Plan(discussion, plain, problems)


def _prose(line: str) -> bool:
    """Whether a line is words around the plan, such as a greeting, rather than a broken part of it."""
    return not re.search(r"[{}\[\]#*]|^\s*[-+]|ablat|action|replace", line, re.IGNORECASE)


def _read(text: str) -> Plan | None:
    try:
        return read_text(text, where="answer")
    except UserError:
        return None


def _as_lines(text: str) -> str:
    """The objects of an answer that look like ablations, one a line."""
    return "\n".join(json.dumps(one, ensure_ascii=False) for one in _objects(text))


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """Every JSON object in the text that is an entry, within lists and other objects as well."""
    decoder, position, broken = json.JSONDecoder(), 0, 0
    while (start := text.find("{", position)) >= 0 and broken < MOST_BROKEN:
        try:  # a slice, since the decoder counts the lines before an error from the start of what it was given
            value, length = decoder.raw_decode(text[start : start + LONGEST])
        except (ValueError, RecursionError):
            position, broken = start + 1, broken + 1
            continue
        position = start + length
        yield from _entries(value)


def _entries(value: Any, depth: int = 0) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict) and sum(key in value for key in KEYS) >= 2:
        yield value
    elif depth < 4:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        for one in inner:
            yield from _entries(one, depth + 1)


def judge(plan: Plan, recipe: Recipe, done: Sequence[str] = ()) -> Judged:
    """Which ablations can be run, reduced to the replacements that can; `done`: changed recipes that exist already."""
    usable, unusable = list[Ablation](), [Entry(f"line {p.line}", p.what) for p in plan.problems]
    judging = _Judging(recipe, set(done), Baseline(recipe))
    for ablation in plan.ablations:
        kept, errors = judging.reduced(ablation)
        usable += [kept] if kept else []
        unusable += [Entry(_named(ablation), error) for error in errors]
    return Judged(plan.discussion, usable, unusable)


@dataclass
class _Judging:
    recipe: Recipe
    seen: set[str]
    baseline: Baseline

    def reduced(self, ablation: Ablation) -> tuple[Ablation | None, list[str]]:
        """The ablation with the replacements whose arms are all ready and new, and the errors of the others."""
        kept, errors = list[str | None](), list[str]()
        for text in ablation.replacement or (None,):
            if error := self._error(replace(ablation, replacement=[] if text is None else [text])):
                errors.append(f"{text or ablation.ablated_part}: {error}")
            else:
                kept.append(text)
        whole = replace(ablation, replacement=[text for text in kept if text is not None])
        if kept and ready(resolve(whole, self.recipe)) is None:
            return None, [*errors, "its replacements cannot be read beside each other"]
        return (whole if kept else None), errors

    def _error(self, ablation: Ablation) -> str:
        """Why one replacement, or a removal, cannot be run; '' where it can, and then it counts as seen."""
        arms = resolve(ablation, self.recipe).arms
        refused = next((arm for arm in arms if arm.status != "ready"), None)
        if refused or not arms:
            return _why(refused.reason, refused.nearest) if refused else "it stands for nothing in the table"
        targets = {what_matters(changed(self.recipe, arm.change)) for arm in arms}
        if targets <= self.seen:
            return "this was done already, or stands above"
        if any(self.baseline.added(arm.change) is None for arm in arms):
            return "it changes nothing that this recipe does, or cannot be run with its files"
        self.seen |= targets
        return ""


def _why(reason: str, nearest: Sequence[str]) -> str:
    return reason + (f" (nearest: {', '.join(nearest)})" if nearest else "")


def _named(ablation: Ablation) -> str:
    return json.dumps(
        {"name": ablation.name, "ablated_part": ablation.ablated_part, "action": ablation.action,
         "replacement": ablation.replacement}, ensure_ascii=False,
    )  # fmt: skip
