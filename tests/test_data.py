"""Splits by pixel hash, quantisation, augmentation, and the order of training as a pure function of (seed, step)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from deme_diffusion.config import AugmentSettings, DataSettings
from deme_diffusion.data.augment import augmented
from deme_diffusion.data.loading import Batch, Order, steps
from deme_diffusion.data.sources import Digits, Pixels
from deme_diffusion.data.splits import Split, SplitName, load_splits, split_of, to_model_range, to_pixels
from deme_diffusion.errors import UserError
from deme_diffusion.rng import image_at

WARP = AugmentSettings(shift=1.0, rotate=20.0, scale=0.2)


@dataclass(frozen=True)
class Listed:
    """A source of the images it is given."""

    images: list[Pixels]

    def __len__(self) -> int:
        return len(self.images)

    def pixels(self, index: int) -> Pixels:
        return self.images[index]

    def label(self, index: int) -> int | None:
        return None


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Splits of given images: listed(images, **settings) -> {split: set of the images' bytes}."""

    def split(images: list[Pixels], **settings: float) -> dict[SplitName, set[bytes]]:
        monkeypatch.setattr("deme_diffusion.data.splits.Digits", lambda: Listed(images))
        splits = load_splits(DataSettings(**settings))
        return {name: {part.source.pixels(i).tobytes() for i in part.indices} for name, part in splits.items()}

    return split


def random_images(seed: int, count: int, size: int = 4) -> list[Pixels]:
    """Different images of noise."""
    return list(np.random.default_rng(seed).integers(0, 256, (count, size, size, 1), dtype=np.uint8))


def random_tensor(seed: int, count: int) -> torch.Tensor:
    """Images in the model's range."""
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# --- splits -------------------------------------------------------------------------------------------------------


def test_the_split_of_an_image_does_not_depend_on_the_order_of_the_images(listed: Any) -> None:
    images = random_images(0, 200)
    shuffled = [images[i] for i in np.random.default_rng(1).permutation(len(images))]
    assert listed(images) == listed(shuffled)


def test_an_image_keeps_its_split_when_others_come_and_go(listed: Any) -> None:
    images = random_images(0, 200)
    few, many = listed(images[:100]), listed(images)
    assert all(few[name] <= many[name] for name in few)


def test_equal_images_fall_into_one_split_and_splits_do_not_overlap(listed: Any) -> None:
    images = random_images(0, 100)
    splits = listed([*images, *[image.copy() for image in reversed(images)]])
    assert sum(len(part) for part in splits.values()) == len(images)
    assert set().union(*splits.values()) == {image.tobytes() for image in images}


def test_digits_are_partitioned_by_content(digits: dict[SplitName, Split]) -> None:
    everything = sorted(index for split in digits.values() for index in split.indices)
    assert everything == list(range(1797))
    contents = {name: {s.source.pixels(i).tobytes() for i in s.indices} for name, s in digits.items()}
    assert not contents["train"] & contents["search"]
    assert not contents["train"] & contents["report"]
    assert not contents["search"] & contents["report"]


def test_images_of_equal_bytes_and_unlike_shapes_are_hashed_apart() -> None:
    settings = DataSettings(search_fraction=0.3, report_fraction=0.3)
    flat = [np.full((1, 16, 1), level, dtype=np.uint8) for level in range(64)]
    square = [image.reshape(4, 4, 1) for image in flat]
    assert [split_of(i, settings) for i in flat] != [split_of(i, settings) for i in square]


@pytest.mark.parametrize("search, report", [(0.15, 0.25), (0.5, 0.1)])
def test_fractions_hold_within_four_standard_deviations(search: float, report: float) -> None:
    settings = DataSettings(search_fraction=search, report_fraction=report)
    names = [split_of(image, settings) for image in random_images(3, 4000)]
    for name, fraction in (("search", search), ("report", report), ("train", 1 - search - report)):
        assert abs(names.count(name) - 4000 * fraction) < 4 * np.sqrt(4000 * fraction * (1 - fraction))


def test_splits_are_made_before_augmentation() -> None:
    plain = load_splits(DataSettings())
    warped = load_splits(DataSettings(augment=WARP, views=3))
    assert {name: split.indices for name, split in plain.items()} == {n: s.indices for n, s in warped.items()}
    assert torch.equal(plain["train"].images([0, 5]), warped["train"].images([0, 5]))


def test_an_empty_split_is_refused_by_name(listed: Any) -> None:
    with pytest.raises(UserError, match=r"the report split is empty; raise data\.report_fraction"):
        listed(random_images(0, 50), report_fraction=0.0)
    with pytest.raises(UserError, match=r"the train split is empty; lower data\.report_fraction"):
        listed(random_images(0, 8), report_fraction=0.5, search_fraction=0.499)


def test_labels_belong_to_their_images_and_their_absence_is_told(digits: dict[SplitName, Split]) -> None:
    source, search = Digits(), digits["search"]
    assert search.labels([0, 7]).tolist() == [source.label(search.indices[0]), source.label(search.indices[7])]
    unlabelled = Split("train", Listed(random_images(0, 3)), [0, 1, 2], DataSettings())
    with pytest.raises(UserError, match="no labels"):
        unlabelled.labels([0])


# --- pixels -------------------------------------------------------------------------------------------------------


def test_every_level_survives_the_way_to_the_model_and_back() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    there = to_model_range(levels)
    assert there.shape == (1, 1, 16, 16)
    assert there.dtype == torch.float32
    assert there.min() == -1
    assert there.max() == 1
    np.testing.assert_array_equal(to_pixels(there), levels)


def test_channels_are_moved_and_not_mixed() -> None:
    image = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 3), dtype=np.uint8)
    there = to_model_range(image)
    assert there.shape == (2, 3, 3, 5)
    assert float(there[1, 2, 0, 4]) == pytest.approx(image[1, 0, 4, 2] / 127.5 - 1, abs=1e-6)
    np.testing.assert_array_equal(to_pixels(there), image)


def test_quantisation_clips_and_rounds() -> None:
    values = torch.tensor([-7.0, -1.0, 0.9 / 127.5 - 1, 0.4 / 127.5 - 1, 1.0, 3.0]).reshape(1, 1, 1, 6)
    assert to_pixels(values).ravel().tolist() == [0, 0, 1, 0, 255, 255]


# --- augmentation -------------------------------------------------------------------------------------------------


def test_augmentation_off_returns_the_same_tensor() -> None:
    images = random_tensor(0, 3)
    assert augmented(images, AugmentSettings(), seed=0, purpose="x", step=0, first=0) is images


@pytest.mark.parametrize("settings", [WARP, AugmentSettings(flip=0.5), AugmentSettings(shift=2.0)])
def test_augmentation_is_keyed_by_sample_so_that_batch_boundaries_do_not_matter(settings: AugmentSettings) -> None:
    images = random_tensor(1, 6)
    whole = augmented(images, settings, seed=3, purpose="x", step=5, first=0)
    cuts = ((0, 1), (1, 4), (4, 6))
    parts = [augmented(images[a:b], settings, seed=3, purpose="x", step=5, first=a) for a, b in cuts]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, images)


@pytest.mark.parametrize("other", [{"seed": 4}, {"step": 6}, {"purpose": "y"}, {"first": 1}])
def test_each_part_of_the_key_changes_the_augmentation(other: dict[str, Any]) -> None:
    images, key = random_tensor(1, 6), {"seed": 3, "purpose": "x", "step": 5, "first": 0}
    assert not torch.equal(augmented(images, WARP, **key), augmented(images, WARP, **{**key, **other}))


def test_a_flip_alone_is_exact_and_happens_to_its_share() -> None:
    images = random_tensor(2, 400)
    result = augmented(images, AugmentSettings(flip=0.25), seed=0, purpose="x", step=0, first=0)
    flipped = (result == images.flip(-1)).flatten(1).all(1)
    kept = (result == images).flatten(1).all(1)
    assert bool((flipped ^ kept).all())
    assert abs(int(flipped.sum()) - 100) < 4 * np.sqrt(400 * 0.25 * 0.75)


def test_warping_keeps_the_range() -> None:
    images = torch.where(random_tensor(3, 50) > 0, 1.0, -1.0)  # edges at which bicubic interpolation overshoots
    result = augmented(images, WARP, seed=0, purpose="x", step=0, first=0)
    assert result.min() >= -1
    assert result.max() <= 1
    assert result.shape == images.shape


def test_a_shift_moves_by_at_most_its_pixels() -> None:
    images = torch.full((200, 1, 8, 8), -1.0)
    images[:, :, 4, 4] = 1.0
    result = augmented(images, AugmentSettings(shift=1.0), seed=0, purpose="x", step=0, first=0) + 1
    rows = torch.arange(8.0)
    centre = (result.sum((1, 3)) * rows).sum(1) / result.sum((1, 2, 3))
    assert (centre - 4).abs().max() <= 1.1
    assert (centre - 4).abs().max() > 0.8


def test_views_are_augmented_apart_and_one_view_is_the_image_itself(digits: dict[SplitName, Split]) -> None:
    plain = digits["search"]
    assert torch.equal(plain.view(0), plain.images(list(range(len(plain)))))
    many = replace(plain, settings=DataSettings(augment=WARP, views=2))
    assert torch.equal(many.view(1), many.view(1))
    assert not torch.equal(many.view(0), many.view(1))
    both = torch.cat([many.view(0), many.view(1)])
    for batch_size in (1024, 100, 7):
        batches = list(many.views(batch_size))
        assert max(map(len, batches)) <= batch_size
        assert torch.equal(torch.cat(batches), both)


# --- random crops -------------------------------------------------------------------------------------------------


@pytest.fixture
def oblong() -> Split:
    """Images of 4x9 and 9x4 whose levels are their coordinates, to be cropped to 4x4."""
    across = np.arange(36, dtype=np.uint8).reshape(4, 9, 1)
    images = [across, across.transpose(1, 0, 2), across[:, :4]] * 20
    settings = DataSettings(source="folder", path="anywhere", resolution=4, crop="random")
    return Split("train", Listed(images), range(60), settings)


def cropped(split: Split, first: int = 0, stop: int = 60, **key: Any) -> torch.Tensor:
    """Training images of positions [first, stop), each keyed by its position."""
    options = {"seed": 3, "purpose": "augment", "step": 5, **key}
    return split.training_images(range(first, stop), first=first, **options)


def test_random_crops_lie_inside_the_image_and_reach_its_ends(oblong: Split) -> None:
    crops = to_pixels(cropped(oblong))[..., 0].astype(int)
    assert crops.shape == (60, 4, 4)
    starts = crops[:, 0, 0]
    assert set(starts) == set(range(6))
    assert (crops[0::3] - starts[0::3, None, None] == np.add.outer(np.arange(4) * 9, np.arange(4))).all()
    assert (crops[1::3] - starts[1::3, None, None] == np.add.outer(np.arange(4), np.arange(4) * 9)).all()
    assert (starts[2::3] == 0).all()  # a square has nothing to choose


def test_random_crops_are_keyed_by_sample_so_that_batch_boundaries_do_not_matter(oblong: Split) -> None:
    parts = [cropped(oblong, a, b) for a, b in ((0, 1), (1, 40), (40, 60))]
    assert torch.equal(cropped(oblong), torch.cat(parts))
    for other in ({"seed": 4}, {"step": 6}, {"purpose": "y"}):
        assert not torch.equal(cropped(oblong), cropped(oblong, **other))


def test_held_out_images_are_cropped_at_the_centre(oblong: Split) -> None:
    centre = to_pixels(oblong.images([0, 1, 2]))[..., 0]
    assert centre[:, 0, 0].tolist() == [3, 3, 0]
    assert torch.equal(next(oblong.views(3)), oblong.images([0, 1, 2]))
    assert oblong.shape == (1, 4, 4)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_sees_random_crops_whatever_the_workers(oblong: Split, workers: int) -> None:
    loaded = [step[0] for step in steps(oblong, Order(8), seed=3, start=0, stop=3, workers=workers)]
    for step, batch in enumerate(loaded):
        picked = [image_at(3, step * 8 + i, 60) for i in range(8)]
        expected = oblong.training_images(picked, seed=3, purpose="augment", step=step, first=0)
        assert torch.equal(batch["image"], expected)


# --- the order of training ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def train_split() -> Split:
    """Augmented training images, few enough that some steps see two epochs."""
    split = load_splits(DataSettings(augment=WARP))["train"]
    return replace(split, indices=split.indices[:10])


def batches(split: Split, order: Order, **options: Any) -> list[list[Batch]]:
    """All steps of a training."""
    return list(steps(split, order, **{"seed": 7, "start": 0, "stop": 5, **options}))


def assert_equal_steps(one: list[list[Batch]], two: list[list[Batch]]) -> None:
    """Same steps, micro-batches and bits."""
    assert [[(b["step"], b["first"]) for b in step] for step in one] == [
        [(b["step"], b["first"]) for b in step] for step in two
    ]
    for a, b in zip((b for step in one for b in step), (b for step in two for b in step), strict=True):
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["noise"], b["noise"])


def test_two_workers_load_the_same_micro_batches_as_none(train_split: Split) -> None:
    order = Order(batch_size=3, accumulation=2)
    alone = batches(train_split, order)
    assert [len(step) for step in alone] == [2] * 5
    assert_equal_steps(alone, batches(train_split, order, workers=2))


@pytest.mark.parametrize("workers", [0, 2])
def test_starting_at_a_step_gives_the_tail_of_the_whole(train_split: Split, workers: int) -> None:
    order = Order(batch_size=3, accumulation=2)
    assert_equal_steps(batches(train_split, order)[2:], batches(train_split, order, start=2, workers=workers))


def test_another_seed_gives_other_images_and_other_noise(train_split: Split) -> None:
    order = Order(batch_size=8)
    (one,), (two,) = batches(train_split, order, stop=1)[0], batches(train_split, order, stop=1, seed=8)[0]
    assert not torch.equal(one["image"], two["image"])
    assert not torch.equal(one["noise"], two["noise"])


def test_loading_leaves_the_global_generator_alone(train_split: Split) -> None:
    before = torch.get_rng_state()
    batches(train_split, Order(batch_size=3), stop=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_epoch_visits_every_image_once_and_the_next_in_another_order(digits: dict[SplitName, Split]) -> None:
    split = replace(digits["train"], indices=digits["train"].indices[:10])
    assert len(torch.unique(split.images(list(range(10))), dim=0)) == 10
    loaded = batches(split, Order(batch_size=5), stop=4)
    first, second = (torch.cat([step[0]["image"] for step in loaded[a : a + 2]]) for a in (0, 2))
    assert torch.equal(torch.unique(first, dim=0), torch.unique(second, dim=0))
    assert len(torch.unique(first, dim=0)) == 10
    assert not torch.equal(first, second)


def one_step(split: Split, order: Order) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Global sample index -> (image, noise) of the fourth step."""
    samples = {}
    for batch in batches(split, order, start=3, stop=4)[0]:
        for offset, pair in enumerate(zip(batch["image"], batch["noise"], strict=True)):
            assert batch["first"] + offset not in samples
            samples[batch["first"] + offset] = pair
    return samples


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_see_together_what_one_sees_with_twice_the_batch(train_split: Split, accumulation: int) -> None:
    alone = one_step(train_split, Order(4, accumulation))
    halves = [one_step(train_split, Order(2, accumulation, process, 2)) for process in (0, 1)]
    assert not set(halves[0]) & set(halves[1])
    together = halves[0] | halves[1]
    assert sorted(alone) == sorted(together) == list(range(4 * accumulation))
    assert all(torch.equal(a, b) for i in alone for a, b in zip(alone[i], together[i], strict=True))


def test_accumulating_twice_sees_what_one_batch_of_twice_the_size_sees(train_split: Split) -> None:
    once, twice = one_step(train_split, Order(6)), one_step(train_split, Order(3, 2))
    assert sorted(once) == sorted(twice)
    assert all(torch.equal(a, b) for i in once for a, b in zip(once[i], twice[i], strict=True))
