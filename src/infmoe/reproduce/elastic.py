"""Elastic compute: what one checkpoint does over its dials, by how it was trained."""

from collections.abc import Callable, Mapping
from typing import Any

from infmoe.layers.point import ratio_text
from infmoe.reproduce.figures import Gallery
from infmoe.reproduce.plan import ELASTIC_EXPERTS, TWO_PASSES, tokens_text
from infmoe.reproduce.section import (
    FAILS,
    HOLDS,
    MISSING,
    ONE_SEED,
    UNDECIDED,
    Claim,
    Section,
    command,
    markdown_table,
    mean_loss,
    seeds_text,
    text_of,
    verdict_below,
)
from infmoe.reproduce.statistics import Interval, interval, paired
from infmoe.reproduce.store import Finished, Store

RANGE = 0.01  # nats: a dial's useful range is where the loss stays this close to its best
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
    "emoe-k4": "Elastic MoE, k = 4 of 8",
    "matryoshka-k4": "Matryoshka, k = 1 … 8",
    "moe16-fine": "plain, k = 8 (direct, for k = 4)",
    "emoe-k8": "Elastic MoE, k = 8 of 16",
    "matryoshka-k8": "Matryoshka, k = 1 … 16",
    "moe16-fine-k16": "plain, k = 16 (direct, for k = 8)",
}
_SAMPLES = {
    "infinity": "plain, K = 2",
    "infinity-elastic-k": "K drawn from 1 … 4 for each layer",
    "infinity-consistency": "K = 2, two draws made to agree",
}
# x -> seed -> loss
Curve = dict[Any, dict[int, float]]


def elastic(store: Store, gallery: Gallery) -> Section:
    """Training for elasticity, against fixed settings and against direct training."""
    section = Section("Elastic compute: one checkpoint over its dials", command("elastic", store.scale))
    parts = [
        _keep_ratios(store, gallery, section),
        _experts(store, gallery, section),
        _samples(store, section),
        _useful_ranges(store, section),
        _training_cost(store),
        _no_worse_than_moe(store, section),
        _adaptive(store, section),
    ]
    section.body = "\n\n".join(part for part in parts if part)
    _everything(store, gallery, section)
    return section


def curve(
    store: Store,
    arm: str,
    tokens: int,
    x: Callable[[Mapping[str, Any]], Any],
    measure: str = "dials",
    keep: Callable[[Mapping[str, Any]], bool] = lambda row: True,
    figure: str = "loss",
) -> Curve:
    """A figure of the points of a measure, by their place on an axis and by seed; points without a place are left."""
    found: Curve = {}
    for run in store.runs(arm, tokens):
        for row in run.measure(measure) or ():
            at = x(row) if keep(row) else None
            if at is not None and figure in row:
                found.setdefault(at, {})[run.spec.seed] = row[figure]
    return found


def means(found: Curve) -> dict[Any, Interval]:
    """The curve over seeds, in the axis's order."""
    return {at: interval(list(losses.values())) for at, losses in sorted(found.items())}


def _ratio_of(run_samples: int | None) -> Callable[[Mapping[str, Any]], Any]:
    """The keep ratio of a point at the trained number of samples, or None."""

    def x(row: Mapping[str, Any]) -> Any:
        return row["keep_ratio"] if row.get("mode") is None and row.get("num_samples") == run_samples else None

    return x


def _over_ratio(store: Store, arm: str, tokens: int | None = None, figure: str = "loss") -> Curve:
    """Loss over the keep ratio at K = 1, which all these arms are trained with."""
    return curve(store, arm, tokens or store.scale.tokens, _ratio_of(1), figure=figure)


def _over_k(store: Store, arm: str, figure: str = "loss") -> Curve:
    """Loss over the number of experts, gates renormalised."""
    return curve(store, arm, store.scale.tokens, lambda row: row.get("num_experts_per_tok"), figure=figure)


def _over_samples(store: Store, arm: str) -> Curve:
    """Loss over K at the trained keep ratio."""
    return curve(
        store,
        arm,
        store.scale.tokens,
        lambda row: row.get("num_samples") if row.get("mode") is None and row["keep_ratio"] == 0.25 else None,
    )


def _keep_ratios(store: Store, gallery: Gallery, section: Section) -> str:
    tokens = store.scale.tokens
    names = {arm: f"trained at {ratio_text(ratio)}" for arm, ratio in _FIXED.items()} | _ELASTIC
    curves = {arm: found for arm in names if (found := _over_ratio(store, arm))}
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
        title="One checkpoint over the keep ratio, K = 1 (95 % over seeds)",
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
        if not ours or len(fixed) < len(_FIXED):
            section.claims.append(Claim(text, "–", MISSING))
            continue
        best = min(fixed, key=lambda name: sum(means(fixed[name])[r].mean for r in _RATIOS))
        gaps = {r: paired(ours[r], fixed[best][r]) for r in _RATIOS}
        section.claims.append(
            Claim(
                text,
                f"against `{best}`: "
                + ", ".join(f"{text_of(g, sign=True)} at {ratio_text(r)}" for r, g in gaps.items()),
                _no_worse([gap for gap in gaps.values() if gap is not None], 0.0),
            )
        )
        for ratio, name, most in ((1 / 4, "infinity-keep4", 0.01), (1 / 16, "infinity-keep16", 0.03)):
            gap = paired(ours[ratio], fixed[name][ratio])
            section.claims.append(
                Claim(
                    f"not in the paper: `{arm}` at {ratio_text(ratio)} is within {most:g} nats of one trained there",
                    f"{text_of(gap, sign=True)} nats",
                    _no_worse([gap] if gap is not None else [], most),
                )
            )


def _no_worse(gaps: list[Interval], most: float) -> str:
    """Whether all differences are at most so large, by their intervals."""
    if not gaps:
        return MISSING
    if any(gap.half_width is None for gap in gaps):
        return ONE_SEED
    if any(gap.low > most for gap in gaps):
        return FAILS
    return HOLDS if all(gap.high <= most for gap in gaps) else UNDECIDED.replace("0", f"{most:g}")


def _experts(store: Store, gallery: Gallery, section: Section) -> str:
    lines: dict[str, Curve] = {}
    for arm in ELASTIC_EXPERTS:
        if found := _over_k(store, arm):
            lines[f"{arm}: {_EXPERTS[arm]}"] = found
        damped = _damped(store, arm) if arm in ("moe16-fine-k4", "moe16-fine") else {}
        lines |= {f"{arm}, α = {alpha:g}": line for alpha, line in damped.items()}
    if not lines:
        return f"**Loss over the number of experts, 16 experts of d_ff/8**: {MISSING}."
    ks = sorted({k for line in lines.values() for k in line})
    rows = [[name, *(text_of(means(line).get(k)) for k in ks)] for name, line in lines.items()]
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
    head = ("loss, nats", *(f"k′ = {k}" for k in ks))
    return (
        "**Loss over the number of experts: 16 experts of d_ff/8, gates renormalised over those that run**\n\n"
        + markdown_table(head, rows)
        + "\n\nα: the weights of ranks beyond the trained k are multiplied by it before they are renormalised; nothing "
        "is trained for it."
    )


def _damped(store: Store, arm: str) -> dict[float, Curve]:
    """α -> the curve, with the points up to the trained k, which α leaves alone."""
    found: dict[float, Curve] = {}
    for run in store.runs(arm, store.scale.tokens):
        for row in run.measure("rank_dampings") or ():
            at = found.setdefault(row["rank_damping"], {}).setdefault(row["num_experts_per_tok"], {})
            at[run.spec.seed] = row["loss"]
    plain = _over_k(store, arm)
    return {alpha: {**plain, **line} for alpha, line in sorted(found.items())}


def _samples(store: Store, section: Section) -> str:
    rows, ks = [], sorted({k for arm in _SAMPLES for k in _over_samples(store, arm)})
    for arm, text in _SAMPLES.items():
        if line := _over_samples(store, arm):
            base = line.get(1, {})
            at_mu = curve(
                store,
                arm,
                store.scale.tokens,
                lambda row: "mu" if row.get("mode") == "mu" and row["keep_ratio"] == 0.25 else None,
            ).get("mu", {})
            gaps = [text_of(paired(line[k], base), 4, sign=True) if k in line else "–" for k in ks]
            rows.append([f"{arm}: {text}", *gaps, text_of(paired(at_mu, base), 4, sign=True)])
    for mode in ("antithetic", "qmc"):
        line = curve(
            store,
            "infinity",
            store.scale.tokens,
            lambda row, mode=mode: row["num_samples"] if row["mode"] == mode else None,  # type: ignore[misc]
            measure="modes",
        )
        base = _over_samples(store, "infinity").get(1, {})
        if line:
            gaps = [text_of(paired(line[k], base), 4, sign=True) if k in line else "–" for k in ks]
            rows.append([f"infinity, {mode} samples", *gaps, ""])
    if not rows:
        return f"**Loss over the number of samples**: {MISSING}."
    _claim_samples(store, section)
    head = ("loss minus that of one sample, nats", *(f"K = {k}" for k in ks), "z = μ")
    return "**Loss over the number of samples, keep ratio 1/4**\n\n" + markdown_table(head, rows)


def _claim_samples(store: Store, section: Section) -> None:
    line = _over_samples(store, "infinity")
    overlap = curve(
        store,
        "infinity",
        store.scale.tokens,
        lambda row: row.get("num_samples") if row.get("mode") is None and row["keep_ratio"] == 0.25 else None,
        figure="overlap_ratio",
    ).get(2)
    gain = paired(line.get(8, {}), line.get(1, {}))
    if gain is None or not overlap:
        return
    share = interval(list(overlap.values()))
    section.claims.append(
        Claim(
            "not in the paper: more samples buy a lower loss (K = 8 against 1)",
            f"{text_of(gain, 4, sign=True)} nats; two samples share {share.mean:.0%} of their units",
            verdict_below(gain),
            "above 90 %: the K dial is void" if share.mean > 0.9 else "",
        )
    )


def useful_range(found: Curve) -> tuple[Any, Any, Any, float] | None:
    """Where the mean loss is lowest, the ends of the stretch around it within `RANGE`, and that lowest loss."""
    line = {at: value.mean for at, value in means(found).items()}
    if not line:
        return None
    order = sorted(line)
    best = min(order, key=lambda at: line[at])
    low = high = order.index(best)
    while low > 0 and line[order[low - 1]] <= line[best] + RANGE:
        low -= 1
    while high < len(order) - 1 and line[order[high + 1]] <= line[best] + RANGE:
        high += 1
    return best, order[low], order[high], line[best]


def _useful_ranges(store: Store, section: Section) -> str:
    curves: dict[str, tuple[Curve, Callable[[Any], str]]] = {}
    for arm in (*_FIXED, *_ELASTIC):
        curves[f"{arm} (keep ratio)"] = _over_ratio(store, arm), ratio_text
    for arm in ELASTIC_EXPERTS:
        curves[f"{arm} (k′)"] = _over_k(store, arm), str
        if arm in ("moe16-fine-k4", "moe16-fine"):
            for alpha, line in _damped(store, arm).items():
                curves[f"{arm}, α = {alpha:g} (k′)"] = line, str
    for arm in _SAMPLES:
        curves[f"{arm} (K)"] = _over_samples(store, arm), str
    rows = []
    for name, (found, text) in curves.items():
        if (stretch := useful_range(found)) is not None:
            best, low, high, loss = stretch
            rows.append([name, text(best), f"{loss:.3f}", f"{text(low)} … {text(high)}"])
    _claim_emoe(store, section)
    if not rows:
        return ""
    head = ("method (dial)", "best at", "loss there, nats", f"within {RANGE:g} nats of it")
    return "**Useful range of each dial** (means over seeds, of the settings that were measured)\n\n" + markdown_table(
        head, rows
    )


def _claim_emoe(store: Store, section: Section) -> None:
    """Elastic MoE's range against the plain one's and direct training's."""
    for k, plain, direct in ((4, "moe16-fine-k4", "moe16-fine"), (8, "moe16-fine", "moe16-fine-k16")):
        found = {name: useful_range(_over_k(store, name)) for name in (f"emoe-k{k}", plain, direct)}
        text = f"Elastic MoE, trained with k = {k}, is useful up to 2 to 3 times that k (arXiv 2509.21892)"
        ours, its, directly = (found[name] for name in (f"emoe-k{k}", plain, direct))
        if ours is None or its is None or directly is None:
            section.claims.append(Claim(text, "–", MISSING))
            continue
        reach = ours[2] / k
        section.claims.append(
            Claim(
                text,
                f"within {RANGE:g} nats of its best at k′ = {ours[1]} … {ours[2]}; plain {its[1]} … {its[2]}; trained "
                f"directly at {2 * k}: {directly[1]} … {directly[2]}",
                HOLDS if reach >= 2 and ours[2] > its[2] else FAILS,
                "16 experts end the range" if ours[2] == 16 else "",
            )
        )


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


def _no_worse_than_moe(store: Store, section: Section) -> str:
    """The smallest keep ratio at which ∞-MoE still beats MoE top-2 of the same total parameters."""
    tokens = store.scale.tokens
    moe = _over_k(store, "moe").get(2, {})
    runs = store.runs("moe", tokens)
    rows = []
    for arm, samples in (("infinity", 2), *((name, 1) for name in (*_FIXED, *_ELASTIC))):
        found = curve(store, arm, tokens, _ratio_of(samples))
        flops = curve(store, arm, tokens, _ratio_of(samples), figure="flops_ideal")
        gaps = {r: gap for r in sorted(found) if (gap := paired(found[r], moe)) is not None}
        able = [r for r, gap in gaps.items() if gap.high <= 0]
        if not gaps:
            continue
        if not able:
            rows.append([f"{arm}, K = {samples}", "none", "–", "–"])
            continue
        least = able[0]
        cost = interval(list(flops[least].values())).mean / 1e6 if least in flops else None
        cells = ["–" if cost is None else f"{cost:.2f}", f"{text_of(gaps[least], sign=True)}"]
        rows.append([f"{arm}, K = {samples}", ratio_text(least), *cells])
    if not rows or not runs:
        return ""
    ideal = runs[0].cost["flops_ideal"] / 1e6
    head = ("∞-MoE", "smallest keep ratio no worse than MoE", "ideal MFLOPs per token there", "loss minus MoE's, nats")
    return (
        f"**Against MoE, 4 experts, top-2** ({ideal:.2f} MFLOPs per token, equal total parameters without W_z; "
        f"95 % interval at or below 0)\n\n" + markdown_table(head, rows)
    )


def _adaptive(store: Store, section: Section) -> str:
    """Cuts against fixed shares at equal mean share."""
    rules = {
        "cut": "tokens differ: one cut for each layer",
        "one cut": "tokens and layers differ: one cut for all",
        "layers": "layers differ: the shares that the one cut leaves",
    }
    rows, gaps_of = [], {}
    shares = (1 / 16, 1 / 8, 1 / 4)
    for arm in ("infinity", "infinity-keep8", "infinity-keep16", "infinity-elastic"):
        found = {
            rule: curve(
                store,
                arm,
                store.scale.tokens,
                lambda row: row["share"],
                measure="adaptive",
                keep=lambda row, rule=rule: row["rule"] == rule,  # type: ignore[misc]
            )
            for rule in ("ratio", *rules)
        }
        if not found["ratio"]:
            continue
        for rule, text in rules.items():
            gaps = [paired(found[rule].get(s, {}), found["ratio"].get(s, {})) for s in shares]
            gaps_of[arm, rule] = gaps
            rows.append([f"{arm}; {text}", *(text_of(gap, 4, sign=True) for gap in gaps)])
    if not rows:
        return ""
    arm, gaps = next((arm, gaps) for (arm, rule), gaps in gaps_of.items() if rule == "cut")
    shown = [gap for gap in gaps if gap is not None]
    section.claims.append(
        Claim(
            "not in the paper: units where the token's scores ask for them beat a fixed share at equal compute",
            f"`{arm}`: "
            + ", ".join(f"{text_of(g, 4, sign=True)} at {ratio_text(s)}" for s, g in zip(shares, gaps, strict=True)),
            _all_below(shown),
        )
    )
    head = ("loss minus that of one share for all, nats, K = 1", *(f"mean share {ratio_text(s)}" for s in shares))
    return "**Confidence-adaptive compute** (`Routing(score_cut=…)`, cuts found on training text)\n\n" + markdown_table(
        head, rows
    )


def _all_below(gaps: list[Interval]) -> str:
    """Whether all differences are below 0, or all above."""
    verdicts = {verdict_below(gap) for gap in gaps} or {MISSING}
    return verdicts.pop() if len(verdicts) == 1 else UNDECIDED


def _everything(store: Store, gallery: Gallery, section: Section) -> None:
    """Loss against ideal FLOPs for every method."""
    names: dict[str, tuple[Curve, Curve]] = {}
    for arm in ("infinity-keep4", "infinity-elastic", "infinity-sandwich-distill"):
        names[f"{arm}, keep ratio"] = _over_ratio(store, arm), _over_ratio(store, arm, figure="flops_ideal")
    for arm in ("moe16-fine-k4", "emoe-k4", "matryoshka-k4"):
        names[f"{arm}, k′"] = _over_k(store, arm), _over_k(store, arm, figure="flops_ideal")
    drawn: dict[str, dict[float, Interval]] = {}
    for name, (losses, flops) in names.items():
        line = means(losses)
        places = {at: interval(list(values.values())).mean / 1e6 for at, values in flops.items()}
        if line and places:
            drawn[name] = {places[at]: value for at, value in line.items() if at in places}
    if drawn:
        picture = gallery.lines(
            "elastic.png",
            [("", drawn)],
            x_label="ideal MFLOPs per token, forward, router counted",
            y_label="held-out loss (nats per token)",
            title="One checkpoint each: loss against compute (95 % over seeds)",
            few_ticks=True,
        )
        section.pictures.append(("Loss against ideal FLOPs", picture))
