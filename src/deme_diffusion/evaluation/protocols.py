"""Which prompts a table's images are made from, and which real images they are compared with: by name. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deme_diffusion.config import PromptSettings
from deme_diffusion.data.contents import IMAGES
from deme_diffusion.errors import UserError
from deme_diffusion.evaluation.prompts import Group, captions_of_coco, class_names, listed, parti_prompts
from deme_diffusion.files import visible_files
from deme_diffusion.rng import generator

KEY, IMAGES_KEY = "evaluate.prompts.path", "evaluate.prompts.images"
Fit = Literal["squeezed", "cropped"]
"""How a reference image of another shape becomes a square: its sides scaled each for itself, or its centre kept."""


@dataclass(frozen=True)
class Protocol:
    """Where prompts and reference images come from, and how images are compared.

    `side`: shorter side that generated and reference images are reduced to; None keeps that of the model. `rounds`:
    prompts are asked for again once all were, as classes are. `shuffled`: the order of the images is the seed's, not
    the file's.
    """

    name: str
    file: str
    source: str
    images: str = ""
    side: int | None = None
    fit: Fit = "cropped"
    rounds: bool = False
    shuffled: bool = True
    about: str = ""


PROTOCOLS = {
    "coco30k": Protocol(
        "coco30k",
        "captions_val2014.json (or a list of prompts: .csv, as BK-SDM's metadata.csv, .txt, .jsonl, .tsv)",
        "http://images.cocodataset.org/annotations/annotations_trainval2014.zip",
        images="the folder val2014 of http://images.cocodataset.org/zips/val2014.zip",
        side=256,
        fit="squeezed",
        about="a caption of each of as many images of COCO val2014 (or BK-SDM's own 30,000 prompts, its "
        "metadata.csv), compared with all of val2014, all as 256x256 "
        "(Kim et al. 2023, BK-SDM, but for its JPEG files)",
    ),
    "imagenet1k": Protocol(
        "imagenet1k",
        "a text file with a class name a line, in the order of the classes",
        "https://raw.githubusercontent.com/pytorch/hub/master/imagenet_classes.txt",
        images="the validation images of ILSVRC2012, from https://image-net.org/download-images",
        side=256,
        rounds=True,
        about="every class of ImageNet as often, as 'a photo of a NAME', compared at 256x256",
    ),
    "parti": Protocol(
        "parti",
        "PartiPrompts.tsv",
        "https://raw.githubusercontent.com/google-research/parti/main/PartiPrompts.tsv",
        about="PartiPrompts (Yu et al. 2022); it has no images, so there is no FD",
    ),
    "file": Protocol(
        "file",
        "a .txt (a prompt a line), .csv, .jsonl or .tsv (a column prompt, text or caption)",
        "whatever prompts you have",
        shuffled=False,
        about="the prompts of a file",
    ),
}


@dataclass(frozen=True)
class Chosen:
    """A prompt for each image: its text, its place in the file (a class's number), its category where it has one."""

    texts: list[str]
    places: list[int]
    categories: list[str]


def protocol_of(settings: PromptSettings) -> Protocol | None:
    """None: the captions or classes of the report split."""
    return PROTOCOLS.get(settings.protocol)


def missing_file(settings: PromptSettings) -> str | None:
    """What to say of a protocol's prompts that are not there; None where they are."""
    protocol = PROTOCOLS[settings.protocol]
    path = None if settings.path is None else Path(settings.path).expanduser()
    if path is not None and path.is_file():
        return None
    found = "none is given" if path is None else f"{path} is {'a folder' if path.is_dir() else 'not there'}"
    return f"{KEY}: {protocol.name} needs {protocol.file}, and {found}; it comes from {protocol.source}"


def missing_images(settings: PromptSettings) -> str | None:
    """What to say of reference images that are named and not there; None where they are, or none are named."""
    protocol = PROTOCOLS[settings.protocol]
    if settings.images is None or reference_files(Path(settings.images).expanduser()):
        return None
    folder = Path(settings.images).expanduser()
    found = "holds no images" if folder.is_dir() else "is no folder"
    return f"{IMAGES_KEY}: {folder} {found}{f'; take {protocol.images}' if protocol.images else ''}"


def reference_files(folder: Path) -> list[Path]:
    """The images in a folder and its folders, by name; none where it is no folder."""
    return [file for file in visible_files(folder) if file.suffix.lower() in IMAGES] if folder.is_dir() else []


def read(settings: PromptSettings) -> list[Group]:
    """What a protocol's file asks for. Raises UserError where it is missing, in another encoding, or holds nothing."""
    if missing := missing_file(settings):
        raise UserError(missing)
    assert settings.path is not None, "or it would be missing"
    readers = {"coco30k": captions_of_coco, "imagenet1k": class_names, "parti": parti_prompts, "file": listed}
    groups = readers[settings.protocol](Path(settings.path).expanduser(), KEY)
    if not groups:
        raise UserError(f"{KEY}: {settings.path} holds no prompts; {PROTOCOLS[settings.protocol].file} is expected")
    return groups


def chosen(settings: PromptSettings, groups: Sequence[Group], count: int) -> Chosen:
    """A prompt for each of `count` images: a choice by the seed where there are more, of a group one by the seed.

    Raises UserError where there are fewer, and the protocol does not go round.
    """
    protocol, there = PROTOCOLS[settings.protocol], len(groups)
    if count > there and not protocol.rounds:
        raise UserError(
            f"{KEY}: {settings.path} has {there:,} prompts for {count:,} images; "
            f"set evaluate.num_images={there} or less"
        )
    order = [int(i) for i in generator(settings.seed, "prompts", protocol.name).permutation(there)]
    picked = (order * -(-count // there))[:count]
    if not protocol.shuffled:
        picked.sort()
    draws = generator(settings.seed, "captions", protocol.name).random(there)  # by the prompt, whatever was picked
    texts = [groups[i].texts[int(draws[i] * len(groups[i].texts))] for i in picked]
    return Chosen(texts, picked, [groups[i].category for i in picked])
