"""The paper's figures, one function each."""

import shlex
import statistics
from collections.abc import Mapping
from typing import Any

from infmoe import paper
from infmoe.errors import InfMoEError
from infmoe.layers.point import ratio_text
from infmoe.reproduce.checks import is_number
from infmoe.reproduce.page.accuracy import (
    accuracy_claim,
    chance,
    dial_scores,
    few_samples,
    items_text,
    mean_difference,
    means,
    near_guessing,
    not_scored,
    over_seeds,
    points_text,
    scores,
)
from infmoe.reproduce.page.figures import Gallery, Quartiles
from infmoe.reproduce.page.section import (
    HOLDS,
    MISSING,
    OPEN,
    SHARED,
    VOID,
    Claim,
    Section,
    at_dials,
    command,
    in_brackets,
    markdown_table,
    mean_loss,
    nats,
    relative,
    seeds_text,
    text_of,
    verdict_all_below,
    verdict_below,
)
from infmoe.reproduce.plan import tokens_text
from infmoe.reproduce.statistics import Interval, paired
from infmoe.reproduce.store import Store, read_json

_TASK = "HellaSwag"  # what Figure 3 draws
_KEEP, _TRAINED_K = 0.25, 2  # as the models of Figure 2 were trained
_RENORMALISED, _SIXTEEN = "MoE, gates renormalised", "MoE of 16 experts, gates renormalised"
# Figure 4's lines, by the arms of `infmoe bench ffn`
_SPEEDUPS = ("forward_speedup_min", "forward_over_gemms_max", "train_speedup_min", "train_over_gemms_max")
_PATHS = {
    "infinity": "∞-MoE's layer",
    "reference": "reference: products, topk, scatter, mean",
    "gemms": "its bare matrix products",
}


def figure2(store: Store, gallery: Gallery) -> Section:
    """Loss over the number of samples, or of experts."""
    section = Section("Figure 2: more experts or samples at inference", command("figure2", store.scale))
    drawn, lines, mean = _over_samples(store), _over_experts(store), _at_mean(store)
    if drawn:
        lines = {"∞-MoE, sampled": drawn} | lines
        picture = gallery.lines(
            "figure2.png",
            [("", {name: line for name, line in lines.items() if line})],
            x_label="samples or experts per token, K",
            y_label="loss minus that at K = 2 (nats)",
            title="Figure 2: one checkpoint, more experts (95 % over seeds)",
        )
        section.pictures.append((section.title, picture))
    ks = sorted({k for line in lines.values() for k in line})
    rows = [[name, *(text_of(line.get(k), sign=True) for k in ks)] for name, line in lines.items()]
    text, pictures = dial_scores(store, gallery)
    section.body = (
        markdown_table(("loss minus that at K = 2, nats", *(f"K = {k:g}" for k in ks)), rows)
        + f"\n\n∞-MoE at z = μ, which draws nothing: {text_of(mean, sign=True)} nats. "
        "Every column is the same checkpoints, run with another K; MoE has 4 experts or 16, trained with 2, and all "
        "its rows are set against K = 2 with renormalised gates, as it was trained. The paper's figure goes to K = 8 "
        f"for MoE too, whose experts its text counts as 4; it prints no numbers.\n\n{text}"
    )
    section.pictures += pictures
    section.claims += _sample_claims(store, drawn) + _expert_claims(lines[_RENORMALISED], lines[_SIXTEEN])
    return section


def _over_samples(store: Store) -> dict[float, Interval]:
    """∞-MoE's loss at each K, minus that at the trained one."""
    return relative(
        store,
        "infinity",
        store.scale.tokens,
        "dials",
        lambda row: "num_samples" in row and at_dials(row, keep_ratio=_KEEP),
        lambda row: at_dials(row, keep_ratio=_KEEP, num_samples=_TRAINED_K),
        lambda row: float(row["num_samples"]),
    )


def _at_mean(store: Store) -> Interval | None:
    """∞-MoE's loss at z = mu, minus that at the trained K."""
    found = relative(
        store,
        "infinity",
        store.scale.tokens,
        "dials",
        lambda row: at_dials(row, keep_ratio=_KEEP, mode="mu"),
        lambda row: at_dials(row, keep_ratio=_KEEP, num_samples=_TRAINED_K),
        lambda row: "mu",
    )
    return found.get("mu")


def _over_experts(store: Store) -> dict[str, dict[float, Interval]]:
    """The discrete MoEs' loss at each number of experts, minus that at the trained one: one line for each rule."""

    def line(arm: str, norm: str) -> dict[float, Interval]:
        return relative(
            store,
            arm,
            store.scale.tokens,
            "gate_norms",
            lambda row: row["gate_norm"] == norm,
            lambda row: row.get("num_experts_per_tok") == _TRAINED_K,
            lambda row: float(row["num_experts_per_tok"]),
        )

    return {
        _RENORMALISED: line("moe", "selected"),
        "MoE, first gates as trained": line("moe", "trained"),
        "MoE, softmax over all": line("moe", "all"),
        _SIXTEEN: line("moe16", "selected"),
    }


def _sample_claims(store: Store, line: Mapping[float, Interval]) -> list[Claim]:
    """What the paper says of ∞-MoE's K."""
    ours = _at(store, "infinity", keep_ratio=_KEEP, num_samples=1)
    few, gain = paired(ours, _at(store, "moe", num_experts_per_tok=1)), line.get(8.0)
    void = _overlap(store, store.scale.tokens) > SHARED and verdict_below(gain) == HOLDS
    return [
        accuracy_claim(
            store,
            "∞-MoE is 2.5 % better than MoE at few samples (§5.1, in accuracy; measured: K = 1 against k = 1)",
            points_text(few_samples(store)),
            [few_samples(store)],
        ),
        Claim(
            "∞-MoE is better than MoE at few samples, in held-out loss", nats(few), verdict_below(few), _few_cost(store)
        ),
        Claim(
            "∞-MoE gains from more samples at inference (§5.1, Figure 2), in held-out loss",
            f"K = 8 against 2: {nats(gain, 4)}",
            VOID if void else verdict_below(gain),
            _void_dial(store, store.scale.tokens),
        ),
    ]


def _expert_claims(four: Mapping[float, Interval], sixteen: Mapping[float, Interval]) -> list[Claim]:
    """What the paper says of MoE's K."""
    unstable = "MoE may grow unstable at high values of K (§5.1)"
    lost = four.get(4.0)
    return [
        Claim(
            "more experts than trained “can improve accuracy” of MoE (§5.1), in held-out loss",
            f"4 against 2 experts: {nats(lost, 4)}",
            verdict_below(lost),
            _steps_text(four),
        ),
        Claim(
            unstable,
            f"16 experts, trained with 2: {_steps_text(sixteen)} nats{in_brackets(sixteen.get(8.0))}",
            "its loss rises",
            "the paper does not say what else would show it",
        )
        if 8.0 in sixteen
        else Claim(unstable, "–", MISSING),
    ]


def _few_cost(store: Store) -> str:
    """What one sample costs beside one expert."""
    shares = []
    for what in ("ideal", "executed"):
        figure = f"flops_{what}"
        ours = _at(store, "infinity", figure, keep_ratio=_KEEP, num_samples=1)
        theirs = _at(store, "moe", figure, num_experts_per_tok=1)
        if not ours or not theirs:
            return ""
        shares.append(f"{statistics.fmean(ours.values()) / statistics.fmean(theirs.values()):.2f} ({what})")
    return f"K = 1 takes, of the FLOPs per token of k = 1: {', '.join(shares)}"


def _at(store: Store, arm: str, figure: str = "loss", **dials: Any) -> dict[int, float]:
    """Seed -> a figure at a point of the dials."""
    return {
        run.spec.seed: row[figure]
        for run in store.runs(arm, store.scale.tokens)
        for row in run.measure("dials") or ()
        if at_dials(row, **dials)
    }


def _steps_text(line: Mapping[float, Interval]) -> str:
    """The losses at each number of experts, minus that at the trained one."""
    return "; ".join(f"{text_of(gap, 4, sign=True)} at {k:g}" for k, gap in sorted(line.items()) if gap.mean)


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
    drawn: dict[str, dict[float, Interval]] = {"∞-MoE": {}, "MoE": {}}
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
    accuracies = {name: _accuracy_over_data(store, arm) for name, arm in (("∞-MoE", "infinity"), ("MoE", "moe"))}
    parts = [
        markdown_table(head, rows),
        "Every size is a run of its own, its learning rate's cosine as long as the run. The paper draws "
        f"{_TASK} accuracy{f'; {near_guessing(store)}' if scale.name == 'tiny' else ''}.",
        _accuracy_table(store, accuracies),
    ]
    section.body = "\n\n".join(parts)
    if gaps:
        panels: list[tuple[str, dict[str, dict[float, Interval]]]] = [
            ("held-out loss", drawn),
            ("∞-MoE minus MoE", {"paired by seed": gaps}),
        ]
        scored = {name: line for name, line in accuracies.items() if line}
        panels += [(f"{_TASK}, zero-shot", scored)] if scored else []
        picture = gallery.lines(
            "figure3.png",
            panels,
            x_label="training tokens",
            y_label=["nats per token", "nats per token", "accuracy (%)"][: len(panels)],
            title="Figure 3: more data (95 % over seeds)",
            levels=[None, 0.0, chance(_TASK)][: len(panels)],
        )
        section.pictures.append((section.title, picture))
    section.claims += [_more_accurate_everywhere(store), _ahead_everywhere(gaps, len(scale.data_sizes))]
    return section


def _accuracy_over_data(store: Store, arm: str) -> dict[float, Interval]:
    """Tokens -> accuracy on the figure's task, in percent, where it was measured."""
    found = {float(t): over_seeds(means(scores(store, arm, t, "acc"), (_TASK,))) for t in store.scale.data_sizes}
    return {tokens: value for tokens, value in found.items() if value is not None}


def _accuracy_gaps(store: Store) -> dict[int, Interval | None]:
    """Tokens -> ∞-MoE's accuracy on the figure's task minus MoE's, paired by seed, in points."""
    return {
        tokens: mean_difference(store, "infinity", "moe", tokens, tasks=(_TASK,)) for tokens in store.scale.data_sizes
    }


def _accuracy_table(store: Store, accuracies: Mapping[str, Mapping[float, Interval]]) -> str:
    """The figure itself: accuracy over data, below what the paper prints of it."""
    scale = store.scale
    if not any(accuracies.values()):
        return not_scored(store, "figure3", f"{_TASK} accuracy over data")
    rows = []
    for tokens, printed in paper.FIGURE3.items() if paper.of_small(scale.name) else ():
        cells = [f"{printed[arm]:.1f}" for arm in ("moe", "infinity")]
        rows.append([f"paper, small, {tokens_text(tokens)}", *cells, f"{printed['infinity'] - printed['moe']:+.1f}"])
    for tokens, gap in _accuracy_gaps(store).items():
        cells = [text_of(accuracies[name].get(float(tokens)), 1) for name in ("MoE", "∞-MoE")]
        rows.append([f"ours, {tokens_text(tokens)}", *cells, text_of(gap, 1, sign=True)])
    notes = [
        f"{items_text(scale)}, each model at its own dials; guessing gives {chance(_TASK):.0f}.",
        paper.none_at_this_size(scale.name, "Figure 3")
        or "Of its Figure 3 the paper prints the ends alone, in Tables 1 and 5, of one run each.",
    ]
    return f"{markdown_table((f'{_TASK}, %', 'MoE', '∞-MoE', '∞-MoE minus MoE'), rows)}\n\n{' '.join(notes)}"


def _more_accurate_everywhere(store: Store) -> Claim:
    """Whether ∞-MoE is ahead at every length in what the paper draws."""
    ends = ", ".join(
        f"{printed['infinity']} against {printed['moe']} at {tokens_text(tokens)}"
        for tokens, printed in paper.FIGURE3.items()
    )
    gaps = _accuracy_gaps(store)
    shown = ", ".join(
        f"{text_of(gap, 1, sign=True)} at {tokens_text(tokens)}" for tokens, gap in gaps.items() if gap is not None
    )
    of_small = "" if paper.of_small(store.scale.name) else " of the small model"
    return accuracy_claim(
        store,
        f"∞-MoE stays ahead of MoE in {_TASK} accuracy as data grows (Figure 3{of_small}: {ends} tokens)",
        f"{_TASK}, points: {shown}" if shown else "–",
        list(gaps.values()),
    )


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
    path = store.folder.parent.parent / "ffn.json"
    making = f"infmoe bench ffn --out {shlex.quote(str(path))}"
    section = Section("Figure 4: the fused kernel", making)
    if not path.is_file():
        section.body = f"The layer's latency: {MISSING}. `{making}` makes the file that it is read from."
        section.claims += _kernel_claims({}, {})
        return section
    result = read_json(path)
    summary, lines = result.get("summary"), _latencies(result)
    if (
        not isinstance(summary, dict)
        or "forward_speedup_min" not in summary
        or not all(is_number(summary[key]) and summary[key] > 0 for key in _SPEEDUPS if key in summary)
        or lines is None
    ):
        raise InfMoEError(f"{path} is damaged: make it again with `{making}`")
    made = result.get("provenance")
    section.command = str(made.get("command") or making) if isinstance(made, dict) else making
    parts = [
        _speedups(summary),
        "The reference is those products with `torch.topk`, a scatter and a mean; the paper's figure is for a GPU, and "
        "on one, ours is not measured.",
        _latency_table(lines),
    ]
    section.body = "\n\n".join(part for part in parts if part)
    if lines:
        picture = gallery.lines(
            "figure4.png",
            [("", lines)],
            x_label="active rate: share of the neurons that a sample keeps",
            y_label="forward pass of one layer (ms)",
            title="Figure 4 on a CPU (medians and quartiles)",
            from_zero=True,
        )
        section.pictures.append((section.title, picture))
    section.claims += _kernel_claims(summary, lines)
    return section


def _latencies(result: Mapping[str, Any]) -> dict[str, dict[float, Quartiles]] | None:
    """Path -> keep ratio -> ms of a forward pass at the paper's d_z in bfloat16; None: the file is damaged."""
    found: dict[str, dict[float, Quartiles]] = {}
    rows = result.get("rows", [])
    if not isinstance(rows, list):
        return None
    try:
        for row in rows:
            if (row["dtype"], row["z_dim"], row.get("pass")) == ("bf16", 256, "forward") and row["arm"] in _PATHS:
                figures = [row[name] for name in ("keep_ratio", "median", "q1", "q3")]
                if not all(is_number(figure) and figure > 0 for figure in figures):
                    return None
                found.setdefault(_PATHS[row["arm"]], {})[figures[0]] = Quartiles(*figures[1:])
    except (KeyError, TypeError):
        return None
    return {name: found[name] for name in _PATHS.values() if name in found}


def _speedups(summary: Mapping[str, float]) -> str:
    """The worst ratios over all keep ratios; what should be high apart from what should be low."""
    rows = []
    for name, key, printed in (
        ("forward", "forward", f"{paper.FIGURE4_SPEEDUP}×"),
        ("forward and backward", "train", "–"),
    ):
        faster, dearer = (summary.get(f"{key}_{what}") for what in ("speedup_min", "over_gemms_max"))
        rows.append([name, printed, *("–" if ratio is None else f"{ratio:.2f}×" for ratio in (faster, dearer))])
    head = (
        "one layer, D = 768, F = 6144, d_z = 256, K = 2, bfloat16",
        "speed-up, the paper's on a GPU over plain PyTorch (higher is better)",
        "speed-up, ours on a CPU over the reference, at least (higher is better)",
        "cost, ours over its bare matrix products, at most (lower is better)",
    )
    return markdown_table(head, rows)


def _latency_table(lines: Mapping[str, Mapping[float, Quartiles]]) -> str:
    """The picture's medians."""
    ratios = sorted({ratio for line in lines.values() for ratio in line})
    rows = [
        [name, *(f"{line[ratio].median:.1f}" if ratio in line else "–" for ratio in ratios), _slowest_text(line)]
        for name, line in lines.items()
    ]
    head = ("forward, ms, at a keep ratio of", *map(ratio_text, ratios), "slowest over fastest")
    return markdown_table(head, rows) if lines else ""


def _slowest_over_fastest(line: Mapping[float, Quartiles]) -> float | None:
    """How far from flat a path's medians are; None where there are not two of them."""
    medians = [timed.median for timed in line.values()]
    return max(medians) / min(medians) if len(medians) > 1 else None


def _slowest_text(line: Mapping[float, Quartiles]) -> str:
    ratio = _slowest_over_fastest(line)
    return "–" if ratio is None else f"{ratio:.2f}×"


def _kernel_claims(summary: Mapping[str, float], lines: Mapping[str, Mapping[float, Quartiles]]) -> tuple[Claim, Claim]:
    """The paper's two statements, both of a GPU."""
    faster = f"a fused CUDA kernel is {paper.FIGURE4_SPEEDUP} times as fast as plain PyTorch (Figure 4)"
    flat = "the fused CUDA kernel's latency is nearly flat over the active rate (§5.5, Figure 4)"
    no_gpu = "a GPU was not at hand"
    ours, products = (lines.get(_PATHS[arm], {}) for arm in ("infinity", "gemms"))
    spread = _slowest_over_fastest(ours)
    noise = f"; the bare products, which no keep ratio changes: {_slowest_text(products)}" if products else ""
    return (
        Claim(faster, f"on a CPU: at least {summary['forward_speedup_min']:.2f} times", OPEN, no_gpu)
        if summary
        else Claim(faster, "–", MISSING),
        Claim(flat, "–", MISSING)
        if spread is None
        else Claim(
            flat, f"on a CPU, forward: the slowest keep ratio takes {spread:.2f}× the fastest", OPEN, no_gpu + noise
        ),
    )
