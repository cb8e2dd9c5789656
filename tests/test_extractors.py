"""Feature spaces come from where they are named, published statistics too, and what is of another kind is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from deme_diffusion.config import DataSettings, ExtractorSettings
from deme_diffusion.data.splits import Split
from deme_diffusion.errors import UserError
from deme_diffusion.evaluation.extractors import Extractor, load_extractor
from deme_diffusion.evaluation.extractors.classifier import SmallClassifier, StagedClassifier, train_extractor
from deme_diffusion.evaluation.features import extract, extract_real, features_of, in_batches, real_pixels
from deme_diffusion.evaluation.metrics import frechet_distance, statistics
from deme_diffusion.evaluation.scores import load_statistics, published_statistics, save_statistics, score_images
from deme_diffusion.pipeline import extractors
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.run import open_run
from deme_diffusion.recipes import Loaded
from deme_diffusion.recipes.checks import parse
from deme_diffusion.report.tables import read_table

Values = dict[str, Any]


def noise(n: int, side: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, channels), dtype=np.uint8)


# vision models of transformers


def save_vision(model: Any, folder: Path, **processor: Any) -> Path:
    from transformers import BitImageProcessor

    model.save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}
    values = {**BitImageProcessor(**sizes).to_dict(), **processor}  # torchvision is not needed to write it
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return folder


TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
SEEN = {"image_size": 28, "patch_size": 14}


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vision") / "dino-tiny"
    return save_vision(Dinov2Model(Dinov2Config(**{**TINY, **SEEN})), folder)


def test_dinov2_gives_its_class_token(dino: Path) -> None:
    from transformers import Dinov2Model

    extractor = load_extractor(dino, "transformers")
    pixels = noise(3, 20)
    features, logits = extractor(pixels)
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(dino).eval()(extractor.inputs(pixels)).last_hidden_state[:, 0]
    torch.testing.assert_close(features, expected)
    assert logits is None
    assert (extractor.dimension, features.std() > 0) == (16, True)
    assert extractor.preprocessing.startswith("8-bit, BitImageProcessor: shortest_edge 32 (resample 3), crop 28x28")


def test_image_processor_works_on_whole_images_and_repeats_grey(dino: Path) -> None:
    extractor = load_extractor(dino, "transformers")
    white = extractor.inputs(np.full((1, 9, 9, 1), 255, dtype=np.uint8))
    mean, deviation = (torch.tensor(extractor.processor.to_dict()[k]) for k in ("image_mean", "image_std"))  # type: ignore[union-attr]
    torch.testing.assert_close(white, ((1 - mean) / deviation)[None, :, None, None].expand(1, 3, 28, 28))
    whole, single = features_of(noise(5, 8, 1), extractor), features_of(noise(5, 8, 1), extractor, 1)
    np.testing.assert_allclose(whole, single, rtol=0, atol=1e-5)


def test_clip_gives_its_image_embedding(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    text = {**TINY, "vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config={**TINY, **SEEN}, projection_dim=12)).eval()
    save_vision(clip, tmp_path / "clip")
    vision = CLIPVisionModelWithProjection(clip.config.vision_config)
    vision.vision_model.load_state_dict(clip.vision_model.state_dict())
    save_vision(vision, tmp_path / "vision")
    both = [load_extractor(tmp_path / name, "transformers") for name in ("clip", "vision")]
    pixels = noise(2, 20)
    with torch.no_grad():
        pooled = clip.vision_model(pixel_values=both[0].inputs(pixels)).pooler_output
        torch.testing.assert_close(both[0](pixels)[0], clip.visual_projection(pooled))
        expected = both[1].model.visual_projection(pooled)  # type: ignore[operator, union-attr]
        torch.testing.assert_close(both[1](pixels)[0], expected)
    assert both[0].dimension == 12
    assert both[1].dimension == vision.config.projection_dim


def test_models_that_see_nothing_are_refused(tmp_path: Path, dino: Path) -> None:
    from transformers import BertConfig, BertModel

    bert = tmp_path / "bert"
    BertModel(BertConfig(**TINY, vocab_size=20)).save_pretrained(bert)
    settings = ExtractorSettings(kind="transformers", pretrained=str(bert))
    with pytest.raises(UserError, match=r"bert has no preprocessor_config\.json"):
        extractors.given(settings, download=True)
    with pytest.raises(UserError, match="no vision model of transformers"):
        load_extractor(bert, "transformers")
    (bert / "preprocessor_config.json").write_bytes((dino / "preprocessor_config.json").read_bytes())
    with pytest.raises(UserError, match=r"no vision model of transformers \(model_type bert\)"):
        extractors.given(settings, download=True)
    with pytest.raises(UserError, match="no vision model of transformers") as told:
        load_extractor(bert, "transformers")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("file", "values", "said"),
    [
        ("config.json", {"patch_size": 0}, r"weights cannot be loaded \(a size or a count in it is 0\)"),
        ("config.json", {"hidden_size": 24}, r"\d+ weights of its model are missing, or of another shape, as "),
        ("config.json", {"num_hidden_layers": 9}, r"\d+ weights of its model are missing, or of another shape, as "),
        ("preprocessor_config.json", {"image_processor_type": "None"}, "its preprocessor_config.json cannot be used"),
        ("preprocessor_config.json", {"image_mean": [0.5]}, "as its preprocessor_config.json makes it .*3 elements"),
    ],
)
def test_broken_folders_say_what_is_broken(tmp_path: Path, dino: Path, file: str, values: Values, said: str) -> None:
    broken = Path(shutil.copytree(dino, tmp_path / "broken"))
    (broken / file).write_text(json.dumps({**json.loads((broken / file).read_text()), **values}))
    with pytest.raises(UserError, match=f"broken: no vision model of transformers: .*{said}") as told:
        load_extractor(broken, "transformers")
    assert "\n" not in str(told.value)


def test_folders_without_config_or_safetensors_are_refused(tmp_path: Path, dino: Path) -> None:
    settings = ExtractorSettings(kind="transformers", pretrained=str(tmp_path))
    with pytest.raises(UserError, match=r"has no config\.json"):
        extractors.given(settings, download=True)
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((dino / name).read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no safetensors; pickles are never loaded \(try another revision\)"):
        extractors.given(settings, download=True)
    with pytest.raises(UserError, match=r"nowhere.* is no folder, no hub name"):
        extractors.given(ExtractorSettings(kind="transformers", pretrained="nowhere"), download=False)


def test_missing_package_is_named_with_its_extra(dino: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    monkeypatch.setattr(extractors.importlib.util, "find_spec", lambda name: None)
    for ask in (
        lambda: extractors.given(ExtractorSettings(kind="transformers", pretrained=str(dino)), download=False),
        lambda: load_extractor(dino, "transformers"),
    ):
        with pytest.raises(UserError, match=r"pip install 'deme-diffusion\[features\]'"):
            ask()


def test_hub_model_enters_by_its_commit_and_is_pinned(pico_values: Values) -> None:
    commit = "0123456789" * 4
    pico_values["extractor"] = {"kind": "transformers", "pretrained": "owner/dinov2-tiny", "revision": commit}
    graph = Graph(parse(pico_values, where="test"))
    assert graph.extractor.digest != Graph(changed_revision(pico_values, "9" * 40)).extractor.digest
    assert (graph.extractor.path, graph.extractor_name) == (None, "dinov2-tiny")  # type: ignore[union-attr]
    assert graph.pinned().extractor.revision == commit


def changed_revision(values: Values, revision: str) -> Any:
    return parse({**values, "extractor": {**values["extractor"], "revision": revision}}, where="test")


# classifiers


class Squares:
    """Bright squares on noise: the label says in which quarter."""

    def __init__(self, side: int) -> None:
        self.side = side

    def __len__(self) -> int:
        return 200

    def pixels(self, index: int) -> np.ndarray:
        image = noise(1, self.side, seed=index)[0] // 4
        half = self.side // 2
        top, left = divmod(self.label(index), 2)
        image[top * half : (top + 1) * half, left * half : (left + 1) * half] += 90
        return image

    def label(self, index: int) -> int:
        return index % 4

    def caption(self, index: int) -> None:
        return None


def quarters(side: int) -> tuple[Split, Split]:
    settings = DataSettings()
    train, held_out = range(150), range(150, 200)
    return Split("train", Squares(side), train, settings), Split("search", Squares(side), held_out, settings)


STAGED = ExtractorSettings(pretrained=None, stages=2, channels=4, features=8, total_steps=60, train_batch_size=32)


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("staged")
    return folder, train_extractor(*quarters(16), STAGED, seed=0, out=folder)


def test_staged_classifier_learns_and_comes_back(staged: tuple[Path, dict[str, Any]]) -> None:
    folder, results = staged
    assert results["held_out_accuracy"] > 0.9  # 0.25 by chance
    loaded = load_extractor(folder)
    assert isinstance(loaded, StagedClassifier)
    assert json.loads((folder / "config.json").read_text())["size"] == [16, 16]
    images = loaded.inputs(real_pixels(quarters(16)[1]))
    assert loaded.trunk(images).shape[1:] == (16, 4, 4)  # halved twice, four times as wide
    assert loaded.preprocessing == "8-bit, to [-1, 1], antialiased bilinear to 16x16"


def test_stages_widen_up_to_a_cap() -> None:
    model = StagedClassifier(3, channels=2, features=4, classes=3, stages=5)
    widths = [stage[0].out_channels for stage in model.stages]  # type: ignore[index, union-attr]
    assert widths == [4, 8, 16, 16, 16]


def test_images_of_another_size_are_resized_to_the_classifiers_own(staged: tuple[Path, dict[str, Any]]) -> None:
    loaded = load_extractor(staged[0])
    same, larger = noise(2, 16), np.repeat(np.repeat(noise(2, 16), 2, axis=1), 2, axis=2)
    assert torch.equal(loaded.inputs(same), torch.from_numpy(same).permute(0, 3, 1, 2).float() / 127.5 - 1)
    assert loaded.inputs(larger).shape == (2, 3, 16, 16)
    flat = np.full((1, 40, 24, 3), 255, dtype=np.uint8)
    torch.testing.assert_close(loaded.inputs(flat), torch.ones(1, 3, 16, 16))


def test_packaged_classifier_takes_images_as_they_are() -> None:
    import deme_diffusion

    packaged = load_extractor(Path(deme_diffusion.__file__).parent / "assets" / "digits-cnn")
    assert packaged.inputs(noise(1, 9, 1)).shape == (1, 1, 9, 9)
    assert packaged.preprocessing == "8-bit, to [-1, 1], not resized"
    with pytest.raises(UserError, match=r"takes images of 1 channels, these have 3; use data\.mode=L"):
        packaged(noise(1, 8))


def test_too_many_stages_for_the_images_are_a_user_error(tmp_path: Path) -> None:
    settings = STAGED.model_copy(update={"stages": 4})
    with pytest.raises(UserError, match=r"extractor\.stages=4 needs images of 32 pixels or more, these are 16x16"):
        train_extractor(*quarters(16), settings, seed=0, out=tmp_path)


def test_training_reads_no_more_than_a_batch_of_images_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most, images = list[int](), Split.images

    def spy(split: Split, positions: Any) -> torch.Tensor:
        most.append(len(positions))
        return images(split, positions)

    monkeypatch.setattr(Split, "images", spy)
    train, held_out = quarters(16)
    extractor = SmallClassifier(3, 4, 8, 4)
    settings = STAGED.model_copy(update={"total_steps": 2, "train_batch_size": 8})
    train_extractor(train, held_out, settings, seed=0, out=tmp_path / "a")
    assert most == [1, 8, 8, 150, 50]  # the shape, two steps, and two accuracies, up to 1,024 images at once
    most.clear()
    monkeypatch.setattr(SmallClassifier, "batch_size", lambda self, pixels: 32)
    features = extract_real(train, extractor.eval()).features
    assert max(most) == 32
    monkeypatch.undo()
    np.testing.assert_allclose(features, features_of(real_pixels(train), extractor), rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [None, 1, 40, 60, 10_000])
def test_views_of_real_images_are_the_same_in_batches(count: int | None) -> None:
    from deme_diffusion.config import AugmentSettings

    settings = DataSettings(augment=AugmentSettings(shift=1.0, flip=0.5), views=3)
    split = Split("report", Squares(8), list(range(20)), settings)

    class Raw(Extractor):
        """Pixels as features, seven images at a time: across the borders of views."""

        preprocessing, dimension = "none", 192

        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Parameter(torch.ones(1))

        def batch_size(self, pixels: np.ndarray) -> int:
            return 7

        def inputs(self, pixels: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(pixels).float().flatten(1)

        def outputs(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return inputs * self.one, inputs[:, :3]

    found = extract_real(split, Raw(), count)
    expected = real_pixels(split)[:count].reshape(-1, 192)
    np.testing.assert_array_equal(found.features, expected)
    assert found.logits is not None
    np.testing.assert_array_equal(found.logits, expected[:, :3])


def test_extractor_that_answers_nan_is_a_user_error() -> None:
    broken = SmallClassifier(3, 4, 8, 4).eval()
    nn.init.constant_(broken.embed.bias, float("nan"))
    with pytest.raises(UserError, match="NaN or infinity"):
        extract(in_batches(noise(2, 8), 1), broken)


# published statistics


def save_npz(file: Path, **arrays: Any) -> Path:
    np.savez(file, **arrays)
    return file


def test_published_statistics_are_a_second_reference(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    reference, generated = (random.normal(size=(50, 4)).astype(np.float32) + shift for shift in (0, 1))
    fitted = statistics(reference)
    file = save_npz(tmp_path / "cifar10-32x32.npz", mu=fitted.mean, sigma=fitted.covariance)
    published = published_statistics(file, key="x", dimension=4)
    found = score_images(generated, generated, neighbours=3, published=published)
    assert found["FD published"] == pytest.approx(frechet_distance(statistics(generated), fitted), rel=1e-10)
    assert found["FD published"] > 1 > found["FD"]
    assert "FD published" not in score_images(generated, generated, neighbours=3)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mean": np.zeros(3), "cov": np.eye(3)}, "has no mu; it has cov, mean"),
        ({"mu": np.zeros(3)}, "has no sigma; it has mu"),
        ({"mu": np.zeros(5), "sigma": np.eye(5)}, "another protocol: its statistics have dimension 5, .* features 3"),
        ({"mu": np.zeros(3), "sigma": np.eye(2)}, r"not \(d,\) and \(d, d\)"),
        ({"mu": np.array([0, np.nan, 0]), "sigma": np.eye(3)}, "NaN or infinity"),
        ({"mu": np.zeros(3), "sigma": np.full((3, 3), np.inf)}, "NaN or infinity"),
        ({"mu": np.zeros(3), "sigma": np.eye(3) + np.eye(3, k=1)}, "sigma is not symmetric"),
        ({"mu": np.array([object()] * 3), "sigma": np.eye(3)}, "no readable .npz of plain arrays"),
        ({"mu": np.array(["a", "b", "c"]), "sigma": np.eye(3)}, "could not convert"),
    ],
)
def test_statistics_of_another_protocol_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    file = save_npz(tmp_path / "s.npz", **arrays)
    with pytest.raises(UserError, match=message) as told:
        published_statistics(file, key="evaluate.reference_statistics", dimension=3)
    assert str(told.value).startswith("evaluate.reference_statistics: ")
    assert "\n" not in str(told.value)


def test_what_is_no_npz_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("not found")
    (tmp_path / "empty.npz").write_bytes(b"")
    with pytest.raises(UserError, match="is one array"):
        published_statistics(tmp_path / "one.npy", key="x")
    for name in ("text", "empty"):
        with pytest.raises(UserError, match=r"no readable \.npz"):
            published_statistics(tmp_path / f"{name}.npz", key="x")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("https://example.org/cifar10.npz", "is not fetched; download it"),
        ("nowhere.npz", "nowhere.npz is no file"),
        ("wrong.npz", "dimension 5, the extractor's features 64"),
    ],
)
def test_reference_statistics_are_checked_before_anything_runs(
    tmp_path: Path, pico_values: Values, name: str, message: str
) -> None:
    save_npz(tmp_path / "wrong.npz", mu=np.zeros(5), sigma=np.eye(5))
    pico_values["evaluate"]["reference_statistics"] = name if "://" in name else str(tmp_path / name)
    with pytest.raises(UserError, match=message):
        Graph(parse(pico_values, where="test"))


def test_reference_statistics_enter_by_content(tmp_path: Path, pico_values: Values) -> None:
    def digests(**arrays: Any) -> set[str]:
        file = save_npz(tmp_path / f"{len(list(tmp_path.iterdir()))}.npz", **arrays)
        pico_values["evaluate"]["reference_statistics"] = str(file)
        return {node.digest for node in Graph(parse(pico_values, where="test")).of_stage("evaluate")}

    plain = {node.digest for node in Graph(parse(pico_values, where="test")).of_stage("evaluate")}
    first, again = (digests(mu=np.zeros(64), sigma=np.eye(64)) for _ in range(2))
    assert first == again
    assert not first & plain
    assert not first & digests(mu=np.ones(64), sigma=np.eye(64))


def test_kept_statistics_are_the_fitted_ones(tmp_path: Path) -> None:
    fitted = statistics(np.random.default_rng(0).normal(size=(9, 3)))
    save_statistics(tmp_path, fitted)
    kept = load_statistics(tmp_path)
    assert kept.n == 9
    assert np.array_equal(kept.mean, fitted.mean) and np.array_equal(kept.covariance, fitted.covariance)


def test_too_few_images_for_a_covariance_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    random = np.random.default_rng(0)
    few, many = (random.normal(size=(n, 37)).astype(np.float32) for n in (20, 90))
    for _ in range(2):
        score_images(many, few, neighbours=3)
    warned = [record.message for record in caplog.records if "very biased" in record.message]
    assert warned == ["FD: the generated images are 20 for features of dimension 37; with so few it is very biased"]


# through the pipeline


def test_table_of_a_vision_model_with_published_statistics(tmp_path: Path, pico_values: Values, dino: Path) -> None:
    file = save_npz(tmp_path / "published.npz", mu=np.zeros(16), sigma=np.eye(16))
    pico_values["extractor"] = {"kind": "transformers", "pretrained": str(dino)}
    pico_values["evaluate"] |= {"reference_statistics": str(file), "controls": [], "density_neighbours": 4}
    pico_values["merge"] = {"method": "none"}
    pico_values["data"] = {"report_fraction": 0.05}
    pico_values["decouple"] |= {"num_ranges": 1, "total_steps": 1}
    run = open_run(Loaded(parse(pico_values, where="test"), {}), out=tmp_path / "runs" / "pico", command="deme run")
    run.execute()
    run.report()
    rows = {row["model"]: row["metrics"] for row in read_table(run.folder / "table.json")}
    base = rows["base"]
    scores = {name.removesuffix(" DDIM-2") for name in base if name.endswith("DDIM-2")}
    assert scores == {
        "FD(dino-tiny)", "FD(dino-tiny, published.npz)", "KID(dino-tiny)", "precision", "recall", "density", "coverage",
    }  # fmt: skip
    node = run.graph.samples[("base", 0)]
    pixels = np.load(run.store.folder(node.key) / "images.npy")
    own = statistics(features_of(pixels, load_extractor(dino, "transformers")))
    published = published_statistics(file, key="x")
    assert base["FD(dino-tiny, published.npz) DDIM-2"]["mean"] == pytest.approx(
        frechet_distance(own, published), rel=1e-5
    )
    assert base["FD(dino-tiny, published.npz) DDIM-2"]["protocol"]["reference"].startswith("published.npz ")
    assert base["density DDIM-2"]["protocol"]["neighbours"] == 4
    assert base["recall DDIM-2"]["protocol"]["neighbours"] == 3
    assert "BitImageProcessor" in base["FD(dino-tiny) DDIM-2"]["protocol"]["preprocessing"]
    assert rows["training images"]["FD(dino-tiny, published.npz) DDIM-2"]["mean"] is not None
