"""What bfloat16 scores change: units flipped, and the loss, on a model that was trained a little.

B batch rows, T tokens, K samples, U units.
"""

import contextlib
import io
import statistics
from collections.abc import Callable

import torch

from infmoe.bench.common import Measured, Rows, tiny_run
from infmoe.data import TokenData
from infmoe.eval.loading import open_model
from infmoe.hf import InfMoEForCausalLM
from infmoe.layers import InfinityFFN, NoiseKey, Routing
from infmoe.layers.dials import num_kept
from infmoe.layers.router import Indices
from infmoe.ops.masked_ffn import eager
from infmoe.train import run
from infmoe.train.config import apply_overrides


def score_precision(*, quick: bool = False, steps: int = 120, windows: int = 64) -> Measured:
    """Train `tiny/infinity` with scores of either precision, two seeds each; evaluate each model with both.

    Flips are the units that one precision keeps and the other does not, per row of U units, on held-out text.
    """
    if quick:
        steps, windows = 4, 4
    rows: Rows = []
    with tiny_run("infinity", "eval.every=null", "checkpoint.every=1000000") as (config, folder):
        assert config.data.dir is not None
        data = TokenData.open(config.data.dir)
        count = min(windows, data.num_windows("val", config.window))
        tokens_BT = torch.from_numpy(data.windows("val", torch.arange(count).numpy(), config.window))
        for trained in ("float32", "bfloat16"):
            for seed in (0,) if quick else (0, 1):
                out = folder / f"{trained}-{seed}"
                settings = [f"steps={steps}", f"seed={seed}", f"model.score_dtype={trained}"]
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    run(apply_overrides(config, settings), out)
                model = open_model(out).model
                losses, kept = zip(
                    *(_evaluate(model, tokens_BT, dtype) for dtype in ("float32", "bfloat16")), strict=True
                )
                flips = [float((a != b).sum()) / a[..., 0].numel() for a, b in zip(*kept, strict=True)]
                rows.append(
                    {
                        "trained_with": trained,
                        "seed": seed,
                        "loss_float32": losses[0],
                        "loss_bfloat16": losses[1],
                        "difference": losses[1] - losses[0],
                        "flips_per_row": statistics.fmean(flips),
                        "units": kept[0][0].shape[-1],
                    }
                )
    return rows, {
        "difference_max": max(abs(row["difference"]) for row in rows),
        "flips_per_row": statistics.fmean(row["flips_per_row"] for row in rows),
        "steps": steps,
        "limit": 0.001,
    }


@torch.no_grad()
def _evaluate(model: InfMoEForCausalLM, tokens_BT: torch.Tensor, dtype: str) -> tuple[float, list[torch.Tensor]]:
    """Loss, and what every layer of the first batch selected."""
    layers = [module for module in model.modules() if isinstance(module, InfinityFFN)]
    for layer in layers:
        layer.score_dtype = dtype
    losses = []
    kept: list[torch.Tensor] = []

    def record(layer: InfinityFFN) -> Callable[..., None]:
        def hook(router: torch.nn.Module, inputs: object, indices: Indices) -> None:
            own = num_kept((layer.keep_ratio,), layer.num_units)
            kept.append(eager.select(layer._scores(indices.z_BTKZ), own).bool())

        return hook

    for i, batch in enumerate(tokens_BT.split(8)):
        key = NoiseKey(seed=0, stream=torch.arange(8 * i, 8 * i + len(batch)))
        with contextlib.ExitStack() as hooks:
            if i == 0:
                for layer in layers:
                    hooks.callback(layer.router.register_forward_hook(record(layer)).remove)
            routing = Routing(key=key, max_stats_tokens=1)
            loss = model(input_ids=batch, labels=batch, routing=routing, use_cache=False).loss
        losses.append((loss.item(), len(batch)))
    return sum(loss * n for loss, n in losses) / sum(n for _, n in losses), kept
