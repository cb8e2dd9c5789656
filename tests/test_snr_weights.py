"""Merge weights by SNR: each expert's share of min(SNR, 5) in the timesteps that it serves, for `merged` alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import T, make_pico_denoiser, make_pico_values
from deme_diffusion.division import Division, uniform
from deme_diffusion.errors import UserError
from deme_diffusion.merging.table import method
from deme_diffusion.pipeline.found import weights_lines
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.merges import snr_weights
from deme_diffusion.pipeline.run import open_run
from deme_diffusion.recipes import Loaded
from deme_diffusion.recipes.checks import parse
from deme_diffusion.weight_files import read_json

TASK = method("task_arithmetic")


def values_of(pipeline: Path, merge: dict[str, Any], **decouple: Any) -> dict[str, Any]:
    values = make_pico_values(pipeline)
    values["merge"] |= {"search": "none", "weighting": "snr", **merge}
    values["decouple"] |= decouple
    values["evaluate"]["controls"] = ["soup"]
    return values


def graph_of(pipeline: Path, merge: dict[str, Any], **decouple: Any) -> Graph:
    return Graph(parse(values_of(pipeline, merge, **decouple), where="test"))


def expected(num_ranges: int) -> list[float]:
    """From diffusers' own schedule, a loop over the timesteps."""
    snr = make_pico_denoiser().snr().numpy()
    width = T // num_ranges
    sums = [sum(min(float(x), 5.0) for x in snr[i * width : (i + 1) * width]) for i in range(num_ranges)]
    return [value / sum(sums) for value in sums]


def test_weights_are_the_share_of_the_clipped_snr_that_each_expert_serves() -> None:
    snr = np.array([100.0, 6.0, 4.0, 1.0, 0.5, 0.5])
    assert snr_weights(uniform(3, 6), snr, TASK) == pytest.approx([10 / 16, 5 / 16, 1 / 16])
    route = np.array([0, 1, 0, 1, 0, 1])
    assert snr_weights(Division(route[None] == np.arange(2)[:, None], route), snr, TASK) == pytest.approx(
        [9.5 / 16, 6.5 / 16]
    )
    assert snr_weights(uniform(1, 6), snr, TASK) == [1.0]


def test_methods_whose_weights_are_one_each_get_them_scaled_to_that_sum() -> None:
    weights = snr_weights(uniform(3, 6), np.array([100.0, 6.0, 4.0, 1.0, 0.5, 0.5]), method("ties"))
    assert weights == pytest.approx([30 / 16, 15 / 16, 3 / 16])


def test_the_base_s_schedule_gives_them_and_merged_alone_has_them(pico_pipeline: Path) -> None:
    graph = graph_of(pico_pipeline, {}, num_ranges=4)
    served = {one.name: one.parts[0] for one in graph.served[0]}
    merged, uniformly, soup = (served[name].key.settings["weights"] for name in ("merged", "merged-uniform", "soup"))  # type: ignore[union-attr]
    assert merged == pytest.approx(expected(4), abs=1e-6)
    assert merged[0] > merged[1] > merged[2] > merged[3] > 0
    assert uniformly == soup == [0.25] * 4
    plain = graph_of(pico_pipeline, {"weighting": "uniform"}, num_ranges=4)
    assert plain.served[0][-1].parts[0].digest == served["merged-uniform"].digest


def test_a_run_says_whose_the_weights_are(pico_pipeline: Path, tmp_path: Path) -> None:
    recipe = parse(values_of(pico_pipeline, {}), where="test")
    run = open_run(Loaded(recipe, {}), out=tmp_path / "run")
    run.execute([run.graph.merged[0]])
    told = read_json(run.store.folder(run.graph.merged[0].key) / "merge.json")
    assert told["weights_source"] == "by SNR"
    assert told["weights"]["values"] == pytest.approx(expected(2), abs=1e-6)
    (line,) = weights_lines(run.graph, run.store)
    assert line.endswith(f"{expected(2)[0]:.3g}, {expected(2)[1]:.3g}, by SNR")


@pytest.mark.parametrize(
    "merge, message",
    [
        ({"search": "grid"}, "weighting=snr with search=grid: it needs search=none and no weights"),
        ({"weights": [0.5, 0.5]}, "weighting=snr with weights given: it needs search=none and no weights"),
        ({"method": "none"}, "weighting=snr: method=none merges nothing; use weighting=uniform"),
        ({"method": "average"}, "merge.weighting=snr: method average takes no weights; use weighting=uniform"),
    ],
)
def test_what_takes_no_such_weights_is_refused(pico_pipeline: Path, merge: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        graph_of(pico_pipeline, merge)
