"""How prompts, reference images and the model of the CLIP score enter the graph: found and checked. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deme_diffusion.config import ClipSettings, PromptSettings, Recipe
from deme_diffusion.digests import recall, remember, size_and_time
from deme_diffusion.errors import UserError
from deme_diffusion.evaluation import protocols
from deme_diffusion.evaluation.protocols import Chosen, Protocol, chosen, protocol_of
from deme_diffusion.files import canonical_digest, file_digest
from deme_diffusion.pipeline.inputs import Input, resolve
from deme_diffusion.weight_files import read_json

CLIP_KEY = "clip.pretrained"
CLIP_FILES = ("config.json", "preprocessor_config.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Asking:
    """What the images of a table are asked for by, and compared with.

    `protocol` None: by the report split's captions or classes, compared with that split; `takes` says which. `missing`:
    what a run would stop at, which a dry run tells.
    """

    settings: PromptSettings
    takes: str
    protocol: Protocol | None = None
    prompts: Input | None = None
    reference: Input | None = None
    missing: list[str] = field(default_factory=list)

    @property
    def measures_fd(self) -> bool:
        """Whether there are real images to compare with."""
        return self.protocol is None or self.reference is not None

    @property
    def measures_real_fd(self) -> bool:
        """Whether training images score like samples: a protocol's reference is of other images, in another size."""
        return self.protocol is None

    @property
    def covered(self) -> dict[str, Any]:
        """The settings in the keys of the stages that ask."""
        if self.takes == "nothing":
            return {}
        told = {key: value for key, value in self.settings.changed().items() if key in ("protocol", "seed")}
        side = self.protocol.side if self.protocol else None
        return {"asked": told} | ({"side": side} if side else {})

    def chosen(self, count: int) -> Chosen:
        """A protocol's prompts for so many images."""
        return chosen(self.settings, protocols.read(self.settings), count)


def asking(recipe: Recipe, *, download: bool) -> Asking:
    """What a recipe's images are asked for by. Raises UserError for settings that fit no such model, and (unless this
    is a dry run, `download` False) for files that are missing or wrong."""
    settings, takes = recipe.evaluate.prompts, recipe.model.takes
    if takes == "nothing":
        _refuse_prompts(recipe)
        return Asking(settings, takes)
    protocol = protocol_of(settings)
    if protocol is None:
        for name in ("path", "images"):
            if getattr(settings, name) is not None:
                raise UserError(f"evaluate.prompts.{name}: is for a protocol; set evaluate.prompts.protocol, or null")
        if takes == "class" and recipe.evaluate.clip_score:
            raise UserError("evaluate.clip_score: classes have no text; take evaluate.prompts.protocol=imagenet1k")
        return Asking(settings, takes)
    if takes == "class" and protocol.name != "imagenet1k":
        raise UserError(f"evaluate.prompts.protocol: {protocol.name} has texts, and family {recipe.model.family} takes "
                        "classes; take imagenet1k or report")  # fmt: skip
    return _by_protocol(recipe, protocol, takes, download)


def _by_protocol(recipe: Recipe, protocol: Protocol, takes: str, download: bool) -> Asking:
    settings, clip = recipe.evaluate.prompts, recipe.evaluate.clip_score
    if settings.images is not None and protocol.name == "parti":
        raise UserError(f"{protocols.IMAGES_KEY}: parti has no images of its prompts; leave it null")
    if settings.images is None and not clip:
        raise UserError(f"evaluate.prompts.protocol: {protocol.name} without evaluate.prompts.images has no FD, and "
                        "without evaluate.clip_score no other score; set one of them")  # fmt: skip
    missing = [said for said in (protocols.missing_file(settings), protocols.missing_images(settings)) if said]
    if missing and download:
        raise UserError(missing[0])
    prompts = reference = None
    if protocols.missing_file(settings):
        prompts = Input(settings.path or protocol.file, canonical_digest({"prompts": settings.path})[:16], None)
    else:
        assert settings.path is not None, "it is there"
        path = Path(settings.path).expanduser()
        chosen(settings, protocols.read(settings), recipe.evaluate.num_images)  # or it is told now
        prompts = Input(path.name, file_digest(path)[:16], path.resolve())
    if settings.images is not None:
        reference = _reference(Path(settings.images).expanduser())
    return Asking(settings, takes, protocol, prompts, reference, missing)


def _reference(folder: Path) -> Input:
    """A folder of real images, by its files' names and contents; remembered, since hashing thousands takes minutes."""
    files = protocols.reference_files(folder)
    if not files:
        return Input(str(folder), canonical_digest({"images": str(folder)})[:16], None)
    key = ["reference", *((str(file.absolute()), *size_and_time(file)) for file in files)]
    digest = recall(key)
    if digest is None:
        digest = canonical_digest({file.relative_to(folder).as_posix(): file_digest(file) for file in files})
        remember(key, digest, path=str(folder.absolute()), files=len(files))
    return Input(folder.name, digest[:16], folder.resolve())


def _refuse_prompts(recipe: Recipe) -> None:
    family, evaluate = recipe.model.family, recipe.evaluate
    said = {
        "evaluate.prompts": evaluate.prompts.changed(),
        "evaluate.clip_score": evaluate.clip_score,
        "merge.sampler.guidance_scale": recipe.merge.sampler.guidance_scale is not None,
        "evaluate.samplers": any(one.guidance_scale is not None for one in evaluate.samplers),
    }
    for key, value in said.items():
        if value:
            what = "guidance_scale" if "sampler" in key else "it"
            raise UserError(f"{key}: family {family} takes no prompts; leave {what} out")


# -- the model of the CLIP score ------------------------------------------------------------------


def given_clip(settings: ClipSettings, *, download: bool) -> Input | None:
    """The CLIP that a recipe names; None where it is to be trained. Raises UserError for another kind of thing."""
    if settings.pretrained is None:
        return None
    found = resolve(settings.pretrained, settings.revision, key=CLIP_KEY, needs=CLIP_FILES, download=download)
    if found.path is None:
        return found
    kind = read_json(found.path / "config.json").get("model_type")
    if kind != "clip":
        raise UserError(f"{CLIP_KEY}: {found.path} is no CLIP of transformers (model_type {kind})")
    if not any(found.path.glob("*.safetensors")):
        raise UserError(f"{CLIP_KEY}: {found.path} has no safetensors; pickles are never loaded (try another revision)")
    return found


def clip_name(recipe: Recipe) -> str:
    """What a CLIP score is named by: the model that is given, or `<source>-clip` for one trained here."""
    name = recipe.clip.pretrained
    return f"{recipe.data.source}-clip" if name is None else Path(name.removeprefix("packaged:")).name
