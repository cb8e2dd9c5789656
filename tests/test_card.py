"""The model card as the hub reads it: front matter, results, and what it does not claim."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from deme_diffusion.recipes import defaults, to_yaml
from deme_diffusion.report.card import loading_lines, model_card
from deme_diffusion.report.tables import paragraph
from pages import content

HUB = "model: {pretrained: google/ddpm-church-256}\ndata: {source: hub, path: owner/churches}\n"


@pytest.fixture
def run(tmp_path: Path) -> dict[str, Any]:
    made = content(tmp_path, ())
    return {**made, "recipe": "church", "base_model_hub": "google/ddpm-church-256", "recipe_yaml": HUB}


def test_the_hub_reads_what_the_model_is_and_what_was_measured(run: dict[str, Any]) -> None:
    card = ModelCard(model_card(run))
    data = card.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("diffusers", "unconditional-image-generation")
    assert (data["base_model"], data["base_model_relation"]) == ("google/ddpm-church-256", "finetune")
    assert data["datasets"] == ["owner/churches"] and "decouple-then-merge" in data["tags"]
    assert card.data.model_name == "church"
    results = {one.metric_name: one for one in card.data.eval_results}
    fd = results["FD(digits-cnn) DDIM-20"]
    assert (fd.metric_type, fd.metric_value, fd.dataset_split) == ("frechet-distance", 5.9, "report")
    assert (fd.dataset_type, fd.metric_args) == ("owner/churches", {"spread": 0.1, "n": 2000})
    assert results["loss [0,6)"].metric_type == "loss" and results["recall DDPM-50"].metric_type == "recall"


def test_only_the_inception_network_s_distance_is_called_fid(run: dict[str, Any]) -> None:
    merged = next(row for row in run["table"] if row["model"] == "merged")
    some = merged["metrics"]["FD(digits-cnn) DDIM-20"]
    merged["metrics"] = {"FD(inception) DDIM-20": some, "parameters": some, "KID(x) DDIM-20": {**some, "mean": None}}
    results = ModelCard(model_card(run)).data.eval_results
    assert [(one.metric_type, one.metric_name) for one in results] == [("fid", "FD(inception) DDIM-20")]


def test_the_card_claims_no_licence_and_no_hub_base_that_is_none(run: dict[str, Any]) -> None:
    card = model_card({**run, "base_model_hub": None, "base_model": "data/mine", "recipe_yaml": "data: [broken"})
    front = yaml.safe_load(card.split("---\n")[1])
    assert "license" not in front and "# license: set it before you publish" in card
    assert not {"base_model", "base_model_relation", "datasets"} & set(front)
    assert "this card states no licence of its own" in " ".join(card.split())


def test_weights_say_how_they_were_found_and_what_was_noise(run: dict[str, Any]) -> None:
    lost = "the search's gain <b> was noise"
    search = {**run["search"], "source": "one-hot 1", "objective": "FD, search split"}
    card = model_card({**run, "search": search, "lost_gains": [lost]})
    assert "Found by grid on FD, search split, 14 trials, the best: one-hot 1." in card
    assert "The search's gain &lt;b> was noise." in card
    lines = ["merge weights: 0, 1, by one-hot 1: merged is expert 1 alone", lost]
    more = model_card({**run, "search": search, "lost_gains": [lost], "weights_found": lines, "seeds": [3, 4]})
    assert "Merge weights: 0, 1, by one-hot 1: merged is expert 1 alone." in more
    assert more.count("was noise") == 1 and "Of training seed 3; the table is over 3, 4." in more


LIKE_MARKDOWN = ["# a", "- a", "+ a", "* a", "1. a", "12) a", "> a", "~~~", "```sh", "---", "===", "`a`", "~~a~~"]
LIKE_MARKDOWN += ["_a_ b_c", "[a]: b", "[a](b)", "![a](b)", "&lt;", "<b>", "a *b*", "| a |", "    a", "a  \nb", "\\* a"]


@pytest.mark.parametrize("text", LIKE_MARKDOWN)
def test_what_looks_like_markdown_stays_text(run: dict[str, Any], text: str) -> None:
    markdown_it = pytest.importorskip("markdown_it")
    parsed = markdown_it.MarkdownIt("gfm-like", {"linkify": False})
    said = paragraph(text)
    tokens = parsed.parse(f"before\n\n{said}\n\nafter")
    assert [token.type for token in tokens].count("paragraph_open") == 3 and len(tokens) == 9
    (inline,) = [token.children for token in tokens if token.type == "inline"][1:2]
    assert {child.type for child in inline} <= {"text", "text_special"}
    assert "".join(child.content for child in inline) == " ".join(text.split())
    assert f"\n\n{said}\n\n" in model_card({**run, "description": text})


def test_no_folder_of_this_machine_is_on_the_card(run: dict[str, Any]) -> None:
    recipe = "name: x\ndata: {path: /home/me/my images, kinds: [~/a, b/c]}\nurl: https://a.b/c\n"
    card = model_card({**run, "recipe_yaml": recipe, "command": "deme run r data.path='/home/me/my images' --out x"})
    assert "/home/me" not in card and "~/a" not in card
    assert "path: '.../my images'" in card and "- b/c" in card and "https://a.b/c" in card
    assert "'data.path=.../my images' --out x" in card
    assert HUB in model_card(run), "what has none is as it was written"


def test_a_model_with_projections_is_loaded_from_a_folder_that_it_is_fetched_into() -> None:
    extra = {"projection": {"component": "unet", "places": ["mid"]}, "merged_path": "OWNER/NAME"}
    lines = loading_lines(extra).splitlines()
    assert lines[1:6] == [
        "from huggingface_hub import snapshot_download",
        'folder = snapshot_download("OWNER/NAME")',
        "pipeline = DiffusionPipeline.from_pretrained(folder)",
        "from deme_diffusion import attach_projection",
        "attach_projection(pipeline.unet, folder)",
    ]
    assert "snapshot" not in loading_lines({**extra, "merged_path": "/runs/x/merged"})
    assert "snapshot" not in loading_lines({"merged_path": "OWNER/NAME"})


def test_a_picture_of_samples_is_shown_from_beside_the_card(run: dict[str, Any]) -> None:
    assert "![Samples of the same seeds, before and after](my%20samples.png)" in model_card(
        run, samples="my samples.png"
    )
    assert "![" not in model_card(run)


def test_results_are_tables_by_kind_of_models_across(run: dict[str, Any]) -> None:
    card = model_card(run)
    quality, losses = card.partition("### Quality\n\n")[2].split("### Losses\n\n")
    assert quality.startswith("|  | base | all-timesteps | ensemble | merged |")
    assert losses.splitlines()[2].startswith("| loss ↓ | 0.100 |") and "### Costs" not in card
    assert "- all-timesteps: the control: one model" in card
    head, _, rest = card.partition("## Results")
    assert "> This is a demonstration of the mechanism" in head and "demonstration of" not in rest


def test_measured_values_are_rounded_for_the_hub(run: dict[str, Any]) -> None:
    merged = next(row for row in run["table"] if row["model"] == "merged")
    merged["metrics"]["loss"].update(mean=1 / 3, spread=0.0001234567)
    results = {one.metric_name: one for one in ModelCard(model_card(run)).data.eval_results}
    assert results["loss"].metric_value == 0.333333 and results["loss"].metric_args["spread"] == 0.000123457


def test_settings_that_differ_from_the_defaults_are_shown_and_the_others_folded(run: dict[str, Any]) -> None:
    recipe = to_yaml(defaults(["name=mine", "decouple.num_ranges=2", "evaluate.num_images=500"]))
    text = model_card({**run, "recipe_yaml": recipe}).partition("## How it was made")[2].partition("## Limits")[0]
    shown, folded = text.split("<details>")
    values = yaml.safe_load(shown.partition("```yaml\n")[2].partition("```")[0])
    assert values["name"] == "mine" and values["decouple"] == {"num_ranges": 2}
    assert values["evaluate"] == {"num_images": 500} and recipe in folded
    assert "the Python package `deme-diffusion` 0." in shown
    assert "differ from" not in model_card({**run, "recipe_yaml": "names: x"}), "what is no recipe is only folded"


def test_hostile_names_stay_text(run: dict[str, Any], tmp_path: Path) -> None:
    card = model_card({**content(tmp_path, ()), "recipe": "a: b\n---\n<script>"})
    assert ModelCard(card).data.model_name == "a: b\n---\n<script>"
