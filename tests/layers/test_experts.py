import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infmoe.errors import InfMoEError
from infmoe.layers.experts import Experts, balance_loss, expert_stats, router_logits


def make_experts(hidden_size, intermediate_size, num_experts, hidden_act="gelu_new", dtype=torch.float32):
    experts = Experts(hidden_size, intermediate_size, num_experts, hidden_act)
    with torch.no_grad():
        for p in experts.parameters():
            p.normal_(0.0, 0.5)
    return experts.to(dtype)


def naive_experts(experts, x_TD, expert_Tk, gate_Tk):
    """One token and one expert at a time."""
    y = []
    for x, chosen, gates in zip(x_TD, expert_Tk.tolist(), gate_Tk, strict=True):
        total = torch.zeros_like(x)
        for e, gate in zip(chosen, gates, strict=True):
            h = experts.act(x @ experts.w1_EDF[e] + experts.b1_EF[e])
            if experts.w3_EDF is not None:
                h = h * (x @ experts.w3_EDF[e] + experts.b3_EF[e])
            total = total + gate * (h @ experts.w2_EFD[e] + experts.b2_D)
        y.append(total)
    return torch.stack(y)


def choose(num_tokens, num_experts, k, dtype=torch.float32):
    expert_Tk = torch.stack([torch.randperm(num_experts)[:k] for _ in range(num_tokens)])
    return expert_Tk, torch.rand(num_tokens, k, dtype=dtype).requires_grad_()


def outputs_and_grads(f, experts, x_TD, expert_Tk, gate_Tk, grad_TD):
    inputs = (x_TD, gate_Tk, *experts.parameters())
    y_TD = f(x_TD, expert_Tk, gate_Tk)
    return y_TD, *torch.autograd.grad(y_TD, inputs, grad_TD.to(y_TD.dtype))


@settings(max_examples=30, deadline=None)
@given(
    num_tokens=st.integers(1, 9),
    hidden_size=st.integers(1, 25),
    width=st.integers(1, 18),
    num_experts=st.integers(1, 5),
    k=st.integers(1, 5),
    hidden_act=st.sampled_from(["gelu_new", "relu", "swiglu"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_experts_equal_a_double_loop(num_tokens, hidden_size, width, num_experts, k, hidden_act, dtype, seed):
    torch.manual_seed(seed)
    experts = make_experts(hidden_size, width * num_experts, num_experts, hidden_act, dtype)
    x_TD = torch.randn(num_tokens, hidden_size, dtype=dtype, requires_grad=True)
    expert_Tk, gate_Tk = choose(num_tokens, num_experts, min(k, num_experts), dtype)
    grad_TD = torch.randn(num_tokens, hidden_size, dtype=dtype)
    got = outputs_and_grads(experts, experts, x_TD, expert_Tk, gate_Tk, grad_TD)
    naive = outputs_and_grads(lambda *args: naive_experts(experts, *args), experts, x_TD, expert_Tk, gate_Tk, grad_TD)
    for a, b in zip(got, naive, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize(("hidden_size", "width"), [(24, 10), (16, 8), (7, 3)])
def test_bf16_is_near_the_double_loop_in_fp32(hidden_size, width):
    torch.manual_seed(0)
    experts = make_experts(hidden_size, 4 * width, 4, dtype=torch.bfloat16)
    x_TD = torch.randn(11, hidden_size, dtype=torch.bfloat16, requires_grad=True)
    expert_Tk, gate_Tk = choose(11, 3, 2)  # the fourth expert gets no token
    grad_TD = torch.randn(11, hidden_size)
    got = outputs_and_grads(experts, experts, x_TD, expert_Tk, gate_Tk, grad_TD)
    assert got[0].dtype == torch.bfloat16
    exact = make_experts(hidden_size, 4 * width, 4)
    exact.load_state_dict(experts.state_dict())
    x32_TD = x_TD.detach().float().requires_grad_()
    naive = outputs_and_grads(lambda *a: naive_experts(exact, *a), exact, x32_TD, expert_Tk, gate_Tk, grad_TD)
    for a, b in zip(got, naive, strict=True):
        assert (a.float() - b).norm() <= 0.02 * b.norm()


def test_gradcheck():
    torch.manual_seed(0)
    experts = make_experts(5, 6, 3, "swiglu", torch.float64)
    x_TD = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    expert_Tk, gate_Tk = choose(4, 3, 2, torch.float64)
    names = [name for name, _ in experts.named_parameters()]

    def f(x_TD, gate_Tk, *params):
        return torch.func.functional_call(experts, dict(zip(names, params, strict=True)), (x_TD, expert_Tk, gate_Tk))

    assert torch.autograd.gradcheck(f, (x_TD, gate_Tk, *experts.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("num_tokens", [0, 3])
def test_experts_without_tokens_get_zero_gradients(dtype, num_tokens):
    experts = make_experts(6, 12, 4, dtype=dtype)
    expert_Tk = torch.full((num_tokens, 1), 2)
    y_TD = experts(torch.randn(num_tokens, 6, dtype=dtype), expert_Tk, torch.ones(num_tokens, 1))
    assert y_TD.shape == (num_tokens, 6)
    y_TD.square().sum().backward()
    for name in ("w1_EDF", "b1_EF", "w2_EFD"):
        grad = getattr(experts, name).grad
        assert grad[[0, 1, 3]].eq(0).all()
        assert grad[2].ne(0).any() == (num_tokens > 0)


def test_autocast_computes_in_its_dtype_and_keeps_gradients_in_the_weights():
    torch.manual_seed(0)
    experts = make_experts(16, 32, 4)
    x_TD = torch.randn(9, 16)
    expert_Tk, gate_Tk = choose(9, 4, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_TD = experts(x_TD, expert_Tk, gate_Tk)
    assert y_TD.dtype == torch.bfloat16
    assert not torch.equal(y_TD.float(), experts(x_TD, expert_Tk, gate_Tk))
    y_TD.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in experts.parameters())
    half = make_experts(16, 32, 4)
    half.load_state_dict(experts.state_dict())
    expected_TD = half.bfloat16()(x_TD.bfloat16(), expert_Tk, gate_Tk)
    # the biases stay float32 under autocast
    assert (y_TD - expected_TD).float().norm() <= 0.01 * expected_TD.float().norm()


def test_runs_repeat_bit_for_bit():
    torch.manual_seed(0)
    experts = make_experts(32, 64, 4)
    x_TD = torch.randn(500, 32, requires_grad=True)
    expert_Tk, gate_Tk = choose(500, 4, 3)
    args = (experts, x_TD, expert_Tk, gate_Tk, torch.randn(500, 32))
    for a, b in zip(outputs_and_grads(experts, *args), outputs_and_grads(experts, *args), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("num_experts", "intermediate_size", "fitting"), [(4, 10, "8"), (4, 15, "16"), (7, 2, "7")])
def test_unequal_experts_are_refused_with_the_nearest_width(num_experts, intermediate_size, fitting):
    with pytest.raises(InfMoEError, match=rf"nearest that does is {fitting}$"):
        Experts(8, intermediate_size, num_experts, "relu")


@pytest.mark.parametrize("num_experts", [0, -1, 2.0, True])
def test_bad_expert_counts_are_refused(num_experts):
    with pytest.raises(InfMoEError, match="num_experts must be an integer of at least 1"):
        Experts(8, 16, num_experts, "relu")


def test_unknown_activation_is_refused():
    with pytest.raises(InfMoEError, match="did you mean 'swiglu'"):
        Experts(8, 16, 2, "swigluu")


def test_gated_experts_get_two_thirds_of_the_width():
    assert Experts(8, 48, 4, "swiglu").width == 8
    assert Experts(8, 48, 4, "gelu").width == 12


def test_router_logits_are_fp32_under_autocast_and_in_bf16():
    torch.manual_seed(0)
    x_TD, weight_ED = torch.randn(5, 33), torch.randn(3, 33)
    expected_TE = x_TD @ weight_ED.T
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(router_logits(x_TD, weight_ED), expected_TE)
    x_TD, weight_ED = x_TD.bfloat16(), weight_ED.bfloat16()
    expected_TE = x_TD.float() @ weight_ED.float().T
    torch.testing.assert_close(router_logits(x_TD, weight_ED), expected_TE)


def test_balance_loss():
    probs_TE = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2]], requires_grad=True)
    # f = (1/2, 1/4, 1/4), P = (0.6, 0.25, 0.15)
    loss = balance_loss(probs_TE, torch.tensor([[0, 1], [0, 2]]))
    assert loss.item() == pytest.approx(3 * (0.5 * 0.6 + 0.25 * 0.25 + 0.25 * 0.15))
    (grad_TE,) = torch.autograd.grad(loss, probs_TE)
    torch.testing.assert_close(grad_TE, torch.tensor([[0.75, 0.375, 0.375]] * 2))
    assert balance_loss(torch.eye(3), torch.arange(3)[:, None]).item() == pytest.approx(1.0)
    all_to_one = torch.tensor([[1.0, 0.0, 0.0]] * 4)
    assert balance_loss(all_to_one, torch.zeros(4, 1, dtype=torch.int64)).item() == pytest.approx(3.0)
    assert balance_loss(torch.zeros(0, 3), torch.zeros(0, 2, dtype=torch.int64)).item() == 0.0


def test_stats_count_every_strideth_token():
    expert_Tk = torch.tensor([[0, 1], [2, 3], [0, 2], [2, 3], [0, 1]])
    stats = expert_stats(expert_Tk, 4, None)
    assert stats.counts_U.tolist() == [3, 2, 3, 2]
    assert (stats.tokens.item(), stats.union.item(), stats.overlap.item()) == (5, 2.5, 5)
    stats = expert_stats(expert_Tk, 4, 3)  # tokens 0, 2, 4
    assert stats.counts_U.tolist() == [3, 2, 1, 0]
    assert (stats.tokens.item(), stats.union.item(), stats.dropped.item()) == (3, 1.5, 0)
    kept_Tk = torch.tensor([[True, True], [True, True], [True, False], [True, True], [False, True]])
    stats = expert_stats(expert_Tk, 4, 3, kept_Tk)
    assert stats.counts_U.tolist() == [2, 2, 0, 0]
    assert stats.dropped.item() == 2
    assert stats.summary()["dropped_ratio"] == pytest.approx(2 / 6)
