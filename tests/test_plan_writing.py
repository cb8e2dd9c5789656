"""Plans written in every form read back as they were."""

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deme_diffusion.ablate import Ablation, Plan
from deme_diffusion.ablate.entries import normalised
from deme_diffusion.ablate.plan import ACTIONS
from deme_diffusion.ablate.reading import read_text
from deme_diffusion.ablate.writing import to_html, to_markdown, to_records, to_yaml

WRITERS: list[Callable[[Plan], str]] = [to_markdown, to_html, to_records, to_yaml]

LIKE_MARKUP = [
    *(
        "# x",
        "## Ablation Plan",
        "- a",
        "**bold**",
        "**",
        "* a",
        "1. x",
        "<script>alert(1)</script>",
        "<b>x</b>",
        "</div>",
    ),
    *("Action: REMOVE", "Ablated Part: y", "**Metrics**: z", "None", "N/A", "-", "a, b; c", "a and b", "R&D", "&lt;"),
    *(
        "&amp;amp;",
        "x &#42; y",
        "`code`",
        "\\*",
        "C:\\dir",
        "_x_",
        '"quoted"',
        "“x”",
        "it's",
        "Ã©",
        "â€™",
        "a\xa0b",
        "a  b",
    ),
    *(
        "{",
        "[1]",
        '{"a": "b"}',
        "</discussion>",
        "<predictions>",
        "<!-- x",
        "<style>",
        "```",
        "---",
        "===",
        "| a | b |",
    ),
    *(
        "!tag",
        "*alias",
        "&anchor",
        "yes",
        "1e3",
        "2024-01-01",
        "null",
        "~",
        "a: b",
        "Ablation 1: x",
        "Name: x",
        ">",
        "x:",
    ),
    *(
        "💡 idea",
        "时间步划分",
        "данные",
        "é",
        "\x85",
        "\u2028",
        "\ud800",
        "\x1b[31m",
        "\x1e",
        "Ablation Plan",
        "(",
        "x (",
    ),
    *(
        "replace with a, by b",
        "3x3",
        "#",
        "x #",
        "Reasoning Trace",
        "Metrics",
        "set",
        "a\tb",
        "%TAG",
        "@x",
        "? a",
        "1)",
    ),
]
words = st.one_of(
    st.sampled_from(LIKE_MARKUP), st.text(max_size=12), st.text(st.characters(codec="ascii"), max_size=12)
)
texts = st.lists(words, min_size=1, max_size=3).map(" ".join)
names = texts.filter(lambda text: bool(normalised(Plan(text)).discussion.strip()) and bool(_one(text)))
values = st.one_of(st.integers(), st.booleans(), st.none(), st.floats(allow_nan=False, allow_infinity=False), names)
changes = st.dictionaries(
    st.sampled_from(["decouple.num_ranges", "merge.method", "train.use_ema"]), values | st.lists(values, max_size=2)
)


def _one(text: str) -> str:
    from deme_diffusion.ablate.cleaning import one_line

    return one_line(text)


@st.composite
def ablations(draw: st.DrawFn) -> Ablation:
    replacement = draw(st.lists(names, max_size=3, unique_by=_one))
    exact = draw(st.lists(st.sampled_from(replacement), unique=True)) if replacement else []
    return Ablation(
        name=draw(names),
        ablated_part=draw(names),
        action=draw(st.sampled_from(ACTIONS)),
        replacement=replacement,
        metrics=draw(st.lists(names, max_size=3)),
        change=draw(changes),
        changes={text: draw(changes) for text in exact},
    )


plans = st.builds(
    Plan,
    discussion=st.lists(st.one_of(texts, words), max_size=6).map("\n".join),
    ablations=st.lists(ablations(), min_size=1, max_size=3),
)


@pytest.mark.parametrize("write", WRITERS)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(plan=plans)
def test_reading_what_was_written(write: Callable[[Plan], str], plan: Plan) -> None:
    written = write(plan)
    again = read_text(written)
    assert again == normalised(plan)
    assert again.problems == []
