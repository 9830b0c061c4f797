"""∞-MoE: a feed-forward layer with a continuum of experts (Eq. 4-7).

B batch rows, T tokens, D model width, F neurons, U units that a mask selects (neurons, or blocks of them),
K samples, Z index dimensions, N tokens that the statistics look at.
"""

import math
from collections.abc import Iterable
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor

from infmoe.errors import InfMoEError, unknown_name
from infmoe.layers.activations import activation, ffn_width
from infmoe.layers.base import ConditionalFFN, FFNCost, FFNOutput, Init
from infmoe.layers.density import UnionDensity
from infmoe.layers.dials import MASK_SCALES, Dials, MaskScale, num_kept
from infmoe.layers.few_token_call import CallMemory, FewTokenCall, usual_maps
from infmoe.layers.gaussian import mean_mask_second_moment
from infmoe.layers.linear import Linear, affine, is_hooked, is_plain, product
from infmoe.layers.mask_weights import sample_weights
from infmoe.layers.metrics import RoutingStats, stats_stride
from infmoe.layers.router import GaussianRouter, Indices, SigmaActivation, sigma_to_mu
from infmoe.layers.routing import MODES, Mode, NoiseKey, Routing, check_keep_ratio, check_num_samples
from infmoe.layers.samples import coordinates, spread_samples
from infmoe.ops import dispatch, triton
from infmoe.ops.coordinates import NoiseCoordinates
from infmoe.ops.masked_ffn import eager, few_tokens, fused
from infmoe.ops.masked_ffn.result import SELECTIONS, MaskStats, MeanMask, Selection, counted, unpacked
from infmoe.ops.noise import noise_key

Products = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]  # W1 x and W3 x, each with its bias, if any
SCORE_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


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
        trained_keep_ratio: float | None = None,
        routing_mode: Mode = "sample",
        router_hidden_size: int | None = None,
        sigma_activation: SigmaActivation = "softplus",
        initial_sigma: float = 0.5,
        min_sigma: float = 1e-4,
        max_sigma: float = 10.0,
        block_size: int = 1,
        selection: Selection = "exact",
        mask_scale: MaskScale = "none",
        wz_bias: bool = False,
        train_wz: bool = True,
        wz_lr_factor: float = 1.0,
        wz_weight_decay: float | None = None,
        score_dtype: str = "auto",
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
            trained_keep_ratio: the ratio at which `mask_scale` leaves masks as they are; None: `keep_ratio`. A
                checkpoint keeps it, so that opening it with another ratio changes no more than the ratio.
            routing_mode: mode that a call uses unless it says otherwise.
            router_hidden_size, sigma_activation, initial_sigma, min_sigma, max_sigma: see `GaussianRouter`.
            block_size: neurons that share one score; 1 is the paper's.
            selection: "exact" keeps the top N % (Eq. 6); "statistical" what lies above the mean of the scores
                plus a normal quantile of their deviations, N % where scores are Gaussian (linear time).
            mask_scale: how masks are scaled at a keep ratio other than `trained_keep_ratio`: "none"; "fixed", by a
                constant that keeps the mask's expected square for Gaussian scores; "rms", by the token's own
                ratio of the two masks' rms.
            wz_bias: give the scores a bias.
            train_wz: False freezes W_z.
            wz_lr_factor, wz_weight_decay: W_z's own, relative to the run's learning rate and in place of its
                weight decay; None: the run's. Read by `infmoe.train`; for other trainers see its
                `optim.param_groups`.
            score_dtype: what both factors of W_z z are rounded to, "float32" or "bfloat16"; "auto": bfloat16 where
                the layer computes in it, by its weights or autocast (about one unit in a thousand flips, and the
                loss moves by less than 0.0001 nats: results/scores.json). Products and sums are float32. A wrapped
                or quantised W_z multiplies in its own type.
            noise_seed: seed of the noise in eval mode, where a call brings no key.
            **shared: see `ConditionalFFN`.

        Raises:
            InfMoEError: a value out of range.
        """
        super().__init__(hidden_size, intermediate_size, **shared)
        self.num_samples, self.keep_ratio = check_num_samples(num_samples), check_keep_ratio(keep_ratio)
        if trained_keep_ratio is not None:
            trained_keep_ratio = check_keep_ratio(trained_keep_ratio, "trained_keep_ratio")
        if routing_mode not in MODES:
            raise unknown_name("routing_mode", routing_mode, MODES)
        if selection not in SELECTIONS:
            raise unknown_name("selection", selection, SELECTIONS)
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
        self.selection: Selection = selection
        self.num_units = self.width // block_size
        self.trained_keep_ratio = trained_keep_ratio or self.keep_ratio
        self.routing_mode: Mode = routing_mode if sigma_activation != "none" else "mu"
        self.mask_scale, self.score_dtype, self.noise_seed = mask_scale, score_dtype, noise_seed
        self.train_wz, self.wz_lr_factor, self.wz_weight_decay = train_wz, wz_lr_factor, wz_weight_decay
        self._density = UnionDensity()
        self._calls = CallMemory()

        self.router = GaussianRouter(
            hidden_size,
            z_dim,
            router_hidden_size=router_hidden_size,
            sigma_activation=sigma_activation,
            initial_sigma=initial_sigma,
            min_sigma=min_sigma,
            max_sigma=max_sigma,
        )
        self.w_z = Linear(z_dim, self.num_units, bias=wz_bias)
        self.w1 = Linear(hidden_size, self.width)
        self.w3 = Linear(hidden_size, self.width) if gated else None
        self.w2 = Linear(self.width, hidden_size)
        self.reset_parameters()
        self.freeze()

    def freeze(self) -> None:
        if not self.train_wz:
            self.w_z.requires_grad_(False)

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
        found = self._calls.find(self, x_BTD, routing)
        if found is not None and found.call is not None:
            return found.call(x_BTD, self._noise_key(x_BTD, routing))
        dials = self._dials(routing, batch_size=x_BTD.shape[0])
        ffn, router_state = self._plain_weights(), self._router_state()
        backend = self._backend(x_BTD, routing, dials, ffn, router_state)
        num_tokens = x_BTD.shape[0] * x_BTD.shape[1]
        count_every = stats_stride(num_tokens, routing.max_stats_tokens)
        call = self._few_token_call(x_BTD, backend, dials, count_every)
        if found is not None and self._density.is_settled(dials, router_state):
            self._calls.keep(found, call)
        if call is not None:
            out = call(x_BTD, self._noise_key(x_BTD, routing))
        else:
            out = self._many(x_BTD, routing, dials, backend, count_every)
        if not torch.is_grad_enabled():
            self._density.measure(out.stats, dials, router_state, -(-num_tokens // count_every))
        return out

    def _many(self, x_BTD: Tensor, routing: Routing, dials: Dials, backend: str, count_every: int) -> FFNOutput:
        """Any number of tokens, step by step."""
        indices = self._draw(x_BTD, routing, dials)
        run = {"eager": self._eager, "fused": self._fused, "sparse": self._sparse, "triton": self._triton}[backend]
        y_BTD, mask_stats = run(x_BTD, indices.z_BTKZ, dials, count_every)
        sigma, sigma_to_mu = self._spread_stats(indices, count_every)
        looked = -(-x_BTD.shape[0] * x_BTD.shape[1] // count_every)
        zero = torch.zeros((), device=x_BTD.device)
        tokens = torch.full((), float(looked), device=x_BTD.device)
        return FFNOutput(y_BTD, zero, RoutingStats(tokens, *mask_stats, sigma, sigma_to_mu, dropped=zero))

    def chosen_backend(self, x_BTD: Tensor, routing: Routing | None = None) -> str:
        """The backend that a call would run on (see `infmoe.ops.dispatch`)."""
        routing = (routing or Routing()).at_layer(self.layer_index)
        dials = self._dials(routing, batch_size=x_BTD.shape[0])
        return self._backend(x_BTD, routing, dials, self._plain_weights(), self._router_state())

    def _plain_weights(self) -> few_tokens.FFN | None:
        """W1, W3 and W2 with their biases, where all are plain linear maps."""
        w1, w2 = affine(self.w1), affine(self.w2)
        w3: tuple[Tensor | None, Tensor | None] | None = (None, None) if self.w3 is None else affine(self.w3)
        if w1 is None or w2 is None or w3 is None:
            return None
        return few_tokens.FFN(*w1, *w3, *w2)

    def _few_token_call(self, x_BTD: Tensor, backend: str, dials: Dials, count_every: int) -> FewTokenCall | None:
        """How one operator goes from x to the mask, or on to y: for few tokens and the usual router, else None."""
        if (
            backend not in ("fused", "sparse")
            or dials.mode not in ("sample", "mu")
            or dials.cut is not None
            or dials.min_sigma_to_mu
            or torch.compiler.is_compiling()
        ):
            return None
        ffn = self._plain_weights()
        if ffn is None or (backend == "fused" and any(w is not None and w.dtype != x_BTD.dtype for w in ffn)):
            return None
        maps = usual_maps(self.router, self.w_z, x_BTD, sampled=dials.mode == "sample")
        if maps is None or self._scale_needs_scores(dials):
            return None
        B, T, _ = x_BTD.shape
        K, weight_NK = max(dials.num_samples), None
        even = len(dials.num_samples) == 1 and (
            self.mask_scale == "none" or dials.keep_ratios == (self.trained_keep_ratio,)
        )
        if not even:
            weight_NK = self._weights(x_BTD.device, None, dials).expand(B, T, K).reshape(B * T, K).contiguous()
        given = few_tokens.route_of(
            maps,
            (self.router.sigma_activation, self.router.min_sigma, self.router.max_sigma),
            K,
            num_kept(dials.keep_ratios, self.num_units),
            weight_NK,
            count_every=count_every,
            selection=self.selection,
            score_dtype=self._rounded_to,
            mask_dtype=x_BTD.dtype,
            sparse=(ffn, self.hidden_act) if backend == "sparse" else None,
        )
        return FewTokenCall(backend, given, ffn, self.hidden_act)

    # What the backends take: input, indices, dials, and the stride of the tokens that the statistics look at.
    # They return the output and the masks' statistics.

    def _eager(self, x_BTD: Tensor, z_BTKZ: Tensor, dials: Dials, count_every: int) -> tuple[Tensor, MaskStats]:
        """Tensor operations alone: any device and dtype."""
        scores_BTKU = self._scores(z_BTKZ)
        mask = self._eager_mask(scores_BTKU, dials, count_every)
        mask_BTU = mask.mask_BTU
        mask_BTF = mask_BTU.repeat_interleave(self.block_size, dim=-1) if self.block_size > 1 else mask_BTU
        h_BTF = self.act(self.w1(x_BTD))
        if self.w3 is not None:
            h_BTF = h_BTF * self.w3(x_BTD)
        return self.w2(h_BTF * mask_BTF.to(h_BTF.dtype)), mask.stats

    def _fused(self, x_BTD: Tensor, z_BTKZ: Tensor, dials: Dials, count_every: int) -> tuple[Tensor, MaskStats]:
        """Compiled selection and gating between the two products, which skip nothing."""
        products = self._products(x_BTD)
        mask = self._fused_mask(z_BTKZ, dials, count_every, products[0].dtype)
        return self._gated(products, mask.mask_BTU), mask.stats

    def _products(self, x_BTD: Tensor) -> Products:
        """W1 x and W3 x, each with the bias that is still to be added."""
        pre_BTF, b1_F = product(self.w1, x_BTD)
        gate_BTF, b3_F = product(self.w3, x_BTD) if self.w3 is not None else (None, None)
        return pre_BTF, b1_F, gate_BTF, b3_F

    def _gated(self, products: Products, mask_BTU: Tensor) -> Tensor:
        """W2 of the gated activations."""
        if not is_plain(self.w2):
            return self.w2(fused.gate(*products, mask_BTU, self.hidden_act))
        dtype = products[0].dtype
        return fused.gated_linear(
            *products, mask_BTU, self.w2.weight.to(dtype), self.w2.bias.to(dtype), self.hidden_act
        )

    def _sparse(self, x_BTD: Tensor, z_BTKZ: Tensor, dials: Dials, count_every: int) -> tuple[Tensor, MaskStats]:
        """The mask first, then only the neurons that it keeps."""
        ffn = self._plain_weights()
        assert ffn is not None  # else the dispatcher would have refused
        mask = self._fused_mask(z_BTKZ, dials, count_every, torch.float32)
        return few_tokens.sparse_ffn(x_BTD, mask.mask_BTU, *ffn, self.hidden_act), mask.stats

    def _triton(self, x_BTD: Tensor, z_BTKZ: Tensor, dials: Dials, count_every: int) -> tuple[Tensor, MaskStats]:
        """Selection and gating fused on the GPU, between products that skip nothing."""
        B, T, K, _ = z_BTKZ.shape
        scores_BTKU = self._scores(z_BTKZ)
        weight_NK = self._weights(x_BTD.device, scores_BTKU, dials).expand(B, T, K).flatten(0, 1)
        pre_BTF = self.w1(x_BTD)
        gate_NF = self.w3(x_BTD).flatten(0, 1) if self.w3 is not None else None
        kept = num_kept(dials.keep_ratios, self.num_units)
        rows = [torch.full((B * T // len(kept),), n, dtype=torch.int32, device=x_BTD.device) for n in kept]
        selected = (scores_BTKU.flatten(0, 1), torch.cat(rows), weight_NK.detach())
        statistical = self.selection == "statistical"
        if is_plain(self.w2):
            w2, b2 = self.w2.weight.to(pre_BTF.dtype), self.w2.bias.to(pre_BTF.dtype)
            y_ND, packed_NKW, _ = triton.gated_linear(
                pre_BTF.flatten(0, 1), *selected, w2, b2, gate_NF, act=self.hidden_act, statistical=statistical
            )
        else:
            gated_NF, packed_NKW, _ = triton.gated_mask(
                pre_BTF.flatten(0, 1), *selected, gate_NF, act=self.hidden_act, statistical=statistical
            )
            y_ND = self.w2(gated_NF)
        looked = slice(None, None, count_every)
        kept_NKU = unpacked(packed_NKW[looked], self.num_units)
        return y_ND.view(x_BTD.shape), counted(kept_NKU, weight_NK[looked])

    def _eager_mask(self, scores_BTKU: Tensor, dials: Dials, count_every: int) -> MeanMask:
        weight_BTK = self._weights(scores_BTKU.device, scores_BTKU, dials)
        if dials.cut is not None:
            masked = eager.mean_cut_mask if dials.cut.dial == "score_cut" else eager.mean_mass_mask
            return masked(scores_BTKU, dials.cut.at, weight_BTK, count_every)
        kept = num_kept(dials.keep_ratios, self.num_units)
        return eager.mean_top_mask(scores_BTKU, kept, weight_BTK, count_every, self.selection)

    def _fused_mask(self, z_BTKZ: Tensor, dials: Dials, count_every: int, dtype: torch.dtype) -> MeanMask:
        if dials.cut is not None:
            mask = self._eager_mask(self._scores(z_BTKZ), dials, count_every)
            return mask._replace(mask_BTU=mask.mask_BTU.to(dtype))
        kept = num_kept(dials.keep_ratios, self.num_units)
        if is_plain(self.w_z) and not self._scale_needs_scores(dials):
            weight_BTK = self._weights(z_BTKZ.device, None, dials)
            return fused.top_mask(
                z_BTKZ,
                self.w_z.weight,
                self.w_z.bias,
                kept,
                weight_BTK,
                count_every=count_every,
                selection=self.selection,
                score_dtype=self._rounded_to,
                mask_dtype=dtype,
            )
        scores_BTKU = self._scores(z_BTKZ)
        weight_BTK = self._weights(z_BTKZ.device, scores_BTKU, dials)
        return fused.top_mask_of_scores(
            scores_BTKU, kept, weight_BTK, count_every=count_every, selection=self.selection, mask_dtype=dtype
        )

    def _backend(
        self, x_BTD: Tensor, routing: Routing, dials: Dials, ffn: few_tokens.FFN | None, state: tuple[int, ...]
    ) -> str:
        device = x_BTD.device.type
        autocast = torch.is_autocast_enabled(device) and x_BTD.dtype != torch.float64  # which it leaves alone
        dtype = torch.get_autocast_dtype(device) if autocast else x_BTD.dtype
        backend = dispatch.resolve(
            routing.backend,
            device=device,
            dtype=dtype,
            gradients=torch.is_grad_enabled(),
            plain=not autocast
            and ffn is not None
            and ffn.w1_FD.dtype == ffn.w2_DF.dtype == dtype
            and (ffn.w3_FD is None or ffn.w3_FD.dtype == dtype),
            tokens=x_BTD.shape[0] * x_BTD.shape[1],
            density=1.0 if torch.compiler.is_compiling() else self._density.expected(dials, state),
            hidden_size=self.hidden_size,
            width=self.width,
            matrices=2 if self.w3 is None else 3,
        )
        if backend != "triton" or dials.cut is None:
            return backend
        if dispatch.requested(routing.backend) == "triton":
            raise InfMoEError(f"backend 'triton' has no {dials.cut.dial}: use backend 'eager', or keep_ratio")
        return "eager"

    def _router_state(self) -> tuple[int, ...]:
        """What changes with the weights that the masks come from."""
        if torch.compiler.is_compiling():
            return ()
        weights = (self.router.mu.weight, self.w_z.weight)
        return tuple([w._version if isinstance(w, Tensor) and not w.is_inference() else 0 for w in weights])

    def _dials(self, routing: Routing, batch_size: int) -> Dials:
        """The call's dials, with the layer's own where it says nothing."""
        self._refuse(routing, "num_experts_per_tok")
        return Dials.of_call(
            routing,
            num_samples=self.num_samples,
            keep_ratio=self.keep_ratio,
            mode=self.routing_mode,
            mask_scale=self.mask_scale,
            has_sigma=self.router.noise_dim > 0,
            batch_size=batch_size,
        )

    def _draw(self, x_BTD: Tensor, routing: Routing, dials: Dials) -> Indices:
        """Expert indices of every token: sampled (Eq. 5), or the mean."""
        if dials.mode == "mu":
            return self.router(x_BTD, None)
        with torch.no_grad():
            noise_BTKN = spread_samples(
                dials.mode, max(dials.num_samples), self.router.noise_dim, self._noise_coordinates(x_BTD, routing)
            )
        indices = self.router(x_BTD, noise_BTKN)
        if not dials.min_sigma_to_mu:
            return indices
        assert indices.sigma_BTZ is not None  # the router drew
        # The sure tokens' samples all are the first one, and so their mean mask is that one's. They are scored K times
        # all the same: the dial gains nothing (docs/evidence.md), so there is no path that parts the tokens.
        sure_BT11 = (sigma_to_mu(indices.mu_BTZ, indices.sigma_BTZ) < dials.min_sigma_to_mu)[..., None, None]
        z_BTKZ = torch.where(sure_BT11, indices.z_BTKZ[:, :, :1], indices.z_BTKZ)
        return indices._replace(z_BTKZ=z_BTKZ)

    def _noise_key(self, x_BTD: Tensor, routing: Routing) -> NoiseCoordinates:
        return noise_key(**self._noise_coordinates(x_BTD, routing))

    def _noise_coordinates(self, x_BTD: Tensor, routing: Routing) -> dict[str, Any]:
        """What the noise of this call is a function of."""
        B, T, _ = x_BTD.shape
        device = x_BTD.device
        key = routing.with_key(seed=self.noise_seed, training=self.training, batch_size=B, device=device).key
        assert key is not None
        return coordinates(
            key, layer_index=self.layer_index, batch_size=B, num_tokens=T, device=device, positions="positions"
        )

    def _scores(self, z_BTKZ: Tensor) -> Tensor:
        """W_z z in float32: both factors rounded to `score_dtype`, multiplied and summed in float32.

        Rounding the product too would make ties, and ties are all kept.
        """
        dtype = self._rounded_to
        with torch.autocast(z_BTKZ.device.type, enabled=False):
            if type(self.w_z) is Linear and not is_hooked(self.w_z):
                bias = self.w_z.bias.float() if self.w_z.bias is not None else None
                return F.linear(z_BTKZ.to(dtype).float(), self.w_z.weight.to(dtype).float(), bias)
            # wrapped (LoRA) or quantised: the module knows its own product
            weight = self.w_z.weight
            plain = isinstance(weight, Tensor) and weight.dtype.is_floating_point
            return self.w_z(z_BTKZ.to(weight.dtype) if plain else z_BTKZ).float()

    @property
    def _rounded_to(self) -> torch.dtype:
        """What both factors of W_z z are rounded to."""
        chosen = SCORE_DTYPES[self.score_dtype]
        if chosen is not None:
            return chosen
        weight = self.w_z.weight  # W1's may be packed away (quantised)
        if not isinstance(weight, Tensor) or not weight.dtype.is_floating_point or weight.dtype == torch.float64:
            return torch.float32
        device = weight.device.type
        computes_in = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        return torch.bfloat16 if computes_in == torch.bfloat16 else torch.float32

    def _scale_needs_scores(self, dials: Dials) -> bool:
        return self.mask_scale == "rms" and any(ratio != self.trained_keep_ratio for ratio in dials.keep_ratios)

    def _weights(self, device: torch.device, scores_BTKU: Tensor | None, dials: Dials) -> Tensor:
        """Each sample's weight in the mean mask (see `sample_weights`)."""
        return sample_weights(
            dials,
            trained_ratio=self.trained_keep_ratio,
            mask_scale=self.mask_scale,
            device=device,
            scores_BTKU=scores_BTKU,
            selection=self.selection,
        )

    @torch.no_grad()
    def _spread_stats(self, indices: Indices, count_every: int) -> tuple[Tensor, Tensor]:
        """The router's mean sigma and rms(sigma) / rms(mu), summed over the tokens that are looked at."""
        if indices.sigma_BTZ is None:
            zero = torch.zeros((), device=indices.mu_BTZ.device)
            return zero, zero
        if indices.mu_BTZ.device.type == "cpu" and dispatch.use_kernels():
            return fused.spread_stats(indices.mu_BTZ, indices.sigma_BTZ, count_every)
        sigma_NZ = indices.sigma_BTZ.flatten(0, 1)[::count_every]
        mu_NZ = indices.mu_BTZ.flatten(0, 1)[::count_every]
        return sigma_NZ.mean(-1).sum(), sigma_to_mu(mu_NZ, sigma_NZ).sum()

    def cost(self, routing: Routing | None = None, union_ratio: float | None = None) -> FFNCost:
        routing = (routing or Routing()).at_layer(self.layer_index)
        dials = self._dials(routing, batch_size=1)
        (num_samples,), (kept_units,) = dials.num_samples, num_kept(dials.keep_ratios, self.num_units)
        kept = kept_units / self.num_units
        if dials.min_sigma_to_mu:
            raise InfMoEError("how many samples min_sigma_to_mu leaves hangs on the tokens: ask at a fixed num_samples")
        if dials.cut is not None:
            if union_ratio is None:
                raise InfMoEError(f"what {dials.cut.dial} keeps is known only once measured: give union_ratio")
            kept = union_ratio / num_samples  # at least: samples that overlap keep more each
        union = union_ratio if union_ratio is not None else 1.0 - (1.0 - kept) ** num_samples
        sampled = dials.mode != "mu"
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
