"""What every selection returns.

B batch rows, T tokens, N tokens that are looked at, K samples, U units, W bytes of packed selection per sample.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Selection = Literal["exact", "statistical"]
SELECTIONS: tuple[Selection, ...] = ("exact", "statistical")


class MaskStats(NamedTuple):
    """What the mean of the K masks hides, summed over the tokens that were looked at; float32, no gradient.

    Attributes:
        counts_U: how often each unit was kept, over tokens and samples whose weight is not 0.
        union: 0-d; share of units that at least one such sample kept, summed over tokens.
        overlap: 0-d; mean share of a sample's units that another keeps too (1 where there is one sample only).
    """

    counts_U: Tensor
    union: Tensor
    overlap: Tensor


class MeanMask(NamedTuple):
    """The weighted mean of the K masks, with its statistics (see `MaskStats`).

    Attributes:
        mask_BTU: carries gradient to the kept scores and to nothing else.
    """

    mask_BTU: Tensor
    counts_U: Tensor
    union: Tensor
    overlap: Tensor

    @property
    def stats(self) -> MaskStats:
        return MaskStats(self.counts_U, self.union, self.overlap)


def counted(kept_NKU: Tensor, weight_NK: Tensor) -> MaskStats:
    """The statistics of a selection.

    Args:
        kept_NKU: float, 1 where the sample keeps the unit.
        weight_NK: samples of weight 0 do not count.
    """
    live_NK1 = (weight_NK != 0).to(kept_NKU.dtype).unsqueeze(-1)
    times_kept_NU = (kept_NKU * live_NK1).sum(dim=1)
    # a unit kept c times is common to c(c-1)/2 of the K(K-1)/2 pairs; a sample keeps kept/K units
    K_N, kept_N = live_NK1.sum(dim=(1, 2)), times_kept_NU.sum(-1)
    common_N = (times_kept_NU.square().sum(-1) - kept_N) / ((K_N - 1) * kept_N).clamp_min(1)
    return MaskStats(
        times_kept_NU.sum(0),
        times_kept_NU.clamp_max(1.0).mean(-1).sum(),
        torch.where(K_N > 1, common_N, 1.0).sum(),
    )


def unpacked(packed_NKW: Tensor, num_units: int) -> Tensor:
    """1.0 where the bit is set, float32, shape (N, K, U); bit j of byte w is unit 8 w + j."""
    bits_NKW8 = (packed_NKW.unsqueeze(-1) >> torch.arange(8, device=packed_NKW.device)) & 1
    return bits_NKW8.flatten(-2)[..., :num_units].float()
