"""Which weights a parameter gets: patterns, keep, counts, and how they are written on a command line."""

import re

import pytest

from deme_diffusion.errors import UserError
from deme_diffusion.merging.selection import MergeWeights, parse_keep, parse_rules, parse_weights

KEYS = ["conv_in.weight", "down_blocks.0.conv.weight", "down_blocks.1.conv.weight", "up_blocks.0.conv.weight"]


def test_a_star_spans_dots_and_the_last_match_wins() -> None:
    rules = {"down_blocks.*": (0.2, 0.1), "*.conv.*": (0.3, 0.3), "down_blocks.1.*": (0.0, 1.0)}
    weights = MergeWeights((0.5, 0.5), rules).check(KEYS, 2)
    assert [weights.at(key) for key in KEYS] == [(0.5, 0.5), (0.3, 0.3), (0.0, 1.0), (0.3, 0.3)]
    turned = MergeWeights((0.5, 0.5), dict(reversed(rules.items())))
    assert [turned.at(key) for key in KEYS] == [(0.5, 0.5), (0.2, 0.1), (0.2, 0.1), (0.3, 0.3)]


def test_an_exact_name_is_a_pattern_too_and_part_of_a_name_is_none() -> None:
    weights = MergeWeights((0.5,), {"conv_in.weight": (1.0,)}).check(KEYS, 1)
    assert [weights.at(key) for key in KEYS] == [(1.0,), (0.5,), (0.5,), (0.5,)]
    with pytest.raises(UserError, match=re.escape("conv_in: matches no parameter")):
        MergeWeights((0.5,), {"conv_in": (1.0,)}).check(KEYS, 1)


def test_keep_names_whose_tensor_it_is_and_the_last_match_wins() -> None:
    keep = {"down_blocks.*": "base", "down_blocks.1.*": 1}
    weights = MergeWeights((0.5, 0.5), {"*": (0.0, 0.0)}, keep).check(KEYS, 2)  # type: ignore[arg-type]
    assert [weights.kept(key) for key in KEYS] == [None, "base", 1, None]


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (MergeWeights((0.5,)), "weights: 1 given for 2 experts"),
        (MergeWeights((0.5,) * 3), "weights: 3 given for 2 experts"),
        (MergeWeights((0.5, 0.5), {"conv_in.*": (1.0,)}), "weights_for conv_in.*: 1 given for 2 experts"),
        (MergeWeights((0.5, 0.5), {}, {"conv_in.*": 2}), "keep conv_in.*=2: base, or an expert from 0 to 1"),
        (MergeWeights((0.5, float("nan"))), "weights: [0.5, nan]; a weight is a finite number"),
        (
            MergeWeights((0.5, 0.5), {}, {"conv_in.*": "bas"}),  # type: ignore[dict-item]
            "keep conv_in.*=bas: base, or an expert from 0 to 1",
        ),
        (MergeWeights((0.5, 0.5), {}, {"conv_in.*": -1}), "keep conv_in.*=-1: base, or an expert from 0 to 1"),
        (
            MergeWeights((0.5, 0.5), {"down_block.*": (1.0, 0.0)}),
            "down_block.*: matches no parameter; did you mean 'down_blocks.*'?",
        ),
        (
            MergeWeights((0.5, 0.5), {}, {"conv_in.wieght": "base"}),
            "conv_in.wieght: matches no parameter; did you mean 'conv_in.weight'?",
        ),
        (
            MergeWeights((0.5, 0.5), {}, {"Down_Blocks.0.*": "base"}),
            "Down_Blocks.0.*: matches no parameter; did you mean 'down_blocks.0.*'?",
        ),
    ],
)
def test_wrong_weights_are_told_in_one_line(weights: MergeWeights, said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        weights.check(KEYS, 2)


def test_weights_go_to_json_and_back() -> None:
    whole = MergeWeights((0.5, 0.25), {"a.*": (1.0, 0.0)}, {"b.*": "base", "c": 1})
    values = {"values": [0.5, 0.25], "rules": {"a.*": [1.0, 0.0]}, "keep": {"b.*": "base", "c": 1}}
    assert whole.as_dict() == values and MergeWeights.from_dict(values) == whole
    assert MergeWeights((0.5,)).as_dict() == {"values": [0.5]}
    assert MergeWeights.of([1, 0]) == MergeWeights((1.0, 0.0))


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.1,0.5", (0.1, 0.5)),
        ("0.5", (0.5,)),
        ("-0.1,0.5", (-0.1, 0.5)),
        ("0.5,-0.1", (0.5, -0.1)),
        (" 1 , 2e-1 ", (1.0, 0.2)),
    ],
)
def test_weights_are_numbers_between_commas(text: str, values: tuple[float, ...]) -> None:
    assert parse_weights(text) == values


def test_rules_and_keep_are_read_in_order_and_said_last_counts_last() -> None:
    rules = parse_rules(["a.*=1,0", "b.*=0,-1", "a.*=0.5,0.5"])
    assert list(rules.items()) == [("b.*", (0.0, -1.0)), ("a.*", (0.5, 0.5))]
    keep = parse_keep(["a.*=base", "b.*=0", "a.*=3"])
    assert list(keep.items()) == [("b.*", 0), ("a.*", 3)]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: parse_weights("0.1,half"), "--weights 0.1,half: 'half' is no number; a weight an expert"),
        (lambda: parse_weights(""), "--weights : '' is no number"),
        (lambda: parse_weights("0.1,"), "--weights 0.1,: '' is no number"),
        (lambda: parse_weights("0.1;0.5"), "--weights 0.1;0.5: '0.1;0.5' is no number"),
        (lambda: parse_weights("nan,1"), "--weights nan,1: 'nan' is not finite"),
        (lambda: parse_weights("1,-inf"), "--weights 1,-inf: '-inf' is not finite"),
        (lambda: parse_rules(["a.*"]), "--weights-for a.*: PATTERN=VALUE is expected, as down_blocks.*=0.2,0.1"),
        (lambda: parse_rules(["=1,0"]), "--weights-for =1,0: PATTERN=VALUE is expected"),
        (lambda: parse_rules(["a.*="]), "--weights-for a.*=: PATTERN=VALUE is expected"),
        (lambda: parse_rules(["a.*=1,x"]), "--weights-for a.*: 1,x: 'x' is no number"),
        (lambda: parse_keep(["a.*"]), "--keep a.*: PATTERN=VALUE is expected, as conv_out.*=base"),
        (lambda: parse_keep(["a.*=expert"]), "--keep a.*=expert: base, or an expert's number counted from 0"),
        (lambda: parse_keep(["a.*=-1"]), "--keep a.*=-1: base, or an expert's number counted from 0"),
    ],
)
def test_what_cannot_be_read_is_told_in_one_line(call: object, said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}"):
        call()  # type: ignore[operator]
