"""Every merge method against arrays worked by hand, peft's functions, and what must hold for tensors of any shape."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deme_diffusion import rng
from deme_diffusion.config import MethodOptions
from deme_diffusion.merging.methods import Parameter, function, thresholds_of
from deme_diffusion.merging.table import METHODS, method
from deme_diffusion.merging.thresholds import global_thresholds, kept, magnitudes
from deme_diffusion.merging.vectors import Weight

Rows = Sequence[Any]
KEYED = {"dare_linear", "dare_ties", "della"}  # masks that belong to an expert's place


def parameter(
    name: str,
    vectors: Rows,
    weights: Sequence[float],
    base: Any = None,
    dtype: torch.dtype = torch.float32,
    **rest: Any,
) -> Parameter:
    """Task vectors over a base (0 if none is given), with the method's options resolved."""
    taus = [torch.as_tensor(v, dtype=torch.float64) for v in vectors]
    theta = torch.zeros_like(taus[0]) if base is None else torch.as_tensor(base, dtype=torch.float64)
    options = method(name).resolved(MethodOptions(**rest.pop("options", {})))
    fisher = rest.pop("fisher", None)
    if name == "fisher" and fisher is None:
        fisher = [torch.rand(theta.shape, generator=torch.Generator().manual_seed(i)) for i in range(len(taus))]
    experts = [Weight((theta + tau).to(dtype)) for tau in taus]
    return Parameter("conv.weight", Weight(theta.to(dtype)), experts, weights, options, fisher=fisher, **rest)


def merged(name: str, *args: Any, **rest: Any) -> torch.Tensor:
    return function(name)(parameter(name, *args, **rest)).value


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some(shape: tuple[int, ...], count: int, seed: int = 0) -> list[torch.Tensor]:
    return [normal(*shape, seed=seed + i) for i in range(count)]


def num_experts(name: str) -> int:
    return METHODS[name].experts or 3


def close(a: torch.Tensor, b: Any, tolerance: float = 1e-6) -> bool:
    return torch.allclose(a.double(), torch.as_tensor(b, dtype=torch.float64), rtol=tolerance, atol=tolerance)


# By hand


def test_average_is_the_mean_of_the_experts_and_knows_no_weights() -> None:
    assert merged("average", [[1.0, 2.0], [3.0, -4.0]], [9.0, -9.0], base=[1.0, 1.0]).tolist() == [3.0, 0.0]


def test_slerp_of_orthogonal_task_vectors_goes_along_the_circle() -> None:
    half = math.sqrt(0.5)
    assert close(merged("slerp", [[1.0, 0.0], [0.0, 1.0]], [0.5, 0.5]), [half, half])
    assert close(merged("slerp", [[1.0, 0.0], [0.0, 1.0]], [4 / 3, 2 / 3]), [math.sqrt(3), 1.0])  # t = 1/3, s = 2
    assert close(merged("slerp", [[1.0, 0.0], [0.0, 1.0]], [0.5, -0.5]), [half, -half])


@pytest.mark.parametrize("weights", [[0.3, 0.9], [0.3, -0.9], [-1.2, 0.1], [-0.5, -0.5]])
def test_slerp_is_its_formula(weights: list[float]) -> None:
    taus = [np.sign(w) * v.numpy() for w, v in zip(weights, some((6, 7), 2), strict=True)]
    share = abs(weights[0]) + abs(weights[1])
    lengths = np.linalg.norm(taus[0]) * np.linalg.norm(taus[1])
    t, angle = abs(weights[1]) / share, np.arccos((taus[0] * taus[1]).sum() / lengths)
    expected = share * (np.sin((1 - t) * angle) * taus[0] + np.sin(t * angle) * taus[1]) / np.sin(angle)
    assert close(merged("slerp", some((6, 7), 2), weights), expected)


def test_fisher_is_its_formula() -> None:
    taus, weights = [v.numpy() for v in some((6, 7), 3)], [0.3, -0.9, 1.4]
    information = [normal(6, 7, seed=i + 20).abs().numpy() for i in range(3)]
    terms = list(zip(weights, information, taus, strict=True))
    expected = sum(w * f * tau for w, f, tau in terms) / sum(abs(w) * f for w, f, _ in terms)
    fisher = [torch.from_numpy(f) for f in information]
    assert close(merged("fisher", some((6, 7), 3), weights, fisher=fisher), expected)


@pytest.mark.parametrize("second", [[2.0, 4.0], [-2.0, -4.0], [0.0, 0.0]])
def test_slerp_of_colinear_task_vectors_is_linear(second: list[float]) -> None:
    expected = [0.25 + 0.75 * second[0], 0.5 + 0.75 * second[1]]
    assert close(merged("slerp", [[1.0, 2.0], second], [0.25, 0.75]), expected)


def test_slerp_with_a_one_hot_weight_is_that_expert_to_the_bit() -> None:
    p = parameter("slerp", some((5, 7), 2), [0.0, 1.0], base=normal(5, 7, seed=9))
    assert torch.equal(function("slerp")(p).value, p.experts[1].value)


def test_fisher_weighs_each_entry_by_its_information() -> None:
    information = [torch.tensor([1.0, 3.0, 0.0, 1e-25]), torch.tensor([1.0, 1.0, 0.0, 3e-25])]
    vectors = [[1.0, 1.0, 2.0, 4.0], [3.0, -3.0, 6.0, 8.0]]
    assert close(merged("fisher", vectors, [0.5, 0.5], fisher=information), [2.0, 0.0, 4.0, 7.0])
    # (2 * 1 * 1 - 1 * 1 * 3) / 3, (2 * 3 * 1 + 1 * 1 * 3) / 7, (2 * 2 - 6) / 3, (2 * 4 - 3 * 8) / 5
    assert close(merged("fisher", vectors, [2.0, -1.0], fisher=information), [-1 / 3, 9 / 7, -2 / 3, -16 / 5])


def test_fisher_with_a_one_hot_weight_is_that_expert() -> None:
    p = parameter("fisher", some((5, 7), 3), [0.0, 0.4, 0.0], base=normal(5, 7, seed=9))
    assert close(function("fisher")(p).value, p.experts[1].value)


TRIMMED = [[3.0, 0.1, -2.0, 0.2, 1.0], [-1.0, 0.2, 4.0, 0.1, 3.0]]  # at density 0.6 the second and fourth entry go


def test_ties_trims_elects_and_averages_those_that_agree() -> None:
    expected = [3.0, 0.2, 4.0, 0.2, 2.0]
    got = merged("ties", [[3.0, 0.1, -2.0, 0.2, 1.0], [-1.0, 0.2, 4.0, 0.1, 3.0]], [1.0, 1.0], options={"density": 0.8})
    assert close(got, expected)
    assert close(merged("ties", TRIMMED, [1.0, 1.0], options={"density": 0.6}), [3.0, 0.0, 4.0, 0.0, 2.0])


def test_ties_with_weights_of_mixed_sign_divides_by_a_count() -> None:
    # (1 * 1 - 0.9 * 3) / 2 where both agree; a sum of signed weights would divide by 0.1
    assert close(merged("ties", TRIMMED, [1.0, -0.9], options={"density": 0.6}), [3.0, 0.0, -3.6, 0.0, -0.85])
    assert close(merged("ties", TRIMMED, [1.0, -1.0], options={"density": 0.6}), [3.0, 0.0, -4.0, 0.0, -1.0])


def test_ties_with_global_thresholds_may_leave_nothing_of_a_tensor() -> None:
    assert close(merged("ties", TRIMMED, [1.0, 1.0], thresholds=[(2.5,), (3.5,)]), [3.0, 0.0, 4.0, 0.0, 0.0])
    assert close(merged("ties", TRIMMED, [1.0, 1.0], base=[7.0] * 5, thresholds=[(9.0,), (9.0,)]), [7.0] * 5)


def test_breadcrumbs_removes_both_ends() -> None:
    vectors = [[10.0, -1.0, 2.0, -3.0, 4.0, 5.0, -6.0, 7.0, 8.0, 9.0]]
    got = merged("breadcrumbs", vectors, [0.5], options={"density": 0.6, "outliers": 0.2})
    assert close(got, [0.0, 0.0, 0.0, -1.5, 2.0, 2.5, -3.0, 3.5, 4.0, 0.0])


@pytest.mark.parametrize("size", [1, 2, 9, 99])
@pytest.mark.parametrize("density", [0.01, 0.5, 0.999])
@pytest.mark.parametrize("name", ["ties", "breadcrumbs"])
def test_small_tensors_are_not_wiped(name: str, density: float, size: int) -> None:
    assert merged(name, some((size,), 2), [1.0, 1.0], options={"density": density}).count_nonzero() > 0


def mask(purpose: str, i: int, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """The keyed draws, told a second time."""
    bits = rng.generator(seed, purpose, "conv.weight", i).bit_generator
    words = bits.random_raw((math.prod(shape) + 1) // 2).view(np.int32)[: math.prod(shape)]
    return torch.from_numpy((words.astype(np.float64) / 2**32 + 0.5).reshape(shape))


def test_dare_keeps_each_entry_at_random_and_rescales_it() -> None:
    vectors = some((20, 30), 2)
    kept_by = [(mask("dare", i, (20, 30)) < 0.25) / 0.25 for i in range(2)]
    assert close(
        merged("dare_linear", vectors, [0.5, -2.0], options={"density": 0.25}),
        0.5 * kept_by[0] * vectors[0] - 2 * kept_by[1] * vectors[1],
    )
    whole = merged("dare_linear", [torch.ones(300, 300)], [1.0], options={"density": 0.25})
    assert set(whole.unique().tolist()) == {0.0, 4.0}
    assert float(whole.mean()) == pytest.approx(1.0, abs=5 * math.sqrt(3) / 300)


def test_masks_are_keyed_by_seed_parameter_and_expert_and_leave_the_global_rng_alone() -> None:
    vectors = [torch.ones(40, 50)] * 2
    p = parameter("dare_linear", vectors, [1.0, 10.0])
    before = torch.get_rng_state()
    first, other = function("dare_linear")(p).value, function("dare_linear")(replace(p, name="other")).value
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, function("dare_linear")(p).value) and not torch.equal(first, other)
    assert not torch.equal(first, merged("dare_linear", vectors, [1.0, 10.0], options={"seed": 1}))
    assert len(first.unique()) == 4  # the two experts' masks differ


def test_della_drops_by_rank_within_a_row() -> None:
    row = torch.tensor([4.0, -1.0, 3.0, -2.0], dtype=torch.float64)
    rows = torch.stack([row * (i + 1) for i in range(3000)])
    got = merged("della", [rows], [1.0], options={"density": 0.5, "epsilon": 0.4})
    keep = torch.tensor([0.65, 0.35, 0.55, 0.45])  # 0.5 -+ 0.4 (r + 1/2) / 4
    ratio = got / rows
    assert all(close(ratio[:, i][ratio[:, i] != 0].unique(), [1 / keep[i]]) for i in range(4))
    assert torch.allclose((ratio != 0).float().mean(0), keep, atol=5 * 0.5 / math.sqrt(3000))


@pytest.mark.parametrize("shape", [(40,), (5, 300), (7, 1)])
def test_della_keeps_larger_entries_more_often_and_equal_ones_in_their_order(shape: tuple[int, ...]) -> None:
    tau = normal(*shape).mul(3).round().float()  # many are equal
    rows = tau.view(tau.shape[0], -1) if tau.ndim > 1 else tau.view(1, -1)
    length, spread = rows.shape[1], 0.2
    order = rows.abs().argsort(dim=1, descending=True, stable=True)
    keep = torch.empty(rows.shape).scatter_(
        1, order, (0.5 - spread * ((torch.arange(length) + 0.5) / length - 0.5)).expand(rows.shape)
    )
    draws = torch.from_numpy(rng.generator(0, "della", "conv.weight", 0).random(rows.shape, dtype=np.float32))
    assert close(merged("della", [tau], [1.0]).view(rows.shape), rows * (draws < keep) / keep)


def test_della_narrows_epsilon_where_probabilities_would_leave_their_range() -> None:
    vectors = some((10, 100), 1)
    assert close(merged("della", vectors, [1.0], options={"density": 1.0}), vectors[0])
    sparse = merged("della", vectors, [1.0], options={"density": 0.01, "epsilon": 0.9})
    assert (sparse / vectors[0]).max() <= 2 / 0.01


def test_della_elects_and_averages_like_ties() -> None:
    vectors, options = some((6, 8), 3), {"density": 0.6, "epsilon": 0.3}
    left = [merged("della", [v], [1.0], options=options) for v in vectors[:1]]
    assert left[0].count_nonzero() < 48  # of one expert, what MAGPRUNE leaves
    full = {"density": 1.0}
    weights = [1.0, -0.5, 2.0]
    assert close(merged("della", vectors, weights, options=full), merged("ties", vectors, weights, options=full))


# Trimming a whole task vector


def sorted_threshold(vectors: Sequence[torch.Tensor], density: float) -> float:
    ordered = torch.cat([v.flatten().float().abs() for v in vectors]).sort(descending=True).values
    return float(ordered[kept(density, len(ordered)) - 1]) if len(ordered) else 0.0


@pytest.mark.parametrize("density", [1e-9, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("values", ["normal", "tied", "tiny", "zeros", "empty"])
def test_global_thresholds_equal_a_full_sort(values: str, density: float) -> None:
    make: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "normal": lambda v: v,
        "tied": lambda v: v.mul(4).round(),
        "tiny": lambda v: v * 1e-42,  # denormal
        "zeros": torch.zeros_like,
        "empty": lambda v: v.flatten()[:0],
    }
    experts = [[make[values](v) for v in (normal(33, 41, seed=i), normal(700, seed=i + 5))] for i in range(2)]
    passes = []

    def vectors() -> Iterator[Sequence[torch.Tensor]]:
        passes.append(None)
        yield from zip(*experts, strict=True)

    assert global_thresholds(vectors, 2, density) == [sorted_threshold(own, density) for own in experts]
    assert len(passes) == 2


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1), st.floats(0.001, 1.0))
def test_global_thresholds_of_any_floats(values: list[float], density: float) -> None:
    vector = torch.tensor(values, dtype=torch.float32)
    assert global_thresholds(lambda: iter([[vector]]), 1, density) == [sorted_threshold([vector], density)]


def test_trimming_one_tensor_per_tensor_is_trimming_it_globally() -> None:
    vectors = [v.float().double() for v in some((30, 30), 3)]
    thresholds = [(sorted_threshold([v], 0.2),) for v in vectors]
    here = merged("ties", vectors, [1.0] * 3)
    assert torch.equal(here, merged("ties", vectors, [1.0] * 3, thresholds=thresholds))


@pytest.mark.parametrize(
    ("density", "size", "count"), [(0.1, 30, 3), (0.2, 7, 2), (1e-9, 5, 1), (1.0, 7, 7), (0.5, 0, 0)]
)
def test_a_density_keeps_so_many(density: float, size: int, count: int) -> None:
    assert kept(density, size) == count


# Against peft: the same pieces, fed the same masks


@pytest.fixture(scope="module")
def peft() -> Any:
    return pytest.importorskip("peft.utils.merge_utils")


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.7, -0.3, 1.5]])
@pytest.mark.parametrize("density", [0.2, 0.55, 0.9])
def test_ties_is_pefts(peft: Any, density: float, weights: list[float]) -> None:
    """At 100 entries density * n is whole: elsewhere peft rounds the count down, so that 0 of 4 stay at 0.2."""
    vectors = [v.float() for v in some((10, 10), 3)]
    theirs = peft.ties(vectors, torch.tensor(weights), density)
    assert close(merged("ties", vectors, weights, options={"density": density}), theirs)


def test_a_vote_that_ends_even_goes_to_plus_as_in_peft(peft: Any) -> None:
    vectors = [torch.tensor([1.0, -2.0]), torch.tensor([-1.0, 2.0])]
    theirs = peft.ties(vectors, torch.tensor([1.0, 1.0]), 0.99999)
    assert theirs.tolist() != merged("ties", vectors, [1.0, 1.0], options={"density": 0.99999}).tolist()  # peft keeps 1
    stack = torch.stack(vectors)
    theirs = peft.disjoint_merge(stack, peft.calculate_majority_sign_mask(stack))
    assert merged("ties", vectors, [1.0, 1.0], options={"density": 1.0}).tolist() == theirs.tolist() == [1.0, 2.0]


def test_trimming_is_pefts_magnitude_pruning(peft: Any) -> None:
    vector = normal(10, 10).float()
    theirs = peft.magnitude_prune([vector], torch.tensor([1.0]), 0.3)
    assert torch.equal(merged("ties", [vector], [1.0], options={"density": 0.3}), theirs)
    tied = merged("ties", [torch.ones(10)], [1.0], options={"density": 0.3})  # peft keeps any 3 of them
    assert tied.tolist() == [1.0] * 10


def test_dare_is_pefts_with_the_same_masks(peft: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, weights = [v.float() for v in some((9, 11), 3)], [0.7, -0.3, 1.5]
    for name in ("dare_linear", "dare_ties"):
        masks = iter([(mask("dare", i, (9, 11)) < 0.4).float() for i in range(3)])
        monkeypatch.setattr(torch, "bernoulli", lambda _, masks=masks: next(masks))
        theirs = getattr(peft, name)(vectors, torch.tensor(weights), 0.4)
        assert close(merged(name, vectors, weights, options={"density": 0.4}), theirs)


# Any tensor, any method

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHAPES = [
    (),
    (0,),
    (1,),
    (7,),
    (0, 3),
    (3, 0),
    (1, 1),
    (5, 1),
    (1, 5),
    (9, 11),
    (24, 5),
    (4, 3, 3, 3),
    (3, 2, 1, 1),
    (130,),
]


@pytest.mark.parametrize("name", METHODS)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_tensor_through_any_method(name: str, data: st.DataObject) -> None:
    shape, dtype = data.draw(st.sampled_from(SHAPES)), data.draw(st.sampled_from(DTYPES))
    count = METHODS[name].experts or data.draw(st.integers(1, 4))
    weights = data.draw(st.lists(st.floats(-2, 2), min_size=count, max_size=count))
    size = data.draw(st.sampled_from([0.0, 1e-6, 1.0, 50.0]))
    vectors = [size * v for v in some(shape, count, seed=data.draw(st.integers(0, 99)))]
    if data.draw(st.booleans()):
        vectors[0] = torch.zeros(shape)
    p = parameter(name, vectors, weights, base=normal(*shape, seed=77), dtype=dtype)
    before = [part.value.clone() for part in (p.base, *p.experts)]
    got = function(name)(p).value
    assert got.shape == shape and got.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert got.isfinite().all()
    assert all(torch.equal(a, b.value) for a, b in zip(before, (p.base, *p.experts), strict=True))  # nothing in place
    still = function(name)(replace(p, weights=[0.0] * count)).value
    assert name == "average" or close(still, p.base.value)


@pytest.mark.parametrize("shape", [(40,), (12, 9), (6, 4, 3, 3)])
@pytest.mark.parametrize("name", sorted(set(METHODS) - KEYED))
def test_the_order_of_the_experts_does_not_matter(name: str, shape: tuple[int, ...]) -> None:
    count = num_experts(name)
    p = parameter(name, some(shape, count), [0.7, -0.4, 1.1][:count], base=normal(*shape, seed=77))
    back = replace(p, experts=p.experts[::-1], weights=p.weights[::-1], fisher=p.fisher and p.fisher[::-1])
    assert close(function(name)(p).value, function(name)(back).value, 1e-5)


@pytest.mark.parametrize("shape", [(), (40,), (12, 9), (9, 40), (6, 4, 3, 3)])
@pytest.mark.parametrize("name", ["task_arithmetic", "average", "ties", "slerp", "fisher", "wudi", "tsv"])
def test_equal_experts_with_default_weights_give_that_expert(name: str, shape: tuple[int, ...]) -> None:
    options = {"ties": {"density": 1.0}, "tsv": {"rank": 1.0}}.get(name, {})  # neither claims it of what it removed
    count = num_experts(name)
    weights = METHODS[name].default_weights(count)
    p = parameter(name, [normal(*shape)] * count, weights, base=normal(*shape, seed=77), options=options)
    assert close(function(name)(p).value, p.experts[0].value, 1e-5)


@pytest.mark.parametrize("shape", [(), (5,), (6, 4), (4, 6)])
@pytest.mark.parametrize("name", METHODS)
def test_a_nan_in_an_expert_does_not_vanish(name: str, shape: tuple[int, ...]) -> None:
    vectors = some(shape, num_experts(name))
    vectors[0].view(-1)[-1] = math.nan
    weights = METHODS[name].default_weights(len(vectors))
    assert merged(name, vectors, weights).isnan().any()


@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if row.pointwise])
def test_pointwise_methods_merge_in_slices_what_they_merge_whole(name: str) -> None:
    p = parameter(name, some((50,), 3), [0.7, -0.4, 1.1], base=normal(50, seed=77))
    sizes = [magnitudes(p.base.value, expert.value) for expert in p.experts]
    thresholds = [thresholds_of(name)(size, p.options) for size in sizes] if METHODS[name].thresholds else None

    def part(where: slice) -> torch.Tensor:
        experts = [Weight(expert.value[where]) for expert in p.experts]
        fisher = p.fisher and [information[where] for information in p.fisher]
        piece = replace(p, base=Weight(p.base.value[where]), experts=experts, fisher=fisher)
        return function(name)(replace(piece, thresholds=thresholds, first=where.start)).value

    assert torch.equal(function(name)(p).value, torch.cat([part(slice(0, 13)), part(slice(13, 50))]))


@pytest.mark.parametrize("name", METHODS)
def test_experts_of_other_dtypes_are_merged_in_the_widest(name: str) -> None:
    p = parameter(name, some((6, 5), num_experts(name)), METHODS[name].default_weights(num_experts(name)))
    mixed = [Weight(expert.value.to(dtype)) for expert, dtype in zip(p.experts, DTYPES[1:], strict=False)]
    got = function(name)(replace(p, experts=mixed)).value
    assert got.isfinite().all() and got.dtype == (torch.float64 if len(mixed) == 3 else torch.float32)


@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if row.weighted])
@pytest.mark.parametrize("shape", [(6, 5), (7,)])
def test_multiples_of_the_weights_make_the_same_where_only_ratios_count(name: str, shape: tuple[int, ...]) -> None:
    weights, vectors = [0.2, -0.3, 0.4][: num_experts(name)], some(shape, num_experts(name))
    one, double = (merged(name, vectors, [factor * w for w in weights], dtype=torch.float64) for factor in (1.0, 2.0))
    assert close(one, double) == METHODS[name].relative
