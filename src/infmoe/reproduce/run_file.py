"""What the file of a finished run holds: what was trained on what, what it cost, and its measures."""

import hashlib
import json
from pathlib import Path
from typing import Any

from infmoe.data import TokenData
from infmoe.errors import InfMoEError
from infmoe.eval.loading import Opened
from infmoe.eval.report import read_metrics
from infmoe.hf import model_cost
from infmoe.hf.configuration_infmoe import model_fields
from infmoe.hf.identity import fingerprint
from infmoe.provenance import provenance
from infmoe.reproduce.checks import expanded_model, run_identity
from infmoe.reproduce.measures import MEASURES, ZERO_SHOT, Context, own_settings, settings
from infmoe.reproduce.plan import RunSpec
from infmoe.reproduce.store import Store
from infmoe.train.config import hf_config
from infmoe.train.run_dir import RUN_FILE

_CURVE_POINTS = 64


def new_record(store: Store, spec: RunSpec, folder: Path, data: TokenData, label: str) -> dict[str, Any]:
    """Everything about a run but its measures.

    Args:
        store: of the runs, one of which it may have started from.
        spec: the run.
        folder: where it was trained.
        data: what on.
        label: the command that the file names.
    """
    trained = json.loads((folder / RUN_FILE).read_text())
    config = spec.config()
    curve, seconds = _curve(read_metrics(folder))
    start: dict[str, Any] = {}
    training = {"versions": trained["versions"], "commit": trained["git_commit"]}
    if "machine" in trained:  # not in a run that was begun before it was written down
        training["machine"] = trained["machine"]
    if (base := store.base(spec)) is not None:
        # by content: where the base's model lay is this machine's alone, so `config` has nothing of it
        mark = trained["init"]["fingerprint"]
        start = {"init": {"arm": base.arm.name, "slug": base.slug, "fingerprint": mark}}
    return {
        "run": run_identity(spec, config) | start,
        "config": config.to_dict(),
        "model": expanded_model(config),
        "data": describe_data(data),
        "cost": model_cost(hf_config(config)).as_dict(),
        "seconds": seconds,
        "curve": curve,
        "measures": {},
        "measured_with": settings(spec.scale),
        "provenance": provenance() | {"command": label, "training": training},
    }


def with_measure(
    values: dict[str, Any], name: str, context: Context, tasks: dict[str, str], label: str
) -> dict[str, Any]:
    """What a run's file holds with one measure more, which is taken here.

    Args:
        values: the file's, before.
        name: of the measure.
        context: what it is taken of.
        tasks: the zero-shot tasks' files, name -> SHA-256.
        label: the command that takes it.
    """
    more: dict[str, Any] = {"measures": values["measures"] | {name: MEASURES[name].take(context)}}
    own = own_settings(name, context.spec.scale, tasks)
    if own is not None:
        more["measured_with"] = values["measured_with"] | {name: own}
    if name == ZERO_SHOT:
        # it may be taken long after training, by another commit
        more["provenance"] = values["provenance"] | {ZERO_SHOT: provenance() | {"command": label}}
    return values | more


def checked_fingerprint(store: Store, spec: RunSpec, opened: Opened) -> str:
    """The fingerprint of a model that is the run's.

    Raises:
        InfMoEError: a default has changed since the run was begun, or it is another --out's model of the same name.
    """
    wanted, fields = expanded_model(spec.config()), model_fields(opened.model.config)
    # in JSON's values, as those of `expanded_model` are: a list of layers is a tuple in a config
    differing = [name for name, value in json.loads(json.dumps(fields)).items() if value != wanted.get(name)]
    if differing:
        raise InfMoEError(
            f"{opened.checkpoint} is not the model that {spec.slug} stands for now (other values of "
            f"{', '.join(differing)}): a default has changed since; move it away to train that run anew"
        )
    mark = fingerprint(opened.model)
    run = store.get(spec)
    if run is not None and run.values.get("fingerprint", mark) != mark:  # older files have none
        raise InfMoEError(
            f"{opened.checkpoint} is not the model that {run.path} is of: give each --out a --work of its own, "
            "or move the file away to train that run again"
        )
    return mark


def _curve(metrics: list[dict[str, Any]]) -> tuple[dict[str, list], float]:
    """The training's course, thinned out, and the seconds that its steps took (evaluations apart)."""
    steps = [record for record in metrics if "loss" in record]
    seconds, tokens = 0.0, 0
    for record in steps:
        seconds += (record["tokens"] - tokens) / record["tokens_per_sec"]
        tokens = record["tokens"]
    every = max(1, -(-len(steps) // _CURVE_POINTS))  # a run may diverge before its first record
    kept = steps[::-1][::every][::-1]  # the last one always
    curve: dict[str, list] = {"tokens": [r["tokens"] for r in kept], "loss": [round(r["loss"], 5) for r in kept]}
    if kept and kept[-1].get("routing"):
        for name in kept[-1]["routing"]:
            curve[name] = [round(r["routing"][name], 5) for r in kept]
    held_out = [record for record in metrics if "val_loss" in record]
    curve["val_tokens"] = [record["tokens"] for record in held_out]
    curve["val_loss"] = [round(record["val_loss"], 5) for record in held_out]
    return curve, seconds


def describe_data(data: TokenData) -> dict[str, Any]:
    """What runs were trained on, by content: the same wherever the files lie."""
    manifest = data.manifest
    content = {name: [shard.sha256 for shard in split.shards] for name, split in manifest.splits.items()}
    digest = hashlib.sha256(json.dumps([manifest.tokenizer.sha256, content], sort_keys=True).encode()).hexdigest()
    counts = {
        name: {"documents": split.documents, "tokens": split.tokens, "text_bytes": split.text_bytes}
        for name, split in manifest.splits.items()
    }
    return {"sha256": digest, "vocab_size": manifest.tokenizer.vocab_size, "splits": counts}
