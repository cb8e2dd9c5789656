"""An ablation to arms: the part it speaks of, what each replacement changes, or the reason why not. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deme_diffusion.ablate import replacing
from deme_diffusion.ablate.arms import Arm, Resolved
from deme_diffusion.ablate.consequences import applied, completed
from deme_diffusion.ablate.matching import LOOSE, score
from deme_diffusion.ablate.metrics import metrics_of
from deme_diffusion.ablate.parts import PARTS, family
from deme_diffusion.ablate.plan import Ablation
from deme_diffusion.ablate.rows import Change, Part
from deme_diffusion.ablate.speaking import Spoken, spoken
from deme_diffusion.config import Recipe
from deme_diffusion.errors import UserError


def resolve(ablation: Ablation, recipe: Recipe) -> Resolved:
    """What an ablation means for a recipe. Never raises for what a plan may say: every text is in some arm."""
    metrics = metrics_of(ablation.metrics)
    if ablation.change or ablation.changes:
        return Resolved(ablation, _part_of(ablation), metrics, tuple(_exact(ablation, recipe)), 1.0)
    found = spoken(ablation)
    if found.part is None:
        arms = [_refused(text, found.reason, found.nearest, found.score) for text in _texts(ablation)]
        return Resolved(ablation, None, metrics, tuple(arms), found.score)
    arms = _several(ablation, found, recipe) if found.several else _arms(ablation, found.part, found.score, recipe)
    return Resolved(ablation, found.part.name, metrics, tuple(arms), found.score)


def _arms(ablation: Ablation, part: Part, sure: float, recipe: Recipe) -> list[Arm]:
    if ablation.action == "REMOVE":
        return [_removed(part, sure, recipe, ablation.ablated_part)]
    if ablation.action == "ADD":
        return _added(ablation, part, sure, recipe)
    if not ablation.replacement:
        reason = f"REPLACE by what? {part.name} takes {'; '.join(replacing.takes(part))}"
        return [_refused(None, reason, replacing.takes(part), sure)]
    said = ablation.ablated_part
    return [arm for text in ablation.replacement for arm in replaced(part, text, recipe, said)]


def _removed(part: Part, sure: float, recipe: Recipe, text: str) -> Arm:
    if part.exact and (name := replacing.absent(part, text, recipe)):
        return Arm(None, "same_as_baseline", {}, reason=f"the recipe's {part.name} is not {name}", score=sure)
    able = next((row for row in family(part) if "REMOVE" in row.actions), None)
    if able is None:
        reason = f"{part.name} cannot be removed; it can be replaced by {'; '.join(replacing.takes(part))}"
        return _refused(None, reason, replacing.takes(part), sure)
    if not able.is_on(recipe):
        return Arm(None, "same_as_baseline", able.off, reason=f"{able.name} is off in the recipe", score=sure)
    return arm_of(recipe, None, able.off, sure)


def _added(ablation: Ablation, part: Part, sure: float, recipe: Recipe) -> list[Arm]:
    """What the texts name, the ablated part's own among them; a part that only has a default is turned on."""
    texts = ablation.replacement or [ablation.ablated_part]
    arms: list[Arm] = []
    for text in texts:
        given = text if ablation.replacement else None
        named = replaced(part, _beside(part, text), recipe, ablation.ablated_part, label=given)
        known = all(arm.status != "not_executable" for arm in named)
        if known or "ADD" not in part.actions:
            arms += named
        elif not ablation.replacement or score(text, part.names, part.field) >= LOOSE.least:
            arms.append(_turned_on(part, given, sure, recipe))
        else:
            arms += named
    return arms


def _beside(part: Part, text: str) -> str:
    """The name of what ADD makes of a replacement that is not to take the part's place."""
    rows = {row.name: row for row in part.replacements}
    fit = {name: score(text, rows[name].names, part.field) for name in part.beside}
    best = max(fit, key=lambda name: fit[name], default=None)
    return part.beside[best] if best is not None and fit[best] >= LOOSE.least else text


def _turned_on(part: Part, text: str | None, sure: float, recipe: Recipe) -> Arm:
    if part.is_on(recipe):
        return Arm(text, "same_as_baseline", part.on, part.name, f"{part.name} is on in the recipe", score=sure)
    return arm_of(recipe, text, part.on, sure, part.name)


def _several(ablation: Ablation, found: Spoken, recipe: Recipe) -> list[Arm]:
    """Several parts at once: removed, or turned on, together."""
    names = " and ".join(part.name for part in found.several)
    if ablation.action == "REPLACE" or (ablation.action == "ADD" and ablation.replacement):
        reason = f"it names several parts, {names}; an ablation each is needed"
        return [_refused(text, reason, tuple(p.name for p in found.several), found.score) for text in _texts(ablation)]
    removing = ablation.action == "REMOVE"
    change: dict[str, Any] = {}
    for part in found.several:
        if ablation.action not in part.actions:
            return [_refused(None, f"{part.name}: cannot be {'removed' if removing else 'added'}", (), found.score)]
        change |= part.off if removing else {} if part.is_on(recipe) else part.on
    return [arm_of(recipe, None, change, found.score, f"without {names}" if removing else f"with {names}")]


def replaced(part: Part, text: str, recipe: Recipe, context: str = "", *, label: str | None = "") -> list[Arm]:
    """The arms that one replacement text means."""
    given = text if label == "" else label
    meant = replacing.meant(part, text, recipe, context)
    if not meant.choices:
        return [_refused(given, meant.reason, meant.nearest, meant.score)]
    arms = [
        arm_of(recipe, given, choice.change, choice.score, choice.variant, choice.note)
        if not choice.needs
        else Arm(given, "not_executable", choice.change, choice.variant, choice.needs, score=choice.score)
        for choice in meant.choices
    ]
    return [arm for number, arm in enumerate(arms) if arm.change not in [other.change for other in arms[:number]]]


def arm_of(recipe: Recipe, text: str | None, change: Change, sure: float, variant: str = "", note: str = "") -> Arm:
    """An arm for a change: ready, the baseline itself, or refused by the recipe with its reason."""
    whole = completed(recipe, change)
    try:
        same = applied(recipe, whole) == recipe
    except UserError as error:
        return Arm(text, "not_executable", whole, variant, str(error), score=sure)
    if same:
        return Arm(text, "same_as_baseline", whole, variant, "the recipe has it already", score=sure)
    return Arm(text, "ready", whole, variant, note, score=sure)


def _refused(text: str | None, reason: str, nearest: tuple[str, ...], sure: float) -> Arm:
    return Arm(text, "not_executable", {}, "", reason, nearest, sure)


def _texts(ablation: Ablation) -> list[str | None]:
    return list(ablation.replacement) if ablation.replacement and ablation.action != "REMOVE" else [None]


def _exact(ablation: Ablation, recipe: Recipe) -> Iterator[Arm]:
    """What a plan says exactly is taken as it stands; texts without a change of their own are matched."""
    for text in _texts(ablation):
        change = {**ablation.change, **ablation.changes.get(text or "", {})}
        if not change:
            part = PARTS.get(_part_of(ablation) or "")
            if part is None or text is None:
                yield _refused(text, "no change is said for it, and its part is not known", (), 0.0)
            else:
                yield from replaced(part, text, recipe)
            continue
        try:
            same = applied(recipe, change) == recipe
        except UserError as error:
            yield Arm(text, "not_executable", change, reason=str(error), score=1.0)
            continue
        reason = "the recipe has it already" if same else ""
        yield Arm(text, "same_as_baseline" if same else "ready", change, reason=reason, score=1.0)


def _part_of(ablation: Ablation) -> str | None:
    """The part whose setting a plan names: the main one of a row, or any that it sets."""
    paths = {path for change in (ablation.change, *ablation.changes.values()) for path in change}
    main = next((part.name for part in PARTS.values() if part.path in paths), None)
    return main or next((part.name for part in PARTS.values() if paths & {*part.off, *part.on}), None)
