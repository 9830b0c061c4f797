"""One contract for every feed-forward variant and every activation."""

import copy
import inspect
import pickle
import subprocess
import sys

import pytest
import torch
from helpers import VARIANTS, make_layer, routing, tokens

from infmoe.errors import InfMoEError
from infmoe.hf import InfMoEConfig
from infmoe.layers import FFN_CLASSES, NoiseKey, Routing, ffn_class
from infmoe.layers.activations import ACTIVATIONS

EVERY = pytest.mark.parametrize(("ffn", "act"), [(ffn, act) for ffn in VARIANTS for act in ACTIVATIONS])
EACH = pytest.mark.parametrize("ffn", VARIANTS)
D, WIDTH = 16, 48

DIALS = {"num_samples": 2, "keep_ratio": 0.5, "num_experts_per_tok": 1, "mode": "mu"}
OWN_DIALS = {
    "dense": set(),
    "switch": set(),
    "moe": {"num_experts_per_tok"},
    "infinity": {"num_samples", "keep_ratio", "mode"},
}
# Controls whose options change what the layer is made of; the contract holds for them too.
SPECIAL = [
    ("infinity", {"sigma_activation": "none"}),
    ("infinity", {"router_hidden_size": 8, "wz_bias": True, "block_size": 4}),
    ("infinity", {"train_wz": False, "mask_scale": "rms", "score_dtype": "bfloat16"}),
    ("moe", {"expert_router": "random"}),
    ("switch", {"capacity_factor": 1.0}),
]


def x_BTD(batch_size=3, length=5, dtype=torch.float32):
    return torch.randn(batch_size, length, D, generator=torch.Generator().manual_seed(4)).to(dtype)


def closed_form_params(ffn, act):
    gated = ACTIVATIONS[act][1]
    matrices = 3 if gated else 2
    width = 32 if gated else WIDTH  # 2/3 of 48
    plain = matrices * D * width + (matrices - 1) * width + D
    extra = {
        "dense": 0,
        "switch": 2 * D,  # two experts
        "moe": 4 * D,  # four experts
        "infinity": 2 * (D * 8 + 8) + width * 8,  # mu and sigma, W_z
    }
    return plain + extra[ffn]


@EVERY
def test_output_loss_and_statistics(ffn, act):
    layer, x = make_layer(ffn, hidden_act=act), x_BTD()
    out = layer(x, routing(3))
    assert out.y_BTD.shape == x.shape
    assert out.y_BTD.dtype == x.dtype
    assert out.y_BTD.isfinite().all()
    assert out.aux_loss.shape == ()
    assert out.aux_loss.dtype == torch.float32
    assert float(out.aux_loss.detach()) >= 0
    for name, value in out.stats._asdict().items():
        assert value.dtype == torch.float32, name
        assert not value.requires_grad, name
        assert value.ndim == (1 if name == "counts_U" else 0), name
    assert float(out.stats.tokens) == 15
    per_token = {"dense": layer.width if ffn == "dense" else 0, "switch": 1, "moe": 2}
    expected = per_token[ffn] if ffn in per_token else 2 * round(0.25 * layer.num_units)
    assert float(out.stats.counts_U.sum()) == 15 * expected
    summary = out.stats.summary()
    for share in ("entropy", "union_ratio", "overlap_ratio", "dead_ratio", "dropped_ratio"):
        assert 0.0 <= summary[share] <= 1.0 + 1e-6, share
    assert 1.0 <= summary["effective_units"] <= out.stats.counts_U.numel() * (1 + 1e-9)
    assert 1.0 - 1e-6 <= summary["max_load"] <= out.stats.counts_U.numel()
    assert all(isinstance(value, float) for value in summary.values())


@EVERY
def test_two_dimensions_are_one_row(ffn, act):
    layer, x = make_layer(ffn, hidden_act=act), x_BTD(1, 7)
    row, flat = layer(x, routing(1)), layer(x[0], routing(1))
    assert flat.y_BTD.shape == (7, D)
    torch.testing.assert_close(flat.y_BTD, row.y_BTD[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(flat.stats.counts_U, row.stats.counts_U)


@EVERY
def test_parameters_are_counted_and_of_the_closed_form(ffn, act):
    layer = make_layer(ffn, hidden_act=act)
    assert layer.num_params() == sum(p.numel() for p in layer.parameters()) == closed_form_params(ffn, act)
    cost = layer.cost()
    assert cost.params == layer.num_params()
    assert cost.active_params <= cost.params
    assert cost.flops_ideal <= cost.flops_executed


@EACH
@pytest.mark.parametrize("act", ["swiglu", "geglu"])
def test_a_gated_width_keeps_the_parameters(ffn, act):
    plain = make_layer(ffn, 128, 1024, hidden_act="gelu")
    gated = make_layer(ffn, 128, 1024, hidden_act=act)
    assert abs(gated.num_params() / plain.num_params() - 1) < 0.01


@EVERY
def test_inits_cover_every_parameter_once(ffn, act):
    layer = make_layer(ffn, hidden_act=act)
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(torch.nan)
    layer.reset_parameters()
    assert all(p.isfinite().all() for p in layer.parameters())
    initialized = [id(init.tensor) for init in layer.inits()]
    assert sorted(initialized) == sorted(id(p) for p in layer.parameters())


@pytest.mark.parametrize(("ffn", "options"), SPECIAL)
def test_inits_and_gradients_cover_the_controls_too(ffn, options):
    layer = make_layer(ffn, **options).train()
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(torch.nan)
    layer.reset_parameters()
    assert all(p.isfinite().all() for p in layer.parameters())
    assert_gradients_reach_everything(layer)


def assert_gradients_reach_everything(layer):
    x = x_BTD().requires_grad_()
    out = layer(x, routing(3))
    weight = torch.randn(out.y_BTD.shape, generator=torch.Generator().manual_seed(1))
    ((out.y_BTD * weight).sum() + out.aux_loss).backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0
    for name, p in layer.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, name
            assert p.grad.isfinite().all(), name
            assert p.grad.abs().sum() > 0, name
        else:
            assert p.grad is None, name


@EVERY
def test_gradients_reach_every_trainable_parameter(ffn, act):
    assert_gradients_reach_everything(make_layer(ffn, hidden_act=act).train())


@EVERY
def test_gradients_are_those_of_finite_differences(ffn, act):
    # float64 where the variant has it; a step that small flips no unit and moves no token
    layer, x = make_layer(ffn, hidden_act=act).double(), x_BTD(1, 2, torch.float64).requires_grad_()
    direction = torch.randn(x.shape, dtype=torch.float64)
    layer(x, routing(1)).y_BTD.square().sum().backward()
    exact = float((x.grad * direction).sum())
    step = 1e-4
    with torch.no_grad():
        plus, minus = (layer(x + s * step * direction, routing(1)).y_BTD.square().sum() for s in (1, -1))
    assert float((plus - minus) / (2 * step)) == pytest.approx(exact, rel=1e-2, abs=1e-8)


@EACH
@pytest.mark.parametrize("dial", DIALS)
def test_dials_that_a_variant_lacks_are_refused_by_name(ffn, dial):
    layer, given = make_layer(ffn), Routing(**{dial: DIALS[dial]})
    if dial in OWN_DIALS[ffn]:
        layer(x_BTD(), given)
        layer.cost(given)
        return
    with pytest.raises(InfMoEError, match=dial):
        layer(x_BTD(), given)


@pytest.mark.parametrize("ffn", ["dense", "switch", "moe"])
def test_a_backend_is_refused_where_there_are_none_and_the_environments_is_let_be(ffn, monkeypatch):
    layer = make_layer(ffn)
    for given in (Routing(backend="triton"), Routing(backend="auto")):
        for call in (lambda given=given: layer(x_BTD(), given), lambda given=given: layer.cost(given)):
            with pytest.raises(InfMoEError, match=f"has no backends: leave backend='{given.backend}' out"):
                call()
    expected = layer(x_BTD()).y_BTD
    monkeypatch.setenv("INFMOE_BACKEND", "eager")
    torch.testing.assert_close(layer(x_BTD()).y_BTD, expected)


@EVERY
def test_copies_and_pickles_are_the_same_layer(ffn, act):
    layer, x = make_layer(ffn, hidden_act=act), x_BTD()
    expected = layer(x, routing(3)).y_BTD
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x, routing(3)).y_BTD, expected)


@EACH
def test_strides_do_not_matter(ffn):
    layer, x = make_layer(ffn), x_BTD()
    expected = layer(x, routing(3)).y_BTD
    for strided in (x.transpose(0, 1).contiguous().transpose(0, 1), x.repeat_interleave(2, dim=-1)[..., ::2]):
        assert not strided.is_contiguous()
        torch.testing.assert_close(layer(strided, routing(3)).y_BTD, expected, rtol=1e-6, atol=1e-6)


@EACH
@pytest.mark.parametrize("shape", [(2, 0, D), (0, 4, D), (0, D)])
def test_no_tokens_give_no_output(ffn, shape):
    layer = make_layer(ffn).train()
    x = torch.zeros(shape, requires_grad=True)
    out = layer(x, Routing(key=NoiseKey(seed=1)))
    assert out.y_BTD.shape == shape
    assert out.aux_loss.isfinite()
    assert all(v.isfinite().all() for v in out.stats)
    assert float(out.stats.tokens) == 0
    (out.y_BTD.sum() + out.aux_loss).backward()
    summary = out.stats.summary()
    assert all(value == value for value in summary.values())  # no NaN


@EVERY
def test_bfloat16_in_autocast_and_throughout(ffn, act):
    layer, x = make_layer(ffn, hidden_act=act), x_BTD()
    layer.requires_grad_(False)
    expected = layer(x, routing(3)).y_BTD
    with torch.autocast("cpu", torch.bfloat16):
        cast = layer(x, routing(3))
    pure = copy.deepcopy(layer).to(torch.bfloat16)(x.bfloat16(), routing(3))
    for out in (cast, pure):
        assert out.y_BTD.dtype == torch.bfloat16
        assert out.y_BTD.isfinite().all()
        assert out.aux_loss.dtype == torch.float32
        assert all(v.dtype == torch.float32 for v in out.stats)
        # Routing may tip over for single tokens, so on the whole: closer than to anything unrelated.
        error = (out.y_BTD.float() - expected).norm() / expected.norm()
        assert float(error) < 0.5


@EACH
@pytest.mark.parametrize("training", [True, False])
def test_a_call_leaves_nothing_behind(ffn, training):
    layer = make_layer(ffn).train(training)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    attributes = {name: dict(vars(module)) for name, module in layer.named_modules()}
    layer(x_BTD(), Routing(max_stats_tokens=3))
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    for name, module in layer.named_modules():
        assert vars(module).keys() == attributes[name].keys()
        assert all(vars(module)[key] is value for key, value in attributes[name].items()), name


@EACH
def test_eval_repeats_itself(ffn):
    layer = make_layer(ffn)
    assert torch.equal(layer(x_BTD()).y_BTD, layer(x_BTD()).y_BTD)


@EACH
def test_max_stats_tokens_bounds_what_is_looked_at(ffn):
    layer, x = make_layer(ffn), x_BTD(4, 10)
    for most in (1, 7, 40, 100):
        stats = layer(x, routing(4, max_stats_tokens=most)).stats
        assert 1 <= float(stats.tokens) <= most
        summary = stats.summary()
        assert 0 <= summary["union_ratio"] <= 1 + 1e-6
    every = layer(x, routing(4)).stats
    assert float(every.tokens) == 40
    assert torch.equal(layer(x, routing(4, max_stats_tokens=40)).stats.counts_U, every.counts_U)


@EACH
def test_statistics_cost_no_change_of_the_output(ffn):
    layer, x = make_layer(ffn), x_BTD()
    assert torch.equal(layer(x, routing(3)).y_BTD, layer(x, routing(3, max_stats_tokens=2)).y_BTD)


@EACH
def test_a_wrong_activation_is_refused_with_the_nearest_name(ffn):
    with pytest.raises(InfMoEError, match="did you mean 'swiglu'"):
        make_layer(ffn, hidden_act="swigl")


@EACH
@pytest.mark.parametrize("sizes", [(0, 8), (8, 0), (-1, 8)])
def test_empty_layers_are_refused(ffn, sizes):
    with pytest.raises(InfMoEError, match="must be positive"):
        FFN_CLASSES[ffn](*sizes)


@EACH
def test_options_are_fields_of_the_model_config(ffn):
    fields = InfMoEConfig.__dataclass_fields__
    options = FFN_CLASSES[ffn].option_defaults()
    assert options
    assert set(options) <= set(fields)
    for name, default in options.items():  # the defaults agree where the field belongs to all variants
        if fields[name].default is not None:
            assert fields[name].default == default, name


@EACH
def test_every_option_is_documented(ffn):
    documentation = inspect.getdoc(FFN_CLASSES[ffn].__init__)
    for name in FFN_CLASSES[ffn].option_defaults():
        assert name in documentation, name


@EACH
def test_from_config_sets_every_option_and_scales_the_output(ffn):
    config = InfMoEConfig(ffn=ffn, hidden_size=64, num_attention_heads=4, intermediate_size=256, num_hidden_layers=8)
    layer = ffn_class(ffn).from_config(config, layer_index=3)
    assert layer.layer_index == 3
    assert layer.hidden_size == 64
    assert layer.intermediate_size == 256
    assert layer.residual_init_scale == 16**-0.5
    output = layer.w2.weight if hasattr(layer, "w2") else layer.experts.w2_EFD
    assert float(output.detach().std()) == pytest.approx(0.02 / 4, rel=0.05)


def test_unknown_variants_are_refused_with_the_nearest_name():
    with pytest.raises(InfMoEError, match="did you mean 'infinity'"):
        ffn_class("infinit")


def test_the_layers_never_import_transformers():
    code = "import sys, infmoe.layers; print(sorted({'transformers', 'peft'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


def test_hash_routing_keeps_the_contract():
    layer, x = make_layer("moe", expert_router="hash").train(), x_BTD()
    given = Routing(token_ids=tokens(3, 5))
    assert torch.equal(layer(x, given).y_BTD, layer(x, given).y_BTD)
    with pytest.raises(InfMoEError, match="token_ids"):
        layer(x)
