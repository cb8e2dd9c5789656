"""Two experts as one stock pipeline with transformer_2 and boundary_ratio, and such a pair as experts to merge."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import test_cli
import tiny
import tiny_flow
from conftest import make_pico_values
from deme_diffusion.artefacts import Store
from deme_diffusion.config import SamplerSettings
from deme_diffusion.division import Division, from_runs, uniform
from deme_diffusion.divisions import explicit, random_assignment
from deme_diffusion.errors import UserError
from deme_diffusion.evaluation.sample import make_scheduler
from deme_diffusion.evaluation.samplers import flow_names
from deme_diffusion.files import write_json
from deme_diffusion.merging.pairs import boundary_ratio, experts_of
from deme_diffusion.models.families import family
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.node import Served
from deme_diffusion.pipeline.pairing import export_pair
from deme_diffusion.pipeline.run import Run, open_run
from deme_diffusion.pipeline.workbench import Workbench
from deme_diffusion.recipes import load
from deme_diffusion.weight_files import read_json
from test_cli import Deme
from tiny_flow import SEQUENCE, T

deme = test_cli.deme  # the fixture
WEIGHTS = "diffusion_pytorch_model.safetensors"
EULER = "FlowMatchEulerDiscreteScheduler"


def captioned(folder: Path, count: int = 48) -> Path:
    """Grey squares with captions."""
    folder.mkdir()
    rows = []
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": f"picture {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def values_of(folder: Path, **decouple: Any) -> dict[str, Any]:
    """A recipe of two experts on the tiny Wan pipeline."""
    values = make_pico_values(folder / "wan")
    sampler = {"name": EULER, "num_inference_steps": 4}
    return {
        **values,
        "name": "pair",
        "model": {**values["model"], "family": "wan", "resolution": 16, "max_sequence_length": SEQUENCE},
        "data": {"source": "folder", "path": str(folder / "images")},
        "extractor": {"kind": "inception"},
        "decouple": {**values["decouple"], "learning_rate": 0.1, "use_ema": False, "projection": "none", **decouple},
        "merge": {"search": "none", "sampler": sampler},
        "evaluate": {
            "samplers": [sampler, {"name": "UniPCMultistepScheduler", "num_inference_steps": 5}],
            "num_images": 4,
            "controls": [],
        },
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the base and the images."""
    folder = tmp_path_factory.mktemp("pairs")
    tiny_flow.wan(folder / "wan")
    captioned(folder / "images")
    return folder


def trained(folder: Path, out: Path, **decouple: Any) -> Run:
    """The run of its two experts, trained."""
    (out / "recipe.yaml").parent.mkdir(parents=True, exist_ok=True)
    write_json(out / "pair.yaml", values_of(folder, **decouple))
    run = open_run(load(str(out / "pair.yaml"), []), out=out / "run", command="", download=False)
    run.execute(lambda graph: list(graph.of_stage("decouple")))
    return run


@pytest.fixture(scope="module")
def run(place: Path) -> Run:
    """Two experts of unequal ranges."""
    return trained(place, place / "first", division="explicit", edges=[8])


@pytest.fixture(scope="module")
def pair(run: Run, place: Path) -> Path:
    """They as a pair."""
    return export_pair(run, place / "pair").folder


def ensemble_of(run: Run) -> tuple[Any, torch.nn.Module]:
    """The denoiser and the routed ensemble of a run."""
    bench = Workbench(run.graph, run.store)
    experts = tuple(run.graph.experts[run.recipe.seeds[0]])
    return bench.denoiser, bench.module(Served("ensemble", experts, ensemble=True))


def stock_images(pair: Path, scheduler: Any, guidance_scale: float = 5.0) -> torch.Tensor:
    """Two images (2, c, h, w) in [-1, 1] of the pair's own pipeline."""
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(pair)
    pipeline.register_modules(scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline(
        ["a cat", "3"],
        height=16,
        width=16,
        num_frames=1,
        num_inference_steps=7,
        guidance_scale=guidance_scale,
        max_sequence_length=SEQUENCE,
        generator=[torch.Generator().manual_seed(i) for i in range(2)],
        output_type="pt",
    )[0]
    return frames[:, 0] * 2 - 1


# -- export ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [EULER, "FlowMatchHeunDiscreteScheduler", "UniPCMultistepScheduler"])
def test_the_stock_pipeline_of_a_pair_gives_the_ensembles_images(run: Run, pair: Path, name: str) -> None:
    denoiser, ensemble = ensemble_of(run)
    sampler = SamplerSettings(name=name, num_inference_steps=7)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    expected = denoiser.generate(
        ensemble, make_scheduler(denoiser, sampler), ["a cat", "3"], generators=generators, num_inference_steps=7
    )
    found = stock_images(pair, make_scheduler(denoiser, sampler))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    alone = denoiser.generate(
        ensemble.expert(0),
        make_scheduler(denoiser, sampler),
        ["a cat", "3"],
        generators=[torch.Generator().manual_seed(i) for i in range(2)],
        num_inference_steps=7,
    )
    assert (alone - expected).abs().max() > 1e-3  # the experts differ, so that routing is seen


def test_a_pair_is_the_base_with_the_experts_as_they_were_trained(run: Run, pair: Path, place: Path) -> None:
    index = read_json(pair / "model_index.json")
    assert index["transformer_2"] == index["transformer"] == ["diffusers", "WanTransformer3DModel"]
    experts = [run.store.folder(node.key) for node in run.graph.experts[0]]
    for name, expert in (("transformer_2", experts[0]), ("transformer", experts[1])):
        ours, theirs = load_file(pair / name / WEIGHTS), load_file(expert / "transformer" / WEIGHTS)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
        kept = read_json(place / "wan/transformer/config.json")
        assert {k: v for k, v in read_json(pair / name / "config.json").items() if k[0] != "_"} == {
            k: v for k, v in kept.items() if k[0] != "_"
        }
    assert (pair / "vae" / WEIGHTS).read_bytes() == (place / "wan/vae" / WEIGHTS).read_bytes()
    record = read_json(pair / "pair.json")
    assert record["experts"][0]["timesteps"] == [[0, 8]] and record["experts"][1]["timesteps"] == [[8, T]]
    assert record["boundary_ratio"] == index["boundary_ratio"] <= record["first_sigma_of_transformer"]
    assert str(place) not in json.dumps(record)


def test_a_pair_loads_where_this_package_cannot_be_imported(pair: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['deme_diffusion'] = None\n"
        "from diffusers import WanPipeline\n"
        f"p = WanPipeline.from_pretrained({str(pair)!r})\n"
        "assert p.transformer is not p.transformer_2 and 0 < p.config.boundary_ratio < 1\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True)


def routed(t: torch.Tensor, ratio: float, count: int) -> int:
    """As the stock pipeline compares: 1 is `transformer`."""
    return int(bool(t >= ratio * count))


@pytest.mark.parametrize("shift", [1.0, 3.0, 17.0])
@pytest.mark.parametrize("count", [20, 1000])
def test_the_boundary_is_the_division_for_every_timestep_of_every_sampler(
    place: Path, shift: float, count: int, tmp_path: Path
) -> None:
    denoiser = family("wan").load(tiny_flow.wan(tmp_path / "wan", flow_shift=shift, num_train_timesteps=count))
    config = denoiser.scheduler.config
    asked = [
        make_scheduler(denoiser, SamplerSettings(name=name, num_inference_steps=steps)).timesteps
        for name in flow_names()
        for steps in (1, 4, 20, count)
    ]
    trained_at = denoiser.asked_at(torch.arange(count))  # type: ignore[attr-defined]
    for edge in (1, 2, count // 3, count // 2, count - 2, count - 1):
        division = explicit([edge], count)
        ratio = boundary_ratio(division, config)
        for timesteps in (*asked, trained_at, trained_at.double()):
            expected = division.route[denoiser.index(timesteps).numpy()].tolist()
            assert [routed(t, ratio, count) for t in timesteps] == expected
        assert [routed(t, ratio, count) for t in trained_at] == division.route.tolist()


def test_other_divisions_are_refused() -> None:
    config = {"_class_name": EULER, "num_train_timesteps": T}
    for division in (uniform(3, T), random_assignment(2, T, 0), uniform(1, T), flipped(uniform(2, T))):
        with pytest.raises(UserError, match=r"a pair is two contiguous ranges, the first from 0 on; use decouple\."):
            boundary_ratio(division, config)


def flipped(division: Division) -> Division:
    return Division(division.member[::-1].copy(), 1 - division.route)


@pytest.mark.parametrize("how", [{"lora_rank": 2}, {"projection": "residual"}])
def test_a_pair_holds_experts_with_their_loras_or_projections_in_them(
    place: Path, tmp_path: Path, how: dict[str, Any]
) -> None:
    run = trained(place, tmp_path, **how)
    pair = export_pair(run, tmp_path / "pair").folder
    base = load_file(place / "wan/transformer" / WEIGHTS)
    denoiser, ensemble = ensemble_of(run)
    for name in ("transformer", "transformer_2"):
        found = load_file(pair / name / WEIGHTS)
        assert found.keys() == base.keys() and any(not torch.equal(found[key], base[key]) for key in base)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    sampler = SamplerSettings(name=EULER, num_inference_steps=7)
    expected = denoiser.generate(
        ensemble, make_scheduler(denoiser, sampler), ["a cat", "3"], generators=generators, num_inference_steps=7
    )
    torch.testing.assert_close(stock_images(pair, make_scheduler(denoiser, sampler)), expected, rtol=1e-3, atol=1e-4)


def test_what_cannot_become_a_pair_is_refused(place: Path, run: Run, tmp_path: Path, deme: Deme) -> None:
    three = values_of(place, num_ranges=3)
    write_json(tmp_path / "three.yaml", three)
    told = deme("pair", str(tmp_path / "three.yaml"), "--out", str(tmp_path / "x"))
    assert told.status == 2 and "a pair is two contiguous ranges" in told.err
    write_json(tmp_path / "two.yaml", values_of(place, total_steps=2))
    told = deme("pair", str(tmp_path / "two.yaml"), "--out", str(tmp_path / "x"))
    assert told.status == 2 and "is not done; first: deme decouple" in told.err
    told = deme("pair", str(run.folder), "--out", str(place / "wan"))
    assert told.status == 2 and "it exists already; name a new folder" in told.err
    told = deme("pair", str(run.folder))
    assert told.status == 2 and "deme pair without --out" in told.err
    told = deme("pair", "digits", "--out", str(tmp_path / "x"))
    assert told.status == 2 and "model.family=ddpm: no stock pipeline of it takes a pair of experts" in told.err
    assert not (tmp_path / "x").exists()


def test_the_command_tells_where_the_experts_change(run: Run, tmp_path: Path, deme: Deme) -> None:
    told = deme("pair", str(run.folder), "--out", str(tmp_path / "made"))
    assert told.status == 0, told.err
    assert told.out.splitlines()[0] == str(tmp_path / "made")
    assert "transformer from t = 8 (sigma 0.7105) on, transformer_2 below: boundary_ratio=0.70" in told.out
    told = deme("pair", str(run.folder), "--out", str(tmp_path / "again"), "--json")
    assert json.loads(told.out)["first_timestep_of_transformer"] == 8


# -- import ----------------------------------------------------------------------------------------


def test_a_pair_goes_back_into_one_model_as_its_experts_do(
    run: Run, pair: Path, place: Path, tmp_path: Path, deme: Deme
) -> None:
    weights = ("--weights", "0.3,0.6")
    told = deme("merge", "--base", str(place / "wan"), "--pair", str(pair), *weights, "--out", str(tmp_path / "one"))
    assert told.status == 0, told.err
    folders = [str(run.store.folder(node.key)) for node in run.graph.experts[0]]
    named = [word for folder in folders for word in ("--expert", folder)]
    told = deme("merge", "--base", str(place / "wan"), *named, *weights, "--out", str(tmp_path / "two"))
    assert told.status == 0, told.err
    found, expected = (load_file(tmp_path / name / "transformer" / WEIGHTS) for name in ("one", "two"))
    base = load_file(place / "wan/transformer" / WEIGHTS)
    low, high = (load_file(Path(folder) / "transformer" / WEIGHTS) for folder in folders)
    for key in base:
        assert torch.equal(found[key], expected[key])
        by_hand = base[key] + 0.3 * (low[key] - base[key]) + 0.6 * (high[key] - base[key])
        torch.testing.assert_close(found[key], by_hand, rtol=1e-5, atol=1e-6)
    from diffusers import WanPipeline

    merged = WanPipeline.from_pretrained(tmp_path / "one")
    assert merged.transformer_2 is None and merged.config.boundary_ratio is None


def test_a_pair_of_another_architecture_is_refused(pair: Path, place: Path, tmp_path: Path, deme: Deme) -> None:
    def merged(other: Path) -> str:
        told = deme("merge", "--base", str(place / "wan"), "--pair", str(other), "--out", str(tmp_path / "x"))
        assert told.status == 2 and not (tmp_path / "x").exists()
        return str(told.err)

    other = shutil.copytree(pair, tmp_path / "keys")
    state = load_file(other / "transformer_2" / WEIGHTS)
    state.pop("proj_out.bias")
    save_file(state, other / "transformer_2" / WEIGHTS)
    assert "proj_out.bias" in merged(other)
    other = shutil.copytree(pair, tmp_path / "config")
    config = read_json(other / "transformer/config.json")
    write_json(other / "transformer/config.json", {**config, "eps": 1e-3})
    assert "eps is 0.001, the base's 1e-06" in merged(other)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"boundary_ratio": None}, "names no boundary_ratio; it is one model, so give it as --expert"),
        ({"boundary_ratio": 1.5}, "boundary_ratio is 1.5; a number between 0 and 1 is expected"),
        ({"boundary_ratio": "0.9"}, "boundary_ratio is '0.9'"),
    ],
)
def test_what_is_no_pair_is_refused(
    pair: Path, place: Path, tmp_path: Path, index: dict[str, Any], message: str
) -> None:
    other = shutil.copytree(pair, tmp_path / "other")
    write_json(other / "model_index.json", {**read_json(other / "model_index.json"), **index})
    with pytest.raises(UserError, match=re.escape(message)):
        experts_of(other, place / "wan")


def test_half_a_pair_or_a_pair_as_base_is_refused(pair: Path, place: Path, tmp_path: Path, deme: Deme) -> None:
    other = shutil.copytree(pair, tmp_path / "other")
    shutil.rmtree(other / "transformer_2")
    with pytest.raises(UserError, match=r"no transformer_2/config\.json; a pair holds both"):
        experts_of(other, place / "wan")
    with pytest.raises(UserError, match="a pair of experts itself; name the one model"):
        experts_of(pair, pair)
    with pytest.raises(UserError, match="no such folder"):
        experts_of(tmp_path / "nowhere", place / "wan")
    with pytest.raises(UserError, match="of a hub model, first: hf download owner/a-pair --local-dir FOLDER"):
        experts_of(Path("owner/a-pair"), place / "wan")
    with pytest.raises(UserError, match=r"no model_index\.json; a pipeline with transformer"):
        experts_of(place / "images", place / "wan")
    with pytest.raises(UserError, match="a pair of experts, transformer and transformer_2; name a base of one"):
        family("wan").load(pair)
    both = ("--pair", str(pair), "--expert", str(pair))
    told = deme("merge", "--base", str(place / "wan"), *both, "--out", str(tmp_path / "x"))
    assert told.status == 2 and "--pair and --expert: a pair is two experts already" in told.err
    told = deme("merge", "digits", "--pair", str(pair))
    assert told.status == 2 and "a recipe trains its own experts" in told.err


def test_a_family_without_such_a_pipeline_is_refused_before_anything(tmp_path: Path) -> None:
    values = make_pico_values(tiny.stable_diffusion(tmp_path / "sd"))
    values["model"] = {**values["model"], "family": "stable_diffusion"}
    values["extractor"] = {"kind": "inception"}
    sampler = {"name": "DDIMScheduler", "num_inference_steps": 4}
    write_json(tmp_path / "sd.yaml", {**values, "merge": {"search": "none", "sampler": sampler}})
    run = open_run(load(str(tmp_path / "sd.yaml"), []), out=tmp_path / "run", command="", download=False)
    with pytest.raises(UserError, match=r"model\.family=stable_diffusion: no stock pipeline of it takes a pair"):
        export_pair(run, tmp_path / "pair")
    assert isinstance(run.graph, Graph) and isinstance(run.store, Store)
    assert len(from_runs(run.graph.division.served(0))) == T // 2
