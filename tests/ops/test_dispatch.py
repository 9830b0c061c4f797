"""The dispatcher: what decides, what a calibration is, and that no choice changes a result."""

import dataclasses
import json
import math

import pytest
import torch
from helpers import make_layer, routing
from hypothesis import given
from hypothesis import strategies as st

from infmoe.errors import InfMoEError
from infmoe.ops import dispatch, native
from infmoe.ops.dispatch import Calibration, Site
from infmoe.ops.masked_ffn import compiled, few_tokens

needs_kernels = pytest.mark.skipif(not compiled.available(), reason="no compiled kernels here")

SITE = Site(tokens=1, density=0.4, hidden_size=256, width=1024, matrices=2, dtype="float32", threads=1)
GRID = Calibration((1, 4, 16), (0.1, 0.5, 1.0), ((0.2, 0.5, 1.1), (0.4, 0.9, 2.0), (0.8, 1.5, 4.0)))
CALL = {
    "device": "cpu",
    "dtype": torch.float32,
    "gradients": False,
    "plain": True,
    "tokens": 1,
    "density": 0.4,
    "hidden_size": 256,
    "width": 1024,
    "matrices": 2,
}


@pytest.fixture(autouse=True)
def _no_backend_in_the_environment(monkeypatch):
    monkeypatch.delenv("INFMOE_BACKEND", raising=False)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache folder, and no calibration in memory."""
    monkeypatch.setattr(dispatch, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(dispatch, "_calibrations", {})
    return tmp_path


@pytest.fixture
def measured(folder, monkeypatch):
    """The sites that were measured; the result is always `GRID`."""
    sites = []
    monkeypatch.setattr(dispatch, "calibrate", lambda site: sites.append(site) or GRID)
    return sites


def another_process():
    dispatch._calibrations.clear()
    dispatch._chosen.cache_clear()


def in_file(entry):
    return json.dumps({dispatch._machine(): {SITE.geometry: entry}})


ENTRY = dataclasses.asdict(GRID)
BROKEN = {
    "empty": "",
    "no JSON": "{'tokens': 1",
    "no text": b"\xff\xfe\x00\x80",
    "a list": "[1, 2]",
    "a number": "3",
    "null": "null",
    "null for a machine": lambda: json.dumps({dispatch._machine(): None}),
    "a list for a machine": lambda: json.dumps({dispatch._machine(): [ENTRY]}),
    "null for a geometry": lambda: in_file(None),
    "text for a geometry": lambda: in_file("fast"),
    "nothing in it": lambda: in_file({}),
    "no ratios": lambda: in_file({"tokens": [1, 4], "densities": [0.1, 0.5]}),
    "a row short": lambda: in_file(ENTRY | {"ratios": ENTRY["ratios"][:2]}),
    "a column short": lambda: in_file(ENTRY | {"ratios": [row[:2] for row in ENTRY["ratios"]]}),
    "ragged": lambda: in_file(ENTRY | {"ratios": [[1.0, 1.0, 1.0], [1.0], [1.0, 1.0, 1.0]]}),
    "one token count": lambda: in_file({"tokens": [1], "densities": [0.1, 0.5], "ratios": [[1.0, 1.0]]}),
    "empty grids": lambda: in_file({"tokens": [], "densities": [], "ratios": []}),
    "a negative ratio": lambda: in_file(ENTRY | {"ratios": [[1.0, 1.0, -1.0]] * 3}),
    "a ratio of 0": lambda: in_file(ENTRY | {"ratios": [[1.0, 1.0, 0.0]] * 3}),
    "a ratio that is NaN": lambda: in_file(ENTRY | {"ratios": [[1.0, 1.0, math.nan]] * 3}),
    "an infinite ratio": lambda: in_file(ENTRY | {"ratios": [[1.0, 1.0, math.inf]] * 3}),
    "words for ratios": lambda: in_file(ENTRY | {"ratios": [["a", "b", "c"]] * 3}),
    "no tokens": lambda: in_file(ENTRY | {"tokens": [0, 4, 16]}),
    "negative tokens": lambda: in_file(ENTRY | {"tokens": [-1, 4, 16]}),
    "infinite tokens": lambda: in_file(ENTRY | {"tokens": [1, 4, math.inf]}),
    "tokens that fall": lambda: in_file(ENTRY | {"tokens": [16, 4, 1]}),
    "tokens twice": lambda: in_file(ENTRY | {"tokens": [1, 1, 1]}),
    "a density of 0": lambda: in_file(ENTRY | {"densities": [0.0, 0.5, 1.0]}),
    "a negative density": lambda: in_file(ENTRY | {"densities": [-0.1, 0.5, 1.0]}),
    "a density that is NaN": lambda: in_file(ENTRY | {"densities": [0.1, math.nan, 1.0]}),
    "densities twice": lambda: in_file(ENTRY | {"densities": [0.5, 0.5, 0.5]}),
    "deeply nested": "[" * 100_000,
}


@needs_kernels
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_calibration_is_measured_anew_once(name, folder, measured, capsys):
    content = BROKEN[name]() if callable(BROKEN[name]) else BROKEN[name]
    (folder / "calibration.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert "kernels:" in dispatch.explain()
    assert dispatch.resolve(None, **CALL) == "sparse"
    assert len(measured) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert SITE.geometry in line
    another_process()
    assert dispatch.resolve(None, **CALL) == "sparse"
    assert len(measured) == 1
    assert capsys.readouterr().err == ""
    assert [path.name for path in folder.iterdir()] == ["calibration.json"]


@needs_kernels
def test_a_broken_neighbour_costs_no_other_geometry_its_calibration(folder, measured):
    other = SITE._replace(width=2048)
    dispatch.calibration(other)
    content = json.loads((folder / "calibration.json").read_text())
    content[dispatch._machine()]["broken"] = {"tokens": "?"}
    content["another machine"] = {"its own": "business"}
    (folder / "calibration.json").write_text(json.dumps(content))
    for _ in range(2):
        another_process()
        assert dispatch.calibration(other) == dispatch.calibration(SITE) == GRID
    assert measured == [other, SITE]
    assert json.loads((folder / "calibration.json").read_text())["another machine"] == {"its own": "business"}


@needs_kernels
@pytest.mark.parametrize("where", ["missing", "file"])
def test_a_folder_that_cannot_be_written_is_no_trouble(where, folder, measured, monkeypatch):
    (folder / "file").touch()
    monkeypatch.setattr(dispatch, "cache_dir", lambda: folder / where / "deeper")
    for _ in range(2):
        assert dispatch.resolve(None, **CALL) == "sparse"
    assert len(measured) == 1
    assert SITE.geometry in dispatch.explain()


@needs_kernels
def test_a_folder_in_the_files_place_is_no_trouble(folder, measured):
    (folder / "calibration.json").mkdir()
    assert dispatch.resolve(None, **CALL) == "sparse"
    assert [path.name for path in folder.iterdir()] == ["calibration.json"]


@needs_kernels
def test_calibrations_of_several_geometries_and_threads_stand_side_by_side(folder, measured):
    sites = [SITE._replace(**change) for change in ({}, {"threads": 2}, {"dtype": "bfloat16"}, {"matrices": 3})]
    for site in (*sites, SITE._replace(tokens=7), SITE._replace(density=0.1)):
        dispatch.calibration(site)
    assert measured == sites
    another_process()
    for site in sites:
        dispatch.calibration(site)
    assert measured == sites


def test_the_ratio_hits_its_grid_and_holds_beyond():
    for i, tokens in enumerate(GRID.tokens):
        for j, density in enumerate(GRID.densities):
            assert GRID.ratio(tokens, density) == pytest.approx(GRID.ratios[i][j], rel=1e-9)
    assert GRID.ratio(1, 0.001) == GRID.ratio(1, 0.0) == pytest.approx(0.2)
    assert GRID.ratio(10_000, 1.0) == pytest.approx(4.0)
    assert GRID.ratio(10_000, 0.01) == pytest.approx(0.8)
    assert GRID.ratio(2, 0.5) == pytest.approx(math.sqrt(0.5 * 0.9))


@given(st.integers(1, 5000), st.floats(0, 1))
def test_the_ratio_never_leaves_its_cell(tokens, density):
    ratio = GRID.ratio(tokens, density)
    assert 0.2 - 1e-9 <= ratio <= 4.0 + 1e-9
    assert ratio <= GRID.ratio(tokens + 1, density) + 1e-9
    assert ratio <= GRID.ratio(tokens, min(1.0, density + 0.05)) + 1e-9


@needs_kernels
def test_a_real_calibration_is_a_grid_that_reads_back(folder):
    state = torch.get_rng_state()
    known = dispatch.calibrate(SITE._replace(matrices=3, dtype="bfloat16", hidden_size=64, width=512))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(known.ratios) == len(known.tokens)
    assert all(len(row) == len(known.densities) for row in known.ratios)
    assert all(0 < ratio < 1000 for row in known.ratios for ratio in row)
    dispatch._write(SITE.geometry, known)
    assert dispatch._read() == {SITE.geometry: known}


@needs_kernels
@pytest.mark.parametrize("surrounding", ["gradients", "inference mode", "bfloat16 by default", "float64 by default"])
def test_a_calibration_measures_the_same_thing_wherever_it_is_called(surrounding, monkeypatch):
    seen = []
    monkeypatch.setattr(dispatch, "_TOKENS", (1, 2))
    original = few_tokens.sparse_ffn

    def spy(x, mask, w1, *rest):
        seen.append((x.dtype, mask.dtype, w1.dtype, torch.is_grad_enabled(), rest[3].is_inference()))
        return original(x, mask, w1, *rest)

    monkeypatch.setattr(few_tokens, "sparse_ffn", spy)
    before = torch.get_default_dtype()
    defaults = {"bfloat16 by default": torch.bfloat16, "float64 by default": torch.float64}
    torch.set_default_dtype(defaults.get(surrounding, before))
    try:
        with torch.inference_mode(surrounding == "inference mode"):
            dispatch.calibrate(SITE._replace(hidden_size=16, width=64))
    finally:
        torch.set_default_dtype(before)
    # inference tensors have no versions, by which a copy is known to be of today
    assert set(seen) == {(torch.float32, torch.float32, torch.float32, False, False)}


# ---- Who decides


@needs_kernels
def test_the_argument_beats_the_environment_and_that_the_calibration(measured, monkeypatch):
    assert dispatch.resolve(None, **CALL) == "sparse"
    monkeypatch.setenv("INFMOE_BACKEND", "fused")
    assert dispatch.resolve(None, **CALL) == "fused"
    for name in ("eager", "fused", "sparse"):
        assert dispatch.resolve(name, **CALL) == name
    assert dispatch.resolve("auto", **CALL) == "sparse"
    monkeypatch.setenv("INFMOE_BACKEND", "auto")
    assert dispatch.resolve(None, **CALL) == "sparse"


@needs_kernels
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"gradients": True}, "fused"),
        ({"plain": False}, "fused"),
        ({"tokens": 0}, "fused"),
        ({"tokens": 4096}, "fused"),
        ({"hidden_size": 8, "width": 32}, "fused"),
        ({"dtype": torch.float64}, "eager"),
        ({"dtype": torch.float16}, "eager"),
        ({"device": "mps"}, "eager"),
    ],
)
def test_auto_measures_only_where_there_is_a_choice(change, expected, measured):
    assert dispatch.resolve(None, **CALL | change) == expected
    assert not measured


@needs_kernels
@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("sparse", {"gradients": True}, r"gradients.*: eager, fused$"),
        ("sparse", {"plain": False}, r"wrapped.*: eager, fused$"),
        ("sparse", {"dtype": torch.float64}, r"not float64.*: eager$"),
        ("fused", {"dtype": torch.float16}, r"not float16.*: eager$"),
        ("fused", {"device": "mps"}, r"on 'mps'.*: eager$"),
        ("triton", {}, r"CUDA.*: eager, fused, sparse$"),
    ],
)
def test_a_backend_that_cannot_run_is_refused_by_name_in_one_line(name, change, reason, measured, monkeypatch):
    monkeypatch.setenv("INFMOE_BACKEND", name)
    for argument in (name, None):
        with pytest.raises(InfMoEError, match=f"backend '{name}' can't run this call: .*{reason}"):
            dispatch.resolve(argument, **CALL | change)
    assert not measured


def test_without_kernels_the_plain_path_runs_and_the_others_are_refused(monkeypatch, measured):
    monkeypatch.setattr(compiled, "available", lambda: False)
    assert dispatch.resolve(None, **CALL) == "eager"
    assert not dispatch.use_kernels()
    for name in ("fused", "sparse"):
        with pytest.raises(InfMoEError, match=r"no compiled kernels.*: eager$"):
            dispatch.resolve(name, **CALL)


def test_the_environment_decides_for_calls_that_name_none(monkeypatch):
    monkeypatch.setenv("INFMOE_BACKEND", "eager")
    assert dispatch.requested(None) == "eager"
    assert dispatch.requested("sparse") == "sparse"
    assert not dispatch.use_kernels()


@needs_kernels
def test_the_explanation_names_what_decides(folder, measured, monkeypatch):
    text = dispatch.explain()
    assert str(native.isa()) in text
    assert f"threads: {torch.get_num_threads()}" in text
    assert str(folder) in text
    assert "no calibration yet" in text
    dispatch.calibration(SITE)
    monkeypatch.setenv("INFMOE_BACKEND", "fused")
    text = dispatch.explain()
    assert "INFMOE_BACKEND=fused" in text
    assert SITE.geometry in text
    assert "no calibration yet" not in text
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip()[:1].isdigit()}
    assert rows["1"].endswith(" 0.5")
    assert rows["16"].endswith(" 0.1")
    slow = dataclasses.replace(GRID, ratios=((2.0,) * 3,) * 3)
    dispatch._calibrations[SITE.geometry] = slow
    assert "never: fused" in dispatch.explain()
    assert "sparsity can't help" in dispatch.explain()


# ---- No choice changes a result


@needs_kernels
@pytest.mark.parametrize("act", ["gelu_new", "swiglu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_equal_on_both_sides_of_every_switch(act, dtype, folder, monkeypatch):
    """Sparse wins up to 2 tokens at a sparse mask, and for 1 token at a dense one."""
    switching = Calibration((1, 2, 4), (0.2, 0.9), ((0.5, 0.6), (0.7, 1.5), (3.0, 4.0)))
    layer = make_layer("infinity", 64, 4096, hidden_act=act, initializer_range=0.1).to(dtype)
    chosen = []
    original = type(layer)._backend
    monkeypatch.setattr(type(layer), "_backend", lambda *args: chosen.append(original(*args)) or chosen[-1])
    monkeypatch.setattr(dispatch, "calibration", lambda site: switching)
    with torch.no_grad():
        for length in (1, 2, 3, 4, 64, 65):
            x = torch.randn(1, length, 64, generator=torch.Generator().manual_seed(length)).to(dtype)
            for keep_ratio in (0.1, 0.9):
                out = layer(x, routing(1, keep_ratio=keep_ratio))
                wins = length == 1 or (length == 2 and keep_ratio == 0.1)
                assert chosen.pop() == ("sparse" if wins else "fused"), (length, keep_ratio)
                for name in ("eager", "fused", "sparse"):
                    other = layer(x, routing(1, keep_ratio=keep_ratio, backend=name))
                    error = (out.y_BTD.float() - other.y_BTD.float()).norm() / other.y_BTD.float().norm()
                    assert float(error) < (1e-5 if dtype == torch.float32 else 2e-2), name
                    assert torch.equal(out.stats.counts_U, other.stats.counts_U), name
                chosen.clear()
