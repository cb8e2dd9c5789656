"""Rules by which a plan's words are refused rather than guessed, or read as one thing and not as several."""

from __future__ import annotations

import pytest

from deme_diffusion.ablate.arms import Arm, Resolved
from deme_diffusion.ablate.plan import ACTIONS, Ablation, Action
from deme_diffusion.ablate.resolve import resolve
from deme_diffusion.recipes import changed, load

DIGITS = load("digits").recipe


def arms(part: str, action: Action, *replacement: str) -> Resolved:
    return resolve(Ablation("", part, action, list(replacement)), DIGITS)


def only(part: str, action: Action, *replacement: str) -> Arm:
    (arm,) = arms(part, action, *replacement).arms
    return arm


@pytest.mark.parametrize(
    "part",
    [
        "the expert for t in [0, T/4)",
        "Specialist covering [750, 1000)",
        "The first expert",
        "Expert 3",
        "the low-noise expert",
        "Learning rate of the last expert",
    ],
)
def test_one_expert_of_several_is_no_setting(part: str) -> None:
    for action in ACTIONS:
        (arm,) = arms(part, action, "0.1").arms
        assert arm.status == "not_executable" and "single experts" in arm.reason
    for whole in ("One expert per timestep range", "the expert of each range", "Number of experts"):
        assert arms(whole, "REMOVE").part == "decoupling"


def test_a_word_for_several_parts_names_none() -> None:
    for text in ("Training techniques", "finetuning tricks", "finetuning techniques such as sampling and consistency"):
        arm = only(text, "REMOVE")
        assert arm.status == "not_executable" and "any of: probabilistic sampling, consistency loss" in arm.reason
    assert len(only("all three techniques", "REMOVE").change) == 3


def test_what_explains_a_list_adds_nothing_to_it_and_strangers_in_it_are_not_dropped() -> None:
    both = {"decouple.global_prob": 0.0, "decouple.consistency_weight": 0.0}
    assert only("prob. sampling + consistency loss (i.e. decoupling, then merging)", "REMOVE").change == both
    assert only("probabilistic sampling (and consistency loss)", "REMOVE").change == both
    refused = only("consistency loss and dropout", "REMOVE")
    assert refused.status == "not_executable" and "'dropout'" in refused.reason


def test_relative_amounts_are_of_the_quantity_they_are_told_with() -> None:
    assert only("20K its per expert", "REPLACE", "a quarter of the finetuning steps").change == {
        "decouple.total_steps": 600
    }
    assert only("20K its per expert", "REPLACE", "four times as many").change == {"decouple.total_steps": 9600}
    assert only("Number of experts", "REPLACE", "half the training steps").status == "not_executable"
    assert only("Number of experts", "REPLACE", "twice as many").change == {"decouple.num_ranges": 8}
    assert only("Number of experts", "REPLACE", "8 experts, as many steps").change == {"decouple.num_ranges": 8}


def test_a_value_for_each_range_is_one_arm() -> None:
    rates, listed = [1e-4, 2e-4, 3e-4, 4e-4], "1e-4, 2e-4, 3e-4 and 4e-4"
    path = "decouple.range_learning_rates"
    assert only("Learning rate", "REPLACE", f"{listed} respectively").change[path] == rates
    assert only("Learning rate", "REPLACE", f"{listed} from large t to small t").change[path] == rates[::-1]
    assert len(arms("Learning rate", "REPLACE", listed).arms) == 4
    for part, text in (
        ("Learning rate", "1e-4 and 2e-4 respectively"),
        ("Learning rate", f"{listed} from early to late"),
        ("Learning rate", "1e-4 for the first two experts and 2e-4 for the others"),
        ("Consistency weight", "0.1, 0.2, 0.3, 0.4 respectively"),
    ):
        assert only(part, "REPLACE", text).status == "not_executable", text
    steps = only("Training length", "REPLACE", "100, 200, 300, 400 steps in order from small t to large t")
    assert steps.change["decouple.range_steps"] == [100, 200, 300, 400]


def test_one_range_has_no_division() -> None:
    one = changed(DIGITS, {"decouple.num_ranges": 1, "merge.method": "none", "merge.search": "none"})
    texts = ["overlapping ranges", "random boundaries", "log-SNR"]
    found = resolve(Ablation("", "Timestep division", "REPLACE", texts), one).arms
    exact = resolve(Ablation("", "x", "REPLACE", change={"decouple.division": "log_snr"}), one).arms
    for arm in (*found, *exact):
        assert arm.status == "not_executable" and "set decouple.num_ranges" in arm.reason
    (edges,) = resolve(Ablation("", "Timestep division", "REPLACE", ["boundaries at 100, 300"]), one).arms
    assert edges.status == "ready" and edges.change["decouple.num_ranges"] == 3


def test_the_methods_own_terms_win() -> None:
    for text in ("Probabilistic sampling of timesteps", "Probabilistic timestep sampling", "global timesteps"):
        assert only(text, "REMOVE").change == {"decouple.global_prob": 0.0}
    freezing = only("Freezing the teacher", "REMOVE").change
    assert freezing["decouple.teacher"] == "ema" and "decouple.consistency_weight" not in freezing


def test_an_arm_says_which_search_goes_with_its_method() -> None:
    assert "least_squares needs task arithmetic" in only("Merge method", "REPLACE", "TIES").reason
    assert "no weights" in only("Merge method", "REPLACE", "simple average").reason
    assert only("Merge weights", "REPLACE", "grid search").reason == ""


def test_a_number_alone_is_of_the_value_that_the_part_names() -> None:
    for text, gamma in (("gamma 5", 5.0), ("\N{GREEK SMALL LETTER GAMMA}=1", 1.0), ("2", 2.0)):
        arm = only("min-SNR loss weighting", "ADD", text)
        assert arm.change == {"decouple.loss_weighting": "min_snr", "decouple.snr_gamma": gamma}
    assert only("Loss weighting", "REPLACE", "min-SNR-5").change["decouple.snr_gamma"] == 5.0


def test_what_is_added_may_name_its_own_part() -> None:
    assert only("Loss of each expert", "ADD", "Min-SNR").change["decouple.loss_weighting"] == "min_snr"
    assert only("Loss of each expert", "ADD", "dropout").status == "not_executable"
    assert only("Attention maps", "ADD", "Min-SNR").status == "not_executable"


@pytest.mark.parametrize(
    "kept",
    [", keeping channel projection", ", keeping just the 1x1 projection", " but keep the merging", " while keeping p"],
)
def test_what_is_kept_is_not_ablated(kept: str) -> None:
    assert only(f"Consistency loss{kept}", "REMOVE").change == {"decouple.consistency_weight": 0.0}
    both = only("Consistency loss (keeping p) and channel projection", "REMOVE").change
    assert both == {"decouple.consistency_weight": 0.0, "decouple.projection": "none"}


def test_a_learning_rate_is_relative_or_a_rate() -> None:
    now = DIGITS.decouple.learning_rate
    for text, factor in (("lr/10", 0.1), ("x0.1", 0.1), ("lr*0.1", 0.1), ("10x smaller", 0.1), ("10x larger", 10.0)):
        assert only("Learning rate", "REPLACE", text).change["decouple.learning_rate"] == pytest.approx(factor * now)
    assert only("Learning rate", "REPLACE", "5 x 10^-5").change == {"decouple.learning_rate": 5e-5}
    assert only("Learning rate", "REPLACE", "10").status == "not_executable"


def test_a_model_that_there_is_not_is_no_teacher() -> None:
    assert only("Teacher", "REPLACE", "the frozen pretrained model").status == "same_as_baseline"
    for text in ("a larger pretrained teacher", "the 2B pretrained teacher", "a frozen classifier"):
        assert only("Teacher", "REPLACE", text).status == "not_executable"


def test_steps_of_one_method_are_no_alternatives() -> None:
    steps = only("Merge method", "REPLACE", "DARE with drop rate 0.9, followed by linear combination").change
    assert steps["merge.method"] == "dare_linear" and steps["merge.options.density"] == pytest.approx(0.1)
    assert only("Merge method", "REPLACE", "DARE, then TIES").change["merge.method"] == "dare_ties"
    for text in ("TIES, then finetuning", "TIES followed by SLERP"):
        assert only("Merge method", "REPLACE", text).status == "not_executable"
