"""Every division covers [0, T), routes to experts that exist, and is a function of its settings alone."""

import copy
import itertools
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from deme_diffusion.config import DecoupleSettings
from deme_diffusion.division import Division, name_of, names_of, uniform
from deme_diffusion.divisions import (
    DIVISIONS,
    Facts,
    Similarity,
    best_cuts,
    conflicts,
    explicit,
    gradient_similarity,
    log_snr,
    overlapping,
    random_assignment,
    random_boundaries,
)
from deme_diffusion.errors import UserError
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.recipes.checks import parse
from deme_diffusion.report.figures import division_picture
from deme_diffusion.schedule import alphas_cumprod, signal_to_noise
from deme_diffusion.similarity_file import read_similarity

Values = dict[str, Any]
LINEAR = {"num_train_timesteps": 1000}


@st.composite
def counts(draw: st.DrawFn) -> tuple[int, int]:
    """N and T with 1 <= N <= T."""
    num_timesteps = draw(st.integers(1, 120))
    return draw(st.integers(1, num_timesteps)), num_timesteps


def cosines(size: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((size, 3))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors @ vectors.T


def bins(cosine: np.ndarray, num_timesteps: int) -> Similarity:
    edges = [k * num_timesteps // len(cosine) for k in range(len(cosine) + 1)]
    return Similarity(cosine, np.array(edges))


def is_whole(division: Division, n: int, t: int) -> None:
    assert (division.num_experts, division.num_timesteps) == (n, t)
    assert division.member.any(axis=0).all()
    assert set(division.route.tolist()) == set(range(n))  # each serves something
    assert division.member[division.route, np.arange(t)].all()  # what it was trained on


def contiguous(division: Division) -> bool:
    return all(len(division.subset(i)) == 1 and division.subset(i) == division.served(i)
               for i in range(division.num_experts))  # fmt: skip


# each of them


@settings(deadline=None, max_examples=60)
@given(counts(), st.integers(0, 99), st.floats(0, 1))
def test_divisions_cover_every_timestep_and_every_expert_serves(sizes: tuple[int, int], seed: int, over: float) -> None:
    n, t = sizes
    made = [overlapping(n, t, over), random_boundaries(n, t, seed), random_assignment(n, t, seed)]
    made.append(gradient_similarity(n, bins(cosines(t, seed), t)))
    made.append(explicit([i + t - n for i in range(1, n)], t))
    for division in made:
        is_whole(division, n, t)
    assert contiguous(made[1]) and contiguous(made[3]) and contiguous(made[4])
    again = [overlapping(n, t, over), random_boundaries(n, t, seed), random_assignment(n, t, seed)]
    for one, other in zip(made, again, strict=False):
        assert (one.member == other.member).all() and (one.route == other.route).all()


@given(counts(), st.floats(0, 1))
def test_overlapping_reaches_into_neighbours_and_the_nearest_centre_serves(sizes: tuple[int, int], over: float) -> None:
    n, t = sizes
    division, plain = overlapping(n, t, over), uniform(n, t)
    centres = [(plain.subset(i)[0][0] + plain.subset(i)[0][1] - 1) / 2 for i in range(n)]
    nearest = np.abs(np.arange(t)[:, None] - np.array(centres)[None]).argmin(axis=1)  # ties to the lower
    np.testing.assert_array_equal(division.route, nearest)
    for i in range(n):
        (lo, hi), (first, last) = plain.subset(i)[0], division.subset(i)[0]
        assert (first, last) == (max(0, lo - round(over * (hi - lo))), min(t, hi + round(over * (hi - lo))))
    assert (overlapping(n, t, 0.0).member == plain.member).all()


def test_quarter_of_an_overlap_by_hand() -> None:
    division = overlapping(4, 1000, 0.2)
    assert [division.subset(i) for i in range(4)] == [[[0, 300]], [[200, 550]], [[450, 800]], [[700, 1000]]]
    assert [division.served(i) for i in range(4)] == [[[0, 250]], [[250, 500]], [[500, 750]], [[750, 1000]]]


def test_random_divisions_differ_by_seed_and_the_assignment_is_balanced_and_scattered() -> None:
    for make in (random_boundaries, random_assignment):
        assert len({make(4, 1000, seed).member.tobytes() for seed in range(8)}) == 8
    sizes = random_assignment(3, 1000, 5).member.sum(axis=1)
    assert sorted(sizes.tolist()) == [333, 333, 334]
    assert len(random_assignment(4, 1000, 0).subset(0)) > 100
    ends = [random_boundaries(2, 1000, seed).subset(0)[0][1] for seed in range(200)]
    assert min(ends) < 50 and max(ends) > 950 and 400 < np.mean(ends) < 600  # uniform over the places


def test_every_range_of_random_boundaries_may_be_one_timestep() -> None:
    assert [random_boundaries(5, 5, 0).subset(i) for i in range(5)] == [[[i, i + 1]] for i in range(5)]


@pytest.mark.parametrize("name", sorted(set(DIVISIONS) - {"explicit", "gradient_similarity"}))
def test_more_ranges_than_timesteps_are_refused(name: str) -> None:
    chosen = DecoupleSettings(num_ranges=11, division=name)
    with pytest.raises(UserError, match=r"num_ranges: 11 ranges do not fit into 10 timesteps; the most is 10$"):
        DIVISIONS[name](chosen, Facts(10, lambda: signal_to_noise({"num_train_timesteps": 10})))


@pytest.mark.parametrize("edges", [[0, 5], [5, 10], [5, 5], [6, 5]])
def test_edges_outside_or_out_of_order_are_refused(edges: list[int]) -> None:
    with pytest.raises(UserError, match=r"decouple.edges: .*; ascending ones from 1 to 9 are needed"):
        explicit(edges, 10)


def test_subsets_of_one_size_have_different_names() -> None:
    division = random_assignment(4, 1000, 0)
    subsets = [division.served(i) for i in range(4)]
    assert len(set(names_of(subsets))) == 4
    assert names_of(subsets)[2] == f"#2 250 timesteps in {len(subsets[2])} runs"
    assert names_of([[[0, 5]], [[5, 10]]]) == [name_of([[0, 5]]), "[5,10)"]


def test_scattered_subsets_are_drawn_as_strokes_on_a_band_with_their_size() -> None:
    scattered, plain = (division_picture(d.member, d.route) for d in (random_assignment(3, 1000, 0), uniform(3, 1000)))
    for said in (b"<!-- 333 -->", b"<!-- 334 -->", b"<!-- each timestep by the expert that trains on it -->"):
        assert said in scattered and said not in plain
    route = np.roll(random_assignment(3, 1000, 0).route, 1)  # which says something of its own
    assert b"each timestep" not in division_picture(random_assignment(3, 1000, 0).member, route)


# log-SNR


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.3, "num_train_timesteps": 20},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 50},
        {"beta_schedule": "sigmoid"},
        {"beta_schedule": "laplace"},
        {"trained_betas": [0.1, 0.2, 0.4], "num_train_timesteps": 3},
        {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
    ],
)
def test_schedule_is_that_of_diffusers(config: Values) -> None:
    theirs = DDPMScheduler(**config).alphas_cumprod.double().numpy()
    np.testing.assert_allclose(alphas_cumprod(config), theirs, atol=1e-6)
    np.testing.assert_allclose(alphas_cumprod(config), theirs, rtol=2e-3, atol=1e-9)  # theirs is in float32


@pytest.mark.parametrize("config", [LINEAR, {"rescale_betas_zero_snr": True}, {"beta_schedule": "squaredcos_cap_v2"}])
def test_log_snr_ranges_are_equally_long_in_log_snr(config: Values) -> None:
    snr = signal_to_noise(config)
    division = log_snr(4, snr)
    is_whole(division, 4, 1000)
    assert contiguous(division)
    log = np.log(snr[snr > 0])
    ends = [log[division.subset(i)[0][0]] for i in range(4)]
    step = (log[0] - log[-1]) / 4
    for i, end in enumerate(ends):
        assert end <= log[0] - i * step < end + np.diff(-log).max()


def test_log_snr_of_a_straight_line_is_uniform() -> None:
    assert (log_snr(4, np.exp(-np.arange(1001) / 10)).member[:, :1000] == uniform(4, 1000).member).all()


def test_log_snr_range_without_a_timestep_is_refused() -> None:
    with pytest.raises(UserError, match=r"num_ranges: with division=log_snr, range 1 of 8 holds none of the 12"):
        log_snr(8, np.exp(-np.array([0.0, 5, 5.1, 5.2, 5.3, 5.4, 5.5, 5.6, 5.7, 5.8, 5.9, 6])))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"beta_schedule": "liner"}, "beta_schedule 'liner' is none of .*did you mean 'linear'"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas holds 2, for num_train_timesteps=1000"),
        ({"trained_betas": [0.1, 1.25], "num_train_timesteps": 2}, r"trained_betas holds 1.25 at t=1; above 0"),
        ({"trained_betas": ["a", 0.1], "num_train_timesteps": 2}, "trained_betas holds what is no number"),
        ({"beta_end": 1.5}, "beta_end is 1.5; a number above 0 and at most 1"),
        ({"beta_start": None}, "beta_start is None; a number above 0"),
        ({"beta_start": "small", "beta_schedule": "scaled_linear"}, "beta_start is 'small'; a number above 0"),
        ({"beta_end": True, "beta_schedule": "sigmoid"}, "beta_end is True; a number above 0"),
    ],
)
def test_schedule_that_is_none_is_refused(config: Values, message: str) -> None:
    with pytest.raises(UserError, match=f"^here: {message}"):
        alphas_cumprod(config, where="here")


def test_schedule_without_terminal_signal_may_be_saved_as_betas() -> None:
    from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr

    betas = rescale_zero_terminal_snr(DDPMScheduler(num_train_timesteps=30).betas)
    assert betas[-1] == 1
    snr = signal_to_noise({"trained_betas": betas.tolist(), "num_train_timesteps": 30, "beta_start": None})
    shifted = signal_to_noise({"num_train_timesteps": 30, "rescale_betas_zero_snr": True})
    assert snr[-1] == shifted[-1] == 0
    np.testing.assert_allclose(snr, shifted, rtol=1e-3)


# by gradients


def by_brute_force(similarity: Similarity, n: int) -> float:
    """The least sum over ranges of m times the mean of 1 - cosine over ordered pairs of timesteps, written out."""
    bin_of = np.repeat(np.arange(len(similarity.cosine)), np.diff(similarity.edges))
    least = np.inf
    for cuts in itertools.combinations(range(1, len(similarity.cosine)), n - 1):
        edges = similarity.edges[[0, *cuts, len(similarity.cosine)]]
        total = 0.0
        for lo, hi in itertools.pairwise(edges.tolist()):
            pairs = [(bin_of[s], bin_of[t]) for s in range(lo, hi) for t in range(lo, hi)]
            total += sum(1 - similarity.cosine[a, b] for a, b in pairs if a != b) / (hi - lo)
        least = min(least, total)
    return least


@settings(deadline=None, max_examples=15)
@given(st.integers(2, 7), st.integers(0, 1000), st.data())
def test_dynamic_programme_finds_the_least_conflict(size: int, seed: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, size))
    similarity = Similarity(cosines(size, seed), np.cumsum([0, *np.random.default_rng(seed).integers(1, 4, size)]))
    cost, cuts = conflicts(similarity), best_cuts(conflicts(similarity), n)
    found = sum(cost[a, b] for a, b in itertools.pairwise([0, *cuts, size]))
    assert found == pytest.approx(by_brute_force(similarity, n), abs=1e-9)
    division = gradient_similarity(n, similarity)
    assert {division.subset(i)[0][0] for i in range(n)} <= set(similarity.edges.tolist())


def test_blocks_of_a_matrix_are_found() -> None:
    owner = np.repeat([0, 1, 2], [3, 9, 4])
    cosine = np.where(owner[:, None] == owner[None], 0.9, -0.1)
    np.fill_diagonal(cosine, 1.0)
    division = gradient_similarity(3, bins(cosine, 160))
    assert [division.subset(i) for i in range(3)] == [[[0, 30]], [[30, 120]], [[120, 160]]]


def test_noise_of_gradients_moves_no_edge() -> None:
    """Noise of its own in each gradient lowers all cosines alike: it costs every division the same."""
    cosine = cosines(12, 3)
    noisy = 0.3 * cosine + 0.7 * np.eye(12)
    cuts = [best_cuts(conflicts(bins(matrix, 120)), 4) for matrix in (cosine, noisy)]
    assert cuts[0] == cuts[1]


def write_matrix(path: Path, cosine: Any, **more: Any) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps({"cosine": np.asarray(cosine).tolist(), **more}))
    elif path.suffix == ".npy":
        np.save(path, cosine)
    else:
        np.savez(path, cosine=cosine, **more)
    return path


@pytest.mark.parametrize("kind", [".npz", ".npy", ".json"])
def test_similarity_files_of_every_kind_give_the_same(kind: str, tmp_path: Path) -> None:
    found = read_similarity(write_matrix(tmp_path / f"s{kind}", cosines(7)), 20)
    np.testing.assert_allclose(found.cosine, cosines(7), atol=1e-12)
    assert found.edges.tolist() == [0, 3, 6, 9, 12, 15, 18, 20]  # where floor(7 t / 20) changes


def test_edges_of_a_file_are_its_own(tmp_path: Path) -> None:
    for kind in (".npz", ".json"):
        assert read_similarity(
            write_matrix(tmp_path / f"s{kind}", cosines(3), edges=[0, 1, 2, 20]), 20
        ).edges.tolist() == [0, 1, 2, 20]
    (tmp_path / "list.json").write_text(json.dumps(cosines(2).tolist()))
    assert read_similarity(tmp_path / "list.json", 20).edges.tolist() == [0, 10, 20]


@pytest.mark.parametrize(
    ("cosine", "more", "message"),
    [
        (np.full((3, 3), np.nan), {}, "not finite"),
        (np.array([[1.0, 0.5], [0.2, 1.0]]), {}, "not symmetric, by 0.3"),
        (np.ones((2, 3)), {}, r"shape \(2, 3\); a square"),
        (np.ones(4), {}, r"shape \(4,\)"),
        (np.ones((0, 0)), {}, "a square matrix is needed"),
        (np.ones((21, 21)), {}, "21 x 21 for 20 timesteps"),
        (np.full((2, 2), 3.0), {}, "between -1 and 1"),
        (np.array([["a"]]), {}, "no matrix of numbers"),
        (np.eye(2) * 1j, {}, "holds complex numbers"),
        (np.array([[1.0, 0.5], [0.5, 0.9]]), {}, "off 1 by 0.1 on its diagonal"),
        (np.ones((2, 2)), {"edges": [0, 20]}, r"edges have shape \(2,\) for 2 bins"),
        (np.ones((2, 2)), {"edges": [0, 25, 20]}, "ascend from 0 to 20"),
        (np.ones((2, 2)), {"edges": [0, 5, 19]}, "ascend from 0 to 20"),
        (np.ones((2, 2)), {"edges": ["a", "b", "c"]}, "edges are no numbers"),
    ],
)
def test_matrix_that_is_no_similarity_is_refused(cosine: Any, more: Values, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"decouple.similarity_file: .*s.npz: .*{message}"):
        read_similarity(write_matrix(tmp_path / "s.npz", cosine, **more), 20)


def nothing(path: Path) -> None:
    path.unlink(missing_ok=True)


def pickled(path: Path) -> None:
    np.savez(path, cosine=np.array([[{}]], dtype=object))


def empty_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w"):
        pass


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("s.npz", nothing, "No such file"),
        ("s.npz", lambda path: path.mkdir(), "."),
        ("s.npz", lambda path: path.write_bytes(b"PK\x03\x04 cut short"), "cannot be read"),
        ("s.npz", lambda path: path.write_bytes(b""), "cannot be read"),
        ("s.npz", pickled, "cannot be read"),
        ("s.npz", empty_zip, "holds nothing, but no cosine or similarity"),
        ("s.json", lambda path: path.write_text("[[1, "), "cannot be read"),
        ("s.json", lambda path: path.write_text("[" * 100_000), "cannot be read"),
        ("s.json", lambda path: path.write_bytes(b"\xff\xfe"), "cannot be read"),
        ("s.json", lambda path: path.write_text('{"a": 1}'), "holds a, but no cosine"),
        ("s.json", lambda path: path.write_text("3"), "shape"),
        ("s.csv", lambda path: path.write_text("1"), "a .npz, .npy or .json file is expected"),
    ],
)
def test_file_that_is_none_is_refused_in_one_line(
    name: str, make: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    make(tmp_path / name)
    with pytest.raises(UserError, match=message) as told:
        read_similarity(tmp_path / name, 20)
    assert "\n" not in str(told.value)


# in a graph


def graph_of(values: Values, **decouple: Any) -> Graph:
    values = copy.deepcopy(values)
    values["decouple"] |= decouple
    return Graph(parse(values, where="test"))


def scheduled(values: Values, folder: Path, **scheduler: Any) -> Values:
    """The recipe with another schedule beside its base."""
    values = copy.deepcopy(values)
    base = shutil.copytree(values["model"]["pretrained"], folder / "base")
    file = base / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | scheduler))
    values["model"]["pretrained"] = str(base)
    return values


def test_experts_of_equal_subsets_are_shared_between_divisions(pico_values: Values, tmp_path: Path) -> None:
    plain = [e.digest for e in graph_of(pico_values).experts[0]]
    file = write_matrix(tmp_path / "s.npz", np.kron(np.eye(2), np.ones((2, 2))))
    same = [
        {"division": "explicit", "edges": [10]},
        {"division": "overlapping", "overlap": 0.0},
        {"division": "gradient_similarity", "similarity_file": str(file)},
    ]
    for decouple in same:
        graph = graph_of(pico_values, **decouple)
        assert [e.digest for e in graph.experts[0]] == plain
        assert graph.similarity is None and not graph.provisional
    for decouple in ({"division": "overlapping"}, {"division": "random_assignment"}, {"division": "log_snr"}):
        assert not set(plain) & {e.digest for e in graph_of(pico_values, **decouple).experts[0]}


def test_division_by_a_file_reaches_other_processes_by_its_edges(pico_values: Values, tmp_path: Path) -> None:
    file = write_matrix(tmp_path / "s.npz", cosines(5, 1), edges=[0, 3, 4, 9, 15, 20])
    graph = graph_of(pico_values, division="gradient_similarity", similarity_file=str(file))
    file.unlink()
    there = Graph(graph.pinned())
    assert {n.digest for n in there.nodes} == {n.digest for n in graph.nodes}


def test_schedule_in_a_base_s_file_that_is_none_is_refused_with_the_file(pico_values: Values, tmp_path: Path) -> None:
    base = scheduled(pico_values, tmp_path, beta_start=None)
    with pytest.raises(UserError, match=r"scheduler/scheduler_config.json: beta_start is None; a number"):
        graph_of(base, division="log_snr")
    graph_of(base)  # which looks at no schedule


@pytest.mark.parametrize(
    ("weighting", "section", "prediction_type", "refused"),
    [
        ("truncated_snr", "decouple", "epsilon", True),
        ("snr_plus_one", "decouple", "epsilon", True),
        ("snr_plus_one", "decouple", "v_prediction", False),
        ("truncated_snr", "decouple", "sample", False),
        ("truncated_snr", "pretrain", "epsilon", False),  # the base is there
        ("min_snr", "decouple", "epsilon", False),
        ("p2", "decouple", "epsilon", False),
    ],
)
def test_infinite_weight_of_a_timestep_is_refused_at_a_dry_run(
    weighting: str, section: str, prediction_type: str, refused: bool, pico_values: Values, tmp_path: Path
) -> None:
    values = scheduled(pico_values, tmp_path, rescale_betas_zero_snr=True, prediction_type=prediction_type)
    values[section] = {**values.get(section, {}), "loss_weighting": weighting}
    if not refused:
        Graph(parse(values, where="test"))
        return
    said = f"^decouple.loss_weighting={weighting} has no finite weight at t=19, where the SNR is 0 .*=min_snr"
    with pytest.raises(UserError, match=said):
        Graph(parse(values, where="test"))


def test_infinite_weight_in_the_training_of_a_base_is_refused_at_a_dry_run(pico_values: Values) -> None:
    steep = {"num_train_timesteps": 200, "beta_start": 0.9, "beta_end": 0.99}  # 1 / SNR is no float32
    pretrain = {"scheduler": steep, "loss_weighting": "snr_plus_one"}
    with pytest.raises(UserError, match=r"^pretrain.loss_weighting=snr_plus_one has no finite weight at t="):
        Graph(parse({**pico_values, "model": {"pretrained": None}, "pretrain": pretrain}, where="test"))


@pytest.mark.parametrize(
    ("decouple", "said"),
    [
        ({"division": "explicit", "edges": [1]}, "division=explicit: of expert 0, the subset is one timestep"),
        ({"division": "overlapping", "overlap": 0.04}, "decouple.overlap=0.04 of 10 timesteps is none: nothing"),
        ({"division": "overlapping", "overlap": 0.1}, None),
        ({"division": "overlapping", "overlap": 0.0}, None),
        ({"num_ranges": 20, "total_steps": 20}, None),
    ],
)
def test_division_that_was_perhaps_not_meant_is_told(decouple: Values, said: str | None, pico_values: Values) -> None:
    remarks = graph_of(pico_values, **decouple).remarks
    assert len(remarks) == (said is not None) and all(remark.startswith(str(said)) for remark in remarks)


def test_one_range_needs_no_similarity(pico_values: Values) -> None:
    graph = graph_of(pico_values, num_ranges=1, division="gradient_similarity")
    assert graph.similarity is None and not graph.provisional


@pytest.mark.parametrize(
    ("decouple", "message"),
    [
        ({"division": "explicit", "edges": [20]}, "decouple.edges: 20; ascending ones from 1 to 19"),
        ({"division": "gradient_similarity", "similarity_file": "no.npz"}, "decouple.similarity_file: no.npz: No such"),
        ({"num_ranges": 15, "total_steps": 15, "division": "log_snr"}, "with division=log_snr, range"),
    ],
)
def test_division_that_cannot_be_is_refused_at_a_dry_run(pico_values: Values, decouple: Values, message: str) -> None:
    with pytest.raises(UserError, match=message):
        graph_of(pico_values, **decouple)


def test_ranges_of_the_loss_are_as_if_they_were_served(pico_values: Values) -> None:
    values = copy.deepcopy(pico_values)
    values["evaluate"]["loss_ranges"] = 2
    told = graph_of(values, division="random_assignment")
    plain, other = graph_of(pico_values), graph_of(pico_values, division="random_assignment")

    def evaluation(graph: Graph, name: str) -> str:
        return next(node.digest for row, _, node in graph.evaluations if row == name)

    assert evaluation(told, "base") == evaluation(plain, "base") != evaluation(other, "base")
    assert told.loss_ranges == [[[0, 10]], [[10, 20]]]
    with pytest.raises(UserError, match=r"evaluate.loss_ranges: 21 ranges do not fit into 20 timesteps"):
        graph_of({**values, "evaluate": {**values["evaluate"], "loss_ranges": 21}})
