"""The vertices of the stage graph: a stage with its key and inputs, a model as it is served, all of them. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from deme_diffusion.artefacts import Key
from deme_diffusion.pipeline.inputs import Input

METRICS, COSTS, MERGE = "metrics.json", "cost.json", "merge.json"
SIMILARITY = "similarity.npz"
PROMPTS = "prompts.json"
"""Beside sampled images: what each was asked for by."""
StageName = Literal[
    "data",
    "cache",
    "pretrain",
    "extractor",
    "clip",
    "similarity",
    "decouple",
    "fisher",
    "search",
    "merge",
    "sample",
    "features",
    "clip_score",
    "evaluate",
    "cost",
    "activations",
    "landscape",
    "plane",
    "vectors",
    "trajectory",
]

VERSIONS: dict[StageName, int] = {
    "data": 2,  # splits are shuffled once, max_images is a random choice
    "cache": 1,
    "pretrain": 1,
    "extractor": 1,
    "clip": 1,
    "similarity": 3,  # groups of images, each stratified in t
    "decouple": 1,
    "fisher": 1,
    "search": 2,  # the value of the base beside
    "merge": 2,  # merge.json beside the model
    "sample": 1,
    "features": 2,  # logits too; the statistics of real images beside
    "clip_score": 1,
    "evaluate": 3,  # density, coverage, Inception score
    "cost": 3,  # load time
    "activations": 2,  # channels compared between two parts of space
    "landscape": 2,  # standard errors, by image
    "plane": 2,  # likewise
    "vectors": 2,  # which projections are folded in
    "trajectory": 1,
}
"""Raised when a stage's code or defaults change results, so that old artefacts are not taken for new ones."""


@dataclass(frozen=True, eq=False)
class Node:
    """One stage with its inputs. `arguments` are for the stage's function; the key says all that shapes the result."""

    key: Key
    label: str
    parents: Mapping[str, Node | Input]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 0
    images: int = 0
    exclusive: bool = False

    @property
    def stage(self) -> str:
        """Name of the stage."""
        return self.key.stage

    @cached_property
    def digest(self) -> str:
        """The key's digest."""
        return self.key.digest


@dataclass(frozen=True, eq=False)
class Served:
    """A row's model: one component, or the experts of a routed ensemble."""

    name: str
    parts: tuple[Node | Input, ...]
    ensemble: bool = False


class Vertices:
    """The stages in an order that can be run, each once: equal keys are one stage."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []

    def _add(
        self,
        stage: StageName,
        label: str,
        settings: Mapping[str, Any],
        parents: Mapping[str, Node | Input],
        seed: int | None,
        **options: Any,
    ) -> Node:
        made = Node(self._key(stage, settings, parents, seed), label, parents, **options)
        known = next((node for node in self.nodes if node.digest == made.digest), None)
        if known is None:
            self.nodes.append(made)
        return known or made

    def _key(
        self, stage: StageName, settings: Mapping[str, Any], parents: Mapping[str, Node | Input], seed: int | None
    ) -> Key:
        inputs = {name: parent.digest for name, parent in parents.items()}
        return Key(stage, VERSIONS[stage], self._covered(settings, parents), inputs, seed)

    def _covered(self, settings: Mapping[str, Any], parents: Mapping[str, Node | Input]) -> Mapping[str, Any]:
        """The settings that enter a stage's key."""
        return settings

    def node(self, digest: str) -> Node:
        """The stage of that digest."""
        return next(node for node in self.nodes if node.digest == digest)

    def needed(self, targets: Sequence[Node]) -> list[Node]:
        """The targets and all they are made from, in an order that can be run."""
        wanted: set[str] = set()

        def visit(node: Node) -> None:
            wanted.add(node.digest)
            for parent in node.parents.values():
                if isinstance(parent, Node) and parent.digest not in wanted:
                    visit(parent)

        for target in targets:
            visit(target)
        return [node for node in self.nodes if node.digest in wanted]

    def of_stage(self, stage: str) -> Iterator[Node]:
        """All stages of one name."""
        return (node for node in self.nodes if node.stage == stage)


def figure_file(node: Node) -> str:
    """Name of the data that a figure's stage leaves in its folder."""
    return f"{node.stage}.npz"
