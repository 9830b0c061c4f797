"""Runs that start from another run's model."""

import dataclasses
import fcntl
import json
import shutil
import time
import types

import pytest
from fake_results import MINI
from reproduce_helpers import runs_of

from infmoe.errors import InfMoEError
from infmoe.hf import InfMoEForCausalLM
from infmoe.hf.identity import fingerprint
from infmoe.reproduce import child, plan, work
from infmoe.reproduce.command import run_request
from infmoe.reproduce.plan import Group
from infmoe.reproduce.store import Store

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


def test_a_base_of_another_out_is_not_started_from(tuning, in_process):
    assert run_request(dataclasses.replace(tuning, arms="infinity-keep4")) == 0
    path = tuning.out / "tiny" / "runs" / f"{BASE}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fingerprint": "f" * 64}))
    with pytest.raises(InfMoEError, match=f"{BASE} is not the model that {path} is of"):
        run_request(dataclasses.replace(tuning, arms="infinity-sandwich-w0.25-tuned"))
    assert not (tuning.work / "tiny" / TUNED).exists()
