"""The backends of ∞-MoE give one answer: outputs, statistics, gradients, generated text."""

import itertools

import pytest
import torch
from backend_helpers import BACKENDS, CASES, EACH, backend_layer, close, gradients, inputs, run
from helpers import backend_of_the_environment, routing, tiny_model, tokens
from kernel_helpers import NEEDS_KERNELS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from infmoe.errors import InfMoEError
from infmoe.layers import Routing
from infmoe.ops import dispatch
from infmoe.ops.masked_ffn import compiled


@NEEDS_KERNELS
@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_outputs_and_statistics_agree(case, dtype):
    layer = backend_layer(case, dtype)
    for shape in ((3, 5), (3, 1)):
        x = inputs(layer, *shape)
        expected = run(layer, x, "eager", case)
        for backend in ("fused", "sparse"):
            out = run(layer, x, backend, case)
            close(out.y_BTD, expected.y_BTD, dtype, backend)
            for name, value in out.stats._asdict().items():
                close(value, getattr(expected.stats, name), torch.float32, f"{backend} {name}")


@NEEDS_KERNELS
@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_agree(case, dtype):
    layer = backend_layer(case, dtype).train()
    x = inputs(layer)
    expected, actual = gradients(layer, x, "eager", case), gradients(layer, x, "fused", case)
    assert expected.keys() == actual.keys()
    rounded = case == "bfloat16 scores"  # the plain path rounds the gradients of both factors too
    for name, gradient in expected.items():
        close(actual[name], gradient, torch.bfloat16 if rounded else dtype, name)


@NEEDS_KERNELS
@pytest.mark.parametrize("case", ["gelu_new", "swiglu", "blocks", "bfloat16 scores", "rms scale", "mu"])
def test_under_autocast_they_agree(case):
    layer = backend_layer(case).train()
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
    layer = backend_layer(dtype=torch.float64)
    x = inputs(layer)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(run(layer, x, None).y_BTD, run(layer, x, "eager").y_BTD)


@NEEDS_KERNELS
@pytest.mark.parametrize("backend", ["fused", "sparse", "triton"])
@torch.no_grad()
def test_double_is_refused_by_the_name_of_a_backend_that_lacks_it(backend):
    layer = backend_layer(dtype=torch.float64)
    with pytest.raises(InfMoEError, match=f"'{backend}' can't run this call: .*; those that can: eager$") as raised:
        run(layer, inputs(layer), backend)
    assert "\n" not in str(raised.value)


@NEEDS_KERNELS
@pytest.mark.parametrize("backend", ["eager", "fused"])
def test_gradient_checkpointing_changes_no_gradient(backend):
    layer = backend_layer("swiglu").train()
    x = inputs(layer)
    expected = gradients(layer, x, backend, "swiglu")
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    y = checkpoint(lambda t: run(layer, t, backend, "swiglu").y_BTD, leaf, use_reentrant=False)
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    assert torch.equal(leaf.grad, expected.pop("x"))
    for name, gradient in expected.items():
        assert torch.equal(layer.get_parameter(name).grad, gradient), name


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("shape", [(2, 0), (0, 4)])
def test_no_tokens_are_no_trouble(backend, shape):
    if backend in ("fused", "sparse") and not compiled.available():
        pytest.skip("no compiled kernels here")
    layer = backend_layer("swiglu").train()
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
    layer = backend_layer()
    x = inputs(layer, 1, 2)
    for num_samples in (64, 65, 300):
        expected = layer(x, routing(1, num_samples=num_samples, backend="eager")).y_BTD
        close(layer(x, routing(1, num_samples=num_samples)).y_BTD, expected)


@NEEDS_KERNELS
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_torchs_default_dtype_changes_nothing(default, backend):
    layer = backend_layer("rows of their own")
    x = inputs(layer)
    expected = run(layer, x, backend, "rows of their own").y_BTD
    torch.set_default_dtype(default)
    try:
        y = run(layer, x, backend, "rows of their own").y_BTD
    finally:
        torch.set_default_dtype(torch.float32)
    assert y.dtype == torch.float32
    close(y, expected)


@NEEDS_KERNELS
@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_a_diverged_token_is_nan_and_its_neighbours_are_not(backend):
    layer = backend_layer()
    x = inputs(layer)
    clean = run(layer, x, backend).y_BTD
    x[1, 2, 3] = torch.nan
    y = run(layer, x, backend).y_BTD
    assert y[1, 2].isnan().all()
    others = torch.ones(3, 5, dtype=torch.bool)
    others[1, 2] = False
    close(y[others], clean[others])


@NEEDS_KERNELS
@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_and_repetition_change_nothing_but_rounding(backend):
    layer = backend_layer("swiglu")
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
    layer, seen = backend_layer("rms scale"), _Names()
    with backend_of_the_environment("eager"), torch.set_grad_enabled(grad), seen:
        run(layer, inputs(layer, 1, length), None, "rms scale")
    assert {name for name in seen.names if name.startswith("infmoe")} == {"infmoe.kth_largest", "infmoe.noise_bits"}


@NEEDS_KERNELS
@pytest.mark.parametrize("backend", ["fused", "sparse"])
def test_the_backend_asked_for_is_the_one_that_runs(backend):
    layer, seen = backend_layer(), _Names()
    for by_environment in (True, False):
        seen.names.clear()
        with torch.no_grad(), backend_of_the_environment(backend if by_environment else "eager"), seen:
            run(layer, inputs(layer), None if by_environment else backend)
        dense, sparse = {"infmoe.gate", "infmoe.gated_linear"} & seen.names, "infmoe.sparse_ffn" in seen.names
        assert (bool(dense), sparse) == (backend == "fused", backend == "sparse")
        assert dispatch.requested(None) == "auto"


@NEEDS_KERNELS
def test_sparse_by_name_is_refused_where_gradients_are_wanted():
    layer = backend_layer()
    with pytest.raises(InfMoEError, match=r"no gradients.*torch.no_grad\(\); those that can: eager, fused$"):
        run(layer, inputs(layer), "sparse")


@pytest.mark.parametrize("name", ["nope", "sparce", ""])
def test_unknown_names_are_refused(name, monkeypatch):
    with pytest.raises(InfMoEError, match="backend") as raised:
        Routing(backend=name)
    assert "sparse" in str(raised.value)
    monkeypatch.setenv("INFMOE_BACKEND", name or "None")
    layer = backend_layer()
    with pytest.raises(InfMoEError, match=r"INFMOE_BACKEND=.*auto, eager, fused, sparse, triton"):
        run(layer, inputs(layer), None)


def test_an_empty_environment_variable_is_none(monkeypatch):
    monkeypatch.setenv("INFMOE_BACKEND", "")
    layer = backend_layer()
    run(layer, inputs(layer), None)


@NEEDS_KERNELS
@pytest.mark.parametrize("options", [{}, {"hidden_act": "swiglu", "score_dtype": "bfloat16"}], ids=str)
def test_every_backend_writes_the_same_text(options):
    model, ids = tiny_model(**options), tokens(2, 5)
    greedy = {"do_sample": False, "max_new_tokens": 8}
    texts = []
    for backend in (None, *BACKENDS):
        with backend_of_the_environment("eager"):  # the routing's own word counts
            texts.append(model.generate(ids, **greedy, routing=Routing(backend=backend)))
    for backend in BACKENDS:
        with backend_of_the_environment(backend):
            texts.append(model.generate(ids, **greedy))
    for text, other in itertools.pairwise(texts):
        assert torch.equal(text, other)


@NEEDS_KERNELS
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


@NEEDS_KERNELS
@EACH
@pytest.mark.parametrize("backend", ["fused", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_one_operator_from_a_few_tokens_to_their_mask_gives_the_same_bits(case, backend, dtype, monkeypatch):
    layer = backend_layer(case, dtype)
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
