"""The folder of what is unfinished: data, runs in training, their logs and locks, and the trained models.

It is never committed. A run's lock, which the training process holds too, keeps other workers off it, and so does the
run's own, where a launcher does not pass the first on.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infmoe.checkpoint import to_disk
from infmoe.errors import InfMoEError
from infmoe.locks import is_locked, take_lock
from infmoe.provenance import write_json
from infmoe.reproduce.plan import RunSpec
from infmoe.reproduce.store import Store, read_json
from infmoe.train.run_dir import LOCK_FILE, RUN_FILE, read_ending

# what a model folder needs to be opened; the optimizer's state stays behind
_MODEL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class WorkFolder:
    """Where runs are trained and models are kept.

    Attributes:
        path: of the folder, one for each scale.
    """

    path: Path

    @property
    def models(self) -> Path:
        """Where the trained models are."""
        return self.path / "models"

    def model_dir(self, spec: RunSpec) -> Path:
        """Where a trained model is kept."""
        return self.models / spec.slug

    def run_dir(self, spec: RunSpec) -> Path:
        """Where a run is trained."""
        return self.path / spec.slug

    def log_file(self, spec: RunSpec) -> Path:
        """What a run's training prints."""
        return self.path / f"{spec.slug}.log"

    def lock(self, spec: RunSpec) -> contextlib.AbstractContextManager[int | None]:
        """A run's lock, as a file descriptor; None where another process holds it, an orphaned training run perhaps.

        Raises:
            InfMoEError: it can't be locked.
        """
        return self._lock(spec.slug)

    def at_work(self, spec: RunSpec) -> bool:
        """Whether another process trains or measures a run."""
        if not self._lock_path(spec.slug).exists():
            return False
        with self.lock(spec) as lock:
            return lock is None

    def claim(self, data: dict[str, Any]) -> None:
        """Say what the models and unfinished runs are trained on: their names don't.

        Raises:
            InfMoEError: those that are there were trained on something else.
        """
        path = self.path / "data.json"
        known = read_json(path).get("sha256") if path.exists() else None
        if known == data["sha256"]:
            return
        if known is not None and (any(self.models.glob("*")) or any(self._unfinished())):
            raise InfMoEError(
                f"the models and unfinished runs in {self.path} are of other data ({path}): "
                "give that, or another --work"
            )
        write_json(path, data)

    def keep(self, checkpoint: Path, spec: RunSpec) -> None:
        """Keep a trained model without its optimizer; whole, or not at all."""
        to = self.model_dir(spec)
        beside = to.with_name(f".{to.name}.tmp")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        for name in (*_MODEL_FILES, *(p.name for p in checkpoint.glob("model*.safetensors*"))):
            if (checkpoint / name).is_file():
                shutil.copyfile(checkpoint / name, beside / name)
                to_disk(beside / name)  # its result's file is, and then the checkpoint goes
        shutil.rmtree(to, ignore_errors=True)
        beside.rename(to)

    def clear(self, spec: RunSpec) -> None:
        """Remove what a finished run needs no more: everything but its model."""
        self._clear(spec.slug)

    def _clear(self, slug: str) -> None:
        folder, *files = self._leftovers(slug)
        shutil.rmtree(folder, ignore_errors=True)
        for path in files:
            path.unlink(missing_ok=True)

    def sweep(self, store: Store) -> None:
        """Remove what finished runs left behind when their worker was killed."""
        for result in (store.folder / "runs").glob("*.json"):
            slug = result.stem
            if not any(path.exists() for path in self._leftovers(slug)):
                continue
            # what was finished elsewhere and has begun here is not ours to remove
            ending = read_ending(self.path / slug)
            if (self.models / slug).is_dir() or (ending is not None and ending.how == "diverged"):
                with self._lock(slug) as lock:
                    if lock is not None:
                        self._clear(slug)

    def _unfinished(self) -> Iterator[Path]:
        """Folders of runs that have begun; three steps for a trial are none."""
        return (path.parent for path in self.path.glob(f"*/{RUN_FILE}") if not path.parent.name.startswith("smoke-"))

    def _leftovers(self, slug: str) -> tuple[Path, Path, Path]:
        return self.path / slug, self.path / f"{slug}.log", self._lock_path(slug)

    def _lock_path(self, slug: str) -> Path:
        return self.path / f"{slug}.lock"

    @contextlib.contextmanager
    def _lock(self, slug: str) -> Iterator[int | None]:
        path = self._lock_path(slug)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = take_lock(path)
        except OSError as error:
            fix = "choose another --work, on a filesystem that has locks"
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC):
                fix = "make it writable, make room there, or choose another --work"
            raise InfMoEError(f"cannot lock {path} ({error.strerror}): {fix}") from error
        try:
            # looked at only by who has the first: to look is to hold it for a moment
            free = descriptor is not None and not is_locked(self.path / slug / LOCK_FILE)
            yield descriptor if free else None
        finally:
            if descriptor is not None:
                os.close(descriptor)
