"""`InfMoEConfig`: what it fills in, refuses, saves and loads."""

import json

import pytest
import torch
from helpers import VARIANTS, tiny_config, tiny_model
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig

from infmoe.errors import InfMoEError
from infmoe.hf import InfMoEConfig, InfMoEForCausalLM
from infmoe.layers import FFN_CLASSES


@pytest.mark.parametrize("ffn", VARIANTS)
def test_a_variants_own_defaults_are_filled_in(ffn):
    config = InfMoEConfig(ffn=ffn)
    own = FFN_CLASSES[ffn].option_defaults()
    trained = {"trained_keep_ratio": "keep_ratio", "trained_experts_per_tok": "num_experts_per_tok"}  # what the dial is
    for name in own:
        assert getattr(config, name) == own[trained.get(name, name)], name
    foreign = set().union(*(c.option_defaults() for c in FFN_CLASSES.values()))
    for name in foreign - set(FFN_CLASSES[ffn].option_defaults()):
        assert getattr(config, name) is None, name


@pytest.mark.parametrize("ffn", VARIANTS)
def test_round_trip(ffn, tmp_path):
    config = tiny_config(ffn, hidden_act="swiglu")
    config.save_pretrained(tmp_path)
    assert InfMoEConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is InfMoEConfig
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()


@pytest.mark.parametrize(
    ("ffn", "dials", "trained"),
    [
        ("infinity", {"keep_ratio": [0.5, 0.125], "num_samples": (1, 3)}, "trained_keep_ratio"),
        ("moe", {"num_experts_per_tok": [4, 1]}, "trained_experts_per_tok"),
    ],
)
def test_a_dial_may_have_a_value_for_each_layer(ffn, dials, trained, tmp_path):
    config = tiny_config(ffn, **dials)
    config.save_pretrained(tmp_path)
    assert InfMoEConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    for name, values in dials.items():
        assert getattr(config, name) == tuple(values)
        assert [getattr(block.mlp, name) for block in tiny_model(ffn, **dials).transformer.h] == list(values)
    assert getattr(config, trained) == tuple(next(iter(dials.values())))


@pytest.mark.parametrize(
    ("ffn", "dial", "message"),
    [
        ("infinity", {"keep_ratio": [0.5]}, "keep_ratio has 1 values for 2 layers: give one number, or one for each"),
        ("infinity", {"num_samples": ()}, "num_samples has 0 values for 2 layers"),
        ("infinity", {"keep_ratio": [0.5, 2.0]}, "keep_ratio must lie in"),
        ("moe", {"num_experts_per_tok": [1, 5]}, "5 is more than the layer's 4 experts"),
        ("moe", {"keep_ratio": [0.5, 0.5]}, "ffn='moe' has no option 'keep_ratio'"),
    ],
)
def test_values_for_each_layer_are_checked(ffn, dial, message, tmp_path):
    with pytest.raises(InfMoEError, match=message):
        tiny_model(ffn, **dial)
    tiny_model(ffn).save_pretrained(tmp_path)
    with pytest.raises(InfMoEError, match=message):
        InfMoEForCausalLM.from_pretrained(tmp_path, **dial)


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("num_sample", "num_samples"), ("keepratio", "keep_ratio"), ("hidden_sizes", "hidden_size")],
)
def test_unknown_keys_are_refused_with_the_nearest_name(typo, meant, tmp_path):
    with pytest.raises(InfMoEError, match=f"unknown config key '{typo}'; did you mean '{meant}'"):
        InfMoEConfig(**{typo: 4})
    tiny_config().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {typo: 4}))
    for load in (InfMoEConfig.from_pretrained, AutoConfig.from_pretrained, InfMoEForCausalLM.from_pretrained):
        with pytest.raises(InfMoEError, match=f"did you mean '{meant}'"):
            load(tmp_path)


def test_an_unknown_keyword_of_from_pretrained_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises((InfMoEError, TypeError), match="num_sample"):
        InfMoEForCausalLM.from_pretrained(tmp_path, num_sample=4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_samples", 2.0),
        ("num_samples", "2"),
        ("keep_ratio", "0.25"),
        ("keep_ratio", [0.5, "0.25"]),
        ("num_samples", [1, True]),
        ("hidden_size", 32.0),
        ("wz_bias", "no"),
        ("ffn", 3),
        ("hidden_act", None),
    ],
)
def test_wrong_types_are_refused(name, value):
    with pytest.raises(StrictDataclassFieldValidationError, match=name):
        InfMoEConfig(**{name: value})
    config = InfMoEConfig()
    with pytest.raises(StrictDataclassFieldValidationError, match=name):
        setattr(config, name, value)


@pytest.mark.parametrize(
    ("ffn", "option"),
    [
        ("dense", {"num_samples": 2}),
        ("dense", {"num_experts": 4}),
        ("infinity", {"num_experts": 4}),
        ("moe", {"z_dim": 8}),
    ],
)
def test_options_of_another_variant_are_refused(ffn, option, tmp_path):
    (name,) = option
    with pytest.raises(InfMoEError, match=f"ffn='{ffn}' has no option '{name}'"):
        tiny_config(ffn, **option)
    tiny_model(ffn).save_pretrained(tmp_path)
    with pytest.raises(InfMoEError, match=f"has no option '{name}'"):
        InfMoEForCausalLM.from_pretrained(tmp_path, **option)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"ffn": "infinite"}, "did you mean 'infinity'"),
        ({"hidden_size": 30}, "num_attention_heads"),
        ({"keep_ratio": 2.0}, "keep_ratio"),
        ({"num_samples": 0}, "num_samples"),
        ({"hidden_act": "gelu_ne"}, "did you mean 'gelu_new'"),
    ],
)
def test_bad_values_are_refused_when_the_model_is_built_at_the_latest(options, named):
    with pytest.raises(InfMoEError, match=named):
        tiny_model(**options)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_attention_heads": 0},
        {"num_hidden_layers": 0},
        {"vocab_size": -1},
        {"attn_pdrop": 2},
        {"ffn": "moe", "top_k": 4},
        {"temperature": 0.5},
    ],
)
def test_values_that_make_no_model_are_refused(fields):
    with pytest.raises(InfMoEError, match=next(reversed(fields))):
        InfMoEConfig(**fields)


@pytest.mark.parametrize("name", ["mode", "keep_ration", "num_sample"])
def test_a_misnamed_dial_is_refused_by_the_model_itself(name):
    model = tiny_model("infinity")
    with pytest.raises(InfMoEError, match="did you mean"):
        model(torch.zeros(1, 4, dtype=torch.int64), **{name: 1})


@pytest.mark.parametrize("name", ["wz_lr_factor", "wz_weight_decay"])
@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_the_optimizers_factors_are_checked(name, value):
    with pytest.raises(InfMoEError, match=name):
        tiny_model("infinity", **{name: value})
