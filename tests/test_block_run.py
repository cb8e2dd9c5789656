"""A run with the paper's placement, end to end: the merged folder is stock, and three lines load all of the model."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMPipeline
from torch import nn

from conftest import make_pico_values
from deme_diffusion import attach_projection
from deme_diffusion.errors import UserError
from deme_diffusion.evaluation.objectives import FrechetObjective
from deme_diffusion.evaluation.sample import IMAGES, sample_pixels
from deme_diffusion.models.ddpm import DDPM
from deme_diffusion.models.projection import FILE
from deme_diffusion.pipeline.node import Node
from deme_diffusion.pipeline.run import Run, open_run
from deme_diffusion.pipeline.stages import Stages
from deme_diffusion.pipeline.workbench import seed_of_node
from deme_diffusion.recipes import Loaded, to_yaml
from deme_diffusion.recipes.checks import parse
from deme_diffusion.rng import seed_of
from deme_diffusion.weights import WEIGHTS_NAME, Weights, load_state

REST = ["down_blocks.0", "down_blocks.1", "mid_block"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, pico_pipeline: Path) -> Run:
    values = make_pico_values(pico_pipeline)
    values["decouple"] |= {"projection": "block", "learning_rate": 1e-2, "total_steps": 6, "use_ema": False}
    values["merge"] |= {"search": "none", "weights": [0.7, 0.6]}
    folder = tmp_path_factory.mktemp("block") / "pico"
    run = open_run(Loaded(parse(values, where="test"), {}), out=folder, command="deme run pico")
    logger = logging.getLogger("deme_diffusion")
    logger.setLevel(logging.ERROR)
    run.execute()
    run.report()
    logger.setLevel(logging.NOTSET)
    return run


def test_experts_have_a_trained_matrix_after_each_block(finished: Run) -> None:
    for i in range(2):
        matrices = load_state(finished.folder / "experts" / str(i) / "unet" / FILE)
        assert sorted(matrices) == [*REST, "up_blocks.0", "up_blocks.1"]
        assert all(matrix.any() for matrix in matrices.values())


def test_merged_folder_is_stock_and_holds_what_does_not_fold(finished: Run, pico_pipeline: Path) -> None:
    merged = finished.merged / "unet"
    with Weights(merged) as ours, Weights(pico_pipeline / "unet") as base:
        assert {k: ours.shape(k) for k in ours.keys()} == {k: base.shape(k) for k in base.keys()}  # noqa: SIM118
    experts = [load_state(finished.folder / "experts" / str(i) / "unet" / FILE) for i in range(2)]
    rest = load_state(merged / FILE)
    assert sorted(rest) == REST
    for place, matrix in rest.items():
        torch.testing.assert_close(matrix, 0.7 * experts[0][place] + 0.6 * experts[1][place])


def test_three_lines_load_the_very_model_that_the_table_was_made_from(finished: Run) -> None:
    node = next(n for (name, _), n in finished.graph.samples.items() if name == "merged")
    assert isinstance(node, Node)
    measured = np.load(finished.store.folder(node.key) / IMAGES)
    sampler, denoiser = node.arguments["sampler"], DDPM.load(finished.merged)

    def images(module: nn.Module) -> Any:
        return sample_pixels(denoiser, module.eval(), sampler, seed=seed_of_node(node), count=16, batch_size=256)

    pipeline = DDPMPipeline.from_pretrained(finished.merged)
    stock = images(pipeline.unet)
    attach_projection(pipeline.unet, finished.merged)
    assert np.array_equal(images(pipeline.unet), measured)
    assert not np.array_equal(stock, measured)


def test_costs_of_the_table_count_the_extra_module(finished: Run) -> None:
    costs = json.loads(next(finished.store.root.glob("cost/*/cost.json")).read_text())["models"]
    extra = 4 * 4 + 8 * 8 + 8 * 8
    assert costs["merged"]["parameters"] == costs["base"]["parameters"] + extra
    assert costs["ensemble"]["parameters"] == 2 * (costs["base"]["parameters"] + extra)
    size = (finished.merged / "unet" / FILE).stat().st_size
    assert costs["merged"]["disk"] == (finished.merged / "unet" / WEIGHTS_NAME).stat().st_size + size


@pytest.mark.parametrize("card", ["merged/README.md", "model_card.md", "report.html"])
def test_cards_say_that_stock_diffusers_alone_loads_another_model(finished: Run, card: str) -> None:
    text = (finished.folder / card).read_text()
    assert (
        "without its extra module: the channel-wise projections after down_blocks.0, down_blocks.1, mid_block" in text
    )
    assert "attach_projection(pipeline.unet, " in text
    assert "nothing else is needed" not in text


def test_trials_of_a_search_are_of_the_projected_model(finished: Run) -> None:
    values = yaml.safe_load(to_yaml(finished.recipe))
    del values["merge"]["weights"], values["merge"]["search"]
    run = open_run(Loaded(parse(values, where="test"), {}), out=finished.folder.parent / "searched")
    search = run.graph.searches[0]
    run.execute([search])
    found = json.loads((run.store.folder(search.key) / "search.json").read_text())
    uniform = next(trial for trial in found["trials"] if trial["weights"] == [0.5, 0.5])

    stages, settings = Stages(run.graph, run.store), run.recipe.merge
    served = next(s for s in run.graph.served[0] if s.name == "merged-uniform")
    metric = FrechetObjective(
        stages.denoiser,
        lambda _: stages.component(served.parts[0]),
        stages.splits["search"],
        stages.extractor,
        settings.sampler,
        seed_of(seed_of_node(search), "search"),
        settings.num_images,
        256,
    )
    assert uniform["value"] == pytest.approx(metric.value([0.5, 0.5]), rel=1e-5)


def test_a_merged_model_with_an_extra_module_is_no_base(finished: Run, tmp_path: Path) -> None:
    values = make_pico_values(finished.merged.resolve())
    with pytest.raises(UserError, match="a base must be whole without projections"):  # at once, so at a dry run too
        open_run(Loaded(parse(values, where="test"), {}), out=tmp_path / "again", download=False)
