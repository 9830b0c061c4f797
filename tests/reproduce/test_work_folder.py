"""The folder of what is unfinished."""

import dataclasses
import errno
import fcntl
import json
import os

import pytest
from fake_results import DATA, fill, spec_of

from infmoe import locks
from infmoe.errors import InfMoEError
from infmoe.locks import take_lock
from infmoe.reproduce import work_folder
from infmoe.reproduce.work_folder import WorkFolder
from infmoe.train.run_dir import Ending


@pytest.fixture
def work(tmp_path):
    """An empty folder."""
    return WorkFolder(tmp_path / "work")


def begin(work, spec, how=None):
    """A run that has begun, and perhaps ended; its lock is there."""
    folder = work.run_dir(spec)
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    (folder / "run.lock").touch()
    if how is not None:
        (folder / "ended.json").write_text(json.dumps(dataclasses.asdict(Ending(how))))


def test_a_run_has_one_lock_for_workers_and_one_of_its_own(store, work, monkeypatch):
    spec = spec_of(store)
    begin(work, spec)
    assert not work.at_work(spec)
    with work.lock(spec) as lock:
        assert lock is not None
        # the run's own is left alone then: to look at it is to hold it
        monkeypatch.setattr(work_folder, "is_locked", lambda path: pytest.fail("looked"))
        assert work.at_work(spec)
    monkeypatch.undo()
    orphan = take_lock(work.run_dir(spec) / "run.lock")
    assert work.at_work(spec)
    with work.lock(spec) as lock:
        assert lock is None
    os.close(orphan)
    assert not work.at_work(spec)


def test_what_finished_runs_left_is_swept_but_for_what_is_held(store, work, mini):
    fill(store, {"infinity": 3.4, "moe": 3.6}, mini.tokens, seeds=1)
    kept, held = spec_of(store, "infinity"), spec_of(store, "moe")
    for spec in (kept, held):
        begin(work, spec)
        work.model_dir(spec).mkdir(parents=True)
    orphan = take_lock(work.run_dir(held) / "run.lock")
    work.sweep(store)
    assert sorted(path.name for path in work.path.iterdir()) == sorted([held.slug, f"{held.slug}.lock", "models"])
    os.close(orphan)
    work.sweep(store)
    assert [path.name for path in work.path.iterdir()] == ["models"]
    assert sorted(path.name for path in work.models.iterdir()) == sorted([kept.slug, held.slug])


@pytest.mark.parametrize(("how", "left"), [("diverged", False), ("stopped", True), (None, True)])
def test_without_a_model_only_a_run_that_diverged_here_is_swept(store, work, mini, how, left):
    fill(store, {"infinity": 3.4}, mini.tokens, seeds=1)
    spec = spec_of(store, "infinity")
    begin(work, spec, how)
    work.sweep(store)
    assert work.run_dir(spec).is_dir() == left


def test_steps_for_a_trial_are_of_no_data(work):
    work.claim(DATA)
    trial = work.path / "smoke-infinity"
    trial.mkdir()
    (trial / "run.json").write_text("{}")
    other = DATA | {"sha256": "e" * 64}
    work.claim(other)
    trial.rename(work.path / "infinity-5M-lr0.002-s1")
    with pytest.raises(InfMoEError, match="are of other data"):
        work.claim(DATA)


@pytest.mark.parametrize(
    ("number", "fix"), [(errno.ENOLCK, "on a filesystem that has locks"), (errno.EACCES, "make it w")]
)
def test_a_folder_that_cannot_be_locked_is_refused(store, work, monkeypatch, number, fix):
    def refuse(path):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(work_folder, "take_lock", refuse)
    with pytest.raises(InfMoEError, match=f"cannot lock .*{fix}"), work.lock(spec_of(store)):
        pass


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    path, flock, removed = tmp_path / "lock", fcntl.flock, []

    def late(descriptor, how):
        """The holder before us removes the file between our opening and locking it, once."""
        if not removed:
            removed.append(path.unlink())
        flock(descriptor, how)

    monkeypatch.setattr(locks.fcntl, "flock", late)
    descriptor = take_lock(path)
    assert removed
    assert os.path.samestat(os.fstat(descriptor), path.stat())
    assert take_lock(path) is None
    os.close(descriptor)
