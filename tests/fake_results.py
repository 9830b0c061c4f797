"""A scale so small that a run takes seconds, and results that nobody trained."""

import copy
import dataclasses
import json
from functools import cache
from typing import Any

from infmoe.hf import InfMoEConfig, model_cost
from infmoe.reproduce.arms import arm_named
from infmoe.reproduce.checks import expanded_model, run_identity
from infmoe.reproduce.measures import MEASURES, own_settings, settings
from infmoe.reproduce.page.elastic import elastic
from infmoe.reproduce.page.figures import Gallery
from infmoe.reproduce.page.section import Claim
from infmoe.reproduce.places import Place
from infmoe.reproduce.plan import SCALES, RunSpec, Scale
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


@cache
def _places(name: str, model: str, arm: str, tokens: int, scale: Scale) -> list[Place]:
    where = MEASURES[name].where
    assert where is not None
    found = where(_built(model)[0], RunSpec(scale, arm_named(arm), tokens, 0.0, 1))
    return [*found.required, *(place for group in found.groups for place in group)]


def _fake_scores(place: Place, loss: float) -> dict[str, float]:
    """Zero-shot scores: the better the loss the better they are, and better with more samples and neurons."""
    i = TASKS.index(place["task"])
    gain = 0.01 * place.get("num_samples", 0) + 0.1 * place.get("keep_ratio", 0)
    acc, margin = 0.5 - 0.05 * loss + 0.01 * i + gain, 4.0 - loss + 0.1 * i + gain
    figures = {"items": 4, "acc": acc, "acc_se": 0.02, "acc_norm": acc, "acc_norm_se": 0.02}
    return figures | {"margin": margin, "margin_se": 0.1, "margin_low": margin - 0.2, "margin_high": margin + 0.2}


_ROUTED = {"overlap_ratio": 0.8, "union_ratio": 0.3, "sigma_to_mu": 0.3, "flops_ideal": 10**6, "flops_executed": 10**7}
_NEED = {"ratio": 0.0, "cut": 0.01, "one cut": -0.01, "layers": -0.02}


def _dial_loss(place: Place, model: Any) -> float:
    """What a place adds to the loss: little, and most at z = mu."""
    if place.get("mode") == "mu":
        return 0.002
    if "num_samples" in place and place["keep_ratio"] == model.keep_ratio:
        return 1e-4 / place["num_samples"]
    return 1e-4 * abs(place["keep_ratio"] - 0.25)


def _expert_row(place: Place, model: Any, loss: float) -> dict[str, Any]:
    k, slope = place["num_experts_per_tok"], 0.002 if model.ideal_experts_per_tok else 0.02
    figures = {"overlap_ratio": 1.0, "union_ratio": 0.5, "sigma_to_mu": 0.0}
    flops = {"flops_ideal": 10**5 * k, "flops_executed": 10**5 * k}
    return {"loss": loss + slope * abs(k - model.num_experts_per_tok)} | flops | figures


def _sample_row(place: Place, loss: float) -> dict[str, Any]:
    mean = 2.01 if place["rule"] == "unsure" else float(place["num_samples"])
    return {"loss": loss + 0.008 / place["num_samples"], "mean_samples": mean}


def _grid_loss(place: Place) -> float:
    samples = 0.0 if place.get("mode") == "mu" else 0.01 / place["num_samples"]
    return samples - 0.1 * place["keep_ratio"]


def _fake_measures(spec: RunSpec, model: Any, loss: float) -> dict[str, Any]:
    """What each measure that a model has holds at a place, beside the place."""
    if model.ffn == "moe" and model.expert_router == "learned":
        row = lambda place: _expert_row(place, model, loss)  # noqa: E731
        damped = {"rank_dampings": row} if model.num_experts > max(4, model.num_experts_per_tok) else {}
        return {"dials": row, "gate_norms": row, **damped}
    if model.ffn != "infinity":
        return {}
    found = {
        "dials": lambda place: {"loss": loss + _dial_loss(place, model)} | _ROUTED,
        "mask_scales": lambda place: {"loss": loss + 1e-4 * abs(place["keep_ratio"] - 0.25)},
        "adaptive": lambda place: {"loss": loss + _NEED[place["rule"]], "layer_shares": [place["share"]] * 2},
        "adaptive_mass": lambda place: {
            "loss": loss - place["share"] / 10 * (place["rule"] != "ratio"),
            "layer_shares": [place["share"]] * 2,
        },
    }
    if model.sigma_activation == "none":
        return found
    gaps = {"antithetic": 0.003, "qmc": 0.004}
    return found | {
        "adaptive_samples": lambda place: _sample_row(place, loss),
        "dial_grid": lambda place: {"loss": loss + _grid_loss(place)} | _ROUTED,
        "own_samples": lambda place: {"loss": loss + _grid_loss(place)} | _ROUTED,
        "modes": lambda place: {"loss": loss + gaps[place["mode"]] / place["num_samples"]},
    }


def fake_values(spec: RunSpec, loss: float, *, tasks: bool = True, **changes: Any) -> dict[str, Any]:
    """A run's file, as if it had been trained to this loss, and scored on tasks unless told otherwise."""
    config = spec.config()
    built = json.dumps(config.model)
    model, cost = _built(built)
    ours = model.ffn == "infinity"
    routing = {
        "entropy": 0.9,
        "effective_units": 500.0,
        "dead_ratio": 0.01,
        "sigma_to_mu": 0.3 * ours,
        "overlap_ratio": 0.8 if ours else 1.0,
    }
    identity = run_identity(spec, config)
    steps = [round(i * identity["tokens"] / 16) for i in range(1, 17)]
    curve: dict[str, list] = {"tokens": steps, "loss": [loss + 1.0] * 16, "val_tokens": [steps[-1]], "val_loss": [loss]}
    curve |= {name: [value] * 16 for name, value in routing.items()}
    rows = {"held_out": lambda place: {"loss": loss}} | _fake_measures(spec, model, loss)
    if spec.seed and tasks:
        rows["zero_shot"] = lambda place: _fake_scores(place, loss)
    measures = {
        name: [place | row(place) for place in _places(name, built, spec.arm.name, spec.tokens, spec.scale)]
        for name, row in rows.items()
    }
    measured_with = settings(spec.scale)
    for name in measures:
        if (own_ones := own_settings(name, spec.scale, TASK_FILES)) is not None:
            measured_with[name] = own_ones
    if spec.arm.init is not None:
        base = arm_named(spec.arm.init)
        slug = RunSpec(spec.scale, base, spec.scale.tokens, spec.lr / spec.arm.lr_factor, spec.seed).slug
        identity["init"] = {"arm": base.name, "slug": slug, "fingerprint": "f" * 64}
    return {
        "run": identity,
        "config": config.to_dict(),
        "model": expanded_model(config),
        "data": copy.deepcopy(DATA),
        "cost": dict(cost),
        "seconds": 1.0,
        "curve": curve,
        "measures": measures,
        "measured_with": measured_with,
        "provenance": {
            "machine": {"cpu": "a processor"},
            "versions": {"torch": "2"},
            "training": {"versions": {"torch": "2"}, "commit": "c" * 40},
        },
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


def elastic_claims(store: Store, text: str) -> list[Claim]:
    """The elastic section's claims with these words."""
    section = elastic(store, Gallery(store.folder))
    return [claim for claim in section.claims if text in claim.text]


def ffn_result() -> dict[str, Any]:
    """What `infmoe bench ffn` writes: at three keep ratios, beside what Figure 4 does not show."""
    medians = {"infinity": (10.0, 12.0, 13.0), "reference": (40.0, 44.0, 42.0), "gemms": (10.0, 10.5, 10.2)}
    rows = [
        {"dtype": "bf16", "z_dim": 256, "pass": "forward", "arm": arm, "keep_ratio": ratio, "median": median}
        | {"q1": median - 1.0, "q3": median + 3.0, "rounds": 2}
        for arm, line in medians.items()
        for ratio, median in zip((0.25, 0.5, 1.0), line, strict=True)
    ]
    others = [{"pass": "train"}, {"dtype": "fp32"}, {"z_dim": 64}, {"arm": "eager"}]
    rows += [row | other | {"median": 99.0} for other in others for row in rows[:3]]
    memory = {"dtype": "bf16", "z_dim": 256, "arm": "infinity memory", "unit": "MB"}
    return {
        "rows": [*rows, memory],
        "summary": {"forward_speedup_min": 3.5, "forward_over_gemms_max": 1.1, "train_speedup_min": 2.5},
        "provenance": {"command": "infmoe bench ffn --out a.json"},
    }
