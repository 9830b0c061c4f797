"""Every recipe, dry."""

import pytest

from infmoe.errors import InfMoEError
from infmoe.hf import ModelCost, model_cost
from infmoe.recipes import describe_variant, recipe, recipe_names
from infmoe.train import RunConfig, apply_overrides, dry_run
from infmoe.train.config import hf_config


def cost(name: str) -> ModelCost:
    return model_cost(hf_config(recipe(name)))


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_runs_dry(name):
    config = recipe(name)
    assert isinstance(config, RunConfig)
    assert config.name == name
    assert config.accumulation(1) * config.micro_batch_size * config.window == config.batch_tokens
    text = dry_run(config)
    assert f"{cost(name).total:,}" in text
    assert f'"intermediate_size": {config.model["intermediate_size"]}' in text
    assert describe_variant(name).endswith(".")


@pytest.mark.parametrize("size", ["tiny", "small", "medium"])
def test_variants_are_comparable(size):
    dense, wide = cost(f"{size}/dense"), cost(f"{size}/dense-wide")
    for name in ("switch", "moe", "moe-hash", "moe16-fine"):
        # experts share their output bias, so the counts are equal, not close
        assert cost(f"{size}/{name}").total == wide.total
        assert cost(f"{size}/{name}").active == dense.active
    assert cost(f"{size}/moe16").active == dense.active
    assert cost(f"{size}/moe16").total > 2 * wide.total
    assert cost(f"{size}/dense-swiglu").total == pytest.approx(wide.total, rel=2e-3)
    # the router is what ∞-MoE adds
    assert wide.total < cost(f"{size}/infinity").total < 1.05 * wide.total
    assert dense.active < cost(f"{size}/infinity").active < 1.07 * dense.active
    assert cost(f"{size}/infinity-no-topn").active == cost(f"{size}/infinity-no-topn").total


def test_paper_setup():
    config = recipe("small/infinity")
    assert config.steps * config.batch_tokens == pytest.approx(10e9, rel=1e-4)
    assert config.steps == 19073
    model = config.model
    assert (model["hidden_size"], model["num_hidden_layers"], model["num_attention_heads"]) == (768, 12, 12)
    assert (model["intermediate_size"], model["z_dim"]) == (6144, 256)
    assert (model["num_samples"], model["keep_ratio"]) == (2, 0.25)
    assert (config.optim.lr, config.optim.weight_decay, config.schedule.warmup_steps) == (6e-4, 0.1, 700)
    medium = recipe("medium/infinity").model
    assert (medium["hidden_size"], medium["num_hidden_layers"], medium["intermediate_size"]) == (
        1024,
        24,
        8192,
    )


def test_dry_run_shows_overrides_and_what_they_cost():
    changed = apply_overrides(recipe("tiny/infinity"), ["model.z_dim=16"])
    assert '"z_dim": 16' in dry_run(changed)
    assert f"{model_cost(hf_config(changed)).total_with_wz:,}" in dry_run(changed)
    late = ("elastic.keep_ratio=[0.0625,0.25]", "elastic.rule=sandwich", "elastic.start=0.8", "steps=1000")
    shown = dry_run(apply_overrides(recipe("tiny/infinity"), late)).splitlines()[-1]
    assert " ".join(shown.split()) == "passes over a token 1.2 elastic training begins after 800 steps"
    with pytest.raises(InfMoEError, match=r"elastic\.keep_ratio: DenseFFN has no dial"):
        dry_run(apply_overrides(recipe("tiny/dense"), late))


def test_unknown_recipe_suggests_the_nearest():
    with pytest.raises(InfMoEError, match="unknown recipe 'tiny/infinty'; did you mean 'tiny/infinity'"):
        recipe("tiny/infinty")
