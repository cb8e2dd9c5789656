"""The errors that decide the command's exit status, and the hint that goes with a wrong name."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """The user's input is wrong; the command line prints it in one line and exits with status 2."""


class NotFetched(UserError):
    """What the hub was asked for did not come: its name may be wrong, or the network down."""


class MachineError(RuntimeError):
    """The machine or we failed (disk full, lost file...); exit status 1."""


class Interrupted(Exception):
    """SIGINT or SIGTERM came and a checkpoint was written; exit status 130."""


class Stopped(Interrupted):
    """The same, of what begins anew when it is run again."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """A suffix `; did you mean 'x'?` with the valid name nearest to `name`, or '' where none is near."""
    found = get_close_matches(name, list(valid), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""
