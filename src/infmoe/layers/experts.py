"""Experts of equal width behind a discrete router, and what the discrete variants share.

T tokens, k experts per token, N = T * k pairs of the two, E experts, D model width, F neurons per expert.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infmoe.errors import InfMoEError
from infmoe.layers.activations import activation, ffn_width
from infmoe.layers.base import FFNCost, Init
from infmoe.layers.metrics import RoutingStats, stats_stride
from infmoe.ops.expert_ffn import expert_ffn


class Experts(nn.Module):
    """E feed-forward networks of equal width: W2_e Act(W1_e x + b1_e) + b2.

    A gated activation multiplies by W3_e x + b3_e, as in `DenseFFN`. The experts share b2, so that together
    they have exactly the parameters of one plain FFN of the total width; where the gates sum to one, a shared
    b2 does what one per expert would, could they be equal.

    All products run grouped over the pairs sorted by expert; nothing is padded to a capacity, and no pair's
    result depends on another's. Sums run in a fixed order (no scatter-add), so runs repeat bit for bit.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, num_experts: int, hidden_act: str):
        """Allocate the weights; the owner initializes them.

        Args:
            hidden_size: D.
            intermediate_size: neurons of all experts together, before the 2/3 of a gated activation.
            num_experts: E; must divide `intermediate_size`.
            hidden_act: a name from `ACTIVATIONS`.
        """
        super().__init__()
        _check_count("num_experts", num_experts)
        if intermediate_size % num_experts:
            fitting = max(1, round(intermediate_size / num_experts)) * num_experts
            raise InfMoEError(
                f"intermediate_size {intermediate_size} does not divide into {num_experts} experts of equal "
                f"width; the nearest that does is {fitting}"
            )
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.hidden_act = hidden_act
        self.act, gated = activation(hidden_act)
        self.width = ffn_width(intermediate_size // num_experts, gated)
        into, out = (num_experts, hidden_size, self.width), (num_experts, self.width, hidden_size)
        self.w1_EDF = nn.Parameter(torch.empty(into))
        self.b1_EF = nn.Parameter(torch.empty(num_experts, self.width))
        self.w3_EDF = nn.Parameter(torch.empty(into)) if gated else None
        self.b3_EF = nn.Parameter(torch.empty(num_experts, self.width)) if gated else None
        self.w2_EFD = nn.Parameter(torch.empty(out))
        self.b2_D = nn.Parameter(torch.empty(hidden_size))

    def inits(self, initializer_range: float, residual_init_scale: float) -> Iterable[Init]:
        """How every parameter starts."""
        yield Init(self.w1_EDF, 0.0, initializer_range)
        yield Init(self.b1_EF, 0.0, 0.0)
        if self.w3_EDF is not None and self.b3_EF is not None:
            yield Init(self.w3_EDF, 0.0, initializer_range)
            yield Init(self.b3_EF, 0.0, 0.0)
        yield Init(self.w2_EFD, 0.0, initializer_range * residual_init_scale)
        yield Init(self.b2_D, 0.0, 0.0)

    def forward(self, x_TD: Tensor, expert_Tk: Tensor, gate_Tk: Tensor) -> Tensor:
        """Sum over each token's k experts of gate * expert(x), b2 inside the expert.

        Args:
            x_TD: tokens.
            expert_Tk: int64, which experts each token runs.
            gate_Tk: their weights, float32 (float64 for a float64 layer).

        Returns:
            shape (T, D), in x's dtype, or autocast's where that is enabled.
        """
        dtype = _compute_dtype(x_TD)
        if x_TD.device.type == "cpu":
            return expert_ffn(
                x_TD,
                expert_Tk,
                gate_Tk,
                self.w1_EDF,
                self.b1_EF,
                self.w3_EDF,
                self.b3_EF,
                self.w2_EFD,
                self.b2_D,
                hidden_act=self.hidden_act,
                dtype=dtype,
            )
        num_tokens, k = expert_Tk.shape
        expert_N, order_N = expert_Tk.reshape(-1).sort(stable=True)
        experts = torch.arange(self.num_experts, device=x_TD.device)
        ends_E = torch.searchsorted(expert_N, experts, right=True, out_int32=True)
        place_N = torch.empty_like(order_N)
        place_N.scatter_(0, order_N, torch.arange(order_N.numel(), device=x_TD.device))
        # k copies of each token, permuted: the gradient is the inverse permutation and a sum over k, where a
        # gather from the tokens themselves would add with atomics on a GPU.
        copies_ND = x_TD.to(dtype)[:, None].expand(-1, k, -1).reshape(-1, self.hidden_size)
        x_ND = _Permute.apply(copies_ND, order_N, place_N)
        # The biases enter by a product with one-hot rows: as quick as indexing, and their gradient too is a
        # matrix product.
        pick_NE = (expert_N[:, None] == experts).to(dtype)
        w1_EDF, b1_EF, w2_EFD = self.w1_EDF.to(dtype), self.b1_EF.to(dtype), self.w2_EFD.to(dtype)
        h_NF = self.act(_grouped_linear(x_ND, w1_EDF, b1_EF, ends_E, pick_NE))
        if self.w3_EDF is not None and self.b3_EF is not None:
            w3_EDF, b3_EF = self.w3_EDF.to(dtype), self.b3_EF.to(dtype)
            h_NF = h_NF * _grouped_linear(x_ND, w3_EDF, b3_EF, ends_E, pick_NE)
        y_ND = _grouped_mm(h_NF, w2_EFD, ends_E)
        y_TkD = _Permute.apply(y_ND, place_N, order_N).view(num_tokens, k, self.hidden_size)
        # The gates' dtype is float32 at least, so the sum over k is taken in it.
        y_TD = (y_TkD * gate_Tk[..., None]).sum(dim=1) + gate_Tk.sum(dim=1, keepdim=True) * self.b2_D
        return y_TD.to(dtype)

    def cost(self, num_experts_per_tok: int, num_router_params: int) -> FFNCost:
        """What a layer costs that holds these experts and a linear router, k of them run per token.

        Args:
            num_experts_per_tok: k.
            num_router_params: D * E, or 0 where nothing is learned.
        """
        params = sum(p.numel() for p in self.parameters())
        shared = self.b2_D.numel()
        active = (params - shared) // self.num_experts * num_experts_per_tok + shared
        matrices = 2 if self.w3_EDF is None else 3
        flops_router = 2 * num_router_params
        flops = flops_router + num_experts_per_tok * matrices * 2 * self.hidden_size * self.width
        return FFNCost(
            params=params + num_router_params,
            params_wz=0,
            params_discrete_router=num_router_params,
            active_params=active,
            active_params_union=active + num_router_params,
            flops_executed=flops,
            flops_ideal=flops,
            flops_router=flops_router,
            weights_executed=active + num_router_params,
            weights_ideal=active + num_router_params,
        )


def router_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """x W^T in float32 (float64 for float64 inputs), whatever the model's dtype or autocast's."""
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    with torch.autocast(device_type=x_TD.device.type, enabled=False):
        return F.linear(x_TD.to(dtype), weight_ED.to(dtype))


def narrow_softmax(logits_TE: Tensor) -> Tensor:
    """softmax over the last dimension; over few columns, torch's takes several times as long on a CPU."""
    if logits_TE.shape[1] >= 16:
        return logits_TE.softmax(dim=-1)
    return logits_TE.T.contiguous().softmax(dim=0).T


def balance_loss(probs_TE: Tensor, expert_Tk: Tensor) -> Tensor:
    """E * sum_i f_i P_i (Switch Transformer, Eq. 4-6): 1 at perfect balance, E where one expert takes all.

    f_i is the share of (token, expert) pairs that go to expert i and carries no gradient; P_i is the mean
    probability of expert i over the tokens.
    """
    num_tokens, num_experts = probs_TE.shape
    f_E = count_experts(expert_Tk, num_experts) / max(expert_Tk.numel(), 1)
    p_E = probs_TE.sum(dim=0) / max(num_tokens, 1)
    return num_experts * (f_E * p_E).sum()


def count_experts(expert_Tk: Tensor, num_experts: int, kept_Tk: Tensor | None = None) -> Tensor:
    """How many pairs go to each expert (only those that `kept_Tk` marks), float32, shape (E,)."""
    experts = torch.arange(num_experts, device=expert_Tk.device)
    pick_EN = expert_Tk.reshape(-1) == experts[:, None]  # sums along rows are quicker than down columns
    if kept_Tk is not None:
        pick_EN = pick_EN & kept_Tk.reshape(-1)
    return pick_EN.sum(dim=1).float()


@torch.no_grad()
def expert_stats(
    expert_Tk: Tensor, num_experts: int, max_tokens: int | None, kept_Tk: Tensor | None = None
) -> RoutingStats:
    """Routing statistics over evenly spaced tokens; a unit is an expert, and there is one sample.

    Args:
        expert_Tk: which experts each token chose.
        num_experts: E.
        max_tokens: how many tokens to look at, at most; None: all.
        kept_Tk: False where a capacity limit dropped the pair; None: nothing was dropped.
    """
    stride = stats_stride(expert_Tk.shape[0], max_tokens)
    expert_Tk = expert_Tk[::stride]
    kept_Tk = None if kept_Tk is None else kept_Tk[::stride]
    counts_E = count_experts(expert_Tk, num_experts, kept_Tk)
    selected = counts_E.sum()
    tokens = torch.full((), float(expert_Tk.shape[0]), device=expert_Tk.device)
    zero = torch.zeros((), device=expert_Tk.device)
    return RoutingStats(
        tokens=tokens,
        counts_U=counts_E,
        union=selected / num_experts,
        overlap=tokens.clone(),
        sigma=zero,
        sigma_to_mu=zero,
        dropped=zero if kept_Tk is None else expert_Tk.numel() - selected,
    )


def check_weight(name: str, value: float) -> None:
    """Raise unless `value` is a usable loss weight."""
    if not 0.0 <= value < float("inf"):
        raise InfMoEError(f"{name} must be a number of at least 0, got {value!r}")


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InfMoEError(f"{name} must be an integer of at least 1, got {value!r}")


class _Permute(torch.autograd.Function):
    """x[order]; its gradient gathers by the inverse, which is quicker than autograd's scatter."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_N)
        return x_ND.index_select(0, order_N)

    @staticmethod
    def backward(ctx, grad_ND: Tensor) -> tuple[Tensor, None, None]:
        (inverse_N,) = ctx.saved_tensors
        return grad_ND.index_select(0, inverse_N), None, None


def _compute_dtype(x: Tensor) -> torch.dtype:
    """What a linear layer would compute in: x's dtype, or autocast's where enabled (not for float64).

    `grouped_mm` is not on autocast's list, so its operands are cast by hand.
    """
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return x.dtype


def _grouped_linear(x_NI: Tensor, w_EIO: Tensor, b_EO: Tensor, ends_E: Tensor, pick_NE: Tensor) -> Tensor:
    return torch.addmm(_grouped_mm(x_NI, w_EIO, ends_E), pick_NE, b_EO)


def _grouped_mm(x_NI: Tensor, w_EIO: Tensor, ends_E: Tensor) -> Tensor:
    """x @ w[e] for each expert's rows, which lie between ends[e - 1] and ends[e]; I inputs, O outputs."""
    if not _has_grouped_mm(x_NI):
        return _looped_mm(x_NI, w_EIO, ends_E)
    # It demands strides of whole 16 bytes, in the gradients too: odd widths are padded by zeros.
    inputs, outputs = w_EIO.shape[1:]
    unit = 16 // x_NI.element_size()
    pad_in, pad_out = -inputs % unit, -outputs % unit
    if pad_in:
        x_NI = F.pad(x_NI, (0, pad_in))
    if pad_in or pad_out:
        w_EIO = F.pad(w_EIO, (0, pad_out, 0, pad_in))
    y_NO = F.grouped_mm(x_NI, w_EIO, offs=ends_E)
    return y_NO[:, :outputs] if pad_out else y_NO


def _has_grouped_mm(x: Tensor) -> bool:
    """Whether torch's grouped_mm takes x: no float64, bfloat16 alone under torch.compile, Ampere or newer."""
    if x.dtype == torch.float64 or (torch.compiler.is_compiling() and x.dtype != torch.bfloat16):
        return False
    return x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) >= (8, 0)


# A loop over the experts for what grouped_mm refuses; an operator of its own, so that torch.compile need not
# look into it: the rows per expert depend on the data.
@torch.library.custom_op("infmoe::looped_mm", mutates_args=())
def _looped_mm(x_NI: Tensor, w_EIO: Tensor, ends_E: Tensor) -> Tensor:
    y_NO = x_NI.new_empty(x_NI.shape[0], w_EIO.shape[2])
    start = 0
    for w_IO, end in zip(w_EIO, ends_E.tolist(), strict=True):
        torch.mm(x_NI[start:end], w_IO, out=y_NO[start:end])
        start = end
    return y_NO


@torch.library.custom_op("infmoe::looped_mm_grad", mutates_args=())
def _looped_mm_grad(x_NI: Tensor, grad_NO: Tensor, ends_E: Tensor) -> Tensor:
    """The weights' gradient: x^T grad of each expert's rows."""
    grad_EIO = x_NI.new_empty(ends_E.shape[0], x_NI.shape[1], grad_NO.shape[1])
    start = 0
    for grad_IO, end in zip(grad_EIO, ends_E.tolist(), strict=True):
        torch.mm(x_NI[start:end].T, grad_NO[start:end], out=grad_IO)
        start = end
    return grad_EIO


@_looped_mm.register_fake
def _(x_NI: Tensor, w_EIO: Tensor, ends_E: Tensor) -> Tensor:
    return x_NI.new_empty(x_NI.shape[0], w_EIO.shape[2])


@_looped_mm_grad.register_fake
def _(x_NI: Tensor, grad_NO: Tensor, ends_E: Tensor) -> Tensor:
    return x_NI.new_empty(ends_E.shape[0], x_NI.shape[1], grad_NO.shape[1])


def _save_for_gradient(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _looped_mm_backward(ctx, grad_NO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x_NI, w_EIO, ends_E = ctx.saved_tensors
    grad_x = _looped_mm(grad_NO, w_EIO.transpose(1, 2), ends_E) if ctx.needs_input_grad[0] else None
    grad_w = _looped_mm_grad(x_NI, grad_NO, ends_E) if ctx.needs_input_grad[1] else None
    return grad_x, grad_w, None


_looped_mm.register_autograd(_looped_mm_backward, setup_context=_save_for_gradient)
