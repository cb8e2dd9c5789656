"""A whole run with LoRA experts: trained, searched, merged into one LoRA that stock diffusers loads without us."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

import tiny
from conftest import make_pico_values
from deme_diffusion import merge_checkpoints
from deme_diffusion.errors import UserError
from deme_diffusion.evaluation.objectives import FixedNoiseObjective
from deme_diffusion.lora import read_lora
from deme_diffusion.lora_files import LORA_NAME
from deme_diffusion.merging.lora_write import write_lora
from deme_diffusion.merging.selection import MergeWeights
from deme_diffusion.models.adapters import SwitchedEnsemble
from deme_diffusion.models.ddpm import DDPM
from deme_diffusion.models.lora import attach
from deme_diffusion.models.stable_diffusion import StableDiffusion
from deme_diffusion.pipeline.exporting import export_merged
from deme_diffusion.pipeline.run import Run, open_run
from deme_diffusion.pipeline.searching import SEARCH, Asked
from deme_diffusion.pipeline.stages import Stages
from deme_diffusion.recipes import Loaded
from deme_diffusion.recipes.checks import parse
from deme_diffusion.weights import WEIGHTS_NAME, load_state, state_digest
from lora_models import answered, inputs

WEIGHTS = (0.7, 0.4)
STOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "deme_diffusion":
            raise ImportError("blocked: " + name)

sys.meta_path.insert(0, Blocked())
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

base, lora, given, out = sys.argv[1:]
pipeline = DiffusionPipeline.from_pretrained(base)
pipeline.load_lora_weights(lora)
x = load_file(given)
with torch.no_grad():
    answer = pipeline.unet(x["x"], x["t"], x["states"], return_dict=False)[0]
pipeline.set_progress_bar_config(disable=True)
images = pipeline("a seven", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images
save_file({"answer": answer, "images": images}, out)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion; read only."""
    return tiny.stable_diffusion(tmp_path_factory.mktemp("base") / "sd")


def opened(base: Path, folder: Path, **merge: Any) -> Run:
    """A run of two LoRA experts on captioned digits, in a folder of runs."""
    values = make_pico_values(base)
    values["model"]["family"] = "stable_diffusion"
    values["decouple"] |= {"projection": "none", "lora_rank": 2, "lora_alpha": 4.0, "learning_rate": 3e-2}
    values["merge"] |= {"search": "none", "weights": WEIGHTS, **merge}
    values["evaluate"]["controls"] = []
    values["data"] = {"search_fraction": 0.03, "report_fraction": 0.03}
    return open_run(Loaded(parse(values, where="test"), {}), out=folder, command="deme run lora")


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run to its end."""
    run = opened(base, tmp_path_factory.mktemp("runs") / "runs" / "lora")
    run.execute()
    return run


def explicit(base: Path, run: Run) -> torch.nn.Module:
    """base + sum_i w_i s_i B_i A_i, by dense matrices."""
    module = StableDiffusion.load(base).module.eval()
    for w, node in zip(WEIGHTS, run.graph.experts[0], strict=True):
        for name, own in read_lora(run.store.folder(node.key), "unet", {}).layers.items():
            weight: Any = module.get_submodule(name).weight
            weight.data += w * own.scale * own.up @ own.down
    return module


def test_the_merged_lora_is_the_merged_model_where_this_package_cannot_be_imported(
    base: Path, whole: Run, tmp_path: Path
) -> None:
    (tmp_path / "stock.py").write_text(STOCK)
    x, t, states = inputs()
    save_file({"x": x, "t": t, "states": states}, tmp_path / "given.safetensors")
    out = tmp_path / "out.safetensors"
    command = [sys.executable, "-I", tmp_path / "stock.py", base, whole.merged, tmp_path / "given.safetensors", out]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, module = load_file(out), explicit(base, whole)
    torch.testing.assert_close(found["answer"], answered(module), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found["answer"], answered(StableDiffusion.load(base).module.eval()), atol=1e-3)
    assert found["images"].shape == (1, 1, 8, 8)
    bench = Stages(whole.graph, whole.store)
    served = next(one for one in whole.graph.served[0] if one.name == "merged")
    torch.testing.assert_close(answered(bench.module(served).eval()), found["answer"], rtol=1e-5, atol=1e-6)


def test_what_a_run_leaves(whole: Run) -> None:
    expert = whole.store.folder(whole.graph.experts[0][0].key)
    assert (expert / LORA_NAME).is_file() and (expert / "raw" / LORA_NAME).is_file()
    assert "load_lora_weights" in (expert / "README.md").read_text() and not (expert / "unet").exists()
    merged = whole.store.find(whole.graph.merged[0].key)
    assert merged is not None and {"merge.json", "README.md", LORA_NAME} <= set(merged.manifest["files"])
    assert merged.results["lora"]["exact"] and merged.results["lora"]["rank"] == 4
    costs = json.loads((whole.store.folder(whole.graph.cost.key) / "cost.json").read_text())["models"]
    plain, one = costs["base"]["parameters"], read_lora(expert, "unet", {}).layers.values()
    adapters = sum(own.down.numel() + own.up.numel() for own in one)
    assert costs["ensemble"]["parameters"] == costs["merged"]["parameters"] == plain + 2 * adapters
    assert costs["ensemble"]["disk"] > costs["base"]["disk"]


def test_the_ensemble_switches_adapters_in_one_base(base: Path, whole: Run) -> None:
    bench = Stages(whole.graph, whole.store)
    served = next(one for one in whole.graph.served[0] if one.ensemble)
    ensemble = bench.module(served).eval()
    assert isinstance(ensemble, SwitchedEnsemble)
    x, t, states = inputs()  # t = 0, 7, 14 of 20
    with torch.no_grad():
        mixed = ensemble(x, t, states).sample
        for rows, part in ((slice(0, 2), served.parts[0]), (slice(2, 3), served.parts[1])):
            alone = bench.component(part).eval()
            assert torch.equal(mixed[rows], alone(x[rows], t[rows], states[rows])[0])


def test_a_lora_that_lies_in_a_base_is_not_put_into_it(base: Path, whole: Run, tmp_path: Path) -> None:
    stray = tmp_path / "stray"
    shutil.copytree(base, stray)
    shutil.copy(whole.merged / LORA_NAME, stray)
    run = opened(stray, tmp_path / "runs" / "stray")
    bench = Stages(run.graph, run.store)
    assert bench.lora(run.graph.base) is None and bench.component_folder(run.graph.base).name == "unet"
    assert torch.equal(answered(bench.component(run.graph.base)), answered(StableDiffusion.load(base).module.eval()))


def test_an_ensemble_of_loras_is_loaded_as_one_base(whole: Run) -> None:
    bench = Stages(whole.graph, whole.store)
    counts = {one.name: len(bench.loaders(one)) for one in whole.graph.served[0]}
    assert counts["ensemble"] == 1
    served = next(one for one in whole.graph.served[0] if one.ensemble)
    assert isinstance(bench.loaders(served)[0](), SwitchedEnsemble)


@pytest.mark.parametrize("objective", ["loss", "relative_loss"])
def test_what_reads_the_base_between_turns_gets_the_base(base: Path, whole: Run, objective: str) -> None:
    run = opened(base, whole.folder.parent / objective, search="least_squares", weights=None, objective=objective)
    stages, node = Stages(run.graph, run.store), run.graph.searches[0]
    with stages._merger(node) as merger:
        own: FixedNoiseObjective = Asked(stages, node, merger, whole.folder / "none.jsonl").loss.objective
        loaded = FixedNoiseObjective(own.noise, own.base, own.experts, own.materialise, own.relative)
        found = own.normal_equations()  # which takes the base's losses, within
        for ours, expected in zip(found, loaded.normal_equations(), strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("merge", [{"lora_rank": 1}, {"method": "ties"}])
def test_a_search_scores_the_lora_that_is_written(
    base: Path, whole: Run, tmp_path: Path, merge: dict[str, Any]
) -> None:
    run = opened(base, whole.folder.parent / next(iter(merge)), search="grid", weights=None, **merge)
    stages, node = Stages(run.graph, run.store), run.graph.searches[0]
    with stages._merger(node) as merger:
        asked = Asked(stages, node, merger, tmp_path / "none.jsonl")
        materialise = asked.metric.objective.materialise
        materialise([0.1, 0.2])  # of which nothing stays
        scored, dense = answered(materialise(WEIGHTS)), answered(asked.materialise(WEIGHTS))
        kept = write_lora(merger, MergeWeights(WEIGHTS), tmp_path, source="given", rank=merge.get("lora_rank"))
    written = attach(StableDiffusion.load(base).module, read_lora(tmp_path, "unet", {}))
    torch.testing.assert_close(scored, answered(written), rtol=1e-5, atol=1e-5)
    assert not kept["lora"]["exact"] and not torch.allclose(scored, dense, atol=1e-4)


def test_a_search_is_another_one_only_where_its_lora_is_cut(base: Path, whole: Run) -> None:
    folder = whole.folder.parent / "keys"
    keys = [
        opened(base, folder / str(i), search="grid", weights=None, **merge).graph.searches[0].digest
        for i, merge in enumerate([{}, {"fuse": True}, {"lora_rank": 1}, {"lora_rank": 2}])
    ]
    assert keys[0] == keys[1] and len(set(keys)) == 3


@pytest.mark.parametrize(("search", "judge"), [("least_squares", "kid"), ("gradient", "fd")])
def test_searches_work_on_lora_experts(base: Path, whole: Run, search: str, judge: str) -> None:
    run = opened(base, whole.folder.parent / search, search=search, judge=judge, weights=None, gradient_steps=2)
    run.execute(lambda graph: list(graph.merged.values()))
    assert [run.store.folder(node.key) for node in run.graph.experts[0]] == [
        whole.store.folder(node.key) for node in whole.graph.experts[0]
    ]  # trained once
    found = json.loads((run.store.folder(run.graph.searches[0].key) / SEARCH).read_text())
    assert found["objective"].startswith(f"{judge.upper()}(")
    sources = {trial["source"] for trial in found["trials"]}
    assert any(source.startswith(search.replace("_", " ")) for source in sources) and {"w = 0", "uniform"} <= sources
    assert all(torch.isfinite(torch.tensor(trial["value"])) for trial in found["trials"])
    merged = json.loads((run.store.folder(run.graph.merged[0].key) / "merge.json").read_text())
    assert merged["weights"]["values"] == found["weights"] and merged["score"]["after"] == found["value"]


def test_a_least_squares_search_of_lora_experts_holds_one_base(
    base: Path, whole: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive, answered_by = list[int](), list[torch.Tensor]()
    real = StableDiffusion.answer

    def counting(self: StableDiffusion, module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        gc.collect()
        models = (one for one in gc.get_objects() if isinstance(one, UNet2DConditionModel))
        alive.append(len({one.conv_in.weight.data_ptr() for one in models} - others))
        answered_by.append(real(self, module, *args, **kwargs))
        return answered_by[-1]

    run = opened(base, whole.folder.parent / "held", search="least_squares", weights=None)
    gc.collect()
    others = {o.conv_in.weight.data_ptr() for o in gc.get_objects() if isinstance(o, UNet2DConditionModel)}
    stages = Stages(run.graph, run.store)
    node = run.graph.searches[0]
    with stages._merger(node) as merger:
        asked = Asked(stages, node, merger, whole.folder / "none.jsonl")
        before = state_digest(stages.denoiser.module.state_dict())
        objective: FixedNoiseObjective = asked.loss.objective
        loaded = FixedNoiseObjective(objective.noise, objective.base, objective.experts, objective.materialise)
        monkeypatch.setattr(StableDiffusion, "answer", counting)
        a, b = objective.normal_equations()
        assert set(alive) == {1}, "the base, which takes all places"
        alive.clear()
        expected = loaded.normal_equations()
        assert set(alive) == {3}, "as whole experts: one each"
        np.testing.assert_allclose(a, expected[0], rtol=1e-5)
        np.testing.assert_allclose(b, expected[1], rtol=1e-4, atol=1e-9)
        assert np.abs(a).max() > 0
        assert state_digest(stages.denoiser.module.state_dict()) == before, "adapters are out again"
        alive.clear()
        objective.normal_equations([0.3, 0.2])
        assert set(alive) == {2}, "Gauss-Newton: the base, and one that takes the place of all merged models"


def test_a_given_rank_and_a_fused_merge_are_stages_of_their_own(base: Path, whole: Run) -> None:
    low = opened(base, whole.folder.parent / "low", lora_rank=1)
    low.execute(lambda graph: list(graph.merged.values()))
    own = json.loads((low.merged / "merge.json").read_text())["lora"]
    assert own["rank"] == 1 and 0 < own["relative_error"] < 1 and not own["exact"]
    fused = opened(base, whole.folder.parent / "fused", fuse=True)
    fused.execute(lambda graph: list(graph.merged.values()))
    module = StableDiffusion.load(fused.merged).module.eval()
    torch.testing.assert_close(answered(module), answered(explicit(base, whole)), rtol=1e-5, atol=1e-5)
    digests = {run.graph.merged[0].digest for run in (whole, low, fused)}
    assert len(digests) == 3


def test_an_expert_is_refused_for_another_base(whole: Run, tmp_path: Path) -> None:
    other = tiny.stable_diffusion(tmp_path / "other")
    file = other / "unet" / WEIGHTS_NAME
    state = load_state(file)
    save_file({**state, "conv_in.bias": state["conv_in.bias"] + 1}, file, {"format": "pt"})
    expert = whole.store.folder(whole.graph.experts[0][0].key)
    with pytest.raises(UserError, match="a LoRA of another base: it was trained on weights"):
        merge_checkpoints(other, [expert], tmp_path / "out")


def test_the_merged_lora_is_exported(whole: Run, tmp_path: Path) -> None:
    found = export_merged(whole, tmp_path / "upload")
    assert {LORA_NAME, "merge.json", "README.md"} <= set(found.files)
    card = (tmp_path / "upload" / "README.md").read_text()
    assert "load_lora_weights" in card and "- lora" in card


def test_convolutions_of_a_pixel_model_are_adapted_and_fused(pico_values: dict[str, Any], tmp_path: Path) -> None:
    pico_values["decouple"] |= {"projection": "none", "lora_rank": 1, "lora_targets": ["conv1", "time_emb_proj"]}
    pico_values["merge"] |= {"search": "none", "fuse": True}
    recipe = parse(pico_values, where="test")
    run = open_run(Loaded(recipe, {}), out=tmp_path / "runs" / "pico", command="deme run pico")
    run.execute(lambda graph: list(graph.merged.values()))
    merged, plain = DDPM.load(run.merged).module, DDPM.load(Path(str(recipe.model.pretrained))).module
    moved = {key for key, value in plain.state_dict().items() if not torch.equal(value, merged.state_dict()[key])}
    assert moved and all(key.endswith(("conv1.weight", "time_emb_proj.weight")) for key in moved)
