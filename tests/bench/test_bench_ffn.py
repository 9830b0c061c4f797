"""The layer against its limit: what the arms are, what is counted, and what the summary holds."""

import dataclasses

import pytest
import torch

from infmoe.bench import ffn
from infmoe.errors import InfMoEError

POINTS = ("forward_speedup_min", "forward_over_gemms_max", "train_speedup_min", "train_over_gemms_max")


@pytest.mark.parametrize("quick", [True, False])
def test_summary_has_its_keys(ffn_shape, quick):
    ffn_shape = dataclasses.replace(ffn_shape, keep_ratios=(1 / 4,))
    rows, summary = ffn.ffn_speed(quick=quick, shape=ffn_shape)
    suffixes = ("", "_z8", "_fp32") if quick else ("", "_z8", "_fp32", "_z8_fp32")
    for suffix in suffixes:
        for key in POINTS:
            assert summary[key + suffix] > 0
    assert summary["memory_ratio"] > 0
    assert summary["reference_over_calls_max"] > 0
    forward = [r for r in rows if r.get("pass") == "forward" and (r["dtype"], r["z_dim"]) == ("bf16", 16)]
    assert {r["keep_ratio"] for r in forward} == set(ffn_shape.keep_ratios)
    ours = [r for r in forward if r["arm"] == "infinity"]
    assert summary["forward_speedup_min"] == min(r["speedup_median"] for r in ours)
    assert summary["forward_over_gemms_max"] == max(r["over_limit_median"] for r in ours)
    assert all(r["q1"] <= r["median"] <= r["q3"] for r in rows if "median" in r)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.15)])
@pytest.mark.parametrize("keep_ratio", [1 / 16, 1 / 4, 1.0])
def test_the_reference_computes_the_same_function(ffn_shape, dtype, tolerance, keep_ratio):
    assert ffn.LayerCase(ffn_shape, 16, dtype).check(keep_ratio) < tolerance


def test_a_reference_that_computes_something_else_is_refused(ffn_shape, monkeypatch):
    case = ffn.LayerCase(ffn_shape, 16, torch.float32)
    monkeypatch.setattr(case, "reference", lambda keep_ratio: torch.ones(24, 32))
    with pytest.raises(InfMoEError, match="differ by"):
        case.check(0.25)


def test_flops_of_the_products_are_the_layers(ffn_shape):
    case = ffn.LayerCase(ffn_shape, 16, torch.float32)
    # by hand: W1 and W2, two samples of W_z, both maps; 24 tokens
    by_hand = 24 * 2 * (2 * 32 * 96 + 2 * 16 * 96 + 2 * 32 * 16)
    assert case.gemms(backward=False)[1] == by_hand == 24 * case.layer.cost().flops_executed
    assert case.gemms(backward=True)[1] == 3 * by_hand


def test_training_leaves_no_gradients(ffn_shape):
    case = ffn.LayerCase(ffn_shape, 16, torch.float32)
    seen = []
    case.layer.w1.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.norm()))
    case.trained(lambda: case.infinity(0.25, "auto"))()
    case.trained(lambda: case.reference(0.25))()
    torch.testing.assert_close(*seen, rtol=1e-3, atol=0)
    assert all(p.grad is None for p in case.layer.parameters())


def test_live_bytes_counts_what_is_held():
    kept = []

    def work() -> None:
        large = torch.zeros(1_000_000)
        kept.append(large + 1)
        del large
        kept.append(torch.zeros(500_000))

    peak, end = ffn.live_bytes(work)
    assert peak == pytest.approx(8_000_000, abs=10_000)
    assert end == pytest.approx(6_000_000, abs=10_000)


def test_activation_memory_of_a_dense_layer():
    # The backward pass needs W1's output and W2's input, and the output is alive too; at the peak the gradients of
    # hidden layer and of a weight stand beside them.
    from infmoe.layers import DenseFFN

    layer, x, grad = DenseFFN(64, 512), torch.randn(256, 64, requires_grad=True), torch.randn(256, 64)
    saved, peak = ffn.activation_memory(lambda: layer(x).y_BTD, layer, x, grad)
    hidden, output, weight = 4 * 256 * 512, 4 * 256 * 64, 4 * 64 * 512
    assert saved == pytest.approx(2 * hidden + output, rel=0.02)
    assert 3 * hidden < peak <= 1.02 * (4 * hidden + 2 * output + weight)
    assert x.grad is None
    assert layer.w1.weight.grad is None
