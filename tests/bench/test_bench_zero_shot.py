"""`infmoe bench zero_shot` over files of tasks."""

import json

import pytest

pytest.importorskip("lm_eval", reason="the `eval` extra is not installed")

from zero_shot_helpers import write_files

from infmoe.bench import zero_shot_speed
from infmoe.cli import main


def test_every_task_is_timed_with_both_models(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(zero_shot_speed, "WINDOW", 64)
    files = write_files(tmp_path / "files")
    assert main(["bench", "zero_shot", "--quick", "--tasks-dir", str(files), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    tasks = ["BoolQ", "HellaSwag", "WinoGrande", "ARC-e", "ARC-c", "OBQA", "SAT-en"]
    arms = ["ours", "lm-eval's hf", "ours over lm-eval's"]
    expected = [(t, m, a) for m in ("dense", "infinity") for t in tasks for a in arms]
    assert [(row["task"], row["model"], row["arm"]) for row in result["rows"]] == expected
    summary = result["summary"]
    assert summary["difference_max"] < 1e-4  # GPT-2 through either scorer
    assert summary["speed_ratio_all"] == min(summary[f"{m}, {t}"] for m in ("dense", "infinity") for t in tasks)
    assert summary["speed_ratio"] == min(summary[f"{m}, {t}"] for m in ("dense", "infinity") for t in tasks[:-1])


def test_files_are_for_what_reads_them(tmp_path, capsys):
    assert main(["bench", "router", "--tasks-dir", str(tmp_path)]) == 2
    assert "--tasks-dir goes with zero_shot: router reads no files" in capsys.readouterr().err
    for option in ("--tasks-dir", "--data-dir"):
        assert main(["bench", "zero_shot", "--quick", option, str(tmp_path / "none")]) == 2
        assert "cannot read" in capsys.readouterr().err
