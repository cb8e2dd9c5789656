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
from hypothesis import given
from hypothesis import strategies as st

from deme_diffusion import artefacts
from deme_diffusion.artefacts import Key, Store
from deme_diffusion.errors import MachineError, UserError, nearest

KEY = Key(stage="decouple", version=1, settings={"learning_rate": 1e-5}, inputs={"base": "ab"}, seed=0)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
TEXTS = st.text()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3))


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


def reversed_keys(value: object) -> object:
    if isinstance(value, dict):
        return {key: reversed_keys(inner) for key, inner in reversed(value.items())}
    return [reversed_keys(inner) for inner in value] if isinstance(value, list) else value


# digests


@given(st.dictionaries(st.text(), VALUES, max_size=5))
def test_digest_ignores_key_order_and_survives_json(value: dict[str, object]) -> None:
    digest = artefacts.canonical_digest(value)
    assert digest == artefacts.canonical_digest(reversed_keys(value))
    assert digest == artefacts.canonical_digest(json.loads(json.dumps(value)))


def test_digest_is_sha256_of_canonical_json() -> None:
    # printf '{"a":[1,null],"b":0.5}' | sha256sum
    golden = "e538351ae63f53e363c30268d420c1326bbb521f9654b990125d44fa23340bdc"
    assert artefacts.canonical_digest({"b": 0.5, "a": (1, None)}) == golden


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [float("nan")]}])
def test_digest_refuses_nan(value: object) -> None:
    with pytest.raises(ValueError):
        artefacts.canonical_digest(value)


def test_key_digest_depends_on_each_field() -> None:
    fields = KEY.as_dict()
    others: dict[str, Any] = {"stage": "merge", "version": 2, "settings": {}, "inputs": {"base": "cd"}, "seed": None}
    assert list(fields) == list(others)
    digests = {Key(**{**fields, name: other}).digest for name, other in others.items()} | {KEY.digest}
    assert len(digests) == len(others) + 1
    assert all(len(digest) == 16 for digest in digests)
    assert Key(**fields).digest == KEY.digest


def test_file_digest_streams_past_one_block(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(2**20) + b"x")
    (tmp_path / "b").write_bytes(bytes(2**20) + b"y")
    shell = subprocess.run(["sha256sum", str(tmp_path / "a")], capture_output=True, text=True, check=True).stdout
    assert artefacts.file_digest(tmp_path / "a") == shell.split()[0]
    assert artefacts.file_digest(tmp_path / "a") != artefacts.file_digest(tmp_path / "b")


def test_tree_digest_sees_names_and_contents_but_not_hidden_files_or_links(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    make(one)
    shutil.copytree(one, two)
    before = artefacts.tree_digest(one)
    (two / ".cache").mkdir()
    (two / ".cache" / "junk").write_text("junk")
    shutil.move(two / "unet", tmp_path / "elsewhere")
    (two / "unet").symlink_to(tmp_path / "elsewhere")
    assert artefacts.tree_digest(two) == before
    only_weights = artefacts.tree_digest(two, ["*.bin"])
    (two / "log.txt").write_text("world")
    assert artefacts.tree_digest(two) != before
    assert artefacts.tree_digest(two, ["*.bin"]) == only_weights != before
    (one / "log.txt").rename(one / "log2.txt")
    assert artefacts.tree_digest(one) != before


def test_tree_digest_ends_when_a_link_points_to_its_own_folder(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    before = artefacts.tree_digest(tmp_path)
    (tmp_path / "self").symlink_to(tmp_path)
    assert artefacts.tree_digest(tmp_path) == before


# atomic writes


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_failing_write_keeps_the_old_file_and_says_what_and_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, code: int
) -> None:
    path = tmp_path / "deep" / "a.json"
    artefacts.write_json(path, {"a": 1})
    monkeypatch.setattr(os, function, failing(code))
    with pytest.raises(MachineError) as caught:
        artefacts.write_json(path, {"a": 2})
    assert str(caught.value) == f"cannot write {path}: {os.strerror(code)}"
    assert json.loads(path.read_text()) == {"a": 1}
    assert [found.name for found in path.parent.iterdir()] == ["a.json"]


def test_other_os_errors_pass_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError) as caught:
        artefacts.write_text(tmp_path / "a", "a")
    assert caught.value.errno == errno.EIO
    assert not list(tmp_path.iterdir())


def test_interrupt_in_a_streamed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    artefacts.write_bytes(path, b"old")
    with pytest.raises(KeyboardInterrupt), artefacts.replacing(path) as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_write_json_refuses_nan_before_touching_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        artefacts.write_json(tmp_path / "a.json", {"fid": float("nan")})
    assert not list(tmp_path.iterdir())


# jsonl


def test_jsonl_round_trip_and_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "log.jsonl"
    assert artefacts.read_jsonl(path) == []
    for step in range(3):
        artefacts.append_jsonl(path, {"step": step})
    assert artefacts.read_jsonl(path) == [{"step": 0}, {"step": 1}, {"step": 2}]


def test_jsonl_drops_a_torn_tail_also_when_appending_to_it(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"st')
    assert artefacts.read_jsonl(path) == [{"step": 0}, {"step": 1}]
    artefacts.append_jsonl(path, {"step": 2})
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("broken", ['{"st', "[]", "", "3"])
def test_jsonl_broken_elsewhere_names_the_line(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(f'{{"step": 0}}\n{broken}\n{{"step": 2}}\n')
    with pytest.raises(MachineError, match=r"log\.jsonl: line 2 "):
        artefacts.read_jsonl(path)


def test_jsonl_truncated_at_resume_has_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for step in (1, 2, 3, 4):
        artefacts.append_jsonl(path, {"step": step})
    artefacts.truncate_jsonl(path, lambda record: record["step"] <= 2)
    for step in (3, 4):
        artefacts.append_jsonl(path, {"step": step})
    assert [record["step"] for record in artefacts.read_jsonl(path)] == [1, 2, 3, 4]
    artefacts.truncate_jsonl(tmp_path / "none.jsonl", lambda _: True)
    assert not (tmp_path / "none.jsonl").exists()


# the store


def test_produce_then_find_without_making_again(store: Store) -> None:
    assert (store.find(KEY), store.status(KEY)) == (None, "missing")
    made = store.produce(KEY, make)
    assert made.folder == store.root / "decouple" / KEY.digest == store.folder(KEY)
    assert set(made.manifest["files"]) == {"unet/weights.bin", "log.txt"}
    assert made.manifest["files"]["log.txt"]["sha256"] == artefacts.file_digest(made.path("log.txt"))
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


# provenance, links, clean-up, space


def test_provenance_is_json_and_knows_what_is_installed() -> None:
    found = artefacts.provenance()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert set(found) == {"python", "platform", "processors", "versions", "git"}
    assert found["versions"]["numpy"] is not None


def test_provenance_survives_a_machine_without_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    artefacts._git.cache_clear()
    monkeypatch.setattr(importlib.metadata, "version", failing(errno.EIO))
    monkeypatch.setattr(subprocess, "run", failing(errno.ENOENT))
    found = artefacts.provenance()
    artefacts._git.cache_clear()
    assert set(found["versions"].values()) == {None}
    assert found["git"] is None


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_git_tells_commit_and_dirt_of_a_checkout_only(tmp_path: Path) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "a"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    clean = artefacts._git(tmp_path)
    assert clean is not None and len(clean["commit"]) == 40 and clean["dirty"] is False
    (tmp_path / "within").mkdir()
    (tmp_path / "within" / "a").write_text("a")
    assert artefacts._git(tmp_path / "within") is None
    artefacts._git.cache_clear()
    assert artefacts._git(tmp_path) == {**clean, "dirty": True}


def test_links_are_relative_and_replaced(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / "store" / name).mkdir(parents=True)
        artefacts.link(tmp_path / "store" / name, tmp_path / "run" / "base")
        assert (tmp_path / "run" / "base").readlink() == Path("..") / "store" / name
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["base"]
    tmp_path.joinpath("run").rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "base").resolve() == (tmp_path / "store" / "two").resolve()


def test_without_symlinks_a_text_file_tells_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "symlink", failing(errno.EPERM))
    artefacts.link(tmp_path / "store" / "one", tmp_path / "run" / "base")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["base.path"]
    assert (tmp_path / "run" / "base.path").read_text() == "../store/one\n"


def test_clean_keeps_referenced_and_locked(store: Store) -> None:
    keys = [Key("merge", 1, {}, {}, seed) for seed in range(3)]
    kept, held, loose = (store.produce(key, make).folder for key in keys)
    foreign = store.root / "merge" / "notes"
    foreign.mkdir()
    runs = store.root.parent
    artefacts.write_json(runs / "demo" / "run.json", {"stages": [{"stage": "merge", "digest": kept.name, "more": 1}]})
    (runs / "notes.txt").write_text("not a run")
    keep = artefacts.referenced(runs)
    assert keep == {("merge", kept.name)}
    size = sum(path.stat().st_size for path in loose.rglob("*") if path.is_file())
    with FileLock(f"{held}.lock"):
        assert artefacts.clean(store, keep, dry_run=True) == [(loose, size)]
        assert loose.exists()
        assert artefacts.clean(store, keep, dry_run=False) == [(loose, size)]
    assert (kept.exists(), held.exists(), loose.exists(), foreign.exists()) == (True, True, False, True)
    assert store.status(keys[2]) == "missing"


@pytest.mark.parametrize("text", [None, "{", "{}", "[]", '{"stages": [{"stage": "merge"}]}', '{"stages": {"a": 1}}'])
def test_unreadable_run_stops_the_clean_up(tmp_path: Path, text: str | None) -> None:
    (tmp_path / "demo").mkdir()
    if text is not None:
        (tmp_path / "demo" / "run.json").write_text(text)
    with pytest.raises(UserError, match=r"demo/run\.json"):
        artefacts.referenced(tmp_path)


def test_run_on_an_unmounted_disk_stops_the_clean_up(tmp_path: Path) -> None:
    (tmp_path / "demo").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="demo"):
        artefacts.referenced(tmp_path)
    with pytest.raises(UserError, match="gone"):
        artefacts.referenced(tmp_path / "gone")


def test_clean_does_not_follow_links(store: Store, tmp_path: Path) -> None:
    folder = store.produce(KEY, make).folder
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "a").write_text("a")
    (folder / "link").symlink_to(tmp_path / "precious")
    (store.root / "merge").mkdir()
    (store.root / "merge" / ("0" * 16)).symlink_to(tmp_path / "precious")
    assert [path for path, _ in artefacts.clean(store, set(), dry_run=False)] == [folder]
    assert (tmp_path / "precious" / "a").read_text() == "a"


def test_require_space_says_needed_free_and_where(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "yet"
    artefacts.require_space(folder, 1)
    with pytest.raises(MachineError, match=r"needs 1000000000\.00 GB.* free") as caught:
        artefacts.require_space(folder, 10**18)
    assert str(folder) in str(caught.value)
    assert not folder.parent.exists()


def test_nearest_name() -> None:
    assert nearest("learing_rate", ["learning_rate", "seed"]) == "; did you mean 'learning_rate'?"
    assert nearest("zzz", iter(["learning_rate", "seed"])) == ""
