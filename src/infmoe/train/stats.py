"""Routing statistics of a whole step: summed over micro-batches and processes, averaged over layers.

U units.
"""

from collections.abc import Sequence
from typing import Any

import torch

from infmoe.layers.metrics import RoutingStats


def add_stats(total: list[RoutingStats] | None, more: Sequence[RoutingStats]) -> list[RoutingStats]:
    """Each layer's sums so far plus those of one more micro-batch."""
    if total is None:
        return list(more)
    return [a + b for a, b in zip(total, more, strict=True)]


def summarize(stats: Sequence[RoutingStats] | None, accelerator: Any) -> dict[str, float]:
    """The figures that people read, averaged over layers; one collective and one wait for the device."""
    if not stats:
        return {}
    entries = [entry.reshape(-1).float() for layer in stats for entry in layer]
    flat = accelerator.reduce(torch.cat(entries), "sum").cpu()
    parts = iter(flat.split([entry.numel() for entry in entries]))
    summaries = []
    for layer in stats:
        summed = RoutingStats(*(next(parts).view(entry.shape) for entry in layer))
        summaries.append(summed.summary())
    return {name: sum(s[name] for s in summaries) / len(summaries) for name in summaries[0]}
