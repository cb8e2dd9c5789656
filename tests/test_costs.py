"""Costs counted from a config are what torch counts of the class it is for; those of latents, LoRA and guidance."""

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from deme_diffusion.config import DataSettings, ExtractorSettings, ModelSettings
from deme_diffusion.config.evaluation import DIGITS_CNN
from deme_diffusion.data.sources import WORDINGS, WORDS
from deme_diffusion.evaluation import objectives
from deme_diffusion.models.lora import layers_for
from deme_diffusion.pipeline import needs, space
from deme_diffusion.pipeline.base_cost import base_cost, component_cost, known_configs
from deme_diffusion.pipeline.cost_parts import FLOAT, Cost
from deme_diffusion.pipeline.encoder_cost import autoencoder, clip_cost, text_encoder
from deme_diffusion.pipeline.facts import known
from deme_diffusion.pipeline.fetching import GATED, downloads
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.inputs import wanted_files
from deme_diffusion.pipeline.lora_cost import adapter_parameters
from deme_diffusion.recipes import load
from deme_diffusion.recipes.checks import parse
from tiny import stable_diffusion

Values = dict[str, Any]
TEXT = 11
CAPTIONS = len(WORDS) * len(WORDINGS) + 1
"""Of the digits, and ''."""
UNET: Values = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 48,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
XL: Values = {
    **UNET,
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 3),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 24,
}
DIT: Values = {
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 3,
    "sample_size": 16,
    "num_embeds_ada_norm": 10,
}
SD3: Values = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 48,
    "caption_projection_dim": 64,
    "pooled_projection_dim": 24,
    "pos_embed_max_size": 16,
}
SD35: Values = {**SD3, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}
FLUX: Values = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 48,
    "pooled_projection_dim": 24,
    "axes_dims_rope": (4, 6, 6),
}
WAN: Values = {
    "num_attention_heads": 4,
    "attention_head_dim": 24,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 48,
    "freq_dim": 32,
    "ffn_dim": 200,
    "num_layers": 3,
}


def given(kind: str, config: Values) -> Values:
    """A forward's arguments for one image; of a video of five frames."""
    text, pooled = torch.zeros(1, TEXT, 48), torch.zeros(1, 24)
    image, whole = torch.zeros(1, 4, 16, 16), torch.zeros(1, dtype=torch.long)
    if kind == "UNet2DConditionModel":
        more = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": torch.zeros(1, 6)}} if config is XL else {}
        return {"sample": image, "timestep": whole, "encoder_hidden_states": text, **more}
    if kind == "DiTTransformer2DModel":
        return {"hidden_states": image, "timestep": whole, "class_labels": whole}
    if kind == "SD3Transformer2DModel":
        return {"hidden_states": image, "timestep": whole, "encoder_hidden_states": text, "pooled_projections": pooled}
    if kind == "WanTransformer3DModel":
        return {"hidden_states": torch.zeros(1, 4, 5, 16, 16), "timestep": whole, "encoder_hidden_states": text}
    guidance = {"guidance": torch.zeros(1)} if config.get("guidance_embeds") else {}
    ids = {"img_ids": torch.zeros(64, 3), "txt_ids": torch.zeros(TEXT, 3)}
    tokens = {"hidden_states": torch.zeros(1, 64, 16), "timestep": torch.zeros(1)}
    return {**tokens, "encoder_hidden_states": text, "pooled_projections": pooled, **ids, **guidance}


CASES = {
    "unet": ("UNet2DConditionModel", UNET),
    "xl": ("UNet2DConditionModel", XL),
    "dit": ("DiTTransformer2DModel", DIT),
    "sd3": ("SD3Transformer2DModel", SD3),
    "sd3.5": ("SD3Transformer2DModel", SD35),
    "flux": ("FluxTransformer2DModel", FLUX),
    "flux-dev": ("FluxTransformer2DModel", {**FLUX, "guidance_embeds": True}),
    "wan": ("WanTransformer3DModel", WAN),
}


def counted(kind: str, config: Values) -> Cost:
    cost = component_cost({"_class_name": kind, **config}, size=(16, 16), tokens=TEXT, frames=5)
    assert cost is not None
    return cost


@pytest.mark.parametrize("name", CASES)
def test_a_component_costs_what_torch_counts(name: str) -> None:
    kind, config = CASES[name]
    cost = counted(kind, config)
    module = getattr(diffusers, kind)(**config)
    assert cost.parameters == sum(p.numel() for p in module.parameters())
    assert cost.kept == pytest.approx(kept_by_autograd(module, lambda: module(**given(kind, config))), rel=0.1)
    with torch.device("meta"):  # where attention is not fused, which the counter then sees
        module, arguments = module.to("meta"), given(kind, config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(**arguments)
    assert cost.flops == pytest.approx(counter.get_total_flops(), rel=0.001)
    if "UNet" in kind:
        assert cost.convolved == counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
    assert cost.checkpointed < cost.kept and cost.peak < cost.kept


def kept_by_autograd(module: torch.nn.Module, call: Callable[[], Any]) -> int:
    """Bytes of distinct storages that are saved for the backward pass, parameters left out."""
    own = {p.untyped_storage()._cdata for p in module.parameters()}
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    storages = {s._cdata: s.nbytes() for s in (tensor.untyped_storage() for tensor in saved)}
    return sum(size for key, size in storages.items() if key not in own)


@pytest.mark.parametrize("name", ["unet", "xl", "dit", "sd3", "sd3.5", "flux", "wan"])
def test_a_lora_has_the_parameters_that_its_layers_ask_for(name: str) -> None:
    kind, config = CASES[name]
    families = {"unet": "stable_diffusion", "xl": "stable_diffusion_xl", "sd3": "stable_diffusion_3"}
    family = families.get(name.split(".")[0], name)
    with torch.device("meta"):
        module = getattr(diffusers, kind)(**config)
    asked: list[list[str] | None] = [None, ["to_q"], ["net.2"]]
    for targets in asked:
        model = {"family": family, "pretrained": "nobody/nothing"}
        lora = {"lora_rank": 3, "projection": "none", "lora_targets": targets}
        recipe = parse({"model": model, "decouple": lora, "merge": {"fuse": True}}, where="test")
        layers = [module.get_submodule(layer) for layer in layers_for(module, targets)]
        widths = sum(layer.in_features + layer.out_features for layer in layers)
        assert adapter_parameters(recipe, counted(kind, config)) == 3 * widths > 0


@pytest.mark.parametrize(
    ("kind", "config", "change"),
    [
        ("UNet2DConditionModel", UNET, {"class_embed_type": "timestep"}),
        ("UNet2DConditionModel", UNET, {"down_block_types": ("SimpleCrossAttnDownBlock2D",) * 3}),
        ("UNet2DConditionModel", UNET, {"encoder_hid_dim_type": "text_proj"}),
        ("SD3Transformer2DModel", SD3, {"qk_norm": "layer_norm"}),
        ("WanTransformer3DModel", WAN, {"image_dim": 1280}),
        ("PixArtTransformer2DModel", DIT, {}),
    ],
)
def test_what_cannot_be_counted_is_not_guessed(kind: str, config: Values, change: Values) -> None:
    assert component_cost({"_class_name": kind, **config, **change}, size=(16, 16)) is None


# what is known of hub names


FAMILIES = {
    "sd14": "stable_diffusion",
    "sd21": "stable_diffusion",
    "sdxl": "stable_diffusion_xl",
    "dit-xl-2-256": "dit",
    "sd3-medium": "stable_diffusion_3",
    "sd35-medium": "stable_diffusion_3",
    "sd35-large": "stable_diffusion_3",
    "flux-dev": "flux",
    "wan21-1b": "wan",
}
PUBLISHED = {"sd14": 859_520_964, "sdxl": 2_567_463_684, "flux-dev": 11_901_408_320}
NAMES = [name for name, model in known()["models"].items() if "pipeline" in model]


def cost_of(name: str, **model: Any) -> Cost:
    configs = known_configs(name)
    assert configs is not None
    family = FAMILIES[known()["models"][name]["pipeline"]]
    cost = base_cost(ModelSettings.model_validate({"family": family, "pretrained": name, **model}), configs)
    assert cost is not None
    return cost


@pytest.mark.parametrize("name", FAMILIES)
def test_published_components_have_the_parameters_of_their_class(name: str) -> None:
    config = known()["components"][name]
    kind = config["_class_name"]
    with torch.device("meta"):
        module = getattr(diffusers, kind)(**{key: value for key, value in config.items() if key != "_class_name"})
    size = None if config.get("sample_size") else (128, 128)
    cost = component_cost(config, size=size)
    assert cost is not None and cost.parameters == sum(p.numel() for p in module.parameters())
    assert cost.parameters == PUBLISHED.get(name, cost.parameters)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_of_known_pipelines_are_those_of_their_parts(name: str) -> None:
    """Published in float32, or in half precision; where positions are a buffer, a little more."""
    cost, told = cost_of(name), known()["models"][name]["bytes"]
    assert cost.encoders is not None
    each = told / (cost.parameters + cost.encoders.parameters)
    assert min(abs(each - FLOAT), abs(each - 2)) < 0.06


def test_autoencoders_cost_what_torch_counts() -> None:
    config = known()["vaes"]["kl-4"]
    found = autoencoder(config, (64, 64))
    with torch.device("meta"):
        vae = diffusers.AutoencoderKL(**{key: value for key, value in config.items() if key != "_class_name"})
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            latents = vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mode()
        encode = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            vae.decode(latents)
    assert found.parameters == sum(p.numel() for p in vae.parameters()) == 83_653_863
    assert (found.encode, found.decode) == pytest.approx((encode, counter.get_total_flops()), rel=0.001)


@pytest.mark.parametrize("name", known()["texts"])
def test_text_encoders_cost_what_torch_counts(name: str) -> None:
    facts = known()["texts"][name]
    (kind,) = facts["architectures"]
    plain = {"CLIPTextModel": "CLIPTextConfig", "CLIPTextModelWithProjection": "CLIPTextConfig"}
    config = getattr(transformers, plain.get(kind, kind.replace("EncoderModel", "Config")))(**facts)
    with torch.device("meta"):
        encoder = getattr(transformers, kind)(config).eval()
        ids = torch.zeros(1, 77, dtype=torch.long)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            encoder(ids)
    found = text_encoder(facts, 77)
    assert found.parameters == sum(p.numel() for p in encoder.parameters())
    assert found.flops == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_the_papers_clip_costs_what_torch_counts() -> None:
    facts = known()["clips"]["laion/CLIP-ViT-g-14-laion2B-s12B-b42K"]
    parts = {name: facts[name] for name in ("text_config", "vision_config", "projection_dim")}
    with torch.device("meta"):
        clip = transformers.CLIPModel(transformers.CLIPConfig(**parts)).eval()
        asked = {"input_ids": torch.zeros(1, 77, dtype=torch.long), "pixel_values": torch.zeros(1, 3, 224, 224)}
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            clip(**asked)
    parameters, flops = clip_cost(facts["text_config"], facts["vision_config"], facts["projection_dim"])
    assert parameters == sum(p.numel() for p in clip.parameters())
    assert flops == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert facts["bytes"] == pytest.approx(FLOAT * parameters, rel=0.01)


def test_sizes_are_the_settings_or_the_checkpoints() -> None:
    flux = "black-forest-labs/FLUX.1-dev"
    assert cost_of("CompVis/stable-diffusion-v1-4").shape == (4, 64, 64)
    assert cost_of(flux).shape == (16, 128, 128) and cost_of(flux).image == (3, 1024, 1024)
    small = cost_of(flux, resolution=512)
    assert small.shape == (16, 64, 64) and small.flops < cost_of(flux).flops / 3
    video = cost_of("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", num_frames=81, resolution=480)
    assert video.shape == (16, 21, 60, 60)


# sums on a tiny pipeline: 8x8 images, latents (4, 4, 4), texts of 12 tokens of width 16


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stable_diffusion(tmp_path_factory.mktemp("sd") / "base")


def values(base: Path, pico_values: Values, **changes: Any) -> Values:
    sampler = {"num_inference_steps": 2}
    made = {
        **pico_values,
        "model": {"family": "stable_diffusion", "pretrained": str(base)},
        "data": {"caption_column": None},
        "decouple": {**pico_values["decouple"], "projection": "none"},
        "evaluate": {**pico_values["evaluate"], "samplers": [sampler, {**sampler, "guidance_scale": 1.0}]},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        made = {**made, section: {**made.get(section, {}), name: value}}
    return made


def graph_of(base: Path, pico_values: Values, **changes: Any) -> tuple[Graph, Cost]:
    graph = Graph(parse(values(base, pico_values, **changes), where="test"))
    cost = needs.model_cost(graph)
    assert cost is not None and cost.encoders is not None
    return graph, cost


def test_guidance_asks_the_model_twice(base: Path, pico_values: Values) -> None:
    graph, cost = graph_of(base, pico_values)
    around = cost.encoders
    assert around is not None
    guided, plain = (
        needs.flops(graph, node, cost) / 16 for node in graph.of_stage("sample") if node.label.startswith("sample base")
    )
    assert guided == 2 * 2 * cost.flops + around.decode + 2 * around.caption
    assert plain == 2 * cost.flops + around.decode + around.caption


def test_what_is_encoded_once_is_not_encoded_at_each_step(base: Path, pico_values: Values) -> None:
    (kept, cost), (anew, _) = (graph_of(base, pico_values, cache__enabled=on) for on in (True, False))
    around = cost.encoders
    assert around is not None
    (cache,) = kept.of_stage("cache")
    assert not list(anew.of_stage("cache"))
    assert needs.flops(kept, cache, cost) == 1797 * around.encode + CAPTIONS * around.caption
    once, again = (needs.flops(g, next(g.of_stage("decouple")), cost) for g in (kept, anew))
    trained, checked = 4 * 4, 2 * 4 * round(0.15 * 1797)  # two validations, in quarters
    assert again - once == pytest.approx((trained + checked) * (around.encode + around.caption))
    used = space.disk(kept, [cache], cost)["cache"]
    assert used == 1797 * prod(cost.shape) * 2 + CAPTIONS * (12 * 16 * 2 + 8)
    assert space.disk(graph_of(base, pico_values, cache__dtype="float32")[0], [cache], cost)["cache"] > 1.9 * used
    assert space.memory(kept, [cache], cost)["encoding"] > FLOAT * (cost.parameters + around.parameters)


def test_a_lora_holds_one_base_and_leaves_little(base: Path, pico_values: Values) -> None:
    (full, cost), (lora, _) = (graph_of(base, pico_values, decouple__lora_rank=rank) for rank in (None, 2))
    adapters = adapter_parameters(lora.recipe, cost)
    assert 0 < adapters < cost.parameters
    activations = 4 * cost.kept
    held = {
        name: space.memory(g, g.of_stage("decouple"), cost)["training"] for name, g in (("full", full), ("lora", lora))
    }
    assert held["full"] == 24 * cost.parameters + activations  # weights, gradients, two moments, average, teacher
    assert held["lora"] == 20 * adapters + FLOAT * cost.parameters + activations
    half, _ = graph_of(base, pico_values, decouple__lora_rank=2, model__dtype="bfloat16")
    assert space.memory(half, half.of_stage("decouple"), cost)["training"] == (
        20 * adapters + 2 * cost.parameters + activations // 2
    )
    for graph, each in ((full, FLOAT * cost.parameters), (lora, FLOAT * adapters)):
        used = space.disk(graph, graph.of_stage("decouple"), cost)
        assert used["weights"] == 3 * 2 * each and used["checkpoints"] == 2 * 4 * each
    merged = next(lora.of_stage("merge"))
    assert space.disk(lora, [merged], cost)["weights"] == FLOAT * 2 * adapters  # ranks side by side
    reduced, _ = graph_of(base, pico_values, decouple__lora_rank=2, merge__lora_rank=1)
    assert space.disk(reduced, [merged], cost)["weights"] == FLOAT * adapters // 2
    fused, _ = graph_of(base, pico_values, decouple__lora_rank=2, merge__fuse=True)
    assert space.disk(fused, [merged], cost)["weights"] == FLOAT * cost.parameters
    less = needs.flops(full, next(full.of_stage("decouple")), cost) - needs.flops(
        lora, next(lora.of_stage("decouple")), cost
    )
    assert less == 4 * 4 * cost.flops  # a forward pass less, of each sample of the control's four steps


def test_sampling_holds_text_encoders_and_autoencoder(base: Path, pico_values: Values) -> None:
    graph, cost = graph_of(base, pico_values, runtime__sample_batch_size=3)
    around = cost.encoders
    assert around is not None
    one = next(node for node in graph.of_stage("sample") if node.label.startswith("sample base"))
    run = max(2 * cost.peak, around.decode_peak)
    held = FLOAT * (2 * cost.parameters + around.parameters)  # the base, and the model that is served
    assert space.memory(graph, [one], cost)["sampling"] == held + 3 * run
    assert space.memory(graph, [graph.cost], cost)["sampling"] == held + FLOAT * cost.parameters + 3 * run, "ensemble"
    many, _ = graph_of(base, pico_values, runtime__sample_batch_size=40)
    assert space.memory(many, [many.cost], cost)["sampling"] == held + FLOAT * cost.parameters + 16 * run


def test_a_search_holds_all_whole_experts_and_one_base_of_lora_experts(base: Path, pico_values: Values) -> None:
    least = {"merge__search": "least_squares", "runtime__sample_batch_size": 1}
    full, cost = graph_of(base, pico_values, **least)
    lora, _ = graph_of(base, pico_values, **least, decouple__lora_rank=2)
    around = cost.encoders
    assert around is not None
    whole, adapted = (space.memory(g, list(g.of_stage("search")), cost)["search"] for g in (full, lora))
    point = FLOAT * around.parameters + cost.peak
    adapters = 2 * FLOAT * adapter_parameters(lora.recipe, cost)
    assert adapted == FLOAT * cost.parameters + adapters + space.HELD_ANSWERS + point
    assert whole == max(3 * FLOAT * cost.parameters + point, 2 * FLOAT * cost.parameters + FLOAT * around.parameters
                        + max(2 * cost.peak, around.decode_peak))  # fmt: skip
    exact, _ = graph_of(base, pico_values, **least, merge__gauss_newton_rounds=1)
    assert space.memory(exact, list(exact.of_stage("search")), cost)["search"] > whole
    assert space.HELD_ANSWERS == objectives.HELD_ANSWERS


def test_a_gated_base_is_told_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    recipe = load("flux-lora", ["evaluate.clip_score=false"]).recipe
    graph = Graph(
        recipe.model_copy(update={"data": DataSettings(), "extractor": ExtractorSettings(pretrained=DIGITS_CNN)})
    )
    assert [(entry["name"], entry["note"]) for entry in downloads(graph)] == [
        ("black-forest-labs/FLUX.1-dev@main", GATED)
    ]


def test_of_a_repository_only_what_a_pipeline_loads_is_fetched() -> None:
    """As those of Stable Diffusion XL and 3.5 are laid out."""
    wanted = [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/tokenizer_config.json",
        "tokenizer_2/spiece.model",
        "tokenizer_2/tokenizer_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
        "transformer/diffusion_pytorch_model.safetensors.index.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    beside = [
        "README.md",
        "sd3.5_large.safetensors",
        "text_encoder/model.fp16.safetensors",
        "text_encoders/t5xxl_fp16.safetensors",
        "transformer/diffusion_pytorch_model.bin",
        "safety_checker/config.json",
        "safety_checker/model.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    ]
    assert wanted_files(sorted([*wanted, *beside])) == wanted
    model = ["config.json", "merges.txt", "model.safetensors", "preprocessor_config.json"]
    assert wanted_files([*model, "open_clip_model.safetensors", "pytorch_model.bin"]) == model
    bare = ["config.json", "diffusion_pytorch_model.safetensors", "model_index.json", "scheduler_config.json"]
    assert wanted_files(bare) == bare  # a pipeline without folders
