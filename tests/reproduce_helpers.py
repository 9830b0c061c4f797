"""What the tests of `infmoe reproduce` and its page look at, and how runs die in them."""

import json
from collections.abc import Callable
from typing import Any

from infmoe.reproduce.command import Request


def runs_of(request: Request) -> dict[str, dict[str, Any]]:
    """The files of the finished runs: slug -> content."""
    folder = request.out / "tiny" / "runs"
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


class Killed(BaseException):
    """Nothing is cleaned up after it."""


def dies(function: Callable, when: str, number: int) -> Callable:
    """The function, in whose call of this number the process dies, before it does anything or after all of it."""
    calls = []

    def dying(*args):
        calls.append(args)
        if (when, len(calls)) == ("before", number):
            raise Killed
        result = function(*args)
        if (when, len(calls)) == ("after", number):
            raise Killed
        return result

    return dying


def cells_of(body: str, start: str) -> list[str]:
    """The cells of the one row of the tables that begins so."""
    (row,) = [line for line in body.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in row.strip("|").split("|")]
