"""Routing by hash and at random."""

import pytest
import torch
from moe_helpers import key_of, moe_layer, naive_expert

from infmoe.errors import InfMoEError
from infmoe.layers.routing import NoiseKey, Routing


@pytest.mark.parametrize("k", [1, 2, 3])
def test_hash_routing_is_fixed_by_the_token_id(k):
    layer = moe_layer(expert_router="hash", num_experts_per_tok=k)
    x_D = torch.randn(12)
    y = {}
    for token_id in range(20):
        # The same input everywhere: only the token id can make a difference.
        output = layer(x_D.expand(2, 3, 12), Routing(token_ids=torch.full((2, 3), token_id)))
        torch.testing.assert_close(output.y_BTD, output.y_BTD[:1, :1].expand(2, 3, 12), rtol=0, atol=1e-6)
        chosen = output.stats.counts_U.nonzero().flatten().tolist()
        assert output.stats.counts_U[chosen].tolist() == [6.0] * k
        expected_D = sum(naive_expert(layer.experts, e, x_D) for e in chosen) / k
        torch.testing.assert_close(output.y_BTD[0, 0], expected_D, rtol=1e-4, atol=1e-5)
        y[token_id] = tuple(chosen)
    assert len(set(y.values())) > 2
    other = moe_layer(expert_router="hash", num_experts_per_tok=k, layer_index=1)
    differing = [
        other(x_D.expand(1, 12), Routing(token_ids=torch.tensor([i]))).stats.counts_U.nonzero().flatten().tolist()
        != list(chosen)
        for i, chosen in y.items()
    ]
    assert any(differing)


def test_hash_routing_needs_token_ids_that_fit():
    layer = moe_layer(expert_router="hash")
    with pytest.raises(InfMoEError, match="needs the token ids"):
        layer(torch.randn(2, 3, 12))
    with pytest.raises(InfMoEError, match=r"token ids of shape \(2, 4\)"):
        layer(torch.randn(2, 3, 12), Routing(token_ids=torch.zeros(2, 4, dtype=torch.int64)))
    with pytest.raises(InfMoEError, match="int64"):
        layer(torch.randn(2, 3, 12), Routing(token_ids=torch.zeros(2, 3)))


@pytest.mark.parametrize("expert_router", ["hash", "random"])
def test_hash_and_random_routing_are_balanced(expert_router):
    layer = moe_layer(expert_router=expert_router, num_experts=8)
    token_ids = torch.arange(8192).view(1, -1)
    counts_E = layer.eval()(torch.zeros(1, 8192, 12), Routing(token_ids=token_ids)).stats.counts_U
    # Two of eight for each of 8192: 2048 each, standard deviation sqrt(8192 / 4 * 3 / 4) = 39.
    assert counts_E.sum() == 2 * 8192
    assert (counts_E - 2048).abs().max() < 5 * 39
    assert counts_E.unique().numel() > 1


def test_random_routing_is_a_function_of_the_key():
    layer = moe_layer(expert_router="random")
    x_BTD = torch.randn(3, 40, 12)

    def y(key, x_BTD=x_BTD):
        return layer(x_BTD, Routing(key=key)).y_BTD

    y_BTD = y(key_of([5, 6, 7], 40))
    torch.testing.assert_close(y(key_of([5, 6, 7], 40)), y_BTD, rtol=0, atol=0)
    for other in (key_of([5, 6, 7], 40, seed=1), key_of([5, 6, 7], 40, step=1), key_of([8, 9, 10], 40)):
        assert not torch.allclose(y(other), y_BTD)
    # A row alone, and a row's last tokens alone (as with a cache), draw what they drew in the batch.
    torch.testing.assert_close(y(key_of([6], 40), x_BTD[1:2])[0], y_BTD[1], rtol=0, atol=1e-6)
    tail = NoiseKey(stream=torch.tensor([6]), position=torch.arange(33, 40))
    torch.testing.assert_close(y(tail, x_BTD[1:2, 33:])[0], y_BTD[1, 33:], rtol=0, atol=1e-6)


def test_random_routing_without_a_key():
    layer = moe_layer(expert_router="random", noise_seed=3).train()
    x_BTD = torch.randn(2, 40, 12)
    assert not torch.allclose(layer(x_BTD).y_BTD, layer(x_BTD).y_BTD)
    layer.eval()
    expected_BTD = layer(x_BTD, Routing(key=NoiseKey(seed=3))).y_BTD
    torch.testing.assert_close(layer(x_BTD).y_BTD, expected_BTD, rtol=0, atol=0)


def test_keys_that_do_not_fit_the_batch_are_refused():
    layer = moe_layer(expert_router="random")
    x_BTD = torch.randn(2, 5, 12)
    with pytest.raises(InfMoEError, match="3 streams, the batch 2 rows"):
        layer(x_BTD, Routing(key=NoiseKey(stream=torch.arange(3))))
    with pytest.raises(InfMoEError, match=r"positions of shape \(6,\)"):
        layer(x_BTD, Routing(key=NoiseKey(position=torch.arange(6))))


@pytest.mark.parametrize("expert_router", ["hash", "random"])
def test_unlearned_routers_have_neither_parameters_nor_losses(expert_router):
    layer = moe_layer(expert_router=expert_router, z_loss_weight=1.0)
    output = layer(torch.randn(1, 5, 12), Routing(token_ids=torch.zeros(1, 5, dtype=torch.int64)))
    assert output.aux_loss.item() == 0.0
    cost = layer.cost()
    assert cost.params == cost.total == layer.num_params() == moe_layer().cost().total
    assert (cost.params_discrete_router, cost.flops_router) == (0, 0)
