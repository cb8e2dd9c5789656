"""A streamed merge gives the bits of one in memory, whatever its slices, and its threads end whatever happens."""

from __future__ import annotations

import errno
import math
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import component
from deme_diffusion import weights as weights_module
from deme_diffusion.config import MethodOptions
from deme_diffusion.errors import MachineError, UserError
from deme_diffusion.merging import reading
from deme_diffusion.merging import stream as stream_module
from deme_diffusion.merging.apply import Merger
from deme_diffusion.merging.selection import MergeWeights
from deme_diffusion.merging.stream import stream
from deme_diffusion.merging.table import METHODS
from deme_diffusion.merging.threads import Ended, Line
from deme_diffusion.merging.vectors import Weight, interpolate
from deme_diffusion.merging.write import write_merged
from deme_diffusion.models import projection
from deme_diffusion.weights import WEIGHTS_NAME, State, load_state, save_state, state_digest

POINTWISE = [row.name for row in METHODS.values() if row.pointwise and not row.fisher]
SHAPES = {
    "down.weight": (5, 3, 3, 3),
    "down.bias": (5,),
    "long": (1000,),
    "scale": (),
    "none": (0, 3),
    "one": (1,),
}


def drawn(seed: int, dtype: torch.dtype = torch.float32) -> State:
    random = torch.Generator().manual_seed(seed)
    state = {key: torch.randn(shape, generator=random).to(dtype) for key, shape in SHAPES.items()}
    return {**state, "steps": torch.tensor([seed, 7]), "flag": torch.tensor([True])}


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [component(tmp_path / f"model{seed}", drawn(seed)) for seed in range(4)]


def streamed(merger: Merger, weights: Sequence[float] | MergeWeights, out: Path, **options: Any) -> State:
    header = {key: (merger.base.dtype(key), merger.base.shape(key)) for key in merger.keys()}  # noqa: SIM118
    stream(merger, merger.check(weights), {out: header}, {}, **options)
    return load_state(out)


# bits


@pytest.mark.parametrize("entries", [1, 7, 64, 1000, 1 << 20])
@pytest.mark.parametrize("method", POINTWISE)
def test_slices_of_any_size_give_the_bits_of_the_whole(
    tmp_path: Path, folders: list[Path], method: str, entries: int
) -> None:
    with Merger(folders[0], folders[1:], method) as merger:
        found = streamed(merger, [0.3, -0.2, 0.7], tmp_path / "out.safetensors", entries=entries)
        assert state_digest(found) == state_digest(merger.state([0.3, -0.2, 0.7]))


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties", "breadcrumbs"])
def test_bits_do_not_depend_on_the_threads_nor_on_how_far_is_looked_ahead(
    tmp_path: Path, folders: list[Path], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    digests, before = set(), torch.get_num_threads()
    for threads, ahead in [(1, 1), (2, 1), (4, 600), (4, 1 << 25)]:
        monkeypatch.setattr(stream_module, "AHEAD", ahead)
        try:
            torch.set_num_threads(threads)
            with Merger(folders[0], folders[1:], method) as merger:
                found = streamed(merger, [0.3, 0.0, 0.7], tmp_path / f"{len(digests)}.safetensors", entries=50)
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
        digests.add(state_digest(found))
    assert len(digests) == 1


def test_thresholds_are_of_the_whole_tensor_and_looked_for_once_an_expert(
    tmp_path: Path, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, looks = Merger.thresholds, list[tuple[str, int]]()

    def counting(merger: Merger, key: str, i: int) -> tuple[float, ...]:
        looks.append((key, i))
        return real(merger, key, i)

    monkeypatch.setattr(Merger, "thresholds", counting)
    weights = MergeWeights((1.0, 1.0, 1.0), {"down.bias": (0.0, 0.0, 0.0)}, {"one": 2})
    with Merger(folders[0], folders[1:], "ties", MethodOptions(density=0.1)) as merger:
        found = streamed(merger, weights, tmp_path / "out.safetensors", entries=10)
    assert sorted(looks) == [(key, i) for key in ("down.weight", "long", "scale") for i in range(3)]
    taus = [drawn(seed)["long"] - drawn(0)["long"] for seed in (1, 2, 3)]
    stay = torch.stack([tau.abs() >= tau.abs().sort().values[900] for tau in taus])
    assert torch.equal(found["long"] != drawn(0)["long"], stay.any(0))


def test_error_of_a_look_is_raised_and_no_thread_or_file_stays(
    tmp_path: Path, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = threading.active_count()

    def failing(merger: Merger, key: str, i: int) -> tuple[float, ...]:
        raise MachineError(f"{key}: cannot be read")

    monkeypatch.setattr(Merger, "thresholds", failing)
    with Merger(folders[0], folders[1:], "ties") as merger, pytest.raises(MachineError, match="cannot be read"):
        streamed(merger, [1.0] * 3, tmp_path / "out" / WEIGHTS_NAME, entries=16)
    assert not list((tmp_path / "out").iterdir())
    assert threading.active_count() == threads


def test_streamed_bits_are_those_of_eq_8(tmp_path: Path, folders: list[Path]) -> None:
    base, *experts = (drawn(seed) for seed in range(4))
    with Merger(folders[0], folders[1:]) as merger:
        found = streamed(merger, [0.3, -0.2, 0.7], tmp_path / "out.safetensors", entries=100)
    for key in SHAPES:
        expected = interpolate(Weight(base[key]), [Weight(own[key]) for own in experts], [0.3, -0.2, 0.7]).value
        assert torch.equal(found[key], expected), key
    assert torch.equal(found["steps"], base["steps"])


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if not row.fisher])
def test_every_method_streams_what_it_merges_in_memory(tmp_path: Path, folders: list[Path], method: str) -> None:
    experts = folders[1 : 1 + (METHODS[method].experts or 3)]
    weights = [0.4, 0.6, 0.5][: len(experts)]
    with Merger(folders[0], experts, method) as merger:
        found = streamed(merger, weights, tmp_path / "out.safetensors", entries=64)
        assert state_digest(found) == state_digest(merger.state(weights))
        zero = merger.state([0.0] * len(experts))
    assert state_digest(zero) == state_digest(drawn(0))


def test_ties_trims_over_all_tensors_where_asked(tmp_path: Path, folders: list[Path]) -> None:
    def moved(trim: Any) -> dict[str, torch.Tensor]:
        options = MethodOptions(density=0.3, trim=trim)
        with Merger(folders[0], [component(tmp_path / "wide", wider)], "ties", options) as merger:
            found = streamed(merger, [1.0], tmp_path / "out.safetensors")
        return {key: found[key] != base[key] for key in SHAPES}

    base, other = drawn(0), drawn(1)
    wider = base | {key: base[key] + (other[key] - base[key]) * (9 if key == "long" else 1) for key in SHAPES}
    tau = torch.cat([(wider[key] - base[key]).flatten() for key in SHAPES]).abs()
    least = tau.sort(descending=True).values[math.ceil(0.3 * len(tau)) - 1]
    expected = {key: (wider[key] - base[key]).abs() >= least for key in SHAPES}
    assert all(torch.equal(mask, expected[key]) for key, mask in moved("global").items())
    assert moved("tensor")["down.weight"].sum() == math.ceil(0.3 * 135) > expected["down.weight"].sum()


FLOATING = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=4),
    st.lists(st.sampled_from(FLOATING), min_size=3, max_size=3),
    st.sampled_from([None, *FLOATING]),
    st.integers(1, 40),
    st.lists(st.floats(-2, 2), min_size=2, max_size=2),
)
def test_shapes_and_dtypes_of_any_kind_stream_as_they_merge(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: list[list[int]],
    dtypes: list[torch.dtype],
    out: torch.dtype | None,
    entries: int,
    weights: list[float],
) -> None:
    folder = tmp_path_factory.mktemp("any")
    random = torch.Generator().manual_seed(0)
    states = [
        {f"p{i}": torch.randn(shape, generator=random).to(dtype) for i, shape in enumerate(shapes)} for dtype in dtypes
    ]
    places = [component(folder / str(i), state) for i, state in enumerate(states)]
    with Merger(places[0], places[1:]) as merger:
        header = {key: (merger.dtype_of(key, out), merger.base.shape(key)) for key in merger.keys()}  # noqa: SIM118
        files = {folder / "out.safetensors": header}
        stream(merger, merger.check(weights), files, {}, dtype=out, entries=entries)
        expected = {key: merger.tensor(key, weights, out) for key in merger.keys()}  # noqa: SIM118
    found = load_state(folder / "out.safetensors")
    assert state_digest(found) == state_digest(expected)
    assert {tensor.dtype for tensor in found.values()} == {out or dtypes[0]}


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_float8_is_merged_in_float32_and_written_as_float8(tmp_path: Path, method: str) -> None:
    dtype = torch.float8_e4m3fn
    folders = [component(tmp_path / str(i), {"w": torch.tensor([1.0, 2.0]).mul(i).to(dtype)}) for i in (1, 3)]
    with Merger(folders[0], folders[1:], method) as merger:
        found = streamed(merger, [0.5], tmp_path / "out.safetensors", observe=Seen())["w"]
    assert found.dtype == dtype
    assert found.float().tolist() == ([2.0, 4.0] if method == "task_arithmetic" else [1.0, 4.0])


def test_rules_and_kept_tensors_hold_in_the_stream_as_in_memory(tmp_path: Path, folders: list[Path]) -> None:
    weights = MergeWeights((0.3, 0.2, 0.1), {"down.*": (1.0, 0.5, 0.0)}, {"long": 1, "one": "base"})
    with Merger(folders[0], folders[1:]) as merger:
        found = streamed(merger, weights, tmp_path / "out.safetensors", entries=50)
        assert state_digest(found) == state_digest(merger.state(weights))
    states = [drawn(seed) for seed in range(4)]
    assert torch.equal(found["long"], states[2]["long"])
    assert torch.equal(found["one"], states[0]["one"])
    ruled = interpolate(
        Weight(states[0]["down.bias"]), [Weight(own["down.bias"]) for own in states[1:]], [1.0, 0.5, 0.0]
    )
    assert torch.equal(found["down.bias"], ruled.value)


# Fisher information


def information(folder: Path, seed: int) -> Path:
    state = {key: value.square() for key, value in drawn(seed).items() if value.is_floating_point()}
    save_state(folder / f"fisher{seed}.safetensors", state)
    return folder / f"fisher{seed}.safetensors"


def test_fisher_information_is_sliced_along(tmp_path: Path, folders: list[Path]) -> None:
    files = [information(tmp_path, seed) for seed in (11, 12, 13)]
    with Merger(folders[0], folders[1:], "fisher", fisher=files) as merger:
        found = streamed(merger, [0.3, 0.2, 0.1], tmp_path / "out.safetensors", entries=13)
        assert state_digest(found) == state_digest(merger.state([0.3, 0.2, 0.1]))
    with Merger(folders[0], folders[1:], "fisher", fisher=files[::-1]) as merger:
        assert state_digest(merger.state([0.3, 0.2, 0.1])) != state_digest(found)


def test_fisher_method_is_refused_without_its_files_or_with_those_of_another_model(
    tmp_path: Path, folders: list[Path]
) -> None:
    file = information(tmp_path, 11)
    with pytest.raises(UserError, match="1 files given for 3 experts"):
        Merger(folders[0], folders[1:], "fisher", fisher=[file])
    with pytest.raises(UserError, match="method task_arithmetic takes no Fisher information"):
        Merger(folders[0], folders[1:2], fisher=[file])
    state = load_state(file)
    for name, other, message in [
        ("few", {key: value for key, value in state.items() if key != "long"}, "of another model: lacks long"),
        ("many", {**state, "more": torch.ones(1)}, "of another model: has more"),
        ("wide", {**state, "long": torch.ones(3)}, r"long has shape \(3,\)"),
    ]:
        save_state(tmp_path / name, other)
        with pytest.raises(UserError, match=message):
            Merger(folders[0], folders[1:2], "fisher", fisher=[tmp_path / name])


# who looks on


class Seen:
    """Keeps what it is shown."""

    def __init__(self) -> None:
        self.parts: dict[str, list[list[torch.Tensor]]] = {}

    def see(self, key: str, base: torch.Tensor, experts: Sequence[torch.Tensor]) -> None:
        self.parts.setdefault(key, []).append([part.clone() for part in (base, *experts)])

    def whole(self, key: str, i: int) -> torch.Tensor:
        return torch.cat([parts[i] for parts in self.parts[key]])


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
@pytest.mark.parametrize("weights", [[0.3, 0.2, 0.1], [0.0, 0.0, 0.0]])
def test_observer_sees_each_entry_of_each_floating_parameter_once(
    tmp_path: Path, folders: list[Path], method: str, weights: list[float]
) -> None:
    seen = Seen()
    projection.save(folders[2], {"down": torch.ones(5, 5)})
    with Merger(folders[0], folders[1:], method) as merger:
        streamed(merger, weights, tmp_path / "out.safetensors", entries=64, observe=seen)
    for i, state in enumerate(drawn(seed) for seed in range(4)):
        for key, shape in SHAPES.items():
            if 0 not in shape:
                assert torch.equal(seen.whole(key, i), state[key].flatten()), key
    assert [part.sum() for part in seen.parts["projection.down"][0]] == [0, 0, 25, 0]
    assert seen.parts.keys() - SHAPES.keys() == {"projection.down"}


class Watching:
    """Keeps the most anonymous memory that the process had, in bytes."""

    def __init__(self) -> None:
        self.most = anonymous()

    def see(self, key: str, base: torch.Tensor, experts: Sequence[torch.Tensor]) -> None:
        self.most = max(self.most, anonymous())


def anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for its memory")
def test_memory_does_not_grow_with_a_tensor(tmp_path: Path) -> None:
    size = 2**23  # 32 MB a tensor, in three files
    folders = [component(tmp_path / str(i), {"w": torch.full((size,), float(i))}) for i in range(3)]
    before, watching = anonymous(), Watching()
    with Merger(folders[0], folders[1:]) as merger:
        write_merged(merger, [0.5, 0.25], tmp_path / "out", observe=watching)
    assert watching.most - before < 24e6
    assert load_state(tmp_path / "out" / WEIGHTS_NAME)["w"].unique().tolist() == [1.0]


def test_expert_that_equals_the_base_is_noted_once_it_is_known(tmp_path: Path, folders: list[Path]) -> None:
    with Merger(folders[0], [folders[1], component(tmp_path / "same", drawn(0))]) as merger:
        streamed(merger, [0.5, 0.5], tmp_path / "out.safetensors")
        assert merger.notes == [f"{tmp_path / 'same'}: equals the base"]


# threads


def test_a_closed_line_wakes_and_refuses_both_sides() -> None:
    line, ended = Line[int](1), list[str]()
    line.put(1)

    def waits() -> None:
        try:
            line.put(2)
        except Ended:
            ended.append("put")

    thread = threading.Thread(target=waits)
    thread.start()
    line.close()
    thread.join(5)
    assert ended == ["put"]
    with pytest.raises(Ended):
        line.get()


def test_error_of_the_reading_thread_is_raised_and_no_thread_or_file_stays(
    tmp_path: Path, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, fills, threads = reading._fill, list[str](), threading.active_count()

    def failing(files: Any, reader: Any, piece: Any, *others: Any) -> torch.Tensor:
        fills.append(piece.key)
        if len(fills) == 9:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(files, reader, piece, *others)

    monkeypatch.setattr(reading, "_fill", failing)
    out = tmp_path / "out" / WEIGHTS_NAME
    with Merger(folders[0], folders[1:]) as merger, pytest.raises(OSError) as caught:
        streamed(merger, [0.3, 0.2, 0.1], out, entries=16)
    assert caught.value.errno == errno.EIO
    assert not list(out.parent.iterdir())
    assert threading.active_count() == threads


def test_a_file_that_shrinks_while_it_is_read_is_an_error_of_the_machine(tmp_path: Path, folders: list[Path]) -> None:
    with Merger(folders[0], folders[1:]) as merger:
        file = folders[2] / WEIGHTS_NAME
        os.truncate(file, file.stat().st_size - 4000)
        with pytest.raises(MachineError, match=r"model2.*: became shorter while it was read"):
            streamed(merger, [0.3, 0.2, 0.1], tmp_path / "out.safetensors")


def test_error_of_the_writing_thread_is_raised_and_no_thread_or_file_stays(
    tmp_path: Path, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = threading.active_count()

    def full(writer: weights_module.StreamWriter, key: str, part: torch.Tensor) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(weights_module.StreamWriter, "write_part", full)
    with Merger(folders[0], folders[1:]) as merger, pytest.raises(MachineError, match="No space left on device"):
        write_merged(merger, [0.3, 0.2, 0.1], tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    assert threading.active_count() == threads


@pytest.mark.parametrize("method", ["task_arithmetic", "average", "ties", "iso_c"])
def test_nan_in_an_expert_names_the_tensor_and_the_expert(tmp_path: Path, folders: list[Path], method: str) -> None:
    broken = drawn(9)
    broken["down.weight"][1, 0, 2, 1] = torch.nan
    experts = [folders[1], component(tmp_path / "broken", broken)]
    message = r"^down\.weight: .*not (be )?finite: NaN or infinity in .*broken$"
    with Merger(folders[0], experts, method) as merger, pytest.raises(UserError, match=message):
        streamed(merger, [0.3, 0.2], tmp_path / "out" / "a.safetensors")
    assert not list((tmp_path / "out").iterdir())
