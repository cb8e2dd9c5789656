"""Whether the record of an experiment, as it lies on disk, can be shown: it may be an older one, or another's."""

from deme_diffusion.errors import UserError
from deme_diffusion.report.ablation_effects import Content
from deme_diffusion.report.ablation_sentences import verdicts
from deme_diffusion.report.ablation_text import to_markdown
from deme_diffusion.report.figures import division_tables


def check_record(content: Content) -> None:
    """Raises UserError where the content of an `ablation.json` lacks what its tables and pictures are made of."""
    try:
        _read(content)
    except (LookupError, TypeError, ValueError, AttributeError, AssertionError) as error:
        raise UserError(f"no record of an experiment as they are now ({type(error).__name__}: {error})") from None


def _read(content: Content) -> None:
    to_markdown({**content, "plan": content["plan"], "recipe": content["recipe"]}, verdicts(content))
    arms = [arm for ablation in content["ablations"] for arm in ablation["arms"]]
    for division in filter(None, (one.get("division") for one in (content["baseline"], *arms))):
        division_tables(division)
