"""What a whole model costs: parameters in both accountings, FLOPs and weights per token."""

from dataclasses import asdict, dataclass

import torch

from infmoe.hf.configuration_infmoe import InfMoEConfig
from infmoe.hf.modeling_infmoe import InfMoEForCausalLM
from infmoe.layers import ConditionalFFN, FFNCost, Routing

_FLOAT32_BYTES = 4


@dataclass(frozen=True)
class ModelCost:
    """Counts of one model under one routing; FLOPs are forward, per token, 2 x multiply-adds.

    Attributes:
        total, active: parameters in the paper's accounting (Table 1): W_z and a discrete router's map left
            out, K*r of the FFN active.
        total_with_wz: every parameter there is.
        active_with_wz: the paper's active parameters plus W_z and the discrete router's map.
        active_union: used per token when the union of the K masks is counted (see `FFNCost`).
        ffn_flops_executed, ffn_flops_ideal, ffn_flops_router: the FFN layers alone.
        flops_executed, flops_ideal: with attention at half the context and the output layer.
        weights_executed, weights_ideal: weights read for one token at batch 1.
        bytes_executed, bytes_ideal: the same in bytes, float32; half of it in bfloat16.
    """

    total: int
    active: int
    total_with_wz: int
    active_with_wz: int
    active_union: int
    ffn_flops_executed: int
    ffn_flops_ideal: int
    ffn_flops_router: int
    flops_executed: int
    flops_ideal: int
    weights_executed: int
    weights_ideal: int
    bytes_executed: int
    bytes_ideal: int

    def as_dict(self) -> dict[str, int]:
        """The counts by name."""
        return asdict(self)


def model_cost(
    config: InfMoEConfig, routing: Routing | None = None, union_ratios: tuple[float, ...] | None = None
) -> ModelCost:
    """Count without allocating: the model is built on the meta device.

    Args:
        config: the model.
        routing: None: the config's dials.
        union_ratios: measured union of the K masks, one per layer; None: independent masks.

    Raises:
        InfMoEError: a dial that the variant does not have.
    """
    with torch.device("meta"):
        model = InfMoEForCausalLM(config)
    layers: list[ConditionalFFN] = [block.mlp for block in model.transformer.h]  # type: ignore[misc]
    ratios = union_ratios or (None,) * len(layers)
    costs = [layer.cost(routing, ratio) for layer, ratio in zip(layers, ratios, strict=True)]
    ffn: FFNCost = sum(costs[1:], costs[0])
    params = model.num_parameters()
    backbone = params - ffn.params
    # a lookup reads one row of each table; with tied embeddings the output layer reads the whole of wte
    lookups = (0 if config.tie_word_embeddings else config.vocab_size - 1) + config.max_position_embeddings - 1
    read_always = backbone - lookups * config.hidden_size
    width, depth = config.hidden_size, config.num_hidden_layers
    attention = depth * (2 * 4 * width * width + 2 * 2 * width * config.max_position_embeddings // 2)
    other_flops = attention + 2 * width * config.vocab_size
    return ModelCost(
        total=backbone + ffn.total,
        active=backbone + ffn.active_params,
        total_with_wz=params,
        active_with_wz=backbone + ffn.active_params + ffn.params_wz + ffn.params_discrete_router,
        active_union=backbone + ffn.active_params_union,
        ffn_flops_executed=ffn.flops_executed,
        ffn_flops_ideal=ffn.flops_ideal,
        ffn_flops_router=ffn.flops_router,
        flops_executed=other_flops + ffn.flops_executed,
        flops_ideal=other_flops + ffn.flops_ideal,
        weights_executed=read_always + ffn.weights_executed,
        weights_ideal=read_always + ffn.weights_ideal,
        bytes_executed=_FLOAT32_BYTES * (read_always + ffn.weights_executed),
        bytes_ideal=_FLOAT32_BYTES * (read_always + ffn.weights_ideal),
    )
