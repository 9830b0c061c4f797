"""Settings that differ from layer to layer: those that a search finds, and shares of a wanted mean."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from infmoe.errors import InfMoEError
from infmoe.eval.adaptive import layer_ratios
from infmoe.eval.heldout import HeldOut
from infmoe.hf import model_cost
from infmoe.layers.dials import num_kept
from infmoe.layers.point import Point


def schedules(
    model: Any,
    start: Point,
    dial: str,
    values: Sequence[Any],
    count: int,
    *,
    evaluate: Callable[[Sequence[Point]], list[dict[str, Any]]],
) -> list[Point]:
    """Settings with a value of their own for each layer, `count` of them evenly spread over the FLOPs.

    A greedy walk from the largest value in every layer to the smallest: each step lowers the layer that costs
    least loss per FLOP saved, by what lowering that layer alone does to the loss.

    Args:
        model: in eval mode.
        start: the setting whose `dial` is replaced.
        dial: "keep_ratio" or "num_experts_per_tok".
        values: of the dial.
        count: how many settings.
        evaluate: loss and FLOPs of points.
    """
    ladder = rungs(model, dial, values)
    num_layers = model.config.num_hidden_layers
    if count < 1 or len(ladder) < 2 or num_layers < 2:
        return []

    def setting(levels: Sequence[int]) -> Point:
        per_layer: dict[str, Any] = {dial: tuple(ladder[level] for level in levels)}
        return replace(start, **per_layer)

    top = [0] * num_layers
    single = [[setting([*top[:i], level, *top[i + 1 :]]) for level in range(1, len(ladder))] for i in range(num_layers)]
    rows = evaluate([setting(top), *(point for layer in single for point in layer)])
    base = rows[0]["loss"]
    losses = [[0.0] * len(ladder) for _ in range(num_layers)]
    for i in range(num_layers):
        for level in range(1, len(ladder)):
            losses[i][level] = rows[1 + i * (len(ladder) - 1) + level - 1]["loss"] - base
    levels, walk = list(top), []
    while any(level < len(ladder) - 1 for level in levels):

        def price(i: int) -> float:
            here, there = levels[i], levels[i] + 1
            return (losses[i][there] - losses[i][here]) / (ladder[here] - ladder[there])

        i = min((i for i in range(num_layers) if levels[i] < len(ladder) - 1), key=price)
        levels[i] += 1
        if len(set(levels)) > 1:
            walk.append(setting(levels))
    flops = [model_cost(model.config, point.routing()).flops_ideal for point in walk]
    low, high = min(flops), max(flops)
    wanted = [low + (high - low) * (k + 0.5) / count for k in range(count)]
    nearest = [walk[min(range(len(walk)), key=lambda j: abs(flops[j] - target))] for target in wanted]
    return list(dict.fromkeys(nearest))


def rungs(model: Any, dial: str, values: Sequence[Any]) -> list[Any]:
    """The values of a dial from the largest down, of ratios that keep as many units the first alone."""
    ladder = sorted(set(values), reverse=True)
    if dial != "keep_ratio":
        return ladder
    units = model.transformer.h[0].mlp.num_units
    return list({num_kept((ratio,), units): ratio for ratio in reversed(ladder)}.values())[::-1]


def layered(
    model: Any, start: Point, ratios: Sequence[float], held_out: HeldOut, *, seed: int, batch_size: int
) -> list[Point]:
    """Beside every ratio for all layers, a schedule of that mean (see `layer_ratios`), where there is one.

    Of samples that are drawn one by one, which is how cuts are found; of more layers than one.
    """
    found: list[Point] = []
    samples = start.num_samples
    if not isinstance(samples, int) or start.mode not in (None, "sample") or model.config.num_hidden_layers < 2:
        return found
    for ratio in ratios:
        with contextlib.suppress(InfMoEError):  # no cut keeps that share
            own = layer_ratios(model, held_out, ratio, num_samples=samples, seed=seed, batch_size=batch_size)
            found.append(replace(start, keep_ratio=own.values))
    return found
