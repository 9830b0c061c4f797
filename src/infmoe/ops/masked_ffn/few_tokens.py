"""The compiled kernels at few tokens, where what is read decides: no gradients, all threads on one row.

B batch rows, T tokens, N tokens of all rows, K samples, Z index dimensions, U units, F neurons, D model width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from infmoe.ops.coordinates import NoiseCoordinates
from infmoe.ops.masked_ffn import compiled
from infmoe.ops.masked_ffn.compiled import ACTIVATIONS, SIGMA_ACTIVATIONS, rows
from infmoe.ops.masked_ffn.result import Selection
from infmoe.ops.tracing import plain_wanted

# Up to so many rows the kernels' own product is as fast as torch's, or faster; found by hand, no bench records it.
_FEW_ROWS = {torch.float32: 8, torch.bfloat16: 1}
MAX_ROWS = max(_FEW_ROWS.values())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`; for a few rows and without gradients a product that runs on all threads, which torch's does not."""
    if not few_rows(x, weight):
        return F.linear(x, weight, bias)
    return torch.ops.infmoe.few_rows_linear(rows(x), weight, bias).view(*x.shape[:-1], weight.shape[0])


def few_rows(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels' own product is to multiply `x` (..., I) by `weight` (O, I)."""
    dtype = x.dtype
    return (
        not torch.is_grad_enabled()
        and 0 < x.numel() <= _FEW_ROWS.get(dtype, 0) * weight.shape[1]
        and x.is_cpu
        and weight.dtype == dtype
        and weight.is_contiguous()
        and not torch.is_autocast_enabled("cpu")
        and not plain_wanted()
        and compiled.available()
    )


Affine = tuple[Tensor, Tensor | None]  # weight (O, I) and bias (O)


class RouterMaps(NamedTuple):
    """The linear maps that lead to the scores, all of x's dtype but W_z (float32 or bfloat16); biases may be None.

    Without one to sigma z = mu.
    """

    mu_ZD: Tensor
    b_mu_Z: Tensor | None
    sigma_ZD: Tensor | None
    b_sigma_Z: Tensor | None
    w_z_UZ: Tensor
    b_z_U: Tensor | None


class FFN(NamedTuple):
    """A feed-forward layer's weights; no W3 without a gated activation.

    Attributes:
        w1_FD, w3_FD, w2_DF: float32 or bfloat16, of one dtype.
        b1_F, b3_F, b2_D: the biases, or None.
    """

    w1_FD: Tensor
    b1_F: Tensor | None
    w3_FD: Tensor | None
    b3_F: Tensor | None
    w2_DF: Tensor
    b2_D: Tensor | None


class Route(NamedTuple):
    """What `route` is given beside x and the noise's key: the same for every token of a model that decodes.

    Attributes:
        before, after: the operator's arguments before and after the key.
        w2t_FD: the copy of W2 that is among them, if it is.
    """

    before: tuple
    after: tuple
    w2t_FD: Tensor | None


class Routed(NamedTuple):
    """What `route` returns; all but the result float32.

    Attributes:
        result: the mean mask (B, T, U), or the output (B, T, D).
        counts_U, union, overlap: see `MaskStats`.
        sigma, sigma_to_mu: the two sums of `fused.spread_stats`.
        tokens: how many tokens were looked at.
        zero: 0.
    """

    result: Tensor
    counts_U: Tensor
    union: Tensor
    overlap: Tensor
    sigma: Tensor
    sigma_to_mu: Tensor
    tokens: Tensor
    zero: Tensor


def route_of(
    maps: RouterMaps,
    sigma_form: tuple[str, float, float],
    num_samples: int,
    num_kept: tuple[int, ...],
    weight_NK: Tensor | None,
    *,
    count_every: int = 1,
    selection: Selection = "exact",
    score_dtype: torch.dtype = torch.float32,
    mask_dtype: torch.dtype = torch.float32,
    sparse: tuple[FFN, str] | None = None,
) -> Route:
    """What `route` is to do.

    Args:
        maps: the router's and W_z.
        sigma_form: "softplus" or "exp", and what sigma is clamped to; of no account at z = mu.
        num_samples: K; 1 at z = mu.
        weight_NK: each sample's weight in the mean, contiguous; None: 1 / K each.
        num_kept, count_every, selection, score_dtype: see `fused.top_mask`.
        mask_dtype: of the mask, where that is what is asked for.
        sparse: weights and activation of the FFN, of which only the kept neurons are read (see `sparse_ffn`): the
            same call goes on to its output.
    """
    activation, min_sigma, max_sigma = sigma_form
    neurons: tuple = (None,) * 6 + (0,)
    w2t_FD = None
    if sparse is not None:
        neurons = (*_operands(*sparse[0]), ACTIVATIONS[sparse[1]])
        w2t_FD = neurons[4]
    after = (
        num_samples,
        maps.w_z_UZ.contiguous(),
        maps.b_z_U,
        score_dtype == torch.bfloat16,
        num_kept,
        weight_NK,
        count_every,
        selection == "statistical",
        mask_dtype == torch.bfloat16,
        *neurons,
    )
    form = 0 if maps.sigma_ZD is None else SIGMA_ACTIVATIONS[activation]
    return Route((*maps[:4], form, min_sigma, max_sigma), after, w2t_FD)


def route(x_BTD: Tensor, noise_key: NoiseCoordinates, given: Route) -> Routed:
    """From few tokens to their mean mask in one call: linear router, noise, z, W_z z and selection (Eq. 5 and 6).

    What `few_rows` allows. The same numbers as `linear`, `noise.normal_noise`, `fused.spread`, `fused.top_mask` and
    `sparse_ffn` one after the other.

    Args:
        x_BTD: float32 or bfloat16.
        noise_key: see `noise.noise_key`; nothing is drawn at z = mu.
        given: see `route_of`.
    """
    B, T, D = x_BTD.shape
    result_NX, counts_U, sums = torch.ops.infmoe.route(
        x_BTD.reshape(B * T, D).contiguous(), *given.before, *noise_key, *given.after
    )
    return Routed(result_NX.view(B, T, -1), counts_U, *sums.unbind())


def copies_hold(ffn: FFN, given: Route) -> bool:
    """Whether the copy of W2 that `given` holds, if it does, is still of these weights; see `_columns`."""
    return given.w2t_FD is None or torch.ops.infmoe.like_its_transpose(ffn.w2_DF, given.w2t_FD)


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
    weights = (w1_FD, b1_F, w3_FD, b3_F, w2_DF, b2_D)
    return run(rows(x_BTD), rows(mask_BTU), *weights, ACTIVATIONS[activation]).view(x_BTD.shape)


def _operands(w1_FD, b1_F, w3_FD, b3_F, w2_DF, b2_D) -> tuple[Tensor | None, ...]:
    """The weights as the kernels take them, W2 transposed."""
    w3_FD = None if w3_FD is None else w3_FD.contiguous()
    return w1_FD.contiguous(), b1_F, w3_FD, b3_F, _columns(w2_DF), b2_D


# W2's rows are its outputs; skipping neurons needs their columns in one piece. weight -> (its state, the copy)
_transposed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _columns(weight_DF: Tensor) -> Tensor:
    """W2 transposed, from the last call if W2 is still what it was.

    A write through `.data` changes neither version nor address, so a few entries are compared too. A copy that is in
    use is left as it is: another takes its place.
    """
    version = None if weight_DF.is_inference() else weight_DF._version
    state = (version, weight_DF.data_ptr(), weight_DF.dtype, weight_DF.shape, weight_DF.stride())
    known = _transposed.get(weight_DF)
    if known is None or known[0] != state or not torch.ops.infmoe.like_its_transpose(weight_DF, known[1]):
        known = (state, weight_DF.detach().T.contiguous())
        _transposed[weight_DF] = known
    return known[1]


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
    return torch.ops.infmoe.sparse_ffn(x_ND, mask_NU, *_operands(w1_FD, b1_F, w3_FD, b3_F, w2_DF, b2_D), act)


@_sparse_ffn.register_fake
def _(x_ND, mask_NU, w1_FD, b1_F, w3_FD, b3_F, w2_DF, b2_D, act):
    return torch.empty_like(x_ND)
