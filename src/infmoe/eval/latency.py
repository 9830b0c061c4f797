"""Latency of models under several routings, measured side by side.

B rows, T tokens.
"""

import dataclasses
import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from infmoe.layers import NoiseKey, Routing

NEXT_TOKENS = 8  # a timed decoding step goes round so many tokens


@dataclass(frozen=True)
class Timing:
    """Milliseconds over the rounds: the median, and the quarter and three-quarter points."""

    median_ms: float
    low_ms: float
    high_ms: float

    @staticmethod
    def of(seconds: Sequence[float]) -> "Timing":
        """From at least two rounds."""
        low, median, high = statistics.quantiles(seconds, n=4)
        return Timing(1e3 * median, 1e3 * low, 1e3 * high)


def interleave(
    arms: Sequence[Callable[[], Any]], *, rounds: int, warmup: int = 2, limit_sec: float | None = None
) -> list[list[float]]:
    """Time the arms in turn, round after round, so that the machine's moods fall on all of them alike.

    Every round has an order of its own, the same in every call: no arm always follows the same other one.

    Args:
        arms: what to time.
        rounds: how often each is timed.
        warmup: calls of each before that.
        limit_sec: no round begins after this many seconds, warm-up included, once there are two (quartiles
            need two).

    Returns:
        For each arm its seconds per round.
    """
    start = time.perf_counter()
    for arm in arms:
        for _ in range(warmup):
            arm()
    seconds: list[list[float]] = [[] for _ in arms]
    for r in range(rounds):
        if limit_sec is not None and r >= 2 and time.perf_counter() - start > limit_sec:
            break
        for i in random.Random(r).sample(range(len(arms)), len(arms)):
            begin = time.perf_counter()
            arms[i]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[i].append(time.perf_counter() - begin)
    return seconds


@torch.no_grad()
def decode_step(model: Any, routing: Routing | None, *, prompt_length: int, batch_size: int = 1) -> Callable[[], Any]:
    """One decoding step, to be timed: one new token a row after `prompt_length` cached ones.

    The new tokens change from call to call, and the rows differ, as requests do: equal tokens would select
    equal neurons, and a path that reads only those would find them in the cache.
    """
    device = next(model.parameters()).device
    draw = torch.Generator().manual_seed(0)
    shape = (batch_size, prompt_length + NEXT_TOKENS)
    tokens_BT = torch.randint(model.config.vocab_size, shape, generator=draw).to(device)
    routing = routing or Routing()
    if routing.key is None:
        key = NoiseKey(seed=getattr(model.config, "noise_seed", None) or 0, stream=torch.arange(batch_size).to(device))
        routing = dataclasses.replace(routing, key=key)
    prompt_BT, next_B1s = tokens_BT[:, :prompt_length], tokens_BT[:, prompt_length:].split(1, dim=1)
    cache = model(input_ids=prompt_BT, use_cache=True, routing=routing).past_key_values
    turn = itertools.cycle(next_B1s)

    @torch.no_grad()
    def step() -> None:
        model(input_ids=next(turn), past_key_values=cache, use_cache=True, routing=routing, logits_to_keep=1)
        cache.crop(-1)  # one token off again

    return step


def decode_latency(
    model: Any, routings: Sequence[Routing], *, prompt_length: int, rounds: int = 30, batch_size: int = 1
) -> list[Timing]:
    """Time of one decoding step: one new token a row after `prompt_length` cached ones."""
    arms = [decode_step(model, r, prompt_length=prompt_length, batch_size=batch_size) for r in routings]
    return [Timing.of(s) for s in interleave(arms, rounds=rounds)]


@torch.no_grad()
def forward_latency(
    model: Any, routings: Sequence[Routing], *, batch_size: int, length: int, rounds: int = 8
) -> list[Timing]:
    """Time of one forward pass over `batch_size` rows of `length` tokens, without a cache."""
    device = next(model.parameters()).device
    tokens = torch.zeros((batch_size, length), dtype=torch.int64, device=device)

    def arm(routing: Routing) -> Callable[[], Any]:
        return lambda: model(input_ids=tokens, routing=routing, use_cache=False)

    return [Timing.of(s) for s in interleave([arm(r) for r in routings], rounds=rounds)]
