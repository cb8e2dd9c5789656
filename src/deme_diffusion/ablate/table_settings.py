"""Plain settings that plans name though they are no part of the method: recognised by name, and proposed by nobody."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deme_diffusion.ablate.rows import Change, Numeric, Part, Replacement, Variant
from deme_diffusion.ablate.table_division import whole
from deme_diffusion.ablate.text import Number
from deme_diffusion.config import Recipe
from deme_diffusion.errors import UserError

Values = Mapping[str, tuple[Any, tuple[str, ...]]]
"""A value's name for people -> the value and its other names."""


def _now(recipe: Recipe, path: str) -> Any:
    value: Any = recipe
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _sets(path: str, what: str, goes_with: Change) -> Callable[[Recipe, Number], Change]:
    """What a number makes of a setting: a factor scales its value; `what` names a count's things."""

    def change(recipe: Recipe, number: Number) -> Change:
        now = _now(recipe, path)
        if number.kind == "factor" and now is None:
            raise UserError(f"{path} is not set, so {number} says nothing; say the value")
        value = number.of(now)
        return {path: whole(Number(value), what) if what else value, **goes_with}

    return change


def _number(
    name: str,
    path: str,
    synonyms: tuple[str, ...],
    *,
    example: str,
    what: str = "",
    symbols: tuple[str, ...] = (),
    units: tuple[str, ...] = (),
    off: Any = None,
    goes_with: Mapping[str, Any] | None = None,
) -> Part:
    """A setting that is a number; `off` is its value without it, if there is one."""
    return Part(
        name=name,
        description=f"the setting {path}",
        path=path,
        synonyms=synonyms,
        actions=("REPLACE",) if off is None else ("REMOVE", "REPLACE"),
        off={} if off is None else {path: off},
        is_on=lambda recipe: off is None or _now(recipe, path) != off,
        numeric=Numeric(_sets(path, what, goes_with or {}), symbols, units, (example,), example),
    )


def _named(name: str, path: str, synonyms: tuple[str, ...], values: Values, goes_with: Change | None = None) -> Part:
    """A setting that is one of some words."""
    rows = (Replacement(word, more, {path: value, **(goes_with or {})}) for word, (value, more) in values.items())
    description = f"the setting {path}"
    return Part(name, description, path, synonyms, actions=("REPLACE",), replacements=tuple(rows))


def _each_steps(recipe: Recipe, text: str, numbers: Sequence[Number]) -> list[Variant]:
    """Steps of each expert: shares of the budget, or steps."""
    count, budget = recipe.decouple.num_ranges, recipe.decouple.budget
    shares = all(number.kind == "percent" or 0 < number.value < 1 for number in numbers)
    if len(numbers) != count:
        raise UserError(f"how many steps? {count} numbers, one an expert, as shares of the budget or as steps")
    if shares and abs(sum(number.value for number in numbers) - 1) > 0.01:
        raise UserError("the experts' shares of the budget do not make 100%")
    steps = [round(number.value * budget) if shares else whole(number, "steps") for number in numbers]
    return [("", {"decouple.range_steps": steps})]


EACH_STEPS = Part(
    name="budget of each expert",
    description="how the budget of steps is shared among the experts",
    path="decouple.range_steps",
    synonyms=(
        "uniform length of experts",
        "even training budget of experts",
        "distribution of training steps among experts",
        "equal number of iterations for experts",
        "budget allocation among experts",
        "uniform split of the budget among experts",
        "budget of ranges",
        "uniform budget",
        "nonuniform budget",
        "uniform steps among experts",
        "uniform number of iterations",
        "assign budget to experts",
    ),
    actions=("REPLACE",),
    replacements=(
        Replacement(
            "given budgets",
            ("budget of each expert given by hand",),
            _each_steps,
            pattern=r"\d\s*%?\s*[/,:;]\s*\d+(?:\.\d+)?\s*%?\s*[/,:;]\s*\d",
            example="40%/30%/20%/10%",
        ),
    ),
    also=("training length",),
)


def _bounds(recipe: Recipe, text: str, numbers: Sequence[Number]) -> list[Variant]:
    """The least and the largest weight that a search tries."""
    values = [number.value for number in numbers if number.kind == "plain"]
    if len(values) != 2 or values[0] >= values[1]:
        raise UserError("which bounds? two numbers, the lower one first, as [0, 1]")
    return [("", {"merge.bounds": values})]


BOUNDS = Part(
    name="bounds of the search",
    description="the setting merge.bounds",
    path="merge.bounds",
    synonyms=(
        "search range of merge weights",
        "range of the search",
        "bounds of merge weights",
        "bounds of w_i",
        "range of w_i search",
        "search interval",
        "range of merge weight w_i search",
        "range of merge weights",
    ),
    actions=("REPLACE",),
    replacements=(
        Replacement("given bounds", ("bounds given by hand",), _bounds, pattern=r"\d.*\d", example="[0, 1]"),
    ),
)
FREEZING = Part(
    name="freezing of the teacher",
    description="that the consistency loss's teacher stays as it is; without it, it is a running average",
    path="decouple.teacher",
    synonyms=("teacher freezing",),
    actions=("REMOVE",),
    off={"decouple.teacher": "ema", "decouple.use_ema": True},
    is_on=lambda recipe: recipe.decouple.teacher == "frozen" and recipe.decouple.consistency_weight > 0,
)
SETTINGS = (
    EACH_STEPS,
    BOUNDS,
    FREEZING,
    _named(
        "precision of the optimiser",
        "decouple.use_8bit_adam",
        ("8-bit optimizer", "32-bit optimizer", "8-bit states", "32-bit states", "8-bit", "32-bit optimizer states"),
        {
            "8-bit": (True, ("8-bit optimizer", "8-bit states")),
            "32-bit": (False, ("32-bit optimizer", "32-bit states")),
        },
    ),
    _number(
        "gradient clipping",
        "decouple.max_grad_norm",
        ("gradient norm clipping", "clipping of gradients", "max gradient norm", "clip gradient norm", "grad clip"),
        example="0.5",
        symbols=("norm", "clipping", "clip"),
        units=("gradient", "norm"),
    ),
    _number("weight decay", "decouple.adam_weight_decay", ("L2 weight decay",), example="0.01", off=0.0),
    _number("Adam beta1", "decouple.adam_beta1", ("betaone", "first moment"), example="0.9", symbols=("betaone",)),
    _number("Adam beta2", "decouple.adam_beta2", ("betatwo", "second moment"), example="0.99", symbols=("betatwo",)),
    _number("Adam epsilon", "decouple.adam_epsilon", ("epsilon of adam optimizer",), example="1e-6"),
    _number(
        "gradient accumulation",
        "decouple.gradient_accumulation_steps",
        ("gradient accumulation steps", "accumulated batches", "accumulation of gradients"),
        example="4",
        what="steps",
        units=("step", "accumulat"),
    ),
    _number(
        "warm-up",
        "decouple.lr_warmup_steps",
        ("learning rate warmup", "lr warm up steps", "warmup of learning rate"),
        example="100",
        units=("step", "warmup", "iterat", "warm"),
        off=0,
    ),
    _named(
        "mixed precision",
        "decouple.mixed_precision",
        (
            "numerical precision",
            "floating point precision",
            "training precision",
            "single precision",
            "fp32",
            "fp16",
            "bf16",
        ),
        {
            "bf16": ("bf16", ("bfloat16", "bf16 precision")),
            "fp16": ("fp16", ("float16", "half precision", "fp16 precision")),
            "fp32": ("no", ("float32", "single precision", "full precision", "fp32 precision")),
        },
    ),
    _number(
        "early stopping",
        "decouple.early_stopping",
        ("early stop patience", "patience"),
        example="3",
        what="validations",
        units=("validat", "check", "evaluat"),
        off=0,
    ),
    _named(
        "kept checkpoint",
        "decouple.keep",
        ("best checkpoint", "best validation checkpoint", "checkpoint selection", "last checkpoint"),
        {
            "best": ("best", ("best checkpoint", "best weights")),
            "last": ("last", ("last checkpoint", "final checkpoint")),
        },
    ),
    _number("EMA power", "decouple.ema_power", ("ema exponent", "power of ema warmup"), example="0.6"),
    _number(
        "teacher renewal",
        "decouple.teacher_update_steps",
        ("interval of teacher steps", "teacher refresh steps", "renewal of the teacher"),
        example="100",
        what="steps",
        units=("step", "iterat"),
    ),
    _named(
        "search objective",
        "merge.objective",
        (
            "objective of the search",
            "criterion of the merge weight search",
            "loss of merge weight search",
            "criterion merge weights",
            "objective of merge weights",
            "metric of merge weights",
            "metric of merge weight search",
            "search metric",
            "criterion of weights search",
        ),
        {
            "FD": ("fd", ("fid", "frechet distance", "frechet inception distance")),
            "loss": ("loss", ("validation loss", "denoising loss", "held-out loss")),
            "relative loss": ("relative_loss", ("relative validation loss", "relative denoising loss")),
        },
    ),
    _number(
        "merge density",
        "merge.options.density",
        ("density of task vectors", "ties density", "dare density", "trim ratio density", "density"),
        example="0.5",
        symbols=("density",),
    ),
    _number("ridge", "merge.ridge", ("ridge of least squares", "ridge strength"), example="0.01"),
    _number(
        "search budget",
        "merge.max_evaluations",
        ("budget of the search", "search iterations of training-free candidates"),
        example="64",
        what="evaluations",
        units=("evaluat", "trial", "candidat", "function"),
    ),
    _number("sigma of CMA-ES", "merge.sigma", ("step size of evolutionary search", "cma-es sigma"), example="0.1"),
    _number(
        "multi-task clusters",
        "decouple.multi_task_clusters",
        ("number of multi-task clusters", "number of clusters in multi-task"),
        example="8",
        what="clusters",
        units=("cluster",),
    ),
)
