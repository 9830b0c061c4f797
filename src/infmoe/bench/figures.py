"""Pictures of what `infmoe bench` measured, drawn from its rows."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from infmoe.bench.common import Rows
from infmoe.errors import InfMoEError
from infmoe.eval.plots import COLOURS, MARKERS, figure, save
from infmoe.layers.point import ratio_text

# backend -> colour and hatching, so that the map reads in grey too
BACKENDS = {
    "eager": ("#FFFFFF", ""),
    "fused": ("#56B4E9", ""),
    "sparse": ("#E69F00", "//"),
    "triton": ("#CC79A7", ".."),
}
# arm -> label, index of colour and marker, line style
_FFN_LINES = {
    "infinity": ("∞-MoE (auto)", 1, "-"),
    "eager": ("∞-MoE, plain path", 3, "-."),
    "reference": ("topk, scatter, mean", 2, "--"),
    "gemms": ("limit: the products alone", 0, ":"),
}


def plot_ffn(rows: Rows, path: Path) -> Path:
    """The paper's Figure 4: time against the keep ratio, one panel for each pass and Z, in bfloat16."""
    points = [row for row in rows if row.get("pass") and row["dtype"] == "bf16"]
    panels = _distinct((row["pass"], row["z_dim"]) for row in points)
    fig, axes = figure(len(panels), width=3.8)
    for ax, (passes, z_dim) in zip(axes, panels, strict=True):
        for name, (label, style, line) in _FFN_LINES.items():
            own = [r for r in points if (r["pass"], r["z_dim"], r["arm"]) == (passes, z_dim, name)]
            if own:
                _errorbar(ax, [r["keep_ratio"] for r in own], own, style, label=label, ls=line)
        ax.set_xscale("log", base=2)
        ax.set_ylim(bottom=0)
        ratios = _distinct(r["keep_ratio"] for r in points if (r["pass"], r["z_dim"]) == (passes, z_dim))
        ax.set_xticks(ratios, [ratio_text(ratio) for ratio in ratios])
        ax.set_xlabel("keep ratio of one sample")
        ax.set_ylabel("time of a call (ms; median and quartiles)")
        ax.set_title(f"{'forward' if passes == 'forward' else 'forward and backward'}, d_z = {z_dim}", fontsize=9)
    axes[0].legend(frameon=False, fontsize=8)
    return save(fig, path)


def plot_decode(rows: Rows, path: Path) -> Path:
    """Speedup of decoding over the path that skips nothing, against keep ratio and K, with the limits by bytes."""
    dtypes = _distinct(row["dtype"] for row in rows)
    fig, axes = figure(2 * len(dtypes), width=3.8)
    for i, dtype in enumerate(dtypes):
        own = [row for row in rows if row["dtype"] == dtype and row["num_samples"] is not None]
        single = [row for row in own if row["batch"] == 1 and row["arm"] == "auto"]
        dials, batches = axes[2 * i], axes[2 * i + 1]
        for j, num_samples in enumerate(_distinct(row["num_samples"] for row in single)):
            line = sorted((r for r in single if r["num_samples"] == num_samples), key=lambda r: r["keep_ratio"])
            ratios = [r["keep_ratio"] for r in line]
            _errorbar(dials, ratios, line, j, prefix="speedup_", label=f"K = {num_samples}")
            limit_label = "limit by bytes" if j == 0 else None
            limits = [r["limit"] for r in line]
            dials.plot(ratios, limits, color=COLOURS[j], marker=MARKERS[j], mfc="none", ls=":", label=limit_label)
        dials.axhline(1.0, color="grey", lw=0.8)
        dials.set_xscale("log", base=2)
        ratios = sorted({row["keep_ratio"] for row in single})
        dials.set_xticks(ratios, [ratio_text(ratio) for ratio in ratios])
        dials.set_xlabel("keep ratio of one sample")
        dials.set_ylabel("speedup over skipping nothing\n(median and quartiles)")
        dials.set_title(f"batch 1, {dtype}", fontsize=9)
        dials.legend(frameon=False, fontsize=8)
        many = [row for row in own if row["batch"] > 1 and row["arm"] == "auto"]
        for j, (num_samples, ratio) in enumerate(_distinct((r["num_samples"], r["keep_ratio"]) for r in many)):
            line = [r for r in many if (r["num_samples"], r["keep_ratio"]) == (num_samples, ratio)]
            label = f"K = {num_samples}, keep {ratio_text(ratio)}"
            _errorbar(batches, [r["batch"] for r in line], line, j, prefix="speedup_", label=label)
        batches.axhline(0.97, color="grey", lw=0.8, ls="--", label="0.97")
        batches.set_xscale("log", base=2)
        sizes = _distinct(row["batch"] for row in many)
        batches.set_xticks(sizes, [str(size) for size in sizes])
        batches.set_xlabel("batch (rows)")
        batches.set_ylabel("speedup of auto over skipping nothing")
        batches.set_title(f"larger batches, {dtype}", fontsize=9)
        batches.legend(frameon=False, fontsize=8)
    return save(fig, path)


def plot_growth(rows: Rows, path: Path) -> Path:
    """Time against tokens, F and K on logarithmic axes, with the fitted power laws."""
    names = {"tokens": "tokens", "width": "neurons F", "num_samples": "samples K"}
    shown = _distinct(row["axis"] for row in rows)
    fig, axes = figure(len(shown), width=3.4)
    for ax, axis in zip(axes, shown, strict=True):
        own = [row for row in rows if row["axis"] == axis]
        sizes = [row["size"] for row in own]
        _errorbar(ax, sizes, own, 1, ls="none", label="measured")
        ax.plot(sizes, [row["fitted"] for row in own], color=COLOURS[0], ls="--", label="power law")
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xticks(sizes, [str(size) for size in sizes], rotation=45)
        ax.set_xlabel(names[axis])
    axes[0].set_ylabel("forward time (ms; median and quartiles)")
    axes[0].legend(frameon=False, fontsize=8)
    return save(fig, path)


def plot_dispatch(rows: Rows, path: Path) -> Path:
    """The dispatcher's map: for each K the backend it takes at every number of tokens and keep ratio.

    Args:
        rows: `tokens`, `num_samples`, `keep_ratio`, `chosen`, and `ratio_median`, the chosen backend's time over
            the best one's.
        path: where to.
    """
    from matplotlib.patches import Patch, Rectangle

    samples = sorted({row["num_samples"] for row in rows})
    tokens, ratios = sorted({row["tokens"] for row in rows}), sorted({row["keep_ratio"] for row in rows})
    fig, axes = figure(len(samples), width=1.2 + 0.55 * len(tokens), height=1.4 + 0.5 * len(ratios))
    for ax, num_samples in zip(axes, samples, strict=True):
        ax.grid(visible=False)
        for row in (row for row in rows if row["num_samples"] == num_samples):
            x, y = tokens.index(row["tokens"]), ratios.index(row["keep_ratio"])
            colour, hatch = _backend_style(row["chosen"])
            ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, hatch=hatch, edgecolor="grey"))
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
            ax.text(x, y, f"{row['ratio_median']:.2f}", ha="center", va="center", fontsize=7, bbox=box)
        ax.set_xlim(-0.5, len(tokens) - 0.5)
        ax.set_ylim(-0.5, len(ratios) - 0.5)
        ax.set_xticks(range(len(tokens)), [str(n) for n in tokens], rotation=90, fontsize=8)
        ax.set_yticks(range(len(ratios)), [ratio_text(r) for r in ratios], fontsize=8)
        ax.set_xlabel("tokens")
        ax.set_title(f"K = {num_samples}", fontsize=9)
    axes[0].set_ylabel("keep ratio of one sample")
    patches = [
        Patch(facecolor=_backend_style(name)[0], hatch=_backend_style(name)[1], edgecolor="grey", label=name)
        for name in _distinct(row["chosen"] for row in rows)
    ]
    fig.legend(handles=patches, loc="outside right upper", frameon=False, fontsize=8)
    fig.suptitle("backend taken; figures: its time over the best backend's", fontsize=9)
    return save(fig, path)


# bench -> how its rows are drawn
PICTURES: dict[str, Callable[[Rows, Path], Path]] = {
    "ffn": plot_ffn,
    "decode": plot_decode,
    "growth": plot_growth,
    "dispatch": plot_dispatch,
}


def _backend_style(name: str) -> tuple[str, str]:
    if name not in BACKENDS:
        raise InfMoEError(f"no colour for backend {name!r}: {', '.join(BACKENDS)} have one")
    return BACKENDS[name]


def _errorbar(ax: Any, x: list[Any], rows: Rows, style: int, *, prefix: str = "", **more: Any) -> None:
    """Medians with their quartiles."""
    median = [row[f"{prefix}median"] for row in rows]
    error = [[row[f"{prefix}median"] - row[f"{prefix}q1"] for row in rows]]
    error.append([row[f"{prefix}q3"] - row[f"{prefix}median"] for row in rows])
    ax.errorbar(x, median, error, color=COLOURS[style], marker=MARKERS[style], capsize=2, **more)


def _distinct(values: Iterable[Any]) -> list[Any]:
    """Each value once, in the order of first appearance."""
    return list(dict.fromkeys(values))
