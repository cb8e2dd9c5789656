"""How a recipe's extractor and published statistics enter the graph: found, checked, digested. No torch."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import urllib.request
from http.client import HTTPException
from pathlib import Path

from deme_diffusion.config import ExtractorSettings, Recipe
from deme_diffusion.errors import UserError
from deme_diffusion.evaluation.scores import published_statistics
from deme_diffusion.files import canonical_digest, file_digest, replacing
from deme_diffusion.pipeline.inputs import Input, resolve
from deme_diffusion.weight_files import read_json

log = logging.getLogger(__name__)
KEY, STATISTICS_KEY = "extractor.pretrained", "evaluate.reference_statistics"
INCEPTION = "inception"
FILE = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
SHA256 = "6726825d"
"""First digits of the published file's checksum, which are in its name."""
VISION = ("vision_config", "image_size", "num_channels", "patch_size")
"""Of which the config of a vision model has at least one."""


def given(settings: ExtractorSettings, *, download: bool) -> Input | None:
    """The extractor that a recipe names; None where it is to be trained. Raises UserError for another kind of thing."""
    if settings.kind == "inception":
        return _inception(settings.pretrained, download)
    if settings.kind == "transformers":
        return _vision(settings, download)
    if settings.pretrained is None:
        return None
    needs = ("config.json", "extractor.safetensors")
    return resolve(settings.pretrained, settings.revision, key=KEY, needs=needs, download=download)


def extractor_name(recipe: Recipe) -> str:
    """What a metric is named by: the extractor that is given, or `<source>-cnn` for one trained here."""
    settings = recipe.extractor
    if settings.kind == "inception":
        return INCEPTION
    name = settings.pretrained
    return f"{recipe.data.source}-cnn" if name is None else Path(name.removeprefix("packaged:")).name


def published(recipe: Recipe, extractor: Input | None) -> Input | None:
    """The file of `evaluate.reference_statistics`. Raises UserError unless it fits the extractor's features."""
    name = recipe.evaluate.reference_statistics
    if name is None:
        return None
    if "://" in name:
        raise UserError(f"{STATISTICS_KEY}: {name} is not fetched; download it and give the file")
    file = Path(name).expanduser()
    if not file.is_file():
        raise UserError(f"{STATISTICS_KEY}: {file} is no file; an .npz with mu and sigma is expected")
    published_statistics(file, key=STATISTICS_KEY, dimension=_dimension(recipe.extractor, extractor))
    return Input(file.name, file_digest(file)[:16], file.resolve())


def _dimension(settings: ExtractorSettings, extractor: Input | None) -> int | None:
    """Of the features, where it is known before the extractor is there."""
    if settings.kind == "inception":
        return 2048
    if extractor is None:
        return settings.features
    if extractor.path is None:
        return None
    config = read_json(extractor.path / "config.json")
    pooled = "projection_dim" if "vision_config" in config else "hidden_size"
    found = config.get("features" if settings.kind == "classifier" else pooled)
    return found if isinstance(found, int) else None


def _inception(name: str | None, download: bool) -> Input:
    """A local file, or the published one in torch's cache of downloads, where other FID packages keep it too."""
    file = _cached_weights() if name is None else Path(name).expanduser()
    identity = canonical_digest({INCEPTION: SHA256})[:16]
    if name is not None and not file.is_file():
        raise UserError(f"{KEY}: {file} is no file; kind inception takes {FILE}, or null to download it")
    if name is None and not file.is_file():
        if not download:
            return Input(URL, identity, None)
        _fetch(file)
    found = file_digest(file)
    if name is None and not found.startswith(SHA256):
        raise UserError(f"{KEY}: {file} is not the published file (sha256 {found[:8]}..., not {SHA256}...); remove it")
    if download:  # before anything is trained; a dry run imports no torch
        from deme_diffusion.evaluation.extractors import load_extractor

        load_extractor(file, "inception")
    return Input(str(file), identity if found.startswith(SHA256) else found[:16], file.resolve())


def _cached_weights() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    home = Path(os.environ.get("TORCH_HOME", cache / "torch")).expanduser()
    return home / "hub" / "checkpoints" / FILE


def _fetch(file: Path) -> None:
    """The published weights into a file, whole or not at all."""
    log.info("downloading %s (95 MB)", URL)
    digest = hashlib.sha256()
    advice = f"download it elsewhere and put it at {file}, or name it as {KEY}"
    try:
        with urllib.request.urlopen(URL, timeout=60) as answer, replacing(file) as out:
            while block := answer.read(2**20):
                digest.update(block)
                out.write(block)
            if not digest.hexdigest().startswith(SHA256):
                raise UserError(f"{KEY}: {URL} came with sha256 {digest.hexdigest()[:8]}..., not {SHA256}...; {advice}")
    except (OSError, HTTPException) as error:
        raise UserError(f"{KEY}: {URL} could not be fetched ({error}); {advice}") from None


def _vision(settings: ExtractorSettings, download: bool) -> Input:
    if importlib.util.find_spec("transformers") is None:
        raise UserError("extractor.kind transformers needs the package: pip install 'deme-diffusion[features]'")
    assert settings.pretrained is not None, "checked by the settings"
    needs = ("config.json", "preprocessor_config.json")
    found = resolve(settings.pretrained, settings.revision, key=KEY, needs=needs, download=download)
    if found.path is None:
        return found
    config = read_json(found.path / "config.json")
    if not any(key in config for key in VISION):
        kind = config.get("model_type", "unknown")
        raise UserError(f"{KEY}: {found.path} is no vision model of transformers (model_type {kind})")
    if not any(found.path.glob("*.safetensors")):
        raise UserError(f"{KEY}: {found.path} has no safetensors; pickles are never loaded (try another revision)")
    return found
