"""A layer's call for few tokens, which decoding makes again and again.

Which kernels run it and with what arguments is asked once and remembered: at one token the questions take as long as
reading a megabyte of weights does. What the answers hang on is compared in every call.
"""

import os
from itertools import chain
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from infmoe.layers.base import FFNOutput
from infmoe.layers.linear import affine, is_hooked
from infmoe.layers.metrics import RoutingStats
from infmoe.layers.router import GaussianRouter
from infmoe.layers.routing import Routing
from infmoe.ops.coordinates import NoiseCoordinates
from infmoe.ops.masked_ffn import few_tokens, fused
from infmoe.ops.tracing import ENVIRONMENT

_REMEMBERED = 64  # settings, of one layer; with more all are forgotten
_SAID = attrgetter(
    *("num_samples", "keep_ratio", "score_cut", "score_mass", "min_sigma_to_mu", "num_experts_per_tok", "mode"),
    *("max_stats_tokens", "backend"),
)
_OPTIONS = attrgetter(
    *("num_samples", "keep_ratio", "trained_keep_ratio", "routing_mode", "selection", "mask_scale", "score_dtype"),
    *("hidden_act", "router.sigma_activation", "router.min_sigma", "router.max_sigma"),
)


class FewTokenCall(NamedTuple):
    """How to run one setting: in one operator, or in one up to the mask.

    Attributes:
        backend: "sparse", whose operator returns the layer's output, or "fused", whose operator returns the mask.
        given: what the operator is given.
        ffn: the weights.
        hidden_act: the activation's name.
    """

    backend: str
    given: few_tokens.Route
    ffn: few_tokens.FFN
    hidden_act: str

    def __call__(self, x_BTD: Tensor, key: NoiseCoordinates) -> FFNOutput:
        """The layer's output; `key` is its noise's (see `ops.noise.noise_key`)."""
        out_BTX, counts_U, union, overlap, sigma, sigma_to_mu, tokens, zero = few_tokens.route(x_BTD, key, self.given)
        stats = RoutingStats(tokens, counts_U, union, overlap, sigma, sigma_to_mu, dropped=zero)
        if self.backend == "sparse":
            return FFNOutput(out_BTX, zero, stats)
        w1_FD, b1_F, w3_FD, b3_F, w2_DF, b2_D = self.ffn
        pre_BTF = few_tokens.linear(x_BTD, w1_FD, None)
        gate_BTF = None if w3_FD is None else few_tokens.linear(x_BTD, w3_FD, None)
        y_BTD = fused.gated_linear(pre_BTF, b1_F, gate_BTF, b3_F, out_BTX, w2_DF, b2_D, self.hidden_act)
        return FFNOutput(y_BTD, zero, stats)


def usual_maps(router: GaussianRouter, w_z: Module, x_BTD: Tensor, *, sampled: bool) -> few_tokens.RouterMaps | None:
    """The maps from x to the scores, where they are as the operators take them: plain, of x's type, for few rows.

    Args:
        router, w_z: the layer's.
        x_BTD: its input.
        sampled: whether sigma's map is among them; z = mu has no use for it.
    """
    mu, scores = affine(router.mu), affine(w_z)
    if mu is None or scores is None or router.hidden is not None or is_hooked(router):
        return None
    if not few_tokens.few_rows(x_BTD, mu[0]):
        return None
    if not sampled:
        return few_tokens.RouterMaps(*mu, None, None, *scores)
    sigma = affine(router.sigma)
    if sigma is None or sigma[0].dtype != x_BTD.dtype or not sigma[0].is_contiguous():
        return None
    return few_tokens.RouterMaps(*mu, *sigma, *scores)


class Lookup(NamedTuple):
    """What `CallMemory.find` found.

    Attributes:
        call: how it was run before; None: not in one operator, or not known.
        setting, state: what `CallMemory.keep` is to remember a new one by; taken before anything of the layer was
            read, so that what changes meanwhile shows.
    """

    call: FewTokenCall | None
    setting: tuple
    state: "State"


class CallMemory:
    """The calls that a layer has made, by setting, as long as the layer stays as it was. A copy of it is empty."""

    def __init__(self) -> None:
        self._calls: dict[tuple, Lookup] = {}

    def __reduce__(self):
        return CallMemory, ()

    def find(self, layer: Any, x_BTD: Tensor, routing: Routing) -> Lookup | None:
        """What is known of this setting; None for calls that are not remembered: of many tokens, with gradients."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not x_BTD.is_cpu:
            return None
        num_tokens = x_BTD.shape[0] * x_BTD.shape[1]
        if type(num_tokens) is not int or num_tokens > few_tokens.MAX_ROWS or torch.is_autocast_enabled("cpu"):
            return None
        surroundings = os.environ.get(ENVIRONMENT), torch.get_num_threads()
        setting = (x_BTD.shape, x_BTD.dtype, _SAID(routing), *surroundings)
        known = self._calls.get(setting)
        if known is not None:
            call = known.call
            if known.state.holds(layer) and (call is None or few_tokens.copies_hold(call.ffn, call.given)):
                return known
        state = State(layer)
        if any(not other.state.holds(layer) for other in self._calls.copy().values()):
            self._calls.clear()  # what has changed is not kept alive
        return Lookup(None, setting, state)

    def keep(self, found: Lookup, call: FewTokenCall | None) -> None:
        """Remember how a setting is run."""
        if not found.state.can_be_told_apart:
            return
        if len(self._calls) >= _REMEMBERED:
            self._calls.clear()
        self._calls[found.setting] = Lookup(call, found.setting, found.state)


class State:
    """What a call finds of its layer: options, linear maps and their weights.

    Attributes:
        can_be_told_apart: whether a change of the weights would show: those without a version or an address may change
            unseen, and so may what the operators are given a copy of, but for W2's.
    """

    def __init__(self, layer: Any) -> None:
        router = layer.router
        maps = [m for m in (router.mu, router.sigma, layer.w_z, layer.w1, layer.w3, layer.w2) if m is not None]
        self._called = [router, *maps]
        self._options = _OPTIONS(layer)
        self._tables = [layer._modules, router._modules, *(m._parameters for m in maps)]
        self._entries = self._listed()
        self._weights = [entry for entry in self._entries if isinstance(entry, Tensor)]
        w2 = getattr(layer.w2, "weight", None)
        self.can_be_told_apart = all(
            type(w) in (Tensor, Parameter) and not w.is_inference() and (w is w2 or w.is_contiguous())
            for w in self._weights
        )
        self._versions = self._seen() if self.can_be_told_apart else []

    def _listed(self) -> list:
        return list(chain.from_iterable(map(dict.values, self._tables)))

    def _seen(self) -> list:
        """Versions, and addresses: `Module.to` puts other data into the same parameter, of the same version."""
        return [w._version for w in self._weights] + [w.data_ptr() for w in self._weights]

    def holds(self, layer: Any) -> bool:
        """Whether nothing has changed that the layer's modules show."""
        entries = self._listed()
        return (
            layer._modules is self._tables[0]
            and len(entries) == len(self._entries)
            and all(map(is_, entries, self._entries))
            and not any(map(is_hooked, self._called))
            and self._seen() == self._versions
            and _OPTIONS(layer) == self._options
        )
