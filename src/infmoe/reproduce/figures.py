"""Pictures of the results: intervals drawn, units on the axes, colours and markers as in `eval.plots`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infmoe.eval.plots import COLOURS, figure, look, save
from infmoe.layers.point import ratio_text
from infmoe.reproduce.plan import tokens_text
from infmoe.reproduce.statistics import Interval

Line = Mapping[float, Interval]
_LEGEND_INSIDE = 4  # lines of a panel; the names of more would lie over them
_FEW = {1: " (one seed)", 2: " (two seeds)"}  # drawn hollow, without an interval: it would fill the picture
_PANEL = 4.6  # inches
_COLUMNS = 2  # of a legend below the panels, where they fit: inches of a name are
_KEY, _CHARACTER = 0.6, 0.058  # for its line, and for each character
_SHORT = 20  # characters beside the bars; longer names make the picture wider
_CROWDED = 8  # ticks whose labels still stand beside each other


@dataclass(frozen=True)
class Gallery:
    """Where pictures go.

    Attributes:
        folder: beside the results.
        draw: False: the pictures are named, and not drawn.
    """

    folder: Path
    draw: bool = True

    def lines(self, name: str, panels: Sequence[tuple[str, Mapping[str, Line]]], **labels: Any) -> Path:
        """See `lines`."""
        return lines(self.folder / name, panels, **labels) if self.draw else self.folder / name

    def bars(self, name: str, values: Mapping[str, Interval], **labels: str) -> Path:
        """See `bars`."""
        return bars(self.folder / name, values, **labels) if self.draw else self.folder / name


def lines(
    path: Path,
    panels: Sequence[tuple[str, Mapping[str, Line]]],
    *,
    x_label: str | Sequence[str],
    y_label: str | Sequence[str],
    title: str,
    few_ticks: bool = False,
    rows: int = 1,
    levels: Sequence[float | None] | None = None,
    within: float | None = None,
    linear: bool = False,
    one_scale: bool = False,
) -> Path:
    """One panel for each title, one line with intervals for each name.

    Args:
        path: of the PNG.
        panels: a panel's title, and its lines: name -> x -> interval.
        x_label, y_label: axes, with units; one for all panels, or one each.
        title: of the whole picture.
        few_ticks: an axis with its own ticks, for many points; else a logarithmic one with a tick at each. It is
            linear, but for a picture that shows only what is `within`.
        rows: of panels.
        levels: what guessing gives, a dotted line in each panel that has one.
        within: how far above a panel's lowest mean its picture ends; None: all is shown.
        linear: an axis in steps of one, for whole numbers.
        one_scale: both axes of every panel are the same.
    """
    names = list(dict.fromkeys(name for _, drawn in panels for name in drawn))
    outside = max((len(drawn) for _, drawn in panels), default=0) > _LEGEND_INSIDE
    across = len(panels) // rows
    longest = max((len(name) for name in names), default=0) + len(_FEW[1])
    columns = _COLUMNS if _COLUMNS * (_KEY + _CHARACTER * longest) <= across * _PANEL else 1
    below = 0.2 * -(-len(names) // columns) if outside else 0.0
    fig, axes = figure(across, rows=rows, width=_PANEL, height=(3.9 if rows == 1 else 3.4) + below / rows)
    x_labels = [x_label] * len(panels) if isinstance(x_label, str) else x_label
    y_labels = [y_label] * len(panels) if isinstance(y_label, str) else y_label
    chances = levels or [None] * len(panels)
    for ax, (panel, drawn), x_text, y_text, chance in zip(axes, panels, x_labels, y_labels, chances, strict=True):
        for name, line in drawn.items():
            i = names.index(name)  # one look in all panels
            xs = sorted(line)
            seeds = max(line[x].count for x in xs)
            ax.errorbar(
                xs,
                [line[x].mean for x in xs],
                [_error(line[x]) for x in xs],
                label=f"{name}{_FEW.get(seeds, '')}",
                **look(i),
                markerfacecolor="white" if seeds in _FEW else None,
                linestyle=("-", "--", "-.", ":")[i % 4],
                markersize=5,
                capsize=3,
            )
        ticks = sorted({x for line in drawn.values() for x in line})
        tilted = not few_ticks and len(ticks) > _CROWDED
        if linear:
            ax.set_xticks(ticks)
        elif few_ticks:
            if within is not None:
                ax.set_xscale("log", base=2)
            ax.xaxis.set_major_formatter(lambda x, _: _tick(x))
        else:
            ax.set_xscale("log", base=2)
            ax.set_xticks(ticks, [_tick(x) for x in ticks], rotation=60 if tilted else 0)
            ax.minorticks_off()
        if chance is not None:
            ax.axhline(chance, color="#777777", linestyle=":", linewidth=1.5, label="chance", zorder=0)
        ax.set(xlabel=x_text, ylabel=y_text, title=panel)
        if within is not None and drawn:
            compared = [lines for _, lines in panels] if one_scale else [drawn]
            lowest = min(value.mean for lines in compared for line in lines.values() for value in line.values())
            ax.set_ylim(lowest - within / 4, lowest + within)
        if drawn and not outside:
            ax.legend(fontsize=8)
    if one_scale:
        for ax in axes[1:]:
            ax.sharex(axes[0])
            ax.sharey(axes[0])
        for ax in axes:
            ax.autoscale_view()
    if outside:
        handles: dict[str, Any] = {}
        for ax in axes:
            for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        fig.legend(handles.values(), handles, fontsize=8, loc="outside lower center", ncols=columns, frameon=False)
    fig.suptitle(title, fontsize=11, wrap=True)
    return save(fig, path)


def bars(path: Path, values: Mapping[str, Interval], *, x_label: str, title: str) -> Path:
    """One horizontal bar with its interval for each name, the first at the top; 0 is a line.

    What one or two seeds gave has no interval, and a hollow marker.
    """
    names = [f"{name}{_FEW.get(value.count, '')}" for name, value in values.items()]
    beyond = max(0, max(map(len, names), default=0) - _SHORT)
    fig, axes = figure(width=7.2 + 0.07 * beyond, height=1.2 + 0.27 * len(values))
    ax = axes[0]
    places = range(len(values), 0, -1)
    ax.axvline(0.0, color="#555555", linewidth=1)
    for place, interval in zip(places, values.values(), strict=True):
        ax.errorbar(
            interval.mean,
            place,
            xerr=_error(interval),
            color=COLOURS[1 if interval.mean < 0 else 2],
            markerfacecolor="white" if interval.count in _FEW else None,
            marker="o" if interval.mean < 0 else "s",
            capsize=3,
        )
    ax.set_yticks(list(places), names)
    ax.set(xlabel=x_label, title=title)
    return save(fig, path)


def _error(interval: Interval) -> float:
    """What is drawn of an interval: nothing of a few values'."""
    return math.nan if interval.half_width is None or interval.count in _FEW else interval.half_width


def _tick(x: float) -> str:
    return tokens_text(round(x)) if x >= 1e6 else ratio_text(x)
