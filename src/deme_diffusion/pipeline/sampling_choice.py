"""What is asked of sampling beside seeds: the sampler, prompts, and the family of a plain pipeline. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from deme_diffusion.config import TAKES, SamplerSettings
from deme_diffusion.errors import UserError
from deme_diffusion.evaluation.export import Prompt
from deme_diffusion.evaluation.prompts import LISTS, listed
from deme_diffusion.evaluation.samplers import check_sampler
from deme_diffusion.weight_files import read_json

PIPELINE = "model_index.json"
PIPELINES = {
    "DDPMPipeline": "ddpm",
    "DDIMPipeline": "ddpm",
    "DiTPipeline": "dit",
    "StableDiffusionPipeline": "stable_diffusion",
    "StableDiffusionXLPipeline": "stable_diffusion_xl",
    "StableDiffusion3Pipeline": "stable_diffusion_3",
    "FluxPipeline": "flux",
    "WanPipeline": "wan",
}
"""Class of a pipeline -> its family."""


@dataclass(frozen=True)
class SamplerChoice:
    """What was asked of the sampler; None leaves it as the recipe has it."""

    name: str | None = None
    num_inference_steps: int | None = None
    eta: float | None = None
    timestep_spacing: str | None = None
    guidance_scale: float | None = None

    def of(self, listed: Sequence[SamplerSettings], num_timesteps: int, family: str) -> SamplerSettings:
        """The first sampler of that name (or at all) in the list, changed as asked; a new one where none is listed.

        Raises UserError where diffusers has none such, or it would ignore a setting.
        """
        named = [sampler for sampler in listed if self.name in (None, sampler.name)]
        steps = listed[0].num_inference_steps if listed else min(50, num_timesteps)
        start = named[0].model_dump() if named else {"num_inference_steps": steps}
        changes = {key: value for key, value in vars(self).items() if value is not None}
        try:
            sampler = SamplerSettings.model_validate({**start, **changes})
        except ValidationError as error:
            wrong = error.errors(include_url=False)[0]
            raise UserError(f"--sampler: {wrong['loc'][0]}: {wrong['msg']} (given: {wrong['input']!r})") from None
        check_sampler(sampler, num_timesteps, key="--sampler", family=family)
        if sampler.guidance_scale is not None and TAKES[family] == "nothing":
            raise UserError(f"--guidance {sampler.guidance_scale:g}: family {family} takes no prompts; leave it out")
        return sampler


def given_prompts(text: str, family: str) -> list[Prompt]:
    """What --prompts asks for: a file's prompts (`LISTS`), or one text; class numbers of a class model.

    Raises UserError where the family takes none, or they are not of its kind.
    """
    takes, path = TAKES[family], Path(text).expanduser()
    if takes == "nothing":
        raise UserError(f"--prompts {text}: family {family} takes no prompts; leave it out")
    is_file = path.suffix.lower() in LISTS and len(text.split()) == 1
    if is_file and not path.is_file():
        raise UserError(f"--prompts {text}: there is no such file")
    found = [group.texts[0] for group in listed(path, "--prompts")] if is_file else [text]
    if not found:
        raise UserError(f"--prompts {text}: holds no prompts")
    if takes == "text":
        return list(found)
    wrong = next((one for one in found if not one.isdecimal()), None)
    if wrong is not None:
        raise UserError(f"--prompts {text}: {wrong!r} is no class of family {family}; numbers are, as 207")
    return [int(one) for one in found]


def by_seed(prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Prompt]:
    """Seed s is asked for by prompt s, counted round, so that a folder that grows keeps its images."""
    return [prompts[seed % len(prompts)] for seed in seeds]


def family_of(folder: Path) -> str:
    """The family of a pipeline folder, by the class that it names; what is of no family is left to `ddpm` to refuse."""
    return PIPELINES.get(str(read_json(folder / PIPELINE).get("_class_name")), "ddpm")
