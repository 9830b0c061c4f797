"""How the layer's time grows with tokens, width and samples, and what the router costs beside the FFN.

T tokens, D model width, F neurons, K samples, Z index dimensions.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from infmoe.bench.common import Budget, Measured, Rows, spread
from infmoe.eval.latency import interleave
from infmoe.layers import InfinityFFN
from infmoe.ops.masked_ffn.eager import select


@dataclass(frozen=True)
class Axes:
    """What grows; the other two stay at `num_tokens`, `width` and `num_samples`.

    K has the fewest octaves and a large constant part, the products with W1 and W2: its exponent is far below 1.
    """

    hidden_size: int = 768
    z_dim: int = 64
    num_tokens: int = 512
    width: int = 6144
    num_samples: int = 2
    token_axis: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048, 4096)
    width_axis: tuple[int, ...] = (1536, 3072, 6144, 12288)
    sample_axis: tuple[int, ...] = (1, 2, 4, 8)


PAPER = Axes()
QUICK = Axes(token_axis=(128, 256, 512, 1024))


@dataclass(frozen=True)
class PowerLaw:
    """t = scale * n^exponent, fitted by least squares over the logarithms."""

    exponent: float
    standard_error: float
    scale: float

    @staticmethod
    def fit(sizes: Sequence[float], times: Sequence[float]) -> "PowerLaw":
        """From at least three points; the error is that of the residuals."""
        x, y = [math.log(n) for n in sizes], [math.log(t) for t in times]
        mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
        spread_x = sum((a - mean_x) ** 2 for a in x)
        exponent = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread_x
        residual = sum((b - mean_y - exponent * (a - mean_x)) ** 2 for a, b in zip(x, y, strict=True))
        error = math.sqrt(residual / (len(x) - 2) / spread_x)
        return PowerLaw(exponent, error, math.exp(mean_y - exponent * mean_x))


def growth(*, quick: bool = False, axes: Axes | None = None) -> Measured:
    """Forward time in bfloat16 against tokens, F and K, each fitted by a power law.

    Args:
        quick: fewer points and rounds; ends within 40 s.
        axes: None: the paper's small layer.
    """
    axes = axes or (QUICK if quick else PAPER)
    grown: dict[str, tuple[int, ...]] = {
        "tokens": axes.token_axis,
        "width": axes.width_axis,
        "num_samples": axes.sample_axis,
    }
    budget = Budget(20.0 if quick else None, len(grown))
    rows: Rows = []
    summary: dict[str, Any] = {}
    for axis, sizes in grown.items():
        arms = [_forward(axes, **{axis: size}) for size in sizes]
        seconds = interleave(arms, rounds=5 if quick else 15, warmup=1, limit_sec=budget.share())
        fit = PowerLaw.fit(sizes, [spread(arm)["median"] for arm in seconds])
        for size, arm in zip(sizes, seconds, strict=True):
            row = {"axis": axis, "size": size, "unit": "ms", **spread([1e3 * s for s in arm])}
            rows.append(row | {"fitted": 1e3 * fit.scale * size**fit.exponent, "rounds": len(arm)})
        summary |= {f"exponent_{axis}": fit.exponent, f"exponent_{axis}_se": fit.standard_error}
    return rows, summary


def _forward(
    axes: Axes, *, tokens: int | None = None, width: int | None = None, num_samples: int | None = None
) -> Callable[[], Any]:
    """The layer's forward pass with one size changed."""
    layer = InfinityFFN(
        axes.hidden_size,
        width or axes.width,
        z_dim=axes.z_dim,
        num_samples=num_samples or axes.num_samples,
        score_dtype="bfloat16",
    )
    layer = layer.to(torch.bfloat16).eval()
    x_TD = torch.randn(tokens or axes.num_tokens, axes.hidden_size).to(torch.bfloat16)

    @torch.no_grad()
    def forward() -> None:
        layer(x_TD)

    return forward


@dataclass(frozen=True)
class RouterCost:
    """One token's routing beside its FFN; FLOPs are 2 x multiply-adds, bytes are weights at batch 1 in bfloat16.

    W_z mu once and W_z (sigma eps_k) for each sample is K + 1 products in place of K: never cheaper. Pairs
    mu + sigma eps, mu - sigma eps (mode "antithetic") share both parts: 1 + K/2 products, cheaper from K = 4 on.
    All K samples in one product read W_z once.
    """

    maps_flops: int
    scores_flops: int
    ffn_flops: int
    maps_bytes: int
    wz_bytes: int
    ffn_bytes: int
    split_products: int
    antithetic_products: int

    @staticmethod
    def of(hidden_size: int, width: int, z_dim: int, num_samples: int) -> "RouterCost":
        """Of a layer with linear maps and no gated activation."""
        score = 2 * z_dim * width
        return RouterCost(
            maps_flops=2 * 2 * hidden_size * z_dim,
            scores_flops=num_samples * score,
            ffn_flops=2 * 2 * hidden_size * width,
            maps_bytes=2 * 2 * hidden_size * z_dim,
            wz_bytes=2 * z_dim * width,
            ffn_bytes=2 * 2 * hidden_size * width,
            split_products=num_samples + 1,
            antithetic_products=1 + -(-num_samples // 2),
        )


def router_cost(*, quick: bool = False, axes: Axes | None = None) -> Measured:
    """FLOPs and bytes of the router apart, and how many units bfloat16 scores flip; nothing is timed."""
    axes = axes or PAPER
    rows: Rows = []
    summary: dict[str, Any] = {}
    for z_dim in (4 * axes.z_dim, axes.z_dim):
        flips = score_flips(axes, z_dim, num_tokens=64 if quick else 512)
        for num_samples in (1, 2, 4):
            cost = RouterCost.of(axes.hidden_size, axes.width, z_dim, num_samples)
            router = cost.maps_flops + cost.scores_flops
            rows.append(
                {
                    "z_dim": z_dim,
                    "num_samples": num_samples,
                    "maps_mflop": cost.maps_flops / 1e6,
                    "scores_mflop": cost.scores_flops / 1e6,
                    "ffn_mflop": cost.ffn_flops / 1e6,
                    "router_over_ffn_flops": router / cost.ffn_flops,
                    # the paper's dense baseline has half of the layer's width
                    "router_over_dense_ffn_flops": router / (cost.ffn_flops / 2),
                    "maps_mb": cost.maps_bytes / 1e6,
                    "wz_mb": cost.wz_bytes / 1e6,
                    "ffn_mb": cost.ffn_bytes / 1e6,
                    "router_over_ffn_bytes": (cost.maps_bytes + cost.wz_bytes) / cost.ffn_bytes,
                    "products": num_samples,
                    "split_products": cost.split_products,
                    "antithetic_products": cost.antithetic_products,
                    "bf16_flips_per_row": flips,
                }
            )
            summary[f"router_over_dense_ffn_z{z_dim}_k{num_samples}"] = rows[-1]["router_over_dense_ffn_flops"]
        summary[f"bf16_flips_per_row_z{z_dim}"] = flips
    return rows, summary


@torch.no_grad()
def score_flips(axes: Axes, z_dim: int, *, num_tokens: int) -> float:
    """Units a row that float32 scores keep and bfloat16 scores do not, at the layer's own keep ratio.

    Both factors are rounded, products and sums are float32.
    """
    layer = InfinityFFN(axes.hidden_size, axes.width, z_dim=z_dim, num_samples=1)
    z_BTKZ = layer.router(torch.randn(1, num_tokens, axes.hidden_size), torch.randn(1, num_tokens, 1, z_dim)).z_BTKZ
    kept = []
    for dtype in (torch.float32, torch.bfloat16):
        scores_BTKU = z_BTKZ.to(dtype).float() @ layer.w_z.weight.to(dtype).float().T
        kept.append(select(scores_BTKU, (max(1, round(layer.keep_ratio * layer.num_units)),)))
    return float(((kept[0] > 0) & (kept[1] == 0)).sum()) / num_tokens
