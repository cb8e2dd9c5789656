"""Rows of the parts table: the loss weighting and the optimisation of each expert."""

from __future__ import annotations

from collections.abc import Sequence

from deme_diffusion.ablate.rows import Change, Numeric, Part, Replacement, Variant
from deme_diffusion.ablate.table_division import ONE_MODEL, whole
from deme_diffusion.ablate.text import Number
from deme_diffusion.config import Recipe
from deme_diffusion.errors import UserError


def _steps(recipe: Recipe, number: Number) -> Change:
    total = number.of(recipe.decouple.budget)
    if number.each and number.kind == "plain":
        total *= recipe.decouple.num_ranges
    return {"decouple.total_steps": whole(Number(float(round(total))), "steps")}


def _share(recipe: Recipe, number: Number) -> Change:
    return _steps(recipe, Number(number.value, "factor") if number.kind == "percent" else number)


def _min_snr(recipe: Recipe, text: str, numbers: Sequence[Number]) -> list[Variant]:
    change: Change = {"decouple.loss_weighting": "min_snr"}
    gammas = [number.value for number in numbers if number.value > 0 and number.kind == "plain"]
    if len(gammas) < 2:
        return [("", {**change, **({"decouple.snr_gamma": gammas[0]} if gammas else {})})]
    return [(f"Min-SNR, gamma {gamma:g}", {**change, "decouple.snr_gamma": gamma}) for gamma in gammas]


def _rate(recipe: Recipe, number: Number) -> Change:
    rate = number.of(recipe.decouple.learning_rate)
    if rate > 1:
        raise UserError(f"a learning rate of {rate:g}? a rate is at most 1; a factor is said as 10x, or lr/10")
    return {"decouple.learning_rate": rate}


WEIGHTING = Part(
    name="loss weighting",
    description="the weight of each timestep's loss",
    path="decouple.loss_weighting",
    synonyms=(
        "loss weighting",
        "weight of timestep loss",
        "min snr",
        "snr loss weighting",
        "weights of the loss",
        "snr weight",
        "timestep weight",
        "snr loss",
        "P2",
        "training objective weight",
        "truncated snr",
        "min snr weight",
        "timestep weights",
        "constant weight of timesteps",
        "constant weight",
        "simple loss",
        "lsimple",
        "uniform timestep weights",
        "weights of timesteps in loss",
        "loss weighting by timestep",
        "min snr loss weighting",
    ),
    off={"decouple.loss_weighting": "none"},
    on={"decouple.loss_weighting": "min_snr"},
    is_on=lambda recipe: recipe.decouple.loss_weighting != "none" or recipe.decouple.snr_gamma is not None,
    replacements=(
        Replacement("SNR+1", ("snr + 1", "snr+1 weight"), {"decouple.loss_weighting": "snr_plus_one"}),
        Replacement("truncated SNR", ("truncated snr weight",), {"decouple.loss_weighting": "truncated_snr"}),
        Replacement("Min-SNR", ("min snr gamma", "min snr weight", "min snr with gamma"), _min_snr),
        Replacement("P2", ("p2 weight", "p2 loss"), {"decouple.loss_weighting": "p2"}),
        Replacement(
            "none",
            ("constant weight", "uniform weight", "uniform", "uniform loss weighting", "constant"),
            {"decouple.loss_weighting": "none"},
        ),
    ),
    also=("multi-task weighting",),
)
MULTI_TASK = Part(
    name="multi-task weighting",
    description="one model on all timesteps that weighs the losses of timestep clusters, as in ANT",
    path="decouple.multi_task",
    synonyms=(
        "multi-task",
        "multi-task loss",
        "multi-task loss weighting",
        "uncertainty weighting",
        "nash",
        "multi-task weight",
        "uncertainty",
        "multi-task gradient",
        "uncertainty loss",
        "uncertainty weighting of timesteps",
        "single multi-task",
    ),
    actions=("REMOVE", "REPLACE", "ADD"),
    off={"decouple.multi_task": "none"},
    on={"decouple.multi_task": "uncertainty", **ONE_MODEL},
    is_on=lambda recipe: recipe.decouple.multi_task != "none",
    replacements=(
        Replacement(
            "uncertainty",
            ("uncertainty weight", "multi-task uncertainty", "uncertainty loss weighting"),
            {"decouple.multi_task": "uncertainty", **ONE_MODEL},
        ),
        Replacement("NashMTL", ("nash", "multi-task nash"), {"decouple.multi_task": "nash", **ONE_MODEL}),
    ),
)
EMA = Part(
    name="EMA",
    description="the exponential moving average of the weights, which is what an expert is",
    path="decouple.use_ema",
    synonyms=("ema", "ema decay", "ema of the weights", "ema experts", "ema of training", "ema in finetuning"),
    off={"decouple.use_ema": False},
    on={"decouple.use_ema": True},
    is_on=lambda recipe: recipe.decouple.use_ema,
    replacements=(Replacement("raw weights", ("raw weight", "raw", "last checkpoint"), {"decouple.use_ema": False}),),
    numeric=Numeric(
        lambda recipe, number: {"decouple.ema_max_decay": number.value, "decouple.use_ema": True},
        ("decay", "rate", "ema", "momentum", "beta"),
        ("decay", "ema"),
        ("0.999", "decay 0.9999"),
        "decay 0.9",
    ),
)
RATE = Part(
    name="learning rate",
    description="the learning rate of the finetuning",
    path="decouple.learning_rate",
    synonyms=("lr", "finetuning lr", "lr of the experts", "lr of training", "lr weight"),
    actions=("REPLACE",),
    numeric=Numeric(
        _rate,
        ("lr", "rate"),
        ("lr", "learn", "smaller", "larger", "lower", "higher", "the"),
        ("1e-4", "half"),
        "half",
    ),
    also=("learning rate schedule",),
    each="decouple.range_learning_rates",
)
SCHEDULE = Part(
    name="learning rate schedule",
    description="how the learning rate changes during the finetuning",
    path="decouple.lr_scheduler",
    synonyms=(
        "schedule",
        "cosine lr",
        "linear lr",
        "constant lr",
        "cosine schedule",
        "constant lr schedule",
        "cosine lr schedule",
    ),
    actions=("REMOVE", "REPLACE"),
    off={"decouple.lr_scheduler": "constant"},
    is_on=lambda recipe: recipe.decouple.lr_scheduler != "constant",
    exact=True,
    replacements=(
        Replacement("cosine", ("cosine", "cosine schedule", "cosine lr"), {"decouple.lr_scheduler": "cosine"}),
        Replacement("linear", ("linear", "linear schedule", "linear lr"), {"decouple.lr_scheduler": "linear"}),
        Replacement(
            "constant", ("constant", "constant lr", "constant schedule"), {"decouple.lr_scheduler": "constant"}
        ),
    ),
)
LENGTH = Part(
    name="training length",
    description="optimisation steps of all experts together",
    path="decouple.total_steps",
    synonyms=(
        "length",
        "finetuning length",
        "training length",
        "length of experts",
        "number of steps",
        "length of training",
        "number of finetuning steps",
        "number of finetuning iterations of each expert",
        "number length",
    ),
    actions=("REPLACE",),
    numeric=Numeric(
        _share,
        ("step", "steps", "iterations", "budget", "to"),
        (
            "iterat",
            "step",
            "train",
            "finetun",
            "iter",
            "per",
            "budget",
            "updat",
            "the",
            "total",
            "of",
            "longer",
            "shorter",
            "fewer",
            "more",
            "gradient",
            "as",
            "optimiz",
        ),
        ("20K iterations", "half"),
        "double",
    ),
    each="decouple.range_steps",
)
BATCH = Part(
    name="batch size",
    description="images of one training step",
    path="decouple.train_batch_size",
    synonyms=("batch", "training batch", "finetuning batch"),
    actions=("REPLACE",),
    numeric=Numeric(
        lambda recipe, number: {
            "decouple.train_batch_size": whole(Number(number.of(recipe.decouple.train_batch_size)), "images")
        },
        ("size", "batch", "b"),
        ("imag", "sampl", "batch", "the", "larger", "smaller"),
        ("32", "double"),
        "double",
    ),
)
PARTS = (WEIGHTING, MULTI_TASK, EMA, RATE, SCHEDULE, LENGTH, BATCH)
