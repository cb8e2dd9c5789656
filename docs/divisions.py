"""Draws docs/divisions/*.svg: each division of 1,000 timesteps into four subsets. Run as `python docs/divisions.py`."""

from __future__ import annotations

from pathlib import Path

from deme_diffusion.config import DecoupleSettings
from deme_diffusion.divisions import DIVISIONS, Facts
from deme_diffusion.report.figures import division_picture
from deme_diffusion.schedule import signal_to_noise

FOLDER = Path(__file__).parent / "divisions"
SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
DRAWN = ("overlapping", "random_boundaries", "random_assignment", "log_snr")

if __name__ == "__main__":
    facts = Facts(1000, lambda: signal_to_noise(SCHEDULE))
    FOLDER.mkdir(exist_ok=True)
    for name in DRAWN:
        division = DIVISIONS[name](DecoupleSettings.model_validate({"division": name}), facts)
        (FOLDER / f"{name}.svg").write_bytes(division_picture(division.member, division.route))
