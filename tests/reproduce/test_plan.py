"""What there is to train."""

import pytest

from infmoe.errors import InfMoEError
from infmoe.hf import model_cost
from infmoe.recipes import VARIANTS
from infmoe.reproduce.arms import ARMS, arm_named, label, titled
from infmoe.reproduce.command import all_specs, describe_plan
from infmoe.reproduce.plan import (
    ELASTIC_TUNED,
    EXPERIMENTS,
    SCALES,
    TIER1,
    TIER2,
    TUNING_SEED,
    RunSpec,
    further_tokens,
    groups,
    scale_named,
)
from infmoe.reproduce.store import Store
from infmoe.train.config import hf_config

SCALE = pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)


@SCALE
def test_every_arm_is_a_run_that_can_be_built(scale):
    for arm in (*ARMS.values(), *(arm_named(f"infinity-z{z}") for z in scale.z_dims)):
        config = RunSpec(scale, arm, scale.tokens, 1e-3, 1).config()
        cost = model_cost(hf_config(config))
        assert cost.flops_executed >= cost.flops_ideal > 0
        assert arm.tuned_as is None or arm_named(arm.tuned_as).tuned_as is None


def test_every_recipe_is_an_arm_and_every_arm_says_what_it_is():
    assert set(VARIANTS) <= set(ARMS)
    texts = [arm.label for arm in ARMS.values()]
    assert len(set(texts)) == len(texts)
    assert max(map(len, texts)) <= 58  # they stand in pictures
    assert label("infinity-z8, z = μ") == "∞-MoE, d_z = 8, z = μ"
    assert titled("moe-hash") == "moe-hash: MoE, token ids hashed"
    assert titled("infinity, qmc samples") == "infinity: ∞-MoE, K = 2, 1/4 kept, qmc samples"
    with pytest.raises(InfMoEError, match="unknown arm 'infinity-keep5'; did you mean 'infinity-keep"):
        label("infinity-keep5, keep ratio")


@SCALE
def test_the_arms_that_get_the_routers_parameters_too_have_them(scale):
    cost = {
        name: model_cost(hf_config(RunSpec(scale, arm_named(name), scale.tokens, 1e-3, 1).config()))
        for name in ("infinity", "moe-plus", "dense-swiglu-plus", "moe", "dense-swiglu", "dense-wide")
    }
    wanted = cost["infinity"].total_with_wz
    for name in ("moe-plus", "dense-swiglu-plus"):
        assert cost[name].total_with_wz == pytest.approx(wanted, rel=0.005)
    for name in ("moe", "dense-swiglu", "dense-wide"):
        assert cost[name].total == pytest.approx(cost["infinity"].total, rel=0.05)
        assert cost[name].total_with_wz < 0.97 * wanted


@pytest.mark.parametrize("name", ["small", "medium"])
def test_the_papers_scales_are_the_papers_setting(name):
    scale = scale_named(name)
    specs = {name: RunSpec(scale, arm_named("infinity"), tokens, 6e-4, 1).config() for name, tokens in (
        ("table1", scale.tokens), ("table3", scale.entropy_tokens), ("table5", scale.long_tokens))}  # fmt: skip
    assert specs["table1"].steps == 19_074  # 10B tokens, the last step begun
    assert specs["table3"].steps == 20_000
    assert specs["table5"].steps == pytest.approx(10 * specs["table1"].steps, rel=0.001)
    for config in specs.values():
        assert (config.batch_tokens, config.optim.lr, config.optim.weight_decay) == (2**19, 6e-4, 0.1)
        assert (config.schedule.warmup_steps, config.precision, config.window) == (700, "bf16", 1024)
    assert not scale.lr_grid
    assert scale.z_dims == (32, 64, 128, 256)


@SCALE
def test_everything_can_be_planned_without_data(scale, tmp_path):
    store = Store(tmp_path, scale)
    wanted = groups("all", scale)
    assert all(group in wanted for name in EXPERIMENTS for group in groups(name, scale))
    specs = all_specs(store, wanted)
    assert len({spec.slug for spec in specs}) == len(specs)
    lines = describe_plan(store, wanted).splitlines()
    assert len(lines) == len(specs) + 1
    assert "to do" in lines[-1]
    assert not list(tmp_path.iterdir())
    assert {spec.arm.name for spec in specs} >= {*TIER1, *TIER2}


@SCALE
@pytest.mark.parametrize("name", ["elastic", "all"])
def test_what_starts_from_a_trained_model_comes_after_that_one(scale, name, tmp_path):
    store = Store(tmp_path, scale)
    order = [(spec.arm.name, spec.tokens, spec.seed) for spec in all_specs(store, groups(name, scale))]
    tuned = [(place, arm_named(run[0]).init, run) for place, run in enumerate(order) if arm_named(run[0]).init]
    assert {arm for _, _, (arm, _, _) in tuned} == set(ELASTIC_TUNED)
    for place, base, (_, tokens, seed) in tuned:
        assert tokens == further_tokens(scale) == scale.tokens / 5
        assert order.index((base, scale.tokens, seed)) < place


def test_the_controls_get_their_seeds_before_the_rarer_elastic_rules_are_run(tmp_path):
    scale = SCALES["tiny"]
    store = Store(tmp_path / "reproduce", scale)
    order = [(spec.arm.name, spec.tokens, spec.seed) for spec in all_specs(store, groups("all", scale))]
    third = order.index(("moe16", scale.tokens, 3))
    assert order.index(("infinity-start", scale.tokens, 1)) < order.index(("infinity-start-lr2x", scale.tokens, 1))
    assert order.index(("dense-wide-start-lr0.5x", scale.tokens, 1)) < order.index(("moe16", scale.tokens, 2))
    assert order.index(("infinity-start", scale.tokens, 1)) < order.index(("moe16", scale.tokens, 2))
    assert third < order.index(("infinity", scale.tokens, 5)) < order.index(("moe-hash", scale.tokens, 2))
    assert order.index(("moe-hash", scale.tokens, 3)) < order.index(("dense-wide", scale.long_tokens, 3))
    assert order.index(("infinity-start", scale.tokens, 3)) < order.index(("infinity-consistency", scale.tokens, 1))


def test_a_tuned_arm_is_its_namesake_at_half_the_rate_of_its_base():
    assert set(ELASTIC_TUNED) == {arm.name for arm in ARMS.values() if arm.init}
    for arm in map(arm_named, ELASTIC_TUNED):
        base = arm_named(arm.init)
        assert base.init is None
        # so that the base's rate is known where the arm's own is
        assert (arm.variant, arm.tuned_as, arm.lr_factor) == (base.variant, base.tuned_as, base.lr_factor / 2)
        namesake = ARMS.get(arm.name.removesuffix("-tuned"))
        if arm.name == "infinity-sandwich-w0.25-tuned":  # taught by its own ratio
            namesake = arm_named("infinity-sandwich-quarter-w0.25-from0.8")
            config, late = (RunSpec(SCALES["tiny"], a, 10**6, 1e-3, 1).config() for a in (arm, namesake))
            assert config.elastic == late.elastic.model_copy(update={"start": 0.0})
            assert config.model == late.model
        else:
            assert (arm.model, arm.settings) == (namesake.model, namesake.settings)


def test_the_tuning_seed_is_not_reported(mini, tmp_path):
    specs = all_specs(Store(tmp_path, mini), groups("controls", mini))
    tuning = [spec for spec in specs if spec.seed == TUNING_SEED]
    assert {spec.tokens for spec in tuning} == {mini.tune_tokens}
    assert {spec.lr for spec in tuning} == set(mini.lr_grid)
    assert all(spec.seed > TUNING_SEED for spec in specs if spec not in tuning)


def test_all_arms_of_a_seed_see_the_same_data_in_the_same_order():
    scale = SCALES["tiny"]
    configs = [RunSpec(scale, arm_named(name), scale.tokens, 1e-3, 3).config() for name in (*TIER1, *TIER2)]
    assert len({(c.seed, c.batch_tokens, c.window, c.steps, c.schedule.warmup_steps) for c in configs}) == 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: groups("table9", SCALES["tiny"]), "unknown table or figure 'table9'; did you mean"),
        (lambda: groups("tabel1", SCALES["tiny"]), "did you mean 'table1'?"),
        (lambda: groups("tabel1", SCALES["tiny"]), "known: all, controls, elastic, figure2"),
        (lambda: scale_named("smal"), "did you mean 'small'? known: medium, small, tiny"),
        (lambda: groups("zzz", SCALES["tiny"]), "known: all, controls, elastic, figure2"),
        (lambda: scale_named("large"), "unknown scale 'large'; known: medium, small, tiny"),
        (lambda: arm_named("infinity-blocks"), "unknown arm"),
    ],
)
def test_unknown_names_name_the_known(call, words):
    with pytest.raises(InfMoEError) as error:
        call()
    assert words in str(error.value)
