"""Where what can be made again is kept between runs: compiled kernels, calibrations."""

import atexit
import os
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path


@cache
def cache_dir() -> Path:
    """$INFMOE_CACHE_DIR, else `infmoe` in the user's cache folder, else, where that can't be written, a fresh one.

    The last is this process's own and goes with it; a line says so.
    """
    try:
        path = _wanted()
        path.mkdir(parents=True, exist_ok=True)
        if os.access(path, os.W_OK):
            return path
        reason = f"cannot write to {path}"
    except OSError as error:
        reason = f"cannot write to {path} ({error.strerror})"
    except RuntimeError:  # of `Path.home`: the user's number has no entry, and HOME is not set
        reason = "there is no home folder"
    scratch = Path(tempfile.mkdtemp(prefix="infmoe-"))
    atexit.register(_remove, scratch, os.getpid())
    print(
        f"infmoe: {reason}: compiled kernels and calibrations are made anew in every process; set INFMOE_CACHE_DIR to "
        "a folder that keeps them",
        file=sys.stderr,
    )
    return scratch


def _wanted() -> Path:
    """Where the cache belongs."""
    if named := os.environ.get("INFMOE_CACHE_DIR"):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "infmoe"


def _remove(folder: Path, process: int) -> None:
    """Remove `folder` at the end of the process that made it; a library that is loaded from it stays mapped."""
    if os.getpid() == process:  # not of one that was forked from it
        shutil.rmtree(folder, ignore_errors=True)
