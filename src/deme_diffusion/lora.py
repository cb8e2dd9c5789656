"""LoRA factors on disk: read in any format that stock diffusers converts, written as its pipelines load them.

A LoRA changes a weight K (out, in, ...) by s B A (Hu et al. 2021), with A (r, in, ...), B (out, r, 1, ...) and
s = alpha / r; of a convolution A has the kernel and B is pointwise.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from deme_diffusion.digests import known, recall, remember, size_and_time
from deme_diffusion.errors import UserError, nearest
from deme_diffusion.lora_files import ADAPTER_KEY, BASE_KEY, PEFT_CONFIG, PEFT_NAME, find_lora, metadata_of
from deme_diffusion.weights import State, Weights, load_state, save_state, update_digest

_DORA = "a DoRA, whose change of a weight is no product of two factors; fuse it into its base"
_PEFT = "base_model.model."
_FACTOR = re.compile(r"(?P<layer>.+)\.lora_(?P<which>[AB])(\.default)?\.weight")
_STOCK = re.compile(r"(unet|transformer(_2)?|text_encoder(_\d)?)\..+\.lora_[AB]\.weight")
_LOADERS = {
    "UNet2DConditionModel": "StableDiffusionLoraLoaderMixin",
    "SD3Transformer2DModel": "SD3LoraLoaderMixin",
    "FluxTransformer2DModel": "FluxLoraLoaderMixin",
    "WanTransformer3DModel": "WanLoraLoaderMixin",
}
"""Class of a component -> what of diffusers converts its LoRAs."""


@dataclass(frozen=True, eq=False)
class Factors:
    """One layer's: s B A is what is added to its weight."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        """r."""
        return int(self.down.shape[0])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it is added to."""
        return (int(self.up.shape[0]), *self.down.shape[1:])

    def delta(self) -> torch.Tensor:
        """s B A, shaped as the weight, in float32 or wider."""
        kind = torch.promote_types(self.down.dtype, torch.float32)
        product = self.up.to(kind).flatten(1) @ self.down.to(kind).flatten(1)
        return (product * self.scale).reshape(self.shape)


@dataclass(frozen=True, eq=False)
class Lora:
    """An opened LoRA: layer -> its factors; `base`: what it says of the model it is for; `notes` for the user."""

    file: Path
    component: str
    layers: dict[str, Factors]
    base: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


# -- writing ---------------------------------------------------------------------------------------


def save_lora(
    file: Path, component: str, layers: Mapping[str, Factors], base: Mapping[str, Any] | None = None, **more: str
) -> None:
    """The factors as `pipeline.load_lora_weights(folder)` of stock diffusers takes them, ranks and alphas included."""
    state = {}
    for name, own in layers.items():
        state[f"{component}.{name}.lora_A.weight"] = own.down
        state[f"{component}.{name}.lora_B.weight"] = own.up
    said = {f"{component}.{key}": value for key, value in config_of(layers).items()}
    metadata = {ADAPTER_KEY: json.dumps(said, sort_keys=True), **more}
    if base:
        metadata[BASE_KEY] = json.dumps(dict(base), sort_keys=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_state(file, state, metadata)


def config_of(layers: Mapping[str, Factors]) -> dict[str, Any]:
    """Arguments of peft's `LoraConfig` by which these factors act as they do: r, alpha, and the layers that differ."""
    ranks = {name: own.rank for name, own in layers.items()}
    alphas = {name: own.scale * own.rank for name, own in layers.items()}
    rank, alpha = (Counter(found.values()).most_common(1)[0][0] for found in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{name}": own for name, own in ranks.items() if own != rank},
        "alpha_pattern": {f"^{name}": own for name, own in alphas.items() if own != alpha},
        "target_modules": sorted(layers),
    }


def base_record(base: Weights, *, full_hash: bool = False) -> dict[str, Any]:
    """What a LoRA says of the model it is for; the digest is None where nothing vouches for the files."""
    kinds = sorted({base.entry(key).dtype for key in base.keys()})  # noqa: SIM118 - Weights is no mapping
    digest = known(base.files, full_hash=full_hash).digest
    tensors = tensors_digest(base) if full_hash else None
    return {"sha256": digest, "tensors": tensors, "dtype": kinds, "files": len(base.files)}


def tensors_digest(model: Weights) -> str:
    """`state_digest` of a model, a tensor at a time, and remembered: files may differ in their headers alone."""
    key = ["tensors", *([str(file.absolute()), *size_and_time(file)] for file in model.files)]
    if digest := recall(key):
        return digest
    found = hashlib.sha256()
    for name in sorted(model.keys()):
        update_digest(found, name, model.tensor(name))
    remember(key, found.hexdigest(), path=str(model.path.absolute()))
    return found.hexdigest()


# -- reading ---------------------------------------------------------------------------------------


def read_lora(path: Path, component: str, config: Mapping[str, Any]) -> Lora:
    """The LoRA in a file or folder, for a component with this config.json.

    Raises UserError for what is no LoRA, for one without a factor for the component, and for kinds of adapters that
    are no product of two factors.
    """
    if (file := find_lora(path)) is None:
        raise UserError(f"{path}: no LoRA; a folder with pytorch_lora_weights.safetensors, or such a file is expected")
    state, said = load_state(file), metadata_of(file)
    _check_kind(file, state)
    settings, alphas = _settings(file, said, component), dict[str, float]()
    if not all(_STOCK.fullmatch(key) for key in state):
        state, alphas = _converted(file, state, component, config)
    others = sorted({key.split(".")[0] for key in state if not key.startswith(f"{component}.")})
    own = {key.removeprefix(f"{component}."): value for key, value in state.items() if key.startswith(f"{component}.")}
    if not own:
        raise UserError(f"{file}: nothing in it is for the {component}; it has {', '.join(others) or 'no tensor'}")
    layers = _layers(file, own, settings, {key.removeprefix(f"{component}."): a for key, a in alphas.items()})
    notes = [f"{file}: {', '.join(others)} left out: only the {component} is merged"] if others else []
    return Lora(file, component, layers, _base_said(said), tuple(notes))


def check_fits(lora: Lora, shapes: Mapping[str, Sequence[int]], of: str) -> None:
    """Raises UserError unless every layer has a weight of its shape among `shapes` (parameter -> shape) of a model."""
    for name, own in lora.layers.items():
        key = f"{name}.weight"
        if key not in shapes:
            hint = nearest(key, shapes)
            raise UserError(f"{lora.file}: a LoRA of another base: {of} has no {key}{hint}")
        if tuple(shapes[key]) != own.shape:
            raise UserError(
                f"{lora.file}: a LoRA of another base: {key} is {own.shape} there, {tuple(shapes[key])} in {of}"
            )


def check_base(lora: Lora, base: Mapping[str, Any], model: Weights) -> str | None:
    """Raises UserError where the LoRA says that it is for another model than this one with this `base_record`.

    Only files of one kind can be told apart: the same model in another precision has another digest. Of files that
    differ the tensors are compared, where the LoRA says theirs. Returns what to tell the user where nothing could be.
    """
    said, of = lora.base, model.path
    if said.get("dtype") != base["dtype"] or not said.get("sha256"):
        return None
    if base["sha256"] is None:
        return f"{lora.file}: not compared with the base that it was trained on; a full hash (--full-hash) does"
    differ = said.get("files") == base["files"] and said["sha256"] != base["sha256"]
    if differ and said.get("tensors"):  # equal ones may lie in files whose headers differ
        differ = said["tensors"] != tensors_digest(model)
    if differ:
        raise UserError(
            f"{lora.file}: a LoRA of another base: it was trained on weights {said['sha256'][:12]}, and {of} has "
            f"{base['sha256'][:12]}; give the model that it was trained on"
        )
    return None


def _check_kind(file: Path, state: State) -> None:
    """Raises UserError for a DoRA, whose magnitudes some converters leave out, and for factors in whole numbers."""
    if any("dora_scale" in key or "lora_magnitude_vector" in key for key in state):
        raise UserError(f"{file}: {_DORA}")
    if key := next((key for key, own in state.items() if not own.is_floating_point() and "alpha" not in key), None):
        kind = str(state[key].dtype).removeprefix("torch.")
        raise UserError(f"{file}: {key} is in {kind}: packed factors cannot be merged; give them in floating point")


def _converted(file: Path, state: State, component: str, config: Mapping[str, Any]) -> tuple[State, dict[str, float]]:
    """Another format's tensors under the names of the stock one, and its alphas by layer."""
    if all(key.startswith(_PEFT) for key in state):
        return {f"{component}.{key.removeprefix(_PEFT)}": value for key, value in state.items()}, {}
    kind = str(config.get("_class_name"))
    if kind not in _LOADERS:
        what = "the base has no config.json that says its class" if kind == "None" else f"diffusers has none for {kind}"
        raise UserError(f"{file}: a LoRA in a format that must be converted, and {what}; give one that diffusers saved")
    try:
        found, alphas = _by_diffusers(state, kind, config)
    except (ValueError, KeyError, RuntimeError, AttributeError, IndexError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{file}: no LoRA of a {kind} that diffusers converts: {reason}") from None
    if not alphas:
        _check_alphas(file, state, found)
    return found, alphas


def _by_diffusers(state: State, kind: str, config: Mapping[str, Any]) -> tuple[State, dict[str, float]]:
    """What the loader of the pipeline makes of a state, with peft's names of the factors."""
    from diffusers.loaders import lora_pipeline
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    name, options = _LOADERS[kind], dict[str, Any]()
    if config.get("addition_embed_type") == "text_time":
        name, options = "StableDiffusionXLLoraLoaderMixin", {"unet_config": SimpleNamespace(**config)}
    elif kind == "FluxTransformer2DModel":
        options = {"return_alphas": True}  # without which they are dropped
    loader: Any = getattr(lora_pipeline, name)
    found: Any = loader.lora_state_dict(dict(state), **options)
    tensors, alphas = found if isinstance(found, tuple) else (found, None)
    if not any(".lora_A." in key for key in tensors):
        tensors = convert_unet_state_dict_to_peft(tensors)
    return tensors, {key.removesuffix(".alpha"): float(value) for key, value in (alphas or {}).items()}


def _check_alphas(file: Path, state: State, found: State) -> None:
    """Raises UserError where alphas were neither handed on by the converter nor put into the factors."""
    for key, alpha in state.items():
        if not key.endswith(".alpha"):
            continue
        downs = (f"{key.removesuffix('.alpha')}.{name}.weight" for name in ("lora_A", "lora_down", "lora.down"))
        own = next((state[down] for down in downs if down in state), None)
        if own is None or float(alpha) == own.shape[0]:
            continue
        if any(other.shape == own.shape and torch.equal(other, own) for other in found.values()):
            raise UserError(
                f"{file}: {key}: diffusers' converter loses it, and with it the LoRA's scale; save it again"
            )


def _settings(file: Path, said: Mapping[str, str], component: str) -> dict[str, Any]:
    """Arguments of peft's `LoraConfig`, from the metadata or from the file beside; empty where nothing says them."""
    found: Any = {}
    if ADAPTER_KEY in said:
        found = _json(file, said[ADAPTER_KEY])
        found = {k.removeprefix(f"{component}."): v for k, v in found.items() if k.startswith(f"{component}.")} or found
    elif file.name == PEFT_NAME and (file.parent / PEFT_CONFIG).is_file():
        found = _json(file.parent / PEFT_CONFIG, (file.parent / PEFT_CONFIG).read_text())
    if found.get("use_dora"):
        raise UserError(f"{file}: {_DORA}")
    return dict(found)


def _json(where: Path, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{where}: no readable settings of an adapter in it; save it again")
    return found


def _base_said(said: Mapping[str, str]) -> dict[str, Any]:
    try:
        found = json.loads(said.get(BASE_KEY, "{}"))
    except ValueError:
        found = {}
    return found if isinstance(found, dict) else {}


def _layers(file: Path, own: State, settings: Mapping[str, Any], alphas: Mapping[str, float]) -> dict[str, Factors]:
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in own.items():
        found = _FACTOR.fullmatch(key)
        if found is None:
            raise UserError(f"{file}: {key} is no factor of a low-rank product; fuse this adapter into its base")
        parts.setdefault(found["layer"], {})[found["which"]] = value
    layers = {}
    for name, pair in parts.items():
        if set(pair) != {"A", "B"}:
            raise UserError(f"{file}: {name} has only one of its two factors; fetch or make it again")
        rank = int(pair["A"].shape[0])
        if not rank:
            raise UserError(f"{file}: {name}: factors of rank 0; fetch or make it again")
        if pair["B"].ndim < 2 or pair["B"].shape[1] != rank or math.prod(pair["B"].shape[2:]) != 1:
            raise UserError(f"{file}: {name}: factors {tuple(pair['B'].shape)} and {tuple(pair['A'].shape)} do not fit")
        layers[name] = Factors(pair["A"], pair["B"], _scale(file, name, rank, settings, alphas))
    return layers


def _scale(file: Path, name: str, rank: int, settings: Mapping[str, Any], alphas: Mapping[str, float]) -> float:
    """alpha / r as diffusers would have it: from the metadata, from a tensor of its own, else 1."""
    if alphas:
        return alphas.get(name, Counter(alphas.values()).most_common(1)[0][0]) / rank
    if "lora_alpha" not in settings:
        return 1.0
    alpha, patterns = settings["lora_alpha"], settings.get("alpha_pattern") or {}
    try:
        for pattern, own in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", name):  # as peft matches it
                alpha = own
                break
        return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    except (TypeError, ValueError, AttributeError, re.error):
        told = f"lora_alpha {alpha!r}, alpha_pattern {patterns!r}"
        raise UserError(f"{file}: {name}: no readable alpha in its settings ({told}); save it again") from None
