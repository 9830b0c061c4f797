"""Grids over the dials: from what a command line says to a list of routings."""

from collections.abc import Sequence
from fractions import Fraction
from itertools import product

import torch

from infmoe.errors import InfMoEError, unknown_name
from infmoe.hf import InfMoEConfig
from infmoe.layers import ffn_class
from infmoe.layers.point import Point
from infmoe.layers.routing import MODES, Mode


def parse_ints(text: str | None, option: str) -> tuple[int, ...] | None:
    """Integers from "1,2,4".

    Raises:
        InfMoEError: not a list of integers.
    """
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InfMoEError(f"{option} takes integers separated by commas, e.g. 1,2,4, got {text!r}") from None


def parse_ratios(text: str | None, option: str) -> tuple[float, ...] | None:
    """Numbers from "0.125,1/4".

    Raises:
        InfMoEError: not a list of numbers.
    """
    if text is None:
        return None
    try:
        return tuple(float(Fraction(part.strip())) for part in text.split(","))
    except (ValueError, ArithmeticError):  # 1/0, 1e999
        raise InfMoEError(f"{option} takes numbers separated by commas, e.g. 1/16,0.25, got {text!r}") from None


def parse_mode(text: str | None) -> Mode | None:
    """The mode of this name.

    Raises:
        InfMoEError: there is none; suggests the nearest.
    """
    if text is None:
        return None
    for mode in MODES:
        if text == mode:
            return mode
    raise unknown_name("mode", text, MODES)


def grid(
    config: InfMoEConfig,
    *,
    num_samples: Sequence[int] | None = None,
    keep_ratios: Sequence[float] | None = None,
    num_experts_per_tok: Sequence[int] | None = None,
    mode: Mode | None = None,
) -> list[Point]:
    """All combinations of the dials, in order; a dial left out stays at the model's own setting.

    Args:
        config: the model's, which says which dials there are.
        num_samples: K values; left out in mode "mu".
        keep_ratios: keep ratios.
        num_experts_per_tok: k values of a discrete MoE.
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
    effective_mode = mode or config.routing_mode
    draws = "num_samples" in options and effective_mode != "mu" and config.sigma_activation != "none"
    samples: Sequence[int | None] = num_samples or ((config.num_samples,) if draws else (None,))
    ratios: Sequence[float | None] = keep_ratios or (config.keep_ratio,)
    experts: Sequence[int | None] = num_experts_per_tok or (config.num_experts_per_tok,)
    points = [Point(k, r, e, mode) for k, r, e in product(samples, ratios, experts)]
    with torch.device("meta"):
        layer = ffn_class(config.ffn).from_config(config)
    for point in points:
        layer.cost(point.routing())  # the layer refuses what it cannot run, before anything is measured
    return points
