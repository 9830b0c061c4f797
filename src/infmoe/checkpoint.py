"""Checkpoints that are whole or absent: written beside, hashed, synced, then renamed into place.

A checkpoint is a folder of safetensors and JSON, so opening one never runs code from it. It is a Hugging Face
model folder with three files more: `optimizer.safetensors`, `trainer_state.json` and `manifest.json`, which
holds size and SHA-256 of all the others.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from infmoe.errors import InfMoEError

MANIFEST = "manifest.json"
TRAINER_STATE = "trainer_state.json"
OPTIMIZER = "optimizer.safetensors"
FOLDER = "checkpoints"
_TMP = ".tmp-"


def write_checkpoint(run_dir: Path, step: int, fill: Callable[[Path], None]) -> Path:
    """Write the checkpoint of `step`; what was there before stays until the new one is whole.

    Args:
        run_dir: the run's folder; checkpoints go under `checkpoints/`.
        step: optimizer steps taken.
        fill: writes the files into the folder that it is given.

    Raises:
        InfMoEError: a file could not be written, e.g. because the disk is full; nothing half-written stays.
    """
    final = run_dir / FOLDER / f"step-{step:06d}"
    tmp = final.with_name(_TMP + final.name)
    try:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
        fill(tmp)
        _seal(tmp)
        _discard(final)  # only there if it did not verify: no run reaches the same step twice otherwise
        tmp.rename(final)
        to_disk(final.parent)
    except (OSError, SafetensorError) as error:  # safetensors wraps the operating system's error in its own
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InfMoEError(
            f"could not write the checkpoint of step {step} to {final.parent}: {reason}; "
            f"make room there and continue with --resume"
        ) from error
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return final


def checkpoints(run_dir: Path) -> list[Path]:
    """Every checkpoint folder of a run, oldest first, verified or not."""
    found = [p for p in (run_dir / FOLDER).glob("step-*") if p.is_dir() and p.name[5:].isdigit()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(checkpoint.name[5:])


def prune(run_dir: Path, step: int, keep_last: int | None) -> None:
    """Delete what an interrupted write left behind, and all but the last `keep_last` up to `step`.

    Later ones did not verify when the run resumed, so they must not count; the run will replace them.
    """
    for leftover in (run_dir / FOLDER).glob(_TMP + "*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if keep_last is not None:
        for old in [p for p in checkpoints(run_dir) if step_of(p) <= step][:-keep_last]:
            _discard(old)


def verify(checkpoint: Path) -> None:
    """Check every file against the manifest.

    Raises:
        InfMoEError: names the first file that is missing or changed.
    """
    try:
        listed = json.loads((checkpoint / MANIFEST).read_text())["files"]
        entries = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InfMoEError(f"{checkpoint} has no readable {MANIFEST}: take another checkpoint") from error
    if "config.json" not in entries or not any(name.endswith(".safetensors") for name in entries):
        raise InfMoEError(f"{checkpoint / MANIFEST} lists no model: take another checkpoint")
    for path in sorted(p for p in checkpoint.rglob("*") if p.is_file()):
        name = path.relative_to(checkpoint).as_posix()
        if name not in entries and name != MANIFEST:
            raise InfMoEError(f"{path} is not in the checkpoint's manifest: remove it, or take another checkpoint")
    for name, (size, digest) in entries.items():
        path = checkpoint / name
        if not path.is_file():
            raise InfMoEError(f"{path} is missing: take another checkpoint")
        if path.stat().st_size != size or _sha256(path) != digest:
            raise InfMoEError(f"{path} is damaged (size or SHA-256 differ): take another checkpoint")


def latest(run_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies, or None; says which newer ones it passed over, and why."""
    for candidate in reversed(checkpoints(run_dir)):
        try:
            verify(candidate)
        except InfMoEError as error:
            warn(f"skipping {candidate.name}: {error}")
        else:
            return candidate
    return None


def to_stderr(line: str) -> None:
    """Tell the reader without disturbing what a command prints for programs."""
    print(line, file=sys.stderr)


def resolve_checkpoint(path: Path | str, warn: Callable[[str], None] = to_stderr) -> Path:
    """The model folder that `path` stands for, verified.

    Args:
        path: a run folder (its newest checkpoint that verifies), one checkpoint, or any Hugging Face folder
            of this architecture.
        warn: takes one line for each damaged checkpoint that was passed over.

    Raises:
        InfMoEError: nothing there, damaged, of another architecture, or without safetensors weights.
    """
    path = Path(path)
    if not path.is_dir():
        raise InfMoEError(f"{path} is no folder: give a run folder, a checkpoint or a Hugging Face model folder")
    if (path / FOLDER).is_dir():
        found = latest(path, warn)
        if found is None:
            raise InfMoEError(f"{path} holds no checkpoint that verifies: train it, or restore the folder")
        path = found
    elif is_sealed(path):
        verify(path)
    check_architecture(path)
    return path


def check_architecture(model_dir: Path) -> None:
    """Raise unless the folder is an infmoe model with safetensors weights."""
    try:
        model_type = json.loads((model_dir / "config.json").read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InfMoEError(f"{model_dir} has no readable config.json with a model_type: it is no model") from error
    if model_type != "infmoe":
        raise InfMoEError(f"{model_dir} holds a {model_type!r} model: give one of model_type 'infmoe'")
    if not any(model_dir.glob("*.safetensors")):
        raise InfMoEError(f"{model_dir} holds no *.safetensors weights: convert them with save_pretrained")


def is_sealed(folder: Path) -> bool:
    """Whether the folder is a checkpoint of a run, which verifies as long as nothing is added to it."""
    # transformers' Trainer has a file of the second name too, beside its own arguments; its checkpoints are plain
    lost = (folder / TRAINER_STATE).exists() and not (folder / "training_args.bin").exists()
    return (folder / MANIFEST).exists() or lost


def results_folder(path: Path) -> Path:
    """Where what is measured on the model in `path` goes: that folder, or a sealed checkpoint's run.

    Raises:
        InfMoEError: a checkpoint that lies in no run.
    """
    folder = path.resolve()
    if not is_sealed(folder):
        return path
    if folder.parent.name != FOLDER:
        raise InfMoEError(f"{path} is a sealed checkpoint outside of a run: give --out, a folder for the results")
    return folder.parents[1]


def training_data(checkpoint: Path) -> Path:
    """The prepared data that a checkpoint's run was trained on.

    Args:
        checkpoint: a run folder, or one of its checkpoints.

    Returns:
        The folder; from here where it lies below, so that what is measured does not say where on the machine it was.

    Raises:
        InfMoEError: no run says, the data is gone, or other data has taken its place.
    """
    folder = checkpoint.resolve()
    for place in (folder, *folder.parents[:2]):
        run_file = place / "run.json"
        if run_file.is_file():
            try:
                record = json.loads(run_file.read_text())
                data, known = record["config"]["data"]["dir"], record.get("data_sha256")
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise InfMoEError(f"{run_file} is not readable: give --data") from error
            if not isinstance(data, str):
                raise InfMoEError(f"{run_file} does not say what the run was trained on: give --data")
            found = Path(data).absolute()  # runs of before have a path from where they were started
            if not found.is_dir():
                raise InfMoEError(f"the data that the run was trained on ({found}) is gone: give --data")
            manifest = found / MANIFEST  # the data's own
            if known is not None and manifest.is_file() and _sha256(manifest) != known:
                raise InfMoEError(f"{found} is not the data that the run was trained on: give --data")
            here = Path.cwd()
            return found.relative_to(here) if found.is_relative_to(here) else found
    raise InfMoEError(f"{checkpoint} does not say what it was trained on: give --data")


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The trainer's state of a verified checkpoint."""
    return json.loads((checkpoint / TRAINER_STATE).read_text())


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: a reader sees the old or the new one, never half."""
    tmp = path.with_name(_TMP + path.name)
    tmp.write_text(text)
    to_disk(tmp)
    tmp.replace(path)
    to_disk(path.parent)


def _seal(folder: Path) -> None:
    """Write the manifest and force everything to disk."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        to_disk(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"files": files}, indent=2) + "\n")
    to_disk(manifest)
    to_disk(folder)


def _discard(folder: Path) -> None:
    """Delete a folder so that at no moment half of it bears its name."""
    if folder.exists():
        doomed = folder.with_name(f"{_TMP}old-{folder.name}")
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_disk(path: Path) -> None:
    """See that a file or a folder outlives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
