"""The effects of an experiment's arms as forest plots: each arm's difference to the baseline with its interval."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from deme_diffusion.report.ablation_effects import ArmEffects, Effect, plain_text
from deme_diffusion.report.ablation_sentences import AblationVerdict
from deme_diffusion.report.cells import direction
from deme_diffusion.report.figures import INK, png_of, svg_of

BETTER, WORSE, OPEN = "#0072B2", "#D55E00", INK  # Okabe and Ito's blue and vermilion, told apart by all
MARKS = {"better": ("o", BETTER, True), "worse": ("s", WORSE, True), "changed": ("D", OPEN, True)}
UNTOLD = ("o", OPEN, False)  # hollow: nothing is shown
MOST_PANELS, MOST_ARMS, MOST_METRICS = 12, 40, 2
LABEL, NAME = 34, 60  # characters
WIDTH, ROW, AROUND = 7.6, 0.26, 0.95  # inches


@dataclass(frozen=True)
class Panels:
    """One ablation's plots: an axis for each metric, a row for each arm that has a difference in any."""

    name: str
    metrics: tuple[str, ...]
    arms: tuple[ArmEffects, ...]

    @property
    def height(self) -> float:
        """In inches."""
        return AROUND + ROW * len(self.arms)


def panels_of(found: AblationVerdict) -> Panels | None:
    """What is drawn of an ablation: its first metrics; None where no arm has a difference."""
    asked = dict.fromkeys((*found.columns.primary, *found.columns.quality))
    metrics = [metric for metric in asked if any(_drawable(arm.of(metric)) for arm in found.arms)][:MOST_METRICS]
    arms = [arm for arm in found.arms if any(_drawable(arm.of(metric)) for metric in metrics)]
    return Panels(found.name, tuple(metrics), tuple(arms[:MOST_ARMS])) if arms else None


def effects_figure(found: Sequence[AblationVerdict]) -> tuple[bytes, bytes]:
    """All ablations below each other, as SVG and PNG; of many the first."""
    everything = [panels for one in found if (panels := panels_of(one))]
    shown = everything[:MOST_PANELS]
    if not shown:
        return svg_of(_empty, WIDTH, 0.8), png_of(_empty, WIDTH, 0.8)

    def draw(figure: Any) -> None:
        parts = figure.subfigures(len(shown), 1, height_ratios=[panels.height for panels in shown], squeeze=False)
        for part, panels in zip(parts[:, 0], shown, strict=True):
            _draw(part, panels, titled=True)
        if len(everything) > len(shown):
            figure.supxlabel(f"{len(everything) - len(shown)} more ablations are in ablation.md", fontsize=8)

    height = sum(panels.height for panels in shown)
    with _any_script():
        return svg_of(draw, WIDTH, height), png_of(draw, WIDTH, height)


def ablation_figure(found: AblationVerdict) -> bytes | None:
    """One ablation's forest plot as SVG; None where no arm has a difference."""
    panels = panels_of(found)
    if panels is None:
        return None
    with _any_script():
        return svg_of(lambda figure: _draw(figure, panels, titled=False), WIDTH, panels.height)


@contextmanager
def _any_script() -> Iterator[None]:
    """Plans are in any script; what the font lacks is drawn as a box, without a warning for each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        yield


def _empty(figure: Any) -> None:
    figure.text(0.5, 0.5, "no arm has a difference to the baseline", ha="center", va="center")


def _draw(figure: Any, panels: Panels, *, titled: bool) -> None:
    all_axes = figure.subplots(1, len(panels.metrics), sharey=True, squeeze=False)[0]
    if titled:
        figure.suptitle(plain_text(panels.name, NAME), fontsize=9.5, x=0.01, ha="left")
    for axes, metric in zip(all_axes, panels.metrics, strict=True):
        axes.axvline(0, color=INK, linewidth=0.8)
        for place, effect in _drawn(panels.arms, metric):
            _mark(axes, place, effect)
        axes.set_yticks(range(len(panels.arms)), [plain_text(arm.label, LABEL) for arm in panels.arms])
        axes.set_ylim(len(panels.arms) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.locator_params(axis="x", nbins=5)
        axes.grid(axis="x", color=INK, alpha=0.1, linewidth=0.6)
        axes.margins(x=0.08)
        axes.set_xlabel(_axis(metric))


def _axis(metric: str) -> str:
    better = direction(metric)
    return f"Δ {metric}\n(arm \N{MINUS SIGN} baseline{f'; {better} is better' if better else ''})"


def _drawable(effect: Effect | None) -> bool:
    return effect is not None and effect.difference is not None


def _drawn(arms: Sequence[ArmEffects], metric: str) -> Iterator[tuple[int, Effect]]:
    for place, arm in enumerate(arms):
        if (effect := arm.of(metric)) and _drawable(effect):
            yield place, effect


def _mark(axes: Any, place: int, effect: Effect) -> None:
    """A point with its interval; one seed has a point only."""
    shape, colour, filled = MARKS.get(effect.outcome, UNTOLD)
    if effect.margin is not None:
        ends = [effect.difference - effect.margin, effect.difference + effect.margin]  # type: ignore[operator]
        axes.plot(ends, [place, place], color=colour, linewidth=1.6, solid_capstyle="butt")
    face = colour if filled else "none"
    axes.plot([effect.difference], [place], shape, color=colour, markerfacecolor=face, markersize=5.5)
