"""What must hold of a base and an expert beside their tensors: whole models, not packed, whose configs agree."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from deme_diffusion.errors import UserError
from deme_diffusion.files import part_of, visible_files
from deme_diffusion.merging.checkpoints import Place, parts
from deme_diffusion.weights import PICKLES, Weights, check_same_keys

Config = Mapping[str, Any]
_PACKED = re.compile(r".*\.(absmax|nested_absmax|quant_map|nested_quant_map|quant_state\..+|SCB|qweight|qzeros)")
_LORA = r"lora|lora_(a|b|up|down|unet|te\d?|mid|linear_layer)|hada_w\d_a|lokr_w\d"
_ADAPTER = re.compile(rf"(.*[._])?({_LORA})([._].*)?", re.IGNORECASE)
_SAYS_NOTHING = ("_*", "architectures", "transformers_version")
_MAY_MATTER = (
    *("sample_size", "*dtype*", "*upcast*", "*dropout*", "gradient_checkpointing", "use_cache", "initializer_*"),
    *("decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power"),
)
"""Keys that differ between models that merge well: of training, of its average, or of what is only a default size."""
_BLOCKS, _BLOCK = 8, 1 << 16
_MISSING = object()


def check_model(model: Weights, base: Weights) -> None:
    """Raises UserError for a LoRA, and for packed weights: what they hold is no entry of a weight."""
    own = model.keys() if model is base else sorted(set(model.keys()).difference(base.keys()))
    adapters = [key for key in own if _ADAPTER.fullmatch(key)]
    if key := next(iter(adapters if model is not base or adapters == own else ()), None):
        raise UserError(
            f"{model.path}: a LoRA ({key}), and no whole model; fuse it first: load_lora_weights and fuse_lora on the "
            "base's pipeline, then save_pretrained"
        )
    why = next((key for key in model.keys() if _PACKED.fullmatch(key)), None)  # noqa: SIM118
    if why is None and model.path.is_dir() and read_config(model.path).get("quantization_config"):
        why = "config.json: quantization_config"
    if why:
        raise UserError(f"{model.path}: quantised weights ({why}); merge the models before they are quantised")


def check_same(base: Weights, expert: Weights) -> None:
    """`check_same_keys`; where those differ and the configs name two classes, it is told before any key."""
    try:
        check_same_keys(base, expert)
    except UserError:
        if base.path.is_dir() and expert.path.is_dir():
            ours, theirs = (read_config(model.path).get("_class_name") for model in (base, expert))
            if ours and theirs and ours != theirs:
                raise UserError(f"{expert.path}: a {theirs}; the base is a {ours}: another architecture") from None
        raise


def check_config(base: Path, expert: Path) -> Iterator[str]:
    """What to tell the user of two component folders' configs. Raises UserError where their functions differ.

    What one of them does not say is as its class has it by default. Files have no config, and nothing is known.
    """
    if not (base.is_dir() and expert.is_dir()):
        return
    noted = []
    for key, ours, theirs in _differences(read_config(base), read_config(expert)):
        told = f"{key} is {_told(theirs)}, the base's {_told(ours)}"
        if _MISSING not in (ours, theirs) and not _matches(key, _MAY_MATTER):
            raise UserError(f"{expert}: config.json: {told}; models that compute alike can be merged")
        noted.append(told)
    if noted:
        more = f"; and {len(noted) - 3} more" if len(noted) > 3 else ""
        yield f"{expert}: config.json: {'; '.join(noted[:3])}{more}; the merged model has the base's"


def of_pipelines(base: Place, expert: Place) -> Iterator[str]:
    """What to tell the user of the rest of two pipelines, by configs, sizes and samples of the files."""
    if base.pipeline is None or expert.pipeline is None:
        return
    kinds = [_prediction_type(place.pipeline) for place in (base, expert)]
    if kinds[0] != kinds[1]:
        yield f"{expert.given}: prediction_type is {kinds[1]}, the base's {kinds[0]}; the merged model has the base's"
    names = [name for name in dict.fromkeys([*parts(base.pipeline), *parts(expert.pipeline)]) if name != base.component]
    if differ := [name for name in names if _differ(base.pipeline / name, expert.pipeline / name)]:
        what = f"{', '.join(differ)} {'differs' if len(differ) == 1 else 'differ'} from the base's too"
        yield f"{expert.given}: {what}; only {base.component} is merged, the rest is the base's"


def read_config(folder: Path) -> dict[str, Any]:
    """A component's config.json. Raises UserError where it is no JSON mapping."""
    try:
        values = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{folder / 'config.json'}: no readable JSON mapping")
    return values


# -- configs ---------------------------------------------------------------------------------------


def _differences(ours: Config, theirs: Config) -> Iterator[tuple[str, Any, Any]]:
    """Key, the base's value, the expert's; `_MISSING` where only one says it, and no class what it is else."""
    keys = [key for key in dict.fromkeys([*ours, *theirs]) if not _matches(key, _SAYS_NOTHING)]
    unsaid = any((key in ours) != (key in theirs) for key in keys)
    full = [{**(_defaults(str(config.get("_class_name"))) if unsaid else {}), **config} for config in (ours, theirs)]
    for key in keys:
        one, other = (config.get(key, _MISSING) for config in full)
        if not _alike(one, other):
            yield key, one, other


def _defaults(name: str) -> Config:
    """What a class of diffusers takes where a config says nothing."""
    import diffusers

    kind = getattr(diffusers, name, None)
    if not inspect.isclass(kind):
        return {}
    found = inspect.signature(kind.__init__).parameters
    return {key: own.default for key, own in found.items() if own.default is not own.empty}


def _alike(one: Any, other: Any) -> bool:
    """Whether two values say the same: one for all blocks is as good as a list of it, and null as false."""
    one, other = (list(value) if isinstance(value, tuple) else value for value in (one, other))
    if isinstance(one, list) != isinstance(other, list) and _MISSING not in (one, other):
        single, several = (other, one) if isinstance(one, list) else (one, other)
        return bool(several) and all(_alike(single, value) for value in several)
    return bool(one == other) or (one in (None, False) and other in (None, False))


def _matches(key: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _told(value: Any) -> str:
    return "not said" if value is _MISSING else json.dumps(value)


# -- the rest of a pipeline ------------------------------------------------------------------------


def _prediction_type(pipeline: Path | None) -> str:
    assert pipeline is not None, "a pipeline"
    try:
        said = json.loads((part_of(pipeline, "scheduler") / "scheduler_config.json").read_text())
        return str(said.get("prediction_type", "epsilon"))
    except (OSError, ValueError, AttributeError):
        return "epsilon"


def _differ(ours: Path, theirs: Path) -> bool:
    """Whether two parts with weights are known to differ; the same weights under other names are not looked at."""
    said = [(folder / "config.json").is_file() for folder in (ours, theirs)]
    if not all(said):
        return any(said)
    differences = _differences(read_config(ours), read_config(theirs))
    if any(not _matches(key, _MAY_MATTER) and _MISSING not in (one, other) for key, one, other in differences):
        return True
    both = [(file, theirs / file.relative_to(ours)) for file in visible_files(ours)]
    weights = [(one, other) for one, other in both if one.suffix in (".safetensors", *PICKLES) and other.is_file()]
    return any(not _same(one, other) for one, other in weights)


def _same(one: Path, other: Path) -> bool:
    """By size, and by some blocks spread over the files: a finetuned weight differs nearly everywhere."""
    if one.samefile(other):
        return True
    if (size := one.stat().st_size) != other.stat().st_size:
        return False
    with one.open("rb") as ours, other.open("rb") as theirs:
        for i in range(_BLOCKS):
            for file in (ours, theirs):
                file.seek(max(0, size - _BLOCK) * i // (_BLOCKS - 1))
            if ours.read(_BLOCK) != theirs.read(_BLOCK):
                return False
    return True
