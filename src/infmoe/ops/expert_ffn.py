"""All experts' feed-forward networks on a CPU, as one operator: a loop over the experts, plain matrix products.

T tokens, k experts per token, N = T * k pairs of the two, E experts, D model width, F neurons per expert; n, the
rows of one expert, which are those of N between ends[e - 1] and ends[e].

`F.grouped_mm` has a slow fallback for bfloat16 on CPUs, and padding, casts, permutations and biases around it
cost as much again. Here torch does the products, and compiled kernels (ops/native/experts.cpp), where there are
any, the rest, while the rows at hand lie in the processor's cache. There the gates enter between the two
products: the output is then a plain sum over k, and the gates' gradient needs no copy of each expert's output.
"""

import os
from collections.abc import Callable, Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from infmoe.ops import native
from infmoe.ops.dispatch import ENVIRONMENT

_aten = torch.ops.aten
_Function = Callable[[Tensor], Tensor]
_Gradient = Callable[[Tensor, Tensor], Tensor]  # of the output, at the input
# The order is that of the compiled kernels' enumeration.
_ACTIVATIONS: dict[str, tuple[_Function, _Gradient]] = {
    "gelu": (F.gelu, lambda grad, z: _aten.gelu_backward(grad, z)),
    "gelu_new": (
        lambda z: F.gelu(z, approximate="tanh"),
        lambda grad, z: _aten.gelu_backward(grad, z, approximate="tanh"),
    ),
    "relu": (F.relu, lambda grad, z: _aten.threshold_backward(grad, z, 0)),
    "silu": (F.silu, lambda grad, z: _aten.silu_backward(grad, z)),
}
_INDEX = {act: i for i, act in enumerate(_ACTIVATIONS)}
_PLAIN_OF_GATED = {"swiglu": "silu", "geglu": "gelu"}


def expert_ffn(
    x_TD: Tensor,
    expert_Tk: Tensor,
    gate_Tk: Tensor,
    w1_EDF: Tensor,
    b1_EF: Tensor,
    w3_EDF: Tensor | None,
    b3_EF: Tensor | None,
    w2_EFD: Tensor,
    b2_D: Tensor,
    *,
    hidden_act: str,
    dtype: torch.dtype,
) -> Tensor:
    """Sum over each token's k experts of gate * expert(x), b2 inside the expert; differentiable once.

    For the backward it keeps what a dense layer keeps: x once per token, two tensors of full width per pair
    (three where gated), and the weights where they had to be cast; without the compiled kernels, also each
    pair's output.

    Args:
        x_TD: tokens.
        expert_Tk: int64, which experts each token runs.
        gate_Tk: their weights.
        w1_EDF, b1_EF, w3_EDF, b3_EF, w2_EFD, b2_D: as in `Experts`; gradients come in their own dtypes.
        hidden_act: a name from `ACTIVATIONS`.
        dtype: what the products are computed in.

    Returns:
        shape (T, D), in `dtype`.
    """
    act = _PLAIN_OF_GATED.get(hidden_act, hidden_act)
    weights = (w1_EDF, b1_EF, w3_EDF, b3_EF, w2_EFD, b2_D)
    return _expert_ffn(x_TD.contiguous(), expert_Tk, gate_Tk, *weights, act, dtype, torch.is_grad_enabled())[0]


@torch.library.custom_op("infmoe::expert_ffn", mutates_args=(), device_types="cpu")
def _expert_ffn(
    x_TD: Tensor,
    expert_Tk: Tensor,
    gate_Tk: Tensor,
    w1_EDF: Tensor,
    b1_EF: Tensor,
    w3_EDF: Tensor | None,
    b3_EF: Tensor | None,
    w2_EFD: Tensor,
    b2_D: Tensor,
    act: str,
    dtype: torch.dtype,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The result, and for the backward: token_N, place_Tk, gate_N, ends_E, h_NF, h3_NF, a_NF, y_ND, x_TD, w1, w3, w2.

    token and gate are sorted by expert, place is where each pair went. With the compiled kernels, h and h3 are
    without their biases, a = gate * act(h + b1) * (h3 + b3), and y is empty; else h and h3 have their biases,
    and gates weigh y. x and the weights are empty where they needed no cast: an operator may not return its
    inputs. What only the backward needs is empty unless `save`.
    """
    compiled, wide = _compiled(dtype, x_TD), _wide(b1_EF, x_TD)
    gate_Tk = gate_Tk.to(wide).contiguous()
    b1, b2 = b1_EF.to(wide).contiguous(), b2_D.to(wide).contiguous()
    b3 = None if b3_EF is None else b3_EF.to(wide).contiguous()
    casts = x_Tc, w1c, w3c, w2c = [_cast(t, dtype) for t in (x_TD, w1_EDF, w3_EDF, w2_EFD)]
    x, w1, w2 = _either(x_Tc, x_TD), _either(w1c, w1_EDF), _either(w2c, w2_EFD)
    w3 = None if w3_EDF is None else _either(w3c, w3_EDF)
    num_pairs, width = expert_Tk.numel(), w1_EDF.shape[2]
    h_NF, a_NF = (x.new_empty(num_pairs if save else 0, width) for _ in range(2))
    h3_NF = x.new_empty(num_pairs if save and w3 is not None else 0, width)
    y_ND = x.new_empty(0 if compiled else num_pairs, x.shape[1])
    if compiled:
        ops = torch.ops.infmoe
        routes = token_N, place_Tk, gate_N, ends_E = ops.experts_sort(expert_Tk.contiguous(), gate_Tk, len(w1))
        y_TD = ops.experts_forward(
            x, token_N, place_Tk, gate_Tk, gate_N, ends_E, w1, b1, w3, b3, w2, b2, _INDEX[act], h_NF, h3_NF, a_NF
        )
    else:
        routes = token_N, place_Tk, gate_N, ends_E = _sort(expert_Tk, gate_Tk, len(w1))
        function, _ = _ACTIVATIONS[act]
        for e, rows in _row_groups(ends_E):
            x_nD = x.index_select(0, token_N[rows])
            h_nF = torch.mm(x_nD, w1[e], out=h_NF[rows]) if save else x_nD @ w1[e]
            a_nF = function(h_nF.add_(b1[e]))
            if w3 is not None and b3 is not None:
                h3_nF = torch.mm(x_nD, w3[e], out=h3_NF[rows]) if save else x_nD @ w3[e]
                a_nF *= h3_nF.add_(b3[e])
            if save:
                a_NF[rows] = a_nF
            torch.mm(a_nF, w2[e], out=y_ND[rows])
        y_TD = _sum_over_k(y_ND, place_Tk, gate_Tk).addr_(gate_Tk.sum(1), b2).to(dtype)
    if not save:
        y_ND, casts = y_ND[:0].clone(), [t.new_empty(0) for t in casts]
    return y_TD, *routes, h_NF, h3_NF, a_NF, y_ND, *casts


@_expert_ffn.register_fake
def _(x_TD, expert_Tk, gate_Tk, w1_EDF, b1_EF, w3_EDF, b3_EF, w2_EFD, b2_D, act, dtype, save):
    num_experts, _, width = w1_EDF.shape
    num_pairs = expert_Tk.numel()
    routes = (
        expert_Tk.new_empty(num_pairs),
        expert_Tk.new_empty(expert_Tk.shape),
        gate_Tk.new_empty(num_pairs, dtype=_wide(b1_EF, x_TD)),
        expert_Tk.new_empty(num_experts),
    )
    h_NF, a_NF = (x_TD.new_empty(num_pairs if save else 0, width, dtype=dtype) for _ in range(2))
    h3_NF = x_TD.new_empty(num_pairs if save and w3_EDF is not None else 0, width, dtype=dtype)
    casts = (
        x_TD.new_empty(t.shape if save and t is not None and t.dtype != dtype else 0, dtype=dtype)
        for t in (x_TD, w1_EDF, w3_EDF, w2_EFD)
    )
    kept_rows = 0 if _compiled(dtype, x_TD) or not save else num_pairs
    y_ND = x_TD.new_empty(kept_rows, x_TD.shape[1], dtype=dtype)
    return x_TD.new_empty(x_TD.shape, dtype=dtype), *routes, h_NF, h3_NF, a_NF, y_ND, *casts


@torch.library.custom_op("infmoe::expert_ffn_backward", mutates_args=(), device_types="cpu")
def _expert_ffn_backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    gate_Tk: Tensor,
    w1_EDF: Tensor,
    b1_EF: Tensor,
    w3_EDF: Tensor | None,
    b3_EF: Tensor | None,
    w2_EFD: Tensor,
    b2_D: Tensor,
    token_N: Tensor,
    place_Tk: Tensor,
    gate_N: Tensor,
    ends_E: Tensor,
    h_NF: Tensor,
    h3_NF: Tensor,
    a_NF: Tensor,
    y_ND: Tensor,
    x_Tc: Tensor,
    w1c: Tensor,
    w3c: Tensor,
    w2c: Tensor,
    act: str,
    need_x: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, gate, w1, b1, w3, b3, w2, b2; empty where there is none or none is needed."""
    x, w1, w2 = _either(x_Tc, x_TD), _either(w1c, w1_EDF), _either(w2c, w2_EFD)
    w3 = None if w3_EDF is None else _either(w3c, w3_EDF)
    wide = gate_N.dtype
    b1, b2 = b1_EF.to(wide).contiguous(), b2_D.to(wide).contiguous()
    b3 = None if b3_EF is None else b3_EF.to(wide).contiguous()
    grad_TD, wide_gate_Tk = grad_TD.contiguous(), gate_Tk.to(wide).contiguous()
    grads = _empty_grads(x_TD, gate_Tk, w1_EDF, b1_EF, w3_EDF, b3_EF, w2_EFD, b2_D, wide, need_x, need_weights)
    grad_x, grad_gate, grad_w1, grad_b1, grad_w3, grad_b3, grad_w2, grad_b2 = grads
    if len(y_ND) < len(token_N):  # as the forward pass went, whatever the environment says by now
        torch.ops.infmoe.experts_backward(
            grad_TD, x, token_N, place_Tk, wide_gate_Tk, gate_N, ends_E, w1, b1, w3, b3, w2, b2, _INDEX[act],
            h_NF, h3_NF, a_NF, *grads,
        )  # fmt: skip
    else:
        function, gradient = _ACTIVATIONS[act]
        grad_x_ND = x.new_empty(len(token_N) if need_x else 0, x.shape[1])
        grad_gate_N = torch.empty_like(gate_N)
        for e, rows in _row_groups(ends_E):
            h_nF, x_nD = h_NF[rows], x.index_select(0, token_N[rows])
            grad_nD = grad_TD.index_select(0, token_N[rows])
            torch.sum(grad_nD * y_ND[rows], 1, dtype=wide, out=grad_gate_N[rows])
            grad_nD = (grad_nD * gate_N[rows, None]).to(x.dtype)
            if need_weights:
                grad_w2[e] = a_NF[rows].T @ grad_nD
            grad_h_nF = grad_nD @ w2[e].T
            if w3 is not None:
                grad_h3_nF = grad_h_nF * function(h_nF)
                torch.sum(grad_h3_nF, 0, dtype=wide, out=grad_b3[e])
                grad_h_nF *= h3_NF[rows]
            grad_h_nF = gradient(grad_h_nF, h_nF)
            torch.sum(grad_h_nF, 0, dtype=wide, out=grad_b1[e])
            if need_x:
                torch.mm(grad_h_nF, w1[e].T, out=grad_x_ND[rows])
                if w3 is not None:
                    grad_x_ND[rows].addmm_(grad_h3_nF, w3[e].T)
            if need_weights:
                grad_w1[e] = x_nD.T @ grad_h_nF
                if w3 is not None:
                    grad_w3[e] = x_nD.T @ grad_h3_nF
        if need_x:
            grad_x.copy_(_sum_over_k(grad_x_ND, place_Tk))
        wide_grad_TD = grad_TD.to(wide)
        torch.mv(wide_grad_TD.T, wide_gate_Tk.sum(1), out=grad_b2)
        torch.add(grad_gate_N[place_Tk], (wide_grad_TD @ b2)[:, None], out=grad_gate)
    return (
        grad_x,
        grad_gate.to(gate_Tk.dtype),
        grad_w1,
        grad_b1.to(b1_EF.dtype),
        grad_w3,
        grad_b3.to(b1_EF.dtype),
        grad_w2,
        grad_b2.to(b2_D.dtype),
    )


@_expert_ffn_backward.register_fake
def _(grad_TD, x, gate, w1, b1, w3, b3, w2, b2, *saved):
    *_, need_x, need_weights = saved
    shapes = _empty_grads(x, gate, w1, b1, w3, b3, w2, b2, x.dtype, need_x, need_weights)
    dtypes = [x.dtype, gate.dtype, w1.dtype, b1.dtype, w1.dtype, b1.dtype, w2.dtype, b2.dtype]
    return tuple(t.new_empty(t.shape, dtype=dtype) for t, dtype in zip(shapes, dtypes, strict=True))


def _save_for_gradient(ctx, inputs, output) -> None:
    x_TD, _, gate_Tk, w1, b1, w3, b3, w2, b2, ctx.act, _, _ = inputs
    ctx.save_for_backward(x_TD, gate_Tk, w1, b1, w3, b3, w2, b2, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradient(ctx, grad_TD: Tensor | None, *_) -> tuple:
    if grad_TD is None:
        return (None,) * 12
    needs = ctx.needs_input_grad
    need_weights = any(needs[i] for i in (3, 5, 7))
    x, *rest = _expert_ffn_backward(grad_TD, *ctx.saved_tensors, ctx.act, needs[0], need_weights)
    grads = (g if need else None for g, need in zip((x, None, *rest), needs, strict=False))
    return *grads, None, None, None


_expert_ffn.register_autograd(_gradient, setup_context=_save_for_gradient)


def _compiled(dtype: torch.dtype, x_TD: Tensor) -> bool:
    """Whether the compiled kernels run this; they know float32 and bfloat16."""
    narrow = (torch.float32, torch.bfloat16)
    return dtype in narrow and x_TD.dtype in narrow and os.environ.get(ENVIRONMENT) != "eager" and _available()


@cache
def _available() -> bool:
    """Whether the compiled kernels are there; the first call may build them."""
    return native.load("experts")


def _wide(b: Tensor, x: Tensor) -> torch.dtype:
    """What gates, biases and sums are taken in: float32, or float64 where the layer is."""
    return torch.promote_types(torch.promote_types(b.dtype, x.dtype), torch.float32)


def _cast(t: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A copy in this dtype; empty where t has it (or there is no t)."""
    if t is None or t.dtype == dtype:
        return torch.empty(0, dtype=dtype)
    return t.to(dtype, memory_format=torch.contiguous_format)


def _either(cast: Tensor, original: Tensor) -> Tensor:
    return cast if cast.shape == original.shape else original


def _empty_grads(x, gate, w1, b1, w3, b3, w2, b2, wide, need_x, need_weights) -> list[Tensor]:
    """Room for the gradients; the gates' and the biases' in `wide`."""

    def like(t: Tensor | None, other: Tensor, needed: bool = True, dtype: torch.dtype | None = None) -> Tensor:
        return other.new_empty(t.shape if t is not None and needed else 0, dtype=dtype)

    return [
        like(x, x, need_x),
        like(gate, gate, dtype=wide),
        like(w1, w1, need_weights),
        like(b1, b1, dtype=wide),
        like(w3, w1, need_weights),
        like(b3, b1, dtype=wide),
        like(w2, w2, need_weights),
        like(b2, b2, dtype=wide),
    ]


def _sort(expert_Tk: Tensor, gate_Tk: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens and gates of the pairs sorted by expert, the place where each pair went, and each expert's end."""
    expert_N, order_N = expert_Tk.reshape(-1).sort(stable=True)
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(order_N.numel())
    ends_E = torch.searchsorted(expert_N, torch.arange(num_experts), right=True)
    return order_N // expert_Tk.shape[1], place_N.view(expert_Tk.shape), gate_Tk.reshape(-1)[order_N], ends_E


def _row_groups(ends_E: Tensor) -> Iterator[tuple[int, slice]]:
    start = 0
    for e, end in enumerate(ends_E.tolist()):
        yield e, slice(start, end)
        start = end


def _sum_over_k(y_ND: Tensor, place_Tk: Tensor, gate_Tk: Tensor | None = None) -> Tensor:
    """Each token's sum of its pairs' rows, weighted where there are gates, in float32 at least."""
    y_TD = torch.zeros((), dtype=torch.promote_types(y_ND.dtype, torch.float32))
    for j, place_T in enumerate(place_Tk.unbind(1)):
        part_TD = y_ND.index_select(0, place_T)
        y_TD = y_TD + (part_TD if gate_Tk is None else part_TD * gate_Tk[:, j, None])
    return y_TD
