"""Elastic experts: one discrete MoE, run with other numbers of experts than it was trained with."""

from collections.abc import Mapping, Sequence

from infmoe.reproduce.arms import arm_named, label, titled
from infmoe.reproduce.measures import DAMPED_ARMS, GATE_NORM_ARMS
from infmoe.reproduce.page.dial_curves import RANGE, Curve, Stretch, curve, means, over_k, useful_ranges
from infmoe.reproduce.page.figures import SHOWN, Gallery, Line
from infmoe.reproduce.page.section import (
    FAILS,
    HOLDS,
    MISSING,
    ONE_SEED,
    UNDECIDED,
    Claim,
    Section,
    better,
    markdown_table,
    mean_loss,
    nats,
    text_of,
    verdict_below,
)
from infmoe.reproduce.plan import ELASTIC_DRAWS, ELASTIC_EXPERTS, ELASTIC_RULES, ELASTIC_UNSCALED
from infmoe.reproduce.statistics import Interval, paired
from infmoe.reproduce.store import Store

_PLAIN = {4: "moe16-fine-k4-scaled", 8: "moe16-fine-k8-scaled"}
_DIRECT = {4: "moe16-fine-k8-scaled", 8: "moe16-fine-k16-scaled"}
_TRAINED_FOR = {k: (f"moe16-fine-k{k}-", f"emoe-k{k}-", f"matryoshka-k{k}-") for k in (4, 8)}
# the pictures' lines for each k: plain, damped, Elastic MoE, Matryoshka, and directly trained at twice that k
OF_K = {
    k: (plain, f"{plain}, α = 0.25", f"emoe-k{k}-w0.0001-scaled", f"matryoshka-k{k}-scaled", _DIRECT[k])
    for k, plain in _PLAIN.items()
}
_CLAIMED = {
    "emoe-k4-w0.0001-scaled": 4,
    "emoe-k4-w0.0001-scaled-from0.5": 4,
    "emoe-k4-w0.0001-p0.1-scaled": 4,
    "emoe-k4-w0-scaled": 4,
    "emoe-k8-w0.0001-scaled": 8,
}
_IN_TABLES = (1, 2, 3, 4, 6, 8, 12, 16)
_GATE_COUNTS = (1, 2, 3, 4, 8, 16)
_SCALED = {
    "moe": "moe-scaled",
    "moe16-fine-k4": "moe16-fine-k4-scaled",
    "moe16-fine": "moe16-fine-k8-scaled",
    "moe16-fine-k16": "moe16-fine-k16-scaled",
}


def experts(store: Store, gallery: Gallery, section: Section) -> str:
    """Loss over the number of experts, as it is and against the plain model."""
    lines = {name: line for name, line in expert_curves(store).items() if line}
    _claims(store, section)
    if not lines:
        return f"**Loss over the number of experts, 16 experts of d_ff/8**: {MISSING}."
    panels: list[tuple[str, dict[str, Line]]] = [
        (title, {text: means(lines.get(name, {})) for text, name in named.items()}) for title, named in _panels()
    ]
    shown = [panel for panel in panels if any(panel[1].values())]
    picture = gallery.lines(
        "elastic_experts.png",
        shown,
        x_label="experts run per token, k′ of 16",
        y_label="held-out loss (nats per token)",
        title=f"One checkpoint over the number of experts\n(95 % over seeds; up to {SHOWN} nats above the best)",
        rows=-(-len(shown) // 2),
        within=SHOWN,
        linear=True,
        one_scale=True,
        own_legends=True,
    )
    section.pictures.append(("Loss over the number of experts, by training", picture))
    parts = [
        "**Loss over the number of experts: 16 experts of d_ff/8, gates renormalised over those that run, and scaled "
        "to sum to the trained k**",
        _table(lines),
        "α: the weights of ranks beyond the trained k are multiplied by it before they are renormalised; nothing is "
        "trained for it. λ: the weight of Elastic MoE's router loss; its paper names neither that nor the probability "
        "of its draws, which is a half here where nothing else is said.",
        left_out(store, "over the number of experts", [*OF_K.values(), ELASTIC_DRAWS]),
        _against_plain(lines),
        _gate_rules(store),
        _output_sizes(store),
    ]
    return "\n\n".join(part for part in parts if part)


def expert_curves(store: Store) -> dict[str, Curve]:
    """The curve of every arm, and of the damped ones by α: "moe16-fine-k4-scaled, α = 0.25"."""
    lines: dict[str, Curve] = {}
    for arm in ELASTIC_EXPERTS:
        lines[arm] = over_k(store, arm)
        if arm in DAMPED_ARMS:
            lines |= {f"{arm}, α = {alpha:g}": line for alpha, line in _damped(store, arm).items()}
    return lines


def labelled(k: int) -> dict[str, str]:
    """The lines of a k by their labels; what was trained at twice that k is the direct rival."""
    return {f"direct: {label(name)}" if name == _DIRECT[k] else label(name): name for name in OF_K[k]}


def _panels() -> list[tuple[str, dict[str, str]]]:
    """The picture's panels: a title, and lines by their labels; what two of them share has one place in both."""
    first, then = ELASTIC_DRAWS[:2], ELASTIC_DRAWS[2:]
    others = {label(name): name for name in (*first, *OF_K[4][2:4], *then)}
    of_k = [(f"trained for k = {k} (direct: {2 * k})", labelled(k)) for k in OF_K]
    return [*of_k, ("trained for k = 4, by other draws too", others)]


def left_out(store: Store, picture: str, shown: Sequence[Sequence[str]]) -> str:
    """Says which lines over the number of experts a picture leaves out, if it does.

    Args:
        store: the results.
        picture: which one, after "the picture".
        shown: the names in its panels.
    """
    absent = [name for name, line in expert_curves(store).items() if line and not any(name in p for p in shown)]
    listed = ", ".join(f"`{name}`" for name in absent)
    return f"Left out of the picture {picture} for legibility, and in the tables: {listed}." if absent else ""


def _damped(store: Store, arm: str) -> dict[float, Curve]:
    """α -> the curve, with the plain points up to the trained k, which α leaves alone."""
    found: dict[float, Curve] = {}
    for run in store.runs(arm, store.scale.tokens):
        own = run.values["config"]["model"]["num_experts_per_tok"]
        rows = run.measure("rank_dampings") or ()
        for alpha in {row["rank_damping"] for row in rows}:
            line = [row for row in run.measure("dials") or () if row["num_experts_per_tok"] <= own]
            line += [row for row in rows if row["rank_damping"] == alpha]
            for row in line:
                at = found.setdefault(alpha, {}).setdefault(row["num_experts_per_tok"], {})
                at[run.spec.seed] = row["loss"]
    return dict(sorted(found.items()))


def _against_plain(lines: Mapping[str, Curve]) -> str:
    """Every method minus plain top-k run with as many experts, paired by seed."""
    rows = []
    for k, arms in _TRAINED_FOR.items():
        plain = lines.get(_PLAIN[k])
        if plain is None:
            continue
        for name, line in lines.items():
            if not (name.startswith(arms) or name == _DIRECT[k]):
                continue
            gaps = {k2: paired(line[k2], plain.get(k2, {})) for k2 in line}
            beyond = _best_beyond(line, plain, k)
            last = "–" if beyond is None else f"{text_of(beyond[1], sign=True)} (k′ = {beyond[0]})"
            seeds = max((gap.count for gap in gaps.values() if gap is not None), default=0)
            cells = ["" if line is plain else text_of(gaps.get(k2), sign=True) for k2 in _IN_TABLES]
            rows.append([f"{titled(name)}; minus plain top-{k}", *cells, last, str(seeds)])
    if not rows:
        return ""
    head = ("nats", *(f"k′ = {k}" for k in _IN_TABLES), "best beyond k, minus plain's at k", "seeds")
    return "**Against plain top-k, run with as many experts** (paired by seed)\n\n" + markdown_table(head, rows)


def _gate_rules(store: Store) -> str:
    """Each rule for what the gates sum to at another k: renormalised, as trained, or softmax over all experts."""
    names = {"selected": "renormalised", "trained": "the first ones as trained", "all": "softmax over all"}
    rows = []
    for arm in GATE_NORM_ARMS:
        if arm not in ELASTIC_EXPERTS:
            continue
        for rule, text in names.items():
            line = curve(
                store,
                arm,
                store.scale.tokens,
                lambda row, rule=rule: row["num_experts_per_tok"] if row["gate_norm"] == rule else None,  # type: ignore[misc]
                measure="gate_norms",
            )
            if line:
                cells = [text_of(means(line).get(k)) for k in _GATE_COUNTS]
                rows.append([titled(arm), text, *cells, str(max(map(len, line.values())))])
    if not rows:
        return ""
    head = ("loss, nats", "gates at another k", *(f"k′ = {k}" for k in _GATE_COUNTS), "seeds")
    return (
        "**Other rules for the gates** (in use alone, of models trained with gates renormalised over the selected; "
        "what a model would do that was trained with another rule is not measured)\n\n" + markdown_table(head, rows)
    )


def _best_beyond(line: Curve, plain: Curve, k: int) -> tuple[int, Interval] | None:
    """Where more experts than k lose least against the plain model at its own k, and that difference."""
    gaps = {at: gap for at, losses in line.items() if at > k and (gap := paired(losses, plain.get(k, {}))) is not None}
    return min(gaps.items(), key=lambda item: item[1].mean) if gaps else None


def _output_sizes(store: Store) -> str:
    """Whether what separates the plain models is the size that their outputs start at."""
    tokens = store.scale.tokens
    rows = []
    for arm, scaled in _SCALED.items():
        gap = store.difference(scaled, arm, tokens)
        if gap is not None:
            factor = arm_named(scaled).model["routed_scaling_factor"]
            cells = [text_of(mean_loss(store, name, tokens)) for name in (arm, scaled)]
            rows.append([arm, f"{factor:g}", *cells, text_of(gap, sign=True), str(gap.count)])
    if not rows:
        return ""
    head = ("model", "k", "gates sum to 1", "gates sum to k", "the latter minus the former, nats", "seeds")
    parts = [
        "**The size of the output** (gates that sum to 1 make a MoE start at 1/k of the size of a dense layer of the "
        "active width; `routed_scaling_factor` = k starts it at that size, and scales what is learned too; ∞-MoE's W_z "
        "starts it at the size of a dense layer of the total width, larger by the root of total over active)",
        markdown_table(head, rows),
        _unscaled(store),
    ]
    return "\n\n".join(part for part in parts if part)


def _unscaled(store: Store) -> str:
    """The first arms, whose gates sum to 1."""
    lines = {arm: line for arm in ELASTIC_UNSCALED if (line := over_k(store, arm))}
    return f"**With gates that sum to 1**, where the weights λ were tried\n\n{_table(lines)}" if lines else ""


def _table(lines: Mapping[str, Curve]) -> str:
    """Losses over the number of experts, a row a line."""
    rows = [
        [titled(name), *(text_of(means(line).get(k)) for k in _IN_TABLES), str(max(map(len, line.values())))]
        for name, line in lines.items()
    ]
    return markdown_table(("loss, nats", *(f"k′ = {k}" for k in _IN_TABLES), "seeds"), rows)


def _claims(store: Store, section: Section) -> None:
    section.claims += [_emoe_claim(store, arm, k) for arm, k in _CLAIMED.items()]
    section.claims += [_damping_claim(store), _beyond_claim(store), _size_claim(store)]


def _emoe_claim(store: Store, arm: str, k: int) -> Claim:
    """Elastic MoE's range against the plain one's and direct training's, by the seeds that all three have."""
    alone = arm == "emoe-k4-w0-scaled"
    text = (
        ("the draws of Elastic MoE alone" if alone else f"Elastic MoE (`{arm}`)")
        + f", trained with k = {k}, {'are' if alone else 'is'} useful up to 2 to 3 times that k"
        + ("" if alone else " (arXiv 2509.21892)")
        + f", over more than plain top-k, and than training at {2 * k}"
    )
    found = [useful_ranges(over_k(store, name)) for name in (arm, _PLAIN[k], _DIRECT[k])]
    seeds = sorted(set.intersection(*map(set, found)))
    if not seeds:
        return Claim(text, "–", MISSING)
    ours, plain, direct = ([ranges[seed] for seed in seeds] for ranges in found)
    wider = [[mine.octaves - its.octaves for mine, its in zip(ours, other, strict=True)] for other in (plain, direct)]
    loss = paired(*(dict(zip(seeds, (s.loss for s in of), strict=True)) for of in (ours, plain)))
    assert loss is not None
    counts = " and ".join(str(sum(gap > 0 for gap in gaps)) for gaps in wider)
    ended = max(stretch.high for stretch in (*ours, *plain, *direct)) == 16
    return Claim(
        text,
        f"within {RANGE:g} nats of its best at k′ = {_ends(ours)}; plain {_ends(plain)}; trained at {2 * k}: "
        f"{_ends(direct)}; wider in {counts} of {len(seeds)} seeds; its best loss minus the plain one's: {nats(loss)}",
        _few(len(seeds), store)
        if len(seeds) < store.scale.side_seeds
        else _verdict_wider(wider, min(stretch.high for stretch in ours) / k, loss),
        "16 experts end a range here, so it may reach further" if ended else "",
    )


def _ends(ranges: Sequence[Stretch]) -> str:
    return each([f"{stretch.low} … {stretch.high}" for stretch in ranges])


def each(texts: Sequence[str]) -> str:
    """What every seed says: once where they agree."""
    return texts[0] if len(set(texts)) == 1 else "; ".join(texts)


def _verdict_wider(wider: Sequence[Sequence[float]], reach: float, loss: Interval) -> str:
    """Whether a range reaches far enough and is wider than each other one in every seed.

    Widths go in steps of one expert, so their spread over seeds says little: seeds are counted.

    Args:
        wider: than each other one, seed by seed.
        reach: over the trained k, at least.
        loss: the best one's minus the plain model's.
    """
    if reach < 2 or any(max(gaps) <= 0 for gaps in wider):
        return FAILS
    if any(min(gaps) <= 0 for gaps in wider):
        return "not decided: wider with some seeds alone"
    if loss.low > 0:
        return "wider, and worse: its best is above the plain one's"
    return HOLDS if loss.high <= RANGE else "wider; whether worse is not decided"


def _damping_claim(store: Store) -> Claim:
    """The α dial against Elastic MoE, at twice the trained k."""
    emoe = over_k(store, "emoe-k4-w0.0001-scaled").get(8, {})
    damped = _damped(store, _PLAIN[4]).get(0.25, {}).get(8, {})
    gap = paired(damped, emoe)
    few = gap is not None and gap.count < store.scale.side_seeds
    return Claim(
        "damping the ranks beyond the trained k (α = 0.25), for which nothing is trained, loses "
        "less at twice that k than Elastic MoE",
        nats(gap),
        MISSING if gap is None else _few(gap.count, store) if few else verdict_below(gap),
    )


def _beyond_claim(store: Store) -> Claim:
    """Whether more experts than were trained lower the loss at all."""
    text = f"8 experts, by some rule trained with 4, are {RANGE:g} nats better than plain top-4 at its 4"
    lines = expert_curves(store)
    own = lines[_PLAIN[4]].get(4, {})
    gaps = {name: paired(line.get(8, {}), own) for name, line in lines.items() if name.startswith(_TRAINED_FOR[4])}
    found = {name: gap for name, gap in gaps.items() if gap is not None}
    if not found:
        return Claim(text, "–", MISSING)
    shown = "; ".join(f"{name} {text_of(gap, sign=True)}" for name, gap in found.items())
    enough = store.scale.side_seeds
    judged = {
        name: gap
        for name, gap in gaps.items()
        if name.partition(",")[0] in ELASTIC_RULES or (gap is not None and gap.count >= enough)
    }
    known = [gap for gap in judged.values() if gap is not None]
    seeds = min(gap.count for gap in known) if len(known) == len(judged) else 0
    if seeds < enough:
        verdict = f"not decided: {len(known)} of {len(judged)} rules measured" if not seeds else _few(seeds, store)
    elif any(gap.high < -RANGE for gap in known):
        verdict = HOLDS
    else:
        verdict = FAILS if all(gap.low > -RANGE for gap in known) else UNDECIDED.replace("0", f"-{RANGE:g}")
    fewer = [name for name in found if name not in judged]
    return Claim(text, f"{shown} nats", verdict, f"of fewer seeds, and not judged: {', '.join(fewer)}" if fewer else "")


def _few(seeds: int, store: Store) -> str:
    return ONE_SEED if seeds == 1 else f"not decided: {seeds} of {store.scale.side_seeds} seeds"


def _size_claim(store: Store) -> Claim:
    """What the size of a MoE's output is worth to the paper's baseline."""
    gap = store.difference("moe-scaled", "moe", store.scale.tokens)
    ours = store.difference("infinity", "moe-scaled", store.scale.tokens)
    return Claim(
        "MoE (4 experts, top-2) gains from gates that sum to 2, which start it as large as a dense layer of its active "
        "width",
        "–" if gap is None else f"{nats(gap)}; ∞-MoE minus it: {nats(ours)}",
        better(gap),
    )
