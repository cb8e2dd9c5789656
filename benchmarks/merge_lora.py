"""Seconds to merge N LoRAs of the attention layers of Stable Diffusion 1.x's U-Net (860M parameters) into one.

    python benchmarks/merge_lora.py [--experts 4] [--rank 32] [--merged-rank R] [--repeats 5]

The U-Net is built from the published config without memory (meta tensors); its file on disk is sparse zeros, since a
merge of LoRAs reads shapes, and the adapted layers for its statistics. Prints the median and the range of the repeats.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from deme_diffusion.lora import Factors, save_lora
from deme_diffusion.lora_files import LORA_NAME
from deme_diffusion.merging.perform import performed
from deme_diffusion.merging.request import requested
from deme_diffusion.models.lora import layers_for
from deme_diffusion.rng import generator
from deme_diffusion.weights import WEIGHTS_NAME, stream_to

SD1 = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
"""UNet2DConditionModel of Stable Diffusion 1.4 and 1.5, as published."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--merged-rank", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, count = write_base(folder / "unet")
        experts = [write_expert(folder / f"lora-{i}", base, asked.rank, seed=i) for i in range(asked.experts)]
        times = []
        for repeat in range(asked.repeats + 1):
            started = time.perf_counter()
            request = requested(base, experts, folder / f"out-{repeat}", lora_rank=asked.merged_rank)
            told = performed(request)
            times.append(time.perf_counter() - started)
        size = sum(file.stat().st_size for expert in experts for file in expert.glob("*.safetensors"))
    times = times[1:]  # the first one imports and warms caches
    own, spread = told["lora"], f"from {min(times):.2f} to {max(times):.2f}, {len(times)} repeats"
    print(f"{count / 1e6:.0f}M parameters; {asked.experts} LoRAs of rank {asked.rank}, {size / 1e6:.0f} MB")
    print(f"{own['layers']} layers of rank {own['rank']}, relative error {own['relative_error']:.2g}")
    print(f"{statistics.median(times):.2f} s ({spread}, {torch.get_num_threads()} threads)")


def write_base(folder: Path) -> tuple[Path, int]:
    """A component folder of that architecture, and its number of parameters."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD1)
    unet.save_config(folder)
    state = unet.state_dict()
    header = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in state.items()}
    with stream_to(folder / WEIGHTS_NAME, header, {}) as writer:
        for key in writer.keys:
            writer.write(key, torch.zeros(state[key].shape))
    return folder, sum(tensor.numel() for tensor in state.values())


def write_expert(folder: Path, base: Path, rank: int, seed: int) -> Path:
    """A LoRA of its attention layers, of random factors."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD1)
    layers = {}
    for name in layers_for(unet, None):
        out, into = unet.get_submodule(name).weight.shape
        draw = generator(seed, name)
        parts = [draw.standard_normal(shape, dtype="float32") for shape in ((rank, into), (out, rank))]
        layers[name] = Factors(*(torch.from_numpy(part) / rank for part in parts), 1.0)
    save_lora(folder / LORA_NAME, "unet", layers)
    return folder


if __name__ == "__main__":
    main()
