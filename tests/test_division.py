"""A division is two tables; the uniform one routes as the paper does, and subsets survive as runs."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deme_diffusion.division import Division, from_runs, name_of, owners, reported, to_runs, uniform, whole
from deme_diffusion.errors import UserError

SUBSETS = st.sets(st.integers(0, 60)).map(lambda chosen: np.array(sorted(chosen), dtype=np.int64))


@st.composite
def counts(draw: st.DrawFn) -> tuple[int, int]:
    """N and T with 1 <= N <= T."""
    num_timesteps = draw(st.integers(1, 300))
    return draw(st.integers(1, num_timesteps)), num_timesteps


def overlapping() -> Division:
    """Two experts on ten timesteps: they share 4 and 5, nobody trains on 9, and expert 1 serves both ends."""
    member = np.zeros((2, 10), dtype=np.bool_)
    member[0, 0:6] = True
    member[1, 4:9] = True
    return Division(member, np.array([1, 0, 0, 0, 0, 1, 1, 1, 1, 1], dtype=np.int64))


@given(counts())
def test_uniform_members_are_disjoint_cover_everything_and_serve_what_they_trained_on(sizes: tuple[int, int]) -> None:
    n, t = sizes
    division = uniform(n, t)
    assert (division.num_experts, division.num_timesteps) == (n, t)
    assert (division.member.sum(axis=0) == 1).all()
    for i in range(n):
        assert division.subset(i) == division.served(i)
        assert len(division.subset(i)) == 1
    lengths = division.member.sum(axis=1)
    assert lengths.max() - lengths.min() <= 1


@given(counts())
def test_uniform_routes_timestep_t_to_expert_floor_t_n_over_t(sizes: tuple[int, int]) -> None:
    n, t = sizes
    assert uniform(n, t).route.tolist() == [step * n // t for step in range(t)]  # METHOD.md, Eq. 7


def test_four_ranges_of_a_thousand_are_the_quarters() -> None:
    division = uniform(4, 1000)
    assert [division.subset(i) for i in range(4)] == [[[0, 250]], [[250, 500]], [[500, 750]], [[750, 1000]]]
    assert division.as_dict() == {
        "num_train_timesteps": 1000,
        "subsets": [[[0, 250]], [[250, 500]], [[500, 750]], [[750, 1000]]],
        "route": [[0, 250, 0], [250, 500, 1], [500, 750, 2], [750, 1000, 3]],
    }


def test_ranges_that_do_not_divide_evenly_by_hand() -> None:
    assert uniform(3, 10).route.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert uniform(4, 4).route.tolist() == [0, 1, 2, 3]


def test_more_ranges_than_timesteps_are_refused_with_the_most_there_can_be() -> None:
    with pytest.raises(UserError, match=r"num_ranges: 11 ranges do not fit into 10 timesteps; the most is 10$"):
        uniform(11, 10)


@given(SUBSETS)
def test_runs_and_timesteps_are_inverse(timesteps: np.ndarray) -> None:
    runs = to_runs(timesteps)
    np.testing.assert_array_equal(from_runs(runs), timesteps)
    assert all(lo < hi for lo, hi in runs)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(runs))  # maximal: never touching
    assert json.loads(json.dumps(runs)) == runs == to_runs(from_runs(runs))


def test_overlaps_and_holes_are_kept_apart_from_the_route() -> None:
    division = overlapping()
    assert (division.subset(0), division.subset(1)) == ([[0, 6]], [[4, 9]])
    assert (division.served(0), division.served(1)) == ([[1, 5]], [[0, 1], [5, 10]])
    assert division.as_dict() == {
        "num_train_timesteps": 10,
        "subsets": [[[0, 6]], [[4, 9]]],
        "route": [[0, 1, 1], [1, 5, 0], [5, 10, 1]],
    }


@given(counts())
def test_served_timesteps_are_all_of_them_once(sizes: tuple[int, int]) -> None:
    for division in (uniform(*sizes), overlapping()):
        served = np.concatenate([from_runs(division.served(i)) for i in range(division.num_experts)])
        assert sorted(served.tolist()) == list(range(division.num_timesteps))


def test_a_table_that_cannot_serve_or_train_is_refused() -> None:
    member = np.ones((2, 3), dtype=np.bool_)
    with pytest.raises(ValueError, match="shape"):
        Division(member, np.zeros(4, dtype=np.int64))
    for route in ([0, 1, 2], [-1, 0, 0]):
        with pytest.raises(ValueError, match=r"outside 0\.\.1"):
            Division(member, np.array(route))
    member[1] = False
    with pytest.raises(ValueError, match="expert 1 has no timestep"):
        Division(member, np.zeros(3, dtype=np.int64))


def test_owners_say_which_range_a_timestep_is_in_and_minus_one_for_none() -> None:
    assert owners([[[0, 2], [5, 6]], [[2, 4]]], 7).tolist() == [0, 0, 1, 1, -1, 0, -1]
    assert owners([], 2).tolist() == [-1, -1]


@given(counts())
def test_owners_of_the_served_ranges_are_the_route(sizes: tuple[int, int]) -> None:
    division = uniform(*sizes)
    ranges = [division.served(i) for i in range(division.num_experts)]
    np.testing.assert_array_equal(owners(ranges, division.num_timesteps), division.route)


def test_a_training_on_everything_is_reported_by_quarters() -> None:
    assert reported(whole(1000), 1000) == [[[0, 250]], [[250, 500]], [[500, 750]], [[750, 1000]]]
    assert reported(whole(2), 2) == [[[0, 1]], [[1, 2]]]


def test_a_training_on_a_subset_is_reported_by_its_own_and_the_rest() -> None:
    assert reported([[2, 4]], 10) == [[[2, 4]], [[0, 2], [4, 10]]]
    assert reported([[0, 4]], 10) == [[[0, 4]], [[4, 10]]]


@given(SUBSETS.filter(lambda subset: len(subset) > 0))
def test_reported_ranges_hold_every_timestep_once(subset: np.ndarray) -> None:
    parts = [from_runs(runs) for runs in reported(to_runs(subset), 61)]
    assert all(len(part) for part in parts)
    assert sorted(np.concatenate(parts).tolist()) == list(range(61))


def test_names_of_subsets() -> None:
    assert name_of([[0, 250]]) == "[0,250)"
    assert name_of([[0, 2], [5, 6], [8, 9]]) == "[0,2)+[5,6)+[8,9)"
    assert name_of([[0, 2], [5, 6], [8, 9], [10, 20]]) == "14 timesteps in 4 runs"
