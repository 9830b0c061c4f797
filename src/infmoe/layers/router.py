"""Routers: from a token to a distribution over expert indices z (Eq. 5).

B batch rows, T tokens, D model width, K samples, Z index dimensions.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Literal, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infmoe.errors import InfMoEError, unknown_name
from infmoe.layers.base import Init
from infmoe.layers.linear import Linear
from infmoe.ops import dispatch
from infmoe.ops.masked_ffn import compiled, fused

SigmaActivation = Literal["softplus", "exp", "none"]
SIGMA_ACTIVATIONS: tuple[SigmaActivation, ...] = ("softplus", "exp", "none")


class Indices(NamedTuple):
    """Expert indices and the distribution they were drawn from, all float32.

    Attributes:
        z_BTKZ: the indices.
        mu_BTZ: the distribution's mean.
        sigma_BTZ: its standard deviation; None where the router has none.
    """

    z_BTKZ: Tensor
    mu_BTZ: Tensor
    sigma_BTZ: Tensor | None


def sigma_to_mu(mu: Tensor, sigma: Tensor) -> Tensor:
    """How unsure a router is of each token: rms(sigma) / rms(mu), over the last dimension."""
    return sigma.norm(dim=-1) / mu.norm(dim=-1).clamp_min(1e-12)


class Router(nn.Module, ABC):
    """Maps tokens, and noise that somebody else made, to expert indices.

    A router draws nothing itself: it says how much noise one sample needs and maps that noise to z, so that
    batching, caching and recomputation change nothing, and other distributions fit the same layer.
    """

    z_dim: int

    @property
    @abstractmethod
    def noise_dim(self) -> int:
        """Standard normals that one sample of one token needs; 0: the router is deterministic."""

    @abstractmethod
    def forward(self, x_BTD: Tensor, noise_BTKN: Tensor | None) -> Indices:
        """Draw one z per noise sample; None: the mean, once (K = 1)."""

    @abstractmethod
    def inits(self) -> Iterable[Init]:
        """How every parameter starts."""

    @property
    @abstractmethod
    def initial_noise_variance(self) -> float:
        """Variance that the noise adds to one entry of z at the start, where mu's entries have variance 1."""

    @abstractmethod
    def num_idle_params(self, sampled: bool) -> int:
        """Parameters that a call does not use (not `sampled`: those of the spread)."""

    @abstractmethod
    def num_flops(self, sampled: bool) -> int:
        """FLOPs per token of the maps from x to the distribution (`sampled`: sigma too)."""


@final
class GaussianRouter(Router):
    """Diagonal Gaussian N(mu(x), diag(sigma(x)^2)) (Eq. 5), reparameterised: z = mu + sigma * eps.

    Deviates from the paper: it states neither the "small neural network" nor the form of sigma. Its
    parameter counts fit one linear map each, which is the default; sigma = softplus or exp, clamped.
    """

    def __init__(
        self,
        hidden_size: int,
        z_dim: int,
        *,
        router_hidden_size: int | None,
        sigma_activation: SigmaActivation,
        initial_sigma: float,
        min_sigma: float,
        max_sigma: float,
    ):
        """Build the maps.

        Args:
            hidden_size: D.
            z_dim: Z.
            router_hidden_size: width of a shared GELU layer before both maps; None: linear maps.
            sigma_activation: "softplus", "exp", or "none" (sigma = 0: z = mu, the control).
            initial_sigma: what sigma starts at, by the bias of its map.
            min_sigma, max_sigma: sigma is clamped to this range.

        Raises:
            InfMoEError: a value out of range.
        """
        super().__init__()
        if z_dim < 1:
            raise InfMoEError(f"z_dim must be at least 1, got {z_dim}")
        if router_hidden_size is not None and router_hidden_size < 1:
            raise InfMoEError(
                f"router_hidden_size must be at least 1, or None for linear maps, got {router_hidden_size}"
            )
        if sigma_activation not in SIGMA_ACTIVATIONS:
            raise unknown_name("sigma_activation", sigma_activation, SIGMA_ACTIVATIONS)
        if not 0 < min_sigma < initial_sigma < max_sigma:
            raise InfMoEError(
                f"sigma needs 0 < min_sigma < initial_sigma < max_sigma, got {min_sigma}, {initial_sigma}, {max_sigma}"
            )
        self.hidden_size, self.z_dim = hidden_size, z_dim
        self.sigma_activation, self.initial_sigma = sigma_activation, initial_sigma
        self.min_sigma, self.max_sigma = min_sigma, max_sigma
        width = router_hidden_size or hidden_size
        self.hidden = Linear(hidden_size, width) if router_hidden_size else None
        self.mu = Linear(width, z_dim)
        self.sigma = Linear(width, z_dim) if sigma_activation != "none" else None

    @property
    def noise_dim(self) -> int:
        return self.z_dim if self.sigma is not None else 0

    @property
    def initial_noise_variance(self) -> float:
        return self.initial_sigma**2 if self.sigma is not None else 0.0

    def num_idle_params(self, sampled: bool) -> int:
        return 0 if sampled or self.sigma is None else sum(p.numel() for p in self.sigma.parameters())

    def inits(self) -> Iterable[Init]:
        # Unit-variance inputs give mu of unit variance; sigma starts constant, so the noise starts even.
        if self.hidden is not None:
            yield Init(self.hidden.weight, 0.0, math.sqrt(2 / self.hidden_size))
            yield Init(self.hidden.bias, 0.0, 0.0)
        yield Init(self.mu.weight, 0.0, self.mu.in_features**-0.5)
        yield Init(self.mu.bias, 0.0, 0.0)
        if self.sigma is not None:
            bias = (
                math.log(math.expm1(self.initial_sigma))
                if self.sigma_activation == "softplus"
                else math.log(self.initial_sigma)
            )
            yield Init(self.sigma.weight, 0.0, 0.1 * self.sigma.in_features**-0.5)
            yield Init(self.sigma.bias, bias, 0.0)

    def forward(self, x_BTD: Tensor, noise_BTKN: Tensor | None) -> Indices:
        # Whatever autocast says: rounding here would flip neurons, differently for each shape of the product.
        with torch.autocast(x_BTD.device.type, enabled=False):
            h_BTD = x_BTD.to(self.mu.weight.dtype)
            if self.hidden is not None:
                h_BTD = F.gelu(self.hidden(h_BTD))
            mu_BTZ = self.mu(h_BTD)
            raw_BTZ = self.sigma(h_BTD) if self.sigma is not None else None
            if noise_BTKN is None or raw_BTZ is None:
                mu_BTZ = mu_BTZ.float()
                return Indices(mu_BTZ.unsqueeze(2), mu_BTZ, None)
            if x_BTD.device.type == "cpu" and mu_BTZ.dtype in compiled.DTYPES and dispatch.use_kernels():
                form = (self.sigma_activation, self.min_sigma, self.max_sigma)
                z_BTKZ, sigma_BTZ = fused.spread(mu_BTZ, raw_BTZ, noise_BTKN, *form)
                return Indices(z_BTKZ, mu_BTZ.float(), sigma_BTZ)
            mu_BTZ, raw_BTZ = mu_BTZ.float(), raw_BTZ.float()
        sigma_BTZ = F.softplus(raw_BTZ) if self.sigma_activation == "softplus" else raw_BTZ.exp()
        sigma_BTZ = sigma_BTZ.clamp(self.min_sigma, self.max_sigma)
        return Indices(mu_BTZ.unsqueeze(2) + sigma_BTZ.unsqueeze(2) * noise_BTKN, mu_BTZ, sigma_BTZ)

    def num_flops(self, sampled: bool) -> int:
        maps = 2 if sampled and self.sigma is not None else 1
        first = 2 * self.hidden_size * self.hidden.out_features if self.hidden is not None else 0
        return first + 2 * self.mu.in_features * self.z_dim * maps
