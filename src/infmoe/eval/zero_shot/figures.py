"""The figures that follow from a task's items: accuracy, margins, changes from point to point, and their errors."""

import math
import statistics
from collections.abc import Hashable, Sequence
from typing import Any

from infmoe.eval.zero_shot.items import Scored
from infmoe.eval.zero_shot.tasks import Column, Z


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
        figures |= {
            "acc_change": mean,
            "acc_change_se": error,
            "acc_change_p": p,
            "acc_within_noise": None if error is None else p > 0.05,
        }
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
