"""The images of a recipe: how many, which cannot be read, their sizes and modes, and whether they fit the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deme_diffusion.data.captions import Counted, refusal, unlisted
from deme_diffusion.data.index import SUMMARY, Indexed, Summary, scan
from deme_diffusion.data.sources import Digits, Pixels
from deme_diffusion.data.table import Table
from deme_diffusion.doctor.finding import Finding
from deme_diffusion.errors import UserError
from deme_diffusion.pipeline import preflight
from deme_diffusion.pipeline.images import check_enough, check_fit
from deme_diffusion.pipeline.inputs import NO_SIZE, component_of
from deme_diffusion.pipeline.needs import model_cost
from deme_diffusion.pipeline.node import Node
from deme_diffusion.pipeline.run import Run
from deme_diffusion.weight_files import read_json

MOST_LISTED = 50
FEW = 1000


def findings(run: Run) -> Iterator[Finding]:
    """Looks at every image, unless the run's index is there already, or they would have to be downloaded."""
    settings = run.recipe.data
    if settings.source == "digits":
        digits = Digits()
        yield Finding("ok", "data", f"{len(digits)} embedded digits, 8x8 grey")
        yield from _suited(run, digits.pixels(0), 0, len(digits))
        if run.recipe.model.takes == "text":
            told = Counted()
            for i in range(len(digits)):
                told.add(i, digits.captions(i))
            yield _captioned(run, told.as_dict())
        return
    node = run.graph.data
    assert isinstance(node, Node), "all but the embedded images are indexed"
    if run.store.find(node.key) is not None:
        yield from _of_index(run, node)
    elif settings.source == "hub":
        yield Finding("warning", "data", f"{settings.path} is on the hub: its images are looked at when it is fetched")
    else:
        yield from _of_scan(run)


def _of_index(run: Run, node: Node) -> Iterator[Finding]:
    folder = run.store.folder(node.key)
    summary = read_json(folder / SUMMARY)
    yield Finding("ok", "data", f"{summary['images']:,} images, indexed already in {folder}")
    yield from _described(run, summary)
    if run.recipe.model.takes == "text":
        yield _captioned(run, summary["captions"])
    source = Indexed(run.recipe.data, folder, run.graph.source.commit)
    readable = [i for i, split in enumerate(source.split) if split >= 0]
    pixels = source.pixels(readable[0])
    yield from _fit(run, pixels.shape)
    yield from _suited(run, pixels, [source.label(i) for i in readable].count(None), len(readable))


def _of_scan(run: Run) -> Iterator[Finding]:
    settings, summary, unlabelled = run.recipe.data, Summary(), 0
    pixels: Pixels | None = None
    told, captioned = Counted(), run.recipe.model.takes == "text"
    left = unlisted(settings) if settings.source == "folder" else []
    for row in scan(Table(settings, captioned=captioned), settings):
        summary.add(row)
        if row.split is not None:
            told.add(row.index, row.captions)
        if row.pixels is not None:
            pixels = row.pixels if pixels is None else pixels
            unlabelled += row.label is None or (isinstance(row.label, int) and row.label < 0)
    broken = tuple(f"number {i}: {why}" for i, why in summary.corrupt[:MOST_LISTED])
    if more := len(summary.corrupt) - len(broken):
        broken += (f"and {more} more",)
    try:
        summary.check(settings)
    except UserError as error:
        yield Finding("problem", "data", str(error).partition("; deme doctor")[0], broken)
        return
    yield Finding("ok", "data", f"{summary.images:,} images in {settings.path}")
    if broken:
        share = len(summary.corrupt) / summary.images
        yield Finding("warning", "unreadable", f"{len(summary.corrupt)} images ({share:.2%}) would be skipped", broken)
    if left:
        said = f"{len(left):,} images have no line in metadata.jsonl, and would be left out"
        yield Finding("warning", "unlisted", said, tuple(left[:MOST_LISTED]))
    yield from _described(run, summary.as_dict())
    if captioned:
        yield _captioned(run, told.as_dict())
    yield from _fit(run, summary.shapes.most_common(1)[0][0])
    assert pixels is not None, "some can be read, or the summary is refused"
    yield from _suited(run, pixels, unlabelled, summary.images - len(summary.corrupt))


def _described(run: Run, summary: dict[str, Any]) -> Iterator[Finding]:
    sizes = ", ".join(f"{size} ({n:,})" for size, n in list(summary["sizes"].items())[:5])
    yield Finding("ok", "sizes", sizes + (", ..." if len(summary["sizes"]) > 5 else ""))
    yield Finding("ok", "modes", ", ".join(f"{mode} ({n:,})" for mode, n in summary["modes"].items()))
    splits = {name: summary["splits"].get(name, 0) for name in ("train", "search", "report")}
    said = ", ".join(f"{name} {n:,}" for name, n in splits.items())
    try:
        check_enough(splits, run.recipe.evaluate)
    except UserError as error:
        yield Finding("problem", "splits", f"{said}: {error}")
        return
    if min(splits["search"], splits["report"]) < FEW:
        yield Finding("warning", "splits", f"{said}: distances over fewer than {FEW:,} images are very rough")
    else:
        yield Finding("ok", "splits", said)


def _captioned(run: Run, told: dict[str, Any]) -> Finding:
    """How many captions there are, how long, and whether some images have none."""
    said = f"{told['captions']:,}, of which {told['distinct']:,} differ"
    if told["captions"]:
        said += f"; {told['mean_length']:g} characters on average, {told['longest']:,} at most"
    named = [f"number {i}" for i in told["first_missing"]]
    if refused := refusal(named, told["missing"], told["images"], run.recipe.data):
        return Finding("problem", "captions", refused.removeprefix("data: "))
    if told["missing"]:
        return Finding("warning", "captions", f"{said}; {told['missing']:,} images have none, and train without text")
    return Finding("ok", "captions", said)


def _fit(run: Run, pixels: tuple[int, ...]) -> Iterator[Finding]:
    """Compare an image (h, w, c) with what the model takes; a random crop is square already by then."""
    settings, wanted = run.recipe.data, _model_shape(run)
    if wanted is None:
        yield Finding("warning", "model", "not here yet: whether the images fit it is seen after the download")
        return
    height, width = (settings.resolution,) * 2 if settings.resolution else pixels[:2]
    try:
        check_fit((pixels[2], height, width), wanted, settings)
    except UserError as error:
        yield Finding("problem", "model", str(error).removeprefix("data: "))
        return
    yield Finding("ok", "model", f"takes {width}x{height} with {pixels[2]} channels, as the images are")


def _suited(run: Run, pixels: Pixels, unlabelled: int, images: int) -> Iterator[Finding]:
    """Whether a classifier can learn the images' labels; or the extractor that is given, asked, takes an image."""
    given = run.graph.extractor
    if isinstance(given, Node):
        problem = preflight.unlabelled(unlabelled, images, run.recipe.data)
        said = f"all {images:,} images have one, for the classifier to learn"
        yield Finding("problem", "labels", problem.removeprefix("data: ")) if problem else Finding("ok", "labels", said)
    elif given.path is None:
        yield Finding("warning", "extractor", "not here yet: whether it takes the images is seen after the download")
    else:
        try:
            extractor = preflight.try_extractor(given.path, run.recipe.extractor.kind, pixels[None])
        except UserError as error:
            yield Finding("problem", "extractor", str(error).removeprefix("extractor: "))
            return
        yield Finding("ok", "extractor", f"{given.label} takes the images: {extractor.dimension} features")


def _model_shape(run: Run) -> tuple[int, int, int] | None:
    """(c, h, w) of the base's images; None before it is downloaded."""
    base = run.graph.base
    if run.recipe.model.latent:
        cost = model_cost(run.graph)
        if cost is None or cost.encoders is None:
            return None
        channels, height, width = cost.encoders.image
        return channels, height, width
    if isinstance(base, Node):
        unet = run.recipe.pretrain.unet
        return unet.in_channels, unet.sample_size, unet.sample_size
    if base.path is None:
        return None
    config = read_json(component_of(base.path) / "config.json")
    size: Any = config.get("sample_size")
    if size is None:
        raise UserError(f"{component_of(base.path)}: {NO_SIZE}")
    height, width = size if isinstance(size, list) else (size, size)
    return int(config["in_channels"]), int(height), int(width)
