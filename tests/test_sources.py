"""Folders, parquet files and hub data sets: which rows they have, and what is refused in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deme_diffusion.config import DataSettings
from deme_diffusion.data import contents
from deme_diffusion.data.contents import content_digest, listed
from deme_diffusion.data.index import scan
from deme_diffusion.data.table import Row, Table
from deme_diffusion.errors import MachineError, UserError
from pictures import caches_in, encoded, noise, numbered, on, write_folder, write_parquet


@pytest.fixture(autouse=True)
def _caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caches_in(tmp_path / "caches", monkeypatch)


def rows(settings: DataSettings, commit: str | None = None) -> list[Row]:
    return list(Table(settings, commit))


def names(settings: DataSettings) -> list[tuple[str, Any]]:
    """(file name, label) of a folder's rows."""
    return [(image.name if isinstance(image, Path) else "", label) for image, label in rows(settings)]


# --- folders ------------------------------------------------------------------------------------------------------


def test_a_flat_folder_has_its_images_in_the_order_of_their_names_and_no_labels(tmp_path: Path) -> None:
    files = {name: noise(0, 1)[0] for name in ("b.png", "a.JPG", "c.webp")}
    write_folder(tmp_path / "d", {**files, ".hidden.png": b"", "notes.txt": b"x"})
    assert names(on("folder", tmp_path / "d")) == [("a.JPG", None), ("b.png", None), ("c.webp", None)]


def test_sub_folders_are_the_labels_in_alphabetical_order(tmp_path: Path) -> None:
    write_folder(tmp_path / "d", {f"{label}/0.png": noise(0, 1)[0] for label in ("dog", "cat", "train")})
    assert [label for _, label in names(on("folder", tmp_path / "d"))] == [0, 1, 2]


@pytest.mark.parametrize("files", [["x/0.png"], ["x/0.png", "1.png"], ["x/0.png", "y/z/1.png"]])
def test_one_sub_folder_or_folders_of_several_depths_are_no_labels(tmp_path: Path, files: list[str]) -> None:
    write_folder(tmp_path / "d", dict.fromkeys(files, noise(0, 1)[0]))
    assert {label for _, label in names(on("folder", tmp_path / "d"))} == {None}


ODD = ["a[1].png", "a*.png", "a?.png", "a1.png", "{b}.png", "c::d.png", "http:.png", "e f.png", "%20#.png", "ü.png"]


@pytest.mark.parametrize("parent", ["plain", "odd [x]*"])
def test_file_names_are_names_and_no_patterns_or_addresses(tmp_path: Path, parent: str) -> None:
    folder = write_folder(tmp_path / parent, dict.fromkeys(ODD, noise(0, 1)[0]))
    assert sorted(name for name, _ in names(on("folder", folder))) == sorted(ODD)


def test_links_count_by_their_own_names_and_folders(tmp_path: Path) -> None:
    stored = write_folder(tmp_path / "blobs", {"abc": noise(0, 1)[0], "def": noise(1, 1)[0]})
    for link, target in (("x/0.png", "abc"), ("y/0.png", "def")):
        (tmp_path / "d" / link).parent.mkdir(parents=True)
        (tmp_path / "d" / link).symlink_to(stored / target)
    settings = on("folder", tmp_path / "d")
    assert names(settings) == [("0.png", 0), ("0.png", 1)]
    before = content_digest(settings)
    write_folder(stored, {"def": noise(2, 1)[0]})
    assert content_digest(settings) != before


def test_a_broken_link_is_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", numbered(noise(0, 2)))
    (folder / "1.png").symlink_to("gone.png")
    settings = on("folder", folder)
    assert len(content_digest(settings)) == 64
    problems = [row.problem for row in scan(Table(settings), settings)]
    assert sorted(problems) == ["", "", "d/1.png: No such file or directory"]


@pytest.mark.parametrize("labels", [[3, 1], ["dog", "cat"]])
def test_metadata_beside_the_images_bring_columns(tmp_path: Path, labels: list[Any]) -> None:
    folder = write_folder(tmp_path / "d[1]", {"x/a.png": noise(0, 1)[0], "y/b.png": noise(1, 1)[0]})
    lines = [{"file_name": name, "kind": label} for name, label in zip(("y/b.png", "x/a.png"), labels, strict=True)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert names(on("folder", folder)) == [("b.png", None), ("a.png", None)]
    assert [label for _, label in names(on("folder", folder, label_column="kind"))] == labels


def test_metadata_without_file_names_are_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", numbered(noise(0, 2)))
    (folder / "metadata.csv").write_text("name,label\n000.png,1\n")
    with pytest.raises(UserError, match=r"cannot be read as folder .*file_name"):
        Table(on("folder", folder))


def test_many_files_are_opened_at_once(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", {f"{i}.png": b"" for i in range(3000)})
    assert len(rows(on("folder", folder))) == 3000
    assert not (tmp_path / "caches" / "datasets").exists()  # nothing is copied


# --- what is no folder of images ----------------------------------------------------------------------------------


def test_a_path_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    for source in ("folder", "parquet"):
        with pytest.raises(UserError, match=r"data\.path: no such file or folder: .*nowhere"):
            listed(on(source, tmp_path / "nowhere"))


def test_a_folder_without_images_says_what_it_holds(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", {"a.npy": b"", "b/c.txt": b"", ".d.png": b"", "metadata.jsonl": b""})
    with pytest.raises(UserError, match=r"has no images .*it holds \.jsonl, \.npy, \.txt"):
        listed(on("folder", folder))
    with pytest.raises(UserError, match=r"has no parquet files \(\.parquet\); it holds"):
        listed(on("parquet", folder))


def test_an_empty_folder_has_no_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no images \([^)]*\)$"):
        listed(on("folder", tmp_path))


def test_a_file_where_another_kind_is_needed_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {"a.png": noise(0, 1)[0]})
    with pytest.raises(UserError, match=r"a\.png is not a folder of images, which data\.source=folder takes"):
        listed(on("folder", folder / "a.png"))
    with pytest.raises(UserError, match=r"a\.png is not a \.parquet file or a folder of them"):
        listed(on("parquet", folder / "a.png"))


# --- parquet ------------------------------------------------------------------------------------------------------


def test_parquet_in_the_published_layout_in_several_files_and_row_groups(tmp_path: Path) -> None:
    images, labels = noise(0, 10), list(range(10))
    write_parquet(tmp_path / "d" / "b.parquet", images[6:], rows=2, label=labels[6:])
    write_parquet(tmp_path / "d" / "a.parquet", images[:6], rows=4, label=labels[:6])
    (tmp_path / "d" / "metadata.csv").write_text("of no interest to a table")
    table = Table(on("parquet", tmp_path / "d"))
    assert list(table) == [(encoded(image), label) for image, label in zip(images, labels, strict=True)]
    assert table.encoded(7) == encoded(images[7])
    assert len(table) == 10


def test_one_parquet_file_with_an_odd_name(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a1.parquet", noise(0, 1))
    assert len(rows(on("parquet", write_parquet(tmp_path / "a[1].parquet", noise(0, 2))))) == 2


def test_the_features_that_datasets_writes_into_a_parquet_are_understood(tmp_path: Path) -> None:
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    table = {"img": [{"bytes": encoded(i), "path": None} for i in noise(0, 2)], "label": ["dog", "cat"]}
    datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "a.parquet")
    assert rows(on("parquet", tmp_path)) == [(encoded(noise(0, 2)[0]), 1), (encoded(noise(0, 2)[1]), 0)]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_a_plain_column_of_bytes_is_taken_by_name(tmp_path: Path, kind: pa.DataType) -> None:
    images = noise(0, 2)
    pq.write_table(pa.table({"picture": pa.array([encoded(i) for i in images], kind)}), tmp_path / "a.parquet")
    assert rows(on("parquet", tmp_path, image_column="picture"))[1] == (encoded(images[1]), None)
    with pytest.raises(UserError, match=r"data\.image_column: .* has none with images; its columns: picture"):
        Table(on("parquet", tmp_path))


def test_columns_are_asked_for_by_name_and_the_nearest_is_told(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", noise(0, 2), column="picture", fine_label=["x", "y"], label=[1, 2])
    assert rows(on("parquet", tmp_path, label_column="fine_label"))[1][1] == "y"
    with pytest.raises(
        UserError, match=r"data\.image_column: .* no column 'pictures'.*'?picture'?.*; its columns: pic"
    ):
        Table(on("parquet", tmp_path, image_column="pictures"))
    with pytest.raises(UserError, match=r"data\.label_column: .* no column 'fine_labels'.*fine_label"):
        Table(on("parquet", tmp_path, label_column="fine_labels"))


def test_two_image_columns_are_not_chosen_between(tmp_path: Path) -> None:
    cells = pa.array([{"bytes": encoded(noise(0, 1)[0]), "path": None}])
    pq.write_table(pa.table({"left": cells, "right": cells}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"data\.image_column: name one of left, right"):
        Table(on("parquet", tmp_path))
    assert len(rows(on("parquet", tmp_path, image_column="left"))) == 1


@pytest.mark.parametrize("values", [[1, 2], [0.5, 1.5]])
def test_a_column_of_numbers_holds_no_images(tmp_path: Path, values: list[Any]) -> None:
    write_parquet(tmp_path / "a.parquet", noise(0, 2), number=values)
    with pytest.raises(UserError, match=r"data\.image_column: 'number' of .* holds no encoded images"):
        Table(on("parquet", tmp_path, image_column="number"))


def test_a_broken_parquet_file_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(UserError, match=r"data\.path: .* cannot be read as parquet \(.+\)$") as refused:
        Table(on("parquet", tmp_path))
    assert "\n" not in str(refused.value)


def test_max_images_are_a_fixed_choice_that_does_not_follow_the_order_of_the_files(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", noise(0, 6), rows=2, label=list(range(6)))
    settings = on("parquet", tmp_path, max_images=3)
    chosen = [label for _, label in rows(settings)]
    assert chosen == [label for _, label in rows(settings)] == sorted(set(chosen))
    assert chosen != [0, 1, 2]
    assert len(Table(settings)) == 3
    assert len(Table(on("parquet", tmp_path, max_images=9))) == 6


def test_a_changed_parquet_is_read_anew(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", noise(0, 2))
    before, settings = rows(on("parquet", tmp_path)), on("parquet", tmp_path)
    status = file.stat()
    write_parquet(file, noise(1, 2))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert rows(settings) == [(encoded(image), None) for image in noise(1, 2)] != before


# --- the hub ------------------------------------------------------------------------------------------------------

Loader = Callable[..., Any]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[tuple[Any, ...]]]:
    """hub(data set or exception): what `load_dataset` answers from now on; returns the calls it gets."""

    def serve(answer: Any) -> list[tuple[Any, ...]]:
        calls = []

        def load_dataset(*args: Any, **options: Any) -> Any:
            calls.append((*args, options))
            if isinstance(answer, Exception):
                raise answer
            return answer.to_iterable_dataset() if options["streaming"] else answer

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return serve


@pytest.fixture
def pictures() -> Any:
    """A data set of the hub's kind."""
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    cells = [{"bytes": encoded(image), "path": "x.png"} for image in noise(0, 5)]
    return datasets.Dataset.from_dict({"img": cells, "label": list(range(5))}, features=features)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_data_set_is_read_at_its_commit(hub: Any, pictures: Any, streaming: bool) -> None:
    calls = hub(pictures)
    settings = on("hub", "owner/name", subset="big", split="train+test", streaming=streaming, max_images=5)
    assert rows(settings, "c" * 40) == [(encoded(image), i) for i, image in enumerate(noise(0, 5))]
    options = {"split": "train+test", "revision": "c" * 40, "streaming": streaming}
    assert calls == [("owner/name", "big", options)]


def test_a_stream_that_does_not_say_its_columns_is_asked_for_its_first_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def generate() -> Any:
        yield from ({"picture": {"bytes": encoded(i), "path": None}, "label": 1} for i in noise(0, 3))

    stream = datasets.IterableDataset.from_generator(generate)
    assert stream.features is None
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: stream)
    assert rows(on("hub", "owner/name", streaming=True)) == [(encoded(image), 1) for image in noise(0, 3)]


def test_a_stream_of_files_that_lie_elsewhere_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    with fsspec.open("memory://there/a.png", "wb") as file:
        file.write(encoded(noise(0, 1)[0]))
    stream = datasets.Dataset.from_dict({"image": ["memory://there/a.png", "memory://there/b.png"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: stream.to_iterable_dataset())
    table = iter(Table(on("hub", "owner/name", streaming=True)))
    assert next(table) == (encoded(noise(0, 1)[0]), None)
    with pytest.raises(MachineError, match=r"data\.path: owner/name breaks off \(.*b\.png.*\); try again"):
        next(table)


def test_a_stream_that_breaks_off_is_the_machines_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    def generate() -> Any:
        yield {"image": {"bytes": encoded(noise(0, 1)[0]), "path": None}}
        raise ConnectionError("the line\nis down")

    features = datasets.Features({"image": datasets.Image()})
    stream = datasets.IterableDataset.from_generator(generate, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: stream)
    table = iter(Table(on("hub", "owner/name", streaming=True)))
    next(table)
    with pytest.raises(MachineError, match=r"breaks off \(the line is down\); try again"):
        next(table)


def test_what_the_hub_refuses_is_told_in_one_line(hub: Any) -> None:
    hub(ValueError("Config name is missing.\nPlease pick one among the available configs: ['a', 'b']"))
    with pytest.raises(UserError, match=r"data\.path: owner/name cannot be read as hub \(Config name .*'b'\]\)$"):
        Table(on("hub", "owner/name"), "c" * 40)


def test_a_local_folder_is_not_taken_for_a_hub_data_set(
    hub: Any, pictures: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub(pictures)
    write_folder(tmp_path / "owner" / "name", {"a.png": noise(0, 1)[0]})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"owner/name is also a folder here; set data\.source=folder"):
        Table(on("hub", "owner/name"), "c" * 40)


# --- the digest of the content ------------------------------------------------------------------------------------


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were hashed."""
    seen: list[str] = []
    digest = contents.file_digest

    def counted(path: Path) -> str:
        seen.append(path.name)
        return digest(path)

    monkeypatch.setattr(contents, "file_digest", counted)
    return seen


def test_content_is_hashed_once_and_a_change_is_noticed(tmp_path: Path, hashed: list[str]) -> None:
    folder = write_folder(tmp_path / "d", numbered(noise(0, 2)))
    settings = on("folder", folder)
    first = content_digest(settings)
    assert content_digest(settings) == first
    assert hashed == ["000.png", "001.png"]

    os.utime(folder / "000.png", ns=(1, 1))
    assert content_digest(settings) == first
    assert len(hashed) == 4  # another time of change is looked into, and no more

    write_folder(folder, {"001.png": noise(5, 1)[0]})
    assert content_digest(settings) != first


def test_names_and_files_count_and_their_place_does_not(tmp_path: Path) -> None:
    images = noise(0, 3)
    here, there = (write_folder(tmp_path / name, numbered(images)) for name in ("here", "there"))
    digest = content_digest(on("folder", here))
    assert content_digest(on("folder", there)) == digest
    write_folder(there, {".hidden.png": images[0], "notes.txt": b"x"})
    assert content_digest(on("folder", there)) == digest
    (there / "000.png").rename(there / "abc.png")
    assert content_digest(on("folder", there)) != digest
    one, two = (write_parquet(tmp_path / name, images) for name in ("one.parquet", "two.parquet"))
    assert content_digest(on("parquet", one)) == content_digest(on("parquet", two))


@pytest.mark.parametrize("content", ["", "[]", "{}"])
def test_a_broken_memory_is_made_anew(tmp_path: Path, content: str) -> None:
    settings = on("folder", write_folder(tmp_path / "d", numbered(noise(0, 1))))
    digest = content_digest(settings)
    (file,) = (tmp_path / "caches" / "XDG_CACHE_HOME" / "deme-diffusion" / "digests").iterdir()
    file.write_text(content)
    assert content_digest(settings) == digest
    assert json.loads(file.read_text())["digest"] == digest


def test_a_home_that_cannot_be_written_to_costs_the_memory_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashed: list[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    settings = on("folder", write_folder(tmp_path / "d", numbered(noise(0, 1))))
    assert content_digest(settings) == content_digest(settings)
    assert len(hashed) == 2


# --- the process --------------------------------------------------------------------------------------------------

QUIET = """
import sys, time
from deme_diffusion.pipeline import graph
heavy = {"torch", "datasets", "PIL", "pyarrow"} & set(sys.modules)
assert not heavy, heavy
from deme_diffusion.config import DataSettings
from deme_diffusion.data.table import Table
counts = [len(list(Table(DataSettings(source=s, path=p)))) for s, p in zip(["folder", "parquet"], sys.argv[1:])]
print(*counts)
time.sleep(0.5)  # pyarrow's own threads must not outlive the interpreter (apache/arrow issue 45214)
"""


@pytest.mark.parametrize("early", ["", "import datasets\n"])
def test_the_graph_imports_nothing_heavy_and_reading_shows_no_progress_bars(tmp_path: Path, early: str) -> None:
    write_folder(tmp_path / "d", numbered(noise(0, 3)))
    (tmp_path / "d" / "metadata.jsonl").write_text('{"file_name": "000.png"}\n{"file_name": "001.png"}')
    file = write_parquet(tmp_path / "a.parquet", noise(0, 3))
    script = QUIET if not early else early + QUIET.replace("assert not heavy, heavy\n", "")
    command = [sys.executable, "-c", script, str(tmp_path / "d"), str(file)]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_CACHE": str(tmp_path / "hf" / "d")}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (result.stdout, result.stderr) == ("2 3\n", "")


def test_images_of_a_folder_and_a_parquet_decode_alike(tmp_path: Path) -> None:
    images = noise(0, 4)
    folder = on("folder", write_folder(tmp_path / "d", numbered(images)))
    parquet = on("parquet", write_parquet(tmp_path / "a.parquet", images))
    for settings in (folder, parquet):
        for row, image in zip(scan(Table(settings), settings), images, strict=True):
            np.testing.assert_array_equal(row.pixels, image)
