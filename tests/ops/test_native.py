"""How the compiled kernels come to be: built once, shared, and never needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from infmoe.ops import native
from infmoe.ops.masked_ffn import compiled

BUILT = native._path("masked_ffn") if compiled.available() else None
needs_kernels = pytest.mark.skipif(not compiled.available(), reason="no compiled kernels here")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="fakes a compiler by a shell script")

CALL = """
import torch
from infmoe import InfinityFFN, Routing

layer = InfinityFFN(16, 48, z_dim=8)
layer(torch.randn(2, 5, 16)).y_BTD.sum().backward()
with torch.no_grad():
    for length in (1, 1, 9):
        assert layer.eval()(torch.randn(1, length, 16)).y_BTD.isfinite().all()
"""
LOAD = "from infmoe.ops import native; print(native.isa())"


def start(*args, **environment):
    env = {k: v for k, v in os.environ.items() if k not in ("CXX", "INFMOE_BACKEND", "INFMOE_ISA", "INFMOE_CACHE_DIR")}
    return subprocess.Popen(
        [sys.executable, *args],
        env=env | {name: str(value) for name, value in environment.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    stdout, stderr = process.communicate(timeout=250)
    return process.returncode, stdout, stderr


def test_without_a_compiler_all_runs_and_one_line_says_so(tmp_path):
    code, stdout, stderr = finish(start("-c", CALL, CXX="/nonexistent", INFMOE_CACHE_DIR=tmp_path))
    assert code == 0, stderr
    assert stdout == ""
    (line,) = stderr.splitlines()
    assert "no compiled CPU kernels" in line
    assert "/nonexistent" in line
    assert "g++" in line
    assert "INFMOE_BACKEND=eager" in line


def test_who_wants_the_plain_path_is_not_told_of_a_compiler(tmp_path):
    environment = {"CXX": "/nonexistent", "INFMOE_CACHE_DIR": tmp_path, "INFMOE_BACKEND": "eager"}
    assert finish(start("-c", CALL, **environment)) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@on_linux
def test_a_compiler_that_fails_is_named_with_its_log(tmp_path):
    code, stdout, stderr = finish(start("-c", LOAD, CXX="/bin/false", INFMOE_CACHE_DIR=tmp_path))
    assert (code, stdout) == (0, "None\n")
    building, failed = stderr.splitlines()
    assert "building" in building
    (log,) = tmp_path.glob("kernels/*/build.log")
    assert f"/bin/false failed, see {log}" in failed


@needs_kernels
def test_importing_and_calling_warns_of_nothing():
    command = ("-W", "error", "-c", "import infmoe, infmoe.layers, infmoe.ops.dispatch" + CALL)
    finish(start(*command))  # may build the kernels, and says so
    assert finish(start(*command)) == (0, "", "")


def fake_compiler(folder: Path, *, compile="touch $output", link="cp $library $output") -> Path:
    """A shell script that notes its calls and, as a linker, copies the library that was really built."""
    script = folder / "fake-c++"
    script.write_text(f"""#!/bin/sh
echo "$*" >> {folder}/calls
library={BUILT}
for word in "$@"; do
  [ "$previous" = -o ] && output=$word
  previous=$word
done
case "$1" in
  --version) echo "fake 1.0" ;;
  -shared) {link} ;;
  *) {compile} ;;
esac
""")
    script.chmod(0o755)
    return script


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


@pytest.fixture
def building(tmp_path, monkeypatch):
    """Build into an empty cache in this process; nothing is loaded, the kernels may be here already."""
    loaded = []
    monkeypatch.setattr(native, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)

    def load(compiler):
        monkeypatch.setenv("CXX", str(compiler))
        loaded.clear()
        result = native.load.__wrapped__()
        assert result == bool(loaded)
        return result

    return load


@needs_kernels
@on_linux
def test_two_processes_at_once_share_one_build(tmp_path, building):
    compiler = fake_compiler(tmp_path, link="sleep 1; cp $library $output")
    cache = tmp_path / "cache"
    both = [start("-c", LOAD, CXX=compiler, INFMOE_CACHE_DIR=cache) for _ in range(2)]
    results = [finish(process) for process in both]
    for returned, stdout, stderr in results:
        assert returned == 0, stderr
        assert stdout.strip() == native.isa()
    assert "".join(stderr for *_, stderr in results).count("building") == 1
    assert sum(call.startswith("-shared") for call in calls(tmp_path)) == 1
    assert sum(" -c " in call for call in calls(tmp_path)) == len(native._LIBRARIES["masked_ffn"])
    assert sorted(path.name for path in cache.glob("kernels/*/*")) == ["libinfmoe.so", "lock"]
    assert building(compiler)
    assert sum(call.startswith("-shared") for call in calls(tmp_path)) == 1


FAILURES = {
    "compile": {"compile": "echo no such header; exit 1"},
    "link": {"link": "echo no such header >&2; exit 1"},
}


@needs_kernels
@on_linux
@pytest.mark.parametrize("stage", FAILURES)
def test_a_failed_build_leaves_its_words_in_the_log_and_nothing_else(stage, tmp_path, building, capsys):
    compiler = fake_compiler(tmp_path, **FAILURES[stage])
    assert not building(compiler)
    _, line = capsys.readouterr().err.splitlines()
    (log,) = tmp_path.glob("cache/kernels/*/build.log")
    assert str(log) in line
    assert "no such header" in log.read_text()
    assert sorted(path.name for path in log.parent.iterdir()) == ["build.log", "lock"]
    fake_compiler(tmp_path)  # mended
    assert building(compiler)


@needs_kernels
@on_linux
@pytest.mark.parametrize("stage", ["compile", "link"])
def test_a_compiler_that_hangs_is_given_up(stage, tmp_path, building, monkeypatch, capsys):
    monkeypatch.setattr(native, "_TIMEOUT_S", 0.5)
    assert not building(fake_compiler(tmp_path, **{stage: "exec sleep 20"}))
    assert "took longer" in capsys.readouterr().err.splitlines()[-1]


@needs_kernels
def test_a_compiler_that_does_not_tell_its_version_is_given_up(tmp_path, building, monkeypatch, capsys):
    def hang(command, **options):
        raise subprocess.TimeoutExpired(command, 60)

    monkeypatch.setattr(subprocess, "run", hang)
    assert not building(sys.executable)
    assert "no compiled CPU kernels" in capsys.readouterr().err


def test_other_processors_are_named(building, monkeypatch, capsys):
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert not building(sys.executable)
    (line,) = capsys.readouterr().err.splitlines()
    assert "aarch64" in line


@needs_kernels
@on_linux
def test_a_cache_that_cannot_be_written_is_said(tmp_path, building, capsys):
    (tmp_path / "cache").touch()
    assert not building(fake_compiler(tmp_path))
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "cache") in line


@needs_kernels
@on_linux
def test_every_compiler_source_and_flag_has_a_build_of_its_own(tmp_path, building, monkeypatch):
    def builds():
        return len(list(tmp_path.glob("cache/kernels/*/libinfmoe.so")))

    compiler = fake_compiler(tmp_path)
    for _ in range(2):
        assert building(compiler)
        assert builds() == 1
    compiler.write_text(compiler.read_text().replace("fake 1.0", "fake 2.0"))
    assert building(compiler)
    assert builds() == 2
    monkeypatch.setattr(native, "_COMMON", [*native._COMMON, "-g"])
    assert building(compiler)
    assert builds() == 3


@needs_kernels
@on_linux
def test_a_broken_library_in_the_cache_is_no_trouble(tmp_path, building):
    """The plain path, and a line that says so, or another build."""
    compiler = fake_compiler(tmp_path)
    assert building(compiler)
    (library,) = tmp_path.glob("cache/kernels/*/libinfmoe.so")
    library.write_text("no library")
    code, _, stderr = finish(start("-c", LOAD, CXX=compiler, INFMOE_CACHE_DIR=tmp_path / "cache"))
    assert code == 0, stderr
    assert len(stderr.splitlines()) == 1


@needs_kernels
def test_the_environment_may_name_the_instruction_set():
    assert finish(start("-c", LOAD, INFMOE_ISA="scalar")) == (0, "scalar\n", "")
