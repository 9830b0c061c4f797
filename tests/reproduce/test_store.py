"""Finished runs on disk."""

import json
import subprocess
from pathlib import Path

import pytest
from fake_results import DATA, TASK_FILES, fake_values, fill, spec_of

from infmoe.errors import InfMoEError
from infmoe.reproduce.arms import arm_named
from infmoe.reproduce.plan import Group
from infmoe.reproduce.store import Store


def test_what_is_put_is_found_again(store, mini):
    spec = spec_of(store)
    assert store.get(spec) is None
    store.put(spec, fake_values(spec, 3.5))
    assert Store(store.folder.parent, mini).get(spec).loss == 3.5


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_text(path.read_text()[:-40]), "is damaged (no JSON)"),
        (lambda path: path.write_text("[]"), "is damaged (no object)"),
        (lambda path: _edit(path, lambda v: v.pop("curve")), "is damaged (no 'curve')"),
        (lambda path: _edit(path, lambda v: v["measures"].update(held_out=[])), "an empty measure 'held_out'"),
        (lambda path: _edit(path, lambda v: v["measures"].pop("held_out")), "is damaged (no held-out loss)"),
        (lambda path: _edit(path, lambda v: v["measures"]["dials"].append({})), "a point of 'dials' without a loss"),
        (lambda path: _edit(path, lambda v: v["measures"]["held_out"][0].update(loss=float("nan"))), "without a loss"),
        (lambda path: _edit(path, lambda v: v.update(config=None)), "is damaged (no 'config')"),
        (lambda path: _edit(path, lambda v: v.update(data={})), "no SHA-256 of its data"),
        (lambda path: _edit(path, lambda v: v.update(cost={})), "no cost 'total'"),
        (lambda path: _edit(path, lambda v: v["cost"].pop("active_with_wz")), "no cost 'active_with_wz'"),
        (lambda path: _edit(path, lambda v: v["curve"]["entropy"].pop()), "no course of 'entropy'"),
        (lambda path: _edit(path, lambda v: v["curve"].pop("sigma_to_mu")), "no course of 'sigma_to_mu'"),
        (lambda path: _edit(path, lambda v: v["measures"]["dials"].append(3)), "a point of 'dials' that is none"),
        (
            lambda path: _edit(path, lambda v: v["measures"]["dials"][1].pop("overlap_ratio")),
            "'dials' without overlap_ratio",
        ),
        (
            lambda path: _edit(path, lambda v: v["measures"]["dials"][1].update(flops_ideal=None)),
            "'dials' without flops_ideal",
        ),
        (lambda path: _edit(path, lambda v: v["measures"]["adaptive"][0].pop("rule")), "'adaptive' without rule"),
        (lambda path: _edit(path, lambda v: v["curve"].update(tokens=[])), "no course of training"),
        (lambda path: _edit(path, lambda v: v.update(fingerprint=None)), "is damaged (no 'fingerprint')"),
        (lambda path: _edit(path, lambda v: v["measured_with"].update(windows=3)), "measured with other settings"),
        (lambda path: _edit(path, lambda v: v.update(measured_with=None)), "measured with other settings"),
        (lambda path: _edit(path, lambda v: v["measures"]["zero_shot"][3].pop("margin")), "'zero_shot' without margin"),
        (lambda path: _edit(path, lambda v: v["measures"]["zero_shot"][3].update(acc=1)), "'zero_shot' without acc"),
        (
            lambda path: _edit(path, lambda v: v["measured_with"]["zero_shot"].update(items=7)),
            "'zero_shot' was measured with other settings",
        ),
        (
            lambda path: _edit(path, lambda v: v["measured_with"].pop("zero_shot")),
            "'zero_shot' was measured with other settings",
        ),
        (
            lambda path: _edit(path, lambda v: v["measured_with"].pop("modes")),
            "'modes' was measured with other settings",
        ),
        (lambda path: (path.parents[1] / "tasks.json").unlink(), "'zero_shot' was measured with other"),
        (lambda path: _edit(path, lambda v: v["config"].update(steps=5)), "other values of steps"),
        (lambda path: _edit(path, lambda v: v["config"]["model"].update(z_dim=3)), "other values of model.z_dim"),
        (lambda path: _edit(path, lambda v: v["data"].update(sha256="e")), "was trained on other data"),
    ],
)
def test_a_bad_file_is_named_and_left_alone(store, mini, damage, words):
    spec = spec_of(store)
    path = store.put(spec, fake_values(spec, 3.5))
    damage(path)
    before = path.read_bytes()
    fresh = Store(store.folder.parent, mini)
    for tuning in fresh.tuning(arm_named("infinity")):
        fresh.put(tuning, fake_values(tuning, 4.0 - tuning.lr))
    for ask in (lambda: fresh.get(spec), lambda: list(fresh.missing([Group(("infinity",), mini.tokens, (1, 1))]))):
        with pytest.raises(InfMoEError) as error:
            ask()
        assert str(path) in str(error.value)
        assert words in str(error.value)
    assert path.read_bytes() == before


def _edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("fingerprint", None, "nothing on a model of infinity-keep4 that it started from"),
        ("arm", "infinity", "it started from 'infinity-keep4-0.001024M-lr0.002-s1' of 'infinity', not from "),
        (
            "slug",
            "infinity-keep4-0.001024M-lr0.002-s2",
            "it started from 'infinity-keep4-0.001024M-lr0.002-s2' of 'infin",
        ),
    ],
)
def test_a_tuned_run_says_which_model_it_started_from(store, key, value, words):
    spec = spec_of(store, "infinity-keep4-tuned", lr=1e-3)
    values = fake_values(spec, 3.5)
    path = store.put(spec, values)
    assert store.get(spec).loss == 3.5
    values["run"]["init"][key] = value
    store.put(spec, values)
    with pytest.raises(InfMoEError) as error:
        store.get(spec)
    assert f"{path} is damaged ({words}" in str(error.value)
    del values["run"]["init"]
    store.put(spec, values)
    with pytest.raises(InfMoEError, match="nothing on a model of infinity-keep4"):
        store.get(spec)


def test_what_runs_are_trained_on_may_change_while_there_are_none(store):
    store.claim_data(DATA | {"sha256": "e" * 64})
    assert store.data["sha256"] == "e" * 64
    (store.folder / "data.json").write_text("{")
    store.claim_data(DATA)
    assert store.data == DATA


def test_runs_without_a_word_on_their_data_are_named(store):
    spec = spec_of(store)
    store.put(spec, fake_values(spec, 3.5))
    (store.folder / "data.json").unlink()
    for ask in (lambda: store.data, lambda: store.claim_data(DATA), lambda: store.get(spec)):
        with pytest.raises(InfMoEError, match=r"data\.json is missing, which says what the runs .* restore it"):
            ask()


def test_other_data_is_refused(store):
    spec = spec_of(store)
    store.put(spec, fake_values(spec, 3.5))
    store.claim_data(DATA)
    with pytest.raises(InfMoEError, match="were trained on other data"):
        store.claim_data(DATA | {"sha256": "e" * 64})


def test_other_task_files_are_refused(store):
    store.claim_tasks(TASK_FILES)
    with pytest.raises(InfMoEError, match=r"were scored on other files than arc\.jsonl, boolq\.jsonl of --tasks-dir"):
        store.claim_tasks({"arc.jsonl": "f" * 64, "boolq.jsonl": "0" * 64})
    (store.folder / "tasks.json").write_text('{"files": {"boolq.jsonl": 3}}')
    with pytest.raises(InfMoEError, match=r"tasks\.json is damaged: restore it"):
        store.claim_tasks(TASK_FILES)


def test_a_run_without_zero_shot_scores_is_as_good_as_ever(store, mini):
    spec = spec_of(store)
    store.put(spec, fake_values(spec, 3.5, tasks=False))
    (store.folder / "tasks.json").unlink()
    run = Store(store.folder.parent, mini).get(spec)
    assert run.loss == 3.5
    assert run.measure("zero_shot") is None


def test_the_learning_rate_is_the_best_of_the_grid_and_passed_on(store):
    arm, child = arm_named("infinity"), arm_named("infinity-sigma0")
    assert store.lr(arm) is None
    for spec, loss in zip(store.tuning(arm), (3.9, 4.1), strict=True):
        assert store.lr(child) is None
        store.put(spec, fake_values(spec, loss))
    assert store.lr(arm) == store.lr(child) == 1e-3
    assert store.lr(arm_named("moe")) is None


def test_points_at_fewer_experts_than_are_measured_are_not_mixed_in(store, mini):
    spec = spec_of(store, "moe16-fine-k4-scaled")
    values = fake_values(spec, 3.5)
    store.put(spec, values)
    assert store.get(spec) is not None
    values["measures"]["dials"] = [row for row in values["measures"]["dials"] if row["num_experts_per_tok"] != 5]
    store.put(spec, values)
    with pytest.raises(InfMoEError, match=r"'dials' was measured at other points \(without num_experts_per_tok=5\)"):
        store.get(spec)
    # arms whose ranges are not compared are measured at fewer
    other = spec_of(store, "moe16-fine-k4")
    fewer = fake_values(other, 3.5)
    fewer["measures"]["dials"] = [row for row in fewer["measures"]["dials"] if row["num_experts_per_tok"] != 5]
    store.put(other, fewer)
    assert store.get(other) is not None


def test_tuning_comes_first_and_then_seed_by_seed(store, mini):
    wanted = [Group(("infinity", "moe"), mini.tokens, (2, 2))]
    first = [(s.arm.name, s.tokens, s.seed) for s in store.missing(wanted)]
    assert first == [(arm, mini.tune_tokens, 0) for arm in ("infinity", "infinity", "moe", "moe")]
    for name in ("infinity", "moe"):
        for spec in store.tuning(arm_named(name)):
            store.put(spec, fake_values(spec, 4.0 - spec.lr))
    rest = [(s.arm.name, s.lr, s.seed) for s in store.missing(wanted)]
    assert rest == [(arm, 2e-3, seed) for seed in (1, 2) for arm in ("infinity", "moe")]


def test_seeds_are_added_until_the_interval_is_narrow(store, mini):
    group = Group(("infinity", "moe"), mini.tokens, (2, 4))
    fill(store, {"infinity": 3.0, "moe": 3.2}, mini.tokens, seeds=1)
    assert store.seeds_wanted(group) == 2  # one seed is not enough to say
    for seed, gap in ((1, 0.20), (2, 0.25)):
        for arm, loss in (("infinity", 3.0), ("moe", 3.0 + gap)):
            spec = spec_of(store, arm, seed)
            store.put(spec, fake_values(spec, loss))
    assert store.seeds_wanted(group) == 3  # 0.05 apart: the interval is far wider than 0.01
    for seed in (1, 2):
        spec = spec_of(store, "moe", seed)
        store.put(spec, fake_values(spec, 3.2 + 0.0001 * seed))
    assert store.seeds_wanted(group) == 2
    assert store.seeds_wanted(Group(("infinity", "moe"), mini.tokens, (4, 4))) == 4


def test_a_seed_that_diverged_does_not_end_the_search(store, mini):
    group = Group(("infinity", "moe"), mini.tokens, (2, 4))
    fill(store, {"infinity": 3.0, "moe": 3.2}, mini.tokens, seeds=2)
    assert store.seeds_wanted(group) == 2
    spec = spec_of(store, "moe", 2)
    store.put(spec, fake_values(spec, 3.0, diverged="the loss is nan at step 3", measures={}))
    assert store.seeds_wanted(group) == 3  # one pair is left, which has no interval


def test_an_arm_at_another_learning_rate_follows_the_one_it_is_tuned_as(store, mini):
    fill(store, {"infinity": 3.0, "infinity-glu": 3.0}, mini.tokens, seeds=1)
    for name, factor in (("infinity", 2.0), ("infinity-glu", 0.5)):
        assert store.lr(arm_named(f"{name}-lr{factor:g}x")) == factor * store.lr(arm_named(name))


def test_a_diverged_run_is_finished_and_has_no_loss(store, mini):
    arm = arm_named("infinity")
    broken = {"diverged": "the loss is nan at step 3", "measures": {}}
    for spec, changes in zip(store.tuning(arm), ({}, broken), strict=True):
        store.put(spec, fake_values(spec, 3.0, **changes))
    assert store.lr(arm) == 1e-3
    for seed, changes in ((1, {}), (2, broken)):
        spec = spec_of(store, seed=seed, lr=1e-3)
        store.put(spec, fake_values(spec, 3.0, **changes))
    assert store.losses("infinity", mini.tokens) == {1: 3.0}
    assert not list(store.missing([Group(("infinity",), mini.tokens, (2, 2))]))
    for spec in store.tuning(arm):
        store.put(spec, fake_values(spec, 3.0, **broken))
    with pytest.raises(InfMoEError, match="every learning rate of infinity diverged"):
        Store(store.folder.parent, mini).lr(arm)


def test_results_are_not_ignored_by_git(store):
    root = Path(__file__).parents[2]
    done = subprocess.run(["git", "check-ignore", "-q", "results/reproduce/tiny/runs/a.json"], cwd=root, check=False)
    assert done.returncode != 0


def test_a_difference_is_paired(store, mini):
    fill(store, {"infinity": 3.0, "moe": 3.2}, mini.tokens)
    assert store.difference("infinity", "moe", mini.tokens).mean == pytest.approx(-0.2, abs=1e-3)
    assert store.difference("infinity", "dense", mini.tokens) is None
