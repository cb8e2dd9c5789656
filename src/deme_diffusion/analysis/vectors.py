"""Entries of the task vectors layer by layer, and their norms block by block (Fig. 6b).

A layer is a module that holds weights: its weight and bias are looked at together. tau_i = theta_i - theta is that of
the models as they are served: a projection that folds is in its operation's weight, one that does not is a layer of
its own in the group `projection`, with theta = 0. Tensors are streamed, a layer at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import closing
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from deme_diffusion.errors import UserError
from deme_diffusion.figure_file import write_figure
from deme_diffusion.merging.opening import Parents
from deme_diffusion.merging.statistics import PROJECTION, Statistics, group_of
from deme_diffusion.merging.table import method
from deme_diffusion.merging.vectors import Weight, computable, finite, wide
from deme_diffusion.models.projection import FILE, fold_tensor
from deme_diffusion.rng import generator
from deme_diffusion.weight_files import PROJECTION_KEY

log = logging.getLogger(__name__)
Array = npt.NDArray[np.float64]
Tensors = list[torch.Tensor]
LEVELS = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
"""Of the quantiles."""
MOST, SAMPLE = 2**22, 2**20
"""A layer of more entries is known by a seeded sample of so many, drawn with replacement."""
_FIRST: tuple[str, ...] = (
    *("conv_in", "pos_embed", "patch_embed", "patch_embedding", "x_embedder", "time_proj", "time_embedding"),
    *("time_text_embed", "condition_embedder", "class_embedding", "add_embedding", "encoder_hid_proj"),
    *("context_embedder", "group_norm", "norm", "norm1", "norm1_context", "proj_in", "conv1", "attn1"),
    *("time_emb_proj", "norm2", "conv2", "attn2", "norm3", "to_q", "to_k", "to_v", "norm_q", "norm_k"),
    *("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k"),
)
_LAST: tuple[str, ...] = (
    *("downsamplers", "upsamplers", "down_blocks", "mid_block", "up_blocks", "single_transformer_blocks", "to_out"),
    *("to_add_out", "conv_shortcut", "scale_shift_table", "conv_norm_out", "norm_out", "conv_out", "proj_out"),
    *("proj_out_1", "proj_out_2", PROJECTION),
)
_INTERLEAVED = ("resnets", "attentions", "motion_modules")
"""Lists of a U-Net's block whose members take turns in the forward."""


def write_vectors(path: Path, base: Path, experts: Sequence[Path], *, names: Sequence[str]) -> dict[str, Any]:
    """Leave `quantiles` (N, layers, 7), `mean_absolute` (N, layers), `base_rms` (layers,), `entries` (layers,) and
    `relative_norms` (N, blocks): ||tau_i|| / ||theta||, NaN where theta is 0.

    In the meta: `layers` in the order of the forward, `blocks` and `of_block` (the block's number of each layer),
    `levels`, `sampled` (layers of more than `MOST` entries), `folded` (places whose projections are in a weight), norms
    and cosines of the whole model without others. Returns the norms of the whole. Raises UserError for keys that
    differ, and for entries that are not finite.
    """
    with closing(Parents(base, experts, method("task_arithmetic"), ())) as parents:
        layers = _layers(parents)
        sizes = {layer: sum(_size(parents, key) for key in keys) for layer, keys in layers.items()}
        matrices = {place for own in parents.matrices for place in own}
        folded = sorted(matrices - set(parents.unfolded_places))
        statistics = Statistics(len(experts), sum(sizes.values()))
        rows = list[tuple[Array, Array, float]]()
        for number, (layer, keys) in enumerate(layers.items()):
            if number % 100 == 0:
                log.info("task vectors: %d of %d layers", number, len(layers))
            rows.append(_layer(parents, layer, keys, statistics))
    groups, whole = statistics.groups(), statistics.whole().as_dict()
    of = [group_of(keys[0]) for keys in layers.values()]
    blocks = list(dict.fromkeys(of))
    relative = np.array([groups[block].as_dict()["relative_norms"] for block in blocks], np.float64).T
    told = {
        "names": list(names),
        "layers": list(layers),
        "blocks": blocks,
        "of_block": [blocks.index(block) for block in of],
        "levels": LEVELS,
        "folded": folded,
        "sampled": [layer for layer, size in sizes.items() if size > MOST],
        "sample": SAMPLE,
        "whole": whole,
    }
    write_figure(
        path,
        "vectors",
        told,
        quantiles=np.stack([quantiles for quantiles, _, _ in rows], 1),
        mean_absolute=np.stack([absolute for _, absolute, _ in rows], 1),
        base_rms=np.array([rms for _, _, rms in rows]),
        entries=np.array(list(sizes.values())),
        relative_norms=relative,
    )
    pairs = [whole["cosines"][i][j] for i, j in combinations(range(len(experts)), 2)]
    cosines = [cosine for cosine in pairs if cosine is not None]
    return {"relative_norms": whole["relative_norms"], "mean_cosine": float(np.mean(cosines)) if cosines else None}


# -- layers ---------------------------------------------------------------------------------------


def _layers(parents: Parents) -> dict[str, list[str]]:
    """Layer -> its keys, in the order of the forward; what no task vector can move, and empty tensors, left out."""
    projections = [f"{PROJECTION_KEY}{place}" for place in parents.unfolded_places]
    layers: dict[str, list[str]] = {}
    for key in sorted(filter(lambda key: _moves(parents, key), parents.keys()), key=forward_order):
        layers.setdefault(key.rpartition(".")[0] or key, []).append(key)
    if not layers:
        raise UserError(f"{parents.base.path}: no tensor of floating point numbers, so no task vector")
    return layers | {name: [name] for name in sorted(projections, key=forward_order)}


def _moves(parents: Parents, key: str) -> bool:
    """Not so a buffer of indices; nor infinities that all models share: a mask."""
    if not parents.base.dtype(key).is_floating_point or 0 in parents.base.shape(key):
        return False
    base = parents.base.tensor(key)
    return finite(base) or any(not torch.equal(base, expert.tensor(key)) for expert in parents.experts)


def _size(parents: Parents, key: str) -> int:
    if not key.startswith(PROJECTION_KEY):
        return int(np.prod(parents.base.shape(key), dtype=np.int64))
    return next(own[place].numel() for own in parents.matrices if (place := key.removeprefix(PROJECTION_KEY)) in own)


def forward_order(name: str) -> list[tuple[int, int, str]]:
    """A sort key: diffusers' names in the order in which a forward meets them, others as they are named, numbers as
    numbers."""
    parts, order, at = name.split("."), list[tuple[int, int, str]](), 0
    while at < len(parts):
        part, following = parts[at], parts[at + 1 : at + 2]
        if part in _INTERLEAVED and following and following[0].isdigit():
            order.append((0, int(following[0]), str(_INTERLEAVED.index(part))))
            at += 2
            continue
        order.append((0, int(part), "") if part.isdigit() else (_rank(part), 0, part))
        at += 1
    return order


def _rank(part: str) -> int:
    if part in _FIRST:
        return _FIRST.index(part) - len(_FIRST)
    return _LAST.index(part) + 1 if part in _LAST else 0


# -- entries --------------------------------------------------------------------------------------


def _layer(parents: Parents, layer: str, keys: Sequence[str], statistics: Statistics) -> tuple[Array, Array, float]:
    """(quantiles (N, 7), mean |tau| (N,), root mean square of theta) of one layer, whose norms go to `statistics`."""
    models = [_models(parents, key) for key in keys]
    for key, (base, experts) in zip(keys, models, strict=True):
        statistics.see(key, base.reshape(-1), [expert.reshape(-1) for expert in experts])
    theta = torch.cat([base.reshape(-1) for base, _ in models])
    quantiles, absolute = [], []
    for i in range(len(parents.experts)):
        tau = torch.cat([(Weight(own[i]) - Weight(base)).value.reshape(-1) for base, own in models])
        absolute.append(float(tau.abs().mean(dtype=torch.float64)))
        quantiles.append(quantiles_of(tau, layer))
    return np.array(quantiles), np.array(absolute), float(theta.double().square().mean().sqrt())


def _models(parents: Parents, key: str) -> tuple[torch.Tensor, Tensors]:
    """The base's tensor and the experts', folded, in float32 or wider. Raises UserError where one is not finite."""
    if key.startswith(PROJECTION_KEY):
        place = key.removeprefix(PROJECTION_KEY)
        matrices = [own.get(place) for own in parents.matrices]
        zeros = torch.zeros_like(next(wide(matrix) for matrix in matrices if matrix is not None))
        base, experts = zeros, [zeros if matrix is None else wide(matrix) for matrix in matrices]
    else:
        base, experts = wide(computable(parents.base.tensor(key))), [_folded(parents, key, i)
                        for i in range(len(parents.experts))]  # fmt: skip
    for reader, tensor in zip((parents.base, *parents.experts), (base, *experts), strict=True):
        if not finite(tensor):
            beside = f" or its {FILE}" if parents.folding(key) or key.startswith(PROJECTION_KEY) else ""
            raise UserError(f"{key}: NaN or infinity in {reader.path}{beside}; a task vector has numbers only")
    return base, experts


def _folded(parents: Parents, key: str, i: int) -> torch.Tensor:
    tensor = wide(computable(parents.experts[i].tensor(key)))
    for place in parents.folding(key):
        if (matrix := parents.matrices[i].get(place)) is not None:
            tensor = fold_tensor(tensor, matrix)
    return tensor


def quantiles_of(tau: torch.Tensor, layer: str) -> Array:
    """(7,) quantiles at `LEVELS` of a layer's entries; of more than `MOST`, those of a sample that the layer's name
    seeds."""
    if tau.numel() > MOST:
        tau = tau[torch.from_numpy(generator(0, "vectors", layer).integers(tau.numel(), size=SAMPLE))]
    return np.asarray(np.quantile(tau.double().numpy(), LEVELS), np.float64)
