"""The feature space is the extractor's own and stays put; scores know equal from unequal; costs are counted once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import make_pico_denoiser
from deme_diffusion.config import AugmentSettings, DataSettings, ExtractorSettings, SamplerSettings
from deme_diffusion.data.splits import Split, SplitName, load_splits, to_pixels
from deme_diffusion.division import uniform
from deme_diffusion.errors import UserError
from deme_diffusion.evaluation import cost, scores
from deme_diffusion.evaluation.extractors import load_extractor
from deme_diffusion.evaluation.extractors.classifier import SmallClassifier, accuracy, train_extractor
from deme_diffusion.evaluation.features import features_of, real_pixels
from deme_diffusion.evaluation.scores import score_images
from deme_diffusion.models.ddpm import DDPM
from deme_diffusion.models.ensemble import RoutedEnsemble
from deme_diffusion.weights import save_state, state_digest

FEW = ExtractorSettings(
    pretrained=None, channels=8, features=16, total_steps=80, train_batch_size=64, learning_rate=1e-2
)
SAMPLER = SamplerSettings(num_inference_steps=4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, digits: dict[SplitName, Split]) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("extractor")
    return folder, train_extractor(digits["train"], digits["search"], FEW, seed=0, out=folder)


@pytest.fixture(scope="module")
def untrained() -> SmallClassifier:
    torch.manual_seed(0)
    return SmallClassifier(1, 4, 8, 10).eval()


# the extractor


def test_extractor_learns_and_comes_back_from_its_folder(
    trained: tuple[Path, dict[str, Any]], digits: dict[SplitName, Split]
) -> None:
    folder, results = trained
    assert results["held_out_accuracy"] > 0.6  # 0.1 by chance
    loaded = load_extractor(folder)
    assert accuracy(loaded, digits["search"]) == results["held_out_accuracy"]
    assert accuracy(loaded, digits["train"]) == results["train_accuracy"]
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


def test_extractor_is_a_function_of_its_seed(
    tmp_path: Path, trained: tuple[Path, dict[str, Any]], digits: dict[SplitName, Split]
) -> None:
    torch.manual_seed(123)  # whatever state the process is in
    for seed in (0, 1):
        train_extractor(digits["train"], digits["search"], FEW, seed=seed, out=tmp_path / str(seed))
    digests = [
        state_digest(load_extractor(folder).state_dict()) for folder in (trained[0], tmp_path / "0", tmp_path / "1")
    ]
    assert digests[0] == digests[1] != digests[2]


def test_extractor_trains_on_the_train_split_alone_and_augments_it(
    tmp_path: Path, digits: dict[SplitName, Split], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[AugmentSettings] = []
    train_images = {image.tobytes() for image in to_pixels(digits["train"].images(list(range(len(digits["train"])))))}

    def spy(images: torch.Tensor, settings: AugmentSettings, **_: Any) -> torch.Tensor:
        assert {image.tobytes() for image in to_pixels(images)} <= train_images
        seen.append(settings)
        return images

    monkeypatch.setattr("deme_diffusion.data.splits.augmented", spy)
    splits = load_splits(DataSettings(augment=AugmentSettings(shift=1.0)))
    few = FEW.model_copy(update={"total_steps": 3})
    train_extractor(splits["train"], splits["search"], few, seed=0, out=tmp_path)
    assert seen == [AugmentSettings(shift=1.0)] * 3


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no readable config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "no readable config.json"),
        (lambda folder: (folder / "config.json").write_text("[]"), "not that of a SmallClassifier"),
        (lambda folder: rewrite(folder, {"class": "Inception"}), "not that of a SmallClassifier"),
        (lambda folder: rewrite(folder, {"width": 3}), "config.json is wrong .*'width'"),
        (lambda folder: rewrite(folder, {"features": 9}), "weights do not fit its config"),
        (lambda folder: save_state(folder / "extractor.safetensors", {"x": torch.ones(1)}), "weights do not fit"),
        (lambda folder: (folder / "extractor.safetensors").unlink(), "no such file"),
        (lambda folder: (folder / "extractor.safetensors").write_bytes(b"x" * 50), "not a whole safetensors file"),
    ],
)
def test_wrong_extractor_folder_is_a_user_error(
    tmp_path: Path, untrained: SmallClassifier, spoil: Callable[[Path], None], message: str
) -> None:
    save_state(tmp_path / "extractor.safetensors", untrained.state_dict())
    (tmp_path / "config.json").write_text(json.dumps({"class": "SmallClassifier", **untrained.config}))
    load_extractor(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=message):
        load_extractor(tmp_path)


def rewrite(folder: Path, change: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))


def test_images_without_labels_cannot_train_an_extractor(tmp_path: Path, digits: dict[SplitName, Split]) -> None:
    class Unlabelled:
        def __len__(self) -> int:
            return 4

        def pixels(self, index: int) -> np.ndarray:
            return np.full((8, 8, 1), index, dtype=np.uint8)

        def label(self, index: int) -> None:
            return None

        def caption(self, index: int) -> None:
            return None

    split = Split("train", Unlabelled(), [0, 1, 2, 3], DataSettings())
    with pytest.raises(UserError, match="no labels"):
        train_extractor(split, digits["search"], FEW, seed=0, out=tmp_path)


def test_packaged_extractor_knows_held_out_digits(digits: dict[SplitName, Split]) -> None:
    import deme_diffusion

    folder = Path(deme_diffusion.__file__).parent / "assets" / "digits-cnn"
    assert accuracy(load_extractor(folder), digits["report"]) > 0.95


# features


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_features_do_not_depend_on_the_batch_size(
    untrained: SmallClassifier, digits: dict[SplitName, Split], batch_size: int
) -> None:
    pixels = real_pixels(digits["search"])[:50]
    whole = features_of(pixels, untrained)
    assert (whole.shape, whole.dtype) == ((50, 8), np.float32)
    np.testing.assert_allclose(features_of(pixels, untrained, batch_size), whole, rtol=0, atol=1e-5)
    assert np.abs(whole).max() > 1e-2


def test_real_images_pass_through_quantisation_unchanged(digits: dict[SplitName, Split]) -> None:
    split = digits["search"]
    assert np.array_equal(real_pixels(split), np.stack([split.source.pixels(i) for i in split.indices]))


def test_every_view_of_a_real_image_counts() -> None:
    splits = load_splits(DataSettings(augment=AugmentSettings(shift=1.0), views=3))
    assert len(real_pixels(splits["search"])) == 3 * len(splits["search"])


# scores


def test_identical_sets_score_perfectly() -> None:
    features = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    found = score_images(features, features.copy(), neighbours=3)
    assert found["FD"] == pytest.approx(0.0, abs=1e-9)
    assert (found["precision"], found["recall"], found["n"]) == (1.0, 1.0, 60)
    assert found["KID"] <= 0  # the unbiased estimate of a distance that is 0


def test_precision_and_recall_are_not_mixed_up() -> None:
    random = np.random.default_rng(0)
    reference = random.normal(size=(200, 2)).astype(np.float32)
    narrow = (random.normal(size=(100, 2)) * 0.05).astype(np.float32)  # all of it real, little of what is real
    found = score_images(reference, narrow, neighbours=3)
    assert found["precision"] == 1.0
    assert found["recall"] < 0.2
    assert found["n"] == 100


def test_shifted_images_have_the_distance_of_their_shift() -> None:
    features = np.random.default_rng(0).normal(size=(500, 3)).astype(np.float32)
    found = score_images(features, features + np.float32(10.0), neighbours=3)
    assert found["FD"] == pytest.approx(300.0, rel=1e-5)
    assert (found["precision"], found["recall"]) == (0.0, 0.0)


def test_neighbours_are_sought_among_the_first_images_only_but_distances_take_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scores, "MOST_NEIGHBOURS_IMAGES", 20)
    random = np.random.default_rng(0)
    reference = random.normal(size=(40, 3)).astype(np.float32)
    generated = np.concatenate([reference[:20], reference[:20] + 50]).astype(np.float32)
    found = score_images(reference, generated, neighbours=3)
    assert (found["precision"], found["recall"]) == (1.0, 1.0)
    assert found["FD"] > 1000


# cost


def ensemble_of_four(resident: int = 8) -> RoutedEnsemble:
    loaders = [lambda seed=seed: make_pico_denoiser(seed=seed).module.eval() for seed in range(4)]
    return RoutedEnsemble(loaders, uniform(4, 20), make_pico_denoiser().index, resident=resident)


def bytes_of(module: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def test_peak_memory_of_one_model_is_its_weights_and_the_activations_of_a_batch(pico_denoiser: DDPM) -> None:
    weights = bytes_of(pico_denoiser.module)
    small, large = (cost.peak_memory(pico_denoiser, pico_denoiser.module, SAMPLER, size) for size in (1, 16))
    widest = 64 * (8 + 8 + 4) * 4  # a skip, an upsampled map and a result of 8x8 pixels, in bytes for one image
    assert weights + 16 * 64 * 4 < small
    assert weights + 1 * widest <= small <= weights + 8 * widest
    assert weights + 16 * widest <= large <= weights + 16 * 8 * widest
    assert 10 * (small - weights) < large - weights < 20 * (small - weights)


def test_weights_are_counted_once_though_operations_take_views_of_them() -> None:
    class Linear(torch.nn.Module):
        """One large matrix, which a linear layer transposes at every call."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(512, 512, bias=False)

        def forward(self, x: torch.Tensor, t: torch.Tensor, **kwargs: Any) -> Any:
            return (x * self.layer(torch.ones(1, 512)).mean(),)

    module, denoiser = Linear(), make_pico_denoiser()
    peak = cost.peak_memory(denoiser, module, SAMPLER, 1)
    assert bytes_of(module) < peak < 1.1 * bytes_of(module)


def test_peak_memory_grows_neither_with_steps_nor_with_repetition(pico_denoiser: DDPM) -> None:
    few, many = (SamplerSettings(num_inference_steps=n) for n in (2, 20))
    first = cost.peak_memory(pico_denoiser, pico_denoiser.module, few, 8)
    assert cost.peak_memory(pico_denoiser, pico_denoiser.module, few, 8) == first
    assert cost.peak_memory(pico_denoiser, pico_denoiser.module, many, 8) == pytest.approx(first, rel=0.01)


def test_ensemble_of_four_needs_the_memory_of_four(pico_denoiser: DDPM) -> None:
    weights = bytes_of(pico_denoiser.module)
    single = cost.peak_memory(pico_denoiser, pico_denoiser.module, SAMPLER, 2)
    ensemble = cost.peak_memory(pico_denoiser, ensemble_of_four(), SAMPLER, 2)
    assert ensemble - single == pytest.approx(3 * weights, rel=0.05)


def test_ensemble_that_keeps_one_expert_needs_the_memory_of_one(pico_denoiser: DDPM) -> None:
    weights = bytes_of(pico_denoiser.module)
    single = cost.peak_memory(pico_denoiser, pico_denoiser.module, SAMPLER, 2)
    ensemble = cost.peak_memory(pico_denoiser, ensemble_of_four(resident=1), SAMPLER, 2)
    assert single <= ensemble < single + 1.5 * weights


def test_latency_is_per_step_and_positive(pico_denoiser: DDPM, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))  # a second between any two looks
    monkeypatch.setattr(cost.time, "perf_counter", lambda: float(next(clock)))
    median, spread = cost.latency(pico_denoiser, pico_denoiser.module, SAMPLER, 2)
    assert (median, spread) == (250.0, 0.0)


def test_load_time_is_of_all_that_is_served_after_one_load_that_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now, loaded = [0.0], list[int]()
    monkeypatch.setattr(cost.time, "perf_counter", lambda: now[0])

    def load(expert: int) -> torch.nn.Module:
        rounds = loaded.count(expert)
        loaded.append(expert)
        now[0] += 100.0 if rounds == 0 else 0.1 * rounds  # seconds; the files are read from the disk only once
        return torch.nn.Linear(2, 2)

    median, spread = cost.load_time([lambda: load(0), lambda: load(1)])
    assert loaded == [0, 1] * (1 + cost.LOADS)
    assert (median, spread) == pytest.approx((400.0, 200.0))  # of 200, 400 and 600 ms


def test_disk_counts_the_weight_files_of_all_that_is_served(tmp_path: Path) -> None:
    folders = [tmp_path / str(i) for i in range(4)]
    for folder in folders:
        save_state(folder / "a.safetensors", {"w": torch.ones(100)})
        (folder / "config.json").write_text("x" * 1000)
    one = (folders[0] / "a.safetensors").stat().st_size
    assert one > 400
    assert (cost.disk(folders[:1]), cost.disk(folders)) == (one, 4 * one)
