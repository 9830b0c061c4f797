"""The loss on the validation split.

B rows.
"""

from typing import TYPE_CHECKING

import torch

from infmoe.eval.heldout import spread_windows, window_losses

if TYPE_CHECKING:
    from infmoe.train.session import Session


@torch.no_grad()
def validate(session: "Session") -> dict[str, float]:
    """Mean cross-entropy over fixed windows spread over the split, and its standard error over windows.

    The router's noise is keyed by the window, so two evaluations differ by the weights alone.
    """
    accelerator, config = session.accelerator, session.config
    model = accelerator.unwrap_model(session.model)
    count = session.num_val_windows
    windows = spread_windows(session.data.num_windows("val", config.window), count)
    mine = windows[accelerator.process_index :: accelerator.num_processes]
    sums = torch.zeros(2, dtype=torch.float64)
    model.eval()
    for start in range(0, len(mine), config.micro_batch_size):
        rows = mine[start : start + config.micro_batch_size]
        tokens_BT, routing = session.rows("val", rows, rows, step=0, stats_tokens=1)
        with session.autocast():
            loss_B, _ = window_losses(model, tokens_BT, routing)
        sums += torch.stack([loss_B.sum(), loss_B.square().sum()])
    model.train()
    if accelerator.num_processes > 1:  # where there is but one, its device may have no float64 (Apple's MPS)
        sums = accelerator.reduce(sums.to(accelerator.device), "sum")
    total, squares = sums.tolist()
    mean = total / count
    variance = max(squares / count - mean**2, 0.0) * count / max(count - 1, 1)
    return {"val_loss": mean, "val_loss_se": (variance / count) ** 0.5, "val_windows": count}
