"""Latency of one model under several routings, measured side by side.

B rows, T tokens.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from infmoe.layers import Routing


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


def interleave(arms: Sequence[Callable[[], Any]], *, rounds: int, warmup: int = 2) -> list[list[float]]:
    """Time the arms in turn, round after round, so that the machine's moods fall on all of them alike.

    Odd rounds go backwards.

    Returns:
        For each arm its seconds per round.
    """
    for arm in arms:
        for _ in range(warmup):
            arm()
    seconds: list[list[float]] = [[] for _ in arms]
    for r in range(rounds):
        order = range(len(arms)) if r % 2 == 0 else reversed(range(len(arms)))
        for i in order:
            begin = time.perf_counter()
            arms[i]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[i].append(time.perf_counter() - begin)
    return seconds


@torch.no_grad()
def decode_latency(model: Any, routings: Sequence[Routing], *, prompt_length: int, rounds: int = 30) -> list[Timing]:
    """Time of one decoding step at batch 1: one new token after `prompt_length` cached ones."""
    device = next(model.parameters()).device
    prompt = torch.zeros((1, prompt_length), dtype=torch.int64, device=device)
    token = prompt[:, :1]

    def arm(routing: Routing) -> Callable[[], Any]:
        cache = model(input_ids=prompt, use_cache=True, routing=routing).past_key_values

        def step() -> None:
            model(input_ids=token, past_key_values=cache, use_cache=True, routing=routing, logits_to_keep=1)
            cache.crop(-1)  # one token off again

        return step

    return [Timing.of(s) for s in interleave([arm(r) for r in routings], rounds=rounds)]


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
