"""Versions that fit together, devices, and the packages that a recipe's settings ask for."""

from __future__ import annotations

import importlib
import platform
import re
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec

from deme_diffusion.config import Recipe
from deme_diffusion.doctor.finding import Finding

REQUIRED = ("torch", "diffusers", "accelerate", "datasets", "safetensors")


def findings() -> Iterator[Finding]:
    """Every check of the environment."""
    yield Finding("ok", "python", platform.python_version())
    for name in REQUIRED:
        yield _importable(name)
    yield torchvision()
    yield cuda()


def _importable(name: str) -> Finding:
    version = _version(name)
    if version is None:
        return Finding("problem", name, "not installed; install deme-diffusion again")
    try:
        importlib.import_module(name)
    except Exception as error:  # a broken installation has many ways to fail
        return Finding("problem", name, f"{version} cannot be imported ({_first_line(error)})")
    return Finding("ok", name, version)


def torchvision() -> Finding:
    """A torchvision made for another torch breaks diffusers, transformers and torchmetrics when they are imported."""
    version, torch = _version("torchvision"), _version("torch") or "none"
    if version is None:
        return Finding("ok", "torchvision", "not installed, and not needed")
    needs = [need for need in metadata.requires("torchvision") or [] if re.match(r"torch\s*[=(]", need)]
    asked = re.search(r"==\s*([\w.]+)", needs[0]) if needs else None
    remedy = "pip uninstall torchvision, or install the one that fits"
    if asked and asked.group(1).split("+")[0] != torch.split("+")[0]:
        return Finding("problem", "torchvision", f"{version} is for torch {asked.group(1)}, not {torch}; {remedy}")
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        return Finding("problem", "torchvision", f"{version} cannot be imported ({_first_line(error)}); {remedy}")
    return Finding("ok", "torchvision", f"{version} fits torch {torch}")


def cuda() -> Finding:
    """The GPUs that torch sees, and what they can compute in."""
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        if built is None:
            return Finding("ok", "cuda", "torch is a CPU build: everything runs on the CPU")
        return Finding(
            "warning", "cuda", f"torch is built for CUDA {built}, but sees no GPU; everything runs on the CPU"
        )
    names = []
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        names.append(f"{torch.cuda.get_device_name(i)}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free")
    bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
    return Finding("ok", "cuda", f"{torch.version.cuda}, {len(names)} GPU(s), {bf16}", tuple(names))


def wanted(recipe: Recipe) -> Iterator[Finding]:
    """What the recipe's settings need beyond the installation's own packages."""
    from deme_diffusion.pipeline import preflight

    if recipe.extractor.kind == "transformers":
        yield _extra("transformers", "features", "extractor.kind=transformers")
    if recipe.model.takes == "text":
        yield _extra("transformers", "text", f"model.family={recipe.model.family}")
    elif recipe.evaluate.clip_score:
        yield _extra("transformers", "text", "evaluate.clip_score")
    if recipe.decouple.lora_rank is not None:
        yield _extra("peft", "text", "decouple.lora_rank")
    sections = ["decouple"] if recipe.model.pretrained is not None else ["pretrain", "decouple"]
    for key, error in preflight.settings_problems(recipe, sections):
        yield Finding("problem", key, str(error).removeprefix(f"{key}: "))


def _extra(package: str, extra: str, setting: str) -> Finding:
    version = _version(package)
    if version is not None and find_spec(package) is not None:
        return Finding("ok", package, version)
    return Finding("problem", package, f"{setting} needs it: pip install 'deme-diffusion[{extra}]'")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
