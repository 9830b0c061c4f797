"""The cache folder: where it is, and what happens where there is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from infmoe.cache import cache_dir

SHOW = "from infmoe.cache import cache_dir; print(cache_dir() == cache_dir() and cache_dir().is_dir(), cache_dir())"


def no_home():
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({"INFMOE_CACHE_DIR": "named", "XDG_CACHE_HOME": "xdg"}, "named"),
        ({"INFMOE_CACHE_DIR": "", "XDG_CACHE_HOME": "xdg"}, "xdg/infmoe"),
    ],
)
def test_a_folder_that_is_named_needs_no_home(variables, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "home", no_home)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_dir.__wrapped__() == Path(place)
    assert Path(place).is_dir()
    assert capsys.readouterr().err == ""


def test_without_a_home_a_line_says_so(tmp_path, monkeypatch, capsys):
    registered = []
    monkeypatch.delenv("INFMOE_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("atexit.register", lambda *call: registered.append(call))
    folder = cache_dir.__wrapped__()
    assert folder.parent == tmp_path
    (line,) = capsys.readouterr().err.splitlines()
    assert "there is no home folder" in line
    assert "set INFMOE_CACHE_DIR" in line
    ((remove, _, process),) = registered
    remove(folder, process + 1)  # a process that was forked from this one
    assert folder.is_dir()
    remove(folder, process)
    assert not folder.exists()


def test_a_folder_that_cannot_be_written_is_named_once_and_the_fresh_one_goes(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "scratch").mkdir()
    given = {"INFMOE_CACHE_DIR": str(tmp_path / "file" / "below"), "TMPDIR": str(tmp_path / "scratch")}
    done = subprocess.run(
        [sys.executable, "-c", SHOW], env=os.environ | given, capture_output=True, text=True, timeout=120, check=True
    )
    found, folder = done.stdout.split()
    assert found == "True"
    assert Path(folder).parent == tmp_path / "scratch"
    (line,) = done.stderr.splitlines()
    assert f"cannot write to {tmp_path / 'file' / 'below'} (Not a directory)" in line
    assert list((tmp_path / "scratch").iterdir()) == []
