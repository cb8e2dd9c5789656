"""Where the weights lie that a path means: a pipeline's folder, a component's, or one safetensors file. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deme_diffusion.errors import UserError, nearest
from deme_diffusion.files import part_of
from deme_diffusion.weight_files import PICKLES, checked_parts, pickled

MODEL_INDEX = "model_index.json"
DENOISERS = ("unet", "transformer")


@dataclass(frozen=True)
class Place:
    """Weights as somebody named them: `weights` is a component's folder or a safetensors file.

    `component`: its name, where it is a pipeline's; `pipeline`: the folder with the pipeline's index.
    """

    given: Path
    weights: Path
    component: str | None = None
    pipeline: Path | None = None

    @property
    def is_file(self) -> bool:
        """Whether it is a single file without a config."""
        return self.weights.is_file()


def locate(path: Path, component: str | None = None, *, what: str) -> Place:
    """The weights that `path` means; of a pipeline its `component`, by default the denoiser.

    `what` (base, expert) names it in errors. Raises UserError where nothing mergeable lies.
    """
    if path.is_file():
        return _file(path, what)
    if not path.is_dir():
        siblings = path.parent.iterdir() if path.parent.is_dir() else ()
        near = nearest(path.name, [p.name for p in siblings])
        # A hub name has two parts; a folder of that depth is as likely, so both are told.
        hub = len(path.parts) == 2 and not near and not path.parent.is_dir()
        fetch = f"; of a hub model, first: hf download {path} --local-dir FOLDER" if hub else ""
        raise UserError(f"{what} {path}: no such file or folder{near}{fetch}")
    if (path / MODEL_INDEX).is_file():
        name = _part(path, component, what)
        return Place(path, part_of(path, name), name, path)
    for name in (component,) if component else DENOISERS:  # an expert's folder: a component without its pipeline
        if not (path / "config.json").is_file() and (path / name / "config.json").is_file():
            return Place(path, path / name, name)
    if (path / "config.json").is_file():
        return Place(path, path)
    raise UserError(
        f"{what} {path}: no {MODEL_INDEX} and no config.json; give a diffusers pipeline, a component folder, "
        f"or one .safetensors file{_instead(path)}"
    )


def parts(pipeline: Path) -> list[str]:
    """Names of the parts that a pipeline's index lists: what else lies in the folder is not the model's."""
    try:
        index = dict(json.loads((pipeline / MODEL_INDEX).read_text()))
    except (OSError, ValueError, TypeError):
        raise UserError(f"{pipeline}: no readable {MODEL_INDEX}; a diffusers pipeline folder is expected") from None
    return checked_parts(pipeline / MODEL_INDEX, (name for name in index if not name.startswith("_")))


def _file(path: Path, what: str) -> Place:
    if path.suffix in PICKLES:
        raise pickled(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{what} {path}: not a .safetensors file")
    return Place(path, path)


def _part(pipeline: Path, component: str | None, what: str) -> str:
    names = parts(pipeline)
    if component is not None:
        if component not in names:
            raise UserError(f"{what} {pipeline}: has no part {component!r}{nearest(component, names)}")
        return component
    found = next((name for name in DENOISERS if name in names), None)
    if found is None:
        raise UserError(f"{what} {pipeline}: no {' or '.join(DENOISERS)} in it; name the component: {', '.join(names)}")
    return found


def _instead(folder: Path) -> str:
    """Help by the weight files that lie there all the same."""
    found: Sequence[Path] = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", *PICKLES))
    lora = "; a LoRA is no whole model: fuse it into its base and save that first"
    adapter = (folder / "adapter_config.json").is_file() or any("lora" in path.name.lower() for path in found)
    return (f"; in it lies {found[0].name}" if found else "") + (lora if adapter else "")
