"""The loss on the validation split.

B rows, T tokens.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from infmoe.train.session import Session


@torch.no_grad()
def validate(session: "Session") -> dict[str, float]:
    """Mean cross-entropy over the split's first windows, always the same, and its standard error over them.

    The router's noise is keyed by the window, so two evaluations differ by the weights alone.
    """
    accelerator, config = session.accelerator, session.config
    model = accelerator.unwrap_model(session.model)
    device = accelerator.device
    mine = np.arange(accelerator.process_index, session.num_val_windows, accelerator.num_processes)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    model.eval()
    for start in range(0, len(mine), config.micro_batch_size):
        windows = mine[start : start + config.micro_batch_size]
        tokens_BT, routing = session.rows("val", windows, windows, step=0, stats_tokens=1)
        with session.autocast():
            logits_BTV = model(input_ids=tokens_BT, routing=routing, use_cache=False).logits
        loss_BT = F.cross_entropy(
            logits_BTV[:, :-1].flatten(0, 1).float(), tokens_BT[:, 1:].flatten(), reduction="none"
        ).view(len(windows), -1)
        loss_B = loss_BT.double().mean(dim=1)
        sums += torch.stack([loss_B.sum(), loss_B.square().sum()])
    model.train()
    total, squares = accelerator.reduce(sums, "sum").tolist()
    n = session.num_val_windows
    mean = total / n
    variance = max(squares / n - mean**2, 0.0) * n / max(n - 1, 1)
    return {"val_loss": mean, "val_loss_se": (variance / n) ** 0.5, "val_windows": n}
