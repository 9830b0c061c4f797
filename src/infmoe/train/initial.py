"""The weights that a run starts from: drawn by its seed, or those of a trained model."""

import dataclasses
from typing import Any

import torch
from torch import nn

from infmoe.data import TokenData
from infmoe.errors import InfMoEError
from infmoe.eval.loading import Opened, open_model
from infmoe.hf import InfMoEConfig, InfMoEForCausalLM
from infmoe.layers.routing import DIALS

_DIALS = {*DIALS, "trained_keep_ratio", "trained_experts_per_tok"}  # they change no weight's shape
_WITHOUT_BEARING = {"bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "initializer_range"}


def open_initial(folder: str, model_config: InfMoEConfig, data: TokenData) -> Opened:
    """The model that a run starts from.

    Args:
        folder: a run (its newest checkpoint that verifies), a checkpoint, or a saved model.
        model_config: the run's own model.
        data: what the run trains on.

    Raises:
        InfMoEError: nothing usable there, weights that do not fit the run's model (names the settings that would
            make it fit), or another tokenizer than the data's.
    """
    opened = open_model(folder, device="cpu", dtype="float32")
    differing = _differing(opened.model.config, model_config)
    with torch.device("meta"):
        ours = InfMoEForCausalLM(model_config)
    if _shapes(opened.model) != _shapes(ours):
        remedy = " ".join(
            f"--set model.{name}={theirs}" for name, (theirs, _) in differing.items() if name not in _DIALS
        )
        if "ffn" in differing:
            remedy = f"take a recipe of the variant {opened.model.config.ffn!r}"
        raise InfMoEError(f"the weights in {opened.checkpoint} do not fit this run's model: {remedy}")
    opened.data(data.folder)
    return opened


def describe_start(opened: Opened, model_config: InfMoEConfig) -> str:
    """One line: where the weights come from, and in what the run's model differs from that one."""
    differing = _differing(opened.model.config, model_config)
    changes = ", ".join(f"{name} {theirs} -> {ours}" for name, (theirs, ours) in differing.items())
    return f"starting from the weights in {opened.checkpoint}" + (f"; the model changes: {changes}" if changes else "")


def _differing(theirs: InfMoEConfig, ours: InfMoEConfig) -> dict[str, tuple[Any, Any]]:
    """Settings of the two models that differ: name -> theirs, ours."""
    own = type(ours).__annotations__
    names = [f.name for f in dataclasses.fields(ours) if f.name in own and f.name not in _WITHOUT_BEARING]
    pairs = {name: (getattr(theirs, name), getattr(ours, name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
