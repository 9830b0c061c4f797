"""Curves over a dial, seed by seed, from what runs were measured at."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from infmoe.reproduce.plan import ELASTIC_TUNED, further_tokens
from infmoe.reproduce.statistics import Interval, interval
from infmoe.reproduce.store import Store

RANGE = 0.01  # nats: a dial's useful range is where the loss stays this close to its best
# x -> seed -> loss
Curve = dict[Any, dict[int, float]]


def curve(
    store: Store,
    arm: str,
    tokens: int,
    x: Callable[[Mapping[str, Any]], Any],
    measure: str = "dials",
    figure: str = "loss",
) -> Curve:
    """A figure of the points of a measure, by their place on an axis and by seed; points without a place are left."""
    found: Curve = {}
    for run in store.runs(arm, tokens):
        for row in run.measure(measure) or ():
            at = x(row)
            if at is not None and figure in row:
                found.setdefault(at, {})[run.spec.seed] = row[figure]
    return found


def means(found: Curve) -> dict[Any, Interval]:
    """The curve over seeds, in the axis's order."""
    return {at: interval(list(losses.values())) for at, losses in sorted(found.items()) if losses}


def ratio_of(run_samples: int | None) -> Callable[[Mapping[str, Any]], Any]:
    """The keep ratio of a point at the trained number of samples, or None."""

    def x(row: Mapping[str, Any]) -> Any:
        return row["keep_ratio"] if row.get("mode") is None and row.get("num_samples") == run_samples else None

    return x


def over_ratio(store: Store, arm: str, *, tokens: int | None = None, figure: str = "loss") -> Curve:
    """Loss over the keep ratio at K = 1, which all these arms are trained with.

    Args:
        store, arm: whose.
        tokens: of the runs; None: those that the arm is compared at, few where it starts from a trained model.
        figure: instead of the loss.
    """
    if tokens is None:
        tokens = further_tokens(store.scale) if arm in ELASTIC_TUNED else store.scale.tokens
    return curve(store, arm, tokens, ratio_of(1), figure=figure)


def over_k(store: Store, arm: str, *, tokens: int | None = None, figure: str = "loss") -> Curve:
    """Loss over the number of experts, gates renormalised."""
    return curve(store, arm, tokens or store.scale.tokens, lambda row: row.get("num_experts_per_tok"), figure=figure)


def over_samples(store: Store, arm: str, *, figure: str = "loss") -> Curve:
    """Loss over K at the trained keep ratio."""
    return curve(
        store,
        arm,
        store.scale.tokens,
        lambda row: row.get("num_samples") if row.get("mode") is None and row["keep_ratio"] == 0.25 else None,
        figure=figure,
    )


def at_mu(store: Store, arm: str, *, figure: str = "loss") -> Curve:
    """Loss at z = mu and the trained keep ratio: a curve of one point, under "mu"."""
    return curve(
        store,
        arm,
        store.scale.tokens,
        lambda row: "mu" if row.get("mode") == "mu" and row["keep_ratio"] == 0.25 else None,
        figure=figure,
    )


@dataclass(frozen=True)
class Stretch:
    """Where a dial is useful.

    Attributes:
        best: where the loss is lowest.
        low, high: the ends of the stretch around it within `RANGE`.
        loss: the lowest.
    """

    best: Any
    low: Any
    high: Any
    loss: float

    @property
    def octaves(self) -> float:
        """Its width, in doublings."""
        return math.log2(self.high / self.low)


def shared_tokens(store: Store, arm: str, other: str, tokens: int) -> int:
    """Tokens for which the runs of two arms are one, with every seed that both have: their logged losses are the same.

    So they are where the two differ from some step on and were trained on one machine. 0: nothing is shared.
    """
    theirs = {run.spec.seed: run for run in store.runs(other, tokens)}
    pairs = [(run, theirs[run.spec.seed]) for run in store.runs(arm, tokens) if run.spec.seed in theirs]
    return min((_alike(ours.values["curve"], its.values["curve"]) for ours, its in pairs), default=0)


def _alike(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> int:
    steps = [list(zip(curve["tokens"], curve["loss"], strict=True)) for curve in (ours, theirs)]
    same = 0
    for a, b in zip(*steps, strict=False):
        if a != b:
            break
        same = a[0]
    return same


def useful_range(line: Mapping[Any, float]) -> Stretch:
    """The useful stretch of one checkpoint, of its losses over a dial."""
    order = sorted(line)
    best = min(order, key=lambda at: line[at])
    low = high = order.index(best)
    while low > 0 and line[order[low - 1]] <= line[best] + RANGE:
        low -= 1
    while high < len(order) - 1 and line[order[high + 1]] <= line[best] + RANGE:
        high += 1
    return Stretch(best, order[low], order[high], line[best])


def useful_ranges(found: Curve) -> dict[int, Stretch]:
    """The useful stretch of each seed that has every point of the curve."""
    seeds = set.intersection(*(set(losses) for losses in found.values())) if found else set()
    return {seed: useful_range({at: losses[seed] for at, losses in found.items()}) for seed in sorted(seeds)}
