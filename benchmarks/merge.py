"""What a merge of big checkpoints costs: against plain reads and writes of the same bytes, and `mergekit-pytorch`.

    python benchmarks/merge.py [--parameters 860e6] [--experts 4] [--repeats 3] [--dtype float32]
        [--methods task_arithmetic,average] [--mergekit PATH] [--folder DIR]

A base and its experts with the tensor shapes of a Stable Diffusion 1 U-Net, scaled to about `--parameters`, are written
once. Every repeat then runs, in an order that alternates: the floor (every file read, 16 MB at a time, then one of its
size written and synced), `deme merge` with each method, and mergekit's task arithmetic if it is there (a console script
of the package `mergekit`, best in an environment of its own). Before each run the files are dropped from the page cache
by posix_fadvise; every output is synced within its time, and removed. Ours and mergekit's are processes of their own,
less the time of `import torch`, which every repeat measures. Anonymous memory: the largest RssAnon of /proc/PID/status.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod, sqrt
from pathlib import Path

import torch

from deme_diffusion.files import require_space
from deme_diffusion.weights import WEIGHTS_NAME, stream_to

BLOCK = 1 << 24
FULL_SIZE = 859_520_964  # parameters of Stable Diffusion 1's U-Net
Shapes = dict[str, tuple[int, ...]]


@dataclass
class Runs:
    """Seconds and peak anonymous bytes of one contestant, a repeat each."""

    seconds: list[float] = field(default_factory=list)
    anonymous: list[int] = field(default_factory=list)


# -- checkpoints -----------------------------------------------------------------------------------


def shapes_of(parameters: float) -> Shapes:
    """Those of a Stable Diffusion 1 U-Net with narrower channels."""
    from diffusers import UNet2DConditionModel

    width = max(32, round(320 * sqrt(parameters / FULL_SIZE) / 32) * 32)
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(width, 2 * width, 4 * width, 4 * width),
            cross_attention_dim=max(32, 768 * width // 320),
        )
    return {key: tuple(value.shape) for key, value in unet.state_dict().items()}


def make(folder: Path, shapes: Shapes, dtype: torch.dtype, seed: int) -> Path:
    """A component folder of random weights: one block of noise over and over, which is quick to draw."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    noise = (torch.randn(1 << 22, generator=torch.Generator().manual_seed(seed)) * 1e-2).to(dtype)
    with stream_to(folder / WEIGHTS_NAME, {key: (dtype, shape) for key, shape in shapes.items()}, {}) as writer:
        for key in writer.keys:
            left = prod(shapes[key])
            while left:
                writer.write_part(key, noise[:left])
                left -= min(left, len(noise))
                writer.hand_over(BLOCK)
    return folder


# -- the contestants -------------------------------------------------------------------------------


def floor(files: Sequence[Path], out: Path) -> int:
    """Read every file and write as many bytes as the first has, with plain calls and nothing in between."""
    buffer = bytearray(BLOCK)
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
    left = files[0].stat().st_size
    with out.open("wb", buffering=0) as written:
        while left:
            left -= written.write(memoryview(buffer)[: min(left, BLOCK)])
        os.fsync(written.fileno())
    return 0


def deme(files: Sequence[Path], method: str, out: Path) -> list[str]:
    """The command of our merge."""
    base, *experts = (str(file.parent) for file in files)
    given = [word for expert in experts for word in ("--expert", expert)]
    return [
        sys.executable,
        "-m",
        "deme_diffusion",
        "merge",
        "--base",
        base,
        *given,
        "--method",
        method,
        "--out",
        str(out),
    ]


def mergekit(files: Sequence[Path], script: str, dtype: str, folder: Path, out: Path) -> list[str]:
    """The command of mergekit's task arithmetic on the files as they are, w = 1/N."""
    base, *experts = map(str, files)
    models = [{"model": expert, "parameters": {"weight": 1 / len(experts)}} for expert in experts]
    config = {"merge_method": "task_arithmetic", "base_model": base, "models": models, "dtype": dtype}
    path = folder / "mergekit.yaml"
    path.write_text(json.dumps(config))
    return [script, str(path), str(out)]


# -- measuring -------------------------------------------------------------------------------------


def drop(files: Sequence[Path]) -> None:
    """Let the page cache forget the files, which are on the disk."""
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(contestant: Callable[[Path], int], files: Sequence[Path], out: Path, runs: Runs) -> None:
    """Run one contestant on dropped files until its output is on the disk, and remove that."""
    drop(files)
    start = time.perf_counter()
    peak = contestant(out)
    for file in out.rglob("*") if out.is_dir() else [out]:
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
    runs.seconds.append(time.perf_counter() - start)
    runs.anonymous.append(peak)
    shutil.rmtree(out) if out.is_dir() else out.unlink()


def run(command: list[str]) -> int:
    """Peak anonymous bytes of a command, which must end well."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        peak = watched(process)
        said = process.stderr.read().decode() if process.stderr else ""
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with {process.returncode}: {said[-2000:]}")
    return peak


def watched(process: subprocess.Popen[bytes]) -> int:
    """Peak anonymous bytes of a process, until it ends."""
    status, peak = Path(f"/proc/{process.pid}/status"), 0
    while process.poll() is None:
        for line in status.read_text().splitlines() if status.exists() else ():
            if line.startswith("RssAnon:"):
                peak = max(peak, int(line.split()[1]) * 1024)
        time.sleep(0.01)
    return peak


def seconds_of_import() -> float:
    """What `import torch` takes in a process of its own, less what the process itself takes."""
    times = []
    for program in ("import torch", "pass"):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", program], check=True)
        times.append(time.perf_counter() - start)
    return times[0] - times[1]


# -- telling ---------------------------------------------------------------------------------------


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Median and range of the ratios repeat by repeat."""
    found = [a / b for a, b in zip(ours, theirs, strict=True)]
    return f"{statistics.median(found):.2f} ({min(found):.2f}..{max(found):.2f})"


def table(results: dict[str, Runs], imports: Sequence[float]) -> str:
    """Markdown: each contestant against the floor and against mergekit, torch's import of each repeat taken off."""
    net = {name: runs.seconds for name, runs in results.items()}
    for name in net.keys() - {"floor"}:
        net[name] = [seconds - torch_s for seconds, torch_s in zip(net[name], imports, strict=True)]
    columns = ("", "seconds (median)", "less torch's import", "to the floor", "to mergekit", "anonymous memory, GiB")
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for name, runs in results.items():
        cells = [name, f"{statistics.median(runs.seconds):.1f}", f"{statistics.median(net[name]):.1f}"]
        cells += [ratios(net[name], net[other]) if other in net else "-" for other in ("floor", "mergekit")]
        lines.append(f"| {' | '.join(cells)} | {max(runs.anonymous) / 2**30:.2f} |")
    return "\n".join(lines)


def options() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--parameters", type=float, default=860e6)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--methods", default="task_arithmetic")
    parser.add_argument("--mergekit", default=shutil.which("mergekit-pytorch"), help="the script mergekit-pytorch")
    parser.add_argument("--folder", type=Path, help="where the checkpoints are made; default: a temporary directory")
    return parser.parse_args()


def main() -> None:
    """Make, run, tell."""
    asked = options()
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        print(benchmark(asked, Path(name)))


def benchmark(asked: argparse.Namespace, folder: Path) -> str:
    """The table, and what it was made of."""
    dtype = getattr(torch, asked.dtype)
    shapes = shapes_of(asked.parameters)
    size = sum(map(prod, shapes.values()))
    require_space(folder, (asked.experts + 2) * size * dtype.itemsize)
    files = [make(folder / f"{i}", shapes, dtype, seed=i) / WEIGHTS_NAME for i in range(asked.experts + 1)]
    contestants: dict[str, Callable[[Path], int]] = {"floor": lambda out: floor(files, out)}
    for method in asked.methods.split(","):
        contestants[f"deme merge, {method}"] = lambda out, method=method: run(deme(files, method, out))
    if asked.mergekit:
        contestants["mergekit"] = lambda out: run(mergekit(files, asked.mergekit, asked.dtype, folder, out))
    results, imports = {name: Runs() for name in contestants}, list[float]()
    for repeat in range(asked.repeats):
        imports.append(seconds_of_import())
        for name in list(contestants)[:: 1 if repeat % 2 == 0 else -1]:
            timed(contestants[name], files, folder / "out", results[name])
            print(f"{name}: {results[name].seconds[-1]:.2f} s", file=sys.stderr)
    told = f"{asked.experts + 1} files of {size / 1e6:.0f}M {asked.dtype} parameters in {len(shapes)} tensors"
    return f"{told}; import torch: {statistics.median(imports):.1f} s\n\n{table(results, imports)}"


if __name__ == "__main__":
    main()
