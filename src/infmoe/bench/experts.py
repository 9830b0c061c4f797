"""The discrete experts against their bare matrix products.

T tokens, k experts per token, N = T * k pairs of the two, E experts, D model width, F neurons per expert.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from infmoe.bench.common import Measured, Rows, paired_ratio, spread
from infmoe.eval.latency import interleave
from infmoe.layers import MoEFFN

_K = 2
_INPUTS = 64  # more than there are rounds
# name: D, F, tokens of a call; F is that of the recipes `moe` and `moe16`
_GEOMETRIES = {"tiny": (128, 256, 4096), "small": (768, 1536, 1024)}


def moe_over_gemms(*, quick: bool = False) -> Measured:
    """Forward and backward of the `moe` layer over the matrix products in it, at `tiny` and `small`.

    The products are a plain loop of `torch.mm` over the experts' rows, as the layer's own router deals them
    out: two forward, four backward, in the type in use, into tensors that are there already. The layer does the
    same with router, statistics, casts, permutations, activation, biases and gates; its input changes from call to
    call, and with it every expert's number of rows, as in training. That of the bare products does not: oneDNN makes
    a kernel for each new shape, which would be most of what they take.

    Args:
        quick: fewer rounds, and at `small` four experts alone.
    """
    rows: Rows = []
    summary: dict[str, Any] = {}
    for geometry, (hidden_size, width, num_tokens) in _GEOMETRIES.items():
        rounds = {"tiny": 10 if quick else 40, "small": 4 if quick else 12}[geometry]
        for num_experts in (4,) if quick and geometry == "small" else (4, 16):
            layer = MoEFFN(hidden_size, width * num_experts, num_experts=num_experts, num_experts_per_tok=_K).train()
            for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
                step, bare = _arms(layer, num_tokens, dtype)
                seconds = interleave([step, bare], rounds=rounds)
                ratio = paired_ratio(*seconds)
                common = {"geometry": geometry, "experts": num_experts, "precision": precision}
                for arm, s in zip(("layer", "bare products"), seconds, strict=True):
                    rows.append({**common, "arm": arm, "unit": "ms", **spread([1e3 * v for v in s])})
                rows[-2] |= ratio
                summary[f"over_gemms_{geometry}_{num_experts}_{precision}"] = ratio["ratio_median"]
    return rows, summary | {"over_gemms_max": max(summary.values()), "limit": 1.2}


def _arms(layer: MoEFFN, num_tokens: int, dtype: torch.dtype) -> tuple[Callable[[], None], Callable[[], None]]:
    """The layer's forward and backward, and its products alone."""
    draw = torch.Generator().manual_seed(0)
    shape = (1, num_tokens, layer.hidden_size)
    grad_BTD = torch.randn(shape, generator=draw).to(dtype)
    inputs = itertools.cycle([torch.randn(shape, generator=draw).requires_grad_() for _ in range(_INPUTS)])

    def forward() -> Any:
        x_BTD = next(inputs)
        x_BTD.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return layer(x_BTD)

    def step() -> None:
        output = forward()
        torch.autograd.backward([output.y_BTD, output.aux_loss], [grad_BTD, None])
        layer.zero_grad(set_to_none=True)

    rows_E = forward().stats.counts_U.int().tolist()
    return step, _bare_grouped_mm(layer.experts.w1_EDF, layer.experts.w2_EFD, rows_E, dtype)


def _bare_grouped_mm(w1_EDF: Tensor, w2_EFD: Tensor, rows_E: list[int], dtype: torch.dtype) -> Callable[[], None]:
    """The six products of each expert and nothing else; `rows_E` is how many rows each has."""
    w1_EDF, w2_EFD = w1_EDF.detach().to(dtype), w2_EFD.detach().to(dtype)
    shape = (sum(rows_E), w1_EDF.shape[1])
    x_ND, grad_y_ND, y_ND, grad_x_ND = (torch.randn(shape).to(dtype) for _ in range(4))
    h_NF, grad_h_NF, a_NF = (torch.randn(shape[0], w1_EDF.shape[2]).to(dtype) for _ in range(3))
    grad_w1_EDF, grad_w2_EFD = torch.empty_like(w1_EDF), torch.empty_like(w2_EFD)
    groups = [t.split(rows_E) for t in (x_ND, h_NF, a_NF, y_ND, grad_y_ND, grad_h_NF, grad_x_ND)]
    experts = list(zip(*groups, w1_EDF, w2_EFD, grad_w1_EDF, grad_w2_EFD, strict=True))

    def bare() -> None:
        for x, h, a, y, _, _, _, w1, w2, _, _ in experts:
            torch.mm(x, w1, out=h)
            torch.mm(a, w2, out=y)
        for x, _, a, _, grad_y, grad_h, grad_x, w1, w2, grad_w1, grad_w2 in experts:
            torch.mm(grad_y, w2.T, out=grad_h)
            torch.mm(a.T, grad_y, out=grad_w2)
            torch.mm(grad_h, w1.T, out=grad_x)
            torch.mm(x.T, grad_h, out=grad_w1)

    return bare
