"""Generation: the dials reach every step, and neither cache nor batch changes a result."""

import pytest
import torch
from helpers import key, record_selections, replay_selections, tiny_model, tokens
from transformers import GenerationConfig, StaticCache

from infmoe.errors import InfMoEError
from infmoe.hf import InfMoEForCausalLM
from infmoe.layers import NoiseKey, PerLayer, Routing

EACH = pytest.mark.parametrize("ffn", ["dense", "switch", "moe", "infinity"])
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
GREEDY = {"do_sample": False, "max_new_tokens": 8}


def greedy_by_hand(model, ids, num_new=8, **dials):
    """The argmax of a full forward, again and again, without a cache."""
    for _ in range(num_new):
        ids = torch.cat([ids, model(ids, **dials).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@EACH
def test_greedy_generation_is_the_loop_over_full_forwards(ffn):
    model, ids = tiny_model(ffn), tokens(2, 5)
    assert torch.equal(model.generate(ids, **GREEDY), greedy_by_hand(model, ids))


@pytest.mark.parametrize(
    "dials",
    [
        {"num_samples": 1},
        {"num_samples": 8, "keep_ratio": 0.5},
        {"keep_ratio": 0.1},
        {"routing_mode": "mu"},
        {"routing_mode": "antithetic", "num_samples": 2},
        {"num_samples": (1, 4), "keep_ratio": (0.5, 0.1)},
        {"num_samples": PerLayer([1, 3])},
        {"routing": Routing(num_samples=3, key=NoiseKey(seed=5, stream=torch.tensor([8, 9])))},
    ],
    ids=str,
)
def test_dials_reach_every_step(dials):
    model, ids = tiny_model(), tokens(2, 5)
    assert torch.equal(model.generate(ids, **GREEDY, **dials), greedy_by_hand(model, ids, **dials))


def test_the_number_of_experts_is_a_dial_of_the_mixture():
    model, ids = tiny_model("moe"), tokens(2, 5)
    generated = model.generate(ids, **GREEDY, num_experts_per_tok=1)
    assert torch.equal(generated, greedy_by_hand(model, ids, num_experts_per_tok=1))


@pytest.mark.parametrize("typo", ["num_sample", "keepratio"])
def test_a_mistyped_dial_raises(typo):
    with pytest.raises(ValueError, match=typo):
        tiny_model().generate(tokens(1, 3), **GREEDY, **{typo: 2})


@pytest.mark.parametrize("of_the_model", [True, False])
def test_a_dial_in_a_generation_config_is_refused(of_the_model):
    model, ids = tiny_model(), tokens(1, 3)
    config = GenerationConfig(num_samples=4)
    given = {} if of_the_model else {"generation_config": config}
    if of_the_model:
        model.generation_config = config
    with pytest.raises(InfMoEError, match="a generation config has no 'num_samples'"):
        model.generate(ids, num_samples=2, **given)


def test_a_dial_that_the_variant_lacks_raises():
    with pytest.raises(InfMoEError, match="num_samples"):
        tiny_model("dense").generate(tokens(1, 3), **GREEDY, num_samples=2)


@EACH
@pytest.mark.parametrize("chunks", [[5, 1, 1, 1, 1], [1] * 9, [4, 5]], ids=str)
def test_cached_decoding_equals_the_full_forward(ffn, chunks):
    model, ids, noise_key = tiny_model(ffn), tokens(2, 9), key(2)
    with record_selections() as recorded:
        whole = model(ids, routing=Routing(key=noise_key)).logits
    starts = [sum(chunks[:i]) for i in range(len(chunks))]

    def pick(call):
        step, layer = divmod(call, 2)
        return recorded[layer][:, starts[step] : starts[step] + chunks[step]]

    cache, parts = None, []
    with replay_selections(recorded, pick) as flips:
        for start, length in zip(starts, chunks, strict=True):
            out = model(
                ids[:, start : start + length],
                past_key_values=cache,
                use_cache=True,
                routing=Routing(key=noise_key),
            )
            cache = out.past_key_values
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **CLOSE)
    if ffn == "infinity":
        flips.check()


def left_padded(ids, lengths):
    padded, mask = ids.clone(), torch.ones_like(ids)
    for b, n in enumerate(lengths):
        mask[b, : ids.shape[1] - n] = 0
    padded[mask == 0] = 0
    return padded, mask


@EACH
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_left_padded_batch_generates_what_each_prompt_does_alone(ffn, use_cache):
    model, ids, lengths = tiny_model(ffn, pad_token_id=0), tokens(3, 9), (4, 9, 6)
    padded, mask = left_padded(ids, lengths)
    together = model.generate(padded, attention_mask=mask, use_cache=use_cache, **GREEDY)
    for b, n in enumerate(lengths):
        prompt = ids[b : b + 1, 9 - n :]
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **GREEDY)
        assert torch.equal(together[b, 9:], alone[0, n:])


def test_rows_with_their_own_dials_generate_what_each_does_alone():
    model, ids, lengths = tiny_model(pad_token_id=0), tokens(4, 7), (7, 3, 5, 7)
    samples, ratios = (1, 8, 2, 3), (0.25, 0.1, 1.0, 0.5)
    padded, mask = left_padded(ids, lengths)
    together = model.generate(padded, attention_mask=mask, num_samples=samples, keep_ratio=ratios, **GREEDY)
    for b, n in enumerate(lengths):
        prompt = ids[b : b + 1, 7 - n :]
        dials = {"num_samples": samples[b], "keep_ratio": ratios[b]}
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **dials, **GREEDY)
        assert torch.equal(together[b, 7:], alone[0, n:])


def test_rows_with_their_own_number_of_experts_generate_what_each_does_alone():
    model, ids, lengths = tiny_model("moe", pad_token_id=0), tokens(4, 7), (7, 3, 5, 7)
    experts = (1, 4, 2, 1)
    padded, mask = left_padded(ids, lengths)
    together = model.generate(padded, attention_mask=mask, num_experts_per_tok=experts, **GREEDY)
    for b, n in enumerate(lengths):
        prompt = ids[b : b + 1, 7 - n :]
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), num_experts_per_tok=experts[b], **GREEDY)
        assert torch.equal(together[b, 7:], alone[0, n:])


@pytest.mark.parametrize("how", ["beams", "sequences"])
def test_per_row_dials_follow_the_rows_that_generation_repeats(how):
    model, ids = tiny_model(), tokens(2, 5)
    options = {
        "beams": {"num_beams": 3},
        "sequences": {"num_return_sequences": 3, "do_sample": True, "top_k": 1},
    }[how]
    options = GREEDY | options | {"return_dict_in_generate": True, "output_logits": True}
    samples, ratios = (1, 6), (0.5, 0.1)
    streams = torch.tensor([3, 4])
    given = {"num_samples": samples, "keep_ratio": ratios, "routing": Routing(key=NoiseKey(stream=streams))}
    together = model.generate(ids, **options, **given)
    each = together.sequences.shape[0] // 2
    for b in range(2):
        routing = Routing(key=NoiseKey(stream=streams[b : b + 1]))
        alone = model.generate(ids[b : b + 1], **options, num_samples=samples[b], keep_ratio=ratios[b], routing=routing)
        assert torch.equal(together.sequences[b * each : (b + 1) * each], alone.sequences)


def test_one_stream_serves_all_the_repeated_rows():
    model, ids = tiny_model(), tokens(2, 5)
    given = {"routing": Routing(key=NoiseKey(seed=3, stream=torch.tensor([9]))), "num_samples": (4,)}
    by_beams = model.generate(ids, num_beams=2, **GREEDY, **given)
    assert by_beams.shape == (2, 13)


def test_streams_belong_to_requests():
    model, ids = (
        tiny_model(num_samples=1, initial_sigma=2.0, initializer_range=0.5),
        tokens(1, 5).expand(2, 5),
    )
    options = GREEDY | {"max_new_tokens": 20}
    same = model.generate(ids, **options, routing=Routing(key=NoiseKey(stream=torch.tensor([6, 6]))))
    assert torch.equal(same[0], same[1])
    other = model.generate(ids, **options, routing=Routing(key=NoiseKey(stream=torch.tensor([6, 7]))))
    assert torch.equal(other[0], same[0])
    assert not torch.equal(other[1], same[1])


def target_and_draft(folder):
    """One checkpoint opened twice, and the keep ratios of the draft's calls."""
    model, ratios = tiny_model(), []
    model.save_pretrained(folder)
    draft = InfMoEForCausalLM.from_pretrained(folder, keep_ratio=1 / 16)

    def look(layer, args, out):
        ratios.append(float(out.stats.counts_U.mean() / out.stats.tokens) / layer.num_samples)

    draft.transformer.h[0].mlp.register_forward_hook(look)
    return model, draft, ratios


@pytest.mark.parametrize("routing", [None, Routing(key=NoiseKey(seed=5))], ids=["default", "key"])
def test_assisted_generation_drafts_at_the_assistants_own_dials(routing, tmp_path):
    (model, draft, ratios), ids = target_and_draft(tmp_path), tokens(1, 5)
    assisted = model.generate(ids, assistant_model=draft, routing=routing, **GREEDY)
    assert torch.equal(assisted, model.generate(ids, routing=routing, **GREEDY))
    assert ratios == pytest.approx([1 / 16] * len(ratios))
    assert ratios


@pytest.mark.parametrize(
    ("dials", "named"),
    [
        ({"keep_ratio": 0.5}, "keep_ratio"),
        ({"num_samples": 4, "routing_mode": "antithetic"}, "num_samples, routing_mode"),
        ({"routing": Routing(keep_ratio=0.5)}, "keep_ratio"),
        ({"max_loss_increase": 0.1}, "max_loss_increase"),
    ],
)
def test_dials_beside_an_assistant_are_refused(dials, named, tmp_path):
    model, draft, ratios = target_and_draft(tmp_path)
    with pytest.raises(InfMoEError, match=rf"leave {named} out, and open each .* from_pretrained\(DIR, keep_ratio="):
        model.generate(tokens(1, 5), assistant_model=draft, **GREEDY, **dials)
    assert not ratios


ONCE_MORE = [{"guidance_scale": 1.5}, {"token_healing": True}]


@pytest.mark.parametrize("how", ONCE_MORE, ids=str)
@pytest.mark.parametrize(
    ("dials", "named"),
    [
        ({"keep_ratio": 0.02}, "keep_ratio"),
        ({"keep_ratio": (0.5, 0.1), "routing_mode": "mu"}, "keep_ratio, routing_mode"),
        ({"routing": Routing(num_samples=PerLayer([1, 2]))}, "num_samples"),
        ({"routing": Routing(key=NoiseKey(seed=5))}, "routing"),
        ({"max_loss_increase": 0.1}, "max_loss_increase"),
        ({"latency_budget_ms": 5.0}, "latency_budget_ms"),
    ],
    ids=str,
)
def test_dials_are_refused_where_some_passes_would_run_without_them(how, dials, named):
    model, ids = tiny_model(), tokens(2, 5)
    (name,) = how
    words = rf"{name} runs the model once more at its own dials: leave {name} out, or leave {named} out and open"
    with pytest.raises(InfMoEError, match=words):
        model.generate(ids, **GREEDY, **how, **dials)
    with pytest.raises(InfMoEError, match=words):
        model.generate(ids, GenerationConfig(**how), **dials)
    model.generation_config = GenerationConfig(**how)
    with pytest.raises(InfMoEError, match=words):
        model.generate(ids, **dials)


def test_guidance_at_the_models_own_dials_and_dials_without_guidance_stay():
    model, ids = tiny_model(), tokens(2, 5)
    assert model.generate(ids, guidance_scale=1.5, **GREEDY).shape == (2, 13)
    plain = model.generate(ids, keep_ratio=0.1, **GREEDY)
    model.generation_config.guidance_scale = 1.5
    given = {"guidance_scale": 1, "token_healing": False}
    assert torch.equal(model.generate(ids, keep_ratio=0.1, **given, **GREEDY), plain)


@pytest.mark.parametrize("of_the_model", [True, False])
def test_an_early_exit_is_refused_and_leaves_the_model_as_it_was(of_the_model):
    model, ids = tiny_model(), tokens(1, 5)
    expected = model.generate(ids, **GREEDY)
    given = {} if of_the_model else {"assistant_early_exit": 1}
    if of_the_model:
        model.generation_config.assistant_early_exit = 1
    with pytest.raises(InfMoEError, match="no early exit: leave assistant_early_exit out"):
        model.generate(ids, **GREEDY, **given)
    model.generation_config.assistant_early_exit = None
    assert model.config.num_hidden_layers == 2
    assert torch.equal(model.generate(ids, **GREEDY), expected)


@EACH
def test_a_static_cache_generates_the_same(ffn):
    model, ids = tiny_model(ffn), tokens(2, 5)
    cache = StaticCache(config=model.config, max_cache_len=16)
    out = model(ids, past_key_values=cache, use_cache=True)
    torch.testing.assert_close(out.logits, model(ids).logits, **CLOSE)
    following = tokens(2, 1, seed=1)
    out = model(following, past_key_values=cache, position_ids=torch.full((2, 1), 5), use_cache=True)
    torch.testing.assert_close(out.logits, model(torch.cat([ids, following], 1)).logits[:, -1:], **CLOSE)


@EACH
def test_bfloat16_generates(ffn):
    model = tiny_model(ffn).to(torch.bfloat16)
    generated = model.generate(tokens(2, 5), use_cache=True, **GREEDY)
    assert generated.shape == (2, 13)
    assert torch.equal(generated[:, :5], tokens(2, 5))


def test_generation_repeats_itself_and_draws_no_global_state():
    model, ids = tiny_model(), tokens(2, 5)
    state = torch.get_rng_state()
    assert torch.equal(model.generate(ids, **GREEDY), model.generate(ids, **GREEDY))
    assert torch.equal(torch.get_rng_state(), state)
