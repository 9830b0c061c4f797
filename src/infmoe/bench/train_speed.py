"""Training steps of `infinity` against `moe` and a dense FFN of the total width, beside what FLOPs allow.

B rows, T tokens.

All arms share model size, random tokens, loop and optimizer. "Allowed" is the ratio of executed FLOPs of forward and
backward pass, router, attention and output layer included. The optimizer's step, which costs all of them the same
and weighs much at a thousand tokens a step, is in the whole step and left out of the figures for "passes".
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from infmoe.bench.common import Budget, Measured, Rows, paired_ratio, random_model, spread, training_step
from infmoe.bench.experts import moe_over_gemms
from infmoe.eval.latency import interleave
from infmoe.hf import InfMoEConfig, model_cost
from infmoe.layers import NoiseKey, Routing
from infmoe.recipes import recipe
from infmoe.train.config import RunConfig, apply_overrides, hf_config
from infmoe.train.optim import build_optimizer

RIVALS = ("moe", "dense-wide")


@dataclass(frozen=True)
class Setting:
    """One size.

    Attributes:
        size: the recipe's.
        batch_tokens: tokens a step.
        precisions: of the recipe's `precision`.
        settings: changes to every recipe, as on the command line.
    """

    size: str
    batch_tokens: int
    precisions: tuple[str, ...] = ("bf16", "fp32")
    settings: tuple[str, ...] = ()

    def run_config(self, variant: str, precision: str) -> RunConfig:
        """The recipe as it is measured."""
        return apply_overrides(recipe(f"{self.size}/{variant}"), [f"precision={precision}", *self.settings])


# the batch of `tiny` is its recipe's; that of `small` is one row, all that a CPU trains in a second or two
SETTINGS = (Setting("tiny", 4096), Setting("small", 1024))
QUICK_SETTINGS = (Setting("tiny", 4096, precisions=("bf16",)), Setting("small", 512, precisions=("bf16",)))


def train_flops(config: InfMoEConfig) -> int:
    """FLOPs per token of forward and backward: every product of the forward pass has two in the backward."""
    return 3 * model_cost(config).flops_executed


def train_speed(*, quick: bool = False, settings: tuple[Setting, ...] | None = None) -> Measured:
    """Tokens per second, and each ratio beside what FLOPs allow; and the `moe` layer over its bare products.

    Args:
        quick: fewer rounds, bfloat16 alone, half the tokens at `small`; ends within 40 s.
        settings: None: `tiny` and `small`.
    """
    settings = settings or (QUICK_SETTINGS if quick else SETTINGS)
    budget = Budget(14.0 if quick else None, len(settings))
    rows: Rows = []
    summary: dict[str, Any] = {}
    for setting in settings:
        size_rows, size_summary = _size(setting, rounds=4 if quick else 10, limit_sec=budget.share())
        rows += size_rows
        summary |= size_summary
    bare_rows, bare_summary = moe_over_gemms(quick=quick)
    rows += [{"part": "moe over its products", **row} for row in bare_rows]
    return rows, summary | {f"moe_{key}": value for key, value in bare_summary.items()}


def _size(setting: Setting, *, rounds: int, limit_sec: float | None) -> Measured:
    """Every variant and precision of one size, all taking turns."""
    labels = [(variant, precision) for variant in ("infinity", *RIVALS) for precision in setting.precisions]
    arms: list[Callable[[], None]] = []
    passes: list[list[float]] = []
    flops: dict[str, int] = {}
    for variant in ("infinity", *RIVALS):
        shared: Any = None
        for precision in setting.precisions:
            config = setting.run_config(variant, precision)
            if shared is None:
                shape = hf_config(config)
                flops[variant] = train_flops(shape)
                model = random_model(shape, torch.float32).train()
                shared = (model, _PassTimer(build_optimizer(model, config.optim)))
            model, timer = shared
            passes.append([])
            arms.append(_arm(model, timer, config, setting.batch_tokens, passes[-1]))
    warmup = 1
    steps = interleave(arms, rounds=rounds, warmup=warmup, limit_sec=limit_sec)
    passes = [times[warmup:] for times in passes]

    rows: Rows = []
    summary: dict[str, Any] = {}
    for i, (variant, precision) in enumerate(labels):
        ours = labels.index(("infinity", precision))
        rows.append(
            {
                "part": "step",
                "size": setting.size,
                "batch_tokens": setting.batch_tokens,
                "precision": precision,
                "arm": variant,
                "unit": "tokens/s",
                "rounds": len(steps[i]),
                **spread([setting.batch_tokens / s for s in steps[i]]),
                "gflop_per_s_of_passes": flops[variant] * setting.batch_tokens / 1e9 / spread(passes[i])["median"],
                "optimizer_share": 1 - spread(passes[i])["median"] / spread(steps[i])["median"],
                **paired_ratio(steps[i], steps[ours], prefix="infinity_over_it_"),
                "passes_infinity_over_it": paired_ratio(passes[i], passes[ours])["ratio_median"],
                "allowed": flops[variant] / flops["infinity"],
            }
        )
        row = rows[-1]
        row["reached"] = row["infinity_over_it_median"] / row["allowed"]
        row["passes_reached"] = row["passes_infinity_over_it"] / row["allowed"]
        if variant != "infinity":
            key = f"{setting.size}_{variant.replace('-', '_')}_{precision}"
            summary |= {f"ratio_{key}": row["infinity_over_it_median"], f"allowed_{key}": row["allowed"]}
            summary |= {f"reached_{key}": row["reached"], f"passes_reached_{key}": row["passes_reached"]}
    return rows, summary | {
        f"reached_min_{setting.size}": min(row["reached"] for row in rows),
        f"passes_reached_min_{setting.size}": min(row["passes_reached"] for row in rows),
    }


class _PassTimer:
    """An optimizer that notes when its step begins, which is when forward and backward pass have ended."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self._optimizer = optimizer
        self.began = 0.0

    def step(self) -> None:
        self.began = time.perf_counter()
        self._optimizer.step()

    def zero_grad(self, set_to_none: bool) -> None:
        self._optimizer.zero_grad(set_to_none=set_to_none)


def _arm(
    model: Any, timer: _PassTimer, config: RunConfig, batch_tokens: int, seconds: list[float]
) -> Callable[[], None]:
    """One training step on random tokens; the two passes' seconds are appended."""
    num_rows = max(1, batch_tokens // config.window)
    draw = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(model.config.vocab_size, (num_rows, batch_tokens // num_rows), generator=draw)
    key = NoiseKey(0, 0, torch.arange(num_rows))
    routing = Routing(key=key, max_stats_tokens=config.log.stats_tokens)

    def forward(m: Any) -> Any:
        return m(input_ids=tokens_BT, labels=tokens_BT, routing=routing, use_cache=False)

    step = training_step(model, config, forward, timer)

    def run() -> None:
        begin = time.perf_counter()
        step()
        seconds.append(timer.began - begin)

    return run
