"""The compiled CPU kernels (ops/native) as differentiable operators that torch.compile sees through.

B batch rows, T tokens, N tokens of all rows, K samples, Z index dimensions, U units, F neurons, D model width,
W bytes of packed selection per sample (bit j of byte w is unit 8 w + j).

Between forward and backward they keep the two tensors of full width that a dense FFN keeps (what goes into the
activation, and here the mean mask in place of the activation's result, which is made again), K * F bits of
selection per token, z, and one weight per token and sample. The scores of the K samples are never saved, and of
`top_mask` they never leave the processor's cache.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from infmoe.ops.masked_ffn.compiled import ACTIVATIONS, SIGMA_ACTIVATIONS, empty_gate_gradients, rows, when_loaded
from infmoe.ops.masked_ffn.few_tokens import few_rows
from infmoe.ops.masked_ffn.result import MeanMask, Selection

_SAMPLES_PER_PASS = 2  # of the backward pass: what it holds at once is no more than a dense FFN's
_ROWS_PER_PRODUCT = 512


def top_mask(
    z_BTKZ: Tensor,
    w_z_UZ: Tensor,
    bias_U: Tensor | None,
    num_kept: tuple[int, ...],
    weight_BTK: Tensor,
    *,
    count_every: int = 1,
    selection: Selection = "exact",
    score_dtype: torch.dtype = torch.float32,
    mask_dtype: torch.dtype = torch.float32,
) -> MeanMask:
    """W_z z, its top-N per sample (Eq. 6), and the weighted mean of the K masks, in one pass.

    Args:
        z_BTKZ: float32.
        w_z_UZ, bias_U: float32 or bfloat16.
        num_kept: units kept, one entry for all rows or one per row.
        weight_BTK: float32, broadcastable; carries no gradient.
        count_every: the statistics look at every so many-th token.
        selection: "exact" or "statistical".
        score_dtype: bfloat16 rounds both factors first; products are summed in float32 either way.
        mask_dtype: of the result; float32 or bfloat16.
    """
    B, T, K, Z = z_BTKZ.shape
    weight_NK = weight_BTK.detach().expand(B, T, K).reshape(B * T, K).contiguous()
    mask_NU, _, _, counts_U, totals = torch.ops.infmoe.top_mask(
        z_BTKZ.reshape(B * T, K, Z).contiguous(),
        w_z_UZ.contiguous(),
        bias_U,
        score_dtype == torch.bfloat16,
        list(num_kept),
        weight_NK,
        count_every,
        selection == "statistical",
        mask_dtype == torch.bfloat16,
        torch.is_grad_enabled(),
    )
    return _result(mask_NU.view(B, T, mask_NU.shape[1]), counts_U, totals)


def top_mask_of_scores(
    scores_BTKU: Tensor,
    num_kept: tuple[int, ...],
    weight_BTK: Tensor,
    *,
    count_every: int = 1,
    selection: Selection = "exact",
    mask_dtype: torch.dtype = torch.float32,
) -> MeanMask:
    """As `top_mask`, from scores that somebody else made: float32 or bfloat16."""
    B, T, K, U = scores_BTKU.shape
    weight_NK = weight_BTK.detach().expand(B, T, K).reshape(B * T, K).contiguous()
    mask_NU, _, _, counts_U, totals = torch.ops.infmoe.top_mask_of_scores(
        scores_BTKU.reshape(B * T, K, U).contiguous(),
        list(num_kept),
        weight_NK,
        count_every,
        selection == "statistical",
        mask_dtype == torch.bfloat16,
        torch.is_grad_enabled(),
    )
    return _result(mask_NU.view(B, T, mask_NU.shape[1]), counts_U, totals)


def _result(mask_BTU: Tensor, counts_U: Tensor, totals: Tensor) -> MeanMask:
    union, overlap = totals.detach().unbind()
    return MeanMask(mask_BTU, counts_U.detach(), union, overlap)


def gate(
    pre_BTF: Tensor,
    b1_F: Tensor | None,
    gate_BTF: Tensor | None,
    b3_F: Tensor | None,
    mask_BTU: Tensor,
    activation: str,
) -> Tensor:
    """act(pre + b1) [* (gate + b3)] * mask, the mask's units spread over their blocks of neurons.

    Products and mask are of one dtype, float32 or bfloat16; sums are float32.
    """
    gated_NF = torch.ops.infmoe.gate(
        rows(pre_BTF),
        b1_F,
        None if gate_BTF is None else rows(gate_BTF),
        b3_F,
        rows(mask_BTU),
        ACTIVATIONS[activation],
    )
    return gated_NF.view(pre_BTF.shape)


def gated_linear(
    pre_BTF: Tensor,
    b1_F: Tensor | None,
    gate_BTF: Tensor | None,
    b3_F: Tensor | None,
    mask_BTU: Tensor,
    weight_DF: Tensor,
    bias_D: Tensor | None,
    activation: str,
) -> Tensor:
    """`gate` and the linear map behind it, which keeps the map's input out of memory between the passes."""
    gate_inputs = (rows(pre_BTF), b1_F, None if gate_BTF is None else rows(gate_BTF), b3_F, rows(mask_BTU))
    act = ACTIVATIONS[activation]
    y_ND = torch.ops.infmoe.gated_linear(*gate_inputs, weight_DF.detach(), bias_D, act)
    if torch.is_grad_enabled() and weight_DF.requires_grad:
        y_ND = torch.ops.infmoe.weight_gradient(y_ND, *gate_inputs, weight_DF, act)
    return y_ND.view(*pre_BTF.shape[:-1], weight_DF.shape[0])


def spread(
    mu_BTZ: Tensor, raw_BTZ: Tensor, noise_BTKZ: Tensor, activation: str, min_sigma: float, max_sigma: float
) -> tuple[Tensor, Tensor]:
    """z = mu + sigma * noise with sigma = clamp(activation(raw)), "softplus" or "exp", in one pass.

    Returns:
        z_BTKZ and sigma_BTZ, float32.
    """
    B, T, K, Z = noise_BTKZ.shape
    z_NKZ, sigma_NZ = torch.ops.infmoe.spread(
        rows(mu_BTZ),
        rows(raw_BTZ),
        noise_BTKZ.reshape(B * T, K, Z).contiguous(),
        SIGMA_ACTIVATIONS[activation],
        min_sigma,
        max_sigma,
    )
    return z_NKZ.view(B, T, K, Z), sigma_NZ.view(B, T, Z)


def spread_stats(mu_BTZ: Tensor, sigma_BTZ: Tensor, every: int) -> tuple[Tensor, Tensor]:
    """Mean sigma, and rms(sigma) / rms(mu), summed over every so many-th token; 0-d, without gradient."""
    mean, ratio = torch.ops.infmoe.spread_stats(rows(mu_BTZ.detach()), rows(sigma_BTZ.detach()), every).unbind()
    return mean, ratio


@when_loaded
def _register_gradients() -> None:
    library = torch.library
    library.register_autograd("infmoe::top_mask", _top_mask_backward, setup_context=_top_mask_context)
    library.register_autograd(
        "infmoe::top_mask_of_scores", _top_mask_of_scores_backward, setup_context=_top_mask_of_scores_context
    )
    library.register_autograd("infmoe::gate", _gate_backward, setup_context=_gate_context)
    library.register_autograd("infmoe::spread", _spread_backward, setup_context=_spread_context)


def _top_mask_context(ctx, inputs, output) -> None:
    z_NKZ, w_z_UZ, bias_U, round_bf16, *_ = inputs
    _, packed_NKW, weight_NK, *_ = output
    exact = torch.bfloat16 if round_bf16 else torch.float32  # what is multiplied
    ctx.save_for_backward(z_NKZ if z_NKZ.dtype == exact else z_NKZ.to(exact), w_z_UZ, packed_NKW, weight_NK)
    ctx.exact, ctx.bias_dtype = exact, None if bias_U is None else bias_U.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


@once_differentiable
def _top_mask_backward(ctx, grad_NU, *_):
    """A few samples at a time: their scores' gradients are as wide as the mask, and are used up at once."""
    if grad_NU is None:
        return (None,) * 10
    z_NKZ, w_z_UZ, packed_NKW, weight_NK = ctx.saved_tensors
    needs_z, needs_w, needs_bias = ctx.needs_input_grad[:3]
    N, K, Z = z_NKZ.shape
    grad_NU = grad_NU.contiguous()
    bf16 = ctx.exact == grad_NU.dtype == torch.bfloat16
    dtype = torch.bfloat16 if bf16 else torch.float32
    w_z_UZ_, z_NKZ = w_z_UZ.to(ctx.exact).to(dtype), z_NKZ.to(dtype)
    grad_z, grad_w, grad_bias = [], [], []
    for first in range(0, K, _SAMPLES_PER_PASS):
        last = min(first + _SAMPLES_PER_PASS, K)
        scores_NU = torch.ops.infmoe.expand_selection(grad_NU, packed_NKW, weight_NK, first, last, bf16)
        scores_NU = scores_NU.flatten(0, 1)
        if needs_z:
            grad_z.append((scores_NU @ w_z_UZ_).view(N, last - first, Z))
        if needs_w:
            grad_w.append(scores_NU.T @ z_NKZ[:, first:last].reshape(-1, Z))
        if needs_bias:
            grad_bias.append(scores_NU.sum(0, dtype=torch.float32))
        del scores_NU  # before the gradients are cast
    return (
        _one(grad_z, lambda parts: torch.cat(parts, dim=1), torch.float32),
        _one(grad_w, lambda parts: torch.stack(parts).sum(0), w_z_UZ.dtype),
        _one(grad_bias, lambda parts: torch.stack(parts).sum(0), ctx.bias_dtype),
        *(None,) * 7,
    )


def _one(parts: list[Tensor], join: Callable[[list[Tensor]], Tensor], dtype: torch.dtype) -> Tensor | None:
    """The parts as one tensor of `dtype`; None where there are none."""
    if not parts:
        return None
    return (parts[0] if len(parts) == 1 else join([part.float() for part in parts])).to(dtype)


def _top_mask_of_scores_context(ctx, inputs, output) -> None:
    _, packed_NKW, weight_NK, *_ = output
    ctx.save_for_backward(packed_NKW, weight_NK)
    ctx.dtype = inputs[0].dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


@once_differentiable
def _top_mask_of_scores_backward(ctx, grad_NU, *_):
    if grad_NU is None:
        return (None,) * 7
    packed_NKW, weight_NK = ctx.saved_tensors
    bf16 = ctx.dtype == torch.bfloat16
    K = packed_NKW.shape[1]
    grad_NKU = torch.ops.infmoe.expand_selection(grad_NU.contiguous(), packed_NKW, weight_NK, 0, K, bf16)
    return grad_NKU, *(None,) * 6


def _gate_context(ctx, inputs, output) -> None:
    pre_NF, b1_F, gate_NF, b3_F, mask_NU, ctx.act = inputs
    ctx.save_for_backward(pre_NF, b1_F, gate_NF, b3_F, mask_NU)


@once_differentiable
def _gate_backward(ctx, grad_NF):
    gradients = torch.ops.infmoe.gate_backward(grad_NF.contiguous(), *ctx.saved_tensors, ctx.act)
    return *_in_order(gradients, *ctx.saved_tensors), None


def _in_order(gradients, pre_NF, b1_F, gate_NF, b3_F, mask_NU) -> tuple[Tensor | None, ...]:
    """The kernel's gradients in the order of the gate's inputs, in their dtypes; None where there is no input."""
    grad_pre, grad_gate, grad_mask, grad_b1, grad_b3 = gradients
    return (
        grad_pre,
        grad_b1.to(b1_F.dtype) if b1_F is not None else None,
        grad_gate if gate_NF is not None else None,
        grad_b3.to(b3_F.dtype) if b3_F is not None else None,
        grad_mask,
    )


def _spread_context(ctx, inputs, output) -> None:
    mu_NZ, raw_NZ, noise_NKZ, *ctx.form = inputs
    ctx.save_for_backward(mu_NZ, raw_NZ, noise_NKZ)
    ctx.set_materialize_grads(False)


@once_differentiable
def _spread_backward(ctx, grad_z, grad_sigma):
    mu_NZ, raw_NZ, noise_NKZ = ctx.saved_tensors
    grad_z = torch.zeros_like(noise_NKZ) if grad_z is None else grad_z.contiguous()
    grad_sigma = None if grad_sigma is None else grad_sigma.contiguous()
    grad_mu, grad_raw = torch.ops.infmoe.spread_backward(grad_z, grad_sigma, mu_NZ, raw_NZ, noise_NKZ, *ctx.form)
    return grad_mu, grad_raw, *(None,) * 4


@torch.library.custom_op("infmoe::gated_linear", mutates_args=())
def _gated_linear(
    pre_NF: Tensor,
    b1_F: Tensor | None,
    gate_NF: Tensor | None,
    b3_F: Tensor | None,
    mask_NU: Tensor,
    weight_DF: Tensor,
    bias_D: Tensor | None,
    act: int,
) -> Tensor:
    y_ND = pre_NF.new_empty(pre_NF.shape[0], weight_DF.shape[0])
    # Some rows at a time: what the gate has just written is still in the cache, and oneDNN is quicker
    # with two products of 512 rows than with one of 1024 where the sum runs over thousands (by hand, no bench).
    for begin in range(0, pre_NF.shape[0], _ROWS_PER_PRODUCT):
        part = slice(begin, begin + _ROWS_PER_PRODUCT)
        gate_part = None if gate_NF is None else gate_NF[part]
        gated_NF = torch.ops.infmoe.gate(pre_NF[part], b1_F, gate_part, b3_F, mask_NU[part], act)
        if few_rows(gated_NF, weight_DF):
            y_ND[part] = torch.ops.infmoe.few_rows_linear(gated_NF, weight_DF, None)
        else:
            torch.mm(gated_NF, weight_DF.T, out=y_ND[part])
    return y_ND if bias_D is None else y_ND.add_(bias_D)


@_gated_linear.register_fake
def _(pre_NF, b1_F, gate_NF, b3_F, mask_NU, weight_DF, bias_D, act):
    return pre_NF.new_empty(pre_NF.shape[0], weight_DF.shape[0])


def _gated_linear_context(ctx, inputs, output) -> None:
    *gate_inputs, weight_DF, bias_D, ctx.act = inputs
    ctx.save_for_backward(*gate_inputs, weight_DF)
    ctx.has_bias = bias_D is not None


@torch.library.custom_op("infmoe::gated_linear_backward", mutates_args=())
def _gated_linear_gradients(
    grad_ND: Tensor,
    pre_NF: Tensor,
    b1_F: Tensor | None,
    gate_NF: Tensor | None,
    b3_F: Tensor | None,
    mask_NU: Tensor,
    weight_DF: Tensor,
    act: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of pre, gate, mask, b1 and b3; what has none is empty. That of pre takes the place of the gate's result's."""
    grad_NF = grad_ND @ weight_DF
    return grad_NF, *torch.ops.infmoe.gate_backward_(grad_NF, pre_NF, b1_F, gate_NF, b3_F, mask_NU, act)


@_gated_linear_gradients.register_fake
def _(grad_ND, pre_NF, b1_F, gate_NF, b3_F, mask_NU, weight_DF, act):
    return torch.empty_like(pre_NF), *empty_gate_gradients(pre_NF, b1_F, gate_NF, b3_F, mask_NU)


def _gated_linear_backward(ctx, grad_ND):
    *gate_inputs, weight_DF = ctx.saved_tensors
    gradients = _gated_linear_gradients(grad_ND.contiguous(), *gate_inputs, weight_DF, ctx.act)
    grad_bias = grad_ND.sum(0) if ctx.has_bias and ctx.needs_input_grad[6] else None
    return *_in_order(gradients, *gate_inputs), None, grad_bias, None


# The weight's gradient is a step of its own in the backward pass, before the others: the gate's result, which it
# needs, and the gradient itself are gone by the time the rest is as wide as a dense FFN's.
@torch.library.custom_op("infmoe::weight_gradient", mutates_args=())
def _weight_gradient(
    y_ND: Tensor,
    pre_NF: Tensor,
    b1_F: Tensor | None,
    gate_NF: Tensor | None,
    b3_F: Tensor | None,
    mask_NU: Tensor,
    weight_DF: Tensor,
    act: int,
) -> Tensor:
    return y_ND.clone()


@_weight_gradient.register_fake
def _(y_ND, pre_NF, b1_F, gate_NF, b3_F, mask_NU, weight_DF, act):
    return torch.empty_like(y_ND)


def _weight_gradient_context(ctx, inputs, output) -> None:
    _, *gate_inputs, _, ctx.act = inputs
    ctx.save_for_backward(*gate_inputs)


def _weight_gradient_backward(ctx, grad_ND):
    gated_NF = torch.ops.infmoe.gate(*ctx.saved_tensors, ctx.act)
    return grad_ND, *(None,) * 5, grad_ND.T @ gated_NF, None


_weight_gradient.register_autograd(_weight_gradient_backward, setup_context=_weight_gradient_context)


@register_flop_formula(torch.ops.infmoe.gated_linear)
def _(pre_shape, b1_shape, gate_shape, b3_shape, mask_shape, weight_shape, *args, **kwargs) -> int:
    return 2 * math.prod(pre_shape) * weight_shape[0]


_gated_linear.register_autograd(_gated_linear_backward, setup_context=_gated_linear_context)
