"""What a run has to show: weights, curves, grids, figures and experiments, from what its stages left. No torch."""

from __future__ import annotations

import logging
import math
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deme_diffusion.artefacts import Store
from deme_diffusion.config import FIGURES, FigureName, Recipe
from deme_diffusion.errors import UserError
from deme_diffusion.files import read_jsonl, write_bytes, write_npy
from deme_diffusion.pipeline import found
from deme_diffusion.pipeline.dividing import in_sigmas
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.inputs import Input
from deme_diffusion.pipeline.merges import HowToMerge
from deme_diffusion.pipeline.node import MERGE, Node, figure_file
from deme_diffusion.provenance import machine_of, made_by
from deme_diffusion.recipes import to_yaml
from deme_diffusion.report.ablation_record import check_record
from deme_diffusion.report.drawing.gallery import FOLDER as FIGURES_FOLDER
from deme_diffusion.report.drawing.gallery import draw_figures
from deme_diffusion.report.figures import sample_grid
from deme_diffusion.report.tables import Row
from deme_diffusion.weight_files import read_json

log = logging.getLogger(__name__)
RUN = "run.json"
"""In a run folder: `command` of the run, its `stages`, and when it has `finished`."""
ASKED = "figures_asked"
"""In `run.json`: figures that were asked for by name."""
ABLATIONS, RECORD = "ablations", "ablation.json"
"""Where a run folder holds its experiments, and what each of them found."""
GRID_IMAGES, GRID_WIDTH = 64, 640  # of a grid on disk: how many images, and about how many pixels across
LOSSES, VALIDATION, SEARCH, IMAGES = "loss.jsonl", "validation.jsonl", "search.json", "images.npy"
"""Files of trainings, searches and samples (`decoupling.journal`, `pipeline.searching`, `evaluation.sample`)."""
GRIDS = ("base", "all-timesteps", "ensemble", "merged")


@dataclass
class Evidence:
    """An opened run: its recipe, folder, store and graph. `stages` grows as stages finish or are found done."""

    recipe: Recipe
    folder: Path
    store: Store
    graph: Graph
    command: str = ""
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def merged(self) -> Path:
        """Where the merged pipeline is linked, made or not; with several seeds that of the first."""
        return self.folder / f"merged{self.suffix(self.recipe.seeds[0])}"

    def suffix(self, seed: int) -> str:
        """What names of links end with, where there are several seeds."""
        return "" if len(self.recipe.seeds) == 1 else f"-seed{seed}"

    def required(self) -> list[Node]:
        """What the table is made of: all stages but those of figures alone."""
        drawn = {node.digest for nodes in self.graph.figures.values() for node in nodes}
        return self.graph.needed([node for node in self.graph.nodes if node.digest not in drawn])

    def content(self, rows: list[Row]) -> dict[str, Any]:
        """What the page and the card show."""
        seed = self.recipe.seeds[0]
        figures = self.draw(self._figures())
        content: dict[str, Any] = {
            "recipe": self.recipe.name,
            "description": self.recipe.description,
            "demonstration": self.recipe.demonstration,
            "command": first_command(held(self.folder)),
            "rerun": f"deme run {shlex.quote(str(self.folder.absolute()))}",
            "recipe_yaml": to_yaml(self.recipe),
            "seeds": list(self.recipe.seeds),
            "table": rows,
            "folder": str(self.folder.absolute()),
            "outcome": self.graph.outcome,
            "loss_ranges": self.graph.loss_ranges,
            "stages": [self.entry(node) for node in self._shown()],
            "provenance": self._made_by(),
            "cost_machine": self._cost_machine(),
            "division": self._division(),
            "curves": self._curves(seed),
            "grids": self._grids(seed),
            "base_model": self.graph.base.label,
            "base_model_hub": self._hub_name(),
            "merged_path": str(self.merged.absolute()),
            "base_path": str((self.folder / "base").absolute()),
            "weights_found": self.weights_found(rows) if self._searched() else [],
            "ablations": self._experiments(),
            "figures": figures,
            **found.asked(self.graph, self.store, seed, GRID_IMAGES),
        }  # fmt: skip
        if seed in self.graph.merged:
            content |= self._weights(seed)
            content["lost_gains"] = found.lost_gains(self.graph, self.store, rows) if self._searched() else []
        return content

    def _made_by(self) -> list[dict[str, Any]]:
        """Versions and machines of the stages that are there, not of whoever writes the page."""
        seen = (self.store.glimpse(node.key) for node in self._shown())
        return made_by(one.manifest.get("provenance") for one in seen if one)

    def _division(self) -> dict[str, Any]:
        """The division's subsets and route; of a flow, the subsets by their sigmas too."""
        sigmas = in_sigmas(self.recipe, self.graph.base, self.graph.division)
        return {**self.graph.division.as_dict(), **({"sigmas": sigmas} if sigmas else {})}

    def _cost_machine(self) -> str | None:
        """The machine that latency and load time were measured on; None where its manifest does not say."""
        seen = self.store.glimpse(self.graph.cost.key)
        return machine_of(seen.manifest.get("provenance")) if seen else None

    def _hub_name(self) -> str | None:
        """The base's name on the hub, where it came from there."""
        base = self.graph.base
        return base.label.rpartition("@")[0] if isinstance(base, Input) and base.commit else None

    def entry(self, node: Node) -> dict[str, Any]:
        """A stage as the page tells it."""
        return {**self.stages.get(node.digest, {}), "stage": node.stage, "label": node.label, "digest": node.digest}

    def _shown(self) -> list[Node]:
        """All stages, and of figures that the recipe leaves out those that are there."""
        beside = {node.digest for name, nodes in self.graph.figures.items() for node in nodes
                  if name not in self.recipe.analyze.figures}  # fmt: skip
        required = {node.digest for node in self.required()}
        idle = {digest for digest in beside - required if "seconds" not in self.stages.get(digest, {})}
        return [node for node in self.graph.nodes if node.digest not in idle]

    def _searched(self) -> bool:
        return all(self.store.status(search.key) == "done" for search in self.graph.searches.values())

    def _figures(self) -> list[FigureName]:
        """The recipe's figures, and those that were once asked for beyond them."""
        wanted = {*self.recipe.analyze.figures, *figures_asked(held(self.folder))}
        return self.graph.keyed([name for name in FIGURES if name in wanted])

    def draw(self, names: Sequence[FigureName]) -> list[dict[str, Any]]:
        """Draw those of these figures whose data are there; what was drawn already is not drawn again."""
        data: dict[FigureName, dict[str, Path]] = {}
        for name in names:
            found = {}
            for i, node in enumerate(self.graph.figure(name)):
                if (artefact := self.store.find(node.key)) is not None:
                    found[f"{name}-{i}" if i else name] = artefact.path(figure_file(node))
            data |= {name: found} if found else {}
        return draw_figures(self.folder, data)

    def _experiments(self) -> list[dict[str, Any]]:
        """What the experiments in this folder found; a record that cannot be shown is told and left out."""
        found = []
        for file in sorted(self.folder.glob(f"{ABLATIONS}/*/{RECORD}")):
            try:
                check_record(content := read_json(file))
            except UserError as error:
                log.warning("not shown: %s", error if str(file) in str(error) else f"{file}: {error}")
            else:
                found.append(content)
        return found

    def _weights(self, seed: int) -> dict[str, Any]:
        experts = self.recipe.decouple.num_ranges
        merged = self.store.find(self.graph.merged[seed].key)
        how: HowToMerge = self.graph.merged[seed].arguments["how"]
        weights = {"merged-uniform": how.method.default_weights(experts)}
        weights |= {"merged": merged.results["weights"]} if merged else {}
        search = self.graph.searches.get(seed)
        searched = self.search_of(search) if search else None
        merge = read_json(merged.path(MERGE)) if merged else {}
        extra = (merged.results if merged else {}).get("projection")
        content = {"weights": weights, "search": searched, "merge": merge}
        return {**content, **({"projection": extra} if extra else {})}

    def search_of(self, search: Node) -> dict[str, Any] | None:
        """What a search found; None before it has ended."""
        done = self.store.status(search.key) == "done"
        return read_json(self.store.folder(search.key) / SEARCH) if done else None

    def weights_found(self, rows: Sequence[Row] = ()) -> list[str]:
        """A line for each `merged`: its weights and whose they are; by the table, which search's gain was noise."""
        return found.weights_lines(self.graph, self.store) + found.lost_gains(self.graph, self.store, rows)

    def trainings(self, seed: int) -> list[Node]:
        """The trained models of one seed: experts first, then base and controls."""
        parts = (part for served in self.graph.served[seed] for part in served.parts if isinstance(part, Node))
        return list({node.digest: node for node in (*self.graph.experts[seed], *parts)}.values())

    def _curves(self, seed: int) -> dict[str, Any]:
        """Losses of the trainings, also of one that goes on."""
        training, validation = {}, {}
        for node in self.trainings(seed):
            folder = self.store.folder(node.key)
            if not (folder / LOSSES).exists():
                continue
            training[node.label] = self.points(folder / LOSSES, "denoising")
            validation[node.label] = self.points(folder / VALIDATION, "own")
        return {"training loss": training, "validation loss": validation}

    def points(self, journal: Path, loss: str) -> list[list[float]]:
        """(step, loss) of each line of a training's journal."""
        return [[record["step"], record[loss]] for record in read_jsonl(journal)]

    def _grids(self, seed: int) -> dict[str, str]:
        """The same seeds before and after, as links from the run folder."""
        import numpy as np

        grids = {}
        for name in GRIDS:
            node = self.graph.samples.get((name, seed))
            if node is None or self.store.status(node.key) != "done":
                continue
            images = np.array(np.load(self.store.folder(node.key) / IMAGES, mmap_mode="r")[:GRID_IMAGES])
            path = self.folder / FIGURES_FOLDER / f"{name}.npy"
            grids[name] = f"{FIGURES_FOLDER}/{name}.npy"
            if _holds(path, images):
                continue
            write_npy(path, images)
            scale = max(1, min(4, GRID_WIDTH // (16 * images.shape[2])))  # of large images, PNG would take seconds
            write_bytes(path.with_suffix(".png"), sample_grid(images, columns=16, scale=scale))
        return grids


# -- run.json -------------------------------------------------------------------------------------


def held(folder: Path) -> dict[str, Any]:
    """What the `run.json` of a run folder holds; nothing where it cannot be read."""
    with suppress(UserError):
        return read_json(folder / RUN)
    return {}


def figures_asked(record: Mapping[str, Any]) -> list[FigureName]:
    """The figures that were asked for by name, whatever the recipe has, by a run's `run.json`."""
    names = record.get(ASKED)
    return [name for name in FIGURES if name in names] if isinstance(names, list) else []


def first_command(record: Mapping[str, Any]) -> str:
    """How the run was started, by its `run.json`; '' where no `deme run` was, for no other command makes it all."""
    command = record.get("command")
    try:
        words = [word for word in shlex.split(str(command or "")) if not word.startswith("-")]
    except ValueError:  # quotes that somebody opened and never closed
        return ""
    return str(command) if words[:2] == ["deme", "run"] else ""


def noted(folder: Path) -> dict[str, dict[str, Any]]:
    """Seconds and steps of the stages by digest, as `run.json` has them; what names no digest is passed over.

    Raises UserError where there is no such file, or what it says of a stage is no number.
    """
    file = folder / RUN
    stages = read_json(file).get("stages", [])
    if not isinstance(stages, list):
        raise UserError(f"{file}: stages is {type(stages).__name__}, where a list of stages is expected")
    named = [entry for entry in stages if isinstance(entry, dict) and isinstance(entry.get("digest"), str)]
    for entry, name in ((entry, name) for entry in named for name in ("seconds", "steps") if name in entry):
        value = entry[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            said = f"{name} of the stage {entry.get('label', entry['digest'])} is {value!r}"
            raise UserError(f"{file}: {said}; a number is expected; deme run {shlex.quote(str(folder))} writes it anew")
    return {entry["digest"]: entry for entry in named}


def _holds(path: Path, images: Any) -> bool:
    """Whether a grid is drawn already."""
    import numpy as np

    try:
        return path.with_suffix(".png").is_file() and np.array_equal(np.load(path), images)
    except (OSError, ValueError, EOFError):
        return False
