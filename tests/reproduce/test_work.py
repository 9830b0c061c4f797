"""`infmoe reproduce` trains what is missing: real training runs of seconds."""

import dataclasses
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
import types

import pytest
from fake_results import DATA, MINI
from reproduce_helpers import Killed, dies, runs_of
from tiny_run import documents

from infmoe.data import MemorySource, TrainBPE, prepare
from infmoe.errors import InfMoEError
from infmoe.locks import is_locked
from infmoe.reproduce import child, measures, plan, work
from infmoe.reproduce.checks import expanded_model
from infmoe.reproduce.command import run_request
from infmoe.reproduce.measures import Measure
from infmoe.reproduce.plan import Group
from infmoe.reproduce.store import Store
from infmoe.reproduce.work_folder import WorkFolder
from infmoe.train.config import load_config
from infmoe.train.run_dir import Ending, Hold, read_ending


def test_what_is_missing_is_trained_and_what_is_done_is_not(request_, in_process, capsys, monkeypatch):
    assert run_request(request_) == 0
    found = runs_of(request_)
    assert list(found) == ["infinity-0.001024M-lr0.002-s1", "moe16-0.001024M-lr0.002-s1"]
    for values in found.values():
        assert values["measures"]["held_out"][0]["loss"] == pytest.approx(values["curve"]["val_loss"][-1], abs=0.3)
        assert values["curve"]["tokens"] == [256, 512, 768, 1024]
        assert values["seconds"] > 0
        assert values["config"]["data"]["dir"] is None
        assert values["model"] == expanded_model(load_config(values["config"]))
        assert values["provenance"]["training"]["machine"] == values["provenance"]["machine"]
        assert str(request_.work) not in json.dumps(values)
        assert values["provenance"]["command"] == "infmoe reproduce table6 --scale tiny --data DIR"
    infinity, moe = found.values()
    ks = [
        row["num_samples"] for row in infinity["measures"]["dials"] if row["keep_ratio"] == 0.25 and "mode" not in row
    ]
    assert sorted(ks) == [1, 2, 3, 4, 8, 16]
    assert {row["gate_norm"] for row in moe["measures"]["gate_norms"]} == {"selected", "all", "trained"}
    # what is kept: the models, without the optimizer
    left = sorted(path.name for path in (request_.work / "tiny").iterdir())
    assert left == ["data.json", "models"]
    assert sorted(p.name for p in (request_.work / "tiny" / "models").iterdir()) == list(found)
    out = capsys.readouterr().out
    assert "Table 6: sixteen experts" in out
    assert (request_.out / "tiny" / "table6.md").is_file()

    monkeypatch.setattr(child.subprocess, "Popen", lambda *args, **kwargs: pytest.fail("trained again"))
    assert run_request(request_) == 0
    assert runs_of(request_) == found

    # a measure that comes later is taken of the models that are there
    later = Measure(lambda context: [{"loss": 1.0, "seed": context.spec.seed}], lambda config, _: config.ffn == "moe")
    monkeypatch.setitem(measures.MEASURES, "later", later)
    assert run_request(request_) == 0
    now = runs_of(request_)
    assert now["moe16-0.001024M-lr0.002-s1"]["measures"].pop("later") == [{"loss": 1.0, "seed": 1}]
    assert now == found


def worker_script(path, scale):
    """A file that is `infmoe` with the mini scale, changed as these words say, and one arm in Table 6."""
    path.write_text(
        "import dataclasses, sys\n"
        f"sys.path.insert(0, {str(os.path.dirname(os.path.dirname(__file__)))!r})\n"
        "from fake_results import MINI\n"
        "from infmoe.reproduce import plan\n"
        "from infmoe.cli import main\n"
        f"plan.SCALES['tiny'] = dataclasses.replace(MINI, lr_grid=(), {scale})\n"
        "plan.EXPERIMENTS['table6'] = lambda s: [plan.Group(('infinity',), s.tokens, (1, 1))]\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    return path


def test_killed_anywhere_it_goes_on_and_ends_with_the_same_numbers(request_, mini_data, tmp_path, monkeypatch, request):
    rarely = ("checkpoint.every=8", "eval.every=20")  # each checkpoint is hashed and synced
    longer = dataclasses.replace(plan.SCALES["tiny"], tokens=256 * 40, settings=(*MINI.settings, *rarely))
    monkeypatch.setitem(plan.SCALES, "tiny", longer)
    monkeypatch.setitem(plan.EXPERIMENTS, "table6", lambda s: [Group(("infinity",), s.tokens, (1, 1))])
    settings = f"tokens=256 * 40, settings=(*MINI.settings, *{rarely!r})"
    script = worker_script(tmp_path / "worker.py", settings)
    killed = dataclasses.replace(request_, out=tmp_path / "killed" / "reproduce", work=tmp_path / "killed-runs")
    words = [sys.executable, script, *killed.worker_words(mini_data)]
    process = subprocess.Popen(words, start_new_session=True, stdout=subprocess.DEVNULL)
    folder = killed.work / "tiny"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not list(folder.glob("*/checkpoints/step-0000*")):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)  # the run is in a session of its own
    process.wait()
    (lock,) = folder.glob("*/run.lock")
    os.kill(int(lock.read_text()), signal.SIGKILL)
    while is_locked(lock):
        time.sleep(0.02)
    assert not runs_of(killed)
    assert list(folder.glob("*/checkpoints/step-*"))
    assert run_request(killed) == 0
    request.getfixturevalue("in_process")
    assert run_request(request_) == 0
    (one,), (other,) = runs_of(killed).values(), runs_of(request_).values()
    assert one["measures"] == other["measures"]
    assert one["curve"] == other["curve"]


# as accelerate's and torchrun do: nothing is handed on but the words, and 1 stands for whatever went wrong
LAUNCHER = """
import signal, subprocess, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
words = [sys.executable, "-m", "infmoe", *sys.argv[1:]]
sys.exit(1 if subprocess.Popen(words, close_fds=True).wait() else 0)
"""


def test_behind_a_launcher_a_signal_stops_the_run_and_its_own_word_counts(request_, mini_data, tmp_path):
    (tmp_path / "launch.py").write_text(LAUNCHER)
    script = worker_script(tmp_path / "worker.py", "tokens=256 * 100_000")
    launched = dataclasses.replace(request_, launch=f"{sys.executable} {tmp_path / 'launch.py'}")
    process = subprocess.Popen([sys.executable, script, *launched.worker_words(mini_data)], stdout=subprocess.DEVNULL)
    folder = request_.work / "tiny"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not list(folder.glob("*/checkpoints/step-0000*")):
        time.sleep(0.02)
    (lock,) = folder.glob("*/run.lock")
    assert is_locked(lock)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    # not before it was over: the launcher was gone at once
    assert not is_locked(lock)
    assert read_ending(lock.parent) == Ending("stopped", signal.SIGTERM)
    assert "stopped by a signal" in lock.parent.with_name(f"{lock.parent.name}.log").read_text()


def test_what_another_process_trains_is_left_to_it_by_the_runs_own_lock_too(request_, monkeypatch):
    spec = next(iter(Store(request_.out, plan.SCALES["tiny"]).missing(plan.groups("table6", plan.SCALES["tiny"]))))
    trained = []
    monkeypatch.setattr(work, "_train", lambda shop, spec, *rest: trained.append(spec.arm.name) or False)
    (request_.work / "tiny" / spec.slug).mkdir(parents=True)
    with Hold(request_.work / "tiny" / spec.slug) as hold:
        hold.take()
        assert run_request(request_) == 0
    assert trained == ["moe16"]


def test_a_run_that_another_process_trains_is_left_to_it(request_, monkeypatch):
    spec = next(iter(Store(request_.out, plan.SCALES["tiny"]).missing(plan.groups("table6", plan.SCALES["tiny"]))))
    lock = request_.work / "tiny" / f"{spec.slug}.lock"
    lock.parent.mkdir(parents=True)
    trained = []
    monkeypatch.setattr(work, "_train", lambda shop, spec, *rest: trained.append(spec.arm.name) or False)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run_request(request_) == 0
    assert trained == ["moe16"]


def test_when_time_is_up_it_says_so_and_goes_on_later(request_, monkeypatch, capsys):
    endless = dataclasses.replace(plan.SCALES["tiny"], tokens=256 * 100_000)
    monkeypatch.setitem(plan.SCALES, "tiny", endless)
    up = []

    class Child(subprocess.Popen):
        """An hour passes once it trains, however long it takes to start here."""

        def wait(self, timeout=None):
            if timeout is None:
                return super().wait()
            assert 3500 < timeout <= 3600
            while self.poll() is None and not up:
                up.extend(path for path in (request_.work / "tiny").glob("*/metrics.jsonl") if path.stat().st_size)
                time.sleep(0.05)
            raise subprocess.TimeoutExpired(self.args, timeout)

    names = {"Popen": Child, "DEVNULL": subprocess.DEVNULL, "TimeoutExpired": subprocess.TimeoutExpired}
    monkeypatch.setattr(child, "subprocess", types.SimpleNamespace(**names))
    clock = types.SimpleNamespace(monotonic=lambda: time.monotonic() + 3600 * bool(up), sleep=time.sleep)
    monkeypatch.setattr(work, "time", clock)
    monkeypatch.setattr(child, "time", clock)
    assert run_request(dataclasses.replace(request_, hours=1.0)) == 0
    out = capsys.readouterr().out
    assert "the same command goes on from here" in out
    assert list((request_.work / "tiny").glob("*/checkpoints/step-*"))
    assert not runs_of(request_)


def test_a_signal_at_the_end_of_a_run_stops_what_comes_after(request_, in_process, monkeypatch):
    ran = work.run_child
    monkeypatch.setattr(work, "run_child", lambda *rest, **more: (ran(*rest, **more)[0], signal.SIGTERM))
    monkeypatch.setattr(work, "_measure", lambda *rest: pytest.fail("measured"))
    with pytest.raises(SystemExit) as stop:
        run_request(request_)
    assert stop.value.code == 128 + signal.SIGTERM
    assert len(list((request_.work / "tiny").glob("*/ended.json"))) == 1


def test_a_run_that_fails_is_named_with_its_reason(request_, in_process, monkeypatch):
    broken = dataclasses.replace(plan.SCALES["tiny"], settings=(*plan.SCALES["tiny"].settings, "model.vocab_size=10"))
    monkeypatch.setitem(plan.SCALES, "tiny", broken)
    with pytest.raises(InfMoEError, match=r"training infinity-.* failed with exit code 2 \(error: .*=300\); its log"):
        run_request(request_)


def test_a_signal_to_stop_ends_with_a_checkpoint_and_the_signals_code(request_, tmp_path, monkeypatch):
    launch = tmp_path / "launch.py"
    launch.write_text("import os, signal; os.kill(os.getpid(), signal.SIGTERM)")
    with pytest.raises(SystemExit) as stop:
        run_request(dataclasses.replace(request_, launch=f"{sys.executable} {launch}"))
    assert stop.value.code == 128 + signal.SIGTERM


@pytest.fixture
def diverging(request_, in_process, monkeypatch):
    """A run whose third loss is none."""
    import infmoe.train.loop as loop

    check = loop.check_finite
    nan_at_3 = lambda step, loss, *rest: check(step, float("nan") if step == 3 else loss, *rest)  # noqa: E731
    monkeypatch.setattr(loop, "check_finite", nan_at_3)
    monkeypatch.setitem(plan.EXPERIMENTS, "table6", lambda s: [Group(("infinity",), s.tokens, (1, 1))])


def test_a_run_that_diverges_is_finished_and_the_rest_goes_on(request_, diverging):
    assert run_request(request_) == 0
    (values,) = runs_of(request_).values()
    assert values["diverged"].startswith("the loss is nan at step 3")
    assert values["curve"]["tokens"] == [256, 512]
    assert not list((request_.work / "tiny").glob("infinity*"))


def test_what_a_diverged_run_leaves_behind_when_it_is_killed_is_removed(request_, diverging, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "clear", dies(WorkFolder.clear, "before", 1))
        with pytest.raises(Killed):
            run_request(request_)
    (slug,) = runs_of(request_)
    folder = request_.work / "tiny"
    assert {path.name for path in folder.glob("infinity*")} == {slug, f"{slug}.log", f"{slug}.lock"}
    assert run_request(request_) == 0
    assert not list(folder.glob("infinity*"))


def test_what_was_finished_elsewhere_and_has_begun_here_is_left_alone(request_, in_process, tmp_path):
    assert run_request(request_) == 0
    elsewhere = dataclasses.replace(request_, work=tmp_path / "other-runs")
    begun = elsewhere.work / "tiny" / next(iter(runs_of(request_))) / "checkpoints"
    begun.mkdir(parents=True)
    assert run_request(elsewhere) == 0
    assert begun.is_dir()


def test_a_crash_is_named_with_its_log(request_, tmp_path):
    launch = tmp_path / "launch.py"
    launch.write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(InfMoEError, match=r"training infinity-.* failed with exit code 137 \(no output\); its log is"):
        run_request(dataclasses.replace(request_, launch=f"{sys.executable} {launch}"))


def test_data_without_a_held_out_part_claims_nothing(request_, tmp_path):
    whole = tmp_path / "whole"
    prepare(MemorySource(documents()), whole, tokenizer=TrainBPE(300), val_fraction=0.0)
    with pytest.raises(InfMoEError) as error:
        run_request(dataclasses.replace(request_, data=whole))
    assert f"{whole} can't be trained and measured on (no documents and tokens of the split 'val')" in str(error.value)
    assert not list(request_.out.rglob("*.json"))


def test_other_data_is_refused(request_, tmp_path, mini_data):
    folder = request_.out / "tiny"
    (folder / "runs").mkdir(parents=True)
    (folder / "runs" / "one.json").write_text("{}")
    (folder / "data.json").write_text(json.dumps(DATA | {"sha256": "other"}))
    with pytest.raises(InfMoEError, match="were trained on other data"):
        run_request(request_)


def test_a_work_folder_without_locks_is_refused(request_, monkeypatch):
    def refuse(descriptor, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(InfMoEError, match=r"cannot lock .*\.lock \(No locks available\): choose another --work"):
        run_request(request_)
