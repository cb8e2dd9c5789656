"""Imports point down, siblings never meet, and what must start fast imports no torch (DESIGN.md)."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import deme_diffusion

ROOT = Path(deme_diffusion.__file__).parent
BELOW_DATA = ["errors", "processes", "files", "config", "recipes", "rng", "division", "provenance"]
BELOW_DATA += [
    "artefacts",
    "clean_up",
    "digests",
    "weight_files",
    "weights",
    "lora_files",
    "lora",
    "schedule",
    "density",
    "divisions",
    "similarity_file",
    "figure_file",
]
BELOW_SIBLINGS = [*BELOW_DATA, "data", "models"]
MAY_IMPORT = {
    "errors": [],
    "processes": [],
    "files": ["errors"],
    "config": ["errors", "files"],
    "recipes": ["errors", "processes", "config"],
    "rng": ["errors", "files"],
    "division": ["errors", "files"],
    "lora_files": ["errors"],
    "lora": ["errors", "weights", "digests", "lora_files"],
    "schedule": ["errors"],
    "density": ["errors"],
    "divisions": ["errors", "files", "config", "rng", "division"],
    "similarity_file": ["errors", "files", "division", "divisions"],
    "figure_file": ["errors", "files"],
    "provenance": ["files"],
    "artefacts": ["errors", "files", "config", "rng", "division", "provenance"],
    "clean_up": ["errors", "artefacts"],
    "digests": ["errors", "files", "artefacts"],
    "weight_files": ["errors"],
    "weights": ["errors", "files", "config", "rng", "division", "weight_files"],
    "data": BELOW_DATA,
    "models": [*BELOW_DATA, "data"],
    "decoupling": BELOW_SIBLINGS,
    "merging": [*BELOW_DATA, "data", "models.projection", "models.placement"],
    "evaluation": BELOW_SIBLINGS,
    "analysis": [*BELOW_SIBLINGS, "decoupling", "merging", "evaluation"],
    "report": ["errors", "files", "config", "division", "figure_file", "artefacts"],
    "pipeline": [*BELOW_SIBLINGS, "decoupling", "merging", "evaluation", "analysis", "report"],
    "doctor": [*BELOW_SIBLINGS, "decoupling", "merging", "evaluation", "report", "pipeline"],
    "ablate": [*BELOW_SIBLINGS, "merging", "evaluation", "report", "pipeline"],
    "planner": [*BELOW_DATA, "report", "pipeline", "ablate"],
    "playground": [*BELOW_SIBLINGS, "merging", "evaluation", "report", "pipeline"],
    "cli": [
        *BELOW_SIBLINGS,
        "playground",
        "decoupling",
        "merging",
        "evaluation",
        "report",
        "pipeline",
        "doctor",
        "ablate",
        "planner",
    ],
}
MAY_IMPORT["results"] = ["report"]
MAY_IMPORT["api"] = [*MAY_IMPORT["cli"], "results"]  # the Python door beside the command's
MAY_IMPORT["__init__"], MAY_IMPORT["__main__"] = ["api", "results"], ["cli"]
TORCH_FREE = ["errors", "processes", "files", "config", "recipes", "rng", "division", "provenance", "artefacts"]
TORCH_FREE += ["figure_file", "weight_files", "merging.checkpoints", "schedule", "divisions", "similarity_file"]
TORCH_FREE += [
    "density",
    "lora_files",
    "merging.pairs",
    "clean_up",
    "digests",
    "merging.table",
    "merging.estimate",
    "merging.selection",
    "merging.request",
]
TORCH_FREE += [
    "ablate",
    "planner",
    "report",
    "cli",
    "api",
    "results",
    "__init__",
    "__main__",
    "evaluation.samplers",
    "evaluation.export",
    "evaluation.prompts",
    "evaluation.protocols",
]
TORCH_FREE += [
    f"pipeline.{name}"
    for name in (
        "graph",
        "asking",
        "measured",
        "models",
        "caching",
        "cache_size",
        "dividing",
        "figures",
        "node",
        "inputs",
        "estimate",
        "run",
        "evidence",
        "watching",
        "exporting",
        "pairing",
        "table",
        "engine",
        "workers",
        "sampling",
        "sampling_choice",
        "__init__",
    )
]
HEAVY = ("torch", "diffusers", "accelerate", "safetensors.torch", "torchmetrics")
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(ROOT.rglob("*.py"))}


def test_every_module_imports_only_from_the_layers_below() -> None:
    wrong = [
        f"{module} imports {imported}"
        for module, path in MODULES.items()
        for imported in ours(ast.walk(ast.parse(path.read_text())))
        if imported.split(".")[0] != (own := module.split(".")[0])
        and not any(f"{imported}.".startswith(f"{allowed}.") for allowed in MAY_IMPORT[own])
    ]
    assert not wrong


def test_what_must_start_fast_imports_no_torch_even_through_others() -> None:
    wrong = []
    for start in (m for m in MODULES if any(f"{m}.".startswith(f"{free}.") for free in TORCH_FREE)):
        reached, todo = set[str](), [start]
        while todo:
            reached.add(module := todo.pop())
            heavy, own = imported_at_once(module)
            wrong += [f"{start} reaches {module}, which imports {name}" for name in heavy]
            todo += own - reached
    assert not wrong


@cache
def imported_at_once(module: str) -> tuple[list[str], set[str]]:
    """What is heavy, and which of our modules, that importing a module imports."""
    nodes = list(at_import(ast.parse(MODULES[module].read_text())))
    heavy = [n for n in imports(iter(nodes)) if any(f"{n}.".startswith(f"{h}.") for h in HEAVY)]
    return heavy, {within(name) for name in ours(iter(nodes))}


def imports(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Dotted names: `from a import b` is `a.b`, since b may be a module."""
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def ours(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Imports from this package, without its name."""
    prefix = "deme_diffusion."
    return (name.removeprefix(prefix) for name in imports(nodes) if name.startswith(prefix))


def at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """What runs when a module is imported: not the bodies of functions, nor what only a type checker sees."""
    for node in ast.iter_child_nodes(tree):
        checking = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not checking and not isinstance(node, ast.FunctionDef):
            yield node
            yield from at_import(node)


def within(name: str) -> str:
    """The module that an imported name is, or lies in."""
    parent = name.rpartition(".")[0]
    return next(m for m in (name, f"{name}.__init__", parent, f"{parent}.__init__", "__init__") if m in MODULES)
