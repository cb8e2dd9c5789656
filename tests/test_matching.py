"""Words, numbers and scores: what texts of one meaning have in common, and what tells others apart."""

from __future__ import annotations

import pytest

from deme_diffusion.ablate.matching import LOOSE, STRICT, concepts, score, tagged
from deme_diffusion.ablate.metrics import metric_of, metrics_of
from deme_diffusion.ablate.replacing import wanted
from deme_diffusion.ablate.text import normalised, numbers, stem, words


def test_spellings_of_one_thing_are_one() -> None:
    texts = ["Fine\u2010tuned time-steps", "finetuned timesteps", "FINE-TUNED TIME STEPS", "fine tuned timestep"]
    assert len({tuple(words(normalised(text))) for text in texts}) == 1
    assert stem("initialisation") == stem("initialization") == stem("initialise") == stem("initialized")
    assert stem("merging") == stem("merged") == stem("merges") == stem("merge")


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("N = 8", [8]),
        ("8 experts", [8]),
        ("p=0.5", [0.5]),
        ("λ=0.1", [0.1]),
        ("50%", [0.5]),
        ("20K", [20_000]),
        ("20,000 steps", [20_000]),
        ("1e-4", [1e-4]),
        ("5\N{MULTIPLICATION SIGN}10⁻⁵", [5e-5]),
        ("10^-4", [1e-4]),
        ("from 0.1 to 0.5", [0.1, 0.5]),
        ("0.1/0.3/0.5", [0.1, 0.3, 0.5]),
        ("p ∈ {0, 0.3, 0.5}", [0, 0.3, 0.5]),
        ("2, 4, 8, or 16 experts", [2, 4, 8, 16]),
        ("two experts", [2]),
        ("half the iterations", [0.5]),
        ("10x smaller", [0.1]),
        ("twice as long", [2]),
        ("P2, SNR+1, 3x3, DPM-Solver++(2M)", []),
        ("[0,100), [100,1000)", [0, 100, 100, 1000]),
        ("", []),
    ],
)
def test_numbers(text: str, values: list[float]) -> None:
    assert [number.value for number in numbers(normalised(text))] == pytest.approx(values)


def test_a_number_knows_its_symbol_and_its_unit() -> None:
    (p,), (iterations,) = numbers(normalised("p = 0.5")), numbers(normalised("20K fine-tuning iterations"))
    assert p.symbol == "p" and iterations.after == "finetun"
    (factor,) = numbers(normalised("half of the current budget"))
    assert factor.of(2400) == 1200 and factor.after == "budget"


def test_the_formula_of_a_score() -> None:
    assert score("consistency losses", ["Consistency loss"]) == 1.0
    assert score("the consistency technique", ["consistency"]) == 1.0  # neutral words say nothing
    one = LOOSE.floor + (1 - LOOSE.floor) * 1 / (1 + LOOSE.unknown)
    assert score("consistency gizmo", ["consistency"]) == pytest.approx(one)
    strict = STRICT.floor + (1 - STRICT.floor) * 0.7 / (0.7 + STRICT.unknown)
    assert score("consistency gizmo", ["consistency"], judgement=STRICT) == pytest.approx(strict)
    assert score("projection", ["consistency"]) == 0.0


def test_later_clauses_count_less() -> None:
    first, second = tagged("merging \u2014 because of the projection")
    assert first.place == 1.0 and second.place < 1.0
    assert score("merging: see the projection", ["merging"]) > score("merging projection", ["merging"])


def test_longer_names_are_read_first_and_never_across_a_comma() -> None:
    assert concepts(normalised("weight averaging")) == ("average",)
    assert concepts(normalised("learning rate decay")) == ("schedule",)
    assert [tag.concept for tag in tagged("TIES, DARE")] == ["ties", "dare"]
    assert [tag.concept for tag in tagged("DARE-TIES")] == ["dareties"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("TIES instead of grid search", "ties"),
        ("Instead of grid search, use TIES", "use ties"),
        ("replace the uniform division with overlapping ranges", "overlapping ranges"),
        ("swap DDIM for DDPM", "ddpm"),
        ("overlapping ranges rather than disjoint ones", "overlapping ranges"),
        ("plain text", "plain text"),
    ],
)
def test_what_is_to_go_is_not_what_is_wanted(text: str, said: str) -> None:
    assert wanted(normalised(text)) == said


@pytest.mark.parametrize(
    ("asked", "columns"),
    [
        ("FID", ("FD",)),
        ("FID-50K (lower is better)", ("FD",)),
        ("Fréchet Inception Distance", ("FD",)),
        ("Inception Score", ("IS",)),
        ("IS", ("IS",)),
        ("KID", ("KID",)),
        ("Precision & Recall", ("precision", "recall")),
        ("density/coverage", ("density", "coverage")),
        ("validation loss", ("loss",)),
        ("Inference latency", ("latency (ms)",)),
        ("peak GPU memory", ("peak memory (MB)",)),
        ("storage cost", ("disk (MB)",)),
        ("number of parameters", ("parameters",)),
        ("model loading time", ("load time (ms)",)),
        ("sampling throughput (images/s)", ("latency (ms)",)),
        ("FID50k", ("FD",)),
        ("clean-FID \N{DOWNWARDS ARROW}", ("FD",)),
        ("CLIP score and FID", ("FD",)),
        ("wall-clock time", ("latency (ms)",)),
    ],
)
def test_metrics(asked: str, columns: tuple[str, ...]) -> None:
    assert metric_of(asked).columns == columns and metric_of(asked).reason == ""


@pytest.mark.parametrize(
    "asked",
    [
        *("CLIP Score", "LPIPS", "human preference", "aesthetic score", "BLEU", "accuracy", "training time", ""),
        *("sFID", "spatial FID", "FID-CLIP", "CLIP-FID", "FD-DINOv2", "FVD", "Recall@k", "Precision@5", "mAP"),
        *("average precision", "hyperparameter robustness", "perceptual loss", "wallpaper score", "log density"),
    ],
)
def test_metrics_that_a_recipe_cannot_give_have_a_reason(asked: str) -> None:
    metric = metric_of(asked)
    assert metric.columns == () and metric.reason.startswith("not applicable: ")


def test_without_metrics_fd_is_told() -> None:
    assert [metric.columns for metric in metrics_of([])] == [("FD",)]
