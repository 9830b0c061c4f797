"""∞-MoE: a feed-forward layer with a continuum of experts (Eq. 4-7).

B batch rows, T tokens, D model width, F neurons, U units that a mask selects (neurons, or blocks of them),
K samples, Z index dimensions, N tokens that the statistics look at.
"""

import math
from collections.abc import Iterable
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infmoe.errors import InfMoEError, unknown_name
from infmoe.layers.activations import activation, ffn_width
from infmoe.layers.base import ConditionalFFN, FFNCost, FFNOutput, Init
from infmoe.layers.gaussian import kept_second_moment, mean_mask_second_moment
from infmoe.layers.metrics import RoutingStats, stats_stride
from infmoe.layers.router import GaussianRouter, Indices, SigmaActivation
from infmoe.layers.routing import MODES, Mode, NoiseKey, Routing, check_keep_ratio, check_num_samples
from infmoe.ops import masked_ffn
from infmoe.ops.noise import normal_noise

MaskScale = Literal["none", "fixed", "rms"]
MASK_SCALES: tuple[MaskScale, ...] = ("none", "fixed", "rms")
SCORE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@final
class InfinityFFN(ConditionalFFN):
    """y = mean over k of W2(Act(W1 x) * mask(z_k)), z_k ~ N(mu(x), Sigma(x)) (Eq. 4-7).

    W1 and W2 are shared and W2 is linear, so the K samples fold into one pass under the mean of their masks.

    Deviates from the paper: entries that tie with the last one kept are all kept; W_z and z are scaled so
    that the branch starts at the size of a dense FFN of the same width (the paper is silent on both).
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        hidden_act: str = "gelu_new",
        z_dim: int = 64,
        num_samples: int = 2,
        keep_ratio: float = 0.25,
        routing_mode: Mode = "sample",
        router_hidden_size: int | None = None,
        sigma_activation: SigmaActivation = "softplus",
        initial_sigma: float = 0.5,
        min_sigma: float = 1e-4,
        max_sigma: float = 10.0,
        block_size: int = 1,
        mask_scale: MaskScale = "none",
        wz_bias: bool = False,
        train_wz: bool = True,
        wz_lr_factor: float = 1.0,
        wz_weight_decay: float | None = None,
        score_dtype: str = "float32",
        noise_seed: int = 0,
        **shared,
    ):
        """Build the layer.

        Args:
            hidden_size: D.
            intermediate_size: F, before the 2/3 of a gated activation; the paper's small model has 6144.
            hidden_act: a name from `ACTIVATIONS`; gated ones give act(W1 x) * (W3 x) * mask.
            z_dim: Z; the paper uses 256 and finds 64 as good (Table 2).
            num_samples: K that a call uses unless it says otherwise; the paper's 2.
            keep_ratio: fraction of the units that one sample keeps unless a call says otherwise; the
                paper's 25 %; 1 keeps all (the control without top-N).
            routing_mode: mode that a call uses unless it says otherwise.
            router_hidden_size, sigma_activation, initial_sigma, min_sigma, max_sigma: see `GaussianRouter`.
            block_size: neurons that share one score; 1 is the paper's.
            mask_scale: how masks are scaled at a keep ratio other than `keep_ratio`: "none"; "fixed", by a
                constant that keeps the mask's expected square for Gaussian scores; "rms", by the token's own
                ratio of the two masks' rms.
            wz_bias: give the scores a bias.
            train_wz: False freezes W_z.
            wz_lr_factor, wz_weight_decay: W_z's own, relative to the run's learning rate and in place of its
                weight decay; None: the run's. Read by the optimizer.
            score_dtype: what both factors of W_z z are rounded to, "float32" or "bfloat16"; products and sums
                are float32. A wrapped or quantised W_z multiplies in its own type.
            noise_seed: seed of the noise in eval mode, where a call brings no key.
            **shared: see `ConditionalFFN`.

        Raises:
            InfMoEError: a value out of range.
        """
        super().__init__(hidden_size, intermediate_size, **shared)
        check_num_samples(num_samples)
        check_keep_ratio(keep_ratio)
        if routing_mode not in MODES:
            raise unknown_name("routing_mode", routing_mode, MODES)
        if mask_scale not in MASK_SCALES:
            raise unknown_name("mask_scale", mask_scale, MASK_SCALES)
        if score_dtype not in SCORE_DTYPES:
            raise unknown_name("score_dtype", score_dtype, SCORE_DTYPES)
        self.hidden_act = hidden_act
        self.act, gated = activation(hidden_act)
        self.width = ffn_width(intermediate_size, gated, multiple_of=max(block_size, 1))
        if block_size < 1 or self.width % block_size:
            raise InfMoEError(f"block_size must divide the FFN width {self.width}, got {block_size}")
        for name, value in (("wz_lr_factor", wz_lr_factor), ("wz_weight_decay", wz_weight_decay or 0.0)):
            if not 0 <= value < math.inf:
                raise InfMoEError(f"{name} must be 0 or more, and finite, got {value}")
        NoiseKey(seed=noise_seed)  # refuses a bad seed now rather than at the first evaluation
        self.block_size = block_size
        self.num_units = self.width // block_size
        self.num_samples, self.keep_ratio = num_samples, keep_ratio
        self.routing_mode: Mode = routing_mode if sigma_activation != "none" else "mu"
        self.mask_scale, self.score_dtype, self.noise_seed = mask_scale, score_dtype, noise_seed
        self.wz_lr_factor, self.wz_weight_decay = wz_lr_factor, wz_weight_decay

        self.router = GaussianRouter(
            hidden_size,
            z_dim,
            router_hidden_size=router_hidden_size,
            sigma_activation=sigma_activation,
            initial_sigma=initial_sigma,
            min_sigma=min_sigma,
            max_sigma=max_sigma,
        )
        self.w_z = nn.Linear(z_dim, self.num_units, bias=wz_bias).requires_grad_(train_wz)
        self.w1 = nn.Linear(hidden_size, self.width)
        self.w3 = nn.Linear(hidden_size, self.width) if gated else None
        self.w2 = nn.Linear(self.width, hidden_size)
        self.reset_parameters()

    def inits(self) -> Iterable[Init]:
        yield from self.router.inits()
        # Scores of the size at which the mean mask has an expected square of 1: then W2's input, and so the
        # branch, starts as large as a dense FFN's (mu starts with unit variance, see `GaussianRouter`).
        noise_variance = self.router.initial_noise_variance if self.routing_mode != "mu" else 0.0
        num_samples = self.num_samples if noise_variance else 1
        correlation = 1.0 / (1.0 + noise_variance)
        second_moment = mean_mask_second_moment(self.keep_ratio, num_samples, correlation)
        score_std = second_moment**-0.5
        yield Init(self.w_z.weight, 0.0, score_std / math.sqrt(self.router.z_dim * (1.0 + noise_variance)))
        for linear in (self.w1, self.w3, self.w2):
            if linear is not None:
                std = self.initializer_range * (self.residual_init_scale if linear is self.w2 else 1.0)
                yield Init(linear.weight, 0.0, std)
        for with_bias in (self.w_z, self.w1, self.w3, self.w2):
            if with_bias is not None and with_bias.bias is not None:
                yield Init(with_bias.bias, 0.0, 0.0)

    def forward(self, x_BTD: Tensor, routing: Routing | None = None) -> FFNOutput:
        if x_BTD.ndim == 2:
            out = self.forward(x_BTD[None], routing)
            return out._replace(y_BTD=out.y_BTD[0])
        routing = (routing or Routing()).at_layer(self.layer_index)
        num_samples, keep_ratios, mode = self._dials(routing, batch_size=x_BTD.shape[0])

        indices = self._draw(x_BTD, routing, max(num_samples), mode)
        scores_BTKU = self._scores(indices.z_BTKZ)
        weight_BTK = self._weights(scores_BTKU, num_samples, keep_ratios)
        count_every = stats_stride(x_BTD.shape[0] * x_BTD.shape[1], routing.max_stats_tokens)
        mask_BTU, times_kept_NU = masked_ffn.mean_top_mask(
            scores_BTKU, self._num_kept(keep_ratios), weight_BTK, count_every
        )
        mask_BTF = mask_BTU.repeat_interleave(self.block_size, dim=-1) if self.block_size > 1 else mask_BTU

        h_BTF = self.act(self.w1(x_BTD))
        if self.w3 is not None:
            h_BTF = h_BTF * self.w3(x_BTD)
        y_BTD = self.w2(h_BTF * mask_BTF.to(h_BTF.dtype))

        stats = self._stats(indices, times_kept_NU, num_samples, count_every)
        return FFNOutput(y_BTD, torch.zeros((), device=x_BTD.device), stats)

    def _dials(self, routing: Routing, batch_size: int) -> tuple[tuple[int, ...], tuple[float, ...], Mode]:
        """K and keep ratio, each as one value for all rows or one per row, and the mode."""
        self._refuse(routing, "num_experts_per_tok")
        mode = routing.mode or self.routing_mode
        if self.router.noise_dim == 0 and mode != "mu":
            raise InfMoEError(f"this layer has no sigma (sigma_activation='none'), so mode {mode!r} means nothing")
        if mode == "mu" and routing.num_samples is not None:
            raise InfMoEError("this layer routes by z = mu and draws nothing: leave num_samples out")
        num_samples = _per_row(routing.num_samples, self.num_samples)
        keep_ratios = _per_row(routing.keep_ratio, self.keep_ratio)
        for name, dial in (("num_samples", num_samples), ("keep_ratio", keep_ratios)):
            if len(dial) not in (1, batch_size):
                raise InfMoEError(f"{name} has {len(dial)} values for a batch of {batch_size} rows: give one per row")
        return ((1,) if mode == "mu" else num_samples), keep_ratios, mode

    def _num_kept(self, keep_ratios: tuple[float, ...]) -> tuple[int, ...]:
        return tuple(max(1, round(ratio * self.num_units)) for ratio in keep_ratios)

    def _draw(self, x_BTD: Tensor, routing: Routing, num_samples: int, mode: Mode) -> Indices:
        """Expert indices of every token: sampled (Eq. 5), or the mean."""
        if mode == "mu":
            return self.router(x_BTD, None)
        B, T, _ = x_BTD.shape
        device = x_BTD.device
        routing = routing.with_key(seed=self.noise_seed, training=self.training, batch_size=B, device=device)
        key = routing.key
        assert key is not None
        stream_B = key.stream if key.stream is not None else torch.zeros(1, dtype=torch.int64, device=device)
        position_BT = key.position if key.position is not None else torch.arange(T, device=device)
        if stream_B.numel() not in (1, B) or position_BT.shape not in ((T,), (1, T), (B, T)):
            raise InfMoEError(
                f"the noise key has {stream_B.numel()} streams and positions of shape "
                f"{tuple(position_BT.shape)} for a batch of shape ({B}, {T}): "
                "give one stream per row and one position per token"
            )
        num_draws = -(-num_samples // 2) if mode == "antithetic" else num_samples
        with torch.no_grad():
            noise_BTKN = normal_noise(
                num_draws,
                self.router.noise_dim,
                seed=key.seed,
                step=key.step,
                layer=self.layer_index,
                stream_B=stream_B.reshape(-1).expand(B),
                position_BT=position_BT.expand(B, T),
            )
            if mode == "antithetic":
                pairs = torch.stack([noise_BTKN, -noise_BTKN], dim=3).flatten(2, 3)
                noise_BTKN = pairs[:, :, :num_samples]
        return self.router(x_BTD, noise_BTKN)

    def _scores(self, z_BTKZ: Tensor) -> Tensor:
        """W_z z in float32: both factors rounded to `score_dtype`, multiplied and summed in float32.

        Rounding the product too would make ties, and ties are all kept.
        """
        dtype = SCORE_DTYPES[self.score_dtype]
        with torch.autocast(z_BTKZ.device.type, enabled=False):
            if type(self.w_z) is nn.Linear:
                bias = self.w_z.bias.float() if self.w_z.bias is not None else None
                return F.linear(z_BTKZ.to(dtype).float(), self.w_z.weight.to(dtype).float(), bias)
            # wrapped (LoRA) or quantised: the module knows its own product
            weight = self.w_z.weight
            plain = isinstance(weight, Tensor) and weight.dtype.is_floating_point
            return self.w_z(z_BTKZ.to(weight.dtype) if plain else z_BTKZ).float()

    def _weights(self, scores_BTKU: Tensor, num_samples: tuple[int, ...], keep_ratios: tuple[float, ...]) -> Tensor:
        """Each sample's weight in the mean mask, float32, broadcastable to (B, T, K)."""
        device = scores_BTKU.device
        K = scores_BTKU.shape[2]
        if len(num_samples) == 1:
            weight_BTK = torch.full((1, 1, K), 1.0 / K, device=device)
        else:
            weights = [[1.0 / k if i < k else 0.0 for i in range(K)] for k in num_samples]
            weight_BTK = torch.tensor(weights, device=device)[:, None]
        if self.mask_scale == "none" or all(ratio == self.keep_ratio for ratio in keep_ratios):
            return weight_BTK
        if self.mask_scale == "fixed":
            trained = kept_second_moment(self.keep_ratio)
            factors = [math.sqrt(trained / kept_second_moment(ratio)) for ratio in keep_ratios]
            return weight_BTK * torch.tensor(factors, device=device)[:, None, None]
        one = torch.ones((), device=device)

        def mask_norm_BTK(ratios: tuple[float, ...]) -> Tensor:
            # one sample at a time: the norm of its own mask, not of the mean
            masks = [
                masked_ffn.mean_top_mask(
                    scores_BTKU[:, :, k : k + 1].detach(), self._num_kept(ratios), one.expand(1, 1, 1)
                )[0]
                for k in range(K)
            ]
            return torch.stack([mask.norm(dim=-1) for mask in masks], dim=-1)

        return weight_BTK * mask_norm_BTK((self.keep_ratio,)) / mask_norm_BTK(keep_ratios).clamp_min(1e-12)

    @torch.no_grad()
    def _stats(
        self, indices: Indices, times_kept_NU: Tensor, num_samples: tuple[int, ...], count_every: int
    ) -> RoutingStats:
        """What the mean mask hides: load, union and overlap of the K masks, and the router's spread."""
        B, T, _ = indices.mu_BTZ.shape
        K_B1 = torch.tensor(num_samples, device=times_kept_NU.device)[:, None]
        K_N = K_B1.expand(B, T).reshape(B * T)[::count_every]
        tokens = torch.full((), float(times_kept_NU.shape[0]), device=times_kept_NU.device)
        # a unit kept c times is common to c(c-1)/2 of the K(K-1)/2 pairs; a sample keeps kept/K units
        kept_N = times_kept_NU.sum(-1)
        common_N = (times_kept_NU.square().sum(-1) - kept_N) / ((K_N - 1).clamp_min(1) * kept_N)
        overlap = torch.where(K_N > 1, common_N, 1.0).sum()
        zero = torch.zeros((), device=tokens.device)
        sigma = sigma_to_mu = zero
        if indices.sigma_BTZ is not None:
            sigma_NZ = indices.sigma_BTZ.flatten(0, 1)[::count_every]
            mu_NZ = indices.mu_BTZ.flatten(0, 1)[::count_every]
            sigma = sigma_NZ.mean(-1).sum()
            sigma_to_mu = (sigma_NZ.norm(dim=-1) / mu_NZ.norm(dim=-1).clamp_min(1e-12)).sum()
        return RoutingStats(
            tokens=tokens,
            counts_U=times_kept_NU.sum(0),
            union=times_kept_NU.clamp_max(1.0).mean(-1).sum(),
            overlap=overlap,
            sigma=sigma,
            sigma_to_mu=sigma_to_mu,
            dropped=zero,
        )

    def cost(self, routing: Routing | None = None, union_ratio: float | None = None) -> FFNCost:
        routing = (routing or Routing()).at_layer(self.layer_index)
        samples, ratios, mode = self._dials(routing, batch_size=1)
        (num_samples,), (num_kept,) = samples, self._num_kept(ratios)
        kept = num_kept / self.num_units
        union = union_ratio if union_ratio is not None else 1.0 - (1.0 - kept) ** num_samples
        sampled = mode != "mu"
        params, params_wz = self.num_params(), sum(p.numel() for p in self.w_z.parameters())
        num_matrices = 3 if self.w3 is not None else 2
        neuron = self.hidden_size * num_matrices + (num_matrices - 1)  # weights and biases of one neuron
        always = params - params_wz - neuron * self.width  # router and output bias
        unused_sigma = self.router.num_idle_params(sampled)
        flops_router = self.router.num_flops(sampled) + num_samples * 2 * self.router.z_dim * self.num_units
        flops_neuron = 2 * self.hidden_size * num_matrices
        return FFNCost(
            params=params,
            params_wz=params_wz,
            params_discrete_router=0,
            active_params=round(always + neuron * self.width * min(1.0, num_samples * kept)),
            active_params_union=round(always - unused_sigma + params_wz + neuron * self.width * union),
            flops_executed=flops_router + flops_neuron * self.width,
            flops_ideal=round(flops_router + flops_neuron * self.width * union),
            flops_router=flops_router,
            weights_executed=params - unused_sigma,
            weights_ideal=round(always - unused_sigma + params_wz + neuron * self.width * union),
        )


def _per_row(dial: Any, default: Any) -> tuple:
    """The dial, or the default, as one value for all rows or one per row."""
    value = default if dial is None else dial
    return value if isinstance(value, tuple) else (value,)
