"""The models that are compared: each is a recipe's variant, trained its own way, under a name of its own."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from infmoe.errors import unknown_name

# Tiers and Table 1 at the rates that they were not tuned to: at 0.002 and 0.004 there is then a run of every arm.
RATE_FACTORS = {
    "infinity": 2.0,
    "infinity-glu": 0.5,
    "moe": 2.0,
    "dense-swiglu": 2.0,
    "dense-wide": 0.5,
    "dense": 2.0,
    "switch": 2.0,
    "moe-swiglu": 2.0,
    "moe16-fine-k8-scaled": 2.0,
}
# Tier 1 with larger weights at the start: GPT-2's 0.02 is for a width of 768. At 128 a layer's pre-activations start at
# 0.23 in place of 0.55 and is nearly linear, where the Gaussian router's maps know the width.
STARTED = ("infinity", "moe", "dense-swiglu", "infinity-glu", "dense-wide")
LARGER_START = 0.049  # 0.02 * (768 / 128) ** 0.5
# Rules that begin half way through a run too, after plain training, and that a trained model is tuned by
LATE_EXPERTS = ("emoe-k4-w0.0001-scaled", "matryoshka-k4-scaled")
# A tuning run is short, and starts from weights that a cosine has brought to rest: at the base's peak rate much of it
# would go into making up for what so high a rate undoes.
_TUNING_FACTOR = 0.5


@dataclass(frozen=True)
class Arm:
    """One model that is compared.

    Attributes:
        name: in file names and tables.
        label: what it is, in a few words.
        variant: the recipe's.
        model: fields of the model's config, over the recipe's.
        tuned_as: the arm whose learning rate it takes; None: it has a grid of its own.
        settings: of the run, over the recipe's, as on the command line.
        lr_factor: on that learning rate.
        init: the arm whose trained model of the same seed, at the scale's standard length, it starts from.
        rate_of: the arm that this one is at another learning rate; None: it is none's.
    """

    name: str
    label: str
    variant: str
    model: Mapping[str, Any] = field(default_factory=dict)
    tuned_as: str | None = None
    settings: tuple[str, ...] = ()
    lr_factor: float = 1.0
    init: str | None = None
    rate_of: str | None = None


def arm_named(name: str) -> Arm:
    """The arm of this name; "infinity-z8" has z_dim 8.

    Raises:
        InfMoEError: there is none.
    """
    stem, _, z_dim = name.rpartition("-z")
    if stem == "infinity" and z_dim.isdigit():
        return Arm(name, f"∞-MoE, d_z = {z_dim}", "infinity", {"z_dim": int(z_dim)}, "infinity")
    if name not in ARMS:
        raise unknown_name("arm", name, ARMS)
    return ARMS[name]


def at_other_rates(name: str) -> tuple[str, ...]:
    """The arms that differ from this one in the learning rate alone."""
    return tuple(other.name for other in ARMS.values() if other.rate_of == name)


def label(line: str) -> str:
    """What an arm is, and what follows it after a comma: "infinity, z = μ" is "∞-MoE, K = 2, 1/4 kept, z = μ"."""
    name, comma, rest = line.partition(",")
    return arm_named(name).label + comma + rest


def titled(line: str) -> str:
    """An arm's name before what `label` gives."""
    return f"{line.partition(',')[0]}: {label(line)}"


def _recipes() -> list[Arm]:
    """The recipes' variants, as they are; what differs little from another arm takes its learning rate."""
    own_grid = {
        "dense": "dense, 4 D wide",
        "dense-wide": "dense, 8 D wide",
        "dense-swiglu": "dense SwiGLU",
        "switch": "Switch, 2 experts",
        "moe": "MoE, 4 experts, top-2",
        "moe-swiglu": "MoE of SwiGLU experts",
        "moe16": "MoE, 16 experts, top-2",
        "infinity": "∞-MoE, K = 2, 1/4 kept",
        "infinity-swiglu": "∞-MoE over SwiGLU neurons",
        "infinity-glu": "dense GLU, gate of rank d_z",
    }
    tuned_as = {
        "dense-swiglu": {
            "dense-swiglu-active": "dense SwiGLU, half as wide",
            "dense-swiglu-plus": "dense SwiGLU, wider by W_z and router",
        },
        "moe": {
            "moe-plus": "MoE, wider by W_z and router",
            "moe-hash": "MoE, token ids hashed",
            "moe16-fine": "16 narrow experts, top-8, gates sum to 1",
        },
        "infinity": {
            "infinity-sigma0": "∞-MoE without noise",
            "infinity-no-topn": "∞-MoE, every neuron kept",
            "infinity-frozen-wz": "∞-MoE, W_z as drawn",
            "infinity-keep8": "∞-MoE, K = 1, 1/8 kept",
            "infinity-keep16": "∞-MoE, K = 1, 1/16 kept",
            **{f"infinity-blocks{size}": f"∞-MoE, blocks of {size} neurons" for size in (16, 32, 64)},
        },
    }
    arms = [Arm(name, text, name) for name, text in own_grid.items()]
    arms += [Arm(name, text, name, {}, root) for root, names in tuned_as.items() for name, text in names.items()]
    return arms


def _controls() -> list[Arm]:
    """W_z's ablation, sizes at the start, and a weaker balance loss."""
    wz: dict[str, tuple[str, dict[str, Any]]] = {
        "infinity-wz-decay0": ("∞-MoE, W_z not decayed", {"wz_weight_decay": 0.0}),
        "infinity-wz-lr-half": ("∞-MoE, W_z at half the rate", {"wz_lr_factor": 0.5}),
        "infinity-wz-lr-double": ("∞-MoE, W_z at twice the rate", {"wz_lr_factor": 2.0}),
    }
    arms = [Arm(name, text, "infinity", model, "infinity") for name, (text, model) in wz.items()]
    texts = {arm.name: arm.label for arm in _recipes()}
    arms += [
        Arm(
            f"{name}-start",
            f"{texts[name]}, weights from {LARGER_START:g}",
            name,
            {"initializer_range": LARGER_START},
            name,
        )
        for name in STARTED
    ]
    moe: dict[str, tuple[str, dict[str, Any]]] = {
        "moe-scaled": ("MoE, gates that sum to 2", {"routed_scaling_factor": 2.0}),
        "moe-balance0.001": ("MoE, balance loss at 0.001", {"balance_loss_weight": 0.001}),
    }
    return [*arms, *(Arm(name, text, "moe", model, "moe") for name, (text, model) in moe.items())]


def _other_rates(arms: list[Arm]) -> list[Arm]:
    """Arms at learning rates that were not chosen; with larger weights at the start by the same factors."""
    known = {arm.name: arm for arm in arms}
    factors = RATE_FACTORS | {f"{name}-start": RATE_FACTORS[name] for name in STARTED}
    return [
        replace(
            (arm := known[name]),
            name=f"{name}-lr{factor:g}x",
            label=f"{arm.label}, rate ×{factor:g}",
            tuned_as=arm.tuned_as or name,
            lr_factor=factor,
            rate_of=name,
        )
        for name, factor in factors.items()
    ]


def _elastic() -> list[Arm]:
    """∞-MoE trained for its dials, and the fixed one that it is held against."""
    one_sample: dict[str, Any] = {"num_samples": 1}
    ratios = "elastic.keep_ratio=[0.0625,0.125,0.25,0.5]"
    ends, sandwich = "elastic.keep_ratio=[0.0625,0.5]", "elastic.rule=sandwich"
    found: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
        "infinity-keep4": ("K = 1, 1/4 kept", one_sample, ()),
        "infinity-elastic": ("share drawn for each layer", one_sample, (ratios,)),
        "infinity-elastic-step": ("share drawn for each step", one_sample, (ratios, "elastic.per=step")),
        "infinity-elastic-scaled": ("share drawn, mask size kept", one_sample | {"mask_scale": "fixed"}, (ratios,)),
        "infinity-sandwich": ("1/2 and 1/16 in every step", one_sample, (ends, sandwich)),
        "infinity-sandwich-distill": ("1/2 teaches 1/16", one_sample, (ends, sandwich, "elastic.distill=true")),
        "infinity-sandwich-between": (
            *("1/2 teaches 1/16 and a drawn share", one_sample),
            (ratios, sandwich, "elastic.distill=true", "elastic.between=1"),
        ),
        **{
            f"infinity-sandwich-distill-from{start:g}": (
                *(f"1/2 teaches 1/16 {when}", one_sample),
                (ends, sandwich, "elastic.distill=true", f"elastic.start={start}"),
            )
            for start, when in ((0.5, "from half way on"), (0.8, "in the last fifth"))
        },
        "infinity-sandwich-quarter-from0.8": (
            *("1/4 teaches 1/16 in the last fifth", one_sample),
            ("elastic.keep_ratio=[0.0625,0.25]", sandwich, "elastic.distill=true", "elastic.start=0.8"),
        ),
        "infinity-sandwich-quarter-w0.25-from0.8": (
            *("1/4 teaches 1/16 at a weight of 1/4, last fifth", one_sample),
            (
                *("elastic.keep_ratio=[0.0625,0.25]", sandwich, "elastic.distill=true", "elastic.start=0.8"),
                "elastic.others_weight=0.25",
            ),
        ),
        "infinity-elastic-k": ("K drawn from 1 … 4", {}, ("elastic.num_samples=[1,2,3,4]",)),
        "infinity-consistency": ("two draws made to agree", {}, ("elastic.consistency_weight=1.0",)),
    }
    return [
        Arm(name, f"∞-MoE, {text}", "infinity", model, "infinity", settings)
        for name, (text, model, settings) in found.items()
    ]


def _experts() -> list[Arm]:
    """16 experts for every number of them: plain, drawn, and trained at more; gates sum to k, or (first tried) to 1."""
    arms = []
    for suffix, scaled in (("-scaled", True), ("", False)):
        after = "" if scaled else ", gates sum to 1"
        for k in (4, 8, 16):
            own: dict[str, Any] = {"num_experts_per_tok": k} | ({"routed_scaling_factor": float(k)} if scaled else {})
            if scaled or k != 8:  # that one is a recipe of its own
                arms.append(
                    Arm(
                        f"moe16-fine-k{k}{suffix}", f"16 narrow experts, plain top-{k}{after}", "moe16-fine", own, "moe"
                    )
                )
            if k == 16:
                continue
            # The paper names neither the probability nor the loss's weight: a half, and weights from none to the
            # balance loss's own; of those above 0 the least gave the lowest loss with one seed, and is compared.
            emoe = own | {"ideal_experts_per_tok": 2 * k}
            weights = {"-w0.0001": 1e-4} | ({"-w0": 0.0} if k == 4 else {})
            if not scaled:
                weights |= {"": 0.01} | ({"-w0.001": 1e-3} if k == 4 else {})
            for name, weight in weights.items():
                text = f"Elastic MoE, k = {k}, ideal {2 * k}, λ = {weight:g}{after}"
                model = emoe | {"hierarchical_loss_weight": weight}
                arms.append(Arm(f"emoe-k{k}{name}{suffix}", text, "moe16-fine", model, "moe"))
            if scaled and k == 4:  # "occasionally", says the paper
                model = emoe | {"hierarchical_loss_weight": 1e-4, "coactivation_prob": 0.1}
                text = f"Elastic MoE, k = {k}, λ = 0.0001, drawn for 1 in 10"
                arms.append(Arm(f"emoe-k{k}-w0.0001-p0.1{suffix}", text, "moe16-fine", model, "moe"))
            upto = list(range(1, 2 * k + 1))
            text = f"Matryoshka, k = 1 … {2 * k}{after}"
            drawn = (f"elastic.num_experts_per_tok={upto}",)
            arms.append(Arm(f"matryoshka-k{k}{suffix}", text, "moe16-fine", own, "moe", drawn))
    # The papers tune trained models: the second half of a run may stand for that; `_tuned` has the thing itself.
    return arms + [
        replace(
            arm,
            name=f"{arm.name}-from0.5",
            label=f"{arm.label}, from half way",
            settings=(*arm.settings, "elastic.start=0.5"),
        )
        for arm in arms
        if arm.name in LATE_EXPERTS
    ]


def _tuned() -> list[Arm]:
    """What starts from a trained model: trained on as it was, the control, and made elastic, as Elastic MoE's paper."""
    known = {arm.name: arm for arm in [*_elastic(), *_experts()]}
    keep, experts = "infinity-keep4", "moe16-fine-k4-scaled"
    taught = ("elastic.keep_ratio=[0.0625,0.25]", "elastic.rule=sandwich", "elastic.distill=true")
    sandwich = replace(
        known[keep],
        name="infinity-sandwich-w0.25",
        label="∞-MoE, 1/4 teaches 1/16 at a weight of 1/4",
        settings=(*taught, "elastic.others_weight=0.25"),
    )
    bases = [(known[keep], keep), (sandwich, keep)]
    bases += [(known[name], experts) for name in (experts, *LATE_EXPERTS)]
    return [
        replace(arm, name=f"{arm.name}-tuned", label=f"{arm.label}, tuned", lr_factor=_TUNING_FACTOR, init=base)
        for arm, base in bases
    ]


_AT_THEIR_RATES = [*_recipes(), *_controls(), *_elastic(), *_experts()]
ARMS = {arm.name: arm for arm in [*_AT_THEIR_RATES, *_other_rates(_AT_THEIR_RATES), *_tuned()]}
