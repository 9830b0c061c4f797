"""What is measured of a trained model: each measure is a function to points, and a run's file holds those that apply.

A measure that is added later is taken of the models that are still there, without training anything anew.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infmoe.data import TokenData
from infmoe.errors import InfMoEError
from infmoe.eval.adaptive import calibrate_cut, calibrate_mass, calibrate_sigma_to_mu, routers_sigma_to_mu
from infmoe.eval.heldout import HeldOut, evaluate_loss
from infmoe.eval.loading import Opened
from infmoe.eval.sweep import evaluate_points
from infmoe.hf import model_cost
from infmoe.layers import PerLayer, Routing
from infmoe.layers.point import Point
from infmoe.reproduce import places
from infmoe.reproduce.plan import SANDWICH, TUNING_SEED, RunSpec, Scale

Points = list[dict[str, Any]]
_CUT_WINDOWS = 64  # of training text
# A mass is a share, so little text finds it; and sorting every token's scores takes long.
_MASS_WINDOWS, _NEED_WINDOWS = 16, 256  # to find, and to judge at most
ZERO_SHOT = "zero_shot"
# the arms that the page shows a measure of
ADAPTIVE_ARMS = ("infinity", "infinity-keep4", "infinity-keep8", "infinity-keep16", "infinity-elastic", SANDWICH)
# by mass, and by the router's sureness
BY_NEED_ARMS = (
    *("infinity", "infinity-keep8", "infinity-keep16", "infinity-elastic"),
    *("infinity-elastic-k", "infinity-lr2x"),
)
DAMPED_ARMS = ("moe16-fine-k4-scaled", "moe16-fine-k8-scaled")
GATE_NORM_ARMS = (
    *("moe", "moe16", "moe16-fine-k4-scaled", "emoe-k4-w0.0001-scaled", "matryoshka-k4-scaled"),
    *("moe16-fine-k8-scaled", "emoe-k8-w0.0001-scaled", "matryoshka-k8-scaled"),
)
GRID_ARMS = (*places.SAMPLE_ARMS, "infinity-lr2x", "infinity-keep4", "infinity-keep8", "infinity-keep16", SANDWICH)
OWN_SAMPLES_ARMS = ("infinity-keep4", SANDWICH)  # trained at a ratio that `GRID_RATIOS` leaves to the dials
_SCORING = 2  # which zero-shot items are chosen, and what their figures mean; raised whenever that changes
_BATCH_TOKENS = 8192  # of a forward pass: the logits are its largest tensor


@dataclass(frozen=True)
class Context:
    """What a measure works with.

    Attributes:
        opened: the model, in eval mode, and where its tokenizer lies.
        data: what it was trained on, and its held-out part.
        spec: the run.
        tasks: the folder of the zero-shot tasks' files, or None.
    """

    opened: Opened
    data: TokenData
    spec: RunSpec
    tasks: Path | None = None

    @property
    def model(self) -> Any:
        """The model itself."""
        return self.opened.model

    def points(self, of: Callable[[Any, RunSpec], list[Point]]) -> list[Point]:
        """The points of one measure, of this model."""
        return of(self.model.config, self.spec)

    def evaluate(self, points: list[Point], windows: int) -> Points:
        """Loss, routing and costs of every point (see `evaluate_points`), on windows of whole held-out documents."""
        length = self.model.config.max_position_embeddings
        held_out = HeldOut.from_data(self.data, length, windows)
        return [
            {key: value for key, value in row.items() if value is not None}
            for row in evaluate_points(self.model, held_out, points, batch_size=max(1, _BATCH_TOKENS // length))
        ]


def held_out(context: Context) -> Points:
    """The loss at the run's own dials."""
    return context.evaluate(context.points(places.held_out), context.spec.scale.windows)


def dials(context: Context) -> Points:
    """The loss over each dial, the other as trained; K and z = mu of the arms that the page shows over K."""
    return context.evaluate(context.points(places.dials), _windows(context))


def dial_grid(context: Context) -> Points:
    """Both dials of ∞-MoE at once, and z = mu: what K buys where two samples share less than at the trained ratio."""
    return context.evaluate(context.points(places.dial_grid), _windows(context))


def own_samples(context: Context) -> Points:
    """K and z = mu at the trained keep ratio, of arms whose dials are measured with one sample."""
    return context.evaluate(context.points(places.own_samples), _windows(context))


def gate_norms(context: Context) -> Points:
    """A discrete MoE over k with each rule for what its gates sum to."""
    return _under(context, "gate_norm", places.GATE_NORMS, context.points(places.gate_norms))


def mask_scales(context: Context) -> Points:
    """∞-MoE away from its trained keep ratio, with each rule for the size of the mask."""
    return _under(context, "mask_scale", places.MASK_SCALES, context.points(places.mask_scales))


def rank_dampings(context: Context) -> Points:
    """A discrete MoE beyond its k, the further experts damped before the gates are normalised (the α dial)."""
    return _under(context, "rank_damping", places.RANK_DAMPINGS, context.points(places.rank_dampings))


def modes(context: Context) -> Points:
    """∞-MoE over K with samples that are spread better than independent ones."""
    return context.evaluate(context.points(places.modes), _windows(context))


def adaptive(context: Context) -> Points:
    """∞-MoE with one sample, at a mean share of units that each token, or each layer, may deviate from.

    "ratio": every token and layer keeps that share. "cut": each layer keeps what scores above a cut of its own, so
    tokens differ. "one cut": one cut for all layers, so that layers differ too. "layers": every token keeps what
    "one cut" keeps of that layer on average. Cuts are found on training text.
    """
    return _by_need(context, "score_cut", calibrate_cut, _CUT_WINDOWS, _windows(context))


def adaptive_mass(context: Context) -> Points:
    """The same by mass: a "cut" keeps the fewest units that hold a share of the positive scores' sum."""
    return _by_need(context, "score_mass", calibrate_mass, _MASS_WINDOWS, min(_NEED_WINDOWS, _windows(context)))


def _by_need(context: Context, dial: str, calibrate: Callable[..., Any], to_find: int, to_judge: int) -> Points:
    model, length = context.model, context.model.config.max_position_embeddings
    batch_size = max(1, _BATCH_TOKENS // length)
    one: dict[str, Any] = {"num_samples": 1} if model.config.draws() else {}
    found_on = HeldOut.from_data(context.data, length, to_find, "train")
    judged_on = HeldOut.from_data(context.data, length, to_judge)
    rows: Points = []
    for share in places.CUT_SHARES:
        routings = {"ratio": Routing(keep_ratio=share, **one)}
        for rule, per_layer in (("cut", True), ("one cut", False)):
            with contextlib.suppress(InfMoEError):  # no cut keeps that share: the table has a gap there
                cut = calibrate(model, found_on, share, per_layer=per_layer, batch_size=batch_size, **one)
                routings[rule] = Routing(**{dial: cut}, **one)
        if "one cut" in routings:
            shares = evaluate_loss(model, found_on, routings["one cut"], batch_size=batch_size).union_ratios()
            routings["layers"] = Routing(keep_ratio=PerLayer(shares), **one)
        for rule, routing in routings.items():
            result = evaluate_loss(model, judged_on, routing, batch_size=batch_size)
            unions = result.union_ratios()
            cost = model_cost(model.config, routing, unions)
            rows.append(
                {"rule": rule, "share": share, "loss": result.loss, "flops_ideal": cost.flops_ideal}
                | {"layer_shares": [round(union, 4) for union in unions]}
            )
    return rows


def adaptive_samples(context: Context) -> Points:
    """∞-MoE with several samples where the router is unsure and one elsewhere, beside the same number for all.

    "fixed": every token takes `num_samples`. "unsure": those whose rms(sigma) / rms(mu) is among the largest of their
    layer, so many that the mean is `MEAN_SAMPLES`; the bounds are found on training text.
    """
    model, length = context.model, context.model.config.max_position_embeddings
    batch_size = max(1, _BATCH_TOKENS // length)
    found_on = HeldOut.from_data(context.data, length, _CUT_WINDOWS, "train")
    judged_on = HeldOut.from_data(context.data, length, min(_NEED_WINDOWS, _windows(context)))
    rows: Points = []
    for place in places.sample_settings():
        at = {name: place[name] for name in ("keep_ratio", "num_samples")}
        routing = Routing(**at)
        if place["rule"] == "unsure":
            try:
                bound = calibrate_sigma_to_mu(model, found_on, places.MEAN_SAMPLES, batch_size=batch_size, **at)
            except InfMoEError:  # no bound gives that mean: the table has a gap there
                continue
            routing = Routing(min_sigma_to_mu=bound, **at)
        result = evaluate_loss(model, judged_on, routing, batch_size=batch_size)
        unions = result.union_ratios()
        rows.append(
            place
            | {"loss": result.loss, "mean_samples": _mean_samples(model, judged_on, routing, batch_size)}
            | {"union_ratio": sum(unions) / len(unions)}
        )
    return rows


def _mean_samples(model: Any, held_out: HeldOut, routing: Routing, batch_size: int) -> float:
    """Samples that a token takes, on average over tokens and layers."""
    assert isinstance(routing.num_samples, int)
    if not isinstance(routing.min_sigma_to_mu, PerLayer):
        return float(routing.num_samples)
    found = routers_sigma_to_mu(model, held_out, routing, batch_size=batch_size)
    bounds = routing.min_sigma_to_mu.values
    several = [float((seen_N >= bound).float().mean()) for seen_N, bound in zip(found, bounds, strict=True)]
    return 1.0 + (routing.num_samples - 1) * sum(several) / len(several)


def _windows(context: Context) -> int:
    return context.spec.scale.dial_windows


def _under(context: Context, option: str, values: Sequence[Any], points: list[Point]) -> Points:
    rows: Points = []
    for value in values:
        with _option(context.model, option, value):
            found = context.evaluate(points, context.spec.scale.dial_windows)
        rows += [{option: value, **row} for row in found]
    return rows


@contextlib.contextmanager
def _option(model: Any, option: str, value: Any) -> Iterator[None]:
    """The model with an option of its layers changed."""
    layers = [block.mlp for block in model.transformer.h]
    before = [getattr(layer, option) for layer in layers]
    for layer in layers:
        setattr(layer, option, value)
    try:
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            setattr(layer, option, old)


def zero_shot(context: Context) -> Points:
    """The zero-shot tasks that have local files: one row a task and point, at seed 0 of the noise.

    Every model is scored at its own dials; those that Figure 2 shows, over each dial too, the other as trained.
    """
    from infmoe.eval.zero_shot.files import score_files

    assert context.tasks is not None
    points, limit = context.points(places.zero_shot), context.spec.scale.task_items
    rows = score_files(context.opened, context.tasks, points, limit=limit)
    return [{key: value for key, value in row.items() if value is not None} for row in rows]


@dataclass(frozen=True)
class Measure:
    """A measure, and the models that it is taken of.

    Attributes:
        take: measures.
        applies: whether it is taken of a model of this configuration, trained as this run.
        keys: figures that every row must have, all finite.
        labels: what every row must have beside them.
        where: which rows there must be, by the model's configuration and the run; None: nobody knows.
    """

    take: Callable[[Context], Points]
    applies: Callable[[Any, RunSpec], bool]
    keys: tuple[str, ...] = ("loss",)
    labels: tuple[str, ...] = ()
    where: places.Where | None = None


def _has_dials(config: Any, spec: RunSpec) -> bool:
    return config.ffn == "infinity" or (config.ffn == "moe" and config.expert_router == "learned")


def _keeps_its_tokens(config: Any, spec: RunSpec) -> bool:
    """A Switch layer with a capacity drops tokens by what stands beside them in the batch."""
    return config.ffn != "switch" or config.capacity_factor is None


def _of(*arms: str) -> Callable[[Any, RunSpec], bool]:
    """These arms alone, at the length of the comparisons: a point over a dial takes as long as a part of training."""
    return lambda config, spec: spec.arm.name in arms and spec.tokens == spec.scale.tokens


# the others are floats
COUNTS = frozenset(("flops_ideal", "flops_executed", "weights_ideal", "num_samples", "num_experts_per_tok"))
_ROUTED = ("loss", "flops_ideal", "flops_executed", "union_ratio", "overlap_ratio", "sigma_to_mu")
MEASURES: dict[str, Measure] = {
    "held_out": Measure(held_out, lambda config, spec: True, where=places.every(places.held_out)),
    "dials": Measure(dials, _has_dials, _ROUTED, where=places.dial_places),
    "dial_grid": Measure(dial_grid, _of(*GRID_ARMS), (*_ROUTED, "keep_ratio"), where=places.every(places.dial_grid)),
    "own_samples": Measure(
        own_samples, _of(*OWN_SAMPLES_ARMS), (*_ROUTED, "keep_ratio"), where=places.every(places.own_samples)
    ),
    "gate_norms": Measure(
        gate_norms,
        _of(*GATE_NORM_ARMS),
        ("loss", "num_experts_per_tok"),
        ("gate_norm",),
        places.under("gate_norm", places.GATE_NORMS, places.gate_norms),
    ),
    "rank_dampings": Measure(
        rank_dampings,
        _of(*DAMPED_ARMS),
        ("loss", "num_experts_per_tok", "rank_damping"),
        where=places.under("rank_damping", places.RANK_DAMPINGS, places.rank_dampings),
    ),
    "modes": Measure(modes, _of("infinity"), ("loss", "num_samples"), ("mode",), places.every(places.modes)),
    "adaptive": Measure(adaptive, _of(*ADAPTIVE_ARMS), ("loss", "share"), ("rule", "layer_shares"), places.need_places),
    "adaptive_mass": Measure(
        adaptive_mass, _of(*BY_NEED_ARMS), ("loss", "share"), ("rule", "layer_shares"), places.need_places
    ),
    "adaptive_samples": Measure(
        adaptive_samples,
        _of(*BY_NEED_ARMS),
        ("loss", "num_samples", "keep_ratio", "mean_samples"),
        ("rule",),
        places.sample_places,
    ),
    "mask_scales": Measure(
        mask_scales,
        _of("infinity"),
        ("loss", "keep_ratio"),
        ("mask_scale",),
        places.under("mask_scale", places.MASK_SCALES, places.mask_scales),
    ),
    ZERO_SHOT: Measure(
        zero_shot,
        _keeps_its_tokens,
        ("acc", "acc_se", "margin", "margin_low", "margin_high"),
        ("task",),
        places.task_places,
    ),
}


def settings(scale: Scale) -> dict[str, Any]:
    """What a run's measures depend on beside the run: files made with others are not mixed in.

    Measures that came later have settings of their own beside these: `own_settings`.
    """
    return {
        "windows": scale.windows,
        "dial_windows": scale.dial_windows,
        "samples": list(places.SAMPLES),
        "keep_ratios": list(places.KEEP_RATIOS),
    }


def own_settings(name: str, scale: Scale, files: Mapping[str, str]) -> dict[str, Any] | None:
    """What one measure depends on beside `settings`, or None.

    Args:
        name: the measure's.
        scale: how large.
        files: the zero-shot tasks' files: name -> SHA-256.
    """
    if name == ZERO_SHOT:
        return task_settings(scale, files)
    own: dict[str, dict[str, Any]] = {
        "dial_grid": {"samples": list(places.GRID_SAMPLES), "keep_ratios": list(places.GRID_RATIOS)},
        "own_samples": {"samples": list(places.GRID_SAMPLES)},
        "rank_dampings": {"values": list(places.RANK_DAMPINGS), "experts": list(places.EXPERT_COUNTS)},
        "modes": {"modes": list(places.SPREAD)},
        "adaptive": {"shares": list(places.CUT_SHARES), "cut_windows": _CUT_WINDOWS},
        "adaptive_mass": {"shares": list(places.CUT_SHARES), "to_find": _MASS_WINDOWS, "to_judge": _NEED_WINDOWS},
        "adaptive_samples": {
            "mean_samples": places.MEAN_SAMPLES,
            "samples": list(places.UNSURE_SAMPLES),
            "keep_ratios": list(places.UNSURE_RATIOS),
            "to_find": _CUT_WINDOWS,
            "to_judge": _NEED_WINDOWS,
        },
    }
    return own.get(name)


def task_settings(scale: Scale, files: Mapping[str, str]) -> dict[str, Any]:
    """What zero-shot scores depend on beside the run.

    Args:
        scale: how large.
        files: the tasks' files: name -> SHA-256.
    """
    return {
        "items": scale.task_items,
        "scoring": _SCORING,
        "samples": list(places.TASK_SAMPLES),
        "keep_ratios": list(places.TASK_KEEP_RATIOS),
        "files": dict(files),
    }


def wanted(spec: RunSpec, config: Any, *, tasks: bool) -> list[str]:
    """The measures of a run; tuning needs the loss alone.

    Args:
        spec: the run.
        config: its model's.
        tasks: whether there are files of zero-shot tasks.
    """
    names = [
        name for name, measure in MEASURES.items() if measure.applies(config, spec) and (tasks or name != ZERO_SHOT)
    ]
    return names if spec.seed != TUNING_SEED else names[:1]
