"""The trained model, its held-out windows and a few items of every task, made once."""

from pathlib import Path

import pytest
from tiny_run import TinyRun, make

from infmoe.cli import main
from infmoe.data import TokenData
from infmoe.eval.heldout import HeldOut
from infmoe.eval.loading import Opened, open_model


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """One run for all tests that only read it, those in the other folder too."""
    return make(tmp_path_factory.getbasetemp() / "tiny-run")


@pytest.fixture(scope="session")
def opened(tiny_run: TinyRun) -> Opened:
    return open_model(tiny_run.run)


@pytest.fixture(scope="session")
def held_out(tiny_run: TinyRun, opened: Opened) -> HeldOut:
    return HeldOut.from_data(TokenData.open(tiny_run.data), opened.model.config.max_position_embeddings, 20)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from zero_shot_helpers import write_files  # needs the `eval` extra

    return write_files(tmp_path_factory.mktemp("bench") / "files")


@pytest.fixture(scope="session")
def profile_dir(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `infmoe frontier` writes, of a few settings; for tests that only read it."""
    out = tmp_path_factory.mktemp("profile")
    words = ["frontier", str(tiny_run.run), "--out", str(out), "--num-samples", "1,2", "--keep-ratio", "1/8,1/2"]
    assert main([*words, "--windows", "8", "--rounds", "2", "--schedules", "2", "--budgets", "3"]) == 0
    return out
