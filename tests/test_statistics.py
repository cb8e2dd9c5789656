"""Norms, cosines and overlap of task vectors, against plain numpy; slices add up; a sample is told and is near."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from deme_diffusion.merging import statistics
from deme_diffusion.merging.statistics import Statistics, group_of

SHAPES = {
    "conv_in.weight": (8, 3, 3, 3),
    "conv_in.bias": (8,),
    "down_blocks.0.resnets.0.conv1.weight": (16, 8, 3, 3),
    "down_blocks.0.attentions.0.transformer_blocks.0.norm.bias": (0,),
    "down_blocks.10.conv.weight": (5, 1),
    "down_blocks.2.conv.weight": (1,),
    "mid_block.resnets.0.conv1.weight": (7, 11),
}
State = dict[str, np.ndarray]


def model(seed: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> State:
    draw = np.random.default_rng(seed)
    return {key: draw.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}


def seen(base: State, experts: list[State], size: int | None = None) -> Statistics:
    """All parameters shown in slices of `size` entries, or whole."""
    observer = Statistics(len(experts), sum(array.size for array in base.values()))
    for key in base:
        arrays = [torch.from_numpy(state[key].reshape(-1)) for state in (base, *experts)]
        cuts = [0, *range(size or base[key].size, base[key].size, size or 1), base[key].size]
        for first, last in pairwise(cuts):
            observer.see(key, arrays[0][first:last], [array[first:last] for array in arrays[1:]])
    return observer


def flat(state: State, prefix: str = "") -> np.ndarray:
    return np.concatenate([a.reshape(-1) for key, a in state.items() if key.startswith(prefix)]).astype(np.float64)


def expected(base: State, experts: list[State], prefix: str = "") -> dict[str, object]:
    theta = flat(base, prefix)
    taus = [flat(expert, prefix).astype(np.float32) - theta.astype(np.float32) for expert in experts]
    taus = [tau.astype(np.float64) for tau in taus]
    norms = [np.linalg.norm(tau) for tau in taus]
    sizes = [np.abs(tau) for tau in taus]
    return {
        "parameters": theta.size,
        "share_seen": 1.0,
        "base_norm": np.linalg.norm(theta),
        "norms": norms,
        "relative_norms": [norm / np.linalg.norm(theta) for norm in norms],
        "cosines": [
            [a @ b / n / m for b, m in zip(taus, norms, strict=True)] for a, n in zip(taus, norms, strict=True)
        ],
        "overlaps": [[np.minimum(a, b).sum() / np.maximum(a, b).sum() for b in sizes] for a in sizes],
    }


def assert_near(found: dict[str, object], wanted: dict[str, object], relative: float = 1e-12) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(np.array(found[name], float), np.array(value, float), rtol=relative, err_msg=name)


@pytest.mark.parametrize("size", [None, 1, 7, 1000])
def test_sums_are_those_of_numpy_however_the_tensors_are_cut(size: int | None) -> None:
    base, experts = model(0), [model(1), model(2), model(3)]
    found = seen(base, experts, size).as_dict()
    assert_near(found["model"], expected(base, experts))
    for group in found["groups"]:
        assert_near(found["groups"][group], expected(base, experts, f"{group}."))
    assert list(found["groups"]) == ["conv_in", "down_blocks.0", "down_blocks.2", "down_blocks.10", "mid_block"]


def test_one_expert_has_a_cosine_with_itself_only() -> None:
    base, expert = model(0), model(1)
    assert_near(seen(base, [expert]).as_dict()["model"], expected(base, [expert]))


def test_overlap_and_cosine_worked_by_hand() -> None:
    base = {"a.weight": np.zeros(4, np.float32)}
    experts = [{"a.weight": np.array(tau, np.float32)} for tau in ([3, 1, 0, 0], [-1, 2, 0, 0], [0, 0, 5, 0])]
    found = seen(base, experts).as_dict()["model"]
    assert found["overlaps"][0] == [1.0, (1 + 1) / (3 + 2), 0.0]
    assert found["cosines"][0] == pytest.approx([1.0, -1 / 50**0.5, 0.0], rel=1e-15)
    assert found["norms"] == pytest.approx([10**0.5, 5**0.5, 5.0], rel=1e-15)
    assert found["relative_norms"] == [None, None, None], "nothing is relative to a base of zeros"


def test_an_expert_equal_to_the_base_has_norm_0_and_no_cosine_and_stays_json() -> None:
    base = model(0)
    found = seen(base, [model(1), base, base]).as_dict()["model"]
    assert found["norms"][1:] == found["relative_norms"][1:] == [0.0, 0.0]
    assert found["cosines"][1] == [None, None, None] and found["cosines"][0][0] == 1.0
    assert found["overlaps"] == [[1.0, 0.0, 0.0], [0.0, None, None], [0.0, None, None]]
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_null(value: float) -> None:
    expert = model(1)
    expert["conv_in.bias"][0] = value
    found = seen(model(0), [expert, model(2)]).as_dict()
    json.dumps(found, allow_nan=False)
    assert found["model"]["norms"][0] is None and found["groups"]["mid_block"]["norms"][0] > 0


def test_projections_are_a_group_of_their_own_and_not_of_the_model() -> None:
    base, expert = model(0), model(1)
    whole = seen(base, [expert]).as_dict()["model"]
    for state in (base, expert):
        state["projection.up_blocks.0.resnets.1.conv2"] = np.zeros((2, 2), np.float32)
    expert["projection.up_blocks.0.resnets.1.conv2"] += 0.5
    found = seen(base, [expert]).as_dict()
    assert found["model"] == whole
    assert found["groups"]["projection"]["norms"] == [1.0]
    assert found["groups"]["projection"]["relative_norms"] == [None]


def test_of_big_models_a_fixed_share_is_seen_and_the_sums_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {"up_blocks.0.conv.weight": (600, 1000), "up_blocks.1.conv.weight": (100_003,), "conv_out.bias": (17,)}
    base, experts = model(0, shapes), [model(1, shapes), model(2, shapes)]
    whole = seen(base, experts).as_dict()
    monkeypatch.setattr(statistics, "WHOLE", 1000)
    sampled = seen(base, experts).as_dict()
    assert sampled == seen(base, experts).as_dict(), "the sample is a fixed one"
    assert sampled["groups"]["conv_out"] == whole["groups"]["conv_out"], "small tensors are seen whole"
    assert 0.05 < sampled["model"]["share_seen"] < 0.0625
    assert sampled["model"]["parameters"] == whole["model"]["parameters"] == 700_020
    for name in ("norms", "base_norm", "relative_norms", "overlaps"):
        np.testing.assert_allclose(sampled["model"][name], whole["model"][name], rtol=0.02, err_msg=name)
    assert sampled["model"]["cosines"][0][1] == pytest.approx(whole["model"]["cosines"][0][1], abs=0.02)


@pytest.mark.parametrize("columns", [1024, 4096, 5120, 16384])
def test_a_change_of_some_columns_is_seen_in_its_share(columns: int) -> None:
    key, size = "up_blocks.0.conv.weight", 2**17
    observer = Statistics(1, 64 * size)
    base, changed = torch.ones(size), (torch.arange(64 * size) % columns) >= columns // 4
    for first in range(0, 64 * size, size):
        observer.see(key, base, [base + changed[first : first + size]])
    found = observer.as_dict()["model"]
    assert found["share_seen"] == 1 / 16
    assert found["norms"][0] == pytest.approx((48 * size) ** 0.5, rel=0.03)


@pytest.mark.parametrize(
    ("key", "group"),
    [
        ("conv_in.weight", "conv_in"),
        ("time_embedding.linear_1.bias", "time_embedding"),
        ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight", "down_blocks.0"),
        ("mid_block.attentions.0.transformer_blocks.0.norm1.bias", "mid_block"),
        ("transformer_blocks.3.attn.to_q.weight", "transformer_blocks.3"),
        ("single_transformer_blocks.12.proj_out.bias", "single_transformer_blocks.12"),
        ("encoder.down_blocks.1.resnets.0.conv1.weight", "encoder.down_blocks.1"),
        ("text_model.encoder.layers.3.mlp.fc1.weight", "text_model.encoder.layers.3"),
        ("adapter_list.3.weight", "adapter_list.3"),
        ("logit_scale", "logit_scale"),
        ("projection.up_blocks.1", "projection"),
    ],
)
def test_layer_groups_are_blocks(key: str, group: str) -> None:
    assert group_of(key) == group
