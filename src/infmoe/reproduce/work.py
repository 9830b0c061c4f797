"""Training and measuring what is missing, by one worker or by several side by side.

A run is trained by `infmoe train` in a process of its own, so a cluster's launcher fits before it, and whatever
kills this process leaves that run's checkpoints. A lock that the training process holds too keeps others off, and
the run's own, where a launcher does not pass it on.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from infmoe import checkpoint as ckpt
from infmoe.data import TokenData
from infmoe.errors import InfMoEError
from infmoe.eval.loading import Opened, open_model
from infmoe.eval.report import read_metrics
from infmoe.hf import model_cost
from infmoe.hf.configuration_infmoe import model_fields
from infmoe.hf.identity import fingerprint
from infmoe.locks import is_locked, take_lock
from infmoe.provenance import provenance, write_json
from infmoe.reproduce.checks import data_damage, expanded_model, run_identity
from infmoe.reproduce.child import run_child
from infmoe.reproduce.measures import MEASURES, ZERO_SHOT, Context, own_settings, settings, wanted
from infmoe.reproduce.plan import Group, RunSpec
from infmoe.reproduce.store import Finished, Store, read_json
from infmoe.train.config import hf_config
from infmoe.train.run_dir import LOCK_FILE, RUN_FILE
from infmoe.train.signals import StopSignal

_CURVE_POINTS = 64
_WAIT_SECONDS = 10.0
_NAMED = 3  # runs in a line on many
# what a model folder needs to be opened; the optimizer's state stays behind
_MODEL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Workshop:
    """Where and how runs are trained.

    Attributes:
        store: where finished runs go.
        work: for what is unfinished, and for the models; never committed.
        data: prepared data.
        launch: the command that stands for `infmoe`, e.g. ("accelerate", "launch", "-m", "infmoe").
        label: the command that a run's file names.
        deadline: `time.monotonic()` at which to stop; None: never.
        say: takes lines for the reader.
        tasks: the folder of the zero-shot tasks' files; None: they are not scored.
    """

    store: Store
    work: Path
    data: Path
    launch: tuple[str, ...]
    label: str
    deadline: float | None
    say: Callable[[str], None]
    tasks: Path | None = None

    def model_dir(self, spec: RunSpec) -> Path:
        """Where a trained model is kept."""
        return self.work / "models" / spec.slug

    @property
    def out_of_time(self) -> bool:
        """Whether the deadline has passed."""
        return self.deadline is not None and time.monotonic() >= self.deadline


def work_through(shop: Workshop, groups: Sequence[Group]) -> bool:
    """Train and measure until nothing is missing, or time is up.

    A run that starts from another one's model waits until that is finished. Where there is no such model to come, it
    is left out: a line says so, once.

    Returns:
        Whether it came to the end; False: time was up first. What was left out is missing at the end too.

    Raises:
        InfMoEError: a training run failed, or a result on disk is not what it should be.
        SystemExit: a signal stopped training (its exit code); what was trained stays, and is gone on with.
    """
    data = TokenData.open(shop.data)
    described = describe_data(data)
    if (damage := data_damage(described)) is not None:
        raise InfMoEError(
            f"{shop.data} can't be trained and measured on ({damage}): make it anew with `infmoe data`, "
            "a part of it held out (--val-fraction)"
        )
    _claim_work(shop, described)
    shop.store.claim_data(described)
    if shop.tasks is not None:
        from infmoe.eval.zero_shot.files import file_hashes

        shop.store.claim_tasks(file_hashes(shop.tasks))
    _sweep(shop)
    said: set[str] = set()
    while not shop.out_of_time:
        others_at_work = False
        lacking: list[RunSpec] = []
        for spec in _todo(shop, groups):
            if (obstacle := _obstacle(shop, spec)) is not None:
                lacking.append(spec)
                if not obstacle.may_pass:
                    _say_once(shop, spec, obstacle, said)
                continue
            with _lock(shop.work / f"{spec.slug}.lock") as lock:
                # the second is an orphan's: a launcher need not pass the first on
                if lock is None or is_locked(shop.work / spec.slug / LOCK_FILE):
                    others_at_work = True
                    continue
                if shop.store.fresh(spec) is None and not _train(shop, spec, lock, data):
                    return False
                if not _measure(shop, spec, data):
                    continue
                break  # what comes next may hang on what this one found
        else:
            if others_at_work or any(_base_at_work(shop, spec) for spec in lacking):
                time.sleep(_WAIT_SECONDS)
                continue
            left = [(spec, obstacle) for spec in lacking if (obstacle := _obstacle(shop, spec)) is not None]
            if len(left) < len(lacking):
                continue  # another worker has finished a base since it was looked for
            for spec, obstacle in left:
                _say_once(shop, spec, obstacle, said)
            if left:
                shop.say(f"left out, for want of a model to start from: {', '.join(spec.slug for spec, _ in left)}")
            _say_unmeasured(shop, groups)
            return True
    return False


@dataclass(frozen=True)
class _Obstacle:
    """Why a run can't start from its base's model.

    Attributes:
        reason: of the base, and what to do.
        may_pass: whether a worker may be training the base, or come to it.
    """

    reason: str
    may_pass: bool = False


def _obstacle(shop: Workshop, spec: RunSpec) -> _Obstacle | None:
    """What keeps a run from being trained; None: nothing does, or it is finished."""
    base = shop.store.base(spec) if shop.store.get(spec) is None else None
    if base is None or ckpt.checkpoints(shop.work / spec.slug):  # once begun it goes on by itself
        return None
    run = shop.store.get(base)
    if run is None:
        return _Obstacle(f"which is not trained: name {base.arm.name} in --arms too", may_pass=True)
    if run.diverged:
        return _Obstacle(f"which diverged ({run.path}): there is none")
    if not shop.model_dir(base).is_dir():
        return _Obstacle(f"which is not under {shop.model_dir(base).parent}: move {run.path} away to train it again")
    return None


def _say_once(shop: Workshop, spec: RunSpec, obstacle: _Obstacle, said: set[str]) -> None:
    base = shop.store.base(spec)
    if base is not None and spec.slug not in said:
        said.add(spec.slug)
        shop.say(f"left out {spec.slug}: it starts from the model of {base.slug}, {obstacle.reason}")


def _base_at_work(shop: Workshop, spec: RunSpec) -> bool:
    """Whether another process trains a run's base: that of another command, perhaps."""
    base = shop.store.base(spec)
    path = None if base is None else shop.work / f"{base.slug}.lock"
    if path is None or not path.exists():
        return False
    with _lock(path) as lock:
        return lock is None


def _todo(shop: Workshop, groups: Sequence[Group]) -> Iterator[RunSpec]:
    """What is still to be done: measures that finished runs lack come first, for they take minutes."""
    yield from (run.spec for run in _unmeasured(shop, groups) if shop.model_dir(run.spec).is_dir())
    yield from shop.store.missing(groups)


def _unmeasured(shop: Workshop, groups: Sequence[Group]) -> Iterator[Finished]:
    """Finished runs that lack a measure; a run may come more than once."""
    for group in groups:
        for name in group.trained:
            for run in shop.store.runs(name, group.tokens):
                if not run.diverged and _missing_measures(shop, run.spec, run):
                    yield run


def _say_unmeasured(shop: Workshop, groups: Sequence[Group]) -> None:
    """One line on finished runs that lack measures for good: their models are gone."""
    lost = {run.spec.slug: run for run in _unmeasured(shop, groups) if not shop.model_dir(run.spec).is_dir()}
    if not lost:
        return
    names = list(dict.fromkeys(name for run in lost.values() for name in _missing_measures(shop, run.spec, run)))
    shown = ", ".join(list(lost)[:_NAMED]) + (f" and {len(lost) - _NAMED} more" if len(lost) > _NAMED else "")
    runs = f"{len(lost)} finished run{'s' if len(lost) > 1 else ''}, {shown}"
    shop.say(
        f"not measured ({', '.join(names)}), for want of a model under {shop.work / 'models'}: {runs}; "
        f"to train one again, move its file out of {shop.store.folder / 'runs'}"
    )


def _missing_measures(shop: Workshop, spec: RunSpec, run: Finished | None) -> list[str]:
    there = run.values["measures"] if run is not None else {}
    names = wanted(spec, hf_config(spec.config()), tasks=shop.tasks is not None)
    return [name for name in names if name not in there]


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[int | None]:
    """The lock's file descriptor; None where another process holds it, which may be an orphaned training run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = take_lock(path)
    except OSError as error:
        raise InfMoEError(
            f"cannot lock {path} ({error.strerror}): choose another --work, on a filesystem that has locks"
        ) from error
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _claim_work(shop: Workshop, data: dict[str, Any]) -> None:
    """Say what the models and unfinished runs in the work folder are trained on: their names don't.

    Raises:
        InfMoEError: those that are there were trained on something else.
    """
    path = shop.work / "data.json"
    known = read_json(path).get("sha256") if path.exists() else None
    if known == data["sha256"]:
        return
    if known is not None and (any((shop.work / "models").glob("*")) or any(shop.work.glob(f"*/{RUN_FILE}"))):
        raise InfMoEError(
            f"the models and unfinished runs in {shop.work} are of other data ({path}): give that, or another --work"
        )
    write_json(path, data)


def _sweep(shop: Workshop) -> None:
    """Remove what finished runs left behind when their worker was killed."""
    for model in (shop.work / "models").glob("*"):
        slug = model.name
        if (shop.store.folder / "runs" / f"{slug}.json").is_file():
            with _lock(shop.work / f"{slug}.lock") as lock:
                if lock is not None:
                    _clear(shop, slug)


def _clear(shop: Workshop, slug: str) -> None:
    shutil.rmtree(shop.work / slug, ignore_errors=True)
    for suffix in (".log", ".lock"):
        (shop.work / f"{slug}{suffix}").unlink(missing_ok=True)


def _train(shop: Workshop, spec: RunSpec, lock: int, data: TokenData) -> bool:
    """Train a run to its end, in a process of its own; False where time was up first.

    A run whose loss is no longer finite is finished too: its file says so.
    """
    folder, log = shop.work / spec.slug, shop.work / f"{spec.slug}.log"
    command = [*shop.launch, "train", spec.recipe, "--out", str(folder), "--data", str(shop.data), "--resume"]
    if (base := shop.store.base(spec)) is not None:
        if not ckpt.checkpoints(folder):
            _own_mark(shop, base, open_model(shop.model_dir(base), device="cpu"))
        command += ["--init", str(shop.model_dir(base))]
    command += [word for setting in spec.overrides() for word in ("--set", setting)]
    shop.say(f"training {spec.slug} ({folder})")
    begin = time.monotonic()
    ending = run_child(command, folder, log, lock=lock, deadline=shop.deadline)
    if ending.how == "stopped":
        if shop.out_of_time:
            shop.say(f"time is up: {spec.slug} goes on from its checkpoint next time")
            return False
        raise SystemExit(128 + ending.signal)
    if ending.how == "diverged":
        shop.say(f"diverged {spec.slug}: {ending.message}")
        shop.store.put(spec, _record(shop, spec, folder, data) | {"diverged": ending.message})
        _clear(shop, spec.slug)
        return True
    if ending.how != "finished":
        raise InfMoEError(f"training {spec.slug} failed {ending.message}; its log is {log}")
    shop.say(f"trained  {spec.slug} in {time.monotonic() - begin:.0f} s")
    return True


def _measure(shop: Workshop, spec: RunSpec, data: TokenData) -> bool:
    """Take what is not measured yet, one after the other, and keep the model without its optimizer.

    The run is finished once its loss is there: its model is kept first, for without that it can't be measured again.
    Then the file is written anew after each measure, so that a kill loses no more than the one in progress.

    Returns:
        Whether there was something to do; where time was up, there may be more.

    Raises:
        InfMoEError: the model is not the run's.
        SystemExit: a signal came while it was measured (its exit code).
    """
    run = shop.store.fresh(spec)
    if run is not None and run.diverged:
        return True
    missing = _missing_measures(shop, spec, run)
    if not missing:
        return False
    folder = shop.work / spec.slug
    opened = open_model(folder if run is None else shop.model_dir(spec))
    mark = _own_mark(shop, spec, opened)
    values = _record(shop, spec, folder, data) | {"fingerprint": mark} if run is None else dict(run.values)
    context = Context(opened, data, spec, shop.tasks)
    with StopSignal() as stop:
        for name in missing:
            if values["measures"] and (shop.out_of_time or stop.number):
                break
            values = _with_measure(shop, values, name, context)
            if run is None and name == missing[0]:
                _keep_model(opened.checkpoint, shop.model_dir(spec))
            shop.store.put(spec, values)
    shop.say(f"measured {spec.slug}: held-out loss {values['measures']['held_out'][0]['loss']:.4f}")
    _clear(shop, spec.slug)
    if stop.number:
        raise SystemExit(128 + stop.number)
    return True


def _own_mark(shop: Workshop, spec: RunSpec, opened: Opened) -> str:
    """The fingerprint of a model, which is that of a run.

    Raises:
        InfMoEError: a default has changed since the run was begun, or it is another --out's model of the same name.
    """
    wanted, fields = expanded_model(spec.config()), model_fields(opened.model.config)
    # in JSON's values, as those of `expanded_model` are: a list of layers is a tuple in a config
    differing = [name for name, value in json.loads(json.dumps(fields)).items() if value != wanted.get(name)]
    if differing:
        raise InfMoEError(
            f"{opened.checkpoint} is not the model that {spec.slug} stands for now (other values of "
            f"{', '.join(differing)}): a default has changed since; move it away to train that run anew"
        )
    mark = fingerprint(opened.model)
    run = shop.store.get(spec)
    if run is not None and run.values.get("fingerprint", mark) != mark:  # older files have none
        raise InfMoEError(
            f"{opened.checkpoint} is not the model that {run.path} is of: give each --out a --work of its own, "
            "or move the file away to train that run again"
        )
    return mark


def _with_measure(shop: Workshop, values: dict[str, Any], name: str, context: Context) -> dict[str, Any]:
    """What a run's file holds with one measure more."""
    more: dict[str, Any] = {"measures": values["measures"] | {name: MEASURES[name].take(context)}}
    own = own_settings(name, context.spec.scale, shop.store.tasks or {})
    if own is not None:
        more["measured_with"] = values["measured_with"] | {name: own}
    if name == ZERO_SHOT:
        # it may be taken long after training, by another commit
        more["provenance"] = values["provenance"] | {ZERO_SHOT: provenance() | {"command": shop.label}}
    return values | more


def _record(shop: Workshop, spec: RunSpec, folder: Path, data: TokenData) -> dict[str, Any]:
    """Everything about a run but its measures."""
    trained = json.loads((folder / RUN_FILE).read_text())
    config = spec.config()
    curve, seconds = _curve(read_metrics(folder))
    start: dict[str, Any] = {}
    training = {"versions": trained["versions"], "commit": trained["git_commit"]}
    if "machine" in trained:  # not in a run that was begun before it was written down
        training["machine"] = trained["machine"]
    if (base := shop.store.base(spec)) is not None:
        # by content: where the base's model lay is this machine's alone, so `config` has nothing of it
        mark = trained["init"]["fingerprint"]
        start = {"init": {"arm": base.arm.name, "slug": base.slug, "fingerprint": mark}}
    return {
        "run": run_identity(spec, config) | start,
        "config": config.to_dict(),
        "model": expanded_model(config),
        "data": describe_data(data),
        "cost": model_cost(hf_config(config)).as_dict(),
        "seconds": seconds,
        "curve": curve,
        "measures": {},
        "measured_with": settings(spec.scale),
        "provenance": provenance()
        | {
            "command": shop.label,
            "training": training,
        },
    }


def _curve(metrics: list[dict[str, Any]]) -> tuple[dict[str, list], float]:
    """The training's course, thinned out, and the seconds that its steps took (evaluations apart)."""
    steps = [record for record in metrics if "loss" in record]
    seconds, tokens = 0.0, 0
    for record in steps:
        seconds += (record["tokens"] - tokens) / record["tokens_per_sec"]
        tokens = record["tokens"]
    every = max(1, -(-len(steps) // _CURVE_POINTS))  # a run may diverge before its first record
    kept = steps[::-1][::every][::-1]  # the last one always
    curve: dict[str, list] = {"tokens": [r["tokens"] for r in kept], "loss": [round(r["loss"], 5) for r in kept]}
    if kept and kept[-1].get("routing"):
        for name in kept[-1]["routing"]:
            curve[name] = [round(r["routing"][name], 5) for r in kept]
    held_out = [record for record in metrics if "val_loss" in record]
    curve["val_tokens"] = [record["tokens"] for record in held_out]
    curve["val_loss"] = [round(record["val_loss"], 5) for record in held_out]
    return curve, seconds


def describe_data(data: TokenData) -> dict[str, Any]:
    """What runs were trained on, by content: the same wherever the files lie."""
    manifest = data.manifest
    content = {name: [shard.sha256 for shard in split.shards] for name, split in manifest.splits.items()}
    digest = hashlib.sha256(json.dumps([manifest.tokenizer.sha256, content], sort_keys=True).encode()).hexdigest()
    counts = {
        name: {"documents": split.documents, "tokens": split.tokens, "text_bytes": split.text_bytes}
        for name, split in manifest.splits.items()
    }
    return {"sha256": digest, "vocab_size": manifest.tokenizer.vocab_size, "splits": counts}


def _keep_model(checkpoint: Path, to: Path) -> None:
    beside = to.with_name(f".{to.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    for name in (*_MODEL_FILES, *(p.name for p in checkpoint.glob("model*.safetensors*"))):
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, beside / name)
    shutil.rmtree(to, ignore_errors=True)
    beside.rename(to)


def _gpu_shares(jobs: int) -> list[dict[str, str]]:
    """What each worker's environment says of the GPUs that it may use; nothing where there are none."""
    count = torch.cuda.device_count()
    if not count:
        return [{}] * jobs
    if jobs > count:
        raise InfMoEError(
            f"--jobs {jobs} is more than the {count} GPUs here, and two runs on one would share it: take --jobs {count}"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",")[:count] if visible else [str(i) for i in range(count)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(names[i::jobs])} for i in range(jobs)]


def start_workers(command: Sequence[str], jobs: int) -> int:
    """Run `jobs` workers side by side, each with its share of the cores and of the GPUs.

    Returns:
        The first exit code that is not 0.

    Raises:
        InfMoEError: there are GPUs, but fewer than workers.
    """
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), threads)
    words = [sys.executable, "-m", "infmoe", *command]
    workers = [subprocess.Popen(words, env=environment | share) for share in _gpu_shares(jobs)]

    def stop(*_: object) -> None:
        for worker in workers:
            worker.terminate()

    before = signal.signal(signal.SIGTERM, stop)
    try:
        codes = [worker.wait() for worker in workers]
    except KeyboardInterrupt:
        for worker in workers:
            worker.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    return next((code if code > 0 else 128 - code for code in codes if code), 0)
