"""An ablation experiment as Markdown, as CSV and for the terminal."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from deme_diffusion.report.ablation_effects import NOT_RUN, ArmEffects, Content, plain_text
from deme_diffusion.report.ablation_sentences import AblationVerdict
from deme_diffusion.report.ablation_tables import AblationTable, TableCell, has_rows, protocols_of, table_of
from deme_diffusion.report.ablation_together import together
from deme_diffusion.report.cells import compact
from deme_diffusion.report.tables import escape_markdown

FIGURE = ("mean", "spread", "n", "seeds", "difference", "margin", "p", "holm", "outcome", "times_baseline")
CSV_HEADER = ("ablation", "action", "part", "arm", "change", "status", "metric", *FIGURE, "steps", "seconds", "reason")
LEGEND = (
    "Mean ± standard deviation over seeds. Δ is the arm minus the baseline ± half the 95% interval of the mean over"
    " paired seeds (Student's t). Costs of serving in brackets as multiples of the baseline's; a time (median ± half"
    " the range of its repeats) only where size or sampler differ, and it by more than both half-ranges together."
    " Training steps and seconds are those of a row alone; what rows share is made once. Seconds depend on what else"
    " the machine did, and on --jobs."
)


def to_markdown(content: Content, found: Sequence[AblationVerdict]) -> str:
    """The whole experiment as Markdown; every text of the plan is escaped."""
    title = f"# Ablations of {escape_markdown(_name(content, 'recipe'))}: {escape_markdown(_name(content, 'plan'))}"
    blocks = [title, *(f"{escape_markdown(line)}" for line in headlines(content, found))]
    for ablation, one in zip(content["ablations"], found, strict=True):
        blocks += _markdown_of(table_of(content, ablation, one), one)
    protocols = "\n".join(f"- {escape_markdown(line)}" for line in protocols_of(content, found))
    blocks += ["## Protocols", protocols] if protocols else []
    problems = [
        f"- line {problem['line']}: {escape_markdown(plain_text(problem['what']))}" for problem in problems_of(content)
    ]
    blocks += ["## Entries that could not be read", "\n".join(problems)] if problems else []
    return "\n\n".join(blocks) + "\n"


def headlines(content: Content, found: Sequence[AblationVerdict]) -> list[str]:
    """What the experiment is, what it cost, how to read it, and what its many comparisons mean together."""
    steps, seeds = content.get("steps") or {}, content.get("seeds") or []
    lines = [f"Outcome: {plain_text(content.get('outcome', 'merged'))}; seeds {', '.join(map(str, seeds))}."]
    if {"shared", "independent"} <= steps.keys():
        share = f" ({steps['shared'] / steps['independent']:.2f} of it)" if steps["independent"] else ""
        lines[0] += f" Training steps: {steps['shared']:,}, {steps['independent']:,} for independent runs{share}."
    return [line for line in (*lines, LEGEND, together(found)) if line]


def problems_of(content: Content) -> list[Mapping[str, Any]]:
    """The plan's entries that could not be read."""
    return list(content.get("problems") or ())


def _name(content: Content, key: str) -> str:
    return plain_text(content.get(key) or "")


def _markdown_of(table: AblationTable, found: AblationVerdict) -> list[str]:
    heads = ["arm", "change", *table.heads]
    lines = [f"| {' | '.join(map(escape_markdown, heads))} |", "| --- | --- |" + " ---: |" * len(table.heads)]
    for line in table.lines:
        cells = [cell.text for cell in line.cells] or [line.error, *[""] * (len(table.heads) - 1)]
        lines.append(f"| {' | '.join(map(escape_markdown, (line.label, line.change, *cells)))} |")
    notes = [f"- {escape_markdown(note)}" for note in table.notes]
    left = (
        ["Not run:\n\n" + "\n".join(f"- {escape_markdown(said)}" for said in table.left_out)] if table.left_out else []
    )
    blocks = [f"## {escape_markdown(found.name)}", escape_markdown(found.sentence)]
    blocks += ["\n".join(lines), "\n\n".join(map(escape_markdown, table.marks))] if has_rows(table) else []
    return [block for block in (*blocks, *left, "\n".join(notes) if has_rows(table) else "") if block]


def to_csv(content: Content, found: Sequence[AblationVerdict]) -> str:
    """A line for each arm and metric at full precision, all metrics there are; arms without figures have one line."""
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV_HEADER, lineterminator="\n")
    writer.writeheader()
    lines = _all_csv_lines(content, found)
    writer.writerows({key: _no_formula(value) for key, value in line.items()} for line in lines)
    return out.getvalue()


def _no_formula(value: Any) -> Any:
    """Text that a spreadsheet would compute begins with an apostrophe; numbers stay."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value


def _all_csv_lines(content: Content, found: Sequence[AblationVerdict]) -> Iterator[dict[str, Any]]:
    for label in ("base", "baseline"):
        one = content.get(label) or {}
        yield from _csv_lines({"arm": label, "status": "done", **_timed(one)}, one.get("metrics") or {}, None)
    for ablation, verdict in zip(content["ablations"], found, strict=True):
        effects = iter(verdict.arms)
        about = {"ablation": verdict.name, "action": ablation["action"], "part": ablation.get("part") or ""}
        for arm in ablation["arms"]:
            ran = next(effects) if arm["status"] not in NOT_RUN else None
            start = {**about, "arm": plain_text(arm["label"]), "change": compact(arm.get("change") or {}),
                     "status": arm["status"], **_timed(arm)}  # fmt: skip
            reason = plain_text(arm.get("error") or arm.get("reason") or "")
            yield from _csv_lines(start, arm.get("metrics") or {} if ran else {}, ran) or [{**start, "reason": reason}]


def _timed(one: Content) -> dict[str, Any]:
    return {"steps": one.get("steps", ""), "seconds": one.get("seconds", "")}


def _csv_lines(start: Mapping[str, Any], metrics: Content, effects: ArmEffects | None) -> list[dict[str, Any]]:
    lines = []
    for name, figure in metrics.items():
        line = {**start, "metric": name, **{key: figure[key] for key in ("mean", "spread", "n")}}
        line |= {"seeds": compact(figure["seeds"]), "reason": figure.get("reason", "")}
        if effects and (effect := effects.of(name)):
            line |= {"difference": effect.difference, "margin": effect.margin, "p": effect.p, "outcome": effect.outcome}
            line |= {"holm": effect.survives if effect.p is not None else "", "reason": effect.reason}
        if effects and name in effects.serving.ratios:
            line["times_baseline"] = effects.serving.ratios[name]
        lines.append(line)
    return lines


def rich_tables(content: Content, found: Sequence[AblationVerdict]) -> list[Group]:
    """A narrow table an ablation: each metric with the arms below it; then its notes, as wide as the terminal."""
    pairs = zip(content["ablations"], found, strict=True)
    return [_with_notes(table_of(content, ablation, one), one) for ablation, one in pairs]


def _with_notes(table: AblationTable, found: AblationVerdict) -> Group:
    """Lines below rather than a caption: that is no wider than the table, which may have no row at all."""
    notes = [*table.left_out, *(note for note in table.notes if "n/a" in note)]
    drawn = _rich(table, found) if has_rows(table) else Text(found.name, style="italic")
    errors = [Text(f"{line.label}: {line.error}", style="red") for line in table.lines if line.error]
    marks = [Text(mark) for mark in table.marks]
    return Group(drawn, *marks, *errors, *(Text(note) for note in notes), Text())


def _rich(table: AblationTable, found: AblationVerdict) -> Table:
    drawn = Table(box=SIMPLE_HEAD, show_edge=False, title=Text(found.name), title_justify="left")
    drawn.add_column("", overflow="fold")
    drawn.add_column("value", justify="right", overflow="fold")
    drawn.add_column("Δ", justify="right", overflow="fold")
    heads, width = list(table.heads), 2 * len(found.columns.quality)
    groups: list[tuple[str, int, int | None]] = [(heads[i], i, i + 1) for i in range(0, width, 2)]
    groups += [(heads[i], i, None) for i in range(width, len(heads))]
    for head, value, difference in groups:
        drawn.add_row(Text(head, style="bold"))
        for line in (line for line in table.lines if line.cells and line.cells[value].text):
            cell = line.cells[difference] if difference else TableCell()
            style = {"better": "green", "worse": "red"}.get(cell.mark, "")
            drawn.add_row(Text(f"  {line.label}"), Text(line.cells[value].text), Text(cell.text, style=style))
    return drawn
