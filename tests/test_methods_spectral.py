"""TSV, Iso-C and WUDI: arrays by hand, the papers' formulas in plain numpy, and the time that is told beforehand."""

import math
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch

from deme_diffusion.merging.estimate import spectral_cost, tsv_rank
from deme_diffusion.merging.methods import function
from deme_diffusion.merging.methods.spectral import estimated_seconds
from test_methods import close, merged, normal, parameter, some

Array = npt.NDArray[np.float64]
SHAPES = [(12, 30), (30, 12), (16, 16), (6, 4, 3, 3), (24, 2, 1, 1)]
WEIGHTS = [0.7, -0.4, 1.1]


def matrices(shape: Sequence[int], count: int = 3) -> list[Array]:
    """Task vectors as the method sees them: through float32, in two dimensions."""
    return [v.float().double().flatten(1).numpy() for v in some(tuple(shape), count)]


# By hand


def test_tsv_keeps_orthogonal_experts_as_they_are() -> None:
    first, second = np.diag([3.0, 0, 0, 0]), np.diag([0, 0, 0, 2.0])
    assert close(merged("tsv", [first, second], [1.0, 0.5]), np.diag([3.0, 0, 0, 1.0]))


def test_tsv_decorrelates_what_interferes() -> None:
    """u_1 = e1, u_2 = (0.6, 0.8), one right vector each: the nearest orthonormal pair is turned by half the overlap."""
    first, second = np.outer([1.0, 0], [1.0, 0]), np.outer([0.6, 0.8], [0.0, 1.0])
    half = (math.pi / 2 - math.acos(0.6)) / 2  # each vector gives way by as much as the other
    u1 = np.array([math.cos(-half), math.sin(-half)])
    u2 = np.array([math.sin(half), math.cos(half)])
    expected = np.outer(u1, [1, 0]) + np.outer(u2, [0, 1])
    assert close(merged("tsv", [first, second], [1.0, 1.0]), expected)


def test_iso_c_makes_singular_values_equal() -> None:
    assert close(
        merged("iso_c", [[[3.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, -1.0]]], [1.0, 1.0]), [[2, 0], [0, -2.0]]
    )
    assert close(merged("iso_c", [[[3.0, 4.0], [6.0, 8.0]]], [1.0]), [[3.0, 4.0], [6.0, 8.0]])  # one singular value


def test_wudi_keeps_experts_that_share_no_input_whole() -> None:
    first, second = [[1.0, 2.0, 0.0], [0.0, 3.0, 0.0]], [[0.0, 0.0, 5.0], [0.0, 0.0, -1.0]]
    assert close(merged("wudi", [first, second], [1.0, 1.0]), [[1.0, 2.0, 5.0], [0.0, 3.0, -1.0]])


def test_wudi_of_one_shared_input_is_a_weighted_mean() -> None:
    """Columns: A_i = 1, so m = sum w_i tau_i / sum |w_i|."""
    first, second = [[2.0], [4.0]], [[6.0], [-8.0]]
    assert close(merged("wudi", [first, second], [1.0, 3.0]), [[5.0], [-5.0]])
    assert close(merged("wudi", [first, second], [1.0, -3.0]), [[-4.0], [7.0]])


@pytest.mark.parametrize(("name", "factor"), [("tsv", 1 / 2), ("iso_c", 1 / 2), ("wudi", 1 / 4)])
def test_a_bias_is_averaged(name: str, factor: float) -> None:
    assert close(
        merged(name, [[1.0, 2.0], [4.0, -6.0]], [1.0, 3.0], base=[1.0, 1.0]), [1 + 13 * factor, 1 - 16 * factor]
    )


# The papers' formulas


def tsv_by_svd(taus: list[Array], weights: Sequence[float], rank: float | None) -> Array:
    k = tsv_rank(min(taus[0].shape), len(taus), rank)
    parts = [np.linalg.svd(tau, full_matrices=False) for tau in taus]
    u, v = (np.linalg.svd(np.concatenate(side, 1), full_matrices=False) for side in
            ([u[:, :k] for u, _, _ in parts], [vt[:k].T for _, _, vt in parts]))  # fmt: skip
    s = np.concatenate([w * s[:k] for w, (_, s, _) in zip(weights, parts, strict=True)])
    return (u[0] @ u[2]) * s @ (v[0] @ v[2]).T


def iso_c_by_svd(taus: list[Array], weights: Sequence[float]) -> Array:
    u, s, vt = np.linalg.svd(sum(w * tau for w, tau in zip(weights, taus, strict=True)), full_matrices=False)
    return s.mean() * u @ vt


def wudi_by_pinv(taus: list[Array], weights: Sequence[float]) -> Array:
    a = [tau.T @ tau / (tau**2).sum() for tau in taus]
    right = sum(w * tau @ own for w, tau, own in zip(weights, taus, a, strict=True))
    return right @ np.linalg.pinv(sum(abs(w) * own for w, own in zip(weights, a, strict=True)), rcond=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [None, 0.2, 0.8, 1.0])
def test_tsv_is_its_formula(shape: tuple[int, ...], rank: float | None) -> None:
    got = merged("tsv", some(shape, 3), WEIGHTS, options={"rank": rank})
    assert close(got.flatten(1), tsv_by_svd(matrices(shape), WEIGHTS, rank), 1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_iso_c_is_its_formula(shape: tuple[int, ...]) -> None:
    assert close(merged("iso_c", some(shape, 3), WEIGHTS).flatten(1), iso_c_by_svd(matrices(shape), WEIGHTS), 1e-5)


@pytest.mark.parametrize("shape", [*SHAPES, (5, 15), (5, 16)])
def test_wudi_is_its_formula(shape: tuple[int, ...]) -> None:
    assert close(merged("wudi", some(shape, 3), WEIGHTS).flatten(1), wudi_by_pinv(matrices(shape), WEIGHTS), 1e-4)


@pytest.mark.parametrize("shape", [(5, 30), (30, 12)])
def test_wudi_of_low_rank_experts_is_its_formula(shape: tuple[int, ...]) -> None:
    """As LoRA leaves them: no Cholesky factor, so the pseudo-inverse."""
    taus = [normal(shape[0], 2, seed=i) @ normal(2, shape[1], seed=i + 9) for i in range(3)]
    got = merged("wudi", taus, WEIGHTS, dtype=torch.float64)
    assert close(got, wudi_by_pinv([tau.numpy() for tau in taus], WEIGHTS), 1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_wudi_is_where_the_gradient_of_its_objective_is_zero(shape: tuple[int, ...]) -> None:
    taus = [torch.from_numpy(tau) for tau in matrices(shape)]

    def gradient(m: torch.Tensor) -> torch.Tensor:
        m = m.double().flatten(1).requires_grad_()
        loss = [abs(w) * (((m - math.copysign(1, w) * tau) @ tau.T) ** 2).sum() / (tau**2).sum()
                for w, tau in zip(WEIGHTS, taus, strict=True)]  # fmt: skip
        return torch.autograd.grad(torch.stack(loss).sum(), m)[0]

    at_sum = gradient(sum(w * tau for w, tau in zip(WEIGHTS, taus, strict=True)))
    assert gradient(merged("wudi", some(shape, 3), WEIGHTS)).norm() < 1e-5 * at_sum.norm()


def test_an_expert_that_did_not_move_takes_no_part_in_wudi() -> None:
    first, second = some((8, 12), 2)
    with_still = merged("wudi", [first, torch.zeros(8, 12), second], [1.0, 1.0, 0.5])
    assert close(with_still, merged("wudi", [first, second], [1.0, 0.5]))


def test_what_an_expert_lacks_gets_no_invented_direction() -> None:
    """Rank 1 where k is 4: a decomposition would fill up with vectors of its own, and turn the others by them."""
    thin = [torch.outer(normal(8, seed=i), normal(20, seed=i + 9)) for i in range(2)]
    assert torch.linalg.matrix_rank(merged("tsv", thin, [1.0, 1.0]), rtol=1e-4) == 2
    assert torch.linalg.matrix_rank(merged("iso_c", thin, [1.0, 1.0]), rtol=1e-4) == 2


@pytest.mark.parametrize("name", ["tsv", "iso_c", "wudi"])
def test_projections_over_a_base_of_zeros(name: str) -> None:
    experts = [1e-3 * normal(6, 6), torch.zeros(6, 6), 1e-3 * normal(6, 6, seed=1)]
    got = merged(name, experts, [1.0, 1.0, 1.0])
    assert got.isfinite().all() and got.norm() > 0
    assert merged(name, [torch.zeros(6, 6)] * 3, [1.0, 1.0, 1.0]).count_nonzero() == 0


# The time told beforehand


def test_only_matrices_cost_anything() -> None:
    assert spectral_cost([(7,), (), (0, 3)], 4, "wudi") == (0.0, 0)
    small, memory = spectral_cost([(64, 64)], 4, "tsv")
    assert spectral_cost([(64, 64), (64, 64), (7,)], 4, "tsv") == (2 * small, memory)
    assert spectral_cost([(64, 32, 3, 3)], 2, "iso_c") == spectral_cost([(64, 288)], 2, "iso_c")


@pytest.mark.parametrize("name", ["tsv", "iso_c", "wudi"])
def test_a_wide_matrix_costs_as_its_short_side(name: str) -> None:
    wide, tall = (spectral_cost([shape], 2, name)[0] for shape in ((32, 9216), (96, 9216)))
    assert tall < 12 * wide  # by the long side it would be the same 9216 cubed


@pytest.mark.parametrize("name", ["tsv", "iso_c", "wudi"])
def test_the_estimate_is_near_the_time_it_takes(name: str) -> None:
    shapes = [(320, 640), (160, 160, 3, 3)]
    parameters = [parameter(name, some(shape, 3), [1.0] * 3) for shape in shapes]
    estimate = estimated_seconds(shapes, 3, name)
    start = time.process_time()
    for p in parameters:
        function(name)(p)
    taken = time.process_time() - start
    assert taken / 10 < estimate < taken * 10  # loose: other work shares this machine
