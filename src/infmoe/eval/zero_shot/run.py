"""A checkpoint over tasks and dials: accuracy, margins, paired differences; table, picture and JSON."""

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from infmoe.data.shards import sha256
from infmoe.errors import InfMoEError
from infmoe.eval.dials import grid, parse_ints, parse_mode, parse_ratios
from infmoe.eval.loading import open_model
from infmoe.eval.zero_shot.local import read_local
from infmoe.eval.zero_shot.tasks import Column, columns_named
from infmoe.layers.point import Point
from infmoe.provenance import provenance, write_json

try:
    from infmoe.eval.zero_shot import harness
except ImportError as missing:
    raise InfMoEError("zero-shot tasks run through lm-eval: pip install 'infmoe[eval]'") from missing

_Z = 1.96  # of a 95 % interval over hundreds of items
RESULTS = "zero_shot.json"
PICTURE = "zero_shot.png"


@dataclass(frozen=True)
class Settings:
    """How a checkpoint is scored.

    Attributes:
        tasks: "paper", or lm-eval's names separated by commas.
        data_dir: local files; None: the Hub.
        limit: the first so many items of each task; None: all.
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


@dataclass(frozen=True)
class Item:
    """One scored item: the log-likelihood of each answer, the scored texts' characters, which one is right."""

    log_likelihoods: tuple[float, ...]
    num_chars: tuple[int, ...]
    gold: int

    @property
    def right(self) -> bool:
        """Whether the right answer has the highest log-likelihood (the first of equals counts, as in lm-eval)."""
        return max(range(len(self.log_likelihoods)), key=lambda i: self.log_likelihoods[i]) == self.gold

    @property
    def margin(self) -> float:
        """Log-likelihood of the right answer minus the mean of the others', in nats."""
        return _margin(self.log_likelihoods, self.gold)

    @property
    def per_char(self) -> list[float]:
        """Log-likelihoods per character of the scored text, without the space before it (lm-eval's `acc_norm`)."""
        return [v / max(n, 1) for v, n in zip(self.log_likelihoods, self.num_chars, strict=True)]

    @property
    def right_norm(self) -> bool:
        """Whether the right answer has the highest log-likelihood per character."""
        return max(range(len(self.per_char)), key=lambda i: self.per_char[i]) == self.gold

    @property
    def margin_norm(self) -> float:
        """The margin of the log-likelihoods per character."""
        return _margin(self.per_char, self.gold)


def _margin(values: Sequence[float], gold: int) -> float:
    return values[gold] - statistics.fmean(v for i, v in enumerate(values) if i != gold)


def evaluate_tasks(
    model_dir: Path,
    settings: Settings,
    *,
    num_samples: str | None = None,
    keep_ratio: str | None = None,
    num_experts_per_tok: str | None = None,
    mode: str | None = None,
    out: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Score a checkpoint.

    Args:
        model_dir: a run folder, a checkpoint or a saved model.
        settings: tasks, data, seeds.
        num_samples, keep_ratio, num_experts_per_tok, mode: dials as on the command line.
        out: folder for `zero_shot.json`, written after every task, so that what is done is kept.
        say: told what is done.

    Raises:
        InfMoEError: nothing to open, an unknown task, a missing or damaged file, a Hub that can't be reached.
    """
    columns = columns_named(settings.tasks, local=settings.data_dir is not None)
    files = {c.task: read_local(c, settings.data_dir) for c in columns} if settings.data_dir is not None else {}
    opened = open_model(model_dir)
    points = grid(
        opened.model.config,
        num_samples=parse_ints(num_samples, "--num-samples"),
        keep_ratios=parse_ratios(keep_ratio, "--keep-ratio"),
        num_experts_per_tok=parse_ints(num_experts_per_tok, "--num-experts-per-tok"),
        mode=parse_mode(mode),
    )
    result: dict[str, Any] = {
        "checkpoint": f"{model_dir.resolve().name}/{opened.checkpoint.name}",
        "lm_eval": harness.VERSION,
        "seeds": list(settings.seeds),
        "batch_size": settings.batch_size,
        "limit": settings.limit,
        "notes": {task: file.notes for task, file in files.items() if file.notes},
        "points": [asdict(point) | {"label": point.label(), "tasks": {}} for point in points],
        "files": {file.path.name: sha256(file.path) for file in files.values()},
        "provenance": provenance(),
    }
    model = harness.InfMoELM(opened, batch_size=settings.batch_size)
    if settings.per_item is not None:
        try:
            settings.per_item.parent.mkdir(parents=True, exist_ok=True)
            settings.per_item.write_text("")
        except OSError as error:
            raise InfMoEError(
                f"cannot write {settings.per_item} ({error.strerror}): choose another --per-item"
            ) from error
    for column in columns:
        task = harness.local_config(files[column.task]) if files else column.task
        base: list[Item] | None = None
        for point, row in zip(points, result["points"], strict=True):
            begin = time.perf_counter()
            by_seed = []
            for seed in settings.seeds:
                model.point, model.seed = point, seed
                by_seed.append(_scored(model, column, task, settings, point))
                if not _draws(opened.model.config, point):
                    break  # nothing random: another seed would be the same
            items = by_seed[0]
            base = items if base is None else base
            source = "the Hub" if not files else files[column.task].path.name
            row["tasks"][column.name] = _summary(column, by_seed, base, source, time.perf_counter() - begin)
            figures = row["tasks"][column.name]
            say(f"{column.name:<11}{point.label():<20} accuracy {figures['acc']:.4f} ± {figures['acc_se']:.4f}")
            if out is not None:
                write_json(out / RESULTS, result)
    for row in result["points"]:
        accuracies = [figures["acc"] for figures in row["tasks"].values()]
        row["average"] = statistics.fmean(accuracies)
    if out is not None:
        write_json(out / RESULTS, result)
    return result


def _draws(config: Any, point: Point) -> bool:
    random_experts = getattr(config, "expert_router", None) == "random"
    draws = config.ffn == "infinity" and config.sigma_activation != "none"
    return random_experts or (draws and (point.mode or config.routing_mode) != "mu")


def _scored(model: "harness.InfMoELM", column: Column, task: Any, settings: Settings, point: Point) -> list[Item]:
    """Every item of a task at one point and seed, in the task's order."""
    result = harness.run_task(model, task, settings.limit)
    (samples,) = result["samples"].values()
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    items = [_item(sample, column) for sample in samples]
    if settings.per_item is not None:
        with settings.per_item.open("a", encoding="utf-8") as file:
            for sample, item in zip(samples, items, strict=True):
                record = {"task": column.name, "item": sample["doc_id"], "point": point.label(), "seed": model.seed}
                file.write(json.dumps(record | asdict(item)) + "\n")
    return items


def _item(sample: dict[str, Any], column: Column) -> Item:
    values = tuple(float(response[0]) for response in sample["filtered_resps"])
    doc, target = sample["doc"], sample["target"]
    if isinstance(doc.get("gold"), int):
        gold = doc["gold"]
    elif str(target).isdigit():
        gold = int(target)
    else:  # lm-eval's WinoGrande: the target is the text, the label stands in the document
        gold = int(doc["answer"]) - 1
    if not 0 <= gold < len(values):
        raise InfMoEError(f"{column.name}, item {sample['doc_id']}: label {gold} is none of the {len(values)} answers")
    texts = [str(pair[1]).removeprefix(" ") for pair in _arguments(sample)]
    return Item(values, tuple(len(text) for text in texts), gold)


def _arguments(sample: dict[str, Any]) -> list[Sequence[str]]:
    """(context, continuation) of each answer, in either of lm-eval's forms."""
    found = sample["arguments"]
    listed = list(found.values()) if isinstance(found, dict) else list(found)
    return [list(pair.values()) if isinstance(pair, dict) else pair for pair in listed]


def _summary(
    column: Column, by_seed: list[list[Item]], base: list[Item], source: str, seconds: float
) -> dict[str, Any]:
    items = by_seed[0]
    right = [float(item.right) for item in items]
    norm = [float(item.right_norm) for item in items]
    margins = [item.margin for item in items]
    per_char = [item.margin_norm for item in items]
    accuracies = [statistics.fmean(float(item.right) for item in scored) for scored in by_seed]
    figures: dict[str, Any] = {
        "task": column.task,
        "version": column.version,
        "metric": column.metric,
        "source": source,
        "chance": column.chance,
        "items": len(items),
        "acc": statistics.fmean(right),
        "acc_se": _se(right),
        "acc_norm": statistics.fmean(norm),
        "acc_norm_se": _se(norm),
        "margin": statistics.fmean(margins),
        "margin_se": _se(margins),
        "margin_norm": statistics.fmean(per_char),
        "margin_norm_se": _se(per_char),
        "acc_by_seed": accuracies,
        "acc_seed_sd": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "margin_by_seed": [statistics.fmean(item.margin for item in scored) for scored in by_seed],
        "items_per_sec": len(items) * len(by_seed) / seconds,
    }
    if items is not base:  # item by item against the first point
        for name in ("right", "margin"):
            change = [float(getattr(i, name)) - float(getattr(b, name)) for i, b in zip(items, base, strict=True)]
            mean, error = statistics.fmean(change), _se(change)
            key = {"right": "acc"}.get(name, name)
            noise = {f"{key}_within_noise": abs(mean) <= _Z * error}
            figures |= {f"{key}_change": mean, f"{key}_change_se": error, **noise}
    return figures


def _se(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def table(result: dict[str, Any]) -> str:
    """Accuracy, and the margin below it, of every point; the paper's rows for comparison."""
    from infmoe import paper

    names = list(result["points"][0]["tasks"])
    widths = [max(16, len(name)) for name in names]
    head = f"{'':<22}" + "".join(f"{n:>{w + 2}}" for n, w in zip(names, widths, strict=True)) + f"{'mean':>9}"
    lines = ["accuracy in %, ± standard error; below, the right answer's margin in nats, ± 95 %", head]
    for row in result["points"]:
        cells = [f"{100 * t['acc']:.1f} ± {100 * t['acc_se']:.1f}" for t in row["tasks"].values()]
        lines.append(_line(row["label"], cells, widths, f"{100 * row['average']:.1f}"))
        cells = [f"{t['margin']:+.3f} ± {_Z * t['margin_se']:.3f}" for t in row["tasks"].values()]
        lines.append(_line("  margin", cells, widths, ""))
        if row is not result["points"][0]:
            cells = [_change(figures) for figures in row["tasks"].values()]
            lines.append(_line("  change (acc / margin)", cells, widths, ""))
    chance = [f"{100 * t['chance']:.0f}" for t in result["points"][0]["tasks"].values()]
    lines.append(_line("chance", chance, widths, ""))
    for arm in ("dense", "moe", "infinity"):
        printed = dict(zip(paper.TABLE1_TASKS, paper.TABLE1["small"][arm][1], strict=True))
        cells = [f"{printed[name]:.1f}" if name in printed else "–" for name in names]
        shared = [printed[name] for name in names if name in printed]
        mean = f"{statistics.fmean(shared):.1f}" if len(shared) == len(names) else "–"
        lines.append(_line(f"paper, small {arm}", cells, widths, mean))
    notes = [f"{task}: {count} {what}" for task, found in result["notes"].items() for what, count in found.items()]
    lines += [f"note: {note}" for note in notes]
    return "\n".join(lines)


def _change(figures: dict[str, Any]) -> str:
    acc = "noise" if figures["acc_within_noise"] else f"{100 * figures['acc_change']:+.1f}"
    margin = "noise" if figures["margin_within_noise"] else f"{figures['margin_change']:+.3f}"
    return f"{acc} / {margin}"


def _line(label: str, cells: Sequence[str], widths: Sequence[int], last: str) -> str:
    return f"{label:<22}" + "".join(f"{c:>{w + 2}}" for c, w in zip(cells, widths, strict=True)) + f"{last:>9}"


def plot(result: dict[str, Any], path: Path) -> Path:
    """Mean accuracy over the tasks, and each task's margin, against the points; 95 % intervals over items."""
    from infmoe.eval.plots import COLOURS, MARKERS, figure, save

    fig, axes = figure(2, width=5.4)
    labels = [row["label"] for row in result["points"]]
    places = range(len(labels))
    for i, name in enumerate(result["points"][0]["tasks"]):
        figures = [row["tasks"][name] for row in result["points"]]
        style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "capsize": 3, "label": name}
        axes[0].errorbar(places, [100 * f["acc"] for f in figures], [196 * f["acc_se"] for f in figures], **style)
        axes[1].errorbar(places, [f["margin"] for f in figures], [_Z * f["margin_se"] for f in figures], **style)
    axes[0].set(ylabel="accuracy (%)", title="Accuracy")
    axes[1].set(ylabel="log-likelihood of the right answer minus the others' (nats)", title="Margin")
    for ax in axes:
        ax.set_xticks(list(places), labels, rotation=30, ha="right", fontsize=8)
    axes[0].legend(fontsize=7, ncols=2)
    fig.suptitle("Zero-shot tasks over the dials (95 % over items)", fontsize=11)
    return save(fig, path)
