"""The selection of Eq. 6: numpy's quickselect against torch.topk and kthvalue."""

import torch

from infmoe.bench.common import Measured, Rows, paired_ratio, spread
from infmoe.eval.latency import interleave
from infmoe.ops.masked_ffn.eager import kth_largest


def select_speed(*, quick: bool = False) -> Measured:
    """Microseconds per row of U scores, a quarter kept, 2048 rows, float32; the arms take turns."""
    rounds = 4 if quick else 20
    rows: Rows = []
    summary = {}
    for num_units in (1024, 6144):
        scores = torch.randn(1, 2048, 1, num_units, generator=torch.Generator().manual_seed(0))
        kept = num_units // 4
        arms = {
            "kth_largest": lambda s=scores, n=kept: kth_largest(s, [n]),
            "torch.topk": lambda s=scores, n=kept: s.topk(n, dim=-1, sorted=False),
            "torch.kthvalue": lambda s=scores, n=num_units - kept + 1: s.kthvalue(n, dim=-1),
        }
        seconds = interleave(list(arms.values()), rounds=rounds)
        for name, arm in zip(arms, seconds, strict=True):
            rows.append({"arm": name, "units": num_units, "unit": "us/row", **spread([1e6 * s / 2048 for s in arm])})
        summary[f"topk_over_kth_largest_{num_units}"] = paired_ratio(seconds[1], seconds[0])["ratio_median"]
    return rows, summary | {"rounds": rounds}
