"""Plan documents of many authors: every style is read, what is broken is reported, nothing is executed."""

import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deme_diffusion.ablate import Ablation, Plan, read_plan
from deme_diffusion.ablate.cleaning import MAX_LINE
from deme_diffusion.ablate.entries import action_of
from deme_diffusion.ablate.listing import split_items
from deme_diffusion.ablate.plan import ACTIONS, Problem
from deme_diffusion.ablate.reading import read_text
from deme_diffusion.ablate.writing import to_html, to_markdown, to_records, to_yaml
from deme_diffusion.errors import UserError

WANTED = [
    Ablation("Without dropout", "dropout layers", "REMOVE", [], ["accuracy", "F1 score"]),
    Ablation(
        "Another pooling", "pooling", "REPLACE", ["max pooling", "attention pooling (4 heads, 1 layer)"], ["accuracy"]
    ),
]
PLAN = Plan("Two parts were never tested.", WANTED)

STYLES = {
    "plain bullets": """
## Reasoning trace
Two parts were never tested.

## Ablation plan
### Without dropout
* **Ablated Part:** dropout layers
* **Action:** remove
* **Metrics:** accuracy; F1 score
### Another pooling
* __Action__: Replace
* __Metric__: accuracy
* __ablated_part__: pooling
* __Replacements__: max pooling, attention pooling (4 heads, 1 layer)
""",
    "numbered and bold": """
**Reasoning Trace**

Two parts were never tested.

**Ablation Plan**

1. **Without dropout**
   - Ablated part: dropout layers
   - Action: Removal of the layers
   - Evaluation metrics: accuracy and F1 score

2. **Another pooling**
   - Ablated part: pooling
   - Action: `REPLACE`
   - Replacement: 
      1. max pooling
      2. attention pooling (4 heads, 1 layer)
   - Evaluation metrics: accuracy
""",
    "underlined": """
Reasoning
=========
Two parts were never tested.

Ablation Plan
=============
Without dropout
---------------
Ablated Part: dropout layers
Action: DISABLE
Metrics: accuracy, F1 score

Another pooling
---------------
Ablated Part = pooling
Action = REPLACE
Replacement = {"a": "max pooling", "b": "attention pooling (4 heads, 1 layer)"}
Metrics = ["accuracy"]
""",
    "no blank lines": """# Reasoning Trace
Two parts were never tested.
# Ablation Plan
###Without dropout
-**Ablated Part**:dropout layers
-**Action**:REMOVE
-**Replacement**: N/A
-**Metrics**:accuracy,F1 score
###Another pooling
-**Ablated Part**:pooling
-**Action**:REPLACE
-**Replacement**:
- max pooling
- attention pooling (4 heads, 1 layer)
-**Metrics**:accuracy""",
    "sub-headings": """
## Reasoning

Two parts were never tested.

## Ablation Plan

### Without dropout
#### Ablated Part
dropout layers
#### Action
REMOVE
#### Metrics
- accuracy
- F1 score

### Another pooling
#### Ablated Part
pooling
#### Action
REPLACE
#### Replacement
• max pooling
• attention pooling (4 heads, 1 layer)
#### Metrics
accuracy
""",
    "table": """
## Reasoning
Two parts were never tested.
## Ablation Plan
| Name | Ablated Part | Action | Replacement | Metrics |
| --- | --- | --- | --- | --- |
| Without dropout | dropout layers | REMOVE | - | accuracy, F1 score |
| Another pooling | pooling | REPLACE | max pooling<br>attention pooling (4 heads, 1 layer) | accuracy |
""",
    "html": """<style>h2 { color: red }</style><script>alert("### x")</script>
<div class="box"><h2 style="x">\U0001f9e0 Reasoning Trace</h2>
<p>Two parts were never tested.</p></div>
<div class="box">
<h2>
Ablation Plan</h2>
<h3>Without dropout</h3><ul><li><b>Ablated Part</b>: dropout layers</li><li><b>Action</b>: REMOVE</li>
<li><b>Metrics</b>: accuracy, F1 score</li></ul>
<h3>Another pooling</h3>
<ul><li><strong>Ablated Part:</strong> pooling</li><li><strong>Action:</strong> REPLACE</li>
<li><strong>Replacement:</strong><ul><li>max pooling</li><li>attention pooling (4 heads, 1 layer)</li></ul></li>
<li><strong>Metrics:</strong> accuracy</li></ul></div>
""",
    "records": """<discussion>
Two parts were never tested.
</discussion>
<predictions>
{"name": "Without dropout", "ablated_part": "dropout layers", "action": "REMOVE", "metrics": "accuracy, F1 score"}
{"name": "Another pooling", "ablated_part": "pooling", "action": "replace", "replacement": [{"name": "max pooling"}, \
"attention pooling (4 heads, 1 layer)"], "metrics": ["accuracy"],}
""",
    "array in a fence": """Two parts were never tested.
```json
[
  {
    "name": "Without dropout",
    "ablated_part": "dropout layers",
    "action": "REMOVE",
    "replacement": null,
    "metrics": ["accuracy", "F1 score"]
  },
  {'name': 'Another pooling', 'ablated_part': 'pooling', 'action': 'REPLACE', 'metrics': ('accuracy'),
   'replacement': ['max pooling', 'attention pooling (4 heads, 1 layer)']}
]
```
""".replace("('accuracy')", "['accuracy']"),
    "one object": """{"discussion": "Two parts were never tested.", "ablations": [
  {"name": "Without dropout", "ablated_part": "dropout layers", "action": "drop", "metrics": ["accuracy", "F1 score"]},
  {"name": "Another pooling", "ablated_part": "pooling", "action": "swap", "metrics": ["accuracy"],
   "replacement": {"option 1": "max pooling", "option 2": "attention pooling (4 heads, 1 layer)"}}
]}""",
    "yaml": """discussion: Two parts were never tested.
ablations:
- {name: Without dropout, ablated_part: dropout layers, action: REMOVE, metrics: [accuracy, F1 score]}
- name: Another pooling
  ablated_part: pooling
  action: REPLACE
  replacement:
  - max pooling
  - attention pooling (4 heads, 1 layer)
  metrics: accuracy
""",
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    "change", [str, lambda text: "\ufeff" + text.replace("\n", "\r\n"), lambda text: f"\n\n{text}\n"]
)
def test_a_style(style: str, change: type[str]) -> None:
    plan = read_text(change(STYLES[style]))
    assert plan.ablations == WANTED
    assert plan.discussion == PLAN.discussion
    assert plan.problems == []


def test_wrongly_decoded_text_and_no_break_spaces() -> None:
    text = "## \U0001f4cb Ablation Plan\n"
    text += "### Naïve “\u03b1”\n-\xa0**Ablated\xa0Part**:\xa0λ \u2013 décalé\n- **Action**: REMOVE\n"
    read = [read_text(text), read_text(text.encode().decode("latin-1"))]
    for plan in read:
        assert plan.ablations == [Ablation("Naïve “\u03b1”", "λ \u2013 décalé", "REMOVE")]


def test_files_in_other_encodings(tmp_path: Path) -> None:
    text = "### Dé\n- Ablated Part: “é”\n- Action: REMOVE\n"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "cp1252"):
        (tmp_path / "plan.md").write_bytes(text.encode(encoding))
        assert read_plan(tmp_path / "plan.md").ablations == [Ablation("Dé", "“é”", "REMOVE")]


@pytest.mark.skipif("DEME_TEST_DATA" not in os.environ, reason="DEME_TEST_DATA names no folder with plans/")
def test_the_published_plan() -> None:
    (path,) = (Path(os.environ["DEME_TEST_DATA"]) / "plans").glob("*.md")
    plan = read_plan(path)
    assert [ablation.action for ablation in plan.ablations] == ["REMOVE", "REPLACE"]
    assert [len(ablation.replacement) for ablation in plan.ablations] == [0, 2]
    assert all(ablation.metrics == ["FID", "CLIP Score"] for ablation in plan.ablations)
    assert len(plan.discussion.split()) > 200 and "<" not in plan.discussion
    assert plan.problems == []


# --- fields -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "action"),
    [
        *(("REMOVE", "REMOVE"), ("remove the module", "REMOVE"), ("Removal", "REMOVE"), ("to be deleted", "REMOVE")),
        *(("Replacement", "REPLACE"), ("swap in another", "REPLACE"), ("Vary", "REPLACE"), ("REPLACE by y", "REPLACE")),
        *(("add", "ADD"), ("Insertion", "ADD"), ("introduce it", "ADD"), ("Replace what we removed", "REPLACE")),
    ],
)
def test_actions(text: str, action: str) -> None:
    assert action_of(text) == action


def test_an_unknown_action_is_a_problem_with_its_line_and_the_nearest() -> None:
    entry = "### {0}\n- Ablated Part: x\n- Action: {1}\n"
    plan = read_text(
        "\n".join(entry.format(*each) for each in [("A", "REMVOE"), ("B", "add"), ("C", "remove / replace")])
    )
    assert [ablation.name for ablation in plan.ablations] == ["B"]
    assert str(plan.problems[0]) == ("line 3: action 'REMVOE' is none of REMOVE, REPLACE, ADD; did you mean 'REMOVE'?")
    assert plan.problems[1].line == 11 and "several" in plan.problems[1].what


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("cosine, linear, and constant", ["cosine", "linear", "constant"]),
        ("a, b; c", ["a, b", "c"]),
        ("weights of 1,000 and 0,5", ["weights of 1,000 and 0,5"]),
        ("random order or sorted order", ["random order", "sorted order"]),
        ("cosine or linear schedule", ["cosine or linear schedule"]),
        (
            "an encoder of four layers, which shares its weights",
            ["an encoder of four layers, which shares its weights"],
        ),
        ('"a, b", c', ['"a, b"', "c"]),
        ("a (b, c), d", ["a (b, c)", "d"]),
        ("a (b, c", ["a (b", "c"]),
        *((text, []) for text in ("None", "n/a", "-", "—", "", "Not applicable.")),
    ],
)
def test_one_line_of_several(text: str, items: list[str]) -> None:
    assert split_items(text) == items


def test_a_mapping_as_replacement() -> None:
    mapping = {"uniform": "random", "sizes": [2, 8], "kinds": ["first kind", "second kind"]}
    record = {"name": "x", "action": "REPLACE", "replacement": mapping, "metrics": "FID and IS"}
    (ablation,) = read_text(json.dumps(record)).ablations
    assert ablation.replacement == ["uniform: random", "sizes: 2", "sizes: 8", "first kind", "second kind"]
    assert ablation.metrics == ["FID", "IS"] and ablation.ablated_part == "x"


def test_yaml_says_the_exact_change() -> None:
    plan = read_text("""ablations:
- name: x
  action: REPLACE
  set: {merge: {method: ties, options: {density: 0.2}}}
  replacement:
  - {name: two, set: {decouple: {num_ranges: 2}}}
  - other
  replacemnt: [y]
""")
    (ablation,) = plan.ablations
    assert ablation.change == {"merge.method": "ties", "merge.options.density": 0.2}
    assert ablation.replacement == ["two", "other"] and ablation.changes == {"two": {"decouple.num_ranges": 2}}
    assert [str(problem) for problem in plan.problems] == [
        "line 2: 'replacemnt' is no field of an ablation; did you mean 'replacement'?"
    ]


def test_broken_entries_are_problems_and_the_rest_is_read() -> None:
    good = '{"name": "b", "ablated_part": "y", "action": "ADD"}'
    plan = read_text(
        f'<predictions>\n{{"name": "a", "act\n{good}\nnot json\n{{"name": "c"}}\n[1, 2]\n{good}\n</predictions>'
    )
    assert [ablation.name for ablation in plan.ablations] == ["b", "b"]
    assert [problem.line for problem in plan.problems] == [2, 4, 5, 6]
    plan = read_text("ablations:\n- name: a\n  action: ADD\n- name: [\n  action: ADD\n- x\n- name: c\n  action: ADD\n")
    assert [ablation.name for ablation in plan.ablations] == ["a", "c"]
    assert {problem.line for problem in plan.problems} <= {4, 5, 6} and len(plan.problems) == 2


def test_a_thousand_ablations_of_any_field_and_language() -> None:
    plan = Plan(
        "为什么", [Ablation(f"Ablation {i}: 酶 {i}", f"кофактор {i}", "REPLACE", [f"Mg²⁺ {i}"]) for i in range(1000)]
    )
    for write in (to_markdown, to_html, to_records, to_yaml):
        assert read_text(write(plan)) == plan


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.md", b"\x89PNG\r\n\x1a\n\x00\x00", "not a text document"),
        ("a.md", b"\x1f\x8b\x08\x08\xff\x01", "not a text document"),
        ("a.md", b"# x\n\n" + b"a" * (MAX_LINE + 1), r"line 3: 1,048,577 characters"),
        ("a.yaml", b"ablations:\n- &a {name: x}\n- *a\n", "line 2: YAML anchors and aliases"),
        ("a.yaml", b"ablations:\n- name: !!python/object/apply:os.system [x]\n", "line 2: YAML tags are not read"),
        ("a.yml", b"a: !!binary x\n", "line 1: YAML tags are not read"),
    ],
)
def test_what_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_plan(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_missing_paths_and_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_plan(tmp_path / "none.md")
    with pytest.raises(UserError, match="is a folder"):
        read_plan(str(tmp_path))


def test_replacements_of_one_name_are_both_kept() -> None:
    one, other = "{name: a, set: {x.y: 1}}", "{name: a, set: {x.y: 2}}"
    (ablation,) = read_text(f"ablations:\n- {{name: n, action: REPLACE, replacement: [{one}, {other}]}}").ablations
    assert ablation.replacement == ["a", "a (2)"]
    assert ablation.changes == {"a": {"x.y": 1}, "a (2)": {"x.y": 2}}


@pytest.mark.parametrize("bad", ["{name: b, set: [1]}", "{name: b, set: 3}", "{name: {c: d}, set: {x.y: 3}}"])
def test_a_replacement_that_cannot_be_read_is_a_problem_of_its_own(bad: str) -> None:
    entry = "- name: n\n  action: REPLACE\n  replacement:\n    - {name: a, set: {x.y: 1}}\n    - "
    plan = read_text(f"ablations:\n{entry}{bad}\n")
    assert [ablation.replacement for ablation in plan.ablations] == [["a"]]
    assert [problem.line for problem in plan.problems] == [6]
    alone = read_text(f"ablations:\n- {{name: n, action: REPLACE, set: {{x.y: 1}}, replacement: [{bad}]}}\n")
    assert not alone.ablations and "mapping" in alone.problems[0].what, "what is left is no other change"


@pytest.mark.parametrize("content", ["\n- {name: n, action: REMOVE}", " {n: {action: REMOVE}}"])
def test_one_ablation_where_several_are_listed_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "plan.yaml").write_text(f"ablation:{content}\n")
    plan = read_plan(tmp_path / "plan.yaml")
    assert plan.problems[0] == Problem(1, "'ablation' is no field; did you mean 'ablations'?")
    objects = read_text('{"ablation": [{"name": "n", "action": "REMOVE"}]}')
    assert "did you mean 'ablations'" in objects.problems[0].what


@pytest.mark.parametrize(
    "text", ["", "\n\n", "Nothing planned.", "## Ablation Plan\n", "ablations: []", "[]", "{}", "- x"]
)
def test_a_document_without_ablations_has_a_problem_that_says_so(text: str) -> None:
    plan = read_text(text)
    assert plan.ablations == [] and "no ablation" in plan.problems[-1].what


@pytest.mark.parametrize(
    "unit", [" ", "*", "<", "#", "&", "[", "{", '"', "**a ", "<!--", "<div ", '\\"', ", ", "| ", "a: "]
)
@pytest.mark.parametrize("head", ["", "<predictions>\n{", "ablations:\n- ", "### x\n- Action: ADD\n- Metrics: "])
def test_long_lines_take_no_longer_than_they_are(unit: str, head: str) -> None:
    began = time.process_time()
    read_text(head + unit * (2**17 // len(unit)))
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 50_000, "ablations: " + "[" * 50_000, "<div>" * 50_000, '{"name": ' + "[" * 900]
)
def test_deep_nesting(text: str) -> None:
    assert read_text(text).ablations == []


DOCUMENTS = [*STYLES.values(), *(write(PLAN) for write in (to_markdown, to_html, to_records, to_yaml))]
PIECES = st.sampled_from(
    [*"*#<>&:-|`\"'{}[],;\n\t\x00\x1e\xa0", "- ", "**", "</", "&#", "!!", "\ud800", "```", "action: "]
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(DOCUMENTS), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 40), PIECES), max_size=6))
def test_mutations_raise_nothing_but_user_errors(text: str, edits: list[tuple[float, int, str]]) -> None:
    for place, length, piece in edits:
        at = int(place * len(text))
        text = text[:at] + piece + text[at + length :]
    try:
        plan = read_text(text)
    except UserError:
        return
    assert plan.ablations or plan.problems
    assert all(ablation.action in ACTIONS and ablation.name and ablation.ablated_part for ablation in plan.ablations)
    assert all(problem.line >= 1 for problem in plan.problems)


def test_two_thousand_plans_are_read_in_twenty_seconds() -> None:
    began = time.process_time()
    for at in range(200):
        read_text(DOCUMENTS[at % len(DOCUMENTS)])
    assert time.process_time() - began < 2
