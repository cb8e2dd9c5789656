"""One sentence an ablation: what its figures allow one to say."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deme_diffusion.report.ablation_effects import (
    ArmEffects,
    Columns,
    Content,
    Effect,
    columns_of,
    compare,
    corrected,
    effects_of,
    plain_text,
    score_of,
)
from deme_diffusion.report.ablation_words import abbreviated, listed, quoted, serving
from deme_diffusion.report.cells import Figure, decimals_for, direction, figure_decimals, number, signed

MOST_METRICS, MOST_ARMS, MOST_NAME = 4, 4, 60
MANY = 10
"""More comparisons than this are counted aloud: each alone is at 95%."""


@dataclass(frozen=True)
class AblationVerdict:
    """What one ablation found; `arms` are those that were to be run, `comparisons` how many intervals it rests on."""

    name: str
    sentence: str
    columns: Columns
    arms: tuple[ArmEffects, ...]
    comparisons: int


def verdicts(content: Content) -> list[AblationVerdict]:
    """The verdict of every ablation of an experiment, in the plan's order."""
    columns = [columns_of(content, ablation) for ablation in content["ablations"]]
    effects = [effects_of(content, one, shown) for one, shown in zip(content["ablations"], columns, strict=True)]
    found = zip(content["ablations"], columns, corrected(effects), strict=True)
    return [_verdict(content, ablation, shown, arms) for ablation, shown, arms in found]


def _verdict(content: Content, ablation: Content, columns: Columns, arms: Sequence[ArmEffects]) -> AblationVerdict:
    comparisons = sum(effect.margin is not None for arm in arms for effect in arm.effects)
    sentence = _Sentence(content, ablation, columns, arms).text()
    if comparisons > MANY:
        sentence = f"{sentence[:-1]} ({comparisons} comparisons, each at 95%)."
    return AblationVerdict(plain_text(ablation["name"]), sentence, columns, tuple(arms), comparisons)


def together(found: Sequence[AblationVerdict]) -> str:
    """What many comparisons mean taken together; '' where they are few."""
    count = sum(one.comparisons for one in found)
    if count <= MANY:
        return ""
    kept = [
        f"{effect.metric} of {quoted(arm.label)} ({plain_text(one.name, MOST_NAME)})"
        for one in found
        for arm in one.arms
        for effect in arm.effects
        if effect.survives
    ]
    by_chance = (
        f"{count} comparisons, each with a 95% interval of its own: about {max(1, round(0.05 * count))} would show"
    )
    more = f" and {len(kept) - MANY} more" if len(kept) > MANY else ""
    held = f"{', '.join(kept[:MANY])}{more} still {'do' if len(kept) > 1 else 'does'}" if kept else "none does"
    return f"{by_chance} a difference by chance alone; after Holm's correction over all of them {held}."


class _Sentence:
    """The figures of one ablation and the words for them."""

    def __init__(self, content: Content, ablation: Content, columns: Columns, arms: Sequence[ArmEffects]) -> None:
        self.baseline: Mapping[str, Figure] = content["baseline"]["metrics"]
        self.ablation, self.columns = ablation, columns
        self.done = [arm for arm in arms if arm.status == "done"]
        self.failed = [arm for arm in arms if arm.status != "done"]
        self.decimals = {name: self._decimals(name) for name in columns.quality}

    def _decimals(self, metric: str) -> int:
        return difference_decimals(self.baseline, self.done, metric)

    def text(self) -> str:
        """The sentence with its full stop."""
        if not self.done:
            return self._nothing_ran()
        judged = [arm for arm in self.done if any(effect.outcome != "n/a" for effect in arm.effects)]
        if not judged:
            return f"{self._subject()}: {self._no_figures()}."
        if all(e.outcome in ("one seed", "n/a") for arm in judged for e in arm.effects):
            return self._ended(f"{self._subject()}: {self._one_seed(judged)}", judged)
        if len(self.done) == 1:
            return self._ended(f"{self._subject()} {self._says(judged[0], self._spoken(), seeds=True)}", judged)
        return self._ended(f"{self._subject()}: {self._several(judged)}", judged)

    def _ended(self, text: str, judged: Sequence[ArmEffects]) -> str:
        costs = [said for arm in judged if (said := serving(arm, quoted(arm.label) if len(self.done) > 1 else "it"))]
        return "; ".join([text, *costs, *self._left_out()]) + "."

    # -- who ---------------------------------------------------------------------------------------

    def _subject(self) -> str:
        part, action = quoted(self.ablation["ablated_part"]), self.ablation["action"]
        one = self.ablation["arms"][0] if len(self.ablation["arms"]) == 1 else None
        label = quoted(one["label"]) if one and one.get("replacement") else ""
        if action == "REPLACE":
            return f"Replacing {part} by {label}" if label else f"Replacing {part}"
        if action == "ADD":
            return f"Adding {label} to {part}" if label not in ("", part) else f"Adding {part}"
        return f"Removing {part}"

    def _nothing_ran(self) -> str:
        reasons = [plain_text(arm.get("error") or arm.get("reason") or "", 200) for arm in self.ablation["arms"]]
        said = "; ".join(dict.fromkeys(reason for reason in reasons if reason)) or "it has no arm"
        statuses = {arm["status"] for arm in self.ablation["arms"]}
        if statuses == {"same_as_baseline"}:
            return f"{self._subject()} is what the baseline does already: {said}."
        if "failed" in statuses:
            return f"{self._subject()} failed, so nothing can be concluded: {said}."
        if "missing" in statuses:
            return f"{self._subject()} has not been run yet."
        return f"{self._subject()} was not carried out: {said}."

    def _no_figures(self) -> str:
        reasons = dict.fromkeys(effect.reason for arm in self.done for effect in arm.effects)
        return f"nothing can be concluded ({'; '.join(reasons) or 'there is no figure of quality'})"

    def _left_out(self) -> list[str]:
        left = [f"{quoted(arm.label)} {'failed' if arm.status == 'failed' else 'is missing'}" for arm in self.failed]
        same = [quoted(arm["label"]) for arm in self.ablation["arms"] if arm["status"] == "same_as_baseline"]
        not_run = [quoted(arm["label"]) for arm in self.ablation["arms"] if arm["status"] == "not_executable"]
        left += [f"{listed(same)} {'is' if len(same) == 1 else 'are'} what the baseline does already"] if same else []
        return left + ([f"{listed(not_run)} could not be carried out"] if not_run else [])

    # -- what --------------------------------------------------------------------------------------

    def _spoken(self) -> list[str]:
        """The metrics of a sentence about one arm: the primary ones first, no loss by range beside the overall one."""
        rest = [m for m in self.columns.quality if m not in self.columns.primary]
        return [
            *self.columns.primary,
            *(m for m in rest if score_of(m) == m or score_of(m) not in self.columns.quality),
        ]

    def _says(self, arm: ArmEffects, metrics: Sequence[str], *, seeds: bool = False) -> str:
        """What an arm does to some metrics: `costs 0.80 ± 0.20 FD (3 seeds) and improves recall by 0.02 ± 0.01`."""
        effects = [effect for metric in metrics if (effect := arm.of(metric))]
        judged = [effect for effect in effects if effect.outcome != "n/a"]
        if judged and all(effect.outcome == "identical" for effect in judged):
            return "gives the baseline's figures exactly, as the same model would"
        outcomes = dict.fromkeys(effect.outcome for effect in judged)  # in the order of the metrics
        clauses = [self._clause(outcome, judged) for outcome in sorted(outcomes, key=lambda o: o not in DIFFER)]
        differs = any(effect.outcome in ("worse", "better", "changed") for effect in judged)
        if seeds and differs:
            clauses[0] += f" ({max(effect.seeds for effect in judged)} seeds)"
        return listed(clauses) or "has no figure to compare"

    def _clause(self, outcome: str, effects: Sequence[Effect]) -> str:
        group = [effect for effect in effects if effect.outcome == outcome]
        shown = group[:MOST_METRICS]
        said = [
            WORDS[outcome].each(self, e, name)
            for e, name in zip(shown, abbreviated([effect.metric for effect in shown]), strict=True)
        ]
        said += [f"{len(group) - len(shown)} more"] if len(group) > len(shown) else []
        return WORDS[outcome].around.format(listed(said), seeds=max(effect.seeds for effect in group))

    def amount(self, effect: Effect) -> str:
        """`0.80 ± 0.20`, without its sign."""
        assert effect.difference is not None
        return signed(abs(effect.difference), effect.margin, self.decimals[effect.metric]).removeprefix("+")

    def change(self, effect: Effect) -> str:
        """`−0.03 ± 0.15`."""
        assert effect.difference is not None
        return signed(effect.difference, effect.margin, self.decimals[effect.metric])

    def mean(self, metrics: Mapping[str, Figure], metric: str) -> str:
        """`8.31`, a mean without its spread."""
        return number({**metrics[metric], "spread": None}, self.decimals[metric])

    def _one_seed(self, judged: Sequence[ArmEffects]) -> str:
        parts = []
        shown = [m for m in self._spoken() if any((e := arm.of(m)) and e.outcome == "one seed" for arm in judged)]
        for metric, name in zip(shown[:MOST_METRICS], abbreviated(shown[:MOST_METRICS]), strict=True):
            arms = [arm for arm in judged if (e := arm.of(metric)) and e.outcome == "one seed"]
            means = [
                f"{quoted(arm.label)} " * (len(self.done) > 1) + self.mean(arm.metrics, metric)
                for arm in arms[:MOST_ARMS]
            ]
            parts.append(f"{name} {', '.join(means)} against {self.mean(self.baseline, metric)}")
        return f"one seed: nothing can be concluded ({'; '.join(parts)})"

    # -- several arms ------------------------------------------------------------------------------

    def _several(self, judged: Sequence[ArmEffects]) -> str:
        """The best arms first, then the others by how much they change; then what else differs."""
        order = sorted(judged, key=self._weight)
        best = self._best(judged)
        rest = [arm for arm in order if arm not in best]
        clauses = [self._best_clause(best)] if best else []
        clauses += [f"{quoted(arm.label)} {self._primary(arm, first=not best and i == 0)}"
                    for i, arm in enumerate(rest[:MOST_ARMS])]  # fmt: skip
        clauses += [f"{len(rest) - MOST_ARMS} more in the table"] if len(rest) > MOST_ARMS else []
        return "; ".join(clauses + self._elsewhere(judged))

    def _primary(self, arm: ArmEffects, *, first: bool = False) -> str:
        return self._says(arm, self.columns.primary, seeds=first)

    def _weight(self, arm: ArmEffects) -> tuple[int, float]:
        """Arms with a difference come first, the largest first."""
        effects = [effect for metric in self.columns.primary if (effect := arm.of(metric))]
        rank = min((RANK.get(effect.outcome, len(RANK)) for effect in effects), default=len(RANK))
        return rank, -max((abs(effect.difference or 0) for effect in effects), default=0)

    def _best(self, judged: Sequence[ArmEffects]) -> list[ArmEffects]:
        """The arm that improves the first primary metric most, with those that no interval tells from it."""
        metric = self.columns.primary[0]
        sign = -1 if direction(metric) == "higher" else 1
        improved = [(sign * e.difference, arm) for arm in judged
                    if (e := arm.of(metric)) and e.outcome == "better" and e.difference is not None]  # fmt: skip
        improved.sort(key=lambda pair: pair[0])
        if not improved:
            return []
        top = improved[0][1]
        alike = [arm for _, arm in improved[1:] if self._alike(arm, top, metric)]
        return [top, *alike]

    def _alike(self, arm: ArmEffects, other: ArmEffects, metric: str) -> bool:
        effect = compare(metric, arm.metrics, other.metrics)
        return effect.outcome in ("none", "identical")

    def _best_clause(self, best: Sequence[ArmEffects]) -> str:
        names = [quoted(arm.label) for arm in best]
        if len(best) == 1:
            return f"best is {names[0]}, which {self._primary(best[0], first=True)}"
        said = [f"{name} {self._primary(arm)}" for name, arm in zip(names, best, strict=True)]
        seeds = max(effect.seeds for arm in best for effect in arm.effects)
        return f"{listed(names)} are best, and {seeds} seeds cannot tell them apart: {'; '.join(said[:MOST_ARMS])}"

    def _elsewhere(self, judged: Sequence[ArmEffects]) -> list[str]:
        """What differs in metrics that the sentence has not spoken of."""
        rest = [metric for metric in self._spoken() if metric not in self.columns.primary]
        found = [
            f"{metric} ({', '.join(f'{quoted(label)} {outcome}' for label, outcome in differing[:MOST_ARMS])})"
            for metric in rest
            if (
                differing := [(arm.label, e.outcome) for arm in judged if (e := arm.of(metric)) and e.outcome in DIFFER]
            )
        ]
        more = f" and {len(found) - MOST_METRICS} more" if len(found) > MOST_METRICS else ""
        return [f"there are differences in {', '.join(found[:MOST_METRICS])}{more}"] if found else []


@dataclass(frozen=True)
class _Words:
    """How one outcome is put: for each metric, and around their list."""

    around: str
    form: str

    def each(self, sentence: _Sentence, effect: Effect, name: str) -> str:
        """One metric's part."""
        if effect.outcome == "identical":
            return name
        if effect.outcome == "one seed":
            return f"{name} {sentence.change(effect)}"
        return self.form.format(amount=sentence.amount(effect), change=sentence.change(effect), name=name)


WORDS = {
    "worse": _Words("costs {}", "{amount} {name}"),
    "better": _Words("improves {}", "{name} by {amount}"),
    "changed": _Words("changes {}", "{name} by {change}"),
    "none": _Words("makes no difference that {seeds} seeds can show ({})", "{name} {change}"),
    "identical": _Words("leaves {} exactly as it is", "{name}"),
    "one seed": _Words("has one seed, of which nothing can be concluded ({})", "{name} {change}"),
}
DIFFER = ("worse", "better", "changed")
RANK = {outcome: rank for rank, outcome in enumerate(("better", "worse", "changed", "none", "one seed", "identical"))}


def difference_decimals(baseline: Mapping[str, Figure], arms: Sequence[ArmEffects], metric: str) -> int:
    """One number of decimals for a metric's figures, differences and margins."""
    tables = (baseline, *(arm.metrics for arm in arms))
    figures = [f for table in tables if (f := table.get(metric)) and f["mean"] is not None]
    margins = [effect.margin for arm in arms if (effect := arm.of(metric))]
    return max(figure_decimals(figures), decimals_for((f["mean"] for f in figures), margins))
