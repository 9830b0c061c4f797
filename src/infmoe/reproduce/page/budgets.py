"""Comparisons at equal budgets: parameters, weights used, FLOPs, and what training costs."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
from infmoe.reproduce.plan import TIER1, TIER2
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


# ∞-MoE as the paper has it, and what may stand for it where a budget is smaller: fewer samples, fewer units
_STAND_INS = {
    OURS: "K = 2, 1/4",
    "infinity-keep4": "K = 1, 1/4",
    "infinity-keep8": "K = 1, 1/8",
    "infinity-keep16": "K = 1, 1/16",
}
_RIVALS = ("dense", "switch", "moe")  # what an arm's name begins with
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


def equal_budgets(store: Store, section: Section) -> str:
    """Every rival whose budget is about that of an ∞-MoE, budget by budget."""
    tokens = store.scale.tokens
    names = dict.fromkeys((*TIER1, *TIER2, *_FINE, *_STAND_INS))
    first = {name: runs[0] for name in names if (runs := store.runs(name, tokens))}
    rows = []
    for budget, of in _BUDGETS.items():
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
    return (ours, shares[ours]) if abs(shares[ours] - 1) <= EQUAL else None


def _budget_claim(store: Store, first: Mapping[str, Finished], rival: str, title: str, budget: str) -> Claim:
    """∞-MoE against the arm of this kind whose budget comes nearest to one of ∞-MoE's."""
    text = f"∞-MoE against {title} at {_BUDGETS_CLAIMED[budget]}"
    kin = [name for name in _KIN[rival] if name in first]
    if OURS not in first or rival not in first:
        return Claim(text, "–", MISSING, ours=True)
    of = _BUDGETS[budget]
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


def equal_training(store: Store, section: Section) -> str:
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
