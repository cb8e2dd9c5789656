"""`deme merge` without a recipe, the same from Python, and merge.json: both ways of the command, and every refusal."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import deme_diffusion
import test_cli
from conftest import component, make_pico_denoiser, make_pico_values, save_pipeline
from deme_diffusion import merge_checkpoints
from deme_diffusion.artefacts import Key, Store
from deme_diffusion.errors import UserError
from deme_diffusion.merging.table import METHODS
from deme_diffusion.weights import WEIGHTS_NAME, State
from test_cli import NO_NETWORK_NO_TORCH, Deme, outside, write_recipe

UNET = f"unet/{WEIGHTS_NAME}"
deme = test_cli.deme  # the fixture
TWO = ["--base", "base", "--expert", "e0", "--expert", "e1", "--out", "merged"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and two experts as pipelines; read only."""
    folder = tmp_path_factory.mktemp("trained")
    save_pipeline(make_pico_denoiser(), folder / "base")
    for i in range(2):
        expert = make_pico_denoiser()
        draw = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for weight in expert.module.parameters():
                weight.add_(0.05 * torch.randn(weight.shape, generator=draw))
        save_pipeline(expert, folder / f"e{i}")
    return folder


@pytest.fixture
def models(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of them, free to be broken, which is where the command runs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.parent / f"{tmp_path.name}-cache"))
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path


def weights_of(folder: Path) -> State:
    return load_file(folder / UNET)


def eq8(models: Path, key: str, weights: list[float]) -> torch.Tensor:
    """theta + sum_i w_i (theta_i - theta), in float64."""
    base, *experts = (weights_of(models / name)[key].double() for name in ("base", "e0", "e1"))
    return base + sum(w * (expert - base) for w, expert in zip(weights, experts, strict=True))


def names(folder: Path) -> set[str]:
    """All that lies in a folder, hidden files too."""
    return {path.name for path in folder.iterdir()}


# --- what it writes -----------------------------------------------------------------------------------------------


def test_stock_diffusers_loads_the_merged_pipeline_and_its_weights_are_eq_8(deme: Deme, models: Path) -> None:
    from diffusers import DDPMPipeline

    assert deme("merge", *TWO, "--weights", "0.3,0.5").status == 0
    loaded = DDPMPipeline.from_pretrained(models / "merged").unet.state_dict()
    assert loaded.keys() == weights_of(models / "base").keys()
    for key, tensor in loaded.items():
        torch.testing.assert_close(tensor.double(), eq8(models, key, [0.3, 0.5]), rtol=1e-5, atol=1e-6)
    assert names(models / "merged") == {"model_index.json", "scheduler", "unet", "merge.json"}
    scheduler = "scheduler/scheduler_config.json"
    assert (models / "merged" / scheduler).read_bytes() == (models / "base" / scheduler).read_bytes()


def test_three_lines_of_python_do_the_same_to_the_bit(deme: Deme, models: Path) -> None:
    deme("merge", *TWO, "--weights", "0.3,0.5")
    paths = [models / name for name in ("e0", "e1")]
    merged = merge_checkpoints(models / "base", paths, models / "python", weights=[0.3, 0.5])
    assert merged.path == models / "python" and merged.weights == (0.3, 0.5) and merged.notes == ()
    assert (merged.path / UNET).read_bytes() == (models / "merged" / UNET).read_bytes()
    assert json.loads((merged.path / "merge.json").read_text()) == merged.record


@pytest.mark.parametrize("given", [["--weights=-0.1,0.5"], ["--weights", "-0.1,0.5"]])
def test_weights_may_be_negative(deme: Deme, models: Path, given: list[str]) -> None:
    assert deme("merge", *TWO, *given).status == 0
    key = "conv_in.weight"
    torch.testing.assert_close(weights_of(models / "merged")[key].double(), eq8(models, key, [-0.1, 0.5]))


def test_patterns_give_weights_and_keep_gives_whole_tensors(deme: Deme, models: Path) -> None:
    words = ["--weights", "0.5,0.5", "--weights-for", "*.weight=1,0", "--weights-for", "down_blocks.*=0,0.5"]
    done = deme("merge", *TWO, *words, "--keep", "conv_out.*=base", "--keep", "conv_out.bias=1", "--json")
    assert done.status == 0
    merged, e0, e1 = (weights_of(models / name) for name in ("merged", "e0", "e1"))
    for key in merged:
        if key == "conv_out.bias":
            expected = e1[key]
        elif key == "conv_out.weight":
            expected = weights_of(models / "base")[key]
        elif key.startswith("down_blocks."):
            expected = eq8(models, key, [0.0, 0.5]).float()
        else:
            expected = e0[key] if key.endswith(".weight") else eq8(models, key, [0.5, 0.5]).float()
        torch.testing.assert_close(merged[key], expected, rtol=1e-5, atol=1e-6, msg=key)
    told = json.loads(done.out)
    assert told["weights"] == {
        "values": [0.5, 0.5],
        "rules": {"*.weight": [1.0, 0.0], "down_blocks.*": [0.0, 0.5]},
        "keep": {"conv_out.*": "base", "conv_out.bias": 1},
    }
    groups = told["statistics"]["groups"]
    assert groups["down_blocks.0"]["weights"] == [0.0, 0.5]
    assert groups["conv_out"]["weights"] is None and groups["mid_block"]["weights"] is None, "several"


@pytest.mark.parametrize("name", [name for name in METHODS if name != "fisher"])
def test_every_method_merges_with_its_own_default_weights(deme: Deme, models: Path, name: str) -> None:
    done = deme("merge", *TWO, "--method", name, "--json")
    assert done.status == 0, done.err
    told = json.loads(done.out)
    row = METHODS[name]
    assert told["method"] == name and told["citation"] == row.source and told["options"] == dict(row.defaults)
    assert told["weights"] == {"values": row.default_weights(2)}
    assert told["weights_source"] == f"default of {name}"
    assert all(torch.isfinite(tensor).all() for tensor in weights_of(models / "merged").values())


def test_options_of_the_method_change_it_and_are_told(deme: Deme, models: Path) -> None:
    told = json.loads(deme("merge", *TWO, "--method", "ties", "density=1", "--json").out)
    assert told["options"] == {"density": 1.0, "trim": "tensor"}
    merged = merge_checkpoints(
        models / "base", [models / "e0", models / "e1"], models / "python", method="ties", density=0.1
    )
    assert merged.record["options"] == {"density": 0.1, "trim": "tensor"}
    moved = [weights_of(models / name)["conv_in.weight"] != weights_of(models / "base")["conv_in.weight"]
             for name in ("merged", "python")]  # fmt: skip
    assert moved[0].float().mean() > 0.9 and moved[1].float().mean() < 0.5


def test_fisher_takes_a_file_an_expert(deme: Deme, models: Path) -> None:
    for i, information in enumerate((1.0, 3.0)):
        filled = {key: torch.full_like(tensor, information) for key, tensor in weights_of(models / "base").items()}
        save_file(filled, models / f"f{i}.safetensors")
    words = ["--fisher", "f0.safetensors", "--fisher", "f1.safetensors", "--method", "fisher", "--json"]
    told = json.loads(deme("merge", *TWO, *words).out)
    assert [Path(file["path"]).name for file in told["fisher"]] == ["f0.safetensors", "f1.safetensors"]
    key = "conv_in.weight"
    expected = eq8(models, key, [0.25, 0.75])
    torch.testing.assert_close(weights_of(models / "merged")[key].double(), expected, rtol=1e-5, atol=1e-6)
    assert [note.split(": ")[1] for note in told["notes"]] == [
        "nothing says that it is Fisher information (no deme_fisher in its metadata)"
    ] * 2


def test_negative_entries_are_no_fisher_information(deme: Deme, models: Path) -> None:
    """As of the experts' own weights, whose names and shapes are right."""
    before = names(models)
    files = [word for i in range(2) for word in ("--fisher", f"e{i}/{UNET}")]
    done = deme("merge", *TWO, "--method", "fisher", *files)
    line = done.err.splitlines()[-1]
    assert done.status == 2 and re.match(
        rf"deme: e[01]/{UNET}: \S+ has a negative entry, so it is no Fisher information", line
    )
    assert names(models) == before


def of_artefact(models: Path, digest: str, i: int) -> list[str]:
    """An expert as the run's store has it, and its Fisher information: the words that merge them."""
    folder = models / "store" / digest
    shutil.copytree(models / f"e{i}", folder)
    (folder / "manifest.json").write_text(json.dumps({"digest": digest}))
    filled = {key: torch.full_like(tensor, 1.0 + i) for key, tensor in weights_of(models / f"e{i}").items()}
    about = {"deme_fisher": json.dumps({"expert": digest})}
    save_file(filled, models / f"f{i}.safetensors", metadata=about)
    return ["--expert", str(folder), "--fisher", f"f{i}.safetensors"]


def test_fisher_information_of_the_other_expert_is_refused(deme: Deme, models: Path) -> None:
    one, other = of_artefact(models, "aaaa", 0), of_artefact(models, "bbbb", 1)
    start = ["merge", "--base", "base", "--out", "merged", "--method", "fisher"]
    swapped = deme(*start, *one[:2], *other[:2], *other[2:], *one[2:], "--dry-run").refusal
    assert swapped.startswith("f1.safetensors: Fisher information of expert 1 (")
    assert ", not of expert 0 (" in swapped and swapped.endswith("; expert 0's is f0.safetensors")
    strange = deme(*start, *one[:2], *one[2:], *one[:2], *other[2:]).refusal
    assert strange.startswith("f1.safetensors: Fisher information of another (bbbb), not of expert 1 (")
    assert deme(*start, *one, *other).status == 0
    assert json.loads((models / "merged" / "merge.json").read_text())["notes"] == []
    assert deme("merge", *TWO[:-1], "unknown", "--method", "fisher", *other[2:], *one[2:]).status == 0, "copies"


def test_an_interrupted_merge_says_that_nothing_was_written(
    deme: Deme, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("deme_diffusion.merging.write.stream", stop)
    before = names(models)
    done = deme("merge", *TWO)
    assert (done.status, done.out, done.err) == (130, "", "deme: interrupted: nothing was written\n")
    assert names(models) == before


def test_dtype_and_shard_size_of_the_output(deme: Deme, models: Path) -> None:
    from diffusers import UNet2DModel

    told = json.loads(deme("merge", *TWO, "--dtype", "float16", "--max-shard-size", "8KB", "--json").out)
    files = sorted(path.name for path in (models / "merged" / "unet").glob("*.safetensors"))
    assert told["dtype"] == "float16" and told["shards"] == files and len(files) > 1
    state = UNet2DModel.from_pretrained(models / "merged" / "unet", torch_dtype=torch.float16).state_dict()
    key = "conv_in.weight"
    torch.testing.assert_close(state[key], eq8(models, key, [0.5, 0.5]).half(), rtol=2e-3, atol=1e-4)


def test_component_folders_give_a_component_folder(deme: Deme, models: Path) -> None:
    words = ["--base", "base/unet", "--expert", "e0/unet", "--expert", "e1", "--out", "deep/er/merged"]
    assert deme("merge", *words).status == 0
    assert names(models / "deep" / "er" / "merged") == {"config.json", WEIGHTS_NAME, "merge.json"}


def test_files_give_a_file_with_its_record_beside(deme: Deme, models: Path) -> None:
    files = [f"{name}/{UNET}" for name in ("base", "e0", "e1")]
    words = ["--base", files[0], "--expert", files[1], "--expert", files[2], "--out", "one.safetensors"]
    assert deme("merge", *words).status == 0
    deme("merge", *TWO)
    assert load_file(models / "one.safetensors").keys() == weights_of(models / "merged").keys()
    record = json.loads((models / "one.merge.json").read_text())
    assert record["shards"] == ["one.safetensors"]
    assert names(models) == {"base", "e0", "e1", "merged", "one.safetensors", "one.merge.json"}


# --- what it tells ------------------------------------------------------------------------------------------------


def flat(folder: Path, prefix: str = "") -> np.ndarray:
    state = weights_of(folder)
    return np.concatenate([state[key].numpy().reshape(-1) for key in sorted(state) if key.startswith(prefix)])


def test_merge_json_is_what_numpy_says(deme: Deme, models: Path) -> None:
    assert deme("merge", *TWO, "--weights", "0.3,0.5").status == 0
    record = json.loads((models / "merged" / "merge.json").read_text())
    assert (record["method"], record["options"], record["weights"]) == ("task_arithmetic", {}, {"values": [0.3, 0.5]})
    assert (record["weights_source"], record["dtype"], record["score"]) == ("given", "float32", None)
    assert record["shards"] == [WEIGHTS_NAME] and record["notes"] == []
    size = (models / "e1" / UNET).stat().st_size
    expert = record["experts"][1]
    assert (expert["path"], expert["digest_from"], expert["bytes"]) == (str(models / "e1" / "unet"), "hashed", size)
    for name, prefix in (("model", ""), ("mid_block", "mid_block."), ("up_blocks.1", "up_blocks.1.")):
        seen = record["statistics"]["model"] if name == "model" else record["statistics"]["groups"][name]
        theta = flat(models / "base", prefix)
        taus = [(flat(models / e, prefix) - theta).astype(np.float64) for e in ("e0", "e1")]
        lengths = [np.linalg.norm(tau) for tau in taus]
        assert seen["parameters"] == theta.size and seen["share_seen"] == 1.0
        assert seen["norms"] == pytest.approx(lengths, rel=1e-9)
        relative = [length / np.linalg.norm(theta.astype(np.float64)) for length in lengths]
        assert seen["relative_norms"] == pytest.approx(relative, rel=1e-9)
        assert seen["cosines"][0][1] == pytest.approx(taus[0] @ taus[1] / np.prod(lengths), abs=1e-9)
        sizes = np.abs(taus)
        assert seen["overlaps"][0][1] == pytest.approx(sizes.min(0).sum() / sizes.max(0).sum(), rel=1e-9)
    total = sum(group["parameters"] for group in record["statistics"]["groups"].values())
    assert total == record["statistics"]["model"]["parameters"] == 10709


def test_the_small_table_names_groups_weights_and_the_folder(deme: Deme, models: Path) -> None:
    done = deme("merge", *TWO, "--weights", "0.3,0.5", "--weights-for", "mid_block.*=1,0", "--keep", "conv_in.*=1")
    lines = [line.split() for line in done.out.splitlines()]
    rows = {line[0]: line for line in lines if line}
    assert rows["mid_block"][1] == "2,976" and rows["mid_block"][-2:] == ["1", "0"]
    assert rows["conv_in"][-2:] == ["expert", "1"] and rows["up_blocks.0"][-2:] == ["0.3", "0.5"]
    assert rows["model"][1] == "10,709" and lines[-1] == ["merged"]
    record = json.loads((models / "merged" / "merge.json").read_text())["statistics"]["groups"]["mid_block"]
    shown = [float(figure) for figure in rows["mid_block"][2:8]]
    expected = [100 * norm for norm in record["relative_norms"]] + 2 * [record["cosines"][0][1]]
    assert shown == pytest.approx([*expected, *2 * [record["overlaps"][0][1]]], rel=5e-3, abs=5e-4)


def test_an_expert_equal_to_the_base_is_merged_and_said(deme: Deme, models: Path) -> None:
    done = deme("merge", "--base", "base", "--expert", "e0", "--expert", "base", "--out", "merged")
    assert done.status == 0 and "base/unet: equals the base" in done.err
    record = json.loads((models / "merged" / "merge.json").read_text())
    assert record["notes"] == ["base/unet: equals the base"]
    assert record["statistics"]["model"]["norms"][1] == 0.0
    assert record["statistics"]["model"]["cosines"] == [[1.0, None], [None, None]]


@pytest.mark.parametrize("small", [False, True])
def test_digests_are_hashed_where_small_or_asked_then_remembered_and_known_of_artefacts(
    models: Path, monkeypatch: pytest.MonkeyPatch, small: bool
) -> None:
    import hashlib

    monkeypatch.setattr("deme_diffusion.merging.record.SMALL", 2**26 if small else 0)

    def fill(folder: Path) -> None:
        shutil.copytree(models / "e1" / "unet", folder / "unet")

    made = Store(models / "store").produce(Key("decouple", 1, {}, {}, 0), fill)
    given = models / "base", [models / "e0", made.folder]
    sha = [hashlib.sha256((path / UNET).read_bytes()).hexdigest() for path in (given[0], *given[1])]

    def told(out: str, full_hash: bool) -> list[tuple[str | None, str]]:
        record = merge_checkpoints(*given, models / out, full_hash=full_hash).record
        return [(part["digest"], part["digest_from"]) for part in (record["base"], *record["experts"])]

    if not small:
        assert told("one", False) == [(None, "none"), (None, "none"), (sha[2], "manifest")]
    assert told("two", not small) == [(sha[0], "hashed"), (sha[1], "hashed"), (sha[2], "manifest")]
    assert told("three", False) == [(sha[0], "cache"), (sha[1], "cache"), (sha[2], "manifest")]


def test_the_recipe_of_a_merge_is_in_the_files_metadata_too(deme: Deme, models: Path) -> None:
    deme("merge", *TWO, "--method", "ties", "--weights", "1,0.5")
    with safe_open(models / "merged" / UNET, framework="pt") as file:
        told = json.loads(file.metadata()["deme_merge"])
    assert (told["method"], told["weights"], told["options"]["density"]) == ("ties", [1.0, 0.5], 0.2)


def test_methods_are_listed_with_options_and_sources(deme: Deme) -> None:
    listed = deme("merge", "--methods").out
    for row in METHODS.values():
        assert row.name in listed and row.source in listed and all(f"{name}=" in listed for name in row.options)
    assert listed.count("only the ratios count") == sum(row.relative for row in METHODS.values()) > 0


def test_methods_explain_their_options_and_weights(deme: Deme) -> None:
    listed = deme("merge", "--methods").out
    assert listed.count("density: share of a task vector's entries that stay, above 0 to 1") == 5
    assert "rank: share of singular vectors kept (TSV), above 0 to 1" in listed
    assert "t = |w2| / s, times s = |w1| + |w2|" in listed


def test_an_expert_that_is_named_twice_is_said(deme: Deme, models: Path) -> None:
    shutil.copytree(models / "e0", models / "copy")
    (models / "link").symlink_to(models / "e0")
    words = ["--base", "base", "--expert", "e0", "--expert", "copy", "--expert", "link", "--out", "merged"]
    done = deme("merge", *words)
    said = "link/unet: expert 2 is expert 0 again; its task vector counts twice"
    assert said in done.err and done.err.count("again") == 1
    assert said in json.loads((models / "merged" / "merge.json").read_text())["notes"]


def test_options_from_python_are_a_mapping_or_keywords(models: Path) -> None:
    experts, given = [models / "e0", models / "e1"], {"density": 0.1}
    one = merge_checkpoints(models / "base", experts, models / "one", method="ties", options=given)
    two = merge_checkpoints(models / "base", experts, models / "two", method="ties", density=0.1)
    assert one.record["options"] == two.record["options"] == {"density": 0.1, "trim": "tensor"}
    for options, more, said in (
        (given, given, "density: given in options and by itself"),
        ({"dnsity": 0.1}, {}, "did you mean 'density'"),
        (0.1, {}, "options: 0.1; the method's options are expected"),
    ):
        with pytest.raises(UserError, match=said):
            wrong: Any = {"options": options, **more}
            merge_checkpoints(models / "base", experts, models / "no", method="ties", **wrong)


def test_usage_errors_name_the_help_of_their_command(deme: Deme) -> None:
    assert deme("merge", "--bse", "x").refusal.endswith("(deme merge --help tells more)")
    assert deme("mrge").refusal.endswith("(deme --help tells more)")


# --- dry run ------------------------------------------------------------------------------------------------------


def test_a_dry_run_tells_and_writes_nothing(deme: Deme, models: Path) -> None:
    before = names(models)
    done = deme("merge", *TWO, "--weights", "0.3,0.5", "--max-shard-size", "20KB", "--dtype", "bfloat16", "--dry-run")
    assert done.status == 0 and "weights 0.3 0.5 (given)" in done.out and "dtype: bfloat16" in done.out
    assert "0.02 MB of weights; names, shapes, configs and space were checked; values are checked while" in done.out
    plan = json.loads(deme("merge", *TWO, "--max-shard-size", "20KB", "--dry-run", "--json").out)
    assert plan["bytes"] == sum(plan["shards"].values()) == 4 * 10709 and len(plan["shards"]) > 2
    assert plan["estimate"] is None and names(models) == before
    deme("merge", *TWO, "--max-shard-size", "20KB")
    assert sorted(plan["shards"]) == json.loads((models / "merged" / "merge.json").read_text())["shards"]


def test_spectral_methods_are_estimated_first(deme: Deme, models: Path) -> None:
    dry = deme("merge", *TWO, "--method", "iso_c", "--dry-run")
    matrices = sum(tensor.ndim > 1 for tensor in weights_of(models / "base").values())
    assert f"{matrices} matrices to decompose: about " in dry.out
    assert f"{matrices} matrices to decompose: about " in deme("merge", *TWO, "--method", "iso_c").err


# --- bad input ----------------------------------------------------------------------------------------------------


def edited(models: Path, name: str, change: Callable[[State], None]) -> None:
    state = weights_of(models / name)
    change(state)
    save_file(state, models / name / UNET, metadata={"format": "pt"})


def cut_short(models: Path) -> None:
    data = (models / "e1" / UNET).read_bytes()
    (models / "e1" / UNET).write_bytes(data[: len(data) // 2])


def other_architecture(models: Path) -> None:
    shutil.rmtree(models / "e1")
    edited(models, "e0", lambda state: None)
    shutil.copytree(models / "e0", models / "e1")
    edited(models, "e1", lambda state: state.update({"conv_inn.weight": state.pop("conv_in.weight")}))


def other_class(models: Path) -> None:
    """Of another class, with other keys."""
    other_architecture(models)
    config = models / "e1" / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "UNet2DConditionModel"}))


def other_shape(models: Path) -> None:
    edited(models, "e1", lambda state: state.update({"conv_in.bias": torch.zeros(9)}))


def missing_shard(models: Path) -> None:
    state = weights_of(models / "e1")
    shutil.rmtree(models / "e1")
    component(models / "e1", state, shards=3)
    (models / "e1" / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()


def not_a_number(models: Path) -> None:
    edited(models, "e1", lambda state: state["mid_block.resnets.0.conv1.weight"].view(-1)[5].fill_(torch.nan))


def there_already(models: Path) -> None:
    shutil.copytree(models / "base", models / "merged")


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("breaks", "words", "said"),
    [
        (None, ["--weights", "0.1"], "--weights: 1 given for 2 experts"),
        (None, ["--weights", "0.1,0.2,0.3"], "--weights: 3 given for 2 experts"),
        (None, ["--weights", "0.1;0.2"], "--weights 0.1;0.2: '0.1;0.2' is no number"),
        (None, ["--weights", "0.1,nan"], "--weights 0.1,nan: 'nan' is not finite"),
        (None, ["--weights-for", "down_blocks.*"], "--weights-for down_blocks.*: PATTERN=VALUE is expected"),
        (None, ["--weights-for", "down_blocks.*=1"], "--weights-for down_blocks.*: 1 given for 2 experts"),
        (None, ["--weights-for", "down_block.*=1,0"],
         "down_block.*: matches no parameter; did you mean 'down_blocks.*'?"),
        (None, ["--keep", "conv_ot.*=base"], "conv_ot.*: matches no parameter; did you mean 'conv_out.*'?"),
        (None, ["--keep", "conv_out.*=2"], "--keep conv_out.*=2: base, or an expert from 0 to 1"),
        (None, ["--keep", "conv_out.*=e1"], "--keep conv_out.*=e1: base, or an expert's number"),
        (None, ["--method", "tise"], "method: unknown method 'tise'; did you mean 'ties'?"),
        (None, ["--method", "ties", "dnsity=1"], "dnsity: method ties takes density, trim; did you mean 'density'?"),
        (None, ["density=1"], "density: method task_arithmetic takes no options"),
        (None, ["weights_for=1"], "weights_for: no option of a method; say --weights-for"),
        (None, ["--method", "ties", "density=2"],
         "density: Input should be less than or equal to 1 (given: 2); density is the share of a task vector's"),
        (None, ["--method", "ties", "density="], "density=: an option of the method as KEY=VALUE is expected"),
        (None, ["--method", "average", "--weights", "1,0"], "--weights: method average takes none"),
        (None, ["--method", "slerp", "--expert", "e0"], "method slerp merges 2 experts, 3 are given"),
        (None, ["--method", "fisher"], "fisher: 0 files given for 2 experts"),
        (None, ["--fisher", "f.safetensors"], "fisher: method task_arithmetic takes no Fisher information"),
        (None, ["--component", "unte"], "base base: has no part 'unte'; did you mean 'unet'?"),
        (None, ["--dtype", "float8"], "--dtype: 'float8' is not one of float32, float16, bfloat16"),
        (None, ["--dtype", "fp16"],
         "--dtype: 'fp16' is not one of float32, float16, bfloat16; did you mean 'float16'?"),
        (None, ["--max-shard-size", "big"], "--max-shard-size: 'big' is no size"),
        (None, ["--max-shard-size", "5"], "--max-shard-size: '5' is 5 bytes; did you mean '5GB'?"),
        (None, ["density", "0.5"], "density: an option of the method without its value; say density=..."),
        (None, ["--method", "tsv", "rank=4"],
         "rank: Input should be less than or equal to 1 (given: 4); rank is the share of singular vectors kept"),
        (None, ["--jobs", "2"], "--jobs: it is for a recipe"),
        (None, ["digits"], "digits: a recipe and --base do not go together"),
        (None, ["--out", "base"], "out: base is base, which is merged"),
        (None, ["--out", "e1/unet/new"], "out: e1/unet/new lies in e1, which is merged"),
        (None, ["--out", "."], "out: . holds base, which is merged"),
        (None, ["--expert", "bse"], "expert bse: no such file or folder; did you mean 'base'?"),
        (there_already, [], "merged: exists already"),
        (other_class, [], "e1/unet: a UNet2DConditionModel; the base is a UNet2DModel: another architecture"),
        (other_architecture, [], "e1/unet: keys differ from base/unet: 1 missing (conv_in.weight); 1 extra"),
        (other_shape, [], "e1/unet: conv_in.bias has shape (9,), base/unet has (4,)"),
        (cut_short, [], f"e1/{UNET}: not a whole safetensors file"),
        (missing_shard, [], "e1/diffusion_pytorch_model-00002-of-00003.safetensors: missing (1 of 3 weight files)"),
    ],
)  # fmt: skip
def test_what_cannot_be_merged_is_one_line_and_leaves_nothing(
    deme: Deme,
    models: Path,
    breaks: Callable[[Path], None] | None,
    words: list[str],
    said: str,
    dry: list[str],
) -> None:
    if breaks:
        breaks(models)
    before = names(models)
    assert deme("merge", *TWO, *words, *dry).refusal.startswith(said)
    assert names(models) == before


def test_nan_in_an_expert_is_found_while_merging_and_leaves_nothing(deme: Deme, models: Path) -> None:
    not_a_number(models)
    before = names(models)
    line = deme("merge", *TWO).refusal
    assert line.startswith("mid_block.resnets.0.conv1.weight: ") and "e1/unet" in line
    assert names(models) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing to merge: name a recipe, or say --base DIR --expert DIR ... --out DIR"),
        (["--expert", "e0", "--out", "merged"], "--expert without --base: say --base DIR"),
        (["--weights", "1"], "--weights without --base: say --base DIR"),
        (["--base", "base", "--out", "merged"], "--base without --expert: say --expert DIR"),
        (["--base", "base", "--expert", "e0"], "--base without --out: say where the merged model goes"),
        (["digits", "--weights", "1"], "--weights: it is for --base; with the recipe digits merge.search=none"),
        (["digits", "--method", "ties"], "--method: it is for --base; with the recipe digits merge.method=... says it"),
        (["digits", "--full-hash"], "--full-hash: it is for --base; with the recipe digits"),
        (["--base", "base", "--expert", "e0", "e1", "--out", "m"], "e1: a recipe and --base do not go together"),
    ],
)
def test_the_two_ways_are_not_mixed(deme: Deme, models: Path, words: list[str], said: str) -> None:
    assert deme("merge", *words).refusal.startswith(said)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"weights": [0.1]}, "weights: 1 given for 2 experts"),
        ({"weights": [0.1, float("nan")]}, "weights: [0.1, nan]; a weight is a finite number"),
        ({"method": "ties", "dnsity": 1}, "dnsity: method ties takes density, trim; did you mean 'density'?"),
        ({"method": "ties", "density": "much"}, "density: Input should be a valid number"),
        ({"dtype": "float8"}, "dtype: 'float8' is not one of float32, float16, bfloat16"),
        ({"dtype": torch.float64}, "dtype: torch.float64 is not one of float32, float16, bfloat16"),
        ({"dtype": 16}, "dtype: 16 is not one of float32, float16, bfloat16"),
        ({"weights": 0.5}, "weights: 0.5; a number an expert is expected, as [0.3, 0.5]"),
        ({"weights": "0.3,0.5"}, "weights: '0.3,0.5'; a number an expert is expected, as [0.3, 0.5]"),
        ({"weights": [0.3, "much"]}, "weights: [0.3, 'much']; numbers are expected"),
        ({"weights_for": {"conv_in.*": 0.5}}, "weights_for conv_in.*: 0.5; a number an expert is expected"),
        ({"weights_for": [0.5]}, "weights_for: [0.5]; patterns with what they give are expected"),
        ({"method": None}, "method: unknown method None"),
        ({"experts": "e0"}, "experts: 'e0'; a list of paths is expected, as ['e0']"),
        ({"experts": [None]}, "experts: None is no path"),
        ({"fisher": "f"}, "fisher: 'f'; a list of paths is expected, as ['f']"),
        ({"keep": {"conv_in.*": True}}, "keep conv_in.*=True: base, or an expert from 0 to 1"),
        ({"keep": {"conv_in.*": np.int64(2)}}, "keep conv_in.*=2: base, or an expert from 0 to 1"),
        ({"weigths": [0.5, 0.5]}, "weigths: method task_arithmetic takes no options; did you mean 'weights'?"),
        ({"keep": {"conv_in.*": "bas"}}, "keep conv_in.*=bas: base, or an expert from 0 to 1"),
        ({"out": "base"}, "out: "),
        ({"experts": []}, "no experts: "),
    ],
)
def test_python_refuses_the_same(models: Path, given: dict[str, Any], said: str) -> None:
    arguments = {"experts": [models / "e0", models / "e1"], "out": "merged", **given}
    with pytest.raises(UserError, match=f"^{re.escape(said)}"):
        merge_checkpoints(models / "base", arguments.pop("experts"), models / arguments.pop("out"), **arguments)
    assert names(models) == {"base", "e0", "e1"}


def test_python_takes_torchs_dtype_and_numpys_integers(models: Path) -> None:
    given: Any = {"dtype": torch.float16, "keep": {"conv_in.*": np.int64(1)}, "weights": np.array([0.5, 0.5])}
    merged = merge_checkpoints(models / "base", [models / "e0", models / "e1"], models / "merged", **given)
    assert merged.record["dtype"] == "float16" and merged.record["weights"]["keep"] == {"conv_in.*": 1}
    assert torch.equal(weights_of(models / "merged")["conv_in.bias"], weights_of(models / "e1")["conv_in.bias"].half())


# --- a fast start, and the other way ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["--help"], 0),
        (["--methods"], 0),
        ([*TWO, "--weights", "0.1"], 2),
        ([*TWO, "--method", "ties", "dnsity=1"], 2),
    ],
)
def test_help_methods_and_usage_errors_import_no_torch(tmp_path: Path, words: list[str], status: int) -> None:
    done = outside("merge", *words, script=NO_NETWORK_NO_TORCH, cwd=tmp_path)
    assert done.returncode == status and "forbidden" not in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


def test_help_tells_both_ways_and_every_method(deme: Deme) -> None:
    told = deme("merge", "--help").out
    assert "deme merge digits merge.method=ties merge.search=none" in told and "deme merge --base sd --expert a" in told
    assert all(f"\n    {name} " in told for name in METHODS)


def test_with_a_recipe_it_is_a_stage_as_ever(deme: Deme, tmp_path: Path, pico_pipeline: Path) -> None:
    recipe = write_recipe(tmp_path, make_pico_values(pico_pipeline))
    words = ["merge", recipe, "merge.search=none", "merge.weights=[0.2,0.4]"]
    plan = json.loads(deme(*words, "--dry-run", "--json").out)
    assert {"merge", "decouple"} <= {stage["stage"] for stage in plan["stages"]} and not Path("runs").exists()
    made = {stage["label"]: stage for stage in json.loads(deme(*words, "--json").out)}
    assert made["merged"]["stage"] == "merge" and Path(made["merged"]["folder"], UNET).is_file()
    assert deme("merge", recipe, "merge.method=none").refusal.startswith("deme merge: merge.method=none leaves nothing")


def test_it_is_exported() -> None:
    assert "merge_checkpoints" in deme_diffusion.__all__ and deme_diffusion.merge_checkpoints is merge_checkpoints
