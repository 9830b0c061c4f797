"""What there is to train: scales, and the runs that each table and figure needs."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from infmoe.errors import unknown_name
from infmoe.recipes import recipe
from infmoe.reproduce.arms import LATE_EXPERTS, RATE_FACTORS, STARTED, Arm, at_other_rates
from infmoe.train.config import RunConfig, apply_overrides

TUNING_SEED = 0  # learning rates are chosen on it, so it is not reported


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    Attributes:
        name: of the scale and of its recipes.
        tokens: of a standard run.
        long_tokens: of the runs behind Table 5.
        data_sizes: tokens of Figure 3's runs.
        entropy_tokens: of Table 3's run.
        z_dims: Table 2's, in the paper's order.
        lr_grid: learning rates that are tried; empty: the recipe's.
        tune_tokens: of a tuning run.
        warmup_ratio: share of the steps; None: the recipe's steps.
        seeds: of a comparison, at least and at most; more are added until the intervals are narrow.
        side_seeds: of the runs that only one table needs.
        half_width: of the paired interval, in nats, at which seeds are enough.
        windows: held-out windows of the final loss.
        dial_windows: of every point of the dials.
        task_items: so many items of each zero-shot task, chosen by a hash; None: all.
        settings: over the recipe's, as on the command line.
        vocab: of the tokenizer that a corpus is given; None: data must be prepared.
    """

    name: str
    tokens: int
    long_tokens: int
    data_sizes: tuple[int, ...]
    entropy_tokens: int
    z_dims: tuple[int, ...]
    lr_grid: tuple[float, ...] = ()
    tune_tokens: int = 0
    warmup_ratio: float | None = None
    seeds: tuple[int, int] = (1, 1)
    side_seeds: int = 1
    half_width: float = 0.01
    windows: int = 4096
    dial_windows: int = 1024
    task_items: int | None = None
    settings: tuple[str, ...] = ()
    vocab: int | None = None


_B = 10**9
_PAPER_SETTINGS = ("eval.every=1000", "checkpoint.every=1000")
SCALES = {
    "tiny": Scale(
        "tiny",
        tokens=5_000_000,
        long_tokens=16_000_000,
        data_sizes=(2_000_000, 4_000_000, 8_000_000, 16_000_000),
        entropy_tokens=16_000_000,
        z_dims=(8, 16, 32, 64),
        lr_grid=(1e-3, 2e-3, 4e-3, 8e-3),
        tune_tokens=2_000_000,
        warmup_ratio=0.03,  # the paper's; its 700 steps are for its length
        seeds=(3, 8),
        side_seeds=3,
        windows=1024,
        dial_windows=512,
        task_items=500,
        settings=(
            "model.vocab_size=1024",
            "model.attn_implementation=eager",  # on a CPU the fused attention's backward pass is slow in bfloat16
            "checkpoint.every=200",
            "checkpoint.keep_last=1",
            "log.every=20",
        ),
        vocab=1024,
    ),
    **{
        name: Scale(
            name,
            tokens=10 * _B,
            long_tokens=100 * _B,
            data_sizes=tuple(n * 10 * _B for n in range(1, 11)),
            entropy_tokens=20_000 * 2**19,
            z_dims=(32, 64, 128, 256),
            settings=_PAPER_SETTINGS,
        )
        for name in ("small", "medium")
    },
}


def scale_named(name: str) -> Scale:
    """The scale of this name.

    Raises:
        InfMoEError: there is none; names those that there are.
    """
    if name not in SCALES:
        raise unknown_name("scale", name, SCALES)
    return SCALES[name]


@dataclass(frozen=True)
class RunSpec:
    """One training run."""

    scale: Scale
    arm: Arm
    tokens: int
    lr: float
    seed: int

    @property
    def slug(self) -> str:
        """Its file's name, without the suffix."""
        return f"{self.arm.name}-{tokens_text(self.tokens)}-lr{self.lr:g}-s{self.seed}"

    @property
    def recipe(self) -> str:
        """What `infmoe train` is given."""
        return f"{self.scale.name}/{self.arm.variant}"

    def overrides(self) -> list[str]:
        """Settings over the recipe, as `infmoe train --set` takes them."""
        base = apply_overrides(recipe(self.recipe), self.scale.settings)
        steps = -(-self.tokens // base.batch_tokens)
        settings = [f"seed={self.seed}", f"steps={steps}", f"optim.lr={self.lr!r}"]
        if self.scale.warmup_ratio is not None:
            settings.append(f"schedule.warmup_steps={round(self.scale.warmup_ratio * steps)}")
        return [
            *settings,
            *self.scale.settings,
            *(f"model.{k}={v}" for k, v in self.arm.model.items()),
            *self.arm.settings,
        ]

    def words(self) -> list[str]:
        """The overrides on a command line."""
        return [word for setting in self.overrides() for word in ("--set", setting)]

    def config(self) -> RunConfig:
        """The whole run, but for its data."""
        return apply_overrides(recipe(self.recipe), self.overrides())


def tokens_text(tokens: int) -> str:
    """5M, 10B."""
    return f"{tokens / 1e9:g}B" if tokens >= 1e9 else f"{tokens / 1e6:g}M"


@dataclass(frozen=True)
class Group:
    """Arms that are compared, at one length.

    Attributes:
        arms: names.
        tokens: of every run.
        seeds: at least and at most; more than the least are run until `half_width` is met.
        only: the arms that are trained; None: all. How many seeds it takes, all say.
    """

    arms: tuple[str, ...]
    tokens: int
    seeds: tuple[int, int]
    only: tuple[str, ...] | None = None

    @property
    def trained(self) -> tuple[str, ...]:
        """The arms that are trained."""
        return self.arms if self.only is None else self.only


TIER1 = ("infinity", "moe", "dense-swiglu", "infinity-glu", "dense-wide")
# At the longer runs' length ∞-MoE at the rate of those of tier 1 whose grids end there
LONG_RATES = ("infinity-lr2x",)
# What the tiny geometry and the defaults of a baseline may cost it
STARTS = (*(f"{name}-start" for name in STARTED), "moe-balance0.001")
START_RATES = tuple(arm for name in STARTED for arm in at_other_rates(f"{name}-start"))
OTHER_RATES = tuple(arm for name in RATE_FACTORS for arm in at_other_rates(name))
# Tier 2, the more informative half first
_TIER2_FIRST = (
    *("infinity-sigma0", "infinity-no-topn", "infinity-frozen-wz", "infinity-keep8", "infinity-keep16"),
    *("moe-scaled", "dense", "switch", "moe16", "moe-plus", "dense-swiglu-plus", "dense-swiglu-active"),
)
_TIER2_THEN = (
    *("moe16-fine", "moe-swiglu", "infinity-swiglu", "moe-hash"),
    *("infinity-blocks16", "infinity-blocks32", "infinity-blocks64"),
)
# W_z's weight decay and learning rate
_WZ = ("infinity-wz-decay0", "infinity-wz-lr-half", "infinity-wz-lr-double")
TIER2 = (*_TIER2_FIRST, *_TIER2_THEN, *_WZ)
# What ∞-MoE is compared with at equal budgets beside these: itself with one sample, and mixtures of narrow experts
FURTHER_RIVALS = ("infinity-keep4", *(f"moe16-fine-k{k}-scaled" for k in (4, 8, 16)))


# Elastic compute: over the keep ratio, over the number of experts, over K, and what is left
# 1/4 teaches 1/16 in the last fifth of the steps, and weighs four times as much: what models are made elastic by
SANDWICH = "infinity-sandwich-quarter-w0.25-from0.8"
ELASTIC_KEEP = (
    *("infinity-keep4", "infinity-keep8", "infinity-keep16", "infinity-elastic", "infinity-sandwich-distill"),
    SANDWICH,
)
ELASTIC_LATE = (
    *("infinity-sandwich-distill-from0.5", "infinity-sandwich-distill-from0.8"),
    "infinity-sandwich-quarter-from0.8",
)
ELASTIC_RULES = (
    *("moe16-fine-k4-scaled", "emoe-k4-w0.0001-scaled", "matryoshka-k4-scaled"),
    *("moe16-fine-k8-scaled", "emoe-k8-w0.0001-scaled", "matryoshka-k8-scaled", "moe16-fine-k16-scaled"),
)
# What in them costs loss: the draws alone, rarer ones, and later ones
ELASTIC_DRAWS = (
    *("emoe-k4-w0-scaled", "emoe-k4-w0.0001-p0.1-scaled"),
    *(f"{name}-from0.5" for name in LATE_EXPERTS),
)
ELASTIC_EXPERTS = (*ELASTIC_RULES, *ELASTIC_DRAWS)
# Tuned from a trained model, after each control what is held against it
TUNED_KEEP = ("infinity-keep4-tuned", "infinity-sandwich-w0.25-tuned")
TUNED_EXPERTS = ("moe16-fine-k4-scaled-tuned", *(f"{name}-tuned" for name in LATE_EXPERTS))
ELASTIC_TUNED = (*TUNED_KEEP, *TUNED_EXPERTS)
# The same with gates that sum to 1: one seed, that showed how much of a difference the size of the output makes. It
# and the other rates are for the scale whose grid they answer.
ELASTIC_UNSCALED = (
    *("moe16-fine-k4", "emoe-k4", "emoe-k4-w0.001", "emoe-k4-w0.0001", "emoe-k4-w0", "matryoshka-k4"),
    *("moe16-fine", "emoe-k8", "emoe-k8-w0.0001", "matryoshka-k8", "moe16-fine-k16"),
)
ELASTIC_K = ("infinity-elastic-k",)
ELASTIC_MORE = ("infinity-elastic-step", "infinity-elastic-scaled", "infinity-sandwich", "infinity-consistency")
# Passes over each token, on average: with that many times fewer tokens they take the FLOPs of the others.
PASSES: dict[str, float] = {
    "infinity-sandwich-distill": 2,
    "infinity-sandwich-between": 3,
    "infinity-sandwich-distill-from0.5": 1.5,
    "infinity-sandwich-distill-from0.8": 1.2,
    "infinity-sandwich-quarter-from0.8": 1.2,
    SANDWICH: 1.2,
    "infinity-sandwich": 2,
    "infinity-consistency": 2,
}
# Of these there are runs at that many times fewer tokens.
SHORTER = (
    *(SANDWICH, "infinity-sandwich-distill", "infinity-sandwich-between"),
    *("infinity-sandwich", "infinity-consistency"),
)


def shorter(arm: str, tokens: int) -> int:
    """Tokens at which a rule of several passes takes the training FLOPs of one pass over `tokens`."""
    return int(tokens / PASSES[arm])


def further_tokens(scale: Scale) -> int:
    """Tokens of a run that starts from a trained model: a fifth of what that one had."""
    return scale.tokens // 5


def _elastic(scale: Scale) -> list[Group]:
    side = _side(scale)
    return [
        Group(ELASTIC_KEEP, scale.tokens, side),
        Group(ELASTIC_UNSCALED if scale.lr_grid else (), scale.tokens, (1, 1)),
        Group(ELASTIC_RULES, scale.tokens, side),
        Group(ELASTIC_TUNED, further_tokens(scale), side),
        Group(ELASTIC_K, scale.tokens, side),
        Group((SANDWICH,), shorter(SANDWICH, scale.tokens), side),
        Group(("infinity-sandwich-distill",), shorter("infinity-sandwich-distill", scale.tokens), side),
        Group(("moe-plus",), scale.tokens, side),
        Group(ELASTIC_LATE, scale.tokens, side),
        Group(ELASTIC_DRAWS, scale.tokens, side),
        Group(("infinity-sandwich-between",), scale.tokens, side),
        Group(("infinity-sandwich-between",), shorter("infinity-sandwich-between", scale.tokens), side),
        Group(ELASTIC_MORE, scale.tokens, side),
        Group(("infinity-sandwich", "infinity-consistency"), shorter("infinity-sandwich", scale.tokens), side),
        Group(("infinity", "moe", "moe-scaled", *(("infinity-lr2x",) if scale.lr_grid else ())), scale.tokens, side),
    ]


def z_arms(scale: Scale) -> dict[int, str]:
    """Table 2's arms: d_z -> name."""
    own = recipe(f"{scale.name}/infinity").model["z_dim"]
    return {z: "infinity" if z == own else f"infinity-z{z}" for z in scale.z_dims}


def _table2(scale: Scale) -> list[Group]:
    return [Group(tuple(z_arms(scale).values()), scale.tokens, _side(scale))]


def _side(scale: Scale) -> tuple[int, int]:
    return scale.side_seeds, scale.side_seeds


# name -> the runs that it is made from
EXPERIMENTS: dict[str, Callable[[Scale], list[Group]]] = {
    "table1": lambda s: [Group(("infinity", "moe", "dense", "switch"), s.tokens, _side(s))],
    "table2": _table2,
    "table3": lambda s: [Group(("infinity",), s.entropy_tokens, _side(s))],
    "table5": lambda s: [Group(("infinity", "moe"), tokens, _side(s)) for tokens in (s.long_tokens, s.tokens)],
    "table6": lambda s: [Group(("infinity", "moe16", "moe16-fine", "moe16-fine-k8-scaled", "moe"), s.tokens, _side(s))],
    "figure2": lambda s: [Group(("infinity", "moe", "moe16"), s.tokens, _side(s))],
    "figure3": lambda s: [Group(("infinity", "moe"), tokens, _side(s)) for tokens in s.data_sizes],
    "figure4": lambda s: [],
    "controls": lambda s: [
        Group(TIER1, s.tokens, s.seeds),
        Group(OTHER_RATES if s.lr_grid else (), s.tokens, _side(s)),
        Group(("infinity", *_TIER2_FIRST), s.tokens, _side(s)),
        Group(TIER1, s.long_tokens, _side(s)),
        Group(("infinity", *_TIER2_THEN), s.tokens, _side(s)),
        Group(("infinity", *_WZ), s.tokens, _side(s)),
        Group((*FURTHER_RIVALS, *z_arms(s).values()), s.tokens, _side(s)),
        Group(STARTS if s.lr_grid else (), s.tokens, _side(s)),
        Group(LONG_RATES if s.lr_grid else (), s.long_tokens, (1, 1)),
        Group(START_RATES if s.lr_grid else (), s.tokens, (1, 1)),
    ],
    "elastic": _elastic,
}
_TABLES = ("table3", "figure3", "table6", "table1", "figure2", "figure4")


def _all(scale: Scale) -> list[Group]:
    """Everything, the most informative first.

    Tier 1 with its least seeds and what elastic compute is compared by with all of them; every other comparison once;
    the seeds of tier 2, between its halves some more of tier 1's; those of the long runs; tier 1's last; those of what
    the baselines may be given, of W_z's settings and of Table 2; the rarer elastic rules once; all other seeds.
    """
    first, rates, tier2, longer, tier2_then, wz, further, starts, *other_rates = EXPERIMENTS["controls"](scale)
    keep, unscaled, *elastic, late, draws, between, between_fewer, more, more_fewer, beside = EXPERIMENTS["elastic"](
        scale
    )
    rest = [more, more_fewer, between, between_fewer]
    least, most = first.seeds
    # Of three seeds an interval is 2.5 standard deviations wide to each side, of five 1.2, of eight 0.8
    few, more_seeds = (replace(first, seeds=(n, n)) for n in (least, min(least + 2, most)))
    rates_once = Group(("moe-scaled", *rates.arms), rates.tokens, (1, 1))
    long, sizes = EXPERIMENTS["table5"](scale), EXPERIMENTS["table2"](scale)
    tables = [group for name in _TABLES for group in EXPERIMENTS[name](scale)]
    once = [rates_once, starts, *other_rates, tier2, draws, *sizes, *long, *tables, tier2_then, wz, longer]
    rare_once = _seeds(rest, 1)
    seeds = [tier2, more_seeds, tier2_then, *long, longer, first, starts, wz, *sizes, *rare_once, *tables]
    last = [rates, late, draws, *rest, further, beside]
    return [few, keep, unscaled, *_seeds([late], 1), *elastic, *_seeds(once, 1), *seeds, *last]


def _seeds(wanted: list[Group], seeds: int) -> list[Group]:
    return [replace(group, seeds=(seeds, seeds)) for group in wanted]


def groups(name: str, scale: Scale, seeds: int | None = None) -> list[Group]:
    """The runs of a table or figure, or of all of them, in the order in which they are to be trained.

    Args:
        name: of `EXPERIMENTS`, or "all".
        scale: how large.
        seeds: this many of every run; None: what the experiment asks for.

    Raises:
        InfMoEError: an unknown name.
    """
    if name != "all" and name not in EXPERIMENTS:
        raise unknown_name("table or figure", name, [*EXPERIMENTS, "all"])
    found = _all(scale) if name == "all" else EXPERIMENTS[name](scale)
    return found if seeds is None else _seeds(found, seeds)
