"""Registered operators over the Triton kernels, and the functions that the layer calls.

N tokens, K samples, U units (neurons, or blocks of neurons), F neurons (a multiple of U), D model width,
W = ceil(U / 8) packed bytes.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.library import triton_op

from infmoe.errors import unknown_name
from infmoe.ops.triton.kernels import (
    compact_kernel,
    select_backward_kernel,
    select_kernel,
    sparse_ffn_kernel,
    sum_splits_kernel,
)
from infmoe.ops.triton.launch import wrap_triton

# `layers.activations.ACTIVATIONS` here: name -> (function in the kernels, gated)
ACTS = {
    "gelu": ("gelu", False),
    "gelu_new": ("gelu_new", False),
    "relu": ("relu", False),
    "silu": ("silu", False),
    "swiglu": ("silu", True),
    "geglu": ("gelu", True),
}

MAX_UNITS = 16384  # a row lives in the registers of one program, of at most 512 threads

# 32 units of a row, and of the mask, in each thread. ptxas would take 163 registers, of which an SM has enough for
# one program of 6144 units; with 128 it spills nothing (results/triton_aot.json) and two fit: one loads while the
# other searches.
_UNITS_PER_THREAD = 32
_MAX_REGISTERS = 128

# Programs of a decoding step, all tokens together: about two for each SM of an H100 (132) or A100 (108). Fixed, so
# that the order of the sums, and so the result, is the same on every device.
_DECODE_PROGRAMS = 256
# What one program of a decoding step has in flight of each matrix. Two matrices of it cover HBM's latency at full
# bandwidth (3.35 TB/s x 0.8 us = 20 KiB per SM).
_DECODE_TILE_BYTES = 16384


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return tensor.contiguous() if tensor is not None else None


def _key_shift(scores: Tensor) -> int:
    """Low bits that float32 has and the scores' dtype has not."""
    return 16 if scores.dtype == torch.bfloat16 else 0


def _select(
    scores_NKU: Tensor,
    num_kept_N: Tensor,
    weight_NK: Tensor,
    pre_NF: Tensor | None,
    gate_NF: Tensor | None,
    act: str,
    statistical: bool,
    mask_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One launch of `select_kernel`; outputs that were not asked for have no elements."""
    N, K, U = scores_NKU.shape
    scores_NKU, num_kept_N, weight_NK = scores_NKU.contiguous(), num_kept_N.contiguous(), weight_NK.contiguous()
    pre_NF, gate_NF = _contiguous(pre_NF), _contiguous(gate_NF)
    U = int(U)  # never a symbol: tiles are constants of the kernel
    tile_bytes = triton.next_power_of_2(triton.cdiv(U, 8))  # the whole row
    gated_NF = torch.empty_like(pre_NF) if pre_NF is not None else scores_NKU.new_empty(0)
    mask_NU = scores_NKU.new_empty((N, U) if mask_dtype else 0, dtype=mask_dtype)
    packed_NKW = scores_NKU.new_empty((N, K, triton.cdiv(U, 8)), dtype=torch.uint8)
    weight_out_NK = torch.empty_like(weight_NK)
    wrap_triton(select_kernel)[(N,)](
        scores_NKU,
        num_kept_N,
        weight_NK,
        pre_NF if pre_NF is not None else scores_NKU,
        gate_NF if gate_NF is not None else scores_NKU,
        gated_NF,
        mask_NU,
        packed_NKW,
        weight_out_NK,
        K,
        U,
        ACT=act,
        HAS_PRE=pre_NF is not None,
        HAS_GATE=gate_NF is not None,
        HAS_MASK=mask_dtype is not None,
        STATISTICAL=statistical,
        BLOCK=pre_NF.shape[1] // U if pre_NF is not None else 1,
        SHIFT=_key_shift(scores_NKU),
        TILE_W=tile_bytes,
        num_warps=max(1, tile_bytes * 8 // (32 * _UNITS_PER_THREAD)),
        maxnreg=_MAX_REGISTERS,
    )
    return gated_NF, mask_NU, packed_NKW, weight_out_NK


@triton_op("infmoe::triton_gated_mask", mutates_args=())
def _gated_mask(
    pre_NF: Tensor,
    gate_NF: Tensor | None,
    scores_NKU: Tensor,
    num_kept_N: Tensor,
    weight_NK: Tensor,
    act: str,
    statistical: bool,
    save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mask_dtype = pre_NF.dtype if save_mask else None
    return _select(scores_NKU, num_kept_N, weight_NK, pre_NF, gate_NF, act, statistical, mask_dtype)


@triton_op("infmoe::triton_gated_linear", mutates_args=())
def _gated_linear(
    pre_NF: Tensor,
    gate_NF: Tensor | None,
    scores_NKU: Tensor,
    num_kept_N: Tensor,
    weight_NK: Tensor,
    w2_DF: Tensor,
    b2_D: Tensor | None,
    act: str,
    statistical: bool,
    save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mask_dtype = pre_NF.dtype if save_mask else None
    gated_NF, mask_NU, packed_NKW, weight_out_NK = _select(
        scores_NKU, num_kept_N, weight_NK, pre_NF, gate_NF, act, statistical, mask_dtype
    )
    return F.linear(gated_NF, w2_DF, b2_D), mask_NU, packed_NKW, weight_out_NK


@triton_op("infmoe::triton_mean_mask", mutates_args=())
def _mean_mask(
    scores_NKU: Tensor, num_kept_N: Tensor, weight_NK: Tensor, statistical: bool, mask_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return _select(scores_NKU, num_kept_N, weight_NK, None, None, "", statistical, mask_dtype)[1:]


@triton_op("infmoe::triton_select_backward", mutates_args=())
def _select_backward(
    grad_NF: Tensor,
    pre_NF: Tensor | None,
    gate_NF: Tensor | None,
    mask_NU: Tensor | None,
    packed_NKW: Tensor,
    weight_NK: Tensor,
    act: str,
    num_units: int,
    scores_dtype: torch.dtype,
    want_gated: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the pre-activations, of the gate and of the scores, and the gated activations once more.

    What there is no input for, or no wish, has no elements. Without `pre` the gradient that comes in is the mask's.
    """
    N, K, num_bytes = packed_NKW.shape[0], packed_NKW.shape[1], int(packed_NKW.shape[2])
    grad_NF = grad_NF.contiguous()
    pre_NF, gate_NF = _contiguous(pre_NF), _contiguous(gate_NF)
    grad_pre_NF = torch.empty_like(pre_NF) if pre_NF is not None else grad_NF.new_empty(0)
    grad_gate_NF = torch.empty_like(gate_NF) if gate_NF is not None else grad_NF.new_empty(0)
    gated_NF = torch.empty_like(pre_NF) if pre_NF is not None and want_gated else grad_NF.new_empty(0)
    grad_scores_NKU = grad_NF.new_empty((N, K, num_units), dtype=scores_dtype)
    # 8 units a thread: one vector of 16 bytes of each of the bf16 tensors
    tile_bytes = min(128, triton.next_power_of_2(num_bytes))
    wrap_triton(select_backward_kernel)[(N, triton.cdiv(num_bytes, tile_bytes))](
        grad_NF,
        pre_NF if pre_NF is not None else grad_NF,
        gate_NF if gate_NF is not None else grad_NF,
        mask_NU if mask_NU is not None else grad_NF,
        packed_NKW,
        weight_NK,
        grad_pre_NF,
        grad_gate_NF,
        gated_NF,
        grad_scores_NKU,
        K,
        num_units,
        ACT=act,
        HAS_PRE=pre_NF is not None,
        HAS_GATE=gate_NF is not None,
        WANT_GATED=want_gated,
        BLOCK=pre_NF.shape[1] // num_units if pre_NF is not None else 1,
        TILE_W=tile_bytes,
        num_warps=max(1, tile_bytes // 32),
    )
    return grad_pre_NF, grad_gate_NF, grad_scores_NKU, gated_NF


def _save(ctx: Any, scores_NKU: Tensor, output: tuple, *tensors: Tensor | None) -> None:
    ctx.mark_non_differentiable(*output)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.num_units, ctx.scores_dtype = scores_NKU.shape[2], scores_NKU.dtype


def _gated_mask_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    pre_NF, gate_NF, scores_NKU, _, _, ctx.act, _, save_mask = inputs
    assert save_mask, "a gradient needs save_mask=True"
    _save(ctx, scores_NKU, output[1:], pre_NF, gate_NF, *output[1:])


def _gated_mask_backward(ctx: Any, grad_NF: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_NF is None:
        return (None,) * 8
    saved = ctx.saved_tensors
    grad_pre_NF, grad_gate_NF, grad_scores_NKU, _gated = _select_backward(
        grad_NF, *saved, ctx.act, ctx.num_units, ctx.scores_dtype, False
    )
    return grad_pre_NF, None if saved[1] is None else grad_gate_NF, grad_scores_NKU, *(None,) * 5


def _gated_linear_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    pre_NF, gate_NF, scores_NKU, _, _, w2_DF, b2_D, ctx.act, _, save_mask = inputs
    assert save_mask, "a gradient needs save_mask=True"
    ctx.has_bias = b2_D is not None
    _save(ctx, scores_NKU, output[1:], w2_DF, pre_NF, gate_NF, *output[1:])


def _gated_linear_backward(ctx: Any, grad_ND: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_ND is None:
        return (None,) * 10
    w2_DF, *saved = ctx.saved_tensors
    needs_w2, needs_b2 = ctx.needs_input_grad[5], ctx.has_bias and ctx.needs_input_grad[6]
    grad_pre_NF, grad_gate_NF, grad_scores_NKU, gated_NF = _select_backward(
        grad_ND @ w2_DF, *saved, ctx.act, ctx.num_units, ctx.scores_dtype, needs_w2
    )
    return (
        grad_pre_NF,
        None if saved[1] is None else grad_gate_NF,
        grad_scores_NKU,
        None,
        None,
        grad_ND.T @ gated_NF if needs_w2 else None,
        grad_ND.sum(0) if needs_b2 else None,
        *(None,) * 3,
    )


def _mean_mask_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    _save(ctx, inputs[0], output[1:], *output[1:])


def _mean_mask_backward(ctx: Any, grad_NU: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_NU is None:
        return (None,) * 5
    grad_scores_NKU = _select_backward(
        grad_NU, None, None, None, *ctx.saved_tensors, "", ctx.num_units, ctx.scores_dtype, False
    )[2]
    return grad_scores_NKU, *(None,) * 4


_gated_mask.register_autograd(_gated_mask_backward, setup_context=_gated_mask_context)
_gated_linear.register_autograd(_gated_linear_backward, setup_context=_gated_linear_context)
_mean_mask.register_autograd(_mean_mask_backward, setup_context=_mean_mask_context)


@triton_op("infmoe::triton_sparse_ffn", mutates_args=())
def _sparse_ffn(
    x_ND: Tensor,
    mask_NF: Tensor,
    w1_FD: Tensor,
    b1_F: Tensor,
    w3_FD: Tensor | None,
    b3_F: Tensor | None,
    w2t_FD: Tensor,
    b2_D: Tensor,
    act: str,
) -> Tensor:
    N, D, num_neurons = x_ND.shape[0], int(x_ND.shape[1]), int(mask_NF.shape[1])
    x_ND, mask_NF = x_ND.contiguous(), mask_NF.contiguous()
    active_NF = mask_NF.new_empty((N, num_neurons), dtype=torch.int32)
    num_active_N = mask_NF.new_empty((N,), dtype=torch.int32)
    wrap_triton(compact_kernel)[(N,)](
        mask_NF,
        active_NF,
        num_active_N,
        num_neurons,
        TILE_F=min(4096, triton.next_power_of_2(num_neurons)),
        num_warps=8,
    )
    tile_width = triton.next_power_of_2(D)
    tile_rows = max(1, min(16, _DECODE_TILE_BYTES // (tile_width * w1_FD.element_size())))
    most = min(_DECODE_PROGRAMS, triton.next_power_of_2(triton.cdiv(num_neurons, tile_rows)))
    # by comparison alone: under dynamic shapes N is a symbol
    splits = next((s for s in (256, 128, 64, 32, 16, 8, 4, 2) if s <= most and s * N <= _DECODE_PROGRAMS), 1)
    partial_NSD = x_ND.new_empty((N, splits, D), dtype=torch.float32)
    wrap_triton(sparse_ffn_kernel)[(N, splits)](
        x_ND,
        mask_NF,
        active_NF,
        num_active_N,
        w1_FD,
        b1_F,
        w3_FD if w3_FD is not None else w1_FD,
        b3_F if b3_F is not None else b1_F,
        w2t_FD,
        partial_NSD,
        num_neurons,
        D,
        ACT=act,
        HAS_GATE=w3_FD is not None,
        SPLITS=splits,
        TILE_R=tile_rows,
        TILE_D=tile_width,
        num_warps=min(8, max(1, tile_rows * tile_width // 1024)),
    )
    y_ND = torch.empty_like(x_ND)
    wrap_triton(sum_splits_kernel)[(N, triton.cdiv(D, 16))](
        partial_NSD, b2_D, y_ND, D, SPLITS=splits, TILE_D=16, num_warps=4
    )
    return y_ND


def gated_mask(
    pre_NF: Tensor,
    scores_NKU: Tensor,
    num_kept_N: Tensor,
    weight_NK: Tensor,
    gate_NF: Tensor | None = None,
    *,
    act: str,
    statistical: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Act(pre) [* gate] times the mean mask over the K samples (Eq. 6 and 7), in one pass over the scores.

    For the backward it keeps pre, gate, the mean mask in their dtype, and the packed bits; not the scores.

    Args:
        pre_NF: W1 x, float32 or bfloat16.
        scores_NKU: W_z z, float32 or bfloat16, U at most `MAX_UNITS`.
        num_kept_N: int32, how many units a row keeps, in [1, U].
        weight_NK: float32, each sample's weight in the mean; 0 beyond a token's own K. No gradient.
        gate_NF: W3 x, in pre's dtype, for "swiglu" and "geglu" alone.
        act: a name from `ACTS`.
        statistical: keep the scores >= mean + std * Phi^-1(1 - num_kept / U) instead of the num_kept largest and
            their ties.

    Returns:
        gated_NF: in pre's dtype; carries gradient to pre, gate and the kept scores.
        packed_NKW: uint8, bit j of byte w tells whether unit 8w + j is kept; a row that is not finite keeps all.
        weight_NK: NaN where the row of scores holds NaN or infinity, so that outputs and gradients are; else as
            given.
    """
    kernel_act, save_mask = _check_gated(pre_NF, scores_NKU, num_kept_N, weight_NK, gate_NF, act)
    gated_NF, _, packed_NKW, weight_out_NK = _gated_mask(
        pre_NF, gate_NF, scores_NKU, num_kept_N, weight_NK.detach(), kernel_act, statistical, save_mask
    )
    return gated_NF, packed_NKW, weight_out_NK


def gated_linear(
    pre_NF: Tensor,
    scores_NKU: Tensor,
    num_kept_N: Tensor,
    weight_NK: Tensor,
    w2_DF: Tensor,
    b2_D: Tensor | None,
    gate_NF: Tensor | None = None,
    *,
    act: str,
    statistical: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """W2 of `gated_mask`, which keeps pre (and gate) and the mean mask for the backward, and not W2's input.

    That is what a dense FFN keeps: the backward makes W2's input again in the pass that reads pre and mask anyway.

    Args:
        pre_NF, scores_NKU, num_kept_N, weight_NK, gate_NF, act, statistical: see `gated_mask`.
        w2_DF, b2_D: W2 and its bias, in pre's dtype.

    Returns:
        y_ND, and packed_NKW and weight_NK as `gated_mask` returns them.
    """
    kernel_act, save_mask = _check_gated(pre_NF, scores_NKU, num_kept_N, weight_NK, gate_NF, act, w2_DF, b2_D)
    y_ND, _, packed_NKW, weight_out_NK = _gated_linear(
        pre_NF, gate_NF, scores_NKU, num_kept_N, weight_NK.detach(), w2_DF, b2_D, kernel_act, statistical, save_mask
    )
    return y_ND, packed_NKW, weight_out_NK


def mean_mask(
    scores_NKU: Tensor,
    num_kept_N: Tensor,
    weight_NK: Tensor,
    *,
    statistical: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean mask alone, for `sparse_ffn`.

    Returns:
        mask_NU: of `dtype`; carries gradient to the kept scores.
        packed_NKW, weight_NK: as `gated_mask` returns them.
    """
    _check_scores(scores_NKU, num_kept_N, weight_NK)
    return _mean_mask(scores_NKU, num_kept_N, weight_NK.detach(), statistical, dtype)


def sparse_ffn(
    x_ND: Tensor,
    mask_NF: Tensor,
    w1_FD: Tensor,
    b1_F: Tensor,
    w2t_FD: Tensor,
    b2_D: Tensor,
    w3_FD: Tensor | None = None,
    b3_F: Tensor | None = None,
    *,
    act: str,
) -> Tensor:
    """W2 (Act(W1 x) [* (W3 x)] * mask) for few tokens: neurons whose mask is 0 are not read. No gradient.

    Products and sums are float32, in an order that depends on shapes and mask alone.

    Args:
        x_ND: float32 or bfloat16.
        mask_NF: float32.
        w1_FD, w3_FD, w2t_FD: one row per neuron (W2 transposed), contiguous; float32 or bfloat16.
        b1_F, b3_F, b2_D: biases.
        act: a name from `ACTIVATIONS`.

    Returns:
        y_ND, in x's dtype.
    """
    kernel_act, gated = _act(act)
    _check("w3_FD and b3_F given", (w3_FD is not None, b3_F is not None), (gated, gated))
    shape_FD = (mask_NF.shape[1], x_ND.shape[1])
    for name, weight_FD in (("w1_FD", w1_FD), ("w2t_FD", w2t_FD), ("w3_FD", w3_FD)):
        if weight_FD is not None:
            _check(f"{name}'s shape", tuple(weight_FD.shape), shape_FD)
            _check(f"{name} contiguous", weight_FD.is_contiguous(), True)
    tensors = (x_ND, mask_NF, w1_FD, b1_F, w3_FD, b3_F, w2t_FD, b2_D)
    return _sparse_ffn(*(t.detach() if t is not None else None for t in tensors), kernel_act)


def _act(name: str) -> tuple[str, bool]:
    if name not in ACTS:
        raise unknown_name("hidden_act", name, ACTS)
    return ACTS[name]


def _check_gated(
    pre_NF: Tensor,
    scores_NKU: Tensor,
    num_kept_N: Tensor,
    weight_NK: Tensor,
    gate_NF: Tensor | None,
    act: str,
    *linear: Tensor | None,
) -> tuple[str, bool]:
    """The kernels' name of the activation, and whether a backward may come."""
    kernel_act, gated = _act(act)
    _check_scores(scores_NKU, num_kept_N, weight_NK)
    _check("gate_NF given", gate_NF is not None, gated)
    _check("tokens of pre_NF", pre_NF.shape[0], scores_NKU.shape[0])
    _check("neurons of pre_NF beyond whole units", pre_NF.shape[1] % scores_NKU.shape[2], 0)
    if gate_NF is not None:
        _check("gate_NF's shape", gate_NF.shape, pre_NF.shape)
    for tensor in (gate_NF, *linear):
        _check("dtype beside pre_NF", pre_NF.dtype if tensor is None else tensor.dtype, pre_NF.dtype)
    inputs = (pre_NF, gate_NF, scores_NKU, *linear)
    return kernel_act, torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)


def _check_scores(scores_NKU: Tensor, num_kept_N: Tensor, weight_NK: Tensor) -> None:
    N, K, U = scores_NKU.shape
    _check("num_kept_N's shape", tuple(num_kept_N.shape), (N,))
    _check("weight_NK's shape", tuple(weight_NK.shape), (N, K))
    _check("num_kept_N's and weight_NK's dtype", (num_kept_N.dtype, weight_NK.dtype), (torch.int32, torch.float32))
    if not 1 <= U <= MAX_UNITS:
        raise ValueError(f"the Triton kernels take 1 to {MAX_UNITS} units, got {U}")


def _check(what: str, value: Any, expected: Any) -> None:
    if value != expected:
        raise ValueError(f"{what}: {value}, expected {expected}")
