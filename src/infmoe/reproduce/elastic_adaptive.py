"""Compute by the token's need, held against the same compute for every token."""

import statistics

from infmoe.layers.point import ratio_text
from infmoe.reproduce.dial_curves import Curve, curve
from infmoe.reproduce.measures import (
    ADAPTIVE_ARMS,
    BY_NEED_ARMS,
    CUT_SHARES,
    MEAN_SAMPLES,
    SPREAD_RATIOS,
    SPREAD_SAMPLES,
)
from infmoe.reproduce.section import (
    MISSING,
    Claim,
    Section,
    markdown_table,
    of_seeds,
    text_of,
    verdict_all_below,
)
from infmoe.reproduce.statistics import Interval, paired
from infmoe.reproduce.store import Store

_EQUAL = 0.03  # mean shares and mean samples this close count as equal compute
_RULES = {
    "cut": "tokens differ: one cut for each layer",
    "one cut": "tokens and layers differ: one cut for all",
    "layers": "layers differ: the shares that the one cut leaves",
}


def adaptive(store: Store, section: Section) -> str:
    """Cuts by score and by mass, and samples by the router's sureness."""
    by_score = _units(
        store,
        section,
        "adaptive",
        ADAPTIVE_ARMS,
        claim="units where the token's scores ask for them (above one cut in each layer)",
        title="**Confidence-adaptive compute** (`Routing(score_cut=…)`",
    )
    by_mass = _units(
        store,
        section,
        "adaptive_mass",
        BY_NEED_ARMS,
        claim="the fewest units that hold a share of the token's scores (one share in each layer)",
        title="**The same by the mass of the scores** (`Routing(score_mass=…)`: the fewest units that hold a share of "
        "the sum of a token's positive scores",
    )
    return "\n\n".join(part for part in (by_score, by_mass, _samples(store, section)) if part)


def _units(store: Store, section: Section, measure: str, arms: tuple[str, ...], *, claim: str, title: str) -> str:
    """Cuts against fixed shares at equal mean share."""
    tokens = store.scale.tokens
    rows, off, judged = [], 0.0, None
    for arm in arms:
        found: dict[str, Curve] = {}
        for run in store.runs(arm, tokens):
            for row in run.measure(measure) or ():
                at = found.setdefault(row["rule"], {}).setdefault(row["share"], {})
                at[run.spec.seed] = row["loss"]
                off = max(off, abs(statistics.fmean(row["layer_shares"]) / row["share"] - 1.0))
        if not found:
            continue
        measured = max(len(losses) for losses in found["ratio"].values())
        for rule, text in _RULES.items():
            gaps = [paired(found.get(rule, {}).get(s, {}), found["ratio"].get(s, {})) for s in CUT_SHARES]
            cells = [text_of(g, 4, sign=True) + (_seeds(g) if g and g.count < measured else "") for g in gaps]
            rows.append([f"{arm}; {text}", *cells, str(measured)])
            if rule == "cut" and judged is None:
                judged = arm, gaps
    text = f"not in the paper: {claim} beat a fixed share at equal compute"
    if judged is None:
        section.claims.append(Claim(text, "–", MISSING))
        return ""
    arm, gaps = judged
    shown = ", ".join(f"{text_of(g, 4, sign=True)} at {ratio_text(s)}" for s, g in zip(CUT_SHARES, gaps, strict=True))
    verdict = verdict_all_below(gaps) if off <= _EQUAL else f"not decided: shares differ by {off:.0%}"
    section.claims.append(Claim(text, f"`{arm}`: {shown}", verdict))
    columns = (f"mean share {ratio_text(s)}" for s in CUT_SHARES)
    head = ("loss minus that of one share for all, nats, K = 1", *columns, "seeds")
    return (
        f"{title}, cuts found on training text; mean shares on held-out text differ from the wanted one by at most "
        f"{off:.1%}; fewer seeds in a cell: for the others no cut was found that keeps that share)\n\n"
        + markdown_table(head, rows)
    )


def _samples(store: Store, section: Section) -> str:
    """More samples where the router is unsure, against as many for all."""
    rows, off, judged = [], 0.0, None
    for arm in BY_NEED_ARMS:
        losses = {
            rule: curve(
                store,
                arm,
                store.scale.tokens,
                lambda row, rule=rule: (row["keep_ratio"], row["num_samples"]) if row["rule"] == rule else None,  # type: ignore[misc]
                measure="adaptive_samples",
            )
            for rule in ("fixed", "spread")
        }
        for run in store.runs(arm, store.scale.tokens):
            for row in run.measure("adaptive_samples") or ():
                if row["rule"] == "spread":
                    off = max(off, abs(row["mean_samples"] / MEAN_SAMPLES - 1.0))
        for k in SPREAD_SAMPLES:
            gaps = [
                paired(losses["spread"].get((ratio, k), {}), losses["fixed"].get((ratio, MEAN_SAMPLES), {}))
                for ratio in SPREAD_RATIOS
            ]
            if any(gaps):
                rest = f"{k} samples for the least sure {_one_in((k - 1) / (MEAN_SAMPLES - 1))}, one for the others"
                seeds = max(gap.count for gap in gaps if gap is not None)
                rows.append([f"{arm}; {rest}", *(text_of(g, 4, sign=True) for g in gaps), str(seeds)])
                judged = judged or (arm, k, gaps)
    text = f"not in the paper: samples where the router's σ asks for them beat {MEAN_SAMPLES} for every token"
    if judged is None:
        section.claims.append(Claim(text, "–", MISSING))
        return ""
    arm, k, gaps = judged
    shown = ", ".join(
        f"{text_of(g, 4, sign=True)} at {ratio_text(r)}" for r, g in zip(SPREAD_RATIOS, gaps, strict=True)
    )
    verdict = verdict_all_below(gaps) if off <= _EQUAL else f"not decided: mean samples differ by {off:.0%}"
    section.claims.append(Claim(text, f"`{arm}`, {k} or 1: {shown}", verdict))
    columns = (f"{ratio_text(r)} kept" for r in SPREAD_RATIOS)
    head = (f"loss minus that of {MEAN_SAMPLES} samples for all, nats", *columns, "seeds")
    return (
        "**Samples where the router is unsure** (`Routing(min_spread=…)`: tokens whose rms(σ) / rms(μ) lies below take "
        f"one; bounds found on training text; mean samples on held-out text differ from {MEAN_SAMPLES} by at most "
        f"{off:.1%})\n\n" + markdown_table(head, rows)
    )


def _one_in(count: float) -> str:
    """1/3 -> "third"."""
    return {3.0: "third", 7.0: "seventh"}.get(count, f"1/{count:g}")


def _seeds(gap: Interval | None) -> str:
    return "" if gap is None else f" ({of_seeds(gap)})"
