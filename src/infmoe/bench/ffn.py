"""One ∞-MoE layer against its own matrix products and against the paper's way of doing it (Figure 4).

T tokens, D model width, F neurons, K samples, Z index dimensions, I and O the two sides of a matrix.

The arms, all at the paper's small geometry and all taking turns:

- `infinity`: `InfinityFFN.forward` from x to y in sampled mode, noise, router and statistics included, with
  backend "auto". The forward pass counts over all tokens, as an evaluation does; the training pass looks at 512,
  as the model's own does.
- `eager`: the same call with backend "eager", the plain path that needs no compiled kernel.
- `gemms`: the products with W1, W2, W_z (K rows a token), W_mu and W_sigma and nothing else: the physical limit of
  a path that skips no neuron. In training each brings its two backward products.
- `reference`: those products, one `torch.topk`, one scatter and one mean, with the activation and the products of
  elements that it takes to be a layer; backward by torch's autograd. It is given its noise ready-made and keeps no
  statistics, so it does less than `infinity`.
- `topk`, `scatter`, `mean`: the three calls alone; with `gemms` they say whether the reference is slow by itself
  (`over_calls`). `elementwise`: its activation and the product with the mask, which that sum leaves out.
"""

import gc
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infmoe.bench.common import Budget, Measured, Rows, paired_ratio, spread
from infmoe.errors import InfMoEError
from infmoe.eval.latency import interleave
from infmoe.layers import DenseFFN, InfinityFFN, NoiseKey, Routing
from infmoe.ops.dispatch import Backend
from infmoe.ops.noise import normal_noise

TRAINING_STATS_TOKENS = 512  # what the model's training pass looks at
# The arms must compute one function: relative rms difference to the reference. bfloat16 rounds z and the scores
# otherwise than the layer, so that a few units at the threshold differ.
MAX_ERROR = {torch.float32: 1e-2, torch.bfloat16: 0.15}


@dataclass(frozen=True)
class Shape:
    """What is measured; the defaults are the paper's small model.

    Attributes:
        hidden_size: D.
        width: F.
        num_samples: K.
        num_tokens: T.
        z_dims: values of Z; the summary's plain keys are the first one's, in bfloat16.
        keep_ratios: the axis of Figure 4.
        quick_ratio: the keep ratio of those measurements that a first look makes at one point only.
    """

    hidden_size: int = 768
    width: int = 6144
    num_samples: int = 2
    num_tokens: int = 1024
    z_dims: tuple[int, ...] = (256, 64)
    keep_ratios: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
    quick_ratio: float = 1 / 4


PAPER = Shape()
REFERENCE_CALLS = ("gemms", "topk", "scatter", "mean")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class LayerCase:
    """One layer in one type with its input, and everything that is timed on it."""

    def __init__(self, shape: Shape, z_dim: int, dtype: torch.dtype):
        """Draw the weights, the input, the output's gradient and the reference's noise."""
        T, D, K = shape.num_tokens, shape.hidden_size, shape.num_samples
        self.dtype, self.num_samples = dtype, K
        layer = InfinityFFN(
            D,
            shape.width,
            z_dim=z_dim,
            num_samples=K,
            score_dtype="bfloat16" if dtype == torch.bfloat16 else "float32",
        )
        self.layer = layer.to(dtype)
        self.x_TD = torch.randn(T, D).to(dtype).requires_grad_()
        self.grad_TD = torch.randn(T, D).to(dtype)
        self.key = NoiseKey(seed=0, stream=torch.zeros(1, dtype=torch.int64))
        self.noise_TKZ = normal_noise(
            K,
            z_dim,
            seed=0,
            step=0,
            layer=0,
            stream_B=torch.zeros(1, dtype=torch.int64),
            position_BT=torch.arange(T)[None],
        )[0].to(dtype)

    def num_kept(self, keep_ratio: float) -> int:
        """N of the top-N."""
        return max(1, round(keep_ratio * self.layer.num_units))

    def infinity(self, keep_ratio: float, backend: Backend, stats_tokens: int | None = None) -> Tensor:
        """The layer itself."""
        dials: dict[str, Any] = {"keep_ratio": keep_ratio, "mode": "sample", "max_stats_tokens": stats_tokens}
        return self.layer(self.x_TD, Routing(key=self.key, backend=backend, **dials)).y_BTD

    def indices(self) -> Tensor:
        """z of every token and sample, (T, K, Z)."""
        router = self.layer.router
        assert router.sigma is not None
        mu_TZ = F.linear(self.x_TD, router.mu.weight, router.mu.bias)
        sigma_TZ = F.softplus(F.linear(self.x_TD, router.sigma.weight, router.sigma.bias))
        return mu_TZ[:, None] + sigma_TZ[:, None] * self.noise_TKZ

    def reference(self, keep_ratio: float) -> Tensor:
        """Eq. 4-7 in the calls that the paper's reference has."""
        layer = self.layer
        mask_TF = self.reference_mask(keep_ratio)
        h_TF = layer.act(F.linear(self.x_TD, layer.w1.weight, layer.w1.bias))
        return F.linear(h_TF * mask_TF, layer.w2.weight, layer.w2.bias)

    def reference_mask(self, keep_ratio: float) -> Tensor:
        """Its mean mask; apart, so that scores and indices are given back before W1's output is made."""
        scores_TKF = F.linear(self.indices(), self.layer.w_z.weight)
        top = scores_TKF.topk(self.num_kept(keep_ratio), dim=-1, sorted=False)
        return torch.zeros_like(scores_TKF).scatter_(-1, top.indices, top.values).mean(dim=1)

    @torch.no_grad()
    def calls_alone(self, keep_ratio: float) -> dict[str, Callable[[], Any]]:
        """The reference's three calls, and what it does element by element, each on inputs that lie ready."""
        scores_TKF = F.linear(self.indices(), self.layer.w_z.weight)
        num_kept = self.num_kept(keep_ratio)
        top = scores_TKF.topk(num_kept, dim=-1, sorted=False)

        def scatter() -> Tensor:
            return torch.zeros_like(scores_TKF).scatter_(-1, top.indices, top.values)

        masks_TKF = scatter()
        mask_TF = masks_TKF.mean(dim=1)
        h_TF = torch.randn(mask_TF.shape).to(self.dtype)
        return {
            "topk": lambda: scores_TKF.topk(num_kept, dim=-1, sorted=False),
            "scatter": scatter,
            "mean": lambda: masks_TKF.mean(dim=1),
            "elementwise": lambda: self.layer.act(h_TF) * mask_TF,
        }

    def products(self) -> list[tuple[Tensor, Tensor]]:
        """Input and weight, (rows, I) and (O, I), of every matrix product that the layer needs."""
        layer, router = self.layer, self.layer.router
        assert router.sigma is not None
        x_TD = self.x_TD.detach()
        h_TF = torch.randn(x_TD.shape[0], layer.width).to(self.dtype)
        z_NZ = self.indices().detach().flatten(0, 1)
        pairs = [
            (x_TD, layer.w1),
            (h_TF, layer.w2),
            (z_NZ, layer.w_z),
            (x_TD, router.mu),
            (x_TD, router.sigma),
        ]
        return [(x, linear.weight.detach()) for x, linear in pairs]

    def gemms(self, *, backward: bool) -> tuple[Callable[[], None], int]:
        """The products alone, forward or of both passes, and their FLOPs."""
        work = [(x_NI, w_OI, torch.randn(len(x_NI), len(w_OI)).to(self.dtype)) for x_NI, w_OI in self.products()]
        flops = sum(2 * len(x_NI) * w_OI.numel() for x_NI, w_OI, _ in work)

        def forward_products() -> None:
            for x_NI, w_OI, _ in work:
                F.linear(x_NI, w_OI)

        def both() -> None:
            forward_products()
            for x_NI, w_OI, grad_NO in work:
                _ = grad_NO @ w_OI
                _ = grad_NO.T @ x_NI

        return (both, 3 * flops) if backward else (forward_products, flops)

    def trained(self, forward: Callable[[], Tensor]) -> Callable[[], None]:
        """Forward and backward from a random gradient of y, to x and every parameter."""
        leaves = [self.x_TD, *self.layer.parameters()]

        def step() -> None:
            forward().backward(self.grad_TD)
            for leaf in leaves:
                leaf.grad = None

        return step

    def check(self, keep_ratio: float) -> float:
        """Relative rms difference of the layer's output to the reference's.

        Raises:
            InfMoEError: it is so large that the arms do not compute one function.
        """
        with torch.no_grad():
            reference_TD = self.reference(keep_ratio).float()
            difference_TD = self.infinity(keep_ratio, "auto").float() - reference_TD
        error = float(difference_TD.norm() / reference_TD.norm())
        if not error <= MAX_ERROR[self.dtype]:
            raise InfMoEError(f"the layer and the reference differ by {error:.2g} at keep ratio {keep_ratio}")
        return error


@dataclass(frozen=True)
class _Measurement:
    """One point of one line of the picture."""

    dtype: str
    z_dim: int
    passes: str  # "forward" or "train"
    keep_ratio: float


def ffn_speed(*, quick: bool = False, shape: Shape | None = None) -> Measured:
    """Forward, and forward with backward, against the limit and the reference; and the memory of both passes.

    Args:
        quick: fewer points and rounds; ends within 40 s.
        shape: None: the paper's.
    """
    shape = shape or PAPER
    plan = _plan(shape, quick)
    budget = Budget(24.0 if quick else 240.0, len(plan))
    rows: Rows = []
    errors: list[float] = []
    case_key: tuple[str, int] | None = None
    for point in plan:
        if (point.dtype, point.z_dim) != case_key:
            first, case_key = case_key is None, (point.dtype, point.z_dim)
            case = LayerCase(shape, point.z_dim, DTYPES[point.dtype])
            if first or not quick:
                rows += [{"z_dim": point.z_dim, "dtype": point.dtype, **row} for row in _memory_rows(case, shape)]
        if point.passes == "forward" and (not quick or point.keep_ratio == shape.quick_ratio):
            errors.append(case.check(point.keep_ratio))
        rows += _point_rows(case, point, shape, quick=quick, limit_sec=budget.share())
    summary = _summary(rows, shape)
    return rows, summary | {"reference_error_max": max(errors), "rounds_min": min(r.get("rounds", 99) for r in rows)}


def _plan(shape: Shape, quick: bool) -> list[_Measurement]:
    """What is measured, grouped by layer so that each is built once; the plain summary keys' points come first."""
    plan = []
    for dtype in DTYPES:
        for z_dim in shape.z_dims:
            base = dtype == "bf16" and z_dim == shape.z_dims[0]
            for passes in ("forward", "train"):
                ratios: Iterable[float] = shape.keep_ratios
                if quick and not (base and passes == "forward"):
                    # at the smallest ratio the reference's scatter and gather are cheapest
                    ratios = (shape.keep_ratios[0], shape.quick_ratio) if base else (shape.quick_ratio,)
                    if dtype == "fp32" and z_dim != shape.z_dims[0]:
                        continue
                plan += [_Measurement(dtype, z_dim, passes, ratio) for ratio in dict.fromkeys(ratios)]
    return plan


def _point_rows(case: LayerCase, point: _Measurement, shape: Shape, *, quick: bool, limit_sec: float | None) -> Rows:
    """Every arm at one keep ratio."""
    ratio, train = point.keep_ratio, point.passes == "train"
    gemms, flops = case.gemms(backward=train)
    stats = TRAINING_STATS_TOKENS if train else None
    forwards: dict[str, Callable[[], Tensor]] = {
        "infinity": lambda: case.infinity(ratio, "auto", stats),
        "reference": lambda: case.reference(ratio),
    }
    if not quick:
        forwards["eager"] = lambda: case.infinity(ratio, "eager", stats)
    arms: dict[str, Callable[[], Any]] = {name: case.trained(f) if train else f for name, f in forwards.items()}
    arms["gemms"] = gemms
    if not train:
        arms |= case.calls_alone(ratio)
    with torch.set_grad_enabled(train):
        timed = interleave(list(arms.values()), rounds=5 if quick else 15, warmup=1, limit_sec=limit_sec)
    seconds = dict(zip(arms, timed, strict=True))
    rows: Rows = []
    for name, arm in seconds.items():
        row: dict[str, Any] = {
            "z_dim": point.z_dim,
            "dtype": point.dtype,
            "pass": point.passes,
            "keep_ratio": ratio,
            "arm": name,
            "unit": "ms",
            **spread([1e3 * s for s in arm]),
            "limit": 1e3 * spread(seconds["gemms"])["median"],
            **paired_ratio(arm, seconds["gemms"], prefix="over_limit_"),
            **paired_ratio(seconds["reference"], arm, prefix="speedup_"),
            "gflop_per_s": flops / 1e9 / spread(arm)["median"] if name == "gemms" else None,
            "over_calls": None,
            "over_all": None,
            "rounds": len(arm),
        }
        if name == "reference" and not train:
            calls = [sum(parts) for parts in zip(*(seconds[call] for call in REFERENCE_CALLS), strict=True)]
            everything = [sum(parts) for parts in zip(calls, seconds["elementwise"], strict=True)]
            row["over_calls"] = paired_ratio(arm, calls)["ratio_median"]
            row["over_all"] = paired_ratio(arm, everything)["ratio_median"]
        rows.append(row)
    return rows


def _summary(rows: Rows, shape: Shape) -> dict[str, Any]:
    """The worst point of every line; plain keys are the first Z's in bfloat16."""
    summary: dict[str, Any] = {}
    for dtype in DTYPES:
        for z_dim in shape.z_dims:
            suffix = ("" if z_dim == shape.z_dims[0] else f"_z{z_dim}") + ("" if dtype == "bf16" else f"_{dtype}")
            own = [row for row in rows if (row["dtype"], row["z_dim"]) == (dtype, z_dim)]
            for passes in ("forward", "train"):
                ours = [row for row in own if row.get("pass") == passes and row["arm"] == "infinity"]
                if ours:
                    summary[f"{passes}_speedup_min{suffix}"] = min(row["speedup_median"] for row in ours)
                    summary[f"{passes}_over_gemms_max{suffix}"] = max(row["over_limit_median"] for row in ours)
            memory = [row for row in own if row["arm"] == "infinity memory"]
            for row in memory:
                summary[f"memory_ratio{suffix}"] = row["peak_ratio"]
                summary[f"saved_ratio{suffix}"] = row["saved_ratio"]
    references = [row for row in rows if row.get("over_calls") is not None]
    return summary | {
        "reference_over_calls_max": max(row["over_calls"] for row in references),
        "reference_over_all_max": max(row["over_all"] for row in references),
    }


def _memory_rows(case: LayerCase, shape: Shape) -> Rows:
    """Activation memory of a training pass at the default keep ratio, beside a dense FFN's of the same width."""
    dense = DenseFFN(shape.hidden_size, shape.width).to(case.dtype)
    dials: tuple[float, Backend, int] = (case.layer.keep_ratio, "auto", TRAINING_STATS_TOKENS)
    measured = {
        "infinity memory": activation_memory(lambda: case.infinity(*dials), case.layer, case.x_TD, case.grad_TD),
        "dense memory": activation_memory(lambda: dense(case.x_TD).y_BTD, dense, case.x_TD, case.grad_TD),
    }
    saved, peak = measured["dense memory"]
    return [
        {
            "arm": name,
            "unit": "MB",
            "saved": own_saved / 1e6,
            "peak": own_peak / 1e6,
            "saved_ratio": own_saved / saved,
            "peak_ratio": own_peak / peak,
        }
        for name, (own_saved, own_peak) in measured.items()
    ]


def activation_memory(forward: Callable[[], Tensor], module: nn.Module, x: Tensor, grad: Tensor) -> tuple[int, int]:
    """Bytes that a training pass holds beyond weights and gradients.

    Counted from torch's own allocator, through the profiler's memory events: they cover temporaries inside
    operators too, which a hook on tensors does not see; what numpy or oneDNN allocate for themselves is in
    neither. A parameter's gradient is dropped as soon as it is made, as an optimizer fused into the backward
    pass would: it is no activation.

    Args:
        forward: gives the output.
        module: whose parameters train.
        x: the input, a leaf with a gradient of its own.
        grad: the output's gradient.

    Returns:
        What the forward pass leaves for the backward pass, output included; the peak of both passes.
    """
    leaves = [x, *module.parameters()]
    hooks = [leaf.register_post_accumulate_grad_hook(_drop_gradient) for leaf in leaves if leaf.requires_grad]
    try:
        forward().backward(grad)  # whatever is made once and kept
        kept: list[Tensor] = []
        _, saved = live_bytes(lambda: kept.append(forward()))
        kept.clear()
        peak, _ = live_bytes(lambda: forward().backward(grad))
    finally:
        for hook in hooks:
            hook.remove()
    return saved, peak


def live_bytes(work: Callable[[], Any]) -> tuple[int, int]:
    """Bytes of torch's CPU allocator that `work` holds at its peak, and at its end."""
    gc.collect()
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with _quiet_stderr(), torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        work()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak, live


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """The profiler's library announces its start and stop there, whatever its log level."""
    with open(os.devnull, "w") as nowhere:
        stderr = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def _drop_gradient(leaf: Tensor) -> None:
    leaf.grad = None
