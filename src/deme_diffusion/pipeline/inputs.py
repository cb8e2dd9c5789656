"""Where a run begins: packaged models, folders, and the hub, each entering by a digest. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deme_diffusion.errors import UserError, nearest
from deme_diffusion.files import canonical_digest, tree_digest

ASSETS = Path(__file__).parent.parent / "assets"
PREFIX = "packaged:"
PATTERNS = ("*.json", "*.safetensors")


@dataclass(frozen=True)
class Input:
    """Something that no stage of ours makes; `path` is None when a dry run would have to download it first."""

    label: str
    digest: str
    path: Path | None

    @property
    def folder(self) -> Path:
        """Where it lies."""
        assert self.path is not None, f"{self.label} was never downloaded"
        return self.path


def resolve(name: str, revision: str | None, *, key: str, download: bool) -> Input:
    """What `key` names: `packaged:NAME`, a folder, or a hub name. Raises UserError where it is none of them."""
    if name.startswith(PREFIX):
        return _packaged(name, key)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return Input(name, tree_digest(folder, PATTERNS)[:16], folder.resolve())
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        packaged = [f"{PREFIX}{p.name}" for p in ASSETS.iterdir() if p.is_dir()]
        raise UserError(f"{key}: {name!r} is no folder, no hub name (owner/name){nearest(name, packaged)}")
    return _from_hub(name, revision or "main", key, download)


def _packaged(name: str, key: str) -> Input:
    folder = ASSETS / name.removeprefix(PREFIX)
    if not folder.is_dir():
        packaged = [f"{PREFIX}{p.name}" for p in ASSETS.iterdir() if p.is_dir()]
        raise UserError(f"{key}: nothing is packaged as {name!r}{nearest(name, packaged)}")
    return Input(name, tree_digest(folder, PATTERNS)[:16], folder)


def _from_hub(name: str, revision: str, key: str, download: bool) -> Input:
    """A snapshot enters by its commit; without `download` only what the local cache knows is used."""
    if not download:
        commit = _cached_commit(name, revision)
        digest = canonical_digest({"hub": name, "commit": commit or revision})[:16]
        return Input(f"{name}@{(commit or revision)[:8]} (from the hub)", digest, None)
    from huggingface_hub import snapshot_download

    try:
        path = Path(snapshot_download(name, revision=revision, allow_patterns=list(PATTERNS)))
    except Exception as error:  # the hub's client raises a dozen kinds, of which none is ours to mend
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{key}: {name} could not be fetched from the hub ({reason}); give a local folder") from None
    return Input(f"{name}@{path.name[:8]}", canonical_digest({"hub": name, "commit": path.name})[:16], path)


def _cached_commit(name: str, revision: str) -> str | None:
    from huggingface_hub.constants import HF_HUB_CACHE

    if len(revision) == 40:
        return revision
    reference = Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "refs" / revision
    return reference.read_text().strip() if reference.is_file() else None
