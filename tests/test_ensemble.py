"""The timestep-routed ensemble (Eq. 7): the right expert answers, few are in memory, stock pipelines take it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from conftest import T, make_pico_denoiser
from deme_diffusion.division import Division, uniform
from deme_diffusion.models.ddpm import DDPM
from deme_diffusion.models.ensemble import RoutedEnsemble


class Constant(nn.Module):
    """An expert that answers with its own number, and remembers what it was asked."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor([value]), requires_grad=False)
        self.asked: list[torch.Tensor] = []
        self.positional: list[Any] = []
        self.keywords: list[dict[str, Any]] = []

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype

    def forward(self, sample: torch.Tensor, t: Any, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        self.asked.append(torch.as_tensor(t).reshape(-1))
        self.positional.append(args)
        self.keywords.append(kwargs)
        answer = self.value * torch.ones_like(sample)
        return UNet2DOutput(sample=answer) if return_dict else (answer,)


def identity(t: torch.Tensor) -> torch.Tensor:
    """Timesteps that are indices already."""
    return t.long()


def constants(count: int) -> list[Constant]:
    """Experts that answer 0, 1, 2, ..."""
    return [Constant(float(i)) for i in range(count)]


def ensemble_of(experts: list[Any], division: Division | None = None, **options: Any) -> RoutedEnsemble:
    """An ensemble of modules that are there already."""
    loaders = [lambda expert=expert: expert for expert in experts]
    return RoutedEnsemble(loaders, division or uniform(len(experts), T), identity, **options)


def images(count: int, seed: int = 0) -> torch.Tensor:
    """Noise."""
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def copies(denoiser: DDPM, count: int, **options: Any) -> RoutedEnsemble:
    """N copies of a model as its experts."""
    experts = [copy.deepcopy(denoiser.module).eval() for _ in range(count)]
    loaders = [lambda expert=expert: expert for expert in experts]
    return RoutedEnsemble(loaders, uniform(count, T), denoiser.index, **options)


# --- routing ------------------------------------------------------------------------------------------------------


def test_copies_of_the_base_equal_the_base_to_the_bit_at_every_timestep(pico_denoiser: DDPM) -> None:
    base, ensemble = pico_denoiser.module.eval(), copies(pico_denoiser, 4)
    for t in range(T):
        assert torch.equal(ensemble(images(3), t).sample, base(images(3), t).sample)


def test_the_expert_that_serves_t_answers(pico_denoiser: DDPM) -> None:
    ensemble = ensemble_of(constants(4))
    answers = [float(ensemble(images(1), t).sample.mean()) for t in range(T)]
    assert answers == [t * 4 // T for t in range(T)]


def test_the_route_decides_and_not_membership() -> None:
    member = np.ones((3, T), dtype=bool)  # all experts trained on everything
    route = np.arange(T) % 3
    ensemble = ensemble_of(constants(3), Division(member, route))
    assert [float(ensemble(images(1), t).sample.mean()) for t in range(T)] == route.tolist()


@pytest.mark.parametrize("timestep", [7, torch.tensor(7), torch.tensor([7]), torch.tensor([7, 7, 7])])
def test_a_timestep_may_be_a_number_or_a_tensor(timestep: Any) -> None:
    answer = ensemble_of(constants(4))(images(3), timestep).sample
    assert torch.equal(answer, torch.ones(3, 1, 8, 8))


def test_fractions_and_t_equal_to_T_are_routed_by_the_family(pico_denoiser: DDPM) -> None:
    loaders = [lambda expert=expert: expert for expert in constants(4)]
    ensemble = RoutedEnsemble(loaders, uniform(4, T), pico_denoiser.index)
    assert float(ensemble(images(1), torch.tensor(4.999)).sample.mean()) == 0
    assert float(ensemble(images(1), torch.tensor(float(T))).sample.mean()) == 3


def test_a_batch_of_mixed_timesteps_is_answered_sample_by_sample() -> None:
    experts = constants(4)
    t = torch.tensor([19, 0, 6, 1, 12])
    answer = ensemble_of(experts)(images(5), t).sample
    assert answer.mean((1, 2, 3)).tolist() == [3, 0, 1, 0, 2]
    assert [e.asked[0].tolist() for e in experts] == [[0, 1], [6], [12], [19]]


def test_a_mixed_batch_of_copies_equals_the_base(pico_denoiser: DDPM) -> None:
    t = torch.tensor([19, 0, 6, 1])
    expected = pico_denoiser.module.eval()(images(4), t).sample
    torch.testing.assert_close(copies(pico_denoiser, 4)(images(4), t).sample, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("t", [torch.tensor([0, 0]), torch.tensor([0, 19])])
def test_return_dict_false_gives_a_tuple(t: torch.Tensor) -> None:
    answer = ensemble_of(constants(2))(images(2), t, return_dict=False)
    assert isinstance(answer, tuple)
    assert answer[0].shape == (2, 1, 8, 8)


def test_conditions_of_a_mixed_batch_go_with_their_samples_by_name_and_by_place() -> None:
    experts = constants(2)
    labels, states = torch.tensor([5, 6, 7]), torch.tensor([[1.0], [2.0], [3.0]])
    ensemble_of(experts)(images(3), torch.tensor([0, 19, 1]), labels, states=states)
    assert [e.positional[0][0].tolist() for e in experts] == [[5, 7], [6]]
    assert [e.keywords[0]["states"].tolist() for e in experts] == [[[1.0], [3.0]], [[2.0]]]


def test_as_many_loaders_as_experts_are_asked_for() -> None:
    with pytest.raises(ValueError, match="3 experts for a division into 4"):
        ensemble_of(constants(3), uniform(4, T))


# --- memory -------------------------------------------------------------------------------------------------------


def counting(count: int) -> tuple[list[Callable[[], nn.Module]], list[int]]:
    """Loaders, and the numbers of the experts in the order in which they were loaded."""
    loaded: list[int] = []

    def loader(i: int) -> Callable[[], nn.Module]:
        def load() -> nn.Module:
            loaded.append(i)
            return Constant(float(i))

        return load

    return [loader(i) for i in range(count)], loaded


@pytest.mark.parametrize("resident", [1, 2, 4])
def test_at_most_k_experts_are_in_memory(resident: int) -> None:
    loaders, _ = counting(4)
    ensemble = RoutedEnsemble(loaders, uniform(4, T), identity, resident=resident)
    for t in (19, 12, 6, 0, 19, 6):
        assert float(ensemble(images(1), t).sample.mean()) == t * 4 // T
        assert len(list(ensemble.parameters())) <= resident
    mixed = ensemble(images(4), torch.tensor([0, 6, 12, 19])).sample
    assert mixed.mean((1, 2, 3)).tolist() == [0, 1, 2, 3]
    assert len(list(ensemble.parameters())) <= resident


def test_one_pass_of_sampling_loads_each_expert_once() -> None:
    loaders, loaded = counting(4)
    ensemble = RoutedEnsemble(loaders, uniform(4, T), identity, resident=1)
    loaded.clear()
    for t in reversed(range(T)):
        ensemble(images(1), t)
    assert loaded == [3, 2, 1, 0]


def test_the_expert_used_longest_ago_makes_room() -> None:
    loaders, loaded = counting(3)
    ensemble = RoutedEnsemble(loaders, uniform(3, 3), identity, resident=2)
    for t in (0, 1, 0, 2, 0, 1):
        ensemble(images(1), t)
    assert loaded == [0, 1, 2, 1]


# --- standing in for the component --------------------------------------------------------------------------------


def test_config_dtype_device_and_methods_are_the_experts(pico_denoiser: DDPM) -> None:
    ensemble = copies(pico_denoiser, 2)
    assert ensemble.config == pico_denoiser.module.config
    assert ensemble.dtype == torch.float32
    assert ensemble.device == torch.device("cpu")
    assert ensemble.num_parameters() == pico_denoiser.module.num_parameters()
    with pytest.raises(AttributeError):
        _ = ensemble.no_such_attribute


def test_moving_to_a_dtype_and_device_reaches_experts_that_are_loaded_later() -> None:
    loaders, _ = counting(3)
    ensemble = RoutedEnsemble(loaders, uniform(3, T), identity, resident=1).to(torch.float64)
    for t in (0, 10, 19, 0):
        assert ensemble(images(1), t).sample.dtype == torch.float64
        assert ensemble.dtype == torch.float64
    ensemble.to("meta")
    assert ensemble.expert(2).value.device.type == "meta"
    assert ensemble.expert(2).value.dtype == torch.float64


def test_a_stock_pipeline_samples_with_it_what_it_samples_with_the_base(pico_denoiser: DDPM) -> None:
    def sample(unet: Any) -> np.ndarray:
        pipeline = DDPMPipeline(unet=unet, scheduler=DDIMScheduler.from_config(pico_denoiser.scheduler.config))
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return pipeline(batch_size=2, num_inference_steps=10, generator=generator, output_type="np").images

    base = sample(pico_denoiser.module.eval())
    assert base.std() > 0
    np.testing.assert_array_equal(sample(copies(pico_denoiser, 4, resident=1)), base)
    other = make_pico_denoiser(seed=1)
    mixed = RoutedEnsemble([lambda: pico_denoiser.module, lambda: other.module], uniform(2, T), other.index)
    assert not np.array_equal(sample(mixed), base)
