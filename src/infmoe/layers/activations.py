"""The activations that every variant offers, plain and gated."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from infmoe.errors import unknown_name


def _gelu_new(h: Tensor) -> Tensor:
    return F.gelu(h, approximate="tanh")


# name -> (function, gated). "gelu_new" is GPT-2's own tanh form; the gated ones multiply by a second product.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "gelu": (F.gelu, False),
    "gelu_new": (_gelu_new, False),
    "relu": (F.relu, False),
    "silu": (F.silu, False),
    "swiglu": (F.silu, True),
    "geglu": (F.gelu, True),
}


def activation(name: str) -> tuple[Callable[[Tensor], Tensor], bool]:
    """The function of this name, and whether it is gated: act(W1 x) * (W3 x).

    Raises:
        InfMoEError: an unknown name.
    """
    if name not in ACTIVATIONS:
        raise unknown_name("hidden_act", name, ACTIVATIONS)
    return ACTIVATIONS[name]


def ffn_width(intermediate_size: int, gated: bool, multiple_of: int = 1) -> int:
    """Neurons of one FFN: 2/3 of `intermediate_size` where gated, so that three matrices hold what two would.

    Rounded to a multiple of `multiple_of` (at least one); equal to `intermediate_size` where not gated.
    """
    if not gated:
        return intermediate_size
    return max(1, round(intermediate_size * 2 / 3 / multiple_of)) * multiple_of
