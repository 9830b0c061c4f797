"""Budgets of a profile, tried: how often each is met, and what the picked setting loses."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infmoe.eval.loading import open_model
from infmoe.eval.token_times import setting_of, timed_per_turn, token_times
from infmoe.hf.budget import Profile, find_profile, require_dials
from infmoe.provenance import provenance, require_writable

BUDGET_STEPS = 200  # timed under each budget
_OTHER_TEXT = 1_000_000  # the seed of the prompts that budgets are tried on


def check_budgets(
    model: Any, profile: Profile, *, count: int, steps: int, prompt_length: int, quiet: bool = True
) -> list[dict[str, Any]]:
    """Generate under budgets between the profile's quickest and slowest point, and see how often each is met.

    Args:
        model: in eval mode.
        profile: of this model, here.
        count: how many budgets, evenly spread.
        steps: tokens that are timed under each, at least.
        prompt_length: as in the profile.
        quiet: no progress bar.

    Returns:
        One dict a budget: `budget_ms`, the dials picked, `met` (share of the tokens that took no longer), and
        `regret`: the picked point's loss minus the lowest of those whose tokens, timed here once more, met the
        budget in 95 of 100 cases.
    """
    rounds = -(-steps // timed_per_turn(model, prompt_length))
    slowest, quickest = (f(p.token_ms_p95 for p in profile.points) for f in (max, min))
    share = [i / max(count - 1, 1) for i in range(count)]
    budgets = [(1 - s) * quickest + s * slowest for s in share]  # exact at both ends
    settings = [{"latency_budget_ms": budget, "profile": profile} for budget in budgets]
    again = [setting_of(measured.point) for measured in profile.points]
    log = logging.getLogger("infmoe")
    level = log.level
    log.setLevel(logging.ERROR)  # what is picked is in the rows
    try:
        where = {"rows": profile.rows, "prompt_length": prompt_length, "rounds": rounds}
        spent = token_times(model, [*settings, *again], **where, seed=_OTHER_TEXT, quiet=quiet)
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
    quiet: bool = False,
) -> dict[str, Any]:
    """Try budgets of a profile that is there already: whether it still holds, in another process than measured it.

    Args:
        model_dir, device, dtype, overrides: how the model is opened; see `open_model`.
        profile: its file or folder; None: the checkpoint's or its run's.
        count, steps: see `check_budgets`.
        rows: sequences that are generated at once.
        out: the folder that the caller is going to write to, tried before anything is measured; None: the profile's.
        quiet: no progress bar.

    Returns:
        `budgets` (see `check_budgets`), the profile they are of, and when that was measured.

    Raises:
        InfMoEError: nothing to open, no profile, one that does not fit the model here, or no way to write to `out`.
    """
    model = open_model(model_dir, device, dtype, overrides).model
    require_dials(model)
    found = find_profile(model, profile, rows)
    found.check(model)
    found.check_rows(model, rows)
    require_writable(out or found.path.parent)
    tried = check_budgets(model, found, count=count, steps=steps, prompt_length=found.cached_tokens[0], quiet=quiet)
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
