"""One model whose clusters of timesteps are tasks, weighed against each other (Go et al. 2023, ANT).

A task's loss L_k is its share of the batch's mean loss: weights of 1 give the plain sum, and a task of which a
micro-batch holds nothing adds 0 to it. It is the task's own mean times how often the task is drawn, a factor that the
optimal s_k and alpha_k make up for. `max_grad_norm` clips the model's gradient of the weighted sum, as without weights;
a method's own parameters are not clipped. The losses in the log are not weighted by it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import nn

from deme_diffusion.decoupling.bargaining import bargained, gram
from deme_diffusion.decoupling.step import Job
from deme_diffusion.division import Division, Runs, from_runs, name_of, owners, uniform
from deme_diffusion.divisions import log_snr
from deme_diffusion.errors import UserError
from deme_diffusion.models.denoiser import Denoiser
from deme_diffusion.schedule import signal_to_noise
from deme_diffusion.weights import State

OWN_RATE = 0.025
"""Learning rate of the log-variances, constant: that of NashMTL's own experiments with uncertainty weighting."""


class MultiTask(ABC):
    """A `Combine` of the clusters' losses, with what a training must carry for it: parameters, state, gradients."""

    def __init__(self, clusters: list[Runs], every: int) -> None:
        self.names, self.every = [name_of(runs) for runs in clusters], every
        self.owners = owners(clusters, sum(len(from_runs(runs)) for runs in clusters))

    @abstractmethod
    def __call__(self, losses: dict[int, torch.Tensor]) -> torch.Tensor: ...

    @abstractmethod
    def weights(self) -> torch.Tensor:
        """What each cluster's loss is multiplied with, (K,)."""

    @abstractmethod
    def state(self) -> State:
        """What a checkpoint keeps."""

    @abstractmethod
    def restore(self, state: State) -> None:
        """The inverse of `state`."""

    @abstractmethod
    def begin(self, step: int, micro_batches: int) -> None:
        """Before the first of a step's micro-batches, after `step` steps."""

    @abstractmethod
    def finish(self) -> None:
        """After the last one's backward pass."""

    def parameters(self) -> list[nn.Parameter]:
        """Its own, which are optimised together with the model."""
        return []

    def told(self, step: int) -> dict[str, float] | None:
        """The weights that step `step` (from 1) ended with, by cluster: for the log, at every `every`-th step."""
        return None if (step - 1) % self.every else dict(zip(self.names, self.weights().tolist(), strict=True))


class Uncertainty(MultiTask):
    """sum_k exp(-s_k) L_k + s_k with learned log-variances s_k, 0 at first.

    It is twice 1 / (2 sigma_k^2) L_k + log sigma_k, the loss of a regression (Kendall et al. 2018, Eq. 7), with
    s_k = log sigma_k^2.
    """

    def __init__(self, clusters: list[Runs], every: int, device: torch.device) -> None:
        super().__init__(clusters, every)
        self.log_variances = nn.Parameter(torch.zeros(len(clusters), device=device))

    def __call__(self, losses: dict[int, torch.Tensor]) -> torch.Tensor:
        weights = torch.exp(-self.log_variances)
        return torch.stack([weights[k] * loss for k, loss in losses.items()]).sum() + self.log_variances.sum()

    def weights(self) -> torch.Tensor:
        return torch.exp(-self.log_variances.detach())

    def parameters(self) -> list[nn.Parameter]:
        return [self.log_variances]

    def begin(self, step: int, micro_batches: int) -> None:
        pass

    def finish(self) -> None:
        pass

    def state(self) -> State:
        return {"log_variances": self.log_variances.detach()}

    @torch.no_grad()
    def restore(self, state: State) -> None:
        self.log_variances.copy_(state["log_variances"])


class Nash(MultiTask):
    """sum_k alpha_k L_k with NashMTL's weights (Navon et al. 2022): G^T G alpha = 1 / alpha, every so many steps anew.

    G holds the clusters' gradients of a whole step, all micro-batches together. Only the direction is Nash's: alpha is
    scaled to a mean of 1, so that learning rate and max_grad_norm mean what they mean without it. A cluster of which a
    step holds nothing keeps its weight. All K gradients are in memory at once.
    """

    def __init__(self, clusters: list[Runs], every: int, parameters: list[nn.Parameter]) -> None:
        super().__init__(clusters, every)
        self.trained = parameters
        self._weights = torch.ones(len(clusters), dtype=torch.float64)
        self._gathered: dict[int, list[torch.Tensor]] | None = None
        self._micro_batches = 1

    def __call__(self, losses: dict[int, torch.Tensor]) -> torch.Tensor:
        if self._gathered is not None:
            self._gather(losses)
        loss = torch.stack([float(self._weights[k]) * loss for k, loss in losses.items()]).sum()
        return loss if self._gathered is None else loss.detach()

    def weights(self) -> torch.Tensor:
        return self._weights.clone()

    def state(self) -> State:
        return {"weights": self._weights}

    def restore(self, state: State) -> None:
        self._weights = state["weights"].cpu()

    def begin(self, step: int, micro_batches: int) -> None:
        self._micro_batches = micro_batches
        self._gathered = {} if step % self.every == 0 else None

    def finish(self) -> None:
        """Renew the weights where the gradients were gathered, and leave their weighted sum as the gradient."""
        if self._gathered is None:
            return
        gathered, self._gathered = self._gathered, None
        present = sorted(gathered)
        self._renew(present, gram([gathered[k] for k in present]).cpu())
        for i, parameter in enumerate(self.trained):
            parameter.grad = torch.zeros_like(parameter)
            for k in present:
                parameter.grad.add_(gathered[k][i], alpha=float(self._weights[k]))

    def _gather(self, losses: dict[int, torch.Tensor]) -> None:
        assert self._gathered is not None
        last = max(losses)
        # Autocast is for the forward pass alone.
        with torch.autocast(next(iter(losses.values())).device.type, enabled=False):
            for k, loss in sorted(losses.items()):
                found = torch.autograd.grad(
                    loss / self._micro_batches, self.trained, retain_graph=k != last, materialize_grads=True
                )
                if k not in self._gathered:
                    self._gathered[k] = list(found)
                    continue
                for held, more in zip(self._gathered[k], found, strict=True):
                    held.add_(more)

    def _renew(self, present: list[int], products: torch.Tensor) -> None:
        """The clusters that were there share their weights anew; not by gradients that are 0 or not finite."""
        if bool(products.isfinite().all()) and bool((products.diagonal() > 0).all()):
            alpha = bargained(products)
            self._weights[present] = alpha * (self._weights[present].sum() / alpha.sum())


def multi_task(
    denoiser: Denoiser, job: Job, parameters: list[nn.Parameter], device: torch.device, *, compiled: bool = False
) -> MultiTask | None:
    """How a job weighs clusters of timesteps; None where it does not. Raises UserError for what does not go with it."""
    if job.multi_task == "none":
        return None
    division = _division(denoiser, job)
    clusters = [division.subset(k) for k in range(division.num_experts)]
    if job.multi_task == "uncertainty":
        return Uncertainty(clusters, job.multi_task_update_steps, device)
    if compiled:  # its backward pass gives the graph's memory back after the first of the K gradients
        raise UserError("multi_task=nash takes several gradients of one graph; use runtime.compile=false")
    return Nash(clusters, job.multi_task_update_steps, parameters)


def _division(denoiser: Denoiser, job: Job) -> Division:
    clusters, timesteps = job.multi_task_clusters, denoiser.num_train_timesteps
    if clusters > timesteps:
        raise UserError(
            f"decouple.multi_task_clusters: {clusters} clusters do not fit into {timesteps} timesteps; "
            f"the most is {timesteps}"
        )
    if job.multi_task_division == "uniform":
        return uniform(clusters, timesteps)
    try:
        return log_snr(clusters, signal_to_noise(denoiser.scheduler.config))
    except UserError:
        raise UserError(
            f"decouple.multi_task_clusters: {clusters} clusters of equal length in log SNR leave one without any of "
            f"{timesteps} timesteps; take fewer, or multi_task_division=uniform"
        ) from None
