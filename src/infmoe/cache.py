"""Where what can be made again is kept between runs: compiled kernels, calibrations."""

import os
import tempfile
from functools import cache
from pathlib import Path


@cache
def cache_dir() -> Path:
    """$INFMOE_CACHE_DIR, else `infmoe` in the user's cache folder, else, where that can't be written, a fresh one."""
    named = os.environ.get("INFMOE_CACHE_DIR")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = Path(named) if named else base / "infmoe"
    try:
        path.mkdir(parents=True, exist_ok=True)
        if os.access(path, os.W_OK):
            return path
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="infmoe-"))
