"""Any diffusers layout is found, checked before the first byte, and merged into one like it, whole or not at all."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conftest import component, make_pico_denoiser
from deme_diffusion import files
from deme_diffusion.errors import MachineError, UserError
from deme_diffusion.merging.apply import Merger
from deme_diffusion.merging.checkpoints import Place, locate
from deme_diffusion.merging.write import shard_bytes, write_into, write_model
from deme_diffusion.weights import WEIGHTS_NAME, State, Weights, state_digest

HALF = "diffusion_pytorch_model.fp16.safetensors"


def moved(state: State, by: float) -> State:
    return {key: value + by for key, value in state.items()}


@pytest.fixture(scope="module")
def state() -> State:
    return {key: value.detach().clone() for key, value in make_pico_denoiser().module.state_dict().items()}


@pytest.fixture
def pipeline(tmp_path: Path, pico_pipeline: Path) -> Path:
    return shutil.copytree(pico_pipeline, tmp_path / "pipeline")


@pytest.fixture
def expert(tmp_path: Path, pico_pipeline: Path, state: State) -> Path:
    folder = component(tmp_path / "expert", moved(state, 0.01))
    shutil.copy(pico_pipeline / "unet" / "config.json", folder)
    return folder


def read(path: Path) -> State:
    with Weights(path) as opened:
        return {key: opened.tensor(key).clone() for key in opened.keys()}  # noqa: SIM118


def merge(base: Path, experts: Sequence[Path], out: Path, **options: Any) -> None:
    place = locate(base, what="base")
    found = [locate(path, place.component, what="expert").weights for path in experts]
    with Merger(place.weights, found) as merger:
        write_model(merger, [0.5] * len(experts), place, out, **options)


# where weights lie


def test_pipeline_component_and_file_are_found(pipeline: Path) -> None:
    unet = pipeline / "unet"
    assert locate(pipeline, what="base") == Place(pipeline, unet, "unet", pipeline)
    assert locate(unet, what="base") == Place(unet, unet)
    assert locate(unet / WEIGHTS_NAME, what="base") == Place(unet / WEIGHTS_NAME, unet / WEIGHTS_NAME)
    (pipeline / "model_index.json").unlink()
    assert locate(pipeline, what="base") == Place(pipeline, unet, "unet")


def test_component_asked_for_is_taken_and_a_transformer_found(pipeline: Path) -> None:
    shutil.copytree(pipeline / "unet", pipeline / "prior")
    index = json.loads((pipeline / "model_index.json").read_text())
    (pipeline / "model_index.json").write_text(json.dumps({**index, "prior": ["diffusers", "UNet2DModel"]}))
    assert locate(pipeline, "prior", what="base").weights == pipeline / "prior"
    with pytest.raises(UserError, match=r"base .*has no part 'priors'; did you mean 'prior'"):
        locate(pipeline, "priors", what="base")
    (pipeline / "unet").rename(pipeline / "transformer")
    index["transformer"] = index.pop("unet")
    (pipeline / "model_index.json").write_text(json.dumps(index))
    assert locate(pipeline, what="base").component == "transformer"
    (pipeline / "model_index.json").write_text('{"vqvae": ["diffusers", "VQModel"]}')
    with pytest.raises(UserError, match="no unet or transformer in it; name the component: vqvae"):
        locate(pipeline, what="base")


def test_what_is_no_checkpoint_is_said_in_one_line(tmp_path: Path, pipeline: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"")
    (tmp_path / "model.txt").write_bytes(b"")
    for path, message in [
        (tmp_path / "pipelin", "expert .*no such file or folder; did you mean 'pipeline'"),
        (tmp_path, "no model_index.json and no config.json.*in it lies model.ckpt"),
        (tmp_path / "model.ckpt", "a pickled checkpoint, which is never loaded; `deme convert .*model.ckpt --like"),
        (tmp_path / "model.txt", r"not a \.safetensors file"),
    ]:
        with pytest.raises(UserError, match=message):
            locate(path, what="expert")
    (pipeline / "model_index.json").write_text("{")
    with pytest.raises(UserError, match=r"no readable model_index\.json"):
        locate(pipeline, what="base")


@pytest.mark.parametrize("name", [HALF, "model.safetensors"])
def test_weights_under_other_names_are_read_and_written_under_them(
    tmp_path: Path, expert: Path, state: State, name: str
) -> None:
    base = component(tmp_path / "base", state)
    (base / WEIGHTS_NAME).rename(base / name)
    merge(base, [expert], tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", name]
    merge(base, [expert], tmp_path / "sharded", max_shard_size="20KB")
    assert state_digest(read(tmp_path / "sharded")) == state_digest(read(tmp_path / "out"))


def test_default_goes_before_a_variant_which_is_not_carried_along(tmp_path: Path, expert: Path, pipeline: Path) -> None:
    (pipeline / "unet" / HALF).write_bytes(b"never read")
    merge(pipeline, [expert], tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out" / "unet").iterdir()) == ["config.json", WEIGHTS_NAME]
    (pipeline / "unet" / WEIGHTS_NAME).rename(pipeline / "unet" / "diffusion_pytorch_model.ema.safetensors")
    with pytest.raises(UserError, match="weights of several variants"):
        Merger(pipeline / "unet", [expert])


def test_query_of_another_model_keeps_its_name(tmp_path: Path) -> None:
    state = {"attention.self.query.weight": torch.ones(2, 2), "old.proj_attn.weight": torch.ones(2, 2)}
    with Weights(component(tmp_path / "bert", {**state, "old.query.weight": torch.ones(2)})) as opened:
        assert set(opened.keys()) == {"attention.self.query.weight", "old.to_out.0.weight", "old.to_q.weight"}


# what is written


def test_merged_pipeline_loads_and_its_other_parts_are_copies(
    tmp_path: Path, pipeline: Path, expert: Path, state: State
) -> None:
    index = json.loads((pipeline / "model_index.json").read_text())
    (pipeline / "model_index.json").write_text(json.dumps({**index, "vae": ["diffusers", "AutoencoderKL"]}))
    (pipeline / "vae").mkdir()
    blob = tmp_path / "blobs" / "abc"
    blob.parent.mkdir()
    blob.write_bytes(bytes(2**20))
    (pipeline / "vae" / "big.safetensors").symlink_to(blob)  # as in a snapshot of the hub
    (pipeline / "vae" / "config.json").write_text("{}")
    merge(pipeline, [expert], tmp_path / "out")
    big, config = tmp_path / "out" / "vae" / "big.safetensors", tmp_path / "out" / "vae" / "config.json"
    assert not big.is_symlink() and not big.samefile(blob) and big.read_bytes() == blob.read_bytes()
    assert not config.samefile(pipeline / "vae" / "config.json")
    (tmp_path / "out" / "model_index.json").write_text(json.dumps(index))
    merged = DDPMPipeline.from_pretrained(tmp_path / "out").unet.state_dict()
    for key, value in moved(state, 0.005).items():
        torch.testing.assert_close(merged[key], value, rtol=0, atol=1e-6)


def test_an_interrupted_attempt_in_the_same_folder_is_written_over_and_the_base_left_alone(
    tmp_path: Path, pipeline: Path, expert: Path
) -> None:
    big = pipeline / "scheduler" / "big.safetensors"
    big.write_bytes(bytes(2**20))
    place = locate(pipeline, what="base")
    for link in (True, False):
        with Merger(place.weights, [expert]) as merger:
            write_into(merger, [0.5], place, tmp_path / "out", link=link)
        assert (tmp_path / "out" / "scheduler" / "big.safetensors").samefile(big) == link
    (tmp_path / "out" / "scheduler" / "big.safetensors").write_bytes(b"mine")
    assert big.read_bytes() == bytes(2**20)


def test_shards_of_a_size_load_in_diffusers_and_hold_the_bits_of_one_file(
    tmp_path: Path, pipeline: Path, expert: Path
) -> None:
    merge(pipeline, [expert], tmp_path / "one")
    merge(pipeline, [expert], tmp_path / "many", max_shard_size="12KB")
    shards = sorted((tmp_path / "many" / "unet").glob("*.safetensors"))
    assert len(shards) > 2
    assert all(sum(value.nbytes for value in load_file(shard).values()) <= 12_000 for shard in shards)
    assert state_digest(read(tmp_path / "many" / "unet")) == state_digest(read(tmp_path / "one" / "unet"))
    loaded = UNet2DModel.from_pretrained(tmp_path / "many" / "unet").state_dict()
    assert state_digest(dict(loaded)) == state_digest(read(tmp_path / "one" / "unet"))
    index = json.loads((tmp_path / "many" / "unet" / f"{WEIGHTS_NAME}.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in loaded.values())


def test_sizes_of_shards_are_read_as_people_write_them() -> None:
    assert [shard_bytes(size) for size in ("5GB", "500 mb", "2GiB", "1.5K", 77)] == [
        5 * 10**9, 5 * 10**8, 2**31, 1500, 77]  # fmt: skip
    with pytest.raises(UserError, match="'5' is 5 bytes; did you mean '5GB'"):
        shard_bytes("5")
    for wrong in ("5 apples", "", "0GB", "-1GB"):
        with pytest.raises(UserError, match="give one like 5GB"):
            shard_bytes(wrong)


def test_dtype_that_a_config_says_is_that_of_the_merged_weights_and_nothing_else_changes(
    tmp_path: Path, state: State
) -> None:
    base, expert = (component(tmp_path / name, moved(state, by)) for name, by in (("base", 0.0), ("expert", 0.01)))
    said = {"architectures": ["CLIPTextModel"], "torch_dtype": "float32", "deep": {"torch_dtype": "float32"}, "n": 1e-5}
    for folder in (base, expert):
        (folder / "config.json").write_text(json.dumps(said))
    before = (base / "config.json").read_bytes()
    merge(base, [expert], tmp_path / "as-it-is")
    assert (tmp_path / "as-it-is" / "config.json").read_bytes() == before
    merge(base, [expert], tmp_path / "half", dtype=torch.float16)
    assert json.loads((tmp_path / "half" / "config.json").read_text()) == {**said, "torch_dtype": "float16"}
    assert (base / "config.json").read_bytes() == before
    (base / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    (expert / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    merge(base, [expert], tmp_path / "silent", dtype=torch.float16)
    assert "torch_dtype" not in (tmp_path / "silent" / "config.json").read_text()


def test_a_file_is_merged_into_a_file_with_the_record_next_to_it(tmp_path: Path, expert: Path, state: State) -> None:
    base = tmp_path / "base.safetensors"
    save_file(state, base)
    out = tmp_path / "out" / "merged.safetensors"
    merge(base, [expert], out, dtype=torch.bfloat16, beside=lambda folder: files.write_json(folder / "merge.json", {}))
    assert sorted(path.name for path in out.parent.iterdir()) == ["merged.merge.json", "merged.safetensors"]
    assert {value.dtype for value in load_file(out).values()} == {torch.bfloat16}
    with safe_open(out, framework="pt") as opened:
        assert json.loads(opened.metadata()["deme_merge"]) == {"weights": [0.5]}
    merge(base, [expert], tmp_path / "folder")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["base.safetensors"]


def test_experts_in_another_dtype_or_sharding_merge_and_the_dtype_is_noted(
    tmp_path: Path, pipeline: Path, state: State
) -> None:
    half = component(tmp_path / "half", {key: value.bfloat16() for key, value in state.items()}, shards=3)
    shutil.copy(pipeline / "unet" / "config.json", half)
    with Merger(pipeline / "unet", [half]) as merger:
        assert len(merger.notes) == 1 and "another dtype than the base's" in merger.notes[0]
        assert {value.dtype for value in merger.state([0.5]).values()} == {torch.float32}


# refusals before the first byte


def test_faults_of_shards_are_found_at_opening(tmp_path: Path, pipeline: Path, state: State) -> None:
    index = f"{WEIGHTS_NAME}.index.json"
    second = "diffusion_pytorch_model-00002-of-00003.safetensors"

    def cut(folder: Path) -> None:
        (folder / second).write_bytes((folder / second).read_bytes()[:-4])

    def lie(folder: Path) -> None:
        found = json.loads((folder / index).read_text())
        (folder / index).write_text(json.dumps({"weight_map": {**found["weight_map"], "ghost.weight": second}}))

    def pickled(folder: Path) -> None:
        (folder / second).rename(folder / "diffusion_pytorch_model.bin")

    faults = {
        r"00002-of-00003.safetensors: missing \(1 of 3": lambda folder: (folder / second).unlink(),
        "00002-of-00003.safetensors: not a whole safetensors file": cut,
        "does not agree with the shards: ghost.weight is in none of them": lie,
        "diffusion_pytorch_model.bin: a pickled checkpoint.*`deme convert": pickled,
    }
    for i, (message, fault) in enumerate(faults.items()):
        expert = component(tmp_path / f"expert{i}", state, shards=3)
        fault(expert)
        with pytest.raises(UserError, match=message):
            merge(pipeline, [expert], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir() if "out" in path.name) == []


def test_convolutions_for_linear_layers_are_a_clear_line(tmp_path: Path) -> None:
    flat, square = ({"to_q.weight": torch.ones(shape)} for shape in ((4, 4), (4, 4, 1, 1)))
    with pytest.raises(UserError, match=r"\(4, 4, 1, 1\).*one has 1x1 convolutions where the other has linear layers"):
        Merger(component(tmp_path / "a", flat), [component(tmp_path / "b", square)])


def test_a_target_that_is_taken_or_lies_in_a_parent_is_refused(tmp_path: Path, pipeline: Path, expert: Path) -> None:
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    file.write_text("mine")
    for out, message in [
        (full, "exists already"),
        (file, "exists already"),
        (file / "deep" / "out", "file is a file, not a folder"),
        (pipeline / "merged", "lies inside .*pipeline, which is merged from"),
        (expert / "merged", "lies inside .*expert, which is merged from"),
        (tmp_path / "out.safetensors", "a file, but the base is a folder"),
    ]:
        with pytest.raises(UserError, match=message):
            merge(pipeline, [expert], out)
    other = shutil.copytree(pipeline, tmp_path / "other")
    with pytest.raises(UserError, match=r"lies inside .*other, which is merged from"):
        merge(pipeline, [other], other / "merged")
    assert (full / "mine.txt").read_text() == file.read_text() == "mine"
    (tmp_path / "empty").mkdir()
    merge(pipeline, [expert], tmp_path / "empty")
    assert (tmp_path / "empty" / "unet" / WEIGHTS_NAME).is_file()


# trouble of the machine


def nothing_but(folder: Path, *names: str) -> bool:
    return sorted(path.name for path in folder.iterdir()) == sorted(names)


def test_a_disk_without_room_is_told_before_anything_is_written(
    tmp_path: Path, pipeline: Path, expert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    with pytest.raises(MachineError, match=r"/out needs 0\.00 GB"):
        merge(pipeline, [expert], tmp_path / "out")
    assert nothing_but(tmp_path, "pipeline", "expert")


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, pipeline: Path, expert: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(MachineError, match=rf"^cannot write {tmp_path}/out/unet.*: File too large$"):
            merge(pipeline, [expert], tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert nothing_but(tmp_path, "pipeline", "expert")


def test_a_read_only_target_is_one_line(
    tmp_path: Path, pipeline: Path, expert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path, *args: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(MachineError, match=rf"^cannot write {tmp_path}/out: Read-only file system"):
        merge(pipeline, [expert], tmp_path / "out")


def test_two_merges_into_one_target_do_not_touch_each_other(tmp_path: Path, pipeline: Path, expert: Path) -> None:
    def again(_: Path) -> None:
        with pytest.raises(MachineError, match="another process is at work on it"):
            merge(pipeline, [expert], tmp_path / "out")

    merge(pipeline, [expert], tmp_path / "out", beside=again)
    assert (tmp_path / "out" / "unet" / WEIGHTS_NAME).is_file()
    assert nothing_but(tmp_path, "pipeline", "expert", "out")


def test_a_target_that_appears_in_the_meantime_is_not_overwritten(tmp_path: Path, pipeline: Path, expert: Path) -> None:
    def made(_: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("mine")

    with pytest.raises(UserError, match="somebody else has made it in the meantime"):
        merge(pipeline, [expert], tmp_path / "out", beside=made)
    assert nothing_but(tmp_path, "pipeline", "expert", "out")
    assert nothing_but(tmp_path / "out", "mine.txt")


class Waits:
    """An observer that says when the merge is in the middle, and never goes on."""

    def __init__(self, told: Connection) -> None:
        self.told, self.seen = told, 0

    def see(self, key: str, base: torch.Tensor, experts: Sequence[torch.Tensor]) -> None:
        self.seen += 1
        if self.seen == 10:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background a shell has it ignored
            self.told.send(os.getpid())
            signal.pause()


@pytest.fixture
def stopped(tmp_path: Path, pipeline: Path, expert: Path) -> Callable[[signal.Signals], None]:
    """End a merge into `out`, in a process of its own, by a signal in the middle."""

    def by(ending: signal.Signals) -> None:
        context, (told, tells) = multiprocessing.get_context("fork"), multiprocessing.Pipe(duplex=False)
        arguments = (pipeline, [expert], tmp_path / "out")
        process = context.Process(target=merge, args=arguments, kwargs={"observe": Waits(tells)})
        process.start()
        assert told.poll(30)
        os.kill(told.recv(), ending)
        process.join(30)
        ended = process.exitcode
        process.kill()  # lest the suite wait for it for ever
        assert ended not in (0, None)

    return by


def test_interrupted_merge_leaves_nothing_at_all(tmp_path: Path, stopped: Callable[[signal.Signals], None]) -> None:
    stopped(signal.SIGINT)
    assert nothing_but(tmp_path, "pipeline", "expert")


def test_killed_merge_leaves_nothing_under_the_name_and_the_next_one_cleans_up(
    tmp_path: Path, pipeline: Path, expert: Path, stopped: Callable[[signal.Signals], None]
) -> None:
    stopped(signal.SIGKILL)
    out, hidden = tmp_path / "out", tmp_path / ".out.deme-tmp"
    assert not out.exists()
    assert any(hidden.rglob("*.deme-tmp")), "killed in the middle of a file"
    (hidden / "left" / "deep").mkdir(parents=True)
    merge(pipeline, [expert], out)
    merge(pipeline, [expert], tmp_path / "whole")
    assert state_digest(read(out / "unet")) == state_digest(read(tmp_path / "whole" / "unet"))
    assert nothing_but(tmp_path, "pipeline", "expert", "out", "whole")
    assert nothing_but(out, "model_index.json", "scheduler", "unet")


def test_a_link_to_an_empty_folder_stays_a_link(tmp_path: Path, pipeline: Path, expert: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    merge(pipeline, [expert], tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "elsewhere" / "unet" / WEIGHTS_NAME).is_file()


def test_a_hub_name_says_how_to_fetch_it() -> None:
    with pytest.raises(UserError, match=r"hf download owner/nobodys-model --local-dir FOLDER"):
        locate(Path("owner/nobodys-model"), what="base")
    with pytest.raises(UserError, match=r"no such file or folder$"):
        locate(Path("a/b/c"), what="base")
