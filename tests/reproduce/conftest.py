"""Stores and data of the mini scale."""

from pathlib import Path

import pytest
from fake_results import DATA, MINI, TASK_FILES
from tiny_run import documents

from infmoe.data import MemorySource, TrainBPE, prepare
from infmoe.reproduce.plan import SCALES, Scale
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
