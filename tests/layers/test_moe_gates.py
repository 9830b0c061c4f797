"""What the experts' outputs are weighed by."""

import pytest
import torch
from moe_helpers import chosen_experts, moe_layer

from infmoe.errors import InfMoEError
from infmoe.layers.dense import DenseFFN
from infmoe.layers.moe import GATE_NORMS, MoEFFN
from infmoe.layers.routing import Routing


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_gates_are_a_softmax_over_what_gate_norm_says(k):
    layers = {norm: moe_layer(8, 16, num_experts=4, num_experts_per_tok=2, gate_norm=norm) for norm in GATE_NORMS}
    x = torch.randn(1, 6, 8)
    logits = torch.nn.functional.linear(x[0], layers["all"].router.weight)
    weights = layers["all"].state_dict()
    for norm, layer in layers.items():
        layer.load_state_dict(weights)
        seen = {}
        layer.experts.forward = lambda x_TD, expert_Tk, gate_Tk, seen=seen: (
            seen.update(gate=gate_Tk, at=expert_Tk) or x_TD
        )
        layer(x, Routing(num_experts_per_tok=k))
        for t in range(6):
            order = logits[t].argsort(descending=True)
            over = {"selected": order[:k], "all": order, "trained": order[:2]}[norm]
            expected = logits[t].exp()[order[:k]] / logits[t].exp()[over].sum()
            torch.testing.assert_close(seen["gate"][t], expected, rtol=1e-5, atol=1e-6)
            assert torch.equal(seen["at"][t], order[:k])


def test_an_unknown_gate_norm_is_refused():
    with pytest.raises(InfMoEError, match="did you mean 'trained'"):
        moe_layer(8, 16, gate_norm="train")


@pytest.mark.parametrize("expert_router", ["learned", "random"])
def test_the_scaling_factor_multiplies_the_output(expert_router):
    options = {"num_experts": 4, "num_experts_per_tok": 2, "expert_router": expert_router}
    plain = moe_layer(8, 16, **options).eval()
    scaled = moe_layer(8, 16, routed_scaling_factor=2.0, **options).eval()
    scaled.load_state_dict(plain.state_dict())
    x = torch.randn(3, 7, 8)
    assert torch.equal(scaled(x).y_BTD, 2.0 * plain(x).y_BTD)
    assert torch.equal(scaled(x).aux_loss, plain(x).aux_loss)


def test_scaled_by_k_it_starts_as_large_as_a_dense_layer_of_the_active_width():
    torch.manual_seed(0)
    x = torch.randn(4, 64, 64)
    dense = DenseFFN(64, 8 * 32)(x).y_BTD
    layer = MoEFFN(64, 16 * 32, num_experts=16, num_experts_per_tok=8, routed_scaling_factor=8.0)
    assert layer(x).y_BTD.std().item() == pytest.approx(dense.std().item(), rel=0.05)


@pytest.mark.parametrize("factor", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scaling_factor_that_is_no_size_is_refused(factor):
    with pytest.raises(InfMoEError, match="routed_scaling_factor must be above 0"):
        moe_layer(8, 16, routed_scaling_factor=factor)


@pytest.mark.parametrize("damping", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("gate_norm", GATE_NORMS)
def test_rank_damping_weakens_the_experts_beyond_the_trained_number(damping, gate_norm):
    plain = moe_layer(num_experts=4, num_experts_per_tok=2, gate_norm=gate_norm)
    layer = moe_layer(num_experts=4, num_experts_per_tok=2, gate_norm=gate_norm, rank_damping=damping)
    layer.load_state_dict(plain.state_dict())
    x_TD = torch.randn(20, 12)
    for k in (1, 2):
        assert torch.equal(
            layer(x_TD, Routing(num_experts_per_tok=k)).y_BTD, plain(x_TD, Routing(num_experts_per_tok=k)).y_BTD
        )
    _, gate_Tk, _ = chosen_experts(layer, x_TD, None, k=4)
    _, before_Tk, _ = chosen_experts(plain, x_TD, None, k=4)
    expected = before_Tk * torch.tensor([1.0, 1.0, damping, damping])
    if gate_norm == "selected":
        expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(gate_Tk, expected, rtol=1e-4, atol=1e-6)
