"""Captions of folders, parquet files, tar shards: found, kept beside the index, missing, broken; and what is told."""

from __future__ import annotations

import io
import json
import logging
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from deme_diffusion.config import DataSettings, Recipe
from deme_diffusion.data.contents import content_digest, listed
from deme_diffusion.data.index import CAPTIONS, SUMMARY, Indexed, make_index
from deme_diffusion.data.sources import WORDINGS, SplitName
from deme_diffusion.data.splits import Split, load_splits
from deme_diffusion.data.table import Table
from deme_diffusion.doctor.data import findings
from deme_diffusion.errors import MachineError, UserError
from deme_diffusion.pipeline import images
from deme_diffusion.pipeline.estimate import described, plan
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.node import Node
from deme_diffusion.pipeline.run import Run, open_run
from deme_diffusion.recipes import load
from pictures import caches_in, encoded, noise, numbered, on, write_folder, write_parquet

COUNT = 12
SPOKEN: dict[str, Any] = {"search_fraction": 0.3, "report_fraction": 0.3, "mode": "RGB"}


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caches_in(tmp_path / "caches", monkeypatch)


def captions_of(settings: DataSettings) -> list[list[str]]:
    return [captions for _, _, captions in Table(settings, captioned=True).captioned()]


def index(settings: DataSettings, folder: Path) -> Indexed:
    folder.mkdir(parents=True)
    make_index(settings, folder, commit=None, limit=1e9, captioned=True)
    return Indexed(settings, folder)


def folder_with(path: Path, lines: Sequence[Mapping[str, Any]], count: int = COUNT) -> Path:
    """Images with a metadata.jsonl."""
    folder = write_folder(path, numbered(noise(0, count)))
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return folder


def lines(texts: Sequence[Any], column: str = "text") -> list[dict[str, Any]]:
    return [{"file_name": f"{i:03}.png", column: text} for i, text in enumerate(texts)]


def write_tar(file: Path, members: Mapping[str, bytes]) -> Path:
    """A shard whose samples are the members that share a name before the first point."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file


def shard(file: Path, texts: Sequence[str | None], *, kind: str = "png", start: int = 0) -> Path:
    members: dict[str, bytes] = {}
    for i, (image, text) in enumerate(zip(noise(start, len(texts)), texts, strict=True)):
        members[f"{start + i:05}.{kind}"] = encoded(image, {"jpg": "JPEG"}.get(kind, kind.upper()))
        if text is not None:
            members[f"{start + i:05}.txt"] = text.encode()
    return write_tar(file, members)


# --- where they are found ------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["text", "caption", "txt"])
def test_a_folders_metadata_brings_captions(tmp_path: Path, column: str) -> None:
    folder = folder_with(tmp_path / "d", lines([f"picture {i}" for i in range(3)], column), 3)
    assert captions_of(on("folder", folder)) == [["picture 0"], ["picture 1"], ["picture 2"]]


def test_a_csv_beside_the_images_does_too(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", numbered(noise(0, 2)))
    (folder / "metadata.csv").write_text(
        'file_name,text\n001.png,"a cat, asleep"\n000.png,ein Käse\n', encoding="utf-8"
    )
    assert captions_of(on("folder", folder)) == [["a cat, asleep"], ["ein Käse"]]


def test_a_list_holds_several_captions_and_blanks_are_none(tmp_path: Path) -> None:
    texts = [["a cat", " the cat\n", "", "  "], ["one"], []]
    file = write_parquet(tmp_path / "a.parquet", noise(0, 3), column="image", sentences=texts)
    assert captions_of(on("parquet", file, caption_column="sentences")) == [["a cat", "the cat"], ["one"], []]


def test_a_name_inside_a_column_reaches_into_structs_and_lists_of_them(tmp_path: Path) -> None:
    told = [{"caption": "a cat", "size": 3}, {"caption": None, "size": 1}]
    said = [[{"raw": "one"}, {"raw": "two"}], []]
    file = write_parquet(tmp_path / "a.parquet", noise(0, 2), column="image", json=told, sentences=said)
    assert captions_of(on("parquet", file, caption_column="json.caption")) == [["a cat"], []]
    assert captions_of(on("parquet", file, caption_column="sentences.raw")) == [["one", "two"], []]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"caption_column": "txet"}, r"no column 'txet'.*did you mean 'text'.*its columns: image, text, kind, json"),
        ({"caption_column": "kind"}, r"number 0: 'kind' holds no text but int \(7\)"),
        (
            {"caption_column": "json"},
            r"'json' holds no text but dict \(caption, size\); name one of these as json.NAME",
        ),
    ],
)
def test_columns_without_text_are_refused(tmp_path: Path, changes: dict[str, str], said: str) -> None:
    columns = {"text": ["a", "b"], "kind": [7, 8], "json": [{"caption": "a", "size": 1}] * 2}
    file = write_parquet(tmp_path / "a.parquet", noise(0, 2), column="image", **columns)
    with pytest.raises(UserError, match=f"data.caption_column: .*{said}"):
        captions_of(on("parquet", file, **changes))


def test_images_with_no_captions_at_all_say_how_to_bring_some(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", numbered(noise(0, 2)))
    with pytest.raises(UserError, match=r"has no captions: put a metadata.jsonl .*or set data.missing_captions=empty"):
        Table(on("folder", folder), captioned=True)
    file = write_parquet(tmp_path / "a.parquet", noise(0, 2), column="image", words=["a", "b"])
    with pytest.raises(UserError, match=r"no column text, caption or txt; its columns: image, words; name one"):
        Table(on("parquet", file), captioned=True)
    assert captions_of(on("parquet", file, missing_captions="empty")) == [[], []]
    assert len(list(Table(on("parquet", file)))) == 2, "a model without text does not ask"


# --- shards --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_shards_of_images_with_text(tmp_path: Path, kind: str) -> None:
    shard(tmp_path / "d" / "00001.tar", ["three"], kind=kind, start=2)
    shard(tmp_path / "d" / "00000.tar", ["one", "two\n"], kind=kind)
    settings = on("webdataset", tmp_path / "d")
    assert captions_of(settings) == [["one"], ["two"], ["three"]]
    indexed = index(settings, tmp_path / "index")
    assert [len(indexed), list(indexed.captions(1))] == [3, ["two"]]
    if kind == "png":  # the others lose pixels
        assert (indexed.pixels(1) == noise(0, 2)[1]).all()


def test_shards_with_json(tmp_path: Path) -> None:
    members = {}
    for i, image in enumerate(noise(0, 3)):
        members |= {f"a/{i}.jpg": encoded(image, "JPEG"), f"a/{i}.json": json.dumps({"caption": f"no {i}"}).encode()}
    file = write_tar(tmp_path / "d.tar", members)
    assert captions_of(on("webdataset", file, caption_column="json.caption")) == [["no 0"], ["no 1"], ["no 2"]]


def test_samples_of_a_shard_may_lack_a_caption_or_be_of_several_kinds(tmp_path: Path) -> None:
    pictures = noise(0, 4)
    members = {"a.png": encoded(pictures[0]), "b.jpg": encoded(pictures[1], "JPEG"), "b.txt": b"second"}
    members |= {"c.png": encoded(pictures[2]), "c.txt": b"third", "c.bin": b"left out", "c.json": b'{"unsafe": 1}'}
    members |= {"d.webp": encoded(pictures[3], "WEBP"), "d.json": b'{"unsafe": 0.5, "similarity": "x"}'}
    settings = on("webdataset", write_tar(tmp_path / "a.tar", members), missing_captions="empty")
    assert captions_of(settings) == [[], ["second"], ["third"], []]
    indexed = index(settings, tmp_path / "index")
    assert (indexed.pixels(2) == pictures[2]).all()
    assert (indexed.split >= 0).all()


def test_what_nobody_reads_of_a_shard_may_change_its_kind(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for i, image in enumerate(noise(0, 30)):
        record: dict[str, Any] = {"caption": ["x", "y"] if i % 2 else "x", "nsfw": None if i < 25 else "no", "more": {}}
        told = json.dumps(record).encode()
        members |= {f"{i}.png": encoded(image), f"{i}.json": told, f"{i}.txt": b"hi", f"{i}.cls": b"seven"}
    file = write_tar(tmp_path / "a.tar", members)
    assert captions_of(on("webdataset", file)) == [["hi"]] * 30
    assert captions_of(on("webdataset", file, caption_column="json.caption"))[:2] == [["x"], ["x", "y"]]
    assert {label for _, label in Table(on("webdataset", file, label_column="cls"))} == {"seven"}


def test_shards_may_differ_in_the_kind_of_image_and_in_what_they_hold(tmp_path: Path) -> None:
    shard(tmp_path / "d" / "0.tar", [None] * 3, kind="jpg")
    shard(tmp_path / "d" / "1.tar", ["four", "five"], kind="png", start=3)
    settings = on("webdataset", tmp_path / "d", missing_captions="empty")
    assert captions_of(settings) == [[], [], [], ["four"], ["five"]]
    assert all(image is not None for image, _ in Table(settings))


def test_names_of_members_may_begin_with_a_point(tmp_path: Path) -> None:
    members = {"README.md": b"no sample", "./0.png": encoded(noise(0, 1)[0]), "0.txt": b"one", "./a/README": b"x"}
    members |= {"1.png": encoded(noise(1, 1)[0]), "./1.txt": b"two"}
    assert captions_of(on("webdataset", write_tar(tmp_path / "a.tar", members))) == [["one"], ["two"]]


@pytest.mark.parametrize(
    ("members", "column", "said"),
    [
        ({"7.json": b"{caption"}, "json.caption", r"data.caption_column: a.tar: 7: 'json' is not JSON \("),
        ({"7.json": b'{"caption": 3}'}, "json.caption", r"a.tar: 7: 'json.caption' holds no text but int \(3\)"),
        ({"7.txt": b"x", "7.webp": b"y"}, "txt", r"a.tar: 7 has several images \(png, webp\); name one"),
    ],
)
def test_a_broken_member_is_named(tmp_path: Path, members: dict[str, bytes], column: str, said: str) -> None:
    file = write_tar(tmp_path / "a.tar", {"7.png": encoded(noise(0, 1)[0]), **members})
    with pytest.raises(UserError, match=said):
        captions_of(on("webdataset", file, caption_column=column))


def test_shards_are_copied_once_whoever_asks(tmp_path: Path) -> None:
    import datasets

    settings = on("webdataset", shard(tmp_path / "a.tar", ["one", "two"]))
    for captioned in (True, False, True):
        assert len(Table(settings, captioned=captioned)) == 2
    assert len(list(Path(datasets.config.HF_DATASETS_CACHE).rglob("*.arrow"))) == 1


@pytest.mark.parametrize("source", ["parquet", "webdataset"])
def test_the_copy_that_is_made_of_a_data_set_needs_its_space(
    base: Path, tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / ("a.parquet" if source == "parquet" else "a.tar")
    if source == "parquet":
        write_parquet(file, noise(0, 2), column="image", text=["a", "b"])
    else:
        shard(file, ["a", "b"])
    run = run_of(spoken(base, file, source=source), tmp_path / "run")
    planned = plan(run)
    assert planned["disk"]["data"] >= file.stat().st_size
    assert any(f"of {source} files are copied once" in line for line in described(planned))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 100))
        with pytest.raises(MachineError, match=r"GB, and its disk has 0\.00 GB free"):
            Table(on(source, file))
    Table(on(source, file))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 100))
    assert len(Table(on(source, file))) == 2, "it is there now"


def test_shards_are_known_by_their_content_without_being_opened(tmp_path: Path) -> None:
    settings = on("webdataset", shard(tmp_path / "d" / "a.tar", ["one", "two"]).parent)
    assert [file.name for file in listed(settings)] == ["a.tar"]
    before = content_digest(settings)
    (tmp_path / "d" / "note.txt").write_text("of no interest")
    assert content_digest(settings) == before
    (tmp_path / "d" / "a.tar").write_bytes(b"no tar at all")
    assert content_digest(settings) != before
    with pytest.raises(UserError, match=r"data.path: .* cannot be read as webdataset"):
        Table(settings)


def test_what_is_no_shard_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", {"a.png": noise(0, 1)[0]})
    with pytest.raises(UserError, match=r"has no tar files \(\.tar\); it holds \.png"):
        listed(on("webdataset", folder))
    with pytest.raises(UserError, match=r"is not a \.tar file or a folder of them, which data.source=webdataset takes"):
        listed(on("webdataset", folder / "a.png"))


# --- kept with the index -------------------------------------------------------------------------


def test_the_index_keeps_them_by_image_whatever_the_language(tmp_path: Path) -> None:
    texts = [["a cat", "“Katze”"], ["猫"], ["x" * 3000], ["plain"]]
    file = write_parquet(tmp_path / "a.parquet", noise(0, 4), column="image", text=texts)
    indexed = index(on("parquet", file), tmp_path / "index")
    assert [list(indexed.captions(i)) for i in range(4)] == texts
    assert all(indexed.has_captions(i) for i in range(4))


def test_what_the_index_says_of_them(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "d", lines(["ab", "ab", "abcd", None]), 4)
    settings = on("folder", folder, missing_captions="empty")
    index(settings, tmp_path / "index")
    told = json.loads((tmp_path / "index" / SUMMARY).read_text())["captions"]
    assert told == {
        "images": 4, "captions": 3, "distinct": 2, "missing": 1, "first_missing": [3], "mean_length": 2.7, "longest": 4,
    }  # fmt: skip


def test_an_index_of_a_model_without_text_holds_none(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "d", lines(["a"] * 2), 2)
    make_index(on("folder", folder), tmp_path, commit=None, limit=1e9)
    assert not (tmp_path / CAPTIONS).exists()
    assert list(Indexed(on("folder", folder), tmp_path).captions(0)) == []


def test_captions_enter_the_key_of_the_index_for_models_that_take_text_only(tmp_path: Path) -> None:
    settings = on("folder", tmp_path, missing_captions="empty", resolution=8)
    assert images.indexed(settings, "nothing") == {"resolution": 8}
    assert "captions" not in images.indexed(settings, "class")
    assert images.indexed(settings, "text") == {"resolution": 8, "captions": True}


def test_splits_are_those_of_the_pixels_alone(tmp_path: Path) -> None:
    pictures = noise(0, 60)
    plain = write_parquet(tmp_path / "a.parquet", pictures, column="image")
    spoken = write_parquet(tmp_path / "b.parquet", pictures, column="image", text=[f"no {i}" for i in range(60)])
    (tmp_path / "i").mkdir()
    make_index(on("parquet", plain, **SPOKEN), tmp_path / "i", commit=None, limit=1e9)
    without = load_splits(on("parquet", plain, **SPOKEN), tmp_path / "i")
    index(on("parquet", spoken, **SPOKEN), tmp_path / "j")
    captioned = load_splits(on("parquet", spoken, **SPOKEN), tmp_path / "j")
    for name, split in captioned.items():
        assert split.indices == without[name].indices
        assert [split.caption(p, 0) for p in range(len(split))] == [f"no {i}" for i in split.indices]


# --- missing -------------------------------------------------------------------------------------


def spoken_splits(settings: DataSettings, folder: Path) -> dict[SplitName, Split]:
    index(settings, folder)
    return {name: replace(split, carries="text") for name, split in load_splits(settings, folder).items()}


def test_missing_captions_are_counted_and_the_first_are_named(tmp_path: Path) -> None:
    texts = [None if i % 3 == 0 else " " if i == 1 else f"no {i}" for i in range(30)]
    folder = folder_with(tmp_path / "d", lines(texts), 30)
    refusing = on("folder", folder, **SPOKEN)
    splits = spoken_splits(refusing, tmp_path / "i")
    said = (
        r"11 of 30 images have no caption \(d/000.png, d/001.png, d/003.png, ...\); complete them, .* by "
        r"data.missing_captions=empty"
    )
    with pytest.raises(UserError, match=said):
        images.check_prompts(splits, "text")
    images.check_prompts(splits, "nothing")
    empty = refusing.model_copy(update={"missing_captions": "empty"})
    allowed = {name: replace(split, settings=empty) for name, split in splits.items()}
    images.check_prompts(allowed, "text")
    train = allowed["train"]
    given = [train.caption(p, 0) for p in range(len(train))]
    assert given == [(texts[i] or "").strip() for i in train.indices]
    with pytest.raises(UserError, match="have no captions"):
        [splits["train"].caption(p, 0) for p in range(len(train))]


def test_a_model_of_classes_needs_a_label_for_each_image(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", noise(0, 30), column="image", label=[0, 1, -1] * 10)
    (tmp_path / "i").mkdir()
    make_index(on("parquet", file, **SPOKEN), tmp_path / "i", commit=None, limit=1e9)
    splits = load_splits(on("parquet", file, **SPOKEN), tmp_path / "i")
    said = r"10 of 30 images have no label \(number 2, number 5, number 8\); the model takes classes"
    with pytest.raises(UserError, match=said):
        images.check_prompts(splits, "class")


# --- broken --------------------------------------------------------------------------------------


def indexing(folder: Path, into: Path, **settings: Any) -> None:
    make_index(on("folder", folder, **settings), into, commit=None, limit=1e9, captioned=True)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"file_name": "000.png", "text": "ok"}\n{"file_name": "001.png", "text": "caf\xe9"}'.encode("latin-1"),
         r"metadata.jsonl: line 2 is not UTF-8 \(byte 0xe9 at column 38\); save it as UTF-8"),
        ('{"file_name": "000.png", "text": "ok"}'.encode("utf-16"), r"line 1 is not UTF-8 \(byte 0xff at column 1\)"),
        (b'{"file_name": "000.png", "text": "ok"}\n\n{"file_name": ', r"metadata.jsonl: line 3 is not JSON \("),
        (b'{"file_name": "000.png", "text": "a"}\n{"file_name": "001.png", "text": ["b"]}',
         r"metadata.jsonl: line 2: 'text' is a list, but a string in .*: line 1; write all lines alike"),
        (b"\n", r"metadata.jsonl is empty: it needs a line with file_name and text for each image"),
        (b'["000.png"]\n', r"line 1 is not a JSON object with file_name and text"),
    ],
)  # fmt: skip
def test_broken_metadata_is_told_by_its_line(tmp_path: Path, content: bytes, said: str) -> None:
    folder = write_folder(tmp_path / "d", numbered(noise(0, 2)))
    (folder / "metadata.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=rf"data.path: .*{said}"):
        indexing(folder, tmp_path)


def test_a_csv_in_another_encoding_is_told_by_its_line(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", numbered(noise(0, 2)))
    (folder / "metadata.csv").write_bytes("file_name,text\n000.png,café\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"metadata.csv: line 2 is not UTF-8 \(byte 0xe9 at column 12\)"):
        indexing(folder, tmp_path)


def test_metadata_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", numbered(noise(0, 1)))
    (folder / "metadata.jsonl").write_text('{"file_name": "000.png", "text": "ok"}', encoding="utf-8-sig")
    assert captions_of(on("folder", folder)) == [["ok"]]


def test_lines_that_name_no_image_count_as_unreadable_ones(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "d", [*lines(["a", "b"]), {"file_name": "gone.png", "text": "c"}], 2)
    with pytest.raises(UserError, match=r"1 of 3 images cannot be read.*number 2: d/gone.png: No such file"):
        indexing(folder, tmp_path)
    indexing(folder, tmp_path, max_corrupt=0.5)
    assert json.loads((tmp_path / SUMMARY).read_text())["images"] == 3


def test_images_without_a_line_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = folder_with(tmp_path / "d", lines(["a", "b"]), 7)
    with caplog.at_level(logging.WARNING):
        indexing(folder, tmp_path)
    assert "5 images have no line in metadata.jsonl, and are left out: 002.png, 003.png, 004.png, ..." in caplog.text
    assert json.loads((tmp_path / SUMMARY).read_text())["images"] == 2


def test_bytes_that_are_no_utf8_are_refused(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", noise(0, 2), column="image", text=[b"fine", b"caf\xe9"])
    with pytest.raises(UserError, match=r"data.caption_column: number 1: 'text' holds text that is not UTF-8 \("):
        captions_of(on("parquet", file))


def test_a_shard_with_text_in_another_encoding_is_refused(tmp_path: Path) -> None:
    members = {"0.png": encoded(noise(0, 1)[0]), "0.txt": "café".encode("latin-1")}
    with pytest.raises(UserError, match=r"a.tar: 0.txt is not UTF-8 \(.*0xe9.*\); save it anew"):
        Table(on("webdataset", write_tar(tmp_path / "a.tar", members)), captioned=True)


# --- what the doctor says ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.stable_diffusion(tmp_path_factory.mktemp("spoken") / "sd", channels=3)


def spoken(base: Path, folder: Path, **data: Any) -> dict[str, Any]:
    samplers = [{"num_inference_steps": 2}, {"name": "DDPMScheduler", "num_inference_steps": 3}]
    return {
        "name": "spoken",
        "model": {"family": "stable_diffusion", "pretrained": str(base)},
        "data": {"source": "folder", "path": str(folder), **data},
        "evaluate": {"samplers": samplers, "num_images": 16},
        "merge": {"sampler": samplers[0]},
        "analyze": {"figures": []},
    }


def run_of(values: dict[str, Any], out: Path) -> Run:
    file = out.parent / "spoken.yaml"
    file.write_text(json.dumps(values))
    return open_run(load(str(file)), out=out)


def told(run: Run, topic: str) -> list[tuple[str, str]]:
    return [(finding.status, finding.text) for finding in findings(run) if finding.topic == topic]


def test_the_doctor_tells_of_captions_before_and_after_they_are_indexed(base: Path, tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "d", lines([f"{'long ' * (i % 3)}no {i % 10}" for i in range(40)]), 43)
    run = run_of(spoken(base, folder), tmp_path / "run")
    before, left = told(run, "captions"), told(run, "unlisted")
    assert before == [("ok", "40, of which 30 differ; 8.9 characters on average, 14 at most")]
    assert left == [("warning", "3 images have no line in metadata.jsonl, and would be left out")]
    assert told(run, "model") == [("ok", "takes 8x8 with 3 channels, as the images are")]
    run.execute([run.graph.data])  # type: ignore[list-item]
    assert told(run, "captions") == before


def test_the_doctor_tells_of_missing_captions(base: Path, tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "d", lines(["a" if i % 4 else None for i in range(40)]), 40)
    state, said = told(run_of(spoken(base, folder), tmp_path / "run"), "captions")[0]
    assert state == "problem"
    assert "10 of 40 images have no caption (number 0, number 4, number 8, ...)" in said
    state, said = told(run_of(spoken(base, folder, missing_captions="empty"), tmp_path / "run"), "captions")[0]
    assert (state, said.split("; ")[-1]) == ("warning", "10 images have none, and train without text")


def test_images_without_captions_are_refused_and_allowed_without_indexing_anew(base: Path, tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "d", lines(["a" if i % 4 else None for i in range(60)]), 60)
    run = run_of(spoken(base, folder), tmp_path / "run")
    with pytest.raises(UserError, match=r"15 of 60 images have no caption \(d/000.png, d/004.png, d/008.png, ...\)"):
        run.execute([run.graph.cache])  # type: ignore[list-item]
    allowed = run_of(spoken(base, folder, missing_captions="empty"), tmp_path / "allowed")
    assert allowed.graph.data.digest == run.graph.data.digest
    assert isinstance(allowed.graph.cache, Node)
    allowed.execute([allowed.graph.cache])
    artefact = allowed.store.find(allowed.graph.cache.key)
    assert artefact is not None
    assert {name: artefact.results[name] for name in ("latents", "captions", "cut")} == {
        "latents": 60, "captions": 2, "cut": 0,
    }  # fmt: skip


# --- in a recipe ---------------------------------------------------------------------------------


def test_a_recipe_without_text_keeps_its_stages_beside_captions(tmp_path: Path, pico_values: dict[str, Any]) -> None:
    folder = folder_with(tmp_path / "d", lines(["a"] * 4), 4)
    values = {**pico_values, "extractor": {"pretrained": None}, "data": {"source": "folder", "path": str(folder)}}
    graph = Graph(Recipe.model_validate(values))
    kept = Graph(Recipe.model_validate({**values, "data": {**values["data"], "missing_captions": "empty"}}))
    assert [node.digest for node in graph.nodes] == [node.digest for node in kept.nodes]
    assert not list(graph.of_stage("cache"))
    assert all("cache" not in node.parents for node in graph.nodes)


def test_the_digits_have_captions_in_several_wordings(digits: dict[SplitName, Split]) -> None:
    source = digits["train"].source
    assert len(source.captions(0)) == len(WORDINGS)
    assert source.has_captions(0)
    assert np.unique([source.captions(i)[1] for i in range(200)]).size == 10
