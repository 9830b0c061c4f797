import math

import pytest
import torch
from moe_helpers import moe_layer, naive_expert
from torch.utils.checkpoint import checkpoint

from infmoe.errors import InfMoEError
from infmoe.layers.dense import DenseFFN
from infmoe.layers.moe import MoEFFN
from infmoe.layers.routing import PerLayer, Routing


def naive_moe(layer, x_TD, k):
    y = []
    for x in x_TD:
        logits_E = layer.router.weight @ x
        chosen = sorted(range(layer.num_experts), key=lambda e, logits=logits_E: -logits[e].item())[:k]
        weights = [logits_E[e].exp() for e in chosen]
        parts = [w / sum(weights) * naive_expert(layer.experts, e, x) for w, e in zip(weights, chosen, strict=True)]
        y.append(sum(parts))
    return torch.stack(y)


@pytest.mark.parametrize("hidden_act", ["gelu_new", "swiglu"])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_output_and_gradients_equal_a_loop_over_tokens_and_experts(k, hidden_act):
    layer = moe_layer(hidden_act=hidden_act)
    x_TD = torch.randn(13, 12, requires_grad=True)
    grad_TD = torch.randn(13, 12)
    inputs = (x_TD, *layer.parameters())
    y_TD = layer(x_TD, Routing(num_experts_per_tok=k)).y_BTD
    naive_TD = naive_moe(layer, x_TD, k)
    torch.testing.assert_close(y_TD, naive_TD, rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad(y_TD, inputs, grad_TD)
    for a, b in zip(grads, torch.autograd.grad(naive_TD, inputs, grad_TD), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    router_grad = grads[-1]
    assert (router_grad.abs().max() > 1e-3) == (k > 1)  # one gate alone is 1, whatever the logit


@pytest.mark.parametrize("hidden_act", ["gelu_new", "swiglu"])
def test_one_expert_is_a_dense_ffn(hidden_act):
    layer = moe_layer(intermediate_size=30, num_experts=1, num_experts_per_tok=1, hidden_act=hidden_act)
    dense = DenseFFN(12, 30, hidden_act=hidden_act)
    with torch.no_grad():
        dense.w1.weight.copy_(layer.experts.w1_EDF[0].T)
        dense.w1.bias.copy_(layer.experts.b1_EF[0])
        dense.w2.weight.copy_(layer.experts.w2_EFD[0].T)
        dense.w2.bias.copy_(layer.experts.b2_D)
        if dense.w3 is not None:
            dense.w3.weight.copy_(layer.experts.w3_EDF[0].T)
            dense.w3.bias.copy_(layer.experts.b3_EF[0])
    x_BTD = torch.randn(2, 5, 12)
    torch.testing.assert_close(layer(x_BTD).y_BTD, dense(x_BTD).y_BTD)
    assert layer.cost().total == dense.num_params()


def test_all_experts_make_the_softmax_weighted_sum():
    layer = moe_layer()
    x_TD = torch.randn(6, 12)
    p_TE = (x_TD @ layer.router.weight.T).softmax(dim=-1)
    expected_TD = sum(p_TE[:, e : e + 1] * naive_expert(layer.experts, e, x_TD) for e in range(4))
    output = layer(x_TD, Routing(num_experts_per_tok=4))
    torch.testing.assert_close(output.y_BTD, expected_TD, rtol=1e-4, atol=1e-5)
    assert output.stats.union.item() == 6
    assert output.aux_loss.item() == pytest.approx(layer.balance_loss_weight)  # every expert runs for all


def test_a_case_by_hand():
    layer = MoEFFN(2, 3, num_experts=3, num_experts_per_tok=2, hidden_act="relu")
    with torch.no_grad():
        layer.router.weight.copy_(torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0], [-5.0, 0.0]]))
        layer.experts.w1_EDF.copy_(torch.tensor([[[1.0], [0.0]], [[0.0], [1.0]], [[9.0], [9.0]]]))
        layer.experts.b1_EF.copy_(torch.tensor([[1.0], [-1.0], [9.0]]))
        layer.experts.w2_EFD.copy_(torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]], [[9.0, 9.0]]]))
        layer.experts.b2_D.copy_(torch.tensor([10.0, 20.0]))
    # Logits 0 and log 3: gates 1/4 and 3/4. Expert 0: relu(1 + 1) = 2; expert 1: 2 * relu(5 - 1) = 8.
    y_TD = layer(torch.tensor([[1.0, 5.0]])).y_BTD
    torch.testing.assert_close(y_TD, torch.tensor([[10.0 + 2 / 4, 20.0 + 8 * 3 / 4]]))


def test_ties_still_choose_distinct_experts():
    layer = moe_layer()
    for k in range(1, 5):
        stats = layer(torch.zeros(3, 12), Routing(num_experts_per_tok=k)).stats
        assert stats.counts_U.sum() == 3 * k
        assert stats.counts_U.max() <= 3


def test_auxiliary_losses_by_hand():
    layer = moe_layer(hidden_size=4, num_experts_per_tok=1, balance_loss_weight=0.03)
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(4) * 2)
    assert layer(torch.eye(4)).aux_loss.item() == pytest.approx(0.03)
    x_TD = torch.eye(4)[[0, 0, 0, 1]]
    p_TE = (2 * x_TD).softmax(dim=-1)
    balance = 4 * (0.75 * p_TE[:, 0].mean() + 0.25 * p_TE[:, 1].mean())
    assert layer(x_TD).aux_loss.item() == pytest.approx(0.03 * balance.item())
    layer.z_loss_weight = 0.5
    z = math.log(math.exp(2) + 3) ** 2
    aux_loss = layer(x_TD).aux_loss
    assert aux_loss.item() == pytest.approx(0.03 * balance.item() + 0.5 * z)
    assert (aux_loss.dtype, aux_loss.shape) == (torch.float32, ())


def test_a_row_does_not_depend_on_its_batch():
    layer = moe_layer()
    x_BTD = torch.randn(4, 7, 12)
    y_BTD = layer(x_BTD).y_BTD
    for row in range(4):
        torch.testing.assert_close(layer(x_BTD[row : row + 1]).y_BTD[0], y_BTD[row], rtol=0, atol=1e-6)
    torch.testing.assert_close(layer(x_BTD[1]).y_BTD, y_BTD[1], rtol=0, atol=1e-6)


def test_runs_repeat_bit_for_bit():
    layer = moe_layer()
    x_BTD = torch.randn(8, 64, 12)
    grads = [torch.autograd.grad(layer(x_BTD).y_BTD.square().sum(), list(layer.parameters())) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_no_tokens():
    output = moe_layer(z_loss_weight=1.0)(torch.zeros(0, 12))
    assert output.y_BTD.shape == (0, 12)
    assert output.aux_loss.item() == 0.0


def test_the_dial_per_layer():
    routing = Routing(num_experts_per_tok=PerLayer([1, 3]))
    for layer_index, k in enumerate((1, 3)):
        layer = moe_layer(layer_index=layer_index)
        assert layer(torch.randn(5, 12), routing).stats.counts_U.sum() == 5 * k
        assert layer.cost(routing) == layer.cost(Routing(num_experts_per_tok=k))


@pytest.mark.parametrize("dial", [{"num_samples": 2}, {"keep_ratio": 0.5}, {"mode": "sample"}])
def test_foreign_dials_are_refused(dial):
    layer = moe_layer()
    with pytest.raises(InfMoEError, match=f"MoEFFN has no dial '{next(iter(dial))}'"):
        layer(torch.randn(2, 12), Routing(**dial))
    with pytest.raises(InfMoEError, match="MoEFFN has no dial"):
        layer.cost(Routing(**dial))


def test_bad_k_is_refused():
    routing = Routing(num_experts_per_tok=5)
    for ask in (lambda: moe_layer()(torch.randn(2, 3, 12), routing), lambda: moe_layer().cost(routing)):
        with pytest.raises(InfMoEError, match="num_experts_per_tok 5 is more than the layer's 4"):
            ask()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 3}, "does not divide into 3 experts"),
        ({"num_experts_per_tok": 5}, "more than the layer's 4 experts"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok must be"),
        ({"balance_loss_weight": -1.0}, "balance_loss_weight must be"),
        ({"z_loss_weight": float("inf")}, "z_loss_weight must be"),
        ({"expert_router": "learnt"}, "did you mean 'learned'"),
        ({"noise_seed": -1}, "noise seed"),
    ],
)
def test_bad_options_are_refused_in_one_line(options, message):
    with pytest.raises(InfMoEError, match=message) as error:
        moe_layer(**options)
    assert "\n" not in str(error.value)


def test_cost_in_the_papers_accounting():
    with torch.device("meta"):
        layer = MoEFFN(768, 6144)
    cost = layer.cost()
    assert cost.total == 2 * 768 * 6144 + 6144 + 768
    assert cost.active_params == 2 * 768 * 3072 + 3072 + 768
    assert cost.params == layer.num_params() == cost.total + 4 * 768
    assert cost.active_params_union == cost.weights_executed == cost.weights_ideal == cost.active_params + 4 * 768
    assert cost.flops_router == 2 * 768 * 4
    assert cost.flops_executed == cost.flops_ideal == cost.flops_router + 2 * 2 * 768 * 3072
    every = layer.cost(Routing(num_experts_per_tok=4))
    assert every.active_params == every.total


@pytest.mark.parametrize("options", [{}, {"hidden_act": "swiglu"}, {"expert_router": "hash"}])
def test_inits_cover_every_parameter(options):
    layer = MoEFFN(64, 256, initializer_range=0.1, residual_init_scale=0.5, **options)
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(float("nan"))
    torch.manual_seed(0)
    layer.reset_parameters()
    for name, p in layer.named_parameters():
        std = 0.0 if "b" in name.rsplit(".")[-1][:1] else 0.05 if "w2" in name else 0.1
        assert p.std().item() == pytest.approx(std, rel=0.15), name
        assert p.mean().item() == pytest.approx(0.0, abs=0.02), name


@pytest.mark.parametrize(
    ("expert_router", "autocast"), [("learned", False), ("learned", True), ("hash", False), ("random", False)]
)
def test_compiles_without_a_graph_break(expert_router, autocast):
    torch._dynamo.reset()
    layer = moe_layer(expert_router=expert_router).eval()
    x_BTD = torch.randn(2, 6, 12)
    routing = Routing(token_ids=torch.randint(0, 50, (2, 6)))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    grads = []
    for f in (compiled, layer):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output = f(x_BTD, routing)
        loss = output.y_BTD.float().square().sum() + output.aux_loss
        grads.append((output.y_BTD, *torch.autograd.grad(loss, list(layer.parameters()))))
    for a, b in zip(*grads, strict=True):
        assert (a - b).norm() <= (0.02 if autocast else 1e-5) * b.norm()


@pytest.mark.parametrize("expert_router", ["learned", "random"])
def test_checkpointing_changes_no_gradient(expert_router):
    layer = moe_layer(expert_router=expert_router).train()
    x_BTD = torch.randn(2, 6, 12, requires_grad=True)
    inputs = [x_BTD, *layer.parameters()]

    def grads(checkpointed):
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = checkpoint(layer, x_BTD, use_reentrant=False) if checkpointed else layer(x_BTD)
        loss = output.y_BTD.float().square().sum() + output.aux_loss
        torch.manual_seed(2)  # the second forward must bring its own state back
        return torch.autograd.grad(loss, inputs)

    for a, b in zip(grads(True), grads(False), strict=True):
        assert torch.equal(a, b)


def test_pure_bf16_keeps_the_router_in_fp32():
    layer = moe_layer(hidden_size=64).bfloat16()
    x_BTD = torch.randn(2, 9, 64, dtype=torch.bfloat16)
    output = layer(x_BTD)
    exact = moe_layer(hidden_size=64)
    exact.load_state_dict(layer.state_dict())
    expected = exact(x_BTD.float())
    assert output.y_BTD.dtype == torch.bfloat16
    assert torch.equal(output.stats.counts_U, expected.stats.counts_U)
    torch.testing.assert_close(output.aux_loss, expected.aux_loss)
    assert (output.y_BTD.float() - expected.y_BTD).norm() <= 0.02 * expected.y_BTD.norm()
