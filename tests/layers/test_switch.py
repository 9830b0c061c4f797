import dataclasses

import pytest
import torch

from infmoe.errors import InfMoEError
from infmoe.layers.dense import DenseFFN
from infmoe.layers.routing import Routing
from infmoe.layers.switch import SwitchFFN


def make_layer(hidden_size=12, intermediate_size=30, **options):
    torch.manual_seed(0)
    layer = SwitchFFN(hidden_size, intermediate_size, initializer_range=0.5, **{"num_experts": 3} | options)
    with torch.no_grad():
        layer.experts.b1_EF.normal_()
        layer.experts.b2_D.normal_()
    return layer


def naive_switch(layer, x_TD):
    y = []
    for x in x_TD:
        p_E = (layer.router.weight @ x).softmax(dim=0)
        e = int(p_E.argmax())
        h = layer.experts.act(x @ layer.experts.w1_EDF[e] + layer.experts.b1_EF[e])
        y.append(p_E[e] * (h @ layer.experts.w2_EFD[e] + layer.experts.b2_D))
    return torch.stack(y)


def test_output_and_gradients_equal_a_loop_over_tokens():
    layer = make_layer()
    x_TD = torch.randn(13, 12, requires_grad=True)
    grad_TD = torch.randn(13, 12)
    inputs = (x_TD, *layer.parameters())
    output = layer(x_TD)
    naive_TD = naive_switch(layer, x_TD)
    torch.testing.assert_close(output.y_BTD, naive_TD)
    assert output.stats.counts_U.min() > 0
    grads = torch.autograd.grad(output.y_BTD, inputs, grad_TD)
    for a, b in zip(grads, torch.autograd.grad(naive_TD, inputs, grad_TD), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_router_gets_a_gradient_from_the_output_and_from_the_balance_loss():
    layer = make_layer()
    output = layer(torch.randn(9, 12))
    for loss in (output.y_BTD.sum(), output.aux_loss):
        (grad_ED,) = torch.autograd.grad(loss, layer.router.weight, retain_graph=True)
        assert grad_ED.abs().max() > 1e-4


def test_one_expert_is_a_dense_ffn():
    layer = make_layer(num_experts=1)
    dense = DenseFFN(12, 30)
    with torch.no_grad():
        dense.w1.weight.copy_(layer.experts.w1_EDF[0].T)
        dense.w1.bias.copy_(layer.experts.b1_EF[0])
        dense.w2.weight.copy_(layer.experts.w2_EFD[0].T)
        dense.w2.bias.copy_(layer.experts.b2_D)
    x_BTD = torch.randn(2, 5, 12)
    torch.testing.assert_close(layer(x_BTD).y_BTD, dense(x_BTD).y_BTD)


def test_balance_loss_by_hand():
    layer = make_layer(hidden_size=3, balance_loss_weight=0.01)
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(3) * 2)
    assert layer(torch.eye(3)).aux_loss.item() == pytest.approx(0.01)
    x_TD = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    probs_TE = (2 * x_TD).softmax(dim=-1)
    expected = 0.01 * 3 * (2 / 3 * probs_TE[:, 0].mean() + 1 / 3 * probs_TE[:, 1].mean())
    aux_loss = layer(x_TD).aux_loss
    assert aux_loss.item() == pytest.approx(expected.item())
    assert (aux_loss.dtype, aux_loss.shape) == (torch.float32, ())


def test_a_row_does_not_depend_on_its_batch():
    layer = make_layer()
    x_BTD = torch.randn(4, 7, 12)
    y_BTD = layer(x_BTD).y_BTD
    for row in range(4):
        torch.testing.assert_close(layer(x_BTD[row : row + 1]).y_BTD[0], y_BTD[row], rtol=0, atol=1e-6)
    torch.testing.assert_close(layer(x_BTD[1]).y_BTD, y_BTD[1], rtol=0, atol=1e-6)


def test_capacity_drops_later_tokens_and_counts_them():
    layer = make_layer(hidden_size=3, capacity_factor=1.0)
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(3) * 2)
    # 5 tokens, 3 experts: an expert serves ceil(5 / 3) = 2; expert 0 is asked for 4.
    x_BTD = torch.eye(3)[[0, 0, 1, 0, 0]][None]
    output = layer(x_BTD)
    unlimited = make_layer(hidden_size=3)
    unlimited.load_state_dict(layer.state_dict())
    expected_BTD = unlimited(x_BTD).y_BTD
    kept = [0, 1, 2]
    torch.testing.assert_close(output.y_BTD[:, kept], expected_BTD[:, kept])
    assert expected_BTD[:, 3:].ne(0).all()
    assert output.y_BTD[:, 3:].eq(0).all()
    assert output.stats.dropped.item() == 2
    assert output.stats.counts_U.tolist() == [2, 1, 0]
    assert unlimited(x_BTD).stats.dropped.item() == 0
    assert output.aux_loss.item() == pytest.approx(unlimited(x_BTD).aux_loss.item())  # f counts the dropped


def test_ample_capacity_drops_nothing():
    layer, limited = make_layer(), make_layer(capacity_factor=3.0)
    x_BTD = torch.randn(2, 8, 12)
    torch.testing.assert_close(limited(x_BTD).y_BTD, layer(x_BTD).y_BTD)
    assert limited(x_BTD).stats.dropped.item() == 0


@pytest.mark.parametrize("dial", [{"num_samples": 2}, {"keep_ratio": 0.5}, {"num_experts_per_tok": 1}, {"mode": "mu"}])
def test_dials_are_refused(dial):
    layer = make_layer()
    with pytest.raises(InfMoEError, match=f"SwitchFFN has no dial '{next(iter(dial))}'"):
        layer(torch.randn(2, 12), Routing(**dial))
    with pytest.raises(InfMoEError, match="SwitchFFN has no dial"):
        layer.cost(Routing(**dial))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 4}, "does not divide into 4 experts"),
        ({"num_experts": 0}, "num_experts must be"),
        ({"hidden_act": "gelo"}, "unknown hidden_act"),
        ({"balance_loss_weight": -0.1}, "balance_loss_weight must be"),
        ({"balance_loss_weight": float("nan")}, "balance_loss_weight must be"),
        ({"capacity_factor": 0.0}, "capacity_factor must be positive"),
    ],
)
def test_bad_options_are_refused_in_one_line(options, message):
    with pytest.raises(InfMoEError, match=message) as error:
        make_layer(**options)
    assert "\n" not in str(error.value)


def test_cost_in_the_papers_accounting():
    with torch.device("meta"):
        layer = SwitchFFN(768, 6144)
    cost = layer.cost()
    assert cost.total == 2 * 768 * 6144 + 6144 + 768
    assert cost.active_params == 2 * 768 * 3072 + 3072 + 768
    assert cost.params == layer.num_params() == cost.total + 2 * 768
    assert cost.active_params_union == cost.weights_executed == cost.active_params + 2 * 768
    assert (cost.flops_router, cost.flops_executed) == (2 * 768 * 2, 2 * 768 * 2 + 2 * 2 * 768 * 3072)
    assert dataclasses.astuple(cost)[5:7] == (cost.flops_ideal,) * 2


@pytest.mark.parametrize("hidden_act", ["gelu_new", "swiglu"])
def test_inits_cover_every_parameter(hidden_act):
    layer = make_layer(hidden_act=hidden_act)
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(float("nan"))
    layer.reset_parameters()
    assert all(p.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("capacity_factor", [None, 1.0])
def test_compiles_without_a_graph_break(capacity_factor):
    torch._dynamo.reset()
    layer = make_layer(capacity_factor=capacity_factor)
    x_BTD = torch.randn(2, 6, 12)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x_BTD).y_BTD, layer(x_BTD).y_BTD)
