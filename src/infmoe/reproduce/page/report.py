"""`docs/evidence.md`: every table and figure from what lies under `results/`, nothing typed by hand."""

import math
import os
from collections.abc import Callable
from pathlib import Path

from infmoe.errors import InfMoEError
from infmoe.reproduce.arms import arm_named
from infmoe.reproduce.page import curves, tables
from infmoe.reproduce.page.again import again, one_seed
from infmoe.reproduce.page.controls import controls
from infmoe.reproduce.page.elastic import elastic
from infmoe.reproduce.page.figures import Gallery
from infmoe.reproduce.page.section import Section, claims_table, command, markdown_table
from infmoe.reproduce.plan import SCALES, TUNING_SEED, RunSpec, Scale, groups
from infmoe.reproduce.store import MAX_SEEDS, Finished, Store

SECTIONS: dict[str, Callable[[Store, Gallery], Section]] = {
    "table1": tables.table1,
    "table2": tables.table2,
    "table3": tables.table3,
    "table5": tables.table5,
    "table6": tables.table6,
    "figure2": curves.figure2,
    "figure3": curves.figure3,
    "figure4": curves.figure4,
    "controls": controls,
    "elastic": elastic,
}
_OWN_TABLE = "elastic"  # whose claims, of other papers and our own, stand in the section
_TITLE = "# Evidence"
_CLAIMS = "**What the paper claims**"
_QUESTIONS = "**What the paper leaves out**"
_INTRODUCTION = """\
What the paper claims, and what comes out when it is trained anew. This page is written by `infmoe report` from the
files under `results/`; each run's file names its configuration, seed, data, versions, machine and commit. Losses are
in nats per token on held-out documents, of which each scale says how much is read; “±” is a 95 % interval over
training seeds (Student's t), which says nothing of other documents. Differences are paired by seed, over the seeds
that both have: they need not be those of the means beside them, which may rest on more. Every verdict stands for
itself at 95 %: of twenty comparisons of arms that do not differ, one is expected to be decided. NOVELS stands for
text files of one's own; the data's hash is below. Every arm sees the same tokens in the same order. Tier 1 adds seeds
until its intervals are narrow, which makes them hold the mean a little less often than 95 %. A difference of single
runs is held against the pooled spread of the arms that have more seeds (“pooled ±”; at the end of each scale)."""


def render_section(name: str, store: Store, *, draw: bool = True) -> Section:
    """One table or figure; its picture is drawn beside the results."""
    return SECTIONS[name](store, Gallery(store.folder, draw))


def write_report(results: Path, page: Path, *, check: bool = False) -> bool:
    """Write the page, and the pictures beside the results.

    Args:
        results: the folder that holds `reproduce/`.
        page: the Markdown file.
        check: write nothing, and compare.

    Returns:
        Whether the page was what it should be already.

    Raises:
        InfMoEError: a result is damaged or of another configuration; or there are none.
    """
    text = render_page(results, page.parent, draw=not check)
    same = page.is_file() and page.read_bytes() == text.encode()
    if not check and not same:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_bytes(text.encode())
    return same


def render_page(results: Path, beside: Path | None = None, *, draw: bool = True) -> str:
    """The page's text; its pictures are drawn beside the results.

    Args:
        results: the folder that holds `reproduce/`.
        beside: the page's folder, which its links start from; None: `docs` beside the results.
        draw: False: the pictures are named, and not drawn.
    """
    beside = results.parent / "docs" if beside is None else beside
    stores = [Store(results / "reproduce", scale) for scale in SCALES.values()]
    found = [store.scale for store in stores if store.data is not None]
    if not found:
        raise InfMoEError(f"{results / 'reproduce'} holds no results: make some with `infmoe reproduce`")
    parts = [_TITLE, _INTRODUCTION]
    for scale in found:
        parts += _scale_parts(results, scale, beside, draw)
    return "\n\n".join(parts) + "\n"


def _scale_parts(results: Path, scale: Scale, beside: Path, draw: bool) -> list[str]:
    store = Store(results / "reproduce", scale)
    made = {name: render_section(name, store, draw=draw) for name in SECTIONS}
    claims = [claim for name, section in made.items() if name != _OWN_TABLE for claim in section.claims]
    parts = [
        f"## Scale `{scale.name}`",
        _setting(store),
        _CLAIMS,
        claims_table([claim for claim in claims if not claim.ours]),
        _QUESTIONS,
        claims_table([claim for claim in claims if claim.ours]),
    ]
    for name, section in made.items():
        parts.append(f"### {section.title}")
        if name == _OWN_TABLE and section.claims:
            parts.append(claims_table(section.claims))
        parts.append(section.body)
        for title, picture in section.pictures:
            if not draw and not picture.is_file():
                raise InfMoEError(f"{picture} is missing: run `infmoe report`")
            parts.append(f"![{title}]({_link(picture, beside)})")
        parts.append(f"`{section.command}`")
    parts += ["### Learning rates", _learning_rates(store)]
    if spread := one_seed(store):
        parts += ["### What one seed says", spread]
    if twice := again(results, store, _files(store)[0]):
        parts += ["### The same runs once more", twice]
    if draw:
        for name, section in made.items():
            write_section(store, name, section)
    return parts


def write_section(store: Store, name: str, section: Section) -> Path:
    """One table or figure as a file beside its pictures; returns the file."""
    path = store.folder / f"{name}.md"
    pictures = "".join(f"![{title}]({picture.name})\n\n" for title, picture in section.pictures)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# {section.title}\n\n{section.body}\n\n{pictures}`{section.command}`\n")
    return path


def _link(path: Path, beside: Path) -> str:
    """A link to a file from a page in the folder `beside`; neither need lie in the project, and links are followed."""
    return Path(os.path.relpath(path.resolve(), beside.resolve())).as_posix()


def _setting(store: Store) -> str:
    """What all runs share."""
    data = store.data
    assert data is not None
    runs, strangers = _files(store)
    any_run = next((run for arm in ("infinity", "moe") for run in store.runs(arm, store.scale.tokens)), None)
    lines = [
        f"{len(runs)} runs. Data: {data['splits']['train']['tokens']:,} training tokens of "
        f"{data['splits']['train']['documents']} documents and {data['splits']['val']['tokens']:,} held-out tokens of "
        f"{data['splits']['val']['documents']} others, {data['vocab_size']} tokens of vocabulary "
        f"(SHA-256 {data['sha256'][:12]})."
    ]
    if any_run is not None:
        config = any_run.values["config"]
        # a discrete MoE's own has no d_z
        model = RunSpec(store.scale, arm_named("infinity"), store.scale.tokens, any_run.spec.lr, 1).config().model
        lines.append(
            f"Model: {model['num_hidden_layers']} layers of width {model['hidden_size']}, context "
            f"{model['max_position_embeddings']}, total FFN width {model['intermediate_size']}; ∞-MoE with d_z = "
            f"{model['z_dim']}, K = {model['num_samples']}, keep ratio {model['keep_ratio']:g}. Training: "
            f"{config['batch_tokens']:,} tokens a step, AdamW, {config['precision']}, warm-up over "
            f"{config['schedule']['warmup_steps']} of {config['steps']:,} steps and a cosine to 0. Held-out loss over "
            f"{any_run.measure('held_out') is not None and store.scale.windows:,} windows, the dials over "
            f"{store.scale.dial_windows:,}."
        )
    made = [run.values["provenance"] for run in runs]
    for what, found in (
        ("Machines", {run.processor for run in runs}),
        ("torch", {p["versions"]["torch"] for p in made}),
        ("commits", {commit[:7] for p in made if (commit := p["training"]["commit"]) is not None}),
    ):
        if found:
            lines.append(f"{what}: {', '.join(sorted(found))}.")
    if strangers:
        lines.append(f"Left out, because no table asks for them: {', '.join(path.name for path in strangers)}.")
    return " ".join(lines)


def _files(store: Store) -> tuple[list[Finished], list[Path]]:
    """The finished runs of the plan, at any seed, and the files that are no part of it.

    Raises:
        InfMoEError: the file of a run is not what it should be.
    """
    planned: dict[Path, RunSpec] = {}
    for group in groups("all", store.scale):
        for arm in map(arm_named, group.arms):
            specs = store.tuning(arm)
            if (lr := store.lr(arm)) is not None:
                seeds = range(TUNING_SEED + 1, TUNING_SEED + 1 + MAX_SEEDS)
                specs += [RunSpec(store.scale, arm, group.tokens, lr, seed) for seed in seeds]
            planned |= {store.path(spec): spec for spec in specs}
    there = sorted((store.folder / "runs").glob("*.json"))
    found = (store.get(planned[path]) for path in there if path in planned)
    return [run for run in found if run is not None], [path for path in there if path not in planned]


def _learning_rates(store: Store) -> str:
    """The grid, and what was chosen."""
    scale = store.scale
    if not scale.lr_grid:
        return "The recipe's, for all arms: the paper names one."
    rows = []
    for path in sorted({spec.arm.name for group in _every_arm(scale) for spec in store.tuning(arm_named(group))}):
        specs = store.tuning(arm_named(path))
        losses = [run.loss if (run := store.get(spec)) is not None else None for spec in specs]
        chosen = store.lr(arm_named(path))
        edge = chosen in (min(scale.lr_grid), max(scale.lr_grid))
        rows.append(
            [
                path,
                *("–" if loss is None else "diverged" if loss == math.inf else f"{loss:.3f}" for loss in losses),
                "–" if chosen is None else f"{chosen:g}" + (", the grid's edge" if edge else ""),
            ]
        )
    head = ("arm", *(f"{lr:g}" for lr in scale.lr_grid), "chosen")
    tokens = scale.tune_tokens / 1e6
    inherited: dict[str, list[str]] = {}
    for name in _every_arm(scale):
        if (root := arm_named(name).tuned_as) is not None:
            inherited.setdefault(root, []).append(name)
    # in an order of their own: that of training is no matter of the page
    passed_on = "; ".join(f"`{root}`: {', '.join(sorted(names))}" for root, names in sorted(inherited.items()))
    return (
        f"Held-out loss after {tokens:g}M tokens, seed {TUNING_SEED}, which is not reported elsewhere.\n\n"
        + markdown_table(head, rows)
        + f"\n\nVariations that take an arm's learning rate: {passed_on}.\n\n`{command('all', scale)}`"
    )


def _every_arm(scale: Scale) -> list[str]:
    return list(dict.fromkeys(name for group in groups("all", scale) for name in group.arms))
