"""Any plan document to a `Plan`: which form it is, and what no document may hold."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from deme_diffusion.ablate.cleaning import check_lines, clean, text_of
from deme_diffusion.ablate.markdown import read_markdown
from deme_diffusion.ablate.plan import Plan, Problem
from deme_diffusion.ablate.records import OPENING, read_records
from deme_diffusion.ablate.yaml_form import read_yaml

YAML_KEYS = re.compile(r"^(?:ablations|ablation_plan)[ \t]*:[ \t]*(?:\[.*)?$", re.MULTILINE)
YAML_BEGIN = re.compile(r"(?:[ \t]*(?:#[^\n]*)?\n|---[ \t]*\n)*(?:discussion|ablations|ablation_plan)[ \t]*:")
YAML_LIST = re.compile(r"^- (?:name|ablated_part): ", re.MULTILINE)
EMPTY = "no ablation in it (expected headings with Ablated Part and Action, JSON objects, or YAML with 'ablations')"
"""What is said of a document in which no entry was even begun."""
FENCE = re.compile(r"\s*(?:`{3,}|~{3,})[A-Za-z]{0,20}[ \t]*\n")
OBJECT = re.compile(
    r"^[ \t]{0,40}(?:(?:[-*+]|\d{1,4}[.)])[ \t]{1,8})?[ \t\[]{0,8}\{[ \t]{0,8}[\"'“}\n]|^\[[ \t]{0,8}\n[ \t]{0,40}\{",
    re.MULTILINE,
)


def read_plan(path: str | Path) -> Plan:
    """The plan in a document of any of the forms; entries that cannot be read are its problems.

    Raises UserError for a missing path, a file that is no text, a line over 1 MB, and YAML tags and aliases.
    """
    path = Path(path)
    return _read(text_of(path), str(path), yaml=path.suffix.lower() in (".yaml", ".yml"))


def read_text(text: str, *, where: str = "plan") -> Plan:
    """The same for a text; `where` names it in messages."""
    return _read(text, where, yaml=False)


def _read(text: str, where: str, *, yaml: bool) -> Plan:
    check_lines(text, where)
    text = _unfenced(clean(text))
    plans: list[Plan] = []
    for form in _forms(text, yaml=yaml):
        plan = _FORMS[form](text, where)
        if plan.ablations:
            return plan
        plans.append(plan)
    best = max(plans, key=lambda plan: len(plan.problems))
    return Plan(best.discussion, [], [*best.problems, Problem(1, EMPTY)])


_FORMS: Mapping[str, Callable[[str, str], Plan]] = {
    "yaml": read_yaml,
    "records": lambda text, where: read_records(text),
    "markdown": lambda text, where: read_markdown(text),
    "mixed": lambda text, where: max(read_records(text), read_markdown(text), key=lambda plan: len(plan.ablations)),
}
"""`mixed` is prose with objects in it: whichever finds more."""


def _forms(text: str, *, yaml: bool) -> list[str]:
    """The forms that a document may have, the likeliest first."""
    if yaml:
        return ["yaml"] if not text.lstrip().startswith("{") else ["yaml", "records"]
    if YAML_BEGIN.match(text) and YAML_KEYS.search(text):
        return ["yaml", "markdown"]
    if OPENING.search(text) or OBJECT.match(text.lstrip()):
        return ["records", "markdown"]
    if YAML_LIST.match(text):
        return ["yaml", "markdown"]
    return ["mixed"] if OBJECT.search(text) else ["markdown"]


def _unfenced(text: str) -> str:
    """A document that stands in one fence, without it; its lines keep their numbers."""
    opened = FENCE.match(text)
    if opened is None or not text.rstrip().endswith(("```", "~~~")):
        return text
    inner = text.rstrip().rstrip("`~")
    fence = text[: opened.end()].strip()[:3]
    return text if fence in inner[opened.end() :] else "\n" * text.count("\n", 0, opened.end()) + inner[opened.end() :]
