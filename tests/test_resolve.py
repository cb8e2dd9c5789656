"""Plans of many wordings to arms: what people write, what it changes, and what is refused rather than guessed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deme_diffusion.ablate.arms import Arm, Resolved
from deme_diffusion.ablate.plan import ACTIONS, Ablation, Action
from deme_diffusion.ablate.resolve import resolve
from deme_diffusion.recipes import changed, load

DIGITS = load("digits").recipe


def arms(part: str, action: Action, *replacement: str, name: str = "") -> Resolved:
    return resolve(Ablation(name, part, action, list(replacement)), DIGITS)


def only(part: str, action: Action, *replacement: str) -> Arm:
    (arm,) = arms(part, action, *replacement).arms
    return arm


REMOVED = [
    ("The merging step", "merging", {"merge.method": "none"}),
    ("Merging of the finetuned experts into a single network (parameter-space fusion)", "merging", None),
    ("Model fusion via task vectors", "merging", None),
    ("Consistency loss", "consistency loss", {"decouple.consistency_weight": 0.0}),
    ("The consistency loss term that keeps each expert close to the pretrained model", "consistency loss", None),
    ("consistency regularisation towards the original pre-trained weights", "consistency loss", None),
    ("Channel-wise projection layers after U-Net blocks", "channel-wise projection", {"decouple.projection": "none"}),
    ("channelwise projection matrix W", "channel-wise projection", None),
    ("Probabilistic Sampling Strategy", "probabilistic sampling", {"decouple.global_prob": 0.0}),
    ("Stochastic sampling of timesteps outside the expert's range", "probabilistic sampling", None),
    ("Decoupled fine-tuning", "decoupling", {"decouple.num_ranges": 1}),
    ("Training separate models for each timestep range", "decoupling", {"decouple.num_ranges": 1}),
    ("Exponential moving average of the weights", "EMA", {"decouple.use_ema": False}),
    ("Initialisation from the pre-trained checkpoint", "initialisation", {"decouple.init": "random"}),
    ("Grid search over merging coefficients", "merge weights", {"merge.search": "none"}),
    ("All three training techniques", "all three techniques", {"decouple.projection": "none"}),
]


@pytest.mark.parametrize(("text", "part", "change"), REMOVED)
def test_remove(text: str, part: str, change: dict[str, Any] | None) -> None:
    resolved = arms(text, "REMOVE")
    (arm,) = resolved.arms
    assert resolved.part == part and arm.status == "ready" and arm.label
    assert (change or {}).items() <= arm.change.items()


REPLACED = [
    ("Number of timestep ranges (N)", "N = 8", {"decouple.num_ranges": 8}),
    ("Number of experts", "two experts", {"decouple.num_ranges": 2}),
    ("Timestep decoupling", "a single model fine-tuned on all timesteps", {"decouple.num_ranges": 1}),
    ("Uniform timestep segmentation", "sliding windows that overlap by 25%", {"decouple.overlap": 0.25}),
    ("Uniform timestep segmentation", "equal log-SNR intervals", {"decouple.division": "log_snr"}),
    ("Partitioning of timesteps", "shuffled timesteps", None),
    ("Partitioning of timesteps", "random cut points", {"decouple.division": "random_boundaries"}),
    ("Partitioning of timesteps", "random non-contiguous assignment", {"decouple.division": "random_assignment"}),
    ("Timestep grouping", "clustering by gradient similarity", {"decouple.division": "gradient_similarity"}),
    ("Timestep grouping", "[0,100), [100,400), [400,1000)", {"decouple.edges": [100, 400], "decouple.num_ranges": 3}),
    ("Timestep grouping", "non-uniform boundaries at 100, 300, 600", {"decouple.edges": [100, 300, 600]}),
    ("Timestep grouping", "Non-uniform intervals", {"decouple.division": "log_snr"}),
    ("Sampling probability p", "p = 0.5", {"decouple.global_prob": 0.5}),
    ("Sampling probability p", "always sample globally", {"decouple.global_prob": 1.0}),
    ("Sampling probability p", "only within the expert's own range", {"decouple.global_prob": 0.0}),
    ("Weight of the consistency loss", "λ=0.1", {"decouple.consistency_weight": 0.1}),
    ("Weight of the consistency loss", "double the weight", {"decouple.consistency_weight": 2.0}),
    ("Frozen teacher of the consistency loss", "EMA of the student", {"decouple.teacher": "ema"}),
    ("Channel-wise projection", "spatial projection (depthwise 3x3 conv)", {"decouple.projection_axes": "spatial"}),
    ("Channel-wise projection", "both channel-wise and spatial", {"decouple.projection_axes": "both"}),
    ("Channel-wise projection placement", "after every block", {"decouple.projection": "block"}),
    ("Merging algorithm", "TIES-Merging (Yadav et al., 2023), which elects signs", {"merge.method": "ties"}),
    ("Merging algorithm", "use DARE (drop and rescale) instead", {"merge.method": "dare_linear"}),
    ("Merging algorithm", "DARE-TIES", {"merge.method": "dare_ties"}),
    ("Merging algorithm", "Replace with simple averaging of the weights", {"merge.method": "average"}),
    ("Merging algorithm", "model soup", {"merge.method": "average", "merge.search": "none"}),
    ("Merging algorithm", "Fisher-weighted averaging", {"merge.method": "fisher", "merge.search": "none"}),
    ("Merging algorithm", "keep the experts as a timestep-wise ensemble", {"merge.method": "none"}),
    ("Merging algorithm", "DARE + TIES", {"merge.method": "dare_ties"}),
    ("Merge weights", "weights 0.1/0.1/0.2/0.5", {"merge.weights": [0.1, 0.1, 0.2, 0.5]}),
    ("Merge weights", "w_i = 0.25 each", {"merge.weights": [0.25] * 4}),
    ("decouple.num_ranges", "2", {"decouple.num_ranges": 2}),
    ("global_prob", "0.5", {"decouple.global_prob": 0.5}),
    (
        "Timestep grouping",
        "Random division: timesteps go to experts at random, so that each covers a non-contiguous assignment",
        {"decouple.division": "random_assignment"},
    ),
    ("Overlap ratio of neighbouring ranges", "10%", {"decouple.overlap": 0.1}),
    ("Timestep grouping", "two-way split at t=500", {"decouple.edges": [500], "decouple.num_ranges": 2}),
    ("Number of experts", "from 4 -> 8", {"decouple.num_ranges": 8}),
    ("Merging algorithm", "TIES with uniform weights", {"merge.method": "ties", "merge.search": "none"}),
    ("Merging algorithm", "Task arithmetic with uniform scaling", {"merge.search": "none"}),
    ("Task vector merging", "isotropic merging (Iso-C)", {"merge.method": "iso_c"}),
    ("Merge weights found by grid search", "equal coefficients", {"merge.search": "none"}),
    ("Merge weights", "learnable coefficients optimised by gradient descent", {"merge.search": "gradient"}),
    ("Merge weights", "evolutionary search (CMA-ES)", {"merge.search": "cma_es"}),
    ("Merge weights", "Bayesian optimisation", {"merge.search": "tpe"}),
    ("Merge weights", "0.1, 0.2, 0.3, 0.4", {"merge.weights": [0.1, 0.2, 0.3, 0.4], "merge.search": "none"}),
    ("Merge weights", "weights proportional to the SNR of each range", {"merge.weighting": "snr"}),
    ("Merge weights", "layer-wise coefficients", {"merge.granularity": "layer"}),
    ("Expert initialization", "training from scratch", {"decouple.init": "random"}),
    ("Expert initialization", "random init for half of the layers", {"decouple.init": "partly_random"}),
    (
        "Loss weighting",
        "Min-SNR-\N{GREEK SMALL LETTER GAMMA} with \N{GREEK SMALL LETTER GAMMA}=5",
        {"decouple.loss_weighting": "min_snr", "decouple.snr_gamma": 5.0},
    ),
    ("Loss weighting", "SNR + 1", {"decouple.loss_weighting": "snr_plus_one"}),
    ("Loss weighting", "truncated SNR weighting", {"decouple.loss_weighting": "truncated_snr"}),
    ("Loss weighting", "P2", {"decouple.loss_weighting": "p2"}),
    ("Decoupled training", "uncertainty weighting", {"decouple.multi_task": "uncertainty", "decouple.num_ranges": 1}),
    ("Multi-task loss balancing", "NashMTL", {"decouple.multi_task": "nash"}),
    ("EMA decay", "0.99", {"decouple.ema_max_decay": 0.99}),
    ("Learning rate", "1e-4", {"decouple.learning_rate": 1e-4}),
    ("Learning rate", "10x smaller", {"decouple.learning_rate": 5e-5}),
    ("Learning rate schedule", "linear decay", {"decouple.lr_scheduler": "linear"}),
    ("Fine-tuning duration", "10K iterations", {"decouple.total_steps": 10_000}),
    ("Number of fine-tuning iterations per expert", "10K", {"decouple.total_steps": 40_000}),
    ("Training budget", "half the iterations", {"decouple.total_steps": 1200}),
    ("Batch size", "64", {"decouple.train_batch_size": 64}),
]


@pytest.mark.parametrize(("part", "text", "change"), REPLACED)
def test_replace(part: str, text: str, change: dict[str, Any] | None) -> None:
    found = arms(part, "REPLACE", text).arms
    assert all(arm.status == "ready" and arm.replacement == text and 0 < arm.score <= 1 for arm in found)
    if change is None:
        assert [arm.variant for arm in found] == ["random boundaries", "random assignment"]
    else:
        assert len(found) == 1 and change.items() <= found[0].change.items()


def test_the_second_sampler_stays_at_its_place() -> None:
    arm = only("DDIM sampler", "REPLACE", "DPM-Solver++ with 10 steps")
    first, second = arm.change["evaluate.samplers"]
    assert (first["name"], first["num_inference_steps"]) == ("DPMSolverMultistepScheduler", 10)
    assert second["name"] == DIGITS.evaluate.samplers[1].name
    assert only("Number of sampling steps", "REPLACE", "10").change["evaluate.samplers"][0]["num_inference_steps"] == 10


@pytest.mark.parametrize(
    ("part", "text", "values"),
    [
        ("Number of experts", "N = 2, 8, 16", [2, 8, 16]),
        ("Global sampling probability", "p in {0.1, 0.5, 0.7}", [0.1, 0.5, 0.7]),
        ("Consistency weight", "0.1/0.5", [0.1, 0.5]),
        ("Learning rate", "1e-5, 1e-4", [1e-5, 1e-4]),
        ("Model merging method", "use TIES or DARE instead", ["ties", "dare_linear"]),
        ("Model merging method", "sparsified merging, e.g. TIES and DELLA", None),
    ],
)
def test_lists_become_several_arms(part: str, text: str, values: list[Any] | None) -> None:
    found = arms(part, "REPLACE", text).arms
    if values is None:  # a word of its own beside: no guess
        assert all(arm.status in ("ready", "not_executable") for arm in found)
        return
    assert [next(iter(arm.change.values())) for arm in found] == values
    assert len({arm.label for arm in found}) == len(values)


@pytest.mark.parametrize(
    ("part", "action"),
    [
        ("U-Net architecture", "REPLACE"),
        ("Text encoder", "REMOVE"),
        ("Classifier guidance", "REPLACE"),
        ("Training dataset", "REPLACE"),
        ("Noise schedule", "REPLACE"),
        ("VAE latent space", "REMOVE"),
        ("ControlNet adapters", "ADD"),
        ("Timestep embedding", "REMOVE"),
        ("Adversarial loss", "ADD"),
        ("Batch normalization", "REMOVE"),
        ("Multi-head self-attention", "REMOVE"),
        ("Reward model", "REMOVE"),
        ("Graph neural network layers", "REPLACE"),
        ("Hierarchical clustering of documents", "REMOVE"),
        ("Merging of the word tokens", "REMOVE"),
        ("Knowledge distillation", "REMOVE"),
        ("Beam search", "REPLACE"),
        ("Random cropping", "REMOVE"),
        ("Weighted loss for class imbalance", "REMOVE"),
        ("", "REMOVE"),
        ("?!", "REPLACE"),
    ],
)
def test_what_is_no_part_is_listed_with_a_reason(part: str, action: Action) -> None:
    resolved = resolve(Ablation("", part, action, ["something"]), DIGITS)
    assert resolved.part is None
    assert [arm.status for arm in resolved.arms] == ["not_executable"] and resolved.arms[0].reason


@pytest.mark.parametrize(
    ("part", "text", "said"),
    [
        ("Merging method", "RegMean", "none of the merge methods"),
        ("Merging method", "SLERP", "2 experts"),
        ("Merging method", "knowledge distillation into one student", "takes"),
        ("Merge weights", "random search", "none of the searches"),
        ("Merge weights", "[0.1, 0.2]", "4"),
        ("Consistency loss", "perceptual loss (LPIPS)", "squared errors"),
        ("Channel-wise projection", "LoRA adapters", "adapters"),
        ("Timestep division", "finer ranges at early timesteps", "which ranges"),
        ("Sampling probability p", "p = 2", "global_prob"),
        ("Training length", "20 epochs", "takes"),
        ("Sampling probability p", "p annealed from 0.5 to 0", "takes"),
        ("Decoupled training", "Min-SNR weighting on a single model", "takes"),
        ("Timestep division", "interleaved timesteps (t mod N)", "takes"),
        ("Timestep division", "50 timesteps", "takes"),
        ("Loss weighting", "a bespoke weighting of ours", "takes"),
    ],
)
def test_replacements_that_are_refused(part: str, text: str, said: str) -> None:
    arm = only(part, "REPLACE", text)
    assert arm.status == "not_executable" and said in arm.reason


def test_replace_by_nothing_names_what_the_part_takes() -> None:
    arm = only("Merging method", "REPLACE")
    assert arm.status == "not_executable" and "TIES" in arm.reason and arm.nearest


def test_what_equals_the_baseline_is_said() -> None:
    assert only("Number of experts", "REPLACE", "N=4").status == "same_as_baseline"
    assert only("Consistency loss", "ADD").status == "same_as_baseline"
    assert only("Timestep division", "REPLACE", "uniform ranges").status == "same_as_baseline"


def test_add_turns_on_what_is_off_or_what_is_named() -> None:
    assert only("Antithetic timesteps", "ADD").change == {"decouple.antithetic": True}
    assert only("Loss weighting", "ADD", "P2").change == {"decouple.loss_weighting": "p2"}
    assert only("P2 loss weighting", "ADD").change == {"decouple.loss_weighting": "p2"}
    assert only("Spatial projection", "ADD").change == {"decouple.projection_axes": "both"}
    assert only("Channel-wise projection", "ADD", "spatial projection").change == {"decouple.projection_axes": "both"}
    off = changed(DIGITS, {"decouple.projection": "none"})
    (arm,) = resolve(Ablation("", "channel-wise projection", "ADD"), off).arms
    assert arm.change["decouple.projection"] == "residual" and arm.status == "ready"


def test_what_the_recipe_has_not_cannot_be_removed() -> None:
    assert only("Overlapping timestep ranges", "REMOVE").status == "same_as_baseline"
    assert only("Uniform timestep ranges", "REMOVE").change["decouple.num_ranges"] == 1


def test_a_replacement_alone_says_of_what_only_where_it_is_telling_and_the_part_is_vague() -> None:
    assert arms("Module X", "REPLACE", "TIES merging").part == "merge method"
    assert arms("Module X", "REPLACE", "uniform").part is None
    assert arms("Word tokens", "REPLACE", "TIES merging").part is None


def test_several_parts_are_removed_together_and_not_replaced() -> None:
    arm = only("Probabilistic sampling and consistency loss", "REMOVE")
    assert arm.change == {"decouple.global_prob": 0.0, "decouple.consistency_weight": 0.0}
    refused = only("Probabilistic sampling and consistency loss", "REPLACE", "something")
    assert refused.status == "not_executable" and "several parts" in refused.reason


def test_an_exact_change_needs_no_words() -> None:
    exact = Ablation("x", "whatever", "REPLACE", ["a", "N = 8"], change={}, changes={"a": {"decouple.num_ranges": 2}})
    resolved = resolve(exact, DIGITS)
    assert resolved.part == "decoupling" and resolved.arms[0].change == {"decouple.num_ranges": 2}
    assert resolved.arms[1].change == {"decouple.num_ranges": 8}  # its text is matched to the part of the other
    wrong = resolve(Ablation("x", "y", "REPLACE", change={"decouple.num_rangs": 2}), DIGITS)
    assert wrong.arms[0].status == "not_executable" and "num_ranges" in wrong.arms[0].reason


def test_the_recipe_must_merge_for_merge_weights_to_matter() -> None:
    ensemble = changed(DIGITS, {"merge.method": "none"})
    (arm,) = resolve(Ablation("", "merge weights", "REPLACE", ["grid search"]), ensemble).arms
    assert arm.status == "not_executable" and "merges nothing" in arm.reason


PUBLISHED = Path(os.environ.get("DEME_TEST_DATA", "/nonexistent")) / "plans" / "gpt-4o.md"


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="DEME_TEST_DATA names no folder with plans/gpt-4o.md")
def test_the_published_plan_as_a_person_would_resolve_it() -> None:
    from deme_diffusion.ablate import read_plan

    merging, division = (resolve(ablation, DIGITS) for ablation in read_plan(PUBLISHED).ablations)
    assert [dict(arm.change) for arm in merging.arms] == [{"merge.method": "none"}]
    assert [arm.change["decouple.division"] for arm in division.arms] == [
        "overlapping",
        "random_boundaries",
        "random_assignment",
    ]
    assert all(arm.status == "ready" for arm in (*merging.arms, *division.arms))
    for resolved in (merging, division):
        fid, clip = resolved.metrics
        assert fid.columns == ("FD",) and clip.columns == () and clip.reason.startswith("not applicable")


WORDS = st.sampled_from(  # of what plans say, in no order
    [
        "merge",
        "weights",
        "TIES",
        "overlapping",
        "random",
        "division",
        "N=8",
        "[0,100)",
        "1e-4",
        "p",
        "0.5",
        "SNR",
        "+",
        "1",
        "e.g.",
        "without",
        "instead",
        "of",
        "(,/",
        "—",
        "half",
        "consistency",
        "loss",
        "the",
        "²",
        "½",
        "10^99",
        "1e999",
        "-5",
        "0",
        "replace",
        "with",
        "channel",
        "sampler",
        "DDIM",
        "steps",
        "edges",
    ]
)


@settings(max_examples=150, deadline=None)
@given(
    part=st.lists(WORDS, max_size=6).map(" ".join) | st.text(max_size=40),
    action=st.sampled_from(ACTIONS),
    replacement=st.lists(st.lists(WORDS, max_size=6).map(" ".join) | st.text(max_size=40), max_size=2),
)
def test_resolving_never_raises_and_drops_nothing(part: str, action: Action, replacement: list[str]) -> None:
    resolved = resolve(Ablation(part, part, action, replacement, replacement), DIGITS)
    assert resolved.arms and len(resolved.metrics) == max(1, len(replacement))
    if action != "REMOVE" and replacement:
        assert {arm.replacement for arm in resolved.arms} >= set(replacement)
    assert all(arm.reason for arm in resolved.arms if arm.status == "not_executable")
