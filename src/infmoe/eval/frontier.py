"""The frontier of a checkpoint on this machine: loss against the time of a token, over its dials.

R rows, T tokens, L layers.
"""

import contextlib
import logging
import os
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from infmoe.errors import InfMoEError
from infmoe.eval.adaptive import layer_ratios
from infmoe.eval.dials import grid, parse_ints, parse_mode, parse_ratios
from infmoe.eval.heldout import HeldOut
from infmoe.eval.loading import open_model
from infmoe.eval.sweep import default_grid, evaluate_points
from infmoe.hf import model_cost
from infmoe.hf.budget import (
    Profile,
    find_profile,
    profile_name,
    profile_values,
    upper_increase,
    upper_p95s,
)
from infmoe.hf.clock import TokenClock
from infmoe.layers.dials import num_kept
from infmoe.layers.point import Point
from infmoe.progress import point_progress
from infmoe.provenance import provenance, require_writable

NEW_TOKENS = 16  # timed in a row, before another setting has its turn
BUDGET_STEPS = 200  # timed under each budget
_OTHER_TEXT = 1_000_000  # the seed of the prompts that budgets are tried on
_PROBE_SHARE = 4  # schedules are searched on so many times fewer windows
_CUT_SHARE = 16  # and cuts on so many: a share needs less text than a loss


def token_times(
    model: Any, settings: Sequence[dict[str, Any]], *, rows: int = 1, prompt_length: int, rounds: int, seed: int = 0
) -> list[list[float]]:
    """Milliseconds of every timed token of `generate`, for each setting; they take turns.

    Every round has a prompt of its own and samples its tokens: the same tokens again and again would select the same
    neurons, which the processor's cache then holds.

    Args:
        model: in eval mode.
        settings: arguments of `generate`: a routing, or a budget.
        rows: sequences at once.
        prompt_length: tokens in the cache before the first new one.
        rounds: turns of each setting, of `NEW_TOKENS` tokens; each round has an order of its own, so that no setting
            always shares its neighbour's slow moments.
        seed: of orders, prompts and tokens; the settings of a round share the last two.
    """
    device = next(model.parameters()).device
    wanted = 1 + _timed_per_turn(model, prompt_length)
    if wanted < 3:
        raise InfMoEError(f"a prompt of {prompt_length} tokens leaves none to time: give a shorter --prompt-length")

    def turn(setting: dict[str, Any], draws: int) -> list[float]:
        clock = TokenClock()
        torch.manual_seed(draws)
        prompts_RT = torch.randint(model.config.vocab_size, (rows, prompt_length)).to(device)
        model.generate(
            prompts_RT,
            attention_mask=torch.ones_like(prompts_RT),
            max_new_tokens=wanted,
            min_new_tokens=wanted,
            do_sample=True,
            pad_token_id=0,
            stopping_criteria=[clock],
            **setting,
        )
        return clock.milliseconds()

    times: list[list[float]] = [[] for _ in settings]
    with torch.random.fork_rng():
        for setting in settings:
            turn(setting, seed)
        for r in range(rounds):
            draws = seed + 1 + r
            for i in random.Random(draws).sample(range(len(settings)), len(settings)):
                times[i] += turn(settings[i], draws)
    return times


def _timed_per_turn(model: Any, prompt_length: int) -> int:
    return min(NEW_TOKENS, model.config.max_position_embeddings - prompt_length - 1)


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
    ladder = _rungs(model, dial, values)
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


def _rungs(model: Any, dial: str, values: Sequence[Any]) -> list[Any]:
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
        rounds: timing turns of every point, of `NEW_TOKENS` tokens each.
        budgets: this many budgets are tried afterwards (see `check_budgets`).
        device, dtype, overrides: how the model is opened; see `open_model`.
        out: the folder that the caller is going to write to: tried before anything is measured.
        only_own: a profile that is there already must not be of use still (see `Profile.keep`).
        quiet: no progress bar.

    Returns:
        The profile (see `infmoe.hf.budget`) and how it was measured.

    Raises:
        InfMoEError: nothing to open, a dial that the model does not have, or no way to write to `out`.
    """
    opened = open_model(model_dir, device, dtype, overrides)
    model, config = opened.model, opened.model.config
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

    dial, values = ("keep_ratio", ratios) if ratios else ("num_experts_per_tok", experts)
    if ratios and keep_ratio is None:
        values = (*ratios, min(ratios) / 2, min(ratios) / 4)  # a layer may do with less than all layers can
    searched = 0 if not values else 1 + config.num_hidden_layers * (len(_rungs(model, dial, values)) - 1)
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
        model, [_setting(point) for point in points], rows=rows, prompt_length=prompt_length, rounds=rounds
    )
    late = upper_p95s(times, _timed_per_turn(model, prompt_length))
    for row, spent, p95 in zip(results, times, late, strict=True):
        row["increase"], row["increase_se"] = row.pop("delta"), row.pop("delta_se")
        row["increase_at_most"] = upper_increase(row["increase"], row["increase_se"], len(held_out.tokens_NT))
        row["token_ms"] = statistics.median(spent)
        row["token_ms_p95"] = p95
        row["tokens_timed"] = len(spent)
    mark_frontier(results)
    measured = profile_values(model, results, num_rows=rows, source=str(model_dir))
    measured["cached_tokens"] = [prompt_length, prompt_length + _timed_per_turn(model, prompt_length)]
    if budgets:
        profile = Profile.of(measured, (out or model_dir) / profile_name(rows))
        measured["budgets"] = check_budgets(
            model, profile, count=budgets, steps=BUDGET_STEPS, prompt_length=prompt_length
        )
    return measured | {
        "data": data.folder.name,
        "windows": len(held_out.tokens_NT),
        "window": context,
        "seed": seed,
        "timing_rounds": rounds,
        "provenance": provenance(),
    }


def _profile_there(path: Path) -> Profile | None:
    """The profile that a new one would take the place of; None: nothing, or nothing that can be read."""
    try:
        return Profile.load(path)
    except InfMoEError:
        return None


def _setting(point: Point) -> dict[str, Any]:
    return {"routing": point.routing(max_stats_tokens=1)}


def check_budgets(model: Any, profile: Profile, *, count: int, steps: int, prompt_length: int) -> list[dict[str, Any]]:
    """Generate under budgets between the profile's quickest and slowest point, and see how often each is met.

    Args:
        model: in eval mode.
        profile: of this model, here.
        count: how many budgets, evenly spread.
        steps: tokens that are timed under each, at least.
        prompt_length: as in the profile.

    Returns:
        One dict a budget: `budget_ms`, the dials picked, `met` (share of the tokens that took no longer), and
        `regret`: the picked point's loss minus the lowest of those whose tokens, timed here once more, met the
        budget in 95 of 100 cases.
    """
    rounds = -(-steps // _timed_per_turn(model, prompt_length))
    slowest, quickest = (f(p.token_ms_p95 for p in profile.points) for f in (max, min))
    share = [i / max(count - 1, 1) for i in range(count)]
    budgets = [(1 - s) * quickest + s * slowest for s in share]  # exact at both ends
    settings = [{"latency_budget_ms": budget, "profile": profile} for budget in budgets]
    again = [_setting(measured.point) for measured in profile.points]
    log = logging.getLogger("infmoe")
    level = log.level
    log.setLevel(logging.ERROR)  # what is picked is in the rows
    try:
        where = {"rows": profile.rows, "prompt_length": prompt_length, "rounds": rounds}
        spent = token_times(model, [*settings, *again], **where, seed=_OTHER_TEXT)
    finally:
        log.setLevel(level)
    under, alone = spent[:count], spent[count:]
    rows = []
    for budget, times in zip(budgets, under, strict=True):
        picked = profile.choose(latency_budget_ms=budget).picked
        able = [
            point.loss
            for point, its in zip(profile.points, alone, strict=True)
            if sum(t <= budget for t in its) >= 0.95 * len(its)
        ]
        rows.append(
            {
                "budget_ms": budget,
                "picked": picked.point.label(),
                "met": sum(t <= budget for t in times) / len(times),
                "steps": len(times),
                "regret": picked.loss - min(able) if able else None,
            }
        )
    return rows


def try_budgets(
    model_dir: Path,
    *,
    profile: Path | None = None,
    count: int = 10,
    steps: int = BUDGET_STEPS,
    rows: int = 1,
    device: str | None = None,
    dtype: str | None = None,
    overrides: Sequence[str] = (),
    out: Path | None = None,
) -> dict[str, Any]:
    """Try budgets of a profile that is there already: whether it still holds, in another process than measured it.

    Args:
        model_dir, device, dtype, overrides: how the model is opened; see `open_model`.
        profile: its file or folder; None: the checkpoint's or its run's.
        count, steps: see `check_budgets`.
        rows: sequences that are generated at once.
        out: the folder that the caller is going to write to, tried before anything is measured; None: the profile's.

    Returns:
        `budgets` (see `check_budgets`), the profile they are of, and when that was measured.

    Raises:
        InfMoEError: nothing to open, no profile, one that does not fit the model here, or no way to write to `out`.
    """
    model = open_model(model_dir, device, dtype, overrides).model
    found = find_profile(model, profile, rows)
    found.check(model)
    found.check_rows(model, rows)
    require_writable(out or found.path.parent)
    tried = check_budgets(model, found, count=count, steps=steps, prompt_length=found.cached_tokens[0])
    return {
        "profile": os.path.relpath(found.path),
        "profile_time": found.time,
        "rows": found.rows,
        "budgets": tried,
        "provenance": provenance(),
    }


def budgets_name(rows: int) -> str:
    """The file name of what `try_budgets` says."""
    return "budgets.json" if rows == 1 else f"budgets-rows{rows}.json"


def mark_frontier(rows: Sequence[dict[str, Any]]) -> None:
    """Set `on_frontier` of every row: no other is quicker and better at once."""
    for row in rows:
        row["on_frontier"] = not any(
            other["token_ms"] <= row["token_ms"]
            and other["loss"] <= row["loss"]
            and (other["token_ms"], other["loss"]) != (row["token_ms"], row["loss"])
            for other in rows
        )
