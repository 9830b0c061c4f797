"""The Switch Transformer's layer: one expert per token.

B batch rows, T tokens (of all rows, where there is no B), E experts, D model width.
"""

import math
from collections.abc import Iterable
from typing import final

import torch
from torch import Tensor, nn

from infmoe.errors import InfMoEError
from infmoe.layers.base import ConditionalFFN, FFNCost, FFNOutput, Init
from infmoe.layers.experts import Experts, balance_loss, check_weight, expert_stats, narrow_softmax, router_logits
from infmoe.layers.routing import DIALS, Routing


@final
class SwitchFFN(ConditionalFFN):
    """y = p_i(x) E_i(x) with i = argmax p, p = softmax(W_r x): top-1 routing (Fedus et al. 2022), no dial.

    E_i contains the output bias, so p_i scales that too. The router computes in float32. Without a capacity
    factor nothing is dropped, and a token's output depends on that token alone.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        hidden_act: str = "gelu_new",
        num_experts: int = 2,
        balance_loss_weight: float = 0.01,
        capacity_factor: float | None = None,
        **shared,
    ):
        """Build the layer.

        Args:
            hidden_size: D.
            intermediate_size: neurons of all experts together, before the 2/3 of a gated activation.
            hidden_act: a name from `ACTIVATIONS`.
            num_experts: E; must divide `intermediate_size`.
            balance_loss_weight: weight of the load-balancing loss; its value at perfect balance.
            capacity_factor: an expert serves ceil(tokens / E * factor) tokens of a call, first come first
                served, and the rest get an output of zero. It saves no work here, where nothing is padded; it
                is for comparison with systems that have it, and it makes a token's output depend on the
                tokens before it in the batch. None: no limit.
            **shared: see `ConditionalFFN`.
        """
        super().__init__(hidden_size, intermediate_size, **shared)
        check_weight("balance_loss_weight", balance_loss_weight)
        if capacity_factor is not None and not 0.0 < capacity_factor < float("inf"):
            raise InfMoEError(f"capacity_factor must be positive, or None (no limit), got {capacity_factor!r}")
        self.hidden_act = hidden_act
        self.num_experts = num_experts
        self.balance_loss_weight = balance_loss_weight
        self.capacity_factor = capacity_factor
        self.experts = Experts(hidden_size, intermediate_size, num_experts, hidden_act)
        self.router = nn.Linear(hidden_size, num_experts, bias=False)
        self.reset_parameters()

    def inits(self) -> Iterable[Init]:
        yield from self.experts.inits(self.initializer_range, self.residual_init_scale)
        yield Init(self.router.weight, 0.0, self.initializer_range)

    def forward(self, x_BTD: Tensor, routing: Routing | None = None) -> FFNOutput:
        routing = routing or Routing()
        self._refuse_dials(routing)
        x_TD = x_BTD.reshape(-1, self.hidden_size)
        probs_TE = narrow_softmax(router_logits(x_TD, self.router.weight))
        gate_T1, expert_T1 = probs_TE.max(dim=-1, keepdim=True)
        kept_T1 = None
        if self.capacity_factor is not None:
            kept_T1 = self._within_capacity(expert_T1)
            gate_T1 = gate_T1 * kept_T1
        y_TD = self.experts(x_TD, expert_T1, gate_T1)
        aux_loss = self.balance_loss_weight * balance_loss(probs_TE, expert_T1).float()
        stats = expert_stats(expert_T1, self.num_experts, routing.max_stats_tokens, kept_T1)
        return FFNOutput(y_TD.view(x_BTD.shape), aux_loss, stats)

    def cost(self, routing: Routing | None = None, union_ratio: float | None = None) -> FFNCost:
        self._refuse_dials(routing or Routing())
        return self.experts.cost(1, self.router.weight.numel())

    def _refuse_dials(self, routing: Routing) -> None:
        self._refuse(routing, *DIALS, "mode")
        self._refuse_backend(routing)

    def _within_capacity(self, expert_T1: Tensor) -> Tensor:
        """Which tokens find a place, shape (T, 1); those before them in the batch go first."""
        assert self.capacity_factor is not None
        capacity = math.ceil(expert_T1.shape[0] / self.num_experts * self.capacity_factor)
        experts = torch.arange(self.num_experts, device=expert_T1.device)
        place_TE = (expert_T1 == experts).cumsum(dim=0)
        return place_TE.gather(1, expert_T1) <= capacity
