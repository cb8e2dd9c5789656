"""Randomness is a value: a draw depends on its key alone, never on batches, processes or what was drawn before."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deme_diffusion import rng

KEYS = [(0, "noise", 0, 0), (1, "noise", 0, 0), (0, "coin", 0, 0), (0, "noise", 1, 0), (0, "noise", 0, 1)]


def test_equal_keys_give_equal_draws_whatever_was_drawn_between() -> None:
    before = rng.normals(3, "noise", 5, 7, 2, (4,)), rng.uniforms(3, "t", 5, 7, 2), rng.generator(3, "x", 1).random(4)
    rng.normals(9, "other", 1, 0, 3, (2,))
    np.random.default_rng(0).random(5)
    after = rng.normals(3, "noise", 5, 7, 2, (4,)), rng.uniforms(3, "t", 5, 7, 2), rng.generator(3, "x", 1).random(4)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)


def test_seed_purpose_step_and_index_each_change_the_draws() -> None:
    drawn = {rng.normals(seed, purpose, step, first, 1, (4,)).tobytes() for seed, purpose, step, first in KEYS}
    assert len(drawn) == len(KEYS)
    assert len({rng.seed_of(seed, purpose, step, first) for seed, purpose, step, first in KEYS}) == len(KEYS)
    assert len({rng.generator(seed, purpose, step).random() for seed, purpose, step, _ in KEYS[:4]}) == 4


@given(st.integers(0, 70), st.integers(0, 40))
def test_words_depend_on_their_place_alone(first: int, count: int) -> None:
    whole = rng.words(3, "mask", first=0, count=120)
    assert whole.dtype == np.int32 and len(np.unique(whole)) == 120
    np.testing.assert_array_equal(rng.words(3, "mask", first=first, count=count), whole[first : first + count])
    assert not np.array_equal(rng.words(4, "mask", first=0, count=120), whole)


def test_a_text_and_a_number_are_different_purposes() -> None:
    assert rng.seed_of(0, 1) != rng.seed_of(0, "1")
    assert rng.seed_of(0, "a", "b") != rng.seed_of(0, "ab")


@given(st.integers(0, 8), st.integers(0, 2**40), st.integers(0, 3))
def test_draws_of_a_sample_do_not_depend_on_batch_boundaries(cut: int, first: int, step: int) -> None:
    whole = rng.normals(0, "noise", step, first, 8, (1, 3, 3))
    parts = [rng.normals(0, "noise", step, first, cut, (1, 3, 3))]
    parts.append(rng.normals(0, "noise", step, first + cut, 8 - cut, (1, 3, 3)))
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    singles = [rng.uniforms(0, "t", step, first + i, 1, each=3) for i in range(8)]
    np.testing.assert_array_equal(rng.uniforms(0, "t", step, first, 8, each=3), np.concatenate(singles))


def test_a_sample_that_draws_much_does_not_reach_into_the_next() -> None:
    much = rng.normals(0, "noise", 0, 0, 2, (100_000,))
    little = rng.normals(0, "noise", 0, 0, 2, (10,))
    np.testing.assert_array_equal(much[:, :10], little)
    assert len(np.unique(much)) > 0.98 * much.size  # float32 normals collide a little; a shared stream would by half


def test_golden_draws_stay_what_they_are() -> None:
    # A change of the scheme changes every result without changing a digest: raise the stages' versions with it.
    assert rng.seed_of(0, "image", 3) == 7076702900705484971
    np.testing.assert_allclose(
        rng.normals(0, "noise", 2, 5, 2, (2,)), [[0.970355272, -0.0191529412], [0.770966232, -0.0205624178]], rtol=1e-6
    )
    np.testing.assert_allclose(
        rng.uniforms(0, "t", 2, 5, 2, each=2),
        [[0.23050392032210787, 0.3453289699609573], [0.48260881028055214, 0.7978782985153731]],
        rtol=1e-12,
    )
    assert rng.image_order(0, 1, 8).tolist() == [7, 1, 5, 4, 0, 6, 2, 3]


def test_seeds_fit_torch_and_spread_over_63_bits() -> None:
    seeds = [rng.seed_of(0, "image", i) for i in range(2000)]
    assert len(set(seeds)) == 2000
    assert min(seeds) >= 0 and 2**62 < max(seeds) < 2**63


@pytest.mark.parametrize("num_images", [1, 2, 97])
def test_each_epoch_is_another_permutation_and_visits_each_image_once(num_images: int) -> None:
    orders = [rng.image_order(0, epoch, num_images) for epoch in range(3)]
    for epoch, order in enumerate(orders):
        assert sorted(order.tolist()) == list(range(num_images))
        slots = range(epoch * num_images, (epoch + 1) * num_images)
        assert [rng.image_at(0, slot, num_images) for slot in slots] == order.tolist()
    if num_images == 97:
        assert len({tuple(order) for order in orders} | {tuple(rng.image_order(1, 0, num_images))}) == 4


def test_normals_are_standard_and_uniforms_are_even() -> None:
    count, each = 400, 256
    noise = rng.normals(0, "noise", 0, 0, count, (each,)).astype(np.float64)
    total = noise.size
    assert noise.dtype == np.float64 and rng.normals(0, "noise", 0, 0, 1, (1,)).dtype == np.float32
    assert abs(noise.mean()) < 4 / np.sqrt(total)  # four standard errors
    assert abs(noise.var() - 1) < 4 * np.sqrt(2 / total)
    assert abs((noise**4).mean() - 3) < 4 * np.sqrt(96 / total)
    # Neighbouring samples, steps and purposes are uncorrelated.
    for other in (
        noise[1:],
        rng.normals(0, "noise", 1, 0, count - 1, (each,)),
        rng.normals(0, "x", 0, 0, count - 1, (each,)),
    ):
        assert abs((noise[:-1] * other).mean()) < 4 / np.sqrt(other.size)
    uniform = rng.uniforms(0, "t", 0, 0, count, each)
    assert uniform.shape == (count, each) and uniform.min() >= 0 and uniform.max() < 1
    counts = np.histogram(uniform, bins=16, range=(0, 1))[0]
    expected = total / 16
    assert ((counts - expected) ** 2 / expected).sum() < 37.7  # chi-squared of 15 degrees, one in a thousand
