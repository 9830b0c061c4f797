"""What a run would be, without running it."""

import dataclasses
import json
from typing import TYPE_CHECKING

from infmoe.train.config import RunConfig, hf_config

if TYPE_CHECKING:
    from infmoe.hf import InfMoEConfig


def describe(config: RunConfig) -> str:
    """The resolved configuration as JSON, then parameters, FLOPs and the batch's make-up.

    Raises:
        InfMoEError: the model can't train at the dials that change, or start from the weights named.
    """
    from infmoe.hf import model_cost
    from infmoe.train.elastic import check_elastic
    from infmoe.train.initial import describe_start, open_initial

    model_config = hf_config(config)
    check_elastic(config.elastic, model_config)
    start = [] if config.init is None else [describe_start(open_initial(config.init, model_config, None), model_config)]
    cost = model_cost(model_config)
    resolved = config.to_dict()
    resolved["model"] = {
        field.name: value
        for field in dataclasses.fields(model_config)
        # without what every transformers config inherits
        if field.name in type(model_config).__annotations__ and (value := getattr(model_config, field.name)) is not None
    }
    rows = [
        ("parameters", f"{cost.total:,}", f"with W_z and discrete routers {cost.total_with_wz:,}"),
        ("active per token", f"{cost.active:,}", f"with W_z and discrete routers {cost.active_with_wz:,}"),
        (
            "forward FLOPs per token",
            f"{cost.flops_executed:,}",
            f"{cost.flops_ideal:,} if only the masks' union ran",
        ),
        ("FFN part of it", f"{cost.ffn_flops_executed:,}", f"{cost.ffn_flops_ideal:,} likewise"),
        (
            "batch",
            f"{config.batch_tokens:,} tokens",
            f"{config.batch_rows} rows of {config.window}; a process takes {config.micro_batch_size} at once",
        ),
        ("run", f"{config.steps * config.batch_tokens:,} tokens", f"{config.steps:,} steps"),
        ("passes over a token", f"{config.mean_passes:.3g}", _elastic_from(config)),
    ]
    return "\n".join(
        [
            json.dumps(resolved, indent=2),
            "",
            *(f"{name:<24}{value:>20}   {note}" for name, value, note in rows),
            *start,
            *remarks(config, model_config),
        ]
    )


def remarks(config: RunConfig, model_config: "InfMoEConfig") -> list[str]:
    """What may be trained, but is hardly meant: a line for each."""
    dials = (model_config.num_experts_per_tok, model_config.trained_experts_per_tok)
    norm, layers = model_config.gate_norm, model_config.num_hidden_layers
    of_layers = zip(*(value if isinstance(value, list | tuple) else [value] * layers for value in dials), strict=True)
    constant = any(k == 1 and (norm == "selected" or (norm == "trained" and own == 1)) for k, own in of_layers)
    draws_more = max(config.elastic.num_experts_per_tok or (1,)) > 1
    routes = model_config.expert_router == "learned" and (model_config.num_experts or 0) > 1
    if routes and constant and not draws_more:
        return [
            "note: the gate of a single expert is 1 whatever the router says, so the text does not train such a "
            "layer's router; with --set model.gate_norm=all it does"
        ]
    return []


def _elastic_from(config: RunConfig) -> str:
    return (
        f"elastic training begins after {config.plain_steps:,} steps" if config.plain_steps else "forward and backward"
    )
