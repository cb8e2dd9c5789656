"""Where a run begins: packaged models, folders, and the hub, each entering by a digest. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import yaml
from safetensors import SafetensorError, safe_open

from deme_diffusion.config import DataSettings
from deme_diffusion.digests import recall, remember, size_and_time
from deme_diffusion.errors import NotFetched, UserError, nearest
from deme_diffusion.files import canonical_digest, part_of, tree_digest, visible_files
from deme_diffusion.weight_files import AVERAGED, NO_BASE, PROJECTIONS, read_json

ASSETS = Path(__file__).parent.parent / "assets"
PREFIX = "packaged:"
PATTERNS = ("*.json", "*.safetensors")
TOKENIZERS = ("*.txt", "*.model")
"""What tokenizers need beside: merges of CLIP's, T5's vocabulary."""
CONTENT = (*PATTERNS, "*merges.txt", "*vocab.txt", "*.model")
"""What a local folder is known by: of other texts, as licences, nothing is loaded."""
LARGE = 64_000_000
"""Bytes of a folder from which its digest is remembered."""
VARIANTS, NEVER_RUN = ("fp16", "bf16", "fp8", "non_ema", "ema_only"), ("safety_checker",)
"""Copies of weights in other precisions, and parts of a pipeline that no run loads."""
COMPONENTS = ("unet", "transformer")
SCHEDULER = "scheduler_config.json"
CONVERT = "convert once: deme convert FOLDER --out NEW (of a hub model, first: hf download NAME --local-dir FOLDER)"
NO_SIZE = "config.json has no sample_size; write the size of the images that it was trained on into it"
TRAINED_ON = "trained_on.yaml"
"""Beside a model of ours: which share of which source it never saw; no part of its digest."""


@dataclass(frozen=True)
class Input:
    """Something that no stage of ours makes; `path` is None when a dry run would have to download it first."""

    label: str
    digest: str
    path: Path | None
    commit: str | None = None

    @property
    def folder(self) -> Path:
        """Where it lies."""
        assert self.path is not None, f"{self.label} was never downloaded"
        return self.path


def resolve(name: str, revision: str | None, *, key: str, needs: Sequence[str], download: bool) -> Input:
    """What `key` names: `packaged:NAME`, a folder, or a hub name. Raises UserError where it is none of them.

    It must hold the files that it `needs`, and every safetensors file in it must be whole.
    """
    found = _find(name, revision, key, download)
    if found.path is not None:
        missing = [need for need in needs if not (found.path / need).is_file()]
        if missing:
            raise UserError(f"{key}: {found.path} has no {missing[0]}")
        for file in visible_files(found.path):
            if file.suffix == ".safetensors":
                weight_bytes(file)
    return found


def _find(name: str, revision: str | None, key: str, download: bool) -> Input:
    if name.startswith(PREFIX):
        return _packaged(name, key)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return Input(name, _content(folder), folder.resolve())
    if not looks_like_hub_name(name):
        packaged = [f"{PREFIX}{p.name}" for p in ASSETS.iterdir() if p.is_dir()]
        raise UserError(f"{key}: {name!r} is no folder, no hub name (owner/name){nearest(name, packaged)}")
    return _from_hub(name, revision or "main", key, download)


def _packaged(name: str, key: str) -> Input:
    folder = ASSETS / name.removeprefix(PREFIX)
    if not folder.is_dir():
        packaged = [f"{PREFIX}{p.name}" for p in ASSETS.iterdir() if p.is_dir()]
        raise UserError(f"{key}: nothing is packaged as {name!r}{nearest(name, packaged)}")
    return Input(name, _content(folder), folder)


def _content(folder: Path) -> str:
    """Digest of what is loaded from a folder; of a large one remembered by its files' sizes and times."""
    files = [(file.relative_to(folder).as_posix(), *size_and_time(file)) for file in visible_files(folder)]
    if sum(size for _, size, _ in files) < LARGE:
        return tree_digest(folder, CONTENT)[:16]
    key = ["model", str(folder.absolute()), *files]
    if digest := recall(key):
        return digest
    remember(key, digest := tree_digest(folder, CONTENT)[:16], path=str(folder))
    return digest


def _from_hub(name: str, revision: str, key: str, download: bool) -> Input:
    """A snapshot enters by its commit; without `download` only what the local cache knows is used."""
    if not download:
        commit = cached_commit(name, revision) or revision
        cached = _cache_of(name) / "snapshots" / commit
        digest = canonical_digest({"hub": name, "commit": commit})[:16]
        return Input(f"{name}@{commit[:8]}", digest, cached if cached.is_dir() else None, commit)
    from huggingface_hub import snapshot_download

    try:
        path = Path(snapshot_download(name, revision=revision, allow_patterns=_fetched(name, revision)))
    except Exception as error:  # the hub's client raises a dozen kinds, of which none is ours to mend
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise NotFetched(f"{key}: {name} could not be fetched from the hub ({reason}); give a local folder") from None
    commit = path.name
    return Input(f"{name}@{commit[:8]}", canonical_digest({"hub": name, "commit": commit})[:16], path, commit)


def _fetched(name: str, revision: str) -> list[str]:
    """What of a hub repository is fetched, by name; where its list is not to be had, by pattern."""
    from huggingface_hub import HfApi

    try:
        # Not list_repo_files, which tries again for half a minute, and says so, before it fails.
        listed = HfApi().model_info(name, revision=revision).siblings or []
        return wanted_files([file.rfilename for file in listed])
    except Exception:  # offline, or gone: fetching itself finds out, and tells
        return [*PATTERNS, *TOKENIZERS]


def wanted_files(files: Sequence[str]) -> list[str]:
    """Of a repository's files those that a pipeline or model is loaded from.

    Neither copies in other precisions, nor the single files that other programs load, nor what is never run.
    """
    kinds = tuple(pattern.removeprefix("*") for pattern in (*PATTERNS, *TOKENIZERS))
    parts = {file.rpartition("/")[0] for file in files if file.rpartition("/")[2].endswith("config.json")}
    pipeline = "model_index.json" in files and any(parts & {"unet", "transformer"})
    found = []
    for file in files:
        folder, _, last = file.rpartition("/")
        copied = any(f".{variant}" in last for variant in VARIANTS) or last.startswith("open_clip")
        alone = pipeline and (not folder or folder not in parts) and last.endswith(".safetensors")
        if last.endswith(kinds) and not copied and not alone and folder.partition("/")[0] not in NEVER_RUN:
            found.append(file)
    return found


def cached_commit(name: str, revision: str, kind: str = "models") -> str | None:
    """The commit that a branch of a hub repository stood at when it was last fetched; None where it never was."""
    if len(revision) == 40:
        return revision
    reference = _cache_of(name, kind) / "refs" / revision
    return reference.read_text().strip() if reference.is_file() else None


def looks_like_hub_name(name: str) -> bool:
    """`owner/name`, and no path."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")


def is_cached(name: str, commit: str | None, kind: str = "models") -> bool:
    """Whether some files of a hub repository at a commit are on this machine."""
    return commit is not None and (_cache_of(name, kind) / "snapshots" / commit).is_dir()


def _cache_of(name: str, kind: str = "models") -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE) / f"{kind}--{name.replace('/', '--')}"


def weight_bytes(file: Path) -> int:
    """Bytes of a safetensors file's tensors in float32, by its header. Raises UserError where it is cut short."""
    try:
        with safe_open(file, framework="numpy") as weights:
            return sum(4 * prod(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a whole safetensors file ({error}); fetch or make it again") from None


def check_unseen(model: Input, data: DataSettings, images: str, *, key: str) -> None:
    """Raises UserError when the recipe's search and report splits hold images that the model was trained on."""
    file = model.path / TRAINED_ON if model.path else None
    if file is None or not file.is_file():
        return
    seen = yaml.safe_load(file.read_text())
    held_out = data.report_fraction + data.search_fraction
    if seen["source"] == images and held_out > seen["held_out"] + 1e-9:
        raise UserError(
            f"{key}: {model.label} was trained on all but {seen['held_out']:g} of {data.path or data.source}; the "
            f"report and search splits take {held_out:g}, so they would hold its training images; lower them, or train "
            "it anew with null"
        )


def trained_on(data: DataSettings, images: str) -> str:
    """The content of `TRAINED_ON` for a model trained on the recipe's train split."""
    return yaml.safe_dump({"source": images, "held_out": data.report_fraction + data.search_fraction})


def component_of(base: Path) -> Path:
    """The folder of a pipeline's denoiser. Raises UserError where it has none, a pickle instead, or projections."""
    folders = [part_of(base, name) for name in COMPONENTS if (part_of(base, name) / "config.json").is_file()]
    if not folders:
        raise UserError(f"{base}: no {' or '.join(COMPONENTS)} with a config.json; a diffusers pipeline is expected")
    if not any(folders[0].glob("*.safetensors")):
        others = sorted(f.name for f in folders[0].iterdir() if f.is_file() and f.suffix != ".json")
        instead = f", only {others[0]}, and pickles are never loaded" if others else ""
        raise UserError(f"{folders[0]}: no safetensors{instead}; {CONVERT}")
    if (folders[0] / PROJECTIONS).is_file():  # told again where it is loaded, of bases that a dry run does not see
        raise UserError(f"{folders[0] / PROJECTIONS}: {NO_BASE}")
    return folders[0]


def check_average(base: Path) -> None:
    """Raises UserError where no average of a pipeline's denoiser lies beside it, as diffusers' scripts leave one."""
    component = component_of(base)
    name = component.name if component.name in COMPONENTS else COMPONENTS[0]
    folder = base / f"{name}{AVERAGED}"
    if not any(folder.glob("*.safetensors")):
        what = f"{folder} has no safetensors" if folder.is_dir() else f"there is no {folder}"
        raise UserError(f"decouple.init=ema: {what}; take a base with an average beside it, or init=pretrained")


def timesteps_of(base: Input) -> int:
    """T, from the scheduler config of a base; 1000 for a hub model that a dry run has not downloaded."""
    if base.path is None:
        return 1000
    file = part_of(base.path, "scheduler") / SCHEDULER
    if not file.is_file():
        raise UserError(f"model.pretrained: {base.path} has no scheduler/{SCHEDULER}")
    config = read_json(file)
    timesteps = config.get("num_train_timesteps", 1000 if "_class_name" in config else None)  # diffusers' default
    if not isinstance(timesteps, int) or timesteps < 1:
        raise UserError(f"{file}: num_train_timesteps is {timesteps!r}; a positive number is expected")
    return timesteps
