"""Metrics: against torchmetrics and scipy, closed forms, and examples worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from deme_diffusion.evaluation.manifold import manifold_scores
from deme_diffusion.evaluation.metrics import (
    Statistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    mean_and_spread,
    statistics,
)


def draw(seed: int, n: int, d: int, *, shift: float = 0.0, scale: float = 1.0) -> np.ndarray:
    """n correlated Gaussian features, the same mixing for every seed of one d."""
    mixing = np.random.default_rng(10_000 + d).normal(size=(d, d)) / np.sqrt(d)
    return shift + scale * np.random.default_rng(seed).normal(size=(n, d)) @ (np.eye(d) + mixing)


# --- statistics ---------------------------------------------------------------------------------------------------


def test_statistics_worked_by_hand() -> None:
    fitted = statistics(np.array([[0, 0], [2, 4], [4, 2]], dtype=np.float16))
    assert fitted.n == 3
    assert fitted.mean.dtype == fitted.covariance.dtype == np.float64
    np.testing.assert_array_equal(fitted.mean, [2, 2])
    np.testing.assert_array_equal(fitted.covariance, [[4, 2], [2, 4]])


def test_statistics_do_not_accumulate_in_half_precision() -> None:
    features = (1000 + draw(0, 500, 3)).astype(np.float16)  # a float16 sum overflows at 65504
    np.testing.assert_allclose(statistics(features).covariance, np.cov(features.astype(np.float64).T), rtol=1e-10)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_statistics_refuse_non_finite_features(bad: float) -> None:
    features = draw(0, 5, 3)
    features[2, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        statistics(features)


@pytest.mark.parametrize("shape", [(1, 3), (0, 3), (3,), (3, 0), (2, 3, 4)])
def test_statistics_refuse_bad_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="features"):
        statistics(np.zeros(shape))


def test_cached_statistics_are_checked() -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        Statistics(mean=np.zeros(2), covariance=np.full((2, 2), np.nan), n=5)
    with pytest.raises(ValueError, match=r"\(d, d\)"):
        Statistics(mean=np.zeros(2), covariance=np.eye(3), n=5)


# --- Frechet distance ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 16, 64])
def test_frechet_matches_scipy_and_torchmetrics(d: int) -> None:
    import scipy.linalg
    import torch
    from torchmetrics.image.fid import _compute_fid

    a, b = statistics(draw(1, 300, d)), statistics(draw(2, 200, d, shift=0.3, scale=1.4))
    root = np.asarray(scipy.linalg.sqrtm(a.covariance @ b.covariance)).real
    by_scipy = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance - 2 * root)
    by_torchmetrics = _compute_fid(*(torch.from_numpy(x) for x in (a.mean, a.covariance, b.mean, b.covariance)))
    assert frechet_distance(a, b) == pytest.approx(by_scipy, rel=1e-10)
    assert frechet_distance(a, b) == pytest.approx(by_torchmetrics.item(), rel=1e-10)


@pytest.mark.parametrize(("n", "d"), [(500, 8), (10, 32)])
def test_frechet_of_identical_sets_is_zero_and_the_distance_symmetric(n: int, d: int) -> None:
    a, b = statistics(draw(1, n, d)), statistics(draw(2, n + 7, d, shift=0.2))
    assert 0 <= frechet_distance(a, statistics(draw(1, n, d))) < 1e-9
    assert frechet_distance(a, b) > 0.1
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)


def test_frechet_is_never_negative() -> None:
    fitted = [statistics(draw(seed, 50, 8)) for seed in range(20)]  # rounding alone puts several of these below 0
    assert all(0 <= frechet_distance(s, s) < 1e-12 for s in fitted)


def test_frechet_of_diagonal_gaussians_is_the_closed_form() -> None:
    deviation_a, deviation_b = np.array([1.0, 2.0, 0.0, 3.0]), np.array([2.0, 2.0, 5.0, 0.0])
    a = Statistics(mean=np.array([0.0, 1.0, 0.0, 0.0]), covariance=np.diag(deviation_a**2), n=100)
    b = Statistics(mean=np.array([3.0, 1.0, 0.0, 4.0]), covariance=np.diag(deviation_b**2), n=100)
    assert frechet_distance(a, b) == pytest.approx((9 + 16) + (1 + 0 + 25 + 9), rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_frechet_does_not_change_under_a_rotation(seed: int) -> None:
    a, b = draw(seed, 100, 12), draw(seed + 50, 80, 12, shift=0.5, scale=0.7)
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(12, 12)))[0]
    turned = frechet_distance(statistics(a @ rotation), statistics(b @ rotation))
    assert turned == pytest.approx(frechet_distance(statistics(a), statistics(b)), rel=1e-10)
    assert turned != pytest.approx(frechet_distance(statistics(a @ rotation), statistics(b)), rel=1e-3)


@pytest.mark.parametrize(("n", "m"), [(10, 10), (10, 25), (25, 10), (10, 400), (400, 10)])
def test_frechet_with_singular_covariances_matches_the_nuclear_norm(n: int, m: int) -> None:
    # Tr (Sa Sb)^(1/2) is the nuclear norm of Xa Xb^T of the centred, scaled features: no root of a singular matrix.
    a, b = draw(3, n, 40), draw(4, m, 40, scale=1.3)
    xa, xb = ((x - x.mean(axis=0)) / np.sqrt(len(x) - 1) for x in (a, b))
    cross = np.linalg.svd(xa @ xb.T, compute_uv=False).sum()
    expected = ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum() + (xa**2).sum() + (xb**2).sum() - 2 * cross
    assert frechet_distance(statistics(a), statistics(b)) == pytest.approx(expected, rel=1e-11)


def test_frechet_of_constant_features_is_the_distance_of_the_means() -> None:
    a, b = statistics(np.zeros((5, 2))), statistics(np.full((5, 2), 3.0))
    assert frechet_distance(a, b) == 18.0


def test_frechet_refuses_different_dimensions() -> None:
    with pytest.raises(ValueError, match="different dimension: 3 and 4"):
        frechet_distance(statistics(draw(0, 9, 3)), statistics(draw(0, 9, 4)))


# --- kernel distance ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 5, 64])
def test_kernel_distance_on_the_full_set_matches_torchmetrics(d: int) -> None:
    import torch
    from torchmetrics.image.kid import poly_mmd

    a, b = draw(1, 60, d), draw(2, 60, d, shift=0.4)
    mean, deviation = kernel_distance(a, b, subset_size=60, num_subsets=1)
    assert mean == pytest.approx(poly_mmd(torch.from_numpy(a), torch.from_numpy(b)).item(), rel=1e-10)
    assert deviation == 0.0


def test_kernel_distance_worked_by_hand() -> None:
    # d = 1: k(0, 1) = 1 and k(1, 1) = 8. Within a: 1; within b: 8; across: (1 + 1 + 8 + 8) / 4.
    assert kernel_distance(np.array([[0.0], [1.0]]), np.array([[1.0], [1.0]]))[0] == 1 + 8 - 2 * 4.5


def test_kernel_distance_is_unbiased() -> None:
    pairs = [(draw(2 * i, 20, 4, scale=0.4), draw(2 * i + 1, 20, 4, scale=0.4)) for i in range(300)]
    same = np.array([kernel_distance(a, b)[0] for a, b in pairs])
    error = same.std(ddof=1) / np.sqrt(len(same))
    assert abs(same.mean()) < 4 * error
    assert same.min() < 0
    assert np.mean([kernel_distance(a, b + 0.5)[0] for a, b in pairs]) > 20 * error


def test_kernel_distance_over_subsets_centres_on_the_full_set() -> None:
    a, b = draw(1, 80, 6), draw(2, 80, 6, shift=0.5)
    mean, deviation = kernel_distance(a, b, subset_size=30, num_subsets=400)
    assert deviation > 0
    assert abs(mean - kernel_distance(a, b)[0]) < 4 * deviation / np.sqrt(400)


def test_kernel_distance_depends_on_its_seed_only() -> None:
    a, b = draw(1, 50, 4), draw(2, 40, 4)
    before = np.random.get_state()[1].copy()  # noqa: NPY002  the global generator is what must stay untouched
    first = kernel_distance(a, b, subset_size=10, num_subsets=5, seed=3)
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002
    assert kernel_distance(a, b, subset_size=10, num_subsets=5, seed=3) == first
    assert kernel_distance(a, b, subset_size=10, num_subsets=5, seed=4) != first


def test_kernel_distance_clips_the_subset_to_the_smaller_set() -> None:
    a, b = draw(1, 50, 4), draw(2, 12, 4)
    clipped = kernel_distance(a, b, subset_size=1000, num_subsets=5)
    assert clipped == kernel_distance(a, b, subset_size=12, num_subsets=5)
    assert clipped != kernel_distance(a, b, subset_size=11, num_subsets=5)
    assert kernel_distance(b, a)[1] > 0  # the larger set still varies


@pytest.mark.parametrize("settings", [{"subset_size": 1}, {"num_subsets": 0}])
def test_kernel_distance_refuses_settings_without_an_estimate(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="subset_size must be >= 2 and num_subsets >= 1"):
        kernel_distance(draw(0, 9, 3), draw(1, 9, 3), **settings)


# --- precision and recall -----------------------------------------------------------------------------------------


def precision_recall(
    real: np.ndarray, generated: np.ndarray, *, neighbours: int = 3, block_rows: int = 1024
) -> tuple[float, float]:
    found = manifold_scores(real, generated, neighbours=neighbours, density_neighbours=1, block_rows=block_rows)
    return found["precision"], found["recall"]


def test_precision_is_of_generated_and_recall_of_real() -> None:
    # Mode dropping: real has two modes, generated only the left: all of it is plausible, half of real is missed.
    real = np.array([[0, 0], [0, 1], [10, 0], [10, 1]], dtype=np.float64)
    assert precision_recall(real, real[:2], neighbours=1) == (1.0, 0.5)
    assert precision_recall(real[:2], real, neighbours=1) == (0.5, 1.0)


def test_precision_recall_worked_by_hand() -> None:
    # k = 3. Real radii 3 2 2 3: union [-3, 6] holds 4 and 5. Generated radii 16 15 13 16: 4's ball [-12, 20] holds all.
    real, generated = np.array([[0.0], [1], [2], [3]]), np.array([[4.0], [5], [7], [20]])
    assert precision_recall(real, generated) == (0.5, 1.0)
    # k = 2. Real radii 2 1 1 2: union [-2, 5], border included. Generated radii 3 2 3 15: union [1, 35] misses 0.
    assert precision_recall(real, generated, neighbours=2) == (0.5, 0.75)
    # k = 1. Real radii all 1: union [-1, 4], border included. Generated radii 1 1 2 13: union [3, 33].
    assert precision_recall(real, generated, neighbours=1) == (0.25, 0.25)


def brute_force_share(points: np.ndarray, by: np.ndarray, neighbours: int) -> float:
    radii = [
        sorted(np.linalg.norm(y - z) for j, z in enumerate(by) if j != i)[neighbours - 1] for i, y in enumerate(by)
    ]
    return float(np.mean([any(np.linalg.norm(p - y) <= r for y, r in zip(by, radii, strict=True)) for p in points]))


@pytest.mark.parametrize("block_rows", [1, 7, 30, 1024])
def test_precision_recall_matches_brute_force_at_any_block_size(block_rows: int) -> None:
    real, generated = draw(1, 45, 5), draw(2, 30, 5, shift=0.8, scale=0.8)
    expected = brute_force_share(generated, real, 3), brute_force_share(real, generated, 3)
    assert expected[0] != expected[1]
    assert 0 < min(expected) < max(expected) < 1
    assert precision_recall(real, generated, block_rows=block_rows) == expected


@pytest.mark.parametrize("copies", [2, 3, 4])
def test_precision_recall_of_collapsed_duplicates(copies: int) -> None:
    # Radius 0 everywhere: a copy is inside although |x|^2 + |y|^2 - 2 x.y rounds to something else in every block.
    real = np.repeat(draw(1, 30, 300, shift=5.0), copies, axis=0)
    generated = real[: 5 * copies]
    assert precision_recall(real, generated, neighbours=copies - 1) == (1.0, 5 / 30)
    assert precision_recall(real, generated + 1e-3, neighbours=copies - 1) == (0.0, 0.0)


def test_precision_recall_of_distant_sets_is_zero() -> None:
    assert precision_recall(draw(1, 20, 3), draw(2, 20, 3, shift=100.0)) == (0.0, 0.0)


def test_precision_recall_needs_one_more_point_than_neighbours() -> None:
    assert precision_recall(draw(1, 4, 2), draw(1, 4, 2)) == (1.0, 1.0)
    with pytest.raises(ValueError, match="generated holds 3 features, at least 4"):
        precision_recall(draw(1, 4, 2), draw(1, 3, 2))
    with pytest.raises(ValueError, match="real holds 3 features, at least 4"):
        precision_recall(draw(1, 3, 2), draw(1, 4, 2))
    with pytest.raises(ValueError, match="must be >= 1"):
        precision_recall(draw(1, 4, 2), draw(1, 4, 2), neighbours=0)


@pytest.mark.parametrize("metric", [kernel_distance, precision_recall])
def test_metrics_of_two_sets_refuse_bad_features(metric) -> None:
    with pytest.raises(ValueError, match="different dimension: 3 and 4"):
        metric(draw(0, 9, 3), draw(0, 9, 4))
    with pytest.raises(ValueError, match="NaN or infinity"):
        metric(draw(0, 9, 3), np.full((9, 3), np.nan))
    with pytest.raises(ValueError, match="shape"):
        metric(np.zeros(9), draw(0, 9, 3))


# --- density and coverage -----------------------------------------------------------------------------------------


def density_coverage(
    real: np.ndarray, generated: np.ndarray, *, neighbours: int = 5, block_rows: int = 1024
) -> tuple[float, float]:
    found = manifold_scores(real, generated, neighbours=1, density_neighbours=neighbours, block_rows=block_rows)
    return found["density"], found["coverage"]


def test_density_and_coverage_worked_by_hand() -> None:
    # k = 1. Real radii 1 1 3: balls [-1, 1], [0, 2], [1, 7]. 1 lies in all three, 1.5 in two, 9 in none.
    real, generated = np.array([[0.0], [1], [4]]), np.array([[1.0], [1.5], [9]])
    assert density_coverage(real, generated, neighbours=1) == ((3 + 2 + 0) / 3, 1.0)
    # k = 2. Real radii 4 3 4: [-4, 4], [-2, 4], [0, 8]; 9 is outside, the others in all three.
    assert density_coverage(real, generated, neighbours=2) == ((3 + 3 + 0) / (2 * 3), 1.0)
    # Only the ball [1, 7] of 4 holds 6.
    assert density_coverage(real, np.array([[6.0], [6], [6]]), neighbours=1) == (1.0, 1 / 3)


def test_balls_of_density_and_coverage_are_those_of_real() -> None:
    # An outlier among the generated has a huge ball, which gives recall 1 (k = 3) and no coverage.
    real = np.arange(5.0)[:, None]
    generated = np.array([[100.0], [300], [500], [700]])
    assert manifold_scores(real, generated, density_neighbours=3) == {
        "precision": 0.0,
        "recall": 1.0,
        "density": 0.0,
        "coverage": 0.0,
    }


@pytest.mark.parametrize("block_rows", [1, 7, 30, 1024])
def test_density_and_coverage_match_brute_force_at_any_block_size(block_rows: int) -> None:
    real, generated, k = draw(1, 45, 5), draw(2, 30, 5, shift=0.8, scale=0.8), 4
    radii = [sorted(np.linalg.norm(x - z) for j, z in enumerate(real) if j != i)[k - 1] for i, x in enumerate(real)]
    inside = np.array([[np.linalg.norm(y - x) <= r for x, r in zip(real, radii, strict=True)] for y in generated])
    expected = inside.sum() / (k * len(generated)), inside.any(axis=0).mean()
    assert density_coverage(real, generated, neighbours=k, block_rows=block_rows) == pytest.approx(expected, rel=1e-12)
    assert 0 < expected[1] < 1


def test_density_of_images_from_the_same_distribution_is_about_one() -> None:
    # Naeem et al. 2020: for two large sets of one distribution the expectations are 1 and 1 - 2^-k.
    pairs = [density_coverage(draw(2 * i, 200, 4), draw(2 * i + 1, 200, 4), neighbours=5) for i in range(20)]
    density, coverage = np.mean(pairs, axis=0)
    assert density == pytest.approx(1.0, abs=0.05)
    assert coverage == pytest.approx(1 - 2**-5, abs=0.02)


def test_all_four_come_from_one_pass_and_are_told_apart() -> None:
    real, generated = draw(1, 40, 3), draw(2, 30, 3, shift=0.5, scale=0.6)
    found = manifold_scores(real, generated, neighbours=2, density_neighbours=4)
    assert list(found) == ["precision", "recall", "density", "coverage"]
    assert (found["precision"], found["recall"]) == precision_recall(real, generated, neighbours=2)
    assert (found["density"], found["coverage"]) == density_coverage(real, generated, neighbours=4)
    assert len(set(found.values())) == 4


def test_density_needs_one_more_real_image_than_neighbours() -> None:
    with pytest.raises(ValueError, match="real holds 5 features, at least 6"):
        manifold_scores(draw(1, 5, 2), draw(1, 9, 2), neighbours=1)
    with pytest.raises(ValueError, match="density_neighbours and block_rows must be >= 1"):
        manifold_scores(draw(1, 9, 2), draw(1, 9, 2), density_neighbours=0)


# --- Inception score ----------------------------------------------------------------------------------------------


def test_inception_score_matches_torchmetrics() -> None:
    import torch
    from torchmetrics.image.inception import InceptionScore

    logits = draw(1, 60, 7, scale=3.0).astype(np.float32)
    oracle = InceptionScore(feature=torch.nn.Identity(), splits=1)
    oracle.features = [torch.from_numpy(logits)]
    assert inception_score(logits, splits=1)[0] == pytest.approx(oracle.compute()[0].item(), rel=1e-5)


def test_inception_score_worked_by_hand() -> None:
    sure = np.where(np.eye(4, dtype=bool), 0.0, -1e4)  # each image surely of its own class: exp log 4
    assert inception_score(sure, splits=1) == (pytest.approx(4.0), 0.0)
    assert inception_score(np.repeat(sure[:1], 6, axis=0), splits=1) == (1.0, 0.0)  # all of one class
    assert inception_score(np.full((6, 4), 123.0), splits=1) == (1.0, 0.0)  # all unsure alike
    # p = (3/4, 1/4) and its mirror image: KL to (1/2, 1/2) is 3/4 log 3/2 + 1/4 log 1/2.
    pair = np.log([[0.75, 0.25], [0.25, 0.75]])
    assert inception_score(pair, splits=1)[0] == pytest.approx(1.5**0.75 * 0.5**0.25, rel=1e-12)


def test_inception_score_splits_are_interleaved_and_their_spread_is_told() -> None:
    logits = draw(3, 50, 5, scale=2.0)
    own = [inception_score(logits[i::10], splits=1)[0] for i in range(10)]
    assert inception_score(logits) == (pytest.approx(np.mean(own)), pytest.approx(np.std(own)))
    assert np.std(own) > 0
    by_class = np.repeat(np.where(np.eye(5, dtype=bool), 0.0, -1e4), 20, axis=0)  # as a folder of classes lists them
    assert inception_score(by_class) == (pytest.approx(5.0), pytest.approx(0.0, abs=1e-12))


def test_inception_score_of_fewer_images_than_splits_and_of_nothing() -> None:
    assert inception_score(draw(1, 3, 4)) == (1.0, 0.0)  # splits of one image
    with pytest.raises(ValueError, match="logits holds 0 features"):
        inception_score(np.zeros((0, 4)))
    with pytest.raises(ValueError, match="splits must be >= 1"):
        inception_score(draw(1, 3, 4), splits=0)
    with pytest.raises(ValueError, match="NaN or infinity"):
        inception_score(np.full((3, 4), np.nan))


# --- spread -------------------------------------------------------------------------------------------------------


def test_mean_and_spread() -> None:
    assert mean_and_spread([1.0, 3.0]) == (2.0, pytest.approx(np.sqrt(2)))
    assert mean_and_spread([4.0, 4.0, 4.0]) == (4.0, 0.0)
    assert mean_and_spread([2.5]) == (2.5, None)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_mean_and_spread_refuses_nothing_and_non_finite(values: list[float]) -> None:
    with pytest.raises(ValueError, match="at least one finite number"):
        mean_and_spread(values)
