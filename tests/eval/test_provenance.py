"""What a results file says about its making."""

import sys

import pytest

from infmoe.provenance import portable, provenance


@pytest.mark.parametrize(
    ("word", "kept"),
    [
        ("/home/me/data/bench", "bench"),
        ("--data-dir=/home/me/bench", "--data-dir=bench"),
        ("data.dir=/mnt/x/y", "data.dir=y"),
        ("/data", "data"),
        ("/data/", "data/"),
        ("/", "/"),
        ("1/16,1/4", "1/16,1/4"),
        ("runs/a", "runs/a"),
        ("../shared/novels", "../shared/novels"),
        ("tiny/infinity", "tiny/infinity"),
    ],
)
def test_absolute_paths_lose_their_place(word, kept):
    assert portable(word) == kept


def test_the_command_is_told_without_them(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["infmoe", "evaluate", "/home/me/runs/a", "--keep-ratio", "1/4"])
    assert provenance()["command"] == "infmoe evaluate a --keep-ratio 1/4"
