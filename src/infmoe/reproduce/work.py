"""Training and measuring what is missing; several workers may do it side by side.

A run is trained by `infmoe train` in a process of its own, so a cluster's launcher fits before it, and whatever
kills this process leaves that run's checkpoints.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from infmoe import checkpoint as ckpt
from infmoe.data import TokenData
from infmoe.errors import InfMoEError
from infmoe.eval.loading import open_model
from infmoe.reproduce.checks import data_damage
from infmoe.reproduce.child import run_child
from infmoe.reproduce.measures import Context, wanted
from infmoe.reproduce.plan import Group, RunSpec
from infmoe.reproduce.run_file import checked_fingerprint, describe_data, new_record, with_measure
from infmoe.reproduce.store import Finished, Store
from infmoe.reproduce.work_folder import WorkFolder
from infmoe.train.config import hf_config
from infmoe.train.signals import StopSignal

_WAIT_SECONDS = 10.0
_NAMED = 3  # runs in a line on many


@dataclass(frozen=True)
class Workshop:
    """Where and how runs are trained.

    Attributes:
        store: where finished runs go.
        work: what is unfinished, and the models.
        data: prepared data.
        launch: the command that stands for `infmoe`, e.g. ("accelerate", "launch", "-m", "infmoe").
        label: the command that a run's file names.
        deadline: `time.monotonic()` at which to stop; None: never.
        say: takes lines for the reader.
        tasks: the folder of the zero-shot tasks' files; None: they are not scored.
    """

    store: Store
    work: WorkFolder
    data: Path
    launch: tuple[str, ...]
    label: str
    deadline: float | None
    say: Callable[[str], None]
    tasks: Path | None = None

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
        SystemExit: a signal stopped it (its exit code); what was trained and measured stays, and is gone on with.
    """
    data = TokenData.open(shop.data)
    described = describe_data(data)
    if (damage := data_damage(described)) is not None:
        raise InfMoEError(
            f"{shop.data} can't be trained and measured on ({damage}): make it anew with `infmoe data`, "
            "a part of it held out (--val-fraction)"
        )
    shop.work.claim(described)
    shop.store.claim_data(described)
    if shop.tasks is not None:
        from infmoe.eval.zero_shot.files import file_hashes

        shop.store.claim_tasks(file_hashes(shop.tasks))
    shop.work.sweep(shop.store)
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
            with shop.work.lock(spec) as lock:
                if lock is None:
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
    if base is None or ckpt.checkpoints(shop.work.run_dir(spec)):  # once begun it goes on by itself
        return None
    run = shop.store.get(base)
    if run is None:
        return _Obstacle(f"which is not trained: name {base.arm.name} in --arms too", may_pass=True)
    if run.diverged:
        return _Obstacle(f"which diverged ({run.path}): there is none")
    if not shop.work.model_dir(base).is_dir():
        return _Obstacle(f"which is not under {shop.work.models}: move {run.path} away to train it again")
    return None


def _say_once(shop: Workshop, spec: RunSpec, obstacle: _Obstacle, said: set[str]) -> None:
    base = shop.store.base(spec)
    if base is not None and spec.slug not in said:
        said.add(spec.slug)
        shop.say(f"left out {spec.slug}: it starts from the model of {base.slug}, {obstacle.reason}")


def _base_at_work(shop: Workshop, spec: RunSpec) -> bool:
    """Whether another process trains a run's base: that of another command, perhaps."""
    base = shop.store.base(spec)
    return base is not None and shop.work.at_work(base)


def _todo(shop: Workshop, groups: Sequence[Group]) -> Iterator[RunSpec]:
    """What is still to be done: measures that finished runs lack come first, for they take minutes."""
    yield from (run.spec for run in _unmeasured(shop, groups) if shop.work.model_dir(run.spec).is_dir())
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
    lost = {run.spec.slug: run for run in _unmeasured(shop, groups) if not shop.work.model_dir(run.spec).is_dir()}
    if not lost:
        return
    names = list(dict.fromkeys(name for run in lost.values() for name in _missing_measures(shop, run.spec, run)))
    shown = ", ".join(list(lost)[:_NAMED]) + (f" and {len(lost) - _NAMED} more" if len(lost) > _NAMED else "")
    runs = f"{len(lost)} finished run{'s' if len(lost) > 1 else ''}, {shown}"
    shop.say(
        f"not measured ({', '.join(names)}), for want of a model under {shop.work.models}: {runs}; "
        f"to train one again, move its file out of {shop.store.folder / 'runs'}"
    )


def _missing_measures(shop: Workshop, spec: RunSpec, run: Finished | None) -> list[str]:
    there = run.values["measures"] if run is not None else {}
    names = wanted(spec, hf_config(spec.config()), tasks=shop.tasks is not None)
    return [name for name in names if name not in there]


def _train(shop: Workshop, spec: RunSpec, lock: int, data: TokenData) -> bool:
    """Train a run to its end, in a process of its own; False where time was up first.

    A run whose loss is no longer finite is finished too: its file says so.

    Raises:
        InfMoEError: it failed, or its base's model is not what it should be.
        SystemExit: a signal came meanwhile (its exit code).
    """
    folder, log = shop.work.run_dir(spec), shop.work.log_file(spec)
    command = [*shop.launch, "train", spec.recipe, "--out", str(folder), "--data", str(shop.data), "--resume"]
    if (base := shop.store.base(spec)) is not None:
        if not ckpt.checkpoints(folder):
            checked_fingerprint(shop.store, base, open_model(shop.work.model_dir(base), device="cpu"))
        command += ["--init", str(shop.work.model_dir(base))]
    command += spec.words()
    shop.say(f"training {spec.slug} ({folder})")
    begin = time.monotonic()
    ending, signalled = run_child(command, folder, log, lock=lock, deadline=shop.deadline)
    if ending.how == "stopped":
        if shop.out_of_time and not signalled:
            shop.say(f"time is up: {spec.slug} goes on from its checkpoint next time")
            return False
        raise SystemExit(128 + (signalled or ending.signal))
    if ending.how == "diverged":
        shop.say(f"diverged {spec.slug}: {ending.message}")
        shop.store.put(spec, new_record(shop.store, spec, folder, data, shop.label) | {"diverged": ending.message})
        shop.work.clear(spec)
    elif ending.how == "finished":
        shop.say(f"trained  {spec.slug} in {time.monotonic() - begin:.0f} s")
    else:
        raise InfMoEError(f"training {spec.slug} failed {ending.message}; its log is {log}")
    if signalled:
        raise SystemExit(128 + signalled)
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
    folder = shop.work.run_dir(spec)
    opened = open_model(folder if run is None else shop.work.model_dir(spec))
    mark = checked_fingerprint(shop.store, spec, opened)
    values = (
        new_record(shop.store, spec, folder, data, shop.label) | {"fingerprint": mark}
        if run is None
        else dict(run.values)
    )
    context = Context(opened, data, spec, shop.tasks)
    with StopSignal() as stop:
        for name in missing:
            if values["measures"] and (shop.out_of_time or stop.number):
                break
            values = with_measure(values, name, context, shop.store.tasks or {}, shop.label)
            if run is None and name == missing[0]:
                shop.work.keep(opened.checkpoint, spec)
            shop.store.put(spec, values)
    shop.say(f"measured {spec.slug}: held-out loss {values['measures']['held_out'][0]['loss']:.4f}")
    shop.work.clear(spec)
    if stop.number:
        raise SystemExit(128 + stop.number)
    return True
