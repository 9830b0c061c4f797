"""Compute by the token's need: the score cut that keeps a wanted share of the units on average.

A unit below the cut adds little, for its score is the factor that its activation is multiplied by. So one cut for
all tokens drops the same small contributions everywhere, where a fixed share drops much of one token and keeps the
next one's crumbs.
"""

import math
import statistics
from typing import Any

from infmoe.errors import InfMoEError
from infmoe.eval.heldout import HeldOut, evaluate_loss
from infmoe.layers import PerLayer, Routing

_ROUNDS = 40  # for each cut that is looked for
_NORMAL = statistics.NormalDist()
_CLOSE = 0.005  # of the wanted share


def calibrate_cut(
    model: Any,
    held_out: HeldOut,
    share: float,
    *,
    num_samples: int | None = None,
    per_layer: bool = True,
    seed: int = 0,
    batch_size: int = 16,
) -> float | PerLayer:
    """The `Routing.score_cut` that keeps `share` of the units on average over these windows.

    Calibrate on other text than the cut is judged on.

    Args:
        model: an ∞-MoE model, in eval mode.
        held_out: windows.
        share: of the units that a sample keeps, on average; in (0, 1).
        num_samples: K; None: the model's own.
        per_layer: a cut for each layer, each of which keeps `share`; False: one cut for all, which keep it together.
        seed: of the noise.
        batch_size: windows per forward pass.

    Raises:
        InfMoEError: a model without scores, a share out of range, or no cut that keeps about that share.
    """
    if model.config.ffn != "infinity":
        raise InfMoEError(f"a model with ffn='{model.config.ffn}' has no scores to cut")
    if not 0.0 < share < 1.0:
        raise InfMoEError(f"the share to keep must lie in (0, 1), got {share}")
    num_layers = model.config.num_hidden_layers
    units = min(block.mlp.num_units for block in model.transformer.h)
    if share * units < 1.0:
        raise InfMoEError(f"a share of {share:g} is less than one of {units} units: ask for 1/{units} or more")
    # the scores' size, by W_z's: where to begin
    weights = [block.mlp.w_z.weight.detach().float() for block in model.transformer.h]
    width = [max(float(weight_UZ.norm(dim=1).mean()), 1e-30) for weight_UZ in weights]
    searches = [_Search(share, size) for size in (width if per_layer else [sum(width) / num_layers])]
    for _ in range(_ROUNDS * len(searches)):
        cuts = [search.cut for search in searches] * (1 if per_layer else num_layers)
        kept = _kept(model, held_out, Routing(num_samples=num_samples, score_cut=PerLayer(cuts)), seed, batch_size)
        if not per_layer:
            kept = [sum(kept) / num_layers]
        if all(abs(k / share - 1.0) < _CLOSE for k in kept):
            return PerLayer(cuts) if per_layer else cuts[0]
        # what a layer keeps hangs on its own cut and on those of the layers below it
        moved = False
        for search, k in zip(searches, kept, strict=True):
            close = abs(k / share - 1.0) < _CLOSE
            if not close:
                search.step(k)
            if moved:
                search.forget()
            moved = moved or not close
    worst = max(kept, key=lambda k: abs(k / share - 1.0))
    raise InfMoEError(
        f"no cut keeps {share:g} of the units: many scores are alike, and {worst:.3f} is as near as it gets"
    )


class _Search:
    """The way to a cut: steps as on a normal's quantiles, within what is known to be too low and too high."""

    def __init__(self, share: float, width: float):
        self.share, self.width, self.cut = share, width, 0.0
        self._before: tuple[float, float] | None = None  # the last cut, and the quantile of what it kept
        self._turns = 0
        self.forget()

    def forget(self) -> None:
        """What other cuts kept says nothing any more."""
        self.low, self.high = -math.inf, math.inf

    def step(self, kept: float) -> None:
        """Move the cut, now that it is known what it keeps."""
        edge = min(self.share, 1.0 - self.share) / 4  # what is kept may be all or nothing
        at = _NORMAL.inv_cdf(min(max(kept, edge), 1.0 - edge))
        self._learn(at)
        if kept > self.share:
            self.low = self.cut
        else:
            self.high = self.cut
        self._before = self.cut, at
        self._turns += 1
        cut = self.cut + self.width * (at - _NORMAL.inv_cdf(self.share))
        # scores of several sizes have plateaus, on which such steps stall: every third one halves what is left
        bounded = math.isfinite(self.low) and math.isfinite(self.high)
        if bounded and (self._turns % 3 == 0 or not self.low < cut < self.high):
            cut = (self.low + self.high) / 2
        self.cut = cut

    def _learn(self, at: float) -> None:
        """How far the cut must go for one step of the quantile, by the last two rounds; four times as far at most."""
        if self._before is None:
            return
        cut, before = self._before
        moved = (self.cut - cut) * (before - at)
        if at == before or moved <= 0.0:
            self.width *= 2.0  # nothing moved: the scores are larger than thought
        else:
            self.width = min(max((self.cut - cut) / (before - at), self.width / 4.0), self.width * 4.0)


def _kept(model: Any, held_out: HeldOut, routing: Routing, seed: int, batch_size: int) -> list[float]:
    """The share of the units that a sample keeps, of each layer."""
    layers = evaluate_loss(model, held_out, routing, seed=seed, batch_size=batch_size).layers
    samples = [1 if block.mlp.routing_mode == "mu" else block.mlp.num_samples for block in model.transformer.h]
    K = [routing.num_samples if isinstance(routing.num_samples, int) else own for own in samples]
    return [
        float(stats.counts_U.sum() / stats.tokens / len(stats.counts_U)) / k for stats, k in zip(layers, K, strict=True)
    ]
