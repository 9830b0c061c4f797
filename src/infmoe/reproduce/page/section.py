"""What a table or figure is made of: sections, claims, and the helpers that they share."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from infmoe.reproduce.arms import label
from infmoe.reproduce.page.figures import Gallery
from infmoe.reproduce.plan import Scale, tokens_text
from infmoe.reproduce.statistics import Interval, interval
from infmoe.reproduce.store import Finished, Store

HOLDS, FAILS, OPEN = "holds", "does not hold", "not testable at this scale"
UNDECIDED = "not decided: the interval contains 0"
ONE_SEED = "not decided: one seed"
_BY_ONE = " (one seed)"  # held against the spread of the arms that have more
HOLDS_BY_ONE, FAILS_BY_ONE = HOLDS + _BY_ONE, FAILS + _BY_ONE
NOT_RUN = "not run at this budget"
MISSING = "not measured yet"
VOID = "void: the samples hardly differ"
SHARED = 0.9  # of their units: two samples that have more in common are one, and K is no dial


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, or a question that it leaves out, and what was found.

    Attributes:
        text: what is claimed.
        measured: what was found.
        verdict: one of the above.
        reason: where it needs one.
        ours: a question that the paper leaves out.
    """

    text: str
    measured: str
    verdict: str
    reason: str = ""
    ours: bool = False


@dataclass
class Section:
    """One part of the page.

    Attributes:
        title: its heading.
        command: what makes the results.
        body: Markdown.
        claims: rows of the table that they belong to.
        pictures: PNGs, each with what it shows.
    """

    title: str
    command: str
    body: str = ""
    claims: list[Claim] = field(default_factory=list)
    pictures: list[tuple[str, Path]] = field(default_factory=list)


def claims_table(claims: Sequence[Claim]) -> str:
    """Claims and verdicts; nothing where there are none."""
    rows = [[claim.text, claim.measured, claim.verdict, claim.reason] for claim in claims]
    return markdown_table(("claim", "measured", "verdict", "note"), rows).replace("---:", "---") if rows else ""


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns but the first are aligned right."""
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def mean_loss(store: Store, arm: str, tokens: int) -> Interval | None:
    """Held-out loss over seeds."""
    losses = store.losses(arm, tokens)
    return interval(list(losses.values())) if losses else None


def text_of(value: Interval | None, digits: int = 3, *, sign: bool = False) -> str:
    """The interval, or a dash."""
    return "–" if value is None else value.text(digits, sign=sign)


def seeds_text(runs: Sequence[Finished]) -> str:
    """How many seeds stand behind a figure, and how many of them diverged."""
    diverged = sum(run.diverged for run in runs)
    return f"{len(runs)}" + (f" ({diverged} diverged)" if diverged else "")


def verdict_below(difference: Interval | None) -> str:
    """Whether a difference that should be below 0 is."""
    if difference is None:
        return MISSING
    if difference.half_width is None:
        if difference.pooled is None or abs(difference.mean) <= difference.pooled:
            return ONE_SEED
        return HOLDS_BY_ONE if difference.mean < 0 else FAILS_BY_ONE
    return HOLDS if difference.high < 0 else FAILS if difference.low > 0 else UNDECIDED


def verdict_all_below(differences: Sequence[Interval | None]) -> str:
    """Whether all differences are below 0, or none is."""
    verdicts = {verdict_below(difference) for difference in differences}
    if MISSING in verdicts or not verdicts:
        return MISSING
    if len(verdicts) > 1 and ONE_SEED in verdicts:
        return "not decided: one seed at some points"
    return verdicts.pop() if len(verdicts) == 1 else "not decided: it differs from point to point"


def better(difference: Interval | None) -> str:
    """The verdict on a difference that is no claim of the paper's, and better below 0."""
    verdict = verdict_below(difference)
    words = {HOLDS: "better", FAILS: "worse", HOLDS_BY_ONE: "better" + _BY_ONE, FAILS_BY_ONE: "worse" + _BY_ONE}
    return words.get(verdict, verdict)


def nats(difference: Interval | None, digits: int = 3) -> str:
    """A difference with its unit and its seeds, or a dash."""
    if difference is None:
        return "–"
    spread = "" if difference.pooled is None else f", pooled ± {difference.pooled:.3f}"
    return f"{text_of(difference, digits, sign=True)} nats ({of_seeds(difference)}{spread})"


def lies_above(value: Interval | None, level: float) -> str:
    """Whether a figure lies above a level."""
    if value is None:
        return MISSING
    if value.half_width is None:
        return ONE_SEED
    if value.low > level:
        return HOLDS
    return FAILS if value.high < level else f"not decided: the interval contains {level:g}"


def of_seeds(difference: Interval) -> str:
    """How many seeds stand behind a difference, in words."""
    return f"{difference.count} seeds" if difference.count > 1 else "one seed"


def in_brackets(difference: Interval | None) -> str:
    """The same, to stand behind a figure."""
    return "" if difference is None else f" ({of_seeds(difference)})"


def rivals(section: Section, store: Store, gallery: Gallery, arms: Sequence[str], tokens: int) -> None:
    """A picture of ∞-MoE's loss minus its rivals'."""
    found = {arm: difference for arm in arms if (difference := store.difference("infinity", arm, tokens)) is not None}
    if found:
        name = section.command.split()[2]
        picture = gallery.bars(
            f"{name}.png",
            {label(arm): difference for arm, difference in found.items()},
            x_label=f"∞-MoE's held-out loss minus theirs, {tokens_text(tokens)} tokens (nats; 95 %, paired by seed)",
            title="Left of 0: ∞-MoE is better",
        )
        section.pictures.append((section.title, picture))


def relative(
    store: Store,
    arm: str,
    tokens: int,
    measure: str,
    keep: Callable[[dict[str, Any]], bool],
    reference: Callable[[dict[str, Any]], bool],
    x: Callable[[dict[str, Any]], Any],
) -> dict[Any, Interval]:
    """Loss minus the loss at a reference point of the same model, paired by seed."""
    found: dict[Any, list[float]] = {}
    for run in store.runs(arm, tokens):
        rows = run.measure(measure) or ()
        base = next((row["loss"] for row in run.measure("dials") or () if reference(row)), None)
        for row in rows:
            if base is not None and keep(row):
                found.setdefault(x(row), []).append(row["loss"] - base)
    return {at: interval(values) for at, values in found.items()}


def at_tokens(run: Finished, name: str, tokens: float, within: float = 0.0) -> float:
    """A figure of the training's course.

    Args:
        run: the run.
        name: of the figure.
        tokens: at the record nearest to so many.
        within: the mean of all records that lie no farther off than so many tokens, too.
    """
    course = run.values["curve"]
    off = [abs(at - tokens) for at in course["tokens"]]
    return statistics.fmean(value for value, far in zip(course[name], off, strict=True) if far <= max(within, min(off)))


def at_dials(row: Mapping[str, Any], **dials: Any) -> bool:
    """Whether a point has these dials, and no mode of its own unless one is given."""
    return all(row.get(name) == value for name, value in ({"mode": None} | dials).items())


def command(name: str, scale: Scale) -> str:
    source = "--corpus NOVELS" if scale.vocab else "--data FINEWEB"
    return f"infmoe reproduce {name} --scale {scale.name} {source}"


def minus(value: Interval) -> Interval:
    return replace(value, mean=-value.mean)
