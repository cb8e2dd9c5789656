"""Digests of files: from a manifest, from the memory, by hashing where asked, and never hashed otherwise."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from deme_diffusion import digests
from deme_diffusion.artefacts import Artefact, Key, Store
from deme_diffusion.digests import Known, known, recall, remember
from deme_diffusion.files import canonical_digest


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "deme-diffusion" / "digests"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read to be hashed."""
    seen: list[str] = []
    digest = digests.file_digest

    def counted(path: Path) -> str:
        seen.append(path.name)
        return digest(path)

    monkeypatch.setattr(digests, "file_digest", counted)
    return seen


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def artefact(root: Path, files: dict[str, bytes]) -> Artefact:
    def make(folder: Path) -> None:
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)

    return Store(root).produce(Key("merge", 1, {}, {}, 0), make)


def test_a_file_is_hashed_only_where_asked_and_then_remembered(tmp_path: Path, hashed: list[str]) -> None:
    file = write(tmp_path / "a", b"abc")
    assert known([file]) == Known(None, "none", 3) and not hashed
    assert known([file], full_hash=True) == Known(sha(b"abc"), "hashed", 3)
    assert known([file]) == known([file], full_hash=True) == Known(sha(b"abc"), "cache", 3)
    assert hashed == ["a"]


@pytest.mark.parametrize("change", ["size", "time", "place"])
def test_what_has_changed_is_not_known_any_more(tmp_path: Path, change: str) -> None:
    file = write(tmp_path / "a", b"abc")
    known([file], full_hash=True)
    if change == "size":
        status = file.stat()
        write(file, b"abcd")
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif change == "time":
        os.utime(file, ns=(1, 1))
    else:
        file = file.rename(tmp_path / "b")
    assert known([file]).how == "none"
    assert known([file], full_hash=True) == Known(sha(file.read_bytes()), "hashed", file.stat().st_size)


def test_several_files_have_one_digest_over_names_and_contents(tmp_path: Path, hashed: list[str]) -> None:
    files = [write(tmp_path / name, name.encode()) for name in ("one", "two")]
    known(files[:1], full_hash=True)
    assert known(files) == Known(None, "none", 6), "half of them is not known"
    expected = canonical_digest({"one": sha(b"one"), "two": sha(b"two")})
    assert known(files, full_hash=True) == Known(expected, "hashed", 6)
    assert known(files[::-1]) == Known(expected, "cache", 6)
    assert hashed == ["one", "two"]


def test_an_artefacts_manifest_vouches_for_its_files_also_through_a_link(tmp_path: Path, hashed: list[str]) -> None:
    made = artefact(tmp_path / "store", {"unet/w": b"weights"})
    (tmp_path / "merged").symlink_to(made.folder)
    for folder in (made.folder, tmp_path / "merged"):
        assert known([folder / "unet" / "w"]) == Known(sha(b"weights"), "manifest", 7)
    assert not hashed


def test_a_manifest_does_not_vouch_for_a_file_that_changed_or_that_it_does_not_name(tmp_path: Path) -> None:
    made = artefact(tmp_path / "store", {"unet/w": b"weights"})
    other = write(made.folder / "unet" / "other", b"x")
    os.utime(made.folder / "unet" / "w", ns=(1, 1))
    assert known([made.folder / "unet" / "w"]).how == known([other]).how == "none"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": []}', '{"files": {"w": {}}}'])
def test_a_broken_manifest_vouches_for_nothing(tmp_path: Path, content: str) -> None:
    write(tmp_path / "manifest.json", content.encode())
    file = write(tmp_path / "w", b"abc")
    assert known([file]).how == "none"
    assert known([file], full_hash=True).digest == sha(b"abc")


@pytest.mark.parametrize("content", ["", "[]", "{}"])
def test_a_broken_memory_is_made_anew(tmp_path: Path, cache: Path, content: str) -> None:
    file = write(tmp_path / "a", b"abc")
    known([file], full_hash=True)
    (memory,) = cache.iterdir()
    memory.write_text(content)
    assert known([file]).how == "none"
    known([file], full_hash=True)
    assert json.loads(memory.read_text()) == {"digest": sha(b"abc"), "path": str(file)}


def test_a_cache_that_cannot_be_written_to_costs_the_memory_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashed: list[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(write(tmp_path / "file", b"")))
    file = write(tmp_path / "a", b"abc")
    for _ in range(2):
        assert known([file], full_hash=True) == Known(sha(b"abc"), "hashed", 3)
    assert hashed == ["a", "a"]


def test_keys_of_another_kind_do_not_meet(tmp_path: Path) -> None:
    file = write(tmp_path / "a", b"abc")
    status = file.stat()
    remember([(str(file), status.st_size, status.st_mtime_ns)], "of a data set of one file")
    assert known([file]).how == "none"
    assert recall([(str(file), status.st_size, status.st_mtime_ns)]) == "of a data set of one file"
