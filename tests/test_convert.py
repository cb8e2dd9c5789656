"""`deme convert`: pickled state dicts, components and pipelines become safetensors; code in a pickle is never run."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import pickle
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from deme_diffusion import cli
from deme_diffusion.errors import MachineError, UserError
from deme_diffusion.models.conversion import convert, write_public
from deme_diffusion.models.ddpm import DDPM
from deme_diffusion.models.projection import FILE
from deme_diffusion.models.public import old_name
from deme_diffusion.pipeline.inputs import component_of
from deme_diffusion.weights import WEIGHTS_NAME, State, StreamWriter

Deme = Callable[..., tuple[int, str, str]]
WIDTHS = (4, 8, 8, 8, 4)
BIN = "diffusion_pytorch_model.bin"


def unet() -> UNet2DModel:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    widths: dict[str, Any] = {"block_out_channels": (4, 8), "norm_num_groups": 2, "attention_head_dim": 4}
    return UNet2DModel(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, **widths, **blocks).eval()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In today's layout; read only."""
    folder = tmp_path_factory.mktemp("base") / "pipeline"
    DDPMPipeline(unet=unet(), scheduler=DDPMScheduler(num_train_timesteps=20, beta_end=0.3)).save_pretrained(folder)
    return folder


@pytest.fixture
def old_state() -> State:
    """As the hub has it since 2022, and as the public code saves it."""
    return {old_name(key): tensor.clone() for key, tensor in unet().state_dict().items()}


@pytest.fixture
def public(old_state: State) -> State:
    return old_state | {f"adapter_list.{i}.weight": 2 * torch.eye(c)[:, :, None, None] for i, c in enumerate(WIDTHS)}


@pytest.fixture
def deme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Deme]:
    """The command in this process, in an empty folder: status, stdout, stderr."""
    root, before = logging.getLogger(), signal.getsignal(signal.SIGTERM)
    handlers, level = root.handlers[:], root.level

    def call(*words: object) -> tuple[int, str, str]:
        root.handlers = []  # the command sets up logging anew, and would close pytest's
        monkeypatch.setattr(sys, "argv", ["deme", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), *capfd.readouterr()

    monkeypatch.chdir(tmp_path)
    yield call
    root.handlers, root.level = handlers, level
    signal.signal(signal.SIGTERM, before)


def saved(value: Any, path: Path, *, zipped: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


def names(folder: Path | str) -> list[str]:
    """What lies in a folder, hidden files included."""
    return sorted(path.name for path in Path(folder).iterdir())


def same_weights(folder: Path) -> bool:
    """Whether stock diffusers loads the folder whole, as `unet()`."""
    loaded, told = UNet2DModel.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    return all(torch.equal(value, loaded.state_dict()[key]) for key, value in unet().state_dict().items())


# -- one state dict --------------------------------------------------------------------------------


def test_command_says_what_it_took_and_where_it_lies(deme: Deme, pipeline: Path, public: State, tmp_path: Path) -> None:
    saved({"state_dict": {f"module.{key}": tensor for key, tensor in public.items()}, "epoch": 3}, Path("expert.ckpt"))
    status, out, err = deme("convert", "expert.ckpt", "--like", pipeline, "--out", "expert")
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "took 'state_dict'",
        "dropped 'module.' before every name",
        f"adapter_list: 5 projections in {FILE}",
        "expert",
    ]
    assert names(".") == ["expert", "expert.ckpt"]
    assert names("expert") == ["config.json", WEIGHTS_NAME, FILE]
    assert same_weights(tmp_path / "expert")
    matrices = load_file(tmp_path / "expert" / FILE)
    assert all(torch.equal(matrix, torch.eye(len(matrix))) for matrix in matrices.values()), "D = 2 I - I"
    status, out, _ = deme("convert", "expert", "--to-public", "back.bin", "--json")
    told = json.loads(out)
    assert status == 0 and told["out"] == "back.bin" and len(told["projections"]) == 5 and told["notes"]
    back = torch.load("back.bin", weights_only=True)
    assert back.keys() == public.keys() and all(torch.equal(back[key], public[key]) for key in public)


def wrapped(state: State) -> dict[str, Any]:
    return {
        "plain": state,
        "model": {"model": state, "optimizer": {"lr": 0.1}},
        "nested": {"model": {"state_dict": state}, "step": torch.tensor(3)},
        "module": {f"module.{key}": tensor for key, tensor in state.items()},
        "compiled": {f"module._orig_mod.{key}": tensor for key, tensor in state.items()},
        "both": {"model": state, "ema": {key: 2 * tensor for key, tensor in state.items()}},
    }


@pytest.mark.parametrize("name", ["plain", "model", "nested", "module", "compiled", "both"])
@pytest.mark.parametrize("zipped", [True, False])
def test_usual_wrappers_are_understood(
    name: str, zipped: bool, pipeline: Path, old_state: State, tmp_path: Path
) -> None:
    file = saved(wrapped(old_state)[name], tmp_path / "expert.pt", zipped=zipped)
    done = convert(file, tmp_path / "expert", pipeline / "unet")
    assert same_weights(tmp_path / "expert") and done.projections == []
    assert bool(done.notes) == (name != "plain")
    if name == "both":
        assert done.notes == ["took 'model', not 'ema'"]


def test_config_beside_a_state_dict_is_enough(pipeline: Path, public: State, tmp_path: Path) -> None:
    """`unet_ema_lora/` of the public code: its config, its pickle, and no base."""
    folder = saved(public, tmp_path / "unet_ema_lora" / BIN).parent
    with pytest.raises(UserError, match=r"model\.bin: a state dict alone; .*--like PIPELINE"):
        convert(folder / BIN, tmp_path / "out")
    shutil.copy(pipeline / "unet" / "config.json", folder)
    for number, given in enumerate((folder, folder / BIN)):
        assert len(convert(given, tmp_path / f"out{number}").projections) == 5
        assert same_weights(tmp_path / f"out{number}")
    with pytest.raises(UserError, match="converted already"):
        convert(tmp_path / "out0", tmp_path / "again")
    config = json.loads((folder / "config.json").read_text())
    for change, line in (
        ({"_class_name": "UNetOfMine"}, "no model of diffusers"),
        ({"layers_per_block": 2}, "missing"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(UserError, match=line):
            convert(folder, tmp_path / "again")


def test_safetensors_of_the_public_layout(pipeline: Path, public: State, tmp_path: Path) -> None:
    save_file(public, tmp_path / "expert.safetensors")
    assert len(convert(tmp_path / "expert.safetensors", tmp_path / "expert", pipeline).projections) == 5
    assert same_weights(tmp_path / "expert")


# -- pickles of code -------------------------------------------------------------------------------


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, makes: Path) -> None:
        self.makes = makes

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.makes),)


@pytest.mark.parametrize("how", ["zip", "legacy", "raw"])
@pytest.mark.parametrize("inside", ["alone", "among tensors"])
def test_a_malicious_pickle_is_never_executed(
    deme: Deme, how: str, inside: str, pipeline: Path, old_state: State, tmp_path: Path
) -> None:
    exploded, file = tmp_path / "exploded", tmp_path / "expert.bin"
    value = Bomb(exploded) if inside == "alone" else {**old_state, "conv_in.weight": Bomb(exploded)}
    if how == "raw":
        file.write_bytes(pickle.dumps(value))
    else:
        saved(value, file, zipped=how == "zip")
    if how != "raw" or inside == "alone":
        (torch.load(file, weights_only=False) if how != "raw" else pickle.loads(file.read_bytes()))
        exploded.rmdir()  # so it would have gone off
    status, out, err = deme("convert", file, "--like", pipeline, "--out", "expert")
    assert (status, out) == (2, "") and err.startswith(f"deme: {file}: ") and err.count("\n") == 1
    assert not exploded.exists() and names(".") == ["expert.bin"]


@pytest.mark.parametrize("how", ["zip", "legacy", "raw"])
def test_a_pickled_module_is_refused_with_a_way_out_that_works(
    deme: Deme, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    file = Path("""it's "$(mine)".bin""")
    if how == "raw":
        file.write_bytes(pickle.dumps(unet()))
    else:
        saved(unet(), file, zipped=how == "zip")
    status, _, err = deme("convert", file, "--like", pipeline, "--out", "merged")
    what = "a pickle that torch.save did not write" if how == "raw" else "a pickle of code (diffusers."
    assert status == 2 and err.startswith(f"deme: {file}: {what}") and err.count("\n") == 1
    way_out = re.search(r"(python -c .*), then (deme convert .*)", err)
    assert way_out
    _, _, code, *arguments = shlex.split(way_out[1])
    monkeypatch.setattr(sys, "argv", ["-c", *arguments])
    exec(code, {})
    assert deme(*shlex.split(way_out[2])[1:], "--like", pipeline, "--out", "merged")[0] == 0
    assert same_weights(tmp_path / "merged")


def test_a_config_of_what_is_no_model_is_refused(old_state: State, pipeline: Path, tmp_path: Path) -> None:
    file = saved(old_state, tmp_path / "expert.bin")
    (tmp_path / "like").mkdir()
    shutil.copy(pipeline / "scheduler" / "scheduler_config.json", tmp_path / "like" / "config.json")
    with pytest.raises(UserError, match=r"config\.json: _class_name 'DDPMScheduler' is no model of diffusers"):
        convert(file, tmp_path / "out", tmp_path / "like")


def test_other_objects_than_tensors_are_named(old_state: State, pipeline: Path, tmp_path: Path) -> None:
    file = saved({"state_dict": old_state, "args": argparse.Namespace(lr=1)}, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=r"last\.ckpt: a pickle of code \(argparse\.Namespace\)"):
        convert(file, tmp_path / "out", pipeline)
    for value, found in (
        ([1, 2], "list"),
        ({"lr": 1.0, "step": 2}, "keys lr, step"),
        (torch.zeros(2), "Tensor"),
        ({}, ""),
    ):
        with pytest.raises(UserError, match=rf"no state dict \(found: .*{found}"):
            convert(saved(value, tmp_path / "odd.pt"), tmp_path / "out", pipeline)
    traced = torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2))  # type: ignore[no-untyped-call]
    torch.jit.save(traced, tmp_path / "traced.pt")
    with pytest.raises(UserError, match=r"traced\.pt: a pickle of code \(TorchScript\)"):
        convert(tmp_path / "traced.pt", tmp_path / "out", pipeline)


# -- bad input, full disks -------------------------------------------------------------------------


def test_broken_files_are_one_line(deme: Deme, pipeline: Path, old_state: State, tmp_path: Path) -> None:
    whole = saved(old_state, tmp_path / "whole.bin").read_bytes()
    legacy = saved(old_state, tmp_path / "legacy.bin", zipped=False).read_bytes()
    broken = {
        "cut": whole[: len(whole) // 2],
        "cut_legacy": legacy[: len(legacy) // 2],
        "short": legacy[:-4],
        "page": b"<html>not found</html>",
        "noise": bytes(range(256)) * 4,
        "empty": b"",
    }
    for name, content in broken.items():
        Path(f"{name}.bin").write_bytes(content)
        status, out, err = deme("convert", f"{name}.bin", "--like", pipeline, "--out", "out")
        assert (status, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith(f"deme: {name}.bin: not a whole torch checkpoint ("), err
        assert name != "page" or "(neither a zip archive nor a pickle)" in err
        assert name != "empty" or "(it is empty)" in err
    Path("cut.safetensors").write_bytes(b"\x08")
    for name, line in (
        ("cut.safetensors", "not a whole safetensors file"),
        ("absent.bin", "no such file"),
        ("../x.txt", "no such file"),
    ):
        status, _, err = deme("convert", name, "--like", pipeline, "--out", "out")
        assert status == 2 and err.startswith(f"deme: {name}: ") and line in err and err.count("\n") == 1
    Path("notes.txt").write_text("no weights")
    assert "ends in .safetensors, .bin" in deme("convert", "notes.txt", "--like", pipeline, "--out", "out")[2]
    assert not Path("out").exists() and not list(tmp_path.glob(".*"))


def test_what_stands_under_the_name_is_kept(deme: Deme, pipeline: Path, old_state: State) -> None:
    saved(old_state, Path("expert.bin"))
    Path("out").mkdir()
    Path("out/mine.txt").write_text("mine")
    Path("dangling").symlink_to("nowhere")
    for name in ("out", "dangling", "expert.bin", "."):
        status, _, err = deme("convert", "expert.bin", "--like", pipeline, "--out", name)
        assert status == 2 and err == f"deme: --out {name}: exists already, and is kept; give another name\n"
    assert Path("out/mine.txt").read_text() == "mine" and not Path("nowhere").exists()
    status, _, err = deme("convert", pipeline, "--to-public", "expert.bin")
    assert status == 2 and "--to-public expert.bin: exists already" in err
    assert torch.load("expert.bin", weights_only=True).keys() == old_state.keys()


def test_options_that_do_not_go_together(deme: Deme, pipeline: Path, old_state: State) -> None:
    saved(old_state, Path("expert.bin"))
    for words, line in (
        (("expert.bin",), "give --out DIR, or --to-public FILE"),
        ((pipeline, "--out", "a", "--to-public", "b.bin"), "give --out DIR, or --to-public FILE"),
        ((pipeline, "--to-public", "b.bin", "--like", pipeline), "--like goes with --out"),
        ((pipeline, "--to-public", "b.safetensors"), "name it b.bin"),
        ((pipeline, "--out", "a"), "nothing to convert"),
        ((pipeline, "--out", "a", "--like", pipeline), "--like goes with a state dict"),
        (("expert.bin", "--out", "a", "--like", "nowhere"), "nowhere: no such folder"),
        (("expert.bin", "--to-public", "b.bin"), "no such folder; a diffusers pipeline or component folder"),
        ((".", "--to-public", "b.bin"), "no config.json"),
    ):
        status, out, err = deme("convert", *words)
        assert (status, out) == (2, "") and line in err and err.count("\n") == 1, err
    assert names(".") == ["expert.bin"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_closed_disk_leaves_nothing(
    pipeline: Path, old_state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    saved(old_state, tmp_path / "expert.bin")

    def full(self: StreamWriter, key: str, tensor: torch.Tensor) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(StreamWriter, "write", full)
    with pytest.raises(MachineError, match=rf"cannot write {tmp_path}/out/{WEIGHTS_NAME}: {os.strerror(code)}"):
        convert(tmp_path / "expert.bin", tmp_path / "out", pipeline)
    assert names(tmp_path) == ["expert.bin"]


def test_a_disk_that_fills_while_the_public_file_is_written(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def __init__(self, file: BinaryIO) -> None:
            self.file = file

        def write(self, data: bytes) -> int:
            if self.file.tell() > 5000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(data)

        def flush(self) -> None:
            self.file.flush()

    save = torch.save
    monkeypatch.setattr(torch, "save", lambda state, file: save(state, cast(Any, Full(file))))
    with pytest.raises(MachineError, match=rf"^cannot write {tmp_path}/back.bin: {os.strerror(errno.ENOSPC)}$"):
        write_public(pipeline, tmp_path / "back.bin")
    assert not list(tmp_path.iterdir())


def test_space_is_asked_for_first(
    pipeline: Path, old_state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(old_state, tmp_path / "expert.bin")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1})())
    with pytest.raises(MachineError, match=r"free$"):
        convert(tmp_path / "expert.bin", tmp_path / "out", pipeline)
    with pytest.raises(MachineError, match=r"free$"):
        write_public(pipeline, tmp_path / "back.bin")
    assert names(tmp_path) == ["expert.bin"]


# -- pipelines -------------------------------------------------------------------------------------


def flat(pipeline: Path, state: State, folder: Path) -> Path:
    """google/ddpm-ema-church-256 as it lies on the hub: all parts in one folder, and a pickle."""
    saved(state, folder / BIN)
    shutil.copy(pipeline / "model_index.json", folder)
    shutil.copy(pipeline / "unet" / "config.json", folder)
    shutil.copy(pipeline / "scheduler" / "scheduler_config.json", folder)
    (folder / "README.md").write_text("a card")
    return folder


def test_a_pipeline_in_one_folder_becomes_one_that_everything_loads(
    deme: Deme, pipeline: Path, old_state: State, tmp_path: Path
) -> None:
    source = flat(pipeline, old_state, tmp_path / "hub")
    with pytest.raises(UserError, match="deme convert FOLDER --out NEW"):
        component_of(source)
    assert deme("convert", source, "--out", "church") == (0, "church\n", "")
    made = {str(path.relative_to("church")) for path in Path("church").rglob("*") if path.is_file()}
    assert made == {
        "model_index.json",
        "README.md",
        "unet/config.json",
        f"unet/{WEIGHTS_NAME}",
        "scheduler/scheduler_config.json",
    }
    assert component_of(Path("church")) == Path("church/unet") and same_weights(tmp_path / "church" / "unet")
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 17])
    one, other = DDPM.load(pipeline), DDPM.load(tmp_path / "church")
    with torch.no_grad():
        assert torch.equal(one.predict(one.module, x, t, {}), other.predict(other.module, x, t, {}))
    stock = DDPMPipeline.from_pretrained("church", use_safetensors=True)
    assert stock.scheduler.config.num_train_timesteps == 20


def test_other_parts_are_converted_or_copied(pipeline: Path, old_state: State, tmp_path: Path) -> None:
    source = tmp_path / "hub"
    shutil.copytree(pipeline, source)
    index = json.loads((source / "model_index.json").read_text())
    index |= {
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "BertModel"],
        "tokenizer": ["transformers", "BertTokenizer"],
        "safety_checker": [None, None],
    }
    (source / "model_index.json").write_text(json.dumps(index))
    (source / "unet" / WEIGHTS_NAME).unlink()
    keys = list(old_state)
    for number, part in enumerate((keys[:20], keys[20:]), start=1):
        name = f"diffusion_pytorch_model-{number:05d}-of-00002.bin"
        saved({key: old_state[key] for key in part}, source / "unet" / name)
    (source / "unet" / f"{BIN}.index.json").write_text("{}")
    attention = {f"mid.{name}.weight": torch.randn(2, 2) for name in ("query", "key", "value", "proj_attn")}
    saved(attention, source / "vae" / BIN)
    (source / "vae" / "config.json").write_text("{}")
    words = {"layer.0.attention.self.query.weight": torch.randn(2, 2)}
    saved(words, source / "text_encoder" / "pytorch_model.bin")
    saved(argparse.Namespace(lr=1), source / "text_encoder" / "training_args.bin")
    (source / "tokenizer").mkdir()
    (source / "tokenizer" / "vocab.txt").write_text("a")
    (source / "whole-model.ckpt").write_bytes(b"gigabytes")

    done = convert(source, tmp_path / "out")
    out = tmp_path / "out"
    assert same_weights(out / "unet") and names(out / "unet") == ["config.json", WEIGHTS_NAME]
    assert sorted(load_file(out / "vae" / WEIGHTS_NAME)) == [
        "mid.to_k.weight",
        "mid.to_out.0.weight",
        "mid.to_q.weight",
        "mid.to_v.weight",
    ]
    converted = load_file(out / "text_encoder" / "model.safetensors")
    assert converted.keys() == words.keys(), "transformers names its attention so to this day"
    assert done.notes == ["text_encoder/training_args.bin: more than tensors, or broken; copied as it is"]
    assert (out / "text_encoder" / "training_args.bin").is_file() and (out / "tokenizer" / "vocab.txt").is_file()
    assert not list(out.rglob("*.ckpt")) and not (out / "vae" / BIN).exists()
    assert names(tmp_path) == ["hub", "out"] and (source / "vae" / BIN).is_file()

    next((source / "unet").glob("*-00002-of-*")).unlink()
    with pytest.raises(UserError, match="1 of the 2 shards"):
        convert(source, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_pipeline_whose_pickle_is_code_is_refused_whole(pipeline: Path, tmp_path: Path) -> None:
    source = flat(pipeline, {}, tmp_path / "hub")
    saved(unet(), source / BIN)
    with pytest.raises(UserError, match=rf"{BIN}: a pickle of code"):
        convert(source, tmp_path / "out")
    assert names(tmp_path) == ["hub"]
