"""A run of every latent family leaves a pipeline that stock diffusers loads and samples, without this package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from deme_diffusion.models import projection
from deme_diffusion.pipeline.node import Served
from deme_diffusion.pipeline.run import Run, open_run
from deme_diffusion.pipeline.stages import Stages
from deme_diffusion.recipes import Loaded
from deme_diffusion.recipes.checks import parse
from every_family import FAMILIES, MODEL, T, component_of, opened, pipeline_of, split_of

STOCK = """
import json, sys
sys.modules["deme_diffusion"] = None  # an import of it fails
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

images = {}
for name, (folder, asked) in json.loads(sys.argv[1]).items():
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(7)
    found = pipeline(**asked, num_inference_steps=2, generator=generator, output_type="pt")[0]
    images[name] = found[0].contiguous()
assert sys.modules["deme_diffusion"] is None
save_file(images, sys.argv[2])
"""
WEIGHTS = (0.5, 0.25)


def images_for(name: str, folder: Path) -> dict[str, Any]:
    """`data` of a recipe: the digits; or, of Wan, a folder of larger ones in colour with captions."""
    if name != "wan":
        return {"source": "digits"}
    folder.mkdir()
    split, lines = split_of(name, count=40), []
    for i in range(len(split)):
        index = split.indices[i]
        Image.fromarray(split.source.pixels(index)).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": split.source.captions(index)[0]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return {"source": "folder", "path": str(folder)}


def values_for(name: str, folder: Path) -> dict[str, Any]:
    """A recipe of two experts and a merge by given weights."""
    flows = "max_sequence_length" in MODEL[name]
    sampler = {"name": "FlowMatchEulerDiscreteScheduler" if flows else "DDIMScheduler", "num_inference_steps": 2}
    return {
        "name": name,
        "model": {**MODEL[name], "pretrained": str(pipeline_of(name))},
        "data": images_for(name, folder / f"{name}-images"),
        "cache": {"enabled": False},
        "decouple": {
            "num_ranges": 2,
            "total_steps": 4,
            "train_batch_size": 2,
            "learning_rate": 1e-2,
            "validation_steps": 2,
            "use_ema": False,
            "proportion_empty_prompts": 0.2,
        },
        "merge": {"search": "none", "weights": WEIGHTS, "sampler": sampler},
        "evaluate": {
            "samplers": [sampler, {**sampler, "num_inference_steps": 3}],
            "loss": {"draws": 1, "num_images": 4},
        },
        "analyze": {"figures": []},
        "runtime": {"device": "cpu", "threads": 1},
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """The experts and the merged model of every family."""
    folder, found = tmp_path_factory.mktemp("stock"), {}
    for name in FAMILIES:
        run = open_run(Loaded(parse(values_for(name, folder), where=name), {}), out=folder / name, command="deme run")
        run.execute([run.graph.merged[0]])
        found[name] = run
    return found


def asked_of(name: str) -> dict[str, Any]:
    """What the stock pipeline is asked for."""
    if name == "dit":
        return {"class_labels": [3], "guidance_scale": 1.0}
    sizes = {"height": 8, "width": 8} if name in ("stable_diffusion_3", "flux") else {}
    sizes = {"height": 16, "width": 16, "num_frames": 1} if name == "wan" else sizes
    tokens = {"max_sequence_length": MODEL[name]["max_sequence_length"]} if "max_sequence_length" in MODEL[name] else {}
    return {"prompt": ["the digit three"], **sizes, **tokens}


@pytest.fixture(scope="module")
def images(runs: dict[str, Run], tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """One image of every merged model by the pipeline that its folder names, made where our package is not."""
    asked = {name: (str(run.merged), asked_of(name)) for name, run in runs.items()}
    file = tmp_path_factory.mktemp("images") / "images.safetensors"
    done = subprocess.run([sys.executable, "-c", STOCK, json.dumps(asked), str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return load_file(file)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_merged_model_is_the_weighted_sum_of_the_experts(name: str, runs: dict[str, Run]) -> None:
    run = runs[name]
    base, merged = opened(name).module.state_dict(), component_of(name, run.merged)
    assert merged.keys() == base.keys()
    stages = Stages(run.graph, run.store)
    experts = [stages.component(node).state_dict() for node in run.graph.experts[0]]  # folded
    folded = {key for node in run.graph.experts[0] for key in projection.load(stages.component_folder(node))}
    linear = [key for key in base if key.rpartition(".")[0] not in folded]
    assert len(folded) >= 4 and len(linear) > len(base) / 2
    for key in linear:
        expected = base[key] + sum(w * (own[key] - base[key]) for w, own in zip(WEIGHTS, experts, strict=True))
        torch.testing.assert_close(merged[key], expected, rtol=1e-5, atol=1e-6)
    assert all(not torch.equal(merged[f"{place}.weight"], base[f"{place}.weight"]) for place in folded)


@pytest.mark.parametrize("name", FAMILIES)
def test_stock_diffusers_samples_the_merged_folder_where_our_package_cannot_be_imported(
    name: str, runs: dict[str, Run], images: dict[str, torch.Tensor]
) -> None:
    run = runs[name]
    denoiser = opened(name)
    prompt, guidance = (3, 1.0) if name == "dit" else ("the digit three", None)
    scheduler = denoiser.pipeline.scheduler

    def sampled(module: Any) -> Any:
        options: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": guidance}
        return denoiser.generate(module, scheduler, [prompt], generators=[torch.Generator().manual_seed(7)], **options)[
            0
        ]

    ours = sampled(denoiser.component_from(run.merged))
    stock = images[name][0] if name == "wan" else images[name]  # the first frame
    torch.testing.assert_close(stock * 2 - 1, ours, rtol=0, atol=1e-5)
    assert float((sampled(denoiser.module) - ours).abs().max()) > 1e-4
    index = json.loads((run.merged / "model_index.json").read_text())
    assert index["_class_name"] == json.loads((pipeline_of(name) / "model_index.json").read_text())["_class_name"]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_run_s_ensemble_answers_by_the_expert_of_each_timestep(name: str, runs: dict[str, Run]) -> None:
    graph = runs[name].graph
    stages = Stages(graph, runs[name].store)
    ensemble = stages.module(Served("ensemble", tuple(graph.experts[0]), ensemble=True))
    assert ensemble.route.tolist() == [0] * (T // 2) + [1] * (T // 2)
    assert np.array_equal(graph.division.route, ensemble.route.numpy())
