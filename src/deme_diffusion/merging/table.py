"""The merge methods, a row each with its source: what a method takes, and what it gets where nothing is said. No torch.

The functions lie in `merging/methods/`, under the row's own name. theta is the base, tau_i = theta_i - theta.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deme_diffusion.config import MethodOptions
from deme_diffusion.errors import UserError, nearest


@dataclass(frozen=True)
class Method:
    """One way of merging the tensors of a parameter.

    `module` of `merging.methods` holds the function; `defaults` are the options that it takes and their values;
    `ones`: weights that nobody gives are 1 (the method averages by itself), else 1/N; `experts`: how many it takes, if
    that is fixed; `weighted`: takes weights at all; `spectral`: decomposes matrices, so that its time is told first;
    `pointwise`: an entry of the result depends on that entry alone, so that tensors may be merged in slices;
    `thresholds`: and on thresholds, for which each whole |tau_i| is looked at first; `fisher`: takes a file of Fisher
    information an expert; `relative`: only the ratios of its weights count, so that 2 w makes the same model as w.
    """

    name: str
    module: str
    what: str
    source: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    ones: bool = False
    experts: int | None = None
    weighted: bool = True
    spectral: bool = False
    pointwise: bool = False
    thresholds: bool = False
    fisher: bool = False
    relative: bool = False

    @property
    def options(self) -> list[str]:
        """Names of the options that it takes."""
        return list(self.defaults)

    def resolved(self, given: MethodOptions) -> MethodOptions:
        """Its options, with its own defaults where nothing is given. Raises UserError for one it does not take."""
        for name in given.changed():
            if name not in self.options:
                takes = f"takes {', '.join(self.options)}" if self.options else "takes no options"
                raise UserError(f"{name}: method {self.name} {takes}{nearest(name, self.options)}")
        return MethodOptions(**{**self.defaults, **given.changed()})

    def default_weights(self, num_experts: int) -> list[float]:
        """The weights where none are given."""
        return [1.0 if self.ones else 1.0 / num_experts] * num_experts

    def check(self, num_experts: int) -> None:
        """Raises UserError when it does not take so many experts."""
        if self.experts not in (None, num_experts):
            raise UserError(
                f"method {self.name} merges {self.experts} experts, {num_experts} are given; use task_arithmetic"
            )

    def check_fisher(self, files: int, num_experts: int) -> None:
        """Raises UserError unless it gets a file of Fisher information an expert if it takes any, and none if not."""
        if files and not self.fisher:
            raise UserError(f"fisher: method {self.name} takes no Fisher information; use method fisher")
        if self.fisher and files != num_experts:
            raise UserError(
                f"fisher: {files} files given for {num_experts} experts; method {self.name} takes one an expert, in "
                "their order: `deme fisher RECIPE` makes them"
            )


_DARE = "Yu et al. 2024, arXiv 2311.03099"
_ROWS = (
    Method(
        "task_arithmetic",
        "linear",
        "theta + sum_i w_i tau_i",
        "Ilharco et al. 2023, arXiv 2212.04089; DeMe Eq. 8",
        pointwise=True,
    ),
    Method(
        "average",
        "linear",
        "the mean of the experts; no weights",
        "Wortsman et al. 2022, arXiv 2203.05482",
        weighted=False,
        pointwise=True,
    ),
    Method(
        "ties",
        "sparse",
        "keep the largest entries, elect signs, mean of those that agree",
        "Yadav et al. 2023, arXiv 2306.01708",
        {"density": 0.2, "trim": "tensor"},
        ones=True,
        pointwise=True,
        thresholds=True,
    ),
    Method(
        "dare_linear",
        "sparse",
        "drop entries at random, rescale, add",
        _DARE,
        {"density": 0.5, "seed": 0},
        pointwise=True,
    ),
    Method(
        "dare_ties",
        "sparse",
        "drop at random, rescale, then as TIES",
        _DARE,
        {"density": 0.5, "seed": 0},
        ones=True,
        pointwise=True,
    ),
    Method(
        "breadcrumbs",
        "sparse",
        "remove the largest and the smallest entries, add",
        "Davari and Belilovsky 2024, arXiv 2312.06795",
        {"density": 0.9, "outliers": 0.01},
        pointwise=True,
        thresholds=True,
    ),
    Method(
        "della",
        "sparse",
        "drop by rank within a row, rescale, elect signs, mean of those that agree",
        "Deep et al. 2024, arXiv 2406.11617",
        {"density": 0.5, "epsilon": 0.2, "seed": 0},
        ones=True,
    ),
    Method(
        "slerp",
        "linear",
        "the arc of two task vectors at t = |w2| / s, times s = |w1| + |w2|; a sign turns its vector",
        "Shoemake 1985, doi 10.1145/325334.325242",
        experts=2,
    ),
    Method(
        "fisher",
        "linear",
        "mean weighted by each expert's diagonal Fisher information",
        "Matena and Raffel 2022, arXiv 2111.09832",
        fisher=True,
        pointwise=True,
        relative=True,
    ),
    Method(
        "tsv",
        "spectral",
        "each expert's leading singular vectors, decorrelated",
        "Gargiulo et al. 2025, arXiv 2412.00081",
        {"rank": None},
        ones=True,
        spectral=True,
    ),
    Method(
        "iso_c",
        "spectral",
        "the sum's singular values made equal",
        "Marczak et al. 2025, arXiv 2502.04959",
        ones=True,
        spectral=True,
    ),
    Method(
        "wudi",
        "spectral",
        "least interference with each expert, in closed form",
        "Cheng et al. 2025, arXiv 2503.08099",
        ones=True,
        spectral=True,
        relative=True,
    ),
)
METHODS = {row.name: row for row in _ROWS}
LINEAR = ("task_arithmetic", "average")
"""Methods whose result is a weighted sum of the changes, the weights being known beforehand."""


def method(name: str, *, key: str = "merge.method") -> Method:
    """The row of that name. Raises UserError with the nearest name."""
    if name not in METHODS:
        raise UserError(f"{key}: unknown method {name!r}{nearest(str(name), METHODS)}")
    return METHODS[name]
