"""Tuned from a trained model: what making it elastic brings, against training it on as it was."""

from collections.abc import Callable, Sequence
from typing import Any

from infmoe.layers.point import ratio_text
from infmoe.reproduce.arms import arm_named, titled
from infmoe.reproduce.page.dial_curves import Curve, means, over_k, over_ratio
from infmoe.reproduce.page.section import markdown_table, text_of
from infmoe.reproduce.plan import TUNED_EXPERTS, TUNED_KEEP, further_tokens, tokens_text
from infmoe.reproduce.statistics import paired
from infmoe.reproduce.store import Store

_RATIOS = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
_COUNTS = (1, 2, 4, 6, 8, 12, 16)


def tuned(store: Store) -> str:
    """Loss over the dial of each tuned arm, and minus that of the arm that was tuned plainly."""
    tokens = further_tokens(store.scale)
    tables = [
        _table(store, TUNED_KEEP, {arm: over_ratio(store, arm) for arm in TUNED_KEEP}, _RATIOS, ratio_text),
        _table(
            store,
            TUNED_EXPERTS,
            {arm: over_k(store, arm, tokens=tokens) for arm in TUNED_EXPERTS},
            _COUNTS,
            lambda k: f"k′ = {k}",
        ),
    ]
    measured = [table for table in tables if table]
    if not measured:
        return ""
    title = (
        f"**Tuned from a trained model**: {tokens_text(tokens)} tokens on from the model of the same seed that had "
        f"{tokens_text(store.scale.tokens)}, the first of which these are again, at "
        f"{arm_named(TUNED_KEEP[0]).lr_factor:g} times its learning rate (differences paired by seed)"
    )
    return "\n\n".join([title, *measured])


def _started_alike(store: Store, arm: str, control: str) -> set[int]:
    """The seeds whose two runs started from the same weights: a base may have been trained again in between."""
    marks = [
        {
            run.spec.seed: run.values["run"]["init"]["fingerprint"]
            for run in store.runs(name, further_tokens(store.scale))
        }
        for name in (arm, control)
    ]
    return {seed for seed, mark in marks[0].items() if marks[1].get(seed) == mark}


def _table(
    store: Store, arms: Sequence[str], lines: dict[str, Curve], places: Sequence[Any], text: Callable[[Any], str]
) -> str:
    """A row an arm, and below each but the first its difference to that; empty where nothing is measured."""
    control = arms[0]
    rows = []
    for arm in arms:
        line = lines[arm]
        if not line:
            continue
        seeds = max(map(len, line.values()))
        rows.append([titled(arm), *(text_of(means(line).get(at)) for at in places), str(seeds)])
        alike = _started_alike(store, arm, control)
        base = {at: {s: loss for s, loss in losses.items() if s in alike} for at, losses in lines[control].items()}
        gaps = [paired(line.get(at, {}), base.get(at, {})) for at in places]
        if arm != control and any(gaps):
            both = max(gap.count for gap in gaps if gap is not None)
            rows.append([f"{arm} minus {control}", *(text_of(gap, sign=True) for gap in gaps), str(both)])
    if not rows:
        return ""
    start = titled(arm_named(control).init or control)
    return markdown_table((f"loss, nats; from {start}", *map(text, places), "seeds"), rows)
