"""Calling the command line within this process."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from tiny_run import TinyRun, make

from infmoe.cli import main


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """`infmoe` with these words."""
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")  # as `main` sets it, but for this test alone

    def call(*words: object) -> Outcome:
        capsys.readouterr()
        code = main([str(word) for word in words])
        return Outcome(code, *capsys.readouterr())

    return call


@pytest.fixture
def mistake(cli: Callable[..., Outcome]) -> Callable[..., str]:
    """`infmoe` with words that it refuses; returns the one line that it says."""

    def call(*words: object) -> str:
        outcome = cli(*words)
        assert outcome.code == 2, outcome
        assert outcome.out == ""
        assert outcome.err.startswith("error: ")
        assert outcome.err.count("\n") == 1, outcome.err
        return outcome.err.removesuffix("\n")

    return call


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """One run for all tests that only read it, those in the other folder too."""
    return make(tmp_path_factory.getbasetemp() / "tiny-run")
