"""Comparisons at equal budgets: parameters, weights used, FLOPs, and what training costs."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from infmoe.reproduce.arms import at_other_rates
from infmoe.reproduce.page.section import (
    MISSING,
    NOT_RUN,
    Claim,
    Section,
    better,
    markdown_table,
    nats,
    of_seeds,
    text_of,
)
from infmoe.reproduce.page.speeds import speeds
from infmoe.reproduce.plan import TIER1, TIER2, Scale, z_arms
from infmoe.reproduce.statistics import Interval, paired
from infmoe.reproduce.store import Finished, Store

OURS = "infinity"
EQUAL = 0.1  # budgets count as equal that differ by no more than this share
# budget -> how much of it a run takes
_BUDGETS: dict[str, Callable[[Finished], float]] = {
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


# ∞-MoE as the paper has it, and what stands for it where a budget is smaller: fewer samples and units, or else a
# router of fewer dimensions and blocks of units
_SMALLER = {"infinity-keep4": "K = 1, 1/4", "infinity-keep8": "K = 1, 1/8", "infinity-keep16": "K = 1, 1/16"}
_BLOCKS = {f"infinity-blocks{size}": f"K = 2, 1/4, blocks of {size}" for size in (16, 32, 64)}
_RIVALS = ("dense", "switch", "moe", "infinity-glu")  # what an arm's name begins with
_FINE = ("moe16-fine-k4-scaled", "moe16-fine-k8-scaled", "moe16-fine-k16-scaled")
_CLAIMED_RIVALS = {
    "moe": "MoE (4 experts, top-2)",
    "moe16-fine-k8-scaled": "MoE of 16 narrow experts, gates that sum to k",
    "dense-swiglu": "dense SwiGLU",
    "infinity-glu": "the dense GLU with a gate of rank d_z",
}
# of one kind, the first where several are as near
_KIN = {
    "moe16-fine-k8-scaled": ("moe16-fine-k8-scaled", "moe16-fine-k4-scaled", "moe16-fine-k16-scaled"),
    "moe": ("moe", "moe-scaled", "moe-plus"),
    "dense-swiglu": ("dense-swiglu", "dense-swiglu-active", "dense-swiglu-plus"),
    "infinity-glu": ("infinity-glu",),
}
# budgets of the opening table's claims
_BUDGETS_CLAIMED = {
    "total parameters, W_z and discrete routers left out (the paper's)": "equal total parameters, W_z left out",
    "executed FLOPs per token": "equal executed FLOPs per token",
    "ideal FLOPs per token: the masks' measured union": "equal ideal FLOPs per token",
}


def _stand_ins(scale: Scale) -> tuple[dict[str, str], ...]:
    """∞-MoEs and their dials, those first that are preferred."""
    narrow = {arm: f"K = 2, 1/4, d_z = {z}" for z, arm in z_arms(scale).items() if arm != OURS}
    return {OURS: "K = 2, 1/4"}, _SMALLER, narrow | _BLOCKS


def _dials(scale: Scale) -> dict[str, str]:
    return {name: dials for tier in _stand_ins(scale) for name, dials in tier.items()}


def equal_budgets(store: Store, section: Section) -> str:
    """Every rival whose budget is about that of an ∞-MoE, budget by budget."""
    tokens, dials = store.scale.tokens, _dials(store.scale)
    names = dict.fromkeys((*TIER1, *TIER2, *_FINE, *dials))
    first = {name: runs[0] for name in names if (runs := store.runs(name, tokens))}
    rows = []
    for budget, of in _BUDGETS.items():
        if OURS not in first:
            continue
        found = []
        for name in first:
            if not name.startswith(_RIVALS) or (match := _match(store.scale, first, name, of)) is None:
                continue
            ours, share = match
            difference = store.difference(ours, name, tokens)
            seeds = "0" if difference is None else str(difference.count)
            gap = text_of(difference, sign=True)
            found.append([budget, dials[ours], name, f"{share:.2f}", gap, rates_of(store, ours, name), seeds])
        rows += found or [[budget, "–", "none within a tenth", "–", "–", "–", "–"]]
    for rival, title in _CLAIMED_RIVALS.items():
        for budget in _BUDGETS_CLAIMED:
            section.claims.append(_budget_claim(store, first, rival, title, budget))
    head = (
        *("budget", "∞-MoE with", "rival", "the rival's, over ∞-MoE's", "loss of ∞-MoE minus it, nats"),
        *("learning rate", "seeds"),
    )
    if not rows:
        return ""
    return (
        "**At equal budgets** (a rival within a tenth of ∞-MoE's: ∞-MoE as the paper has it, K = 2 at 1/4, or else the "
        "nearest of those trained with one sample, or else the nearest with a smaller d_z or over blocks)\n\n"
        + markdown_table(head, rows)
    )


def rates_of(store: Store, *arms: str) -> str:
    """The learning rates of arms at the standard length, once where they are the same."""
    runs = [found[0] for name in arms if (found := store.runs(name, store.scale.tokens))]
    return " and ".join(dict.fromkeys(f"{run.spec.lr:g}" for run in runs))


def equal_rates_note(store: Store, ours: str, rival: str, but: tuple[str, str] | None = None) -> str:
    """What is left of a difference at each other learning rate at which both arms were run.

    Args:
        store: of the runs.
        ours, rival: arms.
        but: the pair, at whatever rates, whose difference is told already; None: the arms themselves.
    """
    names = ((arm, *at_other_rates(arm)) for arm in (ours, rival))
    notes = []
    for mine, its in itertools.product(*names):
        gap = store.difference(mine, its, store.scale.tokens)
        rate = rates_of(store, mine, its)
        if gap is not None and (mine, its) != (but or (ours, rival)) and " and " not in rate:
            notes.append(f"at learning rate {rate}: {nats(gap)}")
    return "; ".join(notes)


def _match(
    scale: Scale, first: Mapping[str, Finished], rival: str, of: Callable[[Finished], float]
) -> tuple[str, float] | None:
    """An ∞-MoE whose budget is about the rival's, with the rival's share of it; None: there is none."""
    for tier in _stand_ins(scale):
        shares = {name: of(first[rival]) / of(first[name]) for name in tier if name in first}
        near = {name: share for name, share in shares.items() if abs(share - 1) <= EQUAL}
        if near:
            return min(near.items(), key=lambda match: round(abs(math.log(match[1])), 6))
    return None


def _budget_claim(store: Store, first: Mapping[str, Finished], rival: str, title: str, budget: str) -> Claim:
    """∞-MoE against the arm of this kind whose budget comes nearest to one of ∞-MoE's; the note has the others."""
    text = f"∞-MoE against {title} at {_BUDGETS_CLAIMED[budget]}"
    kin = [name for name in _KIN[rival] if name in first]
    if OURS not in first or rival not in first:
        return Claim(text, "–", MISSING, ours=True)
    of, dials = _BUDGETS[budget], _dials(store.scale)
    pairs = {name: match for name in kin if (match := _match(store.scale, first, name, of)) is not None}
    if not pairs:
        shares = {name: of(first[name]) / of(first[rival]) for name in dials if name in first}
        ends = min(shares, key=shares.__getitem__), max(shares, key=shares.__getitem__)
        over = " … ".join(f"{shares[name]:.2f} ({dials[name]})" for name in dict.fromkeys(ends))
        return Claim(text, "–", NOT_RUN, f"no arm within a tenth; ∞-MoE takes, of the rival's: {over}", ours=True)
    name = min(pairs, key=lambda name: (round(abs(math.log(pairs[name][1])), 2), kin.index(name)))
    ours = pairs[name][0]
    difference = store.difference(ours, name, store.scale.tokens)
    notes = [f"∞-MoE with {dials[ours]}" + ("" if name == rival else f", against `{name}`")]
    rates = rates_of(store, ours, name)
    notes += [f"learning rates {rates}"] if " and " in rates else []
    notes += [note] if (note := equal_rates_note(store, ours, name)) else []
    for other, (own, _) in pairs.items():
        if own != ours:
            gap = nats(store.difference(own, other, store.scale.tokens))
            notes.append(f"with {dials[own]}, against `{other}`: {gap}")
    return Claim(text, nats(difference), better(difference), "; ".join(notes), ours=True)


def equal_training(store: Store, section: Section) -> str:
    """Rivals trained for as long as ∞-MoE, in FLOPs or seconds: on more tokens, between lengths that were run."""
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
                note = f"the rival on {over} times the tokens, between lengths that were run"
                seeds = f" nats ({of_seeds(known[0])})" if known else ""
                section.claims.append(Claim(text, shown + seeds, _verdict_of_ends(found), note, ours=True))
    if not rows:
        return ""
    head = ("budget", "rival", "its tokens over ∞-MoE's", "loss of ∞-MoE minus it, nats", "seeds")
    return (
        "**At equal training cost** (the rival's loss between the two nearest of its lengths, linear in the logarithm "
        "of the tokens, which is more than a curve that flattens has there: a rival does a little better than this; "
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
    return paired(store.losses(OURS, scale.tokens), at_tokens(store, name, scale.tokens * ratio))


def at_tokens(store: Store, name: str, tokens: float) -> dict[int, float]:
    """Seed -> loss at a number of tokens, between the nearest lengths that the seed was run at."""
    scale = store.scale
    lengths = sorted({scale.tokens, scale.long_tokens, *scale.data_sizes})
    runs = {length: store.losses(name, length) for length in lengths}
    found = {}
    for seed in runs[scale.tokens].keys() & runs[scale.long_tokens].keys():
        there = [length for length in lengths if seed in runs[length]]
        short = max(length for length in there if length <= tokens)
        long = min(length for length in there if length >= tokens)
        share = math.log(tokens / short) / math.log(long / short) if long > short else 0.0
        found[seed] = (1 - share) * runs[short][seed] + share * runs[long][seed]
    return found
