"""LoRAs merged into one, against explicit matrices; any format that stock diffusers converts; what is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file

import tiny
import tiny_flow
from deme_diffusion import merge_checkpoints
from deme_diffusion.config import MethodOptions
from deme_diffusion.errors import UserError
from deme_diffusion.lora import Factors, Lora, base_record, read_lora
from deme_diffusion.lora_files import LORA_NAME, find_lora
from deme_diffusion.merging.apply import Merger
from deme_diffusion.merging.differential import Differential
from deme_diffusion.merging.lora import MergedLora, decomposed_to, merged_lora
from deme_diffusion.merging.methods import Parameter, function
from deme_diffusion.merging.opening import Parents
from deme_diffusion.merging.selection import MergeWeights
from deme_diffusion.merging.table import method
from deme_diffusion.merging.vectors import Weight
from deme_diffusion.models import lora as adapters
from deme_diffusion.models.stable_diffusion import StableDiffusion
from deme_diffusion.weights import WEIGHTS_NAME, Weights, load_state, state_digest
from lora_models import answered, random_factors, saved

TARGETS: Sequence[tuple[str, ...] | None] = (None, ("to_q", "conv1"), ("to_q", "conv_in", "proj_in"))
"""Of three LoRAs: other ranks, other layers, among them convolutions, pointwise ones and linear layers."""
WEIGHTS = (0.5, -0.3, 0.9)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion; read only."""
    return tiny.stable_diffusion(tmp_path_factory.mktemp("base") / "sd")


@pytest.fixture(scope="module")
def experts(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three LoRAs for it, of ranks 2, 3 and 4."""
    module, folder = StableDiffusion.load(base).module, tmp_path_factory.mktemp("experts")
    return [
        saved(folder / str(i), random_factors(module, 2 + i, i, targets, 0.05 * (1 + i)))
        for i, targets in enumerate(TARGETS)
    ]


def opened(path: Path) -> Lora:
    """A LoRA for the tiny U-Net."""
    return read_lora(path, "unet", {})


def dense(path: Path, name: str, shape: Sequence[int]) -> torch.Tensor:
    """s B A of a layer by one product in float64; 0 where the LoRA leaves it alone."""
    own = opened(path).layers.get(name)
    if own is None:
        return torch.zeros(*shape, dtype=torch.float64)
    return own.scale * torch.einsum("or,r...->o...", own.up.double().flatten(1), own.down.double())


def merge(
    base: Path,
    experts: Sequence[Path],
    weights: Any = WEIGHTS,
    method_name: str = "task_arithmetic",
    options: MethodOptions | None = None,
    rank: int | None = None,
) -> tuple[MergedLora, dict[str, list[torch.Tensor]]]:
    """One LoRA, and for each layer the experts' changes."""
    with Merger(base / "unet", experts, method_name, options or MethodOptions()) as merger:
        found = merged_lora(merger, MergeWeights.of(weights), rank)
        shapes = {name: merger.base.shape(f"{name}.weight") for name in found.layers}
    return found, {name: [dense(path, name, shape) for path in experts] for name, shape in shapes.items()}


# --- linear methods -----------------------------------------------------------------------------------------------


def test_task_arithmetic_is_exact_in_every_layer(base: Path, experts: list[Path]) -> None:
    found, deltas = merge(base, experts)
    assert found.exact and found.relative_error == 0.0
    assert set(found.layers) == {name for path in experts for name in opened(path).layers}
    for name, own in found.layers.items():
        expected = sum((w * delta for w, delta in zip(WEIGHTS, deltas[name], strict=True)), torch.tensor(0.0))
        torch.testing.assert_close(own.delta().double(), expected, rtol=1e-5, atol=1e-6)
        ranks = [opened(path).layers[name].rank for path in experts if name in opened(path).layers]
        assert own.rank == min(sum(ranks), own.shape[0], math.prod(own.shape[1:]))
        assert math.isclose(found.norms[name], float(expected.square().sum()), rel_tol=1e-5)


def test_the_average_is_of_all_experts_whichever_have_the_layer(base: Path, experts: list[Path]) -> None:
    found, deltas = merge(base, experts, (1.0,) * 3, "average")
    for name, own in found.layers.items():
        torch.testing.assert_close(own.delta().double(), sum(deltas[name]) / 3, rtol=1e-5, atol=1e-6)


def test_factors_merged_apart_are_another_matrix(base: Path, experts: list[Path]) -> None:
    name = next(iter(opened(experts[0]).layers))
    pair = [
        replace(opened(experts[0]).layers[name], scale=1.0),
        random_factors(StableDiffusion.load(base).module, 2, 9)[name],
    ]
    apart = sum(0.5 * own.up for own in pair) @ sum(0.5 * own.down for own in pair)
    assert not torch.allclose(apart, sum(0.5 * own.delta() / own.scale for own in pair), atol=1e-2)


def test_rules_and_kept_parameters(base: Path, experts: list[Path]) -> None:
    weights = MergeWeights(WEIGHTS, {"*.to_q.weight": (0.0, 2.0, 0.0)}, {"conv_in.*": "base", "*.conv1.weight": 1})
    found, deltas = merge(base, experts, weights)
    assert "conv_in" not in found.layers
    for name, own in found.layers.items():
        row = (0.0, 2.0, 0.0) if name.endswith("to_q") else (0, 1, 0) if name.endswith("conv1") else WEIGHTS
        expected = sum((w * delta for w, delta in zip(row, deltas[name], strict=True)), torch.tensor(0.0))
        torch.testing.assert_close(own.delta().double(), expected, rtol=1e-5, atol=1e-6)
        assert name not in opened(experts[1]).layers or not name.endswith("to_q") or own.rank == 3


def test_weights_of_0_leave_the_base_and_a_lora_that_loads(base: Path, experts: list[Path], tmp_path: Path) -> None:
    merge_checkpoints(base, experts, tmp_path / "none", weights=(0, 0, 0))
    module = StableDiffusion.load(base).module.eval()
    plain = answered(module)
    assert torch.equal(answered(adapters.attach(module, opened(tmp_path / "none"))), plain)


# --- a given rank -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_given_rank_is_the_best_of_the_dense_matrix_and_says_what_is_lost(
    base: Path, experts: list[Path], rank: int
) -> None:
    found, deltas = merge(base, experts, rank=rank)
    lost = whole = 0.0
    for name, own in found.layers.items():
        expected = sum((w * d for w, d in zip(WEIGHTS, deltas[name], strict=True)), torch.tensor(0.0)).flatten(1)
        u, values, v = torch.linalg.svd(expected, full_matrices=False)
        best = (u[:, :rank] * values[:rank]) @ v[:rank]
        assert own.rank <= max(rank, 1)
        torch.testing.assert_close(own.delta().double().flatten(1), best, rtol=1e-4, atol=1e-5)
        error = float(values[rank:].square().sum())
        assert math.isclose(found.lost[name], error, rel_tol=1e-6, abs_tol=1e-9)
        lost, whole = lost + error, whole + float(values.square().sum())
    assert math.isclose(found.relative_error, math.sqrt(lost / whole), rel_tol=1e-6)
    assert found.worst[1] >= found.relative_error > 0 and not found.exact


def test_an_exact_merge_has_no_more_rank_than_the_layer(base: Path, tmp_path: Path) -> None:
    module = StableDiffusion.load(base).module
    wide = [saved(tmp_path / str(i), random_factors(module, 6, i, ("to_q",), 0.1)) for i in range(3)]
    found, deltas = merge(base, wide)
    assert found.exact and found.relative_error == 0.0
    for name, own in found.layers.items():
        expected = sum((w * d for w, d in zip(WEIGHTS, deltas[name], strict=True)), torch.tensor(0.0))
        assert own.rank == min(own.shape) < 18
        torch.testing.assert_close(own.delta().double(), expected, rtol=1e-4, atol=1e-5)


def test_what_float32_rounds_away_is_no_loss() -> None:
    draw = torch.Generator().manual_seed(0)
    change = torch.randn(64, 5, generator=draw) @ torch.randn(5, 96, generator=draw)
    for rank, exact in ((5, True), (4, False)):
        own, norm, lost = decomposed_to(change, rank)
        assert lost > 0 and MergedLora({"a": own}, {"a": norm}, {"a": lost}).exact == exact


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 3, 3, 3)])
def test_dense_changes_are_decomposed_as_by_svd(shape: tuple[int, ...]) -> None:
    change = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    own, total, lost = decomposed_to(change, 3)
    values = torch.linalg.svdvals(change.double().flatten(1))
    assert math.isclose(lost, float(values[3:].square().sum()), rel_tol=1e-6)
    assert math.isclose(total, float(values.square().sum()), rel_tol=1e-9)
    assert own.shape == shape and own.rank == 3
    assert math.isclose(float((own.delta() - change).square().sum()), lost, rel_tol=1e-4)


# --- other methods ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ties", "dare_linear", "breadcrumbs", "tsv", "iso_c"])
def test_other_methods_work_on_dense_changes_with_a_base_of_0(base: Path, experts: list[Path], name: str) -> None:
    row, weights = method(name), (1.0, 0.5, 0.7)
    found, deltas = merge(base, experts, weights, name, rank=64)
    for layer, own in found.layers.items():
        zeros = torch.zeros(deltas[layer][0].shape)
        changes = [Weight(delta.float()) for delta in deltas[layer]]
        parameter = Parameter(f"{layer}.weight", Weight(zeros), changes, weights, row.resolved(MethodOptions()))
        expected = function(name)(parameter).value.reshape(zeros.shape)
        torch.testing.assert_close(own.delta(), expected, rtol=1e-3, atol=1e-4)
    assert found.relative_error < 1e-5


def test_another_methods_rank_is_that_of_all_together_with_its_error(base: Path, experts: list[Path]) -> None:
    found, _ = merge(base, experts, (1.0,) * 3, "ties")
    together = {n: sum(opened(p).layers[n].rank for p in experts if n in opened(p).layers) for n in found.layers}
    assert all(own.rank <= together[name] for name, own in found.layers.items())
    assert 0 < found.relative_error < 1


# --- dense readers: what searches, figures and fused merges see -----------------------------------------------------


def test_a_lora_reads_as_the_whole_model_that_it_makes(base: Path, experts: list[Path]) -> None:
    plain = load_state(base / "unet" / WEIGHTS_NAME)
    with closing(Parents(base / "unet", experts, method("task_arithmetic"), ())) as parents:
        for path, reader in zip(experts, parents.experts, strict=True):
            assert list(reader.keys()) == parents.keys() and reader.layout() == parents.base.layout()
            for key in parents.keys():  # noqa: SIM118
                change = dense(path, key.removesuffix(".weight"), plain[key].shape) if key.endswith(".weight") else 0
                torch.testing.assert_close(
                    reader.tensor(key).double(), plain[key].double() + change, rtol=1e-6, atol=1e-6
                )
        assert (
            parents.moved("conv_in.weight")
            and not parents.moved("conv_in.bias")
            and not parents.moved("conv_out.weight")
        )


def test_a_fused_merge_is_the_base_with_the_merged_lora(base: Path, experts: list[Path], tmp_path: Path) -> None:
    told = merge_checkpoints(base, experts, tmp_path / "fused", weights=WEIGHTS, fuse=True)
    merge_checkpoints(base, experts, tmp_path / "lora", weights=WEIGHTS)
    fused = StableDiffusion.load(tmp_path / "fused").module.eval()
    attached = adapters.attach(StableDiffusion.load(base).module, opened(tmp_path / "lora"))
    torch.testing.assert_close(answered(fused), answered(attached), rtol=1e-4, atol=1e-5)
    plain, merged = (load_state(folder / "unet" / WEIGHTS_NAME) for folder in (base, tmp_path / "fused"))
    assert torch.equal(plain["conv_out.weight"], merged["conv_out.weight"])  # which no LoRA moves
    assert told.record["shards"] == [WEIGHTS_NAME]


@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "tsv"])
def test_streamed_and_in_memory_dense_merges_agree(base: Path, experts: list[Path], tmp_path: Path, name: str) -> None:
    merge_checkpoints(base, experts, tmp_path / "fused", method=name, weights=WEIGHTS, fuse=True)
    streamed = load_state(tmp_path / "fused" / "unet" / WEIGHTS_NAME)
    with Merger(base / "unet", experts, name) as merger:
        state = merger.state(WEIGHTS)
    assert all(torch.equal(state[key], value) for key, value in streamed.items())


def test_the_gradient_of_a_search_is_that_of_the_dense_model(base: Path, experts: list[Path]) -> None:
    shell = StableDiffusion.load(base).module.double()
    with Merger(base / "unet", experts) as merger:
        differential = Differential(merger, shell)

        def loss(weights: Sequence[float]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            _, tensors = differential.prepare(weights)
            key = "conv_in.weight"
            return tensors[key].square().sum() + tensors["mid_block.resnets.0.conv1.weight"].sum(), tensors

        value, tensors = loss(WEIGHTS)
        value.backward()
        gradients = {key: own.grad for key, own in tensors.items() if own.grad is not None}
        found = differential.pull_back(WEIGHTS, gradients)[""]
        for i in range(3):
            step = [w + (1e-3 if i == j else 0.0) for j, w in enumerate(WEIGHTS)]
            back = [w - (1e-3 if i == j else 0.0) for j, w in enumerate(WEIGHTS)]
            slope = (float(loss(step)[0]) - float(loss(back)[0])) / 2e-3
            assert math.isclose(found[i], slope, rel_tol=1e-2, abs_tol=1e-2)


# --- formats ------------------------------------------------------------------------------------------------------


def kohya(layers: dict[str, Factors]) -> dict[str, torch.Tensor]:
    """As kohya's scripts save them: underscores, down and up, alpha as a tensor."""
    state = {}
    for name, own in layers.items():
        stem = "lora_unet_" + name.replace(".", "_")
        state |= {f"{stem}.lora_down.weight": own.down, f"{stem}.lora_up.weight": own.up}
        state[f"{stem}.alpha"] = torch.tensor(own.scale * own.rank)
    return state


def test_other_formats_make_the_model_that_stock_diffusers_makes(base: Path, tmp_path: Path) -> None:
    layers = random_factors(StableDiffusion.load(base).module, 2, 0, None, 0.05)
    config = json.loads((base / "unet" / "config.json").read_text())
    files: dict[str, dict[str, torch.Tensor]] = {
        "kohya": kohya(layers),
        "diffusers": {
            f"unet.{n}.lora.{k}.weight": v for n, o in layers.items() for k, v in (("down", o.down), ("up", o.up))
        },
        "peft": {
            f"base_model.model.{n}.lora_{k}.weight": v
            for n, o in layers.items()
            for k, v in (("A", o.down), ("B", o.up))
        },
    }
    for name, state in files.items():
        (tmp_path / name).mkdir()
        file = "adapter_model.safetensors" if name == "peft" else "some.safetensors"
        save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / name / file)
        if name == "peft":
            (tmp_path / name / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 0.1}))
        found = read_lora(tmp_path / name, "unet", config)
        expected = 1.0 if name == "diffusers" else 0.05
        assert all(math.isclose(own.scale, expected, rel_tol=1e-6) for own in found.layers.values())
        assert all(torch.equal(own.up, layers[key].up) for key, own in found.layers.items()) and len(
            found.layers
        ) == len(layers)
        if name != "peft":  # which its pipelines do not load
            pipeline = diffusers.DiffusionPipeline.from_pretrained(base)
            pipeline.load_lora_weights(tmp_path / name, weight_name=file)
            ours = adapters.attach(StableDiffusion.load(base).module, found)
            torch.testing.assert_close(answered(ours), answered(pipeline.unet), rtol=1e-5, atol=1e-6)


def test_alphas_of_flux_are_those_of_stock_diffusers(tmp_path: Path) -> None:
    folder = tiny_flow.flux(tmp_path / "flux")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    layers = random_factors(pipeline.transformer, 2, 0, ("attn.to_q", "attn.to_k"))
    state, config = dict[str, torch.Tensor](), json.loads((folder / "transformer" / "config.json").read_text())
    for i, (name, own) in enumerate(layers.items()):
        state |= {f"transformer.{name}.lora_A.weight": own.down, f"transformer.{name}.lora_B.weight": own.up}
        state[f"transformer.{name}.alpha"] = torch.tensor(1.0 + i % 2)
    file = tmp_path / "alphas.safetensors"
    save_file(state, file)
    found = read_lora(file, "transformer", config)
    pipeline.load_lora_weights(file)
    stock = {
        n: float(part.scaling["default_0"])
        for n, part in pipeline.transformer.named_modules()
        if hasattr(part, "scaling")
    }
    assert {name: own.scale for name, own in found.layers.items()} == stock
    assert set(stock.values()) == {0.5, 1.0}


def test_alphas_that_a_converter_loses_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def losing(state: dict[str, torch.Tensor], **_: Any) -> dict[str, torch.Tensor]:
        return {key: value for key, value in state.items() if not key.endswith(".alpha")}

    monkeypatch.setattr(diffusers.loaders.lora_pipeline.FluxLoraLoaderMixin, "lora_state_dict", losing)
    state = {"transformer.a.lora_A.weight": torch.ones(2, 3), "transformer.a.lora_B.weight": torch.ones(3, 2)}
    config = {"_class_name": "FluxTransformer2DModel"}
    for alpha in (2.0, 1.0):
        save_file({**state, "transformer.a.alpha": torch.tensor(alpha)}, tmp_path / f"{alpha}.safetensors")
    assert read_lora(tmp_path / "2.0.safetensors", "transformer", config).layers["a"].scale == 1.0  # alpha is r
    with pytest.raises(UserError, match=r"transformer\.a\.alpha: diffusers' converter loses it"):
        read_lora(tmp_path / "1.0.safetensors", "transformer", config)


def test_rank_stabilised_scales(base: Path, tmp_path: Path) -> None:
    layers = random_factors(StableDiffusion.load(base).module, 4, 0)
    state = {f"unet.{n}.lora_{k}.weight": v for n, o in layers.items() for k, v in (("A", o.down), ("B", o.up))}
    metadata = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 6, "unet.use_rslora": True})}
    save_file(state, tmp_path / "x.safetensors", metadata)
    assert {own.scale for own in opened(tmp_path / "x.safetensors").layers.values()} == {3.0}


# --- what is written, and what is refused -----------------------------------------------------------------------------


def test_the_merged_folder(base: Path, experts: list[Path], tmp_path: Path) -> None:
    found = merge_checkpoints(base, experts, tmp_path / "out", weights=WEIGHTS, lora_rank=2, dtype="float16")
    assert {path.name for path in found.path.iterdir()} == {LORA_NAME, "merge.json", "README.md"}
    told = json.loads((found.path / "merge.json").read_text())
    assert told["lora"]["rank"] == 2 and 0 < told["lora"]["relative_error"] <= told["lora"]["worst_error"]
    assert told["dtype"] == "float16" and len(told["experts"]) == 3 and told["statistics"]["model"]["norms"]
    text = (found.path / "README.md").read_text()
    assert "load_lora_weights" in text and "relative Frobenius error" in text
    assert {value.dtype for value in load_state(found.path / LORA_NAME).values()} == {torch.float16}
    assert find_lora(found.path) == found.path / LORA_NAME and opened(found.path).base["sha256"]


def test_a_lora_of_another_base_is_refused_in_a_line(base: Path, experts: list[Path], tmp_path: Path) -> None:
    module = StableDiffusion.load(base).module
    layers = random_factors(module, 2, 0)
    name = next(iter(layers))
    wide = {**layers, name: replace(layers[name], up=torch.zeros(24, 2))}
    with pytest.raises(UserError, match=r"a LoRA of another base: .*to_q\.weight is \(24, 8\) there, \(8, 8\) in"):
        merge_checkpoints(base, [saved(tmp_path / "wide", wide)], tmp_path / "out")
    with pytest.raises(UserError, match=r"a LoRA of another base: .* has no mid_block\.gone\.weight"):
        merge_checkpoints(
            base, [saved(tmp_path / "more", {**layers, "mid_block.gone": layers[name]})], tmp_path / "out"
        )
    of = {"sha256": "0" * 64, "dtype": ["F32"], "files": 1}
    with pytest.raises(UserError, match=r"trained on weights 000000000000, and .*unet has [0-9a-f]{12}"):
        merge_checkpoints(base, [saved(tmp_path / "digest", layers, base=of)], tmp_path / "out")
    half = {**of, "dtype": ["F16"]}  # the same model in another precision has another digest
    merge_checkpoints(base, [saved(tmp_path / "half", layers, base=half)], tmp_path / "out")


def test_a_base_in_other_files_is_known_by_its_tensors(base: Path, tmp_path: Path) -> None:
    with Weights(base / "unet") as model:
        of = base_record(model, full_hash=True)
    layers, state = random_factors(StableDiffusion.load(base).module, 2, 0), load_state(base / "unet" / WEIGHTS_NAME)
    assert of["tensors"] == state_digest(state)
    expert = saved(tmp_path / "expert", layers, base=of)
    for name, own in (("same", state), ("other", {**state, "conv_in.bias": state["conv_in.bias"] + 1})):
        shutil.copytree(base, tmp_path / name)
        save_file(own, tmp_path / name / "unet" / WEIGHTS_NAME, {"format": "pt", "by": "another tool"})
    merge_checkpoints(tmp_path / "same", [expert], tmp_path / "out")
    with pytest.raises(UserError, match="a LoRA of another base: it was trained on weights"):
        merge_checkpoints(tmp_path / "other", [expert], tmp_path / "no")


def test_a_big_base_is_compared_where_a_full_hash_is_asked_for(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("deme_diffusion.merging.lora_weights.SMALL", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    of = {"sha256": "0" * 64, "dtype": ["F32"], "files": 1}
    expert = saved(tmp_path / "expert", random_factors(StableDiffusion.load(base).module, 2, 0), base=of)
    merge_checkpoints(base, [expert], tmp_path / "out")
    assert "not compared with the base that it was trained on; a full hash (--full-hash) does" in caplog.text
    with pytest.raises(UserError, match="a LoRA of another base: it was trained on weights 000000000000"):
        merge_checkpoints(base, [expert], tmp_path / "no", full_hash=True)


def test_a_lora_beside_a_whole_model_is_refused(base: Path, experts: list[Path], tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "both")
    shutil.copy(experts[0] / LORA_NAME, tmp_path / "both")
    with pytest.raises(
        UserError, match=r"both: a LoRA \(pytorch.* beside a whole model \(model_index\.json\); give .*both/"
    ):
        merge_checkpoints(base, [tmp_path / "both"], tmp_path / "out")
    assert merge_checkpoints(base, [tmp_path / "both" / LORA_NAME], tmp_path / "lora").record["lora"]
    assert "lora" not in merge_checkpoints(base, [tmp_path / "both" / "unet"], tmp_path / "model").record


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lora_rank": 2, "fuse": True}, "lora_rank: 2: a whole model has no rank"),
        ({"max_shard_size": "1GB"}, "max_shard_size: LoRAs are merged into one LoRA"),
        ({"link": True}, "link: LoRAs are merged into one LoRA"),
    ],
)
def test_options_that_do_not_go_together(
    base: Path, experts: list[Path], tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        merge_checkpoints(base, experts, tmp_path / "out", **options)


def test_what_is_no_low_rank_product_is_refused(base: Path, tmp_path: Path) -> None:
    layers = random_factors(StableDiffusion.load(base).module, 2, 0)
    state = {f"unet.{n}.lora_{k}.weight": v for n, o in layers.items() for k, v in (("A", o.down), ("B", o.up))}
    name = next(iter(layers))
    scaled = {f"lora_unet_{name.replace('.', '_')}.dora_scale": torch.ones(8)}
    nothing = {k: v[:0] if "lora_A" in k else v[:, :0] for k, v in state.items()}
    cases = {
        "kohya": ({**kohya(layers), **scaled}, {}, "a DoRA"),
        "alpha": (state, {"lora_alpha": "x"}, "no readable alpha"),
        "pattern": (state, {"lora_alpha": 1, "alpha_pattern": {"([": 2}}, "no readable alpha"),
        "rank": (nothing, {}, "factors of rank 0"),
        "packed": ({k: v.to(torch.int8) for k, v in state.items()}, {}, "is in int8: packed factors"),
        "dora": ({**state, f"unet.{name}.lora_magnitude_vector": torch.ones(8)}, {}, "a DoRA"),
        "half": ({k: v for k, v in state.items() if k != f"unet.{name}.lora_B.weight"}, {}, "only one of its two"),
        "odd": ({**state, f"unet.{name}.lora_B.weight": torch.ones(8, 3)}, {}, "do not fit"),
        "kind": (state, {"use_dora": True}, "a DoRA"),
        "text": ({"text_encoder.a.lora_A.weight": torch.ones(2, 2)}, {}, "nothing in it is for the unet"),
    }  # fmt: skip
    for kind, (tensors, said, error) in cases.items():
        file = tmp_path / f"{kind}.safetensors"
        save_file(tensors, file, {"lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in said.items()})})
        with pytest.raises(UserError, match=error):
            merge_checkpoints(base, [file], tmp_path / "out")


def test_a_lora_among_whole_models_is_merged_as_the_model_that_it_makes(
    base: Path, experts: list[Path], tmp_path: Path
) -> None:
    merge_checkpoints(base, experts[:1], tmp_path / "one", weights=(1.0,), fuse=True)
    merge_checkpoints(base, [tmp_path / "one", experts[1]], tmp_path / "mixed", weights=WEIGHTS[:2])
    both = load_state(tmp_path / "mixed" / "unet" / WEIGHTS_NAME)
    merge_checkpoints(base, experts[:2], tmp_path / "loras", weights=WEIGHTS[:2], fuse=True)
    for key, value in load_state(tmp_path / "loras" / "unet" / WEIGHTS_NAME).items():
        torch.testing.assert_close(both[key], value, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match=r"lora_rank: it is for LoRAs, and .*one is none"):
        merge_checkpoints(base, [tmp_path / "one", experts[1]], tmp_path / "no", lora_rank=2)
