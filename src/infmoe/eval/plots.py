"""Pictures: axes with units, errors drawn, colours and markers for colour-blind eyes and grey print."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infmoe.eval.dials import ratio_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, from dark to light enough to tell apart in grey.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def figure(columns: int = 1, *, width: float = 5.2, height: float = 4.0) -> tuple["Figure", list["Axes"]]:
    """A figure of one row of panels, without a window system."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width * columns, height), layout="constrained")
    FigureCanvasAgg(fig)
    axes = [fig.add_subplot(1, columns, i + 1) for i in range(columns)]
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
    """Held-out loss against ideal FLOPs and, where measured, against decode latency; one line per K or k.

    Error bars are those of the difference to the reference point (a star), paired over windows: the level
    itself, common to all points, is less certain, and the axis says by how much.
    """
    timed = "decode_ms" in rows[0]
    fig, axes = figure(2 if timed else 1)
    dial = "num_experts_per_tok" if rows[0]["num_experts_per_tok"] is not None else "num_samples"
    # points that differ in a keep ratio share a line; a dial without keep ratios is one line of its own
    by_line: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        by_line.setdefault(row[dial] if row["keep_ratio"] is not None else None, []).append(row)
    for i, (value, line) in enumerate(by_line.items()):
        style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "capsize": 2}
        label = {"num_samples": "K = ", "num_experts_per_tok": "k = "}[dial] + str(value) if value else "all"
        losses, errors = [r["loss"] for r in line], [r["delta_se"] for r in line]
        ideal = [r["flops_ideal"] / 1e6 for r in line]
        axes[0].errorbar(ideal, losses, errors, label=label, **style)
        if timed:
            spread = [
                [r["decode_ms"] - r["decode_ms_low"] for r in line],
                [r["decode_ms_high"] - r["decode_ms"] for r in line],
            ]
            axes[1].errorbar([r["decode_ms"] for r in line], losses, errors, xerr=spread, label=label, **style)
    labels = "keep ratio" if rows[0]["keep_ratio"] is not None else "k" if rows[0][dial] is not None else None
    for row in line:  # the last line has the most room at its right
        if labels is None:
            continue
        axes[0].annotate(
            ratio_text(row["keep_ratio"]) if labels == "keep ratio" else f"{row[dial]}",
            (row["flops_ideal"] / 1e6, row["loss"]),
            textcoords="offset points",
            xytext=(6, 4),
            fontsize=8,
        )
    reference = next(row for row in rows if row["is_reference"])
    for ax, x in zip(axes, ("flops_ideal", "decode_ms"), strict=False):
        place = reference[x] / (1e6 if x == "flops_ideal" else 1)
        ax.plot(place, reference["loss"], marker="*", ms=15, mfc="none", mec="black", zorder=5)
        ax.set_ylabel(f"held-out loss (nats per token)\nbars: paired s.e.; level ±{reference['loss_se']:.3f}")
    executed = sorted({row["flops_executed"] / 1e6 for row in rows})
    axes[0].set_xlabel(
        f"ideal MFLOPs per token, router counted\n(executed now: {_span(executed)} MFLOPs, masks included)"
    )
    axes[0].set_title(f"labels: {labels}; star: reference" if labels else "", fontsize=9)
    if timed:
        axes[1].set_xlabel("decode latency, batch 1 (ms per token; median and quartiles)")
    if list(by_line) != [None]:
        axes[0].legend(frameon=False)
    fig.suptitle(title)
    return save(fig, path)


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


def _span(values: Sequence[float]) -> str:
    low, high = f"{values[0]:.2f}", f"{values[-1]:.2f}"
    return low if low == high else f"{low} to {high}"
