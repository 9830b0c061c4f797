"""The same runs once more: how far apart two trainings of one configuration, seed and data end."""

import math
from collections.abc import Sequence
from pathlib import Path

from infmoe.errors import InfMoEError
from infmoe.reproduce.page.section import markdown_table
from infmoe.reproduce.statistics import t_quantile
from infmoe.reproduce.store import Finished, Store

FOLDER = "again"  # beside the scales: results of `infmoe reproduce --out results/reproduce/again`


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
        cells = [text for one in (twin, run) for text in (_machine(one), f"{one.loss:.4f}")]
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
        "less than others.\n\n" + markdown_table(head, rows)
    )


def _machine(run: Finished) -> str:
    return run.values["provenance"]["machine"]["cpu"]
