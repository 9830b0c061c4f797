"""The compiled kernels at few tokens, where what is read decides: no gradients, all threads on one row.

B batch rows, T tokens, N tokens of all rows, K samples, Z index dimensions, U units, F neurons, D model width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from infmoe.ops.masked_ffn import compiled
from infmoe.ops.masked_ffn.compiled import ACTIVATIONS, SIGMA_ACTIVATIONS, rows
from infmoe.ops.masked_ffn.result import MeanMask, Selection
from infmoe.ops.tracing import plain_wanted

# Up to so many rows the kernels' own product is as fast as torch's, or faster; found by hand, no bench records it.
_FEW_ROWS = {torch.float32: 8, torch.bfloat16: 1}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`; for a few rows and without gradients a product that runs on all threads, which torch's does not."""
    if not few_rows(x, weight):
        return F.linear(x, weight, bias)
    return torch.ops.infmoe.few_rows_linear(rows(x), weight, bias).view(*x.shape[:-1], weight.shape[0])


def few_rows(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels' own product is to multiply `x` (..., I) by `weight` (O, I)."""
    return (
        0 < x.shape[:-1].numel() <= _FEW_ROWS.get(x.dtype, 0)
        and not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype
        and weight.is_contiguous()
        and not torch.is_autocast_enabled("cpu")
        and not plain_wanted()
        and compiled.available()
    )


Affine = tuple[Tensor, Tensor | None]  # weight (O, I) and bias (O)


def route(
    x_BTD: Tensor,
    mu: Affine,
    sigma: Affine,
    sigma_form: tuple[str, float, float],
    noise_key: tuple[Tensor, Tensor, int, Tensor, Tensor],
    num_samples: int,
    w_z: Affine,
    num_kept: tuple[int, ...],
    weight_BTK: Tensor | None,
    *,
    count_every: int = 1,
    selection: Selection = "exact",
    score_dtype: torch.dtype = torch.float32,
    mask_dtype: torch.dtype = torch.float32,
) -> tuple[MeanMask, Tensor, Tensor]:
    """From few tokens to their mean mask in one call: linear router, noise, z, W_z z and selection (Eq. 5 and 6).

    What `few_rows` allows. The same numbers as `linear`, `noise.normal_noise`, `fused.spread` and
    `fused.top_mask` one after the other.

    Args:
        x_BTD: float32 or bfloat16.
        mu, sigma: the router's maps, of x's dtype.
        sigma_form: "softplus" or "exp", and what sigma is clamped to.
        noise_key: see `noise.noise_key`.
        num_samples: K.
        w_z: float32 or bfloat16.
        weight_BTK: see `fused.top_mask`; None: 1 / K each.
        num_kept, count_every, selection, score_dtype, mask_dtype: see `fused.top_mask`.

    Returns:
        The mask, and the two sums of `fused.spread_stats`.
    """
    B, T, _ = x_BTD.shape
    if weight_BTK is not None:
        weight_BTK = weight_BTK.expand(B, T, num_samples).reshape(B * T, num_samples).contiguous()
    activation, min_sigma, max_sigma = sigma_form
    mask_NU, counts_U, sums = torch.ops.infmoe.route(
        rows(x_BTD),
        *mu,
        *sigma,
        SIGMA_ACTIVATIONS[activation],
        min_sigma,
        max_sigma,
        *noise_key,
        num_samples,
        w_z[0].contiguous(),
        w_z[1],
        score_dtype == torch.bfloat16,
        list(num_kept),
        weight_BTK,
        count_every,
        selection == "statistical",
        mask_dtype == torch.bfloat16,
    )
    union, overlap, mean_sigma, sigma_to_mu = sums.unbind()
    return MeanMask(mask_NU.view(B, T, -1), counts_U, union, overlap), mean_sigma, sigma_to_mu


def sparse_ffn(
    x_BTD: Tensor,
    mask_BTU: Tensor,
    w1_FD: Tensor,
    b1_F: Tensor | None,
    w3_FD: Tensor | None,
    b3_F: Tensor | None,
    w2_DF: Tensor,
    b2_D: Tensor | None,
    activation: str,
) -> Tensor:
    """W2 (act(W1 x) [* W3 x] * mask), reading only the neurons for which some token's mask is not 0.

    For few tokens, and without gradients. Keeps a transposed copy of W2 beside it, made at the first call and
    again whenever W2 has changed.

    Args:
        x_BTD: float32 or bfloat16; the weights' dtype need not be the same. Sums are float32.
        mask_BTU: the mean mask, float32 or bfloat16.
    """
    # what torch.compile records is an operator of its own; without it the call costs half as much
    run = torch.ops.infmoe.sparse_ffn_by_rows if torch.compiler.is_compiling() else _sparse_by_rows
    w1_FD, w3_FD = w1_FD.contiguous(), None if w3_FD is None else w3_FD.contiguous()
    y_ND = run(rows(x_BTD), rows(mask_BTU), w1_FD, b1_F, w3_FD, b3_F, w2_DF, b2_D, ACTIVATIONS[activation])
    return y_ND.view(x_BTD.shape)


# W2's rows are its outputs; skipping neurons needs their columns in one piece. weight -> (its state, the copy)
_transposed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_PROBES = 64  # entries compared at every call: a write through `.data` changes neither version nor address


def _columns(weight_DF: Tensor) -> Tensor:
    """W2 transposed, from the last call if W2 is still what it was."""
    version = None if weight_DF.is_inference() else weight_DF._version
    state = (version, weight_DF.data_ptr(), weight_DF.dtype, weight_DF.stride())
    known = _transposed.get(weight_DF)
    if known is None or known[0] != state or not torch.equal(_probe(weight_DF), _probe(known[1].T)):
        known = (state, weight_DF.detach().T.contiguous())
        _transposed[weight_DF] = known
    return known[1]


def _probe(weight_DF: Tensor) -> Tensor:
    """A few entries along a diagonal, without an index tensor."""
    D, width = weight_DF.shape
    count = min(_PROBES, D, width)
    down, across = weight_DF.stride()
    step = (D // count) * down + (width // count) * across
    return weight_DF.detach().as_strided((count,), (step,), weight_DF.storage_offset())


@torch.library.custom_op("infmoe::sparse_ffn_by_rows", mutates_args=())
def _sparse_ffn(
    x_ND: Tensor,
    mask_NU: Tensor,
    w1_FD: Tensor,
    b1_F: Tensor | None,
    w3_FD: Tensor | None,
    b3_F: Tensor | None,
    w2_DF: Tensor,
    b2_D: Tensor | None,
    act: int,
) -> Tensor:
    return _sparse_by_rows(x_ND, mask_NU, w1_FD, b1_F, w3_FD, b3_F, w2_DF, b2_D, act)


def _sparse_by_rows(x_ND, mask_NU, w1_FD, b1_F, w3_FD, b3_F, w2_DF, b2_D, act) -> Tensor:
    return torch.ops.infmoe.sparse_ffn(x_ND, mask_NU, w1_FD, b1_F, w3_FD, b3_F, _columns(w2_DF), b2_D, act)


@_sparse_ffn.register_fake
def _(x_ND, mask_NU, w1_FD, b1_F, w3_FD, b3_F, w2_DF, b2_D, act):
    return torch.empty_like(x_ND)
