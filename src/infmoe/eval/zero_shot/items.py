"""One point's items of one task, read from lm-eval's samples."""

import hashlib
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from infmoe.errors import InfMoEError
from infmoe.eval.zero_shot.harness import InfMoELM, LoadedTask, item_stream, run_task
from infmoe.eval.zero_shot.scoring import common_start
from infmoe.eval.zero_shot.tasks import Column


@dataclass(frozen=True)
class Item:
    """One scored item.

    Attributes:
        number: in the task.
        log_likelihoods: of each answer.
        num_chars: of each answer.
        gold: which one is right.
        passage: names what it may share with others: a passage, a context, WinoGrande's twin sentence.
    """

    number: int
    log_likelihoods: tuple[float, ...]
    num_chars: tuple[int, ...]
    gold: int
    passage: str

    @property
    def right(self) -> bool:
        """Whether the right answer has the highest log-likelihood (the first of equals counts, as in lm-eval)."""
        return max(range(len(self.log_likelihoods)), key=lambda i: self.log_likelihoods[i]) == self.gold

    @property
    def margin(self) -> float:
        """Log-likelihood of the right answer minus the mean of the others', in nats."""
        return _margin(self.log_likelihoods, self.gold)

    @property
    def per_char(self) -> list[float]:
        """Log-likelihoods per character of the scored text, without the space before it (lm-eval's `acc_norm`)."""
        return [v / max(n, 1) for v, n in zip(self.log_likelihoods, self.num_chars, strict=True)]

    @property
    def right_norm(self) -> bool:
        """Whether the right answer has the highest log-likelihood per character."""
        return max(range(len(self.per_char)), key=lambda i: self.per_char[i]) == self.gold

    @property
    def margin_norm(self) -> float:
        """The margin of the log-likelihoods per character."""
        return _margin(self.per_char, self.gold)


def _margin(values: Sequence[float], gold: int) -> float:
    return values[gold] - statistics.fmean(v for i, v in enumerate(values) if i != gold)


@dataclass(frozen=True)
class Scored:
    """A task's items at one point and seed.

    Attributes:
        items: in the task's order.
        version: of the task, as lm-eval has it.
        cut: items that were longer than the model's window, and so lost the beginning of their context.
        notes: what stands out among the items, counted.
    """

    items: list[Item]
    version: float
    cut: int
    notes: dict[str, int]


def score_items(model: InfMoELM, column: Column, task: LoadedTask) -> Scored:
    """Every item of a task at the model's point and seed.

    Args:
        model: with its dials and seed set.
        column: what the task is.
        task: its items.
    """
    model.cut_streams.clear()
    result = run_task(model, task)
    (samples,), (version,) = result["samples"].values(), result["versions"].values()
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    items = [_item(sample, column) for sample in samples]
    cut = sum(item_stream(task.name, sample["doc"]) in model.cut_streams for sample in samples)
    return Scored(items, float(version), cut, _notes(samples, items))


def _item(sample: dict[str, Any], column: Column) -> Item:
    values = tuple(float(response[0]) for response in sample["filtered_resps"])
    doc, target = sample["doc"], sample["target"]
    if isinstance(doc.get("gold"), int):
        gold = doc["gold"]
    elif column.task == "winogrande":  # lm-eval's: the target is the text, the label stands in the document
        gold = int(doc["answer"]) - 1
    else:
        gold = int(target)
    if not 0 <= gold < len(values):
        raise InfMoEError(f"{column.name}, item {sample['doc_id']}: label {gold} is none of the {len(values)} answers")
    pairs = _arguments(sample)
    lengths = tuple(len(str(continuation).removeprefix(" ")) for _, continuation in pairs)
    shared = _shared([str(context) for context, _ in pairs], column.after_passage)
    passage = hashlib.blake2b(json.dumps(shared).encode(), digest_size=6).hexdigest()
    return Item(sample["doc_id"], values, lengths, gold, passage)


def _shared(contexts: Sequence[str], after_passage: str | None) -> list[str]:
    """What items that belong together have in common: a passage, or the context.

    Where the answers stand in the contexts (WinoGrande), the pair of answers and the sentence's first two words: its
    twins differ in a word that may stand before the answer or behind it.
    """
    passage, marker, _ = contexts[0].rpartition(after_passage or "\0")
    if marker:
        return [passage]
    words = [context.split() for context in contexts]
    start = common_start(words)
    if len(set(contexts)) == 1:
        return [contexts[0]]
    return [*start[:2], *sorted(" ".join(one[len(start) :]) for one in words)]


def _notes(samples: Sequence[dict[str, Any]], items: Sequence[Item]) -> dict[str, int]:
    """Repeated items and answers, counted: lm-eval's own tasks are scored as they are."""
    asked = [json.dumps([_arguments(s), item.gold]) for s, item in zip(samples, items, strict=True)]
    pairs = [[tuple(pair) for pair in _arguments(sample)] for sample in samples]
    counts = {
        "repeated items": len(asked) - len(set(asked)),
        "repeated answers, each scored": sum(len(set(answers)) < len(answers) for answers in pairs),
    }
    return {what: count for what, count in counts.items() if count}


def _arguments(sample: dict[str, Any]) -> list[Sequence[str]]:
    """(context, continuation) of each answer, in either of lm-eval's forms."""
    found = sample["arguments"]
    listed = list(found.values()) if isinstance(found, dict) else list(found)
    return [list(pair.values()) if isinstance(pair, dict) else pair for pair in listed]
