"""A base and its experts must compute alike, be whole and unpacked; what else differs is told."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import test_cli
from conftest import component
from deme_diffusion import merge_checkpoints
from deme_diffusion.errors import UserError
from deme_diffusion.merging.apply import Merger
from deme_diffusion.merging.remarks import Progress
from deme_diffusion.results import MergedCheckpoint
from deme_diffusion.weights import WEIGHTS_NAME, State, Weights
from test_cli import Deme

deme = test_cli.deme  # the fixture
STATE: State = {"w": torch.arange(6.0).reshape(2, 3), "ids": torch.tensor([1, 2, 3])}
INFINITE = {**STATE, "mask": torch.tensor([0.0, -torch.inf, 0.0])}


def model(folder: Path, state: State = STATE, **config: Any) -> Path:
    component(folder, state)
    (folder / "config.json").write_text(json.dumps({"_class_name": "Toy", **config}))
    return folder


def merged(tmp_path: Path, expert: Path, **options: Any) -> MergedCheckpoint:
    return merge_checkpoints(tmp_path / "base", [expert], tmp_path / "out", **options)


def result(tmp_path: Path) -> State:
    return load_file(tmp_path / "out" / WEIGHTS_NAME)


# configs


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ({"heads": 4}, {"heads": 2}, r"expert: config\.json: heads is 2, the base's 4"),
        ({"act_fn": "silu"}, {"act_fn": "gelu"}, 'act_fn is "gelu", the base\'s "silu"'),
        ({"widths": [4, 8]}, {"widths": [8, 8]}, r"widths is \[8, 8\], the base's \[4, 8\]"),
        ({"class_embed": None}, {"class_embed": "timestep"}, 'class_embed is "timestep", the base\'s null'),
    ],
)
def test_configs_that_compute_otherwise_are_refused(
    tmp_path: Path, ours: dict[str, Any], theirs: dict[str, Any], said: str
) -> None:
    model(tmp_path / "base", **ours)
    with pytest.raises(UserError, match=said):
        merged(tmp_path, model(tmp_path / "expert", **theirs))
    assert not (tmp_path / "out").exists()


def test_configs_that_say_the_same_are_no_matter(tmp_path: Path) -> None:
    model(tmp_path / "base", heads=4, only=None, eps=1, _name_or_path="a", _diffusers_version="0.1", widths=[4, 8])
    theirs = {"heads": [4, 4], "only": False, "eps": 1.0, "_name_or_path": "b", "_x": 1, "widths": [4, 8]}
    assert merged(tmp_path, model(tmp_path / "expert", **theirs)).notes == (
        "%s: equals the base" % (tmp_path / "expert"),
    )


def test_what_may_not_matter_and_what_only_one_says_is_told(tmp_path: Path) -> None:
    model(tmp_path / "base", sample_size=32, dropout=0.0, upcast_attention=False)
    expert = model(tmp_path / "expert", sample_size=64, dropout=0.1, upcast_attention=True, novel=3)
    note = merged(tmp_path, expert).notes[0]
    assert "sample_size is 64, the base's 32; dropout is 0.1" in note and "and 1 more" in note


def test_a_default_of_diffusers_is_as_good_as_said(tmp_path: Path) -> None:
    model(tmp_path / "base", _class_name="UNet2DModel")
    alike = model(tmp_path / "alike", _class_name="UNet2DModel", act_fn="silu", norm_num_groups=32)
    with Merger(tmp_path / "base", [alike]) as merger:
        assert merger.notes == []
    other = model(tmp_path / "other", _class_name="UNet2DModel", norm_num_groups=8)
    with pytest.raises(UserError, match="norm_num_groups is 8, the base's 32"):
        Merger(tmp_path / "base", [other])


# whole and unpacked models


@pytest.mark.parametrize(
    "key", ["unet.to_q.lora_A.weight", "to_q.lora.up.weight", "lora_unet_mid_to_q.lora_down.weight"]
)
def test_a_lora_is_no_base_and_as_expert_one_that_must_fit(tmp_path: Path, key: str) -> None:
    expert = model(tmp_path / "expert")
    save_file({key: torch.ones(2, 2)}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=r"lora\.safetensors: a LoRA .*fuse it first"):
        Merger(tmp_path / "lora.safetensors", [expert])
    with pytest.raises(UserError, match=r"lora\.safetensors: (nothing in it is for|a LoRA in a format)"):
        Merger(expert, [tmp_path / "lora.safetensors"])


@pytest.mark.parametrize("beside", ["w.absmax", "w.quant_state.bitsandbytes__nf4", "w.SCB"])
@pytest.mark.parametrize("whose", ["base", "expert"])
def test_packed_weights_are_refused(tmp_path: Path, beside: str, whose: str) -> None:
    packed = {"w": torch.ones(6, 1, dtype=torch.uint8), "ids": STATE["ids"], beside: torch.ones(1)}
    paths = {name: model(tmp_path / name, packed if name == whose else STATE) for name in ("base", "expert")}
    with pytest.raises(UserError, match=rf"{whose}: quantised weights \({beside}\)"):
        Merger(paths["base"], [paths["expert"]])


def test_a_config_that_says_quantised_is_refused(tmp_path: Path) -> None:
    model(tmp_path / "base")
    with pytest.raises(UserError, match=r"expert: quantised weights \(config\.json: quantization_config\)"):
        merged(tmp_path, model(tmp_path / "expert", quantization_config={"quant_method": "bitsandbytes"}))


# tensors that are not merged


def test_whole_numbers_are_kept_where_asked_and_told_where_not(tmp_path: Path) -> None:
    model(tmp_path / "base")
    expert = model(tmp_path / "expert", {"w": STATE["w"] + 1, "ids": STATE["ids"] + 1})
    told = merged(tmp_path, expert).notes
    assert any("whole numbers that differ from the base's, and stay the base's: ids" in note for note in told)
    assert result(tmp_path)["ids"].tolist() == [1, 2, 3]
    for out, keep, ids in (("kept", {"ids": 0}, [2, 3, 4]), ("base's", {"ids": "base"}, [1, 2, 3])):
        done = merge_checkpoints(tmp_path / "base", [expert], tmp_path / out, keep=keep)  # type: ignore[arg-type]
        assert load_file(done.path / WEIGHTS_NAME)["ids"].tolist() == ids and done.notes == ()


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "iso_c"])
@pytest.mark.parametrize("shape", [(3,), (1, 3)])
def test_a_mask_of_infinities_that_all_share_passes(tmp_path: Path, method: str, shape: tuple[int, ...]) -> None:
    mask = INFINITE["mask"].reshape(shape)
    model(tmp_path / "base", {**STATE, "mask": mask})
    merged(tmp_path, model(tmp_path / "expert", {**STATE, "w": STATE["w"] + 1, "mask": mask}), method=method)
    assert torch.equal(result(tmp_path)["mask"], mask)
    with Merger(tmp_path / "base", [tmp_path / "expert"], method) as merger:
        assert torch.equal(merger.tensor("mask", [0.5]), mask)


def test_other_infinities_and_nan_are_refused_as_ever(tmp_path: Path) -> None:
    model(tmp_path / "base", INFINITE)
    for i, bad in enumerate([[0.0, -torch.inf, 1.0], [0.0, torch.inf, 0.0], [0.0, 1.0, 0.0]]):
        with pytest.raises(UserError, match="mask: the merged tensor is not finite"):
            merged(tmp_path, model(tmp_path / f"{i}", {**STATE, "mask": torch.tensor(bad)}), weights=[0.5])
    nan = {**STATE, "mask": torch.tensor([torch.nan])}
    with Merger(model(tmp_path / "a", nan), [model(tmp_path / "b", nan)]) as merger, pytest.raises(UserError):
        merger.tensor("mask", [0.5])
    huge = {**STATE, "mask": torch.tensor([1e9])}
    both = model(tmp_path / "c", huge), [model(tmp_path / "d", huge)]
    with Merger(*both) as merger, pytest.raises(UserError, match="too large for float16"):
        merger.tensor("mask", [0.5], torch.float16)


def test_a_broken_expert_of_weight_0_is_told(tmp_path: Path) -> None:
    model(tmp_path / "base")
    broken = model(tmp_path / "broken", {**STATE, "w": torch.full((2, 3), torch.nan)})
    fine = model(tmp_path / "fine", {**STATE, "w": STATE["w"] + 1})
    done = merge_checkpoints(tmp_path / "base", [fine, broken], tmp_path / "out", weights=[1, 0])
    assert done.notes == (f"{broken}: NaN or infinity in w; a weight of 0 leaves it out",)
    assert torch.equal(result(tmp_path)["w"], STATE["w"] + 1)


# two stored names of one tensor


def test_two_names_of_one_tensor_are_refused(tmp_path: Path) -> None:
    both = {f"a.{name}.weight": torch.ones(1) for name in ("proj_attn", "to_out.0", "query")}
    with pytest.raises(UserError, match=r"are one tensor, a\.to_out\.0\.weight"):
        Weights(component(tmp_path / "a", both))


# the rest of a pipeline


def pipeline(folder: Path, by: float, *, kind: str = "epsilon", other: float = 0.0, **config: Any) -> Path:
    model(folder / "transformer", {**STATE, "w": STATE["w"] + by})
    model(folder / "transformer_2", {"w": torch.arange(100_000.0) + other}, **config)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"prediction_type": kind}))
    names = ("transformer", "transformer_2", "scheduler", "feature_extractor")
    (folder / "model_index.json").write_text(json.dumps({name: ["diffusers", "Toy"] for name in names}))
    return folder


@pytest.mark.parametrize("changes", [{"other": 1.0}, {"heads": 3}])
def test_what_else_differs_of_a_pipeline_is_told(tmp_path: Path, changes: dict[str, Any]) -> None:
    pipeline(tmp_path / "base", 0.0, **{name: 2 for name in changes if name == "heads"})
    assert merged(tmp_path, pipeline(tmp_path / "same", 1.0, **{n: 2 for n in changes if n == "heads"})).notes == ()
    expert = pipeline(tmp_path / "expert", 1.0, kind="v_prediction", **changes)
    done = merge_checkpoints(tmp_path / "base", [expert], tmp_path / "other")
    assert done.notes == (
        f"{expert}: prediction_type is v_prediction, the base's epsilon; the merged model has the base's",
        f"{expert}: transformer_2 differs from the base's too; only transformer is merged, the rest is the base's",
    )
    assert (done.path / "transformer_2" / WEIGHTS_NAME).read_bytes() == (
        tmp_path / "base" / "transformer_2" / WEIGHTS_NAME
    ).read_bytes()


@pytest.mark.parametrize("given", ["transformer", f"transformer/{WEIGHTS_NAME}"])
def test_a_component_of_what_is_no_pipeline_is_refused(deme: Deme, tmp_path: Path, given: str) -> None:
    base = pipeline(tmp_path / "base", 0.0) / given
    words = ["--expert", str(base), "--out", "out", "--component", "vae"]
    assert deme("merge", "--base", str(base), *words).refusal.startswith("component vae: base ")
    assert not (tmp_path / "out").exists()


# parents in the record


def test_the_record_has_absolute_paths_and_what_the_hub_s_cache_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model(tmp_path / "base")
    sha, commit = "ab" * 32, "0123abc"
    snapshot = tmp_path / "hub" / "models--org--name--x" / "snapshots" / commit
    blobs = snapshot.parent.parent / "blobs"
    model(snapshot / "unet", {**STATE, "w": STATE["w"] + 1})
    blobs.mkdir()
    (snapshot / "unet" / WEIGHTS_NAME).rename(blobs / sha)
    (snapshot / "unet" / WEIGHTS_NAME).symlink_to(blobs / sha)
    monkeypatch.chdir(tmp_path)
    record = merge_checkpoints("base", [snapshot / "unet"], "out").record
    assert record["base"]["path"] == str(tmp_path / "base")
    assert record["experts"][0] == {
        "path": str(snapshot / "unet"),
        "digest": sha,
        "digest_from": "hub",
        "bytes": (blobs / sha).stat().st_size,
        "repo": "org/name--x".replace("--", "/"),
        "commit": commit,
    }


# progress


def test_a_long_merge_says_now_and_then_how_far_it_is(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    now = [0.0]
    progress = Progress(9, lambda: now[0])
    for seconds, key in [(1, "a"), (16, "a"), (17, "b"), (20, "c"), (30, "d"), (33, "e"), (90, "f")]:
        now[0] = seconds
        progress.at(key)
    assert caplog.messages == [f"{done} of 9 parameters merged" for done in (1, 4, 5)]


def test_the_engine_asks_for_it_at_every_parameter(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("deme_diffusion.merging.remarks.EVERY", 0.0)
    model(tmp_path / "base")
    merged(tmp_path, model(tmp_path / "expert", {**STATE, "w": STATE["w"] + 1}), method="iso_c")
    assert [message for message in caplog.messages if message.endswith("parameters merged")] == [
        "0 of 2 parameters merged",
        "1 of 2 parameters merged",
    ]
