"""The feed-forward variants that are compared, as fields of `InfMoEConfig`; d_ff is the dense one's width.

"Total" and "active" compare FFN parameters with the other variants' in the paper's accounting.
"""

from collections.abc import Callable
from typing import Any

Fields = dict[str, Any]


def dense(d_ff: int) -> Fields:
    """The paper's dense baseline: the active parameters of the others, half their total."""
    return {"ffn": "dense", "intermediate_size": d_ff}


def dense_wide(d_ff: int) -> Fields:
    """Control of equal total parameters: what the width alone is worth."""
    return {"ffn": "dense", "intermediate_size": 2 * d_ff}


def dense_swiglu(d_ff: int) -> Fields:
    """The modern rival, with the total parameters of `dense-wide`."""
    return dense_wide(d_ff) | {"hidden_act": "swiglu"}


def switch(d_ff: int) -> Fields:
    """The paper's Switch baseline: two experts of the dense width, one per token."""
    return {"ffn": "switch", "intermediate_size": 2 * d_ff, "num_experts": 2}


def moe(d_ff: int) -> Fields:
    """The paper's MoE baseline: four experts of half the dense width, two per token."""
    return {"ffn": "moe", "intermediate_size": 2 * d_ff, "num_experts": 4, "num_experts_per_tok": 2}


def moe_hash(d_ff: int) -> Fields:
    """Control: what learning the discrete router is worth."""
    return moe(d_ff) | {"expert_router": "hash"}


def moe16(d_ff: int) -> Fields:
    """Sixteen experts of half the dense width, two per token: equal active, four times the total."""
    return {"ffn": "moe", "intermediate_size": 8 * d_ff, "num_experts": 16, "num_experts_per_tok": 2}


def moe16_fine(d_ff: int) -> Fields:
    """Sixteen experts of an eighth of the dense width, eight per token: equal total and active parameters."""
    return {"ffn": "moe", "intermediate_size": 2 * d_ff, "num_experts": 16, "num_experts_per_tok": 8}


def infinity(d_ff: int) -> Fields:
    """∞-MoE with the dials of the paper's Table 4: two samples that keep a quarter of the neurons each."""
    return {"ffn": "infinity", "intermediate_size": 2 * d_ff, "num_samples": 2, "keep_ratio": 0.25}


def infinity_swiglu(d_ff: int) -> Fields:
    """∞-MoE over gated neurons, against `dense-swiglu`."""
    return infinity(d_ff) | {"hidden_act": "swiglu"}


def infinity_sigma0(d_ff: int) -> Fields:
    """Control: routing by z = mu, so what the noise is worth. There is nothing to draw, hence one sample."""
    return infinity(d_ff) | {"sigma_activation": "none", "num_samples": 1}


def infinity_no_topn(d_ff: int) -> Fields:
    """Control: every neuron is kept, so what the selection is worth."""
    return infinity(d_ff) | {"keep_ratio": 1.0}


def infinity_glu(d_ff: int) -> Fields:
    """Control without noise and selection: a dense GLU whose gate has rank z_dim."""
    return infinity_sigma0(d_ff) | {"keep_ratio": 1.0}


def infinity_frozen_wz(d_ff: int) -> Fields:
    """Control: W_z stays as drawn, so what learning it is worth."""
    return infinity(d_ff) | {"train_wz": False}


def infinity_blocks16(d_ff: int) -> Fields:
    """Control: blocks of 16 neurons share a score, which hardware can turn into speed."""
    return infinity(d_ff) | {"block_size": 16}


def fields(variant: str, *, d_ff: int, z_dim: int) -> Fields:
    """A variant's fields at this width; `z_dim` goes to those that route by z."""
    chosen = VARIANTS[variant](d_ff)
    return chosen | {"z_dim": z_dim} if chosen["ffn"] == "infinity" else chosen


VARIANTS: dict[str, Callable[[int], Fields]] = {
    "dense": dense,
    "dense-wide": dense_wide,
    "dense-swiglu": dense_swiglu,
    "switch": switch,
    "moe": moe,
    "moe-hash": moe_hash,
    "moe16": moe16,
    "moe16-fine": moe16_fine,
    "infinity": infinity,
    "infinity-swiglu": infinity_swiglu,
    "infinity-sigma0": infinity_sigma0,
    "infinity-no-topn": infinity_no_topn,
    "infinity-glu": infinity_glu,
    "infinity-frozen-wz": infinity_frozen_wz,
    "infinity-blocks16": infinity_blocks16,
}
