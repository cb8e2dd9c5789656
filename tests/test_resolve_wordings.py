"""One thing in the words of many authors: what a person would carry out, and what nobody should."""

from __future__ import annotations

import time
from typing import Any

import pytest

from deme_diffusion.ablate.arms import Arm
from deme_diffusion.ablate.matching import GENERIC, meaning
from deme_diffusion.ablate.parts import PARTS, ROWS
from deme_diffusion.ablate.plan import Ablation, Action
from deme_diffusion.ablate.replacing import takes
from deme_diffusion.ablate.resolve import resolve
from deme_diffusion.recipes import load
from judging import entries, judged
from wordings import WORDINGS

DIGITS = load("digits").recipe


RIGHT, MISSED, WRONG = 243, 7, 0
"""What the matcher makes of the corpus; all of it has been looked at, so this is no estimate for other plans."""


def test_the_corpus_is_read_at_least_as_well_as_before() -> None:
    found = judged(DIGITS)
    assert len({entry["author"] for entry in entries()}) == 20 and found.right + len(found.missed) == RIGHT + MISSED
    assert len(found.wrong) <= WRONG, found.wrong
    assert found.right >= RIGHT, found.missed


def _sets(arm: Arm, path: str) -> Any:
    if path in ("sampler", "steps"):
        first = arm.change["evaluate.samplers"][0]
        return first["num_inference_steps"] if path == "steps" else first["name"].removesuffix("Scheduler")
    section, _, name = path.partition(".")
    return arm.change.get(path, DIGITS.model_dump(mode="json")[section].get(name))


@pytest.mark.parametrize(("part", "action", "text", "change"), WORDINGS)
def test_wording(part: str, action: Action, text: str | None, change: dict[str, Any] | None) -> None:
    resolved = resolve(Ablation("", part, action, [text] if text else []), DIGITS)
    carried_out = [arm for arm in resolved.arms if arm.status != "not_executable"]
    if change is None:
        assert not carried_out and all(arm.reason for arm in resolved.arms)
        return
    (arm,) = carried_out
    for path, value in change.items():
        assert _sets(arm, path) == (pytest.approx(value) if not isinstance(value, str) else value), path


def test_replacements_decide_where_the_part_is_vague_and_only_there() -> None:
    vague = resolve(Ablation("", "The component", "REPLACE", ["TIES", "a mystery"]), DIGITS)
    assert vague.part is None  # half of the list is known
    both = resolve(Ablation("", "The component", "REPLACE", ["TIES", "DARE"]), DIGITS)
    assert both.part == "merge method" and [arm.status for arm in both.arms] == ["ready", "ready"]
    other = resolve(Ablation("", "Word tokens", "REPLACE", ["TIES", "DARE"]), DIGITS)
    assert other.part is None
    common = resolve(Ablation("", "The component", "REPLACE", ["uniform"]), DIGITS)
    assert common.part is None  # uniform what?


def test_a_name_that_is_common_to_all_parts_names_none() -> None:
    for part in ROWS.values():
        for name in part.names:
            assert meaning(name), (part.name, name)
            assert part.name in PARTS or len(meaning(name)) > 1 or not meaning(name) <= GENERIC, (part.name, name)


def test_plain_settings_are_recognised_and_in_no_list_of_parts() -> None:
    settings = [part for name, part in ROWS.items() if name not in PARTS]
    assert settings
    for part in settings:
        numeric = [part.numeric.example] if part.numeric else []
        for text in (*numeric, *(row.example or row.name for row in part.replacements)):
            resolved = resolve(Ablation("", part.name, "REPLACE", [text]), DIGITS)
            assert resolved.part == part.name and takes(part), (part.name, text)
            assert all(part.path in arm.change or arm.status == "not_executable" for arm in resolved.arms), part.name


def test_a_text_is_read_in_milliseconds() -> None:
    resolve(Ablation("", "warm", "REPLACE", ["up"]), DIGITS)
    begin = time.perf_counter()
    for number in range(20):
        resolve(
            Ablation(f"{number}", f"merging of expert {number}", "REPLACE", [f"TIES with density {number}%"]), DIGITS
        )
    assert (time.perf_counter() - begin) / 20 < 0.05
