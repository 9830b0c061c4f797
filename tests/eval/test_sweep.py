"""Points of a sweep: paired differences, FLOPs by the measured union, latency side by side, and the picture."""

import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import tiny_model

from infmoe.eval.dials import grid
from infmoe.eval.heldout import HeldOut, evaluate_loss
from infmoe.eval.latency import Timing, decode_latency, forward_latency, interleave
from infmoe.eval.plots import plot_sweep, plot_training
from infmoe.eval.report import read_metrics, table_cells, write_report
from infmoe.eval.sweep import evaluate_points, measure_latency
from infmoe.hf import model_cost

RATIOS = (1 / 8, 1 / 4)


@pytest.fixture(scope="module")
def points(opened):
    return grid(opened.model.config, num_samples=(1, 2), keep_ratios=RATIOS)


@pytest.fixture(scope="module")
def rows(opened, held_out, points):
    made = evaluate_points(opened.model, held_out, points)
    measure_latency(opened.model, points, made, rounds=4)
    return made


def windows(model) -> HeldOut:
    config = model.config
    return HeldOut(torch.randint(config.vocab_size, (4, config.max_position_embeddings)), torch.arange(4))


def test_differences_are_paired(opened, held_out, points, rows):
    results = [evaluate_loss(opened.model, held_out, point.routing()) for point in points]
    assert [row["is_reference"] for row in rows] == [False, False, False, True]  # K = 2, r = 1/4: as trained
    reference = results[-1].window_losses
    for row, result in zip(rows, results, strict=True):
        difference = (result.window_losses - reference).numpy()
        assert row["loss"] == pytest.approx(result.loss)
        assert row["delta"] == pytest.approx(difference.mean())
        assert row["delta_se"] == pytest.approx(difference.std(ddof=1) / len(difference) ** 0.5)
    assert rows[-1]["delta"] == rows[-1]["delta_se"] == 0


def test_without_the_models_own_point_the_first_is_the_reference(opened, held_out):
    points = grid(opened.model.config, num_samples=(1,), keep_ratios=RATIOS)
    assert [row["is_reference"] for row in evaluate_points(opened.model, held_out, points)] == [True, False]


def test_flops_go_by_the_measured_union(opened, points, rows):
    config = opened.model.config
    full = 2 * 2 * config.hidden_size * config.intermediate_size * config.num_hidden_layers  # W1 and W2
    for point, row in zip(points, rows, strict=True):
        saved = row["flops_executed"] - row["flops_ideal"]
        assert saved == pytest.approx(full * (1 - row["union_ratio"]), abs=config.num_hidden_layers)
        assert row["flops_executed"] == model_cost(config, point.routing()).flops_executed
    by_point = {(row["num_samples"], row["keep_ratio"]): row for row in rows}
    assert by_point[1, 1 / 8]["flops_executed"] == by_point[1, 1 / 4]["flops_executed"]
    assert by_point[1, 1 / 8]["union_ratio"] == pytest.approx(1 / 8)
    independent = model_cost(config, points[-1].routing()).flops_ideal
    assert by_point[2, 1 / 4]["flops_ideal"] != independent, "samples of one token share neurons"


@pytest.mark.parametrize("ffn", ["dense", "switch", "moe"])
def test_other_variants(ffn, tmp_path):
    model = tiny_model(ffn)
    ks = {"num_experts_per_tok": (1, 2)} if ffn == "moe" else {}
    points = grid(model.config, **ks)
    rows = evaluate_points(model, windows(model), points)
    assert [row["num_experts_per_tok"] for row in rows] == ([1, 2] if ffn == "moe" else [None])
    if ffn == "dense":
        assert rows[0]["union_ratio"] == rows[0]["entropy"] == 1
    if ffn == "moe":
        assert rows[0]["flops_ideal"] < rows[1]["flops_ideal"]
    measure_latency(model, points, rows, rounds=4)
    assert is_png(plot_sweep(rows, tmp_path / "sweep.png", title=ffn))


def test_a_router_without_sigma_has_one_point_of_its_own():
    model = tiny_model("infinity", sigma_activation="none", keep_ratio=1.0)
    assert model.config.routing_mode == "sample"  # which such a router does not have
    rows = evaluate_points(model, windows(model), grid(model.config, keep_ratios=(0.5, 1.0)))
    assert [row["is_reference"] for row in rows] == [False, True]


def test_every_mode_can_be_swept(opened, held_out, tmp_path):
    for mode in ("mu", "antithetic"):
        rows = evaluate_points(opened.model, held_out, grid(opened.model.config, keep_ratios=RATIOS, mode=mode))
        titles, cells = table_cells(rows)
        assert cells[0][0].startswith(mode)
        assert is_png(plot_sweep(rows, tmp_path / "sweep.png", title=mode))
        assert "decode ms" not in titles


def test_tables_and_pictures(tiny_run, rows, tmp_path):
    titles, cells = table_cells(rows)
    assert titles[0] == "point"
    assert [row[0] for row in cells] == ["K=1 keep=1/8", "K=1 keep=1/4", "K=2 keep=1/8", "K=2 keep=1/4 *"]
    assert float(cells[0][titles.index("MFLOPs ideal")]) == pytest.approx(rows[0]["flops_ideal"] / 1e6, abs=1e-3)
    assert float(cells[0][titles.index("decode ms")]) == pytest.approx(rows[0]["decode_ms"], abs=0.01)
    sweep = plot_sweep(rows, tmp_path / "sweep.png", title="dials")
    metrics = read_metrics(tiny_run.run)
    training = plot_training(metrics, tmp_path / "training.png", title="training")
    assert is_png(sweep)
    assert is_png(training)
    assert is_png(plot_training(metrics[-2:], tmp_path / "one.png", title="a single step"))
    page = write_report(
        tmp_path / "report" / "index.html",
        title="a < b",
        introduction="x & y",
        pictures=[(sweep, "first"), (training, "second")],
        rows=rows,
        samples=[("seed 0", "<script>alert(1)</script>")],
        provenance={"command": "infmoe"},
    ).read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "<script" not in page
    assert "a &lt; b" in page
    assert not any(word in page for word in ("http://", "https://", 'src="s', "<link"))


def is_png(path) -> bool:
    """Whether it is a PNG of some size."""
    data = path.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    return data.startswith(b"\x89PNG") and width > 400 and height > 300


def test_arms_take_turns():
    calls = []
    seconds = interleave([lambda c=c: calls.append(c) for c in "abcd"], rounds=6, warmup=1)
    rounds = ["".join(calls[i : i + 4]) for i in range(0, 28, 4)]
    assert rounds[0] == "abcd"  # to warm up
    assert all(sorted(turn) == list("abcd") for turn in rounds)
    assert len(set(rounds[1:])) > 3  # back and forth there are two orders
    assert [len(s) for s in seconds] == [6] * 4
    assert Timing.of([0.001, 0.002, 0.003]) == Timing(2.0, 1.0, 3.0)


def test_a_decoding_step_reads_one_token_after_the_same_cache(opened, points):
    seen = []

    def model(input_ids, past_key_values=None, **kwargs):
        if past_key_values is not None:
            seen.append((input_ids.shape, past_key_values.get_seq_length()))
        return opened.model(input_ids=input_ids, past_key_values=past_key_values, **kwargs)

    def parameters():
        return opened.model.parameters()

    class Recorder(SimpleNamespace):
        def __call__(self, **kwargs):
            return model(**kwargs)

    recorder = Recorder(parameters=parameters, config=opened.model.config)
    timings = decode_latency(recorder, [p.routing() for p in points], prompt_length=9, rounds=4)
    assert len(timings) == len(points)
    assert set(seen) == {((1, 1), 9)}
    assert len(seen) == (2 + 4) * len(points)
    for timing in (*timings, *forward_latency(opened.model, [points[0].routing()], batch_size=2, length=8, rounds=4)):
        assert 0 < timing.low_ms <= timing.median_ms <= timing.high_ms


def test_rows_are_plain_numbers(rows):
    for row in rows:
        values = [value for name, value in row.items() if name != "mode"]
        assert all(type(value) in (int, float, bool, type(None)) for value in values)
        assert all(np.isfinite(value) for value in values if value is not None)
