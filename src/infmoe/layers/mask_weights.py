"""What one ∞-MoE call runs with, and how much each sample's mask weighs in their mean.

B batch rows, T tokens, K samples, U units.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from infmoe.layers.gaussian import kept_second_moment
from infmoe.layers.routing import Mode, PerLayer, Routing
from infmoe.ops.masked_ffn import eager
from infmoe.ops.masked_ffn.result import Selection

MaskScale = Literal["none", "fixed", "rms"]
MASK_SCALES: tuple[MaskScale, ...] = ("none", "fixed", "rms")
Ints = tuple[int, ...]
Floats = tuple[float, ...]


class Cut(NamedTuple):
    """Where a token's masks end, in place of a fixed share.

    Attributes:
        dial: "score_cut": units that score at least `at`; "score_mass": the fewest that hold `at` of the positive
            scores' sum.
        at: the value.
    """

    dial: Literal["score_cut", "score_mass"]
    at: float


class Dials(NamedTuple):
    """What one call of one layer runs with.

    Attributes:
        num_samples: K; one value for all rows or one per row.
        keep_ratios: likewise.
        mode: how the K samples are drawn.
        cut: keep what this says instead of a share, or None.
        min_sigma_to_mu: tokens whose router is surer than this take one sample; 0: none does.
    """

    num_samples: Ints
    keep_ratios: Floats
    mode: Mode
    cut: Cut | None = None
    min_sigma_to_mu: float = 0.0


def cut_of(routing: Routing) -> Cut | None:
    """What a layer's routing gives in place of a fixed share."""
    assert not isinstance(routing.score_cut, PerLayer)  # `Routing.at_layer` took it apart
    assert not isinstance(routing.score_mass, PerLayer)
    if routing.score_cut is not None:
        return Cut("score_cut", routing.score_cut)
    return None if routing.score_mass is None else Cut("score_mass", routing.score_mass)


def per_row(dial: Any, default: Any) -> tuple:
    """The dial, or the default, as one value for all rows or one per row."""
    value = default if dial is None else dial
    return value if isinstance(value, tuple) else (value,)


def num_kept(keep_ratios: Floats, num_units: int) -> Ints:
    """How many units each ratio keeps: the nearest whole number, one at least."""
    return tuple(max(1, round(ratio * num_units)) for ratio in keep_ratios)


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
