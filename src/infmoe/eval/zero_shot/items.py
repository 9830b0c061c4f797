"""One point's items of one task: log-likelihoods from lm-eval's samples, and the figures that follow from them."""

import hashlib
import json
import math
import statistics
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from infmoe.errors import InfMoEError
from infmoe.eval.zero_shot.harness import InfMoELM, LoadedTask, run_task
from infmoe.eval.zero_shot.scoring import common_start
from infmoe.eval.zero_shot.tasks import Column, Z


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
    return Scored(items, float(version), len(model.cut_streams), _notes(samples, items))


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
    if len(start) == len(words[0]):
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


def summary(column: Column, by_seed: Sequence[Scored], base: Scored, source: str, seconds: float) -> dict[str, Any]:
    """The figures of a task at one point.

    Standard errors take items of one passage as one draw. Where all items have the same answers, the margin is the
    mean over the right answers of their items' means: a blind preference for one answer cancels out.

    Args:
        column: what the task is.
        by_seed: its items, once for each seed; the figures are the first one's, the spread is over all.
        base: the point that this one is compared with, item by item; or this one's own.
        source: where the items come from.
        seconds: that scoring took.
    """
    scored = by_seed[0]
    items = scored.items
    passages = [item.passage for item in items]
    classes = [item.gold for item in items] if column.fixed_answers else None
    # an answer that is never right: a blind preference for another would not cancel out
    balanced = classes is None or set(classes) == set(range(len(items[0].log_likelihoods)))

    def margin_of(values: Sequence[float]) -> tuple[float | None, float | None]:
        return mean_and_error(values, passages, classes) if balanced else (None, None)

    acc, acc_se = mean_and_error([float(item.right) for item in items], passages)
    margin, margin_se = margin_of([item.margin for item in items])
    accuracies = [statistics.fmean(float(item.right) for item in one.items) for one in by_seed]
    found = [margin_of([item.margin for item in one.items])[0] for one in by_seed]
    margins = [value for value in found if value is not None]
    figures: dict[str, Any] = {
        "task": column.task,
        "version": scored.version,
        "metric": column.metric,
        "source": source,
        "chance": column.chance,
        "items": len(items),
        "items_cut": scored.cut,
        "passages": len(set(passages)),
        "acc": acc,
        "acc_se": acc_se,
        **dict.fromkeys(("acc_norm", "acc_norm_se", "margin_norm", "margin_norm_se")),
        "margin": margin,
        "margin_se": margin_se,
        "acc_by_seed": accuracies,
        "acc_seed_sd": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "margin_by_seed": margins,
        "margin_seed_sd": statistics.stdev(margins) if len(margins) > 1 else None,
        "items_per_sec": len(items) * len(by_seed) / seconds,
    }
    if column.per_char:
        norm = mean_and_error([float(item.right_norm) for item in items], passages)
        figures["acc_norm"], figures["acc_norm_se"] = norm
        figures["margin_norm"], figures["margin_norm_se"] = mean_and_error(
            [item.margin_norm for item in items], passages
        )
    if scored is not base:  # item by item against the first point
        pairs = list(zip(items, base.items, strict=True))
        hits = [float(i.right) - float(b.right) for i, b in pairs]
        mean, error = mean_and_error(hits, passages)
        p = _sign_test(hits, passages)
        figures |= {"acc_change": mean, "acc_change_se": error, "acc_change_p": p, "acc_within_noise": p > 0.05}
        change, error = margin_of([i.margin - b.margin for i, b in pairs])
        within = None if change is None or error is None else abs(change) <= Z * error
        figures |= {"margin_change": change, "margin_change_se": error, "margin_within_noise": within}
    return figures


def mean_and_error(
    values: Sequence[float], passages: Sequence[Hashable], classes: Sequence[Hashable] | None = None
) -> tuple[float, float | None]:
    """The mean over items, and its standard error where items of one passage may go together.

    Args:
        values: of each item.
        passages: what each belongs to; all different: the usual standard error.
        classes: where given, the mean is over classes of the means over their items.

    Returns:
        The error is None where a class has one passage alone.
    """
    kinds = classes if classes is not None else [None] * len(values)
    members: dict[Hashable, list[float]] = {}
    groups: dict[Hashable, set[Hashable]] = {}
    for value, kind, passage in zip(values, kinds, passages, strict=True):
        members.setdefault(kind, []).append(value)
        groups.setdefault(kind, set()).add(passage)
    means = {kind: statistics.fmean(found) for kind, found in members.items()}
    mean = statistics.fmean(means.values())
    if min(map(len, groups.values())) < 2:
        return mean, None
    # each class's deviations are from its own mean, which takes a degree of freedom of its passages
    size = {kind: math.sqrt(len(own) / (len(own) - 1)) for kind, own in groups.items()}
    sums: dict[Hashable, float] = {}
    for value, kind, passage in zip(values, kinds, passages, strict=True):
        share = size[kind] * (value - means[kind]) / (len(means) * len(members[kind]))
        sums[passage] = sums.get(passage, 0.0) + share
    return mean, math.sqrt(math.fsum(total**2 for total in sums.values()))


def _sign_test(changes: Sequence[float], passages: Sequence[Hashable]) -> float:
    """Two-sided p of so many passages' items that became right and wrong, were both as likely.

    McNemar's exact test where each item has a passage of its own.
    """
    net: dict[Hashable, float] = {}
    for change, passage in zip(changes, passages, strict=True):
        net[passage] = net.get(passage, 0.0) + change
    better, worse = sum(n > 0 for n in net.values()), sum(n < 0 for n in net.values())
    count = better + worse
    tail = sum(math.comb(count, i) for i in range(max(better, worse), count + 1))
    return min(1.0, 2 * tail / 2**count)
