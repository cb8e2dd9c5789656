"""One's own folder of images and one's own diffusers pipeline: what `deme` needs of both, from nothing in a minute.

Run it as a script, `python examples/own_images_and_model.py [KEY=VALUE ...]`, or cell by cell (`# %%`). It makes a
folder of drawn shapes and a small pipeline in `own/`, in place of which you have yours, and runs the method on them.
BASE_STEPS in the environment sets how long the pipeline is trained; a converged one takes far longer than this.
"""

# %% The images: any folder of PNG, JPEG or WebP files, of any sizes; names of sub-folders are labels
import logging
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

logging.basicConfig(level="INFO", format="%(message)s")
logging.getLogger("httpx").setLevel("WARNING")
folder = Path("own/shapes")


def draw(shape: str, random: np.random.Generator) -> Image.Image:
    """One grey 20 x 20 image of a circle, a square or a triangle, somewhere."""
    image = Image.new("L", (20, 20))
    x, y, size = (int(number) for number in random.integers((1, 1, 6), (8, 8, 12)))
    pen, grey = ImageDraw.Draw(image), int(random.integers(140, 256))
    if shape == "circle":
        pen.ellipse((x, y, x + size, y + size), fill=grey)
    elif shape == "square":
        pen.rectangle((x, y, x + size, y + size), fill=grey)
    else:
        pen.polygon([(x, y + size), (x + size, y + size), (x + size // 2, y)], fill=grey)
    return image


if not folder.exists():
    random = np.random.default_rng(0)
    for shape in ("circle", "square", "triangle"):
        (folder / shape).mkdir(parents=True)
        for number in range(200):
            draw(shape, random).save(folder / shape / f"{number:03d}.png")

# %% The model: any pipeline folder that diffusers' `save_pretrained` wrote, with a UNet2DModel
import torch  # noqa: E402
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel  # noqa: E402

pipeline_folder = Path("own/pipeline")
if not pipeline_folder.exists():  # the plainest training loop there is
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    unet = UNet2DModel(16, 1, 1, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, **blocks)
    scheduler = DDPMScheduler(num_train_timesteps=100, beta_end=0.2)
    files = sorted(folder.glob("*/*.png"))
    pixels = np.stack([np.asarray(Image.open(file).resize((16, 16), Image.Resampling.LANCZOS)) for file in files])
    data = torch.from_numpy(pixels).float().div(127.5).sub(1)[:, None]
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    for _ in range(int(os.environ.get("BASE_STEPS", "300"))):
        clean, t = data[torch.randint(len(data), (32,))], torch.randint(100, (32,))
        noise = torch.randn_like(clean)
        loss = torch.nn.functional.mse_loss(unet(scheduler.add_noise(clean, noise, t), t).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(pipeline_folder)

# %% The recipe says where both are; images are brought to the size and the channels that the model has
recipe = Path("own/shapes.yaml")
recipe.write_text("""\
name: shapes
model: {pretrained: own/pipeline}
data: {source: folder, path: own/shapes, mode: L, resolution: 16}
extractor: {pretrained: null, total_steps: 200}     # a classifier of the sub-folders, in whose features FD is measured
decouple: {num_ranges: 2, total_steps: 200, learning_rate: 5.0e-4, train_batch_size: 32, validation_steps: 50}
merge: {num_images: 100, sampler: {num_inference_steps: 10}}
evaluate:
  num_images: 200
  samplers: [{num_inference_steps: 10}, {name: DDPMScheduler, num_inference_steps: 20}]
""")

# %% The whole method: experts, weights, merge, table and page
from deme_diffusion import run, sample  # noqa: E402

changes = [word for word in sys.argv[1:] if "=" in word and not word.startswith("-")]  # not Jupyter's own arguments
result = run(recipe, *changes, out="own/runs/shapes")
print(result.verdict.sentence)
print(f"the merged pipeline: {result.merged}\nthe table: {result.folder / 'report.html'}")

# %% Images by seed, as PNG files
samples = sample(recipe, *changes, seeds=range(8), grid=True, out="own/runs/shapes")
print(*samples.files, sep="\n")
