"""The compiled operators themselves: loading them, their shapes for torch.compile, and their FLOPs.

N tokens of all rows, K samples, U units, F neurons.
"""

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from infmoe.ops import native
from infmoe.ops.tracing import constant

# The kernels' numbers for `layers.activations.ACTIVATIONS`; the gated ones bring their second product along.
ACTIVATIONS = {"gelu": 0, "gelu_new": 1, "relu": 2, "silu": 3, "swiglu": 3, "geglu": 0}
SIGMA_ACTIVATIONS = {"softplus": 0, "exp": 1}
DTYPES = (torch.float32, torch.bfloat16)

_registrations: list[Callable[[], None]] = []


@constant
def available() -> bool:
    """Whether the kernels are there; the first call may build them."""
    return _load()  # the cache is a level down: torch.compile looks through cached functions


@cache
def _load() -> bool:
    if not native.load():
        return False
    _register_shapes()
    for register in _registrations:
        register()
    return True


def when_loaded(register: Callable[[], None]) -> Callable[[], None]:
    """Have a function called once the operators are there."""
    _registrations.append(register)
    if _load.cache_info().currsize and _load():
        register()
    return register


def rows(x_BTF: Tensor) -> Tensor:
    """(B, T, F) as (N, F), contiguous."""
    return x_BTF.flatten(0, -2).contiguous()


def _register_shapes() -> None:
    library = torch.library

    @library.register_fake("infmoe::top_mask")
    def _(z, w_z, bias, round_bf16, num_kept, weight, count_every, statistical, mask_bf16, want_packed):
        return _empty_top_mask(z, w_z.shape[0], mask_bf16, want_packed)

    @library.register_fake("infmoe::top_mask_of_scores")
    def _(scores, num_kept, weight, count_every, statistical, mask_bf16, want_packed):
        return _empty_top_mask(scores, scores.shape[2], mask_bf16, want_packed)

    @library.register_fake("infmoe::expand_selection")
    def _(grad, packed, weight, first, last, bf16):
        N, U = grad.shape
        return grad.new_empty(N, last - first, U, dtype=torch.bfloat16 if bf16 else torch.float32)

    @library.register_fake("infmoe::gate")
    def _(pre, b1, gate, b3, mask, act):
        return torch.empty_like(pre)

    @library.register_fake("infmoe::gate_backward")
    def _(grad, pre, b1, gate, b3, mask, act):
        return torch.empty_like(pre), *empty_gate_gradients(pre, b1, gate, b3, mask)

    @library.register_fake("infmoe::gate_backward_")
    def _(grad, pre, b1, gate, b3, mask, act):
        return empty_gate_gradients(pre, b1, gate, b3, mask)

    @library.register_fake("infmoe::spread")
    def _(mu, raw, noise, act, min_sigma, max_sigma):
        return torch.empty_like(noise), torch.empty_like(mu, dtype=torch.float32)

    @library.register_fake("infmoe::spread_backward")
    def _(grad_z, grad_sigma, mu, raw, noise, act, min_sigma, max_sigma):
        return torch.empty_like(mu), torch.empty_like(raw)

    @library.register_fake("infmoe::spread_stats")
    def _(mu, sigma, every):
        return mu.new_empty(2)

    @library.register_fake("infmoe::few_rows_linear")
    def _(x, weight, bias):
        return x.new_empty(x.shape[0], weight.shape[0])

    @library.register_fake("infmoe::sparse_ffn")
    def _(x, mask, w1, b1, w3, b3, w2t, b2, act):
        return torch.empty_like(x)

    @library.register_fake("infmoe::route")
    def _(x, w_mu, b_mu, w_sigma, b_sigma, sigma_act, min_sigma, max_sigma, seed, step, layer, stream, position,
          num_samples, w_z, b_z, round_bf16, num_kept, weight, count_every, statistical, mask_bf16,
          w1, *rest):  # fmt: skip
        mask = x.new_empty(x.shape[0], w_z.shape[0], dtype=torch.bfloat16 if mask_bf16 else torch.float32)
        result = mask if w1 is None else torch.empty_like(x)
        return result, mask.new_empty(w_z.shape[0], dtype=torch.float32), mask.new_empty(6, dtype=torch.float32)

    @library.register_fake("infmoe::normal_noise")
    def _(seed, step, layer, stream, position, num_samples, dim):
        return position.new_empty(*position.shape, num_samples, dim, dtype=torch.float32)

    @register_flop_formula(torch.ops.infmoe.top_mask)
    def _(z_shape, w_z_shape, *args, **kwargs) -> int:
        return 2 * math.prod(z_shape) * w_z_shape[0]

    @register_flop_formula(torch.ops.infmoe.route)
    def _(x_shape, w_mu_shape, *args, **kwargs) -> int:
        w_sigma_shape, num_samples, w_z_shape = args[1], args[11], args[12]
        maps = 1 if w_sigma_shape is None else 2
        return 2 * x_shape[0] * (maps * math.prod(w_mu_shape) + num_samples * math.prod(w_z_shape))

    @register_flop_formula(torch.ops.infmoe.few_rows_linear)
    def _(x_shape, weight_shape, *args, **kwargs) -> int:
        return 2 * math.prod(x_shape) * weight_shape[0]


def _empty_top_mask(like: Tensor, num_units: int, mask_bf16: bool, want_packed: bool) -> tuple[Tensor, ...]:
    N, K = like.shape[:2]
    return (
        like.new_empty(N, num_units, dtype=torch.bfloat16 if mask_bf16 else torch.float32),
        like.new_empty(N if want_packed else 0, K, (num_units + 7) // 8, dtype=torch.uint8),
        like.new_empty(N, K, dtype=torch.float32),
        like.new_empty(num_units, dtype=torch.float32),
        like.new_empty(2, dtype=torch.float32),
    )


def empty_gate_gradients(pre_NF, b1_F, gate_NF, b3_F, mask_NU) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of gate, mask, b1 and b3, as the kernel returns them; empty where there is no input."""
    N, width = pre_NF.shape
    return (
        pre_NF.new_empty(N if gate_NF is not None else 0, width),
        torch.empty_like(mask_NU),
        pre_NF.new_empty(width if b1_F is not None else 0, dtype=torch.float32),
        pre_NF.new_empty(width if b3_F is not None else 0, dtype=torch.float32),
    )
