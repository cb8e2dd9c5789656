"""Merging is Eq. 8 to the bit where it can be, folds after it has merged, and leaves what stock diffusers loads."""

import json
import math
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from conftest import component, make_pico_denoiser
from deme_diffusion.config import MethodOptions
from deme_diffusion.errors import UserError
from deme_diffusion.merging.apply import Merger
from deme_diffusion.merging.checkpoints import locate
from deme_diffusion.merging.methods import Parameter, function
from deme_diffusion.merging.selection import MergeWeights
from deme_diffusion.merging.table import METHODS
from deme_diffusion.merging.vectors import TaskVector, Weight, interpolate
from deme_diffusion.merging.write import METADATA_KEY, write_into, write_merged
from deme_diffusion.models import projection
from deme_diffusion.models.ddpm import DDPM
from deme_diffusion.models.placement import residual_places
from deme_diffusion.models.projection import Projected, attach, attached, fold
from deme_diffusion.weights import WEIGHTS_NAME, State, Weights, save_state, state_digest


def perturbed(state: State, seed: int, size: float = 1e-2) -> State:
    random = torch.Generator().manual_seed(seed)
    return {key: value + size * torch.randn(value.shape, generator=random) for key, value in state.items()}


def written(folder: Path) -> State:
    with Weights(folder) as opened:
        return {key: opened.tensor(key).clone() for key in opened.keys()}  # noqa: SIM118


def assert_close(found: State, expected: State, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}")


@pytest.fixture(scope="module")
def base_state() -> State:
    return {key: value.detach().clone() for key, value in make_pico_denoiser().module.state_dict().items()}


@pytest.fixture(scope="module")
def places() -> list[str]:
    return residual_places(make_pico_denoiser().module)


@pytest.fixture(scope="module")
def states(base_state: State) -> list[State]:
    return [perturbed(base_state, seed) for seed in (1, 2, 3)]


@pytest.fixture(scope="module")
def matrices(base_state: State, places: list[str]) -> list[State]:
    """D of the first and the third expert; the second one trained without a projection."""

    def drawn(seed: int) -> State:
        random = torch.Generator().manual_seed(seed)
        width = {place: len(base_state[f"{place}.weight"]) for place in places}
        return {place: 1e-1 * torch.randn(n, n, generator=random) for place, n in width.items()}

    return [drawn(11), {}, drawn(13)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, base_state: State) -> Path:
    return component(tmp_path_factory.mktemp("base") / "unet", base_state)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory, states: list[State]) -> list[Path]:
    return [component(tmp_path_factory.mktemp("expert") / "unet", state) for state in states]


@pytest.fixture(scope="module")
def projected(tmp_path_factory: pytest.TempPathFactory, states: list[State], matrices: list[State]) -> list[Path]:
    folders = [component(tmp_path_factory.mktemp("projected") / "unet", state) for state in states]
    for folder, own in zip(folders, matrices, strict=True):
        projection.save(folder, own)
    return folders


def eq8(base: State, experts: Sequence[State], weights: Sequence[float]) -> State:
    """theta + sum_i w_i (theta_i - theta), in float64 and in the order of the paper."""
    merged = {key: value.double() for key, value in base.items()}
    for expert, weight in zip(experts, weights, strict=True):
        merged = {key: value + weight * (expert[key].double() - base[key].double()) for key, value in merged.items()}
    return merged


def as_double(state: State) -> State:
    return {key: value.double() for key, value in state.items()}


# types


def test_weight_minus_weight_is_a_task_vector_and_added_to_the_base_gives_the_expert() -> None:
    base, expert = Weight(torch.tensor([1.0, 2.0])), Weight(torch.tensor([1.5, 1.0]))
    tau = expert - base
    assert isinstance(tau, TaskVector)
    assert tau.value.tolist() == [0.5, -1.0]
    total = base + 2 * (tau + tau) * 0.5
    assert isinstance(total, Weight)
    assert total.value.tolist() == [2.0, 0.0]


@pytest.mark.parametrize(
    "operation",
    [
        "weight + weight",
        "vector - vector",
        "vector - weight",
        "weight - vector",
        "vector + weight",
        "weight * 2.0",
        "2.0 * weight",
        "weight + 1.0",
        "weight - 1.0",
        "vector + 1.0",
        "vector * vector",
        "weight + tensor",
        "vector * tensor",
    ],
)
def test_any_other_combination_is_a_type_error(operation: str) -> None:
    values = {"tensor": torch.ones(2), "weight": Weight(torch.ones(2)), "vector": TaskVector(torch.ones(2))}
    with pytest.raises(TypeError):
        eval(operation, {}, values)


def test_half_precision_differences_are_taken_in_float32_and_double_ones_in_float64() -> None:
    half = Weight(torch.tensor([1.0], dtype=torch.bfloat16)), Weight(torch.tensor([1.0078125], dtype=torch.bfloat16))
    assert (half[1] - half[0]).value.dtype == torch.float32
    double = [Weight(torch.tensor([x], dtype=torch.float64)) for x in (1.0, 1.0 + 1e-12)]
    assert (double[1] - double[0]).value.item() == pytest.approx(1e-12, rel=1e-3)


# Eq. 8


def test_golden_two_by_two_with_weights_that_do_not_sum_to_one() -> None:
    base = Weight(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    first = Weight(torch.tensor([[2.0, 2.0], [3.0, 0.0]]))
    second = Weight(torch.tensor([[1.0, 0.0], [7.0, 4.0]]))
    # tau_1 = [[1, 0], [0, -4]], tau_2 = [[0, -2], [4, 0]]; w = (0.5, 0.25).
    merged = interpolate(base, [first, second], [0.5, 0.25]).value
    assert merged.tolist() == [[1.5, 1.5], [4.0, 2.0]]


def test_negative_weights_and_weights_above_one_extrapolate() -> None:
    base, expert = Weight(torch.tensor([1.0])), Weight(torch.tensor([2.0]))
    assert interpolate(base, [expert], [2.0]).value.item() == 3.0
    assert interpolate(base, [expert], [-1.0]).value.item() == 0.0


def test_weights_that_sum_to_one_only_but_for_rounding_leave_no_trace_of_the_base() -> None:
    huge, ones = Weight(torch.tensor([1e30])), [Weight(torch.ones(1))] * 10
    assert interpolate(huge, ones, [0.1] * 10).value.item() == pytest.approx(1.0)


def test_zero_weights_give_the_base_to_the_bit(base: Path, projected: list[Path], base_state: State) -> None:
    with Merger(base, projected) as merger:
        assert state_digest(merger.state([0.0, 0.0, 0.0])) == state_digest(base_state)


@pytest.mark.parametrize("i", [0, 1, 2])
def test_one_hot_weights_give_that_expert_to_the_bit(
    base: Path, experts: list[Path], states: list[State], i: int
) -> None:
    with Merger(base, experts) as merger:
        assert state_digest(merger.state([float(j == i) for j in range(3)])) == state_digest(states[i])


def test_one_hot_keeps_the_sign_of_zero_and_ignores_a_base_that_overflowed() -> None:
    base, expert = Weight(torch.tensor([1.0, math.inf])), Weight(torch.tensor([-0.0, 2.0]))
    merged = interpolate(base, [expert], [1.0]).value
    assert merged.tolist() == [0.0, 2.0]
    assert torch.signbit(merged).tolist() == [True, False]


@pytest.mark.parametrize("i", [0, 1, 2])
def test_one_hot_weights_give_the_folded_expert_to_the_bit(
    base: Path, projected: list[Path], states: list[State], matrices: list[State], i: int
) -> None:
    with Merger(base, projected) as merger:
        merged = merger.state([float(j == i) for j in range(3)])
    assert state_digest(merged) == state_digest(fold(states[i], matrices[i]))


def test_merged_model_is_eq_8_of_the_experts(
    base: Path, experts: list[Path], base_state: State, states: list[State]
) -> None:
    weights = [0.1, 0.5, -0.3]
    with Merger(base, experts) as merger:
        merged = merger.state(weights)
    assert_close(as_double(merged), eq8(base_state, states, weights), 1e-6)


def test_order_of_the_experts_does_not_matter(base: Path, projected: list[Path]) -> None:
    weights = [0.1, 0.5, 0.3]
    with Merger(base, projected) as merger, Merger(base, projected[::-1]) as reversed_merger:
        assert_close(merger.state(weights), reversed_merger.state(weights[::-1]), 1e-6)


def test_merged_tensors_keep_the_dtype_of_the_base(tmp_path: Path) -> None:
    dtypes = {"half": torch.float16, "brain": torch.bfloat16, "single": torch.float32, "double": torch.float64}
    base = component(tmp_path / "base", {key: torch.full((2,), 1.0, dtype=dtype) for key, dtype in dtypes.items()})
    expert = component(tmp_path / "expert", {key: torch.full((2,), 2.0) for key in dtypes})
    with Merger(base, [expert]) as merger:
        merged = merger.state([0.5])
    assert {key: value.dtype for key, value in merged.items()} == dtypes
    assert all(value.tolist() == [1.5, 1.5] for value in merged.values())


def test_double_precision_is_not_lost(tmp_path: Path) -> None:
    exact = {"w": torch.tensor([1.0 + 2**-40], dtype=torch.float64)}
    base = component(tmp_path / "base", exact)
    with Merger(base, [component(tmp_path / "expert", {"w": exact["w"] + 2**-41})]) as merger:
        assert merger.state([0.0])["w"].item() == exact["w"].item()
        assert merger.state([1.0])["w"].item() == exact["w"].item() + 2**-41


def test_buffers_of_whole_numbers_stay_the_base_s(tmp_path: Path) -> None:
    state = {"ids": torch.tensor([0, 7, 2**40 + 1]), "flag": torch.tensor([True]), "w": torch.ones(1)}
    base, expert = component(tmp_path / "base", state), component(tmp_path / "expert", state)
    with Merger(base, [expert]) as merger:
        merged = merger.state([0.4])
    assert merged["ids"].tolist() == [0, 7, 2**40 + 1]
    assert merged["flag"].tolist() == [True]


# projections


def by_hand(base: State, states: list[State], matrices: list[State], weights: list[float]) -> State:
    """K' = (I + sum_i w_i D_i) (K + sum_i w_i tau_i), and b' likewise, in float64."""
    merged = eq8(base, states, weights)
    for place in matrices[0]:
        n = len(merged[f"{place}.weight"])
        p = torch.eye(n, dtype=torch.float64)
        for weight, own in zip(weights, matrices, strict=True):
            p = p + weight * own.get(place, torch.zeros(n, n)).double()
        kernel = merged[f"{place}.weight"]
        merged[f"{place}.weight"] = torch.einsum("oc,c...->o...", p, kernel)
        merged[f"{place}.bias"] = p @ merged[f"{place}.bias"]
    return merged


def test_projections_are_merged_and_then_folded(
    base: Path, projected: list[Path], base_state: State, states: list[State], matrices: list[State]
) -> None:
    weights = [0.3, 0.2, 0.6]
    with Merger(base, projected) as merger:
        merged = as_double(merger.state(weights))
    assert_close(merged, by_hand(base_state, states, matrices, weights), 1e-6)


def test_merging_folded_experts_would_be_another_model(
    base: Path, projected: list[Path], base_state: State, states: list[State], matrices: list[State], places: list[str]
) -> None:
    weights = [0.3, 0.2, 0.6]
    with Merger(base, projected) as merger:
        merged = as_double(merger.state(weights))
    folded_first = eq8(base_state, [fold(s, m) for s, m in zip(states, matrices, strict=True)], weights)
    kernels = [f"{place}.weight" for place in places]
    gap = max(float((merged[k] - folded_first[k]).abs().max() / merged[k].abs().max()) for k in kernels)
    assert gap > 1e-3
    assert_close({k: merged[k] for k in merged if k.rpartition(".")[0] not in places},
                 {k: folded_first[k] for k in merged if k.rpartition(".")[0] not in places}, 1e-6)  # fmt: skip


def test_other_methods_take_projections_as_parameters_of_their_own(
    base: Path, projected: list[Path], base_state: State, matrices: list[State], places: list[str]
) -> None:
    with Merger(base, projected, "ties", MethodOptions(density=0.5)) as merger:
        merged = merger.state([0.3, 0.2, 0.6])
    with Merger(base, [component_without(folder) for folder in projected], "ties", MethodOptions(density=0.5)) as plain:
        unfolded = plain.state([0.3, 0.2, 0.6])
    ties = function("ties")
    for place in places:
        zeros = torch.zeros_like(matrices[0][place])
        given = [Weight(own.get(place, zeros)) for own in matrices]
        d = ties(Parameter("d", Weight(zeros), given, [0.3, 0.2, 0.6], MethodOptions(density=0.5, trim="tensor"))).value
        expected = fold({f"{place}.weight": unfolded[f"{place}.weight"]}, {place: d})
        assert torch.equal(merged[f"{place}.weight"], expected[f"{place}.weight"])


def component_without(folder: Path) -> Path:
    """A copy of an expert without its projections."""
    copy = shutil.copytree(folder, folder.with_name("plain"), dirs_exist_ok=True)
    (copy / projection.FILE).unlink(missing_ok=True)
    return copy


def test_a_kept_tensor_is_its_expert_s_folded_one_and_one_kept_from_the_base_is_the_base_s(
    base: Path, projected: list[Path], base_state: State, states: list[State], matrices: list[State], places: list[str]
) -> None:
    key, other = f"{places[0]}.weight", f"{places[1]}.weight"
    with Merger(base, projected) as merger:
        merged = merger.state(MergeWeights((0.3, 0.2, 0.6), keep={f"{places[0]}.*": 2, f"{places[1]}.*": "base"}))
    assert torch.equal(merged[key], fold(states[2], matrices[2])[key])
    assert torch.equal(merged[other], base_state[other])


def test_projection_of_a_place_that_the_base_lacks_is_a_user_error(
    tmp_path: Path, base: Path, states: list[State], places: list[str]
) -> None:
    expert = component(tmp_path / "unet", states[0])
    projection.save(expert, {places[0] + "x": torch.zeros(4, 4)})
    with pytest.raises(UserError, match=f"is no operation or block of .*did you mean '{places[0]}'"):
        Merger(base, [expert])


def test_projection_of_the_wrong_width_is_a_user_error(
    tmp_path: Path, base: Path, states: list[State], places: list[str]
) -> None:
    expert = component(tmp_path / "unet", states[0])
    projection.save(expert, {places[0]: torch.zeros(3, 3)})
    with pytest.raises(UserError, match=r"is \(3, 3\), but .* has 4 channels there"):
        Merger(base, [expert])


# the paper's placement: what folds, and the rest


def drawn_for_blocks(seed: int) -> State:
    random = torch.Generator().manual_seed(seed)
    width = {"down_blocks.0": 4, "down_blocks.1": 8, "mid_block": 8, "up_blocks.0": 8, "up_blocks.1": 4}
    return {place: 1e-1 * torch.randn(n, n, generator=random) for place, n in width.items()}


REST = ["down_blocks.0", "down_blocks.1", "mid_block"]


@pytest.fixture(scope="module")
def block_matrices() -> list[State]:
    return [drawn_for_blocks(21), {}, drawn_for_blocks(23)]


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory, states: list[State], block_matrices: list[State]) -> list[Path]:
    folders = [component(tmp_path_factory.mktemp("blocks") / "unet", state) for state in states]
    for folder, own in zip(folders, block_matrices, strict=True):
        projection.save(folder, own)
    return folders


def asked(module: nn.Module) -> torch.Tensor:
    x = torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8).to(next(module.parameters()).dtype)
    with torch.no_grad():
        answer: torch.Tensor = module(x, torch.tensor([3, 15])).sample
    return answer


def attached_by_hand(base: State, states: list[State], matrices: list[State], weights: list[float]) -> torch.Tensor:
    """What theta + sum_i w_i tau_i with P = I + sum_i w_i D_i after every block answers, in float64 and by hooks."""
    module = make_pico_denoiser().module.double()
    module.load_state_dict(eq8(base, states, weights))
    projected = Projected(module.eval(), "block")
    for place, matrix in zip(projected.projection.places, projected.projection.matrices, strict=True):
        own = [w * m[place].double() for w, m in zip(weights, matrices, strict=True) if place in m]
        matrix.data = torch.stack(own).sum(0)
    return asked(projected)


def test_block_projections_are_merged_then_folded_or_kept(
    base: Path, blocks: list[Path], base_state: State, states: list[State], block_matrices: list[State]
) -> None:
    weights = [0.3, 0.2, 0.6]
    expected = attached_by_hand(base_state, states, block_matrices, weights)
    with Merger(base, blocks) as merger:
        merged = merger.into(make_pico_denoiser().module.eval(), weights)
        assert sorted(merger.unfolded(weights)) == REST
    assert sorted(attached(merged)) == REST
    assert (asked(merged).double() - expected).abs().max() < 1e-5 * expected.abs().max()
    stock = make_pico_denoiser().module.eval()
    stock.load_state_dict(merged.state_dict())
    assert (asked(stock).double() - expected).abs().max() > 1e-2 * expected.abs().max()


def test_projections_in_double_precision_are_exact(
    tmp_path: Path, base_state: State, states: list[State], block_matrices: list[State]
) -> None:
    base = component(tmp_path / "base", as_double(base_state))
    experts = [component(tmp_path / str(i), as_double(state)) for i, state in enumerate(states)]
    for folder, own in zip(experts, block_matrices, strict=True):
        projection.save(folder, as_double(own))
    expected = attached_by_hand(base_state, states, block_matrices, [0.3, 0.2, 0.6])
    with Merger(base, experts) as merger:
        merged = merger.into(make_pico_denoiser().module.double().eval(), [0.3, 0.2, 0.6])
    assert (asked(merged) - expected).abs().max() < 1e-12 * expected.abs().max()


def test_a_shell_follows_the_weights_forth_and_back(base: Path, blocks: list[Path]) -> None:
    shell, plain = make_pico_denoiser().module.eval(), asked(make_pico_denoiser().module.eval())
    with Merger(base, blocks) as merger:
        first = asked(merger.into(shell, [0.3, 0.2, 0.6]))
        assert not torch.equal(asked(merger.into(shell, [0.0, 0.2, 0.6])), first)
        assert torch.equal(asked(merger.into(shell, [0.0, 0.0, 0.0])), plain)
        assert torch.equal(asked(merger.into(shell, [0.3, 0.2, 0.6])), first)


def test_what_does_not_fold_is_written_beside_the_weights_with_the_recipe_and_said(
    tmp_path: Path, base: Path, blocks: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    weights, recipe = [0.3, 0.2, 0.6], {"experts": ["aa", "bb", "cc"]}
    with Merger(base, blocks) as merger:
        write_merged(merger, weights, tmp_path, recipe=recipe)
        rest = projection.load(tmp_path)
        assert state_digest(rest) == state_digest(merger.unfolded(weights))
        assert state_digest(written(tmp_path)) == state_digest(merger.state(weights))
    with safe_open(tmp_path / projection.FILE, framework="pt") as file:
        assert json.loads(file.metadata()[METADATA_KEY]) == {**recipe, "weights": weights}
    assert sorted(rest) == REST
    assert "stock diffusers loads the model without them" in caplog.text


@pytest.mark.parametrize("weights", [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
def test_without_a_matrix_of_weight_no_file_is_left_not_even_an_older_merge_s(
    tmp_path: Path, base: Path, blocks: list[Path], weights: list[float]
) -> None:
    with Merger(base, blocks) as merger:
        write_merged(merger, [0.3, 0.2, 0.6], tmp_path)
        assert (tmp_path / projection.FILE).exists()
        write_merged(merger, weights, tmp_path)
    assert not (tmp_path / projection.FILE).exists()


def test_an_operation_s_and_a_block_s_projections_are_folded_in_the_order_in_which_they_act(
    tmp_path: Path, base: Path, base_state: State, states: list[State], matrices: list[State]
) -> None:
    of_operation, of_block = matrices[0], {"up_blocks.0": drawn_for_blocks(21)["up_blocks.0"]}
    folders = [component(tmp_path / str(i), states[i]) for i in range(2)]
    projection.save(folders[0], of_operation)
    projection.save(folders[1], of_block)
    with Merger(base, folders) as merger:
        merged = merger.into(make_pico_denoiser().module.eval(), [0.5, 0.8])
    hooked = make_pico_denoiser().module.double().eval()
    hooked.load_state_dict(eq8(base_state, states[:2], [0.5, 0.8]))
    attach(hooked, {k: 0.5 * v for k, v in of_operation.items()} | {k: 0.8 * v for k, v in of_block.items()})
    assert (asked(merged).double() - asked(hooked)).abs().max() < 1e-5 * asked(hooked).abs().max()


def test_a_base_with_projections_beside_it_is_a_user_error(blocks: list[Path], experts: list[Path]) -> None:
    with pytest.raises(UserError, match="a base must be whole without projections"):
        Merger(blocks[0], experts)


def test_non_finite_matrix_that_does_not_fold_is_a_user_error(tmp_path: Path, base: Path, states: list[State]) -> None:
    expert = component(tmp_path / "unet", states[0])
    projection.save(expert, {"mid_block": torch.full((8, 8), math.inf)})
    with Merger(base, [expert]) as merger, pytest.raises(UserError, match=r"projection.*: mid_block: .* not finite"):
        merger.unfolded([0.5])


# refusals


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_expert_is_a_user_error_that_names_the_tensor(
    tmp_path: Path, base: Path, states: list[State], bad: float
) -> None:
    broken = {key: value.clone() for key, value in states[0].items()}
    broken["conv_in.bias"][1] = bad
    with Merger(base, [component(tmp_path / "unet", broken)]) as merger:
        with pytest.raises(UserError, match=r"conv_in\.bias: the merged tensor is not finite: NaN or .* in .*unet"):
            merger.state([0.5])
        assert torch.isfinite(merger.tensor("conv_in.weight", [0.5])).all()
        with pytest.raises(UserError, match=r"conv_in\.bias"):
            write_merged(merger, [0.5], tmp_path / "out")


def test_non_finite_projection_is_a_user_error_that_names_the_tensor(
    tmp_path: Path, base: Path, states: list[State], matrices: list[State], places: list[str]
) -> None:
    expert = component(tmp_path / "unet", states[0])
    projection.save(expert, {places[0]: matrices[0][places[0]] * math.nan})
    message = f"{places[0]}.*not finite: NaN or infinity in {expert}/projection"
    with Merger(base, [expert]) as merger, pytest.raises(UserError, match=message):
        merger.state([0.5])


def test_overflow_of_half_precision_is_a_user_error(tmp_path: Path) -> None:
    states = [{"w": torch.tensor([value], dtype=torch.float16)} for value in (1.0, 60000.0)]
    base, expert = (component(tmp_path / str(i), state) for i, state in enumerate(states))
    with Merger(base, [expert]) as merger, pytest.raises(UserError, match=r"w: .*not finite: too large for float16"):
        merger.state([2.0])


@pytest.mark.parametrize("weights", [[], [1.0, 0.0], [0.1] * 4])
def test_wrong_number_of_weights_is_a_user_error(
    tmp_path: Path, base: Path, experts: list[Path], weights: list[float]
) -> None:
    with Merger(base, experts) as merger:
        with pytest.raises(UserError, match=f"weights: {len(weights)} given for 3 experts"):
            merger.state(weights)
        with pytest.raises(UserError, match="weights"):
            write_merged(merger, weights, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_expert_of_another_architecture_is_a_user_error(tmp_path: Path, base: Path, states: list[State]) -> None:
    wider = {**states[0], "conv_in.weight": torch.zeros(8, 1, 3, 3)}
    with pytest.raises(UserError, match=r"conv_in\.weight has shape \(8, 1, 3, 3\)"):
        Merger(base, [component(tmp_path / "wider", wider)])
    fewer = {key: value for key, value in states[0].items() if key != "conv_in.weight"}
    with pytest.raises(UserError, match=r"1 missing \(conv_in\.weight\)"):
        Merger(base, [component(tmp_path / "fewer", fewer)])


def test_unknown_method_is_a_user_error_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match="did you mean 'task_arithmetic'"):
        function("task_arithmetics")


def test_every_method_cites_its_source() -> None:
    assert all(("arXiv" in row.source or "doi" in row.source) for row in METHODS.values())


# files


def test_written_model_equals_the_one_merged_in_memory(tmp_path: Path, base: Path, projected: list[Path]) -> None:
    weights = [0.3, 0.2, 0.6]
    with Merger(base, projected) as merger:
        write_merged(merger, weights, tmp_path / "out")
        assert state_digest(written(tmp_path / "out")) == state_digest(merger.state(weights))
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_sharded_base_gives_a_sharded_model_equal_to_the_unsharded(
    tmp_path: Path, base: Path, projected: list[Path], base_state: State
) -> None:
    sharded = component(tmp_path / "sharded", base_state, shards=3)
    for source, name in ((base, "one"), (sharded, "three")):
        with Merger(source, projected) as merger:
            write_merged(merger, [0.3, 0.2, 0.6], tmp_path / name)
    assert state_digest(written(tmp_path / "three")) == state_digest(written(tmp_path / "one"))
    with Weights(tmp_path / "three") as ours, Weights(sharded) as theirs:
        assert len(ours.files) == 3
        assert {n: sorted(k) for n, k in ours.layout().items()} == {n: sorted(k) for n, k in theirs.layout().items()}


def test_mixed_dtypes_are_written_so_that_safetensors_reads_them(tmp_path: Path) -> None:
    state = {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(2), "c": torch.ones(1, dtype=torch.float16),
             "d": torch.ones(1, dtype=torch.float64), "e": torch.tensor(True)}  # fmt: skip
    base = component(tmp_path / "base", state)
    with Merger(base, [base]) as merger:
        write_merged(merger, [0.5], tmp_path / "out")
    assert state_digest(load_file(tmp_path / "out" / WEIGHTS_NAME)) == state_digest(state)


def test_every_shard_carries_the_weights_and_the_recipe(tmp_path: Path, base_state: State, experts: list[Path]) -> None:
    sharded = component(tmp_path / "sharded", base_state, shards=2)
    recipe = {"method": "task_arithmetic", "experts": ["aa", "bb", "cc"], "source": "uniform"}
    with Merger(sharded, experts) as merger:
        write_merged(merger, [0.3, 0.2, 0.6], tmp_path / "out", recipe=recipe)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == 2
    for path in files:
        with safe_open(path, framework="pt") as file:
            assert file.metadata()["format"] == "pt"
            assert json.loads(file.metadata()[METADATA_KEY]) == {**recipe, "weights": [0.3, 0.2, 0.6]}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_interrupted_merge_leaves_no_model_under_the_final_name(
    tmp_path: Path, base: Path, experts: list[Path], monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    real, done, threads = Merger.part, list[str](), threading.active_count()

    def failing(self: Merger, key: str, *others: Any) -> torch.Tensor:
        done.append(key)
        if len(done) == 10:
            raise error
        return real(self, key, *others)

    monkeypatch.setattr(Merger, "part", failing)
    with Merger(base, experts) as merger, pytest.raises(error):
        write_merged(merger, [0.1, 0.1, 0.1], tmp_path / "out")
    assert 10 <= len(done) < len(merger.keys())  # other threads may have been at work on a few
    assert not list((tmp_path / "out").iterdir())
    assert threading.active_count() == threads


def test_interrupted_merge_over_an_older_model_keeps_the_older(
    tmp_path: Path, base: Path, experts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Merger(base, experts) as merger:
        write_merged(merger, [1.0, 0.0, 0.0], tmp_path / "out")
        before = state_digest(written(tmp_path / "out"))
        monkeypatch.setattr(merger, "part", lambda key, *_: torch.ones(merger.base.shape(key)).flatten()[:0])
        with pytest.raises(ValueError):
            write_merged(merger, [0.0, 1.0, 0.0], tmp_path / "out")
    assert state_digest(written(tmp_path / "out")) == before


# the pipeline folder


@pytest.fixture(scope="module")
def expert_of_pipeline(tmp_path_factory: pytest.TempPathFactory, pico_pipeline: Path, matrices: list[State]) -> Path:
    folder = tmp_path_factory.mktemp("expert") / "unet"
    folder.mkdir()
    shutil.copy(pico_pipeline / "unet" / "config.json", folder)
    save_state(folder / WEIGHTS_NAME, perturbed(load_file(pico_pipeline / "unet" / WEIGHTS_NAME), 5))
    projection.save(folder, matrices[0])
    return folder


@pytest.fixture(scope="module")
def merged_pipeline(tmp_path_factory: pytest.TempPathFactory, pico_pipeline: Path, expert_of_pipeline: Path) -> Path:
    # The base may be a stage of ours, in whose folder more lies than the model.
    base, out = tmp_path_factory.mktemp("base") / "pipeline", tmp_path_factory.mktemp("out") / "merged"
    shutil.copytree(pico_pipeline, base)
    shutil.copytree(base / "unet", base / "raw")
    (base / "manifest.json").write_text("{}")
    (base / "loss.jsonl").write_text("")
    with Merger(base / "unet", [expert_of_pipeline]) as merger:
        write_into(merger, [0.5], locate(base, what="base"), out)
    return out


def test_merged_pipeline_holds_the_parts_of_the_base_s_and_nothing_else(
    merged_pipeline: Path, pico_pipeline: Path
) -> None:
    def names(folder: Path) -> set[str]:
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}

    assert names(merged_pipeline) == names(pico_pipeline)
    same = [name for name in names(pico_pipeline) if name.endswith(".json")]
    assert len(same) == 3
    for name in same:
        assert json.loads((merged_pipeline / name).read_text()) == json.loads((pico_pipeline / name).read_text())


def test_merged_pipeline_has_exactly_the_keys_and_the_parameter_count_of_the_base(
    merged_pipeline: Path, pico_pipeline: Path
) -> None:
    ours, theirs = written(merged_pipeline / "unet"), written(pico_pipeline / "unet")
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}
    assert sum(v.numel() for v in ours.values()) == sum(v.numel() for v in theirs.values())
    assert state_digest(ours) != state_digest(theirs)


ALONE = """
    import json, sys

    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "deme_diffusion":
                raise ImportError("blocked: " + name)

    sys.meta_path.insert(0, Blocked())
    try:
        import deme_diffusion
    except ImportError as error:
        assert "blocked" in str(error)
    else:
        raise SystemExit("deme_diffusion can be imported")

    import torch
    from diffusers import DDPMPipeline

    pipeline = DDPMPipeline.from_pretrained(sys.argv[1])
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=2, generator=torch.Generator().manual_seed(0), num_inference_steps=3, output_type="np")
    x = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
    with torch.no_grad():
        answer = pipeline.unet(x, 3).sample
    print(json.dumps({"shape": images.images.shape, "answer": answer.flatten().tolist()}))
"""


def test_stock_diffusers_loads_and_samples_the_merged_folder_where_this_package_cannot_be_imported(
    merged_pipeline: Path,
) -> None:
    command = [sys.executable, "-c", textwrap.dedent(ALONE), str(merged_pipeline)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["shape"] == [2, 8, 8, 1]
    denoiser = DDPM.load(merged_pipeline)
    with torch.no_grad():
        expected = denoiser.predict(denoiser.module, torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8), torch.tensor(3), {})
    torch.testing.assert_close(torch.tensor(said["answer"]), expected.flatten(), rtol=0, atol=1e-5)
