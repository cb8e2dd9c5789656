"""The command that measures the weights of a page as a run of its own, which shares base and experts. No torch."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from deme_diffusion.config import MergeSettings
from deme_diffusion.files import canonical_digest
from deme_diffusion.merging.selection import MergeWeights


def measuring(
    words: Sequence[str], folder: Path, merge: MergeSettings, weights: MergeWeights, own: Mapping[str, Sequence[float]]
) -> str:
    """For a shell; `words` make the run in `folder`, `own` are the weights by pattern that its recipe has itself.

    The weights are exact, and each model's run has a folder of its own, so that another one's is never refused.
    """
    settings = ["merge.search=none", f"merge.weights={_numbers(weights.values)}"]
    settings += ["merge.method=task_arithmetic"] if merge.method == "none" else []
    settings += ["merge.weighting=uniform"] if merge.weighting != "uniform" else []
    if weights.rules != own:  # a search's, by layer
        rules = [
            f"{json.dumps(pattern, ensure_ascii=False)}: {_numbers(row)}" for pattern, row in weights.rules.items()
        ]
        settings.append(f"merge.weights_for={{{', '.join(rules)}}}")
    digest = canonical_digest([*words[2:], *settings])[:8]
    return shlex.join([*words, *settings, "--out", f"{folder}-played-{digest}"])


def _numbers(values: Iterable[float]) -> str:
    """A list of YAML, to the last bit; YAML takes 1e-05 for a word, and 1.0e-05 for a number."""
    exact = (repr(float(value)) for value in values)
    return f"[{', '.join(text.replace('e', '.0e') if 'e' in text and '.' not in text else text for text in exact)}]"
