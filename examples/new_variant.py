"""Plug in a feed-forward layer of your own: one class and one registry line."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from infmoe import InfMoEConfig, InfMoEForCausalLM, Routing
from infmoe.layers import FFN_CLASSES, ConditionalFFN, FFNCost, FFNOutput, Init
from infmoe.layers.metrics import uniform_stats


class LinearFFN(ConditionalFFN):
    """y = W2 W1 x: a feed-forward layer without an activation, to see what the activation is worth."""

    def __init__(self, hidden_size: int, intermediate_size: int, **shared):
        super().__init__(hidden_size, intermediate_size, **shared)
        self.w1 = nn.Linear(hidden_size, intermediate_size)
        self.w2 = nn.Linear(intermediate_size, hidden_size)
        self.reset_parameters()

    def inits(self) -> Iterable[Init]:
        for linear in (self.w1, self.w2):
            yield Init(linear.weight, 0.0, self.initializer_range)
            yield Init(linear.bias, 0.0, 0.0)

    def forward(self, x_BTD: Tensor, routing: Routing | None = None) -> FFNOutput:
        tokens = x_BTD.numel() // self.hidden_size
        no_loss = torch.zeros((), device=x_BTD.device)
        return FFNOutput(self.w2(self.w1(x_BTD)), no_loss, uniform_stats(tokens, self.intermediate_size, x_BTD.device))

    def cost(self, routing: Routing | None = None, union_ratio: float | None = None) -> FFNCost:
        params, flops = self.num_params(), 4 * self.hidden_size * self.intermediate_size
        return FFNCost(params, 0, 0, params, params, flops, flops, 0, params, params)


FFN_CLASSES["linear"] = LinearFFN
config = InfMoEConfig(
    ffn="linear",
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
)
tokens = torch.arange(16)[None]
print("loss of an untrained model:", InfMoEForCausalLM(config)(tokens, labels=tokens).loss.item())
