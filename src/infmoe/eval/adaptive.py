"""Compute by the token's need: cuts that keep a wanted share of the units on average, and how sure a
router must be for a token to take one sample alone.

A unit below a cut adds little, for its score is the factor that its activation is multiplied by. So one cut for
all tokens drops the same small contributions everywhere, where a fixed share drops much of one token and keeps the
next one's crumbs. A cut by mass looks at a token's scores beside each other, and so takes tokens of all sizes alike.
"""

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from infmoe.errors import InfMoEError
from infmoe.eval.heldout import HeldOut, evaluate_loss
from infmoe.layers import PerLayer, Routing
from infmoe.layers.router import Indices, sigma_to_mu

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
    layers = _layers(model, share)
    # the scores' size, by W_z's: where to begin
    width = [max(float(layer.w_z.weight.detach().float().norm(dim=1).mean()), 1e-30) for layer in layers]

    def kept(cuts: list[float]) -> list[float]:
        routing = Routing(num_samples=num_samples, score_cut=PerLayer(cuts))
        return _kept(model, held_out, routing, seed, batch_size)

    return _calibrate("score_cut", kept, share, width, per_layer)


def layer_ratios(
    model: Any,
    held_out: HeldOut,
    mean_ratio: float,
    *,
    num_samples: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
) -> PerLayer:
    """Keep ratios that differ from layer to layer: what one cut of the scores for all layers leaves of each.

    Args and raises: as `calibrate_cut`; `mean_ratio` is the layers' mean.

    Returns:
        What `Routing.keep_ratio` takes, rounded to ten-thousandths.
    """
    cut = calibrate_cut(
        model, held_out, mean_ratio, num_samples=num_samples, per_layer=False, seed=seed, batch_size=batch_size
    )
    kept = _kept(model, held_out, Routing(num_samples=num_samples, score_cut=cut), seed, batch_size)
    return PerLayer([max(round(ratio, 4), 1e-4) for ratio in kept])


def calibrate_mass(
    model: Any,
    held_out: HeldOut,
    share: float,
    *,
    num_samples: int | None = None,
    per_layer: bool = True,
    seed: int = 0,
    batch_size: int = 16,
) -> float | PerLayer:
    """The `Routing.score_mass` that keeps `share` of the units on average over these windows.

    Args and raises: as `calibrate_cut`; units with positive scores, about a half, are the most that it can keep.
    """
    layers = _layers(model, share)

    def masses(cuts: list[float]) -> PerLayer:
        return PerLayer([max(_NORMAL.cdf(-cut), 1e-300) for cut in cuts])

    def kept_by(mass: PerLayer) -> list[float]:
        return _kept(model, held_out, Routing(num_samples=num_samples, score_mass=mass), seed, batch_size)

    most = kept_by(PerLayer([1.0] * len(layers)))
    ceiling = min(most) if per_layer else sum(most) / len(most)
    if ceiling < share:
        raise InfMoEError(
            f"no score_mass keeps {share:g} of the units: no more than {ceiling:.3f} have positive scores"
        )
    width = [1.0] * len(layers)
    found = _calibrate("score_mass", lambda cuts: kept_by(masses(cuts)), share, width, per_layer)
    return masses(list(found.values)) if isinstance(found, PerLayer) else masses([found]).values[0]


def calibrate_sigma_to_mu(
    model: Any,
    held_out: HeldOut,
    mean_samples: float,
    *,
    num_samples: int,
    keep_ratio: float | None = None,
    seed: int = 0,
    batch_size: int = 16,
) -> PerLayer:
    """The `Routing.min_sigma_to_mu` of each layer at which a token takes `mean_samples` on average: 1, or all K.

    Args:
        model: an ∞-MoE model that draws, in eval mode.
        held_out: windows.
        mean_samples: from 1 to `num_samples`.
        num_samples: K, of the tokens whose router is less sure.
        keep_ratio: that it will run at; None: the model's own.
        seed: of the noise.
        batch_size: windows per forward pass.

    Raises:
        InfMoEError: a model that draws nothing, a mean out of range, or no bound that gives about that mean.
    """
    if not 1.0 <= mean_samples <= num_samples or num_samples < 2:
        raise InfMoEError(f"the mean must lie between 1 and num_samples, 2 or more: got {mean_samples}, {num_samples}")
    wanted = (mean_samples - 1.0) / (num_samples - 1.0)
    bounds = [0.0] * len(_layers(model))
    for i in range(len(bounds)):  # what a layer's router sees hangs on the layers below it
        routing = Routing(num_samples=num_samples, keep_ratio=keep_ratio, min_sigma_to_mu=PerLayer(bounds))
        found_N = routers_sigma_to_mu(model, held_out, routing, seed=seed, batch_size=batch_size)[i]
        bounds[i] = float(found_N.sort(descending=True).values[round(wanted * (len(found_N) - 1))])
        mean = 1.0 + (num_samples - 1) * float((found_N >= bounds[i]).float().mean())
        if abs(mean / mean_samples - 1.0) > max(_CLOSE, num_samples / len(found_N)):
            raise InfMoEError(
                f"no bound gives {mean_samples:g} samples on average: the router is as sure of many tokens, and "
                f"{mean:.2f} is as near as it gets"
            )
    return PerLayer(bounds)


def routers_sigma_to_mu(
    model: Any, held_out: HeldOut, routing: Routing, *, seed: int = 0, batch_size: int = 16
) -> list[Tensor]:
    """What `Routing.min_sigma_to_mu` looks at, of every token: float32, (N,), one for each layer.

    Raises:
        InfMoEError: a routing that draws nothing.
    """
    layers = _layers(model)
    if any((routing.mode or layer.routing_mode) == "mu" or not layer.router.noise_dim for layer in layers):
        raise InfMoEError("z = mu draws nothing: there is no sigma to look at")
    found: list[list[Tensor]] = [[] for _ in layers]
    with contextlib.ExitStack() as hooks:
        for layer, seen in zip(layers, found, strict=True):
            hooks.enter_context(_looking_at(layer.router, seen))
        evaluate_loss(model, held_out, routing, seed=seed, batch_size=batch_size)
    return [torch.cat(seen) for seen in found]


@contextlib.contextmanager
def _looking_at(router: torch.nn.Module, seen: list[Tensor]) -> Iterator[None]:
    def look(module: torch.nn.Module, inputs: Any, indices: Indices) -> None:
        assert indices.sigma_BTZ is not None
        seen.append(sigma_to_mu(indices.mu_BTZ, indices.sigma_BTZ).flatten().cpu())

    handle = router.register_forward_hook(look)
    try:
        yield
    finally:
        handle.remove()


def _layers(model: Any, share: float | None = None) -> list[Any]:
    """The ∞-MoE layers of a model, of whose units that share can be kept."""
    if model.config.ffn != "infinity":
        raise InfMoEError(f"a model with ffn='{model.config.ffn}' has no scores to cut")
    layers = [block.mlp for block in model.transformer.h]
    if share is not None:
        if not 0.0 < share < 1.0:
            raise InfMoEError(f"the share to keep must lie in (0, 1), got {share}")
        units = min(layer.num_units for layer in layers)
        if share * units < 1.0:
            raise InfMoEError(f"a share of {share:g} is less than one of {units} units: ask for 1/{units} or more")
    return layers


def _calibrate(
    dial: str, kept_at: Callable[[list[float]], list[float]], share: float, width: list[float], per_layer: bool
) -> float | PerLayer:
    """The cuts at which each layer, or all together, keep `share`.

    Args:
        dial: whose cuts they are.
        kept_at: the layers' cuts -> what each layer keeps, less with a larger cut.
        share: to keep.
        width: how far to step at first, for each layer.
        per_layer: each layer keeps the share; False: one cut for all.
    """
    num_layers = len(width)
    searches = [_Search(share, size) for size in (width if per_layer else [sum(width) / num_layers])]
    for _ in range(_ROUNDS * len(searches)):
        cuts = [search.cut for search in searches] * (1 if per_layer else num_layers)
        kept = kept_at(cuts)
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
        f"no {dial} keeps {share:g} of the units: many scores are alike, and {worst:.3f} is as near as it gets"
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
