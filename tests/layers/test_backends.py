"""The backends of ∞-MoE give one answer: outputs, statistics, gradients, generated text."""

import copy
import itertools
import pickle

import pytest
import torch
from helpers import make_layer, routing, tiny_model, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from infmoe.errors import InfMoEError
from infmoe.layers import Routing
from infmoe.layers.activations import ACTIVATIONS
from infmoe.ops import dispatch
from infmoe.ops.masked_ffn import compiled

needs_kernels = pytest.mark.skipif(not compiled.available(), reason="no compiled kernels here")
BACKENDS = ("eager", "fused", "sparse")

# Options of the layer, and dials of the call.
CASES = {
    **{act: ({"hidden_act": act}, {}) for act in ACTIVATIONS},
    "blocks": ({"block_size": 4}, {}),
    "gated blocks": ({"block_size": 4, "hidden_act": "swiglu", "intermediate_size": 108}, {}),
    "bias": ({"wz_bias": True}, {}),
    "bfloat16 scores": ({"score_dtype": "bfloat16"}, {}),
    "statistical": ({"selection": "statistical"}, {}),
    "odd sizes": ({"hidden_size": 13, "intermediate_size": 61, "z_dim": 7}, {}),
    "one unit kept": ({}, {"keep_ratio": 0.001}),
    "all kept": ({}, {"keep_ratio": 1.0}),
    "fixed scale": ({"mask_scale": "fixed"}, {"keep_ratio": 0.5}),
    "rms scale": ({"mask_scale": "rms"}, {"keep_ratio": 0.5}),
    "rms scale, statistical": ({"mask_scale": "rms", "selection": "statistical"}, {"keep_ratio": 0.5}),
    "rows of their own": ({}, {"num_samples": (1, 5, 2), "keep_ratio": (0.1, 0.25, 1.0)}),
    "rms rows of their own": ({"mask_scale": "rms"}, {"num_samples": (1, 5, 2), "keep_ratio": (0.1, 0.25, 1.0)}),
    "mu": ({}, {"mode": "mu"}),
    "antithetic": ({}, {"mode": "antithetic", "num_samples": 3}),
    "no sigma": ({"sigma_activation": "none"}, {}),
    "exp sigma": ({"sigma_activation": "exp"}, {}),
    "router of two layers": ({"router_hidden_size": 8}, {}),
    "statistics of some": ({}, {"max_stats_tokens": 4}),
    "eight samples": ({}, {"num_samples": 8}),
}
EACH = pytest.mark.parametrize("case", CASES)


def layer_of(case="gelu_new", dtype=torch.float32):
    options = {"initializer_range": 0.3, **CASES[case][0]}
    layer = make_layer("infinity", options.pop("hidden_size", 16), options.pop("intermediate_size", 48), **options)
    for parameter in layer.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return layer.to(dtype)


def inputs(layer, batch_size=3, length=5):
    x = torch.randn(batch_size, length, layer.hidden_size, generator=torch.Generator().manual_seed(4))
    return x.to(layer.w1.weight.dtype)


def run(layer, x, backend, case="gelu_new"):
    return layer(x, routing(len(x), backend=backend, **CASES[case][1]))


def gradients(layer, x, backend, case="gelu_new"):
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = run(layer, x, backend, case).y_BTD
    (y.float() * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    return {"x": x.grad} | {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}


def close(actual, expected, dtype=torch.float32, what=""):
    assert actual.dtype == expected.dtype, what
    assert actual.shape == expected.shape, what
    if dtype == torch.float32:
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5, msg=lambda text: f"{what}: {text}")
    else:  # the plain path rounds after each operation
        error = (actual.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-6)
        assert float(error) < 0.03, what


@needs_kernels
@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_outputs_and_statistics_agree(case, dtype):
    layer = layer_of(case, dtype)
    for shape in ((3, 5), (3, 1)):
        x = inputs(layer, *shape)
        expected = run(layer, x, "eager", case)
        for backend in ("fused", "sparse"):
            out = run(layer, x, backend, case)
            close(out.y_BTD, expected.y_BTD, dtype, backend)
            for name, value in out.stats._asdict().items():
                close(value, getattr(expected.stats, name), torch.float32, f"{backend} {name}")


@needs_kernels
@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_agree(case, dtype):
    layer = layer_of(case, dtype).train()
    x = inputs(layer)
    expected, actual = gradients(layer, x, "eager", case), gradients(layer, x, "fused", case)
    assert expected.keys() == actual.keys()
    rounded = case == "bfloat16 scores"  # the plain path rounds the gradients of both factors too
    for name, gradient in expected.items():
        close(actual[name], gradient, torch.bfloat16 if rounded else dtype, name)


@needs_kernels
@pytest.mark.parametrize("case", ["gelu_new", "swiglu", "blocks", "bfloat16 scores", "rms scale", "mu"])
def test_under_autocast_they_agree(case):
    layer = layer_of(case).train()
    x = inputs(layer)
    with torch.autocast("cpu", torch.bfloat16):
        y, other = (run(layer, x, backend, case).y_BTD for backend in ("eager", "fused"))
        expected, actual = gradients(layer, x, "eager", case), gradients(layer, x, "fused", case)
        with torch.no_grad(), pytest.raises(InfMoEError, match=r"'sparse' can't run this call.*autocast"):
            run(layer, x, "sparse", case)
        with torch.no_grad():
            assert torch.equal(run(layer, x, None, case).y_BTD, run(layer, x, "fused", case).y_BTD)
    assert y.dtype == torch.bfloat16
    close(other, y, torch.bfloat16)
    for name, gradient in expected.items():
        close(actual[name], gradient, torch.bfloat16, name)


@pytest.mark.parametrize("autocast", [False, True])
def test_double_takes_the_plain_path(autocast):
    layer = layer_of(dtype=torch.float64)
    x = inputs(layer)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(run(layer, x, None).y_BTD, run(layer, x, "eager").y_BTD)


@needs_kernels
@pytest.mark.parametrize("backend", ["fused", "sparse", "triton"])
@torch.no_grad()
def test_double_is_refused_by_the_name_of_a_backend_that_lacks_it(backend):
    layer = layer_of(dtype=torch.float64)
    with pytest.raises(InfMoEError, match=f"'{backend}' can't run this call: .*; those that can: eager$") as raised:
        run(layer, inputs(layer), backend)
    assert "\n" not in str(raised.value)


@needs_kernels
@pytest.mark.parametrize("backend", ["eager", "fused"])
def test_gradient_checkpointing_changes_no_gradient(backend):
    layer = layer_of("swiglu").train()
    x = inputs(layer)
    expected = gradients(layer, x, backend, "swiglu")
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    y = checkpoint(lambda t: run(layer, t, backend, "swiglu").y_BTD, leaf, use_reentrant=False)
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    assert torch.equal(leaf.grad, expected.pop("x"))
    for name, gradient in expected.items():
        assert torch.equal(layer.get_parameter(name).grad, gradient), name


@needs_kernels
@torch.no_grad()
def test_copies_made_after_a_sparse_call_are_independent():
    layer = layer_of()
    x, keys = inputs(layer), list(layer.state_dict())
    expected = run(layer, x, "sparse").y_BTD
    assert list(layer.state_dict()) == keys
    w2 = layer.w2.weight.numel() * 4
    assert len(pickle.dumps(layer)) < len(pickle.dumps(layer_of())) + w2 / 2  # no copy of W2 travels along
    copied, unpickled, loaded = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer_of("relu")
    run(loaded, x, "sparse")
    loaded.load_state_dict(layer.state_dict())
    loaded.hidden_act, loaded.act = layer.hidden_act, layer.act
    for other in (copied, unpickled, loaded):
        assert torch.equal(run(other, x, "sparse").y_BTD, expected)
        other.w2.weight.mul_(2)
        close(run(other, x, "sparse").y_BTD, run(other, x, "eager").y_BTD)
    assert torch.equal(run(layer, x, "sparse").y_BTD, expected)


CHANGES = {
    "an optimizer's step": lambda layer: torch.optim.SGD([layer.w2.weight], lr=1.0).step(),
    "new weights": lambda layer: layer.reset_parameters(),
    "another parameter": lambda layer: setattr(layer.w2, "weight", torch.nn.Parameter(layer.w2.weight * 3)),
    "to bfloat16": lambda layer: layer.to(torch.bfloat16),
    "to bfloat16 and back": lambda layer: layer.mul_by_two().to(torch.bfloat16).to(torch.float32),
    "through .data": lambda layer: layer.w2.weight.data.mul_(2),
    "data replaced": lambda layer: setattr(layer.w2.weight, "data", layer.w2.weight.data * 2),
    "strides": lambda layer: setattr(layer.w2, "weight", torch.nn.Parameter(layer.w2.weight.T.contiguous().T)),
    "strides of w1": lambda layer: setattr(layer.w1, "weight", torch.nn.Parameter(layer.w1.weight.T.contiguous().T)),
    "strides of w_z": lambda layer: setattr(layer.w_z, "weight", torch.nn.Parameter(layer.w_z.weight.T.contiguous().T)),
}


@needs_kernels
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("tokens", [1, 15])  # in one operator, and step by step
@torch.no_grad()
def test_weights_may_change_between_sparse_calls(change, tokens):
    layer = layer_of()
    x = inputs(layer, 1, tokens)
    for _ in range(2):  # the second call is remembered
        run(layer, x, "sparse")
    layer.w2.weight.grad = torch.ones_like(layer.w2.weight)
    layer.mul_by_two = lambda: layer.w2.weight.mul_(2) is None or layer
    CHANGES[change](layer)
    x = x.to(layer.w1.weight.dtype)
    close(run(layer, x, "sparse").y_BTD, run(layer, x, "eager").y_BTD, x.dtype)
    close(run(layer, x, None).y_BTD, run(layer, x, "eager").y_BTD, x.dtype)


@needs_kernels
@pytest.mark.parametrize("targets", [["w1"], ["w2"], ["w_z"], ["w1", "w2", "w3", "w_z"]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maps_under_lora_run_and_the_sparse_path_says_why_it_does_not(targets, dtype):
    peft = pytest.importorskip("peft")
    layer = layer_of("swiglu", dtype)
    x = inputs(layer)
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    wrapped = peft.inject_adapter_in_model(config, layer)
    with torch.no_grad():
        expected = run(wrapped, x, "eager", "swiglu").y_BTD
        close(run(wrapped, x, "fused", "swiglu").y_BTD, expected, dtype)
        close(run(wrapped, x, None, "swiglu").y_BTD, expected, dtype)
        if targets == ["w_z"]:
            close(run(wrapped, x, "sparse", "swiglu").y_BTD, expected, dtype)
        else:
            with pytest.raises(InfMoEError, match=r"'sparse' can't run this call.*wrapped.*eager, fused$") as raised:
                run(wrapped, x, "sparse", "swiglu")
            assert "\n" not in str(raised.value)
    expected, actual = gradients(wrapped, x, "eager", "swiglu"), gradients(wrapped, x, "fused", "swiglu")
    trained = [name for name, p in wrapped.named_parameters() if "lora" in name]
    assert len(trained) == 2 * len(targets)
    assert all(float(actual[name].norm()) > 0 for name in trained)
    for name, gradient in expected.items():
        close(actual[name], gradient, dtype, name)


@needs_kernels
@torch.no_grad()
def test_lora_merged_after_a_sparse_call_is_in_the_next_one():
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(layer_of())
    x = inputs(model[0])
    run(model[0], x, "sparse")
    config = peft.LoraConfig(r=2, target_modules=["w1", "w2"], init_lora_weights=False)
    model = peft.get_peft_model(model, config).merge_and_unload()
    close(run(model[0], x, "sparse").y_BTD, run(model[0], x, "eager").y_BTD)


@needs_kernels
@pytest.mark.parametrize("name", ["w1", "w2", "w3"])
@pytest.mark.parametrize("grad", [True, False])
def test_hooks_on_the_maps_are_called_whatever_the_backend(name, grad):
    layer = layer_of("swiglu")
    x, calls = inputs(layer), []
    layer.get_submodule(name).register_forward_hook(lambda *args: calls.append(name))
    for backend in ("eager", "fused", None):
        with torch.set_grad_enabled(grad):
            run(layer, x, backend, "swiglu")
        assert calls == [name], backend
        calls.clear()


@needs_kernels
@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
@pytest.mark.parametrize("name", ["w1", "w2"])
def test_backward_hooks_on_the_maps_are_called_too(name, kind):
    layer = layer_of().train()
    calls = []
    getattr(layer.get_submodule(name), kind)(lambda *args: calls.append(name))
    for backend in ("eager", "fused"):
        gradients(layer, inputs(layer), backend)
        assert calls == [name], backend
        calls.clear()


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("shape", [(2, 0), (0, 4)])
def test_no_tokens_are_no_trouble(backend, shape):
    if backend in ("fused", "sparse") and not compiled.available():
        pytest.skip("no compiled kernels here")
    layer = layer_of("swiglu").train()
    x = inputs(layer, *shape).requires_grad_(backend != "sparse")
    with torch.set_grad_enabled(backend != "sparse"):
        out = run(layer, x, backend)
    assert out.y_BTD.shape == x.shape
    assert float(out.stats.counts_U.sum()) == 0
    if backend != "sparse":
        out.y_BTD.sum().backward()
        assert x.grad.shape == x.shape


@torch.no_grad()
def test_as_many_samples_as_one_likes():
    layer = layer_of()
    x = inputs(layer, 1, 2)
    for num_samples in (64, 65, 300):
        expected = layer(x, routing(1, num_samples=num_samples, backend="eager")).y_BTD
        close(layer(x, routing(1, num_samples=num_samples)).y_BTD, expected)


@needs_kernels
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_torchs_default_dtype_changes_nothing(default, backend):
    layer = layer_of("rows of their own")
    x = inputs(layer)
    expected = run(layer, x, backend, "rows of their own").y_BTD
    torch.set_default_dtype(default)
    try:
        y = run(layer, x, backend, "rows of their own").y_BTD
    finally:
        torch.set_default_dtype(torch.float32)
    assert y.dtype == torch.float32
    close(y, expected)


@needs_kernels
@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_a_diverged_token_is_nan_and_its_neighbours_are_not(backend):
    layer = layer_of()
    x = inputs(layer)
    clean = run(layer, x, backend).y_BTD
    x[1, 2, 3] = torch.nan
    y = run(layer, x, backend).y_BTD
    assert y[1, 2].isnan().all()
    others = torch.ones(3, 5, dtype=torch.bool)
    others[1, 2] = False
    close(y[others], clean[others])


@needs_kernels
@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_and_repetition_change_nothing_but_rounding(backend):
    layer = layer_of("swiglu")
    x = inputs(layer, 3, 40)
    with torch.set_grad_enabled(backend != "sparse"):
        once = run(layer, x, backend, "swiglu").y_BTD
        assert torch.equal(run(layer, x, backend, "swiglu").y_BTD, once)
        torch.set_num_threads(2)
        try:
            close(run(layer, x, backend, "swiglu").y_BTD, once)
        finally:
            torch.set_num_threads(1)


class _Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func).removesuffix(".default"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("grad", [True, False])
def test_in_an_environment_that_says_eager_no_kernel_runs(length, grad):
    layer, seen = layer_of("rms scale"), _Names()
    with dispatch.backend("eager"), torch.set_grad_enabled(grad), seen:
        run(layer, inputs(layer, 1, length), None, "rms scale")
    assert {name for name in seen.names if name.startswith("infmoe")} == {"infmoe.kth_largest", "infmoe.noise_bits"}


@needs_kernels
@pytest.mark.parametrize("backend", ["fused", "sparse"])
def test_the_backend_asked_for_is_the_one_that_runs(backend):
    layer, seen = layer_of(), _Names()
    for by_environment in (True, False):
        seen.names.clear()
        with torch.no_grad(), dispatch.backend(backend if by_environment else "eager"), seen:
            run(layer, inputs(layer), None if by_environment else backend)
        dense, sparse = {"infmoe.gate", "infmoe.gated_linear"} & seen.names, "infmoe.sparse_ffn" in seen.names
        assert (bool(dense), sparse) == (backend == "fused", backend == "sparse")
        assert dispatch.requested(None) == "auto"


@needs_kernels
def test_sparse_by_name_is_refused_where_gradients_are_wanted():
    layer = layer_of()
    with pytest.raises(InfMoEError, match=r"no gradients.*torch.no_grad\(\); those that can: eager, fused$"):
        run(layer, inputs(layer), "sparse")


@pytest.mark.parametrize("name", ["nope", "sparce", ""])
def test_unknown_names_are_refused(name, monkeypatch):
    with pytest.raises(InfMoEError, match="backend") as raised:
        Routing(backend=name)
    assert "sparse" in str(raised.value)
    with pytest.raises(InfMoEError, match="backend"), dispatch.backend(name):
        pass
    monkeypatch.setenv("INFMOE_BACKEND", name or "None")
    layer = layer_of()
    with pytest.raises(InfMoEError, match=r"INFMOE_BACKEND=.*auto, eager, fused, sparse, triton"):
        run(layer, inputs(layer), None)


def test_an_empty_environment_variable_is_none(monkeypatch):
    monkeypatch.setenv("INFMOE_BACKEND", "")
    layer = layer_of()
    run(layer, inputs(layer), None)


# ---- torch.compile


@pytest.fixture
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@needs_kernels
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(
    "case", ["gelu_new", "gated blocks", "rms rows of their own", "bfloat16 scores", "statistical"]
)
def test_compiled_training_takes_the_same_gradients(case):
    layer = layer_of(case).train()
    x = inputs(layer)
    expected = gradients(layer, x, "fused", case)
    layer.forward = torch.compile(layer.forward, fullgraph=True, backend="aot_eager")
    for name, gradient in gradients(layer, x, "fused", case).items():
        close(gradient, expected[name], what=name)


@needs_kernels
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("backend", [None, "eager", "fused", "sparse"])
def test_compiled_decoding_computes_the_same(backend):
    layer = layer_of("swiglu")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for length in (1, 2, 3, 7):  # from the second on, torch takes the length for a variable
            x = inputs(layer, 2, length)
            expected = run(layer, x, backend, "swiglu")
            out = run(compiled, x, backend, "swiglu")
            close(out.y_BTD, expected.y_BTD)
            close(out.stats.counts_U, expected.stats.counts_U)


@needs_kernels
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("backend", ["fused", None])
def test_compiled_training_takes_any_length(backend):
    layer = layer_of().train()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (4, 9, 2):
        x = inputs(layer, 2, length)
        expected = run(layer, x, backend).y_BTD
        y = run(compiled, x, backend).y_BTD
        close(y, expected)
        y.sum().backward()


@needs_kernels
@pytest.mark.usefixtures("_fresh_compiler")
def test_inductor_trains_fused_and_decodes_sparse():
    layer = layer_of("swiglu").train()
    x = inputs(layer)
    expected = gradients(layer, x, "fused", "swiglu")
    with torch.no_grad():
        sparse = run(layer, x, "sparse", "swiglu").y_BTD
    layer.forward = torch.compile(layer.forward, fullgraph=True)
    for name, gradient in gradients(layer, x, "fused", "swiglu").items():
        close(gradient, expected[name], what=name)
    with torch.no_grad():
        close(run(layer, x, "sparse", "swiglu").y_BTD, sparse)


# ---- Models


@needs_kernels
@pytest.mark.parametrize("options", [{}, {"hidden_act": "swiglu", "score_dtype": "bfloat16"}], ids=str)
def test_every_backend_writes_the_same_text(options):
    model, ids = tiny_model(**options), tokens(2, 5)
    greedy = {"do_sample": False, "max_new_tokens": 8}
    texts = []
    for backend in (None, *BACKENDS):
        with dispatch.backend("eager"):  # the routing's own word counts
            texts.append(model.generate(ids, **greedy, routing=Routing(backend=backend)))
    for backend in BACKENDS:
        with dispatch.backend(backend):
            texts.append(model.generate(ids, **greedy))
    for text, other in itertools.pairwise(texts):
        assert torch.equal(text, other)


@needs_kernels
def test_a_model_trains_alike_under_each_backend():
    model, ids = tiny_model().train(), tokens(2, 9)
    results = []
    for backend in ("eager", "fused", "auto"):
        model.zero_grad()
        loss = model(ids, labels=ids, routing=routing(2, backend=backend)).loss
        loss.backward()
        results.append({"loss": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()})
    for other in results[1:]:
        for name, value in results[0].items():
            close(other[name], value, what=name)


STEP_BY_STEP = {"antithetic", "router of two layers"}  # the general way, in several operators


@needs_kernels
@EACH
@pytest.mark.parametrize("backend", ["fused", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_one_operator_from_a_few_tokens_to_their_mask_gives_the_same_bits(case, backend, dtype, monkeypatch):
    layer = layer_of(case, dtype)
    # float32 up to 8 tokens, bfloat16 one: see few_tokens.few_rows
    one_row = {name: dial for name, dial in CASES[case][1].items() if not isinstance(dial, tuple)}
    x, dials = (inputs(layer, 3, 2), CASES[case][1]) if dtype == torch.float32 else (inputs(layer, 1, 1), one_row)
    calls = []
    original = torch.ops.infmoe.route
    monkeypatch.setattr(torch.ops.infmoe, "route", lambda *args: calls.append(1) or original(*args))
    at_once = layer(x, routing(len(x), backend=backend, **dials))
    torch.set_num_threads(2)
    try:
        on_two_threads = layer(x, routing(len(x), backend=backend, **dials))
    finally:
        torch.set_num_threads(1)
    close(on_two_threads.y_BTD, at_once.y_BTD, dtype)
    assert on_two_threads.stats.counts_U.equal(at_once.stats.counts_U)
    rescaled = layer.mask_scale == "rms" and "keep_ratio" in dials
    assert len(calls) == 2 * (case not in STEP_BY_STEP and not rescaled)
    monkeypatch.setattr(type(layer), "_few_token_call", lambda *args: None)
    in_steps = layer(x, routing(len(x), backend=backend, **dials))
    assert at_once.y_BTD.equal(in_steps.y_BTD)
    for name, expected in in_steps.stats._asdict().items():
        assert getattr(at_once.stats, name).equal(expected), name


@needs_kernels
@pytest.mark.parametrize("name", ["router", "router.mu", "router.sigma", "w_z", "w1", "w2"])
@torch.no_grad()
def test_modules_that_do_more_than_their_class_says_are_called_for_a_few_tokens_too(name):
    layer = layer_of()
    x = inputs(layer, 1, 1)
    expected = run(layer, x, "fused").y_BTD
    calls = []
    module = layer.get_submodule(name)
    handle = module.register_forward_hook(lambda *args: calls.append("hook"))
    close(run(layer, x, "fused").y_BTD, expected)
    handle.remove()
    forward = module.forward  # as Accelerate's hooks do
    module.forward = lambda *args: calls.append("forward") or forward(*args)
    close(run(layer, x, "fused").y_BTD, expected)
    assert calls == ["hook", "forward"]
