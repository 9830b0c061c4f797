"""Times of single tokens, of several settings that take turns.

R rows, T tokens.
"""

import random
from collections.abc import Sequence
from typing import Any

import torch

from infmoe.errors import InfMoEError
from infmoe.hf.clock import TokenClock
from infmoe.layers.point import Point
from infmoe.progress import step_progress

NEW_TOKENS = 16  # timed in a row, before another setting has its turn


def token_times(
    model: Any,
    settings: Sequence[dict[str, Any]],
    *,
    rows: int = 1,
    prompt_length: int,
    rounds: int,
    seed: int = 0,
    quiet: bool = True,
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
        quiet: no progress bar.

    Raises:
        InfMoEError: the context leaves no token to time.
    """
    device = next(model.parameters()).device
    wanted = 1 + timed_per_turn(model, prompt_length)
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
    bar = step_progress("warming up", 1 + rounds, quiet=quiet)
    with torch.random.fork_rng(), bar as step:
        for setting in settings:
            turn(setting, seed)
        step(f"timing, round 1 of {rounds}")
        for r in range(rounds):
            draws = seed + 1 + r
            for i in random.Random(draws).sample(range(len(settings)), len(settings)):
                times[i] += turn(settings[i], draws)
            step(f"timing, round {min(r + 2, rounds)} of {rounds}")
    return times


def timed_per_turn(model: Any, prompt_length: int) -> int:
    """Tokens of a turn, but for the first, of which the prompt is a part."""
    return min(NEW_TOKENS, model.config.max_position_embeddings - prompt_length - 1)


def setting_of(point: Point) -> dict[str, Any]:
    """The arguments of `generate` for dials, as they are timed: without routing figures."""
    return {"routing": point.routing(max_stats_tokens=1)}
