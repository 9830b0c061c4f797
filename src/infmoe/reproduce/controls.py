"""The controls: every arm with what it costs, comparisons at equal budgets, and plain answers."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from infmoe.layers.point import ratio_text
from infmoe.reproduce.arms import RATE_FACTORS, arm_named, label, titled
from infmoe.reproduce.figures import Gallery
from infmoe.reproduce.plan import OTHER_RATES, TIER1, TIER2, tokens_text
from infmoe.reproduce.section import (
    FAILS,
    HOLDS,
    MISSING,
    NOT_RUN,
    SHARED,
    Claim,
    Section,
    at_dials,
    better,
    lies_above,
    markdown_table,
    mean_loss,
    nats,
    of_seeds,
    relative,
    seeds_text,
    text_of,
)
from infmoe.reproduce.speeds import Time, speeds
from infmoe.reproduce.statistics import Interval, interval, paired
from infmoe.reproduce.store import Finished, Store

OURS = "infinity"
# budget -> how much of it a run takes; rivals within a tenth of ours count as equal
BUDGETS: dict[str, Callable[[Finished], float]] = {
    "total parameters, W_z and discrete routers left out (the paper's)": lambda run: run.cost["total"],
    "total parameters, all counted": lambda run: run.cost["total_with_wz"],
    "active parameters, W_z and discrete routers left out (the paper's)": lambda run: run.cost["active"],
    "weights used per token: the masks' measured union, all counted": lambda run: measured(run, "weights_ideal"),
    "executed FLOPs per token": lambda run: run.cost["flops_executed"],
    "ideal FLOPs per token: the masks' measured union": lambda run: measured(run, "flops_ideal"),
}


def measured(run: Finished, name: str) -> float:
    """What a token costs by the measured union of its masks."""
    held_out = run.measure("held_out")
    return held_out[0][name] if held_out and name in held_out[0] else run.cost[name]


_EQUAL = 0.1
_CLAIMED_PARTS = 8  # of what the gain is made of, in the opening table
_GATE_AT_OURS = "infinity-glu-lr0.5x"  # the dense gate at the rate that was chosen for ∞-MoE
_ALIVE, _SHRUNK = 0.05, 2.0
_SAME_WORK = ("infinity", "infinity-wz-decay0", "infinity-wz-lr-half", "infinity-wz-lr-double")
# ∞-MoE as the paper has it, and what may stand for it where a budget is smaller: fewer samples, fewer units
_STAND_INS = {
    OURS: "K = 2, 1/4",
    "infinity-keep4": "K = 1, 1/4",
    "infinity-keep8": "K = 1, 1/8",
    "infinity-keep16": "K = 1, 1/16",
}
_RIVALS = ("dense", "switch", "moe")  # what an arm's name begins with


def controls(store: Store, gallery: Gallery) -> Section:
    """Everything that is not ∞-MoE as the paper has it."""
    scale = store.scale
    source = "--corpus NOVELS" if scale.vocab else "--data FINEWEB"
    section = Section("Controls, at equal budgets", f"infmoe reproduce controls --scale {scale.name} {source}")
    parts = [
        _all_arms(store),
        _seeds_line(store),
        _rates(store),
        _longer(store),
        _equal_budgets(store, section),
        _equal_training(store, section),
        _answers(store, section),
        _keep_ratios(store, gallery, section),
        _mask_scales(store),
    ]
    section.body = "\n\n".join(part for part in parts if part)
    differences = {
        name: difference
        for name in (*TIER1, *TIER2)
        if name != OURS and (difference := store.difference(name, OURS, scale.tokens)) is not None
    }
    if differences:
        ordered = dict(sorted(differences.items(), key=lambda item: item[1].mean))
        picture = gallery.bars(
            "controls.png",
            {label(name): difference for name, difference in ordered.items()},
            x_label=f"held-out loss minus ∞-MoE's at {tokens_text(scale.tokens)} tokens (nats; 95 %, paired by seed)",
            title="Left of 0: better than ∞-MoE",
        )
        section.pictures.append((section.title, picture))
    return section


def _all_arms(store: Store) -> str:
    scale = store.scale
    times = speeds(store)
    rows = []
    for name in (*TIER1, *TIER2):
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
    return markdown_table(head, rows) + (
        "\n\nFLOPs: forward, whole model, router counted; ideal: only the measured union of a token's masks. "
        "Times: median and quartiles of `infmoe bench variants --out results/variants.json`, two threads, on the "
        f"machine named there{_equal_work(times)}. Learning rates: the best of the grid on a seed of its own at "
        f"{tokens_text(scale.tune_tokens)} tokens, or that of the arm it is a variation of (below); the same at every "
        "length."
    )


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
    return (
        f"Seeds of the first five are added until every interval is ± {scale.half_width:g} nats or narrower, "
        f"{scale.seeds[1]} at most; so far, with the seeds in brackets: {shown}."
    )


def _rates(store: Store) -> str:
    """Arms at equal learning rates: the grid's best of two need not be the same."""
    scale = store.scale
    found: dict[str, dict[float, tuple[str, Interval]]] = {}
    for name in RATE_FACTORS:
        for arm in (name, *(other for other in OTHER_RATES if other.startswith(f"{name}-lr"))):
            loss, lr = mean_loss(store, arm, scale.tokens), store.lr(arm_named(arm))
            if loss is not None and lr is not None:
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
    pairs = {name: f"{name}-lr{factor:g}x" for name, factor in RATE_FACTORS.items()}
    gaps = {name: gap for name, arm in pairs.items() if (gap := store.difference(arm, name, scale.tokens)) is not None}
    missed = [
        f"{name} {text_of(gap, sign=True)} ({store.lr(arm_named(pairs[name])):g})"
        for name, gap in gaps.items()
        if gap.mean < 0
    ]
    if not gaps:
        return ""
    return (
        f"\n\nThe grids are of {tokens_text(scale.tune_tokens)} tokens. At {tokens_text(scale.tokens)}, {len(missed)} "
        f"of {len(gaps)} arms do better at the other rate than at the grid's choice"
        + (f" (by, at the rate in brackets: {'; '.join(missed)})" if missed else "")
        + f"; arms that were run at the choice alone may too, and every run of {tokens_text(scale.long_tokens)} tokens "
        "takes the same choice."
    )


def _longer(store: Store) -> str:
    tokens = store.scale.long_tokens
    rows = [
        [
            name,
            text_of(mean_loss(store, name, tokens)),
            "" if name == OURS else text_of(store.difference(OURS, name, tokens), sign=True),
            seeds_text(store.runs(name, tokens)),
        ]
        for name in TIER1
    ]
    head = ("arm", f"loss at {tokens_text(tokens)} tokens, nats", "∞-MoE minus it", "seeds")
    return f"**At {tokens_text(tokens)} tokens**\n\n" + markdown_table(head, rows)


def _equal_budgets(store: Store, section: Section) -> str:
    tokens = store.scale.tokens
    names = dict.fromkeys((*TIER1, *TIER2, *_FINE, *_STAND_INS))
    first = {name: runs[0] for name in names if (runs := store.runs(name, tokens))}
    rows = []
    for budget, of in BUDGETS.items():
        if OURS not in first:
            continue
        found = []
        for name in first:
            if not name.startswith(_RIVALS) or (nearest := _nearest(first, name, of)) is None:
                continue
            ours, share = nearest
            difference = store.difference(ours, name, tokens)
            seeds = "0" if difference is None else str(difference.count)
            found.append([budget, _STAND_INS[ours], name, f"{share:.2f}", text_of(difference, sign=True), seeds])
        rows += found or [[budget, "–", "none within a tenth", "–", "–", "–"]]
    for rival, title in _CLAIMED_RIVALS.items():
        for budget in _BUDGETS_CLAIMED:
            section.claims.append(_budget_claim(store, first, rival, title, budget))
    head = ("budget", "∞-MoE with", "rival", "the rival's, over ∞-MoE's", "loss of ∞-MoE minus it, nats", "seeds")
    if not rows:
        return ""
    return (
        "**At equal budgets** (a rival within a tenth of ∞-MoE's; ∞-MoE as the paper has it, K = 2 at 1/4, or one of "
        "the arms trained with less, whichever comes nearest)\n\n" + markdown_table(head, rows)
    )


def _nearest(first: Mapping[str, Finished], rival: str, of: Callable[[Finished], float]) -> tuple[str, float] | None:
    """The ∞-MoE whose budget is nearest to the rival's, with the rival's share of it; None beyond a tenth."""
    shares = {name: of(first[rival]) / of(first[name]) for name in _STAND_INS if name in first}
    ours = min(shares, key=lambda name: round(abs(math.log(shares[name])), 6))
    return (ours, shares[ours]) if abs(shares[ours] - 1) <= _EQUAL else None


_FINE = ("moe16-fine-k4-scaled", "moe16-fine-k8-scaled")
_CLAIMED_RIVALS = {
    "moe": "MoE (4 experts, top-2)",
    "moe16-fine-k8-scaled": "MoE of 16 narrow experts, its output as large at the start",
    "dense-swiglu": "dense SwiGLU",
}
# of one kind, the first where several are as near
_KIN = {
    "moe16-fine-k8-scaled": ("moe16-fine-k8-scaled", "moe16-fine-k4-scaled"),
    "moe": ("moe", "moe-scaled", "moe-plus"),
    "dense-swiglu": ("dense-swiglu", "dense-swiglu-active", "dense-swiglu-plus"),
}
# budgets of the opening table's claims
_BUDGETS_CLAIMED = {
    "total parameters, W_z and discrete routers left out (the paper's)": "equal total parameters, W_z left out",
    "executed FLOPs per token": "equal executed FLOPs per token",
    "ideal FLOPs per token: the masks' measured union": "equal ideal FLOPs per token",
}


def _budget_claim(store: Store, first: Mapping[str, Finished], rival: str, title: str, budget: str) -> Claim:
    """∞-MoE against the arm of this kind whose budget comes nearest to one of ∞-MoE's."""
    text = f"∞-MoE against {title} at {_BUDGETS_CLAIMED[budget]}"
    kin = [name for name in _KIN[rival] if name in first]
    if OURS not in first or rival not in first:
        return Claim(text, "–", MISSING, ours=True)
    of = BUDGETS[budget]
    pairs = {name: nearest for name in kin if (nearest := _nearest(first, name, of)) is not None}
    if not pairs:
        shares = {_STAND_INS[name]: of(first[name]) / of(first[rival]) for name in _STAND_INS if name in first}
        over = "; ".join(f"{share:.2f} ({dials})" for dials, share in shares.items())
        return Claim(text, "–", NOT_RUN, f"no arm within a tenth; ∞-MoE takes, of the rival's: {over}", ours=True)
    name = min(pairs, key=lambda name: (round(abs(math.log(pairs[name][1])), 2), kin.index(name)))
    ours = pairs[name][0]
    difference = store.difference(ours, name, store.scale.tokens)
    note = f"∞-MoE with {_STAND_INS[ours]}" + ("" if name == rival else f", against `{name}`")
    return Claim(text, nats(difference), better(difference), note, ours=True)


def _equal_training(store: Store, section: Section) -> str:
    """Rivals trained for as long as ∞-MoE, in FLOPs or seconds: on more tokens, between two lengths that were run."""
    scale = store.scale
    times = speeds(store)
    rows = []
    for name in TIER1:
        runs, ours = store.runs(name, scale.tokens), store.runs(OURS, scale.tokens)
        if name == OURS or not runs or not ours or not store.runs(name, scale.long_tokens):
            continue
        flops = ours[0].cost["flops_executed"] / runs[0].cost["flops_executed"]
        ratios = {"executed training FLOPs": (flops, flops)}
        mine, its = (_quickest(times.get(n, {})) for n in (OURS, name))
        if mine and its:
            ratios["measured training time, each in its quicker precision"] = mine[0] / its[1], mine[1] / its[0]
        for budget, ends in ratios.items():
            found = [_at_ratio(store, name, ratio) for ratio in dict.fromkeys(ends)]
            over = " … ".join(f"{ratio:.2f}" for ratio in dict.fromkeys(ends))
            known = [difference for difference in found if difference is not None]
            count = str(known[0].count) if known else "0"
            shown = " … ".join("not run at that length" if d is None else text_of(d, sign=True) for d in found)
            rows.append([budget, name, over, shown, count])
            if name in _CLAIMED_RIVALS:
                text = f"∞-MoE against {_CLAIMED_RIVALS[name]} at equal {budget}"
                note = f"the rival on {over} times the tokens, between two lengths that were run"
                seeds = f" nats ({of_seeds(known[0])})" if known else ""
                section.claims.append(Claim(text, shown + seeds, _verdict_of_ends(found), note, ours=True))
    if not rows:
        return ""
    head = ("budget", "rival", "its tokens over ∞-MoE's", "loss of ∞-MoE minus it, nats", "seeds")
    return (
        "**At equal training cost** (the rival's loss between its two lengths, linear in the logarithm of the tokens; "
        "of a measured time, from the most that its quartiles give the one to the most that they give the other)\n\n"
        + markdown_table(head, rows)
    )


def _verdict_of_ends(differences: Sequence[Interval | None]) -> str:
    """The verdict on a difference that lies between two, each better below 0."""
    verdicts = {NOT_RUN if difference is None else better(difference) for difference in differences}
    signs = {math.copysign(1.0, difference.mean) for difference in differences if difference is not None}
    if len(signs) > 1:
        return "not decided: the sign hangs on the time"
    return verdicts.pop() if len(verdicts) == 1 else "not decided: the time is not known well enough"


def _quickest(speed: Mapping[str, Any]) -> tuple[float, float] | None:
    """The quartiles of the time of a token's training, in the precision of the lower median; None: not measured."""
    found = [speed[key] for key in ("train_us", "train_us_fp32") if key in speed]
    best = min(found, key=lambda time: time.median, default=None)
    return None if best is None else (best.q1, best.q3)


def _at_ratio(store: Store, name: str, ratio: float) -> Interval | None:
    """∞-MoE minus a rival that is trained on so many times its tokens; None beyond the lengths that were run."""
    scale = store.scale
    if not 1.0 <= ratio <= scale.long_tokens / scale.tokens:
        return None
    return paired(store.losses(OURS, scale.tokens), _at_tokens(store, name, scale.tokens * ratio))


def _at_tokens(store: Store, name: str, tokens: float) -> dict[int, float]:
    scale = store.scale
    short, long = store.losses(name, scale.tokens), store.losses(name, scale.long_tokens)
    share = math.log(tokens / scale.tokens) / math.log(scale.long_tokens / scale.tokens)
    return {seed: (1 - share) * short[seed] + share * long[seed] for seed in short.keys() & long.keys()}


def _answers(store: Store, section: Section) -> str:
    scale = store.scale
    parts = {
        "the gate: a dense gate of rank d_z (`infinity-glu`) against none (`dense-wide`)": (
            "infinity-glu",
            "dense-wide",
        ),
        "the sparsity: top-N of that gate (`infinity-sigma0`) against all of it": ("infinity-sigma0", "infinity-glu"),
        "the sparsity, at equal learning rates": ("infinity-sigma0", _GATE_AT_OURS),
        "the noise and a second sample: ∞-MoE against σ = 0": (OURS, "infinity-sigma0"),
        "the noise: ∞-MoE with one sample against σ = 0": ("infinity-keep4", "infinity-sigma0"),
        "a second sample: ∞-MoE against one sample": (OURS, "infinity-keep4"),
        "sparsity, noise and a second sample together: ∞-MoE against the dense gate": (OURS, "infinity-glu"),
        "the three together, at equal learning rates": (OURS, _GATE_AT_OURS),
        "the sparsity, with the noise: ∞-MoE against keeping every neuron": (OURS, "infinity-no-topn"),
        "learning W_z: ∞-MoE against W_z as drawn": (OURS, "infinity-frozen-wz"),
        "a MoE that starts as large as a dense layer: gates that sum to 2 against 1": ("moe-scaled", "moe"),
        "∞-MoE against that MoE": (OURS, "moe-scaled"),
        "learning a discrete router: MoE against hashing token ids": ("moe", "moe-hash"),
        "∞-MoE over SwiGLU neurons against plain SwiGLU": ("infinity-swiglu", "dense-swiglu"),
        "∞-MoE over SwiGLU neurons against over GELU neurons": ("infinity-swiglu", OURS),
        "masks over blocks of 16 neurons against single ones": ("infinity-blocks16", OURS),
        "masks over blocks of 32": ("infinity-blocks32", OURS),
        "masks over blocks of 64": ("infinity-blocks64", OURS),
        "an eighth kept against a quarter, one sample": ("infinity-keep8", "infinity-keep4"),
        "a sixteenth kept against a quarter, one sample": ("infinity-keep16", "infinity-keep4"),
        "W_z without weight decay": ("infinity-wz-decay0", OURS),
        "W_z at half the learning rate": ("infinity-wz-lr-half", OURS),
        "W_z at twice the learning rate": ("infinity-wz-lr-double", OURS),
    }
    if not scale.lr_grid:  # one rate for all arms
        parts = {text: pair for text, pair in parts.items() if _GATE_AT_OURS not in pair}
    rows = []
    for text, (arm, base) in parts.items():
        difference = store.difference(arm, base, scale.tokens)
        count = "0" if difference is None else str(difference.count)
        rates = dict.fromkeys(
            f"{runs[0].spec.lr:g}" for name in (arm, base) if (runs := store.runs(name, scale.tokens))
        )
        rows.append([text, text_of(difference, 4, sign=True), " and ".join(rates) if difference else "–", count])
    for text, (arm, base) in list(parts.items())[:_CLAIMED_PARTS]:
        difference = store.difference(arm, base, scale.tokens)
        note = "" if difference is None else _unequal(store, arm, base)
        section.claims.append(Claim(text, nats(difference), better(difference), note, ours=True))
    head = ("what is worth how much", "change of the loss, nats", "learning rate", "seeds")
    return (
        "**What the gain is made of** (below 0: the first is better)\n\n"
        + markdown_table(head, rows)
        + _gate_note(store)
        + "\n\n"
        + _sigma(store, section)
    )


def _unequal(store: Store, arm: str, base: str) -> str:
    """What a comparison of two arms leaves unequal by more than a tenth, learning rates included."""
    (ours, *_), (theirs, *_) = (store.runs(name, store.scale.tokens) for name in (arm, base))
    shares = {
        "parameters": ours.cost["total_with_wz"] / theirs.cost["total_with_wz"],
        "executed FLOPs": ours.cost["flops_executed"] / theirs.cost["flops_executed"],
    }
    unequal = [f"{share:.2f} times the {name}" for name, share in shares.items() if abs(share - 1) > _EQUAL]
    if ours.spec.lr != theirs.spec.lr:
        unequal.append(f"learning rates {ours.spec.lr:g} and {theirs.spec.lr:g}")
    return ", ".join(unequal)


def _gate_note(store: Store) -> str:
    """What the comparison of the gate leaves unequal."""
    gate, none = (store.runs(arm, store.scale.tokens) for arm in ("infinity-glu", "dense-wide"))
    if not gate or not none:
        return ""
    parameters, flops = (gate[0].cost[key] / none[0].cost[key] for key in ("total_with_wz", "flops_executed"))
    return (
        f"\n\nThe dense gate comes with {parameters:.2f} times the parameters of the plain layer and {flops:.2f} times "
        "its FLOPs; `dense-swiglu-plus` is the rival of its size."
    )


def _sigma(store: Store, section: Section) -> str:
    """Whether the learned spread stays alive, at each length of training."""
    scale = store.scale
    spreads = [found for tokens in (scale.tokens, scale.long_tokens) if (found := _spread(store, tokens)) is not None]
    text = f"whether the learned σ stays alive (rms σ over rms μ above {_ALIVE} at the end)"
    if not spreads:
        section.claims.append(Claim(text, "–", MISSING, ours=True))
        return f"Does the learned σ stay alive? {MISSING.capitalize()}."
    rows = [
        [
            tokens_text(spread.tokens),
            *(text_of(value, 3) for value in (spread.first, spread.last, spread.shared, spread.union)),
            str(spread.last.count),
        ]
        for spread in spreads
    ]
    longest = spreads[-1]
    verdict = {HOLDS: "shrinks, and lives" if longest.shrinks > _SHRUNK else "alive", FAILS: "dies"}
    judged = lies_above(longest.last, _ALIVE)
    ends = "; ".join(
        f"at {tokens_text(s.tokens)} tokens from {s.first.text(2)} to {s.last.text(2)} ({of_seeds(s.last)})"
        for s in spreads
    )
    void = longest.shared.mean > SHARED
    share = f"two samples then share {longest.shared.text(3)} of their units"
    section.claims.append(
        Claim(
            text,
            f"{ends}; {share}",
            verdict.get(judged, judged),
            "judged at the longest training; more than 90 % shared: the K dial is void there" if void else "",
            ours=True,
        )
    )
    head = ("training tokens", "rms σ / rms μ at the start", "at the end", "two samples share", "their union", "seeds")
    return (
        "**Does the learned σ stay alive?** (K = 2, keep ratio 1/4; two independent masks would share 0.25 and have a "
        "union of 0.4375)\n\n" + markdown_table(head, rows)
    )


@dataclass(frozen=True)
class _Spread:
    """What training leaves of the router's spread: at the start, at the end, and what two samples share."""

    tokens: int
    first: Interval
    last: Interval
    shared: Interval
    union: Interval

    @property
    def shrinks(self) -> float:
        return self.first.mean / self.last.mean if self.last.mean else math.inf


def _spread(store: Store, tokens: int) -> _Spread | None:
    """None: no run of that length that says."""
    found = [
        (run.values["curve"]["sigma_to_mu"][0], row)
        for run in store.runs(OURS, tokens)
        for row in run.measure("dials") or ()
        if at_dials(row, keep_ratio=0.25, num_samples=2)
    ]
    if not found:
        return None
    last, shared, union = (
        interval([row[key] for _, row in found]) for key in ("sigma_to_mu", "overlap_ratio", "union_ratio")
    )
    return _Spread(tokens, interval([first for first, _ in found]), last, shared, union)


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


def _mask_scales(store: Store) -> str:
    """Rules for the size of the mask away from the trained ratio."""
    tokens = store.scale.tokens
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


def _quartiles(time: Time | None, digits: int) -> str:
    return "–" if time is None else f"{time.median:.{digits}f} ({time.q1:.{digits}f} … {time.q3:.{digits}f})"
