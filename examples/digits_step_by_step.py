"""Decouple, merge, evaluate, sample: the parts of a run, one after another, on 8x8 digits in about a minute.

Run it as a script, `python examples/digits_step_by_step.py [KEY=VALUE ...]`, or cell by cell (`# %%`) in VS Code or
Jupyter. Everything goes into `runs/` here; run it again and nothing is computed twice. So short a training shows how
the parts fit together, not whether the method helps: for that see `deme run digits-full`.
"""

# %% The recipe, and what this run changes of it
import logging
import sys

import numpy as np
from PIL import Image

from deme_diffusion import decouple, evaluate, merge, sample

logging.basicConfig(level="INFO", format="%(message)s")  # a run tells its progress through logging
logging.getLogger("httpx").setLevel("WARNING")

recipe = "digits"  # `deme run digits --dry-run` prints it with every default written out
changes = [
    "decouple.num_ranges=2",  # two experts: t in [0,500) and in [500,1000)
    "decouple.total_steps=200",  # the whole budget, split over the experts
    "decouple.validation_steps=50",
    "merge.num_images=200",  # images that a candidate for the weights is scored on
    "evaluate.num_images=500",
    "evaluate.sampling_seeds=1",
    "data.views=1",
    "runtime.jobs=1",  # more would start processes, which needs `if __name__ == "__main__"` around all this
    *(word for word in sys.argv[1:] if "=" in word and not word.startswith("-")),  # not Jupyter's own arguments
]

# %% Decouple: a copy of the base for each range of timesteps, finetuned there (Eq. 5, 6)
experts = decouple(recipe, *changes)
for expert in experts:
    print(f"expert {expert.index} of {expert.timesteps}: {expert.folder}")

# %% Merge: weights searched on the search split, then theta + sum_i w_i tau_i (Eq. 8)
merged = merge(recipe, *changes)[0]
print(f"weights {merged.weights}, by {merged.source}: {merged.folder}")

# %% Evaluate: every model of the table on the report split, which nothing else has seen
for row in evaluate(recipe, *changes):
    figures = row["metrics"]
    metric = next(name for name in figures if name.startswith("FD("))
    print(f"{row['model']:<16} {metric} {figures[metric]['mean']}")

# %% The same seeds from the base and from the merged model
for model in ("base", "merged"):
    samples = sample(recipe, *changes, model=model, seeds=range(16), grid=True)
    print(f"{model}: {samples.folder / 'grid.png'}")

# %% The merged model is a plain diffusers pipeline, and a seed means there what it means here
from diffusers import DDIMPipeline  # noqa: E402
from torch import Generator  # noqa: E402

pipeline = DDIMPipeline.from_pretrained(merged.folder)
steps = int(samples.sampler.removeprefix("DDIM-"))
stock = pipeline(num_inference_steps=steps, generator=Generator().manual_seed(3), output_type="np").images[0]
ours = np.asarray(Image.open(samples.files[3]))
print(f"largest difference to stock diffusers: {np.abs(stock[..., 0] * 255 - ours).max():.2f} of 255 (rounding)")
