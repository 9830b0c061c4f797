"""The reference: Eq. 6 in plain PyTorch, slow and obviously right. Every kernel is tested against it.

B batch rows, T tokens, K samples, U units (neurons, or blocks of neurons).
"""

import torch
from torch import Tensor


def select(scores_BTKU: Tensor, num_kept_B: Tensor) -> Tensor:
    """Which units each sample keeps: the `num_kept` largest signed scores of every row (Eq. 6).

    Args:
        scores_BTKU: W_z z, float32.
        num_kept_B: int64, how many units each batch row keeps, in [1, U].

    Returns:
        kept_BTKU, bool. Units that tie with the last one kept are kept too. Where a score is NaN the
        comparison is false and everything is kept, so that a divergence shows in the output.
    """
    descending = scores_BTKU.detach().sort(dim=-1, descending=True).values
    last_kept = (num_kept_B - 1).view(-1, 1, 1, 1).expand(*scores_BTKU.shape[:-1], 1)
    threshold_BTK1 = descending.gather(-1, last_kept)
    return ~(scores_BTKU < threshold_BTK1)


def mean_mask(scores_BTKU: Tensor, kept_BTKU: Tensor, weight_BK: Tensor) -> Tensor:
    """The K masks folded into one: W2 is linear and shared, so the mean over samples commutes with it.

    Args:
        scores_BTKU: W_z z, float32; kept entries keep their raw value (Eq. 6).
        kept_BTKU: from `select`.
        weight_BK: float32, each sample's weight in the mean; 1/K, or 0 beyond a row's own K.

    Returns:
        mask_BTU, float32.
    """
    kept_scores = torch.where(kept_BTKU, scores_BTKU, torch.zeros_like(scores_BTKU))
    return (kept_scores * weight_BK[:, None, :, None]).sum(dim=2)
