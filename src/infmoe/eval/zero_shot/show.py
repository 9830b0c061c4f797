"""What scoring found, for readers: a table beside the paper's rows, and a picture over the dials."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infmoe import paper
from infmoe.layers.point import ratio_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE = "zero_shot.png"
_Z = 1.96  # of a 95 % interval over hundreds of items
# dial -> its symbol, and what its axis says
_DIALS = {
    "num_samples": ("K", "samples per token, K"),
    "num_experts_per_tok": ("k", "experts per token, k"),
    "keep_ratio": ("keep ratio", "keep ratio: share of the neurons that a sample keeps"),
}
_LINES: dict[str, Any] = {"sample": "-", "mu": "--", "antithetic": "-.", "qmc": (0, (5, 1, 1, 1, 1, 1))}
_MODE_NAMES = {"mu": "dashed: z = μ", "antithetic": "dash-dotted: antithetic", "qmc": "dash-dot-dotted: qmc"}
_GREY = "#777777"


def finished(result: dict[str, Any]) -> list[str]:
    """The tasks that were scored at every point."""
    first, *others = (row["tasks"] for row in result["points"])
    return [name for name in first if all(name in tasks for tasks in others)]


def table(result: dict[str, Any]) -> str:
    """Accuracy, and the margin below it, of every point; its spread over seeds; the paper's rows for comparison."""
    names = finished(result)
    several = len(result["seeds"]) > 1
    widths = [max(18 if several else 16, len(name)) for name in names]
    head = _line("", names, widths, "mean")
    lines = ["accuracy in %, ± standard error; below, the right answer's margin in nats, ± 95 %"]
    if several:
        lines.append(f"of seed {result['seeds'][0]}; below, the lowest and the highest of {len(result['seeds'])} seeds")
    lines.append(head)
    for row in result["points"]:
        figures = [row["tasks"][name] for name in names]
        cells = [f"{100 * t['acc']:.1f} ± {100 * t['acc_se']:.1f}" for t in figures]
        lines.append(_line(row["label"], cells, widths, f"{100 * row['average']:.1f}"))
        cells = [f"{t['margin']:+.3f} ± {_Z * t['margin_se']:.3f}" for t in figures]
        lines.append(_line("  margin", cells, widths, ""))
        if len(row["average_by_seed"]) > 1:
            cells = [_spread([100 * value for value in t["acc_by_seed"]], ".1f") for t in figures]
            mean = _spread([100 * value for value in row["average_by_seed"]], ".1f")
            lines.append(_line("  over seeds, accuracy", cells, widths, mean))
            cells = [_spread(t["margin_by_seed"], "+.3f") for t in figures]
            lines.append(_line("  over seeds, margin", cells, widths, ""))
        if row is not result["points"][0]:
            lines.append(_line("  change (acc / margin)", [_change(t) for t in figures], widths, ""))
    chance = [f"{100 * result['points'][0]['tasks'][name]['chance']:.0f}" for name in names]
    lines.append(_line("chance", chance, widths, ""))
    for arm in ("dense", "moe", "infinity"):
        printed = dict(zip(paper.TABLE1_TASKS, paper.TABLE1["small"][arm][1], strict=True))
        cells = [f"{printed[name]:.1f}" if name in printed else "–" for name in names]
        shared = [printed[name] for name in names if name in printed]
        mean = f"{statistics.fmean(shared):.1f}" if len(shared) == len(names) else "–"
        lines.append(_line(f"paper, small {arm}", cells, widths, mean))
    notes = [f"{task}: {count} {what}" for task, found in result["notes"].items() for what, count in found.items()]
    first = result["points"][0]["tasks"]
    cut = [f"{name} {first[name]['items_cut']} of {first[name]['items']}" for name in names if first[name]["items_cut"]]
    if cut:
        notes.append(
            f"longer than the window of {result['window']} tokens, so without their beginning: {', '.join(cut)}"
        )
    if result["limit"] is not None:
        notes.append(f"the first {result['limit']} items of each task; files are not in random order")
    if len(result["points"]) > 1:
        count = 2 * len(names) * (len(result["points"]) - 1)
        notes.append(
            f"changes are against {result['points'][0]['label']}, each judged alone at 95 %: of {count}, about "
            f"{round(0.05 * count)} pass for more than noise by chance"
        )
    if result["unfinished"]:
        notes.append(f"not scored: {', '.join(result['unfinished'])}")
    lines += [f"note: {note}" for note in notes]
    return "\n".join(lines)


def _change(figures: dict[str, Any]) -> str:
    acc = "noise" if figures["acc_within_noise"] else f"{100 * figures['acc_change']:+.1f}"
    margin = "noise" if figures["margin_within_noise"] else f"{figures['margin_change']:+.3f}"
    return f"{acc} / {margin}"


def _spread(values: Sequence[float], form: str) -> str:
    return f"{min(values):{form}} to {max(values):{form}}"


def _line(label: str, cells: Sequence[str], widths: Sequence[int], last: str) -> str:
    return f"{label:<23}" + "".join(f"{c:>{w + 2}}" for c, w in zip(cells, widths, strict=True)) + f"{last:>14}"


def plot(result: dict[str, Any], path: Path) -> Path:
    """Accuracy and margin against each dial that was varied, one line a task; against the tasks where none was.

    Intervals are 95 % over items. A dial's panel shows the points at the model's own setting of the other dial, or
    at the first one given; z = mu, which has no K, is a dashed line.
    """
    from infmoe.eval.plots import figure, save

    names, rows = finished(result), result["points"]
    varied = [dial for dial in _DIALS if len({row[dial] for row in rows} - {None}) > 1]
    fig, axes = figure(max(1, len(varied)), rows=2, width=5.6 if len(varied) > 1 else 8.4, height=3.6)
    columns = len(axes) // 2
    for i in range(columns):
        for ax, value in ((axes[i], "acc"), (axes[columns + i], "margin")):
            if varied:
                _over_dial(ax, result, names, varied[i], value)
            else:
                _over_tasks(ax, rows, names, value)
    axes[0].set_ylabel("accuracy (%)")
    axes[columns].set_ylabel("margin: log-likelihood of the right\nanswer minus the others' mean (nats)")
    if len(rows) > 1:
        handles, labels = axes[0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    which = f" at {rows[0]['label']}" if len(rows) == 1 and rows[0]["label"] != "-" else ""
    fig.suptitle(f"Zero-shot tasks{which} (bars: 95 % over items; dotted: chance)", fontsize=11)
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
                means, errors = zip(*(_figures(row["tasks"][name], value) for row in at), strict=True)
                ax.errorbar([row[dial] * 2**step for row in at], means, errors, capsize=2, **style)
            else:  # no such dial: the same at each of its values
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
    _scale(ax, value)


def _held(result: dict[str, Any], dial: str) -> Any:
    """Where a dial stands in the panels of the others: as the model has it, or at the first value given."""
    values = [row[dial] for row in result["points"] if row[dial] is not None]
    return result["own"][dial] if result["own"][dial] in values else values[0] if values else None


def _over_tasks(ax: "Axes", rows: Sequence[dict[str, Any]], names: Sequence[str], value: str) -> None:
    """The tasks side by side, one marker a point."""
    for i, row in enumerate(rows):
        places = [at + (i - (len(rows) - 1) / 2) * 0.12 for at in range(len(names))]
        means, errors = zip(*(_figures(row["tasks"][name], value) for name in names), strict=True)
        style = _style(i) | {"linestyle": "none", "label": row["label"]}
        ax.errorbar(places, means, errors, capsize=3, **style)
    for at, name in enumerate(names):
        level = 100 * rows[0]["tasks"][name]["chance"] if value == "acc" else 0.0
        ax.hlines(level, at - 0.35, at + 0.35, color=_GREY, linestyle=":", linewidth=1.5)
    ax.set_xticks(range(len(names)), names)
    ax.set_xlabel("task")
    _scale(ax, value)


def _scale(ax: "Axes", value: str) -> None:
    """Margins of one-word answers are hundreds of times smaller than those of sentences."""
    if value == "margin":
        ax.set_yscale("symlog", linthresh=0.1)


def _figures(figures: dict[str, Any], value: str) -> tuple[float, float]:
    """Mean and half of its 95 % interval, accuracy in percent."""
    factor = 100 if value == "acc" else 1
    return factor * figures[value], factor * _Z * figures[f"{value}_se"]


def _style(i: int) -> dict[str, Any]:
    from infmoe.eval.plots import COLOURS, MARKERS

    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 5, "linewidth": 1.2}
