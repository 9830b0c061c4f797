"""Units and samples by the token's need, held against the same mean number for every token."""

import statistics
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from infmoe.layers.point import ratio_text
from infmoe.reproduce.measures import ADAPTIVE_ARMS, BY_NEED_ARMS
from infmoe.reproduce.page.dial_curves import Curve, curve
from infmoe.reproduce.page.section import (
    MISSING,
    Claim,
    Section,
    in_brackets,
    markdown_table,
    text_of,
    verdict_all_below,
)
from infmoe.reproduce.places import CUT_SHARES, MEAN_SAMPLES, UNSURE_RATIOS, UNSURE_SAMPLES
from infmoe.reproduce.statistics import Interval, paired
from infmoe.reproduce.store import Store

_EQUAL = 0.03  # means this close to the wanted one count as equal


class _Judged(NamedTuple):
    """What a claim rests on: the first of the arms that have most seeds.

    Attributes:
        name: the arm, and what of it.
        gaps: differences, one for each column.
        off: how far the mean is from the wanted one, relatively, at most.
        seeds: behind them, at most.
    """

    name: str
    gaps: list[Interval | None]
    off: float
    seeds: int


def adaptive(store: Store, section: Section) -> str:
    """Cuts by score and by mass, and samples by the router's sureness."""
    by_score = _units(
        store,
        section,
        "adaptive",
        ADAPTIVE_ARMS,
        {
            "cut": "tokens differ: one cut for each layer",
            "one cut": "tokens and layers differ: one cut for all",
            "layers": "layers differ: the shares that the one cut leaves",
        },
        claim="units where the token's scores ask for them (above one cut in each layer)",
        title="**Confidence-adaptive compute** (`Routing(score_cut=…)`",
    )
    by_mass = _units(
        store,
        section,
        "adaptive_mass",
        BY_NEED_ARMS,
        {
            "cut": "tokens differ: one mass for each layer",
            "one cut": "tokens and layers differ: one mass for all",
            "layers": "layers differ: the shares that the one mass leaves",
        },
        claim="top-p over units (the fewest that hold a share of the token's positive scores, one share in each layer)",
        title="**The same by the mass of the scores** (top-p over units, `Routing(score_mass=…)`: the fewest that hold "
        "a share of the sum of a token's positive scores",
    )
    return "\n\n".join(part for part in (by_score, by_mass, _samples(store, section)) if part)


def _units(
    store: Store,
    section: Section,
    measure: str,
    arms: tuple[str, ...],
    rules: Mapping[str, str],
    *,
    claim: str,
    title: str,
) -> str:
    """Cuts against fixed shares at equal mean share."""
    rows, most_off, judged = [], 0.0, None
    for arm in arms:
        found: dict[str, Curve] = {}
        off = dict.fromkeys(("ratio", *rules), 0.0)
        for run in store.runs(arm, store.scale.tokens):
            for row in run.measure(measure) or ():
                at = found.setdefault(row["rule"], {}).setdefault(row["share"], {})
                at[run.spec.seed] = row["loss"]
                rule, mean = row["rule"], statistics.fmean(row["layer_shares"])
                off[rule] = max(off[rule], abs(mean / row["share"] - 1.0))
        if not found:
            continue
        most_off = max(most_off, *off.values())
        seeds = max(len(losses) for losses in found["ratio"].values())
        for rule, text in rules.items():
            gaps = [paired(found.get(rule, {}).get(s, {}), found["ratio"].get(s, {})) for s in CUT_SHARES]
            cells = [text_of(g, 4, sign=True) + (in_brackets(g) if g and g.count < seeds else "") for g in gaps]
            rows.append([f"{arm}; {text}", *cells, str(seeds)])
            if rule == "cut" and (judged is None or seeds > judged.seeds):
                judged = _Judged(f"`{arm}`", gaps, max(off["ratio"], off[rule]), seeds)
    text = f"{claim} beat a fixed share at the same mean share"
    if not _claimed(section, text, judged, CUT_SHARES, "shares"):
        return ""
    columns = (f"mean share {ratio_text(s)}" for s in CUT_SHARES)
    head = ("loss minus that of one share for all, nats, K = 1", *columns, "seeds")
    return (
        f"{title}; found on training text; mean shares on held-out text differ from the wanted one by at most "
        f"{most_off:.1%}; fewer seeds in a cell: for the others none was found that keeps that share)\n\n"
        + markdown_table(head, rows)
    )


def _samples(store: Store, section: Section) -> str:
    """More samples where the router is unsure, against as many for all."""
    rows, judged = [], None
    for arm in BY_NEED_ARMS:
        losses, means = (_by_setting(store, arm, figure) for figure in ("loss", "mean_samples"))
        for k in UNSURE_SAMPLES:
            places = [("unsure", ratio, k) for ratio in UNSURE_RATIOS]
            gaps = [paired(losses.get(at, {}), _fixed_at(losses, at[1], means.get(at, {}))) for at in places]
            if not any(gaps):
                continue
            seeds = max(gap.count for gap in gaps if gap is not None)
            share = f"1/{(k - 1) / (MEAN_SAMPLES - 1):g} of the tokens"
            cells = [text_of(g, 4, sign=True) for g in gaps]
            rows.append([f"{arm}; {k} samples for the least sure {share}, one for the others", *cells, str(seeds)])
            if judged is None or seeds > judged.seeds:
                judged = _Judged(f"`{arm}`, {k} or 1", gaps, 0.0, seeds)
    text = f"samples where the router's σ asks for them beat {MEAN_SAMPLES} for every token, at the same mean number"
    if not _claimed(section, text, judged, UNSURE_RATIOS, "mean samples"):
        return ""
    columns = (f"{ratio_text(r)} kept" for r in UNSURE_RATIOS)
    head = (f"loss minus that of about {MEAN_SAMPLES} samples for all, nats", *columns, "seeds")
    return (
        "**Samples where the router is unsure** (`Routing(min_sigma_to_mu=…)`: tokens whose rms(σ) / rms(μ) lies below "
        f"take one; bounds for a mean of {MEAN_SAMPLES} found on training text; against the same number for all, "
        "between whole numbers on the line through them, at the mean on held-out text; the same number of samples that "
        f"count, not the same work: every token's scores are those of all {' or '.join(map(str, UNSURE_SAMPLES))})\n\n"
        + markdown_table(head, rows)
    )


def _fixed_at(losses: Curve, ratio: float, means: Mapping[int, float]) -> dict[int, float]:
    """The loss with as many samples for every token, seed by seed, on the lines between the numbers measured."""
    found = {}
    for seed, mean in means.items():
        line = {k: of[seed] for (rule, at, k), of in losses.items() if (rule, at) == ("fixed", ratio) and seed in of}
        if line:
            found[seed] = float(np.interp(mean, sorted(line), [line[k] for k in sorted(line)]))
    return found


def _by_setting(store: Store, arm: str, figure: str) -> Curve:
    """A figure of every setting of `adaptive_samples`: (rule, keep ratio, K) -> seed -> value."""

    def place(row: Mapping) -> tuple:
        return row["rule"], row["keep_ratio"], row["num_samples"]

    return curve(store, arm, store.scale.tokens, place, measure="adaptive_samples", figure=figure)


def _claimed(section: Section, text: str, judged: _Judged | None, places: tuple[float, ...], what: str) -> bool:
    """Add the claim; whether anything was measured for it."""
    if judged is None:
        section.claims.append(Claim(text, "–", MISSING))
        return False
    shown = ", ".join(
        f"{text_of(g, 4, sign=True)} at {ratio_text(p)}" for g, p in zip(judged.gaps, places, strict=True)
    )
    decided = judged.off <= _EQUAL
    verdict = verdict_all_below(judged.gaps) if decided else f"not decided: {what} differ by {judged.off:.0%}"
    section.claims.append(Claim(text, f"{judged.name}: {shown}", verdict))
    return True
