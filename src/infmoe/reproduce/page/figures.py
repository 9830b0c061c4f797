"""Pictures of the results: intervals drawn, units on the axes, colours and markers as in `eval.plots`."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infmoe.eval.plots import COLOURS, figure, look, save
from infmoe.layers.point import ratio_text
from infmoe.reproduce.plan import tokens_text
from infmoe.reproduce.statistics import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = 0.4  # nats above the best that pictures of dials show: their ends lie far above
_LEGEND_INSIDE = 4  # lines of a panel; the names of more would lie over them
_THIN: dict[str, Any] = {"color": "#888888", "linewidth": 0.8, "zorder": 1}
_BY_SPREAD = "thin: one seed, by the spread of arms with more"
_FEW = {1: " (one seed)", 2: " (two seeds)"}  # drawn hollow, without an interval: it would fill the picture
_ONE_OR_TWO = " (one or two seeds)"
_HOLLOW = "hollow: one or two seeds"
# what titles and labels say of intervals, the longer ways first
_ON_INTERVALS = (" (95 % over seeds)", "95 % over seeds; ", "95 %, ")
_GREY = "#777777"
# references: a line lies behind the others, a point before them
_BACKGROUND = {"color": "#999999", "marker": "x", "linewidth": 1.0, "zorder": 1}
_POINT = {"color": "#555555", "marker": "*", "zorder": 4}
_PANEL = 4.6  # inches
_COLUMNS = 2  # of a legend below the panels, where they fit: inches of a name are
_KEY, _CHARACTER = 0.6, 0.058  # for its line, and for each character
_ENTRY = 0.2  # inches of a legend's height that a name takes
_SHORT = 20  # characters beside the bars; longer names make the picture wider
_CROWDED = 8  # ticks whose labels still stand beside each other
_BELOW, _BELOW_TILTED = 0.5, 0.75  # inches from an axis to the legend under it: ticks and label stand between


@dataclass(frozen=True)
class Quartiles:
    """What repeated timing gave.

    Attributes:
        median: of the rounds.
        low, high: the first and the third quartile.
    """

    median: float
    low: float
    high: float


Line = Mapping[float, Interval | Quartiles]


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
    from_zero: bool = False,
    own_legends: bool = False,
    references: Mapping[str, Line] | None = None,
) -> Path:
    """One panel for each title, one line with intervals for each name.

    A point that one or two seeds stand behind is hollow and has no interval. Where a picture has no interval at all,
    "95 %" is left out of its title.

    Args:
        path: of the PNG.
        panels: a panel's title, and its lines: name -> x -> interval. One without points keeps its place, and is not
            shown.
        x_label, y_label: axes, with units; one for all panels, or one each.
        title: of the whole picture.
        few_ticks: an axis with its own ticks, for many points; else a logarithmic one with a tick at each. It is
            linear, but for a picture that shows only what is `within`.
        rows: of panels; the last may be shorter.
        levels: a dotted line in each panel that has one: what guessing gives, or, without a name, 0.
        within: how far above a panel's lowest mean its picture ends; None: all is shown.
        linear: an axis in steps of one, for whole numbers.
        one_scale: both axes of every panel are the same.
        from_zero: the vertical axes begin at 0.
        own_legends: a legend under each panel, whose lines have the first looks; else a name looks the same in all.
        references: drawn in grey in every panel, and named once below all of them.
    """
    greys = references or {}
    drawn_lines = [line for lines in (*(drawn for _, drawn in panels), greys) for line in lines.values()]
    title = _truthful(title, (value for line in drawn_lines for value in line.values()))
    names = list(dict.fromkeys(name for _, drawn in panels for name in drawn))
    most = max((len(drawn) for _, drawn in panels), default=0)
    outside = most > _LEGEND_INSIDE and not own_legends
    across = -(-len(panels) // rows)
    columns = _legend_columns(panels, across)
    below = -(-len(names) // columns) / rows if outside else most if own_legends else 0  # entries, a row of panels
    fig, cells = figure(across, rows=rows, width=_PANEL, height=(3.9 if rows == 1 else 3.4) + _ENTRY * below)
    axes = cells[: len(panels)]
    for empty in cells[len(panels) :]:
        empty.remove()
    x_labels = [x_label] * len(panels) if isinstance(x_label, str) else x_label
    y_labels = [y_label] * len(panels) if isinstance(y_label, str) else y_label
    chances = levels or [None] * len(panels)
    for ax, (panel, drawn), x_text, y_text, chance in zip(axes, panels, x_labels, y_labels, chances, strict=True):
        _draw_all(ax, drawn, greys, list(drawn) if own_legends else names)
        compared = drawn_lines if one_scale else [*drawn.values(), *greys.values()]
        _set_ticks(ax, sorted({x for line in compared for x in line}), linear, few_ticks, within is not None)
        if chance is not None:
            name = "chance" if chance else None
            ax.axhline(chance, color=_GREY, linestyle=":", linewidth=1.5, label=name, zorder=0)
        pooled = any(_pooled_ends(value) for line in drawn.values() for value in line.values())
        ax.set(xlabel=f"{x_text}\n{_BY_SPREAD}" if pooled else x_text, ylabel=y_text)
        ax.set_title(panel, fontsize=10 if own_legends else None)
        if within is not None and compared:
            lowest = min(_middle(value) for line in compared for value in line.values())
            ax.set_ylim(lowest - within / 4, lowest + within)
        elif from_zero:
            ax.set_ylim(bottom=0)
    if one_scale:
        _share(axes)
    if own_legends:
        _legends_under(fig, axes, {_named(name, line) for name, line in greys.items()})
    elif outside:
        _legend_below(fig, _entries(axes), columns)
    else:
        for ax in axes:
            if entries := _entries([ax]):
                ax.legend(entries.values(), entries, fontsize=8)
    fig.suptitle(title, fontsize=11, wrap=True)
    return save(fig, path)


def bars(path: Path, values: Mapping[str, Interval], *, x_label: str, title: str) -> Path:
    """One horizontal bar with its interval for each name, the first at the top; 0 is a line.

    What one or two seeds gave has no interval, and a hollow marker; where none has one, "95 %" is left out of the
    label and the title. A thin line is what the spread of other arms gives a single seed.
    """
    names = [_named(name, {0.0: value}) for name, value in values.items()]
    beyond = max(0, max(map(len, names), default=0) - _SHORT)
    fig, axes = figure(width=7.2 + 0.07 * beyond, height=1.2 + 0.27 * len(values))
    ax = axes[0]
    places = range(len(values), 0, -1)
    ax.axvline(0.0, color="#555555", linewidth=1)
    for place, interval in zip(places, values.values(), strict=True):
        ends = _pooled_ends(interval)
        if ends is not None:
            ax.hlines(place, *ends, **_THIN)
        ax.errorbar(
            interval.mean,
            place,
            xerr=[[error] for error in _errors(interval)],
            color=COLOURS[1 if interval.mean < 0 else 2],
            markerfacecolor="white" if _few(interval) else None,
            marker="o" if interval.mean < 0 else "s",
            capsize=3,
        )
    ax.set_yticks(list(places), names)
    ax.set_ylim(0.4, len(values) + 0.6)  # a marker on the frame would be cut
    thin = f"\n{_BY_SPREAD}" if any(map(_pooled_ends, values.values())) else ""
    ax.set(xlabel=_truthful(x_label, values.values()) + thin, title=_truthful(title, values.values()))
    return save(fig, path)


def _draw_all(ax: "Axes", drawn: Mapping[str, Line], references: Mapping[str, Line], names: Sequence[str]) -> None:
    """A panel's lines, each with the look of its place among the names, before the references."""
    for name, line in references.items():
        _draw(ax, name, line, _POINT if len(line) == 1 else _BACKGROUND)
    for name, line in drawn.items():
        i = names.index(name)
        if line:
            _draw(ax, name, line, look(i) | {"linestyle": ("-", "--", "-.", ":")[i % 4]})


def _draw(ax: "Axes", name: str, line: Line, style: Mapping[str, Any]) -> None:
    """One line with its intervals; hollow where few seeds stand behind a point, with a thin one by others' spread."""
    xs = sorted(line)
    for x in xs:
        ends = _pooled_ends(line[x])
        if ends is not None:
            ax.vlines(x, *ends, **_THIN)
    hollow = [x for x in xs if _few(line[x])]
    size = 11 if style["marker"] == "*" else 5
    ax.errorbar(
        xs,
        [_middle(line[x]) for x in xs],
        list(zip(*(_errors(line[x]) for x in xs), strict=True)),
        label=_named(name, line),
        markerfacecolor="white" if len(hollow) == len(xs) else None,
        markersize=size,
        capsize=3,
        **style,
    )
    if 0 < len(hollow) < len(xs):
        above = style.get("zorder", 2) + 0.5  # errorbar draws its own markers a little above what it is told
        own: dict[str, Any] = {**style, "linestyle": "none", "markerfacecolor": "white", "zorder": above}
        ax.plot(hollow, [_middle(line[x]) for x in hollow], markersize=size, **own)
        ax.plot([], [], linestyle="none", marker="o", color=_GREY, markerfacecolor="white", label=_HOLLOW)


def _named(name: str, line: Line) -> str:
    """A line's name, and how many seeds it rests on where all its points are hollow."""
    counts = {value.count for value in line.values() if isinstance(value, Interval)}
    if not counts or not counts <= _FEW.keys():
        return name
    return name + (_FEW[counts.pop()] if len(counts) == 1 else _ONE_OR_TWO)


def _pooled_ends(value: Interval | Quartiles) -> tuple[float, float] | None:
    """The interval that the spread of other arms gives a single value, where it does."""
    if not isinstance(value, Interval) or value.pooled is None:
        return None
    return value.mean - value.pooled, value.mean + value.pooled


def _few(value: Interval | Quartiles) -> bool:
    return isinstance(value, Interval) and value.count in _FEW


def _middle(value: Interval | Quartiles) -> float:
    return value.mean if isinstance(value, Interval) else value.median


def _errors(value: Interval | Quartiles) -> tuple[float, float]:
    """What is drawn below and above a point: nothing of a few values'."""
    if _few(value) or not math.isfinite(value.low):
        return math.nan, math.nan
    return _middle(value) - value.low, value.high - _middle(value)


def _truthful(text: str, values: Iterable[Interval | Quartiles]) -> str:
    """A title or a label; without its words on intervals where none of the values has one that is drawn."""
    if any(not math.isnan(_errors(value)[0]) for value in values):
        return text
    for words in _ON_INTERVALS:
        text = text.replace(words, "")
    return text


def _set_ticks(ax: "Axes", ticks: Sequence[float], linear: bool, few_ticks: bool, logarithmic: bool) -> None:
    """See `lines`; `logarithmic` is an axis with few ticks."""
    if linear:
        ax.set_xticks(ticks)
    elif few_ticks:
        if logarithmic:
            ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(lambda x, _: _tick(x))
    else:
        ax.set_xscale("log", base=2)
        ax.set_xticks(ticks, [_tick(x) for x in ticks], rotation=60 if len(ticks) > _CROWDED else 0)
        ax.minorticks_off()


def _tick(x: float) -> str:
    return tokens_text(round(x)) if x >= 1e6 else ratio_text(x)


def _share(axes: Sequence["Axes"]) -> None:
    """Give all panels the same axes."""
    for ax in axes[1:]:
        ax.sharex(axes[0])
        ax.sharey(axes[0])
    for ax in axes:
        ax.autoscale_view()


def _legend_columns(panels: Sequence[tuple[str, Mapping[str, Line]]], across: int) -> int:
    """How many names stand beside each other below so many panels."""
    longest = max((len(_named(name, line)) for _, drawn in panels for name, line in drawn.items()), default=0)
    return _COLUMNS if _COLUMNS * (_KEY + _CHARACTER * longest) <= across * _PANEL else 1


def _entries(axes: Sequence["Axes"]) -> dict[str, Any]:
    """What the legend of these panels names, each once."""
    found: dict[str, Any] = {}
    for ax in axes:
        for handle, name in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    if _HOLLOW in found:
        found[_HOLLOW] = found.pop(_HOLLOW)  # last
    return found


def _legend_below(fig: "Figure", entries: Mapping[str, Any], columns: int, title: str | None = None) -> None:
    """One legend below all panels."""
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": columns, "title": title, "title_fontsize": 8}
    fig.legend(entries.values(), entries, fontsize=8, frameon=False, **place)


def _legends_under(fig: "Figure", axes: Sequence["Axes"], references: Iterable[str]) -> None:
    """A legend under each panel, and one of the references below them all."""
    from matplotlib.transforms import ScaledTranslation

    greys = set(references)
    for ax in axes:
        own = {name: handle for name, handle in _entries([ax]).items() if name not in greys}
        inches = _BELOW_TILTED if any(text.get_rotation() for text in ax.get_xticklabels()) else _BELOW
        anchor = ax.transAxes + ScaledTranslation(0, -inches, fig.dpi_scale_trans)
        place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.0), "bbox_transform": anchor}
        ax.legend(own.values(), own, fontsize=8, frameon=False, borderaxespad=0.0, **place)
    shared = {name: handle for name, handle in _entries(axes).items() if name in greys}
    if shared:
        _legend_below(fig, shared, _COLUMNS, "in every panel")
