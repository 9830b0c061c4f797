"""Elastic compute: what one checkpoint does over its dials, by how it was trained."""

import statistics
from collections.abc import Callable
from typing import Any

from infmoe.layers.point import ratio_text
from infmoe.reproduce.arms import label
from infmoe.reproduce.measures import wanted
from infmoe.reproduce.page.dial_curves import (
    RANGE,
    Curve,
    at_mu,
    curve,
    means,
    over_k,
    over_ratio,
    over_samples,
    ratio_of,
    useful_ranges,
)
from infmoe.reproduce.page.elastic_adaptive import adaptive
from infmoe.reproduce.page.elastic_against_moe import RIVALS, against_moe
from infmoe.reproduce.page.elastic_experts import OF_K, each, expert_curves, experts, labelled, left_out
from infmoe.reproduce.page.elastic_keep import AGAINST, ELASTIC, FIXED, KEEP_PANELS, RATIOS, keep_ratios, short
from infmoe.reproduce.page.elastic_samples import sampling
from infmoe.reproduce.page.elastic_tuned import tuned
from infmoe.reproduce.page.figures import SHOWN, Gallery, Line
from infmoe.reproduce.page.section import (
    Section,
    command,
    markdown_table,
    mean_loss,
    seeds_text,
    text_of,
)
from infmoe.reproduce.places import SAMPLE_ARMS
from infmoe.reproduce.plan import (
    ELASTIC_EXPERTS,
    ELASTIC_TUNED,
    PASSES,
    SHORTER,
    TUNED_EXPERTS,
    further_tokens,
    shorter,
    tokens_text,
)
from infmoe.reproduce.statistics import Interval, interval, paired
from infmoe.reproduce.store import Finished, Store
from infmoe.train.config import hf_config

_ONE_PASS = ("infinity-keep4", "infinity-elastic")  # what rules of several passes are held against


def elastic(store: Store, gallery: Gallery) -> Section:
    """Training for elasticity, against fixed settings and against direct training."""
    section = Section("Elastic compute: one checkpoint over its dials", command("elastic", store.scale))
    parts = [
        keep_ratios(store, gallery, section),
        experts(store, gallery, section),
        sampling(store, section),
        tuned(store),
        _useful_ranges(store),
        _training_cost(store),
        _flops(store),
        against_moe(store, (("infinity", 2), *((arm, 1) for arm in (*FIXED, *ELASTIC)))),
        adaptive(store, section),
        _everything(store, gallery, section),
        _unmeasured(store),
    ]
    section.body = "\n\n".join(part for part in parts if part)
    return section


def _useful_ranges(store: Store) -> str:
    curves: dict[str, tuple[Curve, Callable[[Any], str]]] = {}
    for arm in (*FIXED, *ELASTIC):
        curves[f"{arm} (keep ratio)"] = over_ratio(store, arm), ratio_text
    for name, line in expert_curves(store).items():
        curves[f"{name} (k′)"] = line, str
    for arm in SAMPLE_ARMS:
        curves[f"{arm} (K)"] = over_samples(store, arm), str
    rows = []
    for name, (found, text) in curves.items():
        stretches = useful_ranges(found)
        if stretches:
            ends = [f"{text(s.low)} … {text(s.high)}" for s in stretches.values()]
            bests = [text(s.best) for s in stretches.values()]
            loss = interval([s.loss for s in stretches.values()])
            rows.append([name, each(bests), text_of(loss), each(ends), str(len(stretches))])
    if not rows:
        return ""
    head = ("method (dial)", "best at", "loss there, nats", f"within {RANGE:g} nats of it", "seeds")
    return (
        "**Useful range of each dial** (of the settings that were measured, seed by seed; one entry where all agree; "
        "around each method's own best, which may be a bad one)\n\n" + markdown_table(head, rows)
    )


def _training_cost(store: Store) -> str:
    """What each rule costs, and the rules that pass several times over every token at equal tokens and equal FLOPs."""
    tokens = store.scale.tokens
    rows = []
    for arm in (*FIXED, *ELASTIC, *SAMPLE_ARMS, *ELASTIC_EXPERTS):
        runs = store.runs(arm, tokens)
        if runs and (flops := _flops_per_token(runs[0])) is not None:
            config = runs[0].spec.config()
            plain = config.plain_steps / config.steps
            forward = plain * runs[0].cost["flops_executed"] + (1.0 - plain) * config.elastic.passes * flops
            rows.append(
                [
                    arm,
                    f"{config.mean_passes:.2g}",
                    f"{3.0 * forward * tokens:.3g}",
                    text_of(mean_loss(store, arm, tokens)),
                    seeds_text(runs),
                ]
            )
    if not rows:
        return ""
    head = ("arm", "passes a token", "training FLOPs", "loss at its own dials, nats", "seeds")
    parts = [
        f"**What training costs at {tokens_text(tokens)} tokens** (executed, forward and backward, 3 times the "
        "forward's, router counted; where a dial is drawn, the mean over what may be drawn)",
        markdown_table(head, rows),
        _several_passes(store),
    ]
    return "\n\n".join(part for part in parts if part)


def _flops_per_token(run: Finished) -> float | None:
    """Executed in a forward pass of training, on average over the dial's draws; None where they were not measured.

    The keep ratio changes nothing here: training skips no neuron.
    """
    lists = run.spec.config().elastic.lists
    dial = next((name for name in ("num_samples", "num_experts_per_tok") if name in lists), None)
    if dial is None:
        return run.cost["flops_executed"]
    at = {row[dial]: row["flops_executed"] for row in run.measure("dials") or () if row.get(dial) in lists[dial]}
    return statistics.fmean(at.values()) if at.keys() == set(lists[dial]) else None


def _several_passes(store: Store) -> str:
    """Rules of several passes against fixed and drawn ratios of one, at equal tokens and at equal training FLOPs."""
    tokens = store.scale.tokens
    rows = []
    for arm, passes in PASSES.items():
        samples, rivals = (2, ("infinity",)) if arm == "infinity-consistency" else (1, _ONE_PASS)
        lengths = {tokens: f"equal tokens, {passes:g} times the FLOPs"}
        if arm in SHORTER:
            lengths[shorter(arm, tokens)] = f"equal FLOPs, 1/{passes:g} of the tokens"
        for length, cost in lengths.items():
            ours = curve(store, arm, length, ratio_of(samples))
            for rival in rivals:
                theirs = curve(store, rival, tokens, ratio_of(samples))
                gaps = {r: paired(ours.get(r, {}), theirs.get(r, {})) for r in RATIOS}
                if any(gaps.values()):
                    seeds = max(gap.count for gap in gaps.values() if gap is not None)
                    cells = [text_of(gap, sign=True) for gap in gaps.values()]
                    rows.append([f"{arm} minus {rival}", cost, *cells, str(seeds)])
    if not rows:
        return ""
    head = ("several passes a token against one", "at", *(ratio_text(r) for r in RATIOS), "seeds")
    return "**Several passes a token against one** (paired by seed, nats)\n\n" + markdown_table(head, rows)


def _flops(store: Store) -> str:
    """What a token costs at each setting of a dial."""
    dials: dict[str, tuple[Callable[[str], Curve], Callable[[Any], str]]] = {
        "∞-MoE, K = 1, over the keep ratio": (lambda f: over_ratio(store, "infinity-keep4", figure=f), ratio_text),
        "∞-MoE, keep 1/4, over K": (lambda f: over_samples(store, "infinity", figure=f), lambda k: f"K = {k}"),
        "16 experts, over k′": (lambda f: over_k(store, "moe16-fine-k4-scaled", figure=f), lambda k: f"k′ = {k}"),
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


def _everything(store: Store, gallery: Gallery, section: Section) -> str:
    """Loss against ideal FLOPs for every method; the text says what the picture leaves out."""
    moe = {2: over_k(store, "moe").get(2, {})}
    references = {
        label(AGAINST): _over_flops(over_ratio(store, AGAINST), over_ratio(store, AGAINST, figure="flops_ideal")),
        label("moe"): _over_flops(moe, over_k(store, "moe", figure="flops_ideal")),
    }
    panels = [(title, lines) for title, lines in _methods(store).items() if any(lines.values())]
    if not panels:
        return ""
    picture = gallery.lines(
        "elastic.png",
        panels,
        x_label="ideal MFLOPs per token, forward, router counted",
        y_label="held-out loss (nats per token)",
        title=f"One checkpoint a line: loss against compute\n(95 % over seeds; up to {SHOWN} nats above the best)",
        few_ticks=True,
        rows=-(-len(panels) // 2),
        within=SHOWN,
        one_scale=True,
        own_legends=True,
        references={name: line for name, line in references.items() if line},
    )
    section.pictures.append(("Loss against ideal FLOPs", picture))
    return left_out(store, "of loss against ideal FLOPs", list(OF_K.values()))


def _methods(store: Store) -> dict[str, dict[str, Line]]:
    """Panel -> method -> loss over ideal MFLOPs per token."""
    panels: dict[str, dict[str, Line]] = {
        f"∞-MoE over the keep ratio: {title}": {
            short(arm): _over_flops(over_ratio(store, arm), over_ratio(store, arm, figure="flops_ideal"))
            for arm in arms
        }
        for title, arms in KEEP_PANELS.items()
    }
    over: dict[str, Line] = {}
    for arm in SAMPLE_ARMS:
        over[short(arm)] = _over_flops(over_samples(store, arm), over_samples(store, arm, figure="flops_ideal"))
        over[short(f"{arm}, z = μ")] = _over_flops(at_mu(store, arm), at_mu(store, arm, figure="flops_ideal"))
    panels["∞-MoE over the number of samples K"] = over
    lines = expert_curves(store)
    for k in OF_K:
        panels[f"16 experts, trained for k = {k} (direct: {2 * k})"] = {
            title: _over_flops(lines.get(name, {}), over_k(store, name.partition(",")[0], figure="flops_ideal"))
            for title, name in labelled(k).items()
        }
    few = further_tokens(store.scale)
    panels["16 experts, tuned for k = 4, a fifth more tokens"] = {
        short(arm): _over_flops(over_k(store, arm, tokens=few), over_k(store, arm, tokens=few, figure="flops_ideal"))
        for arm in TUNED_EXPERTS
    }
    return panels


def _over_flops(losses: Curve, flops: Curve) -> dict[float, Interval]:
    """Loss over millions of FLOPs; points without a measurement of these are left."""
    places = {at: interval(list(values.values())).mean / 1e6 for at, values in flops.items() if values}
    return {places[at]: value for at, value in means(losses).items() if at in places}


def _unmeasured(store: Store) -> str:
    """Planned arms that no run is of, and what the runs that there are were not measured for."""
    planned = dict.fromkeys((*FIXED, *ELASTIC, *ELASTIC_EXPERTS, *SAMPLE_ARMS), store.scale.tokens)
    planned |= dict.fromkeys(RIVALS, store.scale.tokens)
    planned |= dict.fromkeys(ELASTIC_TUNED, further_tokens(store.scale))
    absent = [f"`{arm}`" for arm, tokens in planned.items() if not store.runs(arm, tokens)]
    lacking: dict[str, dict[str, list[int]]] = {}
    for arm, tokens in planned.items():
        for run in store.runs(arm, tokens):
            for name in () if run.diverged else wanted(run.spec, hf_config(run.spec.config()), tasks=False):
                if run.measure(name) is None:
                    lacking.setdefault(name, {}).setdefault(arm, []).append(run.spec.seed)
    parts = [f"Not measured yet: {', '.join(absent)}."] if absent else []
    for name, arms in lacking.items():
        seeds = "; ".join(f"`{arm}` ({', '.join(map(str, found))})" for arm, found in arms.items())
        parts.append(f"Without `{name}`, with the seeds in brackets: {seeds}.")
    return " ".join(parts)
