"""Digests, atomic writes, JSON lines and links: nothing is half written, and the disk's refusals are one line."""

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deme_diffusion import files
from deme_diffusion.errors import MachineError, UserError

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
TEXTS = st.text()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3))


def make(folder: Path) -> None:
    (folder / "unet").mkdir(exist_ok=True)
    (folder / "unet" / "weights.bin").write_bytes(b"0123456789")
    (folder / "log.txt").write_text("hello")


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
    digest = files.canonical_digest(value)
    assert digest == files.canonical_digest(reversed_keys(value))
    assert digest == files.canonical_digest(json.loads(json.dumps(value)))


def test_digest_is_sha256_of_canonical_json() -> None:
    # printf '{"a":[1,null],"b":0.5}' | sha256sum
    golden = "e538351ae63f53e363c30268d420c1326bbb521f9654b990125d44fa23340bdc"
    assert files.canonical_digest({"b": 0.5, "a": (1, None)}) == golden


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [float("nan")]}])
def test_digest_refuses_nan(value: object) -> None:
    with pytest.raises(ValueError):
        files.canonical_digest(value)


def test_file_digest_streams_past_one_block(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(2**20) + b"x")
    (tmp_path / "b").write_bytes(bytes(2**20) + b"y")
    shell = subprocess.run(["sha256sum", str(tmp_path / "a")], capture_output=True, text=True, check=True).stdout
    assert files.file_digest(tmp_path / "a") == shell.split()[0]
    assert files.file_digest(tmp_path / "a") != files.file_digest(tmp_path / "b")


def test_tree_digest_sees_names_and_contents_but_not_hidden_files_or_links(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    make(one)
    shutil.copytree(one, two)
    before = files.tree_digest(one)
    (two / ".cache").mkdir()
    (two / ".cache" / "junk").write_text("junk")
    shutil.move(two / "unet", tmp_path / "elsewhere")
    (two / "unet").symlink_to(tmp_path / "elsewhere")
    assert files.tree_digest(two) == before
    only_weights = files.tree_digest(two, ["*.bin"])
    (two / "log.txt").write_text("world")
    assert files.tree_digest(two) != before
    assert files.tree_digest(two, ["*.bin"]) == only_weights != before
    (one / "log.txt").rename(one / "log2.txt")
    assert files.tree_digest(one) != before


def test_tree_digest_ends_when_a_link_points_to_its_own_folder(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    before = files.tree_digest(tmp_path)
    (tmp_path / "self").symlink_to(tmp_path)
    assert files.tree_digest(tmp_path) == before


# atomic writes


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_failing_write_keeps_the_old_file_and_says_what_and_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, code: int
) -> None:
    path = tmp_path / "deep" / "a.json"
    files.write_json(path, {"a": 1})
    monkeypatch.setattr(os, function, failing(code))
    with pytest.raises(MachineError) as caught:
        files.write_json(path, {"a": 2})
    assert str(caught.value) == f"cannot write {path}: {os.strerror(code)}"
    assert json.loads(path.read_text()) == {"a": 1}
    assert [found.name for found in path.parent.iterdir()] == ["a.json"]


def test_other_os_errors_pass_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError) as caught:
        files.write_text(tmp_path / "a", "a")
    assert caught.value.errno == errno.EIO
    assert not list(tmp_path.iterdir())


def test_interrupt_in_a_streamed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    files.write_bytes(path, b"old")
    with pytest.raises(KeyboardInterrupt), files.replacing(path) as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_write_json_refuses_nan_before_touching_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "a.json", {"fid": float("nan")})
    assert not list(tmp_path.iterdir())


# folders that become what they were built for


def test_folder_is_built_under_a_hidden_name_and_renamed(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with files.building(out) as hidden:
        assert hidden.parent == out.parent and hidden.name.startswith(".")
        (hidden / "a").write_text("a")
        assert not out.exists()
    assert (out / "a").read_text() == "a"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_failure_leaves_no_folder_and_a_dead_one_s_leftovers_go(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), files.building(out) as hidden:
        (hidden / "a").write_text("a")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    (hidden / "b").mkdir(parents=True)
    (hidden / "c").write_text("c")
    with files.building(out) as again:
        assert again == hidden and not list(again.iterdir())


def test_one_file_may_become_the_name_its_siblings_next_to_it(tmp_path: Path) -> None:
    with files.building(tmp_path / "x.bin", chosen="whole") as hidden:
        (hidden / "whole").write_text("w")
        (hidden / "notes.json").write_text("n")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"x.bin": "w", "x.notes.json": "n"}


@pytest.mark.parametrize("taken", ["x.notes.json", "x.bin"])
def test_siblings_stand_before_the_file_and_write_over_nothing(tmp_path: Path, taken: str) -> None:
    with (
        pytest.raises(UserError, match="somebody else has made it"),
        files.building(tmp_path / "x.bin", chosen="whole") as hidden,
    ):
        for name in ("whole", "notes.json", "a.json"):
            (hidden / name).write_text("new")
        (tmp_path / taken).write_text("mine")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {taken: "mine"}


def test_two_builders_of_one_name_and_a_name_that_is_taken_meanwhile(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with files.building(out):
        with pytest.raises(MachineError, match=f"cannot write {out}: another process"), files.building(out):
            pass
        with files.building(tmp_path / "other"):
            pass
    with pytest.raises(UserError, match="somebody else has made it"), files.building(tmp_path / "third"):
        (tmp_path / "third").mkdir()
        (tmp_path / "third" / "mine").write_text("mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out", "third"]
    assert (tmp_path / "third" / "mine").read_text() == "mine"


@pytest.mark.parametrize("code", [errno.EBUSY, errno.ENOENT])
def test_a_rename_or_a_file_that_fails_names_the_final_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refused(path: Path, target: Path) -> None:
        raise OSError(code, os.strerror(code), str(path), None, str(target))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", refused)
        message = f"^cannot write {tmp_path}/out: {os.strerror(code)}$"
        with pytest.raises(MachineError, match=message), files.building(tmp_path / "out") as hidden:
            (hidden / "a").write_text("a")
    message = f"^cannot write {tmp_path}/out: {os.strerror(errno.ENOENT)}$"
    with pytest.raises(MachineError, match=message), files.building(tmp_path / "out") as hidden:
        (hidden / "gone").read_text()
    with pytest.raises(FileNotFoundError), files.building(tmp_path / "out"):
        (tmp_path / "another").read_text()
    assert not list(tmp_path.iterdir())


def test_trouble_in_a_hidden_folder_is_told_under_the_final_name(tmp_path: Path) -> None:
    message = f"^cannot write {tmp_path}/out/a.bin: No space left on device$"
    with (
        pytest.raises(MachineError, match=message),
        files.building(tmp_path / "out") as hidden,
        files.replacing(hidden / "a.bin"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# jsonl


def test_jsonl_round_trip_and_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "log.jsonl"
    assert files.read_jsonl(path) == []
    for step in range(3):
        files.append_jsonl(path, {"step": step})
    assert files.read_jsonl(path) == [{"step": 0}, {"step": 1}, {"step": 2}]


def test_jsonl_drops_a_torn_tail_also_when_appending_to_it(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"st')
    assert files.read_jsonl(path) == [{"step": 0}, {"step": 1}]
    files.append_jsonl(path, {"step": 2})
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("broken", ['{"st', "[]", "", "3"])
def test_jsonl_broken_elsewhere_names_the_line(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(f'{{"step": 0}}\n{broken}\n{{"step": 2}}\n')
    with pytest.raises(MachineError, match=r"log\.jsonl: line 2 "):
        files.read_jsonl(path)


def test_jsonl_truncated_at_resume_has_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for step in (1, 2, 3, 4):
        files.append_jsonl(path, {"step": step})
    files.truncate_jsonl(path, lambda record: record["step"] <= 2)
    for step in (3, 4):
        files.append_jsonl(path, {"step": step})
    assert [record["step"] for record in files.read_jsonl(path)] == [1, 2, 3, 4]
    files.truncate_jsonl(tmp_path / "none.jsonl", lambda _: True)
    assert not (tmp_path / "none.jsonl").exists()


# links, space


def test_links_are_relative_and_replaced(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / "store" / name).mkdir(parents=True)
        files.link(tmp_path / "store" / name, tmp_path / "run" / "base")
        assert (tmp_path / "run" / "base").readlink() == Path("..") / "store" / name
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["base"]
    tmp_path.joinpath("run").rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "base").resolve() == (tmp_path / "store" / "two").resolve()


def test_without_symlinks_a_text_file_tells_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "symlink", failing(errno.EPERM))
    files.link(tmp_path / "store" / "one", tmp_path / "run" / "base")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["base.path"]
    assert (tmp_path / "run" / "base.path").read_text() == "../store/one\n"


def test_require_space_says_needed_free_and_where(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "yet"
    files.require_space(folder, 1)
    with pytest.raises(MachineError, match=r"needs 1000000000\.00 GB.* free") as caught:
        files.require_space(folder, 10**18)
    assert str(folder) in str(caught.value)
    assert not folder.parent.exists()
