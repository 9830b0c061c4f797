"""The reference: Eq. 6 in plain PyTorch, slow and obviously right. Every kernel is tested against it.

B batch rows, T tokens, K samples, U units (neurons, or blocks of neurons).
"""

from statistics import NormalDist

import torch
from torch import Tensor


def select(scores_BTKU: Tensor, num_kept_B: Tensor) -> Tensor:
    """Which units each sample keeps: the `num_kept` largest signed scores of every row (Eq. 6).

    Args:
        scores_BTKU: W_z z, float32.
        num_kept_B: int64, how many units each batch row keeps, in [1, U].

    Returns:
        kept_BTKU, bool. Units that tie with the last one kept are kept too.
    """
    descending = scores_BTKU.detach().sort(dim=-1, descending=True).values
    last_kept = (num_kept_B - 1).view(-1, 1, 1, 1).expand(*scores_BTKU.shape[:-1], 1)
    threshold_BTK1 = descending.gather(-1, last_kept)
    return scores_BTKU >= threshold_BTK1


def select_statistical(scores_BTKU: Tensor, num_kept_B: Tensor) -> Tensor:
    """The same number on average, were the scores Gaussian: those above mean + std * (normal quantile).

    The quantile leaves `num_kept` / U of a normal distribution above it; where all are to be kept, all are.

    Returns:
        kept_BTKU, bool.
    """
    num_units = scores_BTKU.shape[-1]
    scores_BTKU = scores_BTKU.detach()
    first_BTK1 = scores_BTKU[..., :1]  # about one of them, so that rows of equal scores come out exact
    std_BTK1, mean_BTK1 = torch.std_mean(scores_BTKU - first_BTK1, dim=-1, correction=0, keepdim=True)
    mean_BTK1 = mean_BTK1 + first_BTK1
    normal = NormalDist()
    quantiles = [-torch.inf if n == num_units else normal.inv_cdf(1.0 - n / num_units) for n in num_kept_B.tolist()]
    quantile_B111 = torch.tensor(quantiles, dtype=scores_BTKU.dtype).view(-1, 1, 1, 1)
    threshold_BTK1 = torch.where(quantile_B111 == -torch.inf, quantile_B111, mean_BTK1 + std_BTK1 * quantile_B111)
    return scores_BTKU >= threshold_BTK1


def select_cut(scores_BTKU: Tensor, cut: float) -> Tensor:
    """Which units score at least `cut`, or, where none does, the row's largest.

    Returns:
        kept_BTKU, bool.
    """
    scores_BTKU = scores_BTKU.detach()
    return (scores_BTKU >= cut) | (scores_BTKU == scores_BTKU.max(dim=-1, keepdim=True).values)


def select_mass(scores_BTKU: Tensor, mass: float) -> Tensor:
    """Top-p over units: the fewest, the largest first, that hold `mass` of the sum of a sample's positive scores.

    Units that tie with the last one kept are kept too; where no score is positive, the row's largest.

    Returns:
        kept_BTKU, bool.
    """
    scores_BTKU = scores_BTKU.detach()
    largest_BTK1 = scores_BTKU.max(dim=-1, keepdim=True).values
    descending_BTKU = scores_BTKU.double().clamp_min(0.0).sort(dim=-1, descending=True).values
    sums_BTKU = descending_BTKU.cumsum(dim=-1)
    reached_BTKU = sums_BTKU >= mass * sums_BTKU[..., -1:]
    first_BTK1 = reached_BTKU.long().argmax(dim=-1, keepdim=True)
    last_kept_BTK1 = descending_BTKU.gather(-1, first_BTK1)
    return (scores_BTKU >= last_kept_BTK1) | (scores_BTKU == largest_BTK1)


def mean_mask(scores_BTKU: Tensor, kept_BTKU: Tensor, weight_BK: Tensor) -> Tensor:
    """The K masks folded into one: W2 is linear and shared, so the mean over samples commutes with it.

    A sample whose scores hold NaN or infinity is NaN throughout, and so is every gradient through it: a
    divergence must show.

    Args:
        scores_BTKU: W_z z, float32; kept entries keep their raw value (Eq. 6).
        kept_BTKU: from `select`.
        weight_BK: float32, each sample's weight in the mean; 1/K, or 0 beyond a row's own K.

    Returns:
        mask_BTU, float32.
    """
    finite_BTK1 = scores_BTKU.detach().isfinite().all(dim=-1, keepdim=True)
    weight_BTK1 = weight_BK[:, None, :, None] * torch.where(finite_BTK1, 1.0, torch.nan)
    return (scores_BTKU * kept_BTKU * weight_BTK1).sum(dim=2)
