"""An ablation to arms: the part it speaks of, what each replacement changes, or the reason why not. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from deme_diffusion.ablate import replacing
from deme_diffusion.ablate.arms import Arm, Resolved
from deme_diffusion.ablate.consequences import applied, completed, idle, taken_along
from deme_diffusion.ablate.matching import LOOSE, concepts, score, strangeness
from deme_diffusion.ablate.metrics import metrics_of
from deme_diffusion.ablate.parts import PARTS, family
from deme_diffusion.ablate.plan import Ablation
from deme_diffusion.ablate.rows import Change, Part
from deme_diffusion.ablate.saying_experts import one_of_several
from deme_diffusion.ablate.speaking import Spoken, spoken
from deme_diffusion.ablate.text import normalised, numbers
from deme_diffusion.config import Recipe
from deme_diffusion.errors import UserError

_STRANGE = 0.34
"""More of a text that is of no vocabulary than this, and it speaks of something else."""
_SURE = 0.7
"""What is added names its own part only where it scores so well."""
_ELSE = re.compile(
    r"\b(?:(?:larger|smaller|bigger|stronger|weaker|newer|older)\b(?: [\w-]+){0,2}? (?:teacher|model|network)"
    r"|(?:other|another|(?:an?|some) different)(?: [\w-]+)? (?:pretrained|pre-trained|teacher))\b",
    re.IGNORECASE,
)
"""Names a model that the recipe does not have."""
_THEN_TRAINED = re.compile(
    r"\b(?:followed by|then|afterwards)\b.*(?:tuning|tuned|training|trained|distil)", re.IGNORECASE
)
_STAYING = "keeping|retaining"
_SHARE = r"(?!.*(?:%|\btop\b|largest))"
_KEPT = re.compile(
    rf"\(\s*(?:but |while )?(?:{_STAYING}){_SHARE}[^()]*\)"
    rf"|(?:[,;(]\s*(?:(?:and|but|while) )?|\b(?:and|but|while)(?: still)? )(?:{_STAYING}|keep|retain)\b{_SHARE}.*"
    rf"|[\s,;(]*\b(?:(?:{_STAYING}) (?:only|just|everything|all){_SHARE}|without (?:changing|touching|altering))\b.*",
    re.IGNORECASE | re.DOTALL,
)
"""What stays as it is, and is therefore not ablated."""
_OTHER = re.compile(r"\b(?:another|(?:an?|some) (?:different|other|alternative))\b", re.IGNORECASE)


def resolve(ablation: Ablation, recipe: Recipe) -> Resolved:
    """What an ablation means for a recipe. Never raises for what a plan may say: every text is in some arm."""
    metrics = metrics_of(ablation.metrics, recipe)
    if ablation.change or ablation.changes:
        return Resolved(ablation, _part_of(ablation), metrics, tuple(_exact(ablation, recipe)), 1.0)
    asked, ablation = ablation, replace(ablation, ablated_part=_without_kept(ablation.ablated_part))
    found = spoken(ablation)
    if found.part is None and ablation.action == "ADD" and (added := _named_by_what_is_added(ablation, recipe)):
        return Resolved(asked, added[0], metrics, added[1], found.score)
    if found.part is None:
        arms = [_refused(text, found.reason, found.nearest, found.score) for text in _texts(ablation)]
        return Resolved(asked, None, metrics, tuple(arms), found.score)
    arms = _several(ablation, found, recipe) if found.several else _arms(ablation, found.part, found.score, recipe)
    return Resolved(asked, found.part.name, metrics, tuple(arms), found.score)


def _without_kept(text: str) -> str:
    """A text without what it says is kept: `all three, keeping only the merging` ablates no merging."""
    rest = _KEPT.sub(" ", text).strip()
    return rest if rest and concepts(normalised(rest)) else text


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
        elif not ablation.replacement or _names(part, text):
            arms.append(_turned_on(part, given, sure, recipe))
        else:
            arms += named
    return arms


def _named_by_what_is_added(ablation: Ablation, recipe: Recipe) -> tuple[str, tuple[Arm, ...]] | None:
    """What is added to a part that is none by itself, but of this method's words, may name its own part surely."""
    if strangeness(ablation.ablated_part) > _STRANGE or one_of_several(ablation.ablated_part):
        return None
    arms: list[Arm] = []
    part = None
    for text in ablation.replacement:
        found = spoken(Ablation("", text, "ADD"))
        if found.part is None or found.several or found.score < _SURE:
            arms.append(_refused(text, found.reason or f"{text!r} names no one part", found.nearest, found.score))
            continue
        part = part or found.part.name
        named = _added(replace(ablation, ablated_part=text, replacement=[text]), found.part, found.score, recipe)
        plain = "ADD" in found.part.actions and not found.part.replacements and found.part.numeric is None
        arms += [_turned_on(found.part, text, found.score, recipe)] if plain else named
    return (part, tuple(arms)) if part else None


def _names(part: Part, text: str) -> bool:
    """Whether a text names the part, and no more."""
    return score(text, part.names, part.field) >= replacing.NAMED and not numbers(normalised(text))


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
    if _ELSE.search(text) and not numbers(normalised(text)):
        reason = (
            f"{text!r} is a model that the recipe does not have; {part.name} takes {'; '.join(replacing.takes(part))}"
        )
        return [_refused(given, reason, replacing.takes(part), 0.0)]
    if part.path.startswith("merge.") and _THEN_TRAINED.search(text):
        return [_refused(given, "nothing is trained after merging", replacing.takes(part), 0.0)]
    meant = replacing.meant(part, text, recipe, context)
    if not meant.choices and (named := replacing.value_of(part, text, context)):
        meant = replacing.meant(part, named, recipe, context)
    if not meant.choices:
        return [_refused(given, meant.reason, meant.nearest, meant.score)]
    if _OTHER.search(text) and all(applied_same(recipe, choice.change) for choice in meant.choices):
        reason = f"{text!r} does not say which other one; {part.name} takes {'; '.join(replacing.takes(part))}"
        return [_refused(given, reason, replacing.takes(part), meant.score)]
    arms = [
        arm_of(recipe, given, choice.change, choice.score, choice.variant, choice.note)
        if not choice.needs
        else Arm(given, "not_executable", choice.change, choice.variant, choice.needs, score=choice.score)
        for choice in meant.choices
    ]
    return [arm for number, arm in enumerate(arms) if arm.change not in [other.change for other in arms[:number]]]


def applied_same(recipe: Recipe, change: Change) -> bool:
    """Whether a change leaves the recipe as it is; one that it refuses does not."""
    try:
        return applied(recipe, completed(recipe, change)) == recipe
    except UserError:
        return False


def arm_of(recipe: Recipe, text: str | None, change: Change, sure: float, variant: str = "", note: str = "") -> Arm:
    """An arm for a change: ready, the baseline itself, or refused by the recipe with its reason."""
    whole = completed(recipe, change)
    try:
        after = applied(recipe, whole)
    except UserError as error:
        return Arm(text, "not_executable", whole, variant, str(error), score=sure)
    if after == recipe:
        return Arm(text, "same_as_baseline", whole, variant, "the recipe has it already", score=sure)
    if reason := idle(after, whole):
        return Arm(text, "not_executable", whole, variant, reason, score=sure)
    notes = (note, taken_along(recipe, change, whole))
    return Arm(text, "ready", whole, variant, "; ".join(filter(None, notes)), score=sure)


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
            after = applied(recipe, change)
        except UserError as error:
            yield Arm(text, "not_executable", change, reason=str(error), score=1.0)
            continue
        if after != recipe and (reason := idle(after, change)):
            yield Arm(text, "not_executable", change, reason=reason, score=1.0)
            continue
        same = after == recipe
        reason = "the recipe has it already" if same else ""
        yield Arm(text, "same_as_baseline" if same else "ready", change, reason=reason, score=1.0)


def _part_of(ablation: Ablation) -> str | None:
    """The part whose setting a plan names: the main one of a row, or any that it sets."""
    paths = {path for change in (ablation.change, *ablation.changes.values()) for path in change}
    main = next((part.name for part in PARTS.values() if part.path in paths), None)
    return main or next((part.name for part in PARTS.values() if paths & {*part.off, *part.on}), None)
