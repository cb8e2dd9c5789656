"""How the processes of one training stay together: what one knows and all must act on goes round before they do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from deme_diffusion.decoupling.step import StepLosses
from deme_diffusion.errors import UserError


def gathered(
    accelerator: Accelerator, losses: list[StepLosses], norm: torch.Tensor, stop: bool
) -> tuple[list[StepLosses], float, bool]:
    """All processes' losses of a step, sample by sample in their global order, the gradient's norm, who wants to stop.

    One transfer from the device, and the only time in a step that the CPU waits for it.
    """
    rows = torch.stack([torch.stack([part.loss, part.denoising, part.consistency]) for part in losses])
    micro, kinds, batch = rows.shape
    values = torch.cat([rows.flatten(), norm.detach().to(rows).reshape(1)])
    if accelerator.num_processes == 1:
        fetched, owners, stops = values[None].cpu(), [part.owner for part in losses], [stop]
    else:
        known = torch.cat([*(part.owner for part in losses), torch.tensor([int(stop)])]).to(values)
        everything = accelerator.gather(torch.cat([values, known])[None]).cpu()
        fetched, rest = everything[:, : len(values)], everything[:, len(values) :].long()
        owners = list(rest[:, :-1].reshape(-1, micro, batch).transpose(0, 1).reshape(micro, -1))
        stops = [bool(value) for value in rest[:, -1]]
    by_process = fetched[:, :-1].reshape(-1, micro, kinds, batch)
    parts = by_process.permute(1, 2, 0, 3).reshape(micro, kinds, -1)
    together = [StepLosses(part[0], part[1], part[2], owner) for part, owner in zip(parts, owners, strict=True)]
    return together, float(fetched[0, -1]), any(stops)


def any_of(accelerator: Accelerator, wish: bool) -> bool:
    """Whether any process wishes so."""
    return wish if accelerator.num_processes == 1 else any(gather_object([wish]))


def from_main(accelerator: Accelerator, value: Any) -> Any:
    """The main process's value."""
    return value if accelerator.num_processes == 1 else broadcast_object_list([value])[0]


def all_allow(accelerator: Accelerator, check: Callable[[], object]) -> None:
    """Run a check that may raise UserError; the first process's objection is raised in all."""
    objection: UserError | None = None
    try:
        check()
    except UserError as error:
        objection = error
    told = [str(objection or "")]
    first = next(filter(None, told if accelerator.num_processes == 1 else gather_object(told)), None)
    if first is not None:
        raise objection or UserError(first)
