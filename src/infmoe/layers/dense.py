"""The plain feed-forward layer: GPT-2's, or a gated one.

B batch rows, T tokens, D model width, F neurons.
"""

from collections.abc import Iterable
from typing import final

import torch
from torch import Tensor

from infmoe.layers.activations import activation, ffn_width
from infmoe.layers.base import ConditionalFFN, FFNCost, FFNOutput, Init
from infmoe.layers.linear import Linear
from infmoe.layers.metrics import stats_stride, uniform_stats
from infmoe.layers.routing import DIALS, Routing


@final
class DenseFFN(ConditionalFFN):
    """y = W2 Act(W1 x): every neuron for every token, no dial.

    With `intermediate_size` = d_ff it is the paper's dense baseline; with the total width of the other
    variants it is the control of equal total parameters; with "swiglu" it is the modern rival.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, *, hidden_act: str = "gelu_new", **shared):
        """Build the layer.

        Args:
            hidden_size: D.
            intermediate_size: F, before the 2/3 of a gated activation.
            hidden_act: a name from `ACTIVATIONS`.
            **shared: see `ConditionalFFN`.
        """
        super().__init__(hidden_size, intermediate_size, **shared)
        self.hidden_act = hidden_act
        self.act, gated = activation(hidden_act)
        self.width = ffn_width(intermediate_size, gated)
        self.w1 = Linear(hidden_size, self.width)
        self.w3 = Linear(hidden_size, self.width) if gated else None
        self.w2 = Linear(self.width, hidden_size)
        self.reset_parameters()

    def inits(self) -> Iterable[Init]:
        for linear in (self.w1, self.w3, self.w2):
            if linear is not None:
                std = self.initializer_range * (self.residual_init_scale if linear is self.w2 else 1.0)
                yield Init(linear.weight, 0.0, std)
                yield Init(linear.bias, 0.0, 0.0)

    def forward(self, x_BTD: Tensor, routing: Routing | None = None) -> FFNOutput:
        routing = routing or Routing()
        self._refuse_dials(routing)
        h_BTF = self.act(self.w1(x_BTD))
        if self.w3 is not None:
            h_BTF = h_BTF * self.w3(x_BTD)
        y_BTD = self.w2(h_BTF)
        num_tokens = x_BTD.numel() // self.hidden_size
        looked_at = -(-num_tokens // stats_stride(num_tokens, routing.max_stats_tokens))
        no_loss = torch.zeros((), device=x_BTD.device)
        return FFNOutput(y_BTD, no_loss, uniform_stats(looked_at, self.width, x_BTD.device))

    def cost(self, routing: Routing | None = None, union_ratio: float | None = None) -> FFNCost:
        self._refuse_dials(routing or Routing())
        params = self.num_params()
        flops = 2 * self.hidden_size * self.width * (3 if self.w3 is not None else 2)
        return FFNCost(
            params=params,
            params_wz=0,
            params_discrete_router=0,
            active_params=params,
            active_params_union=params,
            flops_executed=flops,
            flops_ideal=flops,
            flops_router=0,
            weights_executed=params,
            weights_ideal=params,
        )

    def _refuse_dials(self, routing: Routing) -> None:
        self._refuse(routing, *DIALS, "mode")
        self._refuse_backend(routing)
