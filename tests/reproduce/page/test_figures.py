"""The pictures: what is drawn of intervals, and where legends lie."""

import pytest

from infmoe.eval.plots import COLOURS, MARKERS
from infmoe.reproduce.page import figures
from infmoe.reproduce.page.figures import Gallery
from infmoe.reproduce.statistics import Interval

LABELS = {"x_label": "x", "y_label": "y"}
MARKS = (*MARKERS, "*", "x")  # of points; the ends of intervals have others
ONE, TWO, THREE = Interval(3.0, None, 1), Interval(3.1, 0.4, 2), Interval(3.2, 0.1, 3)


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws with a gallery's method, and gives the figure instead of writing it."""
    found = []
    monkeypatch.setattr(figures, "save", lambda fig, path: found.append(fig) or path)

    def draw(kind, *args, **labels):
        getattr(Gallery(tmp_path), kind)("p.png", *args, **labels)
        found[-1].draw_without_rendering()
        return found[-1]

    return draw


def hollow(ax):
    """The places of the markers that are seen hollow: of what lies on top of each other, the upper one counts."""
    seen = {}
    for line in sorted(ax.lines, key=lambda line: line.get_zorder()):
        if line.get_marker() in MARKS:
            seen |= {(x, y): line.get_markerfacecolor() == "white" for x, y in zip(*line.get_data(), strict=True)}
    return {place for place, white in seen.items() if white}


def intervals(ax):
    """Places that have an interval."""
    segments = [segment for bars in ax.collections for segment in bars.get_segments()]
    return {float(segment[0][0]) for segment in segments if len(segment)}


def names(legend):
    return [text.get_text() for text in legend.get_texts()]


def test_a_point_of_few_seeds_is_hollow_beside_others_that_are_not(drawn):
    fig = drawn("lines", [("", {"a": {1.0: ONE, 2.0: TWO, 4.0: THREE}})], title="t (95 % over seeds)", **LABELS)
    (ax,) = fig.axes
    assert hollow(ax) == {(1.0, 3.0), (2.0, 3.1)}
    assert intervals(ax) == {4.0}
    assert names(ax.get_legend()) == ["a", "hollow: one or two seeds"]
    assert fig.get_suptitle() == "t (95 % over seeds)"


@pytest.mark.parametrize(
    ("points", "name"),
    [([ONE, ONE], "a (one seed)"), ([TWO, TWO], "a (two seeds)"), ([ONE, TWO], "a (one or two seeds)")],
)
def test_a_line_of_few_seeds_says_so_in_its_name(drawn, points, name):
    fig = drawn("lines", [("", {"a": dict(enumerate(points, 1))})], title="t (95 % over seeds)", **LABELS)
    (ax,) = fig.axes
    assert hollow(ax) == {(x, y.mean) for x, y in enumerate(points, 1)}
    assert names(ax.get_legend()) == [name]
    assert not intervals(ax)


@pytest.mark.parametrize(
    ("title", "without"),
    [
        ("a (95 % over seeds)", "a"),
        ("a\n(95 % over seeds; up to 0.4 nats above)", "a\n(up to 0.4 nats above)"),
        ("a (nats; 95 %, paired by seed)", "a (nats; paired by seed)"),
    ],
)
def test_a_picture_without_intervals_speaks_of_none(drawn, title, without):
    for value, said in ((ONE, without), (TWO, without), (THREE, title)):
        assert drawn("lines", [("", {"a": {1.0: value}})], title=title, **LABELS).get_suptitle() == said
        (ax,) = drawn("bars", {"a": value}, x_label=title, title=title).axes
        assert (ax.get_xlabel(), ax.get_title()) == (said, said)


@pytest.mark.parametrize("count", [1, 2, 3, 12])
def test_markers_of_bars_lie_within_the_frame(drawn, count):
    (ax,) = drawn("bars", {f"{i}": ONE for i in range(count)}, x_label="x", title="t").axes
    frame = ax.get_window_extent()
    markers = [line for line in ax.lines if line.get_marker() in MARKS]
    assert len(markers) == count
    for line in markers:
        _, y = ax.transData.transform((line.get_xdata()[0], line.get_ydata()[0]))
        whole = (line.get_markersize() + line.get_markeredgewidth()) / 72 * ax.figure.dpi
        assert frame.y0 + whole < y < frame.y1 - whole  # half of it reaches up and down


def test_each_panel_may_have_a_legend_of_its_own_and_references_stand_in_all(drawn):
    names_of = [[f"a line of panel {i}, {j}" for j in range(2 + i)] for i in range(3)]
    longest = "∞-MoE over the keep ratio: elastic from the first step"
    panels = [(longest, {name: {1.0: THREE, 2.0: THREE} for name in own}) for own in names_of]
    references = {"a line": {0.5: ONE, 8.0: ONE}, "a point": {1.5: THREE}}
    options = {"own_legends": True, "references": references, "rows": 2, "one_scale": True}
    fig = drawn("lines", panels, title="t", **LABELS, **options)
    assert [ax.get_title() for ax in fig.axes] == [longest] * 3
    assert [names(ax.get_legend()) for ax in fig.axes] == names_of
    assert [names(legend) for legend in fig.legends] == [["a line (one seed)", "a point"]]
    for ax, lines in zip(fig.axes, names_of, strict=True):
        own = [(line.get_color(), line.get_marker()) for line in ax.lines if line.get_marker() in MARKERS]
        assert own == list(zip(COLOURS, MARKERS, strict=True))[: len(lines)]
        greys = [line for line in ax.lines if line.get_marker() in ("*", "x")]
        assert [len(line.get_xdata()) for line in greys] == [2, 1]
        assert ax.get_xlim() == fig.axes[0].get_xlim()
        assert ax.get_xlim()[1] > 8
        assert ax.get_ylim() == fig.axes[0].get_ylim()
        title = ax.title.get_window_extent()
        assert fig.bbox.x0 <= title.x0
        assert title.x1 <= fig.bbox.x1
        box = ax.get_legend().get_window_extent()
        assert box.y1 < ax.xaxis.label.get_window_extent().y0
        assert fig.bbox.x0 <= box.x0
        assert box.x1 <= fig.bbox.x1
        (below,) = fig.legends
        assert below.get_window_extent().y1 < box.y0


@pytest.mark.parametrize("panels", [1, 2])
@pytest.mark.parametrize("length", [10, 25, 40, 56])
def test_a_legend_below_the_panels_lies_within_the_picture(drawn, panels, length):
    words = "Elastic MoE, k = 4, ideal 8, λ = 0.0001, from half way on"
    lines = {f"{i} {words[: length - 2]}": {1.0: ONE} for i in range(8)}
    fig = drawn("lines", [("", lines)] * panels, title="t", **LABELS)
    (legend,) = fig.legends
    box, whole = legend.get_window_extent(), fig.bbox
    assert whole.x0 <= box.x0
    assert box.x1 <= whole.x1
    assert box.y0 >= whole.y0


@pytest.mark.parametrize("kind", ["lines", "bars"])
def test_a_single_seed_has_a_thin_interval_by_the_spread_of_others(drawn, kind):
    one = Interval(-0.1, None, 1, pooled=0.04)
    labels = {name: text for name, text in LABELS.items() if kind == "lines" or name != "y_label"}
    values = [("", {"a": {1.0: one, 2.0: THREE}})] if kind == "lines" else {"a": one, "b": THREE}
    fig = drawn(kind, values, title="t", **labels)
    (ax,) = fig.axes
    ends = [segment for lines in ax.collections for segment in lines.get_segments() if lines.get_linewidth()[0] == 0.8]
    (found,) = [segment[:, int(kind == "lines")] for segment in ends]
    assert list(found) == pytest.approx([-0.14, -0.06])
    assert ax.get_xlabel().endswith("thin: one seed, by the spread of arms with more")
    plain = drawn(kind, [("", {"a": {1.0: ONE}})] if kind == "lines" else {"a": ONE}, title="t", **labels)
    assert "thin" not in plain.axes[0].get_xlabel()
