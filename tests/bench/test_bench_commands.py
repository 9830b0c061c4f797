"""`infmoe bench` as a command: what it prints, writes and draws."""

import errno
import json
import sys

import pytest

from infmoe.bench import BENCHES, common, decode, ffn, figures, growth, run_bench
from infmoe.cli import main
from infmoe.ops.masked_ffn import compiled


@pytest.fixture
def small(monkeypatch, ffn_shape, decode_setting, axes):
    monkeypatch.setattr(ffn, "PAPER", ffn_shape)
    monkeypatch.setattr(decode, "small_setting", lambda *, quick: decode_setting)
    monkeypatch.setattr(growth, "PAPER", axes)
    monkeypatch.setattr(growth, "QUICK", axes)


NEEDS_KERNELS = pytest.mark.skipif(not compiled.available(), reason="no compiled kernels, so no fused or sparse path")


@pytest.mark.parametrize("name", ["ffn", pytest.param("decode", marks=NEEDS_KERNELS), "growth", "router"])
def test_the_last_line_is_the_result(name, small, capsys, tmp_path):
    out = tmp_path / "results" / f"{name}.json"
    assert main(["bench", name, "--quick", "--out", str(out)]) == 0
    *above, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert result == json.loads(out.read_text())
    assert result["rows"]
    assert result["summary"]
    assert result["quick"] is True
    assert len(above) > len(result["rows"])  # a heading, and a line for each
    picture = out.with_suffix(".png")
    assert picture.is_file() == (name in figures.PICTURES)
    if picture.is_file():
        assert picture.read_bytes()[:4] == b"\x89PNG"


def test_a_folder_takes_the_result_under_the_benchs_name(small, capsys, tmp_path):
    assert main(["bench", "router", "--quick", "--out", str(tmp_path)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads((tmp_path / "router.json").read_text())


def test_the_result_is_printed_where_it_cannot_be_written(small, capsys, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("infmoe.provenance.write_json", full)
    assert main(["bench", "router", "--quick", "--out", str(tmp_path / "router.json")]) == 2
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1])["rows"]
    assert said.err == "error: No space left on device\n"


def test_json_prints_nothing_else(small, capsys):
    assert main(["bench", "router", "--quick", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert {"bench", "rows", "summary", "provenance"} <= json.loads(out).keys()


def test_explain_prints_the_dispatchers_table(capsys):
    from infmoe.ops.dispatch import explain

    assert main(["bench", "--explain"]) == 0
    assert capsys.readouterr().out == explain() + "\n"


def test_list_names_every_bench(capsys):
    assert main(["bench"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(BENCHES)


@pytest.mark.parametrize("name", BENCHES)
def test_every_bench_exists(name):
    import importlib

    module, function, text = BENCHES[name]
    assert callable(getattr(importlib.import_module(f"infmoe.bench.{module}"), function))
    assert text


def test_run_bench_says_where_it_ran(small):
    assert run_bench("router", quick=True)["provenance"]["machine"]["threads"] >= 1


def test_the_dispatchers_map(tmp_path):
    rows = [
        {"tokens": n, "num_samples": k, "keep_ratio": r, "chosen": chosen, "ratio_median": 1.0}
        for n, k, r, chosen in ((1, 1, 1 / 16, "sparse"), (64, 1, 1 / 16, "fused"), (1, 8, 1 / 2, "eager"))
    ]
    assert figures.plot_dispatch(rows, tmp_path / "dispatch.png").is_file()


def test_table_heads_every_set_of_columns():
    text = common.table([{"a": 1, "b": 0.123456}, {"a": 22, "b": None}, {"c": "x"}])
    assert text.splitlines() == ["a   b", "1   0.1235", "22  None", "c", "x"]


def test_a_budget_is_shared_by_what_is_left(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(common.time, "perf_counter", lambda: now[0])
    budget = common.Budget(10.0, 4)
    assert budget.share() == pytest.approx(2.5)
    now[0] = 4.0
    assert budget.share() == pytest.approx(2.0)
    assert budget.share(2) == pytest.approx(6.0)
    now[0] = 11.0
    assert budget.share() == 0.0
    assert common.Budget(None, 4).share() is None


def test_a_run_that_fails_is_named_in_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text("#!/bin/sh\necho first >&2\necho 'error: no room' >&2\nexit 3\n")
    (tmp_path / "python").chmod(0o755)
    assert main(["bench", "resume", "--quick"]) == 2
    assert capsys.readouterr().err == "error: training in whole ended with 3: error: no room\n"
