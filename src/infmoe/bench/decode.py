"""Decoding with a whole model: one new token after a cached prompt, against the limit that bytes set.

At batch 1 every weight that is used is read once from memory, so the limit of a speedup is the ratio of the bytes
read: all weights against those that the union of the K masks needs, router, attention and output layer included.

The arms, all taking turns:

- `fused`: the baseline, the best path that skips nothing, at the same dials and so with the same output.
- `sparse`: reads only active rows. `auto`: what the dispatcher takes, which is what a user gets.
- `dense`: GPT-2 small itself, torch's own path. `dense-wide`: a dense FFN of the total width. `moe`: the paper's
  MoE of that total width, two of four experts a token.
- `read`: several of torch's multi-threaded reductions over a large buffer, the fastest in each round: the roof.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from infmoe.bench.common import Budget, Measured, Rows, paired_ratio, random_model, spread
from infmoe.eval.latency import decode_step, interleave
from infmoe.hf import InfMoEConfig, model_cost
from infmoe.layers import Routing
from infmoe.ops.dispatch import Backend
from infmoe.recipes import recipe
from infmoe.train.config import apply_overrides, hf_config

Dials = tuple[int, float]  # K, keep ratio
ISSUE_DIALS: tuple[Dials, ...] = ((2, 1 / 4), (1, 1 / 4), (1, 1 / 8), (1, 1 / 16))
BACKENDS: tuple[Backend, ...] = ("fused", "sparse", "auto")
PLAIN = ("dense", "dense-wide", "moe")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Setting:
    """What is measured; the defaults are the small model with the index of Table 2.

    Attributes:
        infinity, dense, wide, moe: the models.
        dials: K and keep ratio of every point; the first is the default that other points are compared with too.
        batch_sizes, batch_dials: where `auto` must not lose to the baseline.
        prompt_length: cached tokens.
        roof_bytes: what the roof's buffer holds; much more than the last cache.
    """

    infinity: InfMoEConfig
    dense: InfMoEConfig
    wide: InfMoEConfig
    moe: InfMoEConfig
    dials: tuple[Dials, ...] = (*ISSUE_DIALS, *itertools.product((2, 4), (1 / 8, 1 / 16)), (4, 1 / 4))
    batch_sizes: tuple[int, ...] = (2, 4, 8, 16)
    batch_dials: tuple[Dials, ...] = ((2, 1 / 4), (1, 1 / 16))
    prompt_length: int = 32
    roof_bytes: int = 2**29


def small_setting(*, quick: bool) -> Setting:
    """The paper's small model with d_z = 64; a first look takes the issue's four points."""
    config = apply_overrides(recipe("small/infinity"), ["model.z_dim=64"])
    setting = Setting(*(hf_config(c) for c in (config, *(recipe(f"small/{name}") for name in PLAIN))))
    return dataclasses.replace(setting, dials=ISSUE_DIALS, batch_dials=((2, 1 / 4),)) if quick else setting


def byte_limit(config: InfMoEConfig, dials: Dials, union_ratios: tuple[float, ...] | None = None) -> tuple[int, int]:
    """Weights read for one token, if all are and if only the union's are.

    The cached keys and values are left out: at a short prompt they are well under one percent.

    Args:
        config: the model.
        dials: K and keep ratio.
        union_ratios: measured, one per layer; None: independent masks.
    """
    num_samples, keep_ratio = dials
    cost = model_cost(config, Routing(num_samples=num_samples, keep_ratio=keep_ratio), union_ratios)
    return cost.weights_executed, cost.weights_ideal


def decode_speed(*, quick: bool = False, setting: Setting | None = None) -> Measured:
    """Milliseconds a token, GB/s and speedup over the baseline at every dial, beside the limits by bytes.

    Args:
        quick: fewer points and rounds; ends within 40 s.
        setting: None: the small model.
    """
    setting = setting or small_setting(quick=quick)
    rounds = 12 if quick else 40
    budget = Budget(8.0 if quick else None, len(DTYPES) * 3)  # a batch's share is half of batch 1's
    rows: Rows = []
    for dtype in DTYPES:
        model = random_model(setting.infinity, DTYPES[dtype])
        if dtype == "bf16":
            for block in model.transformer.h:
                block.mlp.score_dtype = "bfloat16"
        rows += _single_rows(model, setting, dtype, rounds=rounds, limit_sec=budget.share(2))
        rows += _batch_rows(model, setting, dtype, rounds=rounds, limit_sec=budget.share(1))
        del model
    return rows, _summary(rows, setting) | {"rounds_min": min(row["rounds"] for row in rows)}


def _single_rows(model: Any, setting: Setting, dtype: str, *, rounds: int, limit_sec: float | None) -> Rows:
    """Batch 1."""
    arms: dict[Any, Callable[[], Any]] = {}
    others = dict(zip(PLAIN, (setting.dense, setting.wide, setting.moe), strict=True))
    for name, config in others.items():
        plain = random_model(config, DTYPES[dtype])
        arms[name] = decode_step(plain, None, prompt_length=setting.prompt_length)
    for dials, backend in itertools.product(setting.dials, BACKENDS):
        arms[dials, backend] = decode_step(model, _routing(dials, backend), prompt_length=setting.prompt_length)
    readers = _readers(setting.roof_bytes)
    timed = interleave([*arms.values(), *readers], rounds=rounds, warmup=2, limit_sec=limit_sec)
    seconds = dict(zip(arms, timed[: len(arms)], strict=True))
    read = [min(times) for times in zip(*timed[len(arms) :], strict=True)]
    roof = setting.roof_bytes / 1e9 / spread(read)["median"]

    size = DTYPES[dtype].itemsize
    rows: Rows = [_row(dtype, "read", None, read, setting.roof_bytes, roof)]
    for name, config in others.items():
        rows.append(_row(dtype, name, None, seconds[name], size * model_cost(config).weights_executed, roof))
    for dials in setting.dials:
        unions = measured_unions(model, dials, setting.prompt_length)
        executed, ideal = byte_limit(setting.infinity, dials, unions)
        _, ideal_independent = byte_limit(setting.infinity, dials)
        for backend in BACKENDS:
            arm = seconds[dials, backend]
            row = _row(dtype, backend, dials, arm, size * (executed if backend == "fused" else ideal), roof)
            row |= paired_ratio(seconds[dials, "fused"], arm, prefix="speedup_")
            row["limit"] = executed / ideal if backend != "fused" else 1.0
            row["reached"] = row["speedup_median"] / row["limit"]
            row["limit_independent"] = executed / ideal_independent if backend != "fused" else 1.0
            row["speedup_over_default"] = paired_ratio(seconds[setting.dials[0], "fused"], arm)["ratio_median"]
            row["union"] = sum(unions) / len(unions)
            rows.append(row)
    return rows


def _batch_rows(model: Any, setting: Setting, dtype: str, *, rounds: int, limit_sec: float | None) -> Rows:
    """Larger batches: `auto` against the baseline."""
    points = list(itertools.product(setting.batch_sizes, setting.batch_dials))
    compared: tuple[Backend, Backend] = ("fused", "auto")
    arms = [
        decode_step(model, _routing(dials, backend), prompt_length=setting.prompt_length, batch_size=batch)
        for batch, dials in points
        for backend in compared
    ]
    timed = interleave(arms, rounds=rounds, warmup=1, limit_sec=limit_sec)
    rows: Rows = []
    for i, (batch, dials) in enumerate(points):
        fused, auto = timed[2 * i : 2 * i + 2]
        for name, arm in (("fused", fused), ("auto", auto)):
            row = _row(dtype, name, dials, arm, None, None) | {"batch": batch}
            rows.append(row | paired_ratio(fused, arm, prefix="speedup_"))
    return rows


def _routing(dials: Dials, backend: Backend) -> Routing:
    num_samples, keep_ratio = dials
    return Routing(num_samples=num_samples, keep_ratio=keep_ratio, max_stats_tokens=1, backend=backend)


def _row(
    dtype: str, arm: str, dials: Dials | None, seconds: Sequence[float], num_bytes: int | None, roof: float | None
) -> dict[str, Any]:
    row: dict[str, Any] = {"dtype": dtype, "batch": 1, "arm": arm}
    row |= {"num_samples": dials and dials[0], "keep_ratio": dials and dials[1], "unit": "ms", "rounds": len(seconds)}
    row |= spread([1e3 * s for s in seconds])
    if num_bytes is not None and roof is not None:
        rate = num_bytes / 1e9 / spread(seconds)["median"]
        row |= {"mb": num_bytes / 1e6, "gb_per_s": rate, "roof_share": rate / roof}
    return row


@torch.no_grad()
def measured_unions(model: Any, dials: Dials, num_tokens: int) -> tuple[float, ...]:
    """Mean share of the neurons that a token's K masks have together, layer by layer, over random tokens."""
    draw = torch.Generator().manual_seed(1)
    tokens_BT = torch.randint(model.config.vocab_size, (1, num_tokens), generator=draw)
    num_samples, keep_ratio = dials
    out = model(input_ids=tokens_BT, routing=Routing(num_samples=num_samples, keep_ratio=keep_ratio), use_cache=False)
    return tuple(stats.summary()["union_ratio"] for stats in out.routing_stats)


def _readers(num_bytes: int) -> list[Callable[[], Any]]:
    """Whole reads of one buffer; which is the fastest depends on the machine."""
    buffer = torch.ones(num_bytes // 4)
    columns = min(4096, len(buffer))
    matrix, vector = buffer[: len(buffer) // columns * columns].view(-1, columns), torch.ones(columns)
    integers = buffer[: len(buffer) // 2 * 2].view(torch.int64)
    return [buffer.sum, buffer.amax, integers.amax, lambda: matrix @ vector, lambda: torch.dot(buffer, buffer)]


def dials_key(dials: Dials) -> str:
    """K = 1 at keep 1/8 as "k1_keep_1_8"."""
    return f"k{dials[0]}_keep_1_{round(1 / dials[1])}"


def _summary(rows: Rows, setting: Setting) -> dict[str, Any]:
    """Per type what `auto` reaches at the issue's points; plain keys are float32's."""
    summary: dict[str, Any] = {}
    for dtype in DTYPES:
        suffix = "" if dtype == "fp32" else f"_{dtype}"
        own = [row for row in rows if row["dtype"] == dtype]
        single = {(r["arm"], r["num_samples"], r["keep_ratio"]): r for r in own if r["batch"] == 1}
        summary[f"read_roof_gb_per_s{suffix}"] = single["read", None, None]["gb_per_s"]
        stated = [d for d in setting.dials if d in ISSUE_DIALS]
        for dials in stated:
            row, key = single["auto", *dials], dials_key(dials)
            summary[f"speedup_{key}{suffix}"] = row["speedup_median"]
            summary[f"limit_{key}{suffix}"] = row["limit"]
            summary[f"limit_independent_{key}{suffix}"] = row["limit_independent"]
        autos = [single["auto", *dials] for dials in stated]
        summary[f"reached_min{suffix}"] = min(row["reached"] for row in autos)
        summary[f"reached_independent_min{suffix}"] = min(
            row["speedup_median"] / row["limit_independent"] for row in autos
        )
        for name in ("dense", "moe"):
            summary[f"{name}_ms{suffix}"] = single[name, None, None]["median"]
        summary[f"batch_ratio_min{suffix}"] = min(
            row["speedup_median"] for row in own if row["batch"] > 1 and row["arm"] == "auto"
        )
    return summary
