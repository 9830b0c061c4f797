"""Grids over the dials: from what a command line says to a list of routings."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import product
from typing import Any, TypeVar

import torch

from infmoe.errors import InfMoEError, unknown_name
from infmoe.hf import InfMoEConfig
from infmoe.layers import ffn_class
from infmoe.layers.point import Point
from infmoe.layers.routing import MODES, Mode

V = TypeVar("V")


def parse_ints(text: str | None, option: str) -> tuple[int | tuple[int, ...], ...] | None:
    """Integers from "1,2,4"; with bars, one for each layer: "4|2" is one value.

    Raises:
        InfMoEError: not a list of integers.
    """
    if text is None:
        return None
    try:
        return _values(text, int)
    except ValueError:
        raise InfMoEError(
            f"{option} takes integers separated by commas, e.g. 1,2,4, with bars between layers (4|2), got {text!r}"
        ) from None


def parse_ratios(text: str | None, option: str) -> tuple[float | tuple[float, ...], ...] | None:
    """Numbers from "0.125,1/4"; with bars, one for each layer: "1/4|1/8" is one value.

    Raises:
        InfMoEError: not a list of numbers.
    """
    if text is None:
        return None
    try:
        return _values(text, lambda word: float(Fraction(word.strip())))
    except (ValueError, ArithmeticError):  # 1/0, 1e999
        raise InfMoEError(
            f"{option} takes numbers separated by commas, e.g. 1/16,0.25, with bars between layers (1/4|1/8), "
            f"got {text!r}"
        ) from None


def _values(text: str, number: Callable[[str], V]) -> tuple[V | tuple[V, ...], ...]:
    """What stands between commas; a tuple where there are bars, as tables print it."""
    by_layer = [tuple(number(word) for word in part.split("|")) for part in text.split(",")]
    return tuple(values[0] if len(values) == 1 else values for values in by_layer)


def parse_setting(text: str | None, option: str, parse: Callable[[str | None, str], tuple | None]) -> tuple | None:
    """One value for all layers, or one for each with bars between: "1/4", "1/4|1/8".

    Args:
        text: the words.
        option: their option.
        parse: `parse_ints` or `parse_ratios`.

    Returns:
        What `grid` takes: the number, or the tuple, as the one value of the dial.

    Raises:
        InfMoEError: no such values, or several settings.
    """
    values = parse(text, option)
    if values is not None and len(values) > 1:
        raise InfMoEError(f"{option} takes one value here, or one for each layer with bars between, got {text!r}")
    return values


def alike(values: Sequence[Any] | None) -> Sequence[Any] | None:
    """The values of a dial that are one for all layers; None where the dial was left out."""
    return None if values is None else [value for value in values if not isinstance(value, tuple)]


def parse_mode(text: str | None) -> Mode | None:
    """The mode of this name.

    Raises:
        InfMoEError: there is none; suggests the nearest.
    """
    if text is None:
        return None
    if "," in text:
        raise InfMoEError(f"--mode takes one mode here, got {text!r}")
    for mode in MODES:
        if text == mode:
            return mode
    raise unknown_name("mode", text, MODES)


def parse_modes(text: str | None) -> list[Mode | None]:
    """Modes from "sample,mu", each once; None alone where nothing is said.

    Raises:
        InfMoEError: one that there is not; suggests the nearest.
    """
    return [None] if text is None else [parse_mode(name) for name in dict.fromkeys(n.strip() for n in text.split(","))]


def grid(
    config: InfMoEConfig,
    *,
    num_samples: Sequence[int | tuple[int, ...]] | None = None,
    keep_ratios: Sequence[float | tuple[float, ...]] | None = None,
    num_experts_per_tok: Sequence[int | tuple[int, ...]] | None = None,
    mode: Mode | None = None,
) -> list[Point]:
    """All combinations of the dials, in order; a dial left out stays at the model's own setting.

    Args:
        config: the model's, which says which dials there are.
        num_samples: K values, each a number or a tuple with one for each layer; left out in mode "mu".
        keep_ratios: keep ratios, likewise.
        num_experts_per_tok: k values of a discrete MoE, likewise.
        mode: routing mode of every point.

    Raises:
        InfMoEError: a dial that the variant does not have, or a value out of range.
    """
    options = ffn_class(config.ffn).option_defaults()
    for name, values in (
        ("num_samples", num_samples),
        ("keep_ratio", keep_ratios),
        ("num_experts_per_tok", num_experts_per_tok),
        ("mode", mode),
    ):
        if values is not None and {"mode": "routing_mode"}.get(name, name) not in options:
            raise InfMoEError(f"a model with ffn='{config.ffn}' has no dial {name!r}: leave it out")
    samples: Sequence[Any] = num_samples or ((config.num_samples,) if config.draws(mode) else (None,))
    ratios: Sequence[Any] = keep_ratios or (config.keep_ratio,)
    experts: Sequence[Any] = num_experts_per_tok or (config.num_experts_per_tok,)
    points = [Point(k, r, e, mode) for k, r, e in product(samples, ratios, experts)]
    depth = config.num_hidden_layers
    with torch.device("meta"):
        some = range(depth) if any(point.by_layer() for point in points) else range(1)
        layers = [ffn_class(config.ffn).from_config(config, i) for i in some]
    for point in points:
        for name, each in point.by_layer().items():
            if len(each) != depth:
                raise InfMoEError(f"{name} has {len(each)} values for {depth} layers: give one, or one for each layer")
        for layer in layers:
            layer.cost(point.routing())  # the layer refuses what it cannot run, before anything is measured
    return points
