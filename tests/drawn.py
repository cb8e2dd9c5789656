"""A figure's data drawn by a process in which torch cannot be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
sys.modules["torch"] = sys.modules["diffusers"] = None
from importlib import import_module
from pathlib import Path
from deme_diffusion.figure_file import read_figure
from deme_diffusion.report.figures import png_of, svg_of
data = read_figure(Path(sys.argv[1]))
for picture in import_module(f"deme_diffusion.report.drawing.{data.kind}").pictures([data]):
    print(picture.name, *(len(draw(picture.draw, picture.width, picture.height)) for draw in (svg_of, png_of)))
"""


def sizes_without_torch(file: Path) -> dict[str, int]:
    """Name of each picture -> bytes of its SVG or PNG, whichever is smaller."""
    command = [sys.executable, "-c", SCRIPT, str(file)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return {name: min(map(int, sizes)) for name, *sizes in map(str.split, lines)}
