"""Elastic experts on the page: ranges over k', and what they are held against."""

import dataclasses

import pytest
from fake_results import elastic_claims, fill

from infmoe.reproduce.page.elastic import elastic
from infmoe.reproduce.page.figures import Gallery
from infmoe.reproduce.plan import (
    ELASTIC_RULES,
)
from infmoe.reproduce.store import Store

LOSSES = {"infinity": 3.4, "moe": 3.6, "infinity-keep4": 3.5, "infinity-keep8": 3.5, "infinity-keep16": 3.5}


def verdict_of_emoe(store, mini, k, seeds=3, more=0.0, **ranges):
    """What the page says of runs whose loss is 3 within these ends of k′, and 4 beyond; Elastic MoE's is `more`."""
    arms = {
        4: ("emoe-k4-w0.0001-scaled", "moe16-fine-k4-scaled", "moe16-fine-k8-scaled"),
        8: ("emoe-k8-w0.0001-scaled", "moe16-fine-k8-scaled", "moe16-fine-k16-scaled"),
    }[k]
    fill(store, dict.fromkeys(arms, 3.5), mini.tokens, seeds=seeds)
    for arm, (low, high) in zip(arms, ranges.values(), strict=True):
        for run in store.runs(arm, mini.tokens):
            for row in run.values["measures"]["dials"]:
                row["loss"] = 3.0 if low <= row["num_experts_per_tok"] <= high else 4.0
                row["loss"] += more * arm.startswith("emoe")
            store.put(run.spec, run.values)
    (claim,) = elastic_claims(store, f"Elastic MoE (`{arms[0]}`), trained with k = {k}")
    return claim


@pytest.mark.parametrize(
    ("emoe", "plain", "direct", "verdict"),
    [
        ((2, 12), (3, 6), (6, 12), "holds"),
        ((2, 6), (3, 6), (6, 6), "does not hold"),  # less than twice k
        ((2, 12), (3, 6), (1, 12), "does not hold"),  # direct training is wider
        ((2, 12), (1, 12), (6, 6), "does not hold"),
    ],
)
def test_elastic_moe_is_held_against_plain_and_direct_training(store, mini, emoe, plain, direct, verdict):
    claim = verdict_of_emoe(store, mini, 4, emoe=emoe, plain=plain, direct=direct)
    assert claim.verdict == verdict
    for low, high in (emoe, plain, direct):
        assert f"{low} … {high}" in claim.measured


def test_a_wider_range_at_a_higher_loss_is_said(store, mini):
    claim = verdict_of_emoe(store, mini, 4, more=0.2, emoe=(2, 12), plain=(3, 6), direct=(6, 12))
    assert claim.verdict == "wider, and worse: its best is above the plain one's"
    assert "its best loss minus the plain one's: +0.200 ± 0.000 nats" in claim.measured


def test_a_loss_that_may_be_worse_is_not_called_a_gain(store, mini):
    claim = verdict_of_emoe(store, mini, 4, emoe=(2, 12), plain=(3, 6), direct=(6, 12))
    assert claim.verdict == "holds"
    for run in store.runs("emoe-k4-w0.0001-scaled", mini.tokens):
        for row in run.values["measures"]["dials"]:
            row["loss"] += 0.1 * (run.spec.seed == 2)
        store.put(run.spec, run.values)
    (claim,) = elastic_claims(store, "Elastic MoE (`emoe-k4-w0.0001-scaled`)")
    assert claim.verdict == "wider; whether worse is not decided"


def test_ranges_are_compared_by_the_seeds_that_all_have(store, mini):
    store.scale = dataclasses.replace(store.scale, side_seeds=3)
    ranges = {"emoe": (2, 12), "plain": (3, 6), "direct": (6, 12)}
    verdict_of_emoe(store, mini, 4, **ranges)
    # the third seed of Elastic MoE ends early, and has no plain one beside it
    store.path(store.runs("moe16-fine-k4-scaled", mini.tokens)[2].spec).unlink()
    run = store.runs("emoe-k4-w0.0001-scaled", mini.tokens)[2]
    for row in run.values["measures"]["dials"]:
        row["loss"] = 3.0 + (row["num_experts_per_tok"] != 4)
    store.put(run.spec, run.values)
    (claim,) = elastic_claims(Store(store.folder.parent, store.scale), "Elastic MoE (`emoe-k4-w0.0001-scaled`)")
    assert claim.verdict == "not decided: 2 of 3 seeds"
    assert "at k′ = 2 … 12; plain" in claim.measured


@pytest.mark.parametrize(("less", "verdict"), [(-0.05, "holds"), (0.015, "does not hold"), (-0.009, "does not hold")])
def test_more_experts_are_held_against_the_plain_model_at_its_own(store, mini, less, verdict):
    last = "matryoshka-k4-scaled"
    rivals = [name for name in ELASTIC_RULES if name.startswith(("emoe-k4-", "matryoshka-k4-")) and name != last]
    fill(store, dict.fromkeys(("moe16-fine-k4-scaled", *rivals), 3.5), mini.tokens)
    fill(store, {"emoe-k4-w0-scaled": 3.5}, mini.tokens, seeds=1)  # of fewer seeds: shown, and not judged
    (claim,) = elastic_claims(store, "8 experts, by some rule")
    assert claim.verdict == "not decided: 4 of 5 rules measured"  # the plain one counts once more for each α
    assert "emoe-k4-w0-scaled" in claim.measured
    assert claim.reason == "of fewer seeds, and not judged: emoe-k4-w0-scaled"
    fill(store, {last: 3.5}, mini.tokens)
    for run in store.runs(last, mini.tokens):
        plain = store.run("moe16-fine-k4-scaled", mini.tokens, run.spec.seed)
        for row in run.values["measures"]["dials"]:
            row["loss"] = plain.loss + (less if row["num_experts_per_tok"] == 8 else 1.0)
        store.put(run.spec, run.values)
    (claim,) = elastic_claims(store, "8 experts, by some rule")
    assert claim.verdict == verdict
    assert f"matryoshka-k4-scaled {less:+.3f} ± 0.000" in claim.measured
    body = elastic(store, Gallery(store.folder)).body
    (row,) = [line for line in body.splitlines() if line.startswith(f"| {last}:") and "minus plain" in line]
    assert f"{less:+.3f} ± 0.000 (k′ = 8)" in row
    store.scale = dataclasses.replace(store.scale, side_seeds=4)
    (claim,) = elastic_claims(store, "8 experts, by some rule")
    assert claim.verdict == "not decided: 3 of 4 seeds"


def test_the_size_of_the_output_is_compared_seed_by_seed(store, mini):
    fill(store, {"moe16-fine": 3.6, "moe16-fine-k8-scaled": 3.5}, mini.tokens)
    body = elastic(store, Gallery(store.folder)).body
    assert "| moe16-fine | 8 | 3.602 ± 0.002 | 3.502 ± 0.002 | -0.100 ± 0.000 | 3 |" in body


def test_damping_is_held_against_elastic_moe_at_twice_the_trained_k(store, mini):
    fill(store, {"emoe-k4-w0.0001-scaled": 3.7, "moe16-fine-k4-scaled": 3.5}, mini.tokens)
    for run in store.runs("moe16-fine-k4-scaled", mini.tokens):
        for row in run.values["measures"]["rank_dampings"]:
            row["loss"] = 3.0 + row["rank_damping"] + (row["num_experts_per_tok"] == 8)
        store.put(run.spec, run.values)
    for run in store.runs("emoe-k4-w0.0001-scaled", mini.tokens):
        for row in run.values["measures"]["dials"]:
            row["loss"] = 4.5
        store.put(run.spec, run.values)
    (claim,) = elastic_claims(store, "damping the ranks beyond the trained k")
    assert (claim.measured, claim.verdict) == ("-0.250 ± 0.000 nats (3 seeds)", "holds")


def test_one_seed_and_the_number_of_experts_are_said(store, mini):
    claim = verdict_of_emoe(store, mini, 4, seeds=1, emoe=(1, 16), plain=(4, 4), direct=(8, 8))
    assert claim.verdict == "not decided: one seed"
    assert "16 experts end a range" in claim.reason


def test_the_alpha_dial_is_drawn_at_every_k_and_leaves_the_first_alone(store, mini):
    fill(store, {"moe16-fine-k4-scaled": 3.5}, mini.tokens)
    for run in store.runs("moe16-fine-k4-scaled", mini.tokens):
        for row in run.values["measures"]["rank_dampings"]:
            row["loss"] = 3.25 + row["rank_damping"]
        store.put(run.spec, run.values)
    body = elastic(store, Gallery(store.folder)).body
    head, plain = (
        next(x for x in body.splitlines() if x.startswith(t)) for t in ("| loss, nats | k′", "| moe16-fine-k4-scaled:")
    )
    (half,) = [
        line
        for line in body.splitlines()
        if line.startswith("| moe16-fine-k4-scaled: 16 narrow experts, plain top-4, α = 0.5 | 3")
    ]
    ks = [int(cell.split()[-1]) for cell in head.split("|")[2:-2]]
    cells = dict(zip(ks, half.split("|")[2:-2], strict=True))
    assert ks == [1, 2, 3, 4, 6, 8, 12, 16]
    assert [k for k in ks if "3.750" in cells[k]] == [6, 8, 12, 16]
    assert [half.split("|")[i] == plain.split("|")[i] for i in range(2, 6)] == [True] * 4
