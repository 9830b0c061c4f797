"""GPT-2's block around any of the feed-forward layers.

B batch rows, T new tokens, S tokens that they may look at (cached ones and themselves), D model width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from infmoe.hf.configuration_infmoe import InfMoEConfig
from infmoe.layers import FFNOutput, Routing, RoutingStats, ffn_class
from infmoe.layers.linear import Linear


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """softmax(q k^T * scaling + mask) v, the plain form.

    Args:
        module: the attention; only its `training` is looked at.
        query: (B, heads, T, dim).
        key, value: (B, heads, S, dim).
        attention_mask: added to the scores, so 0 where a token may look and a large negative number elsewhere;
            broadcasts to (B, heads, T, S). None: every token may look everywhere.
        scaling: factor on the scores.
        dropout: probability that a weight is dropped, in train mode.
        **kwargs: what other forms of attention take; not looked at.

    Returns:
        The output, (B, T, heads, dim), and the weights, (B, heads, T, S).
    """
    weights = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1).to(value.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


class Dropout(nn.Dropout):
    """`torch.nn.Dropout`, but that nothing is called where nothing is dropped: there are two a layer in every token."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if self.training and self.p > 0 else input


class InfMoEAttention(nn.Module):
    """GPT-2's causal self-attention."""

    def __init__(self, config: InfMoEConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.c_attn = Linear(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = Linear(config.hidden_size, config.hidden_size)
        self.resid_dropout = Dropout(config.resid_pdrop)

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            hidden_states: (B, T, D).
            past_key_values: the cache, which the new keys and values are added to.
            attention_mask: as the configured form of attention takes it; see `eager_attention_forward`.
            **kwargs: passed to it.

        Returns:
            The output, (B, T, D), and the attention weights, (B, heads, T, S); None where the form has none.
        """
        B, T, D = hidden_states.shape
        heads = self.c_attn(hidden_states).view(B, T, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind(0)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attn_pdrop if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        output = self.c_proj(output.reshape(B, T, D).contiguous())
        return self.resid_dropout(output), weights


class InfMoEBlock(GradientCheckpointingLayer):
    """Pre-norm attention and feed-forward, each with its residual."""

    def __init__(self, config: InfMoEConfig, layer_idx: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = InfMoEAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = ffn_class(config.ffn).from_config(config, layer_idx)
        self.resid_dropout = Dropout(config.resid_pdrop)

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: Cache | None,
        attention_mask: Tensor | None,
        routing: Routing,
        **kwargs,
    ) -> tuple[Tensor, Tensor, RoutingStats]:
        """Run attention and feed-forward layer.

        Args:
            hidden_states: (B, T, D).
            past_key_values, attention_mask, **kwargs: see `InfMoEAttention.forward`.
            routing: of the feed-forward layer.

        Returns:
            The hidden states, (B, T, D), the layer's auxiliary loss, 0-d float32, and its routing statistics.
        """
        attended, _ = self.attn(self.ln_1(hidden_states), past_key_values, attention_mask, **kwargs)
        hidden_states = hidden_states + attended
        ffn: FFNOutput = self.mlp(self.ln_2(hidden_states), routing)
        return hidden_states + self.resid_dropout(ffn.y_BTD), ffn.aux_loss, ffn.stats
