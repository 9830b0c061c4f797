"""Plain answers: what the gain is made of, and whether the learned spread stays alive."""

import math
from dataclasses import dataclass

from infmoe.reproduce.page.budgets import EQUAL, OURS
from infmoe.reproduce.page.section import (
    FAILS,
    HOLDS,
    MISSING,
    SHARED,
    Claim,
    Section,
    at_dials,
    better,
    lies_above,
    markdown_table,
    nats,
    of_seeds,
    text_of,
)
from infmoe.reproduce.plan import tokens_text
from infmoe.reproduce.statistics import Interval, interval
from infmoe.reproduce.store import Store

_CLAIMED_PARTS = 8  # of what the gain is made of, in the opening table
_GATE_AT_OURS = "infinity-glu-lr0.5x"  # the dense gate at the rate that was chosen for ∞-MoE
_ALIVE, _SHRUNK = 0.05, 2.0


def answers(store: Store, section: Section) -> str:
    """What each part of ∞-MoE is worth, as differences of two arms."""
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
    unequal = [f"{share:.2f} times the {name}" for name, share in shares.items() if abs(share - 1) > EQUAL]
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
