"""The parts table: every row, action and replacement is a valid change, and no name is a whole phrase of the plan."""

from __future__ import annotations

from collections import Counter

import pytest

from deme_diffusion.ablate.consequences import applied, completed
from deme_diffusion.ablate.declared import declared
from deme_diffusion.ablate.matching import STRICT, meaning, ranked, score
from deme_diffusion.ablate.parts import PARTS, listing
from deme_diffusion.ablate.plan import Ablation
from deme_diffusion.ablate.resolve import resolve
from deme_diffusion.ablate.rows import Part
from deme_diffusion.config import Recipe
from deme_diffusion.merging.table import METHODS
from deme_diffusion.recipes import changed, load

DIGITS = load("digits").recipe


@pytest.mark.parametrize("name", ["digits", "pico", "sd14-coco30k"])
def test_every_declared_change_is_valid(name: str, pico_recipe: Recipe) -> None:
    recipe = pico_recipe if name == "pico" else load(name, ["decouple.mixed_precision=bf16"]).recipe
    seen = Counter[tuple[str, str]]()
    for part, action, change in declared(recipe):
        seen[part.name, action] += 1
        assert applied(recipe, change) is not None, (part.name, action, change)
    able = [part for part in PARTS.values() if not part.needs(recipe)]
    assert set(seen) == {(part.name, action) for part in able for action in part.actions}
    assert seen["merge method", "REPLACE"] == len(METHODS)


def recipe_for(part: Part) -> Recipe:
    return DIGITS if not part.needs(DIGITS) else load("sd14-coco30k").recipe


def test_removing_makes_a_recipe_in_which_the_part_is_off() -> None:
    for part in PARTS.values():
        if "REMOVE" not in part.actions:
            continue
        recipe = recipe_for(part)
        on = applied(recipe, completed(recipe, part.on)) if part.on and not part.is_on(recipe) else recipe
        assert not part.is_on(applied(on, completed(on, part.off))), part.name


def test_adding_turns_on_what_is_off() -> None:
    for part in PARTS.values():
        if "ADD" not in part.actions:
            continue
        recipe = recipe_for(part)
        off = applied(recipe, completed(recipe, part.off))
        assert part.is_on(applied(off, completed(off, part.on))), part.name


def test_each_part_is_recognised_by_each_of_its_own_names() -> None:
    for part in PARTS.values():
        for name in part.names:
            others = {row.name: score(name, row.names, row.field, STRICT) for row in PARTS.values()}
            best = ranked(others)[0]
            related = {part.name, *part.also, *(row.name for row in PARTS.values() if part.name in row.also)}
            assert best[0] in related or others[part.name] == best[1], (part.name, name, best)


def test_every_replacement_is_recognised_by_each_of_its_names() -> None:
    for part in PARTS.values():
        if "REPLACE" not in part.actions:
            continue
        for row in part.replacements:
            for name in (row.name, *row.synonyms):
                assert meaning(name), (part.name, row.name, name)
                own = score(name, row.names, part.field)
                rest = [score(name, other.names, part.field) for other in part.replacements if other is not row]
                assert own >= max(rest, default=0.0), (part.name, row.name, name)


def test_no_name_is_a_whole_phrase_of_the_published_plan() -> None:
    phrases = {
        "model merging technique", "timestep range division strategy", "overlapping ranges", "random division",
        "ablation of model merging", "ablation of timestep range division", "model merging", "timestep range division",
    }  # fmt: skip
    for part in PARTS.values():
        names = {*part.names, *(name for row in part.replacements for name in row.names)}
        assert not phrases & {name.lower() for name in names}, part.name


def test_a_change_takes_along_what_would_make_the_recipe_invalid() -> None:
    given = changed(
        DIGITS,
        {
            "decouple.division": "explicit",
            "decouple.edges": [100, 300, 600],
            "decouple.range_steps": [600, 600, 600, 600],
            "merge.search": "none",
            "merge.weights": [0.1, 0.1, 0.2, 0.5],
        },
    )
    change = completed(given, {"decouple.num_ranges": 2})
    assert change["decouple.division"] == "uniform" and change["merge.weights"] is None
    assert applied(given, change).decouple.num_ranges == 2
    for part, action, declared_change in declared(given):
        assert applied(given, declared_change) is not None, (part.name, action)


def test_a_method_without_weights_has_no_search_and_keeps_no_options_of_another() -> None:
    ties = changed(DIGITS, {"merge.method": "ties", "merge.search": "none", "merge.options.density": 0.5})
    change = completed(ties, {"merge.method": "average"})
    assert applied(ties, change).merge.options.changed() == {}
    assert completed(DIGITS, {"merge.method": "average"})["merge.search"] == "none"
    assert completed(DIGITS, {"merge.method": "none"}) == {"merge.method": "none"}


def test_nothing_is_added_that_the_recipe_has_already() -> None:
    assert completed(DIGITS, {"decouple.division": "log_snr"}) == {"decouple.division": "log_snr"}
    assert completed(DIGITS, {"merge.search": "grid"}) == {"merge.search": "grid"}


def test_listing_tells_every_part() -> None:
    rows = list(listing())
    assert [row["part"] for row in rows] == list(PARTS)
    assert all(row["description"] and row["setting"] and row["actions"] for row in rows)
    by_name = {row["part"]: row for row in rows}
    assert by_name["consistency loss"]["off"] == "decouple.consistency_weight=0.0"
    assert "TIES" in by_name["merge method"]["takes"]


def test_a_part_that_is_off_cannot_be_removed_again() -> None:
    off = changed(DIGITS, {"decouple.consistency_weight": 0.0})
    arm = resolve(Ablation("", "consistency loss", "REMOVE"), off).arms[0]
    assert arm.status == "same_as_baseline" and "off" in arm.reason
