"""The run's folder: who owns it, what may resume in it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infmoe import checkpoint as ckpt
from infmoe.errors import InfMoEError
from infmoe.provenance import git_commit, versions
from infmoe.train.config import RunConfig, differing_keys

RUN_FILE = "run.json"


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        step: optimizer steps taken before.
        checkpoint: the folder to load, or None for a fresh start.
    """

    step: int = 0
    checkpoint: Path | None = None


def open_run(out: Path, record: dict[str, Any], *, resume: bool, say: Callable[[str], None]) -> Start:
    """Claim `out` for this run, or find where the run in it goes on.

    Args:
        out: the run's folder; made where absent.
        record: what `run_record` says about this run; where it started from is added when it goes on.
        resume: continue the run in `out`; with nothing there yet, start it.
        say: takes lines for the reader.

    Raises:
        InfMoEError: `out` holds a run and `resume` is off, or holds another run than this one.
    """
    run_file = out / RUN_FILE
    start = Start()
    if run_file.exists():
        old = _read(run_file)
        _refuse_other_run(out, old, record, resume)
        found = ckpt.latest(out, say)
        if found is not None:
            record |= {"init": old["init"]} if old["init"] else {}
            start = Start(ckpt.read_state(found)["step"], found)
        elif ckpt.checkpoints(out):
            raise InfMoEError(f"{out} holds no checkpoint that verifies: restore one, or start in another --out")
    elif (out / ckpt.FOLDER).exists() or (out / ckpt.MANIFEST).exists() or (out / "config.json").exists():
        raise InfMoEError(f"{out} holds a model but no {RUN_FILE}, so it is no run to go on with: choose another --out")
    if resume:
        say(f"resuming {out} at step {start.step}" if start.checkpoint else f"no checkpoint in {out}: starting anew")
    try:
        out.mkdir(parents=True, exist_ok=True)
        ckpt.write_text(run_file, json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise InfMoEError(f"cannot write to {out}: {error.strerror}; choose another --out") from error
    return start


def run_record(config: RunConfig, data_sha256: str) -> dict[str, Any]:
    """What the run is: configuration, data, and the versions that ran it."""
    return {
        "config": config.to_dict(),
        "data_sha256": data_sha256,
        "versions": versions(),
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
