"""What a merge leaves as it is beside the merged weights: never the base's own bytes, never outside the new folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import test_cli
from conftest import component
from deme_diffusion import merge_checkpoints
from deme_diffusion.errors import MachineError, UserError
from deme_diffusion.merging import unmerged
from deme_diffusion.models.conversion import convert
from deme_diffusion.weights import WEIGHTS_NAME, State
from test_cli import Deme

deme = test_cli.deme  # the fixture
BIG = bytes(range(256)) * 2**12
STATE = {"w": torch.arange(4.0)}
HALF = "diffusion_pytorch_model.fp16.safetensors"


def pipeline(folder: Path, by: float = 0.0) -> Path:
    """A pipeline of a toy unet and a part with a big file, a pickle and a config."""
    component(folder / "unet", {key: value + by for key, value in STATE.items()})
    (folder / "vae").mkdir()
    for name, data in (("big.safetensors", BIG), ("big.bin", BIG), ("config.json", b"{}")):
        (folder / "vae" / name).write_bytes(data)
    index = {"_class_name": "Toy", "unet": ["diffusers", "Toy"], "vae": ["diffusers", "Toy"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base and an expert, in which the command runs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.parent / f"{tmp_path.name}-cache"))
    pipeline(tmp_path / "base")
    pipeline(tmp_path / "expert", 1.0)
    return tmp_path


def merged(models: Path, **options: object) -> Path:
    return merge_checkpoints(models / "base", [models / "expert"], models / "out", **options).path  # type: ignore[arg-type]


def listed(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# copies and links


@pytest.mark.parametrize("in_kernel", [True, False])
def test_writing_through_the_merged_model_leaves_the_base_alone(
    models: Path, monkeypatch: pytest.MonkeyPatch, in_kernel: bool
) -> None:
    if not in_kernel:
        monkeypatch.delattr(os, "copy_file_range")
    out = merged(models)
    for name in listed(models / "base" / "vae"):
        assert (out / "vae" / name).read_bytes() == (models / "base" / "vae" / name).read_bytes()
        with (out / "vae" / name).open("r+b") as file:
            file.write(b"overwritten")
    assert (models / "base" / "vae" / "big.safetensors").read_bytes() == BIG
    assert (models / "base" / "vae" / "big.bin").read_bytes() == BIG


def test_a_copy_that_the_system_breaks_off_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(BIG)
    begun, real = list[int](), os.copy_file_range

    def once(source: int, target: int, count: int) -> int:
        if begun:
            raise OSError(22, "Invalid argument")
        begun.append(real(source, target, min(count, 1000)))
        return begun[0]

    monkeypatch.setattr(os, "copy_file_range", once)
    unmerged.copy(tmp_path / "a", tmp_path / "b")
    assert begun == [1000] and (tmp_path / "b").read_bytes() == BIG


def test_links_are_asked_for_and_never_of_pickles_small_files_or_the_hub_s_cache(deme: Deme, models: Path) -> None:
    words = ["--base", "base", "--expert", "expert"]
    assert deme("merge", *words, "--out", "out", "--link").status == 0
    out, base = models / "out" / "vae", models / "base" / "vae"
    same = {name: (out / name).samefile(base / name) for name in listed(base)}
    assert same == {"big.safetensors": True, "big.bin": False, "config.json": False}
    (models / "blobs").mkdir()
    blob = (base / "big.safetensors").rename(models / "blobs" / "abc")
    (base / "big.safetensors").symlink_to(blob)
    assert deme("merge", *words, "--out", "again", "--link").status == 0
    copied = models / "again" / "vae" / "big.safetensors"
    assert not copied.is_symlink() and not copied.samefile(blob) and copied.read_bytes() == BIG


def test_a_recipe_takes_no_link(deme: Deme, models: Path) -> None:
    assert deme("merge", "digits", "--link").refusal.startswith("--link: it is for --base; with the recipe digits")


def test_room_for_the_copies_is_asked_before_anything_is_written(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(models)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=int(1.5 * len(BIG))))
    with pytest.raises(MachineError, match=r"out needs 0\.00 GB"):
        merged(models)
    assert {path.name for path in models.iterdir()} == {"base", "expert"}
    assert merged(models, link=True).is_dir(), "of the two big files one is linked"


# names from a stranger's index


@pytest.mark.parametrize("name", ["../payload", "..", ".hidden", "a/b", "/etc", "a\nb", "", "vae "])
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_part_s_name_that_leads_elsewhere_is_refused(deme: Deme, models: Path, name: str, dry: list[str]) -> None:
    (models / "payload").mkdir()
    (models / "payload" / "x.txt").write_text("no part")
    for folder in ("base", "expert"):
        index = models / folder / "model_index.json"
        whole = index.read_text()
        index.write_text(json.dumps({**json.loads(whole), name: ["diffusers", "Toy"]}))
        before = listed(models)
        words = ["--base", "base", "--expert", "expert", "--out", "out"]
        refusal = deme("merge", *words, *dry).refusal
        assert f"{folder}/model_index.json: {name!r} is no name of a part" in refusal
        assert listed(models) == before
        index.write_text(whole)


def test_conversion_refuses_such_a_name_too(models: Path) -> None:
    index = models / "base" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "../payload": ["diffusers", "Toy"]}))
    (models / "payload").mkdir()
    before = listed(models)
    with pytest.raises(UserError, match=r"'\.\./payload' is no name of a part"):
        convert(models / "base", models / "out")
    assert listed(models) == before and not (models / "out").exists()


# the merged part's own files


def test_files_that_are_no_weights_come_along(models: Path) -> None:
    unet = models / "base" / "unet"
    for name in ("generation_config.json", "modelling.py", "merges.txt"):
        (unet / name).write_text(name)
    left = ("README.md", "merge.json", "model.onnx", "other.bin", HALF, f"{WEIGHTS_NAME}.index.fp16.json", ".hidden")
    for name in left:
        (unet / name).write_text("{}")
    assert listed(merged(models) / "unet") == {
        "config.json", "generation_config.json", "merges.txt", "modelling.py", WEIGHTS_NAME
    }  # fmt: skip


def half(folder: Path, shards: int = 1) -> Path:
    """A component whose only weights are those of a variant."""
    state: State = {f"w{i}": torch.arange(4.0).half() for i in range(4)}
    component(folder, state, shards)
    for file in folder.glob("*.safetensors"):
        file.rename(folder / file.name.replace("diffusion_pytorch_model", "diffusion_pytorch_model.fp16"))
    if shards > 1:
        index = json.loads((folder / f"{WEIGHTS_NAME}.index.json").read_text())
        (folder / f"{WEIGHTS_NAME}.index.json").unlink()
        owner = {key: name.replace("_model", "_model.fp16") for key, name in index["weight_map"].items()}
        (folder / f"{WEIGHTS_NAME}.index.fp16.json").write_text(json.dumps({"metadata": {}, "weight_map": owner}))
    return folder


@pytest.mark.parametrize("shards", [1, 2])
def test_a_variant_s_name_stays_with_its_dtype_and_goes_with_it(tmp_path: Path, shards: int) -> None:
    base, expert = half(tmp_path / "base", shards), half(tmp_path / "expert")
    same = merge_checkpoints(base, [expert], tmp_path / "same", dtype="float16").path
    assert all(".fp16" in path.name for path in same.glob("*.safetensors"))
    wide = merge_checkpoints(base, [expert], tmp_path / "wide", dtype="float32").path
    names = listed(wide)
    if shards == 1:
        assert names == {"config.json", "merge.json", WEIGHTS_NAME}
        assert load_file(wide / WEIGHTS_NAME)["w0"].dtype == torch.float32
    else:
        stems = {f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)}
        assert names == {"config.json", "merge.json", f"{WEIGHTS_NAME}.index.json", *stems}
        owner = json.loads((wide / f"{WEIGHTS_NAME}.index.json").read_text())["weight_map"]
        assert set(owner.values()) == stems


def test_a_record_of_another_merge_is_not_written_over(deme: Deme, models: Path) -> None:
    files = [f"{name}/unet/{WEIGHTS_NAME}" for name in ("base", "expert")]
    (models / "one.merge.json").write_text("precious")
    words = ["--base", files[0], "--expert", files[1], "--out", "one.safetensors"]
    for dry in ([], ["--dry-run"]):
        assert deme("merge", *words, *dry).refusal.startswith("one.merge.json: exists already")
    assert (models / "one.merge.json").read_text() == "precious" and not (models / "one.safetensors").exists()
