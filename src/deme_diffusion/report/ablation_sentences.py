"""One sentence an ablation: what its figures allow one to say."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deme_diffusion.report.ablation_costs import SAME, same_sampler
from deme_diffusion.report.ablation_effects import (
    ArmEffects,
    Columns,
    Content,
    Effect,
    columns_of,
    corrected,
    difference_decimals,
    effects_of,
    plain_text,
    same_figures,
    score_of,
)
from deme_diffusion.report.ablation_samplers import resampled, sampler_of
from deme_diffusion.report.ablation_top import DIFFER, Top, least_rank, top_of
from deme_diffusion.report.ablation_words import abbreviated, listed, nothing_to_tell, quoted, serving, shortened
from deme_diffusion.report.cells import Figure, difference_said, number

MOST_METRICS, MOST_ARMS = 4, 3
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


class _Sentence:
    """The figures of one ablation and the words for them."""

    def __init__(self, content: Content, ablation: Content, columns: Columns, arms: Sequence[ArmEffects]) -> None:
        self.baseline: Mapping[str, Figure] = content["baseline"]["metrics"]
        self.ablation, self.columns = ablation, columns
        self.alone = len(ablation["arms"]) == 1
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
            who = " " if self.alone else f": {quoted(judged[0].label)} "
            return self._ended(f"{self._subject()}{who}{self._says(judged[0], self._spoken(), seeds=True)}", judged)
        return self._ended(f"{self._subject()}: {self._several(judged)}", judged)

    def _ended(self, text: str, judged: Sequence[ArmEffects]) -> str:
        served = [
            arm for arm in judged if len(self.done) == 1 or self.columns.cost_asked or self._serves_otherwise(arm)
        ]
        costs = [said for arm in served if (said := serving(arm, "it" if len(self.done) == 1 else quoted(arm.label)))]
        if len(costs) > MOST_ARMS:
            costs = [*costs[:MOST_ARMS], f"the costs of {len(costs) - MOST_ARMS} more are in the table"]
        if self.columns.cost_asked and (said := nothing_to_tell(judged, alone=len(self.done) == 1)):
            costs.append(said)
        return "; ".join([text, *costs, *self._left_out()]) + "."

    def _serves_otherwise(self, arm: ArmEffects) -> bool:
        """Whether an arm has other parameters or another sampler: of several arms only these have costs to weigh."""
        sized = abs(arm.serving.ratios.get("parameters", 1.0) - 1) >= SAME
        return sized or not same_sampler(arm.metrics, self.baseline)

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
        """The metrics of a sentence about one arm: the primary ones and the loss first, that overall, not by range."""
        rest = [m for m in self.columns.quality if m not in self.columns.primary]
        rest = [m for m in rest if score_of(m) == m or score_of(m) not in self.columns.quality]
        return [*self.columns.primary, *sorted(rest, key=lambda m: m != "loss")]

    def _short(self) -> list[str]:
        """The metrics that each of several arms is judged by: the primary ones and the loss."""
        return [m for m in self._spoken() if m in self.columns.primary or m == "loss"]

    def _says(self, arm: ArmEffects, metrics: Sequence[str], *, seeds: bool = False) -> str:
        """What an arm does to some metrics: `costs 0.80 ± 0.20 FD (3 seeds) and improves recall by 0.02 ± 0.01`."""
        effects = [effect for metric in metrics if (effect := arm.of(metric))]
        judged = [effect for effect in effects if effect.outcome != "n/a"]
        if judged and all(effect.outcome == "identical" for effect in judged) and self._same(arm):
            return "gives the baseline's figures exactly, as the same model would"
        outcomes = dict.fromkeys(effect.outcome for effect in judged)  # in the order of the metrics
        clauses = [self._clause(outcome, judged, arm) for outcome in sorted(outcomes, key=lambda o: o not in DIFFER)]
        differs = any(effect.outcome in DIFFER for effect in judged)
        others = [] if differs else [e for e in arm.effects if e.outcome in DIFFER and e.metric not in metrics]
        if others:  # the sentence may not deny what the table shows
            clauses = [self._only(others), *(clause.replace("no diff", "no other diff", 1) for clause in clauses)]
        if seeds and (differs or others):
            clauses[0] += f" ({max(effect.seeds for effect in judged)} seeds)"
        return listed(clauses) or "has no figure to compare"

    def _only(self, effects: Sequence[Effect]) -> str:
        """`differs only in loss [0,250) (better by 0.00021 ± 0.00012)`."""
        told = [f"{e.metric} ({e.outcome} by {self.amount(e)})" for e in effects[:MOST_METRICS]]
        more = [f"{len(effects) - MOST_METRICS} more"] if len(effects) > MOST_METRICS else []
        return f"differs only in {listed([*told, *more])}"

    def _same(self, arm: ArmEffects) -> bool:
        """Whether all figures that were compared are equal, and those that two models do not share by chance."""
        compared = [effect for effect in arm.effects if effect.outcome != "n/a"]
        return all(e.outcome == "identical" for e in compared) and same_figures(arm.metrics, self.baseline)

    def _clause(self, outcome: str, effects: Sequence[Effect], arm: ArmEffects) -> str:
        group = [effect for effect in effects if effect.outcome == outcome]
        shown = group[:MOST_METRICS]
        said = [
            WORDS[outcome].each(self, e, self._named(e.metric, name, arm))
            for e, name in zip(shown, abbreviated([effect.metric for effect in shown]), strict=True)
        ]
        said += [f"{len(group) - len(shown)} more in the table"] if len(group) > len(shown) else []
        return WORDS[outcome].around.format(listed(said), seeds=max(effect.seeds for effect in group))

    def _named(self, metric: str, name: str, arm: ArmEffects) -> str:
        """A metric's name; of one that the arm samples otherwise, `FD(digits-cnn) with DDIM-6 in place of DDIM-3`."""
        pair = resampled(arm.metrics.get(metric), self.baseline.get(metric))
        if pair is None:
            return name
        score = name.removesuffix(metric.rpartition(" ")[2])
        return f"{score}with {pair[0]} in place of {pair[1]}"

    def amount(self, effect: Effect) -> str:
        """`0.80 ± 0.20`, without its sign."""
        assert effect.difference is not None
        return difference_said(abs(effect.difference), effect.margin).removeprefix("+")

    def change(self, effect: Effect) -> str:
        """`−0.03 ± 0.15`."""
        assert effect.difference is not None
        return difference_said(effect.difference, effect.margin)

    def mean(self, metrics: Mapping[str, Figure], metric: str) -> str:
        """`8.31`, a mean without its spread."""
        return number({**metrics[metric], "spread": None}, self.decimals[metric])

    def _one_seed(self, judged: Sequence[ArmEffects]) -> str:
        parts = []
        shown = [m for m in self._spoken() if any((e := arm.of(m)) and e.outcome == "one seed" for arm in judged)]
        for metric, name in zip(shown[:MOST_METRICS], abbreviated(shown[:MOST_METRICS]), strict=True):
            arms = [arm for arm in judged if (e := arm.of(metric)) and e.outcome == "one seed"]
            means = [self._mean_of(arm, metric) for arm in arms[:MOST_ARMS]]
            means += [f"{len(arms) - MOST_ARMS} more in the table"] if len(arms) > MOST_ARMS else []
            parts.append(f"{name} {', '.join(means)} against {self.mean(self.baseline, metric)}")
        parts += [f"{len(shown) - MOST_METRICS} more metrics in the table"] if len(shown) > MOST_METRICS else []
        return f"one seed: nothing can be concluded ({'; '.join(parts)})"

    def _mean_of(self, arm: ArmEffects, metric: str) -> str:
        """`"6 steps" 22.7 with DDIM-6`: of one seed, with the sampler where that is not the baseline's."""
        sampled = resampled(arm.metrics.get(metric), self.baseline.get(metric))
        with_sampler = f" with {sampler_of(arm.metrics[metric])}" if sampled else ""
        name = "" if self.alone else f"{quoted(arm.label)} "
        return f"{name}{self.mean(arm.metrics, metric)}{with_sampler}"

    # -- several arms ------------------------------------------------------------------------------

    def _several(self, judged: Sequence[ArmEffects]) -> str:
        """The arm that improves most first, then the others by how much they change; then what else differs."""
        top = top_of(judged, self.columns.primary)
        rest = [arm for arm in sorted(judged, key=self._weight) if not top or arm is not top.arm]
        clauses = [self._top_clause(top)] if top else []
        most = MOST_ARMS - bool(top)
        clauses += [f"{quoted(arm.label)} {self._says_short(arm, first=not top and i == 0)}"
                    for i, arm in enumerate(rest[:most])]  # fmt: skip
        clauses += [self._more(rest[most:])] if len(rest) > most else []
        return "; ".join(clauses + self._elsewhere(judged))

    def _more(self, arms: Sequence[ArmEffects]) -> str:
        """`6 more in the table`, and whether there is anything to see."""
        untold = all(effect.outcome in ("none", "n/a") for arm in arms for effect in arm.effects)
        seeds = max((effect.seeds for arm in arms for effect in arm.effects), default=0)
        return f"{len(arms)} more in the table{f', without a difference that {seeds} seeds can show' if untold else ''}"

    def _says_short(self, arm: ArmEffects, *, first: bool = False) -> str:
        return self._says(arm, self._short(), seeds=first)

    def _weight(self, arm: ArmEffects) -> tuple[int, int, float]:
        """Arms with a difference come first, the largest first; of those without, the ones that differ elsewhere."""
        effects = [effect for metric in self.columns.primary if (effect := arm.of(metric))]
        largest = max((abs(effect.difference or 0) for effect in effects), default=0)
        return least_rank(effects), least_rank(arm.effects), -largest

    def _top_clause(self, top: Top) -> str:
        """It is best where it is better than the baseline and than every other arm; else who is not told from it."""
        name, said = quoted(top.arm.label), self._says_short(top.arm, first=True)
        if top.won:
            where = "" if top.won == tuple(self._short()) else f" in {listed(abbreviated(top.won))}"
            return f"best{where} is {name}, which {said}"
        if not top.untold:
            return f"{name} {said}"
        names = shortened([quoted(arm.label) for arm in top.untold], MOST_ARMS)
        seeds = max(effect.seeds for effect in top.arm.effects)
        return f"{name} {said}; {seeds} seeds cannot tell {listed(names)} from it"

    def _elsewhere(self, judged: Sequence[ArmEffects]) -> list[str]:
        """What differs in metrics that the sentence has not spoken of."""
        rest = [metric for metric in self._spoken() if metric not in self._short()]
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
    "alike": _Words("gives no interval, as all {seeds} seeds differ alike ({})", "{name} {change}"),
    "one seed": _Words("has one seed, of which nothing can be concluded ({})", "{name} {change}"),
}
