"""Multiple-choice items per second: our scorer against lm-eval's own `hf` model, weights and batch size the same."""

import random
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from infmoe.bench.common import Measured, Rows, paired_ratio, spread, tiny_run
from infmoe.data import load_tokenizer
from infmoe.errors import InfMoEError
from infmoe.eval.latency import interleave
from infmoe.eval.loading import Opened
from infmoe.hf import InfMoEForCausalLM

CHOICES = 4


def zero_shot_speed(*, quick: bool = False) -> Measured:
    """A dense model of the tiny shape over items of ARC's form: one question, four answers."""
    try:
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM

        from infmoe.eval.zero_shot.harness import InfMoELM
    except ImportError as error:
        raise InfMoEError("this measurement needs lm-eval: pip install 'infmoe[eval]'") from error

    rounds, count = (3, 64) if quick else (7, 256)
    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=2048, n_embd=128, n_layer=4, n_head=4, n_positions=128)
    gpt2 = GPT2LMHeadModel(shape).eval()
    with tiny_run("dense") as (config, _):
        assert config.data.dir is not None
        tokenizer = load_tokenizer(config.data.dir)
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0, metadata=("speed", number, 1))
        for number, pairs in enumerate(_items(count))
        for pair in pairs
    ]
    model = InfMoEForCausalLM.from_gpt2(gpt2).eval()
    model.config.eos_token_id = gpt2.config.eos_token_id = 0
    ours = InfMoELM(_Opened(model, tokenizer), batch_size=16)
    theirs: Any = HFLM(pretrained=gpt2, tokenizer=tokenizer, max_length=128, batch_size=16 * CHOICES)
    found: dict[str, list] = {}

    def arm(name: str, lm: Any) -> Any:
        def run() -> None:
            found[name] = [value for value, _ in lm.loglikelihood(requests, disable_tqdm=True)]

        return run

    seconds = interleave([arm("ours", ours), arm("hf", theirs)], rounds=rounds, warmup=1)
    worst = max(abs(a - b) for a, b in zip(found["ours"], found["hf"], strict=True))
    rows: Rows = [
        {"arm": name, "unit": "items/s", **spread([count / s for s in arm_seconds])}
        for name, arm_seconds in zip(("ours", "lm-eval's hf"), seconds, strict=True)
    ]
    ratio = paired_ratio(seconds[1], seconds[0])
    return rows, {
        "speed_ratio": ratio["ratio_median"],
        **ratio,
        "difference_max": worst,
        "limit": 1.5,
        "rounds": rounds,
    }


class _Opened(Opened):
    """A model with a tokenizer that is not on disk."""

    def __init__(self, model: Any, tokenizer: Any):
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "checkpoint", None)
        object.__setattr__(self, "_tokenizer", tokenizer)

    def tokenizer(self) -> Any:
        """The one that was given."""
        return self._tokenizer  # type: ignore[attr-defined]


def _items(count: int) -> list[list[tuple[str, str]]]:
    draw = random.Random(0)
    words = ["def", "return", "self", "value", "import", "class", "for", "in", "name", "the", "file", "of", "is"]

    def text(low: int, high: int) -> str:
        return " ".join(draw.choice(words) for _ in range(draw.randint(low, high)))

    made = []
    for _ in range(count):
        question = f"Question: {text(12, 40)}\nAnswer:"
        made.append([(question, " " + text(1, 8)) for _ in range(CHOICES)])
    return made
