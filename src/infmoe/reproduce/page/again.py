"""What a single run is worth: how far arms scatter over seeds, and two trainings of one run end apart."""

import math
from collections.abc import Sequence
from pathlib import Path

from infmoe.errors import InfMoEError
from infmoe.reproduce.page.section import command, markdown_table
from infmoe.reproduce.plan import tokens_text
from infmoe.reproduce.statistics import t_quantile
from infmoe.reproduce.store import Finished, Store

FOLDER = "again"  # beside the scales: results of `infmoe reproduce --out results/reproduce/again`


def one_seed(store: Store) -> str:
    """What is said of a difference that rests on one seed; empty where nothing can be."""
    found, scale = store.spread, store.scale
    if found is None:
        return ""
    return (
        f"Of the arms that were trained on {tokens_text(scale.tokens)} tokens with {found.seeds} seeds, {found.arms} "
        "share no training with another. What is left of their losses, when each arm's and each seed's mean is taken "
        f"off, has a standard deviation of {found.deviation:.4f} nats ({found.degrees} degrees of freedom; a "
        f"randomized block design). If all arms scatter so, the difference of two single runs of a seed is known to ± "
        f"{found.half_width():.3f} nats (95 %), that of two arms over {found.seeds} seeds to ± "
        f"{found.half_width(found.seeds):.3f}, and over {scale.seeds[1]} to ± {found.half_width(scale.seeds[1]):.3f}. "
        "Verdicts on one seed are held against the first of these; arms with more seeds keep intervals of their own."
    )


def again(results: Path, store: Store, runs: Sequence[Finished]) -> str:
    """What runs gave that were trained a second time, against the ones that the page is made from.

    Another processor adds up products in another order, and training does the rest. Pairs that are the same to the last
    bit, as on one machine, show nothing, and are left out.

    Args:
        results: the folder that holds `reproduce/`.
        store: what the page is made from.
        runs: all of it.

    Returns:
        Markdown; empty where nothing was trained twice.

    Raises:
        InfMoEError: a file is damaged, or of another configuration or other data.
    """
    other = Store(results / "reproduce" / FOLDER, store.scale)
    if other.data is None:
        return ""
    if other.data != store.data:
        raise InfMoEError(
            f"{other.folder / 'data.json'} is of other data than {store.folder / 'data.json'}: move it away"
        )
    pairs = [(run, twin) for run in runs if (twin := other.get(run.spec)) is not None]
    pairs = [(run, twin) for run, twin in pairs if not run.diverged and not twin.diverged and run.loss != twin.loss]
    if not pairs:
        return ""
    rows = []
    for run, twin in pairs:
        cells = [text for one in (twin, run) for text in (one.processor, f"{one.loss:.4f}")]
        rows.append([run.spec.slug, *cells, f"{run.loss - twin.loss:+.4f}"])
    differences = [run.loss - twin.loss for run, twin in pairs]
    rms = math.sqrt(sum(d * d for d in differences) / len(differences))
    head = ("run", "trained on", "loss, nats", "once more on", "loss", "the latter minus the former")
    return (
        f"{len(pairs)} runs were trained twice, with the same configuration, seed and data. Their losses lie "
        f"{rms:.4f} nats apart (root mean square; {max(map(abs, differences)):.4f} at most). Two arms that differ in "
        "nothing would, too: a difference of two single runs that is smaller than "
        f"{t_quantile(len(pairs)) * rms:.3f} nats says nothing (95 %), whatever their seeds, unless they share their "
        "first steps (which do, is said under elastic compute). All runs are pooled, though some kinds may spread "
        f"less than others; the second training is of a later commit.\n\n{markdown_table(head, rows)}\n\n"
        f"`{command('all', store.scale)} --out results/reproduce/{FOLDER}`, on another machine"
    )
