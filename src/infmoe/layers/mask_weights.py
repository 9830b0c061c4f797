"""How much each sample's mask weighs in their mean.

B batch rows, T tokens, K samples, U units.
"""

import math

import torch
from torch import Tensor

from infmoe.layers.dials import Dials, Floats, MaskScale, num_kept
from infmoe.layers.gaussian import kept_second_moment
from infmoe.ops.masked_ffn import eager
from infmoe.ops.masked_ffn.result import Selection


def sample_weights(
    dials: Dials,
    *,
    trained_ratio: float,
    mask_scale: MaskScale,
    device: torch.device,
    scores_BTKU: Tensor | None = None,
    selection: Selection = "exact",
) -> Tensor:
    """Each sample's weight in the mean mask, without gradient.

    Args:
        dials: of the call.
        trained_ratio: the ratio at which masks keep their size.
        mask_scale: see `InfinityFFN`.
        device: of the result.
        scores_BTKU: W_z z; what "rms" looks at, away from the trained ratio.
        selection: see `InfinityFFN`.

    Returns:
        float32, broadcastable to (B, T, K): 1 / K, 0 beyond a row's own K, times the scale.
    """
    num_samples, keep_ratios = dials.num_samples, dials.keep_ratios
    K = max(num_samples)
    if len(num_samples) == 1:
        weight_BTK = torch.full((1, 1, K), 1.0 / K, dtype=torch.float32, device=device)
    else:
        weights = [[1.0 / k if i < k else 0.0 for i in range(K)] for k in num_samples]
        weight_BTK = torch.tensor(weights, dtype=torch.float32, device=device)[:, None]
    if mask_scale == "none" or all(ratio == trained_ratio for ratio in keep_ratios):
        return weight_BTK
    if mask_scale == "fixed":
        trained = kept_second_moment(trained_ratio)
        factors = [math.sqrt(trained / kept_second_moment(ratio)) for ratio in keep_ratios]
        return weight_BTK * torch.tensor(factors, dtype=torch.float32, device=device)[:, None, None]
    assert scores_BTKU is not None
    detached_BTKU = scores_BTKU.detach()
    one = torch.ones((1, 1, 1), dtype=torch.float32, device=device)

    def mask_norm_BTK(ratios: Floats) -> Tensor:
        # one sample at a time: the norm of its own mask, not of the mean
        kept = num_kept(ratios, detached_BTKU.shape[-1])
        masks = [
            eager.mean_top_mask(detached_BTKU[:, :, k : k + 1], kept, one, selection=selection).mask_BTU
            for k in range(K)
        ]
        return torch.stack([mask.norm(dim=-1) for mask in masks], dim=-1)

    return weight_BTK * mask_norm_BTK((trained_ratio,)) / mask_norm_BTK(keep_ratios).clamp_min(1e-12)
