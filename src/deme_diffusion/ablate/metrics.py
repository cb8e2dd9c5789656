"""The metrics that plans name, and the table's own that they stand for. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable

from deme_diffusion.ablate.arms import Metric
from deme_diffusion.ablate.text import normalised
from deme_diffusion.config import Recipe

DEFAULT = Metric("", ("FD",), "no metric is named, so FD")
_FD = (
    r"(?<![\w-])(?<!spatial )(?<!clip )(?<!conditional )(?:clean[ -]?)?fi?ds?(?:[ _-]?\d+k?)?"
    r"(?!\w|@|-(?!score)[a-z]| ?\(?(?:clip|dino))|\bfrechet (?:inception )?distance"
)
"""Of the recipe's features; sFID, FID-CLIP and FVD are of others."""
_AT = r"(?! ?@| at\b)"
"""Recall@k is of retrieval."""
_COLUMNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"load(?:ing)?[ -]time|model load|time to load|start[ -]?up|cold start", ("load time (ms)",)),
    (_FD, ("FD",)),
    (r"\bkid\b|kernel inception", ("KID",)),
    (r"inception score|\binception-score", ("IS",)),
    (rf"(?<!average )(?<!mixed )\bprecision\b{_AT}", ("precision",)),
    (rf"(?<!retrieval )\brecall\b{_AT}", ("recall",)),
    (r"(?<!log )(?<!probability )\bdensity", ("density",)),
    (r"\bcoverage", ("coverage",)),
    (r"(?<!perceptual )(?<!adversarial )(?<!lpips )\bloss(?:es)?\b|\bmse\b", ("loss",)),
    (r"disk|storage|checkpoint size|file size|model size|\bsize on", ("disk (MB)",)),
    (r"\bparameter|model size|\bparams?\b|number of weights", ("parameters",)),
    (r"memory|vram|\bram\b|footprint", ("peak memory (MB)",)),
    (
        r"latency|inference|throughput|sampling (?:time|speed)|speed|runtime|generation time|wall[ -]?(?:clock|time)|"
        r"images? per sec|"
        r"images?/s|(?:time|cost) per image",
        ("latency (ms)",),
    ),
    (
        r"efficien|computational (?:cost|overhead)|resource|deployment cost|serving cost",
        ("parameters", "disk (MB)", "peak memory (MB)", "latency (ms)"),
    ),
)
_TRAINING = re.compile(
    r"(?:train|finetun|converg|search|compute)\w*[ -](?:\w+ )?"
    r"(?:time|cost|hour|budget|speed|step|efficien|overhead|iteration)"
    r"|convergence|gpu hours"
)
_CLIP = re.compile(
    r"(?<!fid[ -])(?<!fd[ -])\bclip(?!\w*[ -]?fi?d)"
    r"|text[ -]?(?:image|to[ -]image) (?:align|similar|consist)|prompt (?:align|adher|fidel|follow)"
)
"""CLIP-FID is FD in CLIP's space."""
_ABSENT: tuple[tuple[str, str], ...] = (
    (r"fid|\bfd\b|fvd|frechet", "FD here is of the recipe's own features, and this is of others"),
    (r"flops|\bmacs\b", "operations are not counted; latency is nearest"),
    (r"vqa|tifa|geneval|dpg|t2i-?compbench", "no such judge is at hand; the CLIP score is nearest"),
    (
        r"human|user study|preference|pickscore|imagereward|\bhps|aesthetic|visual|qualitative|mos\b",
        "no judge of images is at hand; the page shows samples of the same seeds side by side",
    ),
    (
        r"lpips|ssim|psnr|perceptual|reconstruction",
        "it compares pairs of images, and there is no original of a generated one",
    ),
    (r"nll|likelihood|bits per dim|\bbpd\b|elbo", "likelihoods are not measured; the fixed-noise loss is nearest"),
    (r"gradient|conflict|cosine similarity", "gradients are compared by the similarity stage, not for each arm"),
    (r"diversity|vendi", "not measured by itself; recall and coverage tell of it"),
)


def metrics_of(asked: Iterable[str], recipe: Recipe | None = None) -> tuple[Metric, ...]:
    """A metric for each that is asked; FD where none is."""
    return tuple(metric_of(text, recipe) for text in asked) or (DEFAULT,)


def metric_of(asked: str, recipe: Recipe | None = None) -> Metric:
    """The table's metrics that a name stands for, or the reason why there is none."""
    text = normalised(asked)
    if _TRAINING.search(text) and not re.search(r"loss|inference|sampling", text):
        return Metric(asked, (), "not applicable: the table tells steps and seconds of training for each arm anyway")
    columns = tuple(dict.fromkeys(name for pattern, names in _COLUMNS if re.search(pattern, text) for name in names))
    if re.search(r"(?<![A-Za-z])IS(?![A-Za-z])", asked):
        columns = (*columns, "IS")
    clip = _CLIP.search(asked.casefold())
    if clip and recipe is not None and recipe.evaluate.clip_score:
        columns = (*columns, "CLIP")
    for pattern, reason in _ABSENT:
        if re.search(pattern, text) and not columns:
            return Metric(asked, (), f"not applicable: {reason}")
    if columns:
        return Metric(asked, columns)
    if clip:
        return Metric(asked, (), f"not applicable: {_no_clip_score(recipe)}")
    return Metric(asked, (), "not applicable: this is not among the metrics of the table")


def _no_clip_score(recipe: Recipe | None) -> str:
    if recipe is None or recipe.model.takes == "nothing":
        return "the model takes no text"
    needs = ", with evaluate.prompts.protocol=imagenet1k" if recipe.model.takes == "class" else ""
    return f"the recipe does not measure it; set evaluate.clip_score=true{needs} (and clip.pretrained: whose CLIP)"
