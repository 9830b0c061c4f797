"""`torch.compile(fullgraph=True)`: every variant, in evaluation and in training."""

import shutil

import pytest
import torch
from helpers import key, make_layer, tiny_model, tokens
from transformers import StaticCache

from infmoe.layers import Routing

HAS_COMPILER = any(shutil.which(name) for name in ("g++", "clang++", "c++"))
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def dials_of(ffn):
    return {"infinity": {"num_samples": 3, "keep_ratio": 0.5}, "moe": {"num_experts_per_tok": 1}}.get(ffn, {})


def evaluate(ffn, backend):
    model, ids = tiny_model(ffn), tokens(2, 9)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, **dials_of(ffn)).logits, model(ids, **dials_of(ffn)).logits, **CLOSE)


def train(ffn, backend, with_key=True):
    model, ids = tiny_model(ffn).train(), tokens(2, 9)
    given = Routing(key=key(2)) if with_key else None
    gradients = []
    for call in (model, torch.compile(model, fullgraph=True, backend=backend)):
        torch.manual_seed(3)
        model.zero_grad()
        call(ids, labels=ids, routing=given).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, **CLOSE)


@pytest.mark.parametrize(
    "dials",
    [
        {"routing_mode": "antithetic", "num_samples": 3},
        {"routing_mode": "qmc", "num_samples": 3},
        {"score_cut": 0.3, "num_samples": 2},
        {"score_mass": 0.6, "min_sigma_to_mu": 0.5, "num_samples": 2},
    ],
    ids=str,
)
def test_every_way_to_draw_and_to_select(dials):
    model, ids = tiny_model(), tokens(2, 9)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, **dials).logits, model(ids, **dials).logits, **CLOSE)


@pytest.mark.parametrize("ffn", ["dense", "switch", "moe", "infinity"])
def test_evaluation(ffn):
    evaluate(ffn, "aot_eager")


@pytest.mark.parametrize("ffn", ["dense", "switch", "moe", "infinity"])
def test_training(ffn):
    train(ffn, "aot_eager")


def test_training_without_a_key():
    train("infinity", "aot_eager", with_key=False)


def test_decoding_with_a_static_cache():
    model, ids, following = tiny_model(), tokens(2, 5), tokens(2, 1, seed=1)
    expected = model(torch.cat([ids, following], dim=1)).logits[:, -1:]
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        logits = compiled(following, past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(logits, expected, **CLOSE)


@pytest.mark.skipif(not HAS_COMPILER, reason="inductor needs a C++ compiler")
def test_inductor_draws_the_same_noise_and_takes_the_same_gradients():
    """The layer alone, as inductor is slow; without a key, when the noise is made of constants only."""
    layer, x = make_layer("infinity"), torch.randn(2, 5, 16)
    compiled = torch.compile(layer, fullgraph=True, backend="inductor")
    expected, out = layer(x), compiled(x)
    torch.testing.assert_close(out.y_BTD, expected.y_BTD, **CLOSE)
    assert torch.equal(out.stats.counts_U, expected.stats.counts_U)
    gradients = []
    for result in (expected, out):
        layer.zero_grad()
        result.y_BTD.square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in layer.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, **CLOSE)
