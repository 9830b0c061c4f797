"""The K dial: what more samples of the router buy, and where two of them differ at all."""

from collections.abc import Callable
from typing import Any

from infmoe.layers.point import ratio_text
from infmoe.reproduce.arms import titled
from infmoe.reproduce.measures import GRID_ARMS
from infmoe.reproduce.page.dial_curves import at_mu, curve, means, over_samples, ratio_of
from infmoe.reproduce.page.section import (
    HOLDS,
    MISSING,
    SHARED,
    VOID,
    Claim,
    Section,
    better,
    markdown_table,
    nats,
    text_of,
    verdict_below,
)
from infmoe.reproduce.places import CUT_SHARES, GRID_RATIOS, GRID_SAMPLES, SAMPLE_ARMS
from infmoe.reproduce.statistics import interval, paired
from infmoe.reproduce.store import Store


def sampling(store: Store, section: Section) -> str:
    """Loss over the number of samples: at the trained keep ratio, and where two samples share less."""
    ks = sorted({k for arm in SAMPLE_ARMS for k in over_samples(store, arm)} - {1})
    plain = over_samples(store, "infinity").get(1, {})
    rows = []
    for arm in SAMPLE_ARMS:
        if line := over_samples(store, arm):
            base = line.get(1, {})
            gaps = [text_of(paired(line[k], base), 4, sign=True) if k in line else "–" for k in ks]
            mean = text_of(paired(at_mu(store, arm).get("mu", {}), base), 4, sign=True)
            against = "" if arm == "infinity" else text_of(paired(base, plain), sign=True)
            shared = means(over_samples(store, arm, figure="overlap_ratio")).get(2)
            alone = text_of(means({1: base})[1]) if base else "–"
            rows.append([titled(arm), alone, against, *gaps, mean, text_of(shared, 2)])
        _claim_samples(store, section, arm)
    for mode in ("antithetic", "qmc"):
        line = curve(
            store,
            "infinity",
            store.scale.tokens,
            lambda row, mode=mode: row["num_samples"] if row["mode"] == mode else None,  # type: ignore[misc]
            measure="modes",
        )
        if line:
            gaps = [text_of(paired(line[k], plain), 4, sign=True) if k in line else "–" for k in ks]
            rows.append([titled(f"infinity, {mode} samples"), "", "", *gaps, "", ""])
    if not rows:
        return f"**Loss over the number of samples**: {MISSING}."
    _claim_second_sample(store, section)
    section.claims += [claim for arm in GRID_ARMS if (claim := _claim_where_samples_differ(store, arm))]
    head = (
        *("nats", "loss at K = 1", "minus plain's", *(f"K = {k} minus K = 1" for k in ks), "z = μ minus K = 1"),
        "two samples share",
    )
    parts = [
        "**Loss over the number of samples, keep ratio 1/4**\n\n" + markdown_table(head, rows),
        _second_sample(store),
        _grids(store),
    ]
    return "\n\n".join(part for part in parts if part)


def _one_sample(store: Store, share: float) -> dict[int, float]:
    """The loss of `infinity` with one sample of this share, by seed: what `adaptive` holds cuts against."""
    return curve(
        store,
        "infinity",
        store.scale.tokens,
        lambda row: row["share"] if row["rule"] == "ratio" else None,
        measure="adaptive",
    ).get(share, {})


def _second_sample(store: Store) -> str:
    """What a second sample buys at smaller shares, where two samples share less of their units."""
    tokens = store.scale.tokens
    two = curve(store, "infinity", tokens, ratio_of(2))
    shared = curve(store, "infinity", tokens, ratio_of(2), figure="overlap_ratio")
    ideal = curve(store, "infinity", tokens, ratio_of(2), figure="flops_ideal")
    rows = []
    for share in CUT_SHARES:
        one = _one_sample(store, share)
        gap = paired(two.get(share, {}), one)
        if gap is None or share not in ideal:
            continue
        cost = interval(list(ideal[share].values())).mean / 1e6
        cells = [text_of(interval(list(shared[share].values())), 2), text_of(interval(list(one.values())))]
        rows.append([ratio_text(share), *cells, text_of(gap, 4, sign=True), f"{cost:.2f}", str(gap.count)])
    if not rows:
        return ""
    head = (
        *("`infinity` at keep ratio", "two samples share", "loss at K = 1, nats", "K = 2 minus K = 1"),
        *("ideal MFLOPs per token at K = 2", "seeds"),
    )
    return (
        "**A second sample, where samples share less** (paired by seed; what the same FLOPs buy as a larger share, the "
        "table over the keep ratio says)\n\n" + markdown_table(head, rows)
    )


def _claim_second_sample(store: Store, section: Section) -> None:
    """What a second sample buys at the smallest share that both numbers were measured at."""
    share = min(CUT_SHARES)
    gap = paired(curve(store, "infinity", store.scale.tokens, ratio_of(2)).get(share, {}), _one_sample(store, share))
    text = f"a second sample buys a lower loss at keep ratio {ratio_text(share)}"
    if gap is None:
        section.claims.append(Claim(text, "–", MISSING))
        return
    shared = curve(store, "infinity", store.scale.tokens, ratio_of(2), figure="overlap_ratio").get(share, {})
    note = f"two samples share {interval(list(shared.values())).mean:.0%} of their units there" if shared else ""
    section.claims.append(Claim(text, nats(gap, 4), better(gap), note))


def _grids(store: Store) -> str:
    """K and z = mu at other shares than the trained one, of the arms that both dials were measured of at once."""
    places = (*GRID_SAMPLES[1:], "mu")
    rows = []
    for arm in GRID_ARMS:
        for share in sorted((*GRID_RATIOS, 1 / 4)):  # a quarter is a measure of its own
            measure = "dial_grid" if share in GRID_RATIOS else "own_samples"
            line, shared = (
                curve(store, arm, store.scale.tokens, _samples_at(share), measure=measure, figure=figure)
                for figure in ("loss", "overlap_ratio")
            )
            if not (one := line.get(1)):
                continue
            gaps = [text_of(paired(line.get(k, {}), one), 4, sign=True) for k in places]
            cells = [text_of(interval(list(shared[2].values())), 2), text_of(interval(list(one.values())))]
            rows.append([titled(arm), ratio_text(share), *cells, *gaps, str(len(one))])
    if not rows:
        return ""
    differences = [f"{'z = μ' if k == 'mu' else f'K = {k}'} minus K = 1" for k in places]
    head = ("arm", "keep ratio", "two samples share", "loss at K = 1, nats", *differences, "seeds")
    return f"**K at other keep ratios** (paired by seed, nats)\n\n{markdown_table(head, rows)}"


def _claim_where_samples_differ(store: Store, arm: str) -> Claim | None:
    """What 8 samples buy over one at the largest share of units of which two samples have less than `SHARED`."""
    for share in sorted(GRID_RATIOS, reverse=True):
        line, shared, ideal = (
            curve(store, arm, store.scale.tokens, _samples_at(share), measure="dial_grid", figure=figure)
            for figure in ("loss", "overlap_ratio", "flops_ideal")
        )
        gap = paired(line.get(8, {}), line.get(1, {}))
        if gap is None or (common := interval(list(shared[2].values()))).mean >= SHARED:
            continue
        times = interval(list(ideal[8].values())).mean / interval(list(ideal[1].values())).mean
        return Claim(
            "where two samples share less than 90 % of their units in the mean, more of them buy a lower loss "
            f"(K = 8 against 1), of `{arm}`",
            f"{nats(gap, 4)} at keep ratio {ratio_text(share)}, for {times:.2f} times the ideal FLOPs",
            verdict_below(gap),
            f"two samples share {common.text()} of their units there",
        )
    return None


def _samples_at(share: float) -> Callable[[Any], Any]:
    """The number of samples of a point at this share, "mu" at z = mu; None elsewhere."""

    def x(row: Any) -> Any:
        if row["keep_ratio"] != share:
            return None
        return "mu" if row.get("mode") == "mu" else row.get("num_samples") if row.get("mode") is None else None

    return x


def _claim_samples(store: Store, section: Section, arm: str) -> None:
    """What K buys this arm, and whether its samples differ at all."""
    line = over_samples(store, arm)
    overlap = over_samples(store, arm, figure="overlap_ratio").get(2)
    gain = paired(line.get(8, {}), line.get(1, {}))
    of = "" if arm == "infinity" else f", of `{arm}`"
    text = f"more samples buy a lower loss (K = 8 against 1){of}"
    if gain is None or not overlap:
        if line:
            section.claims.append(Claim(text, "–", MISSING))
        return
    share = interval(list(overlap.values()))
    section.claims.append(
        Claim(
            text,
            f"{nats(gain, 4)}; two samples share {share.mean:.0%} of their units",
            VOID if share.mean > SHARED and verdict_below(gain) == HOLDS else verdict_below(gain),
            "they share more than 90 %" if share.mean > SHARED else "",
        )
    )
