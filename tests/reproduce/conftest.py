"""Stores, data and requests of the mini scale."""

import contextlib
import dataclasses
import io
import subprocess
import types
from pathlib import Path

import pytest
from fake_results import DATA, MINI, TASK_FILES
from tiny_run import documents

from infmoe.cli import main
from infmoe.data import MemorySource, TrainBPE, prepare
from infmoe.reproduce import child
from infmoe.reproduce.command import Request
from infmoe.reproduce.plan import EXPERIMENTS, SCALES, Group, Scale
from infmoe.reproduce.store import Store


@pytest.fixture
def mini(monkeypatch: pytest.MonkeyPatch) -> Scale:
    """The scale `tiny`, made smaller."""
    monkeypatch.setitem(SCALES, "tiny", MINI)
    return MINI


@pytest.fixture(scope="session")
def mini_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data for it."""
    folder = tmp_path_factory.mktemp("mini") / "data"
    prepare(MemorySource(documents()), folder, tokenizer=TrainBPE(300), val_fraction=0.3)
    return folder


@pytest.fixture
def store(mini: Scale, tmp_path: Path) -> Store:
    """An empty store."""
    made = Store(tmp_path / "reproduce", mini)
    made.claim_data(DATA)
    made.claim_tasks(TASK_FILES)
    return made


@pytest.fixture
def request_(mini_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Request:
    """Two arms, one seed, no tuning."""
    monkeypatch.setitem(SCALES, "tiny", dataclasses.replace(MINI, lr_grid=()))
    monkeypatch.setitem(EXPERIMENTS, "table6", lambda s: [Group(("infinity", "moe16"), s.tokens, (1, 1))])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return Request("table6", data=mini_data, out=tmp_path / "results" / "reproduce", work=tmp_path / "runs")


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
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
