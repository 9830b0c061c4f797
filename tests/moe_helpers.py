"""What the tests of the discrete mixture share."""

import torch

from infmoe.layers.moe import MoEFFN
from infmoe.layers.routing import NoiseKey, Routing


def moe_layer(hidden_size=12, intermediate_size=40, **options):
    torch.manual_seed(0)
    layer = MoEFFN(hidden_size, intermediate_size, **{"initializer_range": 0.5} | options)
    with torch.no_grad():
        layer.experts.b1_EF.normal_()
        layer.experts.b2_D.normal_()
    return layer


def naive_expert(experts, e, x):
    h = experts.act(x @ experts.w1_EDF[e] + experts.b1_EF[e])
    if experts.w3_EDF is not None:
        h = h * (x @ experts.w3_EDF[e] + experts.b3_EF[e])
    return h @ experts.w2_EFD[e] + experts.b2_D


def key_of(streams, num_tokens, **fields):
    position = torch.arange(num_tokens).expand(len(streams), -1)
    return NoiseKey(stream=torch.tensor(streams), position=position, **fields)


def chosen_experts(layer, x_TD, key, k=2):
    """The experts that each token runs, by the ranks of its router's logits: (T, k), and those logits."""
    seen = {}
    forward = layer.experts.forward

    def watch(x, expert_Tk, gate_Tk):
        seen.update(expert_Tk=expert_Tk, gate_Tk=gate_Tk)
        return forward(x, expert_Tk, gate_Tk)

    layer.experts.forward = watch
    try:
        layer(x_TD[None], Routing(num_experts_per_tok=k, key=key))
    finally:
        del layer.experts.forward
    logits_TE = x_TD @ layer.router.weight.T
    order_TE = logits_TE.argsort(dim=-1, descending=True)
    rank_Tk = (seen["expert_Tk"][:, :, None] == order_TE[:, None]).float().argmax(-1)
    return rank_Tk, seen["gate_Tk"], logits_TE.gather(1, seen["expert_Tk"])
