"""The feed-forward variants that are compared, as fields of `InfMoEConfig`.

d_ff is the dense one's width, four times the model's; z_dim goes to those that route by z. "Total" and "active"
compare FFN parameters with the other variants' in the paper's accounting.
"""

from collections.abc import Callable
from typing import Any

Fields = dict[str, Any]


def dense(d_ff: int, z_dim: int) -> Fields:
    """The paper's dense baseline: the active parameters of the others, half their total."""
    return {"ffn": "dense", "intermediate_size": d_ff}


def dense_wide(d_ff: int, z_dim: int) -> Fields:
    """Control of equal total parameters: what the width alone is worth."""
    return {"ffn": "dense", "intermediate_size": 2 * d_ff}


def dense_swiglu(d_ff: int, z_dim: int) -> Fields:
    """The modern rival, with the total parameters of `dense-wide`."""
    return dense_wide(d_ff, z_dim) | {"hidden_act": "swiglu"}


def dense_swiglu_active(d_ff: int, z_dim: int) -> Fields:
    """The modern rival with the parameters that the others use per token."""
    return dense(d_ff, z_dim) | {"hidden_act": "swiglu"}


def dense_swiglu_plus(d_ff: int, z_dim: int) -> Fields:
    """The modern rival, given what W_z and the Gaussian router take besides."""
    return dense_swiglu(d_ff, z_dim) | {"intermediate_size": 2 * d_ff + _extra_width(z_dim)}


def switch(d_ff: int, z_dim: int) -> Fields:
    """The paper's Switch baseline: two experts of the dense width, one per token."""
    return {"ffn": "switch", "intermediate_size": 2 * d_ff, "num_experts": 2}


def moe(d_ff: int, z_dim: int) -> Fields:
    """The paper's MoE baseline: four experts of half the dense width, two per token."""
    return {"ffn": "moe", "intermediate_size": 2 * d_ff, "num_experts": 4, "num_experts_per_tok": 2}


def moe_plus(d_ff: int, z_dim: int) -> Fields:
    """The paper's MoE baseline, given what W_z and the Gaussian router take besides."""
    return moe(d_ff, z_dim) | {"intermediate_size": 2 * d_ff + _extra_width(z_dim)}


def moe_swiglu(d_ff: int, z_dim: int) -> Fields:
    """Four experts that are gated themselves, so what the gate is worth without ∞-MoE."""
    return moe(d_ff, z_dim) | {"hidden_act": "swiglu"}


def moe_hash(d_ff: int, z_dim: int) -> Fields:
    """Control: what learning the discrete router is worth."""
    return moe(d_ff, z_dim) | {"expert_router": "hash"}


def moe16(d_ff: int, z_dim: int) -> Fields:
    """Sixteen experts of half the dense width, two per token: equal active, four times the total."""
    return {"ffn": "moe", "intermediate_size": 8 * d_ff, "num_experts": 16, "num_experts_per_tok": 2}


def moe16_fine(d_ff: int, z_dim: int) -> Fields:
    """Sixteen experts of an eighth of the dense width, eight per token: equal total and active parameters."""
    return {"ffn": "moe", "intermediate_size": 2 * d_ff, "num_experts": 16, "num_experts_per_tok": 8}


def infinity(d_ff: int, z_dim: int) -> Fields:
    """∞-MoE with the dials of the paper's Table 4: two samples that keep a quarter of the neurons each."""
    return {"ffn": "infinity", "intermediate_size": 2 * d_ff, "z_dim": z_dim, "num_samples": 2, "keep_ratio": 0.25}


def infinity_swiglu(d_ff: int, z_dim: int) -> Fields:
    """∞-MoE over gated neurons, against `dense-swiglu`."""
    return infinity(d_ff, z_dim) | {"hidden_act": "swiglu"}


def infinity_sigma0(d_ff: int, z_dim: int) -> Fields:
    """Control: routing by z = mu, so what the noise is worth. There is nothing to draw, hence one sample."""
    return infinity(d_ff, z_dim) | {"sigma_activation": "none", "num_samples": 1}


def infinity_no_topn(d_ff: int, z_dim: int) -> Fields:
    """Control: every neuron is kept, so what the selection is worth."""
    return infinity(d_ff, z_dim) | {"keep_ratio": 1.0}


def infinity_glu(d_ff: int, z_dim: int) -> Fields:
    """Control without noise and selection: a dense GLU whose gate has rank z_dim."""
    return infinity_sigma0(d_ff, z_dim) | {"keep_ratio": 1.0}


def infinity_frozen_wz(d_ff: int, z_dim: int) -> Fields:
    """Control: W_z stays as drawn, so what learning it is worth."""
    return infinity(d_ff, z_dim) | {"train_wz": False}


def infinity_blocks16(d_ff: int, z_dim: int) -> Fields:
    """Control: blocks of 16 neurons share a score, which hardware can turn into speed."""
    return infinity(d_ff, z_dim) | {"block_size": 16}


def infinity_blocks32(d_ff: int, z_dim: int) -> Fields:
    """Control: blocks of 32 neurons share a score."""
    return infinity(d_ff, z_dim) | {"block_size": 32}


def infinity_blocks64(d_ff: int, z_dim: int) -> Fields:
    """Control: blocks of 64 neurons share a score."""
    return infinity(d_ff, z_dim) | {"block_size": 64}


def infinity_keep8(d_ff: int, z_dim: int) -> Fields:
    """One sample that keeps an eighth of the neurons."""
    return infinity(d_ff, z_dim) | {"num_samples": 1, "keep_ratio": 1 / 8}


def infinity_keep16(d_ff: int, z_dim: int) -> Fields:
    """One sample that keeps a sixteenth of the neurons."""
    return infinity(d_ff, z_dim) | {"num_samples": 1, "keep_ratio": 1 / 16}


def _extra_width(z_dim: int) -> int:
    """Neurons whose two weight vectors hold as many parameters as W_z (2 d_ff z) and both router maps (2 D z).

    With d_ff = 4 D that is 10 D z over 2 D.
    """
    return 5 * z_dim


def fields(variant: str, *, d_ff: int, z_dim: int) -> Fields:
    """A variant's fields at this width."""
    return VARIANTS[variant](d_ff, z_dim)


VARIANTS: dict[str, Callable[[int, int], Fields]] = {
    "dense": dense,
    "dense-wide": dense_wide,
    "dense-swiglu": dense_swiglu,
    "dense-swiglu-active": dense_swiglu_active,
    "dense-swiglu-plus": dense_swiglu_plus,
    "switch": switch,
    "moe": moe,
    "moe-plus": moe_plus,
    "moe-swiglu": moe_swiglu,
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
    "infinity-blocks32": infinity_blocks32,
    "infinity-blocks64": infinity_blocks64,
    "infinity-keep8": infinity_keep8,
    "infinity-keep16": infinity_keep16,
}
