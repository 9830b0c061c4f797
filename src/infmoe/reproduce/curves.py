"""The paper's figures, one function each."""

import statistics
from collections.abc import Mapping

from infmoe import paper
from infmoe.errors import InfMoEError
from infmoe.reproduce.accuracy import accuracy_claim, dial_scores, few_samples, points_text
from infmoe.reproduce.checks import is_number
from infmoe.reproduce.figures import Gallery
from infmoe.reproduce.plan import tokens_text
from infmoe.reproduce.section import (
    HOLDS,
    MISSING,
    OPEN,
    SHARED,
    VOID,
    Claim,
    Section,
    at_dials,
    command,
    markdown_table,
    mean_loss,
    minus,
    nats,
    relative,
    seeds_text,
    text_of,
    verdict_all_below,
    verdict_below,
)
from infmoe.reproduce.statistics import Interval
from infmoe.reproduce.store import Store, read_json


def figure2(store: Store, gallery: Gallery) -> Section:
    """Loss over the number of samples, or of experts."""
    scale = store.scale
    tokens = scale.tokens
    section = Section("Figure 2: more experts or samples at inference", command("figure2", scale))
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
    ks = sorted({*infinity, *experts["selected"]})
    columns = [f"K = {k:g}" for k in ks]
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
        "Every column is the same checkpoints, run with another K; MoE has 4 experts, trained with 2, and all its rows "
        "are set against K = 2 with renormalised gates, as it was trained."
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
    text, pictures = dial_scores(store, gallery)
    section.body += f"\n\n{text}"
    section.pictures += pictures
    section.claims.append(
        accuracy_claim(
            store,
            "∞-MoE is 2.5 % better than MoE at few samples (§5.1, in accuracy; measured: K = 1 against k = 1)",
            points_text(few_samples(store)),
            [few_samples(store)],
        )
    )
    gain = infinity.get(8.0)
    section.claims.append(
        Claim(
            "∞-MoE gains from more samples at inference (§5.1, Figure 2), in held-out loss",
            f"K = 8 against 2: {nats(gain, 4)}",
            VOID if _overlap(store, tokens) > SHARED and verdict_below(gain) == HOLDS else verdict_below(gain),
            _void_dial(store, tokens),
        )
    )
    lost = experts["selected"].get(4.0)
    section.claims.append(
        Claim(
            "more experts than trained cost MoE loss (§5.1: they “may introduce instability at high values”)",
            f"4 against 2 experts: {nats(lost, 4)}",
            MISSING if lost is None else verdict_below(minus(lost)),
            "a steady rise, as Figure 2 shows; whether training grows unstable is not tested",
        )
    )
    return section


def _overlap(store: Store, tokens: int) -> float:
    """The share of their units that two samples have in common; 0 where it was not measured."""
    overlaps = [
        row["overlap_ratio"]
        for run in store.runs("infinity", tokens)
        for row in run.measure("dials") or ()
        if at_dials(row, keep_ratio=0.25, num_samples=2)
    ]
    return statistics.fmean(overlaps) if overlaps else 0.0


def _void_dial(store: Store, tokens: int) -> str:
    """What the overlap of two samples says of the K dial."""
    share = _overlap(store, tokens)
    if not share:
        return ""
    void = "more than 90 %, so the K dial is void" if share > SHARED else "so K draws something new, if little"
    return f"two samples share {share:.0%} of their units: {void}"


def figure3(store: Store, gallery: Gallery) -> Section:
    """Loss over data."""
    scale = store.scale
    section = Section("Figure 3: more data", command("figure3", scale))
    drawn: dict[str, dict[float, Interval]] = {"MoE": {}, "∞-MoE": {}}
    rows, gaps = [], {}
    for tokens in scale.data_sizes:
        found = {name: mean_loss(store, arm, tokens) for name, arm in (("MoE", "moe"), ("∞-MoE", "infinity"))}
        difference = store.difference("infinity", "moe", tokens)
        seeds = ", ".join(seeds_text(store.runs(arm, tokens)) for arm in ("moe", "infinity"))
        losses = [text_of(found[name]) for name in ("MoE", "∞-MoE")]
        rows.append([tokens_text(tokens), *losses, text_of(difference, sign=True), seeds])
        for name, loss in found.items():
            if loss is not None:
                drawn[name][float(tokens)] = loss
        if difference is not None:
            gaps[float(tokens)] = difference
    head = ("tokens", "MoE, nats", "∞-MoE, nats", "∞-MoE minus MoE", "seeds of each")
    section.body = markdown_table(head, rows) + (
        "\n\nEvery size is a run of its own, its learning rate's cosine as long as the run. The paper draws HellaSwag "
        f"accuracy{', which is at chance here' if scale.name == 'tiny' else ''}."
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
    section.claims.append(_ahead_everywhere(gaps, len(scale.data_sizes)))
    return section


def _ahead_everywhere(gaps: Mapping[float, Interval], sizes: int) -> Claim:
    """Whether ∞-MoE is ahead at every length."""
    text = "∞-MoE stays ahead of MoE as data grows (Figure 3), in held-out loss"
    if len(gaps) < sizes:
        return Claim(text, "–", MISSING)
    return Claim(
        text,
        ", ".join(f"{nats(gap)} at {tokens_text(round(tokens))}" for tokens, gap in sorted(gaps.items())),
        verdict_all_below(list(gaps.values())),
    )


def figure4(store: Store, gallery: Gallery) -> Section:
    """The fused kernel, from `infmoe bench ffn`."""
    section = Section("Figure 4: the fused kernel", "infmoe bench ffn --out results/ffn.json")
    path = store.folder.parent.parent / "ffn.json"
    if not path.is_file():
        section.body = MISSING
        section.claims.append(
            Claim(f"a fused kernel is {paper.FIGURE4_SPEEDUP} times as fast (Figure 4)", "–", MISSING)
        )
        return section
    summary = read_json(path).get("summary")
    wanted = {
        "forward_speedup_min": "forward over the reference, at least",
        "forward_over_gemms_max": "forward over its bare products, at most",
        "train_speedup_min": "forward and backward over the reference, at least",
        "train_over_gemms_max": "forward and backward over their products, at most",
    }
    if (
        not isinstance(summary, dict)
        or "forward_speedup_min" not in summary
        or not all(is_number(summary[key]) and summary[key] > 0 for key in wanted if key in summary)
    ):
        raise InfMoEError(f"{path} is damaged: make it again with `infmoe bench ffn --out {path}`")
    rows = [[text, "–", f"{summary[key]:.2f}×"] for key, text in wanted.items() if key in summary]
    rows.insert(0, ["its kernel over plain PyTorch, on a GPU", f"{paper.FIGURE4_SPEEDUP}×", "not measured"])
    head = ("one layer, D = 768, F = 6144, d_z = 256, K = 2, bfloat16; ours on a CPU", "paper", "ours")
    section.body = markdown_table(head, rows) + (
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
