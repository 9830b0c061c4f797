"""A layer's call for few tokens, which decoding makes again and again.

Which kernels run it and with what arguments is asked once and remembered: at one token the questions take as long as
reading a megabyte of weights does. What the answers hang on is compared in every call.
"""

import os
from itertools import chain
from operator import attrgetter, is_
from typing import NamedTuple

import torch
from torch import Tensor, nn

from infmoe.layers.routing import Routing
from infmoe.ops import dispatch
from infmoe.ops.masked_ffn import few_tokens
from infmoe.ops.tracing import ENVIRONMENT

_REMEMBERED = 64  # settings, of one layer; with more all are forgotten
_SAID = attrgetter(
    *("num_samples", "keep_ratio", "score_cut", "num_experts_per_tok", "mode", "max_stats_tokens", "backend")
)
_OPTIONS = attrgetter(
    *(
        "num_samples",
        "keep_ratio",
        "trained_keep_ratio",
        "routing_mode",
        "selection",
        "mask_scale",
        "score_dtype",
        "hidden_act",
    ),
    *("router.sigma_activation", "router.min_sigma", "router.max_sigma"),
)


class FewTokenCall(NamedTuple):
    """How to run one setting.

    Attributes:
        backend: "sparse", whose operator returns the layer's output, or "fused", whose operator returns the mask.
        given: what the operator is given.
        ffn: the weights.
    """

    backend: str
    given: few_tokens.Route
    ffn: few_tokens.FFN


class CallMemory:
    """The calls that a layer has made, by setting, as long as the layer stays as it was. A copy of it is empty."""

    def __init__(self) -> None:
        self._calls: dict[tuple, FewTokenCall] = {}
        self._state: _State | None = None

    def __reduce__(self):
        return CallMemory, ()

    def find(self, layer: nn.Module, x_BTD: Tensor, routing: Routing) -> FewTokenCall | None:
        """The call that this input and routing made before, if nothing has changed since."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return None
        call = self._calls.get(_setting(x_BTD, routing))
        if call is None or not x_BTD.is_cpu:
            return None
        assert self._state is not None
        if self._state.holds(layer) and few_tokens.copies_hold(call.ffn, call.given):
            return call
        self._calls.clear()
        return None

    def keep(self, layer: nn.Module, x_BTD: Tensor, routing: Routing, call: FewTokenCall) -> None:
        """Remember a call."""
        if any(p.is_inference() for p in layer.parameters()):
            return  # those have no version to tell a change by
        if self._state is None or not self._state.holds(layer) or len(self._calls) >= _REMEMBERED:
            self._calls.clear()
            self._state = _State(layer)
        self._calls[_setting(x_BTD, routing)] = call


def _setting(x_BTD: Tensor, routing: Routing) -> tuple:
    """What a call is told, and what else its choices look at."""
    surroundings = (os.environ.get(ENVIRONMENT), torch.get_num_threads(), dispatch.generation())
    return x_BTD.shape, x_BTD.dtype, _SAID(routing), surroundings


class _State:
    """What a call found of its layer: options, and linear maps that are just that."""

    def __init__(self, layer) -> None:
        router = layer.router
        maps = [m for m in (router.mu, router.sigma, layer.w_z, layer.w1, layer.w3, layer.w2) if m is not None]
        called = [router, *maps]
        self._options = _OPTIONS(layer)
        self._tables = [layer._modules, router._modules, *(m._parameters for m in maps)]
        self._entries = self._listed()
        self._hooks = [
            hooks
            for m in called
            for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
        ]
        self._own = [m.__dict__ for m in called]  # a `forward` put there takes the place of the class's
        self._sizes = list(map(len, self._own))
        self._weights = [entry for entry in self._entries if isinstance(entry, Tensor)]
        self._versions = [w._version for w in self._weights]
        self._w2 = layer.w2.weight
        self._place = self._w2.data_ptr()

    def _listed(self) -> list:
        return list(chain.from_iterable(map(dict.values, self._tables)))

    def holds(self, layer) -> bool:
        """Whether nothing has changed that the layer's modules show."""
        entries = self._listed()
        return (
            not any(self._hooks)
            and len(entries) == len(self._entries)
            and all(map(is_, entries, self._entries))
            and list(map(len, self._own)) == self._sizes
            and [w._version for w in self._weights] == self._versions
            and self._w2.data_ptr() == self._place
            and _OPTIONS(layer) == self._options
        )
