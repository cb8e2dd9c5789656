"""The store keeps its word: writes are atomic, damage is noticed, work is done once and survives interruptions."""

import errno
import importlib.metadata
import json
import logging
import multiprocessing
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from deme_diffusion import artefacts, clean_up, files, provenance
from deme_diffusion.artefacts import Key, Store
from deme_diffusion.errors import MachineError, UserError

KEY = Key(stage="decouple", version=1, settings={"learning_rate": 1e-5}, inputs={"base": "ab"}, seed=0)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "runs" / "store")


def make(folder: Path) -> dict[str, object]:
    (folder / "unet").mkdir(exist_ok=True)
    (folder / "unet" / "weights.bin").write_bytes(b"0123456789")
    (folder / "log.txt").write_text("hello")
    return {"loss": 0.5}


def never(_: Path) -> None:
    raise AssertionError("made again")


def failing(code: int) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


# the store


def test_key_digest_depends_on_each_field() -> None:
    fields = KEY.as_dict()
    others: dict[str, Any] = {"stage": "merge", "version": 2, "settings": {}, "inputs": {"base": "cd"}, "seed": None}
    assert list(fields) == list(others)
    digests = {Key(**{**fields, name: other}).digest for name, other in others.items()} | {KEY.digest}
    assert len(digests) == len(others) + 1
    assert all(len(digest) == 16 for digest in digests)
    assert Key(**fields).digest == KEY.digest


def test_produce_then_find_without_making_again(store: Store) -> None:
    assert (store.find(KEY), store.status(KEY)) == (None, "missing")
    made = store.produce(KEY, make)
    assert made.folder == store.root / "decouple" / KEY.digest == store.folder(KEY)
    assert set(made.manifest["files"]) == {"unet/weights.bin", "log.txt"}
    assert made.manifest["files"]["log.txt"]["sha256"] == files.file_digest(made.path("log.txt"))
    assert (made.results, made.digest) == ({"loss": 0.5}, KEY.digest)
    assert {name: made.manifest[name] for name in KEY.as_dict()} == KEY.as_dict()
    assert store.produce(KEY, never) == store.find(KEY) == made
    assert store.status(KEY) == "done"


def test_produced_and_found_results_are_equal(store: Store) -> None:
    made = store.produce(KEY, lambda _: {"weights": (0.25, 0.75), "by_range": {0: 1.0}})
    assert made == store.find(KEY)
    assert made.results == {"weights": [0.25, 0.75], "by_range": {"0": 1.0}}


def truncate(folder: Path) -> None:
    (folder / "unet" / "weights.bin").write_bytes(b"0123")


def remove(folder: Path) -> None:
    (folder / "unet" / "weights.bin").unlink()


def change(folder: Path) -> None:
    path = folder / "unet" / "weights.bin"
    path.write_bytes(b"012345678X")
    os.utime(path, ns=(1, 1))  # certainly another mtime


def scribble(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"files"')


def unlist(folder: Path) -> None:
    (folder / "manifest.json").write_text("[]")


def misplace(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "digest": "0" * 16}))


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (truncate, "unet/weights.bin has 4 bytes instead of 10"),
        (remove, "unet/weights.bin is missing"),
        (change, "unet/weights.bin has another checksum"),
        (scribble, "manifest.json is not a manifest"),
        (unlist, "manifest.json is not a manifest"),
        (misplace, "manifest.json belongs to decouple 0000000000000000"),
    ],
)
def test_damage_is_logged_once_and_made_again(
    store: Store, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], why: str
) -> None:
    made = store.produce(KEY, make)
    damage(made.folder)
    with caplog.at_level(logging.WARNING):
        assert store.find(KEY) is None
        assert store.find(KEY) is None
    assert caplog.messages == [f"decouple {KEY.digest}: {why}; it will be made again"]
    assert list(made.folder.iterdir()) == []
    again = store.produce(KEY, make)
    assert again.path("unet/weights.bin").read_bytes() == b"0123456789"
    assert store.status(KEY) == "done"


def test_a_damaged_artefact_that_another_holder_makes_again_is_left_alone(store: Store) -> None:
    made = store.produce(KEY, make)
    truncate(made.folder)
    with FileLock(f"{made.folder}.lock"):
        assert store.find(KEY) is None
    assert made.path("log.txt").exists()


def test_only_touched_files_are_hashed_and_only_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    made = store.produce(KEY, make)
    hashed: list[str] = []
    digest = artefacts.file_digest

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return digest(path)

    monkeypatch.setattr(artefacts, "file_digest", counted)
    assert store.find(KEY) is not None
    assert hashed == []
    os.utime(made.path("log.txt"), ns=(1, 1))
    assert store.status(KEY) == "done"
    assert hashed == []
    assert store.find(KEY) is not None
    assert store.find(KEY) is not None
    assert hashed == ["log.txt"]


def test_status_deletes_nothing(store: Store) -> None:
    made = store.produce(KEY, make)
    truncate(made.folder)
    assert store.status(KEY) == "partial"
    assert made.path("log.txt").exists() and made.path("manifest.json").exists()


def test_failure_leaves_partial_files_to_resume_from_and_no_manifest(store: Store) -> None:
    def interrupted(folder: Path) -> None:
        (folder / "work").mkdir(exist_ok=True)
        (folder / "work" / "step-2").write_text("checkpoint")
        (folder / "part.txt").write_text("part")
        (folder / ".part.txt.12345678.deme-tmp").write_text("of a killed write")
        time.sleep(0.05)
        raise KeyboardInterrupt

    def resumed(folder: Path) -> None:
        assert (folder / "work" / "step-2").read_text() == "checkpoint"
        assert (folder / "part.txt").read_text() == "part"

    with pytest.raises(KeyboardInterrupt):
        store.produce(KEY, interrupted)
    assert not (store.folder(KEY) / "manifest.json").exists()
    assert store.status(KEY) == "partial"
    made = store.produce(KEY, resumed)
    assert sorted(path.name for path in made.folder.iterdir()) == ["manifest.json", "part.txt"]
    assert made.seconds >= 0.05
    assert made.results == {}


def test_results_that_are_not_json_do_not_cost_the_checkpoints(store: Store) -> None:
    def diverged(folder: Path) -> dict[str, object]:
        (folder / "work" / "step-2").write_text("checkpoint")
        return {"fid": float("nan")}

    with pytest.raises(ValueError):
        store.produce(KEY, diverged)
    assert (store.folder(KEY) / "work" / "step-2").exists()
    assert store.status(KEY) == "partial"


def _produce(root: Path, ready: Any) -> None:
    def slow(folder: Path) -> None:
        with (root / "made").open("a") as file:
            file.write("x")
        time.sleep(0.3)
        (folder / "a").write_text("a")

    ready.wait()
    Store(root).produce(KEY, slow)


def test_two_processes_make_it_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(2)
    processes = [context.Process(target=_produce, args=(tmp_path, ready)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert (tmp_path / "made").read_text() == "x"
    assert Store(tmp_path).status(KEY) == "done"


def test_waiting_for_a_lock_is_said_once_and_ends(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    store.folder(KEY).parent.mkdir(parents=True)
    with FileLock(f"{store.folder(KEY)}.lock"), caplog.at_level(logging.INFO, logger=artefacts.__name__):
        with pytest.raises(MachineError, match=r"still locked after 0\.1 s"), store.lock(KEY, timeout=0.1):
            pass
        assert caplog.messages == [f"waiting for another process that makes decouple {KEY.digest}"]
    with store.lock(KEY, timeout=0.1):
        assert len(caplog.messages) == 1


# provenance, clean-up


def test_provenance_is_json_and_knows_what_is_installed() -> None:
    found = provenance.provenance()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    machine = {"platform", "processors", "processor", "memory", "gpus"}
    assert set(found) == {"python", "versions", "git"} | machine
    assert found["versions"]["numpy"] is not None


def test_what_made_a_run_is_told_by_machine_and_nothing_is_taken_from_another() -> None:
    known = provenance.provenance() | {"processor": "A", "memory": "1 GB", "gpus": None}
    old = {"python": "3.11", "versions": known["versions"], "git": None}
    found = provenance.made_by([known, old, old, {**known, "python": "3.12"}, None, {**known, "gpus": ["H100"]}, old])
    assert [(one["stages"], one["processor"], one["gpus"]) for one in found] == [
        (3, "unknown", "unknown"),
        (2, "A", None),
        (1, "unknown", "unknown"),
        (1, "A", ["H100"]),
    ]
    assert found[1]["python"] == [known["python"], "3.12"] and found[2]["versions"] == "unknown"
    assert provenance.made_by([]) == []
    assert provenance.machine_of(old) is None and provenance.machine_of(None) is None
    assert provenance.machine_of({**known, "processors": 2}) == "2 x A, 1 GB, no GPU"


def test_provenance_survives_a_machine_without_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    provenance._git.cache_clear()
    monkeypatch.setattr(importlib.metadata, "version", failing(errno.EIO))
    monkeypatch.setattr(subprocess, "run", failing(errno.ENOENT))
    found = provenance.provenance()
    provenance._git.cache_clear()
    assert set(found["versions"].values()) == {None}
    assert found["git"] is None


def test_the_driver_tells_the_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H100, 81559 MiB'\necho 'NVIDIA H200, 143771 MiB'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for broken, found in ((False, ["NVIDIA H100, 81559 MiB", "NVIDIA H200, 143771 MiB"]), (True, None)):
        if broken:
            program.write_text("#!/bin/sh\nexit 9\n")
        provenance._gpus.cache_clear()
        assert provenance._gpus() == found
    provenance._gpus.cache_clear()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_git_tells_commit_and_dirt_of_a_checkout_only(tmp_path: Path) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "a"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    clean = provenance._git(tmp_path)
    assert clean is not None and len(clean["commit"]) == 40 and clean["dirty"] is False
    (tmp_path / "within").mkdir()
    (tmp_path / "within" / "a").write_text("a")
    assert provenance._git(tmp_path / "within") is None
    provenance._git.cache_clear()
    assert provenance._git(tmp_path) == {**clean, "dirty": True}


def test_clean_keeps_referenced_and_locked(store: Store) -> None:
    keys = [Key("merge", 1, {}, {}, seed) for seed in range(3)]
    kept, held, loose = (store.produce(key, make).folder for key in keys)
    foreign = store.root / "merge" / "notes"
    foreign.mkdir()
    runs = store.root.parent
    files.write_json(runs / "demo" / "run.json", {"stages": [{"stage": "merge", "digest": kept.name, "more": 1}]})
    (runs / "notes.txt").write_text("not a run")
    keep = clean_up.referenced(runs)
    assert keep == {("merge", kept.name)}
    size = sum(path.stat().st_size for path in loose.rglob("*") if path.is_file())
    with FileLock(f"{held}.lock"):
        assert clean_up.clean(store, keep, dry_run=True) == [(loose, size)]
        assert loose.exists()
        assert clean_up.clean(store, keep, dry_run=False) == [(loose, size)]
    assert (kept.exists(), held.exists(), loose.exists(), foreign.exists()) == (True, True, False, True)
    assert store.status(keys[2]) == "missing"


def test_plans_asked_of_a_model_stop_no_clean_up(tmp_path: Path) -> None:
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans" / "digits-model.request.json").write_text("{}")
    assert clean_up.referenced(tmp_path) == set()
    (tmp_path / "plans" / "run.json").write_text("{}")
    with pytest.raises(UserError, match=r"plans/run\.json"):
        clean_up.referenced(tmp_path)


def test_experiments_on_an_arm_that_was_run_are_kept(tmp_path: Path) -> None:
    deep = "demo/ablations/plan/arms/k.two/ablations/k"
    for i, folder in enumerate(("demo", "demo/ablations/plan", str(Path(deep).parents[1]), deep)):
        files.write_json(tmp_path / folder / "run.json", {"stages": [{"stage": "merge", "digest": f"{i}"}]})
    files.write_json(tmp_path / "store" / "merge" / "run.json", {})
    files.link(tmp_path / "store", tmp_path / deep / "arms" / "store")
    assert clean_up.referenced(tmp_path) == {("merge", f"{i}") for i in range(4)}
    (tmp_path / deep / "run.json").unlink()
    with pytest.raises(UserError, match=r"ablations/k/run\.json"):
        clean_up.referenced(tmp_path)


@pytest.mark.parametrize("text", [None, "{", "{}", "[]", '{"stages": [{"stage": "merge"}]}', '{"stages": {"a": 1}}'])
def test_unreadable_run_stops_the_clean_up(tmp_path: Path, text: str | None) -> None:
    (tmp_path / "demo").mkdir()
    if text is not None:
        (tmp_path / "demo" / "run.json").write_text(text)
    with pytest.raises(UserError, match=r"demo/run\.json"):
        clean_up.referenced(tmp_path)


def test_run_on_an_unmounted_disk_stops_the_clean_up(tmp_path: Path) -> None:
    (tmp_path / "demo").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="demo"):
        clean_up.referenced(tmp_path)
    with pytest.raises(UserError, match="gone"):
        clean_up.referenced(tmp_path / "gone")


def test_clean_does_not_follow_links(store: Store, tmp_path: Path) -> None:
    folder = store.produce(KEY, make).folder
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "a").write_text("a")
    (folder / "link").symlink_to(tmp_path / "precious")
    (store.root / "merge").mkdir()
    (store.root / "merge" / ("0" * 16)).symlink_to(tmp_path / "precious")
    assert [path for path, _ in clean_up.clean(store, set(), dry_run=False)] == [folder]
    assert (tmp_path / "precious" / "a").read_text() == "a"
