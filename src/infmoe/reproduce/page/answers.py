"""Plain answers: what the gain is made of, and whether the learned spread stays alive."""

import itertools
import math
from dataclasses import dataclass

from infmoe.reproduce.page.budgets import EQUAL, OURS, rates_of
from infmoe.reproduce.page.section import (
    FAILS,
    HOLDS,
    MISSING,
    SHARED,
    Claim,
    Section,
    at_dials,
    at_tokens,
    better,
    lies_above,
    markdown_table,
    nats,
    of_seeds,
    text_of,
)
from infmoe.reproduce.plan import tokens_text
from infmoe.reproduce.statistics import Interval, interval, paired
from infmoe.reproduce.store import Store

_GATE_AT_OURS = "infinity-glu-lr0.5x"  # the dense gate at the rate that was chosen for ∞-MoE
_ALIVE, _SHRUNK = 0.05, 2.0


@dataclass(frozen=True)
class _Part:
    """A part of ∞-MoE, or another choice: the difference of two arms.

    Attributes:
        text: what is worth so much.
        arm: with it.
        base: without it.
        claimed: a row of the opening table too.
    """

    text: str
    arm: str
    base: str
    claimed: bool = False


_PARTS = (
    _Part(
        "the gate: a dense gate of rank d_z (`infinity-glu`) against none (`dense-wide`)",
        "infinity-glu",
        "dense-wide",
        claimed=True,
    ),
    _Part(
        "the sparsity: top-N of that gate (`infinity-sigma0`) against all of it",
        "infinity-sigma0",
        "infinity-glu",
        claimed=True,
    ),
    _Part("the sparsity, at equal learning rates", "infinity-sigma0", _GATE_AT_OURS, claimed=True),
    _Part("the noise and a second sample: ∞-MoE against σ = 0", OURS, "infinity-sigma0", claimed=True),
    _Part("the noise: ∞-MoE with one sample against σ = 0", "infinity-keep4", "infinity-sigma0", claimed=True),
    _Part("a second sample: ∞-MoE against one sample", OURS, "infinity-keep4", claimed=True),
    _Part(
        "sparsity, noise and a second sample together: ∞-MoE against the dense gate", OURS, "infinity-glu", claimed=True
    ),
    _Part("the three together, at equal learning rates", OURS, _GATE_AT_OURS, claimed=True),
    _Part("the sparsity, with the noise: ∞-MoE against keeping every neuron", OURS, "infinity-no-topn"),
    _Part("learning W_z: ∞-MoE against W_z as drawn", OURS, "infinity-frozen-wz", claimed=True),
    _Part("a MoE that starts as large as a dense layer of its active width: gates that sum to 2", "moe-scaled", "moe"),
    _Part("∞-MoE against that MoE", OURS, "moe-scaled"),
    _Part("learning a discrete router: MoE against hashing token ids", "moe", "moe-hash"),
    _Part("∞-MoE over SwiGLU neurons against plain SwiGLU", "infinity-swiglu", "dense-swiglu"),
    _Part("∞-MoE over SwiGLU neurons against over GELU neurons", "infinity-swiglu", OURS),
    _Part("masks over blocks of 16 neurons against single ones", "infinity-blocks16", OURS, claimed=True),
    _Part("masks over blocks of 32", "infinity-blocks32", OURS, claimed=True),
    _Part("masks over blocks of 64", "infinity-blocks64", OURS, claimed=True),
    _Part("an eighth kept against a quarter, one sample", "infinity-keep8", "infinity-keep4"),
    _Part("a sixteenth kept against a quarter, one sample", "infinity-keep16", "infinity-keep4"),
    _Part("W_z without weight decay", "infinity-wz-decay0", OURS, claimed=True),
    _Part("W_z at half the learning rate", "infinity-wz-lr-half", OURS, claimed=True),
    _Part("W_z at twice the learning rate", "infinity-wz-lr-double", OURS, claimed=True),
)
# from the plain layer to ∞-MoE, at its learning rate
_CHAIN = ("dense-wide-lr0.5x", _GATE_AT_OURS, "infinity-sigma0", "infinity-keep4", OURS)
_CHAIN_STEPS = (
    "a dense gate of rank d_z",
    "its top quarter alone",
    "noise, one sample",
    "a second sample",
)


def answers(store: Store, section: Section) -> str:
    """What each part of ∞-MoE is worth, as differences of two arms."""
    scale = store.scale
    rows = []
    for part in _PARTS:
        if part.base == _GATE_AT_OURS and not scale.lr_grid:  # one rate for all arms
            continue
        difference = store.difference(part.arm, part.base, scale.tokens)
        count = "0" if difference is None else str(difference.count)
        shares = "–" if difference is None else "; ".join(_unequal(store, part.arm, part.base)) or "nothing"
        rates = "–" if difference is None else rates_of(store, part.arm, part.base)
        rows.append([part.text, text_of(difference, 4, sign=True), rates, shares, count])
        if part.claimed:
            section.claims.append(_part_claim(store, part, difference))
    head = ("what is worth how much", "change of the loss, nats", "learning rate", "what else is unequal", "seeds")
    return (
        "**What the gain is made of** (below 0: the first is better)\n\n"
        + markdown_table(head, rows)
        + _chain(store)
        + "\n\n"
        + _sigma(store, section)
    )


def _part_claim(store: Store, part: _Part, difference: Interval | None) -> Claim:
    rates = rates_of(store, part.arm, part.base)
    note = "" if difference is None else "; ".join(_unequal(store, part.arm, part.base))
    if " and " in rates and difference is not None:
        note = "; ".join(text for text in (note, f"learning rates {rates}") if text)
    return Claim(part.text, nats(difference), better(difference), note, ours=True)


def _chain(store: Store) -> str:
    """From the plain layer to ∞-MoE one step at a time, over the seeds that all steps have, so that the steps add up.

    All at ∞-MoE's learning rate; empty where a step is missing.
    """
    scale = store.scale
    arms = _CHAIN if scale.lr_grid else [name.split("-lr")[0] for name in _CHAIN]
    losses = [store.losses(name, scale.tokens) for name in arms]
    seeds = sorted(set.intersection(*(set(found) for found in losses)))
    if not seeds or " and " in rates_of(store, *arms):
        return ""
    losses = [{seed: found[seed] for seed in seeds} for found in losses]
    total = paired(losses[-1], losses[0])
    assert total is not None
    steps = [paired(after, before) for before, after in itertools.pairwise(losses)]
    rows = [
        [what, text_of(step, 4, sign=True), f"{step.mean / total.mean:+.0%}"]
        for what, step in zip(_CHAIN_STEPS, steps, strict=True)
        if step is not None
    ]
    rows.append(["all of it: ∞-MoE against the plain layer", text_of(total, 4, sign=True), "100%"])
    head = ("step", "change of the loss, nats", "share of the gain")
    return (
        f"\n\n**The gain, step by step** (all at learning rate {rates_of(store, *arms)}, over the seeds that every "
        f"step has: {len(seeds)})\n\n{markdown_table(head, rows)}{_at_the_bases_rate(store)}"
    )


def _at_the_bases_rate(store: Store) -> str:
    """What is left of the gain where the plain layer is trained at its own rate, where that is another."""
    base = _CHAIN[0].split("-lr")[0]
    lost = store.difference(_CHAIN[0], base, store.scale.tokens)
    whole = store.difference(OURS, base, store.scale.tokens)
    if lost is None or whole is None or not store.scale.lr_grid:
        return ""
    return (
        f"\n\nThe plain layer loses {text_of(lost, 4, sign=True)} nats at that rate against its own, "
        f"{rates_of(store, base)}; ∞-MoE at its own against it at its own: {nats(whole, 4)}."
    )


def _unequal(store: Store, arm: str, base: str) -> list[str]:
    """What a comparison of two arms leaves unequal by more than a tenth, learning rates apart."""
    (ours, *_), (theirs, *_) = (store.runs(name, store.scale.tokens) for name in (arm, base))
    shares = {
        "parameters": ours.cost["total_with_wz"] / theirs.cost["total_with_wz"],
        "executed FLOPs": ours.cost["flops_executed"] / theirs.cost["flops_executed"],
    }
    return [f"{share:.2f} times the {name}" for name, share in shares.items() if abs(share - 1) > EQUAL]


def _sigma(store: Store, section: Section) -> str:
    """Whether the learned spread stays alive, at each length of training."""
    scale = store.scale
    lengths = (scale.tokens, scale.long_tokens)
    # the longer the run, the later its first record: all are read where the latest begins
    begin = max((run.values["curve"]["tokens"][0] for n in lengths for run in store.runs(OURS, n)), default=0)
    spreads = [found for tokens in lengths if (found := _spread(store, tokens, begin)) is not None]
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
            "judged at the longest training"
            + ("; more than 90 % shared: the K dial is void there" if void else "")
            + "; the paper gives neither σ's form nor its size at the start nor a loss on it, so ours are guesses "
            "([deviations](deviations.md)), and no others were tried",
            ours=True,
        )
    )
    head = (
        *("training tokens", f"rms σ / rms μ after {begin / 1e6:.2g}M tokens", "at the end"),
        *("two samples share", "their union", "seeds"),
    )
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


def _spread(store: Store, tokens: int, begin: float) -> _Spread | None:
    """None: no run of that length that says.

    Args:
        store: the results.
        tokens: of the runs.
        begin: the tokens after which the spread of the start is read.
    """
    found = [
        (at_tokens(run, "sigma_to_mu", begin), row)
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
