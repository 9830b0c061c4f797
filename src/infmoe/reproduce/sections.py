"""Results as tables, pictures and answers: one function for each table and figure of the paper."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infmoe.errors import InfMoEError
from infmoe.hf import model_cost
from infmoe.recipes import recipe
from infmoe.reproduce import paper
from infmoe.reproduce.figures import Gallery
from infmoe.reproduce.plan import Scale, tokens_text
from infmoe.reproduce.statistics import Interval, interval
from infmoe.reproduce.store import Finished, Store, read_json
from infmoe.train.config import hf_config

_HIGH_ENTROPY = 0.85
HOLDS, FAILS, OPEN = "holds", "does not hold", "not testable at this scale"
UNDECIDED = "not decided: the interval contains 0"
ONE_SEED = "not decided: one seed"
MISSING = "not measured yet"


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, and what was found.

    Attributes:
        text: the paper's.
        measured: ours.
        verdict: one of the above.
        reason: where it needs one.
    """

    text: str
    measured: str
    verdict: str
    reason: str = ""


@dataclass
class Section:
    """One part of the page.

    Attributes:
        title: its heading.
        command: what makes the results.
        body: Markdown.
        claims: rows of the opening table.
        pictures: PNGs, each with what it shows.
    """

    title: str
    command: str
    body: str = ""
    claims: list[Claim] = field(default_factory=list)
    pictures: list[tuple[str, Path]] = field(default_factory=list)


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
        return ONE_SEED
    return HOLDS if difference.high < 0 else FAILS if difference.low > 0 else UNDECIDED


def _nats(difference: Interval | None) -> str:
    return f"{text_of(difference, sign=True)} nats"


def _budget_note(rival: str) -> str:
    return {"dense": "equal active parameters, half the total"}.get(rival, "equal total and active, W_z left out")


def _router_claim() -> Claim:
    """The router's share of the layer's work at the paper's own size, by counting."""
    cost = model_cost(hf_config(recipe("small/infinity")))
    dense = model_cost(hf_config(recipe("small/dense")))
    share = cost.ffn_flops_router / cost.ffn_flops_executed
    over_dense = cost.ffn_flops_router / dense.ffn_flops_executed
    return Claim(
        "the routing overhead is small (Limitations)",
        f"at GPT-2 small, d_z = 256, K = 2: {share:.0%} of the layer's FLOPs, {over_dense:.0%} of a dense FFN's",
        FAILS,
        "router maps and W_z z, counted",
    )


def _rivals(section: Section, store: Store, gallery: Gallery, arms: Sequence[str], tokens: int) -> None:
    """A picture of the rivals' losses minus ∞-MoE's."""
    found = {arm: difference for arm in arms if (difference := store.difference(arm, "infinity", tokens)) is not None}
    if found:
        name = section.command.split()[2]
        picture = gallery.bars(
            f"{name}.png",
            found,
            x_label=f"held-out loss minus ∞-MoE's at {tokens_text(tokens)} tokens (nats; 95 %, paired by seed)",
            title="Right of 0: ∞-MoE is better",
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


def at_dials(row: Mapping[str, Any], **dials: Any) -> bool:
    """Whether a point has these dials, and no mode of its own unless one is given."""
    return all(row.get(name) == value for name, value in ({"mode": None} | dials).items())


# ---- The paper's tables --------------------------------------------------------------------------------------------


def table1(store: Store, gallery: Gallery) -> Section:
    """Dense, Switch, MoE and ∞-MoE."""
    scale = store.scale
    section = Section("Table 1: dense, Switch, MoE and ∞-MoE", _command("table1", scale))
    rows = []
    for arm in ("dense", "switch", "moe", "infinity"):
        runs = store.runs(arm, scale.tokens)
        cost = runs[0].cost if runs else None
        rows.append(
            [
                arm,
                *(paper.TABLE1[size][arm][0] for size in ("small", "medium")),
                *(f"{paper.TABLE1[size][arm][2]:.1f}" for size in ("small", "medium")),
                "–" if cost is None else f"{cost['active'] / 1e6:.2f} / {cost['total'] / 1e6:.2f}",
                "–" if cost is None else f"{cost['active_with_wz'] / 1e6:.2f} / {cost['total_with_wz'] / 1e6:.2f}",
                text_of(mean_loss(store, arm, scale.tokens)),
                "" if arm == "infinity" else text_of(store.difference("infinity", arm, scale.tokens), sign=True),
                seeds_text(runs),
            ]
        )
    head = (
        *("model", "paper, small: act./total", "paper, medium", "paper: mean accuracy, small", "medium"),
        *("ours: act./total, M", "with W_z and routers, M", "held-out loss, nats", "∞-MoE minus it", "seeds"),
    )
    section.body = markdown_table(head, rows) + (
        "\n\nThe paper compares zero-shot accuracy; at this scale models score at chance there, so the loss stands in. "
        "Its RACE-high figures near 51 % are not the usual metric: models of this size score 28 to 29 % on RACE in "
        "others' tables. Its standard error over the seven tasks is about 0.5 points, its runs one each."
    )
    section.claims.append(
        Claim(
            "∞-MoE beats dense, Switch and MoE in zero-shot accuracy, by 1.0 to 1.6 points on average (Table 1)",
            "–",
            OPEN,
            "models of this size score at chance; the loss stands in below",
        )
    )
    section.claims.append(
        Claim(
            "129M active parameters are comparable to a dense model of 350M (abstract)", "–", OPEN, "needs both sizes"
        )
    )
    for rival, name in (("moe", "MoE"), ("switch", "Switch"), ("dense", "dense")):
        difference = store.difference("infinity", rival, scale.tokens)
        section.claims.append(
            Claim(
                f"∞-MoE beats {name}, in held-out loss",
                _nats(difference),
                verdict_below(difference),
                _budget_note(rival),
            )
        )
    _rivals(section, store, gallery, ("dense", "switch", "moe"), scale.tokens)
    section.claims.append(_router_claim())
    return section


def table2(store: Store, gallery: Gallery) -> Section:
    """The dimension of the index."""
    scale = store.scale
    section = Section("Table 2: the dimension of z", _command("table2", scale))
    names = _z_arms(scale)
    best = min((loss.mean, z) for z, loss in _known(store, names, scale.tokens).items()) if names else None
    rows, line = [], {}
    last = names[scale.z_dims[-1]]
    for z_dim, (paper_z, printed) in zip(scale.z_dims, paper.TABLE2.items(), strict=True):
        arm = names[z_dim]
        loss = mean_loss(store, arm, scale.tokens)
        if loss is not None:
            line[float(z_dim)] = loss
        difference = store.difference(arm, last, scale.tokens) if arm != last else None
        rows.append(
            [
                str(paper_z),
                f"{printed:.3f}",
                str(z_dim),
                text_of(loss),
                text_of(difference, sign=True) if difference else "",
            ]
        )
    head = ("paper: d_z", "paper: “PPL”", "ours: d_z", "held-out loss, nats", f"minus d_z = {scale.z_dims[-1]}")
    section.body = markdown_table(head, rows) + (
        "\n\nThe paper's “PPL” is a cross-entropy in nats: exp of it, 25, is what a GPT-2 small reaches on FineWeb."
    )
    if line:
        picture = gallery.lines(
            "table2.png",
            [("", {"∞-MoE": line})],
            x_label="dimension of z",
            y_label="held-out loss (nats per token)",
            title=f"Table 2 at {tokens_text(scale.tokens)} tokens (95 % over seeds)",
        )
        section.pictures.append((section.title, picture))
    small = store.difference(names[scale.z_dims[0]], last, scale.tokens)
    section.claims.append(
        Claim(
            "a larger d_z helps up to a point: the smallest is 0.025 nats behind the largest (Table 2)",
            f"{text_of(small, sign=True)} nats" + (f"; best at d_z = {best[1]}" if best and line else ""),
            MISSING if small is None else verdict_below(_minus(small)),
        )
    )
    return section


def _known(store: Store, names: Mapping[int, str], tokens: int) -> dict[int, Interval]:
    found = {z: mean_loss(store, arm, tokens) for z, arm in names.items()}
    return {z: loss for z, loss in found.items() if loss is not None} or {0: Interval(0.0, None, 1)}


def _z_arms(scale: Scale) -> dict[int, str]:
    return {z: "infinity" if z == scale.z_dims[-1] else f"infinity-z{z}" for z in scale.z_dims}


def _minus(value: Interval) -> Interval:
    return Interval(-value.mean, value.half_width, value.count)


def table3(store: Store, gallery: Gallery) -> Section:
    """Routing entropy over training."""
    scale = store.scale
    tokens = scale.entropy_tokens
    section = Section("Table 3: routing entropy over training", _command("table3", scale))
    runs = store.runs("infinity", tokens)
    rows = []
    for i, (step, printed) in enumerate(paper.TABLE3.items(), start=1):
        share = i / len(paper.TABLE3)
        found = {
            name: interval([_at(run, name, share * tokens) for run in runs]) if runs else None
            for name in ("entropy", "effective_units", "dead_ratio")
        }
        rows.append(
            [
                f"{step:,}",
                f"{printed:.3f}",
                f"{6144**printed:,.0f} of 6144",
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
    section.body = markdown_table(head, rows) + (
        "\n\nEffective units: exp of the entropy; the paper's last row is 39 % of its units: stable, and far from "
        f"balanced. Ours is taken over {_stats_tokens(runs)} tokens of one training step, averaged over layers, so a "
        "unit that is rare counts as never selected there."
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
            y_label="mean over layers",
            title="What the router does (95 % over seeds)",
            few_ticks=True,
        )
        section.pictures.append((section.title, picture))
    last = interval([_at(run, "entropy", tokens) for run in runs]) if runs else None
    section.claims.append(
        Claim(
            f"routing entropy stays high (Table 3: 0.893 at the end; counted as high: above {_HIGH_ENTROPY})",
            text_of(last),
            MISSING
            if last is None
            else HOLDS
            if last.low > _HIGH_ENTROPY
            else FAILS
            if last.high < _HIGH_ENTROPY
            else UNDECIDED,
            "" if last is None else f"{_at(runs[0], 'effective_units', tokens):.0f} of {_width(runs)} units effective",
        )
    )
    return section


def _stats_tokens(runs: Sequence[Finished]) -> str:
    return str(runs[0].values["config"]["log"]["stats_tokens"]) if runs else "some"


def _width(runs: Sequence[Finished]) -> int:
    return int(runs[0].values["config"]["model"]["intermediate_size"])


def _at(run: Finished, name: str, tokens: float) -> float:
    """A figure of the training's course, at the record nearest to so many tokens."""
    course = run.values["curve"]
    nearest = min(range(len(course["tokens"])), key=lambda i: abs(course["tokens"][i] - tokens))
    return course[name][nearest]


def _course(runs: Sequence[Finished], name: str) -> dict[float, Interval]:
    tokens = runs[0].values["curve"]["tokens"][::4]
    return {float(t): interval([_at(run, name, t) for run in runs]) for t in tokens}


def table5(store: Store, gallery: Gallery) -> Section:
    """More data."""
    scale = store.scale
    tokens = scale.long_tokens
    section = Section("Table 5: MoE and ∞-MoE on more data", _command("table5", scale))
    rows = [
        [arm, f"{paper.TABLE5[arm]:.3f}", text_of(mean_loss(store, arm, tokens)), seeds_text(store.runs(arm, tokens))]
        for arm in ("moe", "infinity")
    ]
    difference = store.difference("infinity", "moe", tokens)
    head = ("model", "paper: mean accuracy, 100B", f"ours: loss at {tokens_text(tokens)}, nats", "seeds")
    section.body = markdown_table(head, rows) + f"\n\n∞-MoE minus MoE: {text_of(difference, sign=True)} nats."
    section.claims.append(
        Claim("∞-MoE is ahead of MoE in accuracy after 100B tokens, 0.412 against 0.407 (Table 5)", "–", OPEN)
    )
    section.claims.append(
        Claim(
            f"∞-MoE is ahead of MoE in held-out loss at {tokens_text(tokens)} tokens",
            _nats(difference),
            verdict_below(difference),
        )
    )
    _rivals(section, store, gallery, ("moe",), tokens)
    return section


def table6(store: Store, gallery: Gallery) -> Section:
    """Sixteen experts."""
    scale = store.scale
    section = Section("Table 6: sixteen experts", _command("table6", scale))
    rows = []
    for arm in ("moe16", "moe16-fine", "infinity"):
        printed = paper.TABLE6.get(arm)
        runs = store.runs(arm, scale.tokens)
        rows.append(
            [
                arm,
                "–" if printed is None else f"{printed:.3f}",
                "–" if not runs else f"{runs[0].cost['total_with_wz'] / 1e6:.2f}",
                text_of(mean_loss(store, arm, scale.tokens)),
                "" if arm == "infinity" else text_of(store.difference("infinity", arm, scale.tokens), sign=True),
                seeds_text(runs),
            ]
        )
    head = ("model", "paper: “PPL” (nats)", "ours: parameters, M", "held-out loss, nats", "∞-MoE minus it", "seeds")
    section.body = markdown_table(head, rows) + (
        "\n\n`moe16`: 16 experts as wide as the 4 of Table 1, top-2, so four times the parameters. `moe16-fine`: 16 "
        "experts of the same total width as ∞-MoE, top-8. The paper "
        "ran 16 experts, top-2, at equal active parameters: `moe16`; the other is ours."
    )
    difference = store.difference("infinity", "moe16", scale.tokens)
    section.claims.append(
        Claim(
            "∞-MoE beats 16 experts, 3.238 against 3.294 (Table 6)",
            _nats(difference),
            verdict_below(difference),
            "the sixteen experts have four times the FFN parameters here",
        )
    )
    _rivals(section, store, gallery, ("moe16", "moe16-fine"), scale.tokens)
    return section


# ---- The paper's figures --------------------------------------------------------------------------------------------


def figure2(store: Store, gallery: Gallery) -> Section:
    """Loss over the number of samples, or of experts."""
    scale = store.scale
    tokens = scale.tokens
    section = Section("Figure 2: more experts or samples at inference", _command("figure2", scale))
    keep, trained_k = 0.25, 2
    infinity = relative(
        store,
        "infinity",
        tokens,
        "dials",
        lambda row: "num_samples" in row and at_dials(row, keep_ratio=keep),
        lambda row: at_dials(row, keep_ratio=keep, num_samples=trained_k),
        lambda row: float(row["num_samples"]),
    )
    mean = relative(
        store,
        "infinity",
        tokens,
        "dials",
        lambda row: at_dials(row, keep_ratio=keep, mode="mu"),
        lambda row: at_dials(row, keep_ratio=keep, num_samples=trained_k),
        lambda row: "mu",
    )
    experts = {
        norm: relative(
            store,
            "moe",
            tokens,
            "gate_norms",
            lambda row, norm=norm: row["gate_norm"] == norm,  # type: ignore[misc]
            lambda row: row.get("num_experts_per_tok") == 2,
            lambda row: float(row["num_experts_per_tok"]),
        )
        for norm in ("selected", "trained", "all")
    }
    columns = [f"K = {k}" for k in sorted({*infinity, *experts["selected"]})]
    ks = sorted({*infinity, *experts["selected"]})
    names = {
        "selected": "MoE, gates renormalised",
        "trained": "MoE, first gates as trained",
        "all": "MoE, softmax over all",
    }
    rows = [["∞-MoE, sampled", *(text_of(infinity.get(k), sign=True) for k in ks)]]
    rows += [[names[norm], *(text_of(line.get(k), sign=True) for k in ks)] for norm, line in experts.items()]
    section.body = (
        markdown_table(("loss minus that at K = 2, nats", *columns), rows)
        + f"\n\n∞-MoE at z = μ, which draws nothing: {text_of(mean.get('mu'), sign=True)} nats. "
        "Every column is the same checkpoints, run with another K; MoE has 4 experts, trained with 2."
    )
    if infinity:
        drawn = {"∞-MoE, sampled": infinity} | {names[n]: line for n, line in experts.items() if line}
        picture = gallery.lines(
            "figure2.png",
            [("", drawn)],
            x_label="samples or experts per token, K",
            y_label="loss minus that at K = 2 (nats)",
            title="Figure 2: one checkpoint, more experts (95 % over seeds)",
        )
        section.pictures.append((section.title, picture))
    section.claims.append(
        Claim("∞-MoE is 2.5 % better than MoE at few samples (§5.1, in accuracy)", "–", OPEN, "accuracy is at chance")
    )
    gain = infinity.get(8.0)
    section.claims.append(
        Claim(
            "∞-MoE gains from more samples at inference (§5.1, Figure 2), in held-out loss",
            f"K = 8 against 2: {text_of(gain, 4, sign=True)} nats",
            verdict_below(gain),
            _void_dial(store, tokens),
        )
    )
    lost = experts["selected"].get(4.0)
    section.claims.append(
        Claim(
            "more experts than trained make MoE unstable (§5.1: “may introduce instability at high values”), in loss",
            f"4 against 2 experts: {text_of(lost, 4, sign=True)} nats",
            MISSING if lost is None else verdict_below(_minus(lost)),
        )
    )
    return section


def _void_dial(store: Store, tokens: int) -> str:
    """What the overlap of two samples says of the K dial."""
    overlaps = [
        row["overlap_ratio"]
        for run in store.runs("infinity", tokens)
        for row in run.measure("dials") or ()
        if at_dials(row, keep_ratio=0.25, num_samples=2)
    ]
    if not overlaps:
        return ""
    share = statistics.fmean(overlaps)
    void = "more than 90 %, so the K dial is void" if share > 0.9 else "so K draws something new, if little"
    return f"two samples share {share:.0%} of their units: {void}"


def figure3(store: Store, gallery: Gallery) -> Section:
    """Loss over data."""
    scale = store.scale
    section = Section("Figure 3: more data", _command("figure3", scale))
    drawn: dict[str, dict[float, Interval]] = {"MoE": {}, "∞-MoE": {}}
    rows, gaps = [], {}
    for tokens in scale.data_sizes:
        found = {name: mean_loss(store, arm, tokens) for name, arm in (("MoE", "moe"), ("∞-MoE", "infinity"))}
        difference = store.difference("infinity", "moe", tokens)
        rows.append(
            [tokens_text(tokens), text_of(found["MoE"]), text_of(found["∞-MoE"]), text_of(difference, sign=True)]
        )
        for name, loss in found.items():
            if loss is not None:
                drawn[name][float(tokens)] = loss
        if difference is not None:
            gaps[float(tokens)] = difference
    head = ("tokens", "MoE, nats", "∞-MoE, nats", "∞-MoE minus MoE")
    section.body = markdown_table(head, rows) + (
        "\n\nEvery size is a run of its own, its learning rate's cosine as long as the run. The paper draws HellaSwag "
        "accuracy, which is at chance here."
    )
    if gaps:
        picture = gallery.lines(
            "figure3.png",
            [("held-out loss", drawn), ("∞-MoE minus MoE", {"paired by seed": gaps})],
            x_label="training tokens",
            y_label="nats per token",
            title="Figure 3: more data (95 % over seeds)",
        )
        section.pictures.append((section.title, picture))
    return section


def figure4(store: Store, gallery: Gallery) -> Section:
    """The fused kernel, from `infmoe bench ffn`."""
    section = Section("Figure 4: the fused kernel", "infmoe bench ffn --out results/ffn.json")
    path = store.folder.parent.parent / "ffn.json"
    if not path.is_file():
        section.body = MISSING
        section.claims.append(Claim("a fused kernel is 1.25 times as fast (Figure 4)", "–", MISSING))
        return section
    summary = read_json(path).get("summary") or {}
    if not isinstance(summary.get("forward_speedup_min"), float):
        raise InfMoEError(f"{path} is damaged: make it again with `infmoe bench ffn --out {path}`")
    wanted = {
        "forward_speedup_min": "forward over the reference, at least",
        "forward_over_gemms_max": "forward over its bare products, at most",
        "train_speedup_min": "forward and backward over the reference, at least",
        "train_over_gemms_max": "forward and backward over their products, at most",
    }
    rows = [[text, f"{summary[key]:.2f}×"] for key, text in wanted.items() if key in summary]
    section.body = markdown_table(("one layer, D = 768, F = 6144, d_z = 256, K = 2, bfloat16, CPU", "ratio"), rows) + (
        "\n\nThe paper's figure is for a GPU; on one, ours is not measured. The picture is "
        "[`results/ffn.png`](../results/ffn.png)."
    )
    section.claims.append(
        Claim(
            f"a fused CUDA kernel is {paper.FIGURE4_SPEEDUP} times as fast as plain PyTorch (Figure 4)",
            f"on a CPU: at least {summary['forward_speedup_min']:.2f} times",
            OPEN,
            "a GPU was not at hand",
        )
    )
    return section


def _command(name: str, scale: Scale) -> str:
    source = "--corpus NOVELS" if scale.vocab else "--data FINEWEB"
    return f"infmoe reproduce {name} --scale {scale.name} {source}"
