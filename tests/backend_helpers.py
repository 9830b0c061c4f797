"""Layers, dials and comparisons that every backend is put to."""

import pytest
import torch
from helpers import make_layer, routing

from infmoe.layers.activations import ACTIVATIONS

BACKENDS = ("eager", "fused", "sparse")

# Options of the layer, and dials of the call.
CASES = {
    **{act: ({"hidden_act": act}, {}) for act in ACTIVATIONS},
    "blocks": ({"block_size": 4}, {}),
    "gated blocks": ({"block_size": 4, "hidden_act": "swiglu", "intermediate_size": 108}, {}),
    "bias": ({"wz_bias": True}, {}),
    "bfloat16 scores": ({"score_dtype": "bfloat16"}, {}),
    "statistical": ({"selection": "statistical"}, {}),
    "odd sizes": ({"hidden_size": 13, "intermediate_size": 61, "z_dim": 7}, {}),
    "one unit kept": ({}, {"keep_ratio": 0.001}),
    "all kept": ({}, {"keep_ratio": 1.0}),
    "fixed scale": ({"mask_scale": "fixed"}, {"keep_ratio": 0.5}),
    "rms scale": ({"mask_scale": "rms"}, {"keep_ratio": 0.5}),
    "rms scale, statistical": ({"mask_scale": "rms", "selection": "statistical"}, {"keep_ratio": 0.5}),
    "rows of their own": ({}, {"num_samples": (1, 5, 2), "keep_ratio": (0.1, 0.25, 1.0)}),
    "rms rows of their own": ({"mask_scale": "rms"}, {"num_samples": (1, 5, 2), "keep_ratio": (0.1, 0.25, 1.0)}),
    "mu": ({}, {"mode": "mu"}),
    "antithetic": ({}, {"mode": "antithetic", "num_samples": 3}),
    "no sigma": ({"sigma_activation": "none"}, {}),
    "exp sigma": ({"sigma_activation": "exp"}, {}),
    "router of two layers": ({"router_hidden_size": 8}, {}),
    "statistics of some": ({}, {"max_stats_tokens": 4}),
    "eight samples": ({}, {"num_samples": 8}),
}
EACH = pytest.mark.parametrize("case", CASES)


def backend_layer(case="gelu_new", dtype=torch.float32):
    options = {"initializer_range": 0.3, **CASES[case][0]}
    layer = make_layer("infinity", options.pop("hidden_size", 16), options.pop("intermediate_size", 48), **options)
    for parameter in layer.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return layer.to(dtype)


def inputs(layer, batch_size=3, length=5):
    x = torch.randn(batch_size, length, layer.hidden_size, generator=torch.Generator().manual_seed(4))
    return x.to(layer.w1.weight.dtype)


def run(layer, x, backend, case="gelu_new"):
    return layer(x, routing(len(x), backend=backend, **CASES[case][1]))


def gradients(layer, x, backend, case="gelu_new"):
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = run(layer, x, backend, case).y_BTD
    (y.float() * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    return {"x": x.grad} | {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}


def close(actual, expected, dtype=torch.float32, what=""):
    assert actual.dtype == expected.dtype, what
    assert actual.shape == expected.shape, what
    if dtype == torch.float32:
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5, msg=lambda text: f"{what}: {text}")
    else:  # the plain path rounds after each operation
        error = (actual.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-6)
        assert float(error) < 0.03, what
