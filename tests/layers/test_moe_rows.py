"""Rows of a batch that run different numbers of experts."""

import pytest
import torch
from moe_helpers import key_of, moe_layer

from infmoe.errors import InfMoEError
from infmoe.layers.routing import PerLayer, Routing


@pytest.mark.parametrize("expert_router", ["learned", "hash", "random"])
def test_rows_with_their_own_k_give_what_each_does_alone(expert_router):
    layer = moe_layer(12, 42, num_experts=6, expert_router=expert_router).eval()
    x_BTD, ids_BT = torch.randn(5, 7, 12), torch.randint(50, (5, 7))
    k_B, streams = (2, 1, 6, 2, 3), [11, 12, 13, 14, 15]
    out = layer(x_BTD, Routing(num_experts_per_tok=k_B, key=key_of(streams, 7), token_ids=ids_BT))
    selected = torch.zeros(6)
    for b, k in enumerate(k_B):
        alone = Routing(num_experts_per_tok=k, key=key_of(streams[b : b + 1], 7), token_ids=ids_BT[b : b + 1])
        found = layer(x_BTD[b : b + 1], alone)
        torch.testing.assert_close(out.y_BTD[b : b + 1], found.y_BTD)
        selected += found.stats.counts_U
    assert torch.equal(out.stats.counts_U, selected)
    assert out.stats.tokens == 35
    few = layer(x_BTD, Routing(num_experts_per_tok=k_B, key=key_of(streams, 7), token_ids=ids_BT, max_stats_tokens=10))
    assert few.stats.tokens == 10  # of each k its rows' share
    torch.testing.assert_close(few.y_BTD, out.y_BTD)
    per_layer = Routing(num_experts_per_tok=PerLayer([k_B, 1]), key=key_of(streams, 7), token_ids=ids_BT)
    torch.testing.assert_close(layer(x_BTD, per_layer).y_BTD, out.y_BTD)
    one = layer(x_BTD, Routing(num_experts_per_tok=(2,), key=key_of(streams, 7), token_ids=ids_BT))
    same = layer(x_BTD, Routing(num_experts_per_tok=2, key=key_of(streams, 7), token_ids=ids_BT))
    assert torch.equal(one.y_BTD, same.y_BTD)


def test_rows_with_their_own_k_are_refused_where_they_mean_nothing():
    layer = moe_layer()
    x_BTD = torch.randn(3, 2, 12)
    with pytest.raises(InfMoEError, match="are for inference"):
        layer(x_BTD, Routing(num_experts_per_tok=(1, 2, 2)))
    layer.eval()
    with pytest.raises(InfMoEError, match=r"has 2 values for an input of shape \(3, 2, 12\)"):
        layer(x_BTD, Routing(num_experts_per_tok=(1, 2)))
    with pytest.raises(InfMoEError, match=r"of shape \(3, 12\): give one per row of \(B, T, D\)"):
        layer(x_BTD[:, 0], Routing(num_experts_per_tok=(1, 2, 2)))
    for given in ({"key": key_of([1, 2], 2)}, {"token_ids": torch.zeros(2, 2, dtype=torch.int64)}):
        with pytest.raises(InfMoEError, match="2 values for a batch of 3 rows"):
            layer(x_BTD, Routing(num_experts_per_tok=(1, 2, 2), **given))
    assert layer(x_BTD[:0], Routing(num_experts_per_tok=())).y_BTD.shape == (0, 2, 12)
    with pytest.raises(InfMoEError, match="has 2 values"):
        layer(x_BTD[:0], Routing(num_experts_per_tok=(1, 2)))
    same = Routing(num_experts_per_tok=(2, 2, 2))
    assert layer.cost(same) == layer.cost(Routing(num_experts_per_tok=2))
    assert layer.train()(x_BTD, same).aux_loss == layer(x_BTD, Routing(num_experts_per_tok=2)).aux_loss
    with pytest.raises(InfMoEError, match="more than the layer's 4 experts"):
        layer(x_BTD, Routing(num_experts_per_tok=(1, 2, 5)))
    with pytest.raises(InfMoEError, match="ask for one at a time"):
        layer.cost(Routing(num_experts_per_tok=(1, 2)))


def test_losses_of_rows_with_their_own_k_are_weighed_by_rows():
    layer = moe_layer(balance_loss_weight=0.1).eval()
    x_BTD = torch.randn(4, 9, 12)
    found = layer(x_BTD, Routing(num_experts_per_tok=(2, 1, 2, 2))).aux_loss
    parts = [layer(x_BTD[[0, 2, 3]], Routing(num_experts_per_tok=2)), layer(x_BTD[[1]], Routing(num_experts_per_tok=1))]
    torch.testing.assert_close(found, 0.75 * parts[0].aux_loss + 0.25 * parts[1].aux_loss)
    assert found > 0
    same = layer(x_BTD, Routing(num_experts_per_tok=(2, 2, 2, 2))).aux_loss
    torch.testing.assert_close(same, layer(x_BTD, Routing(num_experts_per_tok=2)).aux_loss)
