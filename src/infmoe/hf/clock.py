"""When each token of a generation came out."""

import time
from typing import Any

import torch
from torch import Tensor


class TokenClock:
    """A stopping criterion of `generate` that never stops, and notes the time at which it is asked: once a token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if input_ids.is_cuda:  # or the prompt's work would still be under way, and the first token pay for it
            torch.cuda.synchronize(input_ids.device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def milliseconds(self) -> list[float]:
        """Each token's time but the first's, which the prompt is part of."""
        return [1e3 * (b - a) for a, b in zip(self.times, self.times[1:], strict=False)]
