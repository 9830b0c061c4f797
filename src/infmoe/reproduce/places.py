"""Where each measure is taken: points of the dials, and what else tells its rows apart.

What measures and what checks a file's rows both ask here.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from infmoe.eval.dials import grid
from infmoe.eval.zero_shot.tasks import columns_named
from infmoe.layers.point import Point
from infmoe.layers.routing import Mode
from infmoe.reproduce.plan import ELASTIC_EXPERTS, RunSpec

SAMPLES = (1, 2, 3, 4, 8, 16)
KEEP_RATIOS = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 1.0)
EXPERT_COUNTS = tuple(range(1, 17))
_FEWER_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16)  # of arms whose useful ranges are not compared
RANK_DAMPINGS = (0.25, 0.5)
GATE_NORMS = ("selected", "all", "trained")
MASK_SCALES = ("fixed", "rms")
CUT_SHARES = (1 / 16, 1 / 8, 1 / 4)
MEAN_SAMPLES = 2  # where sure tokens take one sample and the others so many:
UNSURE_SAMPLES = (4, 8)
UNSURE_RATIOS = (1 / 16, 1 / 4)
GRID_SAMPLES = (1, 2, 4, 8, 16)
GRID_RATIOS = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 2)  # 1/4 is among the dials, or the own samples
SPREAD: tuple[Mode, ...] = ("antithetic", "qmc")
TASK_SAMPLES = (1, 2, 3, 4, 8)
TASK_KEEP_RATIOS = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
SAMPLE_ARMS = ("infinity", "infinity-elastic-k", "infinity-consistency")  # that the page shows over K

Place = dict[str, Any]
# what tells a measure's rows apart
_NAMES = (
    *("task", "rule", "share", "gate_norm", "mask_scale", "rank_damping"),
    *("mode", "num_samples", "keep_ratio", "num_experts_per_tok"),
)


@dataclass(frozen=True)
class Places:
    """The rows that a measure has.

    Attributes:
        required: what must be there.
        groups: what may be: the places of each group all, or none.
    """

    required: list[Place]
    groups: tuple[list[Place], ...] = ()


Where = Callable[[Any, RunSpec], Places]


def place_of(row: dict[str, Any]) -> Place:
    """What tells a row from the others of its measure."""
    return {name: row[name] for name in _NAMES if row.get(name) is not None}


def held_out(config: Any, spec: RunSpec) -> list[Point]:
    """The run's own dials."""
    return grid(config)


def dials(config: Any, spec: RunSpec) -> list[Point]:
    """Each dial, the other as trained; K and z = mu of the arms that the page shows over K."""
    if config.ffn == "moe":
        return grid(config, num_experts_per_tok=expert_counts(spec, config.num_experts))
    points = grid(config, keep_ratios=KEEP_RATIOS)
    if config.draws() and spec.arm.name in SAMPLE_ARMS:
        points += grid(config, num_samples=SAMPLES) + grid(config, mode="mu")
    return list(dict.fromkeys(points))


def expert_counts(spec: RunSpec, num_experts: int) -> list[int]:
    """The numbers of experts that a discrete MoE is measured at."""
    counts = EXPERT_COUNTS if spec.arm.name in ELASTIC_EXPERTS else _FEWER_COUNTS
    return [k for k in counts if k <= num_experts]


def dial_grid(config: Any, spec: RunSpec) -> list[Point]:
    """Both dials of ∞-MoE at once, and z = mu."""
    sampled = grid(config, num_samples=GRID_SAMPLES, keep_ratios=GRID_RATIOS)
    return sampled + grid(config, keep_ratios=GRID_RATIOS, mode="mu")


def own_samples(config: Any, spec: RunSpec) -> list[Point]:
    """K and z = mu at the run's own keep ratio."""
    return grid(config, num_samples=GRID_SAMPLES) + grid(config, mode="mu")


def gate_norms(config: Any, spec: RunSpec) -> list[Point]:
    """Numbers of experts, for each of `GATE_NORMS`."""
    return _experts(config, [k for k in SAMPLES if k <= (config.num_experts or 0)])


def mask_scales(config: Any, spec: RunSpec) -> list[Point]:
    """Keep ratios, for each of `MASK_SCALES`."""
    return grid(config, keep_ratios=KEEP_RATIOS)


def rank_dampings(config: Any, spec: RunSpec) -> list[Point]:
    """Numbers of experts beyond the trained one, for each of `RANK_DAMPINGS`."""
    own, most = config.num_experts_per_tok or 0, config.num_experts or 0
    return _experts(config, [k for k in EXPERT_COUNTS if own < k <= most])


def _experts(config: Any, counts: Sequence[int]) -> list[Point]:
    """No points where there are no counts: a dial left out would stay at the model's own."""
    return grid(config, num_experts_per_tok=counts) if counts else []


def modes(config: Any, spec: RunSpec) -> list[Point]:
    """Several samples, in each mode of `SPREAD`."""
    several = [k for k in SAMPLES if k > 1]
    return [point for mode in SPREAD for point in grid(config, num_samples=several, mode=mode)]


def sample_settings() -> list[Place]:
    """Where `adaptive_samples` is taken: "fixed" numbers for all tokens, and more where the router is "unsure"."""
    plans = [("fixed", k) for k in (1, MEAN_SAMPLES, *UNSURE_SAMPLES)] + [("unsure", k) for k in UNSURE_SAMPLES]
    return [{"rule": rule, "keep_ratio": ratio, "num_samples": k} for ratio in UNSURE_RATIOS for rule, k in plans]


def zero_shot(config: Any, spec: RunSpec) -> list[Point]:
    """The run's own dials; of the models that Figure 2 shows, each dial too, the other as trained."""
    points = grid(config)
    if spec.tokens == spec.scale.tokens and spec.arm.name == "moe":
        points += grid(config, num_experts_per_tok=range(1, config.num_experts + 1))
    elif spec.tokens == spec.scale.tokens and spec.arm.name == "infinity":
        points += grid(config, num_samples=TASK_SAMPLES) + grid(config, mode="mu")
        points += grid(config, keep_ratios=TASK_KEEP_RATIOS)
    return list(dict.fromkeys(points))


def _at(points: Sequence[Point], **more: Any) -> list[Place]:
    return [place_of(asdict(point) | more) for point in points]


def every(points: Callable[[Any, RunSpec], list[Point]]) -> Where:
    """All of these points."""
    return lambda config, spec: Places(_at(points(config, spec)))


def under(option: str, values: Sequence[Any], points: Callable[[Any, RunSpec], list[Point]]) -> Where:
    """All of these points, for each value of an option."""
    return lambda config, spec: Places(
        [place for value in values for place in _at(points(config, spec), **{option: value})]
    )


def dial_places(config: Any, spec: RunSpec) -> Places:
    """The dials; a discrete MoE may have been measured at other numbers of experts too."""
    required = _at(dials(config, spec))
    if config.ffn != "moe":
        return Places(required)
    others = _at(grid(config, num_experts_per_tok=range(1, config.num_experts + 1)))
    return Places(required, tuple([place] for place in others if place not in required))


def need_places(config: Any, spec: RunSpec) -> Places:
    """A share for all tokens, and where there are cuts that keep it: one for each layer, and one for all of them."""
    groups = [
        [{"rule": rule, "share": share} for rule in rules]
        for share in CUT_SHARES
        for rules in (("cut",), ("one cut", "layers"))
    ]
    return Places([{"rule": "ratio", "share": share} for share in CUT_SHARES], tuple(groups))


def sample_places(config: Any, spec: RunSpec) -> Places:
    """Fixed numbers of samples; and what bounds give that have the wanted mean, where there are any."""
    found = sample_settings()
    unsure = tuple([place] for place in found if place["rule"] == "unsure")
    return Places([place for place in found if place["rule"] == "fixed"], unsure)


def task_places(config: Any, spec: RunSpec) -> Places:
    """Every task that has a local file, at every point."""
    columns, points = columns_named("paper", local=True), zero_shot(config, spec)
    return Places([place for column in columns for place in _at(points, task=column.name)])
