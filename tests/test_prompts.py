"""What images are asked for: prompts in files, protocols, which image gets which, and what is refused in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tiny
from conftest import make_pico_values
from deme_diffusion.config import PromptSettings, Recipe
from deme_diffusion.data.sources import SplitName
from deme_diffusion.data.splits import Split
from deme_diffusion.errors import UserError
from deme_diffusion.evaluation import protocols
from deme_diffusion.evaluation.export import ImageFolder
from deme_diffusion.evaluation.protocols import chosen, read
from deme_diffusion.evaluation.reducing import reduced_to, reference_batches, size_at
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.prompted import of_split
from deme_diffusion.pipeline.sampling_choice import by_seed, family_of, given_prompts
from deme_diffusion.recipes.checks import parse


@pytest.fixture(scope="session")
def text_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion; read only."""
    return tiny.stable_diffusion(tmp_path_factory.mktemp("text") / "pipeline")


@pytest.fixture
def text_values(text_pipeline: Path) -> dict[str, Any]:
    values = make_pico_values(text_pipeline)
    values["model"]["family"] = "stable_diffusion"
    return values


def asked(protocol: str, path: Path, **more: Any) -> PromptSettings:
    return PromptSettings.model_validate({"protocol": protocol, "path": str(path), **more})


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def coco(path: Path, captions: dict[int, list[str]]) -> Path:
    entries = [{"image_id": i, "caption": text, "id": 7} for i, texts in captions.items() for text in texts]
    return write(path, json.dumps({"annotations": entries[::-1], "images": []}))


def parti(path: Path) -> Path:
    rows = ["Prompt\tCategory\tChallenge\tNote", 'a sign that says "GO"\tArts\tBasic\t', "bond\tAbstract\tBasic\tnote"]
    return write(path, "\n".join([*rows, "\t\t\t", "a cat\tAnimals\tBasic\t"]) + "\n")


# files


def test_every_kind_of_file_is_read(tmp_path: Path) -> None:
    assert [g.texts for g in read(asked("file", write(tmp_path / "a.txt", "a cat\n\n  two   dogs\r\n")))] == [
        ("a cat",),
        ("two dogs",),
    ]
    lines = [{"prompt": "a"}, {"Text": "b", "x": 1}, {"caption": "c"}]
    found = read(asked("file", write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, lines)))))
    assert [g.texts[0] for g in found] == ["a", "b", "c"]
    found = read(asked("file", write(tmp_path / "a.tsv", "id\tCaption\n1\ta cat\n2\t\n3\ta dog\n")))
    assert [g.texts[0] for g in found] == ["a cat", "a dog"]
    found = read(asked("imagenet1k", write(tmp_path / "c.txt", "tench, Tinca tinca\ngoldfish\n")))
    assert [g.texts[0] for g in found] == ["a photo of a tench", "a photo of a goldfish"]
    found = read(asked("coco30k", coco(tmp_path / "c.json", {9: ["z."], 3: ["a \n dog ", "b"]})))
    assert [sorted(g.texts) for g in found] == [["a dog", "b"], ["z."]], "by the number of the image"
    table = 'file_name,Text\na.jpg,"A cat, which says ""GO""."\nb.jpg,"two\ndogs"\n\nc.jpg,\n'
    for name, given in (("m.csv", table), ("m.jsonl", '{"text": "A cat, which says \\"GO\\"."}\n{"text": "two dogs"}')):
        for protocol in ("coco30k", "file"):
            found = read(asked(protocol, write(tmp_path / name, given)))
            assert [g.texts for g in found] == [('A cat, which says "GO".',), ("two dogs",)], "as BK-SDM's list"
    found = read(asked("parti", parti(tmp_path / "p.tsv")))
    assert [(g.texts[0], g.category) for g in found] == [
        ('a sign that says "GO"', "Arts"),
        ("bond", "Abstract"),
        ("a cat", "Animals"),
    ]


@pytest.mark.parametrize(
    ("protocol", "name", "content", "said"),
    [
        ("file", "a.txt", b"caf\xe9\n", "is not UTF-8 (line 1); once: iconv -f latin1 -t utf-8 a.txt > new.txt"),
        ("parti", "a.tsv", b"Prompt\tCategory\na\tb\nna\xefve\tc\n", "is not UTF-8 (line 3)"),
        ("coco30k", "a.json", b'{"annotations": "\xe9"}', "is not UTF-8 (line 1)"),
        ("parti", "a.tsv", b"Prompt\tKind\na\tb\n", "has no column Category in its first line; it has Prompt, Kind"),
        ("parti", "a.tsv", b"Prompt\tCategory\na\n", "line 2: 1 columns where the first line has 2"),
        ("file", "a.tsv", b"id\tname\n1\t2\n", "has no column prompt, text, caption in its first line"),
        ("file", "a.txt", b"\n \n", "holds no prompts"),
        ("file", "a.jsonl", b'{"prompt": "a"}\n{"prompt": 3}\n', 'line 2: no "prompt", "text" or "caption"'),
        ("file", "a.jsonl", b"{'prompt'}\n", "line 1: no JSON"),
        ("file", "a.xml", b"a\n", "is no list of prompts; .txt, .csv, .jsonl and .tsv are"),
        (
            "coco30k",
            "a.csv",
            b"file_name,name\n1,2\n",
            "has no column prompt, text, caption in its first line; it has file",
        ),
        ("coco30k", "a.csv", b"file_name,text\na,b\nc\n", "line 3: 1 columns where the first line has 2"),
        ("coco30k", "a.json", b'{"images": []}', 'is not COCO\'s JSON ("annotations"'),
        ("coco30k", "a.json", b"[1, 2", "is not COCO's JSON"),
        ("imagenet1k", "a.txt", b"", "holds no prompts; a text file with a class name a line"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, protocol: str, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read(asked(protocol, tmp_path / name))
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("evaluate.prompts.path: ")


# which image gets which


def test_a_choice_is_the_seeds_and_a_caption_is_one_of_its_image(tmp_path: Path) -> None:
    captions = {i: [f"{i} one", f"{i} two", f"{i} three"] for i in range(40)}
    settings = asked("coco30k", coco(tmp_path / "c.json", captions))
    groups = read(settings)
    found = chosen(settings, groups, 30)
    numbers = [int(text.split()[0]) for text in found.texts]
    assert len(set(numbers)) == 30, "a caption an image"
    assert numbers == found.places
    assert {text.split()[1] for text in found.texts} == {"one", "two", "three"}
    assert chosen(settings, groups, 30) == found
    assert chosen(settings, groups, 10).texts == found.texts[:10], "fewer images are the first of more"
    assert chosen(settings.model_copy(update={"seed": 1}), groups, 30).texts != found.texts


def test_a_file_keeps_its_order_and_is_never_asked_for_twice(tmp_path: Path) -> None:
    settings = asked("file", write(tmp_path / "a.txt", "\n".join(f"p{i}" for i in range(9))))
    assert chosen(settings, read(settings), 9).texts == [f"p{i}" for i in range(9)]
    some = chosen(settings, read(settings), 4).texts
    assert some == sorted(some)
    assert some != [f"p{i}" for i in range(4)]
    with pytest.raises(UserError, match=r"a.txt has 9 prompts for 10 images; set evaluate.num_images=9 or less"):
        chosen(settings, read(settings), 10)


def test_classes_go_round(tmp_path: Path) -> None:
    settings = asked("imagenet1k", write(tmp_path / "c.txt", "cat\ndog\neel\n"))
    places = chosen(settings, read(settings), 9).places
    assert sorted(places) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len(set(places[:3])) == 3


def test_splits_ask_by_their_own_captions(digits: dict[SplitName, Split]) -> None:
    search, report = (replace(digits[name], carries="text") for name in ("search", "report"))
    words = of_split(report, range(len(report) + 5))
    assert words == [*words[: len(report)], *of_split(report, range(len(report), len(report) + 5))]
    assert all(word in report.source.captions(report.indices[i % len(report)]) for i, word in enumerate(words))
    assert len({str(word).replace("one", "two") for word in words[:60]}) > 6, "in several wordings"
    assert of_split(search, range(8)) != words[:8]
    assert of_split(report, [5]) == [words[5]], "an image's own, whatever is beside it"
    classes = of_split(replace(report, carries="class"), range(4))
    assert classes == report.labels(range(4)).tolist()


# the graph


def graph_of(values: dict[str, Any], **evaluate: Any) -> Graph:
    values = {**values, "evaluate": {**values["evaluate"], **evaluate}}
    return Graph(parse(values, where="text"), download=True)


def test_what_is_asked_for_is_in_the_keys(text_values: dict[str, Any], tmp_path: Path) -> None:
    one, two = (graph_of(text_values, prompts={"seed": seed}) for seed in (0, 1))
    assert not {n.digest for n in one.of_stage("sample")} & {n.digest for n in two.of_stage("sample")}
    assert {n.digest for n in one.of_stage("decouple")} == {n.digest for n in two.of_stage("decouple")}
    folder = tmp_path / "real"
    folder.mkdir()
    Image.fromarray(np.zeros((9, 7, 3), np.uint8)).save(folder / "a.png")
    file = write(tmp_path / "a.txt", "\n".join(f"p{i}" for i in range(16)))
    given = {"protocol": "file", "path": str(file), "images": str(folder)}
    before = graph_of(text_values, prompts=given)
    assert [n.label for n in before.of_stage("features") if "real" in n.label] == ["features of real"]
    write(file, "\n".join(f"q{i}" for i in range(16)))
    after = graph_of(text_values, prompts=given)
    assert not {n.digest for n in before.of_stage("sample")} & {n.digest for n in after.of_stage("sample")}
    assert after.asking.reference is not None
    # Real training images are of another kind and size: only their captions are scored.
    scored = graph_of(text_values, prompts=given, clip_score=True)
    real = next(node for name, _, node in scored.evaluations if name == "training images")
    assert real.arguments["samples"] == [] and real.arguments["clips"] == ["clip real"]
    assert not any("training images" in n.label for n in (*scored.of_stage("features"), *after.of_stage("evaluate")))
    reference = after.asking.reference.digest
    Image.fromarray(np.ones((9, 7, 3), np.uint8)).save(folder / "b.png")
    changed = graph_of(text_values, prompts=given).asking.reference
    assert changed is not None
    assert changed.digest != reference


def test_parti_has_no_fd_and_the_clip_score_alone(text_values: dict[str, Any], tmp_path: Path) -> None:
    prompts = {"protocol": "parti", "path": str(parti(tmp_path / "p.tsv"))}
    graph = graph_of(text_values, prompts=prompts, num_images=3, clip_score=True)
    assert not list(graph.of_stage("features"))
    assert len(list(graph.of_stage("clip_score"))) == len(list(graph.of_stage("sample"))) + 1, "and training images"
    assert all("reference" not in node.parents for _, _, node in graph.evaluations)


def test_a_dry_run_only_tells_what_is_missing(text_values: dict[str, Any]) -> None:
    text_values["evaluate"] |= {"prompts": {"protocol": "coco30k", "images": "nowhere"}, "clip_score": True}
    graph = Graph(parse(text_values, where="text"), download=False)
    path, images = graph.asking.missing
    assert path.startswith(
        "evaluate.prompts.path: coco30k needs captions_val2014.json (or a list of prompts: .csv, as BK-"
    )
    assert path.endswith("http://images.cocodataset.org/annotations/annotations_trainval2014.zip")
    assert images.startswith("evaluate.prompts.images: nowhere is no folder; take the folder val2014 of http://")
    with pytest.raises(UserError, match=r"coco30k needs captions_val2014\.json"):
        Graph(parse(text_values, where="text"), download=True)


@pytest.mark.parametrize(
    ("evaluate", "said"),
    [
        ({"prompts": {"path": "a.txt"}}, "evaluate.prompts.path: is for a protocol"),
        ({"prompts": {"protocol": "parti"}}, "parti without evaluate.prompts.images has no FD"),
        ({"prompts": {"protocol": "parti", "images": "x"}, "clip_score": True}, "parti has no images of its prompts"),
        ({"prompts": {"protocol": "file", "path": "a.txt"}, "clip_score": True}, "and a.txt is not there; it comes"),
    ],
)
def test_prompts_that_make_no_table_are_one_line(text_values: dict[str, Any], evaluate: Any, said: str) -> None:
    with pytest.raises(UserError) as error:
        graph_of(text_values, **evaluate)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"evaluate": {"prompts": {"seed": 1}}}, "evaluate.prompts: family ddpm takes no prompts; leave it out"),
        ({"evaluate": {"clip_score": True}}, "evaluate.clip_score: family ddpm takes no prompts; leave it out"),
        ({"merge": {"sampler": {"guidance_scale": 3}}}, "merge.sampler.guidance_scale: family ddpm takes no prompts"),
    ],
)
def test_a_model_without_prompts_refuses_them(pico_values: dict[str, Any], section: Any, said: str) -> None:
    for name, values in section.items():
        pico_values[name] |= values
    with pytest.raises(UserError) as error:
        Graph(parse(pico_values, where="pico"))
    assert said in str(error.value)


def test_an_unconditional_recipe_has_the_keys_that_it_had(pico_recipe: Recipe) -> None:
    graph = Graph(pico_recipe)
    covered = next(iter(graph.of_stage("sample"))).key
    assert set(covered.settings) == {"sampler", "num_images"}
    assert set(covered.inputs) == {"base", "model 0"}
    assert graph.clip is None


@pytest.mark.parametrize(("size", "told"), [(8, 8), (16, None), (64, None)])
def test_serving_is_measured_with_no_more_images_than_are_sampled_at_once(
    text_values: dict[str, Any], size: int, told: int | None
) -> None:
    graph = Graph(parse(text_values | {"runtime": {"sample_batch_size": size}}, where="text"))
    assert graph.cost.key.settings.get("batch") == told
    assert graph.served_batch == min(size, 16)


@pytest.mark.parametrize("offset", [0, 1])  # the stock pipeline sets 1 in any case
def test_steps_that_begin_beyond_the_timesteps_are_refused_before_anything_runs(
    text_values: dict[str, Any], tmp_path: Path, offset: int
) -> None:
    folder = tiny.stable_diffusion(tmp_path / "pipeline")
    file = folder / "scheduler" / "scheduler_config.json"
    schedule = json.loads(file.read_text())
    file.write_text(json.dumps(schedule | {"steps_offset": offset}))
    text_values["model"]["pretrained"] = str(folder)
    total = schedule["num_train_timesteps"]
    listed = [{"name": "DDPMScheduler", "num_inference_steps": total}, {"num_inference_steps": 2}]
    wanted = (
        f": {total} steps of DDPMScheduler begin beyond the model's {total} timesteps, since its scheduler has "
        f"steps_offset 1; take at most {total - 1} steps, or timestep_spacing=trailing"
    )
    for key, changes in (
        ("evaluate.samplers.0", {"evaluate": {"samplers": listed}}),
        ("merge.sampler", {"merge": {"sampler": listed[0]}}),
        ("analyze.sampler", {"analyze": {"figures": ["trajectory"], "sampler": listed[0]}}),
    ):
        given = {**text_values, **{name: {**text_values[name], **more} for name, more in changes.items()}}
        with pytest.raises(UserError) as error:
            Graph(parse(given, where="text"))
        assert str(error.value) == key + wanted
    for change in ({"num_inference_steps": total - 1}, {"timestep_spacing": "trailing"}):
        graph_of(text_values, samplers=[{**listed[0], **change}, listed[1]])


# sizes


def test_images_are_reduced_and_never_enlarged() -> None:
    images = np.arange(2 * 8 * 6 * 3, dtype=np.uint8).reshape(2, 8, 6, 3)
    assert reduced_to(images, None) is images
    assert reduced_to(images, 6) is images
    assert size_at((8, 6), 3) == (4, 3)
    grey = np.full((1, 8, 8, 1), 7, np.uint8)
    assert np.array_equal(reduced_to(grey, 4), np.full((1, 4, 4, 1), 7))


def test_reference_images_are_squeezed_or_cut(tmp_path: Path) -> None:
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, :2] = 200  # on the left of what a cut leaves
    Image.fromarray(pixels).save(tmp_path / "a.png")
    cut = next(reference_batches([tmp_path / "a.png"], (3, 4, 4), "cropped"))
    squeezed = next(reference_batches([tmp_path / "a.png"], (1, 4, 4), "squeezed"))
    assert cut.shape == (1, 4, 4, 3)
    assert cut.max() == 0
    assert squeezed.shape == (1, 4, 4, 1)
    assert squeezed[0, :, 0].min() > 100
    write(tmp_path / "b.png", "no image")
    with pytest.raises(UserError, match=r"evaluate.prompts.images: .*b.png cannot be read"):
        list(reference_batches([tmp_path / "b.png"], (3, 4, 4), "cropped"))
    assert protocols.reference_files(tmp_path) == [tmp_path / "a.png", tmp_path / "b.png"]


# deme sample


def test_prompts_of_the_command_are_a_text_or_a_file(tmp_path: Path, text_pipeline: Path) -> None:
    file = write(tmp_path / "a.txt", "3\n5\n")
    assert given_prompts("two cats.", "flux") == ["two cats."]
    assert given_prompts(str(file), "flux") == ["3", "5"]
    assert given_prompts(str(file), "dit") == [3, 5]
    assert by_seed(["a", "b", "c"], [4, 0, 2]) == ["b", "a", "c"]
    for text, family, said in [
        ("a cat", "ddpm", "--prompts a cat: family ddpm takes no prompts; leave it out"),
        ("none.txt", "flux", "--prompts none.txt: there is no such file"),
        ("a cat", "dit", "--prompts a cat: 'a cat' is no class of family dit; numbers are, as 207"),
    ]:
        with pytest.raises(UserError) as error:
            given_prompts(text, family)
        assert str(error.value) == said
    assert family_of(text_pipeline) == "stable_diffusion"


def test_a_folder_of_images_tells_what_each_was_asked_for_by(tmp_path: Path) -> None:
    folder = ImageFolder(tmp_path, "png", {"model": "merged"})
    folder.begin([3, 1], ["three", "one"])
    folder.begin([3, 7], ["three", "seven"])
    told = json.loads((tmp_path / "protocol.json").read_text())
    assert told["prompts"] == {"1": "one", "3": "three", "7": "seven"}
    folder.write([1], np.zeros((1, 4, 4, 1), np.uint8))
    with pytest.raises(UserError, match='the image of seed 1 is there, asked for by "one", here by "two"'):
        folder.begin([1], ["two"])


@pytest.mark.parametrize("format", ["png", "npy"])
def test_images_that_are_there_keep_the_prompts_that_they_were_asked_for_by(tmp_path: Path, format: Any) -> None:
    folder = ImageFolder(tmp_path, format, {"model": "merged"})
    folder.begin([3, 1], ["three", "one"])
    folder.begin([3, 1], ["three", "two"])  # none is there yet
    assert json.loads((tmp_path / "protocol.json").read_text())["prompts"] == {"1": "two", "3": "three"}
    folder.copy([3, 1], np.zeros((2, 4, 4, 1), np.uint8))
    for check in (folder.check, folder.begin):
        with pytest.raises(UserError, match='the image of seed 1 is there, asked for by "two", here by "one"'):
            check([3, 1], ["three", "one"])
    folder.begin([3, 1], ["three", "two"])
