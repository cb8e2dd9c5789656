"""Multi-task weights of timestep clusters: uncertainty and NashMTL, alone, in a training, resumed, and in a run."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from conftest import T, make_pico_denoiser
from deme_diffusion.config import DataSettings, DecoupleSettings, PretrainSettings, RuntimeSettings
from deme_diffusion.data.splits import Split, load_splits
from deme_diffusion.decoupling import multi_task as module
from deme_diffusion.decoupling.bargaining import bargained, gram
from deme_diffusion.decoupling.memory import estimate
from deme_diffusion.decoupling.multi_task import MultiTask, Nash, Uncertainty, multi_task
from deme_diffusion.decoupling.setup import make_optimizer
from deme_diffusion.decoupling.step import Job, total
from deme_diffusion.decoupling.train import train
from deme_diffusion.division import Runs, name_of, reported, uniform, whole
from deme_diffusion.divisions import log_snr
from deme_diffusion.errors import Interrupted, UserError
from deme_diffusion.files import read_jsonl
from deme_diffusion.models.ddpm import DDPM
from deme_diffusion.models.projection import Projected
from deme_diffusion.recipes.checks import parse
from deme_diffusion.schedule import signal_to_noise
from deme_diffusion.weights import WEIGHTS_NAME, load_state

CPU = torch.device("cpu")
CLUSTERS: list[Runs] = [uniform(3, T).subset(k) for k in range(3)]


@pytest.fixture(scope="module")
def images() -> Split:
    """A few training images."""
    split = load_splits(DataSettings())["train"]
    return replace(split, indices=split.indices[:40])


def job(method: str, *, steps: int = 4, **options: Any) -> Job:
    """One model on all timesteps; a step holds 12 samples in two micro-batches."""
    own = {k: options.pop(k) for k in list(options) if k.startswith("multi_task")}
    own = {"multi_task_clusters": 3, "multi_task_update_steps": 2, "consistency_weight": 1.0, **own}
    settings = {"train_batch_size": 6, "gradient_accumulation_steps": 2, "learning_rate": 1e-2, **options}
    values = DecoupleSettings.model_validate({"num_ranges": 1, **settings})
    return Job("one", values, whole(T), steps, 1e-2, 5, projection="residual", multi_task=method, **own)  # type: ignore[arg-type]


def runtime(**options: Any) -> RuntimeSettings:
    return RuntimeSettings(**{"device": "cpu", "checkpointing_steps": 2, "checkpoints_total_limit": 4, **options})


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_state(folder / "unet" / WEIGHTS_NAME)


class Toy:
    """A linear model and the losses of its tasks, each in one micro-batch or more."""

    def __init__(self, tasks: int = 3) -> None:
        generator = torch.Generator().manual_seed(0)
        self.parameters = [nn.Parameter(torch.randn(4, 3, generator=generator)), nn.Parameter(torch.zeros(4))]
        self.x = torch.randn(tasks, 3, generator=generator)
        self.y = torch.randn(tasks, 4, generator=generator)

    def losses(self, present: list[int], scale: float = 1.0) -> dict[int, torch.Tensor]:
        weight, bias = self.parameters
        return {k: scale * (weight @ self.x[k] + bias - self.y[k]).square().sum() for k in present}

    def gradient(self, loss: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(loss, self.parameters))


# --- the bargaining solution --------------------------------------------------------------------------------------


@given(tasks=st.integers(1, 8), seed=st.integers(0, 10_000), scale=st.floats(1e-6, 1e4), spread=st.floats(0, 3))
def test_the_weights_solve_the_paper_s_equation(tasks: int, seed: int, scale: float, spread: float) -> None:
    rows = np.random.default_rng(seed).standard_normal((tasks, 40))
    gradients = torch.from_numpy(scale * rows * np.logspace(0, spread, tasks)[:, None])
    products = gradients @ gradients.T
    alpha = bargained(products)
    assert (alpha > 0).all()
    torch.testing.assert_close(products @ alpha, 1 / alpha, rtol=1e-8, atol=0)


def test_orthogonal_gradients_of_equal_length_are_weighed_equally() -> None:
    alpha = bargained(4 * torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(alpha, torch.full((5,), 0.5, dtype=torch.float64), rtol=1e-10, atol=0)


def test_orthogonal_gradients_get_one_over_their_length() -> None:
    alpha = bargained(torch.tensor([1.0, 4.0, 1e-8, 1e6], dtype=torch.float64).diag())
    torch.testing.assert_close(alpha, torch.tensor([1.0, 0.5, 1e4, 1e-3], dtype=torch.float64), rtol=1e-10, atol=0)


def test_two_tasks_as_worked_by_hand() -> None:
    """Unit gradients at an angle: a (1 + c) = 1 / a."""
    for cosine in (-0.9, 0.0, 0.5):
        products = torch.tensor([[1.0, cosine], [cosine, 1.0]], dtype=torch.float64)
        torch.testing.assert_close(
            bargained(products), torch.full((2,), (1 + cosine) ** -0.5, dtype=torch.float64), rtol=1e-9, atol=0
        )


def test_gradients_that_are_equal_or_cancel_out_have_finite_weights() -> None:
    one = torch.ones(3, 3, dtype=torch.float64)
    torch.testing.assert_close(bargained(one), torch.full((3,), 3**-0.5, dtype=torch.float64), rtol=1e-9, atol=0)
    against = bargained(torch.tensor([[1.0, -2.0], [-2.0, 4.0]], dtype=torch.float64))
    assert against.isfinite().all()
    assert float(against[0] / against[1]) == pytest.approx(2.0)  # the combined gradient is 0 as well


def test_the_products_are_those_of_whole_gradients() -> None:
    generator = torch.Generator().manual_seed(1)
    gradients = [[torch.randn(2, 3, generator=generator), torch.randn(5, generator=generator)] for _ in range(4)]
    flat = torch.stack([torch.cat([part.flatten() for part in parts]) for parts in gradients]).double()
    torch.testing.assert_close(gram(gradients), flat @ flat.T, rtol=1e-12, atol=0)


# --- uncertainty --------------------------------------------------------------------------------------------------


def test_uncertainty_with_log_variances_of_0_is_the_plain_sum() -> None:
    losses = Toy().losses([0, 1, 2])
    assert torch.equal(Uncertainty(CLUSTERS, 1, CPU)(losses), total(losses))


def test_uncertainty_is_the_loss_of_kendall_et_al() -> None:
    toy, weighing = Toy(), Uncertainty(CLUSTERS, 1, CPU)
    sigma = torch.tensor([0.5, 1.0, 3.0])
    weighing.restore({"log_variances": sigma.square().log()})
    losses = toy.losses([0, 1, 2])
    theirs = sum((losses[k] / (2 * sigma[k] ** 2) + sigma[k].log() for k in losses), torch.tensor(0.0))
    torch.testing.assert_close(weighing(losses), 2 * theirs)
    torch.testing.assert_close(weighing.weights(), sigma**-2)


def test_a_cluster_of_which_nothing_was_drawn_still_counts_with_its_log_variance() -> None:
    """Or what is seldom drawn would be thought to be certain: the mean over micro-batches is that of the whole."""
    toy, weighing = Toy(), Uncertainty(CLUSTERS, 1, CPU)
    weighing.restore({"log_variances": torch.tensor([0.3, -0.2, 1.0])})
    apart = (weighing(toy.losses([0], 2.0)) + weighing(toy.losses([1, 2], 2.0))) / 2
    torch.testing.assert_close(apart, weighing(toy.losses([0, 1, 2])))


def test_log_variances_find_the_logarithm_of_their_losses() -> None:
    weighing = Uncertainty(CLUSTERS, 1, CPU)
    losses = {0: torch.tensor(0.5), 1: torch.tensor(1.0), 2: torch.tensor(2.0)}
    optimizer = torch.optim.Adam(weighing.parameters(), lr=module.OWN_RATE)
    for _ in range(200):
        optimizer.zero_grad()
        weighing(losses).backward()
        optimizer.step()
    torch.testing.assert_close(weighing.weights(), torch.tensor([2.0, 1.0, 0.5]), rtol=0.01, atol=0)


def test_log_variances_are_a_group_of_their_own_without_weight_decay() -> None:
    weighing, parameters = Uncertainty(CLUSTERS, 1, CPU), [nn.Parameter(torch.zeros(2))]
    model, own = make_optimizer(parameters, job("uncertainty", adam_weight_decay=0.1), CPU, weighing).param_groups
    assert model["params"] == parameters
    assert (model["lr"], model["weight_decay"]) == (1e-2, 0.1)
    assert own["params"] == weighing.parameters()
    assert (own["lr"], own["weight_decay"]) == (module.OWN_RATE, 0.0)
    for without in (None, Nash(CLUSTERS, 1, parameters)):
        assert len(make_optimizer(parameters, job("none"), CPU, without).param_groups) == 1


# --- NashMTL ------------------------------------------------------------------------------------------------------


def step_of(weighing: MultiTask, toy: Toy, micro_batches: list[list[int]], step: int = 0) -> None:
    """As the loop takes one: zeroed gradients, each micro-batch, the end."""
    for parameter in toy.parameters:
        parameter.grad = None
    weighing.begin(step, len(micro_batches))
    for present in micro_batches:
        loss = weighing(toy.losses(present))
        if loss.requires_grad:
            (loss / len(micro_batches)).backward()
    weighing.finish()


def assert_gradient_is_weighted(toy: Toy, weights: torch.Tensor, present: list[int], share: float = 1.0) -> None:
    expected = toy.gradient(
        share * sum((weights[k] * loss for k, loss in toy.losses(present).items()), torch.zeros(()))
    )
    for parameter, gradient in zip(toy.parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-6)


def test_nash_leaves_the_bargained_sum_of_gradients_with_weights_of_mean_1() -> None:
    toy = Toy()
    weighing = Nash(CLUSTERS, 2, toy.parameters)
    step_of(weighing, toy, [[0, 1, 2]])
    gradients = [toy.gradient(loss) for loss in toy.losses([0, 1, 2]).values()]
    alpha = bargained(gram(gradients))
    torch.testing.assert_close(weighing.weights(), alpha / alpha.mean(), rtol=1e-6, atol=0)
    assert weighing.weights().std() > 0.05
    assert_gradient_is_weighted(toy, weighing.weights().float(), [0, 1, 2])


def test_nash_takes_the_gradients_of_all_micro_batches_of_a_step_together() -> None:
    toy = Toy()
    whole_step, parts = (Nash(CLUSTERS, 2, toy.parameters) for _ in range(2))
    step_of(whole_step, toy, [[0, 1, 2]])
    step_of(parts, toy, [[2], [0, 1, 2], [1, 0]])
    assert parts.weights().tolist() == pytest.approx(whole_step.weights().tolist(), rel=1e-5)
    assert_gradient_is_weighted(toy, parts.weights().float(), [0, 1, 2], share=2 / 3)  # each in two of three


def test_nash_keeps_its_weights_between_renewals() -> None:
    toy = Toy()
    weighing = Nash(CLUSTERS, 2, toy.parameters)
    step_of(weighing, toy, [[0, 1, 2]])
    renewed = weighing.weights()
    toy.y += 1
    step_of(weighing, toy, [[0, 1, 2]], step=1)
    assert torch.equal(weighing.weights(), renewed)
    assert_gradient_is_weighted(toy, renewed.float(), [0, 1, 2])
    step_of(weighing, toy, [[0, 1, 2]], step=2)
    assert not torch.allclose(weighing.weights(), renewed, rtol=1e-3)


def test_a_cluster_that_a_renewal_does_not_see_keeps_its_weight() -> None:
    toy = Toy()
    weighing = Nash(CLUSTERS, 1, toy.parameters)
    step_of(weighing, toy, [[0, 1, 2]])
    before = weighing.weights()
    step_of(weighing, toy, [[0], [2]])
    after = weighing.weights()
    assert after[1] == before[1]
    assert float(after.sum()) == pytest.approx(3.0)
    alpha = bargained(gram([toy.gradient(loss) for loss in toy.losses([0, 2]).values()]))
    assert float(after[0] / after[2]) == pytest.approx(float(alpha[0] / alpha[1]), rel=1e-5)


def test_gradients_that_are_not_finite_leave_the_weights_and_are_handed_on() -> None:
    toy = Toy()
    weighing = Nash(CLUSTERS, 1, toy.parameters)
    step_of(weighing, toy, [[0, 1, 2]])
    before = weighing.weights()
    toy.y[1] = torch.nan
    step_of(weighing, toy, [[0, 1, 2]])
    assert torch.equal(weighing.weights(), before)
    assert toy.parameters[0].grad is not None
    assert toy.parameters[0].grad.isnan().any()


# --- in a training ------------------------------------------------------------------------------------------------


class Stop(Exception):
    """As good as a kill."""


def stopped_after(monkeypatch: pytest.MonkeyPatch, kind: type[MultiTask], step: int) -> None:
    """Let trainings die when they begin the step after `step`."""
    begin = kind.begin

    def dying(self: MultiTask, at: int, micro_batches: int) -> None:
        if at == step:
            raise Stop
        begin(self, at, micro_batches)

    monkeypatch.setattr(kind, "begin", dying)


@pytest.mark.parametrize("after, every", [(2, 2), (3, 2), (2, 3)])
@pytest.mark.parametrize("method, kind", [("uncertainty", Uncertainty), ("nash", Nash)])
def test_four_steps_are_some_and_a_kill_and_the_rest_to_the_bit(
    method: str, kind: type[MultiTask], after: int, every: int, images: Split, tmp_path: Path
) -> None:
    task = job(method, multi_task_update_steps=every)
    train(make_pico_denoiser(dropout=0.1), images, task, tmp_path / "whole", runtime=runtime())
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        stopped_after(patch, kind, after)
        train(make_pico_denoiser(dropout=0.1), images, task, tmp_path / "parts", runtime=runtime())
    train(make_pico_denoiser(dropout=0.1), images, task, tmp_path / "parts", runtime=runtime())
    last = Path("work/checkpoint-00000004/state.safetensors")
    for name in (last, Path("unet") / WEIGHTS_NAME, Path("raw") / WEIGHTS_NAME, Path("loss.jsonl")):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name
    saved = load_state(tmp_path / "whole" / last)
    key = {"uncertainty": "multi_task/log_variances", "nash": "multi_task/weights"}[method]
    assert saved[key].std() > 0
    last_of_all = max(int(name.split("/")[1]) for name in saved if name.startswith("optimizer/"))
    own = saved[f"optimizer/{last_of_all}/exp_avg"]
    assert (own.shape == (3,)) == (method == "uncertainty")  # the moments of the log-variances


@pytest.mark.parametrize("method", ["uncertainty", "nash"])
def test_one_cluster_trains_nearly_as_without(method: str, images: Split, tmp_path: Path) -> None:
    for name, task in (("with", job(method, steps=1, multi_task_clusters=1)), ("without", job("none", steps=1))):
        train(make_pico_denoiser(), images, task, tmp_path / name, runtime=runtime())
    ours, plain = (weights_of(tmp_path / name) for name in ("with", "without"))
    for key, value in ours.items():
        torch.testing.assert_close(value, plain[key], rtol=1e-3, atol=1e-4)


def test_the_log_tells_the_weights_by_cluster_and_the_losses_by_the_reported_ranges(
    images: Split, tmp_path: Path
) -> None:
    train(make_pico_denoiser(), images, job("nash"), tmp_path, runtime=runtime())
    records = read_jsonl(tmp_path / "loss.jsonl")
    assert ["weights" in record for record in records] == [True, False, True, False]
    assert list(records[0]["weights"]) == [name_of(runs) for runs in CLUSTERS]
    assert sum(records[0]["weights"].values()) == pytest.approx(3.0)
    assert len(set(records[0]["weights"].values())) == 3
    ranges = {name for record in records for name in record["ranges"]}
    assert ranges == set(map(name_of, reported(whole(T), T)))


def test_a_loss_weighting_a_checkpointed_graph_and_half_precision_go_with_nash(images: Split, tmp_path: Path) -> None:
    task = job("nash", steps=1, loss_weighting="p2", mixed_precision="bf16")
    train(make_pico_denoiser(), images, task, tmp_path / "bf16", runtime=runtime())
    plain = job("nash", steps=1)
    for name, checkpointing in (("plain", False), ("again", True)):
        settings = runtime(gradient_checkpointing=checkpointing)
        train(make_pico_denoiser(), images, plain, tmp_path / name, runtime=settings)
    ours, theirs = (read_jsonl(tmp_path / name / "loss.jsonl")[0]["weights"] for name in ("plain", "again"))
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert read_jsonl(tmp_path / "bf16" / "loss.jsonl")[0]["weights"] != pytest.approx(ours, rel=1e-4)


def test_an_interrupted_training_goes_on_with_the_renewed_weights(images: Split, tmp_path: Path) -> None:
    """A signal in the second step: the third renews, the fourth uses what the third found."""
    with pytest.MonkeyPatch.context() as patch:
        begin = Nash.begin

        def signalled(self: Nash, at: int, micro_batches: int) -> None:
            if at == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            begin(self, at, micro_batches)

        patch.setattr(Nash, "begin", signalled)
        with pytest.raises(Interrupted):
            train(make_pico_denoiser(), images, job("nash"), tmp_path / "parts", runtime=runtime())
    train(make_pico_denoiser(), images, job("nash"), tmp_path / "parts", runtime=runtime())
    train(make_pico_denoiser(), images, job("nash"), tmp_path / "whole", runtime=runtime())
    assert weights_of(tmp_path / "parts").keys() == weights_of(tmp_path / "whole").keys()
    for key, value in weights_of(tmp_path / "whole").items():
        assert torch.equal(value, weights_of(tmp_path / "parts")[key]), key


# --- clusters, memory, and what is refused ------------------------------------------------------------------------


def test_clusters_are_cut_uniformly_or_by_the_logarithm_of_the_snr() -> None:
    denoiser = make_pico_denoiser()

    def owners_of(how: str) -> np.ndarray:
        weighing = multi_task(denoiser, job("uncertainty", multi_task_division=how), [], CPU)
        assert weighing is not None
        return weighing.owners

    assert owners_of("uniform").tolist() == uniform(3, T).route.tolist()
    log = denoiser.snr().log().numpy()
    place = 3 * (log[0] - log) / (log[0] - log[-1])
    assert owners_of("log_snr").tolist() == np.minimum(place.astype(int), 2).tolist()


def test_clusters_are_cut_where_a_division_is() -> None:
    denoiser = make_pico_denoiser()
    denoiser.scheduler = type(denoiser.scheduler)()  # in diffusers' float32, one of its edges is another
    task = replace(job("uncertainty", multi_task_division="log_snr"), multi_task_clusters=11)
    weighing = multi_task(denoiser, task, [], CPU)
    assert weighing is not None
    assert weighing.owners.tolist() == log_snr(11, signal_to_noise({})).route.tolist()


def test_the_memory_of_nash_is_a_gradient_more_for_each_cluster() -> None:
    denoiser = make_pico_denoiser()
    plain, nash, uncertainty = (
        estimate(denoiser, job(method), runtime(), CPU)["gradients"] for method in ("none", "nash", "uncertainty")
    )
    largest = max(p.numel() for p in denoiser.module.parameters())
    assert (nash, uncertainty) == (4 * plain + 3 * largest * 16, plain)  # inner products are taken in float64


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_estimate_is_within_a_quarter_of_what_a_renewal_takes(micro_batches: int) -> None:
    from torch.profiler import ProfilerActivity, profile

    denoiser = DDPM.from_scratch(PretrainSettings(), out_seed=0)
    task = replace(job("nash", train_batch_size=32), multi_task_clusters=5)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        student = Projected(denoiser.student(), task.projection).train()
        parameters = list(student.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
        average = [parameter.detach().clone() for parameter in parameters]
        weighing = multi_task(denoiser, task, parameters, CPU)
        assert weighing is not None
        x, t = torch.randn(32, *denoiser.sample_shape), torch.arange(32)
        for step in (0, 2):
            weighing.begin(step, micro_batches)
            for _ in range(micro_batches):
                losses = (denoiser.predict(student, x, t, {}) - x).square().flatten(1).mean(1)
                weighing({k: losses[k::5].sum() / 32 for k in range(5)})
                del losses
            weighing.finish()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        del average
    held = peak = 0
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    needed = estimate(denoiser, task, runtime(), CPU)
    assert 0.75 < (sum(needed.values()) - needed["base"]) / peak < 1.25


def test_too_many_clusters_are_refused() -> None:
    denoiser = make_pico_denoiser()
    with pytest.raises(
        UserError, match="multi_task_clusters: 21 clusters do not fit into 20 timesteps; the most is 20"
    ):
        multi_task(denoiser, job("nash", multi_task_clusters=21), [], CPU)
    with pytest.raises(UserError, match="multi_task_clusters: 19 clusters of equal length in log SNR"):
        multi_task(denoiser, job("nash", multi_task_clusters=19, multi_task_division="log_snr"), [], CPU)


def test_nash_refuses_a_compiled_model_and_uncertainty_does_not() -> None:
    denoiser = make_pico_denoiser()
    with pytest.raises(UserError, match=r"multi_task=nash .*runtime\.compile=false"):
        multi_task(denoiser, job("nash"), [], CPU, compiled=True)
    assert multi_task(denoiser, job("uncertainty"), [], CPU, compiled=True) is not None


@pytest.mark.parametrize(
    "options, message",
    [
        ({"multi_task": "nash", "num_ranges": 2}, "num_ranges=1"),
        ({"multi_task": "nash", "processes": 2}, "processes=1, not 2"),
        ({"multi_task": "uncertainty", "processes": 2}, "processes=1, not 2"),
        ({"multi_task": "nash", "mixed_precision": "fp16"}, "use mixed_precision bf16 or no"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecoupleSettings.model_validate({"num_ranges": 1, **options})


def test_a_recipe_that_compiles_is_refused_before_anything_runs(pico_values: dict[str, Any]) -> None:
    pico_values["decouple"] |= {"num_ranges": 1, "multi_task": "nash"}
    pico_values["runtime"]["compile"] = True
    with pytest.raises(UserError, match=r"nash takes several gradients of one graph: runtime\.compile=false"):
        parse(pico_values, where="pico")


# --- in a run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["uncertainty", "nash"])
def test_a_run_trains_its_one_model_by_the_method(method: str, pico_values: dict[str, Any], tmp_path: Path) -> None:
    from deme_diffusion.pipeline.run import open_run
    from deme_diffusion.recipes import Loaded

    pico_values["decouple"] |= {"num_ranges": 1, "multi_task": method, "multi_task_clusters": 4}
    run = open_run(Loaded(parse(pico_values, where="pico"), {}), out=tmp_path / "run", download=False)
    run.execute([run.graph.experts[0][0]])
    (losses,) = tmp_path.glob("store/decouple/*/loss.jsonl")
    first = read_jsonl(losses)[0]
    assert len(first["weights"]) == 4
    assert all(weight > 0 for weight in first["weights"].values())
    assert set(first["weights"].values()) != {1.0}
