"""The frontier of a checkpoint on this machine: loss against the time of a token, over its dials."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from infmoe.errors import InfMoEError
from infmoe.eval.budgets import BUDGET_STEPS, check_budgets
from infmoe.eval.dials import alike, grid, parse_ints, parse_mode, parse_ratios
from infmoe.eval.heldout import HeldOut
from infmoe.eval.loading import open_model
from infmoe.eval.schedules import layered, rungs, schedules
from infmoe.eval.sweep import default_grid, evaluate_points
from infmoe.eval.token_times import setting_of, timed_per_turn, token_times
from infmoe.hf.bounds import upper_increase, upper_p95s
from infmoe.hf.budget import Profile, profile_name, profile_values, require_dials
from infmoe.layers.point import Point
from infmoe.progress import point_progress
from infmoe.provenance import provenance, require_writable

_PROBE_SHARE = 4  # schedules are searched on so many times fewer windows
_CUT_SHARE = 16  # and cuts on so many: a share needs less text than a loss


def measure_frontier(
    model_dir: Path,
    *,
    data_dir: Path | None = None,
    num_samples: str | None = None,
    keep_ratio: str | None = None,
    num_experts_per_tok: str | None = None,
    mode: str | None = None,
    num_schedules: int = 4,
    windows: int = 128,
    batch_size: int = 16,
    rows: int = 1,
    prompt_length: int | None = None,
    rounds: int = 12,
    budgets: int = 0,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    only_own: bool = False,
    quiet: bool = False,
    save: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure loss and token time over a checkpoint's dials.

    Args:
        model_dir, data_dir, windows, batch_size, seed: what to evaluate, on what, how.
        num_samples, keep_ratio, num_experts_per_tok, mode: comma-separated values; None: a grid over every dial,
            with z = mu beside the samples.
        num_schedules: settings with a value of their own for each layer that are searched for, at most; unless 0,
            there is one more of the mean of every keep ratio (see `layered`).
        rows: sequences that are generated at once.
        prompt_length: tokens in the cache before the first timed one; None: half the context, 128 at most.
        rounds: timing turns of every point (see `token_times`).
        budgets: this many budgets are tried afterwards (see `check_budgets`).
        device, dtype, overrides: how the model is opened; see `open_model`.
        out: the folder that the caller is going to write to: tried before anything is measured.
        only_own: a profile that is there already must not be of use still (see `Profile.keep`).
        quiet: no progress bar.
        save: is given the result as soon as it is there, before budgets are tried.

    Returns:
        The profile (see `infmoe.hf.budget`) and how it was measured.

    Raises:
        InfMoEError: nothing to open, a dial that the model does not have, budgets of a model without dials, or no way
            to write to `out`.
    """
    opened = open_model(model_dir, device, dtype, overrides)
    model, config = opened.model, opened.model.config
    if budgets:
        require_dials(model)
    routing_mode = parse_mode(mode)
    samples, ratios, experts = default_grid(
        config,
        parse_ints(num_samples, "--num-samples"),
        parse_ratios(keep_ratio, "--keep-ratio"),
        parse_ints(num_experts_per_tok, "--num-experts-per-tok"),
        routing_mode,
    )
    points = grid(config, num_samples=samples, keep_ratios=ratios, num_experts_per_tok=experts, mode=routing_mode)
    if mode is None and num_samples is None and samples is not None:
        points += grid(config, keep_ratios=ratios, mode="mu")
    (own,) = grid(config)
    points = list(dict.fromkeys([own, *points]))
    context = config.max_position_embeddings
    prompt_length = min(128, context // 2) if prompt_length is None else prompt_length
    if not 1 <= prompt_length <= context - 3:
        raise InfMoEError(f"--prompt-length must lie in 1 .. {context - 3}, got {prompt_length}")
    data = opened.data(data_dir)
    if out is not None:
        require_writable(out)
        if only_own and (there := _profile_there(out / profile_name(rows))) is not None:
            there.keep(model)
    held_out = HeldOut.from_data(data, context, windows)
    # schedules are searched on other text than they are judged on
    probe = HeldOut.from_data(data, context, max(2, windows // _PROBE_SHARE), "train")

    # what the search takes from; a schedule that was given is measured as it is
    samples, ratios, experts = alike(samples), alike(ratios), alike(experts)
    dial, values = ("keep_ratio", ratios) if ratios else ("num_experts_per_tok", experts)
    if ratios and keep_ratio is None:
        values = (*ratios, min(ratios) / 2, min(ratios) / 4)  # a layer may do with less than all layers can
    searched = 0 if not values else 1 + config.num_hidden_layers * (len(rungs(model, dial, values)) - 1)
    total = len(points) + (searched + num_schedules + len(ratios or ()) if num_schedules else 0)
    with point_progress(total, quiet=quiet) as progress:

        def evaluate(some: Sequence[Point]) -> list[dict[str, Any]]:
            return evaluate_points(model, probe, some, seed=seed, batch_size=batch_size, progress=progress)

        if values:
            (start,) = grid(config, num_samples=(min(samples),) if samples else None, mode=routing_mode)
            points += schedules(model, start, dial, values, num_schedules, evaluate=evaluate)
            if ratios and num_schedules:
                few = HeldOut.from_data(data, context, max(2, windows // _CUT_SHARE), "train")
                points += layered(model, start, ratios, few, seed=seed, batch_size=batch_size)
        points = list(dict.fromkeys(points))
        results = evaluate_points(model, held_out, points, seed=seed, batch_size=batch_size, progress=progress)
    times = token_times(
        model,
        [setting_of(point) for point in points],
        rows=rows,
        prompt_length=prompt_length,
        rounds=rounds,
        quiet=quiet,
    )
    late = upper_p95s(times, timed_per_turn(model, prompt_length))
    for row, spent, p95 in zip(results, times, late, strict=True):
        row["increase"], row["increase_se"] = row.pop("delta"), row.pop("delta_se")
        row["increase_at_most"] = upper_increase(row["increase"], row["increase_se"], len(held_out.tokens_NT))
        row["token_ms"] = statistics.median(spent)
        row["token_ms_p95"] = p95
        row["tokens_timed"] = len(spent)
    mark_frontier(results)
    measured = profile_values(model, results, num_rows=rows, source=str(model_dir))
    measured["cached_tokens"] = [prompt_length, prompt_length + timed_per_turn(model, prompt_length)]
    measured |= {
        "data": data.folder.name,
        "windows": len(held_out.tokens_NT),
        "window": context,
        "seed": seed,
        "timing_rounds": rounds,
        "provenance": provenance(),
    }
    save(measured)
    if budgets:
        profile = Profile.of(measured, (out or model_dir) / profile_name(rows))
        measured["budgets"] = check_budgets(
            model, profile, count=budgets, steps=BUDGET_STEPS, prompt_length=prompt_length, quiet=quiet
        )
    return measured


def _profile_there(path: Path) -> Profile | None:
    """The profile that a new one would take the place of; None: nothing, or nothing that can be read."""
    try:
        return Profile.load(path)
    except InfMoEError:
        return None


def mark_frontier(rows: Sequence[dict[str, Any]]) -> None:
    """Set `on_frontier` of every row: no other is quicker and better at once."""
    for row in rows:
        row["on_frontier"] = not any(
            other["token_ms"] <= row["token_ms"]
            and other["loss"] <= row["loss"]
            and (other["token_ms"], other["loss"]) != (row["token_ms"], row["loss"])
            for other in rows
        )
