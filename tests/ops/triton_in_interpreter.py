"""The Triton kernels against the reference, interpreted on CPU.

`test_triton.py` runs this file in a process of its own: TRITON_INTERPRET has to be set before triton is imported.
"""

import math
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs under TRITON_INTERPRET=1, from test_triton.py", allow_module_level=True)

from infmoe.bench import gpu
from infmoe.layers import InfinityFFN, NoiseKey, Routing
from infmoe.layers.activations import ACTIVATIONS
from infmoe.ops import dispatch
from infmoe.ops import triton as kernels
from infmoe.ops.masked_ffn import naive
from infmoe.ops.triton import ops

DTYPES = (torch.float32, torch.bfloat16)
BOTH = pytest.mark.parametrize("dtype", DTYPES, ids=("fp32", "bf16"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def selection(scores_NKU, num_kept_N, weight_NK, statistical=False):
    """The reference's kept units and mean mask."""
    scores_N1KU = scores_NKU.float()[:, None]
    select = naive.select_statistical if statistical else naive.select
    kept_N1KU = select(scores_N1KU, num_kept_N.long())
    return kept_N1KU[:, 0], naive.mean_mask(scores_N1KU, kept_N1KU, weight_NK)[:, 0]


def unpack(packed_NKW, num_units):
    bits = (packed_NKW[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1
    assert not bits.flatten(-2)[..., num_units:].any(), "bits beyond the last unit"
    return bits.flatten(-2)[..., :num_units].bool()


def inputs(N, K, U, dtype=torch.float32, scores_dtype=torch.float32, block=1):
    pre_NF = torch.randn(N, U * block).to(dtype)
    scores_NKU = torch.randn(N, K, U).to(scores_dtype)
    num_kept_N = torch.randint(1, U + 1, (N,), dtype=torch.int32)
    num_samples_N1 = torch.randint(1, K + 1, (N, 1))
    weight_NK = torch.where(torch.arange(K) < num_samples_N1, 1.0 / num_samples_N1, 0.0)
    return pre_NF, scores_NKU, num_kept_N, weight_NK


def assert_near(name, mine, theirs, rounded):
    """Within rounding of the row's largest value."""
    assert mine.dtype == theirs.dtype, name
    rows, expected = mine.float(), theirs.float()
    assert torch.equal(rows.isnan(), expected.isnan()), name
    error = (rows - expected).abs().nan_to_num()
    scale = expected.abs().nan_to_num().amax(-1, keepdim=True)
    # bf16: the saved mask and the result are rounded, and the interpreter cuts bits off instead
    tolerance = 2e-2 if rounded else 1e-5
    assert bool((error <= tolerance * scale + 1e-37).all()), (
        f"{name}: {(error / scale).nan_to_num().max():.1e} of the largest"
    )


def compare(pre_NF, scores_NKU, num_kept_N, weight_NK, act="gelu_new", statistical=False, linear=False):
    """Outputs and gradients of the kernels and of plain operations on the reference's mask."""
    gate_NF = torch.randn_like(pre_NF) if ACTIVATIONS[act][1] else None
    block = pre_NF.shape[1] // scores_NKU.shape[2]
    w2_DF, b2_D = torch.randn(5, pre_NF.shape[1]).to(pre_NF.dtype), torch.randn(5).to(pre_NF.dtype)
    tensors = (pre_NF, scores_NKU, gate_NF, *((w2_DF, b2_D) if linear else ()))
    grad = None
    results = []
    for ours in (True, False):
        leaves = [t.detach().clone().requires_grad_() if t is not None else None for t in tensors]
        pre, scores, gate, *w2 = leaves
        if ours:
            op = kernels.gated_linear if linear else kernels.gated_mask
            args = (*w2, gate) if linear else (gate,)
            out, packed_NKW, weight_out_NK = op(
                pre, scores, num_kept_N, weight_NK, *args, act=act, statistical=statistical
            )
            assert out.dtype == pre.dtype
        else:
            kept_NKU, mask_NU = selection(scores, num_kept_N, weight_NK, statistical)
            out = ACTIVATIONS[act][0](pre.float()) * mask_NU.repeat_interleave(block, dim=-1)
            out = (out * gate.float() if gate is not None else out).to(pre.dtype)
            out = torch.nn.functional.linear(out, *w2) if linear else out
        grad = torch.randn_like(out) if grad is None else grad
        grads = torch.autograd.grad(out, [leaf for leaf in leaves if leaf is not None], grad)
        results.append((out.detach(), *grads))
    for name, mine, theirs in zip(("out", "pre", "scores", "rest", "w2", "b2"), *results, strict=False):
        assert_near(name, mine, theirs, torch.bfloat16 in (pre_NF.dtype, mine.dtype))
    finite_NK = scores_NKU.isfinite().all(-1)
    assert torch.equal(weight_out_NK.isnan(), ~finite_NK)
    assert torch.equal(weight_out_NK[finite_NK], weight_NK[finite_NK])
    kept = unpack(packed_NKW, scores_NKU.shape[2])
    assert kept[~finite_NK].all()
    assert torch.equal(kept[finite_NK], kept_NKU[finite_NK])
    return results[0]


@BOTH
@pytest.mark.parametrize(("K", "U"), [(1, 8), (2, 1), (3, 13), (8, 100), (2, 257), (1, 1500)])
def test_selection_and_gradients_equal_the_reference(K, U, dtype):
    compare(*inputs(2, K, U, dtype))


@pytest.mark.parametrize("act", ACTIVATIONS)
@BOTH
def test_every_activation(act, dtype):
    assert ops.ACTS.keys() == ACTIVATIONS.keys()
    assert ops.ACTS[act][1] == ACTIVATIONS[act][1]
    pre_NF, *rest = inputs(2, 2, 40, dtype)
    pre_NF[0, :9] = torch.tensor([0.0, -0.0, 1e-6, -1e-6, 5.0, -5.0, 30.0, -30.0, 1e4])
    compare(pre_NF, *rest, act=act)


@pytest.mark.parametrize("act", ["gelu_new", "swiglu"])
@BOTH
def test_the_linear_map_behind_it(act, dtype):
    compare(*inputs(4, 2, 33, dtype), act=act, linear=True)


@pytest.mark.parametrize("linear", [False, True])
def test_what_is_kept_for_the_backward(linear):
    """Of full width: pre and the mean mask; with W2 behind, no input of W2."""
    pre_NF, scores_NKU, num_kept_N, weight_NK = inputs(4, 3, 64)
    pre_NF.requires_grad_(), scores_NKU.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        if linear:
            w2_DF = torch.randn(7, 64, requires_grad=True)
            kernels.gated_linear(pre_NF, scores_NKU, num_kept_N, weight_NK, w2_DF, None, act="gelu")
        else:
            kernels.gated_mask(pre_NF, scores_NKU, num_kept_N, weight_NK, act="gelu")
    weights = 7 * 64 * 4 if linear else 0
    assert sum(t.nbytes for t in saved) == 2 * pre_NF.nbytes + 4 * 3 * 8 + 4 * 3 * 4 + weights


@pytest.mark.parametrize("scores_dtype", DTYPES)
@pytest.mark.parametrize("block", [1, 4])
def test_scores_of_blocks_of_neurons(block, scores_dtype):
    compare(*inputs(3, 2, 20, scores_dtype=scores_dtype, block=block))
    compare(*inputs(3, 2, 20, torch.bfloat16, scores_dtype, block=block), act="geglu")


@pytest.mark.parametrize("scores_dtype", DTYPES)
def test_ties_zeros_and_extremes(scores_dtype):
    pre_NF, _, num_kept_N, weight_NK = inputs(8, 2, 70)
    scores = torch.randn(8, 2, 70)
    scores[0] = (scores[0] * 2).round()
    scores[1] = scores[1].sign() * 0.0  # zeros of both signs are equal
    scores[2] = torch.where(scores[2] > 0, scores[2], 0.0)
    scores[3] = 1.0 + torch.randint(0, 3, (2, 70)) * 2.0**-23
    scores[4, :, 0] = 3e38
    scores[4, :, 1] = -3e38
    # subnormal, which the interpreter reads as 0 from bfloat16
    scores[5] = scores[5] * (1e-40 if scores_dtype == torch.float32 else 1e-36)
    scores[6] = torch.exp(8 * scores[6])
    scores[7] = -torch.exp(8 * scores[7])
    for n in (1, 18, 70):
        compare(pre_NF, scores.to(scores_dtype), num_kept_N.fill_(n), weight_NK)


@pytest.mark.parametrize("value", [0.0, -1.5, 0.1, 3.3e38])
@pytest.mark.parametrize("statistical", [False, True])
def test_rows_of_equal_scores_are_kept_whole(value, statistical):
    scores_NKU = torch.full((2, 2, 27), value)
    num_kept_N, weight_NK = torch.tensor([1, 9], dtype=torch.int32), torch.full((2, 2), 0.5)
    mask_NU, packed_NKW, _ = kernels.mean_mask(scores_NKU, num_kept_N, weight_NK, statistical=statistical)
    assert unpack(packed_NKW, 27).all()
    torch.testing.assert_close(mask_NU, scores_NKU[:, 0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("statistical", [False, True])
def test_a_divergence_shows_in_its_token_and_nowhere_else(bad, statistical):
    pre_NF, scores_NKU, num_kept_N, _ = inputs(3, 2, 50)
    num_kept_N.fill_(10)
    weight_NK = torch.tensor([[0.5, 0.5], [0.5, 0.5], [1.0, 0.0]])
    scores_NKU[1, 0, 7] = bad
    scores_NKU[2, 1, :] = bad  # without weight, but a divergence all the same
    pre_NF.requires_grad_(), scores_NKU.requires_grad_()
    out, packed, weight = kernels.gated_mask(
        pre_NF, scores_NKU, num_kept_N, weight_NK, act="relu", statistical=statistical
    )
    out.backward(torch.ones_like(out))
    assert out[1:].isnan().all()
    assert pre_NF.grad[1:].isnan().all()
    assert scores_NKU.grad[1, 0].isnan().all()
    assert scores_NKU.grad[2, 1].isnan().all()
    assert weight.isnan().tolist() == [[False, False], [True, False], [False, True]]
    for clean in (out[0], pre_NF.grad[0], scores_NKU.grad[0], scores_NKU.grad[1, 1], scores_NKU.grad[2, 0]):
        assert clean.isfinite().all()
    assert unpack(packed, 50)[1, 0].all()


def test_samples_without_weight_add_nothing():
    pre_NF, scores_NKU, num_kept_N, _ = inputs(2, 3, 40)
    alone = kernels.gated_mask(pre_NF, scores_NKU[:, :1], num_kept_N, torch.ones(2, 1), act="silu")[0]
    weight_NK = torch.tensor([[1.0, 0.0, 0.0]] * 2)
    scores_NKU.requires_grad_()
    padded = kernels.gated_mask(pre_NF, scores_NKU, num_kept_N, weight_NK, act="silu")[0]
    assert torch.equal(padded, alone)
    padded.sum().backward()
    assert not scores_NKU.grad[:, 1:].any()


@BOTH
def test_statistical_selection(dtype):
    """Against the formula, units at the threshold itself aside."""
    pre_NF, scores_NKU, num_kept_N, weight_NK = inputs(6, 2, 600, dtype)
    num_kept_N[:] = torch.tensor([1, 20, 150, 300, 599, 600])
    compare(pre_NF, scores_NKU, num_kept_N, weight_NK, statistical=True)


def test_the_normal_quantile():
    """Through the threshold: on U = 16384 evenly spaced scores the count tells the quantile to 1e-4."""
    U = 16384
    scores = torch.linspace(-1, 1, U).expand(5, 1, U)
    num_kept_N = torch.tensor([5000, 3, 8192, 9000, 16000], dtype=torch.int32)
    _, packed, _ = kernels.mean_mask(scores, num_kept_N, torch.ones(5, 1), statistical=True)
    normal = torch.distributions.Normal(0.0, 1.0)
    std = torch.linspace(-1, 1, U).double().std(correction=0)
    threshold = normal.icdf(1 - num_kept_N.double() / U) * std
    expected = (torch.linspace(-1, 1, U).double() >= threshold[:, None]).sum(-1)
    assert ((unpack(packed, U)[:, 0].sum(-1) - expected).abs() <= 1).all()


@pytest.mark.parametrize("mask_dtype", DTYPES)
def test_the_mean_mask_alone(mask_dtype):
    _, scores_NKU, num_kept_N, weight_NK = inputs(4, 3, 61)
    leaf, other = scores_NKU.clone().requires_grad_(), scores_NKU.clone().requires_grad_()
    mask_NU, packed_NKW, _ = kernels.mean_mask(leaf, num_kept_N, weight_NK, dtype=mask_dtype)
    kept, expected = selection(other, num_kept_N, weight_NK)
    assert mask_NU.dtype == mask_dtype
    torch.testing.assert_close(
        mask_NU, expected.to(mask_dtype), rtol=1e-6 if mask_dtype == torch.float32 else 0.01, atol=1e-6
    )
    assert torch.equal(unpack(packed_NKW, 61), kept)
    grad = torch.randn(4, 61).to(mask_dtype)
    mask_NU.backward(grad)
    expected.backward(grad.float())
    torch.testing.assert_close(leaf.grad, other.grad)


def test_inputs_may_be_strided_or_empty():
    pre_NF, scores_NKU, num_kept_N, weight_NK = inputs(4, 2, 24)
    compare(pre_NF.T.contiguous().T, scores_NKU.transpose(0, 1).contiguous().transpose(0, 1), num_kept_N, weight_NK)
    compare(pre_NF, scores_NKU, num_kept_N, torch.full((1, 1), 0.5).expand(4, 2))
    gated, packed, weight = kernels.gated_mask(pre_NF[:0], scores_NKU[:0], num_kept_N[:0], weight_NK[:0], act="gelu")
    assert gated.shape == (0, 24)
    assert packed.shape == (0, 2, 3)
    assert weight.shape == (0, 2)


def test_bad_inputs_are_refused():
    pre_NF, scores_NKU, num_kept_N, weight_NK = inputs(2, 2, 16)
    with pytest.raises(ValueError, match="gate_NF given"):
        kernels.gated_mask(pre_NF, scores_NKU, num_kept_N, weight_NK, act="swiglu")
    with pytest.raises(ValueError, match="unknown hidden_act"):
        kernels.gated_mask(pre_NF, scores_NKU, num_kept_N, weight_NK, act="gelu_old")
    with pytest.raises(ValueError, match="num_kept_N"):
        kernels.gated_mask(pre_NF, scores_NKU, num_kept_N[:1], weight_NK, act="gelu")
    with pytest.raises(ValueError, match="dtype"):
        kernels.mean_mask(scores_NKU, num_kept_N.long(), weight_NK)
    with pytest.raises(ValueError, match="16384 units"):
        kernels.mean_mask(torch.zeros(1, 1, 16385), num_kept_N[:1], torch.ones(1, 1))


def dense(x_ND, mask_NF, w1_FD, b1_F, w2t_FD, b2_D, w3_FD, b3_F, act):
    h_NF = ACTIVATIONS[act][0](x_ND.double() @ w1_FD.double().T + b1_F.double())
    if w3_FD is not None:
        h_NF = h_NF * (x_ND.double() @ w3_FD.double().T + b3_F.double())
    return (h_NF * mask_NF.double()) @ w2t_FD.double() + b2_D.double()


@BOTH
@pytest.mark.parametrize(
    ("N", "D", "F", "act"),
    [(1, 16, 64, "gelu_new"), (2, 50, 129, "swiglu"), (2, 1, 1, "relu"), (1, 200, 150, "geglu"), (12, 3, 9, "silu")],
)
def test_sparse_decoding_equals_the_dense_formula(N, D, F, act, dtype):
    x, w1, w2t, w3 = (torch.randn(s).to(dtype) for s in ((N, D), (F, D), (F, D), (F, D)))
    b1, b2, b3 = (torch.randn(s).to(dtype) for s in (F, D, F))
    gate = (w3, b3) if ACTIVATIONS[act][1] else (None, None)
    mask = torch.randn(N, F) * (torch.rand(N, F) < 0.3)
    y = kernels.sparse_ffn(x, mask, w1, b1, w2t, b2, *gate, act=act)
    assert y.dtype == dtype
    expected = dense(x, mask, w1, b1, w2t, b2, *gate, act)
    scale = expected.abs().max().item()
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=scale * (1e-5 if dtype == torch.float32 else 8e-3))
    assert torch.equal(y, kernels.sparse_ffn(x, mask, w1, b1, w2t, b2, *gate, act=act))


def test_sparse_decoding_reads_active_rows_alone():
    """Rows of NaN that no mask asks for do not show; a mask that is NaN does."""
    N, D, F = 2, 20, 70
    mask = torch.zeros(N, F)
    mask[0, ::7] = 1.0
    w1, w2t = torch.randn(F, D), torch.randn(F, D)
    inactive = torch.arange(F) % 7 != 0
    w1[inactive], w2t[inactive] = math.nan, math.nan
    b1, b2 = torch.randn(F), torch.randn(D)
    x = torch.randn(N, D)
    y = kernels.sparse_ffn(x, mask, w1, b1, w2t, b2, act="gelu")
    assert y[0].isfinite().all()
    assert torch.equal(y[1], b2)  # no neuron is active
    mask[0, 0] = math.nan
    y = kernels.sparse_ffn(x, mask, w1, b1, w2t, b2, act="gelu")
    assert y[0].isnan().all()
    assert kernels.sparse_ffn(x[:0], mask[:0], w1, b1, w2t, b2, act="gelu").shape == (0, D)


# Interpreted kernels cannot be traced; test_triton.py traces them.
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def test_the_operators_are_lawful():
    pre_NF, scores_NKU, num_kept_N, weight_NK = inputs(3, 2, 16)
    pre_NF.requires_grad_(), scores_NKU.requires_grad_()
    gate_NF = torch.randn(3, 16, requires_grad=True)
    w2_DF = torch.randn(4, 16, requires_grad=True)
    rest = (scores_NKU, num_kept_N, weight_NK)
    check = torch.library.opcheck
    check(ops._gated_mask, (pre_NF, gate_NF, *rest, "silu", False, True), test_utils=OPCHECKS)
    check(ops._gated_linear, (pre_NF, None, *rest, w2_DF, None, "gelu", False, True), test_utils=OPCHECKS)
    check(ops._mean_mask, (*rest, True, torch.float32), test_utils=OPCHECKS)
    x_ND, w_FD = torch.randn(2, 4), torch.randn(16, 4)
    args = (x_ND, torch.rand(2, 16), w_FD, torch.randn(16), None, None, w_FD, torch.randn(4), "relu")
    check(ops._sparse_ffn, args, test_utils=OPCHECKS)


def test_the_check_of_a_gpu_runs_on_tiny_shapes():
    rows = gpu.check_kernels(torch.device("cpu"), geometries=((1, 2, 9, 8),))
    assert rows
    assert all(row["max_error"] <= row["tolerance"] for row in rows), rows


@pytest.mark.parametrize("options", [{}, {"hidden_act": "swiglu"}, {"block_size": 4}, {"selection": "statistical"}])
def test_a_layer_on_triton_equals_the_plain_path(options, monkeypatch):
    layer = InfinityFFN(16, 48, z_dim=8, initializer_range=0.2, **options)
    x = torch.randn(2, 3, 16)
    dials = {"num_samples": (1, 2), "keep_ratio": (0.5, 0.25), "key": NoiseKey(seed=1)}
    results = []
    for backend in ("eager", "triton"):
        monkeypatch.setattr(dispatch, "resolve", lambda *_, name=backend, **__: name)
        layer.zero_grad()
        out = layer(x, Routing(**dials))
        out.y_BTD.square().sum().backward()
        results.append((out.y_BTD.detach(), [p.grad for p in layer.parameters()], out.stats))
    flat = [(y, *gradients, *stats) for y, gradients, stats in results]
    for theirs, ours in zip(*flat, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
