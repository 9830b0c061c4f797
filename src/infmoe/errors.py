"""The one exception that means "the user can mend this"."""

import difflib
from collections.abc import Iterable

_FEW = 12  # names that a line has room for beside a suggestion


class InfMoEError(ValueError):
    """A mistake the user can mend: one line that names the fix. The CLI prints it and exits with `exit_code`."""

    exit_code = 2


class DivergedError(InfMoEError):
    """Training met a loss or a gradient that is not finite."""

    exit_code = 3


def unknown_name(what: str, name: str, known: Iterable[str]) -> InfMoEError:
    """An error for `name`, which is not among `known`, that suggests the nearest one, and lists them if they are few.

    Args:
        what: what the name stands for, e.g. "recipe".
        name: the name that was given.
        known: the names that exist.
    """
    options = sorted(known)
    nearest = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    hints = [f"did you mean {nearest[0]!r}?"] if nearest else []
    if not nearest or len(options) <= _FEW:
        hints.append(f"known: {', '.join(options)}")
    return InfMoEError(f"unknown {what} {name!r}; {' '.join(hints)}")
