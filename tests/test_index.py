"""From encoded images to pixels and their index: modes, sizes, what cannot be read, and the splits of any source."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from deme_diffusion.config import DataSettings
from deme_diffusion.data.index import PIXELS, SUMMARY, Indexed, make_index
from deme_diffusion.data.loading import Order, steps
from deme_diffusion.data.prepare import FILTERS, Corrupt, decode, prepared
from deme_diffusion.data.sources import Digits, Pixels
from deme_diffusion.data.splits import Split, SplitName, load_splits, to_pixels
from deme_diffusion.errors import UserError
from pictures import caches_in, encoded, noise, numbered, on, pil, splits_of, write_folder, write_parquet


@pytest.fixture(autouse=True)
def _caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caches_in(tmp_path / "caches", monkeypatch)


def seen(data: bytes, **settings: Any) -> Pixels:
    """What training sees of an image file."""
    return prepared(decode(data), on("folder", "anywhere", **settings))


def contents(splits: dict[SplitName, Split]) -> dict[SplitName, list[bytes]]:
    return {n: sorted(to_pixels(split.images([i])).tobytes() for i in range(len(split))) for n, split in splits.items()}


# --- modes --------------------------------------------------------------------------------------------------------


def test_colour_and_grey_are_told_apart_and_converted() -> None:
    (colour,), (grey,) = noise(0, 1), noise(0, 1, channels=1)
    np.testing.assert_array_equal(seen(encoded(colour)), colour)
    np.testing.assert_array_equal(seen(encoded(grey), mode="L"), grey)
    np.testing.assert_array_equal(seen(encoded(grey)), grey.repeat(3, -1))
    np.testing.assert_array_equal(seen(encoded(colour), mode="L")[..., 0], np.asarray(pil(colour).convert("L")))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_transparency_becomes_white(mode: str) -> None:
    black = np.zeros((1, 3, 4), np.uint8)
    black[0, :, 3] = (0, 128, 255)
    np.testing.assert_array_equal(seen(encoded(black), mode=mode)[0, :, 0], [255, 127, 0])


def test_transparent_colours_of_a_palette_become_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    np.testing.assert_array_equal(seen(encoded(image))[0], [[10, 20, 30], [40, 50, 60]])
    np.testing.assert_array_equal(seen(encoded(image, transparency=0))[0], [[255] * 3, [40, 50, 60]])


def test_bilevel_and_grey_with_alpha_are_read() -> None:
    assert seen(encoded(Image.new("1", (2, 2), 1))).tolist() == [[[255] * 3] * 2] * 2
    assert seen(encoded(Image.new("LA", (1, 1), (9, 255))), mode="L").tolist() == [[[9]]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_and_not_clipped(kind: str) -> None:
    levels = np.array([[0, 257, 32896, 65535]], np.uint16)
    assert seen(encoded(Image.fromarray(levels), kind), mode="L")[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("levels", [np.float32([[0.5]]), np.int32([[70_000]]), np.int32([[-1]])])
def test_pixels_of_no_known_range_are_refused(levels: Any) -> None:
    with pytest.raises(Corrupt, match="its pixels are"):
        seen(encoded(Image.fromarray(levels), "TIFF"))


def test_inks_are_converted() -> None:
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = seen(encoded(image, "TIFF"))[0, 0]
    assert red[0] > 200
    assert red[1:].max() < 60


def test_orientation_that_a_camera_noted_is_applied() -> None:
    (image,) = noise(0, 1, height=4, width=6)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    np.testing.assert_array_equal(seen(encoded(image, exif=exif)), np.rot90(image, -1))


# --- sizes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 13), (13, 8), (4, 7), (3, 3), (100, 9)])
def test_the_shorter_side_is_resized_and_the_centre_kept(height: int, width: int) -> None:
    (image,) = noise(0, 1, height=height, width=width)
    pixels = seen(encoded(image), resolution=8)
    assert pixels.shape == (8, 8, 3)
    scaled = pil(image).resize((max(8, round(8 * width / height)), max(8, round(8 * height / width))), 1)
    top, left = (scaled.height - 8) // 2, (scaled.width - 8) // 2
    np.testing.assert_array_equal(pixels, np.asarray(scaled)[top : top + 8, left : left + 8])


@pytest.mark.parametrize("interpolation", FILTERS)
def test_each_interpolation_is_that_of_pil(interpolation: str) -> None:
    (image,) = noise(0, 1, height=20, width=20)
    kind = getattr(Image.Resampling, interpolation.upper())
    expected = np.asarray(pil(image).resize((8, 8), kind))
    np.testing.assert_array_equal(seen(encoded(image), resolution=8, interpolation=interpolation), expected)


def test_an_image_of_the_right_size_is_not_touched() -> None:
    (image,) = noise(0, 1)
    np.testing.assert_array_equal(seen(encoded(image), resolution=8), image)
    np.testing.assert_array_equal(seen(encoded(image)), image)


def test_a_random_crop_leaves_the_longer_side_to_training() -> None:
    (image,) = noise(0, 1, height=8, width=13)
    np.testing.assert_array_equal(seen(encoded(image), resolution=8, crop="random"), image)


def test_a_strip_that_would_fill_the_memory_is_refused() -> None:
    with pytest.raises(Corrupt, match="1x60000 is too narrow a strip"):
        seen(encoded(np.zeros((60_000, 1, 3), np.uint8)), resolution=256)


def test_images_of_several_sizes_need_a_resolution(tmp_path: Path) -> None:
    images = [*noise(0, 30), *noise(1, 20, width=9)]
    folder = write_folder(tmp_path / "d", numbered(images))
    with pytest.raises(UserError, match=r"images of 2 sizes \(8x8, 9x8, \.\.\.\); set data\.resolution"):
        make_index(on("folder", folder), tmp_path, commit=None, limit=1e9)
    splits = splits_of(on("folder", folder, resolution=6), tmp_path / "index")
    assert splits["train"].shape == (3, 6, 6)
    summary = json.loads((tmp_path / "index" / SUMMARY).read_text())
    assert summary["sizes"] == {"8x8": 30, "9x8": 20}
    assert summary["modes"] == {"RGB": 50}


# --- what cannot be read ------------------------------------------------------------------------------------------

BROKEN = {
    "cut.jpg": encoded(noise(0, 1, height=64, width=64)[0], "JPEG")[:900],
    "cut.png": encoded(noise(0, 1)[0])[:60],
    "empty.png": b"",
    "text.png": b"This is no image.",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_corrupt_and_say_why_without_addresses(name: str) -> None:
    with pytest.raises(Corrupt) as refused:
        decode(BROKEN[name])
    assert str(refused.value)
    assert "0x" not in str(refused.value)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_damaged_bytes_are_read_or_corrupt_and_nothing_else(kind: str) -> None:
    draw, whole = np.random.default_rng(0), encoded(noise(0, 1)[0], kind)
    for _ in range(60):
        damaged = np.frombuffer(whole, np.uint8).copy()
        damaged[draw.integers(0, min(len(whole), 60), 3)] = draw.integers(0, 256, 3)
        try:
            assert seen(damaged.tobytes(), resolution=4).shape == (4, 4, 3)
        except Corrupt as problem:
            assert str(problem)


def test_a_few_unreadable_images_are_skipped_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_folder(tmp_path / "d", {**numbered(noise(0, 36)), **BROKEN})
    with caplog.at_level(logging.WARNING):
        summary = make_index(on("folder", folder, max_corrupt=0.1), tmp_path, commit=None, limit=1e9)
    assert summary["images"] == 40
    assert summary["unreadable"] == 4
    assert sum(summary["splits"].values()) == 36
    assert [item["problem"].split(":")[0] for item in summary["corrupt"]] == [f"d/{name}" for name in BROKEN]
    assert [record.getMessage().split(":")[1] for record in caplog.records] == [
        f" image {i} is skipped" for i in range(36, 40)
    ]
    splits = load_splits(on("folder", folder), tmp_path)
    assert sorted(i for split in splits.values() for i in split.indices) == list(range(36))
    assert contents(splits) == contents(
        splits_of(on("folder", write_folder(tmp_path / "e", numbered(noise(0, 36)))), tmp_path / "x")
    )


def test_more_than_the_share_are_refused_with_their_count_and_names(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", {**numbered(noise(0, 36)), **BROKEN})
    refusal = r"4 of 40 images cannot be read, more than the share data\.max_corrupt=0\.09 .*number 36: d/cut\.jpg: "
    with pytest.raises(UserError, match=refusal) as refused:
        make_index(on("folder", folder, max_corrupt=0.09), tmp_path, commit=None, limit=1e9)
    assert "\n" not in str(refused.value)


def test_an_empty_cell_is_an_unreadable_image(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", [*noise(0, 30), None, b""])
    summary = make_index(on("parquet", file, max_corrupt=0.1), tmp_path, commit=None, limit=1e9)
    assert summary["corrupt"] == [{"index": 30, "problem": "empty"}, {"index": 31, "problem": "not an image"}]


def test_a_table_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.path: .*a\.parquet"):
        make_index(on("parquet", write_parquet(tmp_path / "a.parquet", [])), tmp_path, commit=None, limit=1e9)


@pytest.mark.parametrize(
    ("few", "said"), [(1, "split is empty"), (0.0, "the report split is empty; raise data.report")]
)
def test_an_empty_split_is_refused_by_name(tmp_path: Path, few: float, said: str) -> None:
    images = noise(0, 1 if few else 40)
    settings = on("folder", write_folder(tmp_path / "d", numbered(images)), report_fraction=few and 0.25)
    with pytest.raises(UserError, match=said):
        splits_of(settings, tmp_path / "index")


# --- labels -------------------------------------------------------------------------------------------------------


def test_labels_are_class_numbers_in_the_order_of_values_and_names(tmp_path: Path) -> None:
    images = noise(0, 30)
    for given, expected in (([10**6, 2, -1] * 10, [1, 0, None]), (["b", "a", None] * 10, [1, 0, None])):
        settings = on("parquet", write_parquet(tmp_path / "a.parquet", images, label=given))
        make_index(settings, tmp_path, commit=None, limit=1e9)
        indexed = Indexed(settings, tmp_path)
        assert [indexed.label(i) for i in range(3)] == expected


def test_labels_keep_to_their_images_when_others_cannot_be_read(tmp_path: Path) -> None:
    images = noise(0, 40)
    files: dict[str, Pixels | bytes] = {f"{i % 2}/{i:02}.png": image for i, image in enumerate(images)}
    settings = on("folder", write_folder(tmp_path / "d", {**files, "0/05.png": b"", "1/0.png": b""}), max_corrupt=0.1)
    number = {image.tobytes(): i for i, image in enumerate(images)}
    for split in splits_of(settings, tmp_path).values():
        labels = split.labels(range(len(split))).tolist()
        assert labels == [number[split.source.pixels(i).tobytes()] % 2 for i in split.indices]


def test_images_without_labels_say_so(tmp_path: Path) -> None:
    settings = on("parquet", write_parquet(tmp_path / "a.parquet", noise(0, 40)))
    with pytest.raises(UserError, match=r"data\.source parquet .*no labels \(data\.label_column\)"):
        splits_of(settings, tmp_path)["train"].labels([0])


# --- splits and stored pixels -------------------------------------------------------------------------------------


def test_equal_images_fall_into_equal_splits_whatever_the_source_and_the_names(tmp_path: Path) -> None:
    images = noise(0, 60)
    folder = write_folder(tmp_path / "d", numbered(images))
    other = write_folder(tmp_path / "e", {f"x{i}.bmp": encoded(image, "BMP") for i, image in enumerate(images[::-1])})
    table = write_parquet(tmp_path / "a.parquet", images[::2] + images[1::2])
    sources = [on("folder", folder), on("folder", other), on("parquet", table)]
    one, two, three = (contents(splits_of(s, tmp_path / str(i))) for i, s in enumerate(sources))
    assert one == two == three
    assert sum(map(len, one.values())) == 60
    resized = splits_of(on("folder", folder, resolution=4), tmp_path / "resized")
    assert {n: len(split) for n, split in resized.items()} == {n: len(images) for n, images in one.items()}


def test_digits_as_files_fall_into_the_splits_of_the_embedded_digits(tmp_path: Path) -> None:
    images = [Digits().pixels(i) for i in range(200)]
    splits = splits_of(on("folder", write_folder(tmp_path / "d", numbered(images)), mode="L"), tmp_path / "index")
    embedded = load_splits(DataSettings())
    for name, split in splits.items():
        assert sorted(split.indices) == [i for i in embedded[name].indices if i < 200]
        places = [embedded[name].indices.index(i) for i in split.indices]
        assert torch.equal(split.images(range(len(split))), embedded[name].images(places))


def test_the_first_images_of_a_split_do_not_follow_the_order_of_the_files(tmp_path: Path) -> None:
    settings = on("parquet", write_parquet(tmp_path / "a.parquet", noise(0, 400), label=[i // 200 for i in range(400)]))
    first = splits_of(settings, tmp_path)["train"].labels(range(40))
    assert 10 < int(first.sum()) < 30
    assert torch.equal(first, splits_of(settings, tmp_path / "again")["train"].labels(range(40)))


def test_duplicates_stay_in_one_split(tmp_path: Path) -> None:
    images = noise(0, 40)
    splits = contents(splits_of(on("folder", write_folder(tmp_path / "d", numbered(images * 2))), tmp_path / "index"))
    assert sum(len(set(part)) for part in splits.values()) == 40
    assert sum(map(len, splits.values())) == 80


@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("source", ["folder", "parquet"])
def test_stored_pixels_are_those_decoded_anew(tmp_path: Path, source: str, crop: str) -> None:
    images: list[Any] = [image for i in range(40) for image in noise(i, 1, height=9 + i % 3, width=12 - i % 4)]
    file = write_parquet(tmp_path / "a.parquet", [*images, None])
    path = file if source == "parquet" else write_folder(tmp_path / "d", {**numbered(images), "z.png": b""})
    settings = on(source, path, resolution=8, crop=crop, max_corrupt=0.1)
    stored, anew = (splits_of(settings, tmp_path / name, limit=n) for name, n in (("stored", 1e9), ("anew", 0)))
    assert (tmp_path / "stored" / PIXELS).is_file()
    assert not (tmp_path / "anew" / PIXELS).exists()
    for name, split in stored.items():
        assert list(split.indices) == list(anew[name].indices)
        for index in split.indices:
            np.testing.assert_array_equal(split.source.pixels(index), anew[name].source.pixels(index))


@pytest.mark.parametrize("spare", [0, -1])
def test_pixels_are_stored_up_to_the_limit_and_not_beyond(tmp_path: Path, spare: int) -> None:
    settings = on("folder", write_folder(tmp_path / "d", numbered(noise(0, 40))))
    splits_of(settings, tmp_path, limit=40 * 8 * 8 * 3 + spare)
    assert (tmp_path / PIXELS).exists() == (spare == 0)


def test_making_an_index_again_gives_the_same_bytes(tmp_path: Path) -> None:
    settings = on("folder", write_folder(tmp_path / "d", numbered(noise(0, 40))))
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second, second):  # what an interruption left is replaced
        splits_of(settings, folder)
    assert {f.name: f.read_bytes() for f in first.iterdir()} == {f.name: f.read_bytes() for f in second.iterdir()}


@pytest.mark.parametrize("limit", [1e9, 0])
def test_an_index_travels_to_another_process_without_its_pixels(tmp_path: Path, limit: float) -> None:
    images = noise(0, 40, height=64, width=64)
    splits = splits_of(on("folder", write_folder(tmp_path / "d", numbered(images))), tmp_path / "index", limit=limit)
    pixels = splits["train"].images([0, 1])  # the table, if it is needed, is open by now
    sent = pickle.dumps(splits["train"])
    assert len(sent) < 10_000 < pixels.nbytes
    assert torch.equal(pickle.loads(sent).images([0, 1]), pixels)


@pytest.fixture
def spawning() -> Iterator[None]:
    """New processes start from nothing, as they do on macOS and Windows."""
    before = torch.multiprocessing.get_start_method()
    torch.multiprocessing.set_start_method("spawn", force=True)
    yield
    torch.multiprocessing.set_start_method(before, force=True)


@pytest.mark.usefixtures("spawning")
def test_workers_that_share_no_memory_load_the_same_batches(tmp_path: Path) -> None:
    settings = on("folder", write_folder(tmp_path / "d", numbered(noise(0, 40))))
    split = splits_of(settings, tmp_path / "index", limit=0)["train"]
    alone = [step[0]["image"] for step in steps(split, Order(4), seed=0, start=0, stop=3)]
    spawned = [step[0]["image"] for step in steps(split, Order(4), seed=0, start=0, stop=3, workers=1)]
    assert all(torch.equal(a, b) for a, b in zip(alone, spawned, strict=True))
