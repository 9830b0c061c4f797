"""Pictures of the results: intervals drawn, units on the axes, colours and markers as in `eval.plots`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infmoe.eval.plots import COLOURS, MARKERS, figure, save
from infmoe.reproduce.statistics import Interval

Line = Mapping[float, Interval]


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
) -> Path:
    """One panel for each title, one line with intervals for each name.

    Args:
        path: of the PNG.
        panels: a panel's title, and its lines: name -> x -> interval.
        x_label, y_label: axes, with units; one for all panels, or one each.
        title: of the whole picture.
        few_ticks: a linear axis with its own ticks, for many points; else a logarithmic one with a tick at each.
        rows: of panels.
        levels: what guessing gives, a dotted line in each panel that has one.
    """
    fig, axes = figure(len(panels) // rows, rows=rows, width=4.6, height=3.9 if rows == 1 else 3.4)
    x_labels = [x_label] * len(panels) if isinstance(x_label, str) else x_label
    y_labels = [y_label] * len(panels) if isinstance(y_label, str) else y_label
    chances = levels or [None] * len(panels)
    for ax, (panel, drawn), x_text, y_text, chance in zip(axes, panels, x_labels, y_labels, chances, strict=True):
        for i, (name, line) in enumerate(drawn.items()):
            xs = sorted(line)
            ax.errorbar(
                xs,
                [line[x].mean for x in xs],
                [line[x].half_width or 0.0 for x in xs],
                label=name,
                color=COLOURS[i % len(COLOURS)],
                marker=MARKERS[i % len(MARKERS)],
                linestyle=("-", "--", "-.", ":")[i % 4],
                markersize=5,
                capsize=3,
            )
        ticks = sorted({x for line in drawn.values() for x in line})
        if few_ticks:
            ax.xaxis.set_major_formatter(lambda x, _: _tick(x))
        else:
            ax.set_xscale("log", base=2)
            ax.set_xticks(ticks, [_tick(x) for x in ticks])
            ax.minorticks_off()
        if chance is not None:
            ax.axhline(chance, color="#777777", linestyle=":", linewidth=1.5, label="chance", zorder=0)
        ax.set(xlabel=x_text, ylabel=y_text, title=panel)
        if drawn:
            ax.legend(fontsize=8)
    fig.suptitle(title, fontsize=11)
    return save(fig, path)


def bars(path: Path, values: Mapping[str, Interval], *, x_label: str, title: str) -> Path:
    """One horizontal bar with its interval for each name, the first at the top; 0 is a line."""
    fig, axes = figure(width=7.2, height=1.2 + 0.27 * len(values))
    ax = axes[0]
    places = range(len(values), 0, -1)
    ax.axvline(0.0, color="#555555", linewidth=1)
    for place, interval in zip(places, values.values(), strict=True):
        ax.errorbar(
            interval.mean,
            place,
            xerr=interval.half_width or 0.0,
            color=COLOURS[1 if interval.mean < 0 else 2],
            marker="o" if interval.mean < 0 else "s",
            capsize=3,
        )
    ax.set_yticks(list(places), list(values))
    ax.set(xlabel=x_label, title=title)
    return save(fig, path)


def _tick(x: float) -> str:
    if 0 < x < 1 and abs(1 / x - round(1 / x)) < 1e-9:
        return f"1/{round(1 / x)}"
    return f"{x / 1e6:g}M" if x >= 1e6 else f"{x:g}"
