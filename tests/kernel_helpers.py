"""Shared by the tests of the compiled operators: operands, formulas in plain tensor operations, comparison."""

import pytest
import torch
import torch.nn.functional as F

from infmoe.layers.activations import ACTIVATIONS
from infmoe.ops.masked_ffn import compiled

NEEDS_KERNELS = pytest.mark.skipif(not compiled.available(), reason="no compiled kernels here")
OPS = torch.ops.infmoe
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
ACTS = pytest.mark.parametrize("act", ACTIVATIONS)


def random(*shape, dtype=torch.float32, seed=0, scale=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def close(actual, expected, dtype=torch.float32, *, atol=1e-5, rtol=1e-5):
    """`expected` is float32 or wider: what rounds to `actual`'s dtype once, or twice where gradients pass through."""
    limits = {"rtol": rtol, "atol": atol} if dtype == torch.float32 else {"rtol": 2**-6, "atol": 2**-6}
    torch.testing.assert_close(actual.float(), expected.float(), equal_nan=True, **limits)


def plain_gate(pre, b1, gate, b3, mask, act):
    function, _ = ACTIVATIONS[act]
    h = function(pre if b1 is None else pre + b1)
    if gate is not None:
        h = h * (gate if b3 is None else gate + b3)
    return h * mask.repeat_interleave(pre.shape[-1] // mask.shape[-1], dim=-1)


def sparse_inputs(act, N, D, width, block, dtype, seed=0):
    gated = ACTIVATIONS[act][1]
    w1, w3, w2 = (
        random(rows, columns, dtype=dtype, seed=seed + i, scale=columns**-0.5)
        for i, (rows, columns) in enumerate([(width, D), (width, D), (D, width)])
    )
    b1, b3 = (random(width, dtype=dtype, seed=seed + 3 + i) for i in range(2))
    mask = random(1, N, width // block, seed=seed + 5)
    mask *= torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed + 6)) < 0.3
    x = random(1, N, D, dtype=dtype, seed=seed + 7)
    third = (w3, b3) if gated else (None, None)
    return x, mask, w1, b1, *third, w2, random(D, dtype=dtype, seed=seed + 8)


def dense_formula(x, mask, w1, b1, w3, b3, w2, b2, act):
    x, mask, w1, b1, w3, b3, w2, b2 = (t.double() if t is not None else None for t in (x, mask, w1, b1, w3, b3, w2, b2))
    gate = F.linear(x, w3) if w3 is not None else None
    return F.linear(plain_gate(F.linear(x, w1), b1, gate, b3, mask, act), w2, b2)
