"""How far the keep ratio can fall before a MoE of equal total parameters is the better model."""

from collections.abc import Mapping, Sequence

from infmoe.layers.point import ratio_text
from infmoe.reproduce.arms import label
from infmoe.reproduce.page.dial_curves import curve, over_k, ratio_of
from infmoe.reproduce.page.section import ONE_SEED, markdown_table, text_of
from infmoe.reproduce.page.speeds import decode_over_dials, speeds
from infmoe.reproduce.statistics import interval, paired
from infmoe.reproduce.store import Store

# rival -> the number of experts it is trained with, and what is equal
RIVALS = {
    "moe": (2, "equal total parameters without W_z and the routers"),
    "moe-plus": (2, "its experts wider, so equal total parameters with W_z and the routers"),
    "moe16-fine-k8-scaled": (8, "equal total and active parameters without W_z and the routers"),
    "moe16-fine-k4-scaled": (4, "equal total parameters without W_z and the routers, half the active ones"),
}


def against_moe(store: Store, arms: Sequence[tuple[str, int]]) -> str:
    """The smallest keep ratio at which each (arm, K) is no worse than MoE, for each way to count parameters."""
    return "\n\n".join(part for rival in RIVALS if (part := _table(store, rival, arms)))


def _table(store: Store, rival: str, arms: Sequence[tuple[str, int]]) -> str:
    runs = store.runs(rival, store.scale.tokens)
    k, equal = RIVALS[rival]
    theirs = over_k(store, rival).get(k, {})
    times = decode_over_dials(store)
    rows = [row for arm, samples in arms if (row := _row(store, theirs, arm, samples, times))]
    if not rows or not runs:
        return ""
    head = (
        *("∞-MoE", "smallest keep ratio no worse than MoE", "ideal MFLOPs per token there", "executed"),
        *("decoding there, ms per token", "loss minus MoE's, nats", "at the next smaller ratio"),
    )
    ideal = runs[0].cost["flops_ideal"] / 1e6
    ms, dense = (speeds(store).get(arm, {}).get("decode_ms") for arm in (rival, "dense"))
    decoding = "decoding not measured" if ms is None else f"decoding {ms.median:.2f} ms per token"
    if ms is not None and dense is not None:
        decoding += f", without a compiled path for single tokens; `dense` {dense.median:.2f}"
    return (
        f"**Against {label(rival)}** (`{rival}`, {equal}: {ideal:.2f} MFLOPs per token, {decoding}; "
        "no worse: the 95 % interval lies at or below 0; where no ratio's does, the difference is the best one's)\n\n"
        + markdown_table(head, rows)
    )


def _row(
    store: Store, theirs: Mapping[int, float], arm: str, samples: int, times: Mapping[tuple[int, float], float]
) -> list[str]:
    """A row of the table; empty where the two have no seed in common."""
    name = f"{arm}, K = {samples}"
    found = curve(store, arm, store.scale.tokens, ratio_of(samples))
    gaps = {r: gap for r in sorted(found, reverse=True) if (gap := paired(found[r], theirs)) is not None}
    if not gaps:
        return []
    if any(gap.half_width is None for gap in gaps.values()):
        return [name, ONE_SEED, *["–"] * 5]
    best = min(gaps, key=lambda r: gaps[r].mean)
    downwards = [r for r in gaps if r <= best]
    failing = next((i for i, r in enumerate(downwards) if gaps[r].high > 0), len(downwards))
    if failing == 0:
        decided = all(gap.low > 0 for gap in gaps.values())
        text = "none" if decided else f"not decided: {gaps[best].count} seeds"
        return [name, text, "–", "–", "–", text_of(gaps[best], sign=True), "–"]
    least = downwards[failing - 1]
    cells = [_megaflops(store, arm, samples, least, figure) for figure in ("flops_ideal", "flops_executed")]
    cells.append(f"{times[samples, least]:.2f}" if (samples, least) in times else "–")
    beyond = downwards[failing] if failing < len(downwards) else None
    then = "–" if beyond is None else f"{text_of(gaps[beyond], sign=True)} at {ratio_text(beyond)}"
    return [name, ratio_text(least), *cells, text_of(gaps[least], sign=True), then]


def _megaflops(store: Store, arm: str, samples: int, ratio: float, figure: str) -> str:
    found = curve(store, arm, store.scale.tokens, ratio_of(samples), figure=figure).get(ratio)
    return "–" if not found else f"{interval(list(found.values())).mean / 1e6:.2f}"
