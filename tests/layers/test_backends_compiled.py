"""The backends of ∞-MoE under torch.compile."""

import pytest
import torch
from backend_helpers import backend_layer, close, gradients, inputs, run
from kernel_helpers import NEEDS_KERNELS


@pytest.fixture
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@NEEDS_KERNELS
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(
    "case", ["gelu_new", "gated blocks", "rms rows of their own", "bfloat16 scores", "statistical"]
)
def test_compiled_training_takes_the_same_gradients(case):
    layer = backend_layer(case).train()
    x = inputs(layer)
    expected = gradients(layer, x, "fused", case)
    layer.forward = torch.compile(layer.forward, fullgraph=True, backend="aot_eager")
    for name, gradient in gradients(layer, x, "fused", case).items():
        close(gradient, expected[name], what=name)


@NEEDS_KERNELS
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("backend", [None, "eager", "fused", "sparse"])
def test_compiled_decoding_computes_the_same(backend):
    layer = backend_layer("swiglu")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for length in (1, 2, 3, 7):  # from the second on, torch takes the length for a variable
            x = inputs(layer, 2, length)
            expected = run(layer, x, backend, "swiglu")
            out = run(compiled, x, backend, "swiglu")
            close(out.y_BTD, expected.y_BTD)
            close(out.stats.counts_U, expected.stats.counts_U)


@NEEDS_KERNELS
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("backend", ["fused", None])
def test_compiled_training_takes_any_length(backend):
    layer = backend_layer().train()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (4, 9, 2):
        x = inputs(layer, 2, length)
        expected = run(layer, x, backend).y_BTD
        y = run(compiled, x, backend).y_BTD
        close(y, expected)
        y.sum().backward()


@NEEDS_KERNELS
@pytest.mark.usefixtures("_fresh_compiler")
def test_inductor_trains_fused_and_decodes_sparse():
    layer = backend_layer("swiglu").train()
    x = inputs(layer)
    expected = gradients(layer, x, "fused", "swiglu")
    with torch.no_grad():
        sparse = run(layer, x, "sparse", "swiglu").y_BTD
    layer.forward = torch.compile(layer.forward, fullgraph=True)
    for name, gradient in gradients(layer, x, "fused", "swiglu").items():
        close(gradient, expected[name], what=name)
    with torch.no_grad():
        close(run(layer, x, "sparse", "swiglu").y_BTD, sparse)
