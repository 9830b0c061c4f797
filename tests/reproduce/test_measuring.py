"""Measures of finished runs, taken one by one."""

import dataclasses
import json
import os
import shutil
import signal
import time
import types

import pytest
from reproduce_helpers import Killed, dies, runs_of

from infmoe.cli import main
from infmoe.errors import InfMoEError
from infmoe.hf import InfMoEForCausalLM
from infmoe.hf.identity import fingerprint
from infmoe.reproduce import measures, plan, run_file, work
from infmoe.reproduce.checks import expanded_model
from infmoe.reproduce.command import run_request
from infmoe.reproduce.measures import Measure
from infmoe.reproduce.plan import Group
from infmoe.reproduce.store import Store
from infmoe.reproduce.work_folder import WorkFolder


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


def test_killed_anywhere_in_measuring_it_goes_on_with_what_is_left(
    request_, three_measures, tmp_path, monkeypatch, capsys
):
    assert run_request(request_) == 0
    (whole,) = runs_of(request_).values()
    assert list(whole["measures"]) == ["held_out", "one", "two"]
    steps = [(WorkFolder, "keep", 1), (WorkFolder, "clear", 1), *((Store, "put", number) for number in (1, 2, 3))]
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
            written = {"keep": 0, "clear": 3, "put": number - (when == "before")}[name]
            again = {"one", "two"} if written < 2 else {"two"} if written == 2 else set()
            first = {"keep": 0, "clear": 2, "put": number - 1}[name]
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
        patch.setattr(run_file, "expanded_model", lambda config: expanded_model(config) | {"layer_norm_epsilon": 1e-6})
        with pytest.raises(
            InfMoEError, match=r"step-000004 is not the model that dense-.* \(other values of layer_norm"
        ):
            run_request(request_)
        assert not runs_of(request_)
    assert run_request(request_) == 0


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
