"""The dense variant is GPT-2: its weights give GPT-2's logits."""

import pytest
import torch
from helpers import tokens
from transformers import GPT2Config, GPT2LMHeadModel

from infmoe.errors import InfMoEError
from infmoe.hf import InfMoEForCausalLM


def gpt2(**options):
    defaults = {
        "vocab_size": 61,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 32,
        "initializer_range": 0.2,
    }
    model = GPT2LMHeadModel(GPT2Config(**(defaults | options))).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_()
    return model


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "options", [{}, {"n_inner": 80, "activation_function": "relu"}, {"tie_word_embeddings": False}], ids=str
)
def test_logits_equal_gpt2s(attn, options):
    source = gpt2(**options)
    model = InfMoEForCausalLM.from_gpt2(source).eval()
    for each in (source, model):
        each.set_attn_implementation(attn)
    ids = tokens(3, 12)
    mask = torch.ones(3, 12, dtype=torch.int64)
    mask[1, 7:] = 0
    mask[2, 1:3] = 0
    for given in ({}, {"attention_mask": mask}):
        # GPT-2 counts positions over padding too, so they are given here
        positions = torch.arange(12).expand(3, 12)
        expected = source(ids, position_ids=positions, **given).logits
        logits = model(ids, position_ids=positions, **given).logits
        seen = mask.bool() if given else torch.ones_like(mask).bool()
        torch.testing.assert_close(logits[seen], expected[seen], rtol=1e-5, atol=1e-5)
    assert torch.equal(
        model.generate(ids, do_sample=False, max_new_tokens=5),
        source.generate(ids, do_sample=False, max_new_tokens=5),
    )


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_gradients_equal_gpt2s(attn):
    source = gpt2(resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0).train()
    model = InfMoEForCausalLM.from_gpt2(source).train()
    ids = tokens(2, 9)
    for each in (source, model):
        each.set_attn_implementation(attn)
        each(ids, labels=ids).loss.backward()
    torch.testing.assert_close(
        model.transformer.wte.weight.grad, source.transformer.wte.weight.grad, rtol=1e-4, atol=1e-5
    )
    ours, theirs = model.transformer.h[0].mlp.w1.weight.grad, source.transformer.h[0].mlp.c_fc.weight.grad.T
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_converted_model_saves_and_loads(tmp_path):
    model = InfMoEForCausalLM.from_gpt2(gpt2()).eval()
    model.save_pretrained(tmp_path)
    ids = tokens(2, 9)
    assert torch.equal(InfMoEForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    "option",
    [{"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}, {"add_cross_attention": True}],
)
def test_what_the_backbone_lacks_is_refused(option):
    with pytest.raises(InfMoEError, match="attention"):
        InfMoEForCausalLM.from_gpt2(gpt2(**option))


def test_an_activation_that_the_layers_lack_is_refused():
    with pytest.raises(InfMoEError, match="hidden_act"):
        InfMoEForCausalLM.from_gpt2(gpt2(activation_function="tanh"))
