"""Models that take text or classes: what they cannot follow is found before a step; the doctor knows their needs."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from deme_diffusion.doctor import Finding, examine, needs
from deme_diffusion.errors import UserError
from deme_diffusion.pipeline import preflight
from deme_diffusion.pipeline.run import Run, open_run
from deme_diffusion.pipeline.workbench import Workbench
from deme_diffusion.recipes import Loaded
from deme_diffusion.recipes.checks import parse
from tiny import dit, stable_diffusion

Values = dict[str, Any]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stable_diffusion(tmp_path_factory.mktemp("sd") / "base")


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DiT of ten classes, which the stock pipeline does not guide."""
    return dit(tmp_path_factory.mktemp("dit") / "base", classes=10)


def values(pico: Values, family: str, base: Path, **decouple: Any) -> Values:
    model = {"family": family, "pretrained": str(base)}
    return {**pico, "model": model, "decouple": {**pico["decouple"], "projection": "none", **decouple}}


def run_of(made: Values, folder: Path) -> Run:
    return open_run(Loaded(parse(made, where="pico"), {}), out=folder / "runs" / "pico")


def test_guidance_that_the_stock_pipeline_lacks_is_refused_before_a_step(
    pico_values: Values, classes: Path, tmp_path: Path
) -> None:
    run = run_of(values(pico_values, "dit", classes), tmp_path)
    with pytest.raises(UserError, match="guidance_scale=1"):
        run.execute()
    assert not [node for node in run.graph.nodes if node.stage in ("cache", "decouple") and run.store.find(node.key)]
    plain = [{"num_inference_steps": steps, "guidance_scale": 1.0} for steps in (2, 3)]
    made = values(pico_values, "dit", classes)
    made["merge"], made["evaluate"] = {**made["merge"], "sampler": plain[0]}, {**made["evaluate"], "samplers": plain}
    run = run_of(made, tmp_path / "plain")
    preflight.check_asked(Workbench(run.graph, run.store))


def test_a_missing_peft_is_told_before_a_step(
    pico_values: Values, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    run = run_of(values(pico_values, "stable_diffusion", base, lora_rank=2), tmp_path)
    nodes = [node for node in run.graph.nodes if node.stage == "decouple"]
    with pytest.raises(UserError, match="LoRA needs peft"):
        preflight.check(Workbench(run.graph, run.store), nodes)


def test_layers_that_a_lora_does_not_find_are_told_before_a_step(
    pico_values: Values, base: Path, tmp_path: Path
) -> None:
    lora = {"lora_rank": 2, "lora_targets": ["to_qq"]}
    run = run_of(values(pico_values, "stable_diffusion", base, **lora), tmp_path)
    with pytest.raises(UserError, match=r"decouple\.lora_targets: .*to_qq.*did you mean"):
        run.execute()
    assert not [node for node in run.graph.nodes if node.stage in ("cache", "decouple") and run.store.find(node.key)]


def examined(made: Values, folder: Path) -> dict[str, Finding]:
    recipe = parse(made, where="pico")
    found = examine(lambda: open_run(Loaded(recipe, {}), out=folder / "runs" / "pico", download=False))
    return {finding.topic: finding for finding in found}


@pytest.mark.parametrize("lora", [None, 2])
def test_the_doctor_compares_what_a_text_recipe_needs(
    lora: int | None, pico_values: Values, base: Path, tmp_path: Path
) -> None:
    found = examined(values(pico_values, "stable_diffusion", base, lora_rank=lora), tmp_path)
    assert found["transformers"].status == "ok" and ("peft" in found) == (lora is not None)
    assert {"disk", "memory for training", "memory for encoding", "memory for sampling"} <= set(found)
    assert not [finding for finding in found.values() if finding.status == "problem"]


def test_the_doctor_tells_of_a_base_without_its_parts(pico_values: Values, base: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(base, tmp_path / "broken"))
    shutil.rmtree(broken / "text_encoder")
    found = examined(values(pico_values, "stable_diffusion", broken), tmp_path)
    assert found["model"].status == "problem" and "text_encoder" in found["model"].text


def test_a_base_too_large_to_open_is_reckoned_by_its_config(
    pico_values: Values, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(values(pico_values, "stable_diffusion", base), tmp_path)
    assert needs.training_memory(run, torch.device("cpu"))
    monkeypatch.setattr(needs, "free_memory", lambda device: 1000)
    assert needs.training_memory(run, torch.device("cpu")) is None
    findings = {finding.topic: finding for finding in needs.findings(run)}
    assert findings["memory for training"].status == "problem"
