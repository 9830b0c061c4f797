"""The experts on a CPU, with the compiled kernels and without, against a loop over tokens and experts."""

import pytest
import torch

from infmoe.layers.activations import ACTIVATIONS
from infmoe.layers.experts import Experts
from infmoe.ops import expert_ffn as module

D, F, E, T, K = 24, 10, 4, 13, 2
NAMES = ("x", "gate", "w1", "b1", "w3", "b3", "w2", "b2")


@pytest.fixture(params=["plain", "compiled"], autouse=True)
def kernels(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setenv("INFMOE_BACKEND", "eager")
        return
    monkeypatch.delenv("INFMOE_BACKEND", raising=False)
    if not module._available():
        pytest.skip("no compiled kernels on this machine")


def choose(case, num_tokens=T):
    if case == "one takes all":
        return torch.full((num_tokens, 1), 2)
    most = 2 if case == "empty experts" else E
    return torch.stack([torch.randperm(most)[:K] for _ in range(num_tokens)] or [torch.zeros(K)]).long()[:num_tokens]


def make(expert_Tk, hidden_act="gelu_new", dtype=torch.float64, sizes=(D, F)):
    """x, gate, weights and biases, as leaves."""
    experts = Experts(sizes[0], E * sizes[1], E, hidden_act)
    if ACTIVATIONS[hidden_act][1]:
        experts = Experts(sizes[0], E * sizes[1] * 3 // 2, E, hidden_act)
    shapes = [None if p is None else p.shape for p in weights(experts)]
    x = torch.randn(len(expert_Tk), sizes[0])
    gate = torch.rand(expert_Tk.shape)
    leaves = [x, gate, *(None if s is None else 0.5 * torch.randn(s) for s in shapes)]
    return [None if t is None else t.to(dtype).requires_grad_() for t in leaves]


def weights(experts):
    return experts.w1_EDF, experts.b1_EF, experts.w3_EDF, experts.b3_EF, experts.w2_EFD, experts.b2_D


def ours(leaves, expert_Tk, hidden_act, dtype=None):
    x, gate, *rest = leaves
    return module.expert_ffn(x, expert_Tk, gate, *rest, hidden_act=hidden_act, dtype=dtype or x.dtype)


def naive(leaves, expert_Tk, hidden_act):
    x_TD, gate_Tk, w1, b1, w3, b3, w2, b2 = leaves
    act = ACTIVATIONS[hidden_act][0]
    y = x_TD * 0
    for t, chosen in enumerate(expert_Tk.tolist()):
        for j, e in enumerate(chosen):
            h = act(x_TD[t] @ w1[e] + b1[e])
            if w3 is not None:
                h = h * (x_TD[t] @ w3[e] + b3[e])
            y = y + torch.nn.functional.one_hot(torch.tensor(t), len(x_TD))[:, None] * gate_Tk[t, j] * (h @ w2[e] + b2)
    return y


def outputs_and_grads(f, leaves, *args, **options):
    y = f(leaves, *args, **options)
    inputs = [t for t in leaves if t is not None]
    grad = torch.sin(torch.arange(y.numel(), dtype=torch.float64)).view(y.shape).to(y.dtype)
    return [y, *torch.autograd.grad(y, inputs, grad)]


def converted(leaves, dtype):
    return [None if t is None else t.detach().to(dtype).requires_grad_() for t in leaves]


def assert_near(got, expected, tolerance):
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.shape == b.shape
        assert (a.double() - b).norm().item() <= tolerance * max(b.norm().item(), 1e-9), i


@pytest.mark.parametrize("hidden_act", list(ACTIVATIONS))
@pytest.mark.parametrize("case", ["every expert", "empty experts", "one takes all"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.03)]
)
def test_outputs_and_gradients_equal_a_loop(hidden_act, case, dtype, tolerance):
    torch.manual_seed(0)
    expert_Tk = choose(case)
    leaves = make(expert_Tk, hidden_act, dtype)
    got = outputs_and_grads(ours, leaves, expert_Tk, hidden_act)
    assert got[0].dtype == dtype
    assert_near(got, outputs_and_grads(naive, converted(leaves, torch.float64), expert_Tk, hidden_act), tolerance)


@pytest.mark.parametrize("sizes", [(1, 1), (7, 3), (64, 32), (70, 65), (130, 600)])
@pytest.mark.parametrize("hidden_act", ["gelu_new", "swiglu"])
def test_any_size_many_rows(sizes, hidden_act):
    torch.manual_seed(0)
    expert_Tk = choose("every expert", 700)
    sizes = (sizes[0], 2 * sizes[1])
    leaves = make(expert_Tk, hidden_act, torch.float32, sizes)
    got = outputs_and_grads(ours, leaves, expert_Tk, hidden_act)
    exact = outputs_and_grads(ours, converted(leaves, torch.float64), expert_Tk, hidden_act)
    assert_near(got, exact, 1e-5)


@pytest.mark.parametrize("hidden_act", ["relu", "swiglu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_tokens(hidden_act, dtype):
    expert_Tk = torch.zeros(0, K, dtype=torch.int64)
    y, *grads = outputs_and_grads(ours, make(expert_Tk, hidden_act, dtype), expert_Tk, hidden_act)
    assert y.shape == (0, D)
    assert all(g.eq(0).all() for g in grads)


@pytest.mark.parametrize("hidden_act", ["gelu_new", "geglu"])
def test_weights_of_another_type_are_cast_and_get_gradients_of_their_own(hidden_act):
    torch.manual_seed(0)
    expert_Tk = choose("empty experts")
    leaves = make(expert_Tk, hidden_act, torch.float32)
    got = outputs_and_grads(ours, leaves, expert_Tk, hidden_act, dtype=torch.bfloat16)
    assert got[0].dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in got[1:])
    assert_near(got, outputs_and_grads(naive, converted(leaves, torch.float64), expert_Tk, hidden_act), 0.03)


@pytest.mark.parametrize("hidden_act", ["gelu_new", "swiglu"])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_many_rows_are_multiplied_in_pieces(hidden_act, weights):
    """In bfloat16: whole sixty-fours and a rest, and sums over rows of 256, 16 and 1."""
    torch.manual_seed(0)
    expert_Tk = choose("every expert", 1800)
    rows_E = expert_Tk.flatten().bincount()
    assert (rows_E > 256).all()
    assert (rows_E % 16 > 0).any()
    leaves = make(expert_Tk, hidden_act, weights)
    got = outputs_and_grads(ours, leaves, expert_Tk, hidden_act, dtype=torch.bfloat16)
    assert_near(got, outputs_and_grads(naive, converted(leaves, torch.float64), expert_Tk, hidden_act), 0.03)


def test_gradcheck():
    torch.manual_seed(0)
    expert_Tk = choose("empty experts", 5)
    leaves = make(expert_Tk, "swiglu", sizes=(3, 2))
    assert torch.autograd.gradcheck(lambda *a: ours(a, expert_Tk, "swiglu"), leaves)


def test_a_gate_of_zero_still_has_its_gradient():
    torch.manual_seed(0)
    expert_Tk = choose("every expert")
    leaves = make(expert_Tk, dtype=torch.float32)
    with torch.no_grad():
        leaves[1][::2] = 0
    got = outputs_and_grads(ours, leaves, expert_Tk, "gelu_new")
    assert_near(got, outputs_and_grads(naive, converted(leaves, torch.float64), expert_Tk, "gelu_new"), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden_act", list(ACTIVATIONS))
def test_divergence_shows_in_its_token_and_no_other(hidden_act, dtype):
    torch.manual_seed(0)
    expert_Tk = choose("every expert")
    leaves = make(expert_Tk, hidden_act, dtype)
    clean = ours(leaves, expert_Tk, hidden_act)
    with torch.no_grad():
        leaves[0][3, 5] = torch.nan
    y = ours(leaves, expert_Tk, hidden_act)
    assert y[3].isnan().all()
    others = torch.arange(T) != 3
    assert torch.equal(y[others], clean[others])
    if hidden_act != "relu":  # whose slope is 0 there, in torch too
        (grad,) = torch.autograd.grad(y[3].sum(), [leaves[0]])
        assert grad[3].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_values_overflow_nowhere(dtype):
    torch.manual_seed(0)
    expert_Tk = choose("every expert")
    for hidden_act in ("gelu", "gelu_new", "silu"):
        leaves = make(expert_Tk, hidden_act, dtype)
        with torch.no_grad():
            leaves[0].mul_(1e4)
        got = outputs_and_grads(ours, leaves, expert_Tk, hidden_act)
        assert_near(got, outputs_and_grads(naive, converted(leaves, torch.float64), expert_Tk, hidden_act), 0.03)


def test_nothing_is_computed_for_frozen_weights():
    expert_Tk = choose("every expert")
    leaves = make(expert_Tk, dtype=torch.float32)
    expected = outputs_and_grads(ours, leaves, expert_Tk, "gelu_new")
    frozen = [None if t is None else t.detach() for t in leaves]
    frozen[0].requires_grad_()
    (grad,) = torch.autograd.grad(ours(frozen, expert_Tk, "gelu_new"), [frozen[0]], torch.ones_like(expected[0]))
    (same,) = torch.autograd.grad(ours(leaves, expert_Tk, "gelu_new"), [leaves[0]], torch.ones_like(expected[0]))
    assert torch.equal(grad, same)


def test_strides_do_not_matter():
    torch.manual_seed(0)
    expert_Tk = choose("every expert")
    leaves = make(expert_Tk, "swiglu", torch.float32)
    expected = outputs_and_grads(ours, leaves, expert_Tk, "swiglu")
    strided = [
        None if t is None else t.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()
        for t in leaves
    ]
    got = outputs_and_grads(ours, strided, expert_Tk.T.contiguous().T, "swiglu")
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(32, 64), (512, 1100)])
def test_runs_repeat_bit_for_bit_with_and_without_a_backward(sizes, dtype):
    torch.manual_seed(0)
    expert_Tk = choose("every expert", 600)
    leaves = make(expert_Tk, "gelu_new", torch.float32, sizes)
    first = outputs_and_grads(ours, leaves, expert_Tk, "gelu_new", dtype=dtype)
    for _ in range(3):
        again = outputs_and_grads(ours, leaves, expert_Tk, "gelu_new", dtype=dtype)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with torch.no_grad():
        assert torch.equal(ours(leaves, expert_Tk, "gelu_new", dtype), first[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden_act", ["relu", "swiglu"])
@pytest.mark.parametrize("save", [True, False])
def test_operators_are_well_behaved(hidden_act, dtype, save):
    expert_Tk = choose("every expert")
    x, gate, *rest = make(expert_Tk, hidden_act, torch.float32)
    args = (x, expert_Tk, gate, *rest, module._PLAIN_OF_GATED.get(hidden_act, hidden_act), dtype, save)
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(module._expert_ffn, args, test_utils=utils)
    if save:
        with torch.no_grad():
            y, *saved = module._expert_ffn(*args)
            backward_args = (torch.ones_like(y), x, gate, *rest, *saved, args[-3], True, True)
        torch.library.opcheck(module._expert_ffn_backward, backward_args, test_utils=utils)
        torch.library.opcheck(module._expert_ffn_backward, (*backward_args[:-2], False, False), test_utils=utils)


@pytest.mark.parametrize("hidden_act", ["gelu_new", "swiglu"])
def test_compiles_whole(hidden_act):
    torch.manual_seed(0)
    torch._dynamo.reset()
    expert_Tk = choose("every expert")
    leaves = make(expert_Tk, hidden_act, torch.float32)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    got = outputs_and_grads(compiled, leaves, expert_Tk, hidden_act, dtype=torch.bfloat16)
    expected = outputs_and_grads(ours, leaves, expert_Tk, hidden_act, dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
