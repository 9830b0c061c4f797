"""Where a measurement came from: what every file under `results/` says about its making."""

import contextlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from infmoe.checkpoint import is_sealed, to_stderr
from infmoe.errors import InfMoEError

PACKAGES = ("infmoe", "torch", "transformers", "accelerate", "numpy", "tokenizers", "safetensors", "lm_eval")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide results."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit of the source tree that runs, "+changes" where it has any; None outside of a tree."""
    here = Path(__file__).resolve().parent

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def machine() -> dict[str, Any]:
    """The processor, and the threads and accelerator that torch uses."""
    import torch

    known: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        pairs = (line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        known = {name.strip(): value.strip() for name, value in pairs}
    # a virtual machine's model name may be that of a whole family of processors
    names = ("cpu family", "model", "stepping", "CPU implementer", "CPU variant", "CPU part")  # x86's, and Arm's
    kind = [known[name] for name in names if name in known]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": known.get("model name") or platform.processor() or platform.machine(),
        "cpu_kind": "-".join(kind) or None,
        "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def portable(word: str) -> str:
    """A word of a command line, an absolute path cut down to its last part: where it lay is nobody's business."""
    return re.sub(r"(^|=)/(?:[^/]+/)*(?=[^/])", r"\1", word)


def provenance() -> dict[str, Any]:
    """Command, time, machine, versions and commit of this process."""
    return {
        "command": " ".join(["infmoe", *map(portable, sys.argv[1:])]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "commit": git_commit(),
    }


def require_writable(folder: Path, option: str = "--out") -> None:
    """Make `folder`, and write to it once, before the work whose results go there.

    Args:
        folder: is made where it is missing.
        option: of the command, that chooses it.

    Raises:
        InfMoEError: it cannot be made or written to, or is a sealed checkpoint.
    """
    checkpoints = [place for place in folder.resolve().parents if (place / "config.json").is_file()]
    if any(map(is_sealed, (folder, *checkpoints))):
        raise InfMoEError(f"{folder} is sealed by its manifest, and would not verify any more: choose another {option}")
    probe = folder / f".{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InfMoEError(f"cannot write to {folder} ({error.strerror}): choose another {option}") from error


def set_aside(*paths: Path) -> None:
    """Copy results that others are about to take the place of, sweep.json to sweep.1.json, and say so.

    Args:
        paths: the files of one result, which get one number.

    Raises:
        InfMoEError: they can't be copied; what was there is as it was.
    """
    there = [path for path in paths if path.is_file()]
    if not there:
        return

    def numbered(path: Path, number: int) -> Path:
        return path.with_suffix(f".{number}{path.suffix}")

    free = next(n for n in itertools.count(1) if not any(numbered(path, n).exists() for path in paths))
    try:
        for path in there:
            shutil.copy2(path, numbered(path, free))
    except OSError as error:
        for path in there:
            numbered(path, free).unlink(missing_ok=True)
        raise InfMoEError(
            f"cannot keep {there[0]} beside the new one ({error.strerror}): make room there, or choose another --out"
        ) from error
    to_stderr(f"kept what was there before: {', '.join(str(numbered(path, free)) for path in there)}")


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write readable JSON, whole or not at all, and through to the disk.

    Raises:
        InfMoEError: it can't be written there; nothing half-written stays.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("w") as file:
            file.write(json.dumps(values, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise InfMoEError(
            f"cannot write {path} ({error.strerror}): make room there, or choose another place"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # it has its name by now, or its folder can't be made
            beside.unlink()
