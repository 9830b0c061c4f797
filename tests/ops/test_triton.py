"""The Triton kernels without a GPU: interpreted against the reference, traced, and compiled ahead of time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from infmoe.bench import aot, gpu
from infmoe.errors import InfMoEError
from infmoe.ops import triton as kernels

needs_triton = pytest.mark.skipif(
    kernels.available()[1].startswith("triton is not installed"), reason="triton is not installed"
)


def python(*args, **environment):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    done = subprocess.run([sys.executable, *args], env=env, capture_output=True, text=True, timeout=280)
    return done.returncode, done.stdout + done.stderr


@needs_triton
def test_interpreted_kernels_equal_the_reference():
    cases = Path(__file__).with_name("triton_in_interpreter.py")
    code, output = python("-m", "pytest", str(cases), "-x", "-p", "no:cacheprovider", TRITON_INTERPRET="1")
    assert code == 0, output
    assert "passed" in output


def test_infmoe_needs_no_triton():
    """torch may import it; infmoe does at the first use of a kernel, and says what to do where it is missing."""
    script = """
import sys
sys.modules["triton"] = None
import infmoe.layers, infmoe.ops.triton, infmoe.bench.aot, infmoe.bench.gpu
assert "infmoe.ops.triton.kernels" not in sys.modules
print(infmoe.ops.triton.available())
try:
    infmoe.bench.aot.aot(quick=True)
except infmoe.errors.InfMoEError as error:
    print(error)
"""
    code, output = python("-c", script)
    assert code == 0, output
    assert output.count("triton is not installed: pip install 'infmoe[triton]'") == 2, output


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_without_a_gpu_the_reason_is_named():
    ok, reason = kernels.available()
    assert not ok
    assert reason
    with pytest.raises(InfMoEError, match="needs a CUDA device"):
        gpu.gpu(quick=True)
    with pytest.raises(AttributeError, match="no_such"):
        _ = kernels.no_such


@needs_triton
def test_torch_compile_traces_the_kernels_forward_and_backward():
    """Into one graph, with as many tokens as there come; nothing runs, which takes a GPU."""
    graphs = []

    def record(graph, _inputs):
        graphs.append([node.target.__name__ for node in graph.graph.nodes if "triton" in str(node.target)])
        outputs = [n if n is None else n.meta["val"] for n in graph.graph.output_node().args[0]]
        makes = [(list(map(int, o.shape)), o.dtype) if o is not None else None for o in outputs]
        return make_boxed_func(lambda *_: [m and torch.zeros(m[0], dtype=m[1]) for m in makes])

    def layer(x, pre, scores, num_kept, weight, w2):
        y, packed, _ = kernels.gated_linear(pre, scores, num_kept, weight, w2, None, act="gelu_new")
        mask, *_ = kernels.mean_mask(scores, num_kept, weight)
        w = w2.T.contiguous()
        return y, packed, kernels.sparse_ffn(x, mask, w, scores[0, 0], w, x[0], act="relu")

    N, K, U, D = 3, 2, 20, 12
    w2 = torch.randn(D, U, requires_grad=True)
    compiled = torch.compile(layer, backend=aot_autograd(fw_compiler=record, bw_compiler=record), fullgraph=True)
    pre, scores = torch.randn(N, U, requires_grad=True), torch.randn(N, K, U, requires_grad=True)
    num_kept, weight = torch.full((N,), 5, dtype=torch.int32), torch.full((N, K), 0.5)
    y, packed, decoded = compiled(torch.randn(N, D), pre, scores, num_kept, weight, w2)
    assert (y.shape, packed.shape, packed.dtype, decoded.shape) == ((N, D), (N, K, 3), torch.uint8, (N, D))
    y.sum().backward()
    assert (pre.grad.shape, scores.grad.shape, w2.grad.shape) == (pre.shape, scores.shape, w2.shape)
    assert [len(names) for names in graphs] == [5, 1], graphs
    compiled(torch.randn(N, D), pre, scores, num_kept, weight, w2)
    assert len(graphs) == 2


@needs_triton
@pytest.mark.parametrize("num_units", [6144, 16384])
def test_the_kernels_compile_for_gpus(num_units):
    """sm_80 and sm_90: at most a register or two spilled, and every program fits its SM."""
    recorded = aot.launches(num_units, dtype=torch.bfloat16, act="gelu_new")
    names = [aot.kernel_name(launch) for launch in recorded]
    assert names == [
        "select",
        "select_backward (and W2's input)",
        "select (mask alone)",
        "compact",
        "sparse_ffn",
        "sum_splits",
    ]
    for launch in recorded:
        for architecture in aot.ARCHITECTURES:
            used = aot.resources(aot.compile_launch(launch, architecture), architecture)
            assert used["spill_store_bytes"] <= 8, (launch.kernel.__name__, used)
            assert used["programs_per_sm"] >= (2 if num_units == 6144 else 1), (launch.kernel.__name__, used)
