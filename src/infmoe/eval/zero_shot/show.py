"""What scoring found, for readers: a table beside the paper's rows, and a picture over the dials."""

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infmoe import paper
from infmoe.eval.zero_shot.tasks import ALL, Z
from infmoe.layers.point import ratio_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE = "zero_shot.png"
# dial -> its symbol, and what its axis says
_DIALS = {
    "num_samples": ("K", "samples per token, K"),
    "num_experts_per_tok": ("k", "experts per token, k"),
    "keep_ratio": ("keep ratio", "keep ratio: share of the neurons that a sample keeps"),
}
_LINES: dict[str, Any] = {"sample": "-", "mu": "--", "antithetic": "-.", "qmc": (0, (5, 1, 1, 1, 1, 1))}
_MODE_NAMES = {"mu": "dashed: z = μ", "antithetic": "dash-dotted: antithetic", "qmc": "dash-dot-dotted: qmc"}
_JUDGED = ("acc", "margin")  # what is compared from point to point
_GREY = "#777777"


def finished(result: dict[str, Any]) -> list[str]:
    """The tasks that were scored at every point."""
    first, *others = (row["tasks"] for row in result["points"])
    return [name for name in first if all(name in tasks for tasks in others)]


def table(result: dict[str, Any]) -> str:
    """Accuracy, and the margin below it, of every point; its spread over seeds; the paper's rows for comparison.

    A task that something stopped at a later point is shown where it was scored.
    """
    rows = result["points"]
    known: dict[str, dict[str, Any]] = {}
    for row in rows:
        for name, figures in row["tasks"].items():
            known.setdefault(name, figures)
    names = list(known)
    several = len(result["seeds"]) > 1
    widths = [max(18 if several else 16, len(name)) for name in names]
    first = max(23, *(len(row["label"]) + 1 for row in rows))  # a schedule's label is long
    lines = ["accuracy in %, ± standard error; below, the right answer's margin in nats, ± 95 %"]
    if several:
        lines.append(f"of seed {result['seeds'][0]}; below, the lowest and the highest of {len(result['seeds'])} seeds")
    lines.append(_line("", names, widths, "mean", first))

    def add(label: str, row: dict[str, Any], cell: Callable[[dict[str, Any]], str], last: str = "") -> None:
        cells = [cell(row["tasks"][name]) if name in row["tasks"] else "–" for name in names]
        if set(cells) != {"–"}:
            lines.append(_line(label, cells, widths, last, first))

    for row in rows:
        average = f"{100 * row['average']:.1f}" if "average" in row else "–"
        add(row["label"], row, lambda t: with_error(t, "acc", 100, ".1f"), average)
        add("  per character", row, lambda t: with_error(t, "acc_norm", 100, ".1f"))
        add("  margin", row, lambda t: with_error(t, "margin", 1, "+.3f", Z))
        if len(row.get("average_by_seed", ())) > 1:
            mean = _spread([100 * value for value in row["average_by_seed"]], ".1f")
            add("  over seeds, accuracy", row, lambda t: _spread([100 * v for v in t["acc_by_seed"]], ".1f"), mean)
            add(
                "  over seeds, margin",
                row,
                lambda t: _spread(t["margin_by_seed"], "+.3f") if t["margin_by_seed"] else "–",
            )
        if row is not rows[0]:
            add("  change (acc / margin)", row, _change)
    lines.append(_line("chance", [f"{100 * known[name]['chance']:.0f}" for name in names], widths, "", first))
    for arm in ("dense", "moe", "infinity"):
        printed = dict(zip(paper.TABLE1_TASKS, paper.TABLE1["small"][arm][1], strict=True))
        cells = [f"{printed[name]:.1f}" if name in printed else "–" for name in names]
        shared = [printed[name] for name in names if name in printed]
        mean = f"{statistics.fmean(shared):.1f}" if len(shared) == len(names) else "–"
        lines.append(_line(f"paper, small {arm}", cells, widths, mean, first))
    lines += [f"note: {note}" for note in _notes(result, known)]
    return "\n".join(lines)


def _notes(result: dict[str, Any], known: dict[str, dict[str, Any]]) -> list[str]:
    """What a reader of the figures must know."""
    rows = result["points"]
    notes = [f"{task}: {count} {what}" for task, found in result["notes"].items() for what, count in found.items()]
    cut = [f"{name} {t['items_cut']} of {t['items']}" for name, t in known.items() if t["items_cut"]]
    if cut:
        notes.append(
            f"longer than the window of {result['window']} tokens, so without their beginning: {', '.join(cut)}"
        )
    shared = [f"{name} {t['items']} on {t['passages']}" for name, t in known.items() if t["passages"] < t["items"]]
    if shared:
        notes.append(f"items that share a passage count as one draw in every error: {', '.join(shared)}")
    fixed = [name for name, t in known.items() if ALL[t["task"]].fixed_answers]
    if fixed:
        notes.append(f"margins of {', '.join(fixed)}: each right answer weighs the same, however often it is right")
    small = [name for name, t in known.items() if None in (t["acc_se"], t["margin"], t["margin_se"])]
    if small:
        notes.append(f"too few items for an error, or for a margin over every right answer: {', '.join(small)}")
    if result["limit"] is not None:
        notes.append(f"{result['limit']} items of each task at most, chosen by a hash of what they say")
    names = finished(result)
    judged = [row["tasks"][name][f"{value}_within_noise"] for row in rows[1:] for name in names for value in _JUDGED]
    if count := sum(one is not None for one in judged):
        notes.append(
            f"changes are against {rows[0]['label']}, each judged alone at 95 %: of {count}, about "
            f"{round(0.05 * count)} pass for more than noise by chance"
        )
    if result["unfinished"]:
        notes.append(f"not scored, or not at every point: {', '.join(result['unfinished'])}")
    return notes


def with_error(figures: dict[str, Any], value: str, unit: float, form: str, errors: float = 1.0) -> str:
    """A figure and so many of its standard errors; a dash for what is not known."""
    if figures[value] is None:
        return "–"
    error = figures[f"{value}_se"]
    size = "–" if error is None else f"{unit * errors * error:{form.lstrip('+')}}"
    return f"{unit * figures[value]:{form}} ± {size}"


def _change(figures: dict[str, Any]) -> str:
    parts = []
    for value, unit, form in (("acc", 100, "+.1f"), ("margin", 1, "+.3f")):
        noise = figures[f"{value}_within_noise"]
        parts.append("–" if noise is None else "noise" if noise else f"{unit * figures[f'{value}_change']:{form}}")
    return " / ".join(parts)


def _spread(values: Sequence[float], form: str) -> str:
    return f"{min(values):{form}} to {max(values):{form}}"


def _line(label: str, cells: Sequence[str], widths: Sequence[int], last: str, first: int) -> str:
    return f"{label:<{first}}" + "".join(f"{c:>{w + 2}}" for c, w in zip(cells, widths, strict=True)) + f"{last:>14}"


def plot(result: dict[str, Any], path: Path) -> Path:
    """Accuracy, margin and its change item by item, against each dial that was varied or against the tasks.

    A dial's panel shows the points at the model's own setting of the other dial, or at the first one given; z = mu,
    which has no K, is a dashed line. Bars are 95 % over items, a wide pale bar the spread over seeds.
    """
    from infmoe.eval.plots import figure, save

    names, rows = finished(result), result["points"]
    varied = [dial for dial in _DIALS if len({row[dial] for row in rows} - {None}) > 1]
    if any(isinstance(row[dial], tuple | list) for dial in varied for row in rows):
        varied = []  # no axis has a place for one value a layer
    values = ["acc", "margin", *(["margin_change"] if len(rows) > 1 else [])]
    fig, axes = figure(max(1, len(varied)), rows=len(values), width=5.6 if len(varied) > 1 else 8.4, height=3.4)
    columns = len(axes) // len(values)
    labels = {
        "acc": "accuracy (%)",
        "margin": "margin: log-likelihood of the right\nanswer minus the others' mean (nats)",
        "margin_change": f"change of the margin from\n{rows[0]['label']}, item by item (nats)",
    }
    for i, value in enumerate(values):
        for column in range(columns):
            ax = axes[i * columns + column]
            if varied:
                _over_dial(ax, result, names, varied[column], value)
            else:
                _over_tasks(ax, result, names, value)
        axes[i * columns].set_ylabel(labels[value])
    if len(rows) > 1:
        handles, texts = axes[0].get_legend_handles_labels()
        fig.legend(handles, texts, loc="outside right center", fontsize=8, frameon=False)
    counts = sorted({rows[0]["tasks"][name]["items"] for name in names})
    items = f"{counts[0]} items" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} items"
    spread = f"; pale: {len(result['seeds'])} seeds" if len(result["seeds"]) > 1 else ""
    which = f" at {rows[0]['label']}" if len(rows) == 1 and rows[0]["label"] != "-" else ""
    fig.suptitle(
        f"Zero-shot, {result['checkpoint'].partition('/')[0]}{which}: {items} a task\n"
        f"(bars: 95 % over items{spread}; dotted: chance, or no change)",
        fontsize=10,
    )
    return save(fig, path)


def _over_dial(ax: "Axes", result: dict[str, Any], names: Sequence[str], dial: str, value: str) -> None:
    """One line a task and mode, against a dial."""
    rows = result["points"]
    others = [name for name in _DIALS if name != dial]
    held = {name: _held(result, name) for name in others}
    ticks = sorted({row[dial] for row in rows} - {None})
    styles: dict[str, Any] = {}
    for mode in dict.fromkeys(row["mode"] or "sample" for row in rows):
        chosen = [row for row in rows if (row["mode"] or "sample") == mode]
        chosen = [row for row in chosen if all(row[name] in (None, held[name]) for name in others)]
        at = sorted((row for row in chosen if row[dial] is not None), key=lambda row: row[dial])
        styles[mode] = _LINES[mode]
        for i, name in enumerate(names):
            style = _style(i) | {"linestyle": styles[mode], "label": name if len(styles) == 1 else None}
            if at:
                step = (i - (len(names) - 1) / 2) * 0.035  # side by side, else the bars hide each other
                places = [row[dial] * 2**step for row in at]
                _draw(ax, places, [row["tasks"][name] for row in at], value, style)
            elif chosen:  # no such dial: the same at each of its values
                ax.axhline(_figures(chosen[0]["tasks"][name], value)[0], **style | {"marker": None})
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [ratio_text(tick) if dial == "keep_ratio" else f"{tick}" for tick in ticks])
    ax.minorticks_off()
    ax.set_xlabel(_DIALS[dial][1])
    fixed = [f"{_DIALS[name][0]} = {ratio_text(found)}" for name, found in held.items() if found is not None]
    shown = [_MODE_NAMES[mode] for mode in styles if mode != "sample"]
    ax.set_title(", ".join([*(["at " + ", ".join(fixed)] if fixed else []), *shown]), fontsize=9)
    for level in {100 * rows[0]["tasks"][name]["chance"] for name in names} if value == "acc" else {0.0}:
        ax.axhline(level, color=_GREY, linestyle=":", linewidth=1.5, zorder=0)
    _scale(ax, result, names, value)


def _draw(
    ax: "Axes", places: Sequence[float], found: Sequence[dict[str, Any]], value: str, style: dict[str, Any]
) -> None:
    """Means with their intervals, and behind them the spread over seeds where there are several."""
    means, errors = zip(*(_figures(figures, value) for figures in found), strict=True)
    ax.errorbar(places, means, errors, capsize=2, **style)
    factor = 100 if value == "acc" else 1
    for place, figures in zip(places, found, strict=True):
        by_seed = figures.get(f"{value}_by_seed") or ()
        if len(by_seed) > 1:
            ends = [factor * min(by_seed), factor * max(by_seed)]
            ax.vlines(place, *ends, color=style["color"], alpha=0.3, linewidth=9, zorder=0)


def _held(result: dict[str, Any], dial: str) -> Any:
    """Where a dial stands in the panels of the others: as the model has it, or at the first value given."""
    values = [row[dial] for row in result["points"] if row[dial] is not None]
    return result["own"][dial] if result["own"][dial] in values else values[0] if values else None


def _over_tasks(ax: "Axes", result: dict[str, Any], names: Sequence[str], value: str) -> None:
    """The tasks side by side, one marker a point."""
    rows = result["points"]
    for i, row in enumerate(rows):
        places = [at + (i - (len(rows) - 1) / 2) * 0.12 for at in range(len(names))]
        style = _style(i) | {"linestyle": "none", "label": row["label"]}
        _draw(ax, places, [row["tasks"][name] for name in names], value, style)
    for at, name in enumerate(names):
        level = 100 * rows[0]["tasks"][name]["chance"] if value == "acc" else 0.0
        ax.hlines(level, at - 0.35, at + 0.35, color=_GREY, linestyle=":", linewidth=1.5)
    ax.set_xticks(range(len(names)), names)
    ax.set_xlabel("task")
    _scale(ax, result, names, value)


def _scale(ax: "Axes", result: dict[str, Any], names: Sequence[str], value: str) -> None:
    """Margins of one-word answers are hundreds of times smaller than those of sentences.

    The axis is linear up to the smallest interval's half-width, so that what lies within it lies near 0.
    """
    if value == "acc":
        return
    found = [row["tasks"][name] for row in result["points"] for name in names]
    widths = [Z * t[f"{value}_se"] for t in found if t.get(f"{value}_se")]
    ax.set_yscale("symlog", linthresh=max(min(widths, default=0.1), 1e-4))


def _figures(figures: dict[str, Any], value: str) -> tuple[float, float]:
    """Mean and half of its 95 % interval, accuracy in percent; NaN, which is not drawn, for what is not known."""
    factor = 100 if value == "acc" else 1
    # the point that others are compared with has no change, and it has not changed
    found = [figures.get(name, 0.0) for name in (value, f"{value}_se")]
    mean, error = (math.nan if figure is None else figure for figure in found)
    return factor * mean, factor * Z * error


def _style(i: int) -> dict[str, Any]:
    from infmoe.eval.plots import look

    return look(i) | {"markersize": 5, "linewidth": 1.2}
