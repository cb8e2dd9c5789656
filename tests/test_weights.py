"""Safetensors come out as the format's own library reads them, whole or not at all, and a pickle is never opened."""

import errno
import json
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conftest import component
from deme_diffusion import weights
from deme_diffusion.errors import MachineError, UserError
from deme_diffusion.weights import (
    WEIGHTS_NAME,
    State,
    Weights,
    check_component,
    check_same_keys,
    load_state,
    save_state,
    state_digest,
    stream_to,
)

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
          torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]  # fmt: skip


def filled(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """A tensor of small whole numbers, which every dtype holds."""
    numbers = torch.randint(0, 2 if dtype == torch.bool else 9, shape, generator=torch.Generator().manual_seed(seed))
    return numbers.to(dtype)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same_state(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape), key
        assert bits(found[key]) == bits(tensor), key


def stream(path: Path, state: State, metadata: dict[str, str] | None = None) -> None:
    header = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in state.items()}
    with stream_to(path, header, metadata or {}) as writer:
        for key in writer.keys:
            writer.write(key, state[key])


def header_of(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    header: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header


def small_state() -> State:
    return {
        "conv.weight": filled(torch.float32, (3, 2, 1, 1)),
        "conv.bias": filled(torch.bfloat16, (3,)),
        "scale": filled(torch.float32, ()),
        "nothing": torch.empty(0, 4),
        "flags": filled(torch.bool, (3,)),
        "steps": filled(torch.int64, (1,)),
    }


# the streaming writer


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=4)), max_size=6))
def test_streamed_file_reads_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, specs: list[tuple[torch.dtype, list[int]]]
) -> None:
    path = tmp_path_factory.mktemp("stream") / "a.safetensors"
    state = {f"t{i}": filled(dtype, tuple(shape), seed=i) for i, (dtype, shape) in enumerate(specs)}
    stream(path, state)
    assert_same_state(dict(load_file(path)), state)


def test_streamed_data_are_the_bytes_that_safetensors_itself_would_write(tmp_path: Path) -> None:
    state = small_state()
    stream(tmp_path / "ours.safetensors", state, {"k": "v"})
    save_file(state, tmp_path / "theirs.safetensors", {"format": "pt", "k": "v"})
    ours, theirs = (tmp_path / f"{name}.safetensors" for name in ("ours", "theirs"))
    assert ours.stat().st_size == theirs.stat().st_size
    assert_same_state(dict(load_file(ours)), dict(load_file(theirs)))
    for key, entry in header_of(theirs).items():
        if key != "__metadata__":
            assert {k: header_of(ours)[key][k] for k in ("dtype", "shape")} == {k: entry[k] for k in ("dtype", "shape")}


def test_every_tensor_starts_at_a_multiple_of_its_element_size(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    state = {"odd": filled(torch.uint8, (3,)), "wide": filled(torch.float64, (2,)), "half": filled(torch.float16, (1,))}
    stream(path, state)
    length = int.from_bytes(path.read_bytes()[:8], "little")
    assert length % 8 == 0
    for key, tensor in state.items():
        start, end = header_of(path)[key]["data_offsets"]
        assert start % tensor.element_size() == 0
        assert end - start == tensor.nbytes


def test_metadata_is_kept_beside_the_format(tmp_path: Path) -> None:
    stream(tmp_path / "a.safetensors", {"a": torch.ones(1)}, {"recipe": '{"w": [0.5]}', "über": "ü"})
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "recipe": '{"w": [0.5]}', "über": "ü"}


def test_non_contiguous_tensor_is_written_in_its_logical_order(tmp_path: Path) -> None:
    turned = torch.arange(6.0).reshape(2, 3).T
    stream(tmp_path / "a.safetensors", {"a": turned})
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], turned)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (["b"], "b: written out of order"),
        (["a", "a"], "a: written out of order"),
        (["a", "b", "c"], "c: written out of order"),
        (["a"], "1 tensors were never written"),
    ],
)
def test_wrong_sequence_of_tensors_raises_and_leaves_no_file(tmp_path: Path, written: list[str], message: str) -> None:
    header = {"a": (torch.float32, (2,)), "b": (torch.float32, (2,))}
    with pytest.raises(ValueError, match=message), stream_to(tmp_path / "a.safetensors", header, {}) as writer:
        for key in written:
            writer.write(key, torch.ones(2))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tensor", [torch.ones(3), torch.ones(2, dtype=torch.float64), torch.ones(2, 1)])
def test_tensor_unlike_its_announcement_raises(tmp_path: Path, tensor: torch.Tensor) -> None:
    header = {"a": (torch.float32, (2,))}
    with pytest.raises(ValueError, match=r"a: .* announced as"), stream_to(tmp_path / "a", header, {}) as writer:
        writer.write("a", tensor)


def test_dtype_that_the_format_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a: safetensors has no torch\.complex128"):
        save_state(tmp_path / "a.safetensors", {"a": torch.ones(1, dtype=torch.complex128)})


def test_interrupted_stream_keeps_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    stream(path, {"a": torch.ones(2)})
    header = {"a": (torch.float32, (2,)), "b": (torch.float32, (2,))}
    with pytest.raises(KeyboardInterrupt), stream_to(path, header, {}) as writer:
        writer.write("a", torch.zeros(2))
        raise KeyboardInterrupt
    assert torch.equal(load_file(path)["a"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


# reading


def test_weights_read_a_single_file_and_a_sharded_folder_alike(tmp_path: Path) -> None:
    state = small_state()
    single, sharded = component(tmp_path / "one", state), component(tmp_path / "three", state, shards=3)
    with Weights(single) as one, Weights(sharded) as three, Weights(single / WEIGHTS_NAME) as file:
        for opened in (one, three, file):
            assert_same_state({key: opened.tensor(key) for key in opened.keys()}, state)  # noqa: SIM118
            assert {key: (opened.dtype(key), opened.shape(key)) for key in state} == {
                key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in state.items()
            }


def test_layout_says_which_file_holds_which_keys(tmp_path: Path) -> None:
    state = small_state()
    with Weights(component(tmp_path / "unet", state, shards=2)) as opened:
        layout = {name: sorted(keys) for name, keys in opened.layout().items()}
    keys = list(state)
    assert layout == {
        "diffusion_pytorch_model-00001-of-00002.safetensors": sorted(keys[0::2]),
        "diffusion_pytorch_model-00002-of-00002.safetensors": sorted(keys[1::2]),
    }


@pytest.mark.parametrize("keep", [0, 4, 40, -1], ids=["empty", "length", "header", "one byte short"])
def test_truncated_file_is_a_user_error(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "a.safetensors"
    save_state(path, small_state())
    path.write_bytes(path.read_bytes()[:keep])
    for opening in (Weights, load_state):
        with pytest.raises(UserError, match=r"a\.safetensors: not a whole safetensors file"):
            opening(path)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    folder = component(tmp_path / "unet", small_state(), shards=3)
    (folder / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"00002-of-00003\.safetensors: missing \(1 of 3 weight files\)"):
        Weights(folder)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"weight_map": [1]}'])
def test_broken_shard_index_is_a_user_error(tmp_path: Path, text: str) -> None:
    folder = component(tmp_path / "unet", small_state(), shards=2)
    (folder / f"{WEIGHTS_NAME}.index.json").write_text(text)
    with pytest.raises(UserError, match="index"):
        Weights(folder)


def test_folder_without_config_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json; a diffusers component folder is expected"):
        check_component(tmp_path)


def test_missing_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.safetensors: no such file"):
        load_state(tmp_path / "nowhere.safetensors")


class Bomb:
    """Unpickling it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.ckpt", "model.pt", WEIGHTS_NAME])
def test_pickle_is_refused_and_never_unpickled(tmp_path: Path, name: str) -> None:
    trace, folder = tmp_path / "exploded", tmp_path / "unet"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / name).write_bytes(pickle.dumps(Bomb(trace)))
    for opening in (Weights, load_state):
        with pytest.raises(UserError, match=r"pickle|not a whole safetensors file"):
            opening(folder / name)
    with pytest.raises(UserError, match=r"pickle|not a whole safetensors file"):
        Weights(folder)
    assert not trace.exists()


def test_same_keys_pass_whatever_the_sharding(tmp_path: Path) -> None:
    one = component(tmp_path / "one", small_state())
    two = component(tmp_path / "two", small_state(), shards=2)
    with Weights(one) as a, Weights(two) as b:
        check_same_keys(a, b)


def refusal(base: Path, other: Path) -> str:
    with Weights(base) as ours, Weights(other) as theirs, pytest.raises(UserError) as raised:
        check_same_keys(ours, theirs)
    return str(raised.value)


def test_missing_and_extra_keys_are_listed_with_the_nearest_name(tmp_path: Path) -> None:
    state = small_state()
    other = {("conv.weights" if key == "conv.weight" else key): value for key, value in state.items() if key != "scale"}
    message = refusal(component(tmp_path / "a", state), component(tmp_path / "b", other))
    assert "2 missing (conv.weight, scale); 1 extra (conv.weights)" in message
    assert "did you mean 'conv.weight'?" in message
    assert str(tmp_path / "b") in message


def test_many_differing_keys_are_counted_and_cut(tmp_path: Path) -> None:
    many = {f"k{i}": torch.ones(1) for i in range(5)}
    few = {"k0": torch.ones(1)}
    message = refusal(component(tmp_path / "a", many), component(tmp_path / "b", few))
    assert message.endswith("4 missing (k1, k2, k3, ...)")


def test_differing_shape_is_a_user_error(tmp_path: Path) -> None:
    a, b = ({"w": torch.ones(shape)} for shape in ((2, 3), (3, 2)))
    message = refusal(component(tmp_path / "a", a), component(tmp_path / "b", b))
    assert message == f"{tmp_path / 'b'}: w has shape (3, 2), {tmp_path / 'a'} has (2, 3)"


# whole states


def test_state_survives_saving_and_loading(tmp_path: Path) -> None:
    state = small_state()
    save_state(tmp_path / "deep" / "a.safetensors", state, {"note": "x"})
    assert_same_state(load_state(tmp_path / "deep" / "a.safetensors"), state)
    with safe_open(tmp_path / "deep" / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "note": "x"}


def test_saved_parameters_may_share_memory_and_need_gradients(tmp_path: Path) -> None:
    shared = torch.nn.Parameter(torch.ones(2, 3))
    save_state(tmp_path / "a.safetensors", {"a": shared, "b": shared.T})
    assert_same_state(load_state(tmp_path / "a.safetensors"), {"a": shared.data, "b": shared.data.T})


def test_failed_save_keeps_the_old_file_and_leaves_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, after = tmp_path / "a.safetensors", {"a": torch.zeros(2), "b": torch.zeros(2)}
    save_state(path, {"a": torch.ones(2)})
    real = weights.replacing

    @contextmanager
    def full(path: Path) -> Iterator[Any]:
        with real(path) as file:
            yield Full(file)

    monkeypatch.setattr(weights, "replacing", full)
    with pytest.raises(MachineError, match="No space left on device"):
        save_state(path, after)
    assert torch.equal(load_state(path)["a"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


class Full:
    """A file on a disk that is full after the header."""

    def __init__(self, file: Any) -> None:
        self.file, self.writes = file, 0

    def write(self, data: bytes) -> int:
        self.writes += 1
        if self.writes > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(self.file.write(data))


def test_digest_is_a_function_of_the_state_alone() -> None:
    state = small_state()
    turned = {key: value.clone() for key, value in reversed(state.items())}
    assert state_digest(state) == state_digest(turned)


@pytest.mark.parametrize(
    "changed",
    [
        {"a": torch.tensor([1.0, -0.0])},
        {"a": torch.tensor([1.0, 1e-45])},
        {"b": torch.tensor([1.0, 0.0])},
        {"a": torch.tensor([[1.0, 0.0]])},
        {"a": torch.tensor([1.0, 0.0]).view(torch.int32)},
        {"a": torch.tensor([1.0, 0.0]), "b": torch.empty(0)},
    ],
    ids=["a sign of zero", "a lowest bit", "a name", "a shape", "a dtype of the same bits", "an empty tensor more"],
)
def test_digest_sees(changed: State) -> None:
    assert state_digest(changed) != state_digest({"a": torch.tensor([1.0, 0.0])})
