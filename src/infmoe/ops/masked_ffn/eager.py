"""The plain path in tensor operations: what runs where no fused kernel is built.

B batch rows, T tokens, K samples, U units (neurons, or blocks of neurons), N tokens whose counts are taken.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from infmoe.ops.masked_ffn.result import MeanMask, Selection, counted

_ROWS_PER_PASS = 256  # rows copied at once: small enough to stay in the second-level cache


def mean_top_mask(
    scores_BTKU: Tensor,
    num_kept: tuple[int, ...],
    weight_BTK: Tensor,
    count_every: int = 1,
    selection: Selection = "exact",
) -> MeanMask:
    """Top-N of every sample (Eq. 6), and the weighted mean of the K masks.

    Args:
        scores_BTKU: W_z z, float32 or wider.
        num_kept: units kept, one entry for all rows or one per row.
        weight_BTK: float32, broadcastable; each sample's weight in the mean; carries no gradient.
        count_every: the counts look at every so many-th token of the batch (the routing statistics' stride).
        selection: "exact", or "statistical": see `naive.select_statistical`.

    Returns:
        The mask in the scores' dtype, and the statistics.
    """
    kept_BTKU = select(scores_BTKU, num_kept) if selection == "exact" else select_statistical(scores_BTKU, num_kept)
    return _mean_mask(scores_BTKU, kept_BTKU, weight_BTK, count_every)


def mean_cut_mask(scores_BTKU: Tensor, cut: float, weight_BTK: Tensor, count_every: int = 1) -> MeanMask:
    """The weighted mean of masks that keep what scores at least `cut` (see `naive.select_cut`).

    Args and returns: as `mean_top_mask`.
    """
    largest_BTK1 = scores_BTKU.detach().amax(dim=-1, keepdim=True)
    kept_BTKU = (scores_BTKU.detach() >= largest_BTK1.clamp_max(cut)).to(scores_BTKU.dtype)
    return _mean_mask(scores_BTKU, kept_BTKU, weight_BTK, count_every)


def mean_mass_mask(scores_BTKU: Tensor, mass: float, weight_BTK: Tensor, count_every: int = 1) -> MeanMask:
    """The weighted mean of masks that keep `mass` of the positive scores' sum (see `naive.select_mass`).

    Args and returns: as `mean_top_mask`.
    """
    ascending_BTKU = scores_BTKU.detach().sort(dim=-1).values
    # sums from the smallest up: in float32 (not every device has float64) the small ones would vanish in the others
    sums_BTKU = ascending_BTKU.clamp_min(0.0).cumsum(dim=-1)
    kept_BTK1 = (sums_BTKU > (1.0 - mass) * sums_BTKU[..., -1:]).sum(dim=-1, keepdim=True).clamp_min(1)
    cut_BTK1 = ascending_BTKU.gather(-1, scores_BTKU.shape[-1] - kept_BTK1)
    kept_BTKU = (scores_BTKU.detach() >= cut_BTK1).to(scores_BTKU.dtype)
    return _mean_mask(scores_BTKU, kept_BTKU, weight_BTK, count_every)


def _mean_mask(scores_BTKU: Tensor, kept_BTKU: Tensor, weight_BTK: Tensor, count_every: int) -> MeanMask:
    B, T, K, U = scores_BTKU.shape
    weight_BTK = weight_BTK.detach().expand(B, T, K)
    # 0 for a row of numbers, NaN for one with NaN or infinity in it: a divergence must show
    poison_BTK = scores_BTKU.detach().abs().amax(dim=-1) * 0.0
    mask_BTU = _MeanMask.apply(scores_BTKU, kept_BTKU, weight_BTK + poison_BTK)
    looked = slice(None, None, count_every)
    stats = counted(kept_BTKU.reshape(B * T, K, U)[looked], weight_BTK.reshape(B * T, K)[looked])
    return MeanMask(mask_BTU, *stats)


def select(scores_BTKU: Tensor, num_kept: tuple[int, ...]) -> Tensor:
    """1.0 where a sample keeps the unit, else 0.0; ties with the last kept unit are kept. No gradient."""
    scores_BTKU = scores_BTKU.detach()
    if all(n == scores_BTKU.shape[-1] for n in num_kept):
        return torch.ones_like(scores_BTKU)
    threshold_BTK1 = kth_largest(scores_BTKU, list(num_kept))
    return torch.ge(scores_BTKU, threshold_BTK1, out=torch.empty_like(scores_BTKU))


def select_statistical(scores_BTKU: Tensor, num_kept: tuple[int, ...]) -> Tensor:
    """1.0 where a score is above the quantile of a normal distribution with the row's mean and deviation."""
    scores_BTKU = scores_BTKU.detach()
    num_units = scores_BTKU.shape[-1]
    first_BTK1 = scores_BTKU[..., :1]  # about one of them, so that rows of equal scores come out exact
    std_BTK1, mean_BTK1 = torch.std_mean(scores_BTKU - first_BTK1, dim=-1, correction=0, keepdim=True)
    mean_BTK1 = mean_BTK1 + first_BTK1
    normal = NormalDist()
    # a quantile of -inf would be NaN at a deviation of 0; this keeps all too
    quantiles = [-3e38 if n == num_units else normal.inv_cdf(1.0 - n / num_units) for n in num_kept]
    quantile_B111 = torch.tensor(quantiles, dtype=scores_BTKU.dtype, device=scores_BTKU.device).view(-1, 1, 1, 1)
    threshold_BTK1 = torch.where(quantile_B111 == -3e38, -torch.inf, mean_BTK1 + std_BTK1 * quantile_B111)
    return torch.ge(scores_BTKU, threshold_BTK1, out=torch.empty_like(scores_BTKU))


class _MeanMask(torch.autograd.Function):
    """Sum over k of weight_k * scores_k * kept_k, one sample at a time: nothing of size BTKU is made.

    The product, not `where`: it is several times faster on CPU, and 0 * nan = nan keeps a divergence visible.
    """

    @staticmethod
    def forward(ctx, scores_BTKU: Tensor, kept_BTKU: Tensor, weight_BTK: Tensor) -> Tensor:
        ctx.save_for_backward(kept_BTKU, weight_BTK)
        mask_BTU = torch.zeros_like(scores_BTKU[:, :, 0])
        for k in range(scores_BTKU.shape[2]):
            mask_BTU.addcmul_(scores_BTKU[:, :, k] * kept_BTKU[:, :, k], weight_BTK[:, :, k, None])
        return mask_BTU

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BTU: Tensor) -> tuple[Tensor, None, None]:
        kept_BTKU, weight_BTK = ctx.saved_tensors
        return (kept_BTKU * grad_BTU[:, :, None]).mul_(weight_BTK[..., None]), None, None


@torch.library.custom_op("infmoe::kth_largest", mutates_args=())
def kth_largest(scores: Tensor, num_kept: list[int]) -> Tensor:
    """The n-th largest entry along the last dimension.

    On CPU numpy's vectorised quickselect, several times faster than `torch.topk` (results/select.json).

    Args:
        scores: float32, shape (B, ..., U).
        num_kept: n in [1, U]; one for all, or one for each of the B rows.

    Returns:
        float32, shape (B, ..., 1). NaN counts as larger than any number, as in `torch.topk`.
    """
    num_units = scores.shape[-1]
    out = scores.new_empty((*scores.shape[:-1], 1))
    if scores.numel() == 0:
        return out
    if scores.device.type != "cpu":
        for row, n in _rows(scores, num_kept):
            out[row] = scores[row].topk(n, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
        return out
    source, target = scores.contiguous().numpy(), out.numpy()
    for row, n in _rows(scores, num_kept):
        _partition(source[row].reshape(-1, num_units), target[row].reshape(-1), num_units - n)
    return out


@kth_largest.register_fake
def _(scores: Tensor, num_kept: list[int]) -> Tensor:
    return scores.new_empty((*scores.shape[:-1], 1))


def _rows(scores: Tensor, num_kept: list[int]) -> list[tuple[slice, int]]:
    """Runs of batch rows that share one n."""
    if len(num_kept) == 1:
        return [(slice(None), num_kept[0])]
    starts = [b for b, n in enumerate(num_kept) if b == 0 or n != num_kept[b - 1]]
    return [(slice(b, end), num_kept[b]) for b, end in zip(starts, [*starts[1:], len(num_kept)], strict=True)]


def _partition(source_NU: np.ndarray, target_N: np.ndarray, kth: int) -> None:
    """target[i] = the kth smallest of source[i], split over torch's number of threads."""

    def work(begin: int, end: int) -> None:
        for i in range(begin, end, _ROWS_PER_PASS):
            block = source_NU[i : min(i + _ROWS_PER_PASS, end)].copy()
            block.partition(kth, axis=-1)
            target_N[i : i + len(block)] = block[:, kth]

    num_rows, num_threads = len(source_NU), torch.get_num_threads()
    if num_threads == 1 or num_rows < 2 * _ROWS_PER_PASS:
        work(0, num_rows)
        return
    share = -(-num_rows // num_threads)
    list(_pool(num_threads).map(lambda i: work(i, min(i + share, num_rows)), range(0, num_rows, share)))


@cache
def _pool(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="infmoe-select")


if hasattr(os, "register_at_fork"):  # threads do not survive a fork: the child makes its own
    os.register_at_fork(after_in_child=_pool.cache_clear)
