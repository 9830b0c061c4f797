"""∞-MoE's own claims: Eq. 4-7, the mask, its sizes, what it is a special case of."""

import itertools
import math

import pytest
import torch
from helpers import key, make_layer, record_selections, routing
from infinity_helpers import WIDTH, D, Z, draw, expert, infinity_layer, inputs, same_weights

from infmoe.errors import InfMoEError
from infmoe.layers import DenseFFN, InfinityFFN, NoiseKey, Routing
from infmoe.layers.activations import ACTIVATIONS


@pytest.mark.parametrize("K", [1, 2, 5])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hidden_act": "swiglu"},
        {"block_size": 4, "wz_bias": True},
        {"keep_ratio": 1.0},
        {"keep_ratio": 0.01},
    ],
)
def test_the_output_is_the_mean_of_k_separate_experts(K, options):
    layer, x, noise_key = infinity_layer(layer_index=5, **options), inputs(), key(3)
    if layer.w_z.bias is not None:
        layer.w_z.bias.normal_()
    y = layer(x, Routing(num_samples=K, key=noise_key)).y_BTD
    for b, t in itertools.product(range(3), range(5)):
        parts = []
        for k in range(K):
            part, num_kept = expert(layer, x[b, t], draw(layer, x[b, t], noise_key, b, t, k), layer.keep_ratio)
            assert num_kept == max(1, round(layer.keep_ratio * layer.num_units))
            parts.append(part)
        torch.testing.assert_close(y[b, t], torch.stack(parts).mean(0) + layer.w2.bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keep_ratio", [0.01, 1 / 32, 0.1, 0.25, 0.5, 0.77, 1.0])
def test_each_sample_keeps_exactly_its_share(keep_ratio):
    layer = infinity_layer()
    with record_selections() as recorded:
        layer(inputs(), routing(3, keep_ratio=keep_ratio))
    (kept,) = recorded
    assert (kept.sum(-1) == max(1, round(keep_ratio * layer.num_units))).all()


def test_ties_are_all_kept():
    layer = infinity_layer()
    layer.w_z.weight[:] = layer.w_z.weight[:1]  # every unit scores alike
    with record_selections() as recorded:
        layer(inputs(), routing(3))
    assert (recorded[0] == 1).all()


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("K", [1, 4])
def test_under_a_mask_of_ones_it_is_the_dense_layer(act, K):
    layer = infinity_layer(hidden_act=act, wz_bias=True, keep_ratio=1.0)
    layer.w_z.weight.zero_()
    layer.w_z.bias.fill_(1.0)
    layer.w2.bias.normal_()
    dense = DenseFFN(D, WIDTH, hidden_act=act).requires_grad_(False)
    shared = {name: p for name, p in layer.state_dict().items() if name.startswith(("w1", "w2", "w3"))}
    dense.load_state_dict(shared)
    x = inputs()
    y = layer(x, routing(3, num_samples=K)).y_BTD
    torch.testing.assert_close(y, dense(x).y_BTD, rtol=1e-5, atol=1e-5)


def test_the_mean_over_samples_converges_like_one_over_root_k():
    layer, x = infinity_layer(initial_sigma=1.0), inputs(64, 4)
    mean = layer(x, Routing(num_samples=4096, key=NoiseKey(seed=99, stream=torch.arange(64)))).y_BTD
    errors = [float((layer(x, routing(64, num_samples=K)).y_BTD - mean).square().mean().sqrt()) for K in (1, 4, 16, 64)]
    for coarse, fine in itertools.pairwise(errors):
        assert 1.6 < coarse / fine < 2.5  # 2 but for chance


@pytest.mark.parametrize("block_size", [1, 2, 8, 48])
def test_blocks_share_one_score(block_size):
    layer, x = infinity_layer(block_size=block_size), inputs()
    assert layer.num_units == WIDTH // block_size == layer.w_z.out_features
    out = layer(x, routing(3))
    assert out.stats.counts_U.shape == (layer.num_units,)
    per_neuron = same_neurons(layer)
    y = per_neuron(x, routing(3, keep_ratio=max(1, round(0.25 * layer.num_units)) * block_size / WIDTH)).y_BTD
    torch.testing.assert_close(out.y_BTD, y, rtol=1e-5, atol=1e-5)


def same_neurons(layer):
    """The layer without blocks whose W_z repeats the blocks' rows: ties keep the whole block."""
    state = layer.state_dict()
    state["w_z.weight"] = state["w_z.weight"].repeat_interleave(layer.block_size, dim=0)
    other = infinity_layer()
    other.load_state_dict(state)
    return other


@pytest.mark.parametrize("block_size", [0, -1, 5, 96])
@pytest.mark.parametrize("act", ["gelu", "swiglu"])
def test_blocks_that_do_not_fit_are_refused(block_size, act):
    if act == "swiglu" and block_size > 0:
        # the gated width rounds to whole blocks instead
        assert infinity_layer(block_size=block_size, hidden_act=act).width % block_size == 0
        return
    with pytest.raises(InfMoEError, match="block_size"):
        infinity_layer(block_size=block_size, hidden_act=act)


def test_a_frozen_wz_gets_no_gradient_and_passes_it_on():
    layer = make_layer("infinity", D, WIDTH, train_wz=False, wz_bias=True).train()
    assert [name for name, p in layer.named_parameters() if not p.requires_grad] == ["w_z.weight", "w_z.bias"]
    layer(inputs(), routing(3)).y_BTD.square().sum().backward()
    assert layer.w_z.weight.grad is None
    assert layer.router.mu.weight.grad.abs().sum() > 0
    assert layer.router.sigma.weight.grad.abs().sum() > 0


def mask_rms(layer, x, keep_ratio, K=1):
    """Root mean square of the masks that the layer puts on its neurons."""
    seen = []
    hook = layer.w2.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    layer(x, routing(len(x), keep_ratio=keep_ratio, num_samples=K))
    hook.remove()
    return float((seen[0] / layer.act(layer.w1.bias)).square().mean().sqrt())


@pytest.mark.parametrize("mask_scale", ["none", "fixed", "rms"])
def test_mask_scale_changes_nothing_at_the_trained_ratio(mask_scale):
    layer, x = infinity_layer(mask_scale=mask_scale), inputs()
    expected = same_weights(layer, infinity_layer())(x, routing(3)).y_BTD
    assert torch.equal(layer(x, routing(3)).y_BTD, expected)
    assert torch.equal(layer(x, routing(3, keep_ratio=0.25)).y_BTD, expected)
    # in one batch with rows at another ratio too
    mixed = layer(x, routing(3, keep_ratio=(0.25, 0.5, 0.25))).y_BTD
    torch.testing.assert_close(mixed[[0, 2]], expected[[0, 2]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("mask_scale", "tolerance"), [("fixed", 0.05), ("rms", 1e-3)])
def test_mask_scale_keeps_the_masks_size_at_other_ratios(mask_scale, tolerance):
    layer = make_layer("infinity", D, 768, z_dim=32, mask_scale=mask_scale, initializer_range=0.3)
    layer.requires_grad_(False)
    layer.w1.weight.zero_()
    layer.w1.bias.fill_(1.0)  # every neuron alike, so that W2's input shows the mask
    x = inputs(16, 16)
    trained = mask_rms(layer, x, 0.25)
    plain = same_weights(layer, make_layer("infinity", D, 768, z_dim=32)).requires_grad_(False)
    for keep_ratio in (1 / 16, 0.125, 0.5, 1.0):
        assert mask_rms(layer, x, keep_ratio) == pytest.approx(trained, rel=tolerance)
        if keep_ratio != 0.5:  # there the plain mask is of much the same size
            assert abs(mask_rms(plain, x, keep_ratio) / trained - 1) > 0.1


def test_the_discrete_mixture_is_a_special_case():
    """Eq. 3: where z picks a block of neurons, f(x, z) is that block's FFN, an expert of its own."""
    num_experts, width = 4, WIDTH // 4
    layer = InfinityFFN(
        D,
        WIDTH,
        z_dim=num_experts,
        keep_ratio=1 / num_experts,
        sigma_activation="none",
        initializer_range=0.3,
    ).requires_grad_(False)
    layer.w_z.weight.copy_(torch.eye(num_experts).repeat_interleave(width, dim=0))
    layer.router.mu.weight.zero_()
    x = inputs(1, 1)[0]
    for e in range(num_experts):
        layer.router.mu.bias.copy_(torch.nn.functional.one_hot(torch.tensor(e), num_experts))
        rows = slice(e * width, (e + 1) * width)
        h = layer.act(x @ layer.w1.weight[rows].T + layer.w1.bias[rows])
        torch.testing.assert_close(layer(x).y_BTD, h @ layer.w2.weight[:, rows].T + layer.w2.bias)


def test_a_weighted_mixture_of_experts_is_the_mean_over_their_indices():
    """Eq. 1 and 4: p(z) with mass 2/3 and 1/3 on two experts gives 2/3 e_1 + 1/3 e_2."""
    layer = InfinityFFN(D, WIDTH, z_dim=4, keep_ratio=0.25, initializer_range=0.3).requires_grad_(False)
    layer.w_z.weight.copy_(torch.eye(4).repeat_interleave(12, dim=0))
    picks = torch.nn.functional.one_hot(torch.tensor([0, 2, 0]), 4).float().view(1, 1, 3, 4)
    x = inputs(1, 1)

    def hand_set(module, args, out):
        return out._replace(z_BTKZ=picks)

    layer.router.register_forward_hook(hand_set)
    y = layer(x, Routing(num_samples=3)).y_BTD[0, 0]
    experts = [
        layer.w2.weight[:, 12 * e : 12 * e + 12]
        @ layer.act(layer.w1.weight[12 * e : 12 * e + 12] @ x[0, 0] + layer.w1.bias[12 * e : 12 * e + 12])
        for e in (0, 2)
    ]
    torch.testing.assert_close(y, 2 / 3 * experts[0] + 1 / 3 * experts[1], rtol=1e-5, atol=1e-6)


STARTS = [
    {"keep_ratio": 1 / 16},
    {"keep_ratio": 0.25},
    {"keep_ratio": 0.5},
    {"keep_ratio": 1.0},
    {"num_samples": 1},
    {"num_samples": 8},
    {"hidden_act": "relu"},
    {"hidden_act": "gelu"},
    {"hidden_act": "swiglu"},
    {"hidden_act": "geglu", "keep_ratio": 0.5, "num_samples": 4},
    {"initial_sigma": 0.05},
    {"initial_sigma": 2.0},
    {"routing_mode": "mu"},
    {"routing_mode": "antithetic"},
    {"routing_mode": "antithetic", "num_samples": 4, "initial_sigma": 1.0},
    {"routing_mode": "antithetic", "num_samples": 3, "initial_sigma": 2.0},
    {"sigma_activation": "none"},
    {"sigma_activation": "exp"},
    {"block_size": 8},
    {"router_hidden_size": 128},
]


@pytest.mark.parametrize("width", [512, 2048])
@pytest.mark.parametrize("options", STARTS, ids=str)
def test_the_branch_starts_as_large_as_a_dense_one(width, options):
    D = 64
    x = torch.nn.functional.layer_norm(torch.randn(16, 16, D), (D,))
    sizes = []
    for seed in range(4):
        torch.manual_seed(seed)
        layer = InfinityFFN(D, width, z_dim=64, **options).eval()
        dense = DenseFFN(D, width, hidden_act=layer.hidden_act)
        given = Routing(key=NoiseKey(seed=seed, stream=torch.arange(16)))
        with torch.no_grad():
            sizes.append((float(layer(x, given).y_BTD.square().mean()), float(dense(x).y_BTD.square().mean())))
    ratio = math.sqrt(sum(a for a, _ in sizes) / sum(b for _, b in sizes))
    assert 0.9 < ratio < 1.1


def test_score_dtype_is_what_it_says():
    exact, coarse, auto = (
        infinity_layer(score_dtype="float32"),
        infinity_layer(score_dtype="bfloat16"),
        infinity_layer(),
    )
    for layer in (coarse, auto):
        layer.load_state_dict(exact.state_dict())
    z = torch.randn(4, 5, 3, Z)
    rounded = [t.bfloat16().double() for t in (z, exact.w_z.weight)]
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            fine, rough = exact._scores(z), coarse._scores(z)
        torch.testing.assert_close(fine.double(), z.double() @ exact.w_z.weight.double().T, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(rough.double(), rounded[0] @ rounded[1].T, atol=1e-5, rtol=1e-5)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert torch.equal(auto._scores(z), rough if autocast else fine)
    assert not torch.equal(fine, rough)
    assert auto.bfloat16()._rounded_to == torch.bfloat16


def test_bfloat16_scores_and_weights_make_no_ties():
    for layer in (infinity_layer(score_dtype="bfloat16"), infinity_layer().bfloat16()):
        out = layer(inputs().to(layer.w1.weight.dtype), routing(3, num_samples=1, keep_ratio=0.25))
        assert out.stats.counts_U.sum() == out.stats.tokens * round(0.25 * layer.num_units)


def test_mu_and_sigma_are_float32_under_autocast():
    layer, x = infinity_layer(), inputs()
    expected = layer.router(x, None).mu_BTZ
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.router(x, None).mu_BTZ, expected)


def test_autocast_leaves_the_scores_of_equal_indices_alone():
    layer, z = infinity_layer(score_dtype="float32"), torch.randn(2, 3, 2, Z)
    expected = layer._scores(z)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer._scores(z), expected)
    assert expected.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_samples": 0}, "num_samples"),
        ({"keep_ratio": 0.0}, "keep_ratio"),
        ({"routing_mode": "sampl"}, "did you mean 'sample'"),
        ({"mask_scale": "rmss"}, "did you mean 'rms'"),
        ({"score_dtype": "float16"}, "score_dtype"),
        ({"noise_seed": -1}, "noise seed"),
        ({"z_dim": 0}, "z_dim"),
    ],
)
def test_bad_options_are_refused_by_name(options, named):
    with pytest.raises(InfMoEError, match=named):
        InfinityFFN(D, WIDTH, **options)


def test_cost_counts_what_the_masks_use():
    layer = InfinityFFN(64, 256, z_dim=16)
    neuron, router, bias = 2 * 64 + 1, 2 * (64 * 16 + 16), 64
    cost = layer.cost()
    assert cost.params == 256 * neuron + router + bias + 256 * 16
    assert cost.params_wz == 256 * 16
    assert cost.active_params == 128 * neuron + router + bias  # K r = 1/2 of the neurons, no W_z
    assert cost.active_params_union == round(0.4375 * 256 * neuron) + router + bias + 256 * 16
    assert layer.cost(union_ratio=0.3).active_params_union == round(0.3 * 256 * neuron + router + bias + 256 * 16)
    assert cost.flops_router == 2 * 2 * 64 * 16 + 2 * 2 * 16 * 256
    assert cost.flops_executed == cost.flops_router + 2 * 2 * 64 * 256
    by_mean = layer.cost(Routing(mode="mu", keep_ratio=1.0))
    assert by_mean.active_params == by_mean.total
    assert by_mean.weights_ideal == cost.params - (64 * 16 + 16)  # sigma's map is not read
    assert layer.cost(Routing(num_samples=8)).active_params == cost.total  # K r is at most all
    with pytest.raises(InfMoEError, match="num_experts_per_tok"):
        layer.cost(Routing(num_experts_per_tok=2))
