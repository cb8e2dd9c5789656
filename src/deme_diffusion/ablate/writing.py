"""A `Plan` to a document of each form; reading it again gives the same plan."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import yaml

from deme_diffusion.ablate.cleaning import MOJIBAKE, clean
from deme_diffusion.ablate.entries import normalised
from deme_diffusion.ablate.listing import split_items
from deme_diffusion.ablate.markdown_lines import PLAN_TITLES, heading_line, plain, title_key
from deme_diffusion.ablate.plan import Ablation, Plan
from deme_diffusion.ablate.reading import read_text

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem; font-family: system-ui, sans-serif; line-height: 1.5; }}
.trajectory-box {{ padding: 20px; margin: 20px 0; border-radius: 8px; color: #1a1a1a; }}
.trajectory-box h2 {{ margin-top: 0; font-size: 1.3em; }}
.reasoning {{ background: #e3f2fd; border-left: 5px solid #2196f3; }}
.plan {{ background: #e8f5e8; border-left: 5px solid #4caf50; }}
.text {{ white-space: pre-wrap; }}
</style>
</head>
<body>
<h1>{title}</h1>
<div class="trajectory-box reasoning">
<h2>Reasoning Trace</h2>
<div class="text">
{discussion}
</div>
</div>
<div class="trajectory-box plan">
<h2>Ablation Plan</h2>
{ablations}
</div>
</body>
</html>
"""


def to_markdown(plan: Plan, title: str = "Ablation plan") -> str:
    """The published form without its boxes."""
    return _written(normalised(plan), lambda plan, text: _markdown(plan, text, title))


def to_html(plan: Plan, title: str = "Ablation plan") -> str:
    """A page in the published style, a box for the reasoning and one for the plan; every text is escaped."""
    return _written(normalised(plan), lambda plan, text: _html(plan, text, title))


def to_records(plan: Plan) -> str:
    """`<discussion>` and `<predictions>`, one JSON object a line."""
    plan = normalised(plan)
    objects = [_json(_record(ablation)) for ablation in plan.ablations]
    said = plan.discussion
    if clean(said).strip() != said or re.search(r"&|</?(?:discussion|predictions)>", said, re.IGNORECASE):
        said = _Escape(careful=False)(said)
    return "\n".join(["<discussion>", said, "</discussion>", "<predictions>", *objects, "</predictions>", ""])


def to_yaml(plan: Plan) -> str:
    """Our own form, with the exact changes where there are any."""
    plan = normalised(plan)
    content = {"discussion": plan.discussion, "ablations": [_record(ablation) for ablation in plan.ablations]}
    text = yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    if (clean(text) == text and text.isprintable()) or read_text(text) == plan:
        return text
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=False, width=110)


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks; equal objects twice, not as an alias."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _record(ablation: Ablation) -> dict[str, Any]:
    """An ablation as the JSON and YAML forms hold it."""
    replacement = [
        {"name": text, "set": dict(ablation.changes[text])} if text in ablation.changes else text
        for text in ablation.replacement
    ]
    record = {
        "name": ablation.name,
        "ablated_part": ablation.ablated_part,
        "action": ablation.action,
        "replacement": replacement,
        "metrics": list(ablation.metrics),
    }
    return record | ({"set": dict(ablation.change)} if ablation.change else {})


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if clean(text) == text else json.dumps(value)


class _Escape:
    """Text as Markdown and HTML; a careful one leaves nothing but letters, digits and blanks inside as they are."""

    def __init__(self, *, careful: bool) -> None:
        self.careful = careful

    def __call__(self, text: str) -> str:
        """What reads as `text`, in one line or several."""
        text = re.sub(r"[&<>\\*`\xa0\u202f\r]", _entity, text)
        if MOJIBAKE.search(text):
            text = re.sub(r"[^\x00-\x7f]", _entity, text)
        return text

    def line(self, text: str) -> str:
        """A name, a part, an entry of a list."""
        if not self.careful:
            return self(text)
        return re.sub(r"^.|[^A-Za-z0-9 ]|(?<= ) | $", _entity, text, flags=re.DOTALL)

    def discussion(self, text: str) -> str:
        """Paragraphs; no line of them reads as the plan's heading."""
        if self.careful:
            return re.sub(r"[^A-Za-z0-9 \n]|(?m:^.)", _entity, text)
        lines = re.sub(r"[&<>\xa0\u202f\r]", _entity, text).split("\n")
        if MOJIBAKE.search(text):
            lines = [re.sub(r"[^\x00-\x7f]", _entity, line) for line in lines]
        titled = [_is_title(line, below) for line, below in zip(lines, [*lines[1:], ""], strict=True)]
        return "\n".join(
            re.sub(r"[A-Za-z]", _entity, line, count=1) if title else line
            for line, title in zip(lines, titled, strict=True)
        )


def _is_title(line: str, below: str) -> bool:
    found = heading_line(line, below)
    return found is not None and title_key(found[1]) in PLAN_TITLES


def _entity(found: re.Match[str]) -> str:
    names = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "\xa0": "&nbsp;"}
    return names.get(found[0]) or f"&#{ord(found[0])};"


def _written(plan: Plan, write: Any) -> str:
    """The document; where its light escapes do not bring the plan back (a name like `Action: x`), the careful one."""
    text: str = write(plan, _Escape(careful=False))
    again = read_text(text)
    return text if again == plan and not again.problems else write(plan, _Escape(careful=True))


def _markdown(plan: Plan, text: _Escape, title: str) -> str:
    head = (
        f"# {text.line(clean(title))}\n\n## Reasoning Trace\n\n{text.discussion(plan.discussion)}\n\n## Ablation Plan\n"
    )
    return "\n".join([head, *(_entry(ablation, text) for ablation in plan.ablations)])


def _entry(ablation: Ablation, text: _Escape) -> str:
    lines = [
        f"### {text.line(ablation.name)}",
        f"- **Ablated Part**: {text.line(ablation.ablated_part)}",
        f"- **Action**: {ablation.action}",
    ]
    if ablation.replacement:
        lines += ["- **Replacement**:", *(f"  - {text.line(each)}" for each in ablation.replacement)]
    inline = ", ".join(map(text, ablation.metrics))
    if (
        ablation.metrics
        and not text.careful
        and list(map(plain, split_items(inline, metrics=True))) == ablation.metrics
    ):
        lines.append(f"- **Metrics**: {inline}")
    elif ablation.metrics:
        lines += ["- **Metrics**:", *(f"  - {text.line(each)}" for each in ablation.metrics)]
    for name, values in _settings(ablation).items():
        lines.append(f"- **{name}**: `{_Escape(careful=False)(_json(values))}`")
    return "\n".join(lines) + "\n"


def _settings(ablation: Ablation) -> dict[str, Mapping[str, Any]]:
    """The exact changes, under the names of their fields."""
    changes = {text: dict(change) for text, change in ablation.changes.items()}
    return {name: values for name, values in (("Set", dict(ablation.change)), ("Sets", changes)) if values}


def _html(plan: Plan, text: _Escape, title: str) -> str:
    return PAGE.format(
        title=text.line(clean(title)),
        discussion=text.discussion(plan.discussion),
        ablations="\n".join(_html_entry(ablation, text) for ablation in plan.ablations),
    )


def _html_entry(ablation: Ablation, text: _Escape) -> str:
    def listed(name: str, entries: list[str]) -> list[str]:
        items = [f"<li>{text.line(each)}</li>" for each in entries]
        return [f"<li><strong>{name}</strong>:", "<ul>", *items, "</ul>", "</li>"] if entries else []

    lines = [
        f"<h3>{text.line(ablation.name)}</h3>",
        "<ul>",
        f"<li><strong>Ablated Part</strong>: {text.line(ablation.ablated_part)}</li>",
        f"<li><strong>Action</strong>: {ablation.action}</li>",
        *listed("Replacement", ablation.replacement),
        *listed("Metrics", ablation.metrics),
    ]
    for name, values in _settings(ablation).items():
        lines.append(f"<li><strong>{name}</strong>: <code>{_Escape(careful=False)(_json(values))}</code></li>")
    return "\n".join([*lines, "</ul>"])
