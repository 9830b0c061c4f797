"""Compute by the token's need: the score cut that keeps a wanted share of the units on average.

A unit below the cut adds little, for its score is the factor that its activation is multiplied by. So one cut for
all tokens drops the same small contributions everywhere, where a fixed share drops much of one token and keeps the
next one's crumbs.
"""

import statistics
from typing import Any

from infmoe.errors import InfMoEError
from infmoe.eval.heldout import HeldOut, evaluate_loss
from infmoe.layers import PerLayer, Routing

_ROUNDS = 40
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
    if not per_layer:
        width = [sum(width) / num_layers] * num_layers
    cuts, before = [0.0] * num_layers, None
    for _ in range(_ROUNDS):
        routing = Routing(num_samples=num_samples, score_cut=PerLayer(cuts))
        kept = _kept(model, held_out, routing, seed, batch_size)
        if not per_layer:
            kept = [sum(kept) / num_layers] * num_layers
        if all(abs(k / share - 1.0) < _CLOSE for k in kept):
            return PerLayer(cuts) if per_layer else cuts[0]
        # a layer's scores hang on what the layers below it keep, so no bracket holds: steps as on a normal's quantiles
        at = [_quantile(k) for k in kept]
        if before is not None:
            width = [_width(*four) for four in zip(width, cuts, at, *before, strict=True)]
        before = cuts, at
        cuts = [cut + w * (a - _quantile(share)) for cut, w, a in zip(cuts, width, at, strict=True)]
    worst = max(kept, key=lambda k: abs(k / share - 1.0))
    raise InfMoEError(
        f"no cut keeps {share:g} of the units: many scores are alike, and {worst:.3f} is as near as it gets"
    )


def _quantile(share: float) -> float:
    """Of the standard normal, ends drawn in."""
    return _NORMAL.inv_cdf(min(max(share, 1e-3), 1 - 1e-3))


def _width(width: float, cut: float, at: float, cut_before: float, at_before: float) -> float:
    """How far the cut must go for one step of the quantile, by the last two rounds; three times or a third at most."""
    if at == at_before or (cut - cut_before) * (at - at_before) >= 0.0:
        return width if at != at_before else 3.0 * width  # nothing moved yet: the scores are larger than thought
    return min(max((cut - cut_before) / (at_before - at), width / 3.0), 3.0 * width)


def _kept(model: Any, held_out: HeldOut, routing: Routing, seed: int, batch_size: int) -> list[float]:
    """The share of the units that a sample keeps, of each layer."""
    layers = evaluate_loss(model, held_out, routing, seed=seed, batch_size=batch_size).layers
    samples = [1 if block.mlp.routing_mode == "mu" else block.mlp.num_samples for block in model.transformer.h]
    K = [routing.num_samples if isinstance(routing.num_samples, int) else own for own in samples]
    return [
        float(stats.counts_U.sum() / stats.tokens / len(stats.counts_U)) / k for stats, k in zip(layers, K, strict=True)
    ]
