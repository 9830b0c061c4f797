"""Whether a run's file is whole, and of the run that it is named after: else it is named, and left alone."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from infmoe.errors import InfMoEError
from infmoe.hf import InfMoEConfig, model_cost
from infmoe.hf.configuration_infmoe import model_fields
from infmoe.reproduce.arms import arm_named
from infmoe.reproduce.measures import COUNTS, MEASURES, ZERO_SHOT, own_settings, settings
from infmoe.reproduce.places import Place, Places, place_of
from infmoe.reproduce.plan import RunSpec, Scale
from infmoe.train.config import RunConfig, differing_keys

_PARTS = {
    "run": dict,
    "config": dict,
    "data": dict,
    "cost": dict,
    "seconds": float,
    "curve": dict,
    "measures": dict,
    "provenance": dict,
}
_COST = (
    *("total", "total_with_wz", "active", "active_with_wz", "active_union"),
    *("flops_executed", "flops_ideal", "weights_ideal"),
)
_COURSE = ("loss", "entropy", "effective_units", "dead_ratio", "sigma_to_mu", "overlap_ratio")
# what a file says of its making, and the page reads
_MAKING: tuple[tuple[str, str, tuple[type, ...]], ...] = (
    ("machine", "cpu", (str,)),
    ("versions", "torch", (str,)),
    ("training", "commit", (str, type(None))),  # None: trained outside of a source tree
)
_LARGEST = 1e200
_ROUNDING = 1e-6  # by which a mean of shares may lie above one
# what a row's figures lie between, those that the page reads
_LIMITS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(COUNTS, (1, math.inf)),
    **dict.fromkeys(("keep_ratio", "share", "union_ratio", "overlap_ratio", "acc"), (0.0, 1.0 + _ROUNDING)),
    **dict.fromkeys(("loss", "sigma_to_mu", "acc_se"), (0.0, math.inf)),
    "mean_samples": (1.0, math.inf),
}
_NAMED = 3  # missing rows in an error


def check_run(path: Path, spec: RunSpec, values: Mapping[str, Any], tasks: Mapping[str, str]) -> None:
    """Nothing, of a run's file that is what it should be.

    Args:
        path: the file, for the error.
        spec: the run that it is named after.
        values: its content.
        tasks: the zero-shot tasks' files: name -> SHA-256.

    Raises:
        InfMoEError: it is damaged, of another configuration, or measured in another way; names the file and a remedy.
    """
    config = spec.config()
    _refuse_damage(path, _parts_damage(spec, values))
    if differing := _differing(spec, config, values):
        raise InfMoEError(
            f"{path} is of another configuration (other values of {', '.join(differing)}): "
            "move it away to train that run again, or give another --out"
        )
    _refuse_damage(path, _cost_damage(config, values["cost"]))
    _refuse_damage(path, _curve_damage(config, values["curve"], diverged=bool(values.get("diverged"))))
    if values.get("diverged"):
        _refuse_damage(path, "measures of a run that diverged" if values["measures"] else None)
        return
    _refuse_damage(path, _measures_damage(config, values["measures"]))
    _check_settings(path, spec.scale, values, tasks)
    for name, rows in values["measures"].items():
        _check_places(path, spec, config, name, rows)


def run_identity(spec: RunSpec, config: RunConfig) -> dict[str, Any]:
    """What a run's file says of the run in a few words; what it started from stands beside it."""
    return {
        "scale": spec.scale.name,
        "arm": spec.arm.name,
        "recipe": spec.recipe,
        "tokens": config.steps * config.batch_tokens,
        "lr": spec.lr,
        "seed": spec.seed,
    }


def expanded_model(config: RunConfig) -> dict[str, Any]:
    """Every field that describes a run's model, defaults filled in, in JSON's values.

    A default that changes later is seen by it: `config.model` holds only what the recipe and the run set.
    """
    return dict(_known(json.dumps(config.model)).fields)


@dataclass(frozen=True)
class _Known:
    """What follows from a model's settings.

    Attributes:
        config: the configuration.
        fields: all that it says of the model.
        cost: parameters and FLOPs.
    """

    config: InfMoEConfig
    fields: dict[str, Any]
    cost: dict[str, int]


@cache  # many runs share a model
def _known(model: str) -> _Known:
    config = InfMoEConfig(**json.loads(model))
    return _Known(config, model_fields(config), model_cost(config).as_dict())


def _refuse_damage(path: Path, damage: str | None) -> None:
    if damage is not None:
        raise InfMoEError(f"{path} is damaged ({damage}): restore it, or move it away to train that run again")


def is_number(value: Any) -> bool:
    """Whether a value of a file is a finite number, and none that arithmetic in floats would overflow with."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST


def is_count(value: Any) -> bool:
    """Whether a value of a file is a whole number above 0."""
    return isinstance(value, int) and is_number(value) and value > 0


def data_damage(data: Mapping[str, Any]) -> str | None:
    """What is wrong with `data.json`, or None."""
    if not isinstance(data.get("sha256"), str):
        return "no SHA-256"
    if not is_count(data.get("vocab_size")):
        return "no size of the vocabulary"
    splits = data.get("splits")
    for name in ("train", "val"):
        split = splits.get(name) if isinstance(splits, dict) else None
        if not isinstance(split, dict) or not all(is_count(split.get(key)) for key in ("documents", "tokens")):
            return f"no documents and tokens of the split {name!r}"
    return None


def _parts_damage(spec: RunSpec, values: Mapping[str, Any]) -> str | None:
    """What is missing of a run's file, or None."""
    for key, kind in _PARTS.items():
        if not isinstance(values.get(key), kind):
            return f"no {key!r}"
    if not is_number(values["seconds"]) or values["seconds"] < 0:
        return "no 'seconds'"
    if "model" in values and (not isinstance(values["model"], dict) or not values["model"]):
        return "no 'model'"
    if "diverged" in values and (not isinstance(values["diverged"], str) or not values["diverged"]):
        return "no reason for 'diverged'"
    if "fingerprint" in values and not isinstance(values["fingerprint"], str):  # older files have none
        return "no 'fingerprint'"
    if spec.arm.init is not None and (damage := _start_damage(spec, values["run"].get("init"))) is not None:
        return damage
    if not isinstance(values["data"].get("sha256"), str):
        return "no SHA-256 of its data"
    log = values["config"].get("log")
    if not isinstance(log, dict) or not is_count(log.get("stats_tokens")):
        return "no 'log.stats_tokens' in its configuration"
    for part, key, kinds in _MAKING:
        found = values["provenance"].get(part)
        if not isinstance(found, dict) or key not in found or not isinstance(found[key], kinds):
            return f"no '{part}.{key}' in its provenance"
    return None


def _start_damage(spec: RunSpec, start: Any) -> str | None:
    """What is wrong with what a file says of the model that its run started from, or None."""
    assert spec.arm.init is not None
    base = arm_named(spec.arm.init)
    keys = ("arm", "slug", "fingerprint")
    if not isinstance(start, dict) or not all(isinstance(start.get(key), str) for key in keys):
        return f"nothing on a model of {base.name} that it started from"
    lr = spec.lr / spec.arm.lr_factor * base.lr_factor
    wanted = RunSpec(spec.scale, base, spec.scale.tokens, lr, spec.seed).slug
    if (start["arm"], start["slug"]) != (base.name, wanted):
        return f"it started from {start['slug']!r} of {start['arm']!r}, not from {wanted!r} of {base.name!r}"
    return None


def _differing(spec: RunSpec, config: RunConfig, values: Mapping[str, Any]) -> list[str]:
    """Dotted keys in which a file is of another run than the one that it is named after.

    A field that the expanded model was written without, because there was none then, is not looked at; neither is a
    file that was written before models were expanded.
    """
    keys = set(differing_keys(config.to_dict(), values["config"]))
    fields = _known(json.dumps(config.model)).fields
    keys |= {f"model.{name}" for name, value in values.get("model", {}).items() if value != fields.get(name)}
    run, wanted = values["run"], run_identity(spec, config)
    keys |= {f"run.{name}" for name in wanted if run.get(name) != wanted[name]}
    if "init" in run and spec.arm.init is None:
        keys.add("run.init")
    return sorted(keys)


def _cost_damage(config: RunConfig, cost: Mapping[str, Any]) -> str | None:
    """What is wrong with a run's costs, which its configuration decides, or None."""
    counted = _known(json.dumps(config.model)).cost
    for name, count in counted.items():
        if name in _COST and not is_count(cost.get(name)):
            return f"no cost {name!r}"
        if name in cost and cost[name] != count:
            return f"cost {name!r} is {cost[name]!r}, its model's is {count}"
    return None


def _curve_damage(config: RunConfig, curve: Mapping[str, Any], *, diverged: bool) -> str | None:
    """What is wrong with the course of training, or None. One that diverged may end anywhere, and nobody reads it."""
    for name, course in curve.items():
        if not isinstance(course, list):
            return f"no course of {name!r}"
    if diverged:
        return None
    tokens = curve.get("tokens")
    if not tokens or not all(map(is_count, tokens)) or tokens != sorted(set(tokens)):
        return "no course of training"
    if tokens[-1] != config.steps * config.batch_tokens:
        return f"a course of training that ends at {tokens[-1]} tokens"
    for name in _COURSE:
        if len(curve.get(name, ())) != len(tokens):
            return f"no course of {name!r}"
    for name, course in curve.items():
        if not all(is_number(value) and value >= 0 for value in course):
            return f"no course of {name!r}: it holds what is no such figure"
    return None


def _measures_damage(config: RunConfig, measures: Mapping[str, Any]) -> str | None:
    """What is wrong with what was measured, or None."""
    for name, rows in measures.items():
        if not isinstance(rows, list) or not rows:
            return f"an empty measure {name!r}"
        for row in rows:
            if not isinstance(row, dict):
                return f"a point of {name!r} that is none"
            if name in MEASURES and (what := _row_damage(name, row, config)) is not None:
                return f"a point of {name!r} {what}"
    return None if "held_out" in measures else "no held-out loss"


def _row_damage(name: str, row: Mapping[str, Any], config: RunConfig) -> str | None:
    """What is wrong with a row of a measure, or None."""
    for key in (*MEASURES[name].keys, *(key for key in row if key in _LIMITS)):
        value, kind = row.get(key), int if key in COUNTS else float
        if not isinstance(value, kind) or not is_number(value):
            return f"without {'a loss' if key == 'loss' else key}"
        low, high = _LIMITS.get(key, (-math.inf, math.inf))
        if not low <= value <= high:
            return f"whose {key} is {value}"
    for label in MEASURES[name].labels:
        if label not in row:
            return f"without {label}"
    shares, layers = row.get("layer_shares"), config.model.get("num_hidden_layers")
    if shares is not None and not (
        isinstance(shares, list) and len(shares) == layers and all(is_number(s) and 0 <= s <= 1 for s in shares)
    ):
        return "without layer_shares"
    return None


def _check_settings(path: Path, scale: Scale, values: Mapping[str, Any], tasks: Mapping[str, str]) -> None:
    """Refuse what was measured with other settings."""
    found = values.get("measured_with")
    measured_with = dict(found) if isinstance(found, dict) else {}
    own = {name: measured_with.pop(name, None) for name in MEASURES}
    if measured_with != settings(scale):
        raise InfMoEError(f"{path} was measured with other settings (windows, dials): move it away to make it again")
    for name in values["measures"]:
        expected = own_settings(name, scale, tasks)
        if expected is not None and own.get(name) != expected:
            where = " (tasks.json beside runs/ says on which files)" if name == ZERO_SHOT else ""
            raise InfMoEError(f"{path}: {name!r} was measured with other settings{where}: restore it, or {_anew(name)}")


def _anew(name: str) -> str:
    """What has a measure taken again."""
    if name == "held_out":  # a file without it is damaged
        return "move it away to train that run again"
    return f"take {name!r} out of its measures to have it measured anew"


@cache
def _places(name: str, model: str, arm: str, tokens: int, scale: Scale) -> Places | str | None:
    """Where a measure is taken of a run; why it can't be; or None where nobody knows."""
    where = MEASURES[name].where
    spec = RunSpec(scale, arm_named(arm), tokens, 0.0, 1)  # neither rate nor seed decides it
    try:
        return None if where is None else where(_known(model).config, spec)
    except InfMoEError as error:  # a dial that the model does not have
        return str(error)


def _check_places(path: Path, spec: RunSpec, config: RunConfig, name: str, rows: list[dict[str, Any]]) -> None:
    """Refuse a measure whose rows are not those that a run is measured at."""
    if name not in MEASURES:
        return
    wanted = _places(name, json.dumps(config.model), spec.arm.name, spec.tokens, spec.scale)
    wrong = wanted if isinstance(wanted, str) else _wrong_places(wanted, [place_of(row) for row in rows])
    if wrong is not None:
        raise InfMoEError(f"{path}: {name!r} was measured at other points ({wrong}): restore it, or {_anew(name)}")


def _wrong_places(wanted: Places | None, found: list[Place]) -> str | None:
    """Which rows are missing, too many or of no place that there is; None: it is as it should be."""
    if wanted is None:
        return None
    begun = [group for group in wanted.groups if any(place in found for place in group)]
    expected = [*wanted.required, *(place for group in begun for place in group)]
    if missing := [place for place in expected if place not in found]:
        more = f", and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        return f"without {'; '.join(map(_place_text, missing[:_NAMED]))}{more}"
    if strange := [place for place in found if place not in expected]:
        return f"{_place_text(strange[0])} is not one of them"
    twice = [place for place in expected if found.count(place) > 1]
    return f"{_place_text(twice[0])} twice" if twice else None


def _place_text(place: Place) -> str:
    shown = {name: f"{value:g}" if isinstance(value, float) else repr(value) for name, value in place.items()}
    return " ".join(f"{name}={value}" for name, value in shown.items()) or "the run's own"
