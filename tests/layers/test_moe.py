import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from infmoe.errors import InfMoEError
from infmoe.layers.dense import DenseFFN
from infmoe.layers.moe import GATE_NORMS, MoEFFN
from infmoe.layers.routing import NoiseKey, PerLayer, Routing


def make_layer(hidden_size=12, intermediate_size=40, **options):
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


def naive_moe(layer, x_TD, k):
    y = []
    for x in x_TD:
        logits_E = layer.router.weight @ x
        chosen = sorted(range(layer.num_experts), key=lambda e, logits=logits_E: -logits[e].item())[:k]
        weights = [logits_E[e].exp() for e in chosen]
        parts = [w / sum(weights) * naive_expert(layer.experts, e, x) for w, e in zip(weights, chosen, strict=True)]
        y.append(sum(parts))
    return torch.stack(y)


def key_of(streams, num_tokens, **fields):
    position = torch.arange(num_tokens).expand(len(streams), -1)
    return NoiseKey(stream=torch.tensor(streams), position=position, **fields)


@pytest.mark.parametrize("hidden_act", ["gelu_new", "swiglu"])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_output_and_gradients_equal_a_loop_over_tokens_and_experts(k, hidden_act):
    layer = make_layer(hidden_act=hidden_act)
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
    layer = make_layer(intermediate_size=30, num_experts=1, num_experts_per_tok=1, hidden_act=hidden_act)
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
    layer = make_layer()
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
    layer = make_layer()
    for k in range(1, 5):
        stats = layer(torch.zeros(3, 12), Routing(num_experts_per_tok=k)).stats
        assert stats.counts_U.sum() == 3 * k
        assert stats.counts_U.max() <= 3


def test_auxiliary_losses_by_hand():
    layer = make_layer(hidden_size=4, num_experts_per_tok=1, balance_loss_weight=0.03)
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
    layer = make_layer()
    x_BTD = torch.randn(4, 7, 12)
    y_BTD = layer(x_BTD).y_BTD
    for row in range(4):
        torch.testing.assert_close(layer(x_BTD[row : row + 1]).y_BTD[0], y_BTD[row], rtol=0, atol=1e-6)
    torch.testing.assert_close(layer(x_BTD[1]).y_BTD, y_BTD[1], rtol=0, atol=1e-6)


def test_runs_repeat_bit_for_bit():
    layer = make_layer()
    x_BTD = torch.randn(8, 64, 12)
    grads = [torch.autograd.grad(layer(x_BTD).y_BTD.square().sum(), list(layer.parameters())) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_no_tokens():
    output = make_layer(z_loss_weight=1.0)(torch.zeros(0, 12))
    assert output.y_BTD.shape == (0, 12)
    assert output.aux_loss.item() == 0.0


def test_the_dial_per_layer():
    routing = Routing(num_experts_per_tok=PerLayer([1, 3]))
    for layer_index, k in enumerate((1, 3)):
        layer = make_layer(layer_index=layer_index)
        assert layer(torch.randn(5, 12), routing).stats.counts_U.sum() == 5 * k
        assert layer.cost(routing) == layer.cost(Routing(num_experts_per_tok=k))


@pytest.mark.parametrize("dial", [{"num_samples": 2}, {"keep_ratio": 0.5}, {"mode": "sample"}])
def test_foreign_dials_are_refused(dial):
    layer = make_layer()
    with pytest.raises(InfMoEError, match=f"MoEFFN has no dial '{next(iter(dial))}'"):
        layer(torch.randn(2, 12), Routing(**dial))
    with pytest.raises(InfMoEError, match="MoEFFN has no dial"):
        layer.cost(Routing(**dial))


def test_bad_k_is_refused():
    routing = Routing(num_experts_per_tok=5)
    for ask in (lambda: make_layer()(torch.randn(2, 3, 12), routing), lambda: make_layer().cost(routing)):
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
        make_layer(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_hash_routing_is_fixed_by_the_token_id(k):
    layer = make_layer(expert_router="hash", num_experts_per_tok=k)
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
    other = make_layer(expert_router="hash", num_experts_per_tok=k, layer_index=1)
    differing = [
        other(x_D.expand(1, 12), Routing(token_ids=torch.tensor([i]))).stats.counts_U.nonzero().flatten().tolist()
        != list(chosen)
        for i, chosen in y.items()
    ]
    assert any(differing)


def test_hash_routing_needs_token_ids_that_fit():
    layer = make_layer(expert_router="hash")
    with pytest.raises(InfMoEError, match="needs the token ids"):
        layer(torch.randn(2, 3, 12))
    with pytest.raises(InfMoEError, match=r"token ids of shape \(2, 4\)"):
        layer(torch.randn(2, 3, 12), Routing(token_ids=torch.zeros(2, 4, dtype=torch.int64)))
    with pytest.raises(InfMoEError, match="int64"):
        layer(torch.randn(2, 3, 12), Routing(token_ids=torch.zeros(2, 3)))


@pytest.mark.parametrize("expert_router", ["hash", "random"])
def test_hash_and_random_routing_are_balanced(expert_router):
    layer = make_layer(expert_router=expert_router, num_experts=8)
    token_ids = torch.arange(8192).view(1, -1)
    counts_E = layer.eval()(torch.zeros(1, 8192, 12), Routing(token_ids=token_ids)).stats.counts_U
    # Two of eight for each of 8192: 2048 each, standard deviation sqrt(8192 / 4 * 3 / 4) = 39.
    assert counts_E.sum() == 2 * 8192
    assert (counts_E - 2048).abs().max() < 5 * 39
    assert counts_E.unique().numel() > 1


def test_random_routing_is_a_function_of_the_key():
    layer = make_layer(expert_router="random")
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
    layer = make_layer(expert_router="random", noise_seed=3).train()
    x_BTD = torch.randn(2, 40, 12)
    assert not torch.allclose(layer(x_BTD).y_BTD, layer(x_BTD).y_BTD)
    layer.eval()
    expected_BTD = layer(x_BTD, Routing(key=NoiseKey(seed=3))).y_BTD
    torch.testing.assert_close(layer(x_BTD).y_BTD, expected_BTD, rtol=0, atol=0)


def test_keys_that_do_not_fit_the_batch_are_refused():
    layer = make_layer(expert_router="random")
    x_BTD = torch.randn(2, 5, 12)
    with pytest.raises(InfMoEError, match="3 streams, the batch 2 rows"):
        layer(x_BTD, Routing(key=NoiseKey(stream=torch.arange(3))))
    with pytest.raises(InfMoEError, match=r"positions of shape \(6,\)"):
        layer(x_BTD, Routing(key=NoiseKey(position=torch.arange(6))))


@pytest.mark.parametrize("expert_router", ["hash", "random"])
def test_unlearned_routers_have_neither_parameters_nor_losses(expert_router):
    layer = make_layer(expert_router=expert_router, z_loss_weight=1.0)
    output = layer(torch.randn(1, 5, 12), Routing(token_ids=torch.zeros(1, 5, dtype=torch.int64)))
    assert output.aux_loss.item() == 0.0
    cost = layer.cost()
    assert cost.params == cost.total == layer.num_params() == make_layer().cost().total
    assert (cost.params_discrete_router, cost.flops_router) == (0, 0)


def test_cost_in_the_papers_accounting():
    with torch.device("meta"):
        layer = MoEFFN(768, 6144)
    cost = layer.cost()
    assert cost.total == 2 * 768 * 6144 + 6144 + 768
    assert cost.active_params == layer.num_active_params() == 2 * 768 * 3072 + 3072 + 768
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
    layer = make_layer(expert_router=expert_router).eval()
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
    layer = make_layer(expert_router=expert_router).train()
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
    layer = make_layer(hidden_size=64).bfloat16()
    x_BTD = torch.randn(2, 9, 64, dtype=torch.bfloat16)
    output = layer(x_BTD)
    exact = make_layer(hidden_size=64)
    exact.load_state_dict(layer.state_dict())
    expected = exact(x_BTD.float())
    assert output.y_BTD.dtype == torch.bfloat16
    assert torch.equal(output.stats.counts_U, expected.stats.counts_U)
    torch.testing.assert_close(output.aux_loss, expected.aux_loss)
    assert (output.y_BTD.float() - expected.y_BTD).norm() <= 0.02 * expected.y_BTD.norm()


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_gates_are_a_softmax_over_what_gate_norm_says(k):
    layers = {norm: make_layer(8, 16, num_experts=4, num_experts_per_tok=2, gate_norm=norm) for norm in GATE_NORMS}
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
        make_layer(8, 16, gate_norm="train")


@pytest.mark.parametrize("expert_router", ["learned", "random"])
def test_the_scaling_factor_multiplies_the_output(expert_router):
    options = {"num_experts": 4, "num_experts_per_tok": 2, "expert_router": expert_router}
    plain = make_layer(8, 16, **options).eval()
    scaled = make_layer(8, 16, routed_scaling_factor=2.0, **options).eval()
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
        make_layer(8, 16, routed_scaling_factor=factor)


# Elastic MoE (arXiv 2509.21892)


def elastic_layer(**options):
    return make_layer(intermediate_size=80, num_experts=8, num_experts_per_tok=2, **options).train()


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
    layer = make_layer(num_experts=4, balance_loss_weight=0.0, hierarchical_loss_weight=0.5)
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


@pytest.mark.parametrize("damping", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("gate_norm", GATE_NORMS)
def test_rank_damping_weakens_the_experts_beyond_the_trained_number(damping, gate_norm):
    plain = make_layer(num_experts=4, num_experts_per_tok=2, gate_norm=gate_norm)
    layer = make_layer(num_experts=4, num_experts_per_tok=2, gate_norm=gate_norm, rank_damping=damping)
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


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rank_damping": 1.5}, "rank_damping must lie"),
        ({"coactivation_prob": -0.1}, "coactivation_prob must lie"),
        ({"ideal_experts_per_tok": 5}, r"between the trained k \(2\)"),
        ({"ideal_experts_per_tok": 1}, r"between the trained k \(2\)"),
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
        make_layer(**options)


@pytest.mark.parametrize("expert_router", ["learned", "hash", "random"])
def test_rows_with_their_own_k_give_what_each_does_alone(expert_router):
    layer = make_layer(12, 42, num_experts=6, expert_router=expert_router).eval()
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
    layer = make_layer()
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
    layer = make_layer(balance_loss_weight=0.1).eval()
    x_BTD = torch.randn(4, 9, 12)
    found = layer(x_BTD, Routing(num_experts_per_tok=(2, 1, 2, 2))).aux_loss
    parts = [layer(x_BTD[[0, 2, 3]], Routing(num_experts_per_tok=2)), layer(x_BTD[[1]], Routing(num_experts_per_tok=1))]
    torch.testing.assert_close(found, 0.75 * parts[0].aux_loss + 0.25 * parts[1].aux_loss)
    assert found > 0
    same = layer(x_BTD, Routing(num_experts_per_tok=(2, 2, 2, 2))).aux_loss
    torch.testing.assert_close(same, layer(x_BTD, Routing(num_experts_per_tok=2)).aux_loss)
