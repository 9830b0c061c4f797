"""The compiled gate, and the linear layer behind it, each against its formula."""

import pytest
import torch
import torch.nn.functional as F
from kernel_helpers import ACTS, DTYPES, NEEDS_KERNELS, OPS, close, plain_gate, random

from infmoe.layers.activations import ACTIVATIONS
from infmoe.ops.masked_ffn import fused

pytestmark = NEEDS_KERNELS


def gate_inputs(act, dtype, B, T, width, block, biases):
    gated = ACTIVATIONS[act][1]
    full = [random(B, T, width, dtype=dtype, seed=i, scale=2.0) for i in range(2)]
    b1, b3 = (random(width, dtype=dtype, seed=7 + i) if biases else None for i in range(2))
    mask = random(B, T, width // block, dtype=dtype, seed=5)
    mask *= torch.rand(mask.shape, generator=torch.Generator().manual_seed(6)) < 0.4
    return full[0], b1, full[1] if gated else None, b3 if gated else None, mask


def forward_and_gradients(function, inputs, grad):
    leaves = [t.detach().clone().requires_grad_() if t is not None else None for t in inputs]
    result = function(*leaves)
    result.backward(grad.to(result.dtype))
    return [result.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


@ACTS
@DTYPES
@pytest.mark.parametrize(("width", "block"), [(1, 1), (15, 1), (16, 1), (99, 1), (99, 3), (64, 16), (66, 66)])
@pytest.mark.parametrize("biases", [True, False])
def test_gate_and_its_gradients_equal_the_formula(act, dtype, width, block, biases):
    inputs = gate_inputs(act, dtype, 2, 5, width, block, biases)
    grad = random(2, 5, width, dtype=dtype, seed=9)
    actual = forward_and_gradients(lambda *t: fused.gate(*t, act), inputs, grad)
    wide = [t.double() if t is not None else None for t in inputs]
    expected = forward_and_gradients(lambda *t: plain_gate(*t, act), wide, grad.double())
    assert len(actual) == len(expected)
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == dtype
        close(got, want, dtype)


@ACTS
@DTYPES
@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("rows_per_product", [1, 3, 512])
def test_gated_linear_and_its_gradients_equal_the_formula(act, dtype, block, biases, rows_per_product, monkeypatch):
    monkeypatch.setattr(fused, "_ROWS_PER_PRODUCT", rows_per_product)
    inputs = (
        *gate_inputs(act, dtype, 2, 7, 99, block, biases),
        random(12, 99, dtype=dtype, seed=10, scale=0.1),
        random(12, dtype=dtype, seed=11) if biases else None,
    )
    grad = random(2, 7, 12, dtype=dtype, seed=9)
    actual = forward_and_gradients(lambda *t: fused.gated_linear(*t, act), inputs, grad)
    wide = [t.double() if t is not None else None for t in inputs]
    expected = forward_and_gradients(lambda *t: F.linear(plain_gate(*t[:5], act), t[5], t[6]), wide, grad.double())
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == dtype
        scale = float(want.abs().max())
        close(got / scale, want / scale, dtype)


@ACTS
def test_gradients_are_made_for_what_needs_them_only(act):
    pre, b1, gate, b3, mask = gate_inputs(act, torch.float32, 1, 3, 20, 1, True)
    weight = random(4, 20)
    for leaf in (pre, mask, b1):
        leaf.requires_grad_()
        fused.gated_linear(pre, b1, gate, b3, mask, weight, None, act).sum().backward()
        assert leaf.grad is not None
        leaf.requires_grad_(False)
        leaf.grad = None
    assert weight.grad is None


@ACTS
def test_large_inputs_saturate_as_torchs_do(act):
    function, gated = ACTIVATIONS[act]
    sizes = torch.tensor([0.0, 1e-30, 1e-8, 1e-3, 0.1, 1.0, 3.0, 5.5, 10.0, 20.0, 50.0, 87.0, 88.5, 100.0, 1e4, 1e10])
    pre = torch.cat([sizes, -sizes]).view(1, 1, -1).requires_grad_()
    ones = torch.ones_like(pre)
    out = fused.gate(pre, None, ones if gated else None, None, ones, act)
    out.sum().backward()
    leaf = pre.detach().double().requires_grad_()
    expected = function(leaf)
    expected.sum().backward()
    close(out.detach(), expected.detach(), atol=1e-6)
    close(pre.grad, leaf.grad, atol=2e-6)


@ACTS
@DTYPES
def test_a_divergence_passes_through_the_gate(act, dtype):
    inputs = gate_inputs(act, dtype, 1, 3, 20, 1, False)
    for which in (0, 2, 4):
        if inputs[which] is None:
            continue
        poisoned = [t.clone() if t is not None else None for t in inputs]
        poisoned[which][0, 1, 7] = torch.nan
        poisoned[4][0, 1, 7] = torch.nan if which == 4 else 1.0
        out = fused.gate(*poisoned, act)
        assert out[0, 1, 7].isnan()
        assert int(out.isnan().sum()) == 1
    poisoned = [t.clone() if t is not None else None for t in inputs]
    poisoned[0][0, 1, 7], poisoned[4][0, 1, 7] = torch.inf, 1.0
    assert not fused.gate(*poisoned, act)[0, 1, 7].isfinite()


def test_the_gate_takes_what_is_not_contiguous_and_nothing():
    pre, mask = random(3, 4, 40)[..., ::2].requires_grad_(), random(4, 3, 20, seed=1).transpose(0, 1)
    out = fused.gate(pre, None, None, None, mask, "relu")
    close(out.detach(), plain_gate(pre, None, None, None, mask, "relu").detach())
    out.sum().backward()
    for shape in ((0, 4, 20), (2, 0, 20)):
        empty = torch.zeros(shape, requires_grad=True)
        assert fused.gate(empty, None, empty, None, empty, "swiglu").shape == shape
        y = fused.gated_linear(empty, None, empty, None, empty, random(5, 20), random(5), "swiglu")
        assert y.shape == (*shape[:2], 5)
        y.sum().backward()
        assert empty.grad.shape == shape


@pytest.mark.parametrize("case", ["widths", "dtypes", "activation"])
def test_the_gate_refuses_what_does_not_fit(case):
    pre, mask = random(2, 20), random(2, 20)
    with pytest.raises(RuntimeError, match={"widths": "fit", "dtypes": "dtype", "activation": "activation"}[case]):
        OPS.gate(
            pre,
            None,
            None,
            None,
            {"widths": random(2, 7), "dtypes": mask.bfloat16(), "activation": mask}[case],
            9 if case == "activation" else 0,
        )
