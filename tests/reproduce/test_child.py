"""A training run in a process of its own: how it ends, and who is asked to stop."""

import contextlib
import dataclasses
import json
import os
import signal
import sys
import time

import pytest

from infmoe.reproduce import child
from infmoe.train.run_dir import Ending


@pytest.fixture
def small_run(tmp_path):
    """A run's folder and log, as `run_child` is given them."""
    (tmp_path / "run").mkdir()
    return tmp_path / "run", tmp_path / "run.log"


def says(folder, ending, *, then):
    """A command that writes an ending into the run's folder, and does something else."""
    text = json.dumps(dataclasses.asdict(ending)) if ending is not None else ""
    write = f"open({str(folder / 'ended.json')!r}, 'w').write({text!r});" if ending is not None else ""
    return [sys.executable, "-c", f"import os, signal, sys, time; {write} {then}"]


@pytest.mark.parametrize(
    ("said", "then", "ending"),
    [
        (Ending("finished"), "sys.exit(1)", Ending("finished")),
        (Ending("diverged", message="the loss is nan"), "sys.exit(1)", Ending("diverged", message="the loss is nan")),
        (Ending("stopped", 15), "sys.exit(1)", Ending("stopped", 15)),
        (Ending("failed", message="no room"), "sys.exit(1)", Ending("failed", message="with exit code 1 (no room)")),
        (None, "print('error: the loss is nan'); sys.exit(3)", Ending("diverged", message="the loss is nan")),
        (None, "os.kill(os.getpid(), signal.SIGINT); time.sleep(9)", Ending("stopped", 2)),
        (None, "print('oh'); sys.exit(5)", Ending("failed", message="with exit code 5 (oh)")),
        (
            None,
            "sys.exit(0)",
            Ending("failed", message="with exit code 0 before its end: a launcher has to wait for what it starts"),
        ),
    ],
)
def test_a_runs_own_word_goes_before_its_exit_code(small_run, said, then, ending):
    folder, log = small_run
    (folder / "ended.json").write_text(json.dumps(dataclasses.asdict(Ending("finished"))))  # the last time's
    if "SIGINT" in then:
        then = "signal.signal(signal.SIGINT, signal.SIG_DFL); " + then
    with log.open("w") as held:
        found = child.run_child(says(folder, said, then=then), folder, log, lock=held.fileno(), deadline=None)
    assert found == (ending, 0)


@pytest.fixture
def ctrl_c():
    """Ctrl-C as at a terminal: a shell's job in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_what_the_launcher_started(small_run, ctrl_c, number):
    folder, log = small_run
    # it asks for its own end, as a user would who sees it train; the launcher does not pass signals on
    write = f"open({str(folder / 'was-told')!r}, 'w').close()"
    run = (
        f"import os, signal, time; signal.signal({int(number)}, lambda *_: ({write}, os._exit(0)));"
        f" os.kill({os.getpid()}, {int(number)}); time.sleep(60)"
    )
    launch = f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', {run!r}]).returncode)"
    command = [sys.executable, "-c", launch]
    expected = pytest.raises(KeyboardInterrupt) if number == signal.SIGINT else contextlib.nullcontext()
    begin = time.monotonic()
    with log.open("w") as held, expected:
        found = child.run_child(command, folder, log, lock=held.fileno(), deadline=None)
        assert found == (Ending("stopped", number), number)
    assert time.monotonic() - begin < 30
    while not (folder / "was-told").exists() and time.monotonic() - begin < 30:
        time.sleep(0.02)
    assert (folder / "was-told").exists()


def test_a_signal_that_comes_too_late_for_the_run_is_told(small_run):
    folder, log = small_run
    command = says(folder, Ending("finished"), then=f"os.kill({os.getpid()}, signal.SIGTERM); time.sleep(0.5)")
    with log.open("w") as held:
        found = child.run_child(command, folder, log, lock=held.fileno(), deadline=None)
    assert found == (Ending("finished"), signal.SIGTERM)


def test_the_deadline_is_no_signal(small_run):
    folder, log = small_run
    command = says(folder, None, then="time.sleep(60)")
    with log.open("w") as held:
        found = child.run_child(command, folder, log, lock=held.fileno(), deadline=time.monotonic() + 0.5)
    assert found == (Ending("stopped", signal.SIGTERM), 0)


def test_an_orphan_is_waited_for(small_run):
    folder, log = small_run
    holder = (
        "import fcntl, os, time; file = open('run.lock', 'w'); fcntl.flock(file, fcntl.LOCK_EX); print(flush=True);"
        ' time.sleep(1); open(\'ended.json\', \'w\').write(\'{"how": "finished", "signal": 0, "message": ""}\')'
    )
    start = f"subprocess.Popen([sys.executable, '-c', {holder!r}], cwd={str(folder)!r}, stdout=-1).stdout.readline()"
    command = [sys.executable, "-c", f"import subprocess, sys; {start}; import os; os._exit(1)"]
    with log.open("w") as held:
        found = child.run_child(command, folder, log, lock=held.fileno(), deadline=None)
    assert found == (Ending("finished"), 0)
