"""The weights that a run starts from: drawn by its seed, or those of a trained model."""

import dataclasses
import json
from typing import Any

import torch
from torch import nn

from infmoe.data import TokenData
from infmoe.errors import InfMoEError
from infmoe.eval.loading import Opened, open_model
from infmoe.hf import InfMoEConfig, InfMoEForCausalLM

# What the weights' shapes hang on, and how attention splits them, which no shape shows
_SHAPE = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("max_position_embeddings", "hidden_act", "z_dim", "router_hidden_size", "sigma_activation", "block_size"),
    *("wz_bias", "num_experts", "expert_router", "tie_word_embeddings"),
)
_IDLE = {"bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "initializer_range"}  # no word about these


def open_initial(folder: str, model_config: InfMoEConfig, data: TokenData | None) -> Opened:
    """The model that a run starts from.

    Args:
        folder: a run (its newest checkpoint that verifies), a checkpoint, or a saved model, with its tokenizer.
        model_config: the run's own model.
        data: what the run trains on; None: not known yet.

    Raises:
        InfMoEError: nothing usable there, weights that do not fit the run's model (names the settings that would
            make it fit), or no tokenizer, or another one than the data's.
    """
    opened = open_model(folder, device="cpu", dtype="float32")
    theirs = opened.model.config
    with torch.device("meta"):
        ours = InfMoEForCausalLM(model_config)
    untied = model_config.tie_word_embeddings and not theirs.tie_word_embeddings  # which of the two would be lost
    if theirs.ffn != model_config.ffn:
        raise _misfit(opened, f"take a recipe of the variant {theirs.ffn!r}")
    if (
        _shapes(opened.model) != _shapes(ours)
        or theirs.num_attention_heads != ours.config.num_attention_heads
        or untied
    ):
        differing = [name for name in _SHAPE if getattr(theirs, name) != getattr(model_config, name)]
        raise _misfit(opened, " ".join(f"--set model.{name}={json.dumps(getattr(theirs, name))}" for name in differing))
    opened.tokenizer()  # refuses where there is none: ids of another would be other words
    if data is not None:
        opened.data(data.folder)
    return opened


def _misfit(opened: Opened, remedy: str) -> InfMoEError:
    return InfMoEError(f"the weights in {opened.checkpoint} do not fit this run's model: {remedy}")


def describe_start(opened: Opened, model_config: InfMoEConfig) -> str:
    """One line: where the weights come from, and in what the run's model differs from that one."""
    differing = _differing(opened.model.config, model_config)
    changes = ", ".join(f"{name} {theirs} -> {ours}" for name, (theirs, ours) in differing.items())
    return f"starting from the weights in {opened.checkpoint}" + (f"; the model changes: {changes}" if changes else "")


def _differing(theirs: InfMoEConfig, ours: InfMoEConfig) -> dict[str, tuple[Any, Any]]:
    """Settings of the two models that differ: name -> theirs, ours."""
    own = type(ours).__annotations__
    names = [f.name for f in dataclasses.fields(ours) if f.name in own and f.name not in _IDLE]
    pairs = {name: (getattr(theirs, name), getattr(ours, name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
