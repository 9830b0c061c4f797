"""Shared by the tests of zero-shot scoring: a plain scorer, small models, task files."""

import dataclasses
import json
import os
import random
from pathlib import Path

import torch
from tiny_run import MODEL_SETTINGS

from infmoe.eval.loading import Opened, open_model
from infmoe.eval.zero_shot.scoring import Request
from infmoe.hf import InfMoEConfig, InfMoEForCausalLM
from infmoe.layers import NoiseKey, Routing

# The real files, where they lie beside the project or where the environment says.
BENCH = Path(os.environ.get("INFMOE_BENCH_DATA", Path(__file__).parents[2] / "shared" / "data" / "bench"))


def plain_score(model, context, continuation, stream, seed=0, routing=None):
    """One continuation alone: the whole text in one row, no batch, no sharing; float64 from the logits on."""
    window = model.config.max_position_embeddings
    if len(continuation) > window:  # in pieces of half a window
        half, total = window // 2, 0.0
        for start in range(0, len(continuation), half):
            before = [*context, *continuation[:start]]
            total += plain_score(model, before, continuation[start : start + half], stream, seed, routing)
        return total
    tokens = (list(context) + list(continuation))[-(window + 1) :]
    key = NoiseKey(seed=seed, stream=torch.tensor([stream]))
    with torch.no_grad():
        given = dataclasses.replace(routing or Routing(), key=key)
        logits = model(input_ids=torch.tensor([tokens[:-1]]), routing=given).logits[0].double()
    likelihoods = logits.log_softmax(-1)[-len(continuation) :]
    return float(sum(row[token] for row, token in zip(likelihoods, continuation, strict=True)))


def model_of(ffn, seed=0, **options):
    torch.manual_seed(seed)
    settings = {s.partition("=")[0].removeprefix("model."): json.loads(s.partition("=")[2]) for s in MODEL_SETTINGS}
    extra = {"z_dim": 8} if ffn == "infinity" else {}
    return InfMoEForCausalLM(InfMoEConfig(**{**settings, "ffn": ffn, **extra, **options})).eval()


def requests(count=60, seed=0):
    """Several continuations a context; contexts longer than the window, one-token continuations among them."""
    draw = random.Random(seed)
    made = []
    for item in range(count):
        context = tuple(draw.randrange(320) for _ in range(draw.choice((1, 3, 12, 31, 32, 50))))
        for _ in range(draw.randrange(1, 5)):
            length = draw.choice((1, 1, 2, 5, 9, 32, 33, 70))
            made.append(Request(context, tuple(draw.randrange(320) for _ in range(length)), item))
    return made


def write_files(folder):
    """A few items of every local task, in their files' layouts."""
    folder.mkdir()
    words = ["ab", "cde", "fgh", "ha", "bead", "cab", "gef", "dah"]
    draw = random.Random(0)

    def text(count):
        return " ".join(draw.choice(words) for _ in range(count))

    def jsonl(name, docs):
        (folder / name).write_text("".join(json.dumps(doc) + "\n" for doc in docs))

    for name, stem in (("arc_easy", "Question: "), ("arc_challenge", "Question: "), ("openbook_qa", "")):
        docs = [
            {"query": stem + text(6) + f" {i}", "choices": [text(1 + j) for j in range(4)], "gold": i % 4}
            for i in range(9)
        ]
        jsonl(f"{name}.jsonl", docs)
    boolq = [
        {"query": f"Passage: {text(40)}\nQuestion: is {text(2)} {i}", "choices": ["no", "yes"], "gold": i % 2}
        for i in range(9)
    ]
    jsonl("boolq.jsonl", boolq)
    sat = [{"query": text(50) + "\nAnswer:", "choices": list("ABCD"), "gold": i % 4} for i in range(9)]
    jsonl("agi_eval_sat_en.jsonl", sat)
    winogrande = [
        {"context_options": [f"{i} {text(5)} ab", f"{i} {text(5)} cab"], "continuation": text(3), "gold": i % 2}
        for i in range(9)
    ]
    jsonl("winogrande.jsonl", winogrande)
    lines = [line for i in range(9) for line in (f"{text(8)} {i}", str(i % 4), *(text(3 + j) for j in range(4)))]
    (folder / "hellaswag_val.txt").write_text("\n".join(lines) + "\n")
    return folder


def opened_with(model, tiny_run):
    """A model with the tiny run's tokenizer."""
    opened = open_model(tiny_run.run)
    model.config.eos_token_id = opened.model.config.eos_token_id
    return Opened(model, opened.checkpoint)


def raw_items(task, path):
    """A file's items without the package's reader: (context, continuation) of each answer, and the label."""
    text = path.read_text(encoding="utf-8")
    if task == "hellaswag":
        lines = text.rstrip("\n").split("\n")
        made = []
        for start in range(0, len(lines), 6):
            context, label, *endings = lines[start : start + 6]
            made.append(([(context, " " + ending) for ending in endings], int(label)))
        return made
    docs = [json.loads(line) for line in text.split("\n") if line]
    if task == "winogrande":
        return [([(c, " " + doc["continuation"]) for c in doc["context_options"]], doc["gold"]) for doc in docs]
    made = []
    for doc in docs:
        context = doc["query"]
        if task == "boolq":  # "passage, newline, Question: ...?, newline, Answer:" is lm-eval's prompt
            passage, _, question = context.rpartition("\nQuestion: ")
            context = f"{passage[len('Passage: ') :].rstrip()}\nQuestion: {question.strip().rstrip('?')}?\nAnswer:"
        elif task in ("arc_easy", "arc_challenge"):
            context += "\nAnswer:"
        answers = []
        for choice in doc["choices"]:
            if choice not in answers:
                answers.append(choice)
        made.append(([(context, " " + answer) for answer in answers], answers.index(doc["choices"][doc["gold"]])))
    return made


def plain_text_score(model, tokenizer, context, continuation, stream):
    """As lm-eval splits texts into tokens, and then plainly."""
    start = len(tokenizer.encode(context, add_special_tokens=False))
    whole = tokenizer.encode(context + continuation, add_special_tokens=False)
    return plain_score(model, whole[:start], whole[start:], stream)
