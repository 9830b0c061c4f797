"""One point's items of one task: log-likelihoods from lm-eval's samples, and the figures that follow from them."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from infmoe.errors import InfMoEError
from infmoe.eval.zero_shot.harness import InfMoELM, run_task
from infmoe.eval.zero_shot.tasks import Column

Z = 1.96  # of a 95 % interval over hundreds of items


@dataclass(frozen=True)
class Item:
    """One scored item: its number in the task, each answer's log-likelihood and characters, which one is right."""

    number: int
    log_likelihoods: tuple[float, ...]
    num_chars: tuple[int, ...]
    gold: int

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


def score_items(model: InfMoELM, column: Column, task: Any, limit: int | None) -> list[Item]:
    """Every item of a task at the model's point and seed, in the task's order.

    Args:
        model: with its dials and seed set.
        column: what the task is.
        task: lm-eval's name, or a task of ours (see `local_config`).
        limit: the first so many items; None: all.
    """
    model.cut_streams.clear()
    (samples,) = run_task(model, task, limit)["samples"].values()
    return [_item(sample, column) for sample in sorted(samples, key=lambda sample: sample["doc_id"])]


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
    texts = [str(pair[1]).removeprefix(" ") for pair in _arguments(sample)]
    return Item(sample["doc_id"], values, tuple(len(text) for text in texts), gold)


def _arguments(sample: dict[str, Any]) -> list[Sequence[str]]:
    """(context, continuation) of each answer, in either of lm-eval's forms."""
    found = sample["arguments"]
    listed = list(found.values()) if isinstance(found, dict) else list(found)
    return [list(pair.values()) if isinstance(pair, dict) else pair for pair in listed]


def summary(
    column: Column, by_seed: list[list[Item]], base: list[Item], source: str, seconds: float, cut: int
) -> dict[str, Any]:
    """The figures of a task at one point.

    Args:
        column: what the task is.
        by_seed: its items, once for each seed; the figures are the first one's, the spread is over all.
        base: the items of the point that this one is compared with, item by item; or this one's own.
        source: where the items come from.
        seconds: that scoring took.
        cut: items that were longer than the model's window, and so lost the beginning of their context.
    """
    items = by_seed[0]
    right = [float(item.right) for item in items]
    norm = [float(item.right_norm) for item in items]
    margins = [item.margin for item in items]
    per_char = [item.margin_norm for item in items]
    accuracies = [statistics.fmean(float(item.right) for item in scored) for scored in by_seed]
    mean_margins = [statistics.fmean(item.margin for item in scored) for scored in by_seed]
    figures: dict[str, Any] = {
        "task": column.task,
        "version": column.version,
        "metric": column.metric,
        "source": source,
        "chance": column.chance,
        "items": len(items),
        "items_cut": cut,
        "acc": statistics.fmean(right),
        "acc_se": _se(right),
        "acc_norm": statistics.fmean(norm),
        "acc_norm_se": _se(norm),
        "margin": statistics.fmean(margins),
        "margin_se": _se(margins),
        "margin_norm": statistics.fmean(per_char),
        "margin_norm_se": _se(per_char),
        "acc_by_seed": accuracies,
        "acc_seed_sd": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "margin_by_seed": mean_margins,
        "margin_seed_sd": statistics.stdev(mean_margins) if len(mean_margins) > 1 else None,
        "items_per_sec": len(items) * len(by_seed) / seconds,
    }
    if items is not base:  # item by item against the first point
        for name in ("right", "margin"):
            change = [float(getattr(i, name)) - float(getattr(b, name)) for i, b in zip(items, base, strict=True)]
            mean, error = statistics.fmean(change), _se(change)
            key = {"right": "acc"}.get(name, name)
            if key == "acc":
                p = _sign_test(sum(c > 0 for c in change), sum(c < 0 for c in change))
                noise: dict[str, Any] = {"acc_change_p": p, "acc_within_noise": p > 0.05}
            else:
                noise = {f"{key}_within_noise": abs(mean) <= Z * error}
            figures |= {f"{key}_change": mean, f"{key}_change_se": error, **noise}
    return figures


def _sign_test(better: int, worse: int) -> float:
    """Two-sided p of so many items that became right and wrong, were both as likely (McNemar's exact test)."""
    count = better + worse
    tail = sum(math.comb(count, i) for i in range(max(better, worse), count + 1))
    return min(1.0, 2 * tail / 2**count)


def _se(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
