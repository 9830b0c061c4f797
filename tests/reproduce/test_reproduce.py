"""`infmoe reproduce`, with real training runs of seconds."""

import contextlib
import dataclasses
import errno
import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest
from fake_results import DATA, MINI, fake_values, fill
from tiny_run import documents

from infmoe.cli import main
from infmoe.data import MemorySource, TrainBPE, prepare
from infmoe.data.manifest import Manifest
from infmoe.errors import InfMoEError
from infmoe.hf import InfMoEForCausalLM
from infmoe.hf.identity import fingerprint
from infmoe.locks import is_locked
from infmoe.recipes import recipe
from infmoe.reproduce import child, command, measures, plan, work
from infmoe.reproduce.arms import arm_named
from infmoe.reproduce.checks import expanded_model
from infmoe.reproduce.command import Request, describe_arms, describe_plan, only, repeats, run_request, smoke_settings
from infmoe.reproduce.measures import Measure
from infmoe.reproduce.plan import Group, RunSpec
from infmoe.reproduce.store import Store
from infmoe.train.config import apply_overrides, load_config
from infmoe.train.run_dir import Ending, Hold, read_ending


@pytest.fixture
def request_(mini_data, tmp_path, monkeypatch):
    """Two arms, one seed, no tuning."""
    monkeypatch.setitem(plan.SCALES, "tiny", dataclasses.replace(MINI, lr_grid=()))
    monkeypatch.setitem(plan.EXPERIMENTS, "table6", lambda s: [Group(("infinity", "moe16"), s.tokens, (1, 1))])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return Request("table6", data=mini_data, out=tmp_path / "results" / "reproduce", work=tmp_path / "runs")


@pytest.fixture
def in_process(monkeypatch):
    """Training runs in this process: what is tested is what becomes of them, and starting one takes seconds."""

    class Child:
        def __init__(self, command, *, stdout, **rest):
            errors = io.StringIO()
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
                self.code = main([str(word) for word in command[command.index("train") :]])
            stdout.write(errors.getvalue().encode())
            stdout.flush()

        def wait(self, timeout=None):
            return self.code

    # not the module itself, which git's answers come through
    names = {"Popen": Child, "DEVNULL": subprocess.DEVNULL, "TimeoutExpired": subprocess.TimeoutExpired}
    monkeypatch.setattr(child, "subprocess", types.SimpleNamespace(**names))


def runs_of(request):
    folder = request.out / "tiny" / "runs"
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


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


def test_zero_shot_scores_are_taken_of_the_models_that_are_there(request_, in_process, tmp_path, capsys, monkeypatch):
    pytest.importorskip("lm_eval", reason="the `eval` extra is not installed")
    from zero_shot_helpers import write_files

    from infmoe.eval.zero_shot.run import Settings, evaluate_tasks

    assert run_request(request_) == 0
    before = runs_of(request_)
    assert all("zero_shot" not in values["measures"] for values in before.values())
    files = write_files(tmp_path / "tasks")
    scoring = dataclasses.replace(request_, tasks=files)
    assert "--tasks-dir" not in request_.worker_words(files)
    words = scoring.worker_words(request_.data)
    assert words[words.index("--tasks-dir") + 1] == str(files)
    assert scoring.label.endswith("--data DIR --tasks-dir DIR")
    # as a worker gets it: through the command line
    monkeypatch.setattr(work, "_train", lambda *rest: pytest.fail("trained again"))
    assert main(words) == 0
    now = runs_of(request_)
    infinity, moe = now.values()
    tasks = {"BoolQ", "HellaSwag", "WinoGrande", "ARC-e", "ARC-c", "OBQA", "SAT-en"}
    for values in (infinity, moe):
        rows = values["measures"]["zero_shot"]
        assert {row["task"] for row in rows} == tasks
        assert {row["items"] for row in rows} == {9}
        assert values["measured_with"]["zero_shot"]["items"] == 9
        assert len(values["measured_with"]["zero_shot"]["files"]) == 7
        assert values["provenance"]["zero_shot"]["command"] == scoring.label
        assert str(tmp_path) not in json.dumps(values)
    rows = [row for row in infinity["measures"]["zero_shot"] if row["task"] == "ARC-e"]
    dials = [(row.get("mode"), row.get("num_samples"), row["keep_ratio"]) for row in rows]
    sampled = [(None, k, 0.25) for k in (2, 1, 3, 4, 8)]
    assert dials == [*sampled, ("mu", None, 0.25), *[(None, 2, ratio) for ratio in (1 / 16, 1 / 8, 1 / 2)]]
    assert len(moe["measures"]["zero_shot"]) == 7  # no arm of Figure 2: at its own dials alone
    # the numbers are those of `infmoe evaluate --tasks` on the same model
    (model,) = (request_.work / "tiny" / "models").glob("infinity-*")
    own = evaluate_tasks(model, Settings(data_dir=files, limit=9))["points"][0]["tasks"]["ARC-e"]
    for key in ("acc", "acc_norm", "margin", "margin_se"):
        assert rows[0][key] == pytest.approx(own[key], abs=1e-6)
    assert rows[0]["margin_low"] == pytest.approx(own["margin"] - 1.96 * own["margin_se"], abs=1e-6)
    # nothing else has changed, and nothing is measured twice
    for values in (infinity, moe):
        del values["measures"]["zero_shot"], values["measured_with"]["zero_shot"], values["provenance"]["zero_shot"]
    assert {name: now[name] for name in before} == before
    monkeypatch.setattr(work, "open_model", lambda *rest: pytest.fail("measured again"))
    assert run_request(scoring) == 0
    capsys.readouterr()
    # other files are refused, a damaged one before anything is done
    (files / "boolq.jsonl").write_text((files / "boolq.jsonl").read_text().replace("Passage", "passage", 1))
    with pytest.raises(InfMoEError, match=r"scored on other files than boolq\.jsonl"):
        run_request(scoring)
    (files / "winogrande.jsonl").unlink()
    with pytest.raises(InfMoEError, match=r"cannot read .*winogrande\.jsonl"):
        run_request(scoring)
    assert main([*words[:2], "--data", str(request_.data), "--tasks-dir", str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "put the file there" in error


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


@pytest.fixture
def three_measures(request_, in_process, monkeypatch):
    """One arm, with a loss and two measures that count how often they are taken."""
    taken = []
    for name in ("one", "two"):
        take = lambda context, name=name: taken.append(name) or [{"loss": context.spec.seed / 3}]  # noqa: E731
        monkeypatch.setitem(measures.MEASURES, name, Measure(take, lambda *_: True))
    monkeypatch.setitem(plan.EXPERIMENTS, "table6", lambda s: [Group(("dense",), s.tokens, (1, 1))])
    return taken


def test_finished_runs_that_cannot_be_measured_any_more_are_named(request_, in_process, monkeypatch, capsys):
    monkeypatch.setitem(plan.EXPERIMENTS, "table6", lambda s: [Group(("dense",), s.tokens, (5, 5))] * 2)
    assert run_request(request_) == 0
    assert "not measured" not in capsys.readouterr().out
    models = request_.work / "tiny" / "models"
    shutil.move(models, tmp := models.with_name("kept"))
    monkeypatch.setitem(measures.MEASURES, "later", Measure(lambda context: [{"loss": 1.0}], lambda *_: True))
    assert run_request(request_) == 0
    slugs = [f"dense-0.001024M-lr0.002-s{seed}" for seed in range(1, 6)]
    line = f"not measured (later), for want of a model under {models}: 5 finished runs, {', '.join(slugs[:3])} and 2 "
    line += f"more; to train one again, move its file out of {request_.out / 'tiny' / 'runs'}\n"
    assert capsys.readouterr().out.count(line) == 1
    shutil.move(tmp, models)
    assert run_request(request_) == 0
    assert "not measured" not in capsys.readouterr().out
    assert all("later" in values["measures"] for values in runs_of(request_).values())


class Killed(BaseException):
    """Nothing is cleaned up after it."""


def dies(function, when, number):
    """The function, in whose call of this number the process dies, before it does anything or after all of it."""
    calls = []

    def dying(*args):
        calls.append(args)
        if (when, len(calls)) == ("before", number):
            raise Killed
        result = function(*args)
        if (when, len(calls)) == ("after", number):
            raise Killed
        return result

    return dying


def test_killed_anywhere_in_measuring_it_goes_on_with_what_is_left(
    request_, three_measures, tmp_path, monkeypatch, capsys
):
    assert run_request(request_) == 0
    (whole,) = runs_of(request_).values()
    assert list(whole["measures"]) == ["held_out", "one", "two"]
    steps = [(work, "_keep_model", 1), (work, "_clear", 1), *((Store, "put", number) for number in (1, 2, 3))]
    for i, (place, name, number) in enumerate(steps):
        for when in ("before", "after"):
            asked = dataclasses.replace(
                request_, out=tmp_path / f"{when}-{i}" / "reproduce", work=tmp_path / f"{when}-{i}-runs"
            )
            three_measures.clear()
            with monkeypatch.context() as patch:
                patch.setattr(place, name, dies(getattr(place, name), when, number))
                with pytest.raises(Killed):
                    run_request(asked)
            assert run_request(asked) == 0
            (found,) = runs_of(asked).values()
            for key in ("measures", "curve", "config", "run"):
                assert found[key] == whole[key], (name, number, when)
            # what has been written is not taken again
            written = {"_keep_model": 0, "_clear": 3, "put": number - (when == "before")}[name]
            again = {"one", "two"} if written < 2 else {"two"} if written == 2 else set()
            first = {"_keep_model": 0, "_clear": 2, "put": number - 1}[name]
            assert len(three_measures) == first + len(again), (name, number, when)
            assert [path.name for path in (asked.work / "tiny" / "models").iterdir()] == list(runs_of(asked))
            assert not (asked.work / "tiny" / next(iter(runs_of(asked)))).exists()


@pytest.mark.parametrize("how", ["time", "signal"])
def test_between_measures_it_stops_when_time_is_up_or_a_signal_says_so(request_, three_measures, monkeypatch, how):
    up = []

    def take(context):
        up.append(True)
        if how == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        return [{"loss": 1.0}]

    monkeypatch.setitem(measures.MEASURES, "one", Measure(take, lambda *_: True))
    if how == "time":
        clock = types.SimpleNamespace(monotonic=lambda: time.monotonic() + 3600 * bool(up), sleep=time.sleep)
        monkeypatch.setattr(work, "time", clock)
        assert run_request(dataclasses.replace(request_, hours=1.0)) == 0
    else:
        with pytest.raises(SystemExit) as stop:
            run_request(request_)
        assert stop.value.code == 128 + signal.SIGTERM
    (found,) = runs_of(request_).values()
    assert list(found["measures"]) == ["held_out", "one"]
    monkeypatch.setattr(work, "_train", lambda *rest: pytest.fail("trained again"))
    assert run_request(request_) == 0
    (found,) = runs_of(request_).values()
    assert list(found["measures"]) == ["held_out", "one", "two"]
    assert len(up) == 1


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


def test_a_work_folder_without_locks_is_refused(request_, monkeypatch):
    def refuse(descriptor, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(InfMoEError, match=r"cannot lock .*\.lock \(No locks available\): choose another --work"):
        run_request(request_)


def test_several_workers_are_refused_where_there_are_no_locks(request_, monkeypatch):
    monkeypatch.setattr(command, "LOCKS", False)
    monkeypatch.setattr(work, "start_workers", lambda *rest: pytest.fail("started"))
    with pytest.raises(InfMoEError, match="leave --jobs out"):
        run_request(dataclasses.replace(request_, jobs=2))


BASE = "infinity-keep4-0.001024M-lr0.002-s1"
TUNED = "infinity-sandwich-w0.25-tuned-0.000204M-lr0.001-s1"


@pytest.fixture
def tuning(request_, monkeypatch):
    """A model, what starts from it, and what does not; the second before the first, to be the harder."""
    arms = ("infinity-sandwich-w0.25-tuned", "infinity-keep4", "dense")
    length = lambda s, arm: plan.further_tokens(s) if "tuned" in arm else s.tokens  # noqa: E731
    monkeypatch.setitem(plan.EXPERIMENTS, "table6", lambda s: [Group((arm,), length(s, arm), (1, 1)) for arm in arms])
    return request_


def test_a_tuned_run_starts_from_its_base_and_says_so(tuning, in_process, capsys, monkeypatch):
    commands = []
    start = child.subprocess.Popen
    monkeypatch.setattr(child.subprocess, "Popen", lambda words, **rest: commands.append(words) or start(words, **rest))
    assert run_request(dataclasses.replace(tuning, arms="infinity-keep4,infinity-sandwich-w0.25-tuned")) == 0
    assert "left out" not in capsys.readouterr().out
    base = tuning.work / "tiny" / "models" / BASE
    plain, tuned = commands
    assert "--init" not in plain
    assert tuned[tuned.index("--init") + 1] == str(base)
    values = runs_of(tuning)
    assert list(values) == [BASE, TUNED]
    assert "init" not in values[BASE]["run"]
    mark = fingerprint(InfMoEForCausalLM.from_pretrained(base))
    assert values[TUNED]["run"]["init"] == {"arm": "infinity-keep4", "slug": BASE, "fingerprint": mark}
    assert values[TUNED]["config"]["init"] is None
    assert str(tuning.work.parent) not in json.dumps(values)
    assert values[TUNED]["measures"].keys() >= {"held_out", "dials"}
    run = Store(tuning.out, plan.SCALES["tiny"]).run("infinity-sandwich-w0.25-tuned", plan.further_tokens(MINI), 1)
    assert run.loss == values[TUNED]["measures"]["held_out"][0]["loss"]


def test_without_its_bases_model_a_run_is_left_out_and_the_rest_goes_on(tuning, in_process, capsys):
    only_base = dataclasses.replace(tuning, arms="infinity-keep4")
    assert run_request(only_base) == 0
    models = tuning.work / "tiny" / "models"
    shutil.rmtree(models / BASE)
    capsys.readouterr()
    assert run_request(tuning) == 0
    assert list(runs_of(tuning)) == ["dense-0.001024M-lr0.002-s1", BASE]
    out, path = capsys.readouterr().out, tuning.out / "tiny" / "runs" / f"{BASE}.json"
    line = f"left out {TUNED}: it starts from the model of {BASE}, which is not under {models}: "
    assert out.count(line + f"move {path} away to train it again\n") == 1
    assert f"left out, for want of a model to start from: {TUNED}\n" in out
    assert "time is up" not in out
    path.unlink()
    assert run_request(tuning) == 0
    assert TUNED in runs_of(tuning)


def test_a_tuned_run_that_has_begun_needs_its_base_no_more(tuning, in_process, monkeypatch):
    assert run_request(dataclasses.replace(tuning, arms="infinity-keep4")) == 0
    shutil.rmtree(tuning.work / "tiny" / "models" / BASE)
    (tuning.work / "tiny" / TUNED / "checkpoints" / "step-000001").mkdir(parents=True)
    trained = []
    monkeypatch.setattr(work, "_train", lambda shop, spec, *rest: trained.append(spec.slug) or False)
    run_request(dataclasses.replace(tuning, arms="infinity-sandwich-w0.25-tuned"))
    assert trained == [TUNED]


def test_a_first_checkpoint_that_was_killed_is_none(tuning, in_process, monkeypatch, capsys):
    assert run_request(dataclasses.replace(tuning, arms="infinity-keep4")) == 0
    shutil.rmtree(tuning.work / "tiny" / "models" / BASE)
    (tuning.work / "tiny" / TUNED / "checkpoints" / ".tmp-step-000001").mkdir(parents=True)
    assert run_request(tuning) == 0
    assert list(runs_of(tuning)) == ["dense-0.001024M-lr0.002-s1", BASE]
    assert f"left out {TUNED}: " in capsys.readouterr().out


def test_a_base_that_diverged_is_none(tuning, in_process, capsys):
    assert run_request(dataclasses.replace(tuning, arms="infinity-keep4")) == 0
    path = tuning.out / "tiny" / "runs" / f"{BASE}.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"diverged": "the loss is nan at step 3", "measures": {}}))
    assert run_request(dataclasses.replace(tuning, arms="infinity-sandwich-w0.25-tuned")) == 0
    out = capsys.readouterr().out
    assert f"left out {TUNED}: it starts from the model of {BASE}, which diverged ({path}): there is none\n" in out
    assert TUNED not in runs_of(tuning)


def test_a_base_that_nobody_trains_is_asked_for(tuning, monkeypatch, capsys):
    monkeypatch.setattr(work, "_train", lambda *rest: pytest.fail("trained"))
    assert run_request(dataclasses.replace(tuning, arms="infinity-sandwich-w0.25-tuned")) == 0
    line = f"left out {TUNED}: it starts from the model of {BASE}, which is not trained: name infinity-keep4 in --arms"
    assert capsys.readouterr().out.count(line) == 1


@pytest.mark.parametrize("arms", ["infinity-sandwich-w0.25-tuned", "infinity-keep4,infinity-sandwich-w0.25-tuned"])
def test_a_base_that_another_process_trains_is_waited_for(tuning, in_process, monkeypatch, arms, capsys):
    assert run_request(dataclasses.replace(tuning, arms="infinity-keep4")) == 0
    path, lock = tuning.out / "tiny" / "runs" / f"{BASE}.json", tuning.work / "tiny" / f"{BASE}.lock"
    finished = path.read_text()
    path.unlink()
    slept = []
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)

        def sleep(seconds):
            slept.append(seconds)
            if len(slept) == 2:
                path.write_text(finished)
                file.close()

        clock = types.SimpleNamespace(monotonic=time.monotonic, sleep=sleep)
        monkeypatch.setattr(work, "time", clock)
        assert run_request(dataclasses.replace(tuning, arms=arms)) == 0
    assert len(slept) == 2
    assert TUNED in runs_of(tuning)
    assert "left out" not in capsys.readouterr().out


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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": None}, "give --corpus FILES to train on, or --data DIR"),
        ({"corpus": "x"}, "one of the two"),
        ({"launch": '"accelerate launch'}, "--launch '\"accelerate launch' is no command (No closing quotation)"),
        ({"launch": " "}, "--launch is empty"),
        ({"hours": float("nan")}, "--hours nan is no time to stop after"),
        ({"hours": 0.0}, "--hours 0 is no time to stop after"),
        ({"hours": -1.0}, "--hours -1 is no time to stop after"),
        ({"name": "table4"}, "unknown table or figure 'table4'"),
        ({"scale": "huge"}, "unknown scale 'huge'; known: medium, small, tiny"),
        ({"name": "figure4", "arms": "moe"}, "figure4 trains no arms: leave --arms out"),
        ({"arms": "moe16,, infinity"}, "unknown arm ''; known: infinity, moe16"),
        ({"scale": "small", "data": None, "corpus": "x"}, "trains on prepared data: give --data DIR"),
        ({"scale": "small", "data": None, "corpus": "x"}, "--subset sample-350BT"),  # its longest run has 100B
        ({"name": "table5", "scale": "medium", "data": None, "corpus": "x"}, "--subset sample-350BT"),
    ],
)
def test_bad_requests_name_the_fix(request_, changes, words):
    with pytest.raises(InfMoEError) as error:
        run_request(dataclasses.replace(request_, **changes))
    assert words in str(error.value)


def test_data_that_is_read_more_than_once_is_said(mini, mini_data):
    tokens = Manifest.read(mini_data).splits["train"].tokens
    assert repeats(mini_data, [Group(("infinity",), tokens, (1, 1))]) is None
    note = repeats(mini_data, [Group(("moe",), 10, (1, 1)), Group(("infinity",), 2 * tokens, (1, 1))])
    assert f"has {tokens:,}: they read it 2.0 times" in note


def test_other_data_is_refused(request_, tmp_path, mini_data):
    folder = request_.out / "tiny"
    (folder / "runs").mkdir(parents=True)
    (folder / "runs" / "one.json").write_text("{}")
    (folder / "data.json").write_text(json.dumps(DATA | {"sha256": "other"}))
    with pytest.raises(InfMoEError, match="were trained on other data"):
        run_request(request_)


@pytest.fixture
def dense(request_, in_process, monkeypatch):
    """One finished run, and a measure that it lacks."""
    monkeypatch.setitem(plan.EXPERIMENTS, "table6", lambda s: [Group(("dense",), s.tokens, (1, 1))])
    assert run_request(request_) == 0
    monkeypatch.setitem(measures.MEASURES, "later", Measure(lambda context: [{"loss": 1.0}], lambda *_: True))
    return request_


def test_a_kept_model_of_another_out_is_not_measured(dense, tmp_path, monkeypatch):
    (values,) = runs_of(dense).values()
    (model,) = (dense.work / "tiny" / "models").iterdir()
    assert values["fingerprint"] == fingerprint(InfMoEForCausalLM.from_pretrained(model))
    path = dense.out / "tiny" / "runs" / f"{model.name}.json"
    path.write_text(json.dumps(values | {"fingerprint": "f" * 64}))
    with pytest.raises(InfMoEError) as error:
        run_request(dense)
    assert f"{model} is not the model that {path} is of: give each --out a --work of its own" in str(error.value)
    # a file from before there were any is gone on with
    path.write_text(json.dumps({key: value for key, value in values.items() if key != "fingerprint"}))
    assert run_request(dense) == 0
    assert "later" in runs_of(dense)[model.name]["measures"]


def test_a_model_of_before_a_default_changed_is_not_recorded(request_, in_process, monkeypatch):
    monkeypatch.setitem(plan.EXPERIMENTS, "table6", lambda s: [Group(("dense",), s.tokens, (1, 1))])
    with monkeypatch.context() as patch:
        patch.setattr(work, "_measure", dies(work._measure, "before", 1))
        with pytest.raises(Killed):
            run_request(request_)
    with monkeypatch.context() as patch:
        patch.setattr(work, "expanded_model", lambda config: expanded_model(config) | {"layer_norm_epsilon": 1e-6})
        with pytest.raises(
            InfMoEError, match=r"step-000004 is not the model that dense-.* \(other values of layer_norm"
        ):
            run_request(request_)
        assert not runs_of(request_)
    assert run_request(request_) == 0


def test_a_base_of_another_out_is_not_started_from(tuning, in_process):
    assert run_request(dataclasses.replace(tuning, arms="infinity-keep4")) == 0
    path = tuning.out / "tiny" / "runs" / f"{BASE}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fingerprint": "f" * 64}))
    with pytest.raises(InfMoEError, match=f"{BASE} is not the model that {path} is of"):
        run_request(dataclasses.replace(tuning, arms="infinity-sandwich-w0.25-tuned"))
    assert not (tuning.work / "tiny" / TUNED).exists()


def test_a_work_folder_of_other_data_is_refused_while_there_is_something_in_it(dense, tmp_path):
    path = dense.work / "tiny" / "data.json"
    known = json.loads(path.read_text())
    path.write_text(json.dumps(known | {"sha256": "other"}))
    other = dataclasses.replace(dense, out=tmp_path / "other" / "reproduce")
    with pytest.raises(InfMoEError, match=r"are of other data \(.*data\.json\): give that, or another --work"):
        run_request(other)
    assert not other.out.exists() or not list(other.out.rglob("*.json"))
    shutil.rmtree(dense.work / "tiny" / "models")
    assert run_request(other) == 0
    assert json.loads(path.read_text()) == known


def test_data_without_a_held_out_part_claims_nothing(request_, tmp_path):
    whole = tmp_path / "whole"
    prepare(MemorySource(documents()), whole, tokenizer=TrainBPE(300), val_fraction=0.0)
    with pytest.raises(InfMoEError) as error:
        run_request(dataclasses.replace(request_, data=whole))
    assert f"{whole} can't be trained and measured on (no documents and tokens of the split 'val')" in str(error.value)
    assert not list(request_.out.rglob("*.json"))


def test_arms_may_be_picked_by_name_and_shown_as_training_commands(request_, in_process, capsys):
    assert run_request(dataclasses.replace(request_, arms="moe16, infinity", dry_run=True)) == 0
    both = [line for line in capsys.readouterr().out.splitlines() if line.startswith("infmoe train tiny/")]
    assert [line.split()[2] for line in both] == ["tiny/infinity", "tiny/moe16"]
    picked = dataclasses.replace(request_, arms=" moe16")
    assert run_request(dataclasses.replace(picked, dry_run=True)) == 0
    listed = capsys.readouterr().out
    assert "infinity" not in listed
    (command,) = [line for line in listed.splitlines() if line.startswith("infmoe train tiny/moe16 --data DIR --out")]
    assert "--set optim.lr=0.002" in command
    assert run_request(picked) == 0
    assert list(runs_of(request_)) == ["moe16-0.001024M-lr0.002-s1"]
    with pytest.raises(InfMoEError, match="unknown arm 'moe61'; did you mean 'moe16'"):
        run_request(dataclasses.replace(request_, arms="infinity,moe61"))
    assert picked.worker_words(request_.data)[-2:] == ["--arms", " moe16"]
    said = dataclasses.replace(request_, arms="moe16, infinity", seeds=2).label
    assert said == "infmoe reproduce table6 --scale tiny --seeds 2 --arms moe16,infinity --data DIR"


def test_a_plan_ends_with_what_it_takes_in_all_and_what_is_left(mini, store):
    arms, passes = ("infinity", "infinity-sandwich"), (1, 2)
    fill(store, dict.fromkeys(arms, 3.5), mini.tokens, seeds=1)
    wanted = [Group(arms, mini.tokens, (2, 2))]
    once = store.runs("infinity", mini.tokens)[0].cost["flops_executed"] * mini.tokens * 3
    # one seed of each arm is trained, and both learning rates of the one that is tuned, at half the length
    tuned = store.runs("infinity", mini.tokens)[0].cost["flops_executed"] * mini.tune_tokens * 3
    second = sum(run.cost["flops_executed"] * mini.tokens * 3 for run in store.runs("infinity-sandwich", mini.tokens))
    left = passes[0] * once + passes[1] * second
    assert describe_plan(store, wanted).splitlines()[-1] == (
        f"in all 6 runs, 0.00512M tokens, {2 * left + 2 * tuned:.2e} FLOPs of training; "
        f"to do 2 runs, 0.002048M tokens, {left:.2e} FLOPs of training"
    )


def test_every_length_and_rate_of_an_arm_has_its_command(mini, store):
    text = describe_arms(store, only(plan.groups("elastic", mini), ["infinity-sandwich-distill"]))
    assert [f"--out runs/infinity-sandwich-distill-{n}M " in text for n in (0.001024, 0.000512)] == [True, True]
    text = describe_arms(store, only(plan.groups("controls", mini), ["infinity", "infinity-lr2x"]))
    rates = {
        line.split("--out runs/")[1].split()[0]: line.split("optim.lr=")[1].split()[0] for line in text.splitlines()
    }
    assert float(rates["infinity-lr2x-0.001024M"]) == 2 * float(rates["infinity-0.001024M"])


def test_the_command_of_a_tuned_arm_names_what_it_starts_from(mini, store):
    text = describe_arms(store, only(plan.groups("elastic", mini), ["infinity-keep4", "infinity-keep4-tuned"]))
    base, tuned = text.splitlines()
    assert "--init" not in base
    (out,) = [word for word in base.split() if word.startswith("runs/")]
    assert f"--out runs/infinity-keep4-tuned-0.000204M --init {out} " in tuned


def test_picking_arms_changes_no_number_of_seeds(mini, store):
    fill(store, {"infinity": 3.0, "moe": 3.2}, mini.tokens, seeds=2)
    (group,) = only([Group(("infinity", "moe"), mini.tokens, (2, 4))], ["moe"])
    assert group.trained == ("moe",)
    assert store.seeds_wanted(group) == 2
    spec = store.runs("moe", mini.tokens)[1].spec
    store.put(spec, fake_values(spec, 3.9))
    assert store.seeds_wanted(group) == 3
    assert [spec.arm.name for spec in store.missing([group])] == ["moe"]


def test_three_steps_of_each_arm(request_, monkeypatch):
    monkeypatch.setitem(plan.EXPERIMENTS, "table6", lambda s: [Group(("infinity",), s.tokens, (1, 1))])
    assert run_request(dataclasses.replace(request_, smoke=True)) == 0
    record = json.loads((request_.out / "tiny" / "smoke-table6.json").read_text())
    assert [row["arm"] for row in record["rows"]] == ["infinity"]
    assert all(len(row["losses"]) == 3 for row in record["rows"])


@pytest.mark.parametrize("scale", ["tiny", "small", "medium"])
def test_three_steps_behind_a_launcher_have_rows_for_many_processes(request_, scale):
    spec = RunSpec(plan.SCALES[scale], arm_named("infinity"), 10**6, 1e-3, 1)
    launched = dataclasses.replace(request_, launch="accelerate launch -m infmoe")
    config = apply_overrides(recipe(spec.recipe), [*spec.overrides(), *smoke_settings(launched)])
    for processes in (1, 2, 8, 64):
        assert config.accumulation(processes) >= 1
    alone = apply_overrides(recipe(spec.recipe), [*spec.overrides(), *smoke_settings(request_)])
    assert alone.batch_tokens == 1024


def test_a_run_that_diverges_is_finished_and_the_rest_goes_on(request_, in_process, monkeypatch):
    import infmoe.train.loop as loop

    check = loop.check_finite
    diverging = lambda step, loss, *rest: check(step, float("nan") if step == 3 else loss, *rest)  # noqa: E731
    monkeypatch.setattr(loop, "check_finite", diverging)
    monkeypatch.setitem(plan.EXPERIMENTS, "table6", lambda s: [Group(("infinity",), s.tokens, (1, 1))])
    assert run_request(request_) == 0
    (values,) = runs_of(request_).values()
    assert values["diverged"].startswith("the loss is nan at step 3")
    assert values["curve"]["tokens"] == [256, 512]
    assert not list((request_.work / "tiny").glob("infinity*"))


def test_a_crash_is_named_with_its_log(request_, tmp_path):
    launch = tmp_path / "launch.py"
    launch.write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(InfMoEError, match=r"training infinity-.* failed with exit code 137 \(no output\); its log is"):
        run_request(dataclasses.replace(request_, launch=f"{sys.executable} {launch}"))


def test_workers_side_by_side_report_the_first_that_failed():
    assert work.start_workers(["recipes"], 2) == 0
    assert work.start_workers(["no-such-command"], 2) == 2


@pytest.mark.parametrize(
    ("visible", "shares"),
    [(None, ["0,2", "1"]), ("4,5,7", ["4,7", "5"]), ("GPU-a,GPU-b,GPU-c", ["GPU-a,GPU-c", "GPU-b"])],
)
def test_workers_share_the_gpus(monkeypatch, visible, shares):
    monkeypatch.setattr(work.torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    seen = []
    child_of = lambda words, env: seen.append(env["CUDA_VISIBLE_DEVICES"]) or types.SimpleNamespace(wait=lambda: 0)  # noqa: E731
    monkeypatch.setattr(work, "subprocess", types.SimpleNamespace(Popen=child_of))
    assert work.start_workers(["recipes"], 2) == 0
    assert seen == shares
    with pytest.raises(InfMoEError, match="--jobs 4 is more than the 3 GPUs here"):
        work.start_workers(["recipes"], 4)
    assert len(seen) == 2
