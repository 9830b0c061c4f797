"""Elastic compute: what one checkpoint does over its dials, by how it was trained."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from infmoe.layers.point import ratio_text
from infmoe.reproduce.dial_curves import (
    RANGE,
    Curve,
    Stretch,
    at_mu,
    curve,
    means,
    over_k,
    over_ratio,
    over_samples,
    ratio_of,
    useful_ranges,
)
from infmoe.reproduce.figures import Gallery
from infmoe.reproduce.measures import ADAPTIVE_ARMS, DAMPED_ARMS, SAMPLE_ARMS
from infmoe.reproduce.plan import TWO_PASSES, tokens_text
from infmoe.reproduce.section import (
    FAILS,
    HOLDS,
    MISSING,
    ONE_SEED,
    UNDECIDED,
    VOID,
    Claim,
    Section,
    command,
    markdown_table,
    mean_loss,
    nats,
    seeds_text,
    text_of,
    verdict_below,
)
from infmoe.reproduce.speeds import decode_over_dials, speeds
from infmoe.reproduce.statistics import Interval, interval, paired
from infmoe.reproduce.store import Finished, Store

_EQUAL_SHARE = 0.03  # mean shares this close count as equal compute
_SHOWN = 0.4  # nats above the best that pictures show: the ends of the dials lie far above
_RATIOS = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
_FIXED = {"infinity-keep4": 1 / 4, "infinity-keep8": 1 / 8, "infinity-keep16": 1 / 16}
_ELASTIC = {
    "infinity-elastic": "drawn for each layer",
    "infinity-elastic-step": "drawn for each step",
    "infinity-elastic-scaled": "drawn for each layer, mask size kept",
    "infinity-sandwich": "largest and smallest in every step",
    "infinity-sandwich-distill": "the largest teaches the smallest",
}
_EXPERTS = {
    "moe16-fine-k4": "plain, k = 4",
    "emoe-k4": "Elastic MoE, k = 4 of 8, λ = 0.01",
    "emoe-k4-w0.001": "λ = 0.001",
    "emoe-k4-w0.0001": "λ = 0.0001",
    "emoe-k4-w0": "λ = 0, its draws alone",
    "matryoshka-k4": "Matryoshka, k = 1 … 8",
    "moe16-fine": "plain, k = 8 (direct, for k = 4)",
    "emoe-k8": "Elastic MoE, k = 8 of 16, λ = 0.01",
    "emoe-k8-w0.0001": "λ = 0.0001",
    "matryoshka-k8": "Matryoshka, k = 1 … 16",
    "moe16-fine-k16": "plain, k = 16 (direct, for k = 8)",
}
_SAMPLES = dict(
    zip(
        SAMPLE_ARMS,
        ("plain, K = 2", "K drawn from 1 … 4 for each layer", "K = 2, two draws made to agree"),
        strict=True,
    )
)


def elastic(store: Store, gallery: Gallery) -> Section:
    """Training for elasticity, against fixed settings and against direct training."""
    section = Section("Elastic compute: one checkpoint over its dials", command("elastic", store.scale))
    parts = [
        _keep_ratios(store, gallery, section),
        _experts(store, gallery, section),
        _samples(store, section),
        _useful_ranges(store, section),
        _training_cost(store),
        _flops(store),
        _no_worse_than_moe(store),
        _adaptive(store, section),
    ]
    section.body = "\n\n".join(part for part in parts if part)
    _everything(store, gallery, section)
    return section


def _keep_ratios(store: Store, gallery: Gallery, section: Section) -> str:
    tokens = store.scale.tokens
    names = {arm: f"trained at {ratio_text(ratio)}" for arm, ratio in _FIXED.items()} | _ELASTIC
    curves = {arm: found for arm in names if (found := over_ratio(store, arm))}
    _claim_elastic(section, curves)
    if not curves:
        return f"**Loss over the keep ratio, K = 1**: {MISSING}."
    ratios = sorted({ratio for found in curves.values() for ratio in found})
    rows = []
    for arm, found in curves.items():
        line = means(found)
        seeds = seeds_text(store.runs(arm, tokens))
        rows.append([f"{arm}: {names[arm]}", *(text_of(line.get(r)) for r in ratios), seeds])
    picture = gallery.lines(
        "elastic_keep.png",
        [("", {arm: means(found) for arm, found in curves.items()})],
        x_label="share of the neurons that the sample keeps",
        y_label="held-out loss (nats per token)",
        title=f"One checkpoint over the keep ratio, K = 1\n(95 % over seeds; up to {_SHOWN} nats above the best)",
        within=_SHOWN,
    )
    section.pictures.append(("Loss over the keep ratio, by training", picture))
    head = ("loss, nats", *(ratio_text(r) for r in ratios), "seeds")
    return f"**Loss over the keep ratio, K = 1, {tokens_text(tokens)} tokens**\n\n" + markdown_table(head, rows)


def _claim_elastic(section: Section, curves: Mapping[str, Curve]) -> None:
    """One elastic checkpoint against the best fixed one, and against models trained at each end."""
    fixed = {arm: found for arm in _FIXED if (found := curves.get(arm)) and set(_RATIOS) <= found.keys()}
    for arm in ("infinity-elastic", "infinity-sandwich-distill"):
        ours = curves.get(arm)
        text = f"not in the paper: `{arm}`, at every ratio from 1/16 to 1/2, is no worse than the best fixed checkpoint"
        if not ours or not set(_RATIOS) <= ours.keys() or len(fixed) < len(_FIXED):
            section.claims.append(Claim(text, "–", MISSING))
            continue
        best = min(fixed, key=lambda name: sum(means(fixed[name])[r].mean for r in _RATIOS))
        gaps = {r: paired(ours[r], fixed[best][r]) for r in _RATIOS}
        section.claims.append(
            Claim(
                text,
                f"against `{best}`: "
                + ", ".join(f"{text_of(g, sign=True)} at {ratio_text(r)}" for r, g in gaps.items()),
                _no_worse(list(gaps.values()), 0.0),
            )
        )
        for ratio, name, most in ((1 / 4, "infinity-keep4", 0.01), (1 / 16, "infinity-keep16", 0.03)):
            gap = paired(ours[ratio], fixed[name][ratio])
            section.claims.append(
                Claim(
                    f"not in the paper: `{arm}` at {ratio_text(ratio)} is within {most:g} nats of one trained there",
                    nats(gap),
                    _no_worse([gap], most),
                )
            )


def _no_worse(gaps: Sequence[Interval | None], most: float) -> str:
    """Whether all differences are at most so large, by their intervals."""
    found = [gap for gap in gaps if gap is not None]
    if len(found) < len(gaps) or not found:
        return MISSING
    if any(gap.half_width is None for gap in found):
        return ONE_SEED
    if any(gap.low > most for gap in found):
        return FAILS
    return HOLDS if all(gap.high <= most for gap in found) else UNDECIDED.replace("0", f"{most:g}")


def _experts(store: Store, gallery: Gallery, section: Section) -> str:
    lines: dict[str, Curve] = {}
    for arm in _EXPERTS:
        if found := over_k(store, arm):
            lines[f"{arm}: {_EXPERTS[arm]}"] = found
        damped = _damped(store, arm) if arm in DAMPED_ARMS else {}
        lines |= {f"{arm}, α = {alpha:g}": line for alpha, line in damped.items()}
    if not lines:
        return f"**Loss over the number of experts, 16 experts of d_ff/8**: {MISSING}."
    ks = sorted({k for line in lines.values() for k in line})
    rows = [
        [name, *(text_of(means(line).get(k)) for k in ks), str(len(next(iter(line.values()))))]
        for name, line in lines.items()
    ]
    panels = [
        (f"trained for k = {k}", {n: means(line) for n, line in lines.items() if n.startswith(arms)})
        for k, arms in (
            (4, ("moe16-fine-k4", "emoe-k4", "matryoshka-k4")),
            (8, ("moe16-fine:", "moe16-fine,", "emoe-k8", "matryoshka-k8")),
        )
    ]
    picture = gallery.lines(
        "elastic_experts.png",
        [(title, drawn) for title, drawn in panels if drawn],
        x_label="experts run per token, k′ of 16",
        y_label="held-out loss (nats per token)",
        title="One checkpoint over the number of experts (95 % over seeds)",
    )
    section.pictures.append(("Loss over the number of experts, by training", picture))
    head = ("loss, nats", *(f"k′ = {k}" for k in ks), "seeds")
    return (
        "**Loss over the number of experts: 16 experts of d_ff/8, gates renormalised over those that run**\n\n"
        + markdown_table(head, rows)
        + "\n\nα: the weights of ranks beyond the trained k are multiplied by it before they are renormalised; nothing "
        "is trained for it. λ: the weight of Elastic MoE's router loss; its paper names neither that nor the "
        "probability of its draws, which is a half here."
    )


def _damped(store: Store, arm: str) -> dict[float, Curve]:
    """α -> the curve, with the plain points up to the trained k, which α leaves alone."""
    found: dict[float, Curve] = {}
    for run in store.runs(arm, store.scale.tokens):
        own = run.values["config"]["model"]["num_experts_per_tok"]
        rows = run.measure("rank_dampings") or ()
        for alpha in {row["rank_damping"] for row in rows}:
            line = [row for row in run.measure("dials") or () if row["num_experts_per_tok"] <= own]
            line += [row for row in rows if row["rank_damping"] == alpha]
            for row in line:
                at = found.setdefault(alpha, {}).setdefault(row["num_experts_per_tok"], {})
                at[run.spec.seed] = row["loss"]
    return dict(sorted(found.items()))


def _samples(store: Store, section: Section) -> str:
    rows, ks = [], sorted({k for arm in _SAMPLES for k in over_samples(store, arm)})
    for arm, text in _SAMPLES.items():
        if line := over_samples(store, arm):
            base = line.get(1, {})
            mean = at_mu(store, arm).get("mu", {})
            gaps = [text_of(paired(line[k], base), 4, sign=True) if k in line else "–" for k in ks]
            rows.append([f"{arm}: {text}", *gaps, text_of(paired(mean, base), 4, sign=True)])
    for mode in ("antithetic", "qmc"):
        line = curve(
            store,
            "infinity",
            store.scale.tokens,
            lambda row, mode=mode: row["num_samples"] if row["mode"] == mode else None,  # type: ignore[misc]
            measure="modes",
        )
        base = over_samples(store, "infinity").get(1, {})
        if line:
            gaps = [text_of(paired(line[k], base), 4, sign=True) if k in line else "–" for k in ks]
            rows.append([f"infinity, {mode} samples", *gaps, ""])
    if not rows:
        return f"**Loss over the number of samples**: {MISSING}."
    _claim_samples(store, section)
    head = ("loss minus that of one sample, nats", *(f"K = {k}" for k in ks), "z = μ")
    return "**Loss over the number of samples, keep ratio 1/4**\n\n" + markdown_table(head, rows)


def _claim_samples(store: Store, section: Section) -> None:
    line = over_samples(store, "infinity")
    overlap = over_samples(store, "infinity", "overlap_ratio").get(2)
    gain = paired(line.get(8, {}), line.get(1, {}))
    if gain is None or not overlap:
        return
    share = interval(list(overlap.values()))
    section.claims.append(
        Claim(
            "not in the paper: more samples buy a lower loss (K = 8 against 1)",
            f"{text_of(gain, 4, sign=True)} nats; two samples share {share.mean:.0%} of their units",
            VOID if share.mean > 0.9 and verdict_below(gain) == HOLDS else verdict_below(gain),
            "they share more than 90 %" if share.mean > 0.9 else "",
        )
    )


def _useful_ranges(store: Store, section: Section) -> str:
    curves: dict[str, tuple[Curve, Callable[[Any], str]]] = {}
    for arm in (*_FIXED, *_ELASTIC):
        curves[f"{arm} (keep ratio)"] = over_ratio(store, arm), ratio_text
    for arm in _EXPERTS:
        curves[f"{arm} (k′)"] = over_k(store, arm), str
        for alpha, line in _damped(store, arm).items() if arm in DAMPED_ARMS else ():
            curves[f"{arm}, α = {alpha:g} (k′)"] = line, str
    for arm in _SAMPLES:
        curves[f"{arm} (K)"] = over_samples(store, arm), str
    rows = []
    for name, (found, text) in curves.items():
        stretches = useful_ranges(found)
        if stretches:
            ends = [f"{text(s.low)} … {text(s.high)}" for s in stretches.values()]
            bests = [text(s.best) for s in stretches.values()]
            loss = interval([s.loss for s in stretches.values()])
            rows.append([name, _each(bests), text_of(loss), _each(ends), str(len(stretches))])
    _claim_emoe(store, section)
    _claim_damping(store, section)
    if not rows:
        return ""
    head = ("method (dial)", "best at", "loss there, nats", f"within {RANGE:g} nats of it", "seeds")
    return (
        "**Useful range of each dial** (of the settings that were measured, seed by seed; one entry where all agree)"
        "\n\n" + markdown_table(head, rows)
    )


def _each(texts: Sequence[str]) -> str:
    return texts[0] if len(set(texts)) == 1 else "; ".join(texts)


def _claim_emoe(store: Store, section: Section) -> None:
    """Elastic MoE's range against the plain one's and direct training's, paired by seed."""
    plain, direct = {4: "moe16-fine-k4", 8: "moe16-fine"}, {4: "moe16-fine", 8: "moe16-fine-k16"}
    for arm, k in (("emoe-k4-w0.0001", 4), ("emoe-k4-w0", 4), ("emoe-k8-w0.0001", 8)):
        ours, its, directly = (useful_ranges(over_k(store, name)) for name in (arm, plain[k], direct[k]))
        wider = [
            paired(*({seed: stretch.octaves for seed, stretch in ranges.items()} for ranges in (ours, other)))
            for other in (its, directly)
        ]
        alone = arm == "emoe-k4-w0"
        text = (
            ("not in the paper: the draws of Elastic MoE alone" if alone else f"Elastic MoE (`{arm}`)")
            + f", trained with k = {k}, {'are' if alone else 'is'} useful up to 2 to 3 times that k"
            + ("" if alone else " (arXiv 2509.21892)")
            + f", over more than plain top-k, and than training at {2 * k}"
        )
        if wider[0] is None or wider[1] is None:
            section.claims.append(Claim(text, "–", MISSING))
            continue
        reach = min(stretch.high for stretch in ours.values()) / k
        best, plain_best = ({seed: stretch.loss for seed, stretch in ranges.items()} for ranges in (ours, its))
        ended = max(stretch.high for stretch in (*ours.values(), *its.values(), *directly.values())) == 16
        section.claims.append(
            Claim(
                text,
                f"within {RANGE:g} nats of its best at k′ = {_ends(ours)}; plain {_ends(its)}; trained at {2 * k}: "
                f"{_ends(directly)}; wider by {text_of(wider[0], 2, sign=True)} and {text_of(wider[1], 2, sign=True)} "
                f"doublings; its best loss minus the plain one's: {nats(paired(best, plain_best))}",
                _verdict_wider([gap for gap in wider if gap is not None], reach, paired(best, plain_best)),
                "16 experts end a range here, so it may reach further" if ended else "",
            )
        )


def _claim_damping(store: Store, section: Section) -> None:
    """The α dial against Elastic MoE, at twice the trained k."""
    emoe = over_k(store, "emoe-k4-w0.0001").get(8, {})
    damped = _damped(store, "moe16-fine-k4").get(0.25, {}).get(8, {})
    gap = paired(damped, emoe)
    section.claims.append(
        Claim(
            "not in the paper: damping the ranks beyond the trained k (α = 0.25), for which nothing is trained, loses "
            "less at twice that k than Elastic MoE",
            nats(gap),
            MISSING if gap is None else verdict_below(gap),
        )
    )


def _ends(ranges: Mapping[int, Stretch]) -> str:
    return _each([f"{stretch.low} … {stretch.high}" for stretch in ranges.values()])


def _verdict_wider(wider: Sequence[Interval], reach: float, loss: Interval | None) -> str:
    """Whether a range is wider than the others and reaches far enough; `loss` is its best minus the plain one's."""
    if any(gap.half_width is None for gap in wider):
        return ONE_SEED
    if reach < 2 or any(gap.high <= 0 for gap in wider):
        return FAILS
    if any(gap.low <= 0 for gap in wider):
        return UNDECIDED
    return "wider, and worse: its best is above the plain one's" if loss is not None and loss.low > 0 else HOLDS


def _training_cost(store: Store) -> str:
    """Rules that pass twice over every token, at equal tokens and at equal training FLOPs."""
    tokens = store.scale.tokens
    rows = []
    for arm in TWO_PASSES:
        base = "infinity" if arm == "infinity-consistency" else "infinity-elastic"
        whole, half = store.runs(arm, tokens), store.runs(arm, tokens // 2)
        if not whole and not half:
            continue
        rows.append(
            [
                arm,
                f"{_training_flops((whole or half)[0], tokens if whole else tokens // 2):.3g}",
                text_of(mean_loss(store, arm, tokens)),
                text_of(mean_loss(store, arm, tokens // 2)),
                f"{base}: {text_of(mean_loss(store, base, tokens))}",
            ]
        )
    if not rows:
        return ""
    head = (
        *("two passes a token", f"training FLOPs at {tokens_text(tokens)}", f"loss at {tokens_text(tokens)} tokens"),
        *(f"at {tokens_text(tokens // 2)}: equal training FLOPs", f"one pass, {tokens_text(tokens)} tokens"),
    )
    return (
        "**What training costs** (executed FLOPs, forward and backward, 3 times the forward's; losses at each model's "
        "own dials)\n\n" + markdown_table(head, rows)
    )


def _training_flops(run: Finished, tokens: int) -> float:
    passes = run.spec.config().elastic.passes
    return 3.0 * run.cost["flops_executed"] * tokens * passes


def _no_worse_than_moe(store: Store) -> str:
    """The smallest keep ratio at which ∞-MoE still beats MoE top-2 of the same total parameters."""
    tokens = store.scale.tokens
    moe = over_k(store, "moe").get(2, {})
    runs = store.runs("moe", tokens)
    times = decode_over_dials(store)
    rows = []
    for arm, samples in (("infinity", 2), *((name, 1) for name in (*_FIXED, *_ELASTIC))):
        found = curve(store, arm, tokens, ratio_of(samples))
        gaps = {r: gap for r in sorted(found) if (gap := paired(found[r], moe)) is not None}
        if not gaps:
            continue
        if any(gap.half_width is None for gap in gaps.values()):
            rows.append([f"{arm}, K = {samples}", ONE_SEED, "–", "–", "–", "–"])
            continue
        best = min(gaps, key=lambda r: gaps[r].mean)
        downwards = [r for r in sorted(gaps, reverse=True) if r <= best]
        failing = next((i for i, r in enumerate(downwards) if gaps[r].high > 0), len(downwards))
        able = downwards[:failing]
        if not able:
            seeds = next(iter(gaps.values())).count
            decided = all(gap.low > 0 for gap in gaps.values())
            text = "none" if decided else f"not decided: {seeds} seeds"
            rows.append([f"{arm}, K = {samples}", text, "–", "–", "–", text_of(gaps[best], sign=True)])
            continue
        least = able[-1]
        cells = [_megaflops(store, arm, samples, least, figure) for figure in ("flops_ideal", "flops_executed")]
        cells.append(f"{times[samples, least]:.2f}" if (samples, least) in times else "–")
        rows.append([f"{arm}, K = {samples}", ratio_text(least), *cells, text_of(gaps[least], sign=True)])
    if not rows or not runs:
        return ""
    ideal = runs[0].cost["flops_ideal"] / 1e6
    head = (
        *("∞-MoE", "smallest keep ratio no worse than MoE", "ideal MFLOPs per token there", "executed"),
        *("decoding there, ms per token", "loss minus MoE's, nats"),
    )
    moe_ms = speeds(store).get("moe", {}).get("decode_ms")
    decoding = "decoding not measured" if moe_ms is None else f"decoding {moe_ms:.2f} ms per token"
    return (
        f"**Against MoE, 4 experts, top-2** ({ideal:.2f} MFLOPs per token, {decoding}; equal total parameters "
        f"without W_z; 95 % interval at or below 0; where no ratio is, the last column has the best one's)\n\n"
        + markdown_table(head, rows)
    )


def _megaflops(store: Store, arm: str, samples: int, ratio: float, figure: str) -> str:
    found = curve(store, arm, store.scale.tokens, ratio_of(samples), figure=figure).get(ratio)
    return "–" if not found else f"{interval(list(found.values())).mean / 1e6:.2f}"


def _adaptive(store: Store, section: Section) -> str:
    """Cuts against fixed shares at equal mean share."""
    rules = {
        "cut": "tokens differ: one cut for each layer",
        "one cut": "tokens and layers differ: one cut for all",
        "layers": "layers differ: the shares that the one cut leaves",
    }
    tokens = store.scale.tokens
    shares = (1 / 16, 1 / 8, 1 / 4)
    rows, off, judged = [], 0.0, None
    for arm in ADAPTIVE_ARMS:
        found: dict[str, Curve] = {}
        for run in store.runs(arm, tokens):
            for row in run.measure("adaptive") or ():
                at = found.setdefault(row["rule"], {}).setdefault(row["share"], {})
                at[run.spec.seed] = row["loss"]
                off = max(off, abs(statistics.fmean(row["layer_shares"]) / row["share"] - 1.0))
        if not found:
            continue
        for rule, text in rules.items():
            gaps = [paired(found.get(rule, {}).get(s, {}), found["ratio"].get(s, {})) for s in shares]
            seeds = seeds_text(store.runs(arm, tokens))
            rows.append([f"{arm}; {text}", *(text_of(gap, 4, sign=True) for gap in gaps), seeds])
            if rule == "cut" and judged is None:
                judged = arm, gaps
    if judged is None:
        return ""
    arm, gaps = judged
    section.claims.append(
        Claim(
            "not in the paper: units where the token's scores ask for them beat a fixed share at equal compute",
            f"`{arm}`: "
            + ", ".join(f"{text_of(g, 4, sign=True)} at {ratio_text(s)}" for s, g in zip(shares, gaps, strict=True)),
            _all_below(gaps) if off <= _EQUAL_SHARE else f"not decided: shares differ by {off:.0%}",
        )
    )
    columns = (f"mean share {ratio_text(s)}" for s in shares)
    head = ("loss minus that of one share for all, nats, K = 1", *columns, "seeds")
    return (
        "**Confidence-adaptive compute** (`Routing(score_cut=…)`, cuts found on training text; mean shares on held-out "
        f"text differ from the wanted one by at most {off:.1%})\n\n" + markdown_table(head, rows)
    )


def _all_below(gaps: Sequence[Interval | None]) -> str:
    """Whether all differences are below 0, or all above."""
    verdicts = {verdict_below(gap) for gap in gaps}
    if MISSING in verdicts or not verdicts:
        return MISSING
    return verdicts.pop() if len(verdicts) == 1 else "not decided: it differs from point to point"


def _flops(store: Store) -> str:
    """What a token costs at each setting of a dial."""
    dials: dict[str, tuple[Callable[[str], Curve], Callable[[Any], str]]] = {
        "∞-MoE, K = 1, over the keep ratio": (lambda f: over_ratio(store, "infinity-keep4", figure=f), ratio_text),
        "∞-MoE, keep 1/4, over K": (lambda f: over_samples(store, "infinity", f), lambda k: f"K = {k}"),
        "16 experts, over k′": (lambda f: over_k(store, "moe16-fine-k4", f), lambda k: f"k′ = {k}"),
    }
    rows = []
    for name, (of, text) in dials.items():
        ideal, executed = (means(of(figure)) for figure in ("flops_ideal", "flops_executed"))
        if ideal and ideal.keys() == executed.keys():
            cells = [f"{text(at)}: {ideal[at].mean / 1e6:.2f} / {executed[at].mean / 1e6:.2f}" for at in ideal]
            rows.append(f"- {name}: " + ", ".join(cells))
    if not rows:
        return ""
    title = "**MFLOPs per token, ideal / executed** (forward, whole model, router counted; ideal: measured unions)"
    return title + "\n\n" + "\n".join(rows)


def _everything(store: Store, gallery: Gallery, section: Section) -> None:
    """Loss against ideal FLOPs for every method."""
    panels: dict[str, dict[str, tuple[Curve, Curve]]] = {"∞-MoE": {}, "16 experts, k′ = 1 … 16": {}}
    infinity, experts = panels.values()
    for arm in (*_FIXED, *_ELASTIC):
        infinity[f"{arm}, keep ratio"] = over_ratio(store, arm), over_ratio(store, arm, figure="flops_ideal")
    for arm in SAMPLE_ARMS:
        infinity[f"{arm}, K"] = over_samples(store, arm), over_samples(store, arm, "flops_ideal")
        infinity[f"{arm}, z = μ"] = at_mu(store, arm), at_mu(store, arm, "flops_ideal")
    for arm in _EXPERTS:
        flops = over_k(store, arm, "flops_ideal")
        experts[arm] = over_k(store, arm), flops
        for alpha, line in _damped(store, arm).items() if arm in DAMPED_ARMS else ():
            experts[f"{arm}, α = {alpha:g}"] = line, flops
    drawn: list[tuple[str, dict[str, dict[float, Interval]]]] = []
    for title, names in panels.items():
        lines: dict[str, dict[float, Interval]] = {}
        for name, (losses, flops) in names.items():
            places = {at: interval(list(values.values())).mean / 1e6 for at, values in flops.items()}
            by_flops = {places[at]: value for at, value in means(losses).items() if at in places}
            if by_flops:
                lines[name] = by_flops
        if lines:
            drawn.append((title, lines))
    if drawn:
        picture = gallery.lines(
            "elastic.png",
            drawn,
            x_label="ideal MFLOPs per token, forward, router counted",
            y_label="held-out loss (nats per token)",
            title=f"One checkpoint a line: loss against compute\n(95 % over seeds; up to {_SHOWN} nats above the best)",
            few_ticks=True,
            within=_SHOWN,
        )
        section.pictures.append(("Loss against ideal FLOPs", picture))
