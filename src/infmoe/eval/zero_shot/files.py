"""The tasks of a folder of local files, scored in one go: what `infmoe reproduce` measures."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from infmoe.data.shards import sha256
from infmoe.errors import InfMoEError
from infmoe.eval.loading import Opened
from infmoe.eval.zero_shot.local import LocalTask, read_local
from infmoe.eval.zero_shot.tasks import Z, columns_named
from infmoe.layers.point import Point

try:
    from infmoe.eval.zero_shot.figures import summary
    from infmoe.eval.zero_shot.harness import InfMoELM, load_task, local_config
    from infmoe.eval.zero_shot.items import score_items
except ImportError as missing:
    raise InfMoEError("zero-shot tasks run through lm-eval: pip install 'infmoe[eval]'") from missing

_FIGURES = ("items", "items_cut", "acc", "acc_se", "acc_norm", "acc_norm_se", "margin", "margin_se")


def read_tasks(folder: Path) -> list[LocalTask]:
    """Every task that has a local file, checked; SAT-en among them, RACE not.

    Raises:
        InfMoEError: a file is missing or damaged.
    """
    return [read_local(column, folder) for column in columns_named("paper", local=True)]


def file_hashes(folder: Path) -> dict[str, str]:
    """Each task's file and its SHA-256.

    Raises:
        InfMoEError: a file is missing or damaged.
    """
    return {task.path.name: sha256(task.path) for task in read_tasks(folder)}


def score_files(
    opened: Opened, folder: Path, points: Sequence[Point], *, limit: int | None, seed: int = 0, batch_size: int = 16
) -> list[dict[str, Any]]:
    """Accuracies and margins of every task at every point.

    Args:
        opened: the model.
        folder: with the tasks' files.
        points: of the dials.
        limit: so many items of each task, chosen by a hash of what they say; None: all.
        seed: of the noise.
        batch_size: contexts per forward pass.

    Returns:
        One row a point and task: the dials, the task's column, items, accuracies and the margin (in nats, with its
        95 % interval over items).

    Raises:
        InfMoEError: a file is missing or damaged, or a task has too few items for its errors.
    """
    model = InfMoELM(opened, batch_size=batch_size)
    model.seed = seed
    rows = []
    for task in read_tasks(folder):
        loaded = load_task(local_config(task), limit)
        for point in points:
            model.point = point
            scored = score_items(model, task.column, loaded)
            figures = summary(task.column, [scored], scored, task.path.name, 1.0)
            margin, error = figures["margin"], figures["margin_se"]
            if margin is None or error is None or figures["acc_se"] is None:
                raise InfMoEError(
                    f"{len(scored.items)} items of {task.column.name} are too few for an error: raise the limit"
                )
            interval = {"margin_low": margin - Z * error, "margin_high": margin + Z * error}
            rows.append(
                {"task": task.column.name, **asdict(point), **{name: figures[name] for name in _FIGURES}, **interval}
            )
    return rows
