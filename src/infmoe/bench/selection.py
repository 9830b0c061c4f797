"""The selection of Eq. 6, one way against the other: what decided for C++ kernels, and for numpy without a compiler.

N rows, U units.
"""

import contextlib
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from infmoe.bench.common import Measured, Rows, paired_ratio, spread
from infmoe.eval.latency import interleave
from infmoe.ops.masked_ffn import compiled, fused
from infmoe.ops.masked_ffn.eager import kth_largest

_ROWS = 2048


def select_speed(*, quick: bool = False) -> Measured:
    """Microseconds per row of U scores, a quarter kept, 2048 rows, float32; the arms take turns.

    The first three find the threshold alone, the others the masked scores; `kernel` packs the selection and sums
    the statistics besides. Those that the machine lacks (a compiler, Numba) are left out.
    """
    rounds = 4 if quick else 20
    rows: Rows = []
    summary: dict[str, float | int] = {}
    for num_units in (1024, 6144):
        scores = torch.randn(1, _ROWS, 1, num_units, generator=torch.Generator().manual_seed(0))
        flat, kept = scores.view(_ROWS, num_units), num_units // 4
        arms: dict[str, Callable[[], object]] = {
            "kth_largest": partial(kth_largest, scores, [kept]),
            "torch.topk": partial(scores.topk, kept, dim=-1, sorted=False),
            "torch.kthvalue": partial(scores.kthvalue, num_units - kept + 1, dim=-1),
        }
        makers = _mask_makers(quick=quick)
        expected = flat * (flat >= flat.topk(kept, dim=-1).values[:, -1:])
        for name, make in makers.items():
            assert torch.equal(make(flat, kept), expected), name
            arms[name] = partial(make, flat, kept)
        seconds = dict(zip(arms, interleave(list(arms.values()), rounds=rounds), strict=True))
        for name, arm in seconds.items():
            rows.append({"arm": name, "units": num_units, "unit": "us/row", **spread([1e6 * s / _ROWS for s in arm])})
        for name in ("kth_largest", *makers):
            ratio = paired_ratio(seconds["torch.topk"], seconds[name])["ratio_median"]
            summary[f"topk_over_{name.replace(' ', '_')}_{num_units}"] = ratio
    return rows, summary | {"rounds": rounds}


def _mask_makers(*, quick: bool) -> dict[str, Callable[[Tensor, int], Tensor]]:
    """Scores and how many are kept -> the scores, 0 where they are not kept."""
    makers: dict[str, Callable[[Tensor, int], Tensor]] = {}
    if compiled.available():
        makers["kernel"] = _kernel
    if not quick:  # compiling takes a minute
        makers["torch.compile"] = torch.compile(_bisection, dynamic=False)
    with contextlib.suppress(ImportError):
        makers["numba"] = _numba()
    return makers


def _kernel(scores_NU: Tensor, num_kept: int) -> Tensor:
    weight = torch.ones(1, 1, 1)
    return fused.top_mask_of_scores(scores_NU[None, :, None], (num_kept,), weight).mask_BTU[0]


def _bisection(scores_NU: Tensor, num_kept: int) -> Tensor:
    """On the integers that order as the floats do."""
    bits = scores_NU.view(torch.int32)
    key_NU = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    low = torch.full((len(scores_NU), 1), -(2**31), dtype=torch.int64)
    high = torch.full((len(scores_NU), 1), 2**31 - 1, dtype=torch.int64)
    for _ in range(32):
        middle = low + ((high - low + 1) >> 1)
        enough = (key_NU >= middle).sum(-1, keepdim=True) >= num_kept
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle - 1)
    return scores_NU * (key_NU >= low)


def _numba() -> Callable[[Tensor, int], Tensor]:
    """The same in Numba, rows in parallel on its own threads."""
    import numba

    @numba.njit(parallel=True)
    def run(scores, keys, num_kept, out):
        for r in numba.prange(scores.shape[0]):
            low, high = -(2**31), 2**31 - 1
            while low < high:
                middle = low + ((high - low + 1) >> 1)
                count = 0
                for u in range(keys.shape[1]):
                    count += keys[r, u] >= middle
                if count >= num_kept:
                    low = middle
                else:
                    high = middle - 1
            for u in range(keys.shape[1]):
                out[r, u] = scores[r, u] if keys[r, u] >= low else 0.0

    def make(scores_NU: Tensor, num_kept: int) -> Tensor:
        scores = scores_NU.numpy()
        bits = scores.view(np.int32)
        out = np.empty_like(scores)
        run(scores, np.where(bits < 0, bits ^ 0x7FFFFFFF, bits), num_kept, out)
        return torch.from_numpy(out)

    return make
