"""The configuration of a training run: everything that decides the weights, and how the run reports.

Importing this module is cheap (no torch), so that listing recipes and `--help` stay fast.
"""

import contextlib
import difflib
import json
import re
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import to_jsonable_python

from infmoe.errors import InfMoEError, unknown_name


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


Beta = Annotated[float, Field(ge=0, lt=1)]


class DataConfig(_Strict):
    """Where the tokens are.

    Attributes:
        dir: a folder made by `infmoe data`.
        window: tokens per row; None: the model's `max_position_embeddings`.
    """

    dir: str | None = None
    window: int | None = Field(default=None, ge=2)


class OptimConfig(_Strict):
    """AdamW. W_z's own learning rate factor and decay are fields of the model's config.

    Attributes:
        lr: peak learning rate.
        betas: the paper does not name them; (0.9, 0.95) is the usual choice for language models.
        eps: AdamW's epsilon.
        weight_decay: on every matrix, embeddings included (as nanoGPT).
        clip_norm: the gradient's norm is cut to this; None: never.
        zero_stage: 1: of several processes each keeps AdamW's state of its share of the parameters alone, updates
            those, and sends them to the others (ZeRO-1, which the paper trains with); 0: each keeps all of it. The
            weights are the same, and a run may go on with the other.
    """

    lr: float = Field(gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    clip_norm: float | None = Field(default=1.0, gt=0)
    zero_stage: Literal[0, 1] = 0


class ScheduleConfig(_Strict):
    """Linear warm-up, then a cosine down to `min_lr_ratio` of the peak at the last step.

    Attributes:
        warmup_steps: steps of the linear rise; a run shorter than this never leaves it.
        min_lr_ratio: where the cosine ends, as a fraction of the peak.
    """

    warmup_steps: int = Field(ge=0)
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)


Ratio = Annotated[float, Field(gt=0, le=1, strict=True)]  # strict: true is no number
Count = Annotated[int, Field(ge=1, strict=True)]


class ElasticConfig(_Strict):
    """Training at changing dials, so that one checkpoint serves many of them; all None: at the model's own.

    Attributes:
        start: share of the steps that pass before it begins: until then the model trains at its own dials, as if
            nothing here were set, and a `moe` without Elastic MoE's draws and router loss.
        keep_ratio: keep ratios of ∞-MoE.
        num_samples: K of ∞-MoE.
        num_experts_per_tok: k of a discrete MoE; drawn per layer, this is Matryoshka-MoE (arXiv 2509.26520).
        per: whether each "layer" draws its own, all values equally likely, or all share one draw per "step".
        rule: "draw" one setting a step; or a "sandwich" (Yu and Huang 2019): the largest and the smallest of every
            list in every step, and `between` drawn ones.
        between: drawn settings of a sandwich.
        distill: the largest of a sandwich learns from the text and teaches the others its distribution.
        others_weight: of the loss of each of a sandwich's other settings; the largest has 1, and the sum of the
            weighted losses is divided by the sum of the weights.
        consistency_weight: of the divergence between two draws of the router's noise: a second pass with other
            noise learns from the text and, so weighted, from the first one's distribution (∞-MoE).
    """

    start: float = Field(default=0.0, ge=0, lt=1)
    keep_ratio: tuple[Ratio, ...] | None = None
    num_samples: tuple[Count, ...] | None = None
    num_experts_per_tok: tuple[Count, ...] | None = None
    per: Literal["layer", "step"] = "layer"
    rule: Literal["draw", "sandwich"] = "draw"
    between: int = Field(default=0, ge=0, strict=True)
    distill: bool = False
    others_weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    consistency_weight: float = Field(default=0.0, ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _makes_sense(self) -> "ElasticConfig":
        for name, values in self.lists.items():
            if not values:
                raise ValueError(f"elastic.{name} must hold at least one value")
        if self.per == "step" and not self.lists:
            raise ValueError("elastic.per=step draws nothing without a list, e.g. elastic.keep_ratio=[0.125,0.5]")
        if self.rule == "sandwich" and self.lists and all(len(set(values)) == 1 for values in self.lists.values()):
            raise ValueError("elastic.rule=sandwich needs a list of at least two values: its ends are the same")
        if self.rule == "sandwich" and not self.lists:
            raise ValueError("elastic.rule='sandwich' needs a list of values, e.g. elastic.keep_ratio=[0.125,0.5]")
        if self.rule == "sandwich" and not self.between:
            between = [name for name, values in self.lists.items() if len(set(values)) > 2]
            if between:
                raise ValueError(
                    f"a sandwich trains at the ends of elastic.{between[0]} alone: give two values, or set "
                    "elastic.between=1 to draw one between them too"
                )
            if self.per == "step":
                raise ValueError("elastic.per=step draws nothing in a sandwich: set elastic.between, or leave it out")
        if self.rule != "sandwich" and (self.between or self.distill or self.others_weight != 1):
            raise ValueError("elastic.between, distill and others_weight go with elastic.rule=sandwich")
        if self.rule == "sandwich" and self.consistency_weight:
            raise ValueError("elastic.consistency_weight goes with elastic.rule=draw")
        return self

    @property
    def lists(self) -> dict[str, tuple]:
        """Dial -> the values that it takes."""
        names = ("keep_ratio", "num_samples", "num_experts_per_tok")
        return {name: values for name in names if (values := getattr(self, name)) is not None}

    @property
    def passes(self) -> int:
        """Forward and backward passes over each token, once it has begun."""
        return 2 + self.between if self.rule == "sandwich" else 2 if self.consistency_weight else 1


class EvalConfig(_Strict):
    """The loss on the validation split.

    Attributes:
        every: steps between two evaluations (and one at the end); None: no evaluation.
        windows: how many windows, always the same, spread over the split.
    """

    every: int | None = Field(default=100, ge=1)
    windows: int = Field(default=64, ge=1)


class LogConfig(_Strict):
    """What is reported, and how often.

    Attributes:
        every: steps between two lines of `metrics.jsonl`.
        stats_tokens: the routing statistics look at this many tokens of a micro-batch.
        tensorboard: write TensorBoard events beside the JSON lines.
    """

    every: int = Field(default=10, ge=1)
    stats_tokens: int = Field(default=512, ge=1)
    tensorboard: bool = False


class CheckpointConfig(_Strict):
    """When checkpoints are written.

    Attributes:
        every: steps between two checkpoints (and one at the end).
        keep_last: how many stay on disk; None: all.
    """

    every: int = Field(default=100, ge=1)
    keep_last: int | None = Field(default=2, ge=1)


class RunConfig(_Strict):
    """One training run.

    Attributes:
        name: the recipe it came from.
        init: a run, a checkpoint or a saved model whose weights it starts from; None: the seed draws them.
        seed: of the initial weights, the data order, the router's noise and dropout.
        steps: optimizer steps.
        batch_tokens: tokens per optimizer step, over all processes and micro-batches.
        micro_batch_size: rows per process and forward pass.
        precision: "bf16" runs forward and backward under autocast; weights and optimizer stay float32.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        model: fields of `InfMoEConfig`, which checks them.
        elastic: dials that change while training.
    """

    name: str
    init: str | None = None
    seed: int = Field(default=0, ge=0, lt=2**63)
    steps: int = Field(ge=1)
    batch_tokens: int = Field(ge=1)
    micro_batch_size: int = Field(ge=1)
    precision: Literal["bf16", "fp32"] = "bf16"
    gradient_checkpointing: bool = False
    model: dict[str, Any]
    data: DataConfig = DataConfig()
    optim: OptimConfig
    schedule: ScheduleConfig
    elastic: ElasticConfig = ElasticConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _start_is_between(self) -> "RunConfig":
        if self.elastic.start and not 0 < self.plain_steps < self.steps:
            raise ValueError(
                f"elastic.start={self.elastic.start:g} of {self.steps} steps is step {self.plain_steps}: "
                "choose one between the first and the last"
            )
        return self

    @model_validator(mode="after")
    def _window_fits(self) -> "RunConfig":
        positions = self.model.get("max_position_embeddings")
        if not isinstance(positions, int) or positions < 2:
            raise ValueError(f"model.max_position_embeddings must be an integer of at least 2, got {positions!r}")
        if self.data.window is not None and self.data.window > positions:
            raise ValueError(
                f"data.window={self.data.window} exceeds model.max_position_embeddings={positions}: lower it"
            )
        return self

    @property
    def window(self) -> int:
        """Tokens per row."""
        return self.data.window or int(self.model["max_position_embeddings"])

    @property
    def plain_steps(self) -> int:
        """Steps before the first elastic one."""
        return round(self.elastic.start * self.steps)

    @property
    def mean_passes(self) -> float:
        """Forward and backward passes over a token, on average over the run."""
        return 1.0 + (self.elastic.passes - 1) * (1.0 - self.plain_steps / self.steps)

    @property
    def batch_rows(self) -> int:
        """Rows per optimizer step, over all processes and micro-batches."""
        return self.batch_tokens // self.window

    def accumulation(self, num_processes: int) -> int:
        """Micro-batches per process and optimizer step.

        Raises:
            InfMoEError: `batch_tokens` is no multiple of what one forward pass of all processes takes.
        """
        unit = self.window * self.micro_batch_size * num_processes
        if self.batch_tokens % unit:
            nearest = max(1, round(self.batch_tokens / unit)) * unit
            raise InfMoEError(
                f"batch_tokens={self.batch_tokens} is no multiple of {unit} (window {self.window} x "
                f"micro_batch_size {self.micro_batch_size} x {num_processes} processes): "
                f"take batch_tokens={nearest}, or another micro_batch_size"
            )
        return self.batch_tokens // unit

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `load_config` reads them back."""
        return self.model_dump(mode="json")


# Where 2026/10 is a folder, or a name.
_FREE_TEXT = ("name", "init", "data.dir")
_FRACTION = re.compile(r"(?<![\w./])(\d+)\s*/\s*(\d+)(?![\w./])")

# What may differ between a run and its resumption: it leaves the weights as they are. The data folder may
# have moved; its contents are compared by hash.
FREE_KEYS = ("name", "data.dir", "eval", "log", "checkpoint", "optim.zero_stage")


def load_config(values: Mapping[str, Any]) -> RunConfig:
    """Validate plain values.

    Raises:
        InfMoEError: an unknown setting or a value that does not fit; names the setting.
    """
    try:
        return RunConfig.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise _unknown_setting(path) from None
        if first["type"] == "value_error":
            raise InfMoEError(str(first["ctx"]["error"])) from None
        got = "" if first["type"] == "missing" else f", got {first['input']!r}"
        if first["type"] == "tuple_type":
            raise InfMoEError(f"setting {path!r} takes a list in brackets, {path}=[...]{got}") from None
        raise InfMoEError(f"setting {path!r}: {first['msg'][:1].lower()}{first['msg'][1:]}{got}") from None


def apply_overrides(config: RunConfig, overrides: Iterable[str]) -> RunConfig:
    """The configuration with `a.b=value` settings applied; values are read as JSON, else taken as text.

    Fractions are numbers, alone and in lists: `elastic.keep_ratio=[1/4,1/16]`.

    Raises:
        InfMoEError: no `=`, an unknown key (names the nearest), or a value that does not fit.
    """
    values = config.to_dict()
    model_changed = False
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise InfMoEError(f"cannot read {override!r}: write it as key=value, e.g. optim.lr=1e-3")
        *parents, leaf = key.strip().split(".")
        section = values
        for parent in parents:
            if not isinstance(section.get(parent), dict):
                raise _unknown_setting(key)
            section = section[parent]
        if isinstance(section.get(leaf), dict):
            raise InfMoEError(f"{key!r} is a section: set one of its keys, e.g. {key}.{min(section[leaf])}=...")
        section[leaf] = _parse_value(text.strip(), fractions=key.strip() not in _FREE_TEXT)
        model_changed = model_changed or parents == ["model"]
    changed = load_config(values)
    if model_changed:
        hf_config(changed)
    return changed


def hf_config(config: RunConfig) -> Any:
    """The model's `InfMoEConfig`, which checks the fields under `model` (imports transformers)."""
    from infmoe.hf import InfMoEConfig

    return InfMoEConfig(**config.model)


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Dotted keys that decide the weights and differ between two dumped configurations.

    A setting that one of them was written without, because there was none then, has its default.
    """
    flat_old, flat_new = ({**_defaults(), **_flatten(values)} for values in (old, new))
    return sorted(
        key
        for key in flat_old.keys() | flat_new.keys()
        if flat_old.get(key) != flat_new.get(key)
        and not any(key == free or key.startswith(free + ".") for free in FREE_KEYS)
    )


def _defaults(model: type[BaseModel] = RunConfig, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> default, in JSON's values, of the settings that have one."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        section = _section(field.annotation)
        if section is not None:
            found |= _defaults(section, f"{prefix}{name}.")
        elif not field.is_required():
            found[prefix + name] = to_jsonable_python(field.default)
    return found


def _section(annotation: Any) -> type[BaseModel] | None:
    """The model of a field that is a section of its own."""
    plain_class = isinstance(annotation, type) and typing.get_origin(annotation) is None
    return annotation if plain_class and issubclass(annotation, BaseModel) else None


def _parse_value(text: str, *, fractions: bool) -> Any:
    words = {"true": True, "false": False, "null": None, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    with contextlib.suppress(json.JSONDecodeError):
        return json.loads(text)
    if fractions:
        with contextlib.suppress(ValueError, ArithmeticError):  # no JSON, 1/0
            return json.loads(_FRACTION.sub(lambda found: str(int(found[1]) / int(found[2])), text))
    return text


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _setting_names(model: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    names: list[str] = []
    for name, field in model.model_fields.items():
        section = _section(field.annotation)
        if section is not None:
            names += _setting_names(section, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def _unknown_setting(path: str) -> InfMoEError:
    """Suggest by the last word too: `lr` is meant to find `optim.lr`."""
    names = _setting_names()
    leaf = path.rpartition(".")[2]
    same_leaf = [name for name in names if name.rpartition(".")[2] == leaf]
    if same_leaf and not difflib.get_close_matches(path, names, n=1, cutoff=0.8):
        return InfMoEError(f"unknown setting {path!r}; did you mean {same_leaf[0]!r}?")
    return unknown_name("setting", path, names)
