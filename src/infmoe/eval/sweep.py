"""The sweep: loss against latency and FLOPs over a grid of the dials, from one checkpoint."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from infmoe.eval.dials import grid, parse_ints, parse_modes, parse_ratios
from infmoe.eval.heldout import HeldOut, evaluate_loss
from infmoe.eval.latency import decode_latency, forward_latency
from infmoe.eval.loading import open_model
from infmoe.hf import model_cost
from infmoe.layers.point import Point
from infmoe.progress import point_progress
from infmoe.provenance import provenance, require_writable

_COSTS = ("flops", "ffn_flops", "weights", "bytes")
DECODE_PROMPT = 32  # cached tokens before the timed decoding step, or half the context where that is less


def evaluate_points(
    model: Any,
    held_out: HeldOut,
    points: Sequence[Point],
    *,
    seed: int = 0,
    batch_size: int = 16,
    progress: Callable[[Point], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Loss, routing figures and costs of every point.

    Returns:
        One dict a point: the dials; `loss`, `loss_se`; `delta` and `delta_se`, the difference to the
        reference point, paired over windows; `is_reference`, true of the model's own setting where it is
        among the points, else of the first; the routing figures of `RoutingStats.summary`, averaged over
        layers; FLOPs per token and weights read, `executed` and `ideal` (by the measured union).
    """
    results = []
    for point in points:
        results.append(evaluate_loss(model, held_out, point.routing(), seed=seed, batch_size=batch_size))
        progress(point)
    own_mode = model.config.routing_mode if model.config.has_sigma else None
    modes = dict.fromkeys((None, own_mode, points[0].mode))
    own_points = [own for mode in modes for own in grid(model.config, mode=mode)]
    reference = next((points.index(own) for own in own_points if own in points), 0)
    rows: list[dict[str, Any]] = []
    for i, (point, result) in enumerate(zip(points, results, strict=True)):
        paired = result.window_losses - results[reference].window_losses
        cost = model_cost(model.config, point.routing(), result.union_ratios()).as_dict()
        rows.append(
            asdict(point)
            | {"loss": result.loss, "loss_se": result.loss_se, "is_reference": i == reference}
            | {"delta": float(paired.mean()), "delta_se": float(paired.std()) / len(paired) ** 0.5}
            | result.routing()
            | {name: value for name, value in cost.items() if name.startswith(_COSTS)}
        )
    return rows


def measure_latency(model: Any, points: Sequence[Point], rows: list[dict[str, Any]], *, rounds: int) -> None:
    """Add decode and forward latency to `rows`, all points interleaved."""
    context = model.config.max_position_embeddings
    routings = [point.routing(max_stats_tokens=1) for point in points]
    decode = decode_latency(model, routings, prompt_length=min(DECODE_PROMPT, context // 2), rounds=rounds)
    forward = forward_latency(
        model,
        routings,
        batch_size=max(1, 512 // context),
        length=min(context, 512),
        rounds=max(4, rounds // 4),
    )
    for row, one, many in zip(rows, decode, forward, strict=True):
        row["decode_ms"], row["decode_ms_low"], row["decode_ms_high"] = one.median_ms, one.low_ms, one.high_ms
        row["forward_512_ms"] = many.median_ms


def sweep_checkpoint(
    model_dir: Path,
    *,
    data_dir: Path | None,
    num_samples: str | None,
    keep_ratio: str | None,
    num_experts_per_tok: str | None,
    mode: str | None,
    windows: int,
    batch_size: int,
    seed: int,
    rounds: int = 0,
    full_grid: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Evaluate a checkpoint over the dials that a command line gives.

    Args:
        model_dir, data_dir, windows, batch_size, seed: what to evaluate, on what, how.
        num_samples, keep_ratio, num_experts_per_tok, mode: comma-separated values; None: the model's own, or
            with `full_grid` the grid that shows each dial at work.
        rounds: timing rounds; 0: latency is not measured.
        device, dtype, overrides: how the model is opened; see `open_model`.
        out: the folder that the caller is going to write to: tried before anything is measured.
        quiet: no progress bar.

    Returns:
        `points` (see `evaluate_points`), and what was measured, where and how.

    Raises:
        InfMoEError: nothing to open, a dial that the model does not have, or no way to write to `out`.
    """
    opened = open_model(model_dir, device, dtype, overrides)
    config = opened.model.config
    points = points_of(config, num_samples, keep_ratio, num_experts_per_tok, mode, full_grid=full_grid)
    data = opened.data(data_dir)
    if out is not None:
        require_writable(out)
    held_out = HeldOut.from_data(data, config.max_position_embeddings, windows)
    with point_progress(len(points), quiet=quiet) as progress:
        rows = evaluate_points(opened.model, held_out, points, seed=seed, batch_size=batch_size, progress=progress)
    if rounds:
        measure_latency(opened.model, points, rows, rounds=rounds)
    return {
        "checkpoint": str(opened.checkpoint),
        "device": opened.model.device.type,
        "dtype": str(opened.model.dtype).removeprefix("torch."),
        "overrides": list(overrides),
        "data": str(data.folder),
        "windows": len(held_out.tokens_NT),
        "window": config.max_position_embeddings,
        "batch_size": batch_size,
        "seed": seed,
        "timing_rounds": rounds,
        "points": rows,
        "provenance": provenance(),
    }


def points_of(
    config: Any,
    num_samples: str | None,
    keep_ratio: str | None,
    num_experts_per_tok: str | None,
    mode: str | None,
    *,
    full_grid: bool = False,
) -> list[Point]:
    """The points of a command line; beside modes that draw, z = mu is one point a keep ratio, whatever K.

    Args:
        config: the model's.
        num_samples, keep_ratio, num_experts_per_tok, mode: comma-separated values; None: the model's own.
        full_grid: dials that are left out take values that show them at work (see `default_grid`).

    Raises:
        InfMoEError: no such values, or a dial that the model does not have.
    """
    samples = parse_ints(num_samples, "--num-samples")
    ratios = parse_ratios(keep_ratio, "--keep-ratio")
    experts = parse_ints(num_experts_per_tok, "--num-experts-per-tok")
    modes = parse_modes(mode)
    points: list[Point] = []
    for one in modes:
        dials = (None if one == "mu" and len(modes) > 1 else samples, ratios, experts)
        own_samples, own_ratios, own_experts = default_grid(config, *dials, one) if full_grid else dials
        points += grid(
            config, num_samples=own_samples, keep_ratios=own_ratios, num_experts_per_tok=own_experts, mode=one
        )
    return list(dict.fromkeys(points))


def default_grid(
    config: Any,
    num_samples: Sequence[Any] | None,
    keep_ratios: Sequence[Any] | None,
    num_experts_per_tok: Sequence[Any] | None,
    mode: str | None,
) -> tuple[Sequence[Any] | None, Sequence[Any] | None, Sequence[Any] | None]:
    """Fill in the dials that were left out with values that show them at work."""
    if config.ffn == "infinity":
        return (
            num_samples or ((1, 2, 4, 8) if config.draws(mode) else None),
            keep_ratios or (1 / 16, 1 / 8, 1 / 4, 1 / 2),
            num_experts_per_tok,
        )
    if config.ffn == "moe":
        k_values = [k for k in (1, 2, 3, 4, 6, 8, 12, 16) if k <= config.num_experts]
        return num_samples, keep_ratios, num_experts_per_tok or k_values
    return num_samples, keep_ratios, num_experts_per_tok
