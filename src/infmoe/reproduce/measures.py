"""What is measured of a trained model: each measure is a function to points, and a run's file holds those that apply.

A measure that is added later is taken of the models that are still there, without training anything anew.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from infmoe.data import TokenData
from infmoe.eval.dials import grid
from infmoe.eval.heldout import HeldOut
from infmoe.eval.sweep import evaluate_points
from infmoe.layers.moe import GATE_NORMS
from infmoe.layers.point import Point
from infmoe.reproduce.plan import TUNING_SEED, RunSpec, Scale

Points = list[dict[str, Any]]
SAMPLES = (1, 2, 3, 4, 8, 16)
KEEP_RATIOS = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 1.0)
_BATCH_TOKENS = 8192  # of a forward pass: the logits are its largest tensor


@dataclass(frozen=True)
class Context:
    """What a measure works with.

    Attributes:
        model: in eval mode.
        data: what it was trained on, and its held-out part.
        spec: the run.
    """

    model: Any
    data: TokenData
    spec: RunSpec

    def evaluate(self, points: list[Point], windows: int) -> Points:
        """Loss, routing and costs of every point (see `evaluate_points`), on windows of whole held-out documents."""
        length = self.model.config.max_position_embeddings
        held_out = HeldOut.from_data(self.data, length, windows)
        return [
            {key: value for key, value in row.items() if value is not None}
            for row in evaluate_points(self.model, held_out, points, batch_size=max(1, _BATCH_TOKENS // length))
        ]


def held_out(context: Context) -> Points:
    """The loss at the run's own dials."""
    return context.evaluate(grid(context.model.config), context.spec.scale.windows)


def dials(context: Context) -> Points:
    """The loss over each dial, the other as trained; z = mu besides."""
    config = context.model.config
    windows = context.spec.scale.dial_windows
    if config.ffn == "moe":
        points = grid(config, num_experts_per_tok=[k for k in (*SAMPLES, 6, 12) if k <= config.num_experts])
        return context.evaluate(sorted(points, key=lambda p: p.num_experts_per_tok or 0), windows)
    points = grid(config, keep_ratios=KEEP_RATIOS)
    if config.sigma_activation != "none" and config.routing_mode != "mu":
        points += grid(config, num_samples=SAMPLES) + grid(config, mode="mu")
    return context.evaluate(list(dict.fromkeys(points)), windows)


def gate_norms(context: Context) -> Points:
    """A discrete MoE over k with each rule for what its gates sum to."""
    config = context.model.config
    points = grid(config, num_experts_per_tok=[k for k in SAMPLES if k <= config.num_experts])
    return _under(context, "gate_norm", GATE_NORMS, points)


def mask_scales(context: Context) -> Points:
    """∞-MoE away from its trained keep ratio, with each rule for the size of the mask."""
    return _under(context, "mask_scale", ("fixed", "rms"), grid(context.model.config, keep_ratios=KEEP_RATIOS))


def _under(context: Context, option: str, values: tuple[str, ...], points: list[Point]) -> Points:
    rows: Points = []
    for value in values:
        with _option(context.model, option, value):
            found = context.evaluate(points, context.spec.scale.dial_windows)
        rows += [{option: value, **row} for row in found]
    return rows


@contextlib.contextmanager
def _option(model: Any, option: str, value: str) -> Iterator[None]:
    """The model with an option of its layers changed."""
    layers = [block.mlp for block in model.transformer.h]
    before = [getattr(layer, option) for layer in layers]
    for layer in layers:
        setattr(layer, option, value)
    try:
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            setattr(layer, option, old)


@dataclass(frozen=True)
class Measure:
    """A measure, and the models that it is taken of."""

    take: Callable[[Context], Points]
    applies: Callable[[Any], bool]


def _has_dials(config: Any) -> bool:
    return config.ffn == "infinity" or (config.ffn == "moe" and config.expert_router == "learned")


MEASURES: dict[str, Measure] = {
    "held_out": Measure(held_out, lambda config: True),
    "dials": Measure(dials, _has_dials),
    "gate_norms": Measure(gate_norms, lambda config: config.ffn == "moe" and config.expert_router == "learned"),
    "mask_scales": Measure(mask_scales, lambda config: config.ffn == "infinity" and config.keep_ratio < 1),
}


def settings(scale: Scale) -> dict[str, Any]:
    """What a run's measures depend on beside the run: files made with others are not mixed in."""
    return {
        "windows": scale.windows,
        "dial_windows": scale.dial_windows,
        "samples": list(SAMPLES),
        "keep_ratios": list(KEEP_RATIOS),
    }


def wanted(spec: RunSpec, config: Any) -> list[str]:
    """The measures of a run; tuning needs the loss alone."""
    names = [name for name, measure in MEASURES.items() if measure.applies(config)]
    return names if spec.seed != TUNING_SEED else names[:1]
