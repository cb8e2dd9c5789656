"""The model card of the merged model: a README.md as model hubs read it."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from deme_diffusion.config import Recipe
from deme_diffusion.division import names_of
from deme_diffusion.report.card_front import HUB_NAME, front_matter
from deme_diffusion.report.card_results import folded, results
from deme_diffusion.report.tables import escape_markdown, paragraph
from deme_diffusion.report.verdict import verdict
from deme_diffusion.report.words import grouped, seeds_said, weights_said

MOST_PATTERNS = 12
DEMONSTRATION = (
    "This is a demonstration of the mechanism on a small data set; its figures are no evidence about the method."
)
LIMITS = (
    "It inherits the limits, biases and licence terms of its base model and of the images it was finetuned on; this"
    " card states no licence of its own."
)
PACKAGE = "deme-diffusion"
CITATION = """@inproceedings{ma2025decouple,
  title     = {Decouple-Then-Merge: Finetune Diffusion Models as Multi-Task Learning},
  author    = {Ma, Qianli and Ning, Xuefei and Liu, Dongrui and Niu, Li and Zhang, Linfeng},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2025},
  note      = {arXiv:2410.06664}
}"""


def model_card(run: Mapping[str, Any], *, samples: str | None = None) -> str:
    """A README.md with YAML front matter; `run` is run.json, and `base_model_hub` names the base on the hub, if there.

    `samples` is the path of a picture of samples, relative to the card.
    """
    sections = [
        front_matter(run),
        _what(run),
        _warned(run),
        f"![Samples of the same seeds, before and after]({quote(samples)})" if samples else "",
        _section("Results", results(run)),
        _section("Merge weights", "\n\n".join(part for part in (_weights(run), _found(run), _merged(run)) if part)),
        _section("How it was made", _made(run)),
        _section("Limits", LIMITS),
        _section("Use", f"{escape_markdown(needs(run))}\n\n" + fenced(loading_lines(run), "python")),
        _section("Citation", fenced(CITATION, "bibtex")),
    ]
    return "\n\n".join(section.strip() for section in sections if section) + "\n"


def loading_lines(run: Mapping[str, Any]) -> str:
    """Lines of Python that load the merged model and sample (`sample_call` overrides the last).

    Projections lie in a folder, and so a model on the hub that has some is fetched into one.
    """
    if run.get("lora"):
        return _lora_lines(run)
    named = str(run.get("merged_path", "merged"))
    where, extra = json.dumps(named, ensure_ascii=False), run.get("projection")
    lines = ["from diffusers import DiffusionPipeline"]
    if extra and HUB_NAME.fullmatch(named) and not Path(named).is_dir():
        lines += ["from huggingface_hub import snapshot_download", f"folder = snapshot_download({where})"]
        where = "folder"
    lines.append(f"pipeline = DiffusionPipeline.from_pretrained({where})")
    if extra:
        lines += ["from deme_diffusion import attach_projection",
                  f"attach_projection(pipeline.{extra['component']}, {where})"]  # fmt: skip
    return "\n".join([*lines, _sampled(run)])


def _lora_lines(run: Mapping[str, Any]) -> str:
    base = run.get("base_model_hub") or run.get("base_path") or run.get("base_model") or "base"
    base, merged = (json.dumps(str(name), ensure_ascii=False) for name in (base, run.get("merged_path", "merged")))
    lines = ["from diffusers import DiffusionPipeline", f"pipeline = DiffusionPipeline.from_pretrained({base})"]
    return "\n".join([*lines, f"pipeline.load_lora_weights({merged})", _sampled(run)])


def _sampled(run: Mapping[str, Any]) -> str:
    return f"images = {run.get('sample_call', 'pipeline(batch_size=16).images')}"


def needs(run: Mapping[str, Any]) -> str:
    """What the merged model needs to be loaded; `projection` is the extra module's component and places, if any."""
    extra = run.get("projection")
    if run.get("lora"):
        return "Stock diffusers loads it onto its base, which it needs beside it."
    if not extra:
        return "Stock diffusers loads it; nothing else is needed."
    return (
        f"Stock diffusers loads it, but without its extra module: {_projections(extra['places'])}, which fold into no"
        f" weight and lie in {extra['component']}/projection.safetensors. Without them it is another model than the one"
        " described here; these lines load all of it."
    )


def _projections(names: Sequence[str]) -> str:
    """Those of a merged model in words; `PLACE|spatial` is a spatial one."""
    spatial = [place for place, _, kind in (name.partition("|") for name in names) if kind]
    channel = [name for name in names if "|" not in name]
    kinds = {"channel-wise projections": channel, "spatial projections (depthwise 3x3 convolutions)": spatial}
    return " and ".join(f"the {kind} after {', '.join(places)}" for kind, places in kinds.items() if places)


def fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _what(run: Mapping[str, Any]) -> str:
    what = (
        f"A diffusion model of the base's {_compared(run)}: copies of the base were finetuned as experts on"
        " subsets of the timesteps, and their task vectors merged into one set of weights (decouple-then-merge)."
    )
    if run.get("lora"):
        what = (
            "A LoRA for the base: several were trained as experts on subsets of the timesteps, and merged into one"
            " (decouple-then-merge)."
        )
    title = f"# {escape_markdown(str(run.get('recipe', 'merged model')))}"
    return "\n\n".join(part for part in (title, paragraph(str(run.get("description") or "")), what) if part)


def _warned(run: Mapping[str, Any]) -> str:
    """What the figures are no evidence of, and the verdict, as a quotation."""
    evidence = paragraph(verdict(run["table"]).sentence) if run.get("table") else ""
    parts = [part for part in (DEMONSTRATION if run.get("demonstration") else "", evidence) if part]
    return "\n>\n".join(f"> {part}" for part in parts)


def _compared(run: Mapping[str, Any]) -> str:
    return "architecture with small projections beside it" if run.get("projection") else "architecture, size and cost"


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _weights(run: Mapping[str, Any]) -> str:
    weights: Mapping[str, Sequence[float]] = run.get("weights") or {}
    if not weights:
        return ""
    names = names_of((run.get("division") or {}).get("subsets", []))
    width = max(map(len, weights.values()))
    names = names if len(names) == width else [f"w_{i}" for i in range(width)]
    lines = ["| model | " + " | ".join(names) + " |", "| --- |" + " ---: |" * width]
    for label, values in weights.items():
        lines.append(f"| {escape_markdown(label)} | " + " | ".join(f"{value:.4g}" for value in values) + " |")
    return "\n".join(lines)


def _found(run: Mapping[str, Any]) -> str:
    """How the weights were found, what the merged model then is, and which gain of the search was noise."""
    search, found = run.get("search"), []
    if search:
        best = f", the best: {search['source']}" if search.get("source") else ""
        method, objective = str(search["method"]).replace("_", " "), grouped(search["objective"])
        found = [f"Found by {method} on {objective}, {len(search['trials']):,} trials{best}."]
    seed = f"Of {said}." if (said := seeds_said(run)) else ""
    return "\n\n".join(paragraph(line) for line in (*found, *weights_said(run), seed) if line)


def method_said(run: Mapping[str, Any]) -> str:
    """The merge method with its options and source, in a sentence; '' for Eq. 8, which needs no word."""
    merge = run.get("merge") or {}
    if merge.get("method", "task_arithmetic") == "task_arithmetic":
        return ""
    options = ", ".join(f"{name} {value}" for name, value in merge["options"].items() if value is not None)
    return f"Merged by {merge['method']}{f' ({options})' if options else ''}: {merge['citation']}."


def patterns(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a merge does by pattern: the pattern, and its weights or whose tensors are taken; the last match counts."""
    weights = (run.get("merge") or {}).get("weights") or {}
    rules = [(key, ", ".join(f"{w:.4g}" for w in values)) for key, values in weights.get("rules", {}).items()]
    kept = {key: "the base's" if who == "base" else f"expert {who}'s" for key, who in weights.get("keep", {}).items()}
    return [*rules, *kept.items()]


def _merged(run: Mapping[str, Any]) -> str:
    """Method, and weights by pattern: of many only how many, since `merge.json` lists them."""
    listed = patterns(run)
    if len(listed) > MOST_PATTERNS:
        table = f"{len(listed):,} groups of parameters have weights of their own: merge.json lists them."
    elif listed:
        rows = [f"| {escape_markdown(pattern)} | {said} |" for pattern, said in listed]
        table = "\n".join(["| parameters | weights |", "| --- | --- |", *rows])
    else:
        table = ""
    return "\n\n".join(part for part in (escape_markdown(method_said(run)), table) if part)


def expert_card(label: str, base: str, component: str, kind: str, *, projected: bool, averaged: bool) -> str:
    """A README.md of an expert's artefact: what lies there, and how it is loaded."""
    extra = (
        f"It was trained with projections, which lie in {component}/projection.safetensors and which stock"
        " diffusers does not read: without them it is another model. `attach_projection` adds them."
    )
    lines = [f"from diffusers import {kind}", f'{component} = {kind}.from_pretrained("{component}")']
    if projected:
        lines += ["from deme_diffusion import attach_projection", f'attach_projection({component}, "{component}")']
    kept = "The weights are the average over the training (EMA); `raw` holds the last ones themselves."
    parts = [
        f"# {escape_markdown(label)}",
        f"One training of the {component} of {escape_markdown(base)}: a component, and no pipeline. The base's pipeline"
        " runs it in place of its own.",
        kept if averaged else "",
        extra if projected else "",
        fenced("\n".join(lines), "python"),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _made(run: Mapping[str, Any]) -> str:
    """Package, command, and the recipe: what differs from the defaults, and folded all of it."""
    command, recipe = run.get("command"), run.get("recipe_yaml")
    if not command and not recipe:
        return ""
    by = " by" if command else "."
    parts = [f"Made with the Python package `{PACKAGE}`{_version()}{by}"]
    parts += [fenced(_portable(command), "sh")] if command else []
    if recipe:
        some = _changed(recipe)
        lead = "The recipe's settings that differ from the defaults:"
        parts += [lead, fenced(_portable_recipe(some), "yaml")] if some else []
        parts.append(folded("The recipe with every setting", fenced(_portable_recipe(recipe), "yaml")))
    return "\n\n".join(parts)


def _version() -> str:
    try:
        return f" {metadata.version(PACKAGE)}"
    except metadata.PackageNotFoundError:  # a source tree that is not installed
        return ""


def _changed(text: str) -> str:
    """The recipe's settings that differ from their defaults, as YAML; '' of what is no recipe of this version."""
    try:
        recipe = Recipe.model_validate(yaml.safe_load(text))
    except (yaml.YAMLError, ValueError):  # pydantic's errors are such
        return ""
    return str(yaml.safe_dump(recipe.changed(), sort_keys=False, allow_unicode=True, width=100))


def _portable(command: str) -> str:
    """A command without the folders of this machine, which are nobody else's business."""
    try:
        words = [_elsewhere(word) for word in shlex.split(command)]
    except ValueError:  # quotes that are never closed
        return command
    return command if words == shlex.split(command) else shlex.join(words)


def _portable_recipe(text: str) -> str:
    """The same of a recipe; as it stands where it holds no such folder."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    told = _without_folders(values)
    return text if told == values else str(yaml.safe_dump(told, sort_keys=False, allow_unicode=True, width=100))


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    return _elsewhere(value) if isinstance(value, str) else value


def _elsewhere(word: str) -> str:
    """`.../name` of an absolute path, also after `key=`."""
    found = re.fullmatch(r"((?:[\w.-]+=)?)(?:[/~]|[A-Za-z]:[\\/]|file:/).*?([^/\\]*)[/\\]*", word, re.DOTALL)
    return f"{found[1]}.../{found[2]}" if found else word
