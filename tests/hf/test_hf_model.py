"""The model: saving and loading, initialization, masks, batches, dials, loss."""

import json

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from helpers import key, record_selections, replay_selections, tiny_config, tiny_model, tokens
from safetensors import safe_open
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModel, AutoModelForCausalLM

from infmoe.errors import InfMoEError
from infmoe.hf import InfMoEForCausalLM, InfMoEModel
from infmoe.layers import NoiseKey, PerLayer, Routing, RoutingStats

EACH = pytest.mark.parametrize("ffn", ["dense", "switch", "moe", "infinity"])
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@EACH
def test_save_and_load_give_equal_logits(ffn, tmp_path):
    model, ids = tiny_model(ffn), tokens(2, 9)
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["config.json", "generation_config.json", "model.safetensors"]  # no pickle, no code
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    assert "lm_head.weight" not in keys
    assert keys == set(model.state_dict()) - {"lm_head.weight"}
    for auto in (InfMoEForCausalLM, AutoModelForCausalLM):
        loaded, report = auto.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert type(loaded) is InfMoEForCausalLM
        assert loaded.lm_head.weight is loaded.transformer.wte.weight
        assert torch.equal(loaded(ids).logits, expected)
    backbone = AutoModel.from_pretrained(tmp_path)
    assert type(backbone) is InfMoEModel
    assert torch.equal(backbone(ids).last_hidden_state, model.transformer(ids).last_hidden_state)


def test_untied_embeddings_are_saved(tmp_path):
    model = tiny_model(tie_word_embeddings=False)
    assert model.lm_head.weight is not model.transformer.wte.weight
    model.save_pretrained(tmp_path)
    assert torch.equal(InfMoEForCausalLM.from_pretrained(tmp_path).lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("frozen", [True, False])
def test_what_the_config_freezes_is_frozen_after_loading_too(frozen, tmp_path):
    model = tiny_model(train_wz=not frozen, wz_bias=True)
    expected = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert len(expected) == (4 if frozen else 0)
    model.save_pretrained(tmp_path)

    class OfOnesOwn(InfMoEForCausalLM):
        pass

    for auto in (InfMoEForCausalLM, AutoModelForCausalLM, OfOnesOwn):
        loaded = auto.from_pretrained(tmp_path)
        assert {name for name, p in loaded.named_parameters() if not p.requires_grad} == expected
    backbone, _ = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert {f"transformer.{name}" for name, p in backbone.named_parameters() if not p.requires_grad} == expected


def test_dials_may_be_set_on_loading(tmp_path):
    model, ids = tiny_model(), tokens(2, 9)
    model.save_pretrained(tmp_path)
    loaded = InfMoEForCausalLM.from_pretrained(tmp_path, num_samples=5, keep_ratio=0.5, mask_scale="fixed")
    assert (loaded.config.num_samples, loaded.config.keep_ratio) == (5, 0.5)
    assert all(block.mlp.mask_scale == "fixed" for block in loaded.transformer.h)
    # the ratio that masks are scaled to is still the one of training
    at_once = InfMoEForCausalLM.from_pretrained(tmp_path, mask_scale="fixed")
    assert torch.equal(loaded(ids).logits, at_once(ids, num_samples=5, keep_ratio=0.5).logits)
    assert not torch.equal(loaded(ids).logits, model(ids, num_samples=5, keep_ratio=0.5).logits)


@pytest.mark.parametrize(
    ("ffn", "dials", "options"),
    [
        ("infinity", {"keep_ratio": 0.5}, {"mask_scale": "fixed"}),
        ("infinity", {"keep_ratio": 0.5}, {"mask_scale": "rms"}),
        ("moe", {"num_experts_per_tok": 4}, {"gate_norm": "trained"}),
        ("moe", {"num_experts_per_tok": 4}, {"rank_damping": 0.25}),
        ("moe", {"num_experts_per_tok": 4}, {"ideal_experts_per_tok": 3}),
    ],
)
def test_a_dial_set_for_good_gives_what_it_gives_in_a_call(ffn, dials, options, tmp_path):
    model, ids = tiny_model(ffn, **options), tokens(2, 9)
    expected = model(ids, **dials).logits
    assert not torch.equal(expected, model(ids).logits)
    folder = tmp_path / "0"
    model.save_pretrained(folder)
    for i in range(2):  # saved as opened, it is opened once more
        loaded = InfMoEForCausalLM.from_pretrained(folder, **dials)
        assert torch.equal(loaded(ids).logits, expected)
        folder = tmp_path / str(i + 1)
        loaded.save_pretrained(folder)
    own = InfMoEForCausalLM.from_pretrained(folder).config
    assert {name: getattr(own, name) for name in dials} == dials
    assert (own.trained_keep_ratio, own.trained_experts_per_tok) == (
        (None, 2) if ffn == "moe" else (model.config.keep_ratio, None)
    )


def test_a_config_of_before_there_were_trained_dials_takes_them_from_its_dials(tmp_path):
    tiny_model("moe").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    assert values.pop("trained_experts_per_tok") == 2
    path.write_text(json.dumps(values))
    config = InfMoEForCausalLM.from_pretrained(tmp_path, num_experts_per_tok=4).config
    assert (config.num_experts_per_tok, config.trained_experts_per_tok) == (4, 2)


@EACH
def test_initialization_covers_every_parameter(ffn):
    """A model from the meta device: nothing may stay uninitialized memory."""
    config = tiny_config(ffn)
    with torch.device("meta"):
        model = InfMoEForCausalLM(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    model.init_weights()
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_start_is_gpt2s():
    model = tiny_model(hidden_size=64, num_hidden_layers=8, initializer_range=0.02, intermediate_size=512)
    block = model.transformer.h[3]
    for weight, std in (
        (model.transformer.wte.weight, 0.02),
        (model.transformer.wpe.weight, 0.02),
        (block.attn.c_attn.weight, 0.02),
        (block.attn.c_proj.weight, 0.02 / 4),
        (block.mlp.w1.weight, 0.02),
        (block.mlp.w2.weight, 0.02 / 4),
        (block.mlp.router.mu.weight, 1 / 8),
    ):
        assert float(weight.detach().std()) == pytest.approx(std, rel=0.08)
    assert not block.attn.c_attn.bias.any()
    assert (block.ln_1.weight == 1).all()


@EACH
def test_batch_composition_changes_nothing(ffn):
    model, ids = tiny_model(ffn), tokens(4, 9)
    with record_selections() as recorded:
        together = model(ids, routing=Routing(key=key(4))).logits
    for b in range(4):
        alone = NoiseKey(seed=7, step=3, stream=key(4).stream[b : b + 1])
        with replay_selections(recorded, lambda call, b=b: recorded[call][b : b + 1]) as flips:
            logits = model(ids[b : b + 1], routing=Routing(key=alone)).logits
        torch.testing.assert_close(logits[0], together[b], **CLOSE)
        if ffn == "infinity":
            flips.check()


@EACH
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_padding_changes_nothing(ffn, side, attn):
    model, ids = tiny_model(ffn), tokens(2, 12)
    model.set_attn_implementation(attn)
    lengths = (7, 12)
    mask, padded = torch.zeros(2, 12, dtype=torch.int64), ids.clone()
    for b, n in enumerate(lengths):
        mask[b, 12 - n :] = 1 if side == "left" else 0
        if side == "right":
            mask[b, :n] = 1
    padded[mask == 0] = 5
    together = model(padded, attention_mask=mask).logits
    for b in range(2):
        alone = model(padded[b][mask[b] == 1][None]).logits[0]
        torch.testing.assert_close(together[b][mask[b] == 1], alone, **CLOSE)


@EACH
def test_attention_implementations_agree(ffn):
    model, ids = tiny_model(ffn), tokens(2, 9)
    with record_selections() as recorded:
        sdpa = model(ids).logits
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    with replay_selections(recorded) as flips:
        eager = model(ids, output_attentions=True)
    torch.testing.assert_close(eager.logits, sdpa, **CLOSE)
    if ffn == "infinity":
        flips.check()
    attention = eager.attentions[0]
    assert attention.shape == (2, 4, 9, 9)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 4, 9))
    assert not attention.triu(1).any()  # causal


@EACH
def test_the_future_changes_nothing(ffn):
    model, ids = tiny_model(ffn), tokens(2, 9)
    other = ids.clone()
    other[:, 6:] = (other[:, 6:] + 1) % 61
    torch.testing.assert_close(model(other).logits[:, :6], model(ids).logits[:, :6], **CLOSE)


def draws_of(model, ids, given):
    """The noise that each layer's router was given."""
    seen = []
    hooks = [
        block.mlp.router.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
        for block in model.transformer.h
    ]
    model(ids, routing=given)
    for hook in hooks:
        hook.remove()
    return seen


def test_equal_streams_draw_equal_noise_and_others_do_not():
    model, ids = tiny_model(), tokens(1, 9).expand(3, 9)
    for noise_BTKZ in draws_of(model, ids, Routing(key=NoiseKey(seed=1, stream=torch.tensor([4, 4, 5])))):
        assert torch.equal(noise_BTKZ[0], noise_BTKZ[1])
        assert not (noise_BTKZ[0] == noise_BTKZ[2]).any()
    first, second = draws_of(model, ids, Routing(key=NoiseKey(seed=1)))
    assert not (first == second).any()  # layers draw their own


def test_the_default_key_is_the_noise_seed_and_the_position():
    model, ids = tiny_model(noise_seed=9), tokens(2, 9)
    expected = model(ids, routing=Routing(key=NoiseKey(seed=9))).logits
    assert torch.equal(model(ids).logits, expected)
    assert not torch.equal(model(ids, routing=Routing(key=NoiseKey(seed=8))).logits, expected)
    shifted = Routing(key=NoiseKey(seed=9, position=torch.arange(9) + 1))
    assert not torch.equal(model(ids, routing=shifted).logits, expected)


def test_dials_by_name_equal_dials_in_routing_and_take_precedence():
    model, ids = tiny_model(), tokens(2, 9)
    expected = model(ids, routing=Routing(num_samples=4, keep_ratio=0.5)).logits
    assert torch.equal(model(ids, num_samples=4, keep_ratio=0.5).logits, expected)
    assert torch.equal(model(ids, routing=Routing(num_samples=1, keep_ratio=0.5), num_samples=4).logits, expected)
    by_mean = model(ids, routing=Routing(mode="mu")).logits
    assert torch.equal(model(ids, routing_mode="mu").logits, by_mean)
    assert not torch.equal(by_mean, expected)


@pytest.mark.parametrize("dial", ["num_samples", "keep_ratio"])
def test_rows_with_their_own_dials_equal_each_alone(dial):
    model, ids = tiny_model(), tokens(3, 9)
    values = (1, 4, 2) if dial == "num_samples" else (0.1, 1.0, 0.5)
    together = model(ids, **{dial: values}).logits
    for b, value in enumerate(values):
        torch.testing.assert_close(model(ids[b : b + 1], **{dial: value}).logits[0], together[b], **CLOSE)


@pytest.mark.parametrize(
    ("ffn", "values"),
    [("infinity", {"keep_ratio": (0.5, 0.125), "num_samples": (1, 3)}), ("moe", {"num_experts_per_tok": (4, 1)})],
)
def test_a_checkpoint_keeps_values_for_each_layer(ffn, values, tmp_path):
    model, ids = tiny_model(ffn), tokens(2, 9)
    dials = {name: PerLayer(each) for name, each in values.items()}
    expected, text = model(ids, **dials).logits, model.generate(ids, max_new_tokens=4, **dials)
    assert not torch.equal(expected, model(ids).logits)
    model.save_pretrained(tmp_path / "0")
    for i in range(2):  # saved as opened, it is opened once more
        opened = InfMoEForCausalLM.from_pretrained(tmp_path / str(i), **({} if i else values))
        assert torch.equal(opened(ids).logits, expected)
        assert torch.equal(opened.generate(ids, max_new_tokens=4), text)
        ones = dict.fromkeys(values, 1)
        assert torch.equal(opened(ids, **ones).logits, model(ids, **ones).logits)
        opened.save_pretrained(tmp_path / str(i + 1))


def test_per_layer_dials():
    model, ids = tiny_model(), tokens(2, 9)
    same = model(ids, num_samples=PerLayer([3, 3]), keep_ratio=PerLayer([0.5, 0.5])).logits
    assert torch.equal(same, model(ids, num_samples=3, keep_ratio=0.5).logits)
    assert not torch.equal(same, model(ids, num_samples=PerLayer([3, 1]), keep_ratio=0.5).logits)
    with pytest.raises(InfMoEError, match="3 per-layer values for 2 layers"):
        model(ids, num_samples=PerLayer([1, 2, 3]))


@pytest.mark.parametrize(
    ("ffn", "dial"),
    [("dense", {"num_samples": 2}), ("moe", {"keep_ratio": 0.5}), ("infinity", {"num_experts_per_tok": 1})],
)
def test_dials_that_the_variant_lacks_are_refused(ffn, dial):
    with pytest.raises(InfMoEError, match=next(iter(dial))):
        tiny_model(ffn)(tokens(1, 4), **dial)


OTHERWISE = {
    "infinity": {
        "keep_ratio": 0.125,
        "num_samples": 4,
        "routing_mode": "mu",
        "mask_scale": "rms",
        "trained_keep_ratio": 0.5,
        "selection": "statistical",
        "noise_seed": 7,
    },
    "moe": {
        "num_experts_per_tok": 1,
        "rank_damping": 0.25,
        "gate_norm": "all",
        "routed_scaling_factor": 2.0,
        "trained_experts_per_tok": 1,
        "ffn": "dense",
    },
    "switch": {"capacity_factor": 1.0},
    "dense": {"rank_damping": 0.25},  # of another variant
}


@pytest.mark.parametrize(
    ("ffn", "name", "value"),
    [(ffn, name, value) for ffn, options in OTHERWISE.items() for name, value in options.items()],
)
def test_an_option_changed_in_the_config_of_a_finished_model_is_refused_and_not_saved(ffn, name, value, tmp_path):
    model, ids = tiny_model(ffn), tokens(1, 4)
    built = getattr(model.config, name)
    setattr(model.config, name, value)
    words = f"config.{name} was set to {value!r} after .* built with {built!r}"
    for call in (model, model.generate):
        for prompt in (ids, ids[:, :1]):
            with pytest.raises(InfMoEError, match=words):
                call(prompt)
    for part in (model, model.transformer):
        with pytest.raises(InfMoEError, match=words):
            part.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    setattr(model.config, name, built)
    assert model(ids).logits.isfinite().all()
    model.save_pretrained(tmp_path)


def test_a_context_too_long_is_refused_by_name():
    model = tiny_model()
    with pytest.raises(InfMoEError, match="33 tokens do not fit the model's context of 32"):
        model(tokens(1, 33))
    cache = model(tokens(1, 32), use_cache=True).past_key_values
    with pytest.raises(InfMoEError, match="33 tokens"):
        model(tokens(1, 1), past_key_values=cache)
    # padding takes no positions
    mask = torch.ones(1, 40, dtype=torch.int64)
    mask[:, :10] = 0
    torch.testing.assert_close(
        model(tokens(1, 40), attention_mask=mask).logits[:, 10:], model(tokens(1, 40)[:, 10:]).logits, **CLOSE
    )


def test_inputs_are_ids_or_embeddings():
    model, ids = tiny_model(), tokens(2, 9)
    by_embeddings = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    assert torch.equal(by_embeddings, model(ids).logits)
    with pytest.raises(ValueError, match="exactly one"):
        model()
    with pytest.raises(ValueError, match="exactly one"):
        model(ids, inputs_embeds=by_embeddings)


@EACH
def test_outputs_hold_losses_and_statistics(ffn):
    model, ids = tiny_model(ffn), tokens(2, 9)
    out = model(ids, labels=ids, output_hidden_states=True)
    assert out.loss.shape == out.aux_loss.shape == ()
    assert (float(out.aux_loss.detach()) > 0) == (ffn in ("switch", "moe"))
    assert len(out.routing_stats) == 2
    assert all(isinstance(stats, RoutingStats) for stats in out.routing_stats)
    assert all(float(stats.tokens) == 18 for stats in out.routing_stats)
    assert len(out.hidden_states) == 3
    assert torch.equal(out.hidden_states[-1], model.transformer(ids).last_hidden_state)
    assert set(model.config.keys_to_ignore_at_inference) == {"past_key_values", "aux_loss", "routing_stats"}


@EACH
@pytest.mark.parametrize("training", [True, False])
def test_the_loss_is_the_shifted_cross_entropy_and_in_training_the_auxiliary_loss(ffn, training):
    model, ids = tiny_model(ffn).train(training), tokens(2, 9)
    labels = ids.clone()
    labels[0, 3:6] = -100
    out = model(ids, labels=labels)
    per_token = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    torch.testing.assert_close(out.loss, per_token / (16 - 3) + (out.aux_loss if training else 0.0))


@EACH
def test_num_items_in_batch_makes_micro_batches_add_up(ffn):
    model, ids = tiny_model(ffn).train(), tokens(2, 9)
    labels = ids.clone()
    labels[0, 3:6] = -100
    given = Routing(key=NoiseKey(seed=7))

    def loss(b, **items):
        return model(ids[b : b + 1], labels=labels[b : b + 1], routing=given, **items).loss

    expected = loss(0) * (13 - 8) / 13 + loss(1) * 8 / 13
    torch.testing.assert_close(sum(loss(b, num_items_in_batch=torch.tensor(13)) for b in range(2)), expected)


def test_losses_of_blocks_on_several_devices_meet_on_the_models():
    """A device map, as Accelerate carries it out; the second device is torch's stand-in, which computes no values."""
    with FakeTensorMode(), torch.no_grad():
        model = InfMoEForCausalLM(tiny_config("dense", attn_implementation="eager")).train()
        block = model.transformer.h[1]
        for module in block.modules():
            for name, p in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(torch.empty_like(p, device="cuda:1"), requires_grad=False))
        add_hook_to_module(block, AlignDevicesHook("cuda:1"))
        add_hook_to_module(model.transformer.ln_f, AlignDevicesHook("cpu"))
        ids = torch.zeros(2, 9, dtype=torch.int64)
        out = model(ids, labels=ids)
        assert [str(stats.tokens.device) for stats in out.routing_stats] == ["cpu", "cuda:1"]
        assert (str(out.aux_loss.device), str(out.loss.device)) == ("cpu", "cpu")


def test_logits_to_keep():
    model, ids = tiny_model(), tokens(2, 9)
    whole = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, whole[:, -2:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([1, 4])).logits, whole[:, [1, 4]])


@EACH
def test_a_call_leaves_the_model_as_it_was(ffn):
    model = tiny_model(ffn).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(tokens(2, 9), labels=tokens(2, 9)).loss.backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_bfloat16_weights(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    half = InfMoEForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    logits = half(tokens(2, 9)).logits
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
