"""A checkpoint over tasks and dials: accuracy, margins, paired differences, as one JSON object."""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from infmoe.data.shards import sha256
from infmoe.errors import InfMoEError
from infmoe.eval.dials import grid
from infmoe.eval.loading import open_model
from infmoe.eval.sweep import points_of
from infmoe.eval.zero_shot.local import read_local
from infmoe.eval.zero_shot.show import finished, with_error
from infmoe.eval.zero_shot.tasks import Column, columns_named
from infmoe.hf.identity import fingerprint
from infmoe.layers.point import Point
from infmoe.provenance import provenance, require_writable, write_json

try:
    from infmoe.eval.zero_shot import harness
    from infmoe.eval.zero_shot.figures import summary
    from infmoe.eval.zero_shot.items import Item, Scored, score_items
except ImportError as missing:
    raise InfMoEError("zero-shot tasks run through lm-eval: pip install 'infmoe[eval]'") from missing

RESULTS = "zero_shot.json"


@dataclass(frozen=True)
class Settings:
    """How a checkpoint is scored.

    Attributes:
        tasks: "paper", or lm-eval's names separated by commas.
        data_dir: local files; None: the Hub.
        limit: so many items of each task, chosen by a hash of what they say; None: all.
        seeds: of the routing noise; the first one's items are those that are compared.
        batch_size: contexts per forward pass.
        per_item: where each item's log-likelihoods go (JSON lines), or None.
    """

    tasks: str = "paper"
    data_dir: Path | None = None
    limit: int | None = None
    seeds: tuple[int, ...] = (0,)
    batch_size: int = 16
    per_item: Path | None = None


def evaluate_tasks(
    model_dir: Path,
    settings: Settings,
    *,
    num_samples: str | None = None,
    keep_ratio: str | None = None,
    num_experts_per_tok: str | None = None,
    mode: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
    show: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Score a checkpoint.

    Args:
        model_dir: a run folder, a checkpoint or a saved model.
        settings: tasks, data, seeds.
        num_samples, keep_ratio, num_experts_per_tok: dials as on the command line.
        mode: the same; several separated by commas, "sample,mu", are points side by side.
        device, dtype, overrides: how the model is opened; see `open_model`.
        out: folder for `zero_shot.json`, written after every task, so that what is done is kept.
        say: told what is done.
        show: given the result once, at the end or where something failed, if anything was scored.

    Raises:
        InfMoEError: nothing to open, an unknown task, a missing or damaged file (all files are read before the
            first is scored), a Hub that can't be reached.
    """
    harness.check_limit(settings.limit)
    columns = columns_named(settings.tasks, local=settings.data_dir is not None)
    files = {c.task: read_local(c, settings.data_dir) for c in columns} if settings.data_dir is not None else {}
    opened = open_model(model_dir, device, dtype, overrides)
    points = points_of(opened.model.config, num_samples, keep_ratio, num_experts_per_tok, mode)
    result: dict[str, Any] = {
        "checkpoint": f"{model_dir.resolve().name}/{opened.checkpoint.name}",
        "device": opened.model.device.type,
        "dtype": str(opened.model.dtype).removeprefix("torch."),
        "overrides": list(overrides),
        "lm_eval": harness.VERSION,
        "seeds": list(settings.seeds),
        "batch_size": settings.batch_size,
        "limit": settings.limit,
        "window": opened.model.config.max_position_embeddings,
        "weights": fingerprint(opened.model),
        "notes": {task: file.notes for task, file in files.items() if file.notes},
        "own": asdict(grid(opened.model.config)[0]),
        "unfinished": [column.name for column in columns],
        "points": [asdict(point) | {"label": point.label(), "tasks": {}} for point in points],
        "files": {file.path.name: sha256(file.path) for file in files.values()},
        "provenance": provenance(),
    }
    model = harness.InfMoELM(opened, batch_size=settings.batch_size)
    if settings.per_item is not None:
        require_writable(settings.per_item.parent, "--per-item")
        try:
            settings.per_item.write_text("")
        except OSError as error:
            raise InfMoEError(
                f"cannot write {settings.per_item} ({error.strerror}): choose another --per-item"
            ) from error
    try:
        for column in columns:
            config = harness.local_config(files[column.task]) if files else column.task
            task = harness.load_task(config, settings.limit)
            base: Scored | None = None
            for point, row in zip(points, result["points"], strict=True):
                begin = time.perf_counter()
                by_seed = []
                for seed in settings.seeds:
                    model.point, model.seed = point, seed
                    by_seed.append(score_items(model, column, task))
                    if settings.per_item is not None:
                        _append(settings.per_item, by_seed[-1].items, column.name, point, seed)
                    if not draws(opened.model.config, point):
                        break  # nothing random: another seed would be the same
                base = by_seed[0] if base is None else base
                source = "the Hub" if not files else files[column.task].path.name
                figures = summary(column, by_seed, base, source, time.perf_counter() - begin)
                row["tasks"][column.name] = figures
                _note(result["notes"], column, base, local=bool(files))
                accuracy = with_error(figures, "acc", 100, ".1f")
                say(f"{column.name:<11}{point.label():<20} accuracy {accuracy} %")
                if out is not None:
                    write_json(out / RESULTS, result)
            result["unfinished"].remove(column.name)
    except BaseException:
        try:
            _conclude(result, out, show)
        except Exception as error:  # what stopped the scoring is what the caller must hear of
            say(f"the results so far could not be written or drawn: {error}")
        raise
    _conclude(result, out, show)
    return result


def _conclude(result: dict[str, Any], out: Path | None, show: Callable[[dict[str, Any]], None]) -> None:
    """Means over the tasks that were scored at every point; then write and show what there is."""
    names = finished(result)
    for row in result["points"] if names else ():
        row["average"] = statistics.fmean(row["tasks"][name]["acc"] for name in names)
        by_task = [row["tasks"][name]["acc_by_seed"] for name in names]
        row["average_by_seed"] = [statistics.fmean(accuracies) for accuracies in zip(*by_task, strict=True)]
    if any(row["tasks"] for row in result["points"]):
        try:
            show(result)
        finally:
            if out is not None:
                write_json(out / RESULTS, result)


def _note(notes: dict[str, dict[str, float]], column: Column, scored: Scored, *, local: bool) -> None:
    """What a task of the Hub turned out to hold; local files were checked as they were read."""
    found: dict[str, float] = {} if local else dict(scored.notes)
    if scored.version != column.version:
        found[f"is the version in lm-eval {harness.VERSION}; the columns were written for {column.version:g}"] = (
            scored.version
        )
    if found:
        notes[column.task] = found


def draws(config: Any, point: Point) -> bool:
    """Whether a point draws anything, so that its scores hang on the seed."""
    random_experts = getattr(config, "expert_router", None) == "random"
    return random_experts or config.draws(point.mode)


def _append(path: Path, items: Sequence[Item], task: str, point: Point, seed: int) -> None:
    with path.open("a", encoding="utf-8") as file:
        for item in items:
            values = asdict(item)
            record = {"task": task, "item": values.pop("number"), "point": point.label(), "seed": seed}
            file.write(json.dumps(record | values) + "\n")
