"""Zero-shot accuracy and margins of the finished runs, for the tables and figures that show them."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any

from infmoe import paper
from infmoe.eval.dials import grid
from infmoe.eval.zero_shot.tasks import ALL, SAT
from infmoe.hf import InfMoEConfig
from infmoe.layers.point import Point, ratio_text
from infmoe.reproduce.measures import ZERO_SHOT
from infmoe.reproduce.page.figures import Gallery
from infmoe.reproduce.page.section import (
    FAILS,
    MISSING,
    ONE_SEED,
    OPEN,
    UNDECIDED,
    Claim,
    command,
    markdown_table,
    minus,
    text_of,
    verdict_below,
)
from infmoe.reproduce.places import TASK_KEEP_RATIOS, TASK_SAMPLES
from infmoe.reproduce.plan import Scale, groups, tokens_text
from infmoe.reproduce.statistics import Interval, interval, paired
from infmoe.reproduce.store import Finished, Store

# the paper's tasks that have local files, and what stands where RACE can't: never under its name
SHARED = tuple(name for name in paper.TABLE1_TASKS if name in {c.name for c in ALL.values() if c.file})
TASKS = (*SHARED, SAT.name)
_CHANCE = {column.name: column.chance for column in ALL.values()}
_DIALS = ("num_samples", "keep_ratio", "num_experts_per_tok", "mode")
_UNIT = {"acc": 100.0, "margin": 1.0}
_GUESSING = 2.0  # standard errors over items, within which an accuracy can't be told from guessing
_DIGITS = {"acc": 1, "margin": 3}

Scores = dict[int, dict[str, float]]  # seed -> task -> accuracy in percent, or margin in nats


def chance(task: str) -> float:
    """What guessing gives, in percent."""
    return 100 * _CHANCE[task]


def own_point(run: Finished) -> Point:
    """The dials that a run's model was trained with."""
    return _own_point(json.dumps(run.values["config"]["model"]))


@cache
def _own_point(model: str) -> Point:
    return grid(InfMoEConfig(**json.loads(model)))[0]


def scores(store: Store, arm: str, tokens: int, value: str, point: Point | None = None) -> Scores:
    """What an arm's runs scored.

    Args:
        store: the results.
        arm: its name.
        tokens: of its runs.
        value: "acc", then in percent; "margin"; or "strength", the margin over the spread of its items.
        point: of the dials; None: as trained.
    """
    found: Scores = {}
    for run in store.runs(arm, tokens):
        rows = run.measure(ZERO_SHOT)
        if rows is not None:
            dials = asdict(point or own_point(run))
            at = {row["task"]: row for row in rows if all(row.get(dial) == dials[dial] for dial in _DIALS)}
            if all(task in at for task in TASKS):
                found[run.spec.seed] = {task: _value(at[task], value) for task in TASKS}
    return found


def _value(row: Mapping[str, Any], value: str) -> float:
    if value == "strength":  # margins of sentences are hundreds of times those of single words
        spread = row["margin_se"] * math.sqrt(row["items"])
        return row["margin"] / spread if spread else 0.0
    return _UNIT[value] * row[value]


def near_guessing(store: Store) -> str:
    """How many of all scored accuracies can't be told from guessing, in words; says what is expected where none is."""
    found = [
        abs(row["acc"] - _CHANCE[row["task"]]) <= _GUESSING * row["acc_se"]
        for arm, tokens in {(arm, group.tokens) for group in groups("all", store.scale) for arm in group.trained}
        for run in store.runs(arm, tokens)
        for row in run.measure(ZERO_SHOT) or ()
        if all(row.get(dial) == value for dial, value in asdict(own_point(run)).items() if dial in _DIALS)
    ]
    if not found:
        return "models of this size are expected to score at chance; held-out loss stands in"
    return (
        f"{sum(found)} of the {len(found)} accuracies scored at this scale lie within {_GUESSING:g} standard errors of "
        "guessing; held-out loss stands in"
    )


def means(found: Scores, tasks: Sequence[str] = TASKS) -> dict[int, float]:
    """Each seed's mean over tasks."""
    return {seed: statistics.fmean(values[task] for task in tasks) for seed, values in found.items()}


def over_seeds(values: Mapping[int, float]) -> Interval | None:
    """The interval over seeds, if there are any."""
    return interval(list(values.values())) if values else None


def mean_difference(
    store: Store, arm: str, other: str, tokens: int, value: str = "acc", tasks: Sequence[str] | None = None
) -> Interval | None:
    """An arm's mean over tasks minus another's, paired by seed; accuracy over the tasks that the paper has too."""
    tasks = tasks or (SHARED if value == "acc" else TASKS)
    return paired(*(means(scores(store, name, tokens, value), tasks) for name in (arm, other)))


def points_text(difference: Interval | None) -> str:
    """A difference of mean accuracies, as a claim shows it."""
    return "–" if difference is None else f"mean of six tasks: {text_of(difference, 1, sign=True)} points"


def accuracy_claim(store: Store, text: str, measured: str, differences: Sequence[Interval | None]) -> Claim:
    """A claim on accuracy: judged by the intervals, but at the tiny scale, whose models hardly know the tasks.

    Args:
        store: the results.
        text: the paper's.
        measured: ours.
        differences: ∞-MoE's accuracy minus each rival's.
    """
    if store.scale.name == "tiny":
        return Claim(text, measured, OPEN, near_guessing(store))
    verdicts = {MISSING if gap is None else verdict_below(minus(gap)) for gap in differences}
    decided = next((verdict for verdict in (MISSING, FAILS, ONE_SEED) if verdict in verdicts), None)
    return Claim(text, measured, decided or (verdicts.pop() if len(verdicts) == 1 else UNDECIDED))


def not_scored(store: Store, name: str, what: str) -> str:
    """Says that scores are missing, and what makes them.

    Args:
        store: the results.
        name: of the table or figure.
        what: is missing.
    """
    return f"{what}: {MISSING} (`{command(name, store.scale)} --tasks-dir DIR` scores the models)."


def accuracy_table(
    store: Store, name: str, arms: Sequence[str], tokens: int, printed: Mapping[str, Sequence[float]]
) -> str:
    """Accuracies beside the paper's, and margins; says so where nothing is measured.

    Args:
        store: the results.
        name: of the table, for the command that makes it.
        arms: its rows.
        tokens: of the runs.
        printed: what the paper has at this size, in percent: arm -> the tasks of its Table 1; empty: nothing.
    """
    accuracy = {arm: scores(store, arm, tokens, "acc") for arm in arms}
    if not any(accuracy.values()):
        return not_scored(store, name, "Zero-shot accuracy and margins")
    size = paper.SIZES[store.scale.name]
    rows = []
    for arm in arms:
        if arm in printed:
            theirs = dict(zip(paper.TABLE1_TASKS, printed[arm], strict=True))
            mean = statistics.fmean(theirs[task] for task in SHARED)
            rows.append([f"{arm}, paper, {size}", *(f"{v:.1f}" for v in theirs.values()), "–", f"{mean:.1f}", ""])
        ours = {task: over_seeds({seed: v[task] for seed, v in accuracy[arm].items()}) for task in TASKS}
        cells = [text_of(ours.get(task), 1) for task in (*paper.TABLE1_TASKS, SAT.name)]
        difference = mean_difference(store, "infinity", arm, tokens) if arm != "infinity" else None
        rows.append(
            [
                *(f"{arm}, ours", *cells, text_of(over_seeds(means(accuracy[arm], SHARED)), 1)),
                "" if arm == "infinity" else text_of(difference, 1, sign=True),
            ]
        )
    guessing = [f"{chance(task):.0f}" for task in (*paper.TABLE1_TASKS, SAT.name)]
    rows.append(["chance", *guessing, f"{statistics.fmean(chance(task) for task in SHARED):.1f}", ""])
    head = ("zero-shot accuracy, %", *paper.TABLE1_TASKS, SAT.name, "mean of the first six", "∞-MoE minus it")
    parts = [
        markdown_table(head, rows),
        _margin_table(store, arms, tokens),
        f"{items_text(store.scale)}, seed 0 of the noise, each model at its own dials. The margin is the right "
        "answer's log-likelihood minus the mean of the others', over each right answer alike where all items have the "
        "same answers (BoolQ, SAT-en); the mean over tasks takes each in standard deviations of its items. “±” "
        "is over training seeds; the "
        f"items add a standard error of {_item_error(store, arms, tokens):.1f} points to each accuracy. {SAT.name} is "
        "no task of the paper's; RACE has no local file.",
    ]
    return "\n\n".join(parts)


def _margin_table(store: Store, arms: Sequence[str], tokens: int) -> str:
    rows = []
    for arm in arms:
        margin = scores(store, arm, tokens, "margin")
        cells = [text_of(over_seeds({seed: v[task] for seed, v in margin.items()})) for task in TASKS]
        strength = scores(store, arm, tokens, "strength")
        difference = mean_difference(store, "infinity", arm, tokens, "strength")
        rows.append(
            [
                *(arm, *cells, text_of(over_seeds(means(strength)))),
                "" if arm == "infinity" else text_of(difference, sign=True),
            ]
        )
    head = ("margin of the right answer, nats", *TASKS, "mean, in items' deviations", "∞-MoE minus it")
    return markdown_table(head, rows)


def items_text(scale: Scale) -> str:
    """Which items the scores are of."""
    return (
        "All items of each task"
        if scale.task_items is None
        else f"{scale.task_items} items of each task, chosen by a hash"
    )


def _item_error(store: Store, arms: Sequence[str], tokens: int) -> float:
    """The mean standard error of an accuracy over items, in points."""
    rows = [row for arm in arms for run in store.runs(arm, tokens) for row in run.measure(ZERO_SHOT) or ()]
    return 100 * statistics.fmean(row["acc_se"] for row in rows)


def dial_scores(store: Store, gallery: Gallery) -> tuple[str, list[tuple[str, Any]]]:
    """Every task over K and keep ratio, and a picture of the means; the text says so where nothing is measured."""
    tokens = store.scale.tokens
    keep, trained_k = 0.25, 2
    points: dict[str, dict[str, Point]] = {
        "infinity": {
            **{f"K = {k}": Point(k, keep) for k in TASK_SAMPLES},
            "z = μ": Point(None, keep, mode="mu"),
            **{f"keep {ratio_text(r)}": Point(trained_k, r) for r in TASK_KEEP_RATIOS if r != keep},
        },
        "moe": {f"k = {k}": Point(num_experts_per_tok=k) for k in range(1, 5)},
    }
    found = {
        arm: {value: {name: scores(store, arm, tokens, value, at) for name, at in named.items()} for value in _UNIT}
        for arm, named in points.items()
    }
    if not any(scored for by_value in found.values() for named in by_value.values() for scored in named.values()):
        return f"Zero-shot tasks over the dials: {MISSING}.", []
    parts = []
    for arm, by_value in found.items():
        rows = []
        for value, named in by_value.items():
            unit = "accuracy, %" if value == "acc" else "margin, nats"
            for task in TASKS:
                cells = [over_seeds({seed: v[task] for seed, v in scored.items()}) for scored in named.values()]
                rows.append([f"{task}: {unit}", *(text_of(cell, _DIGITS[value]) for cell in cells)])
            cells = [over_seeds(means(scored)) for scored in named.values()]
            rows.append([f"mean: {unit}", *(text_of(cell, _DIGITS[value]) for cell in cells)])
        name = "∞-MoE" if arm == "infinity" else "MoE"
        parts.append(markdown_table((f"{name}, zero-shot", *points[arm]), rows))
    parts.append(
        f"{items_text(store.scale)}; the other dial as trained (K = {trained_k}, keep {ratio_text(keep)}). "
        "“±” is over training seeds. The picture shows the means over the seven tasks."
    )
    title = f"Zero-shot tasks over the dials at {tokens_text(tokens)} tokens (95 % over seeds)"
    picture = gallery.lines(
        "figure2_zero_shot.png",
        _panels(found, keep),
        x_label=["samples or experts per token, K", "keep ratio (K = 2)"] * 2,
        y_label=["mean accuracy (%)"] * 2 + ["mean margin (nats)"] * 2,
        title=title,
        rows=2,
        levels=[statistics.fmean(chance(task) for task in TASKS)] * 2 + [None] * 2,
    )
    return "\n\n".join(parts), [(title, picture)]


def _panels(
    found: Mapping[str, Mapping[str, Mapping[str, Scores]]], keep: float
) -> list[tuple[str, dict[str, dict[float, Interval]]]]:
    """Means over tasks: accuracy over K and over keep ratios, then the margin."""
    panels = []
    for value in _UNIT:
        infinity, moe = ({n: over_seeds(means(s)) for n, s in found[arm][value].items()} for arm in ("infinity", "moe"))
        over_k = {
            "∞-MoE, sampled": {float(k): infinity[f"K = {k}"] for k in TASK_SAMPLES},
            "∞-MoE, z = μ": {float(k): infinity["z = μ"] for k in (TASK_SAMPLES[0], TASK_SAMPLES[-1])},
            "MoE": {float(k): moe[f"k = {k}"] for k in range(1, 5)},
        }
        at = {r: "K = 2" if r == keep else f"keep {ratio_text(r)}" for r in TASK_KEEP_RATIOS}
        over_keep = {"∞-MoE, sampled": {r: infinity[name] for r, name in at.items()}}
        for lines in (over_k, over_keep):
            known = {n: {x: v for x, v in line.items() if v is not None} for n, line in lines.items()}
            panels.append(("", {name: line for name, line in known.items() if line}))
    return panels


def few_samples(store: Store) -> Interval | None:
    """Mean accuracy of ∞-MoE with one sample minus MoE's with one expert, paired by seed."""
    tokens = store.scale.tokens
    one, other = Point(1, 0.25), Point(num_experts_per_tok=1)
    ours, theirs = scores(store, "infinity", tokens, "acc", one), scores(store, "moe", tokens, "acc", other)
    return paired(means(ours, SHARED), means(theirs, SHARED))
