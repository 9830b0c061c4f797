"""Held-out loss over fixed windows, in nats per token.

B rows, T tokens, V vocabulary.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from infmoe.data import TokenData
from infmoe.data.manifest import Split
from infmoe.errors import InfMoEError
from infmoe.layers import NoiseKey, Routing, RoutingStats


@dataclass(frozen=True)
class HeldOut:
    """Fixed windows of held-out text.

    Attributes:
        tokens_NT: int64, one window a row.
        window_N: int64, each window's number in its split: the stream of its noise.
    """

    tokens_NT: Tensor
    window_N: Tensor

    @staticmethod
    def from_data(data: TokenData, length: int, num_windows: int, split: Split = "val") -> "HeldOut":
        """Windows spread evenly over the split; all of them where it has fewer than `num_windows`.

        Raises:
            InfMoEError: the split is empty, or holds fewer than two windows of this length.
        """
        if not data.info(split).tokens:
            raise InfMoEError(
                f"{data.folder} has no {split} split: give other --data, prepared with a --val-fraction above 0"
            )
        remedy = "give other --data with more text" + (" or a larger --val-fraction" if split == "val" else "")
        available = data.num_windows(split, length, at_least=2, remedy=remedy)
        indices = spread_windows(available, min(num_windows, available))
        tokens = torch.from_numpy(data.windows(split, indices, length))
        return HeldOut(tokens, torch.from_numpy(indices))


def spread_windows(available: int, count: int) -> NDArray[np.int64]:
    """`count` of the windows 0 .. available - 1, evenly spread, so that they fall on as many documents as they can."""
    return np.arange(count, dtype=np.int64) * available // count


@dataclass(frozen=True)
class LossPoint:
    """The loss under one routing.

    Attributes:
        loss: mean cross-entropy in nats per token.
        loss_se: standard error of the mean over windows.
        window_losses: float64, one a window, for paired comparisons.
        layers: each layer's routing statistics over all windows.
    """

    loss: float
    loss_se: float
    window_losses: Tensor
    layers: tuple[RoutingStats, ...]

    def routing(self) -> dict[str, float]:
        """Routing figures averaged over layers (see `RoutingStats.summary`)."""
        summaries = [stats.summary() for stats in self.layers]
        return {name: sum(s[name] for s in summaries) / len(summaries) for name in summaries[0]}

    def union_ratios(self) -> tuple[float, ...]:
        """The measured share of units in the union of the K masks, one a layer."""
        return tuple(stats.summary()["union_ratio"] for stats in self.layers)


@torch.no_grad()
def window_losses(model: Any, tokens_BT: Tensor, routing: Routing) -> tuple[Tensor, tuple[RoutingStats, ...]]:
    """Mean cross-entropy of each row's tokens 1 .. T-1, float64 of shape (B,) on the CPU, and the routing statistics.

    Averaged on the CPU, as not every device has float64 (Apple's MPS).
    """
    output = model(input_ids=tokens_BT, routing=routing, use_cache=False)
    loss_BT = F.cross_entropy(
        output.logits[:, :-1].flatten(0, 1).float(), tokens_BT[:, 1:].flatten(), reduction="none"
    ).view(tokens_BT.shape[0], -1)
    return loss_BT.cpu().double().mean(dim=1), output.routing_stats


def evaluate_loss(model: Any, held_out: HeldOut, routing: Routing, *, seed: int = 0, batch_size: int = 16) -> LossPoint:
    """The loss under `routing`; each window is its own noise stream, so batch size and order change nothing.

    Args:
        model: an `InfMoEForCausalLM`, in eval mode.
        held_out: the windows.
        routing: dials and mode; its key is replaced.
        seed: of the noise.
        batch_size: windows per forward pass.

    Raises:
        InfMoEError: a dial that the model does not have.
    """
    device = next(model.parameters()).device
    losses, layers = [], None
    for start in range(0, len(held_out.tokens_NT), batch_size):
        rows = slice(start, start + batch_size)
        key = NoiseKey(seed=seed, stream=held_out.window_N[rows].to(device))
        loss_B, stats = window_losses(model, held_out.tokens_NT[rows].to(device), dataclasses.replace(routing, key=key))
        losses.append(loss_B)
        layers = stats if layers is None else tuple(a + b for a, b in zip(layers, stats, strict=True))
    loss_N = torch.cat(losses)
    assert layers is not None
    return LossPoint(float(loss_N.mean()), float(loss_N.std()) / math.sqrt(len(loss_N)), loss_N, layers)
