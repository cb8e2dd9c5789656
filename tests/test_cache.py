"""Caches of latents and text embeddings: equal to encoding anew, made once, resumed, shared, refused where wrong."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import every_family
import tiny
from deme_diffusion import files
from deme_diffusion.config import CacheSettings, DataSettings, Recipe
from deme_diffusion.data.encoded import RECORD, EncodedSplit, check_shards, open_cache
from deme_diffusion.data.encoding import distinct_captions, make_cache, say_cut
from deme_diffusion.data.loading import Order, steps
from deme_diffusion.data.sources import WORDINGS, WORDS, SplitName
from deme_diffusion.data.splits import Split, load_splits
from deme_diffusion.errors import MachineError, UserError
from deme_diffusion.models.stable_diffusion import StableDiffusion
from deme_diffusion.pipeline import caching, inputs
from deme_diffusion.pipeline.cache_size import cache_size
from deme_diffusion.pipeline.estimate import described, plan
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.needs import model_cost
from deme_diffusion.pipeline.node import Node
from deme_diffusion.pipeline.run import Run, open_run
from deme_diffusion.recipes import load
from deme_diffusion.weight_files import WEIGHTS_NAME

DIGITS_BASE = "c28e9105dfa535ef"
"""What the packaged digits-base has been known by since it is there: stores of caches and trainings go by it."""
IMAGES, DISTINCT = 80, len(WORDS) * len(WORDINGS) + 1
Splits = dict[SplitName, Split]


class Counting:
    """An encoder of 8x8 grey images to (2, 4, 4) and of captions to (3, 2), which counts, and may be killed."""

    def __init__(
        self, shape: tuple[int, ...] = (2, 4, 4), *, dies_after: int | None = None, scale: float = 1.0
    ) -> None:
        self.sample_shape, self.left, self.scale = shape, dies_after, scale
        self.images, self.captions, self.counted = 0, Counter[str](), list[int]()

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        if self.left is not None and (left := self.left - len(images)) < 0:
            raise KeyboardInterrupt
        self.left = None if self.left is None else left
        self.images += len(images)
        small = torch.nn.functional.avg_pool2d(images, 2).flatten(1)
        return self.scale * small.repeat(1, prod(self.sample_shape) // 16).reshape(-1, *self.sample_shape)

    def encode_captions(self, captions: Sequence[str]) -> dict[str, torch.Tensor]:
        self.captions.update(captions)
        states = [[len(c), hash_of(c), i] for c in captions for i in (0, 1)]
        return {"states": torch.tensor(states).float().reshape(-1, 2, 3).mT, "size": torch.full((len(captions), 1), 7)}

    def placeholder(self, count: int) -> dict[str, torch.Tensor]:
        return {"states": torch.zeros(count, 3, 2), "size": torch.zeros(count, 1, dtype=torch.int64)}

    def truncated(self, captions: Sequence[str]) -> list[bool]:
        self.counted.append(len(captions))
        return [len(caption) > 25 for caption in captions]


def hash_of(caption: str) -> int:
    return sum(caption.encode()) % 97


def splits_of(carries: Any = "text", **settings: Any) -> Splits:
    found = load_splits(DataSettings.model_validate({"max_images": IMAGES, **settings}))
    return {name: replace(split, carries=carries) for name, split in found.items()}


def views_of(settings: DataSettings, cache: CacheSettings) -> dict[SplitName, int]:
    return caching.stored_views(Recipe().model_copy(update={"data": settings, "cache": cache}))


def made(folder: Path, splits: Splits, encoder: Any, *, most_bytes: int = 10**9, **settings: Any) -> dict[str, Any]:
    cache = CacheSettings.model_validate({"dtype": "float32", "batch_size": 8, **settings})
    views = views_of(splits["train"].settings, cache)
    return make_cache(folder, splits, encoder, cache, made_of={}, views=views, most_bytes=most_bytes)


def opened(folder: Path, splits: Splits, encoder: Any, **settings: Any) -> dict[SplitName, EncodedSplit]:
    made(folder, splits, encoder, **settings)
    return open_cache(folder, splits)


KEYED: dict[str, Any] = {"seed": 3, "purpose": "augment", "step": 5, "first": 2}
POSITIONS = [4, 0, 17, 4, 30]

# --- what is read --------------------------------------------------------------------------------


def test_a_training_batch_is_that_of_the_images_encoded_anew(tmp_path: Path) -> None:
    splits, encoder = splits_of(), Counting()
    batch = opened(tmp_path, splits, encoder)["train"].training_batch(POSITIONS, **KEYED, empty=0.6)
    plain = splits["train"].training_batch(POSITIONS, **KEYED, empty=0.6)
    assert 0 < plain["caption"].count("") < len(POSITIONS)
    assert torch.equal(batch["latent"], encoder.encode_images(plain["image"]))
    for name, value in encoder.encode_captions(plain["caption"]).items():
        assert torch.equal(batch["condition"][name], value)
        assert batch["condition"][name].dtype == value.dtype
    assert set(batch) == {"latent", "condition"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_is_stored_in_half_precision_is_rounded_once(tmp_path: Path, dtype: str) -> None:
    splits, encoder = splits_of(), Counting()
    batch = opened(tmp_path, splits, encoder, dtype=dtype)["train"].training_batch(POSITIONS, **KEYED)
    plain, held = splits["train"].training_batch(POSITIONS, **KEYED), getattr(torch, dtype)
    assert torch.equal(batch["latent"], encoder.encode_images(plain["image"]).to(held).float())
    assert torch.equal(batch["condition"]["states"], encoder.encode_captions(plain["caption"])["states"].to(held))
    assert batch["condition"]["size"].dtype == torch.int64


@pytest.mark.parametrize("views", [1, 3])
def test_held_out_views_are_those_of_the_images(tmp_path: Path, views: int) -> None:
    splits, encoder = splits_of(views=views, augment={"shift": 1.0, "flip": 0.5}), Counting()
    cached = opened(tmp_path, splits, encoder, most_bytes=4000)
    for name in ("search", "report"):
        for view in range(4):
            batch, plain = cached[name].view_batch(view, 2, 9), splits[name].view_batch(view, 2, 9)
            assert torch.equal(batch["latent"], encoder.encode_images(plain["image"]))
            assert torch.equal(batch["condition"]["states"], encoder.encode_captions(plain["caption"])["states"])
        assert len(cached[name].view_batch(0)["latent"]) == len(cached[name]) == len(splits[name])


def test_training_draws_one_of_the_stored_views_whatever_the_batches(tmp_path: Path) -> None:
    splits, encoder = splits_of(augment={"shift": 2.0, "rotate": 20.0}), Counting()
    train = opened(tmp_path, splits, encoder, views=3, most_bytes=3000)["train"]
    keyed = {"seed": 0, "purpose": "cache", "first": 7}
    views = [encoder.encode_images(splits["train"].training_images([7], step=view, **keyed))[0] for view in range(3)]
    drawn = Counter[int]()
    for step in range(40):
        latent = train.training_batch([7], seed=1, purpose="augment", step=step, first=0)["latent"][0]
        drawn[[torch.equal(latent, view) for view in views].index(True)] += 1
    assert set(drawn) == {0, 1, 2}
    whole = train.training_batch([1, 7, 2], seed=1, purpose="augment", step=9, first=0)["latent"]
    parts = [train.training_batch([p], seed=1, purpose="augment", step=9, first=i) for i, p in enumerate([1, 7, 2])]
    assert torch.equal(whole, torch.cat([part["latent"] for part in parts]))


def test_images_that_are_not_augmented_are_stored_once(tmp_path: Path) -> None:
    splits, encoder = splits_of(), Counting()
    assert made(tmp_path, splits, encoder, views=5)["latents"] == encoder.images == IMAGES


def test_loaders_in_other_processes_read_the_same(tmp_path: Path) -> None:
    train = opened(tmp_path, splits_of(), Counting(), most_bytes=2000)["train"]
    train.view_batch(0)
    asked: dict[str, Any] = {"seed": 0, "start": 0, "stop": 3, "shape": (2, 4, 4), "empty": 0.3}
    here = [batch for micro in steps(train, Order(4), **asked) for batch in micro]
    there = [
        batch for micro in steps(pickle.loads(pickle.dumps(train)), Order(4), **asked, workers=1) for batch in micro
    ]
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one["latent"], other["latent"])
        assert torch.equal(one["condition"]["states"], other["condition"]["states"])
        assert one["noise"].shape == (4, 2, 4, 4)
    assert len(pickle.dumps(train)) < 400_000  # no shard goes with it


def test_models_of_classes_keep_latents_and_read_labels(tmp_path: Path) -> None:
    splits, encoder = splits_of("class"), Counting()
    batch = opened(tmp_path, splits, encoder)["train"].training_batch(POSITIONS, **KEYED, empty=0.6)
    plain = splits["train"].training_batch(POSITIONS, **KEYED, empty=0.6)
    assert torch.equal(batch["label"], plain["label"])
    assert set(batch) == {"latent", "label"}
    assert not encoder.captions
    assert not list(tmp_path.glob("text-*"))


def test_latents_of_videos_have_an_axis_more(tmp_path: Path) -> None:
    splits, encoder = splits_of(), Counting((2, 1, 4, 4))
    batch = opened(tmp_path, splits, encoder)["search"].view_batch(0)
    assert batch["latent"].shape == (len(splits["search"]), 2, 1, 4, 4)


# --- how it is made ------------------------------------------------------------------------------


def test_each_caption_is_encoded_once_and_each_image(tmp_path: Path) -> None:
    encoder = Counting()
    told = made(tmp_path, splits_of(), encoder, batch_size=7)
    assert set(encoder.captions.values()) == {1}
    assert "" in encoder.captions
    assert len(encoder.captions) == told["captions"] == DISTINCT
    assert encoder.images == told["latents"] == IMAGES
    assert told["cut"] == sum(len(caption) > 25 for caption in encoder.captions) > 0


def test_its_size_is_said_beforehand_and_is_that_of_its_tensors(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        told = made(tmp_path, splits_of(), Counting(), dtype="float16", most_bytes=2000)
    said = next(line for line in caplog.messages if "latents" in line)
    assert said.startswith(f"cache: 0.0 MB for {IMAGES} latents, 0.0 MB for {DISTINCT} distinct captions, in ")
    assert (
        f"{told['cut']} of {DISTINCT} captions are longer than the model's tokenizer takes, and are cut" in caplog.text
    )
    stored = 0
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            stored += sum(shard.get_tensor(key).nbytes for key in shard.keys())  # noqa: SIM118
    assert told["bytes"] == stored == IMAGES * 32 * 2 + DISTINCT * (8 + 6 * 2 + 8)


def test_a_disk_that_is_too_small_is_told_before_anything_is_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = Counting()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 5000))
    with pytest.raises(MachineError, match=r"needs 0\.0\d GB, and its disk has 0\.00 GB free"):
        made(tmp_path, splits_of(), encoder)
    assert encoder.images == 0


def test_what_does_not_fit_into_the_stored_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cache.dtype: .* not finite in float16; use bfloat16 or float32"):
        made(tmp_path, splits_of(), Counting(scale=1e6), dtype="float16")
    assert not (tmp_path / RECORD).exists()


@pytest.mark.parametrize("dies_after", [0, 8, 23, 70])
def test_a_killed_attempt_goes_on_after_its_last_shard(tmp_path: Path, dies_after: int) -> None:
    splits, whole = splits_of(), tmp_path / "whole"
    made(whole, splits, Counting(), most_bytes=2048)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "killed", splits, Counting(dies_after=dies_after), most_bytes=2048)
    assert not (tmp_path / "killed" / RECORD).exists()
    there = {file.name for file in (tmp_path / "killed").glob("*")}
    encoder = Counting()
    made(tmp_path / "killed", splits, encoder, most_bytes=2048)
    kept = json.loads((whole / RECORD).read_text())["shards"]
    assert encoder.images == IMAGES - sum(kept[name]["rows"] for name in there if name.startswith("latents"))
    assert encoder.captions.total() == DISTINCT - sum(kept[name]["rows"] for name in there if name.startswith("text"))
    assert {f.name: f.read_bytes() for f in (tmp_path / "killed").iterdir()} == {
        f.name: f.read_bytes() for f in whole.iterdir()
    }


def test_lengths_are_counted_a_batch_at_a_time_and_not_again(tmp_path: Path) -> None:
    splits, encoder = splits_of(), Counting()
    told = made(tmp_path, splits, encoder, batch_size=7)
    assert max(encoder.counted) == 7
    assert sum(encoder.counted) == DISTINCT
    (tmp_path / RECORD).unlink()  # killed at the very end
    again = Counting()
    assert made(tmp_path, splits, again, batch_size=7) == told
    assert (again.images, again.counted) == (0, [])


def test_captions_are_read_before_images(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, splits_of(), Counting(dies_after=0))
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["text-00000.safetensors"]


def test_without_a_cache_the_first_captions_are_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    splits, encoder = splits_of(), Counting()
    every = [c for i in splits["train"].indices for c in splits["train"].source.captions(i)]
    assert say_cut(encoder, splits) == sum(len(c) > 25 for c in every) > 0
    assert f" of {len(every)} training captions are longer than" in caplog.text
    monkeypatch.setattr("deme_diffusion.data.encoding.LOOKED_AT", 20)
    assert say_cut(encoder, splits) == sum(len(c) > 25 for c in every[:20])
    assert " of the first 20 training captions are longer than" in caplog.text


def test_shards_of_another_size_are_not_mixed_in(tmp_path: Path) -> None:
    splits = splits_of()
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, splits, Counting(dies_after=40), most_bytes=1024)
    cached = opened(tmp_path, splits, Counting(), most_bytes=3072)
    assert {file.name for file in tmp_path.glob("*.safetensors")} == set(
        json.loads((tmp_path / RECORD).read_text())["shards"]
    )
    assert torch.equal(
        cached["train"].view_batch(0)["latent"], Counting().encode_images(splits["train"].view_batch(0)["image"])
    )


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_shard_is_told_by_its_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    made(tmp_path / "c", splits_of(), Counting())
    check_shards(tmp_path / "c")
    file = tmp_path / "c" / "latents-train-00000.safetensors"
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content[:-1] + (b"" if damage == "cut" else bytes([content[-1] ^ 1])))
    said = "damaged, its checksum is not the one in cache.json" if damage == "flipped" else "missing or cut short"
    with pytest.raises(UserError, match=rf"latents-train-00000.safetensors: {said}; copy it again, or make the cache"):
        check_shards(tmp_path / "c")


# --- a latent text-to-image model ----------------------------------------------------------------


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.stable_diffusion(tmp_path_factory.mktemp("cached") / "sd")


SAMPLERS: list[dict[str, Any]] = [{"num_inference_steps": 2}, {"name": "DDPMScheduler", "num_inference_steps": 3}]


def values(base: Path) -> dict[str, Any]:
    """A recipe of one expert and two steps."""
    return {
        "name": "spoken",
        "model": {"family": "stable_diffusion", "pretrained": str(base)},
        "data": {"max_images": 150},
        "cache": {"dtype": "float32", "batch_size": 64},
        "decouple": {"num_ranges": 1, "total_steps": 2, "train_batch_size": 4, "proportion_empty_prompts": 0.3},
        "evaluate": {"num_images": 16, "loss": {"draws": 1}, "controls": [], "samplers": SAMPLERS},
        "merge": {"search": "none", "sampler": SAMPLERS[0]},
        "analyze": {"figures": []},
        "runtime": {"device": "cpu", "threads": 1},
    }


def changed(values: Mapping[str, Any], **sections: Any) -> dict[str, Any]:
    return {**values, **{name: {**values.get(name, {}), **more} for name, more in sections.items()}}


def run_of(values: dict[str, Any], folder: Path) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{values['name']}.yaml"
    file.write_text(json.dumps(values))
    return open_run(load(str(file)), out=folder / values["name"])


def cache_of(values: dict[str, Any]) -> Node:
    graph = Graph(Recipe.model_validate(values))
    assert isinstance(graph.cache, Node)
    return graph.cache


@pytest.fixture(scope="session")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Its cache and its expert, made."""
    run = run_of(values(base), tmp_path_factory.mktemp("trained"))
    run.execute(lambda graph: [expert for experts in graph.experts.values() for expert in experts])
    return run


def state(run: Run) -> dict[str, torch.Tensor]:
    folder = run.store.folder(run.graph.experts[0][0].key)
    with safe_open(folder / "unet" / "diffusion_pytorch_model.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def test_an_expert_is_the_same_with_a_cache_as_without(base: Path, trained: Run, tmp_path: Path) -> None:
    plain = run_of(changed(values(base), cache={"enabled": False, "dtype": "float16"}), tmp_path)
    assert plain.graph.cache is None
    plain.execute(lambda graph: [graph.experts[0][0]])
    ours, theirs = state(trained), state(plain)
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-6) for key in theirs)


def test_training_from_a_cache_loads_no_encoder(
    base: Path, trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(trained.graph.cache, Node)
    shutil.copytree(trained.store.root / "cache", tmp_path / "store" / "cache")
    calls = Counter[str]()
    for name in ("encode_images", "encode_captions", "truncated"):
        monkeypatch.setattr(StableDiffusion, name, lambda self, *_, name=name: calls.update([name]))
    monkeypatch.setattr(StableDiffusion, "pipeline", property(lambda self: calls.update(["pipeline"])))
    run = run_of(changed(values(base), decouple={"validation_steps": 1}), tmp_path)
    run.execute(lambda graph: [graph.experts[0][0]])
    assert not calls
    assert all(torch.isfinite(value).all() for value in state(run).values())


def test_a_training_step_takes_what_the_stage_wrote(trained: Run) -> None:
    artefact = trained.store.find(cache_of(values(Path(trained.recipe.model.pretrained or ""))).key)
    assert artefact is not None
    splits = splits_of(max_images=150)
    denoiser = StableDiffusion.load(Path(trained.recipe.model.pretrained or ""))
    batch = open_cache(artefact.folder, splits)["train"].training_batch(POSITIONS, **KEYED, empty=0.5)
    plain = splits["train"].training_batch(POSITIONS, **KEYED, empty=0.5)
    noise, t = torch.ones(len(POSITIONS), *denoiser.sample_shape), torch.tensor([0, 5, 9, 14, 19])
    ours, theirs = denoiser.noised(batch, t, noise), denoiser.noised(plain, t, noise)
    assert torch.allclose(ours.x_t, theirs.x_t, atol=1e-6)
    states = "encoder_hidden_states"
    assert torch.allclose(ours.condition[states].float(), theirs.condition[states].float(), atol=1e-6)
    assert artefact.results["captions"] == DISTINCT
    assert artefact.results["cut"] == sum(denoiser.truncated(distinct_captions(splits)))


def test_it_is_shared_by_whatever_encodes_alike(base: Path, tmp_path: Path) -> None:
    plain = values(base)
    cache = cache_of(plain)
    other = shutil.copytree(base, tmp_path / "other")
    (other / "unet" / "config.json").write_text((base / "unet" / "config.json").read_text() + "\n")
    alike = [
        changed(plain, model={"pretrained": str(other)}),
        changed(plain, decouple={"num_ranges": 2, "learning_rate": 1e-3}),
        changed(plain, cache={"batch_size": 3, "shard_size": "1MB", "views": 4}),
    ]
    assert {cache_of(one).digest for one in alike} == {cache.digest}
    (other / "vae" / "config.json").write_text((base / "vae" / "config.json").read_text() + "\n")
    unlike = [
        alike[0],
        changed(plain, cache={"dtype": "float16"}),
        changed(plain, model={"encoder_dtype": "bfloat16"}),
        changed(plain, model={"dtype": "bfloat16"}),
        changed(plain, data={"max_images": 140}),
        changed(plain, data={"views": 2}),
        changed(plain, data={"augment": {"flip": 0.5}}),
        changed(plain, data={"augment": {"flip": 0.5}}, cache={"views": 2}),
        changed(plain, data={"augment": {"flip": 0.5}}, cache={"views": 1}),
    ]
    assert cache_of(changed(unlike[-1], cache={"views": 4})).digest == cache_of(unlike[-3]).digest
    assert len({cache.digest, *(cache_of(one).digest for one in unlike)}) == 1 + len(unlike)


def test_augmented_images_have_several_views_or_it_is_said(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = changed(values(base), data={"augment": {"shift": 1.0}, "max_images": 60})
    for number, (cache, views, said) in enumerate((
        ({}, 4, "4 augmented views of each training image"),
        ({"views": 1}, 1, "each image keeps one augmentation; set cache.views=N or cache.enabled=false"),
    )):  # fmt: skip
        run = run_of(changed(plain, cache=cache), tmp_path / str(number))
        assert caching.stored_views(run.recipe)["train"] == views
        assert any(said in line for line in described(plan(run)))
        caplog.clear()
        with caplog.at_level(logging.INFO):
            run.execute([run.graph.cache])  # type: ignore[list-item]
        spoken = [record for record in caplog.records if said in record.message]
        assert [record.levelname for record in spoken] == ["INFO" if views > 1 else "WARNING"]
    random = Recipe.model_validate(changed(values(base), data={"crop": "random", "resolution": 8}))
    assert caching.stored_views(random)["train"] == 4
    unchanged = Recipe.model_validate(values(base))
    assert (caching.stored_views(unchanged)["train"], caching.frozen(unchanged)) == (1, None)


def test_captions_that_are_cut_are_told_without_a_cache_too(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(StableDiffusion, "truncated", lambda self, captions: [True] * len(captions))
    run = run_of(changed(values(base), cache={"enabled": False}), tmp_path)
    run.execute(lambda graph: [graph.experts[0][0]])
    assert "training captions are longer than the model's tokenizer takes, and are cut" in caplog.text


def test_only_what_encodes_is_in_the_key(base: Path, tmp_path: Path) -> None:
    pipeline = shutil.copytree(base, tmp_path / "sd")
    plain = changed(values(base), model={"pretrained": str(pipeline)})
    before = cache_of(plain).digest
    (pipeline / "LICENSE.txt").write_text("of no interest")
    (pipeline / "v1-4.safetensors").write_bytes((pipeline / "vae" / WEIGHTS_NAME).read_bytes())
    shutil.copy(pipeline / "vae" / WEIGHTS_NAME, pipeline / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    shutil.copytree(pipeline / "vae", pipeline / "safety_checker")
    scheduler = pipeline / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text() + "\n")
    assert cache_of(plain).digest == before
    tokenizer = next(file for file in (pipeline / "tokenizer").iterdir() if file.suffix == ".json")
    content = tokenizer.read_text()
    tokenizer.write_text(content + "\n")
    assert cache_of(plain).digest != before
    tokenizer.write_text(content)
    assert cache_of(plain).digest == before
    index = json.loads((pipeline / "model_index.json").read_text())
    (pipeline / "model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": False}))
    assert cache_of(plain).digest == before
    (pipeline / "model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": True}))
    assert cache_of(plain).digest != before


def test_a_local_base_is_known_by_its_vocabulary_too(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    pipeline = shutil.copytree(base, tmp_path / "sd")
    seen = [_digest(pipeline)]
    for name in ("merges.txt", "vocab.txt", "spiece.model"):
        (pipeline / "tokenizer" / name).write_text("a b")
        seen.append(_digest(pipeline))
    assert len(set(seen)) == 4
    (pipeline / "LICENSE.txt").write_text("of no interest")
    assert _digest(pipeline) == seen[-1]
    assert inputs.resolve("packaged:digits-base", None, key="k", needs=(), download=False).digest == DIGITS_BASE


def test_a_large_base_is_not_hashed_at_each_command(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    pipeline = shutil.copytree(base, tmp_path / "sd")
    small = _digest(pipeline)
    assert not (tmp_path / "home").exists(), "of small ones nothing is remembered"
    monkeypatch.setattr(inputs, "LARGE", 1)
    hashed = Counter[str]()
    monkeypatch.setattr(files, "file_digest", lambda file, plain=files.file_digest: hashed.update(["x"]) or plain(file))
    assert _digest(pipeline) == small
    assert hashed["x"] > 0
    hashed.clear()
    assert _digest(pipeline) == small
    assert not hashed
    (pipeline / "model_index.json").write_text((base / "model_index.json").read_text() + "\n")
    assert _digest(pipeline) != small


def _digest(folder: Path) -> str:
    return inputs.resolve(str(folder), None, key="model.pretrained", needs=(), download=False).digest


def test_whatever_reads_latents_waits_for_the_cache(base: Path) -> None:
    sections = {"merge": {"search": "least_squares"}, "analyze": {"figures": ["similarity", "landscape", "vectors"]}}
    graph = Graph(Recipe.model_validate(changed(values(base), **sections)))
    graph.fishers()
    reading = {node.stage for node in graph.nodes if node.parents.get("cache") is graph.cache}
    assert reading == {"decouple", "search", "evaluate", "similarity", "landscape", "fisher"}
    measured = [n for n in graph.of_stage("evaluate") if "ranges" in n.key.settings]
    assert all("cache" in node.parents for node in measured)


def test_the_dry_run_says_its_size(base: Path, trained: Run) -> None:
    told = cache_size(trained.graph, trained.store, model_cost(trained.graph))
    artefact = trained.store.find(cache_of(values(base)).key)
    assert told is not None
    assert artefact is not None
    assert told["latents_bytes"] + told["text_bytes"] == artefact.results["bytes"]
    assert (told["latents"], told["captions"], told["exact"]) == (150, DISTINCT, True)


@pytest.mark.parametrize("name", every_family.FAMILIES)
def test_every_family_is_trained_on_what_it_would_encode(tmp_path: Path, name: str) -> None:
    denoiser, count = every_family.opened(name), 6
    train = every_family.split_of(name, count=count)
    splits = {"train": train, "search": every_family.split_of(name, "search", count)}
    cached = opened(tmp_path, splits, denoiser)["train"]
    batches = [split.training_batch(range(count), **KEYED, empty=0.4) for split in (cached, train)]
    noise, t = torch.ones(count, *denoiser.sample_shape), torch.arange(count) * 3
    ours, theirs = (denoiser.noised(batch, t, noise) for batch in batches)
    assert torch.allclose(ours.x_t, theirs.x_t, atol=1e-6)
    assert torch.allclose(ours.target, theirs.target, atol=1e-6)
    assert set(ours.condition) == set(theirs.condition)
    for key, value in theirs.condition.items():
        assert ours.condition[key].dtype == value.dtype
        assert torch.allclose(ours.condition[key], value, atol=1e-6)
    with torch.no_grad():
        answers = [denoiser.answer(denoiser.module, noised) for noised in (ours, theirs)]
    assert torch.allclose(*answers, atol=1e-5)


# --- made elsewhere ------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(trained: Run, tmp_path: Path) -> Iterator[Path]:
    """A copy of the cache."""
    assert isinstance(trained.graph.cache, Node)
    yield shutil.copytree(trained.store.folder(trained.graph.cache.key), tmp_path / "elsewhere")


def test_a_cache_made_elsewhere_gives_the_same_expert(
    base: Path, trained: Run, elsewhere: Path, tmp_path: Path
) -> None:
    run = run_of(changed(values(base), cache={"folder": str(elsewhere)}), tmp_path)
    assert run.graph.experts[0][0].digest == trained.graph.experts[0][0].digest
    assert not list(run.graph.of_stage("cache"))
    run.execute(lambda graph: [graph.experts[0][0]])
    ours, theirs = state(run), state(trained)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_cache_of_something_else_is_refused(base: Path, elsewhere: Path, tmp_path: Path) -> None:
    plain = changed(values(base), cache={"folder": str(elsewhere)})
    other = shutil.copytree(base, tmp_path / "other")
    (other / "text_encoder" / "config.json").write_text((base / "text_encoder" / "config.json").read_text() + "\n")
    wrong = {
        r"made with the encoders of another model \(\w+\) than .*other": {"model": {"pretrained": str(other)}},
        r"made of other images, or by other settings of data": {"data": {"max_images": 140}},
        r"made with cache.dtype float32, where this recipe has cache.dtype as it is by default": {
            "cache": {"dtype": "float16"}
        },
        r"made with model.encoder_dtype as it is by default, where this recipe has model.encoder_dtype bfloat16": {
            "model": {"encoder_dtype": "bfloat16"}
        },
    }
    for said, sections in wrong.items():
        with pytest.raises(UserError, match=rf"cache.folder: .*{said}.*; leave cache.folder out, and deme cache makes"):
            Graph(Recipe.model_validate(changed(plain, **sections)))
    with pytest.raises(UserError, match=r"cache.folder: .*nowhere has no cache.json"):
        Graph(Recipe.model_validate(changed(plain, cache={"folder": str(tmp_path / "nowhere")})))
    (elsewhere / RECORD).write_text("{}")
    with pytest.raises(UserError, match=r"cache.json does not say what it was made of"):
        Graph(Recipe.model_validate(plain))


def test_a_damaged_cache_from_elsewhere_is_refused_before_training(
    base: Path, elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    file = next(elsewhere.glob("latents-train-*"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    run = run_of(changed(values(base), cache={"folder": str(elsewhere)}), tmp_path)
    with pytest.raises(UserError, match="damaged, its checksum"):
        run.execute(lambda graph: [graph.experts[0][0]])
    assert not list(tmp_path.glob("store/decouple/*/unet"))


def test_a_command_for_caches_that_there_are_not_says_why(base: Path, tmp_path: Path) -> None:
    from deme_diffusion.cli.stages import _no_cache

    said = [_no_cache(Recipe.model_validate(v)) for v in (
        changed(values(base), cache={"enabled": False}), changed(values(base), cache={"folder": str(tmp_path)})
    )]  # fmt: skip
    assert said[0] == "cache.enabled=false turns it off; leave it out"
    assert str(said[1]).startswith(f"cache.folder={tmp_path} is there")
    assert str(_no_cache(Recipe())).startswith("model.family=ddpm has no latents to keep")
    assert _no_cache(Recipe.model_validate(values(base))) is None


def test_the_global_generator_is_left_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    opened(tmp_path, splits_of(augment={"flip": 0.5}), Counting(), views=2)["train"].training_batch(POSITIONS, **KEYED)
    assert torch.equal(before, torch.get_rng_state())
