"""How far `backend="auto"` is from the best backend, over tokens, K and keep ratio.

N tokens, K samples.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from infmoe.bench.common import Measured, Rows
from infmoe.errors import InfMoEError
from infmoe.layers import InfinityFFN, NoiseKey, Routing
from infmoe.ops import dispatch

TOKENS = (1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096)
SAMPLES = (1, 2, 4, 8)
KEEP_RATIOS = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
_EAGER_ROWS = 512  # rows of scores beyond which the plain path, several times slower before, is not run
_LOST = 1.5  # a backend that is slower by this factor at first sight can't be the best


def dispatch_regret(
    *,
    quick: bool = False,
    hidden_size: int = 768,
    intermediate_size: int = 6144,
    z_dim: int = 64,
    tokens: tuple[int, ...] = TOKENS,
    samples: tuple[int, ...] = SAMPLES,
    keep_ratios: tuple[float, ...] = KEEP_RATIOS,
) -> Measured:
    """Forward passes in float32 through layers in rotation, as in a model; every backend and `auto` take turns.

    The calibration is made, or read, before anything is timed. Backends that a first look shows to be slower by
    half are left out of the rounds.

    Returns:
        rows with tokens, num_samples, keep_ratio, chosen (what `auto` took), best, ratio_median (auto over the
            best backend) and the 95 % interval of its mean log; summary with the medians over the grid.
    """
    rounds, seconds = (5, 0.05) if quick else (15, 0.6)
    grid = list(itertools.product(tokens, samples, keep_ratios))
    if quick:
        grid = [point for point in grid if point[0] in tokens[::3] and point[1] in samples[::2]]
    copies = 1 if quick else 6
    torch.manual_seed(0)
    layers = [
        InfinityFFN(hidden_size, intermediate_size, z_dim=z_dim, layer_index=i, score_dtype="bfloat16").eval()
        for i in range(copies)
    ]
    rows: Rows = []
    with torch.no_grad():
        for N, K, ratio in grid:
            rows.append(_point(layers, N, K, ratio, rounds, seconds))
    regrets = [row["ratio_median"] for row in rows]
    return rows, {
        "points": len(rows),
        "regret_median": statistics.median(regrets) - 1.0,
        "regret_max": max(regrets) - 1.0,
        "points_wholly_above_1_05": sum(row["ratio_low"] > 1.05 for row in rows),
        "sparse_chosen": sum(row["chosen"] == "sparse" for row in rows),
        "rounds": rounds,
    }


def _point(layers: list[InfinityFFN], N: int, K: int, ratio: float, rounds: int, seconds: float) -> dict[str, Any]:
    x_1ND = torch.randn(1, N, layers[0].hidden_size)
    turns = itertools.cycle(range(len(layers)))

    def arm(backend: str) -> Callable[[], float]:
        routing = Routing(num_samples=K, keep_ratio=ratio, key=NoiseKey(seed=0), backend=backend)  # type: ignore[arg-type]

        def call() -> float:
            layer = layers[next(turns)]
            begin = time.perf_counter()
            layer(x_1ND, routing)
            return time.perf_counter() - begin

        return call

    arms = {name: arm(name) for name in _able(layers[0], N, K)}
    first = {name: min(call() for _ in range(3 if N <= 64 else 1)) for name, call in arms.items()}
    arms = {name: call for name, call in arms.items() if first[name] < _LOST * min(first.values())}
    chosen = layers[0].chosen_backend(x_1ND, Routing(num_samples=K, keep_ratio=ratio))
    arms["auto"] = arm("auto")
    times: dict[str, list[float]] = {name: [] for name in arms}
    deadline = time.perf_counter() + seconds
    for r in range(rounds):
        if r >= 5 and time.perf_counter() > deadline:
            break
        order = list(arms) if r % 2 == 0 else list(reversed(arms))
        for name in order:
            times[name].append(arms[name]())
    auto = times.pop("auto")
    best = min(times, key=lambda name: statistics.median(times[name]))
    ratios = [a / b for a, b in zip(auto, times[best], strict=True)]
    low, high = _interval(ratios)
    return {
        "tokens": N,
        "num_samples": K,
        "keep_ratio": ratio,
        "chosen": chosen,
        "best": best,
        "auto_ms": 1e3 * statistics.median(auto),
        "best_ms": 1e3 * statistics.median(times[best]),
        "ratio_median": statistics.median(ratios),
        "ratio_low": low,
        "ratio_high": high,
    }


def _able(layer: InfinityFFN, N: int, K: int) -> list[str]:
    """The backends that run here; sparse and eager only where they are not out of the question."""
    able: list[str] = []
    names: tuple[dispatch.Backend, ...] = ("eager", "fused", "sparse")
    for name in names:
        if (name == "sparse" and N > dispatch.MAX_SPARSE_TOKENS) or (name == "eager" and N * K > _EAGER_ROWS):
            continue
        try:
            layer(torch.zeros(1, 1, layer.hidden_size), Routing(backend=name))
        except InfMoEError:
            continue
        able.append(name)
    return able


def _interval(ratios: list[float]) -> tuple[float, float]:
    """Order statistics that hold the median in 95 % of cases (the sign test's interval; all, for five or less)."""
    ordered, n = sorted(ratios), len(ratios)
    skipped, tail = 0, 0.5**n
    term = tail
    while skipped < (n - 1) // 2:
        term *= (n - skipped) / (skipped + 1)
        if tail + term > 0.025:
            break
        tail += term
        skipped += 1
    return ordered[skipped], ordered[n - 1 - skipped]
