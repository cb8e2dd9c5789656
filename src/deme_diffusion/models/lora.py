"""LoRA adapters in a component, by peft: put in with keyed factors, switched off for the teacher, taken out again.

An adapter's layers take the place of the base's own, which they hold: the base's parameters are never copied. A is
drawn as diffusers' training scripts do, from N(0, 1/r^2), by a key of its own for each layer; B is 0. Both are float32,
whatever the base is held in.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from deme_diffusion.errors import MachineError, UserError, nearest
from deme_diffusion.lora import Factors, Lora, check_fits, config_of
from deme_diffusion.models.precision import widened
from deme_diffusion.rng import generator
from deme_diffusion.weights import State, state_digest

NAME = "default"
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_JOINT = (*_ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
TARGETS: dict[str, tuple[str, ...]] = {
    "UNet2DConditionModel": _ATTENTION,
    "SD3Transformer2DModel": tuple(f"attn.{name}" for name in _JOINT),
    "FluxTransformer2DModel": (
        *(f"attn.{name}" for name in _JOINT),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    ),
}
"""Class of a component -> the layers that diffusers' training scripts adapt; of others the attention's."""
ADAPTABLE = (nn.Linear, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class LowRank:
    """What a training's adapters are: rank r, alpha (the scale is alpha / r), and names that layers end in.

    `targets` None: those of `TARGETS`. `base`: what the result says of the model that it is for (`lora.base_record`).
    """

    rank: int
    alpha: float | None = None
    targets: tuple[str, ...] | None = None
    base: Mapping[str, Any] = field(default_factory=dict)


class Adapted(nn.Module):
    """The base itself with adapters in it, which alone are trained; its forward, config and names are the base's."""

    def __init__(self, component: nn.Module) -> None:
        super().__init__()
        self.component = component

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.component(*args, **kwargs)

    def scales(self) -> dict[str, float]:
        """Layer -> alpha / r."""
        return {name: part.scaling[NAME] for name, part in _adapters(self.component)}

    def own_state(self) -> State:
        """The adapters' tensors by name: all that a training changes."""
        return {name: tensor for name, tensor in self.component.state_dict().items() if _is_adapter(name)}

    def load_own_state(self, state: State) -> None:
        """The inverse of `own_state`. Raises RuntimeError where the names are not the same."""
        missing = set(self.own_state()).symmetric_difference(state)
        if missing:
            raise RuntimeError(f"{sorted(missing)[0]}: not among the adapters of both")
        self.component.load_state_dict(state, strict=False)


class Bare(nn.Module):
    """The base that adapters are in, answering without them, in eval mode: the teacher of its own student.

    It holds no parameters of its own, and none of the base's by name.
    """

    def __init__(self, component: nn.Module) -> None:
        super().__init__()
        self._held = [component]  # a list: no submodule

    @property
    def component(self) -> nn.Module:
        """The base."""
        return self._held[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        component = self.component
        training = component.training
        with switched_off(component):
            component.eval()
            try:
                return component(*args, **kwargs)
            finally:
                component.train(training)


# -- which layers ----------------------------------------------------------------------------------


def layers_for(module: nn.Module, targets: Sequence[str] | None) -> list[str]:
    """Names of the layers that end in one of the targets. Raises UserError for a target that no layer ends in.

    None is what diffusers' training script of the component adapts.
    """
    parts = {name: part for name, part in module.named_modules() if name}
    kind = type(module).__name__
    wanted = TARGETS.get(kind, _JOINT) if targets is None else tuple(targets)
    found: list[str] = []
    for target in wanted:
        own = [name for name in parts if name == target or name.endswith(f".{target}")]
        if targets is not None:
            _check_target(target, own, parts, kind)
        found += own
    if not found:
        raise UserError(f"decouple.lora_targets: a {kind} has no attention layers; name the layers, as conv1")
    return sorted(set(found), key=list(parts).index)


def _check_target(target: str, own: Sequence[str], parts: Mapping[str, nn.Module], kind: str) -> None:
    able = {name: part for name, part in parts.items() if isinstance(part, ADAPTABLE)}
    tails = dict.fromkeys(".".join(name.split(".")[-length:]) for name in able for length in (1, 2, 3))
    if not own:
        raise UserError(f"decouple.lora_targets: no layer of the {kind} ends in {target}{nearest(target, tails)}")
    if bad := next((name for name in own if name not in able), None):
        what = type(parts[bad]).__name__
        hint = next((f"; did you mean {tail!r}?" for tail in tails if tail.startswith(f"{target}.")), "")
        raise UserError(f"decouple.lora_targets: {target}: {bad} is a {what}, and no linear layer or convolution{hint}")
    grouped = next((name for name in own if getattr(able[name], "groups", 1) != 1), None)
    if grouped:
        raise UserError(f"decouple.lora_targets: {target}: {grouped} is a convolution in groups, which LoRA leaves out")


# -- in and out ------------------------------------------------------------------------------------


def adapt(module: nn.Module, low_rank: LowRank, seed: int) -> Adapted:
    """Put new adapters into a module, in place. Raises UserError for targets that it does not have, or without peft."""
    names, layers = layers_for(module, low_rank.targets), dict[str, Factors]()
    for name in names:
        weight: Any = module.get_submodule(name).weight
        scale = (low_rank.alpha or low_rank.rank) / low_rank.rank
        down = torch.empty(low_rank.rank, *weight.shape[1:])
        up = torch.zeros(weight.shape[0], low_rank.rank, *(1 for _ in weight.shape[2:]))
        if not weight.is_meta:
            drawn = generator(seed, "lora", name).standard_normal(tuple(down.shape), dtype="float32")
            down = torch.from_numpy(drawn) / low_rank.rank
        layers[name] = Factors(down, up, scale)
    put_in(module, layers)
    return Adapted(module)


def attach(module: nn.Module, lora: Lora, name: str = NAME) -> nn.Module:
    """Put the adapter of a file into a module, in place, in eval mode. Raises UserError where it is another base's."""
    check_fits(lora, {key: tuple(own.shape) for key, own in _stock_parameters(module)}, f"the {type(module).__name__}")
    put_in(module, lora.layers, name)
    return module.requires_grad_(False).eval()


@torch.no_grad()
def fused(module: nn.Module, lora: Lora) -> nn.Module:
    """The module in place, in float32 or wider, with s B A added to its weights: for what looks at weights alone."""
    check_fits(lora, {key: tuple(own.shape) for key, own in module.named_parameters()}, f"the {type(module).__name__}")
    widened(module)
    for name, own in lora.layers.items():
        weight: Any = module.get_submodule(name).weight
        weight += own.delta().to(weight)
    return module


def put_in(module: nn.Module, layers: Mapping[str, Factors], name: str = NAME) -> None:
    """Adapters with these factors, held in float32 (float64 in a module of float64) on the module's device."""
    inject, config_class = peft_parts()
    config = config_of(layers)
    for key in ("rank_pattern", "alpha_pattern"):
        config[key] = {f"^{re.escape(own.removeprefix('^'))}": value for own, value in config[key].items()}
    config["target_modules"] = "|".join(map(re.escape, layers))  # a text is matched whole, a list by its ends
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # peft draws factors that are overwritten
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        inject(config_class(**config, init_lora_weights=False), module, adapter_name=name, low_cpu_mem_usage=True)
    first = next(iter(module.parameters()))
    wide = torch.float64 if first.dtype == torch.float64 else torch.float32
    for layer, factors in layers.items():
        own: Any = module.get_submodule(layer)
        for part, value in ((own.lora_A, factors.down), (own.lora_B, factors.up)):
            part[name].weight = nn.Parameter(value.to(first.device, wide, copy=True))
        own.scaling[name] = factors.scale


def exchange(module: nn.Module, layers: Mapping[str, Factors]) -> nn.Module:
    """The module with an adapter of these factors instead of those that were in it, in eval mode."""
    put_in(take_out(module), layers)
    return module.requires_grad_(False).eval()


def take_out(module: nn.Module) -> nn.Module:
    """The module as it was before adapters were put in: its own layers, parameters and names."""
    for name, part in _adapters(module):
        above, _, last = name.rpartition(".")
        setattr(module.get_submodule(above), last, part.base_layer)
    if hasattr(module, "peft_config"):
        del module.peft_config
    return module


@contextmanager
def lent(module: nn.Module) -> Iterator[None]:
    """While the block runs adapters may be put into a module; afterwards they are out, and its bits are the same."""
    before = state_digest(module.state_dict())
    try:
        yield
    finally:
        take_out(module)
        module.requires_grad_(False).eval()
    assert state_digest(module.state_dict()) == before, "the base's weights were changed during training"


# -- what is in ------------------------------------------------------------------------------------


@contextmanager
def switched_off(module: nn.Module) -> Iterator[None]:
    """While the block runs the module answers as it would without adapters."""
    parts = [part for _, part in _adapters(module)]
    # Not peft's `enable_adapters`, which also takes the factors' gradients away.
    for part in parts:
        part._disable_adapters = True
    try:
        yield
    finally:
        for part in parts:
            part._disable_adapters = False


def choose(module: nn.Module, name: str) -> nn.Module:
    """The module, in which only the adapter of that name acts."""
    for _, part in _adapters(module):
        part._disable_adapters = False
        part.set_adapter(name, inference_mode=True)
    return module


def choose_none(module: nn.Module) -> nn.Module:
    """The module, in which no adapter acts."""
    for _, part in _adapters(module):
        part._disable_adapters = True
    return module


def parameters_of(module: nn.Module) -> list[nn.Parameter]:
    """The factors of a module's adapters, in its own order; none of a stock module."""
    return [parameter for name, parameter in module.named_parameters() if _is_adapter(name)]


def factors_of(module: nn.Module, name: str = NAME) -> dict[str, Factors]:
    """Layer -> the factors of one adapter, detached."""
    return {
        layer: Factors(
            part.lora_A[name].weight.detach().clone(), part.lora_B[name].weight.detach().clone(), part.scaling[name]
        )
        for layer, part in _adapters(module)
        if name in part.lora_A
    }


def factors_in(state: State, scales: Mapping[str, float], name: str = NAME) -> dict[str, Factors]:
    """Layer -> factors, of a state as `Adapted.own_state` gives it."""
    return {
        layer: Factors(state[f"{layer}.lora_A.{name}.weight"], state[f"{layer}.lora_B.{name}.weight"], scale)
        for layer, scale in scales.items()
    }


def _adapters(module: nn.Module) -> list[tuple[str, Any]]:
    """Name and layer of everything that holds an adapter; none where peft is not there to have put one in."""
    return [(name, part) for name, part in module.named_modules() if hasattr(part, "lora_A") and hasattr(part, "r")]


def _stock_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Those of the base, under its own names."""
    for name, parameter in module.named_parameters():
        if not _is_adapter(name):
            yield name.replace(".base_layer.", "."), parameter


def _is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def peft_parts() -> tuple[Any, Any]:
    """peft's `inject_adapter_in_model` and `LoraConfig`. Raises UserError without it, MachineError if it is broken."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise MachineError(f"peft is there, and cannot be imported: {error}; install it again") from None
        raise UserError("LoRA needs peft: pip install 'deme-diffusion[text]'; or decouple.lora_rank=null") from None
    except ImportError as error:
        raise MachineError(f"peft is there, and cannot be imported: {error}; install it again") from None
    return inject_adapter_in_model, LoraConfig
