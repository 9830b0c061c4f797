"""Measurements of the product itself, each regenerable by `infmoe bench NAME`.

Every measurement returns `rows` and `summary`; arms that are compared take turns.
"""

import importlib
from pathlib import Path
from typing import Any

from infmoe.errors import InfMoEError, unknown_name

# name -> (module, function, one line)
BENCHES: dict[str, tuple[str, str, str]] = {
    "loop": ("training", "loop_overhead", "the training loop over bare forward, backward and step"),
    "gpt2": (
        "training",
        "against_gpt2",
        "tiny/dense against transformers' GPT-2 of the same shape, same loop",
    ),
    "stats": ("training", "stats_cost", "what the routing statistics cost in a training step"),
    "zero_shot": ("zero_shot_speed", "zero_shot_speed", "multiple-choice items per second against lm-eval's own model"),
    "variants": ("training", "variant_speed", "training and decoding speed of every arm of the tiny experiments"),
    "select": ("selection", "select_speed", "top-N selection: numpy's quickselect against torch.topk"),
    "startup": ("startup", "startup", "time of `infmoe --help` and of `import infmoe` over `import torch`"),
    "resume": ("resume", "kill_and_resume", "a run killed by SIGKILL and resumed, bit for bit"),
    "ffn": ("ffn", "ffn_speed", "one ∞-MoE layer against its bare matrix products and the paper's reference"),
    "decode": ("decode", "decode_speed", "decoding with a whole model against the limits by bytes"),
    "train": ("train_speed", "train_speed", "training steps against moe and dense, beside what FLOPs allow"),
    "experts": ("experts", "moe_over_gemms", "the moe layer over its own bare grouped products"),
    "growth": ("growth", "growth", "the layer's time against tokens, F and K, each fitted"),
    "router": ("growth", "router_cost", "FLOPs and bytes of the router apart; flips of bf16 scores"),
    "dispatch": ("dispatching", "dispatch_regret", "the dispatcher's choice against the best backend, over a grid"),
    "scores": ("scores", "score_precision", "what bfloat16 scores change on a trained model: units and loss"),
    "gpu": ("gpu", "gpu", "the Triton kernels on a GPU: checked against naive.py, then timed"),
    "aot": ("aot", "aot", "the Triton kernels compiled for sm_80 and sm_90: registers and shared memory"),
    "data": ("tokenize", "tokenize", "`infmoe data` against tokenizers' encode_batch alone"),
}

ON_FILES = ("zero_shot",)  # those that take `--tasks-dir`


def run_bench(name: str, *, quick: bool = False, data_dir: Path | None = None) -> dict[str, Any]:
    """Run one measurement.

    Args:
        name: a key of `BENCHES`.
        quick: fewer rounds, for a first look.
        data_dir: the zero-shot tasks' files, for those of `ON_FILES`.

    Returns:
        `bench`, `quick`, `rows`, `summary` and `provenance`.

    Raises:
        InfMoEError: an unknown name, or files for what reads none.
    """
    if name not in BENCHES:
        raise unknown_name("bench", name, BENCHES)
    if data_dir is not None and name not in ON_FILES:
        raise InfMoEError(f"--tasks-dir goes with {', '.join(ON_FILES)}: {name} reads no files, leave it out")
    module, function, _ = BENCHES[name]
    files = {"data_dir": data_dir} if data_dir is not None else {}
    rows, summary = getattr(importlib.import_module(f"infmoe.bench.{module}"), function)(quick=quick, **files)
    from infmoe.provenance import provenance

    return {"bench": name, "quick": quick, "rows": rows, "summary": summary, "provenance": provenance()}
