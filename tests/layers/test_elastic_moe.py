"""Elastic MoE (arXiv 2509.21892)."""

import math

import pytest
import torch
from moe_helpers import chosen_experts, key_of, moe_layer

from infmoe.errors import InfMoEError
from infmoe.layers.routing import NoiseKey, Routing


def elastic_layer(**options):
    return moe_layer(intermediate_size=80, num_experts=8, num_experts_per_tok=2, **options).train()


@pytest.mark.parametrize("prob", [0.0, 0.3, 1.0])
def test_coactivation_draws_every_subset_of_the_candidates_alike(prob):
    layer = elastic_layer(ideal_experts_per_tok=4, coactivation_prob=prob)
    x_TD = torch.randn(6000, 12)
    rank_Tk, gate_Tk, logit_Tk = chosen_experts(layer, x_TD, key_of([0], 6000, seed=5))
    assert rank_Tk.max() < 4
    assert (rank_Tk[:, 0] < rank_Tk[:, 1]).all()  # the best first, none twice
    torch.testing.assert_close(gate_Tk, logit_Tk.softmax(-1), rtol=1e-4, atol=1e-5)
    counts = torch.zeros(4, 4).index_put_((rank_Tk[:, 0], rank_Tk[:, 1]), torch.ones(6000), accumulate=True) / 6000
    for i in range(4):
        for j in range(i + 1, 4):
            share = prob / 6 + (1.0 - prob) * ((i, j) == (0, 1))
            assert abs(counts[i, j].item() - share) < 5 * math.sqrt(max(share * (1 - share), 1e-9) / 6000), (i, j)


def test_coactivation_is_a_function_of_the_key_and_of_training():
    layer = elastic_layer(ideal_experts_per_tok=8, coactivation_prob=1.0)
    x_TD = torch.randn(50, 12)
    drawn = chosen_experts(layer, x_TD, key_of([3], 50, step=1))[0]
    assert torch.equal(drawn, chosen_experts(layer, x_TD, key_of([3], 50, step=1))[0])
    for other in (key_of([4], 50, step=1), key_of([3], 50, step=2)):
        assert not torch.equal(drawn, chosen_experts(layer, x_TD, other)[0])
    alone = chosen_experts(layer, x_TD[7:8], NoiseKey(stream=torch.tensor([3]), position=torch.tensor([[7]]), step=1))
    assert torch.equal(drawn[7:8], alone[0])
    layer.eval()
    for k in (1, 2, 5):
        ranks = chosen_experts(layer, x_TD, key_of([3], 50), k=k)[0]
        assert torch.equal(ranks, torch.arange(k).expand(50, k))


def test_coactivation_at_k_ideal_is_plain_top_k():
    layer = elastic_layer(ideal_experts_per_tok=3, coactivation_prob=1.0)
    x_TD = torch.randn(40, 12)
    for k in (3, 6):
        assert torch.equal(chosen_experts(layer, x_TD, key_of([0], 40), k=k)[0], torch.arange(k).expand(40, k))


def test_gradients_reach_the_router_through_the_drawn_experts():
    layer = elastic_layer(ideal_experts_per_tok=8, coactivation_prob=1.0, balance_loss_weight=0.0)
    x_TD = torch.randn(64, 12)
    layer(x_TD[None], Routing(key=key_of([0], 64))).y_BTD.sum().backward()
    assert (layer.router.weight.grad.abs().sum(dim=1) > 0).all()


def test_the_hierarchical_loss_is_the_entropy_below_its_maximum():
    layer = moe_layer(num_experts=4, balance_loss_weight=0.0, hierarchical_loss_weight=0.5)
    x_TD = torch.randn(30, 12)
    p_TE = (x_TD @ layer.router.weight.T).softmax(-1)
    uniform = torch.full_like(p_TE, 0.25)
    divergence = (p_TE * (p_TE / uniform).log()).sum(-1).mean()
    aux_loss = layer(x_TD).aux_loss
    assert aux_loss.item() == pytest.approx(-0.5 * divergence.item(), rel=1e-4)
    with torch.no_grad():
        layer.router.weight -= 0.1 * torch.autograd.grad(aux_loss, layer.router.weight)[0]
    assert layer(x_TD).aux_loss < aux_loss  # lower is sharper
    assert layer(torch.zeros(3, 12)).aux_loss.item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rank_damping": 1.5}, "rank_damping must lie"),
        ({"coactivation_prob": -0.1}, "coactivation_prob must lie"),
        ({"ideal_experts_per_tok": 5}, r"above the trained k \(2\), and num_experts \(4\) at most, got 5"),
        ({"ideal_experts_per_tok": 1}, r"above the trained k \(2\)"),
        ({"ideal_experts_per_tok": 2, "coactivation_prob": 1.0}, r"above the trained k \(2\).*, got 2"),
        ({"hierarchical_loss_weight": -1.0}, "hierarchical_loss_weight"),
        ({"coactivation_prob": 0.9}, "goes with ideal_experts_per_tok"),
        ({"ideal_experts_per_tok": 3.0}, "ideal_experts_per_tok must be an integer"),
        ({"rank_damping": "a"}, "rank_damping must lie"),
        ({"trained_experts_per_tok": 5}, "trained_experts_per_tok 5 is more than"),
        ({"trained_experts_per_tok": 0}, "trained_experts_per_tok must be an integer"),
        ({"ideal_experts_per_tok": 3, "expert_router": "hash"}, "ranks no experts"),
        ({"rank_damping": 0.5, "expert_router": "random"}, "ranks no experts"),
    ],
)
def test_bad_elastic_options_are_refused_by_name(options, named):
    with pytest.raises(InfMoEError, match=named):
        moe_layer(**options)
