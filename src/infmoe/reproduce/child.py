"""A training run in a process of its own: how it is asked to stop, and how it ended.

A launcher may stand between: its exit code says little then, it may end before what it started, and what it started
need not get its signals. So the whole process group is signalled, the run's own lock says when it is over, and what
it wrote into its folder says how.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infmoe.errors import DivergedError
from infmoe.locks import LOCKS, is_locked
from infmoe.train.run_dir import ENDED_FILE, LOCK_FILE, Ending, read_ending

_POLL_SECONDS = 0.2
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run_child(
    command: Sequence[str], folder: Path, log: Path, *, lock: int, deadline: float | None
) -> tuple[Ending, int]:
    """Run `infmoe train` to its end; SIGTERM, Ctrl-C and the deadline let it write a checkpoint first.

    Args:
        command: with the launcher, if any.
        folder: the run's.
        log: takes what it prints.
        lock: a file descriptor that the command holds too, so that its lock outlives this process.
        deadline: `time.monotonic()` at which to stop; None: never.

    Returns:
        How it ended, and the signal that this process got meanwhile, or 0: the run may have been over by then.

    Raises:
        KeyboardInterrupt: Ctrl-C, once the run is over.
    """
    (folder / ENDED_FILE).unlink(missing_ok=True)  # else that of the last time would be read where it fails early
    with log.open("ab") as output:
        keep: dict[str, Any] = {"pass_fds": (lock,)} if LOCKS else {}
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, **keep
        )
        code, got, asked = _wait(child, folder, deadline)
    return _ending(folder, log, code, asked), got


def _wait(child: subprocess.Popen, folder: Path, deadline: float | None) -> tuple[int, int, int]:
    """The exit code, the signal that this process got, and the one that the run was asked to stop by, or 0."""
    got, asked = 0, 0

    def stop(number: int) -> None:
        nonlocal asked
        asked = asked or number
        _signal_group(child, number)

    def terminated(number: int, *_: object) -> None:
        nonlocal got
        got = number
        stop(number)

    code: int | None = None
    before = signal.signal(signal.SIGTERM, terminated)
    try:
        while code is None or is_locked(folder / LOCK_FILE):
            late = deadline is not None and not asked
            left = max(0.1, deadline - time.monotonic()) if late and deadline is not None else None
            try:
                if code is None:
                    code = child.wait(left)
                elif left is not None and left <= _POLL_SECONDS:
                    stop(signal.SIGTERM)
                else:
                    time.sleep(_POLL_SECONDS)
            except subprocess.TimeoutExpired:
                stop(signal.SIGTERM)
            except KeyboardInterrupt:  # the run is in a session of its own, and has not got it
                terminated(signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)
    if got == signal.SIGINT:
        raise KeyboardInterrupt
    return code, got, asked


def _signal_group(child: subprocess.Popen, number: int) -> None:
    """Send a signal to the command and to all that it started."""
    if not hasattr(os, "killpg"):  # Windows
        child.terminate()
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)


def _ending(folder: Path, log: Path, code: int, asked: int) -> Ending:
    """How a run ended: by its own word, else by its exit code."""
    code = code if code >= 0 else 128 - code  # killed by a signal, as a shell would say it
    lines = log.read_text(errors="replace").strip().splitlines()
    last = lines[-1] if lines else "no output"
    said = read_ending(folder)
    if said is not None:
        return said if said.how != "failed" else Ending("failed", message=f"with exit code {code} ({said.message})")
    if asked or code in [128 + number for number in _SIGNALS]:
        return Ending("stopped", asked or code - 128)
    if code == DivergedError.exit_code:
        return Ending("diverged", message=last.removeprefix("error: "))
    if not code:
        return Ending("failed", message="with exit code 0 before its end: a launcher has to wait for what it starts")
    return Ending("failed", message=f"with exit code {code} ({last})")
