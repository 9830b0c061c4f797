"""Pictures: axes with units, errors drawn, colours and markers for colour-blind eyes and grey print."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infmoe.layers.point import Point, ratio_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, from dark to light enough to tell apart in grey.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_BY_LAYER = "per layer"


def look(i: int) -> dict[str, Any]:
    """Colour and marker of the i-th line of a picture: no two of the first 49 have both in common."""
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]}


def figure(
    columns: int = 1, *, rows: int = 1, width: float = 5.2, height: float = 4.0
) -> tuple["Figure", list["Axes"]]:
    """A figure of panels, row by row, each of this width and height, without a window system."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(fig)
    axes = [fig.add_subplot(rows, columns, i + 1) for i in range(rows * columns)]
    for ax in axes:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    return fig, axes


def save(fig: "Figure", path: Path) -> Path:
    """Write as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=140)
    return path


def plot_sweep(rows: Sequence[dict[str, Any]], path: Path, *, title: str) -> Path:
    """Held-out loss against ideal and executed FLOPs and, where measured, decode latency; one line per K and mode.

    Error bars are those of the difference to the reference point (a star), paired over windows: the level
    itself, common to all points, is less certain, and the axis says by how much.
    """
    # key -> what the axis says, and what one unit of it is
    panels = {
        "flops_ideal": ("ideal MFLOPs per token: only the union of the masks, router counted", 1e6),
        "flops_executed": ("executed MFLOPs per token: every neuron, then the mask", 1e6),
        "decode_ms": ("decode latency, batch 1 (ms per token; median and quartiles)", 1.0),
    }
    shown = {key: panel for key, panel in panels.items() if key in rows[0]}
    fig, axes = figure(len(shown), width=4.6)
    dial = "num_experts_per_tok" if rows[0]["num_experts_per_tok"] is not None else "num_samples"
    # points that differ in a keep ratio share a line; a dial without keep ratios is one line of its own
    by_line: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_line.setdefault(_line_of(row), []).append(row)
    alike = [name for name in by_line if name != _BY_LAYER]
    reference = next(row for row in rows if row["is_reference"])
    for ax, (key, (axis, unit)) in zip(axes, shown.items(), strict=True):
        for i, (name, line) in enumerate(by_line.items()):
            style = look(i) | ({"ls": "none"} if name == _BY_LAYER else {})
            if key == "decode_ms":
                low, high = [r[key] - r["decode_ms_low"] for r in line], [r["decode_ms_high"] - r[key] for r in line]
                style["xerr"] = [low, high]
            ax.errorbar(
                [r[key] / unit for r in line],
                [r["loss"] for r in line],
                [r["delta_se"] for r in line],
                label=name,
                capsize=2,
                **style,
            )
        ax.plot(reference[key] / unit, reference["loss"], marker="*", ms=15, mfc="none", mec="black", zorder=5)
        ax.set_xlabel(axis, fontsize=8)
    axes[0].set_ylabel(f"held-out loss (nats per token)\nbars: paired s.e.; level ±{reference['loss_se']:.3f}")
    labels = "keep ratio" if rows[0]["keep_ratio"] is not None else "k" if rows[0][dial] is not None else None
    if labels is not None:
        axes[0].set_title(f"labels: {labels}; star: reference", fontsize=9)
        for row in by_line[alike[-1]] if alike else ():  # the last line has the most room at its right
            axes[0].annotate(
                ratio_text(row["keep_ratio"]) if labels == "keep ratio" else f"{row[dial]}",
                (row["flops_ideal"] / 1e6, row["loss"]),
                textcoords="offset points",
                xytext=(6, 4),
                fontsize=8,
            )
    if len(by_line) > 1 or rows[0]["num_samples"] is not None:
        axes[0].legend(frameon=False)
    fig.suptitle(title)
    return save(fig, path)


def plot_frontier(result: dict[str, Any], path: Path, *, title: str) -> Path:
    """Held-out loss against the time of a token; one marker per K, mode or schedule, the frontier as a line."""
    fig, (ax,) = figure(width=7.0, height=4.6)
    rows = result["points"]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(_line_of(row), []).append(row)
    for i, (name, members) in enumerate(groups.items()):
        ax.errorbar(
            [r["token_ms"] for r in members],
            [r["loss"] for r in members],
            [r["increase_se"] for r in members],
            [[0.0] * len(members), [r["token_ms_p95"] - r["token_ms"] for r in members]],
            ls="none",
            label=name,
            **look(i),
            capsize=2,
            elinewidth=0.8,
        )
    best = sorted((r for r in rows if r["on_frontier"]), key=lambda r: r["token_ms"])
    ax.plot([r["token_ms"] for r in best], [r["loss"] for r in best], color="#555555", lw=1, ls="--", label="frontier")
    reference = next(r for r in rows if r["is_reference"])
    ax.plot(reference["token_ms"], reference["loss"], marker="*", ms=15, mfc="none", mec="black", ls="none")
    for row in best:
        dial = row["keep_ratio"] if row["keep_ratio"] is not None else row["num_experts_per_tok"]
        if dial is not None and not isinstance(dial, tuple | list):
            text = ratio_text(dial) if row["keep_ratio"] is not None else f"{dial}"
            ax.annotate(
                text,
                (row["token_ms"], row["loss"]),
                textcoords="offset points",
                xytext=(-4, -11),
                fontsize=8,
                ha="right",
            )
    tokens = result["cached_tokens"]
    ax.set_xlabel(
        f"time of a generated token (ms): median, bar to what 95 % stay below\n{result['rows']} row(s), "
        f"{tokens[0]} to {tokens[1]} tokens cached, {result['machine']['threads']} threads"
    )
    ax.set_ylabel("held-out loss (nats per token), paired s.e.")
    ax.set_title("labels: keep ratio or k of the frontier's points; star: the checkpoint's own setting", fontsize=9)
    ax.legend(frameon=False, fontsize=8)
    fig.suptitle(title)
    return save(fig, path)


def _line_of(row: dict[str, Any]) -> str:
    """What the points of one line have in common."""
    point = Point.of(row)
    if point.by_layer():
        return _BY_LAYER
    if point.mode is not None:
        return "z = μ" if point.mode == "mu" else f"{point.mode}, K = {point.num_samples}"
    if point.num_samples is not None:
        return f"K = {point.num_samples}"
    return "one setting" if point == Point() else "all layers alike"


def plot_training(metrics: Sequence[dict[str, Any]], path: Path, *, title: str) -> Path:
    """Training and validation loss over tokens; routing entropy, overlap and sigma beside them."""
    fig, (left, right) = figure(2)
    train = [m for m in metrics if "loss" in m]
    val = [m for m in metrics if "val_loss" in m]
    dot = "." if len(train) == 1 else None  # a line of one point would not show
    tokens, losses = [m["tokens"] / 1e6 for m in train], [m["loss"] for m in train]
    left.plot(tokens, losses, color=COLOURS[5], marker=dot, label="training")
    left.errorbar(
        [m["tokens"] / 1e6 for m in val],
        [m["val_loss"] for m in val],
        [m["val_loss_se"] for m in val],
        color=COLOURS[0],
        marker="o",
        capsize=2,
        label="validation",
    )
    left.set_xlabel("tokens (millions)")
    left.set_ylabel("loss (nats per token)")
    left.legend(frameon=False)
    for i, (name, label) in enumerate(
        (
            ("entropy", "routing entropy (Eq. 9)"),
            ("overlap_ratio", "overlap of two samples"),
            ("union_ratio", "union of the K masks"),
            ("sigma_to_mu", "sigma / |mu|"),
        )
    ):
        values = [(m["tokens"] / 1e6, m["routing"][name]) for m in train if m.get("routing")]
        if values:
            right.plot(
                *zip(*values, strict=True), color=COLOURS[i], ls=("-", "--", "-.", ":")[i], marker=dot, label=label
            )
    right.set_xlabel("tokens (millions)")
    right.set_ylabel("mean over layers")
    right.set_ylim(bottom=0)
    right.legend(frameon=False, fontsize=8)
    fig.suptitle(title)
    return save(fig, path)
