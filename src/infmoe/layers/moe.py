"""Top-k mixture of experts, with hash and random routing as controls.

B batch rows, T tokens (of all rows, where there is no B), k experts per token, E experts, D model width.
"""

from collections.abc import Iterable
from typing import Literal, final

import torch
from torch import Tensor, nn

from infmoe.errors import InfMoEError, unknown_name
from infmoe.layers.base import ConditionalFFN, FFNCost, FFNOutput, Init
from infmoe.layers.experts import Experts, balance_loss, check_weight, expert_stats, narrow_softmax, router_logits
from infmoe.layers.routing import NoiseKey, Routing, check_num_experts_per_tok
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

    The dial is k, `Routing.num_experts_per_tok`; it may differ from layer to layer, not from row to row. What
    the gates sum to at another k than the layer's own is `gate_norm`'s to say.
    Nothing is dropped, and a token's output depends on that token alone. The router computes in float32.

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
        balance_loss_weight: float = 0.01,
        z_loss_weight: float = 0.0,
        expert_router: ExpertRouter = "learned",
        gate_norm: GateNorm = "selected",
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
            balance_loss_weight: weight of the load-balancing loss; its value at perfect balance.
            z_loss_weight: weight of the mean squared logsumexp of the logits, which keeps them small.
            expert_router: "learned", "hash" (needs `Routing.token_ids`) or "random".
            gate_norm: which experts a learned router's gates are a softmax over: those "selected" (they sum to 1
                at every k, and more experts dilute the first ones), "all" (they sum to less), or the first
                `num_experts_per_tok` ("trained": the first ones keep their weight at every k, and more come on
                top, so that they sum to more).
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
        NoiseKey(seed=noise_seed)  # refuses a bad seed now rather than at the first evaluation
        self.hidden_act = hidden_act
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.balance_loss_weight = balance_loss_weight
        self.z_loss_weight = z_loss_weight
        self.expert_router = expert_router
        self.gate_norm: GateNorm = gate_norm
        self.noise_seed = noise_seed
        self.experts = Experts(hidden_size, intermediate_size, num_experts, hidden_act)
        self._check_k(num_experts_per_tok)
        self.router = nn.Linear(hidden_size, num_experts, bias=False) if expert_router == "learned" else None
        self.reset_parameters()

    def inits(self) -> Iterable[Init]:
        yield from self.experts.inits(self.initializer_range, self.residual_init_scale)
        if self.router is not None:
            yield Init(self.router.weight, 0.0, self.initializer_range)

    def forward(self, x_BTD: Tensor, routing: Routing | None = None) -> FFNOutput:
        routing = (routing or Routing()).at_layer(self.layer_index)
        k = self._k(routing)
        x_TD = x_BTD.reshape(-1, self.hidden_size)
        if self.router is not None:
            logits_TE = router_logits(x_TD, self.router.weight)
            top_Tk, expert_Tk = logits_TE.topk(k, dim=-1)
            gate_Tk = self._gates(logits_TE, top_Tk)
            aux_loss = self._aux_loss(logits_TE, expert_Tk)
        else:
            expert_Tk = self._fixed_experts(x_BTD, k, routing)
            gate_dtype = torch.promote_types(x_BTD.dtype, torch.float32)
            gate_Tk = torch.full(expert_Tk.shape, 1.0 / k, dtype=gate_dtype, device=x_BTD.device)
            aux_loss = torch.zeros((), device=x_BTD.device)
        y_TD = self.experts(x_TD, expert_Tk, gate_Tk)
        stats = expert_stats(expert_Tk, self.num_experts, routing.max_stats_tokens)
        return FFNOutput(y_TD.view(x_BTD.shape), aux_loss, stats)

    def cost(self, routing: Routing | None = None, union_ratio: float | None = None) -> FFNCost:
        k = self._k((routing or Routing()).at_layer(self.layer_index))
        return self.experts.cost(k, 0 if self.router is None else self.router.weight.numel())

    def _k(self, routing: Routing) -> int:
        self._refuse(routing, "num_samples", "keep_ratio", "mode")
        k = routing.num_experts_per_tok
        if k is None:
            return self.num_experts_per_tok
        if isinstance(k, tuple):
            raise InfMoEError(
                f"num_experts_per_tok takes one integer (or PerLayer) for the whole batch, not one per row: got {k}"
            )
        assert isinstance(k, int)  # `at_layer` took PerLayer apart
        return self._check_k(k)

    def _check_k(self, k: int) -> int:
        check_num_experts_per_tok(k)
        if k > self.num_experts:
            raise InfMoEError(f"num_experts_per_tok {k} is more than the layer's {self.num_experts} experts")
        return k

    def _gates(self, logits_TE: Tensor, top_Tk: Tensor) -> Tensor:
        """Weights of the selected experts, whose logits are `top_Tk`; see `gate_norm`."""
        k = top_Tk.shape[1]
        if self.gate_norm == "selected" or (self.gate_norm == "trained" and k == self.num_experts_per_tok):
            return narrow_softmax(top_Tk)
        if self.gate_norm == "all":
            over_TE = logits_TE
        elif k > self.num_experts_per_tok:
            over_TE = top_Tk[:, : self.num_experts_per_tok]
        else:
            over_TE = logits_TE.topk(self.num_experts_per_tok, dim=-1).values
        return (top_Tk - over_TE.logsumexp(dim=-1, keepdim=True)).exp()

    def _aux_loss(self, logits_TE: Tensor, expert_Tk: Tensor) -> Tensor:
        loss = self.balance_loss_weight * balance_loss(narrow_softmax(logits_TE), expert_Tk)
        if self.z_loss_weight:
            square = logits_TE.logsumexp(dim=-1).square().sum() / max(logits_TE.shape[0], 1)
            loss = loss + self.z_loss_weight * square
        return loss.float()

    @torch.no_grad()
    def _fixed_experts(self, x_BTD: Tensor, k: int, routing: Routing) -> Tensor:
        """k distinct experts for each token without a look at it: the top k of its noise."""
        batch_size, num_tokens = x_BTD.shape[:-1] if x_BTD.ndim == 3 else (1, x_BTD.shape[0])
        device = x_BTD.device
        if self.expert_router == "hash":
            if routing.token_ids is None:
                raise InfMoEError("hash routing needs the token ids: pass Routing(token_ids=input_ids)")
            # The token id takes the position's place in the noise's key.
            key = NoiseKey(seed=_HASH_SEED, position=routing.token_ids)
        else:
            routing = routing.with_key(
                seed=self.noise_seed, training=self.training, batch_size=batch_size, device=device
            )
            assert routing.key is not None
            key = routing.key
        zeros_B = torch.zeros(batch_size, dtype=torch.int64, device=device)
        stream_B = zeros_B if key.stream is None else key.stream.to(device)
        position_T = torch.arange(num_tokens, device=device) if key.position is None else key.position.to(device)
        if stream_B.shape not in ((1,), (batch_size,)):
            raise InfMoEError(
                f"the noise key has {stream_B.numel()} streams, the batch {batch_size} rows: give one per row"
            )
        if position_T.shape not in ((num_tokens,), (1, num_tokens), (batch_size, num_tokens)):
            what = "token ids" if self.expert_router == "hash" else "positions"
            raise InfMoEError(
                f"{what} of shape {tuple(position_T.shape)} do not fit a batch of {batch_size} rows of "
                f"{num_tokens} tokens: give one per token"
            )
        noise_BTE = normal_noise(
            1,
            self.num_experts,
            seed=key.seed,
            step=key.step,
            layer=self.layer_index,
            stream_B=stream_B.expand(batch_size),
            position_BT=position_T.expand(batch_size, num_tokens),
        )[:, :, 0]
        return noise_BTE.reshape(-1, self.num_experts).topk(k, dim=-1).indices
