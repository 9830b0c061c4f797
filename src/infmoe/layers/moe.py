"""Top-k mixture of experts, with hash and random routing as controls.

B batch rows, T tokens (of all rows, where there is no B), k experts per token, E experts, D model width.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Literal, final

import torch
from torch import Tensor, nn

from infmoe.errors import InfMoEError, unknown_name
from infmoe.layers.base import ConditionalFFN, FFNCost, FFNOutput, Init
from infmoe.layers.experts import Experts, balance_loss, check_weight, expert_stats, narrow_softmax, router_logits
from infmoe.layers.metrics import RoutingStats
from infmoe.layers.routing import DIALS, NoiseKey, Routing, check_num_experts_per_tok
from infmoe.layers.samples import coordinates
from infmoe.ops.noise import normal_noise

ExpertRouter = Literal["learned", "hash", "random"]
EXPERT_ROUTERS: tuple[ExpertRouter, ...] = ("learned", "hash", "random")
GateNorm = Literal["selected", "all", "trained"]
GATE_NORMS: tuple[GateNorm, ...] = ("selected", "all", "trained")
# Hash routing's noise seed: fixed for good, so that a checkpoint's tokens always find their experts again.
_HASH_SEED = 0x1F3D5B79


@final
class MoEFFN(ConditionalFFN):
    """y = sum over the top-k experts of g_i(x) E_i(x), g the softmax over the k selected logits (Eq. 2).

    The dial is k, `Routing.num_experts_per_tok`; it may differ from layer to layer and, at inference, from row to
    row. What the gates sum to at another k than the layer's own is `gate_norm`'s to say.
    Nothing is dropped, and a token's output depends on that token alone. The router computes in float32.

    Elastic MoE, which trains for more experts than it runs, is `ideal_experts_per_tok` and
    `hierarchical_loss_weight`; Matryoshka-MoE, which trains with a k drawn for each layer and step, gives `Routing`
    that k (`infmoe.train.elastic`).

    The controls learn no router, so they have neither auxiliary loss; their gates are 1/k. "hash" sends every
    occurrence of a token id to the same k experts of a layer; "random" draws k experts for every token anew,
    from the noise key in `Routing`.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        hidden_act: str = "gelu_new",
        num_experts: int = 4,
        num_experts_per_tok: int = 2,
        trained_experts_per_tok: int | None = None,
        balance_loss_weight: float = 0.01,
        z_loss_weight: float = 0.0,
        expert_router: ExpertRouter = "learned",
        gate_norm: GateNorm = "selected",
        routed_scaling_factor: float = 1.0,
        rank_damping: float = 1.0,
        ideal_experts_per_tok: int | None = None,
        coactivation_prob: float = 0.5,
        hierarchical_loss_weight: float = 0.0,
        noise_seed: int = 0,
        **shared,
    ):
        """Build the layer.

        Args:
            hidden_size: D.
            intermediate_size: neurons of all experts together, before the 2/3 of a gated activation.
            hidden_act: a name from `ACTIVATIONS`.
            num_experts: E; must divide `intermediate_size`.
            num_experts_per_tok: k, where `Routing` does not say.
            trained_experts_per_tok: the k that the gates are measured against at another one (`gate_norm`,
                `rank_damping`), and that `ideal_experts_per_tok` is to be above; None: `num_experts_per_tok`. A
                checkpoint keeps it, so that opening it with another k changes no more than the k.
            balance_loss_weight: weight of the load-balancing loss; its value at perfect balance.
            z_loss_weight: weight of the mean squared logsumexp of the logits, which keeps them small.
            expert_router: "learned", "hash" (needs `Routing.token_ids`) or "random".
            gate_norm: which experts a learned router's gates are a softmax over: those "selected" (they sum to 1
                at every k, and more experts dilute the first ones; the gate of a single expert is then 1, so the
                text has no gradient for the router: train with k = 1 by "all", or a `SwitchFFN`), "all" (they sum
                to less), or the first
                `trained_experts_per_tok` ("trained": the first ones keep their weight at every k, and more come on
                top, so that they sum to more).
            routed_scaling_factor: factor on all gates, a learned router's or not (DeepSeek's). Gates that sum to 1
                make the layer start at 1/k of the size of a dense one of k experts' width; k makes them equal.
            rank_damping: factor on the weights of the experts beyond the first `trained_experts_per_tok` (the "α
                dial": no training, and 1 leaves them alone). Before they are normalised where they are normalised
                over the selected; by the other rules of `gate_norm` what is taken away goes to no other expert.
            ideal_experts_per_tok: k_ideal of Elastic MoE (arXiv 2509.21892): in train mode a token's k experts
                are sometimes drawn from its k_ideal best, all subsets equally likely, instead of being its k
                best; evaluation takes the best. None: never.
            coactivation_prob: the probability of that, drawn for each token; the paper does not name it.
            hierarchical_loss_weight: weight of Elastic MoE's router loss, -KL(p || uniform) averaged over tokens,
                which pushes every token's distribution over the experts away from uniform; the paper does not
                name it.
            noise_seed: seed of random routing in eval mode, where `Routing` has no key.
            **shared: see `ConditionalFFN`.
        """
        super().__init__(hidden_size, intermediate_size, **shared)
        if expert_router not in EXPERT_ROUTERS:
            raise unknown_name("expert_router", expert_router, EXPERT_ROUTERS)
        if gate_norm not in GATE_NORMS:
            raise unknown_name("gate_norm", gate_norm, GATE_NORMS)
        if gate_norm != "selected" and expert_router != "learned":
            raise InfMoEError(f"expert_router={expert_router!r} has gates of 1/k: leave gate_norm={gate_norm!r} out")
        check_weight("balance_loss_weight", balance_loss_weight)
        check_weight("z_loss_weight", z_loss_weight)
        check_weight("hierarchical_loss_weight", hierarchical_loss_weight)
        for name, value in (("rank_damping", rank_damping), ("coactivation_prob", coactivation_prob)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
                raise InfMoEError(f"{name} must lie in [0, 1], got {value!r}")
        if not 0.0 < routed_scaling_factor < math.inf:
            raise InfMoEError(f"routed_scaling_factor must be above 0, and finite, got {routed_scaling_factor!r}")
        if coactivation_prob != 0.5 and ideal_experts_per_tok is None:
            raise InfMoEError("coactivation_prob goes with ideal_experts_per_tok: give both, or neither")
        num_experts_per_tok = check_num_experts_per_tok(num_experts_per_tok)
        if trained_experts_per_tok is not None:
            trained_experts_per_tok = check_num_experts_per_tok(trained_experts_per_tok, "trained_experts_per_tok")
        if ideal_experts_per_tok is not None:
            ideal_experts_per_tok = check_num_experts_per_tok(ideal_experts_per_tok, "ideal_experts_per_tok")
        elastic = {
            "rank_damping": rank_damping != 1.0,
            "ideal_experts_per_tok": ideal_experts_per_tok is not None,
            "hierarchical_loss_weight": hierarchical_loss_weight != 0.0,
        }
        for name, given in elastic.items():
            if given and expert_router != "learned":
                raise InfMoEError(f"expert_router={expert_router!r} ranks no experts: leave {name} out")
        NoiseKey(seed=noise_seed)  # refuses a bad seed now rather than at the first evaluation
        self.hidden_act = hidden_act
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.trained_experts_per_tok = trained = trained_experts_per_tok or num_experts_per_tok
        self.balance_loss_weight = balance_loss_weight
        self.z_loss_weight = z_loss_weight
        self.expert_router = expert_router
        self.gate_norm: GateNorm = gate_norm
        self.routed_scaling_factor = routed_scaling_factor
        self.rank_damping = rank_damping
        self.ideal_experts_per_tok = ideal_experts_per_tok
        self.coactivation_prob = coactivation_prob
        self.hierarchical_loss_weight = hierarchical_loss_weight
        self.is_elastic = True  # False puts both of Elastic MoE's off: a trainer may begin without them
        self.noise_seed = noise_seed
        self.experts = Experts(hidden_size, intermediate_size, num_experts, hidden_act)
        self._check_k(num_experts_per_tok)
        self._check_k(trained, "trained_experts_per_tok")
        if ideal_experts_per_tok is not None and not trained < ideal_experts_per_tok <= num_experts:
            raise InfMoEError(
                f"ideal_experts_per_tok must be above the trained k ({trained}), and num_experts ({num_experts}) at "
                f"most, got {ideal_experts_per_tok}"
            )
        self.router = nn.Linear(hidden_size, num_experts, bias=False) if expert_router == "learned" else None
        self.reset_parameters()

    def inits(self) -> Iterable[Init]:
        yield from self.experts.inits(self.initializer_range, self.residual_init_scale)
        if self.router is not None:
            yield Init(self.router.weight, 0.0, self.initializer_range)

    def forward(self, x_BTD: Tensor, routing: Routing | None = None) -> FFNOutput:
        routing = (routing or Routing()).at_layer(self.layer_index)
        if isinstance(routing.num_experts_per_tok, tuple):
            return self._by_rows(x_BTD, routing, routing.num_experts_per_tok)
        k = self._k(routing)
        x_TD = x_BTD.reshape(-1, self.hidden_size)
        if self.router is not None:
            logits_TE = router_logits(x_TD, self.router.weight)
            if self.training and self.is_elastic and k < (self.ideal_experts_per_tok or 0):
                top_Tk, expert_Tk = self._coactivated(logits_TE, k, x_BTD, routing)
            else:
                top_Tk, expert_Tk = logits_TE.topk(k, dim=-1)
            gate_Tk = self._gates(logits_TE, top_Tk)
            aux_loss = self._aux_loss(logits_TE, expert_Tk)
        else:
            expert_Tk = self._fixed_experts(x_BTD, k, routing)
            gate_dtype = torch.promote_types(x_BTD.dtype, torch.float32)
            gate_Tk = torch.full(expert_Tk.shape, 1.0 / k, dtype=gate_dtype, device=x_BTD.device)
            aux_loss = torch.zeros((), device=x_BTD.device)
        y_TD = self.experts(x_TD, expert_Tk, gate_Tk * self.routed_scaling_factor)
        stats = expert_stats(expert_Tk, self.num_experts, routing.max_stats_tokens)
        return FFNOutput(y_TD.view(x_BTD.shape), aux_loss, stats)

    def _by_rows(self, x_BTD: Tensor, routing: Routing, k_B: tuple[int, ...]) -> FFNOutput:
        """Rows of one k together, each as it would be alone."""
        B = len(x_BTD)
        if len(k_B) not in (1, B) or x_BTD.ndim != 3:
            raise InfMoEError(
                f"num_experts_per_tok has {len(k_B)} values for an input of shape {tuple(x_BTD.shape)}: give one per "
                "row of (B, T, D)"
            )
        for k in k_B:
            self._check_k(k)
        if len(set(k_B)) < 2:
            return self.forward(x_BTD, dataclasses.replace(routing, num_experts_per_tok=k_B[0] if k_B else None))
        if self.training:
            raise InfMoEError("rows of different num_experts_per_tok are for inference: balance losses take one k")
        y_BTD, aux_loss = x_BTD, torch.zeros((), device=x_BTD.device)
        stats: RoutingStats | None = None
        for k in sorted(set(k_B)):
            rows = [b for b in range(B) if k_B[b] == k]
            given = routing.of_rows(rows, B)
            if (looked := routing.max_stats_tokens) is not None:  # each part its share of them
                given = dataclasses.replace(given, max_stats_tokens=max(1, round(looked * len(rows) / B)))
            out = self.forward(x_BTD[rows], dataclasses.replace(given, num_experts_per_tok=k))
            y_BTD = out.y_BTD.new_empty(x_BTD.shape) if y_BTD is x_BTD else y_BTD
            y_BTD[rows] = out.y_BTD
            aux_loss = aux_loss + out.aux_loss * (len(rows) / B)
            stats = out.stats if stats is None else stats + out.stats
        assert stats is not None
        return FFNOutput(y_BTD, aux_loss, stats)

    def cost(self, routing: Routing | None = None, union_ratio: float | None = None) -> FFNCost:
        k = self._k((routing or Routing()).at_layer(self.layer_index))
        return self.experts.cost(k, 0 if self.router is None else self.router.weight.numel())

    def _k(self, routing: Routing) -> int:
        self._refuse(routing, *(dial for dial in DIALS if dial != "num_experts_per_tok"), "mode")
        self._refuse_backend(routing)
        k = routing.num_experts_per_tok
        if k is None:
            return self.num_experts_per_tok
        if isinstance(k, tuple) and len(set(k)) == 1:
            k = k[0]
        if isinstance(k, tuple):
            raise InfMoEError(f"rows of different num_experts_per_tok, {k}, cost differently: ask for one at a time")
        assert isinstance(k, int)  # `at_layer` took PerLayer apart
        return self._check_k(k)

    def _check_k(self, k: int, name: str = "num_experts_per_tok") -> int:
        k = check_num_experts_per_tok(k, name)
        if k > self.num_experts:
            raise InfMoEError(f"{name} {k} is more than the layer's {self.num_experts} experts: use those or fewer")
        return k

    def _coactivated(self, logits_TE: Tensor, k: int, x_BTD: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        """Elastic MoE's choice: k of each token's k_ideal best at random, or its k best; the best first.

        Returns:
            The chosen experts' logits, and the experts, each of shape (T, k).
        """
        top_TC, expert_TC = logits_TE.topk(self.ideal_experts_per_tok or k, dim=-1)
        num_candidates = top_TC.shape[1]
        with torch.no_grad():
            noise_TC = self._noise(x_BTD, routing, num_candidates + 1)
            drawn_Tk = noise_TC[:, :num_candidates].topk(k, dim=-1).indices.sort(dim=-1).values
            threshold = torch.special.ndtri(torch.tensor(self.coactivation_prob, device=noise_TC.device))
            place_Tk = torch.where(
                noise_TC[:, num_candidates:] < threshold, drawn_Tk, torch.arange(k, device=drawn_Tk.device)
            )
        return top_TC.gather(1, place_Tk), expert_TC.gather(1, place_Tk)

    def _gates(self, logits_TE: Tensor, top_Tk: Tensor) -> Tensor:
        """Weights of the selected experts, whose logits are `top_Tk`; see `gate_norm` and `rank_damping`."""
        k, trained = top_Tk.shape[1], self.trained_experts_per_tok
        weighed_Tk = top_Tk
        if self.rank_damping != 1.0 and k > trained:
            damping_k = top_Tk.new_full((k,), self.rank_damping)
            damping_k[:trained] = 1.0
            weighed_Tk = top_Tk + damping_k.log()
        if self.gate_norm == "selected" or (self.gate_norm == "trained" and k == trained):
            return narrow_softmax(weighed_Tk)
        if self.gate_norm == "all":
            over_TE = logits_TE
        elif k > trained:
            over_TE = top_Tk[:, :trained]
        else:
            over_TE = logits_TE.topk(trained, dim=-1).values
        return (weighed_Tk - over_TE.logsumexp(dim=-1, keepdim=True)).exp()

    def _aux_loss(self, logits_TE: Tensor, expert_Tk: Tensor) -> Tensor:
        loss = self.balance_loss_weight * balance_loss(narrow_softmax(logits_TE), expert_Tk)
        if self.z_loss_weight:
            square = logits_TE.logsumexp(dim=-1).square().sum() / max(logits_TE.shape[0], 1)
            loss = loss + self.z_loss_weight * square
        if self.hierarchical_loss_weight and self.is_elastic:
            log_p_TE = logits_TE.log_softmax(dim=-1)
            divergence_T = (log_p_TE.exp() * log_p_TE).sum(dim=-1) + math.log(self.num_experts)
            loss = loss - self.hierarchical_loss_weight * divergence_T.sum() / max(logits_TE.shape[0], 1)
        return loss.float()

    @torch.no_grad()
    def _fixed_experts(self, x_BTD: Tensor, k: int, routing: Routing) -> Tensor:
        """k distinct experts for each token without a look at it: the top k of its noise."""
        if self.expert_router == "random":
            return self._noise(x_BTD, routing, self.num_experts).topk(k, dim=-1).indices
        if routing.token_ids is None:
            raise InfMoEError("hash routing needs the token ids: pass Routing(token_ids=input_ids)")
        # The token id takes the position's place in the noise's key.
        key = NoiseKey(seed=_HASH_SEED, position=routing.token_ids)
        return self._noise(x_BTD, dataclasses.replace(routing, key=key), self.num_experts).topk(k, dim=-1).indices

    @torch.no_grad()
    def _noise(self, x_BTD: Tensor, routing: Routing, count: int) -> Tensor:
        """`count` independent normals for each token, by the call's key: (T, count)."""
        batch_size, num_tokens = x_BTD.shape[:-1] if x_BTD.ndim == 3 else (1, x_BTD.shape[0])
        device = x_BTD.device
        key = routing.with_key(seed=self.noise_seed, training=self.training, batch_size=batch_size, device=device).key
        assert key is not None
        where = coordinates(
            key,
            layer_index=self.layer_index,
            batch_size=batch_size,
            num_tokens=num_tokens,
            device=device,
            positions="token ids" if self.expert_router == "hash" else "positions",
        )
        return normal_noise(1, count, **where)[:, :, 0].reshape(-1, count)
