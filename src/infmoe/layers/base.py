"""The interface that every feed-forward variant has.

B batch rows, T tokens, D model width, F neurons.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from infmoe.errors import InfMoEError
from infmoe.layers.metrics import RoutingStats
from infmoe.layers.routing import Routing


class FFNOutput(NamedTuple):
    """What a feed-forward layer returns.

    Attributes:
        y_BTD: the layer's output, in the input's dtype (or autocast's).
        aux_loss: 0-d float32, to be added to the training loss; already weighted; 0 where there is none.
        stats: sums that describe the routing; they carry no gradient.
    """

    y_BTD: Tensor
    aux_loss: Tensor
    stats: RoutingStats


@dataclass(frozen=True)
class FFNCost:
    """What one layer costs under one routing; FLOPs are 2 x multiply-adds, forward, per token.

    Attributes:
        params: every parameter.
        params_wz: those of W_z, which the paper's accounting leaves out.
        params_discrete_router: those of a discrete router's map, which it leaves out too.
        active_params: used per token in the paper's accounting: K*r of the neurons, no W_z and no discrete
            router.
        active_params_union: used per token when counted honestly: the union of the K masks, W_z and routers.
        flops_executed: what the paths run that skip no neuron, router included.
        flops_ideal: what a path that runs only the union would run, router included.
        flops_router: the part of both that chooses: router maps and W_z z (per sample).
        weights_executed, weights_ideal: weights read for one token at batch 1; times bytes per weight.
    """

    params: int
    params_wz: int
    params_discrete_router: int
    active_params: int
    active_params_union: int
    flops_executed: int
    flops_ideal: int
    flops_router: int
    weights_executed: int
    weights_ideal: int

    def __add__(self, other: "FFNCost") -> "FFNCost":
        return FFNCost(*(a + b for a, b in zip(_values(self), _values(other), strict=True)))

    @property
    def total(self) -> int:
        """Parameters in the paper's accounting."""
        return self.params - self.params_wz - self.params_discrete_router


def _values(cost: FFNCost) -> tuple[int, ...]:
    return tuple(cost.__dict__.values())


class Init(NamedTuple):
    """How one tensor starts: normal with this mean and standard deviation (constant where std is 0)."""

    tensor: Tensor
    mean: float
    std: float


class ConditionalFFN(nn.Module, ABC):
    """A feed-forward layer whose work may depend on the token. Subclasses are final.

    Every option is a keyword argument of the subclass's `__init__`, under the name that the model's config
    has for it: `from_config` passes those that the config holds.

    In a model of your own, do for the router's noise what `InfMoEModel` does: give each layer its own `layer_index`,
    as layers of one index draw the same noise in eval mode; and where a sequence comes in parts (decoding), give each
    call its positions, `Routing(key=NoiseKey(position=...))`, as it counts them from 0 otherwise.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        layer_index: int = 0,
        initializer_range: float = 0.02,
        residual_init_scale: float = 1.0,
    ):
        """Store what every variant shares.

        Args:
            hidden_size: D.
            intermediate_size: total neurons of the layer in parameters of a plain FFN: all experts together;
                a gated activation gets 2/3 of it, so that the parameters stay equal.
            layer_index: the layer's place in the model, which its noise depends on.
            initializer_range: standard deviation that weights start with (GPT-2: 0.02).
            residual_init_scale: factor on the output projection's (GPT-2: 1 / sqrt(2 * layers)).
        """
        super().__init__()
        if hidden_size < 1 or intermediate_size < 1:
            raise InfMoEError(
                f"hidden_size and intermediate_size must be positive, got {hidden_size} and {intermediate_size}"
            )
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.layer_index = layer_index
        self.initializer_range = initializer_range
        self.residual_init_scale = residual_init_scale

    @classmethod
    def option_defaults(cls) -> dict[str, Any]:
        """The variant's own options with their defaults (what `ConditionalFFN` shares left out)."""
        shared = inspect.signature(ConditionalFFN.__init__).parameters
        own = inspect.signature(cls.__init__).parameters
        return {name: p.default for name, p in own.items() if name not in shared and p.kind is p.KEYWORD_ONLY}

    @classmethod
    def from_config(cls, config: Any, layer_index: int = 0) -> "ConditionalFFN":
        """Build from any object whose attributes are named like the options (`InfMoEConfig`).

        Of an option with one value for each layer, a tuple, it takes this layer's.
        The output projection starts smaller by 1 / sqrt(2 * num_hidden_layers), as in GPT-2.
        """
        options = {name: getattr(config, name) for name in cls.option_defaults()}
        options = {name: v[layer_index] if isinstance(v, tuple) else v for name, v in options.items()}
        return cls(
            config.hidden_size,
            config.intermediate_size,
            layer_index=layer_index,
            initializer_range=config.initializer_range,
            residual_init_scale=(2 * config.num_hidden_layers) ** -0.5,
            **options,
        )

    @abstractmethod
    def forward(self, x_BTD: Tensor, routing: Routing | None = None) -> FFNOutput:
        """Apply the layer.

        Args:
            x_BTD: input; (T, D) is taken as one row.
            routing: dials, mode and noise key; None: the layer's defaults.

        Raises:
            InfMoEError: a dial that this variant does not have, or a value that does not fit the batch.
        """

    @abstractmethod
    def inits(self) -> Iterable[Init]:
        """How every parameter starts; covers all of them."""

    @abstractmethod
    def cost(self, routing: Routing | None = None, union_ratio: float | None = None) -> FFNCost:
        """Parameters, FLOPs and weights read under `routing` (one value per dial, not one per row).

        Args:
            routing: None: the layer's defaults.
            union_ratio: measured share of neurons in the union of the K masks; None: independent masks,
                1 - (1 - r)^K.
        """

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start every parameter anew, as `inits` says."""
        for tensor, mean, std in self.inits():
            if std:
                nn.init.normal_(tensor, mean, std)
            else:
                nn.init.constant_(tensor, mean)

    def freeze(self) -> None:
        """Freeze what the options say does not train; for loaders that replace the parameters by new ones."""

    def num_params(self) -> int:
        """Every parameter of the layer, W_z and routers included."""
        return sum(p.numel() for p in self.parameters())

    def _refuse(self, routing: Routing, *dials: str) -> None:
        """Raise if `routing` sets one of `dials`, which this variant does not have."""
        for dial in dials:
            if getattr(routing, dial) is not None:
                raise InfMoEError(f"{type(self).__name__} has no dial {dial!r}: leave it out")

    def _refuse_backend(self, routing: Routing) -> None:
        """Raise if `routing` names a backend; for variants that have none to choose from."""
        if routing.backend is not None:
            raise InfMoEError(f"{type(self).__name__} has no backends: leave backend={routing.backend!r} out")
