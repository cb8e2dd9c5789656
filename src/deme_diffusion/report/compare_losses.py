"""What each run changed in the loss along the timesteps, in one picture and a small table a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deme_diffusion.division import names_of
from deme_diffusion.report.album import Album
from deme_diffusion.report.cells import Figure, difference_said, figure_decimals, number
from deme_diffusion.report.compare import ends, unlike
from deme_diffusion.report.page.losses import Change, by_range, changes_of

Run = Mapping[str, Any]
Spans = list[tuple[list[list[int]], float]]
"""Runs of timesteps, and the difference there in % of the base's loss."""


def losses_section(runs: Sequence[Run], labels: Sequence[str], album: Album) -> dict[str, Any] | None:
    """The picture, a table a run, and whether the same points were taken; None where no run has losses by range."""
    changes = [_changes(run) for run in runs]
    if not any(changes):
        return None
    spans = {label: _spans(run, change) for label, run, change in zip(labels, runs, changes, strict=True) if change}
    totals = {run["division"]["num_train_timesteps"] for run in runs}
    drawn = {label: _scaled(run, spans[label], len(totals) > 1) for label, run in zip(labels, runs, strict=True)
             if label in spans}  # fmt: skip
    alt = "; ".join(
        f"{label} {', '.join(f'{difference_said(*one)} % on {name}' for name, one in change.items())}"
        for label, change in zip(labels, changes, strict=True)
        if change
    )
    return {
        "image": album.svg(_picture(drawn, "t / T" if len(totals) > 1 else "timestep t")),
        "alt": f"Loss of the outcome by timesteps as the difference to the base's: {alt}",
        "tables": [_lines(run, change) for run, change in zip(runs, changes, strict=True)],
        "unlike": ", ".join(field for field in unlike(runs, "loss") if field != "n"),
    }


def _changes(run: Run) -> dict[str, Change]:
    base, outcome = ends(run)
    return changes_of(by_range(outcome), by_range(base)) if base and outcome else {}


def _spans(run: Run, change: Mapping[str, Change]) -> Spans:
    names = names_of(run["loss_ranges"])
    return [(runs, change[name][0]) for name, runs in zip(names, run["loss_ranges"], strict=True) if name in change]


def _scaled(run: Run, spans: Spans, relative: bool) -> list[tuple[list[list[float]], float]]:
    """Of models with different T, as parts of T."""
    total = run["division"]["num_train_timesteps"] if relative else 1
    return [([[lo / total, hi / total] for lo, hi in runs], value) for runs, value in spans]


def _picture(drawn: Mapping[str, Sequence[tuple[Sequence[Sequence[float]], float]]], xlabel: str) -> bytes:
    """A level a range, a colour a run; the base is the line at 0."""
    from deme_diffusion.report.figures import COLOURS, DASHES, INK, svg_of

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for k, (label, spans) in enumerate(drawn.items()):
            style: dict[str, Any] = {"color": COLOURS[k % len(COLOURS)], "linestyle": DASHES[k % len(DASHES)]}
            for runs, value in spans:
                for lo, hi in runs:
                    axes.plot([lo, hi], [value, value], linewidth=2.2, solid_capstyle="butt", label=label, **style)
                    label = "_"  # one line of the legend a run
        axes.axhline(0, color=INK, linewidth=0.7)
        axes.set(xlabel=xlabel, ylabel="loss, difference to base (%)")
        axes.margins(x=0.01, y=0.12)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=min(len(labels), 3), fontsize=8)

    return svg_of(draw, 5.6, 3.1)


def _lines(run: Run, change: Mapping[str, Change]) -> list[dict[str, str]]:
    """A line a range: base, outcome, difference in %."""
    base, outcome = (by_range(row) if row else {} for row in ends(run))
    return [_line(name, base[name], outcome[name], one) for name, one in change.items()]


def _line(name: str, base: Figure, outcome: Figure, change: Change) -> dict[str, str]:
    decimals = figure_decimals([base, outcome])
    moved = difference_said(*change).partition(" ± ")[0]
    return {
        "range": name,
        "base": number(base, decimals),
        "outcome": number(outcome, decimals),
        "difference": f"{moved} %",
    }
