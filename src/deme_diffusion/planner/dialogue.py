"""Asking a language model for the next plan: the request, the check of its answer, one round of repair, the record."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from deme_diffusion.ablate.parts import PARTS
from deme_diffusion.ablate.plan import Plan
from deme_diffusion.config import Recipe
from deme_diffusion.errors import MachineError
from deme_diffusion.files import write_json
from deme_diffusion.planner.answers import Entry, Judged, content_of, judge, read_answer
from deme_diffusion.planner.candidates import done_targets
from deme_diffusion.planner.evidence import Measured, read_evidence
from deme_diffusion.planner.offline import said
from deme_diffusion.planner.prompting import Prompts
from deme_diffusion.planner.service import Message, Service

log = logging.getLogger(__name__)
MOST_REPAIRED, MOST_LINES = 30, 200
"""Entries that go back at most; earlier arms that a request tells of at most."""
NOTHING = Entry("the whole answer", "no ablation could be read in it; the form is one JSON object a line")


@dataclass
class Record:
    """What was sent and what came back, beside the plan; never the key nor a header."""

    service: Service
    plan: Path
    requests: list[dict[str, Any]] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)

    @property
    def paths(self) -> tuple[Path, Path]:
        """What was sent, and what came back."""
        return record_paths(self.plan)

    def ask(self, messages: Sequence[Message]) -> dict[str, Any]:
        """One request; it is on disk before it is sent, and the answer before it is read."""
        self.requests.append({"model": self.service.model, "messages": [dict(message) for message in messages]})
        self._write(0, {"base_url": self.service.base_url, "requests": self.requests})
        answer = self.service.ask(messages)
        self.answers.append({"answer": answer})
        self.note()
        return answer

    def note(self, **found: Any) -> None:
        """Add what was found in the last answer."""
        self.answers[-1] |= found
        self._write(1, {"base_url": self.service.base_url, "answers": self.answers})

    def _write(self, which: int, content: Mapping[str, Any]) -> None:
        write_json(self.paths[which], _writable(self.service.hide(content)))


def record_paths(plan: Path) -> tuple[Path, Path]:
    """PLAN.request.json and PLAN.answer.json."""
    request, answer = (plan.with_name(f"{plan.stem}.{name}.json") for name in ("request", "answer"))
    return request, answer


def ask_for_plan(
    service: Service, recipe: Recipe, runs: Path, plan: Path, *, paper: str, prompts: Prompts, count: int = 5
) -> Plan:
    """A plan of at most `count` ablations that the recipe can run, by a language model; its record beside `plan`.

    Raises UserError and MachineError as the service does, and MachineError where no entry is usable after the repair.
    """
    evidence = read_evidence(runs, recipe)
    values = {"paper": paper, "parts": parts_said(recipe), "recipe": shown(recipe), "done": list(lines(evidence))}
    messages = [
        {"role": "system", "content": prompts.render("system.md", count=count)},
        {"role": "user", "content": prompts.render("user.md", count=count, **values)},
    ]
    prompts.render("repair.md", usable=[], problems=[NOTHING])  # wrong templates are told before anything is asked
    record, done = Record(service, plan), sorted(done_targets(recipe, evidence))
    text, judged = _round(record, messages, recipe, done)
    if judged.unusable:
        judged = _repaired(record, messages, text, judged, recipe, done, prompts)
    for entry in judged.unusable:
        log.warning("left out: %s: %s", entry.entry[:200], entry.error)
    if not judged.usable:
        raise MachineError(f"{service.model} proposes nothing that {recipe.name} can run; see {record.paths[1]}")
    if len(judged.usable) > count:
        log.warning("%d ablations proposed, the first %d are kept (--count)", len(judged.usable), count)
    return Plan(judged.discussion or f"{service.model} gave no reasoning.", judged.usable[:count])


def _round(record: Record, messages: Sequence[Message], recipe: Recipe, done: Sequence[str]) -> tuple[str, Judged]:
    answer = record.ask(messages)
    text = record.service.hide(content_of(answer, record.service.base_url))
    if answer["choices"][0].get("finish_reason") == "length":
        log.warning("%s: the answer is cut at the service's limit of length", record.service.model)
    judged = judge(read_answer(text), recipe, done)
    if not judged.usable and not judged.unusable:
        judged = Judged(judged.discussion, [], [NOTHING])
    record.note(usable=[one.name for one in judged.usable], unusable=[vars(one) for one in judged.unusable])
    return text, judged


def _repaired(
    record: Record, messages: list[Message], text: str, first: Judged, recipe: Recipe, done: Sequence[str],
    prompts: Prompts,
) -> Judged:  # fmt: skip
    """What is usable once the entries that are not went back with their errors."""
    count = len(first.unusable)
    log.info("%d %s cannot be run; back once", count, "entries" if count > 1 else "entry")
    names, problems = [one.name for one in first.usable], first.unusable[:MOST_REPAIRED]
    again = prompts.render("repair.md", usable=names, problems=problems)
    messages = [*messages, {"role": "assistant", "content": text}, {"role": "user", "content": again}]
    try:
        _, second = _round(record, messages, recipe, done)
    except MachineError as error:
        if not first.usable:
            raise
        log.warning("no second answer: %s", error)
        return first
    both = judge(Plan("", [*first.usable, *second.usable]), recipe, done)  # an entry that came again is one
    repeated = [one for one in second.unusable if one is not NOTHING]
    return Judged(first.discussion or second.discussion, both.usable, repeated)


# -- what a request tells ----------------------------------------------------------------------------


def parts_said(recipe: Recipe) -> list[dict[str, Any]]:
    """The parts table for a prompt: name, description, and what each action takes on this recipe."""
    found = []
    for part in PARTS.values():
        actions = []
        for action in part.actions:
            if action == "REPLACE" and part.takes:
                actions.append({"name": action, "replacements": list(part.takes)})
            elif action != "REPLACE" and part.is_on(recipe) == (action == "REMOVE"):
                actions.append({"name": action, "replacements": []})
        found.append({"name": part.name, "description": part.description, "actions": actions})
    return [part for part in found if part["actions"]]


def lines(evidence: Iterable[Measured]) -> Iterable[str]:
    """What was ablated, a line an arm; the recipe's own baseline first."""
    for one in list(evidence)[:MOST_LINES]:
        what = said(one) if one.status == "done" else f"{one.label}: failed: {one.error[:200]}"
        yield " ".join(f"{one.part or 'a part of no table'}: {what}".split())


def shown(recipe: Recipe) -> str:
    """The recipe as YAML without its runtime; of folders of this machine only the last name."""
    return yaml.safe_dump(_without_paths(recipe.model_dump(mode="json", exclude={"runtime"})), sort_keys=False).strip()


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_paths(one) for one in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _writable(value: Any) -> Any:
    """JSON has no NaN, which Python reads all the same; and a lone surrogate is no text."""
    if isinstance(value, dict):
        return {str(key): _writable(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_writable(one) for one in value]
    return str(value) if isinstance(value, float) and value - value != 0 else value
