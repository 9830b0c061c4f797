"""Dials chosen by a budget, from a profile."""

import json
import logging
import re

import pytest
import torch
from helpers import tiny_model, tokens

from infmoe.errors import InfMoEError
from infmoe.hf.budget import PROFILE, Profile, fingerprint, profile_values
from infmoe.layers import PerLayer, Routing
from infmoe.layers.point import Point

# dials, loss, increase, median ms, ms of 95 %
POINTS = [
    (Point(2, 0.25), 3.00, 0.00, 4.0, 5.0),
    (Point(1, 0.25), 3.02, 0.02, 3.0, 4.0),
    (Point(1, (0.25, 0.125)), 3.05, 0.05, 2.0, 2.5),
    (Point(None, 0.0625, mode="mu"), 3.20, 0.20, 1.5, 1.8),
    (Point(8, 0.25), 2.99, -0.01, 6.0, 9.0),
    (Point(4, 0.5), 3.01, 0.01, 7.0, 8.0),  # on nobody's frontier
]


def rows():
    return [
        {
            **{name: getattr(p, name) for name in ("num_samples", "keep_ratio", "num_experts_per_tok", "mode")},
            "loss": loss,
            "increase": increase,
            "token_ms": ms,
            "token_ms_p95": p95,
        }
        for p, loss, increase, ms, p95 in POINTS
    ]


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def folder(model, tmp_path):
    values = profile_values(model, rows(), num_rows=1, source="runs/mine")
    (tmp_path / PROFILE).write_text(json.dumps(values))
    return tmp_path


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
    ("most", "picked"), [(-0.01, 4), (0.0, 0), (0.02, 1), (0.049, 1), (0.05, 2), (0.2, 3), (9.0, 3)]
)
def test_a_loss_budget_buys_the_least_time(folder, most, picked):
    choice = Profile.load(folder).choose(max_loss_increase=most)
    assert choice.point == POINTS[picked][0]
    assert f"{POINTS[picked][3]:.2f} ms" in choice.reason


def test_a_budget_that_cannot_be_met_names_the_nearest(folder):
    profile = Profile.load(folder)
    with pytest.raises(InfMoEError, match=re.escape("nearest is mu keep=1/16 with 1.80 ms")):
        profile.choose(latency_budget_ms=1.79)
    with pytest.raises(InfMoEError, match=re.escape("nearest is K=8 keep=1/4 with -0.0100")):
        profile.choose(max_loss_increase=-0.5)
    for wrong in ({}, {"latency_budget_ms": 1.0, "max_loss_increase": 1.0}):
        with pytest.raises(InfMoEError, match="either"):
            profile.choose(**wrong)
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(InfMoEError, match="above 0"):
            profile.choose(latency_budget_ms=wrong)


def test_generate_runs_what_was_picked_and_says_so(model, folder, caplog):
    ids = tokens(1, 5)
    with caplog.at_level(logging.INFO, logger="infmoe"):
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
    with pytest.raises(InfMoEError, match="infmoe frontier DIR"):
        tiny_model().generate(tokens(1, 4), max_new_tokens=2, latency_budget_ms=5.5)


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


@pytest.mark.parametrize("more", [{}, {"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}])
def test_a_latency_of_other_batches_is_refused(model, folder, more):
    ids = tokens(1, 4) if more else tokens(2, 4)
    with pytest.raises(InfMoEError, match="--rows 2"):
        model.generate(ids, max_new_tokens=2, latency_budget_ms=5.0, profile=folder, **more)
    model.generate(ids, max_new_tokens=2, max_loss_increase=0.0, profile=folder, **more)


def test_other_weights_and_other_machines_are_refused(model, folder):
    profile = Profile.load(folder)
    profile.check(model)
    with torch.no_grad():
        model.transformer.h[1].mlp.w1.weight += 1e-3
    with pytest.raises(InfMoEError, match=r"other weights.*`infmoe frontier runs/mine`"):
        profile.check(model)
    values = json.loads((folder / PROFILE).read_text())
    values["machine"]["cpu"] = "Abacus"
    values["machine"]["threads"] = 77
    (folder / PROFILE).write_text(json.dumps(values))
    with pytest.raises(InfMoEError, match=r"another machine \(cpu Abacus there, .* threads 77 there"):
        Profile.load(folder).check(tiny_model())


def test_the_fingerprint_tells_dtypes_and_values_apart():
    assert fingerprint(tiny_model()) == fingerprint(tiny_model())
    assert fingerprint(tiny_model()) != fingerprint(tiny_model().bfloat16())
    assert fingerprint(tiny_model()) != fingerprint(tiny_model(num_hidden_layers=3))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "no profile at"),
        ("{", "no JSON"),
        ("[]", "no profile of this version"),
        ('{"version": 99}', "no profile of this version"),
        ('{"version": 1, "points": [{}]}', "damaged"),
        ('{"version": 1, "points": [], "checkpoint": "a", "machine": {}, "rows": 1, "model": "m"}', "no points"),
    ],
)
def test_damaged_profiles_are_one_line_with_the_command(tmp_path, content, named):
    if content is not None:
        (tmp_path / PROFILE).write_text(content)
    with pytest.raises(InfMoEError, match=named) as caught:
        Profile.load(tmp_path)
    assert f"infmoe frontier {tmp_path}" in str(caught.value)
    assert "\n" not in str(caught.value)
