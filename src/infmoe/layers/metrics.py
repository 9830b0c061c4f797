"""Routing statistics (Eq. 8-9 and what they leave out), as sums that add up over calls and ranks.

N tokens looked at, K samples, U units (neurons, blocks of neurons, or experts).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class RoutingStats(NamedTuple):
    """Sums over the tokens that were looked at; every entry is a float32 tensor, 0-d but for `counts_U`.

    Attributes:
        tokens: how many tokens were looked at.
        counts_U: how often each unit was selected, over tokens and samples (the numerator of Eq. 8).
        union: sum over tokens of the share of units that at least one sample selected.
        overlap: sum over tokens of the mean share of units that two samples have in common (1 for K = 1).
        sigma: sum over tokens of the router's mean sigma; 0 where there is no sigma.
        sigma_to_mu: sum over tokens of rms(sigma) / rms(mu); 0 where there is no sigma.
        dropped: how many (token, expert) pairs a capacity limit dropped.
    """

    tokens: Tensor
    counts_U: Tensor
    union: Tensor
    overlap: Tensor
    sigma: Tensor
    sigma_to_mu: Tensor
    dropped: Tensor

    def __add__(self, other: "RoutingStats") -> "RoutingStats":  # type: ignore[override]
        return RoutingStats(*(a + b for a, b in zip(self, other, strict=True)))

    def summary(self) -> dict[str, float]:
        """The figures that people read; every value is a plain float.

        Returns:
            entropy: normalised routing entropy in [0, 1] (Eq. 9); effective_units: exp of the entropy;
            union_ratio, overlap_ratio: means over tokens; dead_ratio: share of units never selected;
            max_load: the busiest unit's selections over the mean; sigma, sigma_to_mu: means over tokens;
            dropped_ratio: share of selections dropped by a capacity limit.
        """
        tokens = max(float(self.tokens), 1.0)
        counts = self.counts_U.cpu().double()  # not every device has float64
        total = float(counts.sum())
        q = counts / max(total, 1.0)
        entropy = float(-(q * q.clamp_min(1e-300).log()).sum())
        num_units = counts.numel()
        return {
            "entropy": entropy / math.log(num_units) if num_units > 1 else 1.0,
            "effective_units": math.exp(entropy),
            "union_ratio": float(self.union) / tokens,
            "overlap_ratio": float(self.overlap) / tokens,
            "dead_ratio": float((counts == 0).double().mean()),
            "max_load": float(counts.max()) * num_units / max(total, 1.0),
            "sigma": float(self.sigma) / tokens,
            "sigma_to_mu": float(self.sigma_to_mu) / tokens,
            "dropped_ratio": float(self.dropped) / max(total + float(self.dropped), 1.0),
        }


def uniform_stats(num_tokens: int, num_units: int, device: torch.device) -> RoutingStats:
    """The statistics of a layer that runs every unit for every token."""
    tokens = torch.full((), float(num_tokens), device=device)
    zero = torch.zeros((), device=device)
    counts_U = torch.full((num_units,), float(num_tokens), device=device)
    return RoutingStats(tokens, counts_U, tokens.clone(), tokens.clone(), zero, zero, zero)


def stats_stride(num_tokens: int, max_tokens: int | None) -> int:
    """The s for which every s-th of `num_tokens` tokens makes at most `max_tokens` (1 where None)."""
    return 1 if max_tokens is None else max(1, -(-num_tokens // max_tokens))
