"""Which dials each step trains at, and what its passes learn from: `ElasticConfig` at work.

A step's passes are a function of (seed, step), so that a resumed run and every process draw the same.

B rows, T tokens, V vocabulary.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from infmoe.errors import InfMoEError
from infmoe.hf import InfMoEConfig
from infmoe.layers import MoEFFN, PerLayer, Routing, ffn_class
from infmoe.train.config import ElasticConfig

_OTHER_NOISE = 0x5DEECE66D  # what the seed of a second draw of the noise is combined with
_MAX_ENTRIES = 2**24  # of a distribution at once, 64 MiB in float32
_STREAM = 0xE1A57  # keeps these draws apart from others of the same seed and step


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass over the batch.

    Attributes:
        dials: of its routing, over the model's own.
        teaches: later passes of the step learn from its distribution.
        text: it learns from the text.
        taught: weight of the divergence from the teacher's distribution.
        other_noise: its router's noise is not that of the step's other passes.
        weight: of its loss; the step's loss is the weighted mean over its passes.
    """

    dials: dict[str, Any]
    teaches: bool = False
    text: bool = True
    taught: float = 0.0
    other_noise: bool = False
    weight: float = 1.0

    def routing(self, routing: Routing) -> Routing:
        """The batch's routing with this pass's dials and noise."""
        key = routing.key
        if self.other_noise:
            assert key is not None
            assert isinstance(key.seed, int)
            key = dataclasses.replace(key, seed=key.seed ^ _OTHER_NOISE)
        return dataclasses.replace(routing, key=key, **self.dials)


def set_elastic(model: nn.Module, on: bool) -> None:
    """Let the layers that train elastically by themselves (Elastic MoE) do so, or not yet."""
    for module in model.modules():
        if isinstance(module, MoEFFN):
            module.is_elastic = on


def passes(config: ElasticConfig, *, seed: int, step: int, num_layers: int) -> list[Pass]:
    """The passes of one elastic step, the teacher first."""
    if config.rule == "sandwich":
        largest = {name: max(values) for name, values in config.lists.items()}
        smallest = {name: min(values) for name, values in config.lists.items()}
        others = [smallest, *_draw(config, seed, step, num_layers, config.between)]
        taught = 1.0 if config.distill else 0.0
        return [
            Pass(largest, teaches=config.distill),
            *(Pass(dials, text=not config.distill, taught=taught, weight=config.others_weight) for dials in others),
        ]
    (dials,) = _draw(config, seed, step, num_layers, 1)
    if not config.consistency_weight:
        return [Pass(dials)]
    return [Pass(dials, teaches=True), Pass(dials, taught=config.consistency_weight, other_noise=True)]


def _draw(config: ElasticConfig, seed: int, step: int, num_layers: int, count: int) -> list[dict[str, Any]]:
    """`count` settings, every value of a list equally likely."""
    generator = np.random.default_rng(np.random.SeedSequence((seed, step, _STREAM)))
    settings = []
    for _ in range(count):
        setting: dict[str, Any] = {}
        for name, values in config.lists.items():
            if config.per == "layer":
                setting[name] = PerLayer([values[i] for i in generator.integers(len(values), size=num_layers)])
            else:
                setting[name] = values[generator.integers(len(values))]
        settings.append(setting)
    return settings


def divergence(teacher_BTV: Tensor, student_BTV: Tensor) -> Tensor:
    """KL(teacher || student) in nats per token, over the positions that predict a token of the row.

    Args:
        teacher_BTV: logits, taken as they are: no gradient reaches them.
        student_BTV: logits.

    Distributions are made for a few positions at a time, and again in the backward pass: at a vocabulary of 50,257 two
    of them in float32 would take more memory than the rest of the step.
    """
    teacher_NV = teacher_BTV.detach()[:, :-1].flatten(0, 1)
    student_NV = student_BTV[:, :-1].flatten(0, 1)
    positions = max(1, _MAX_ENTRIES // teacher_NV.shape[1])
    parts = [
        checkpoint(_summed_divergence, *pair, use_reentrant=False)
        for pair in zip(teacher_NV.split(positions), student_NV.split(positions), strict=True)
    ]
    return torch.stack(parts).sum() / len(teacher_NV)


def _summed_divergence(teacher_PV: Tensor, student_PV: Tensor) -> Tensor:
    target, learnt = (logits.float().log_softmax(dim=-1) for logits in (teacher_PV, student_PV))
    return F.kl_div(learnt, target, log_target=True, reduction="sum")


def check_elastic(config: ElasticConfig, model_config: InfMoEConfig) -> None:
    """Raise where the model can't train at these dials.

    Raises:
        InfMoEError: a dial that the variant does not have, a value that it does not take, noise where the router
            draws none, or as many experts as Elastic MoE draws from.
    """
    with torch.device("meta"):
        layer = ffn_class(model_config.ffn).from_config(model_config)
    for name, values in config.lists.items():
        for value in values:
            try:
                layer.cost(Routing(**{name: value}))  # the layer refuses what it cannot run
            except InfMoEError as error:
                raise InfMoEError(f"elastic.{name}: {error}") from error
    ideal, most = model_config.ideal_experts_per_tok, max(config.num_experts_per_tok or (0,))
    if ideal is not None and ideal <= most:
        raise InfMoEError(
            f"elastic.num_experts_per_tok: at {most}, Elastic MoE draws nothing of the {ideal} best: give values below "
            f"{ideal}, or a model.ideal_experts_per_tok above {most}"
        )
    by_itself = model_config.ideal_experts_per_tok is not None or model_config.hierarchical_loss_weight
    if config.start and not (config.lists or config.consistency_weight or by_itself):
        raise InfMoEError("elastic.start puts nothing off: set what is to begin then, e.g. elastic.keep_ratio")
    if config.num_samples is not None and model_config.routing_mode == "mu":
        raise InfMoEError("elastic.num_samples needs a router that draws: this model's routing_mode is 'mu'")
    if config.consistency_weight and not model_config.draws():
        raise InfMoEError("elastic.consistency_weight compares draws of the router's noise: this model draws none")
