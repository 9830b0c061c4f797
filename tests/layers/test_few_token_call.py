"""What a layer remembers of its calls for few tokens changes no result, and notices whatever changes."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from helpers import backend_of_the_environment, make_layer, routing
from torch import nn

from infmoe.layers import Routing
from infmoe.layers.few_token_call import _REMEMBERED, CallMemory
from infmoe.layers.linear import Linear
from infmoe.ops.masked_ffn import compiled

pytestmark = pytest.mark.skipif(not compiled.available(), reason="no compiled kernels here")
SPARSE = routing(1, num_samples=2, keep_ratio=0.25, backend="sparse")


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def layer_and_input(dtype=torch.float32, **options):
    layer = make_layer("infinity", initializer_range=0.3, **options).to(dtype)
    for parameter in layer.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.1)
    return layer, torch.randn(1, 1, layer.hidden_size, generator=torch.Generator().manual_seed(4)).to(dtype)


def remembers(layer, x, given=SPARSE):
    found = layer._calls.find(layer, x, given)
    return found is not None and found.call is not None


def settle(layer, x, given=SPARSE):
    """Call until the call is remembered; the second does it."""
    for _ in range(2):
        out = layer(x, given)
    assert remembers(layer, x, given)
    return out


def anew(layer, x, given=SPARSE):
    """What a layer without memory gives."""
    layer._calls = CallMemory()
    return layer(x, given)


def same(out, other):
    return out.y_BTD.equal(other.y_BTD) and all(a.equal(b) for a, b in zip(out.stats, other.stats, strict=True))


@pytest.mark.parametrize("backend", ["auto", "fused", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", ["gelu_new", "swiglu"])
def test_a_remembered_call_gives_the_same_bits(backend, dtype, act):
    layer, x = layer_and_input(dtype, hidden_act=act)
    given = Routing(key=SPARSE.key, num_samples=2, keep_ratio=0.25, backend=backend)
    settle(layer, x, given)
    other = x + 1  # another token, at other positions
    moved = Routing(key=routing(1).key.at(torch.full((1, 1), 9), 1), num_samples=2, keep_ratio=0.25, backend=backend)
    assert remembers(layer, other, moved)
    out = layer(other, moved)
    assert same(out, anew(layer, other, moved))
    assert float(out.aux_loss) == 0
    assert float(out.stats.tokens) == 1


def test_rows_of_their_own_are_remembered_too():
    layer, x = layer_and_input()
    x = x.expand(3, 1, -1).contiguous()
    given = routing(3, num_samples=(1, 3, 2), keep_ratio=(0.1, 0.25, 1.0), backend="sparse", max_stats_tokens=2)
    out = layer(x, given)
    assert remembers(layer, x, given)
    out = layer(x, given)
    assert same(out, anew(layer, x, given))
    assert float(out.stats.tokens) == 2


def replace_w1(layer):
    layer.w1 = Linear(layer.hidden_size, layer.width)


def wrap_w1(layer):
    layer.w1 = nn.Sequential(layer.w1, nn.Tanh())


def replace_weight(layer):
    layer.w_z.weight = nn.Parameter(torch.randn_like(layer.w_z.weight))


def write_in_place(layer):
    layer.w2.weight.copy_(like_in_what_is_compared(layer))


def like_in_what_is_compared(layer):
    """Another W2, but for the entries by which its copy is checked."""
    weight, step = layer.w2.weight, layer.width // layer.hidden_size
    other = torch.randn_like(weight)
    other[:, ::step].diagonal().copy_(weight[:, ::step].diagonal())
    return other


def write_behind_its_back(layer):
    layer.w2.weight.data.mul_(2.0)


def another_storage(layer):
    layer.w2.weight.data = like_in_what_is_compared(layer)


def take_the_bias_away(layer):
    layer.w2.bias = None


OPTIONS = {
    "keep_ratio": 0.125,
    "num_samples": 3,
    "selection": "statistical",
    "score_dtype": "bfloat16",
    "hidden_act": "relu",
    "routing_mode": "mu",
    "mask_scale": "fixed",
    "trained_keep_ratio": 0.125,
    "router.sigma_activation": "exp",
    "router.min_sigma": 0.9,
    "router.max_sigma": 0.1,
}
CHANGES = [
    *(replace_w1, wrap_w1, replace_weight, write_in_place, write_behind_its_back, another_storage),
    *(take_the_bias_away, *OPTIONS),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: getattr(change, "__name__", change))
@pytest.mark.parametrize("backend", ["fused", "sparse"])
def test_whatever_changes_is_noticed(change, backend):
    if change is wrap_w1 and backend == "sparse":
        pytest.skip("no sparse path for a wrapped W1")
    layer, x = layer_and_input(mask_scale="fixed" if change == "trained_keep_ratio" else "none", keep_ratio=0.5)
    if change == "mask_scale":
        layer.trained_keep_ratio = 0.25
    dials = {} if isinstance(change, str) else {"num_samples": 2, "keep_ratio": 0.25}
    given = routing(1, backend=backend, **dials)
    before = settle(layer, x, given)
    if isinstance(change, str):
        where, _, name = change.rpartition(".")
        setattr(layer.get_submodule(where), name, OPTIONS[change])
    else:
        change(layer)
    after = layer(x, given)
    assert not same(after, before)
    assert same(after, anew(layer, x, given))


@pytest.mark.parametrize("name", ["router", "router.mu", "router.sigma", "w_z"])
@pytest.mark.parametrize("backend", ["fused", "sparse"])
def test_a_module_in_another_type_is_noticed(name, backend):
    layer, x = layer_and_input(torch.bfloat16)
    given = routing(1, num_samples=2, keep_ratio=0.25, backend=backend)
    settle(layer, x, given)
    layer.get_submodule(name).float()
    found = []
    for call in (lambda: layer(x, given), lambda: anew(layer, x, given)):
        try:
            found.append(call())
        except RuntimeError as error:  # a router of another type than the layer's is no router of it
            found.append(str(error))
    assert found[0] == found[1] if isinstance(found[0], str) else same(*found)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_an_output_map_of_another_type_runs_in_the_layers(name):
    layer, x = layer_and_input(torch.bfloat16)
    parameter = getattr(layer.w2, name)
    parameter.data = parameter.data.float()
    given = routing(1, num_samples=2, keep_ratio=0.25, backend="fused")
    for _ in range(3):
        out = layer(x, given)
        assert out.y_BTD.dtype == torch.bfloat16
        assert out.y_BTD.isfinite().all()


def test_what_the_operators_get_a_copy_of_is_not_remembered():
    layer, x = layer_and_input()
    layer.w_z.weight.data = layer.w_z.weight.data.T.contiguous().T
    for _ in range(3):
        layer(x, SPARSE)
    layer.w_z.weight.data.mul_(-1.0)
    assert same(layer(x, SPARSE), anew(layer, x, SPARSE))


def test_what_changes_while_a_call_is_put_together_is_noticed():
    layer, x = layer_and_input()
    found = layer._calls.find(layer, x, SPARSE)
    call = layer._few_token_call(x, "sparse", layer._dials(SPARSE, 1), 1)
    replace_weight(layer)
    layer._calls.keep(found, call)
    assert not remembers(layer, x)


def test_weights_that_were_replaced_are_let_go():
    layer, x = layer_and_input()
    settle(layer, x)
    old = weakref.ref(layer.w1.weight)
    replace_w1(layer)
    layer(x, routing(1, num_samples=1, backend="sparse"))  # another setting
    gc.collect()
    assert old() is None


def test_settings_that_run_step_by_step_are_remembered_as_such(monkeypatch):
    layer, x = layer_and_input()
    given = routing(1, num_samples=2, mode="antithetic", backend="fused")
    for _ in range(2):
        out = layer(x, given)
    found = layer._calls.find(layer, x, given)
    assert found.call is None
    assert found is layer._calls.find(layer, x, given)
    assert same(layer(x, given), out)


@pytest.mark.parametrize("name", ["router", "router.mu", "router.sigma", "w_z", "w1", "w2"])
@pytest.mark.parametrize("how", ["hook", "pre hook", "forward"])
def test_a_module_that_does_more_than_its_class_says_is_called(name, how):
    layer, x = layer_and_input()
    given = routing(1, num_samples=2, keep_ratio=0.25, backend="fused")
    settle(layer, x, given)
    calls, module = [], layer.get_submodule(name)
    if how == "hook":
        module.register_forward_hook(lambda *args: calls.append(how))
    elif how == "pre hook":
        module.register_forward_pre_hook(lambda *args: calls.append(how))
    else:  # as Accelerate's hooks do
        forward = module.forward
        module.forward = lambda *args: calls.append(how) or forward(*args)
    layer(x, given)
    assert calls == [how]
    assert not remembers(layer, x, given)


def test_surroundings_are_part_of_the_setting():
    layer, x = layer_and_input()
    given = Routing(key=SPARSE.key, num_samples=2, keep_ratio=0.25)
    settle(layer, x, given)
    with torch.enable_grad():
        assert not remembers(layer, x, given)
        assert layer(x, given).y_BTD.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert not remembers(layer, x, given)
        assert layer(x, given).y_BTD.dtype == torch.bfloat16
    with backend_of_the_environment("eager"):
        assert not remembers(layer, x, given)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert not remembers(layer, x, given)
    torch.set_num_threads(threads)
    assert remembers(layer, x, given)


def test_another_number_of_tokens_or_another_dial_is_another_setting():
    layer, x = layer_and_input()
    settle(layer, x)
    assert not remembers(layer, x.expand(1, 2, -1))
    assert not remembers(layer, x, routing(1, num_samples=3, keep_ratio=0.25, backend="sparse"))
    assert not remembers(layer, x, routing(1, num_samples=2, keep_ratio=0.25, backend="fused"))


def test_copies_begin_without_memory_and_settings_do_not_pile_up():
    layer, x = layer_and_input()
    settle(layer, x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert not other._calls._calls
        assert same(other(x, SPARSE), layer(x, SPARSE))
    for i in range(2 * _REMEMBERED):
        settle(layer, x, routing(1, keep_ratio=(i + 1) / (2 * _REMEMBERED), backend="sparse"))
    assert len(layer._calls._calls) <= _REMEMBERED


def test_weights_without_a_version_are_not_remembered():
    with torch.inference_mode():
        layer, x = layer_and_input()
        for _ in range(3):
            layer(x, SPARSE)
        assert not remembers(layer, x)
