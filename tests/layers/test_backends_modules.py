"""Maps that change, are wrapped, hooked or copied: the backends' answers follow them."""

import copy
import pickle

import pytest
import torch
from backend_helpers import backend_layer, close, gradients, inputs, run
from kernel_helpers import NEEDS_KERNELS

from infmoe.errors import InfMoEError


@NEEDS_KERNELS
@torch.no_grad()
def test_copies_made_after_a_sparse_call_are_independent():
    layer = backend_layer()
    x, keys = inputs(layer), list(layer.state_dict())
    expected = run(layer, x, "sparse").y_BTD
    assert list(layer.state_dict()) == keys
    w2 = layer.w2.weight.numel() * 4
    assert len(pickle.dumps(layer)) < len(pickle.dumps(backend_layer())) + w2 / 2  # no copy of W2 travels along
    copied, unpickled, loaded = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), backend_layer("relu")
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


@NEEDS_KERNELS
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("tokens", [1, 15])  # in one operator, and step by step
@torch.no_grad()
def test_weights_may_change_between_sparse_calls(change, tokens):
    layer = backend_layer()
    x = inputs(layer, 1, tokens)
    for _ in range(2):  # the second call is remembered
        run(layer, x, "sparse")
    layer.w2.weight.grad = torch.ones_like(layer.w2.weight)
    layer.mul_by_two = lambda: layer.w2.weight.mul_(2) is None or layer
    CHANGES[change](layer)
    x = x.to(layer.w1.weight.dtype)
    close(run(layer, x, "sparse").y_BTD, run(layer, x, "eager").y_BTD, x.dtype)
    close(run(layer, x, None).y_BTD, run(layer, x, "eager").y_BTD, x.dtype)


@NEEDS_KERNELS
@pytest.mark.parametrize("targets", [["w1"], ["w2"], ["w_z"], ["w1", "w2", "w3", "w_z"]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maps_under_lora_run_and_the_sparse_path_says_why_it_does_not(targets, dtype):
    peft = pytest.importorskip("peft")
    layer = backend_layer("swiglu", dtype)
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


@NEEDS_KERNELS
@torch.no_grad()
def test_lora_merged_after_a_sparse_call_is_in_the_next_one():
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(backend_layer())
    x = inputs(model[0])
    run(model[0], x, "sparse")
    config = peft.LoraConfig(r=2, target_modules=["w1", "w2"], init_lora_weights=False)
    model = peft.get_peft_model(model, config).merge_and_unload()
    close(run(model[0], x, "sparse").y_BTD, run(model[0], x, "eager").y_BTD)


@NEEDS_KERNELS
@pytest.mark.parametrize("name", ["w1", "w2", "w3"])
@pytest.mark.parametrize("grad", [True, False])
def test_hooks_on_the_maps_are_called_whatever_the_backend(name, grad):
    layer = backend_layer("swiglu")
    x, calls = inputs(layer), []
    layer.get_submodule(name).register_forward_hook(lambda *args: calls.append(name))
    for backend in ("eager", "fused", None):
        with torch.set_grad_enabled(grad):
            run(layer, x, backend, "swiglu")
        assert calls == [name], backend
        calls.clear()


@NEEDS_KERNELS
@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
@pytest.mark.parametrize("name", ["w1", "w2"])
def test_backward_hooks_on_the_maps_are_called_too(name, kind):
    layer = backend_layer().train()
    calls = []
    getattr(layer.get_submodule(name), kind)(lambda *args: calls.append(name))
    for backend in ("eager", "fused"):
        gradients(layer, inputs(layer), backend)
        assert calls == [name], backend
        calls.clear()


@NEEDS_KERNELS
@pytest.mark.parametrize("name", ["router", "router.mu", "router.sigma", "w_z", "w1", "w2"])
@torch.no_grad()
def test_modules_that_do_more_than_their_class_says_are_called_for_a_few_tokens_too(name):
    layer = backend_layer()
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
