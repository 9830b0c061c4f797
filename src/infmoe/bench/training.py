"""Training speed: the loop against bare steps, our model against transformers', the statistics' share.

B rows, T tokens.
"""

import contextlib
import gc
import io
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infmoe.bench.common import Measured, Rows, paired_ratio, spread, tiny_run, training_step
from infmoe.data import DataOrder, TokenData
from infmoe.eval.latency import decode_step, interleave
from infmoe.eval.sweep import DECODE_PROMPT
from infmoe.hf import InfMoEForCausalLM
from infmoe.layers import InfinityFFN, NoiseKey, Routing
from infmoe.train import run
from infmoe.train.config import RunConfig, apply_overrides, hf_config
from infmoe.train.optim import build_optimizer


def loop_overhead(*, quick: bool = False) -> Measured:
    """Seconds per step of `infmoe train` and of a bare loop over the same model, batches and optimizer.

    The loop's is the difference of a long and a short run, so that start-up and the final checkpoint, which
    both have, fall out; evaluation and intermediate checkpoints are off, logging and statistics on.
    """
    rounds, short, long = (2, 5, 15) if quick else (5, 5, 30)
    settings = ("eval.every=null", "checkpoint.every=1000000")
    with tiny_run("infinity", *settings) as (config, folder):
        batches = _batches(config, long)

        def loop(steps: int, name: str) -> float:
            begin = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                run(apply_overrides(config, [f"steps={steps}"]), folder / name)
            return time.perf_counter() - begin

        loop(2, "warm")
        ours, bare = [], []
        for r in range(rounds):
            arms: list[Callable[[], None]] = [
                lambda r=r: ours.append((loop(long, f"l{r}") - loop(short, f"s{r}")) / (long - short)),  # type: ignore[misc]
                lambda: bare.append(_bare_seconds(config, batches, short)),
            ]
            for arm in arms if r % 2 == 0 else reversed(arms):
                arm()
                gc.collect()
    ratio = paired_ratio(ours, bare)
    rows: Rows = [
        {"arm": "infmoe train", "unit": "s/step", **spread(ours)},
        {"arm": "bare forward, backward, step", "unit": "s/step", **spread(bare)},
    ]
    return rows, {"overhead_ratio": ratio["ratio_median"], **ratio, "limit": 1.05, "rounds": rounds}


def against_gpt2(*, quick: bool = False) -> Measured:
    """Steps of `tiny/dense` and of transformers' GPT-2 of the same shape, taking turns in one process."""
    from transformers import GPT2Config, GPT2LMHeadModel

    rounds = 6 if quick else 40
    with tiny_run("dense") as (config, _):
        batch = _batches(config, 1)[0]
        ours = InfMoEForCausalLM(hf_config(config)).train()
        shape = ours.config
        theirs = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=shape.vocab_size,
                n_positions=shape.max_position_embeddings,
                n_embd=shape.hidden_size,
                n_layer=shape.num_hidden_layers,
                n_head=shape.num_attention_heads,
                n_inner=shape.intermediate_size,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
            )
        ).train()
        routing = Routing(max_stats_tokens=config.log.stats_tokens)
        arms = [
            training_step(
                ours,
                config,
                lambda model: model(input_ids=batch, labels=batch, routing=routing, use_cache=False),
            ),
            training_step(theirs, config, lambda model: model(input_ids=batch, labels=batch, use_cache=False)),
        ]
        seconds = interleave(arms, rounds=rounds)
    rows: Rows = [
        {"arm": name, "unit": "tokens/s", **spread([batch.numel() / s for s in arm])}
        for name, arm in zip(("infmoe tiny/dense", "transformers GPT-2"), seconds, strict=True)
    ]
    ratio = paired_ratio(seconds[1], seconds[0])
    return rows, {"speed_ratio": ratio["ratio_median"], **ratio, "limit": 1.0, "rounds": rounds}


def stats_cost(*, quick: bool = False) -> Measured:
    """A training step of `tiny/infinity` with its routing statistics as the recipe logs them, and with none."""
    rounds = 6 if quick else 40
    with tiny_run("infinity") as (config, _):
        batch = _batches(config, 1)[0]
        model = InfMoEForCausalLM(hf_config(config)).train()

        def arm(tokens: int, stats: Callable[..., Any]) -> Callable[[], None]:
            routing = Routing(key=NoiseKey(0, 0, torch.arange(len(batch))), max_stats_tokens=tokens)
            step = training_step(
                model, config, lambda m: m(input_ids=batch, labels=batch, routing=routing, use_cache=False)
            )

            def run_step() -> None:
                InfinityFFN._spread_stats = stats  # type: ignore[method-assign]
                step()

            return run_step

        real, zero = InfinityFFN._spread_stats, torch.zeros(())
        try:
            seconds = interleave([arm(config.log.stats_tokens, real), arm(1, lambda *_: (zero, zero))], rounds=rounds)
        finally:
            InfinityFFN._spread_stats = real  # type: ignore[method-assign]
    rows: Rows = [
        {"arm": name, "unit": "s/step", **spread(arm)}
        for name, arm in zip((f"{config.log.stats_tokens} tokens", "no statistics"), seconds, strict=True)
    ]
    ratio = paired_ratio(*seconds)
    return rows, {"stats_ratio": ratio["ratio_median"], **ratio, "limit": 1.03, "rounds": rounds}


def variant_speed(*, quick: bool = False) -> Measured:
    """Every arm of the tiny experiments, all taking turns: training in both precisions, and decoding at batch 1.

    ∞-MoE decodes at several settings of its dials too; those rows name them.
    """
    from infmoe.reproduce.arms import arm_named
    from infmoe.reproduce.places import KEEP_RATIOS
    from infmoe.reproduce.plan import SCALES, TIER1, TIER2, RunSpec

    rounds = 3 if quick else 15
    scale = SCALES["tiny"]
    names = TIER1 if quick else (*TIER1, *TIER2)
    arms, labels, models = [], [], []
    for name in names:
        spec = RunSpec(scale, arm_named(name), scale.tokens, 1e-3, 1)
        model = InfMoEForCausalLM(hf_config(spec.config())).train()
        models.append(model)
        for precision in ("fp32", "bf16"):
            config = apply_overrides(spec.config(), [f"precision={precision}"])
            tokens_BT = torch.randint(model.config.vocab_size, (config.batch_rows, config.window))
            routing = Routing(key=NoiseKey(0, 0, torch.arange(config.batch_rows)), max_stats_tokens=1)
            forward = partial(_forward, tokens_BT=tokens_BT, routing=routing)
            arms.append(training_step(model, config, forward))
            labels.append((name, precision))
    warmup = 1 if quick else 6  # until the experts' products have their kernels
    seconds = interleave(arms, rounds=rounds, warmup=warmup)
    dials = [(K, ratio) for K in (1, 2) for ratio in KEEP_RATIOS]
    steps = [decode_step(model.eval(), None, prompt_length=DECODE_PROMPT) for model in models]
    infinity = models[names.index("infinity")]
    steps += [
        decode_step(infinity, Routing(num_samples=K, keep_ratio=ratio), prompt_length=DECODE_PROMPT)
        for K, ratio in dials
    ]
    decoding = interleave(steps, rounds=10 * rounds)
    rows: Rows = [
        {"arm": name, "precision": precision, "unit": "tokens/s", **spread([config.batch_tokens / s for s in arm])}
        for (name, precision), arm in zip(labels, seconds, strict=True)
    ]
    speed = {(r["arm"], r["precision"]): r["median"] for r in rows}
    rows += [
        {"arm": name, "precision": "fp32", "unit": "ms", **spread([1e3 * s for s in arm])}
        for name, arm in zip(names, decoding[: len(names)], strict=True)
    ]
    rows += [
        {"arm": "infinity", "num_samples": K, "keep_ratio": ratio, "precision": "fp32", "unit": "ms"}
        | spread([1e3 * s for s in arm])
        for (K, ratio), arm in zip(dials, decoding[len(names) :], strict=True)
    ]
    return rows, {
        f"infinity_over_{other}_{p}": speed["infinity", p] / speed[other, p]
        for other in ("dense-wide", "moe")
        for p in ("fp32", "bf16")
    } | {"rounds": rounds}


def _forward(model: Any, *, tokens_BT: Tensor, routing: Routing) -> Any:
    return model(input_ids=tokens_BT, labels=tokens_BT, routing=routing, use_cache=False)


def _batches(config: RunConfig, steps: int) -> list[Tensor]:
    """The token batches of a run's first steps, int64, each (B, T)."""
    assert config.data.dir is not None
    data = TokenData.open(Path(config.data.dir))
    order = DataOrder(data.num_windows("train", config.window), config.seed)
    rows = config.batch_rows
    return [
        torch.from_numpy(
            data.windows("train", order.indices(np.arange(s * rows, (s + 1) * rows, dtype=np.int64)), config.window)
        )
        for s in range(steps)
    ]


def _bare_seconds(config: RunConfig, batches: list[Tensor], first_timed: int) -> float:
    """Seconds per step of forward, backward and optimizer step, and nothing else; early steps are not timed."""
    torch.manual_seed(config.seed)
    model = InfMoEForCausalLM(hf_config(config)).train()
    optimizer = build_optimizer(model, config.optim)
    accumulation = config.accumulation(1)

    def step(s: int) -> None:
        for micro, tokens in enumerate(batches[s].split(config.micro_batch_size)):
            first = s * config.batch_rows + micro * config.micro_batch_size
            key = NoiseKey(config.seed, s, torch.arange(first, first + len(tokens)))
            with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
                routing = Routing(key=key, max_stats_tokens=1)
                loss = model(input_ids=tokens, labels=tokens, routing=routing, use_cache=False).loss
            (loss / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for s in range(first_timed):
        step(s)
    begin = time.perf_counter()
    for s in range(first_timed, len(batches)):
        step(s)
    return (time.perf_counter() - begin) / (len(batches) - first_timed)
