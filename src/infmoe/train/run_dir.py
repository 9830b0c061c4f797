"""The run's folder: who owns it, what may resume in it."""

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from infmoe import checkpoint as ckpt
from infmoe.errors import InfMoEError
from infmoe.locks import take_lock
from infmoe.provenance import git_commit, machine, versions
from infmoe.train.config import RunConfig, differing_keys

RUN_FILE = "run.json"
LOCK_FILE = "run.lock"
ENDED_FILE = "ended.json"


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        step: optimizer steps taken before.
        checkpoint: the folder to load, or None for a fresh start.
    """

    step: int = 0
    checkpoint: Path | None = None


@dataclass(frozen=True)
class Ending:
    """How training ended, the last time.

    Attributes:
        how: "finished", "stopped" by a signal, "diverged", or "failed".
        signal: what stopped it, or 0.
        message: why it diverged or failed.
    """

    how: str
    signal: int = 0
    message: str = ""


def read_ending(out: Path) -> Ending | None:
    """How training in `out` ended by its own word; None: it was killed, or has not come so far."""
    try:
        said = json.loads((out / ENDED_FILE).read_text())
        return Ending(str(said["how"]), int(said["signal"]), str(said["message"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


class Hold:
    """A run's folder while it is trained in: its main process keeps others off, and says at the end how it went.

    An exit code says less: a launcher that started the process has one of its own.
    """

    def __init__(self, out: Path):
        self._out = out
        self._taken = False
        self._lock: int | None = None

    def take(self) -> None:
        """Keep other processes off, and forget how the last one ended.

        Raises:
            InfMoEError: another process trains in the folder.
        """
        try:
            self._lock = take_lock(self._out / LOCK_FILE)
        except OSError:  # a filesystem without locks: nobody is kept off
            pass
        else:
            if self._lock is None:
                raise InfMoEError(f"another process trains in {self._out}: wait for it, or choose another --out")
            with contextlib.suppress(OSError):  # for whoever wants to stop it by hand
                os.ftruncate(self._lock, 0)
                os.write(self._lock, f"{os.getpid()}\n".encode())
        self._taken = True
        (self._out / ENDED_FILE).unlink(missing_ok=True)

    def end(self, ending: Ending) -> None:
        """Write down how it went; on the main process, for the others have taken nothing."""
        if self._taken:
            ckpt.write_text(self._out / ENDED_FILE, json.dumps(asdict(ending)) + "\n")

    def __enter__(self) -> "Hold":
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            os.close(self._lock)


def open_run(
    out: Path, record: dict[str, Any], *, resume: bool, say: Callable[[str], None], hold: Hold | None = None
) -> Start:
    """Claim `out` for this run, or find where the run in it goes on.

    Args:
        out: the run's folder; made where absent.
        record: what `run_record` says about this run; where it started from is added when it goes on.
        resume: continue the run in `out`; with nothing there yet, start it.
        say: takes lines for the reader.
        hold: is taken before anything is written; None: nobody is kept off.

    Raises:
        InfMoEError: `out` holds a run and `resume` is off, or holds another run than this one, or one that another
            process trains.
    """
    run_file = out / RUN_FILE
    start, old = Start(), None
    if run_file.exists():
        old = _read(run_file)
        _refuse_other_run(out, old, record, resume)
    elif (out / ckpt.FOLDER).exists() or (out / ckpt.MANIFEST).exists() or (out / "config.json").exists():
        raise InfMoEError(f"{out} holds a model but no {RUN_FILE}, so it is no run to go on with: choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        if hold is not None:
            hold.take()
    except OSError as error:
        raise _unwritable(out, error) from error
    if old is not None:
        found = ckpt.latest(out, say)
        if found is not None:
            record |= {"init": old["init"]} if old["init"] else {}
            start = Start(ckpt.read_state(found)["step"], found)
        elif ckpt.checkpoints(out):
            raise InfMoEError(f"{out} holds no checkpoint that verifies: restore one, or start in another --out")
    if resume:
        say(f"resuming {out} at step {start.step}" if start.checkpoint else f"no checkpoint in {out}: starting anew")
    try:
        ckpt.write_text(run_file, json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise _unwritable(out, error) from error
    return start


def _unwritable(out: Path, error: OSError) -> InfMoEError:
    return InfMoEError(f"cannot write to {out}: {error.strerror}; choose another --out")


def run_record(config: RunConfig, data_sha256: str) -> dict[str, Any]:
    """What the run is: configuration, data, and the versions and the machine that ran it."""
    values = config.to_dict()
    if config.data.dir is not None:
        values["data"]["dir"] = str(Path(config.data.dir).absolute())  # to be the same folder from wherever it is read
    return {
        "config": values,
        "data_sha256": data_sha256,
        "versions": versions(),
        "machine": machine(),
        "git_commit": git_commit(),
    }


def _same_folder(old: str | None, new: str | None) -> bool:
    """Whether two paths may be of one folder that was moved with what lies around it.

    By more than its name, for checkpoints of other runs have the same.
    """
    return old is not None and new is not None and Path(old).parts[-3:] == Path(new).parts[-3:]


def _refuse_other_run(out: Path, old: dict[str, Any], new: dict[str, Any], resume: bool) -> None:
    differing = differing_keys(old["config"], new["config"])
    if "init" in differing and _same_folder(old["config"]["init"], new["config"]["init"]):
        differing.remove("init")
    if old["data_sha256"] != new["data_sha256"]:
        differing.append("the contents of data.dir")
    old_name, old_steps = old["config"]["name"], old["config"]["steps"]
    folders = ckpt.checkpoints(out)
    reached = ckpt.step_of(folders[-1]) if folders else 0
    if differing and resume:
        raise InfMoEError(
            f"cannot resume {out}: it was started with other values of {', '.join(differing)}; "
            f"restore them, or start in another --out"
        )
    if not resume:
        state = "a finished run" if reached >= old_steps else f"a run at step {reached} of {old_steps}"
        same = "this" if not differing else "another"
        remedy = "choose another --out"
        if not differing and reached < old_steps:
            remedy = "pass --resume to continue it, or " + remedy
        raise InfMoEError(f"{out} holds {state} ({old_name}) with {same} configuration: {remedy}")


def _read(run_file: Path) -> dict[str, Any]:
    try:
        record = json.loads(run_file.read_text())
        known = {"config": dict(record["config"]), "data_sha256": str(record["data_sha256"])}
        return known | {"init": record.get("init")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InfMoEError(f"{run_file} is not readable: restore it, or choose another --out") from error
