"""Timesteps of a step: shares (Eq. 6), coins by sample and by batch, mirrored pairs, and what they do not depend on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import T, make_pico_denoiser
from deme_diffusion.decoupling.timesteps import Timesteps, draw_timesteps
from deme_diffusion.division import from_runs

DENOISER = make_pico_denoiser()
RUNS = {"first": [[0, 5]], "inner": [[5, 12]], "holes": [[1, 3], [8, 9], [14, 19]], "whole": [[0, T]]}
MANY = 20_000


def draw(runs: str, *, count: int, first: int = 0, step: int = 3, seed: int = 7, **options: Any) -> Timesteps:
    """Timesteps of some samples of a step."""
    where = {"seed": seed, "step": step, "first": first, "count": count}
    return draw_timesteps(DENOISER, from_runs(RUNS[runs]), **{"global_prob": 0.3, **where, **options})


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("batch", [None, 4])
@pytest.mark.parametrize("runs", ["inner", "holes"])
def test_frequencies_are_those_of_equation_6(runs: str, batch: int | None, antithetic: bool) -> None:
    t = draw(runs, count=MANY, batch=batch, antithetic=antithetic)
    subset = from_runs(RUNS[runs])
    expected = np.full(T, 0.3 / T)
    expected[subset] += 0.7 / len(subset)
    # Samples of a batch share their coin: four times fewer independent ones.
    error = np.sqrt(expected * (4 if batch else 2) / MANY)
    assert (np.abs(np.bincount(t, minlength=T) / MANY - expected) < 5 * error).all()


@pytest.mark.parametrize("options", [{}, {"batch": 6}, {"antithetic": True}, {"batch": 6, "antithetic": True}])
def test_p_of_0_stays_in_the_subset_and_p_of_1_is_the_whole(options: dict[str, Any]) -> None:
    assert set(draw("holes", count=2000, global_prob=0.0, **options)) == set(from_runs(RUNS["holes"]))
    everywhere = draw("holes", count=2000, global_prob=1.0, **options)
    assert set(everywhere) == set(range(T))
    assert (everywhere == draw("first", count=2000, global_prob=1.0, **options)).all()


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_at_p_of_0_and_1_it_does_not_matter_whose_coin_it_is(p: float, antithetic: bool) -> None:
    drawn = [draw("inner", count=40, batch=b, global_prob=p, antithetic=antithetic) for b in (None, 8)]
    assert (drawn[0] == drawn[1]).all()


def test_a_batch_has_one_coin() -> None:
    """At p = 1/2 each batch of a disjoint pair of subsets is drawn from one of them, and both kinds occur."""
    own = draw("inner", count=400, batch=8, global_prob=0.5).reshape(-1, 8)
    outside = ~np.isin(own, from_runs(RUNS["inner"]))
    alone = draw("inner", count=400, batch=8, global_prob=0.0).reshape(-1, 8)
    inside = (own == alone).all(axis=1)
    assert 10 < inside.sum() < 40  # of 50
    assert not outside[inside].any()
    assert outside[~inside].mean() == pytest.approx(13 / 20, abs=0.1)


def test_samples_have_their_own_coins() -> None:
    own = draw("inner", count=400, global_prob=0.5).reshape(-1, 8)
    alone = draw("inner", count=400, global_prob=0.0).reshape(-1, 8)
    assert (own == alone).all(axis=1).sum() < 5


@pytest.mark.parametrize("batch", [None, 4])
@pytest.mark.parametrize("runs", RUNS)
def test_antithetic_pairs_are_mirrored_exactly(runs: str, batch: int | None) -> None:
    """Each pair in the subset's rank or, when its coin says so, in that of [0, T)."""
    subset = from_runs(RUNS[runs])
    for p, pool in ((0.0, subset), (1.0, np.arange(T))):
        pairs = draw(runs, count=300, antithetic=True, batch=batch, global_prob=p).reshape(-1, 2)
        ranks = np.searchsorted(pool, pairs)
        assert (pool[ranks] == pairs).all()
        assert (ranks.sum(axis=1) == len(pool) - 1).all()
    both = draw(runs, count=300, antithetic=True, batch=batch).reshape(-1, 2)
    in_subset = np.isin(both, subset).all(axis=1)
    image = mirrored(np.where(in_subset, both[:, 0], subset[0]), subset)
    assert ((in_subset & (image == both[:, 1])) | (both.sum(axis=1) == T - 1)).all()


def mirrored(t: Timesteps, subset: Timesteps) -> Timesteps:
    """The mirror image of each t in the subset's rank."""
    return subset[len(subset) - 1 - np.searchsorted(subset, t)]


def test_of_a_contiguous_range_the_mirror_image_is_lo_plus_hi_minus_1_minus_t() -> None:
    pairs = draw("inner", count=300, antithetic=True, global_prob=0.0).reshape(-1, 2)
    subset = from_runs(RUNS["inner"])
    assert (pairs.sum(axis=1) == subset[0] + subset[-1]).all()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 99),
    step=st.integers(0, 99),
    local=st.integers(1, 7),
    processes=st.integers(1, 3),
    micro=st.integers(1, 3),
    runs=st.sampled_from(sorted(RUNS)),
    antithetic=st.booleans(),
    by_batch=st.booleans(),
)
def test_samples_do_not_depend_on_how_many_processes_share_a_micro_batch(
    seed: int, step: int, local: int, processes: int, micro: int, runs: str, antithetic: bool, by_batch: bool
) -> None:
    options: dict[str, Any] = {"seed": seed, "step": step, "antithetic": antithetic}
    options["batch"] = local * processes if by_batch else None
    whole = draw(runs, count=micro * processes * local, **options)
    split = [draw(runs, first=i * local, count=local, **options) for i in range(micro * processes)]
    assert (np.concatenate(split) == whole).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 99), sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5), antithetic=st.booleans())
def test_with_a_coin_a_sample_nor_do_they_on_the_micro_batches(seed: int, sizes: list[int], antithetic: bool) -> None:
    whole = draw("inner", count=sum(sizes), seed=seed, antithetic=antithetic)
    firsts = np.cumsum([0, *sizes[:-1]])
    parts = [draw("inner", first=int(first), count=size, seed=seed, antithetic=antithetic)
             for first, size in zip(firsts, sizes, strict=True)]  # fmt: skip
    assert (np.concatenate(parts) == whole).all()


def test_what_was_drawn_before_these_modes_existed_is_still_drawn() -> None:
    assert draw("inner", count=12).tolist() == [9, 13, 7, 11, 7, 6, 9, 3, 7, 6, 8, 10]


def test_steps_and_seeds_differ() -> None:
    for options in ({}, {"batch": 4}, {"antithetic": True}):
        assert (draw("whole", count=64, **options) != draw("whole", count=64, step=4, **options)).any()
        assert (draw("whole", count=64, **options) != draw("whole", count=64, seed=8, **options)).any()
