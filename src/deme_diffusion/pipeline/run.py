"""A run: the run folder with resolved recipe, links, table and page; the whole graph, or some of its stages."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deme_diffusion.artefacts import Artefact, Store
from deme_diffusion.config import FigureName, Recipe
from deme_diffusion.errors import MachineError, UserError
from deme_diffusion.files import canonical_digest, link, read_jsonl, write_bytes, write_json, write_text
from deme_diffusion.pipeline import found, table
from deme_diffusion.pipeline.engine import run_stages
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.merges import HowToMerge
from deme_diffusion.pipeline.node import MERGE, Node, figure_file
from deme_diffusion.processes import is_main
from deme_diffusion.provenance import provenance
from deme_diffusion.recipes import RESOLVED, Loaded, load, to_yaml
from deme_diffusion.report.ablation_record import check_record
from deme_diffusion.report.card import model_card
from deme_diffusion.report.drawing.gallery import draw_figures
from deme_diffusion.report.figures import sample_grid
from deme_diffusion.report.page import write_page
from deme_diffusion.report.tables import Row, write_table
from deme_diffusion.report.verdict import Verdict, verdict
from deme_diffusion.weight_files import read_json

log = logging.getLogger(__name__)
RUNS, RUN, STORE = Path("runs"), "run.json", "store"
ABLATIONS, RECORD = "ablations", "ablation.json"
"""Where a run folder holds its experiments, and what each of them found."""
GRID_IMAGES = 64
ASKED_FOR = ("similarity", "fisher")
"""Stages that sub-commands make, whether or not the recipe needs them."""
Targets = Sequence[Node] | Callable[[Graph], Sequence[Node]]


@dataclass
class Run:
    """An opened run: its recipe, folder, store and graph. `stages` grows as stages finish or are found done."""

    recipe: Recipe
    folder: Path
    store: Store
    graph: Graph
    command: str = ""
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    def execute(self, targets: Targets | None = None) -> list[Node]:
        """Make the targets (all stages by default) and what they need; note each in `run.json` as it finishes.

        A function of the graph gives targets that may wait for the division, which makes `graph` another one. Returns:
        the targets.
        """
        wanted = self._wanted(targets)
        self.prepare()
        if self.graph.waits(wanted):
            assert not isinstance(targets, Sequence), "what waits for the division has other stages afterwards"
            self._divide()
            wanted = self._wanted(targets)
            self._note()
        for said in self.graph.remarks if is_main() else ():
            log.warning("%s", said)
        run_stages(self.graph, self.store, self.graph.needed(wanted), finished=self.finished)
        if is_main():
            self.link()
        return wanted

    def settle(self, nodes: Sequence[Node]) -> None:
        """Where these stages wait for the division, make it; they are of another graph afterwards."""
        if self.graph.waits(nodes):
            self.prepare()
            self._divide()

    def _wanted(self, targets: Targets | None) -> list[Node]:
        found = targets(self.graph) if callable(targets) else targets
        return list(self.graph.nodes if found is None else found)

    def _divide(self) -> None:
        """Compare the gradients that the division is made by, and open the graph again."""
        assert self.graph.similarity is not None, "only a division by gradients waits"
        nodes = self.graph.needed([self.graph.similarity])
        run_stages(self.graph, self.store, nodes, finished=self.finished)
        self.graph = Graph(self.recipe, download=True, store=self.store)
        if self.graph.provisional:
            raise MachineError("the similarity of gradients was taken away after it was made; run again")

    def prepare(self) -> None:
        """Make the folder: the resolved recipe, and all stages by name. Raises UserError where another recipe's is."""
        self.folder.mkdir(parents=True, exist_ok=True)
        resolved = self.folder / RESOLVED
        if resolved.exists():
            there = load(str(self.folder), as_it_stands=True).recipe
            changed = _first_difference(
                there.model_dump(mode="json", exclude={"runtime"}), self.recipe.model_dump(mode="json")
            )
            if changed and self._has_results():
                raise UserError(f"{self.folder}: holds another recipe ({changed}); choose another folder with --out")
        if not is_main():
            return
        with suppress(UserError, KeyError, TypeError):  # what this command does not make keeps its seconds
            self.stages = self.recorded()
        write_text(resolved, to_yaml(self.recipe))
        self._note()

    def _has_results(self) -> bool:
        """Whether more than the index of this folder's images was made: else a corrected recipe may take its place."""
        try:
            return any("seconds" in entry and entry["stage"] != "data" for entry in self.recorded().values())
        except (UserError, KeyError, TypeError):
            return True

    def _note(self) -> None:
        # Every stage is named before it exists, so that a clean-up beside a run takes nothing away from it.
        known = [{"stage": node.stage, "digest": node.digest, "label": node.label} for node in self.graph.nodes]
        here = {node.digest for node in self.graph.nodes}  # and what was once made beside the graph, since asked for
        known += [e for e in self.stages.values() if e.get("stage") in ASKED_FOR and e.get("digest") not in here]
        stages = [{**self.stages.get(entry["digest"], {}), **entry} for entry in known]
        write_json(self.folder / RUN, {"recipe": self.recipe.name, "command": self.command, "stages": stages})

    def finished(self, node: Node, artefact: Artefact, reused: bool) -> None:
        """Note a stage that is done in `run.json`."""
        how = "done already" if reused else f"done in {artefact.seconds:.1f} s"
        log.log(logging.DEBUG if reused else logging.INFO, "%s: %s", node.label, how)
        self.note(node, artefact, reused)

    def note(self, node: Node, artefact: Artefact, reused: bool) -> None:
        """The same without a word."""
        self.stages[node.digest] = {"seconds": round(artefact.seconds, 2), "reused": reused, "steps": node.steps}
        self._note()

    def recorded(self) -> dict[str, dict[str, Any]]:
        """Seconds and steps of the stages as the last run noted them."""
        stages: list[dict[str, Any]] = read_json(self.folder / RUN).get("stages", [])
        return {entry["digest"]: entry for entry in stages}

    def link(self) -> None:
        """`base`, `experts/<i>` and `merged` beside the table; with several seeds `experts-seed<s>/<i>` and so on."""
        base = self.graph.base
        self._link_to(self.store.folder(base.key) if isinstance(base, Node) else base.folder, "base")
        for seed, experts in self.graph.experts.items():
            for i, expert in enumerate(experts):
                self._link_to(self.store.folder(expert.key), f"experts{self._suffix(seed)}/{i}")
            if seed in self.graph.merged:
                self._link_to(self.store.folder(self.graph.merged[seed].key), f"merged{self._suffix(seed)}")

    def _suffix(self, seed: int) -> str:
        return "" if len(self.recipe.seeds) == 1 else f"-seed{seed}"

    @property
    def merged(self) -> Path:
        """Where the merged pipeline is linked, made or not; with several seeds that of the first."""
        return self.folder / f"merged{self._suffix(self.recipe.seeds[0])}"

    def _link_to(self, target: Path, name: str) -> None:
        if target.exists():
            link(target, self.folder / name)

    # -- the evidence ------------------------------------------------------------------------------

    def report(self) -> tuple[list[Row], Verdict]:
        """Table (JSON, markdown, CSV), page and model card from what the stages left; computes nothing anew."""
        rows = table.rows(self.graph, self.store, self.graph.extractor_name)
        if not is_main():
            return rows, verdict(rows)
        write_table(rows, self.folder)
        content = self.content(rows)
        write_text(self.folder / "model_card.md", model_card(content))
        write_page(self.folder, content)
        return rows, verdict(rows)

    def content(self, rows: list[Row]) -> dict[str, Any]:
        """What the page and the card show."""
        seed = self.recipe.seeds[0]
        division = self.graph.division.as_dict()
        content: dict[str, Any] = {
            "recipe": self.recipe.name,
            "description": self.recipe.description,
            "demonstration": self.recipe.demonstration,
            "command": self.command,
            "recipe_yaml": to_yaml(self.recipe),
            "table": rows,
            "stages": [{"stage": n.stage, "label": n.label, "digest": n.digest, **self.stages.get(n.digest, {})}
                       for n in self.graph.nodes],
            "provenance": {key: str(value) for key, value in provenance().items()},
            "division": division,
            "curves": self._curves(seed),
            "grids": self._grids(seed),
            "base_model": self.graph.base.label,
            "merged_path": str(self.merged),
            "ablations": self._experiments(),
            "figures": self.draw(list(self.graph.figures)),
        }  # fmt: skip
        if seed in self.graph.merged:
            content |= self._weights(seed)
            content["lost_gains"] = found.lost_gains(self.graph, self.store, rows)
        return content

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
        searched = read_json(self.store.folder(search.key) / "search.json") if search else None
        merge = read_json(merged.path(MERGE)) if merged else {}
        extra = (merged.results if merged else {}).get("projection")
        content = {"weights": weights, "search": searched, "merge": merge}
        return {**content, **({"projection": extra} if extra else {})}

    def weights_found(self, rows: Sequence[Row] = ()) -> list[str]:
        """A line for each `merged`: its weights and whose they are; by the table, which search's gain was noise."""
        return found.weights_lines(self.graph, self.store) + found.lost_gains(self.graph, self.store, rows)

    def _curves(self, seed: int) -> dict[str, Any]:
        training, validation = {}, {}
        nodes = [
            *self.graph.experts[seed],
            *(p for s in self.graph.served[seed] for p in s.parts if isinstance(p, Node)),
        ]
        for node in nodes:
            folder = self.store.folder(node.key)
            if not (folder / "loss.jsonl").exists():
                continue
            training[node.label] = [[r["step"], r["denoising"]] for r in read_jsonl(folder / "loss.jsonl")]
            validation[node.label] = [[r["step"], r["own"]] for r in read_jsonl(folder / "validation.jsonl")]
        return {"training loss": training, "validation loss": validation}

    def _grids(self, seed: int) -> dict[str, str]:
        """The same seeds before and after, as links from the run folder."""
        import numpy as np

        grids = {}
        for name in ("base", "all-timesteps", "ensemble", "merged"):
            node = self.graph.samples.get((name, seed))
            if node is None or not (self.store.folder(node.key) / "images.npy").exists():
                continue
            images = np.load(self.store.folder(node.key) / "images.npy", mmap_mode="r")[:GRID_IMAGES]
            path = self.folder / "figures" / f"{name}.npy"
            path.parent.mkdir(exist_ok=True)
            np.save(path, np.array(images))
            write_bytes(path.with_suffix(".png"), sample_grid(np.array(images), columns=16, scale=4))
            grids[name] = f"figures/{name}.npy"
        return grids


def _first_difference(there: dict[str, Any], here: dict[str, Any], above: str = "") -> str:
    """`key is X there, Y here` for the first setting of `there` that differs; '' where none does."""
    for key, value in there.items():
        if isinstance(value, dict) and isinstance(here[key], dict):
            if deeper := _first_difference(value, here[key], f"{above}{key}."):
                return deeper
        elif value != here[key]:
            return f"{above}{key} is {value!r} there, {here[key]!r} here"
    return ""


def is_experiment(folder: Path) -> bool:
    """Whether a folder is one that `deme ablate` made for a plan."""
    return folder.resolve().parent.name == ABLATIONS and (folder / "arms").is_dir()


def _first_command(folder: Path | None) -> str:
    """What a run folder that is opened again was made by: resuming or reporting does not say how."""
    with suppress(UserError):
        return str(read_json(folder / RUN).get("command", "")) if folder else ""
    return ""


def open_run(loaded: Loaded, *, out: Path | None = None, command: str = "", download: bool = True) -> Run:
    """The run of a recipe in `out`, the folder it came from, or `runs/<recipe>` (`+<digest8>` with overrides)."""
    recipe, folder = loaded.recipe, out or loaded.folder
    if folder is None:
        changes = {key: value for key, value in loaded.overrides.items() if not key.startswith("runtime.")}
        suffix = f"+{canonical_digest(changes)[:8]}" if changes else ""
        folder = RUNS / f"{recipe.name}{suffix}"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder}: a file, where a run needs a folder")
    if is_experiment(folder):  # a run there would write over what names the arms' stages
        said = f"its baseline is the run {folder.resolve().parent.parent}; its tables again: deme report {folder}"
        raise UserError(f"{folder}: an experiment, no run; {said}")
    store = Store(folder.parent / STORE)
    graph = Graph(recipe, download=download, store=store)
    return Run(recipe, folder, store, graph, _first_command(loaded.folder) or command)
