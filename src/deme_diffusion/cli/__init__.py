"""The command `deme`: thin sub-commands. Results go to stdout, progress and logs to stderr.

Exit status: 0 done; 1 a failure of the machine or ours; 2 the user's input is wrong; 130 interrupted, run again.
`command` holds the command itself and how errors end it, `options` what sub-commands share, `show` all that prints a
result. A sub-command registers when its module is imported, which is here.
"""

from deme_diffusion.cli import (
    ablate,
    analyze,
    convert,
    doctor,
    fisher,
    merge,
    pair,
    plan,
    play,
    report,
    sample,
    stages,
    tools,
)
from deme_diffusion.cli.command import app, main

__all__ = [
    "ablate",
    "analyze",
    "app",
    "convert",
    "doctor",
    "fisher",
    "main",
    "merge",
    "pair",
    "plan",
    "play",
    "report",
    "sample",
    "stages",
    "tools",
]
