"""Multiple-choice items per second: our scorer against lm-eval's own `hf` model, weights and batch size the same."""

import logging
import random
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from infmoe.bench.common import Measured, Rows, spread, tiny_run
from infmoe.data import load_tokenizer
from infmoe.errors import InfMoEError
from infmoe.eval.latency import interleave
from infmoe.eval.loading import Opened
from infmoe.eval.zero_shot.tasks import SAT
from infmoe.hf import InfMoEConfig, InfMoEForCausalLM

CHOICES = 4
WINDOW = 256
# (context, continuation) of each answer
Pairs = list[tuple[str, str]]


def zero_shot_speed(*, quick: bool = False, data_dir: Path | None = None) -> Measured:
    """Models of the tiny shape, GPT-2 and ∞-MoE, over items of every task.

    lm-eval's model runs the context of one-token answers (SAT-en's letters) once too: little is left to gain there.

    Args:
        quick: fewer items and rounds.
        data_dir: the tasks' files; None: made-up items of ARC's form, one question and four answers.
    """
    try:
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM

        from infmoe.eval.zero_shot.harness import InfMoELM
    except ImportError as error:
        raise InfMoEError("this measurement needs lm-eval: pip install 'infmoe[eval]'") from error

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its model tells of every text that it cuts
    rounds, count = (3, 32) if quick else (5, 64)
    tasks = {"made up": _made_up(count)} if data_dir is None else _of_files(data_dir, count)
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=2048, n_embd=128, n_layer=4, n_head=4, n_positions=WINDOW)).eval()
    infinity = InfMoEForCausalLM(
        InfMoEConfig(
            vocab_size=2048,
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=1024,
            z_dim=64,
            max_position_embeddings=WINDOW,
        )
    ).eval()
    with tiny_run("dense") as (config, _):
        assert config.data.dir is not None
        tokenizer = load_tokenizer(config.data.dir)
    dense = InfMoEForCausalLM.from_gpt2(gpt2).eval()
    for model in (gpt2, dense, infinity):
        model.config.eos_token_id = 0
    rows: Rows = []
    summary: dict[str, Any] = {"items_per_task": count, "window": WINDOW, "rounds": rounds, "limit": 1.5}
    for kind, own, other in (("dense", dense, gpt2), ("infinity", infinity, infinity)):
        ours = InfMoELM(_Opened(own, tokenizer), batch_size=16)
        theirs: Any = HFLM(pretrained=other, tokenizer=tokenizer, max_length=WINDOW, batch_size=16 * CHOICES)
        for task, items in tasks.items():
            requests = [
                Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0, metadata=(task, number, 1))
                for number, pairs in enumerate(items)
                for pair in pairs
            ]
            found: dict[str, list[float]] = {}

            def arm(name: str, lm: Any, requests: Any = requests, found: Any = found) -> Any:
                def run() -> None:
                    found[name] = [value for value, _ in lm.loglikelihood(requests, disable_tqdm=True)]

                return run

            arms = {"ours": ours, "lm-eval's hf": theirs}
            seconds = interleave([arm(name, lm) for name, lm in arms.items()], rounds=rounds, warmup=1)
            for name, of_arm in zip(arms, seconds, strict=True):
                rows.append(
                    {"task": task, "model": kind, "arm": name, "unit": "items/s"}
                    | spread([len(items) / s for s in of_arm])
                )
            ratio = spread([b / a for a, b in zip(*seconds, strict=True)])
            rows.append({"task": task, "model": kind, "arm": "ours over lm-eval's", "unit": "x"} | ratio)
            summary[f"{kind}, {task}"] = ratio["median"]
            if kind == "dense":  # sampled scores hang on the item's noise stream, which `hf` does not know
                worst = max(abs(a - b) for a, b in zip(*found.values(), strict=True))
                summary["difference_max"] = max(worst, summary.get("difference_max", 0.0))
    ratios = {task: min(summary[f"{kind}, {task}"] for kind in ("dense", "infinity")) for task in tasks}
    summary["speed_ratio"] = min(ratio for task, ratio in ratios.items() if task != SAT.name)  # no task of the paper's
    summary["speed_ratio_all"] = min(ratios.values())
    return rows, summary


class _Opened(Opened):
    """A model with a tokenizer that is not on disk."""

    def __init__(self, model: Any, tokenizer: Any):
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "checkpoint", None)
        object.__setattr__(self, "_tokenizer", tokenizer)

    def tokenizer(self) -> Any:
        """The one that was given."""
        return self._tokenizer  # type: ignore[attr-defined]


def _of_files(folder: Path, count: int) -> dict[str, list[Pairs]]:
    """Items of every task that has a file: the same ones that `--limit` takes."""
    from infmoe.eval.zero_shot.files import read_tasks
    from infmoe.eval.zero_shot.harness import choose

    found: dict[str, list[Pairs]] = {}
    for task in read_tasks(folder):
        docs = [task.docs[i] for i in choose(task.docs, count)]
        found[task.column.name] = [
            [(context, continuation) for context in doc["contexts"] for continuation in doc["continuations"]]
            for doc in docs
        ]
    return found


def _made_up(count: int) -> list[Pairs]:
    draw = random.Random(0)
    words = ["def", "return", "self", "value", "import", "class", "for", "in", "name", "the", "file", "of", "is"]

    def text(low: int, high: int) -> str:
        return " ".join(draw.choice(words) for _ in range(draw.randint(low, high)))

    made = []
    for _ in range(count):
        question = f"Question: {text(12, 40)}\nAnswer:"
        made.append([(question, " " + text(1, 8)) for _ in range(CHOICES)])
    return made
