"""Rows of the parts table: how the experts become one model."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from deme_diffusion.ablate.rows import Numeric, Part, Replacement, Variant
from deme_diffusion.ablate.text import Number
from deme_diffusion.config import Recipe
from deme_diffusion.errors import UserError
from deme_diffusion.merging.table import METHODS

_METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "task_arithmetic": ("task arithmetic", ("weighted average", "interpolation", "sum of task vectors")),
    "average": ("simple average", ("average", "average of the weights", "uniform average", "average the experts")),
    "ties": ("TIES", ("ties",)),
    "dare_linear": ("DARE", ("dare", "dare with task arithmetic", "dare with linear combination")),
    "dare_ties": ("DARE-TIES", ("dare with ties",)),
    "breadcrumbs": ("Breadcrumbs", ("breadcrumbs",)),
    "della": ("DELLA", ("della",)),
    "slerp": ("SLERP", ("slerp",)),
    "fisher": ("Fisher merging", ("fisher", "fisher weighted average", "fisher average")),
    "tsv": ("TSV", ("task singular vectors",)),
    "iso_c": ("Iso-C", ("isotropic",)),
    "wudi": ("WUDI", ("wudi",)),
}
ENSEMBLE = Replacement(
    "timestep-routed ensemble",
    ("ensemble", "route each timestep to its expert", "keep the experts separate"),
    {"merge.method": "none"},
    "nothing is merged; each timestep is served by its expert",
)


_GONE = re.compile(r"drop|trim(?:ming)? (?:away|off|the)|discard|prun|remov|zero|mask|cut")
_STAYS = re.compile(r"keep|kept|top|largest|retain|densit|stay|surviv|preserv")


def _method(key: str) -> Callable[[Recipe, str, Sequence[Number]], Sequence[Variant]]:
    """A method with the density that a text tells: what is kept of a task vector, or what is dropped."""

    def change(recipe: Recipe, text: str, numbers: Sequence[Number]) -> list[Variant]:
        result = {"merge.method": key}
        found = [n.value for n in numbers if n.kind != "plain" or n.symbol in ("density", "rate", "ratio", "p", "k")]
        found = [value for value in found if 0 < value < 1]
        stays, gone = _STAYS.search(text), _GONE.search(text)
        if not found or not (stays or gone) or "density" not in METHODS[key].defaults:
            return [("", result)]
        if stays and gone:
            place = min(text.find(c) for c in "0123456789" if c in text)
            gone = None if abs(stays.start() - place) < abs(gone.start() - place) else gone
        kept = [round(1 - value, 9) if gone else value for value in found]
        label = next(name for row, (name, _) in _METHODS.items() if row == key)
        return [
            (f"{label}, density {value:g}" if len(kept) > 1 else "", {**result, "merge.options.density": value})
            for value in kept
        ]

    return change


def _merges(recipe: Recipe) -> str:
    return "the recipe merges nothing (merge.method=none)" if recipe.merge.method == "none" else ""


def _given(recipe: Recipe, text: str, numbers: Sequence[Number]) -> list[Variant]:
    """Given weights, one an expert; one number is the weight of each."""
    values, experts = [number.value for number in numbers], recipe.decouple.num_ranges
    if len(values) == experts:
        return [("", {"merge.weights": values})]
    if not values or any(number.kind == "factor" for number in numbers):
        raise UserError(f"which weights? {experts} numbers, one an expert, or one for each of them")
    if "," in text.rstrip(",") and len(values) > 1 and any(c in text for c in "[("):
        raise UserError(f"{len(values)} weights for {experts} experts; {experts} are needed")
    return [(f"each weight {value:g}", {"merge.weights": [value] * experts}) for value in values]


def _uniform(recipe: Recipe, text: str, numbers: Sequence[Number]) -> list[Variant]:
    """The method's own default, or the number that all have."""
    values = [number for number in numbers if number.kind == "plain" and not number.after.startswith("expert")]
    return _given(recipe, text, values) if values else [("", {"merge.search": "none"})]


MERGING = Part(
    name="merging",
    description="the step that makes one model of the experts; without it, the experts serve as an ensemble",
    path="merge.method",
    synonyms=(
        "merge",
        "merge the experts",
        "merge into a single model",
        "merge expert weights",
        "merge timestep experts",
        "merge the finetuned experts",
        "merge task vectors",
        "merge training",
        "merge N experts",
        "merge experts into single",
        "merge into single",
        "merge experts",
        "merge single model from experts",
        "merge back into single",
        "merge N experts into single",
        "single merged model",
        "merge expert task vectors",
        "merge of finetuned weights",
        "merge finetuned weights",
        "merge finetuned experts into single",
        "task vectors",
    ),
    off={"merge.method": "none"},
    on={"merge.method": "task_arithmetic"},
    is_on=lambda recipe: recipe.merge.method != "none",
    replacements=(ENSEMBLE,),
    also=("merge method", "merge weights"),
)
METHOD = Part(
    name="merge method",
    description="how task vectors are combined: task arithmetic (Eq. 8), or one of the other published methods",
    path="merge.method",
    synonyms=(
        "task arithmetic",
        "merge by task vectors",
        "merge by task arithmetic",
        "merge by weighted average",
        "task arithmetic merge of experts",
        "weighted average of experts",
        "linear merge",
        "sum of experts",
        "merge by sum",
        "sum merge",
        "sum of weighted experts",
        "weighted sum",
        "weighted sum of task vectors",
        "linear combination of experts",
        "merge formula",
        "merge interpolation of experts",
        "task vectors sum with weights",
        "interpolation of experts",
        "merge arithmetic",
        "average of experts",
        "merge by average",
        "merge by interpolation",
        "sum of task vectors",
        "ties",
        "dare",
        "slerp",
    ),
    actions=("REPLACE",),
    replacements=tuple(Replacement(name, synonyms, _method(key)) for key, (name, synonyms) in _METHODS.items()),
    also=("merging", "merge weights"),
    joins=("merge weights",),
    needs=_merges,
)
WEIGHTS = Part(
    name="merge weights",
    description="the weight of each task vector: found by a search, uniform, by SNR, or given",
    path="merge.search",
    synonyms=(
        "merge weight search",
        "search of merge weights",
        "grid search",
        "grid search of merge weights",
        "merge search",
        "task vector weights",
        "weights of the experts",
        "weights of the experts merge",
        "grid search of weights",
        "weight search",
        "uniform merge weights",
        "merge ratio",
        "merge grid search",
        "learned merge weights",
        "least squares weights",
        "merge lambda",
        "weight of each expert",
        "merge grid",
        "merge task vectors weight",
        "w_i coefficient",
        "w_i search",
        "w_i grid search",
        "task vector w_i",
        "merge w_i",
        "w_i weights",
        "w_i of task vectors",
        "single weight for each expert",
        "weight for each task vector",
        "weights in the sum of task vectors",
        "search of expert weights",
        "search of task vector weights",
        "expert weights",
        "merge weights found by search",
        "scaling of task vectors",
        "weight of task vectors",
        "merge hyperparameter search",
    ),
    off={"merge.search": "none"},
    on={"merge.search": "least_squares"},
    is_on=lambda recipe: (
        recipe.merge.search != "none" or recipe.merge.weights is not None or recipe.merge.weighting != "uniform"
    ),
    actions=("REMOVE", "REPLACE", "ADD"),
    replacements=(
        Replacement(
            "uniform weights",
            (
                "uniform",
                "uniform weights for all experts",
                "same weight",
                "constant weight",
                "uniform merge",
                "weight 1/N",
                "constant",
            ),
            _uniform,
        ),
        Replacement(
            "least squares",
            ("least squares", "least squares search", "least squares weights"),
            {"merge.search": "least_squares"},
        ),
        Replacement("grid search", ("grid", "grid search of weights"), {"merge.search": "grid"}),
        Replacement(
            "learned by gradient",
            ("learned", "learned weights", "gradient", "learned gradient weights", "gradient search"),
            {"merge.search": "gradient"},
        ),
        Replacement(
            "a weight for each layer",
            ("layerwise weights", "learned layerwise weights", "layerwise"),
            {"merge.search": "gradient", "merge.granularity": "layer"},
        ),
        Replacement(
            "a weight for each block",
            ("blockwise weights", "learned blockwise weights", "blockwise", "block weights"),
            {"merge.search": "gradient", "merge.granularity": "block"},
        ),
        Replacement("CMA-ES", ("evolutionary search", "evolutionary"), {"merge.search": "cma_es"}),
        Replacement(
            "TPE", ("Bayesian optimisation", "bayesian", "bayesian search of weights"), {"merge.search": "tpe"}
        ),
        Replacement(
            "by SNR",
            (
                "snr",
                "snr weights",
                "snr weighted average",
                "average snr",
                "snr of each range",
                "average snr of each range",
            ),
            {"merge.weighting": "snr"},
        ),
        Replacement(
            "given weights",
            ("fixed weights", "manual weights", "weights given by hand", "constant given weights"),
            _given,
            example="each weight 0.25",
        ),
    ),
    numeric=Numeric(
        lambda recipe, number: {}, ("w", "weight", "weights", "lambda", "alpha"), (), ("0.1, 0.2, 0.3, 0.4",), "0.25"
    ),
    also=("merging", "merge method"),
    joins=("merge method",),
    needs=_merges,
    each="merge.weights",
)
PARTS = (MERGING, METHOD, WEIGHTS)
