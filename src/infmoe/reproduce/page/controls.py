"""The controls: every arm with what it costs, comparisons at equal budgets, and plain answers."""

from collections.abc import Mapping, Sequence
from typing import Any

from infmoe.layers.point import ratio_text
from infmoe.reproduce.arms import LARGER_START, RATE_FACTORS, arm_named, at_other_rates, label, titled
from infmoe.reproduce.page.answers import answers
from infmoe.reproduce.page.budgets import OURS, equal_budgets, equal_rates_note, equal_training, measured, rates_of
from infmoe.reproduce.page.figures import Gallery
from infmoe.reproduce.page.section import (
    MISSING,
    Claim,
    Section,
    at_dials,
    better,
    in_brackets,
    markdown_table,
    mean_loss,
    nats,
    relative,
    seeds_text,
    text_of,
    verdict_all_below,
)
from infmoe.reproduce.page.speeds import Time, speeds
from infmoe.reproduce.plan import FURTHER_RIVALS, LONG_RATES, STARTS, TIER1, TIER2, RunSpec, tokens_text
from infmoe.reproduce.statistics import Interval, interval, paired
from infmoe.reproduce.store import Store

_SHOWN = tuple(dict.fromkeys((*TIER1, *TIER2, *FURTHER_RIVALS)))
_SAME_WORK = ("infinity", "infinity-wz-decay0", "infinity-wz-lr-half", "infinity-wz-lr-double")


def controls(store: Store, gallery: Gallery) -> Section:
    """Everything that is not ∞-MoE as the paper has it."""
    scale = store.scale
    source = "--corpus NOVELS" if scale.vocab else "--data FINEWEB"
    section = Section("Controls, at equal budgets", f"infmoe reproduce controls --scale {scale.name} {source}")
    parts = [
        _all_arms(store),
        _seeds_line(store),
        _rates(store),
        _starts(store, section),
        _longer(store),
        equal_budgets(store, section),
        equal_training(store, section),
        answers(store, section),
        _keep_ratios(store, gallery, section),
        _mask_scales(store, section),
    ]
    section.body = "\n\n".join(part for part in parts if part)
    differences = {
        name: difference
        for name in _SHOWN
        if name != OURS and (difference := store.difference(OURS, name, scale.tokens)) is not None
    }
    if differences:
        ordered = dict(sorted(differences.items(), key=lambda item: item[1].mean))
        picture = gallery.bars(
            "controls.png",
            {label(name): difference for name, difference in ordered.items()},
            x_label=f"∞-MoE's held-out loss minus theirs, {tokens_text(scale.tokens)} tokens (nats; 95 %, by seed)",
            title="Left of 0: ∞-MoE is better",
        )
        section.pictures.append((section.title, picture))
    return section


def _all_arms(store: Store) -> str:
    scale = store.scale
    times = speeds(store)
    rows = []
    for name in _SHOWN:
        runs = store.runs(name, scale.tokens)
        if not runs:
            rows.append([titled(name), *["–"] * 7, MISSING, "–", "0"])
            continue
        cost, lr = runs[0].cost, runs[0].spec.lr
        speed = times.get(name, {})
        rows.append(
            [
                titled(name),
                f"{cost['total'] / 1e6:.2f}",
                f"{cost['total_with_wz'] / 1e6:.2f}",
                f"{cost['flops_executed'] / 1e6:.2f}",
                f"{measured(runs[0], 'flops_ideal') / 1e6:.2f}",
                f"{_quartiles(speed.get('train_us'), 0)} / {_quartiles(speed.get('train_us_fp32'), 0)}",
                _quartiles(speed.get("decode_ms"), 2),
                f"{lr:g}",
                text_of(mean_loss(store, name, scale.tokens)),
                "" if name == OURS else text_of(store.difference(OURS, name, scale.tokens), sign=True),
                seeds_text(runs),
            ]
        )
    head = (
        *("arm", "parameters, M", "with W_z, routers", "MFLOPs per token, executed", "ideal"),
        *("training, µs per token, bf16 / fp32", "decoding, ms per token, fp32", "learning rate"),
        *(f"loss at {tokens_text(scale.tokens)} tokens, nats", "∞-MoE minus it", "seeds"),
    )
    notes = ["FLOPs: forward, whole model, router counted; ideal: only the measured union of a token's masks."]
    if times:
        notes.append(
            "Times: median and quartiles of `infmoe bench variants --out results/variants.json`, two threads, on the "
            f"machine named there{_equal_work(times)}."
        )
    if scale.lr_grid:
        notes.append(
            f"Learning rates: the best of the grid on a seed of its own at {tokens_text(scale.tune_tokens)} tokens, or "
            "that of the arm it is a variation of (below); the same at every length."
        )
    return f"{markdown_table(head, rows)}\n\n{' '.join(notes)}"


def _equal_work(times: Mapping[str, Mapping[str, Any]]) -> str:
    """How far apart the times of arms lie that do the same work: what a difference must exceed to be one."""
    same = [times[name]["train_us"].median for name in _SAME_WORK if "train_us" in times.get(name, {})]
    if len(same) < 2:
        return ""
    apart = max(same) / min(same) - 1
    return f"; {len(same)} arms that do the same work ({', '.join(_SAME_WORK)}) lie up to {apart:.0%} apart in training"


def _seeds_line(store: Store) -> str:
    """How far the seeds of tier 1 have come."""
    scale = store.scale
    first, *others = TIER1
    widths = {name: d for name in others if (d := store.difference(first, name, scale.tokens)) is not None}
    if not widths or any(d.half_width is None for d in widths.values()):
        return ""
    shown = ", ".join(f"{name} ± {d.half_width:.3f} ({d.count})" for name, d in widths.items())
    least = store.spread
    if least is None:
        hope = ""
    else:
        width = least.half_width(scale.seeds[1])
        enough = "would be enough" if width <= scale.half_width else "would not be enough"
        hope = f" If they spread as all arms do, {scale.seeds[1]} give ± {width:.3f}, which {enough}."
    return (
        f"Seeds of the first five are added until every interval is ± {scale.half_width:g} nats or narrower, "
        f"{scale.seeds[1]} at most; so far, with the seeds in brackets: {shown}.{hope}"
    )


def _rates(store: Store) -> str:
    """Arms at equal learning rates: the grid's best of two need not be the same."""
    scale = store.scale
    found: dict[str, dict[float, tuple[str, Interval]]] = {}
    for name in RATE_FACTORS:
        for lr, arm in _by_rate(store, name).items():
            loss = mean_loss(store, arm, scale.tokens)
            if loss is not None:
                found.setdefault(name, {})[lr] = arm, loss
    rates = sorted({lr for at in found.values() for lr in at})
    if not any(len(at) > 1 for at in found.values()):
        return ""
    rows = []
    for name, at in found.items():
        cells = []
        for lr in rates:
            ours = found.get(OURS, {}).get(lr)
            gap = store.difference(ours[0], at[lr][0], scale.tokens) if lr in at and ours else None
            own = f"{text_of(at[lr][1])} ({at[lr][1].count})" if lr in at else "–"
            cells += [own, "" if name == OURS else text_of(gap, sign=True)]
        rows.append([name, *cells])
    head = ("arm", *(text for lr in rates for text in (f"loss at learning rate {lr:g}, nats", "∞-MoE minus it")))
    return "**At equal learning rates** (seeds in brackets)\n\n" + markdown_table(head, rows) + _missed_rates(store)


def _missed_rates(store: Store) -> str:
    """The arms that do better at a rate that their grid did not choose."""
    scale = store.scale
    pairs = {name: arm for name in RATE_FACTORS for arm in at_other_rates(name)}
    gaps = {name: gap for name, arm in pairs.items() if (gap := store.difference(arm, name, scale.tokens)) is not None}
    missed = [
        f"{name} {text_of(gap, sign=True)} ({store.lr(arm_named(pairs[name])):g})"
        for name, gap in gaps.items()
        if gap.mean < 0
    ]
    if not gaps:
        return ""
    return (
        f"\n\nThe grids are of {tokens_text(scale.tune_tokens)} tokens{_warmups(store)}. At "
        f"{tokens_text(scale.tokens)}, {len(missed)} "
        f"of {len(gaps)} arms do better at the other rate than at the grid's choice{_decided(list(gaps.values()))}"
        + (f" (by, at the rate in brackets: {'; '.join(missed)})" if missed else "")
        + f"; arms that were run at the choice alone may too, and runs of {tokens_text(scale.long_tokens)} tokens take "
        f"the same choice, but for {', '.join(f'`{name}`' for name in LONG_RATES)}."
    )


def _warmups(store: Store) -> str:
    """How many steps the learning rate rises for in a tuning run, and in what is reported."""
    scale = store.scale
    arm = arm_named(OURS)
    grid, ours = (
        RunSpec(scale, arm, tokens, 1.0, 0).config().schedule.warmup_steps
        for tokens in (scale.tune_tokens, scale.tokens)
    )
    if grid == ours:
        return ""
    return f" with a warm-up of {grid} steps ({ours} at {tokens_text(scale.tokens)})"


def _starts(store: Store, section: Section) -> str:
    """Tier 1 with larger weights at the start, at every learning rate that was run, and a weaker balance loss."""
    scale = store.scale
    rows = []
    for name in STARTS:
        started = "initializer_range" in arm_named(name).model
        base = arm_named(name).tuned_as or name
        ours = f"{OURS}-start" if started else OURS
        for rate, arm in sorted(_by_rate(store, name).items()):
            loss = mean_loss(store, arm, scale.tokens)
            before, rival, first = (_by_rate(store, other).get(rate) for other in (base, ours, OURS))
            rows.append(
                [
                    titled(name),
                    f"{rate:g}",
                    text_of(loss),
                    text_of(_gap(store, arm, before), sign=True),
                    "" if name == ours else text_of(_gap(store, rival, arm), sign=True),
                    "" if base == OURS else text_of(_gap(store, first, before), sign=True),
                    seeds_text(store.runs(arm, scale.tokens)),
                ]
            )
        if started and base != OURS and _by_rate(store, name):
            section.claims.append(_start_claim(store, base, name))
    if not rows:
        return ""
    head = (
        *("arm", "learning rate", "loss, nats", "minus the same arm as it was"),
        *("∞-MoE, so changed too, minus it", "as they were", "seeds"),
    )
    return (
        f"**Larger weights at the start** (standard deviation {LARGER_START:g} in place of GPT-2's 0.02, which is for "
        "its width of 768. At 0.02 and a width of 128 layers are nearly linear at first, and gated ones start small "
        "([deviations](deviations.md)); the Gaussian router's maps know the width. Differences are at equal learning "
        "rates; the grids are of 0.02), **and a weaker balance loss** (0.001 in place of 0.01)\n\n"
        + markdown_table(head, rows)
    )


def _start_claim(store: Store, base: str, name: str) -> Claim:
    """∞-MoE against an arm, both from larger weights: each at the better of the learning rates that it was run at."""
    ours, its = (_best_rate(store, arm) for arm in (f"{OURS}-start", name))
    gap = _gap(store, ours, its)
    notes = [f"at GPT-2's 0.02: {nats(store.difference(OURS, base, store.scale.tokens))}"]
    if gap is not None:
        tried = [len(_by_rate(store, arm)) for arm in (f"{OURS}-start", name)]
        each = "each at the better of two learning rates" if tried == [2, 2] else "at learning rates tuned at 0.02"
        notes.append(f"{each}: {rates_of(store, str(ours), str(its))}")
        equal = equal_rates_note(store, f"{OURS}-start", name, but=(str(ours), str(its)))
        notes += [equal] if equal else []
    text = f"∞-MoE against {label(base)}, the weights of both larger at the start"
    return Claim(text, nats(gap), better(gap), "; ".join(notes), ours=True)


def _by_rate(store: Store, name: str) -> dict[float, str]:
    """Learning rate -> this arm, or the one that it is at another rate, of those that were run at standard length."""
    arms = (name, *at_other_rates(name))
    return {lr: arm for arm in arms if (lr := _rate(store, arm, store.scale.tokens)) is not None}


def _best_rate(store: Store, name: str) -> str | None:
    """The one of `_by_rate` with the lowest loss."""
    arms = _by_rate(store, name).values()
    losses = {arm: loss.mean for arm in arms if (loss := mean_loss(store, arm, store.scale.tokens)) is not None}
    return min(losses, key=lambda arm: losses[arm], default=None)


def _gap(store: Store, first: str | None, second: str | None) -> Interval | None:
    """The paired difference of two arms at standard length; None where one of them was not run."""
    return None if first is None or second is None else store.difference(first, second, store.scale.tokens)


def _decided(gaps: Sequence[Interval]) -> str:
    """How many differences of one seed lie beyond the spread of the arms that have more."""
    pooled = [gap for gap in gaps if gap.pooled is not None]
    if not pooled:
        return ""
    beyond = sum(gap.mean < -gap.pooled for gap in pooled if gap.pooled is not None)
    return f", {beyond} of them beyond ± {pooled[0].pooled:.3f}"


def _longer(store: Store) -> str:
    """Tier 1 after the longer training, ∞-MoE at the rates of both kinds of rivals."""
    tokens = store.scale.long_tokens
    ours = {lr: name for name in (OURS, *LONG_RATES) if (lr := _rate(store, name, tokens)) is not None}
    rows = []
    for name in (*TIER1, *LONG_RATES):
        lr = _rate(store, name, tokens)
        if lr is None and name in LONG_RATES:
            continue
        mine = name in ours.values()
        equal = ours.get(lr) if lr is not None else None
        rows.append(
            [
                name,
                "–" if lr is None else f"{lr:g}",
                text_of(mean_loss(store, name, tokens)),
                "" if mine else text_of(store.difference(OURS, name, tokens), sign=True),
                "" if mine else text_of(store.difference(equal, name, tokens) if equal else None, sign=True),
                seeds_text(store.runs(name, tokens)),
            ]
        )
    head = (
        *("arm", "learning rate", f"loss at {tokens_text(tokens)} tokens, nats", "∞-MoE minus it"),
        *("∞-MoE at the same rate minus it", "seeds"),
    )
    return f"**At {tokens_text(tokens)} tokens**\n\n" + markdown_table(head, rows)


def _rate(store: Store, name: str, tokens: int) -> float | None:
    """The learning rate of an arm's runs at a length."""
    runs = store.runs(name, tokens)
    return runs[0].spec.lr if runs else None


def _keep_ratios(store: Store, gallery: Gallery, section: Section) -> str:
    """Loss over the keep ratio, of models trained at 1/4, 1/8 and 1/16."""
    tokens = store.scale.tokens
    lines: dict[str, dict[float, Interval]] = {}
    for name, trained in ((OURS, 1 / 4), ("infinity-keep8", 1 / 8), ("infinity-keep16", 1 / 16)):
        found: dict[float, list[float]] = {}
        for run in store.runs(name, tokens):
            for row in run.measure("dials") or ():
                if row.get("mode") is None and row.get("num_samples") == run.values["config"]["model"]["num_samples"]:
                    found.setdefault(row["keep_ratio"], []).append(row["loss"])
        if found:
            lines[f"trained at {ratio_text(trained)}"] = {r: interval(v) for r, v in sorted(found.items())}
    if not lines:
        return ""
    ratios = sorted({ratio for line in lines.values() for ratio in line})
    rows = [[name, *(text_of(line.get(ratio)) for ratio in ratios)] for name, line in lines.items()]
    picture = gallery.lines(
        "keep_ratios.png",
        [("", lines)],
        x_label="share of the neurons that a sample keeps",
        y_label="held-out loss (nats per token)",
        title="One checkpoint over the keep ratio (95 % over seeds)",
    )
    section.pictures.append(("Loss over the keep ratio", picture))
    head = ("loss, nats", *(ratio_text(r) for r in ratios))
    return (
        "**The keep ratio at inference** (each at its own K: 2 where trained at 1/4, 1 at 1/8 and 1/16; all three at "
        "K = 1 stand under elastic compute)\n\n" + markdown_table(head, rows)
    )


def _mask_scales(store: Store, section: Section) -> str:
    """Rules for the size of the mask away from the trained ratio."""
    tokens = store.scale.tokens
    _mask_scale_claim(store, section)
    rows = []
    ratios: Sequence[float] = ()
    for rule, measure in (("none", "dials"), ("fixed", "mask_scales"), ("rms", "mask_scales")):
        line = relative(
            store,
            OURS,
            tokens,
            measure,
            lambda row, rule=rule: (  # type: ignore[misc]
                row.get("mask_scale", "none") == rule and row.get("mode") is None and row.get("num_samples") == 2
            ),
            lambda row: at_dials(row, keep_ratio=0.25, num_samples=2),
            lambda row: row["keep_ratio"],
        )
        if not line:
            return ""
        ratios = sorted(line)
        rows.append([rule, *(text_of(line[ratio], sign=True) for ratio in ratios)])
    head = ("`mask_scale`", *(ratio_text(ratio) for ratio in ratios))
    return (
        "**The mask's size away from the trained ratio** (∞-MoE, K = 2; loss minus that at 1/4, nats): left alone, "
        "kept for Gaussian scores, or kept token by token\n\n" + markdown_table(head, rows)
    )


def _mask_scale_claim(store: Store, section: Section) -> None:
    """Whether a rule for the mask's size is better than none, far from the trained ratio."""
    lines: dict[str, dict[float, dict[int, float]]] = {"none": {}, "rms": {}}
    for run in store.runs(OURS, store.scale.tokens):
        for row in (*(run.measure("dials") or ()), *(run.measure("mask_scales") or ())):
            rule = row.get("mask_scale", "none")
            if rule in lines and row.get("mode") is None and row.get("num_samples") == 2:
                lines[rule].setdefault(row["keep_ratio"], {})[run.spec.seed] = row["loss"]
    gaps = {r: gap for r, ours in lines["rms"].items() if (gap := paired(ours, lines["none"].get(r, {}))) is not None}
    text = "keeping the mask's size (`mask_scale=rms`) helps below the trained keep ratio"
    low = sorted(ratio for ratio in gaps if ratio < 1 / 4)
    if not low:
        section.claims.append(Claim(text, "–", MISSING, ours=True))
        return
    shown = ", ".join(f"{text_of(gaps[ratio], sign=True)} at {ratio_text(ratio)}" for ratio in low)
    verdict = verdict_all_below([gaps[ratio] for ratio in low])
    section.claims.append(Claim(text, f"{shown} nats{in_brackets(gaps[low[0]])}", verdict, ours=True))


def _quartiles(time: Time | None, digits: int) -> str:
    return "–" if time is None else f"{time.median:.{digits}f} ({time.q1:.{digits}f} … {time.q3:.{digits}f})"
