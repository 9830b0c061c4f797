"""The paper's tables, one function each."""

import statistics
from collections.abc import Sequence

from infmoe import paper
from infmoe.hf import model_cost
from infmoe.recipes import recipe
from infmoe.reproduce.arms import titled
from infmoe.reproduce.page.accuracy import accuracy_claim, accuracy_table, mean_difference, near_guessing, points_text
from infmoe.reproduce.page.budgets import equal_rates_note
from infmoe.reproduce.page.figures import Gallery
from infmoe.reproduce.page.section import (
    FAILS,
    HOLDS,
    MISSING,
    OPEN,
    Claim,
    Section,
    at_tokens,
    better,
    command,
    in_brackets,
    lies_above,
    markdown_table,
    mean_loss,
    minus,
    nats,
    of_seeds,
    rivals,
    seeds_text,
    text_of,
    verdict_below,
)
from infmoe.reproduce.plan import Scale, tokens_text, z_arms
from infmoe.reproduce.statistics import Interval, interval, paired
from infmoe.reproduce.store import Finished, Store
from infmoe.train.config import hf_config

_HIGH_ENTROPY = 0.85  # above it routing entropy counts as high
_STABLE = 0.01  # what routing entropy may change by and still count as stable
_SMALL = 0.1  # of the layer's work: what routing may take and still count as small


def table1(store: Store, gallery: Gallery) -> Section:
    """Dense, Switch, MoE and ∞-MoE."""
    scale = store.scale
    section = Section("Table 1: dense, Switch, MoE and ∞-MoE", command("table1", scale))
    rows = []
    arms = ("dense", "switch", "moe", "infinity")
    for arm in arms:
        runs = store.runs(arm, scale.tokens)
        cost = runs[0].cost if runs else None
        rows.append(
            [
                titled(arm),
                *(paper.TABLE1[size][arm][0] for size in ("small", "medium")),
                *(f"{paper.TABLE1[size][arm][2]:.1f}" for size in ("small", "medium")),
                "–" if cost is None else f"{cost['active'] / 1e6:.2f} / {cost['total'] / 1e6:.2f}",
                "–" if cost is None else f"{cost['active_with_wz'] / 1e6:.2f} / {cost['total_with_wz'] / 1e6:.2f}",
                text_of(mean_loss(store, arm, scale.tokens)),
                "" if arm == "infinity" else text_of(store.difference("infinity", arm, scale.tokens), sign=True),
                seeds_text(runs),
            ]
        )
    low, high = paper.RACE_OF_OTHERS
    head = (
        *("model", "paper, small: act./total", "paper, medium", "paper: mean accuracy, small", "medium"),
        *("ours: act./total, M", "with W_z and routers, M", "held-out loss, nats", "∞-MoE minus it", "seeds"),
    )
    stands_in = f"; {near_guessing(store)}" if scale.name == "tiny" else ""
    section.body = markdown_table(head, rows) + (
        f"\n\nThe paper compares zero-shot accuracy{stands_in}. Its RACE-high figures near 51 % are not the usual "
        f"metric: models of this size score {low} to {high} % on RACE elsewhere ("
        "ReMoE, arXiv 2412.14711). Of its means over seven tasks the items alone make a standard error of "
        "about half a point, and its runs are one each."
    )
    printed = {arm: row[1] for arm, row in paper.TABLE1[paper.SIZES[scale.name]].items()}
    section.body += "\n\n" + accuracy_table(store, "table1", arms, scale.tokens, printed)
    section.claims.append(
        accuracy_claim(
            store,
            "∞-MoE beats dense, Switch and MoE in zero-shot accuracy, by 1.0 to 1.6 points on average (Table 1)",
            _accuracies(store),
            [mean_difference(store, "infinity", rival, scale.tokens) for rival in ("dense", "switch", "moe")],
        )
    )
    section.claims.append(
        Claim(
            "129M active parameters are comparable to a dense model of 350M (abstract)",
            f"the paper's own Table 1: {paper.TABLE1['small']['infinity'][2]} against "
            f"{paper.TABLE1['medium']['dense'][2]} points",
            OPEN,
            "needs both sizes",
        )
    )
    for rival, name in (("moe", "MoE"), ("switch", "Switch"), ("dense", "dense")):
        difference = store.difference("infinity", rival, scale.tokens)
        section.claims.append(
            Claim(
                f"∞-MoE beats {name}, in held-out loss",
                nats(difference),
                verdict_below(difference),
                "; ".join(n for n in (_budget_note(store, rival), equal_rates_note(store, "infinity", rival)) if n),
            )
        )
        margin = mean_difference(store, "infinity", rival, scale.tokens, "strength")
        section.claims.append(
            Claim(
                f"∞-MoE against {name} in the right answer's margin, mean over the tasks",
                "–"
                if margin is None
                else f"{text_of(margin, sign=True)} standard deviations of the items{in_brackets(margin)}",
                MISSING if margin is None else better(minus(margin)),
                ours=True,
            )
        )
    rivals(section, store, gallery, ("dense", "switch", "moe"), scale.tokens)
    section.claims += [_every_task_claim(), *_counted_claims()]
    return section


def _accuracies(store: Store) -> str:
    """∞-MoE's mean accuracy minus each rival's, in points."""
    found = {arm: mean_difference(store, "infinity", arm, store.scale.tokens) for arm in ("dense", "switch", "moe")}
    shown = [f"{text_of(value, 1, sign=True)} ({arm})" for arm, value in found.items() if value is not None]
    return f"mean of six tasks, points: {', '.join(shown)}" if shown else "–"


def table2(store: Store, gallery: Gallery) -> Section:
    """The dimension of the index."""
    scale = store.scale
    section = Section("Table 2: the dimension of z", command("table2", scale))
    names = z_arms(scale)
    rows, line = [], {}
    last = names[scale.z_dims[-1]]
    for z_dim, (paper_z, printed) in zip(scale.z_dims, paper.TABLE2.items(), strict=True):
        arm = names[z_dim]
        difference = store.difference(arm, last, scale.tokens) if arm != last else None
        if difference is not None:
            line[float(z_dim)] = difference
        rows.append(
            [
                *((str(paper_z), f"{printed:.3f}") if paper.of_small(scale.name) else ("–", "–")),
                str(z_dim),
                text_of(mean_loss(store, arm, scale.tokens)),
                text_of(difference, sign=True) if difference else "",
                *_costs(store, arm),
                seeds_text(store.runs(arm, scale.tokens)),
            ]
        )
    head = (
        *("paper: d_z", "paper: “PPL”", "ours: d_z", "held-out loss, nats", f"minus d_z = {scale.z_dims[-1]}"),
        *("parameters with W_z, M", "MFLOPs per token, executed", "seeds"),
    )
    section.body = f"{markdown_table(head, rows)}\n\n" + (
        paper.none_at_this_size(scale.name, "Table 2")
        or "The paper's “PPL” is a cross-entropy in nats: exp of it, 25, is what a GPT-2 small reaches on FineWeb "
        f"(llm.c: {paper.DENSE_ON_FINEWEB:.3f} nats). "
        f"Of the model with d_z = 256 it prints {paper.TABLE2[256]:.3f} here and {paper.TABLE6['infinity']:.3f} in "
        "Table 6, and does not say why they differ, by more than most of this table's rows do."
    )
    if line:
        picture = gallery.lines(
            "table2.png",
            [("", {"∞-MoE": line})],
            references={f"d_z = {scale.z_dims[-1]}": {float(scale.z_dims[-1]): Interval(0.0, 0.0, scale.side_seeds)}},
            x_label="dimension of z",
            y_label=f"loss minus that at d_z = {scale.z_dims[-1]} (nats)",
            title=f"Table 2 at {tokens_text(scale.tokens)} tokens (95 %, paired by seed)",
            levels=[0.0],
        )
        section.pictures.append((section.title, picture))
    behind = {z: store.difference(names[z], last, scale.tokens) for z in scale.z_dims[:-1]}
    known = {z: gap.mean for z, gap in behind.items() if gap is not None} | {scale.z_dims[-1]: 0.0}
    small, large = behind[scale.z_dims[0]], behind[scale.z_dims[-2]]
    section.claims += [
        Claim(
            "a larger d_z helps up to a point: the smallest is 0.025 nats behind the largest "
            f"(Table 2{_of_small(scale)})",
            nats(small) + (f"; best at d_z = {min(known, key=known.__getitem__)}" if len(known) > 1 else ""),
            MISSING if small is None else verdict_below(minus(small)),
        ),
        Claim(
            f"beyond a moderate d_z there is no further gain (§5.3: 256 is 0.006 nats behind 128{_of_small(scale)})",
            "–" if large is None else f"{nats(minus(large))}: d_z = {scale.z_dims[-1]} against {scale.z_dims[-2]}",
            MISSING if large is None else verdict_below(large),
        ),
    ]
    return section


def _of_small(scale: Scale) -> str:
    """Says behind a table's number that it is of another size, where it is."""
    return "" if paper.of_small(scale.name) else ", of the small model"


def table3(store: Store, gallery: Gallery) -> Section:
    """Routing entropy over training."""
    scale = store.scale
    tokens = scale.entropy_tokens
    section = Section("Table 3: routing entropy over training", command("table3", scale))
    runs = [run for run in store.runs("infinity", tokens) if not run.diverged]
    width = recipe("small/infinity").model["intermediate_size"]  # of the model that the paper's table is of
    around = tokens / 32  # one step's statistics jump about by more than training moves them

    def at(name: str, share: float) -> Interval | None:
        return interval([at_tokens(run, name, share * tokens, around) for run in runs]) if runs else None

    rows = []
    for i, (step, printed) in enumerate(paper.TABLE3.items(), start=1):
        share = i / len(paper.TABLE3)
        units = f"{width**printed:,.0f} of {width}"
        found = {name: at(name, share) for name in ("entropy", "effective_units", "dead_ratio")}
        rows.append(
            [
                *((f"{step:,}", f"{printed:.3f}", units) if paper.of_small(scale.name) else ("–", "–", "–")),
                tokens_text(round(share * tokens)),
                text_of(found["entropy"]),
                text_of(found["effective_units"], 0),
                text_of(found["dead_ratio"], 4),
            ]
        )
    head = (
        *("paper: step", "paper: entropy", "paper: effective units", "ours: tokens", "entropy"),
        *("effective units of " + (str(_width(runs)) if runs else "–"), "never selected"),
    )
    theirs = paper.none_at_this_size(scale.name, "Table 3") or (
        f"The paper's last row is {width ** (printed - 1):.0%} of its units: stable, and far from balanced."
    )
    section.body = markdown_table(head, rows) + (
        f"\n\nEffective units: exp of the entropy. {theirs} Ours is taken over {_stats_tokens(runs)} tokens of a "
        "training step, so a unit that is rare counts as never selected there, and averaged over layers and over the "
        f"steps recorded within {around / 1e6:.2g}M tokens."
    )
    if runs:
        picture = gallery.lines(
            "table3.png",
            [
                ("entropy over log units", {"∞-MoE": _course(runs, "entropy")}),
                ("rms σ over rms μ", {"∞-MoE": _course(runs, "sigma_to_mu")}),
                ("units that two samples share", {"∞-MoE": _course(runs, "overlap_ratio")}),
            ],
            x_label="training tokens",
            y_label=["entropy / log units", "rms σ / rms μ", "share of their units"],
            title="What the router does, mean over layers (95 % over seeds)",
            few_ticks=True,
        )
        section.pictures.append((section.title, picture))
    last, units_last = at("entropy", 1.0), at("effective_units", 1.0)
    half = 0.5 * tokens
    drifts = [at_tokens(r, "entropy", tokens, around) - at_tokens(r, "entropy", half, around) for r in runs]
    drift = interval([abs(change) for change in drifts]) if drifts else None
    printed_drift = paper.TABLE3[20_000] - paper.TABLE3[10_000]
    section.claims += [
        Claim(
            f"routing entropy stays high (Table 3{_of_small(scale)}: 0.893 at the end; counted as high: above "
            f"{_HIGH_ENTROPY})",
            text_of(last),
            lies_above(last, _HIGH_ENTROPY),
            "" if last is None else f"{text_of(units_last, 0)} of {_width(runs)} units effective",
        ),
        Claim(
            f"it “quickly stabilized” (Table 3: over the last half {printed_drift:+.3f}{_of_small(scale)}; counted as "
            f"stable: a change of up to {_STABLE})",
            "–" if drift is None else f"it changes by {text_of(drift)} over the last half{in_brackets(drift)}",
            {HOLDS: FAILS, FAILS: HOLDS}.get(lies_above(drift, _STABLE), lies_above(drift, _STABLE)),
        ),
    ]
    return section


def _stats_tokens(runs: Sequence[Finished]) -> str:
    return str(runs[0].values["config"]["log"]["stats_tokens"]) if runs else "some"


def _width(runs: Sequence[Finished]) -> int:
    return int(runs[0].values["config"]["model"]["intermediate_size"])


def _course(runs: Sequence[Finished], name: str) -> dict[float, Interval]:
    tokens = runs[0].values["curve"]["tokens"][::4]
    return {float(t): interval([at_tokens(run, name, t) for run in runs]) for t in tokens}


def table5(store: Store, gallery: Gallery) -> Section:
    """More data."""
    scale = store.scale
    tokens = scale.long_tokens
    section = Section("Table 5: MoE and ∞-MoE on more data", command("table5", scale))
    rows = [
        [
            titled(arm),
            f"{paper.TABLE5[arm][1] / 100:.3f}" if paper.of_small(scale.name) else "–",
            text_of(mean_loss(store, arm, tokens)),
            seeds_text(store.runs(arm, tokens)),
        ]
        for arm in ("moe", "infinity")
    ]
    difference = store.difference("infinity", "moe", tokens)
    head = ("model", "paper: mean accuracy, 100B", f"ours: loss at {tokens_text(tokens)}, nats", "seeds")
    printed = {arm: row[0] for arm, row in paper.TABLE5.items()} if paper.of_small(scale.name) else {}
    averages = ", ".join(f"{statistics.fmean(values) / 100:.3f} ({arm})" for arm, values in printed.items())
    parts = [
        markdown_table(head, rows),
        f"∞-MoE minus MoE: {text_of(difference, sign=True)} nats.",
        paper.none_at_this_size(scale.name, "Table 5") or f"The paper's seven columns average to {averages}.",
        accuracy_table(store, "table5", ("moe", "infinity"), tokens, printed),
    ]
    section.body = "\n\n".join(part for part in parts if part)
    accuracy = mean_difference(store, "infinity", "moe", tokens)
    section.claims.append(
        accuracy_claim(
            store,
            f"∞-MoE is ahead of MoE in accuracy after 100B tokens, 0.412 against 0.407 (Table 5{_of_small(scale)})",
            points_text(accuracy),
            [accuracy],
        )
    )
    section.claims.append(
        Claim(
            f"∞-MoE is ahead of MoE in held-out loss at {tokens_text(tokens)} tokens",
            nats(difference),
            verdict_below(difference),
            _budget_note(store, "moe", tokens),
        )
    )
    section.claims.append(_lead_over_data(store))
    rivals(section, store, gallery, ("moe",), tokens)
    return section


def _lead_over_data(store: Store) -> Claim:
    """Whether the lead over MoE keeps its size on more data, seed by seed."""
    scale = store.scale
    sizes = (scale.tokens, scale.long_tokens)
    losses = [[store.losses(arm, tokens) for tokens in sizes] for arm in ("infinity", "moe")]
    seeds = set.intersection(*(set(found) for arm in losses for found in arm))
    leads = [{seed: ours[seed] - theirs[seed] for seed in seeds} for ours, theirs in zip(*losses, strict=True)]
    change = paired(leads[1], leads[0])
    shown = [f"{text_of(interval(list(lead.values())), sign=True)} nats" for lead in leads if lead]
    at = [f"{text} at {tokens_text(tokens)} tokens" for text, tokens in zip(shown, sizes, strict=False)]
    verdict = better(change)
    early = paper.TABLE1["small"]["infinity"][2] - paper.TABLE1["small"]["moe"][2]
    late = paper.TABLE5["infinity"][1] - paper.TABLE5["moe"][1]
    return Claim(
        "whether ∞-MoE's lead over MoE keeps its size on more data, in held-out loss",
        ", ".join(at) + ("" if change is None else f" ({of_seeds(change)})") or "–",
        {"better": "it grows", "worse": "it shrinks"}.get(verdict, verdict),
        f"the paper's, in mean accuracy of its small model: {early:.1f} points at 10B tokens, "
        f"{late:.1f} at 100B; it says that the gains persist",
        ours=True,
    )


def table6(store: Store, gallery: Gallery) -> Section:
    """Sixteen experts."""
    scale = store.scale
    section = Section("Table 6: sixteen experts", command("table6", scale))
    rows = []
    for arm in ("moe16", "moe16-fine", "moe16-fine-k8-scaled", "infinity"):
        printed = paper.TABLE6.get(arm) if paper.of_small(scale.name) else None
        runs = store.runs(arm, scale.tokens)
        rows.append(
            [
                titled(arm),
                "–" if printed is None else f"{printed:.3f}",
                *_costs(store, arm),
                text_of(mean_loss(store, arm, scale.tokens)),
                "" if arm == "infinity" else text_of(store.difference("infinity", arm, scale.tokens), sign=True),
                seeds_text(runs),
            ]
        )
    head = (
        *("model", "paper: “PPL” (nats)", "ours: parameters with W_z and routers, M", "MFLOPs per token, executed"),
        *("held-out loss, nats", "∞-MoE minus it", "seeds"),
    )
    notes = [
        "`moe16`: 16 experts as wide as the 4 of Table 1, top-2, so four times the parameters. `moe16-fine`: 16 "
        "experts of the same total width as ∞-MoE, top-8; `moe16-fine-k8-scaled`: the same with gates that sum to 8, "
        "which starts its output at the size of a dense layer of its active width, and not at an eighth of it; ∞-MoE's "
        "starts at that of its total width, so larger by the root of 2. The "
        "paper ran 16 experts, top-2, at equal active parameters: `moe16`; the others are ours.",
        f"Its {paper.TABLE6['moe16']:.3f} is no strong rival: a plain dense GPT-2 small reaches "
        f"{paper.DENSE_ON_FINEWEB:.3f} on as much of FineWeb with the same batch, learning rate and warm-up elsewhere "
        "(llm.c), though perhaps on other held-out text."
        if paper.of_small(scale.name)
        else "",
        paper.none_at_this_size(scale.name, "Table 6"),
    ]
    section.body = f"{markdown_table(head, rows)}\n\n{' '.join(note for note in notes if note)}"
    difference = store.difference("infinity", "moe16", scale.tokens)
    section.claims.append(
        Claim(
            f"∞-MoE beats 16 experts, 3.238 against 3.294 (Table 6{_of_small(scale)})",
            nats(difference),
            verdict_below(difference),
            _budget_note(store, "moe16"),
        )
    )
    more = store.difference("moe16", "moe", scale.tokens)
    section.claims.append(
        Claim(
            "“when the number of experts increases, it becomes difficult to train each expert effectively” (abstract): "
            "16 experts are no better than 4, each as wide",
            nats(more),
            MISSING if more is None else verdict_below(minus(more)),
            _of_sixteen(store),
        )
    )
    rivals(section, store, gallery, ("moe16", "moe16-fine", "moe16-fine-k8-scaled"), scale.tokens)
    return section


def _of_sixteen(store: Store) -> str:
    """What 16 experts have more of than 4."""
    many, few = (store.runs(arm, store.scale.tokens) for arm in ("moe16", "moe"))
    if not many or not few:
        return ""
    share = many[0].cost["total_with_wz"] / few[0].cost["total_with_wz"]
    return f"16 take {share:.1f} times the parameters of 4; each sees a quarter of the tokens"


def _costs(store: Store, arm: str) -> tuple[str, str]:
    """Parameters with W_z and routers, and executed FLOPs per token, in millions."""
    runs = store.runs(arm, store.scale.tokens)
    if not runs:
        return "–", "–"
    return f"{runs[0].cost['total_with_wz'] / 1e6:.2f}", f"{runs[0].cost['flops_executed'] / 1e6:.2f}"


def _budget_note(store: Store, rival: str, tokens: int | None = None) -> str:
    """How much of each budget ∞-MoE takes over the rival."""
    ours, theirs = (store.runs(arm, tokens or store.scale.tokens) for arm in ("infinity", rival))
    if not ours or not theirs:
        return ""
    budgets = {
        "total parameters without W_z": "total",
        "with it": "total_with_wz",
        "active ones without W_z": "active",
        "executed FLOPs": "flops_executed",
    }
    shares = [f"{ours[0].cost[key] / theirs[0].cost[key]:.2f} ({name})" for name, key in budgets.items()]
    return f"∞-MoE takes, over the rival: {', '.join(shares)}"


def _every_task_claim() -> Claim:
    """The paper's sentence on Table 1, against that table."""
    behind = []
    for size, printed in paper.TABLE1.items():
        ours = printed["infinity"][1]
        best = [max(printed[arm][1][i] for arm in printed if arm != "infinity") for i in range(len(ours))]
        tasks = zip(paper.TABLE1_TASKS, ours, best, strict=True)
        behind += [f"{task} {mine:.1f} < {theirs:.1f} ({size})" for task, mine, theirs in tasks if mine < theirs]
    return Claim(
        "∞-MoE “consistently outperformed” the three others “across all tasks” (§4.2)",
        f"the paper's own Table 1: {', '.join(behind)}",
        FAILS if behind else HOLDS,
    )


def _counted_claims() -> list[Claim]:
    """What the paper says of size and work, by counting at its own size."""
    cost = model_cost(hf_config(recipe("small/infinity")))
    dense, wide = (model_cost(hf_config(recipe(f"small/{name}"))) for name in ("dense", "dense-wide"))
    share = cost.ffn_flops_router / cost.ffn_flops_executed
    over_dense = cost.ffn_flops_router / dense.ffn_flops_executed
    executed, ideal = (flops / wide.ffn_flops_executed for flops in (cost.ffn_flops_executed, cost.ffn_flops_ideal))
    bare = (cost.ffn_flops_ideal - cost.ffn_flops_router) / wide.ffn_flops_executed
    return [
        Claim(
            "GPT-2 small with ∞-MoE has 129M active parameters of 186M (Table 1)",
            f"{cost.active / 1e6:.1f}M of {cost.total / 1e6:.1f}M without W_z and the routers, "
            f"{cost.active_with_wz / 1e6:.1f}M of {cost.total_with_wz / 1e6:.1f}M with them",
            "holds where W_z and the routers are left out",
            "every token uses all of them",
        ),
        Claim(
            f"the routing overhead is small (Limitations; counted as small: up to {_SMALL:.0%})",
            f"GPT-2 small, d_z = 256, K = 2: {share:.0%} of the layer's executed FLOPs, {over_dense:.0%} of a dense "
            "FFN's",
            HOLDS if share <= _SMALL else FAILS,
            "router maps and W_z z, counted",
        ),
        Claim(
            "K samples at a ratio r take about K r of a dense FFN's FLOPs (Limitations)",
            f"GPT-2 small, K r = 0.5, of the dense FFN of the same total width: {executed:.2f} executed, {ideal:.2f} "
            f"ideal, of which {ideal - bare:.2f} route",
            "holds of ideal FLOPs without the router"
            if bare <= 0.5 and ideal > 0.5
            else HOLDS
            if bare <= 0.5
            else FAILS,
            "executed: products that skip nothing, as the paper's; ideal: the union of independent masks",
        ),
    ]
