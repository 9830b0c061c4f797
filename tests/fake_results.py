"""A scale so small that a run takes seconds, and results that nobody trained."""

import dataclasses
import json
from functools import cache
from typing import Any

from infmoe.hf import InfMoEConfig, model_cost
from infmoe.reproduce.arms import arm_named
from infmoe.reproduce.measures import own_settings, settings
from infmoe.reproduce.places import (
    EXPERT_COUNTS,
    GRID_RATIOS,
    GRID_SAMPLES,
    MEAN_SAMPLES,
    TASK_KEEP_RATIOS,
    TASK_SAMPLES,
    UNSURE_RATIOS,
    UNSURE_SAMPLES,
)
from infmoe.reproduce.plan import SCALES, RunSpec
from infmoe.reproduce.store import Store

MINI = dataclasses.replace(
    SCALES["tiny"],
    tokens=1024,
    long_tokens=4096,
    data_sizes=(512, 1024, 2048, 4096),
    entropy_tokens=4096,
    lr_grid=(1e-3, 2e-3),
    tune_tokens=512,
    seeds=(2, 4),
    side_seeds=2,
    windows=16,
    dial_windows=8,
    task_items=9,
    settings=(
        *("model.vocab_size=320", "model.hidden_size=32", "model.num_hidden_layers=2", "model.num_attention_heads=2"),
        *("model.max_position_embeddings=32", "batch_tokens=256", "micro_batch_size=8", "checkpoint.every=2"),
        *("eval.every=2", "eval.windows=8", "log.every=1", "precision=fp32"),
    ),
)
DATA = {
    "sha256": "d" * 64,
    "vocab_size": 300,
    "splits": {
        "train": {"documents": 9, "tokens": 1000, "text_bytes": 3000},
        "val": {"documents": 2, "tokens": 200, "text_bytes": 600},
    },
}


TASK_FILES = {"boolq.jsonl": "e" * 64}
TASKS = ("BoolQ", "HellaSwag", "WinoGrande", "ARC-e", "ARC-c", "OBQA", "SAT-en")


@cache
def _built(model: str) -> tuple[Any, dict[str, int]]:
    """A model's configuration and what it costs."""
    built = InfMoEConfig(**json.loads(model))
    return built, model_cost(built).as_dict()


def spec_of(store: Store, arm: str = "infinity", seed: int = 1, *, tokens: int | None = None, lr: float = 2e-3):
    """A run of an arm."""
    return RunSpec(store.scale, arm_named(arm), tokens or store.scale.tokens, lr, seed)


def fake_scores(spec: RunSpec, model: Any, loss: float) -> list[dict[str, Any]]:
    """Zero-shot scores: the better the loss the better they are, and better with more samples and neurons."""
    points: list[dict[str, Any]] = [{}]
    if model.ffn == "infinity":
        trained = {"num_samples": model.num_samples} if model.sigma_activation != "none" else {}
        points = [trained | {"keep_ratio": model.keep_ratio}]
        if spec.arm.name == "infinity":
            keep = model.keep_ratio
            points += [{"num_samples": k, "keep_ratio": keep} for k in TASK_SAMPLES if k != model.num_samples]
            points += [{"num_samples": model.num_samples, "keep_ratio": r} for r in TASK_KEEP_RATIOS if r != keep]
            points += [{"mode": "mu", "keep_ratio": keep}]
    elif model.ffn == "moe":
        points = [{"num_experts_per_tok": model.num_experts_per_tok}]
        if spec.arm.name == "moe":
            points += [{"num_experts_per_tok": k} for k in (1, 3, 4)]
    rows = []
    for point in points:
        gain = 0.01 * point.get("num_samples", 0) + 0.1 * point.get("keep_ratio", 0)
        for i, task in enumerate(TASKS):
            acc, margin = 0.5 - 0.05 * loss + 0.01 * i + gain, 4.0 - loss + 0.1 * i + gain
            figures = {"items": 4, "acc": acc, "acc_se": 0.02, "acc_norm": acc, "acc_norm_se": 0.02}
            interval = {"margin_low": margin - 0.2, "margin_high": margin + 0.2}
            rows.append({"task": task, **point, **figures, "margin": margin, "margin_se": 0.1, **interval})
    return rows


def fake_values(spec: RunSpec, loss: float, *, tasks: bool = True, **changes: Any) -> dict[str, Any]:
    """A run's file, as if it had been trained to this loss, and scored on tasks unless told otherwise."""
    config = spec.config()
    model, cost = _built(json.dumps(config.model))
    ours = model.ffn == "infinity"
    routing = {
        "entropy": 0.9,
        "effective_units": 500.0,
        "dead_ratio": 0.01,
        "sigma_to_mu": 0.3 * ours,
        "overlap_ratio": 0.8 if ours else 1.0,
    }
    steps = [round(i * spec.tokens / 16) for i in range(1, 17)]
    curve: dict[str, list] = {"tokens": steps, "loss": [loss + 1.0] * 16, "val_tokens": [steps[-1]], "val_loss": [loss]}
    curve |= {name: [value] * 16 for name, value in routing.items()}
    measures: dict[str, list] = {"held_out": [{"loss": loss}]}
    if ours:
        trained = {"num_samples": model.num_samples} if model.sigma_activation != "none" else {}
        ratios = [{**trained, "keep_ratio": r, "loss": loss + 1e-4 * abs(r - 0.25)} for r in (1 / 16, 0.125, 0.25, 0.5)]
        samples = [{"num_samples": k, "keep_ratio": model.keep_ratio, "loss": loss + 1e-4 / k} for k in (1, 2, 4, 8)]
        both = {row["keep_ratio"]: row for row in ratios if row["keep_ratio"] != model.keep_ratio or not trained}
        points = [*both.values(), *(samples if trained else [])]
        figures = {"overlap_ratio": 0.8, "union_ratio": 0.3, "sigma_to_mu": 0.3}
        mean = [{"mode": "mu", "keep_ratio": model.keep_ratio, "loss": loss + 0.002}] if trained else []
        measures["dials"] = [row | figures | {"flops_ideal": 10**6, "flops_executed": 10**7} for row in points + mean]
        rules = (("ratio", 0.0), ("cut", 0.01), ("one cut", -0.01), ("layers", -0.02))
        shares = (1 / 16, 1 / 8, 1 / 4)
        measures["adaptive"] = [
            {"rule": rule, "share": share, "loss": loss + gap, "layer_shares": [share, share]}
            for share in shares
            for rule, gap in rules
        ]
        measures["adaptive_mass"] = [
            row | {"loss": loss - row["share"] / 10 * (row["rule"] != "ratio")} for row in measures["adaptive"]
        ]
        if trained:
            fixed = [(k, float(k), "fixed", 0.008 / k) for k in (1, MEAN_SAMPLES, *UNSURE_SAMPLES)]
            unsure = [(k, MEAN_SAMPLES + 0.01, "unsure", 0.008 / k) for k in UNSURE_SAMPLES]
            measures["adaptive_samples"] = [
                {"rule": rule, "keep_ratio": ratio, "num_samples": k, "mean_samples": mean, "loss": loss + more}
                for ratio in UNSURE_RATIOS
                for k, mean, rule, more in (*fixed, *unsure)
            ]
            own_ratio = figures | {"flops_ideal": 10**6, "flops_executed": 10**7}
            measures["dial_grid"] = [
                {"num_samples": k, "keep_ratio": r, "loss": loss + 0.01 / k - 0.1 * r} | own_ratio
                for r in GRID_RATIOS
                for k in GRID_SAMPLES
            ]
            measures["dial_grid"] += [
                {"mode": "mu", "keep_ratio": r, "loss": loss - 0.1 * r} | own_ratio for r in GRID_RATIOS
            ]
            spread = [("antithetic", 0.003), ("qmc", 0.004)]
            measures["modes"] = [
                {"mode": mode, "num_samples": k, "keep_ratio": 0.25, "loss": loss + gap / k}
                for mode, gap in spread
                for k in (2, 4, 8)
            ]
        measures["mask_scales"] = [{"mask_scale": rule, **row} for rule in ("fixed", "rms") for row in ratios]
    elif model.ffn == "moe" and model.expert_router == "learned":
        own = model.num_experts_per_tok
        ks = [k for k in EXPERT_COUNTS if k <= model.num_experts]
        slope = 0.002 if model.ideal_experts_per_tok else 0.02
        flops = {k: {"flops_ideal": 10**5 * k, "flops_executed": 10**5 * k} for k in ks}
        figures = {"overlap_ratio": 1.0, "union_ratio": 0.5, "sigma_to_mu": 0.0}
        rows = [{"num_experts_per_tok": k, "loss": loss + slope * abs(k - own)} | flops[k] | figures for k in ks]
        measures["dials"] = rows
        beyond = [row for row in rows if row["num_experts_per_tok"] > own]
        if beyond and model.num_experts > 4:
            measures["rank_dampings"] = [{"rank_damping": a, **row} for a in (0.25, 0.5) for row in beyond]
        measures["gate_norms"] = [{"gate_norm": norm, **row} for norm in ("selected", "all", "trained") for row in rows]
    measured_with = settings(spec.scale)
    if spec.seed and tasks:
        measures["zero_shot"] = fake_scores(spec, model, loss)
    for name in measures:
        if (own_ones := own_settings(name, spec.scale, TASK_FILES)) is not None:
            measured_with[name] = own_ones
    base = spec.arm.init
    init = {"arm": base, "slug": f"{base}-s{spec.seed}", "fingerprint": "f" * 64}
    return {
        **({} if base is None else {"run": {"init": init}}),
        "config": config.to_dict(),
        "data": DATA,
        "cost": cost,
        "seconds": 1.0,
        "curve": curve,
        "measures": measures,
        "measured_with": measured_with,
        "provenance": {"machine": {"cpu": "a processor"}, "versions": {"torch": "2"}},
    } | changes


def fill(store: Store, losses: dict[str, float], tokens: int, seeds: int = 3, *, tasks: bool = True) -> None:
    """Runs of these arms at these losses, a little different from seed to seed, tuning runs too."""
    for arm_name, loss in losses.items():
        arm = arm_named(arm_name)
        for i, spec in enumerate(store.tuning(arm)):
            store.put(spec, fake_values(spec, loss + 1.0 - 0.1 * i))
        for seed in range(1, 1 + seeds):
            spec = spec_of(store, arm_name, seed, tokens=tokens, lr=2e-3 * arm.lr_factor)
            own = loss + 0.001 * seed + 0.0005 * (seed == 2) * (arm_name == "moe")
            store.put(spec, fake_values(spec, own, tasks=tasks))
