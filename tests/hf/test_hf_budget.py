"""Dials chosen by a budget, from a profile."""

import logging
import re
import time

import pytest
import torch
from fake_profile import MORE, POINTS, written
from helpers import tiny_config, tiny_model, tokens
from transformers import GenerationConfig, StaticCache, StoppingCriteriaList

from infmoe.errors import InfMoEError
from infmoe.hf.budget import Profile, profile_name
from infmoe.layers import PerLayer, Routing
from infmoe.layers.point import Point

pytestmark = pytest.mark.usefixtures("on_a_cpu")


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def folder(model, tmp_path):
    return written(tmp_path, model)


@pytest.mark.parametrize(
    ("budget", "picked"),
    [(1.8, 3), (2.49, 3), (2.5, 2), (3.9, 2), (4.0, 1), (6.0, 0), (8.5, 0), (9.0, 4), (1e9, 4)],
)
def test_a_latency_budget_buys_the_lowest_loss_that_it_can(folder, budget, picked):
    choice = Profile.load(folder).choose(latency_budget_ms=budget)
    assert choice.point == POINTS[picked][0]
    assert f"{budget:g} ms" in choice.reason
    assert choice.point.label() in choice.reason
    assert f"{POINTS[picked][1]:.4f}" in choice.reason


@pytest.mark.parametrize(
    ("most", "picked"),
    [
        *((-0.01 + MORE, 4), (0.0, 0), (0.02, 0), (0.02 + MORE, 1), (0.05, 1), (0.05 + MORE, 2)),
        *((0.2, 2), (0.2 + MORE, 3), (9.0, 3)),
    ],
)
def test_a_loss_budget_buys_the_least_time(folder, most, picked):
    choice = Profile.load(folder).choose(max_loss_increase=most)
    assert choice.point == POINTS[picked][0]
    assert f"{POINTS[picked][3]:.2f} ms" in choice.reason


def test_a_budget_that_cannot_be_met_names_the_nearest(folder):
    profile = Profile.load(folder)
    with pytest.raises(InfMoEError, match=re.escape("nearest is mu keep=1/16 with 1.80 ms")):
        profile.choose(latency_budget_ms=1.79)
    with pytest.raises(InfMoEError, match=re.escape("nearest is K=8 keep=1/4 with -0.0067 at most")):
        profile.choose(max_loss_increase=-0.5)
    for wrong in ({}, {"latency_budget_ms": 1.0, "max_loss_increase": 1.0}):
        with pytest.raises(InfMoEError, match="either"):
            profile.choose(**wrong)
    for wrong in (0.0, -1.0, float("nan"), "5", True):
        with pytest.raises(InfMoEError, match="above 0"):
            profile.choose(latency_budget_ms=wrong)
    for wrong in ("1", float("nan")):
        with pytest.raises(InfMoEError, match="must be a number"):
            profile.choose(max_loss_increase=wrong)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"use_cache": False}, "leave use_cache=False out"),
        ({"guidance_scale": 1.5}, "leave guidance_scale out"),
        ({"num_beams": 2}, "leave num_beams out"),
        ({"generation_config": GenerationConfig(num_beams=2)}, "leave num_beams out"),
        ({"cache_implementation": "static"}, "leave cache_implementation out"),
        ({"past_key_values": StaticCache(tiny_config(), max_cache_len=16)}, "leave past_key_values out"),
        ({"assistant_early_exit": 1}, "leave assistant_early_exit out"),
        ({"generation_config": GenerationConfig(prompt_lookup_num_tokens=3)}, "leave prompt_lookup_num_tokens out"),
        ({"routing": Routing(backend="eager")}, "leave routing.backend out"),
        ({"cache_implementation": "paged"}, "paged generation passes no dials on"),
    ],
)
def test_a_latency_is_refused_where_it_does_not_hold(model, folder, given, words):
    with pytest.raises(InfMoEError, match=re.escape(words)):
        model.generate(tokens(1, 5), max_new_tokens=2, latency_budget_ms=2.6, profile=folder, **given)


def test_whether_a_budget_was_met_is_noted_and_a_miss_is_said(model, folder, caplog):
    asked = {"profile": folder, "min_new_tokens": 20, "max_new_tokens": 20, "pad_token_id": 0}
    seen = []
    for slow, budget in ((0.0, 1e5), (0.02, 5.0)):  # seconds a step; the profile says that a token takes 4 ms

        def criterion(input_ids, scores, slow=slow, **kwargs):
            seen.append(input_ids.shape[1])
            time.sleep(slow)
            return torch.zeros(len(input_ids), dtype=torch.bool)

        caplog.clear()
        criteria = StoppingCriteriaList([criterion])
        model.generate(tokens(1, 4), stopping_criteria=criteria, latency_budget_ms=budget, **asked)
        assert len(model.picked.token_ms) == 19
        assert model.picked.met == (slow == 0)
        assert min(model.picked.token_ms) > 1e3 * slow
        missed = "0% of 19 tokens met the budget of 5 ms: the machine is busier or slower"
        assert (missed in caplog.text) == (slow > 0)
    assert seen == 2 * list(range(5, 25))  # the caller's own criterion is asked too
    model.generate(tokens(1, 4), None, None, criteria, latency_budget_ms=5.0, **asked)
    assert (model.picked.met, len(seen)) == (0.0, 60)
    model.generate(tokens(1, 4), max_new_tokens=1, latency_budget_ms=5.0, profile=folder)
    assert (model.picked.token_ms, model.picked.met) == ((), None)


@pytest.mark.parametrize("how", ["whole", "part", "forward"])
def test_a_compiled_model_has_no_profile(folder, how):
    compiled = tiny_model()
    if how == "forward":
        compiled.forward = torch.compile(compiled.forward)
    else:
        (compiled if how == "whole" else compiled.transformer).compile()
    with pytest.raises(InfMoEError, match="that is not compiled"):
        compiled.generate(tokens(1, 5), max_new_tokens=2, latency_budget_ms=5.0, profile=folder)


@pytest.mark.parametrize(
    "given",
    [
        {"num_samples": 1},
        {"routing_mode": "mu"},
        {"latency_budget_ms": 5.0},
        {"profile": "x"},
        {"max_loss_increase": 0},
    ],
)
def test_dials_do_not_get_lost_in_continuous_batching(model, given):
    with pytest.raises(InfMoEError, match=f"passes no dials on: leave {next(iter(given))} out, and open the model at"):
        model.generate_batch([[1, 2, 3]], max_new_tokens=2, **given)
    with pytest.raises(InfMoEError, match="passes no dials on: leave num_samples out"):
        model.generate_batch([[1, 2, 3]], routing=Routing(num_samples=1))


def test_dials_in_the_config_of_continuous_batching_are_refused(model):
    config = GenerationConfig(max_new_tokens=2)
    config.keep_ratio = 0.5
    with pytest.raises(InfMoEError, match="a generation config has no 'keep_ratio'"):
        model.generate_batch([[1, 2, 3]], config)
    with pytest.raises(InfMoEError, match="a generation config has no 'keep_ratio'"):
        model.init_continuous_batching(generation_config=config)


def test_dials_do_not_get_lost_in_paged_generation(model):
    with pytest.raises(InfMoEError, match="paged generation passes no dials on"):
        model.generate(tokens(1, 5), max_new_tokens=2, num_samples=1, cache_implementation="paged")


@pytest.mark.parametrize("ffn", ["dense", "switch"])
def test_a_model_without_dials_takes_no_budget(ffn, tmp_path):
    model = tiny_model(ffn=ffn)
    with pytest.raises(InfMoEError, match=f"ffn='{ffn}' has none"):
        model.generate(tokens(1, 5), max_new_tokens=2, max_loss_increase=0.1, profile=tmp_path)


@pytest.mark.parametrize(
    ("key", "words"),
    [("latency_budget_ms", "argument of `generate`"), ("backend", "Routing(backend"), ("rank_damping", "the config")],
)
def test_a_forward_pass_says_where_what_is_not_its_own_belongs(model, key, words):
    with pytest.raises(InfMoEError, match=re.escape(words)):
        model(tokens(1, 5), **{key: 1.0})


def test_generate_runs_what_was_picked_and_says_so(model, folder, caplog):
    ids = tokens(1, 5)
    with caplog.at_level(logging.WARNING, logger="infmoe"):
        found = model.generate(ids, max_new_tokens=6, do_sample=False, latency_budget_ms=2.6, profile=folder)
    assert model.picked.point == Point(1, (0.25, 0.125))
    assert model.picked.reason in caplog.text
    dials = {"num_samples": 1, "keep_ratio": PerLayer([0.25, 0.125])}
    assert torch.equal(found, model.generate(ids, max_new_tokens=6, do_sample=False, **dials))
    assert model.picked is None  # of the last call
    quick = model.generate(ids, max_new_tokens=6, do_sample=False, max_loss_increase=0.3, profile=str(folder))
    mu = model.generate(ids, max_new_tokens=6, do_sample=False, routing_mode="mu", keep_ratio=0.0625)
    assert torch.equal(quick, mu)


def test_the_profile_lies_beside_the_checkpoint(folder, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    loaded = type(tiny_model()).from_pretrained(tmp_path).eval()
    loaded.generate(tokens(1, 4), max_new_tokens=2, do_sample=False, latency_budget_ms=5.5)
    assert loaded.picked.point == Point(2, 0.25)
    command = "`infmoe frontier DIR --data DATA --dtype float32`"
    with pytest.raises(InfMoEError, match=f"make it with {command}, and pass profile=DIR"):
        tiny_model().generate(tokens(1, 4), max_new_tokens=2, latency_budget_ms=5.5)
    checkpoint = tmp_path / "checkpoints" / "step-000001"
    tiny_model().save_pretrained(checkpoint)
    of_a_run = type(tiny_model()).from_pretrained(checkpoint).eval()
    of_a_run.generate(tokens(1, 4), max_new_tokens=2, do_sample=False, latency_budget_ms=5.5)
    assert of_a_run.picked.point == Point(2, 0.25)


@pytest.mark.parametrize(
    "given",
    [{"num_samples": 1}, {"routing_mode": "mu"}, {"routing": Routing(keep_ratio=0.5)}, {"score_cut": 0.5}],
    ids=str,
)
def test_a_budget_beside_dials_is_refused(model, folder, given):
    with pytest.raises(InfMoEError, match=r"leave .* out"):
        model.generate(tokens(1, 4), max_new_tokens=2, latency_budget_ms=5.0, profile=folder, **given)
    with pytest.raises(InfMoEError, match="alone chooses nothing"):
        model.generate(tokens(1, 4), max_new_tokens=2, profile=folder)


@pytest.mark.parametrize(
    "call",
    [
        {"input_ids": tokens(2, 4)},
        {"inputs": None, "input_ids": tokens(2, 4)},
        {"inputs_embeds": torch.zeros(2, 4, 32)},
        {"input_ids": tokens(1, 4), "num_return_sequences": 2, "do_sample": True},
        {
            "input_ids": tokens(1, 4),
            "generation_config": GenerationConfig(num_return_sequences=2, do_sample=True),
        },
    ],
    ids=str,
)
def test_a_latency_of_other_batches_is_refused(model, folder, call):
    command = f"`infmoe frontier DIR --data DATA --rows 2 --dtype float32 --out {folder}`"
    with pytest.raises(InfMoEError, match=re.escape(f"not 2: measure that with {command}")):
        model.generate(**call, max_new_tokens=2, latency_budget_ms=5.0, profile=folder / profile_name(1))
    model.generate(**call, max_new_tokens=2, max_loss_increase=0.0, profile=folder)
    with pytest.raises(InfMoEError, match=r"no profile at .*frontier-rows2.json"):
        model.generate(**call, max_new_tokens=2, latency_budget_ms=5.0, profile=folder)
    written(folder, model, num_rows=2)
    model.generate(**call, max_new_tokens=2, latency_budget_ms=5.0, profile=folder)
    assert model.picked.point == Point(2, 0.25)


@pytest.mark.parametrize("budget", [{"latency_budget_ms": 1e5}, {"max_loss_increase": 0.05}], ids=str)
def test_what_was_picked_stays_though_a_callback_generates_too(model, folder, budget):
    def criterion(input_ids, scores, **kwargs):
        model.generate(input_ids, max_new_tokens=1)
        return torch.zeros(len(input_ids), dtype=torch.bool)

    model.generate(tokens(1, 4), max_new_tokens=3, profile=folder, stopping_criteria=[criterion], **budget)
    assert model.picked.point in [point for point, *_ in POINTS]
    assert len(model.picked.token_ms) == (2 if "latency_budget_ms" in budget else 0)


@pytest.mark.parametrize("budget", [{"latency_budget_ms": 5.0}, {"max_loss_increase": 0.1}], ids=str)
def test_a_budget_is_for_a_model_in_eval_mode(model, folder, budget):
    with pytest.raises(InfMoEError, match=re.escape("this one is in train mode: call model.eval() first")):
        model.train().generate(tokens(1, 4), max_new_tokens=2, profile=folder, **budget)
    model.eval().generate(tokens(1, 4), max_new_tokens=2, profile=folder, **budget)


def test_a_latency_is_for_plain_generation(model, folder):
    with pytest.raises(InfMoEError, match="leave assistant_model out"):
        model.generate(tokens(1, 4), latency_budget_ms=5.0, profile=folder, assistant_model=tiny_model())
