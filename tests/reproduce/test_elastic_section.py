"""The elastic part of the page: what it draws from the results."""

import re

import pytest
from fake_results import fill

from infmoe.reproduce.elastic import curve, elastic, means, useful_range
from infmoe.reproduce.figures import Gallery
from infmoe.reproduce.plan import ELASTIC_EXPERTS, ELASTIC_KEEP, TWO_PASSES, groups
from infmoe.train.config import ElasticConfig

LOSSES = {"infinity": 3.4, "moe": 3.6, "infinity-keep4": 3.5, "infinity-keep8": 3.5, "infinity-keep16": 3.5}


def claims(store, text):
    section = elastic(store, Gallery(store.folder))
    return [claim for claim in section.claims if text in claim.text]


@pytest.mark.parametrize(
    ("loss", "worse_than_fixed", "far_from_fixed"),
    [(3.4, "holds", "holds"), (3.505, "does not hold", "holds"), (3.6, "does not hold", "does not hold")],
)
def test_an_elastic_checkpoint_is_judged_at_every_ratio(store, mini, loss, worse_than_fixed, far_from_fixed):
    fill(store, LOSSES | {"infinity-elastic": loss}, mini.tokens)
    (claim,) = claims(store, "`infinity-elastic`, at every ratio")
    assert claim.verdict == worse_than_fixed
    for ratio in ("1/16", "1/8", "1/4", "1/2"):
        assert f"{loss - 3.5:+.3f} ± 0.000 at {ratio}" in claim.measured
    (claim,) = claims(store, "`infinity-elastic` at 1/4 is within 0.01")
    assert claim.verdict == far_from_fixed


def test_one_seed_and_none_decide_nothing(store, mini):
    (claim,) = claims(store, "`infinity-elastic`, at every ratio")
    assert claim.verdict == "not measured yet"
    fill(store, LOSSES | {"infinity-elastic": 3.0}, mini.tokens, seeds=1)
    (claim,) = claims(store, "`infinity-elastic`, at every ratio")
    assert claim.verdict == "not decided: one seed"


def test_the_useful_range_is_the_stretch_around_the_best():
    line = {1: 3.10, 2: 3.02, 4: 3.00, 6: 3.009, 8: 3.02, 12: 3.001, 16: 3.1}
    assert useful_range({k: {1: loss, 2: loss} for k, loss in line.items()}) == (4, 4, 6, 3.00)
    assert useful_range({}) is None
    assert useful_range({2: {1: 3.0}}) == (2, 2, 2, 3.0)


def test_elastic_moe_is_held_against_plain_and_direct_training(store, mini):
    fill(store, dict.fromkeys(ELASTIC_EXPERTS, 3.5), mini.tokens)
    four, eight = claims(store, "Elastic MoE, trained with k")
    assert "k′ = 1 … 8; plain 4 … 4; trained directly at 8: 8 … 8" in four.measured  # as the fake results have it
    assert four.verdict == "holds"
    assert "k′ = 3 … 12" in eight.measured or "k′ = 4 … 12" in eight.measured
    assert eight.verdict == "does not hold"  # 12 is less than twice 8


def test_two_passes_are_shown_at_equal_tokens_and_at_equal_flops(store, mini):
    fill(store, dict.fromkeys(TWO_PASSES, 3.5) | {"infinity": 3.4, "infinity-elastic": 3.45}, mini.tokens)
    fill(store, dict.fromkeys(TWO_PASSES, 3.9), mini.tokens // 2)
    body = elastic(store, Gallery(store.folder)).body
    for arm in TWO_PASSES:
        (row,) = [line for line in body.splitlines() if line.startswith(f"| {arm} |")]
        assert "| 3.502" in row
        assert "| 3.902" in row
    run = store.runs("infinity-sandwich", mini.tokens)[0]
    flops = 2 * 3 * run.cost["flops_executed"] * mini.tokens
    assert f"{flops:.3g}" in body


def test_adaptive_compute_is_judged_by_its_intervals(store, mini):
    fill(store, {"infinity": 3.4}, mini.tokens)
    (claim,) = claims(store, "units where the token's scores ask for them")
    assert claim.verdict == "does not hold"
    assert "+0.0100 ± 0.0000 at 1/16" in claim.measured
    body = elastic(store, Gallery(store.folder)).body
    assert re.search(r"layers differ: the shares that the one cut leaves \| -0\.0200", body)


def test_curves_keep_seeds_apart(store, mini):
    fill(store, {"infinity": 3.4}, mini.tokens, seeds=2)
    found = curve(store, "infinity", mini.tokens, lambda row: row.get("num_samples") if "mode" not in row else None)
    assert set(found[2]) == {1, 2}
    assert means(found)[8].count == 2


def test_elastic_arms_train_as_their_names_say(mini):
    specs = {
        arm: mini.arm(arm) for group in groups("elastic", mini) for arm in group.arms if group.tokens == mini.tokens
    }
    assert set(specs) >= {*ELASTIC_KEEP, *ELASTIC_EXPERTS, *TWO_PASSES}
    for name, arm in specs.items():
        from infmoe.reproduce.plan import RunSpec

        config = RunSpec(mini, arm, mini.tokens, 1e-3, 1).config()
        elastic_run = config.elastic != ElasticConfig()
        assert elastic_run == any(word in name for word in ("elastic", "sandwich", "consistency", "matryoshka")), name
        assert config.elastic.passes == (2 if name in TWO_PASSES else 1)
        if name.startswith("emoe"):
            k = int(name[-1])
            assert config.model["num_experts_per_tok"] == k
            assert config.model["ideal_experts_per_tok"] == 2 * k
