"""The Triton kernels on a GPU: checked against the reference, then timed. One command for whoever has one.

N tokens, K samples, Z index dimensions, U units, F neurons (here one for each unit), D model width.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from infmoe.bench.common import Measured, Rows, paired_ratio, spread
from infmoe.errors import InfMoEError
from infmoe.eval.latency import interleave
from infmoe.layers.activations import ACTIVATIONS
from infmoe.ops import triton as kernels
from infmoe.ops.masked_ffn import naive

# (N, K, U, D): the paper's small model, odd sizes, and the ends of the range
GEOMETRIES = ((64, 2, 6144, 768), (33, 3, 1021, 100), (5, 8, 8, 16), (4, 1, 16384, 4096))
HIDDEN_SIZE, NUM_NEURONS = 768, 6144
Z_DIMS = (64, 256)
_LAYERS = 12  # distinct weights that take turns, as a model's do: one layer's would stay in the cache


def gpu(*, quick: bool = False) -> Measured:
    """Check every kernel, outputs and gradients; then time selection, layer and decoding in bfloat16.

    Raises:
        InfMoEError: there is no GPU, or a kernel is wrong on this one.
    """
    ok, reason = kernels.available()
    if ok and not torch.cuda.is_available():
        ok, reason = False, "the Triton interpreter is on: unset TRITON_INTERPRET, on a machine with a CUDA device"
    if not ok:
        raise InfMoEError(f"`infmoe bench gpu` needs a CUDA device and Triton here: {reason}")
    device = torch.device("cuda")
    rows = check_kernels(device)
    wrong = sorted({row["kernel"] for row in rows if not row["max_error"] <= row["tolerance"]})
    if wrong:
        raise InfMoEError(
            f"wrong on {torch.cuda.get_device_name()}: {', '.join(wrong)}; use another backend than triton"
        )
    rounds = 10 if quick else 50
    roof = _read_bytes_per_sec(device)
    timed = [*_time_selection(device, roof, rounds), *_time_layer(device, rounds), *_time_decode(device, roof, rounds)]
    summary: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "checks": len(rows),
        "roof_gb_per_sec": roof / 1e9,
        "rounds": rounds,
    }
    for bench in ("selection", "selection+backward", "layer", "decode"):
        ratios = [row["ratio_median"] for row in timed if row.get("bench") == bench and "ratio_median" in row]
        summary[f"{bench}_speedup_min"] = min(ratios)
    return rows + timed, summary


def check_kernels(device: torch.device, geometries: Sequence[tuple[int, int, int, int]] = GEOMETRIES) -> Rows:
    """Largest error of every kernel's outputs and gradients, relative to the largest value of the reference's."""
    rows: Rows = []
    for N, K, U, D in geometries:
        for dtype in (torch.float32, torch.bfloat16):
            # fp32: sums in another order; bf16: the saved mask, the result and the reference's are rounded
            tolerance = 2e-5 if dtype == torch.float32 else 2e-2
            where = {"tokens": N, "samples": K, "units": U, "dtype": str(dtype).removeprefix("torch.")}
            for act in ACTIVATIONS:
                for name, ours, theirs in [
                    *_select_both_ways(device, N, K, U, dtype, act),
                    *_decode_both_ways(device, min(N, 4), U, D, dtype, act),
                ]:
                    error = (ours.float() - theirs.float()).abs().max() / theirs.float().abs().max().clamp_min(1e-30)
                    rows.append(
                        {"kernel": name, "act": act, **where, "max_error": error.item(), "tolerance": tolerance}
                    )
    return rows


def _select_both_ways(
    device: torch.device, N: int, K: int, U: int, dtype: torch.dtype, act: str
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, by the kernel, by the reference) of every output and gradient."""
    generator = torch.Generator().manual_seed(U)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    function, is_gated = ACTIVATIONS[act]
    scores_NKU = normal(N, K, U)
    num_kept_N = torch.randint(1, U + 1, (N,), generator=generator, dtype=torch.int32).to(device)
    weight_NK = torch.rand((N, K), generator=generator).to(device)
    tensors = [scores_NKU, normal(N, U).to(dtype), *([normal(N, U).to(dtype)] if is_gated else [])]
    grad_NU = normal(N, U).to(dtype)
    leaves, other = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))

    ours, packed_NKW, _ = kernels.gated_mask(leaves[1], leaves[0], num_kept_N, weight_NK, *leaves[2:], act=act)
    kept_N1KU = naive.select(other[0][:, None], num_kept_N.long())
    mask_NU = naive.mean_mask(other[0][:, None], kept_N1KU, weight_NK)[:, 0]
    theirs = function(other[1].float()) * mask_NU
    theirs = (theirs * other[2].float() if is_gated else theirs).to(dtype)

    yield "selection: kept", _unpack(packed_NKW, U), kept_N1KU[:, 0]
    yield "selection: output", ours, theirs
    names = ("scores", "pre", "gate")
    ours_grads, theirs_grads = torch.autograd.grad(ours, leaves, grad_NU), torch.autograd.grad(theirs, other, grad_NU)
    for name, mine, reference in zip(names, ours_grads, theirs_grads, strict=False):
        yield f"selection: gradient of {name}", mine, reference
    _, packed_NKW, _ = kernels.mean_mask(scores_NKU, num_kept_N, weight_NK, statistical=True)
    std_NK1, mean_NK1 = torch.std_mean(scores_NKU.double(), dim=-1, correction=0, keepdim=True)
    threshold_NK1 = mean_NK1 + std_NK1 * torch.special.ndtri(1.0 - num_kept_N.double() / U)[:, None, None]
    clear_NKU = (scores_NKU - threshold_NK1).abs() > 1e-5  # within rounding of it either answer is right
    yield "selection: statistical", _unpack(packed_NKW, U) & clear_NKU, (scores_NKU >= threshold_NK1) & clear_NKU


def _unpack(packed_NKW: Tensor, num_units: int) -> Tensor:
    bits = (packed_NKW[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed_NKW.device)) & 1
    return bits.flatten(-2)[..., :num_units].bool()


def _decode_both_ways(
    device: torch.device, N: int, U: int, D: int, dtype: torch.dtype, act: str
) -> Iterator[tuple[str, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(D)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    function, is_gated = ACTIVATIONS[act]
    mask_NF = (normal(N, U) * (normal(N, U) > 0.7)).float()
    x_ND, w1_FD, b1_F, w2t_FD, b2_D = normal(N, D), normal(U, D), normal(U), normal(U, D), normal(D)
    gate = (normal(U, D), normal(U)) if is_gated else ()
    ours = kernels.sparse_ffn(x_ND, mask_NF, w1_FD, b1_F, w2t_FD, b2_D, *gate, act=act)
    h_NF = function(F.linear(x_ND.double(), w1_FD.double(), b1_F.double())) * mask_NF
    if gate:
        h_NF = h_NF * F.linear(x_ND.double(), gate[0].double(), gate[1].double())
    yield "sparse decoding", ours, h_NF @ w2t_FD.double() + b2_D.double()


def _plain_mean_mask(scores_NKU: Tensor, num_kept: int) -> Tensor:
    """What one writes without a kernel: one topk, one scatter, one mean."""
    kept = scores_NKU.topk(num_kept, dim=-1, sorted=False)
    return torch.zeros_like(scores_NKU).scatter(-1, kept.indices, kept.values).mean(dim=1)


def _read_bytes_per_sec(device: torch.device) -> float:
    """The roof: bytes read by a sum over 1 GiB."""
    data = torch.ones(2**28, device=device)
    (seconds,) = interleave([_graph(lambda: data.sum())], rounds=10)
    return data.nbytes / min(seconds)


def _graph(work: Callable[[], Any]) -> Callable[[], None]:
    """`work` as one CUDA graph, so that launches cost no time on the host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def _compare(
    arms: dict[str, Callable[[], Any]],
    rounds: int,
    per: int = 1,
    limit_bytes: dict[str, float] | None = None,
    **where: Any,
) -> Rows:
    """One row per arm, microseconds; the ratio is the first arm's time over this one's."""
    seconds = interleave([_graph(arm) for arm in arms.values()], rounds=rounds)
    rows: Rows = []
    for name, arm in zip(arms, seconds, strict=True):
        row = {**where, "arm": name, "unit": "us", **spread([1e6 * s / per for s in arm])}
        if arm is not seconds[0]:
            row |= paired_ratio(seconds[0], arm)
        if limit_bytes and name in limit_bytes:
            row["limit_us"] = 1e6 * limit_bytes[name]
        rows.append(row)
    return rows


def _time_selection(device: torch.device, roof: float, rounds: int, N: int = 4096) -> Iterator[dict[str, Any]]:
    """Activation, selection and mean mask, forward, and forward and backward; the limit is the bytes' own time."""
    for K in (1, 2, 4):
        scores_NKU = torch.randn(N, K, NUM_NEURONS, device=device, requires_grad=True)
        pre_NF = torch.randn(N, NUM_NEURONS, device=device, dtype=torch.bfloat16, requires_grad=True)
        weight_NK = torch.full((N, K), 1.0 / K, device=device)
        grad_NF = torch.randn_like(pre_NF)
        for keep_ratio in (1 / 16, 1 / 4, 1 / 2):
            num_kept = round(keep_ratio * NUM_NEURONS)
            num_kept_N = torch.full((N,), num_kept, dtype=torch.int32, device=device)

            def plain(n: int = num_kept, s: Tensor = scores_NKU, p: Tensor = pre_NF) -> Tensor:
                return F.gelu(p, approximate="tanh") * _plain_mean_mask(s, n).to(p.dtype)

            def fused(
                n: Tensor = num_kept_N, s: Tensor = scores_NKU, p: Tensor = pre_NF, w: Tensor = weight_NK
            ) -> Tensor:
                return kernels.gated_mask(p, s, n, w, act="gelu_new")[0]

            def both_passes(forward: Callable[[], Tensor], inputs=(scores_NKU, pre_NF), grad=grad_NF) -> Any:
                return torch.autograd.grad(forward(), inputs, grad)

            where: dict[str, Any] = {"samples": K, "keep_ratio": keep_ratio, "tokens": N}
            row_bytes = N * NUM_NEURONS
            limit = row_bytes * (4 * K + K / 8 + 4) / roof
            both = limit + row_bytes * (2 + 4 * K + K / 8 + 8) / roof
            with torch.no_grad():
                arms: dict[str, Callable[[], Any]] = {"topk": plain, "triton": fused}
                yield from _compare(arms, rounds, limit_bytes={"triton": limit}, bench="selection", **where)
            arms = {"topk": partial(both_passes, plain), "triton": partial(both_passes, fused)}
            yield from _compare(arms, rounds, limit_bytes={"triton": both}, bench="selection+backward", **where)


class _Layer:
    """One layer's weights, bfloat16, and z for its tokens."""

    def __init__(self, device: torch.device, N: int, K: int, Z: int):
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=torch.bfloat16)

        self.w1_FD, self.w2_DF = normal(NUM_NEURONS, HIDDEN_SIZE), normal(HIDDEN_SIZE, NUM_NEURONS)
        self.b1_F, self.b2_D = normal(NUM_NEURONS), normal(HIDDEN_SIZE)
        self.w_z_UZ, self.z_NKZ = normal(NUM_NEURONS, Z), normal(N, K, Z)
        self.w2t_FD = self.w2_DF.T.contiguous()

    def scores(self) -> Tensor:
        return F.linear(self.z_NKZ, self.w_z_UZ).float()

    def pre(self, x_ND: Tensor) -> Tensor:
        return F.linear(x_ND, self.w1_FD, self.b1_F)

    def out(self, gated_NF: Tensor) -> Tensor:
        return F.linear(gated_NF, self.w2_DF, self.b2_D)


@torch.no_grad()
def _time_layer(device: torch.device, rounds: int, N: int = 4096) -> Iterator[dict[str, Any]]:
    """The layer from z and x to y, against its matrix products alone (the limit) and the plain selection."""
    x_ND = torch.randn(N, HIDDEN_SIZE, device=device, dtype=torch.bfloat16)
    for Z in Z_DIMS:
        for K in (1, 2):
            layer = _Layer(device, N, K, Z)
            weight_NK = torch.full((N, K), 1.0 / K, device=device)
            for keep_ratio in (1 / 16, 1 / 4, 1 / 2):
                num_kept = round(keep_ratio * NUM_NEURONS)
                num_kept_N = torch.full((N,), num_kept, dtype=torch.int32, device=device)

                def limit(layer: _Layer = layer) -> Any:
                    return F.linear(layer.z_NKZ, layer.w_z_UZ), layer.out(layer.pre(x_ND))

                def plain(layer: _Layer = layer, n: int = num_kept) -> Tensor:
                    mask_NU = _plain_mean_mask(layer.scores(), n)
                    return layer.out(F.gelu(layer.pre(x_ND), approximate="tanh") * mask_NU.bfloat16())

                def fused(layer: _Layer = layer, n: Tensor = num_kept_N, w: Tensor = weight_NK) -> Tensor:
                    return layer.out(kernels.gated_mask(layer.pre(x_ND), layer.scores(), n, w, act="gelu_new")[0])

                where: dict[str, Any] = {"samples": K, "keep_ratio": keep_ratio, "tokens": N, "z_dim": Z}
                arms: dict[str, Callable[[], Any]] = {"topk": plain, "triton": fused}
                rows = _compare(arms | {"gemms": limit}, rounds, bench="layer", **where)
                for row in rows:
                    if row["arm"] == "gemms":  # a limit, not a competitor
                        row["bench"] = "layer limit"
                yield from rows


@torch.no_grad()
def _time_decode(device: torch.device, roof: float, rounds: int) -> Iterator[dict[str, Any]]:
    """One layer of a decoding step, from z and x to y: nothing skipped, against rows skipped, and a bare FFN."""
    for N in (1, 4):
        x_ND = torch.randn(N, HIDDEN_SIZE, device=device, dtype=torch.bfloat16)
        for Z in Z_DIMS:
            for K in (1, 2, 4):
                layers = [_Layer(device, N, K, Z) for _ in range(_LAYERS)]
                weight_NK = torch.full((N, K), 1.0 / K, device=device)
                for keep_ratio in (1 / 16, 1 / 8, 1 / 4):
                    num_kept_N = torch.full((N,), round(keep_ratio * NUM_NEURONS), dtype=torch.int32, device=device)

                    def dense(layers=layers, n: Tensor = num_kept_N, w: Tensor = weight_NK, x_ND=x_ND) -> None:
                        for layer in layers:
                            layer.out(kernels.gated_mask(layer.pre(x_ND), layer.scores(), n, w, act="gelu_new")[0])

                    def sparse(layers=layers, n: Tensor = num_kept_N, w: Tensor = weight_NK, x_ND=x_ND) -> None:
                        for layer in layers:
                            mask_NF, *_ = kernels.mean_mask(layer.scores(), n, w)
                            weights = (layer.w1_FD, layer.b1_F, layer.w2t_FD, layer.b2_D)
                            kernels.sparse_ffn(x_ND, mask_NF, *weights, act="gelu_new")

                    def bare(layers=layers, x_ND=x_ND) -> None:
                        for layer in layers:
                            layer.out(F.gelu(layer.pre(x_ND), approximate="tanh"))

                    mask_NF, *_ = kernels.mean_mask(layers[0].scores(), num_kept_N, weight_NK)
                    union = (mask_NF != 0).any(0).float().mean().item()
                    router = 2 * Z * NUM_NEURONS
                    rows_bytes = 2 * 2 * HIDDEN_SIZE * NUM_NEURONS
                    limits = {
                        "dense": (router + rows_bytes) / roof,
                        "sparse": (router + rows_bytes * union) / roof,
                        "bare": rows_bytes / roof,
                    }
                    where: dict[str, Any] = {
                        "tokens": N,
                        "samples": K,
                        "keep_ratio": keep_ratio,
                        "z_dim": Z,
                        "union_ratio": union,
                    }
                    arms: dict[str, Callable[[], Any]] = {"dense": dense, "sparse": sparse}
                    rows = _compare(arms | {"bare": bare}, rounds, _LAYERS, limits, bench="decode", **where)
                    for row in rows:
                        if row["arm"] == "bare":
                            row["bench"] = "decode limit"
                    yield from rows
