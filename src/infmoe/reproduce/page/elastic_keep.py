"""The keep ratio: one ∞-MoE over it, by how it was trained."""

from collections.abc import Sequence

from infmoe.layers.point import ratio_text
from infmoe.reproduce.arms import label, titled
from infmoe.reproduce.page.dial_curves import means, over_ratio, shared_tokens
from infmoe.reproduce.page.figures import SHOWN, Gallery
from infmoe.reproduce.page.section import (
    FAILS,
    HOLDS,
    MISSING,
    ONE_SEED,
    UNDECIDED,
    Claim,
    Section,
    in_brackets,
    markdown_table,
    nats,
    seeds_text,
    text_of,
)
from infmoe.reproduce.plan import ELASTIC_LATE, PASSES, SANDWICH, TUNED_KEEP, shorter, tokens_text
from infmoe.reproduce.statistics import Interval, paired
from infmoe.reproduce.store import Store

RATIOS = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
FIXED = {"infinity-keep4": 1 / 4, "infinity-keep8": 1 / 8, "infinity-keep16": 1 / 16}
ELASTIC = (
    *("infinity-elastic", "infinity-elastic-step", "infinity-elastic-scaled"),
    *("infinity-sandwich", "infinity-sandwich-distill", SANDWICH, *ELASTIC_LATE, "infinity-sandwich-between"),
)
_LATER = (SANDWICH, *ELASTIC_LATE)
# the pictures' panels over the keep ratio; the one that the others are held against stands in all of them
KEEP_PANELS = {
    "trained at one ratio": tuple(FIXED),
    "elastic from the first step": tuple(arm for arm in ELASTIC if arm not in _LATER),
    "elastic from later on": _LATER,
    "tuned, a fifth more tokens": TUNED_KEEP,
}
AGAINST = "infinity-keep4"


def keep_ratios(store: Store, gallery: Gallery, section: Section) -> str:
    tokens = store.scale.tokens
    curves = {arm: found for arm in (*FIXED, *ELASTIC) if (found := over_ratio(store, arm))}
    _claim_elastic(store, section)
    if not curves:
        return f"**Loss over the keep ratio, K = 1**: {MISSING}."
    ratios = sorted({ratio for found in curves.values() for ratio in found})
    rows = []
    for arm, found in curves.items():
        line = means(found)
        seeds = seeds_text(store.runs(arm, tokens))
        rows.append([titled(arm), *(text_of(line.get(r)) for r in ratios), seeds])
    panels = [
        (title, {short(arm): means(over_ratio(store, arm)) for arm in arms}) for title, arms in KEEP_PANELS.items()
    ]
    shown = [panel for panel in panels if any(panel[1].values())]
    picture = gallery.lines(
        "elastic_keep.png",
        shown,
        x_label="share of the neurons that the sample keeps",
        y_label="held-out loss (nats per token)",
        title=f"One ∞-MoE over the keep ratio, K = 1\n(95 % over seeds; up to {SHOWN} nats above the best)",
        rows=-(-len(shown) // 2),
        within=SHOWN,
        one_scale=True,
        own_legends=True,
        references={label(AGAINST): means(curves[AGAINST])} if AGAINST in curves else {},
    )
    section.pictures.append(("Loss over the keep ratio, by training", picture))
    head = ("loss, nats", *(ratio_text(r) for r in ratios), "seeds")
    table = f"**Loss over the keep ratio, K = 1, {tokens_text(tokens)} tokens**\n\n" + markdown_table(head, rows)
    return "\n\n".join(part for part in (table, _differences(store)) if part)


def _differences(store: Store) -> str:
    """Every training minus those at one ratio, paired by seed, with the tokens for which two of them are one run."""
    tokens = store.scale.tokens
    rows = []
    for arm in (*FIXED, *ELASTIC):
        for fixed in list(FIXED)[:2]:
            ours, theirs = over_ratio(store, arm), over_ratio(store, fixed)
            gaps = {r: paired(ours.get(r, {}), theirs.get(r, {})) for r in RATIOS}
            seeds = max((gap.count for gap in gaps.values() if gap is not None), default=0)
            if arm == fixed or (arm, fixed) == ("infinity-keep4", "infinity-keep8") or not seeds:
                continue
            one = shared_tokens(store, arm, fixed, tokens)
            cells = [text_of(gap, sign=True) for gap in gaps.values()]
            rows.append([f"{arm} minus {fixed}", *cells, tokens_text(one) if one else "none", str(seeds)])
    if not rows:
        return ""
    head = ("trained otherwise, minus at one ratio", *(ratio_text(r) for r in RATIOS), "tokens in common", "seeds")
    return (
        "**The same, minus models trained at one ratio** (paired by seed, nats; tokens in common: where the two are "
        "one run, to the last bit of every logged loss, until they part)\n\n" + markdown_table(head, rows)
    )


def _claim_elastic(store: Store, section: Section) -> None:
    """One elastic checkpoint against the best fixed one, and against models trained at each end."""
    tokens = store.scale.tokens
    fixed = {arm: found for arm in FIXED if set(RATIOS) <= (found := over_ratio(store, arm)).keys()}
    for arm, length in (
        *(("infinity-elastic", tokens), (SANDWICH, tokens), ("infinity-sandwich-distill", tokens)),
        *((late, tokens) for late in ELASTIC_LATE),
        ("infinity-sandwich-between", tokens),
        *((arm, shorter(arm, tokens)) for arm in (SANDWICH, "infinity-sandwich-distill", "infinity-sandwich-between")),
    ):
        ours = over_ratio(store, arm, tokens=length)
        subject = f"`{arm}`" + (f" on {tokens_text(length)} tokens" if length < tokens else "")
        passes = PASSES.get(arm, 1)
        dear = f"{passes:g} passes a token: {passes:g} times the training FLOPs"
        note = "" if passes == 1 else dear if length == tokens else "equal training FLOPs"
        text = (
            f"{subject}, at every ratio from 1/16 to 1/2, is no worse than the best fixed checkpoint (of the lowest "
            "mean loss over these ratios)"
        )
        if not set(RATIOS) <= ours.keys() or len(fixed) < len(FIXED):
            section.claims.append(Claim(text, "–", MISSING, note))
            continue
        best = min(fixed, key=lambda name: sum(means(fixed[name])[r].mean for r in RATIOS))
        gaps = {r: paired(ours[r], fixed[best][r]) for r in RATIOS}
        section.claims.append(
            Claim(
                text,
                f"against `{best}`: "
                + ", ".join(f"{text_of(g, sign=True)} at {ratio_text(r)}" for r, g in gaps.items())
                + in_brackets(gaps[RATIOS[0]]),
                _no_worse(list(gaps.values()), 0.0),
                note,
            )
        )
        for ratio, name, most in ((1 / 4, "infinity-keep4", 0.01), (1 / 16, "infinity-keep16", 0.03)):
            gap = paired(ours[ratio], fixed[name][ratio])
            section.claims.append(
                Claim(
                    f"{subject} at {ratio_text(ratio)} is within {most:g} nats of one trained there",
                    nats(gap),
                    _no_worse([gap], most),
                    note,
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


def short(line: str) -> str:
    """The label of one of ∞-MoE's, where the panel says that it is one."""
    return label(line).removeprefix("∞-MoE, ")
