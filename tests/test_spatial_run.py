"""Runs with spatial projections, end to end: trained, searched for, merged, measured, told of, and loaded again."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline
from torch import nn

from conftest import make_pico_values
from deme_diffusion import attach_projection
from deme_diffusion.evaluation.sample import IMAGES, sample_pixels
from deme_diffusion.models.ddpm import DDPM
from deme_diffusion.models.projection import FILE
from deme_diffusion.pipeline.node import Node
from deme_diffusion.pipeline.run import Run, open_run
from deme_diffusion.pipeline.workbench import seed_of_node
from deme_diffusion.recipes import Loaded
from deme_diffusion.recipes.checks import parse
from deme_diffusion.weights import load_state


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("deme_diffusion")
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(logging.NOTSET)


def opened(pipeline: Path, folder: Path, decouple: dict[str, Any], merge: dict[str, Any]) -> Run:
    values = make_pico_values(pipeline)
    values["decouple"] |= {"learning_rate": 1e-2, "use_ema": False, **decouple}
    values["merge"] |= merge
    values["evaluate"]["controls"] = []
    return open_run(Loaded(parse(values, where="test"), {}), out=folder, command="deme run pico")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, pico_pipeline: Path) -> Run:
    """After convolutions, both kinds: the channel-wise ones fold, the spatial ones stay."""
    decouple = {"projection": "residual", "projection_axes": "both"}
    folder = tmp_path_factory.mktemp("spatial") / "pico"
    run = opened(pico_pipeline, folder, decouple, {"search": "none", "weights": [0.7, 0.6]})
    run.execute()
    run.report()
    return run


def test_experts_train_both_kinds_and_the_merged_folder_keeps_the_kernels(finished: Run) -> None:
    experts = [load_state(finished.folder / "experts" / str(i) / "unet" / FILE) for i in range(2)]
    kernels = {name for name in experts[0] if name.endswith("|spatial")}
    channel, linear = experts[0].keys() - kernels, "mid_block.attentions.0.to_out.0"
    assert channel - {name.removesuffix("|spatial") for name in kernels} == {linear}
    assert all(tensor.any() for own in experts for tensor in own.values())
    rest = load_state(finished.merged / "unet" / FILE)
    assert rest.keys() == kernels
    for name, tensor in rest.items():
        torch.testing.assert_close(tensor, 0.7 * experts[0][name] + 0.6 * experts[1][name])


def test_three_lines_load_the_very_model_that_the_table_was_made_from(finished: Run) -> None:
    node = next(n for (name, _), n in finished.graph.samples.items() if name == "merged")
    assert isinstance(node, Node)
    measured = np.load(finished.store.folder(node.key) / IMAGES)
    denoiser, sampler = DDPM.load(finished.merged), node.arguments["sampler"]

    def images(module: nn.Module) -> Any:
        return sample_pixels(denoiser, module.eval(), sampler, seed=seed_of_node(node), count=16, batch_size=256)

    pipeline = DDPMPipeline.from_pretrained(finished.merged)
    stock = images(pipeline.unet)
    attach_projection(pipeline.unet, finished.merged)
    assert np.array_equal(images(pipeline.unet), measured)
    assert not np.array_equal(stock, measured)


def test_costs_count_the_kernels_and_the_cards_say_that_stock_diffusers_does_not_read_them(finished: Run) -> None:
    costs = json.loads(next(finished.store.root.glob("cost/*/cost.json")).read_text())["models"]
    kernels = load_state(finished.merged / "unet" / FILE)
    extra = sum(tensor.numel() for tensor in kernels.values())
    assert costs["merged"]["parameters"] == costs["base"]["parameters"] + extra
    for card in ("merged/README.md", "model_card.md", "report.html"):
        text = (finished.folder / card).read_text()
        assert "without its extra module: the spatial projections (depthwise 3x3 convolutions) after " in text
        assert "mid_block.resnets.1.conv2" in text and "|spatial" not in text
        assert "attach_projection(pipeline.unet, " in text


SEARCHES: list[tuple[str, dict[str, Any]]] = [
    ("residual both", {"search": "grid", "grid_values": [0.0, 0.5], "max_evaluations": 16}),
    ("block both", {"search": "least_squares"}),
    ("block spatial", {"search": "gradient", "gradient_steps": 2, "granularity": "block"}),
    ("residual spatial", {"search": "cma_es", "start": "zero", "max_evaluations": 14}),
    ("residual both", {"search": "tpe", "start": "zero", "max_evaluations": 10}),
]


@pytest.mark.parametrize("axes, merge", SEARCHES, ids=[f"{axes} {merge['search']}" for axes, merge in SEARCHES])
def test_every_search_finds_weights_for_a_model_that_keeps_kernels(
    pico_pipeline: Path, tmp_path: Path, axes: str, merge: dict[str, Any]
) -> None:
    placement, kind = axes.split()
    decouple = {"projection": placement, "projection_axes": kind, "total_steps": 2}
    run = opened(pico_pipeline, tmp_path / "run", decouple, merge)
    node = run.graph.merged[0]
    run.execute([node])
    found = json.loads((run.store.folder(run.graph.searches[0].key) / "search.json").read_text())
    assert found["value"] <= found["value_before"]
    written = run.store.folder(node.key) / "unet" / FILE
    names = load_state(written) if written.is_file() else {}
    assert any(found["weights"]) == bool(names)  # w = 0 is the base itself
    assert all(np.isfinite(trial["value"]) for trial in found["trials"])
