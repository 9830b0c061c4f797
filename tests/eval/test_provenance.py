"""What a results file says about its making."""

import errno
import json
import os
import shutil
import sys

import pytest

from infmoe.errors import InfMoEError
from infmoe.provenance import portable, provenance, set_aside, write_json


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


def test_what_cannot_be_written_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "runs" / "a.json"
    write_json(path, {"x": 1})

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InfMoEError) as error:
        write_json(path, {"x": 2})
    assert f"cannot write {path} (No space left on device): " in str(error.value)
    assert [found.name for found in path.parent.iterdir()] == ["a.json"]
    assert json.loads(path.read_text()) == {"x": 1}
    (tmp_path / "file").touch()
    with pytest.raises(InfMoEError, match="cannot write"):
        write_json(tmp_path / "file" / "a.json", {})


def test_what_is_replaced_is_kept_whole_or_stays(tmp_path, monkeypatch, capsys):
    first, second = tmp_path / "a.json", tmp_path / "a.png"
    set_aside(first, second)
    assert capsys.readouterr().err == ""
    first.write_text("old")
    set_aside(first, second)
    assert capsys.readouterr().err == f"kept what was there before: {tmp_path / 'a.1.json'}\n"
    second.write_text("picture")

    def full(source, target):
        target.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copy2", full)
    with pytest.raises(InfMoEError, match=f"cannot keep {first} .*No space left"):
        set_aside(first, second)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "a.json": "old",
        "a.1.json": "old",
        "a.png": "picture",
    }
