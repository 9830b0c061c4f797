"""Results files that are damaged, or of another configuration: named in one line, and left alone."""

import copy
import json
from pathlib import Path

import pytest
from fake_results import DATA, fake_values, ffn_result, fill, spec_of

from infmoe.errors import InfMoEError
from infmoe.layers import InfinityFFN
from infmoe.provenance import write_json
from infmoe.reproduce import checks
from infmoe.reproduce.arms import arm_named
from infmoe.reproduce.checks import expanded_model
from infmoe.reproduce.measures import MEASURES
from infmoe.reproduce.page.report import _files, _setting, render_section
from infmoe.reproduce.page.speeds import Time, speeds
from infmoe.reproduce.plan import SCALES
from infmoe.reproduce.store import Store

ROOT = Path(__file__).parent.parent.parent
DAMAGED, OTHER, POINTS = "is damaged", "is of another configuration", "was measured at other points"


def refusal(ask, path) -> str:
    """What is said of a file: one line that names it and a remedy; the file stays as it is."""
    before = path.read_bytes()
    with pytest.raises(InfMoEError) as error:
        ask()
    said = str(error.value)
    assert "\n" not in said
    assert str(path) in said
    assert "restore it" in said or "move it away" in said
    assert path.read_bytes() == before
    return said


def set_at(values, keys: str, value) -> None:
    """Set what lies at "a.b.0.c"; None: take it away."""
    *folders, last = [int(key) if key.isdigit() else key for key in keys.split(".")]
    for key in folders:
        values = values[key]
    if value is None:
        del values[last]
    else:
        values[last] = value


@pytest.mark.parametrize(
    ("keys", "value", "words"),
    [
        ("provenance", {}, "no 'machine.cpu' in its provenance"),
        ("provenance.machine", "a processor", "no 'machine.cpu'"),
        ("provenance.machine.cpu", 3, "no 'machine.cpu'"),
        ("provenance.versions", [], "no 'versions.torch'"),
        ("provenance.training", None, "no 'training.commit'"),
        ("provenance.training.commit", None, "no 'training.commit'"),
        ("provenance.training.commit", 7, "no 'training.commit'"),
        ("run", None, "no 'run'"),
        ("seconds", float("nan"), "no 'seconds'"),
        ("model", {}, "no 'model'"),
        ("model", "infinity", "no 'model'"),
        ("diverged", True, "no reason for 'diverged'"),
        ("diverged", "the loss is nan at step 3", "measures of a run that diverged"),
        ("config.log.stats_tokens", "512", "no 'log.stats_tokens'"),
        ("config.log", None, "no 'log.stats_tokens'"),
        ("cost.total", 0, "no cost 'total'"),
        ("cost.flops_executed", -1, "no cost 'flops_executed'"),
        ("cost.flops_ideal", True, "no cost 'flops_ideal'"),
        ("cost.active", 12345, "cost 'active' is 12345, its model's is "),
        ("cost.weights_ideal", 12345, "cost 'weights_ideal' is 12345"),
        ("curve.entropy.3", "0.9", "no course of 'entropy'"),
        ("curve.sigma_to_mu.0", float("inf"), "no course of 'sigma_to_mu'"),
        ("curve.val_loss.0", float("nan"), "no course of 'val_loss'"),
        ("curve.loss.5", -1.0, "no course of 'loss'"),
        ("curve.dead_ratio", "0.01", "no course of 'dead_ratio'"),
        ("curve.tokens.0", "64", "no course of training"),
        ("curve.tokens.1", 64, "no course of training"),  # twice
        ("curve.tokens.15", 2048, "a course of training that ends at 2048 tokens"),
        ("measures.held_out.0.loss", -3.5, "a point of 'held_out' whose loss is -3.5"),
        ("measures.held_out.0.flops_ideal", "10", "a point of 'held_out' without flops_ideal"),
        ("measures.held_out.0.weights_ideal", 0, "a point of 'held_out' whose weights_ideal is 0"),
        ("measures.dials.2.loss", -0.1, "a point of 'dials' whose loss is -0.1"),
        ("measures.dials.2.flops_executed", 0, "a point of 'dials' whose flops_executed is 0"),
        ("measures.dials.2.flops_ideal", True, "a point of 'dials' without flops_ideal"),
        ("measures.dials.2.overlap_ratio", 1.5, "a point of 'dials' whose overlap_ratio is 1.5"),
        ("measures.dials.2.keep_ratio", "1/16", "a point of 'dials' without keep_ratio"),
        ("measures.adaptive.0.layer_shares", [0.25], "a point of 'adaptive' without layer_shares"),
        ("measures.adaptive.0.layer_shares.1", "0.25", "a point of 'adaptive' without layer_shares"),
        ("measures.adaptive_samples.0.mean_samples", 0.0, "'adaptive_samples' whose mean_samples is 0.0"),
        ("measures.zero_shot.0.acc", 1.2, "a point of 'zero_shot' whose acc is 1.2"),
    ],
)
def test_a_damaged_run_is_named_in_one_line(store, keys, value, words):
    spec = spec_of(store)
    values = fake_values(spec, 3.5)
    store.put(spec, values)
    assert store.get(spec).loss == 3.5
    set_at(values, keys, value)
    path = store.put(spec, values)
    said = refusal(lambda: store.get(spec), path)
    assert f"{DAMAGED} (" in said
    assert words in said


@pytest.mark.parametrize(
    ("keys", "value", "words"),
    [
        ("run.scale", "small", "run.scale"),
        ("run.arm", "moe", "run.arm"),
        ("run.recipe", "tiny/moe", "run.recipe"),
        ("run.tokens", 2048, "run.tokens"),
        ("run.lr", 1e-3, "run.lr"),
        ("run.seed", 2, "run.seed"),
        ("run.seed", None, "run.seed"),
        ("run.init", {"arm": "moe"}, "run.init"),
        ("config.seed", 2, "seed"),
        ("model.initial_sigma", 0.25, "model.initial_sigma"),
        ("model.sigma_activation", "exp", "model.sigma_activation"),
        ("model.wz_bias", 2, "model.wz_bias"),
        ("model.balance_loss_weight", 0.01, "model.balance_loss_weight"),
        ("model.an_option_of_old", 1, "model.an_option_of_old"),
    ],
)
def test_the_file_of_another_run_is_named_with_what_differs(store, keys, value, words):
    spec = spec_of(store)
    values = fake_values(spec, 3.5)
    set_at(values, keys, value)
    path = store.put(spec, values)
    said = refusal(lambda: store.get(spec), path)
    assert f"{OTHER} (other values of {words})" in said


def test_a_file_under_another_runs_name_is_not_that_runs(store):
    one, two = spec_of(store, seed=1), spec_of(store, seed=2)
    path = store.put(two, fake_values(one, 3.5))
    assert f"{OTHER} (other values of run.seed, seed)" in refusal(lambda: store.get(two), path)


def test_a_default_that_changes_makes_another_model(store, monkeypatch):
    spec = spec_of(store)
    path = store.put(spec, fake_values(spec, 3.5))
    assert store.get(spec) is not None
    defaults = InfinityFFN.option_defaults() | {"initial_sigma": 0.75, "mask_scale": "rms"}
    monkeypatch.setattr(InfinityFFN, "option_defaults", classmethod(lambda cls: defaults))
    checks._known.cache_clear()
    try:
        said = refusal(lambda: store.fresh(spec), path)
        assert f"{OTHER} (other values of model.initial_sigma, model.mask_scale)" in said
    finally:
        checks._known.cache_clear()


def test_a_file_is_as_good_without_what_came_after_it(store):
    spec = spec_of(store)
    values = fake_values(spec, 3.5)
    del values["model"]["mask_scale"]  # an option that there was not yet
    store.put(spec, values | {"model": values["model"] | {"an_option_of_old": None}})
    assert store.get(spec) is not None
    del values["model"]
    store.put(spec, values)
    assert store.get(spec) is not None


@pytest.mark.parametrize("arm", ["infinity", "infinity-glu", "moe16", "switch", "dense"])
def test_the_expanded_model_survives_json_and_leaves_nothing_open(store, arm):
    config = spec_of(store, arm).config()
    fields = expanded_model(config)
    assert json.loads(json.dumps(fields)) == fields
    assert fields.keys() >= config.model.keys() - {"attn_implementation"}
    assert fields.keys() >= {"initial_sigma", "sigma_activation", "min_sigma", "mask_scale", "wz_bias", "gate_norm"}
    assert not fields.keys() & {"use_cache", "eos_token_id", "model_type", "transformers_version", "dtype"}
    assert (fields["initial_sigma"] is None) == (not arm.startswith("infinity"))


@pytest.mark.parametrize(
    ("arm", "name"),
    [
        *(("infinity", name) for name in MEASURES if name not in ("gate_norms", "rank_dampings")),
        *(("moe16-fine-k4-scaled", name) for name in ("held_out", "dials", "gate_norms", "rank_dampings", "zero_shot")),
    ],
)
def test_a_measure_holds_each_of_its_points_once(store, arm, name):
    spec = spec_of(store, arm)
    whole = fake_values(spec, 3.5)
    path = store.put(spec, whole)
    rows = store.get(spec).measure(name)
    required = range(1 if name.startswith("adaptive") else len(rows))  # the others may be gaps
    for i in required:
        values = copy.deepcopy(whole)
        gone = values["measures"][name].pop(i)
        values["measures"][name] += [gone] * (len(rows) == 1)
        values["measures"][name].append(values["measures"][name][-1])
        store.put(spec, values)
        said = refusal(lambda: store.get(spec), path)
        assert f"{name!r} {POINTS} (" in said
        assert ("twice" in said) == (len(rows) == 1)
        assert (f"take {name!r} out of its measures" in said) == (name != "held_out")


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("dials", {"num_samples": 5}, "num_samples=5 keep_ratio=0.25 is not one of them"),
        ("dials", {"keep_ratio": 0.3}, "num_samples=2 keep_ratio=0.3 is not one of them"),
        ("dials", {"mode": "qmc"}, "mode='qmc' num_samples=2 keep_ratio=0.25 is not one of them"),
        ("mask_scales", {"mask_scale": "none"}, "mask_scale='none'"),
        ("adaptive", {"share": 0.5}, "rule='ratio' share=0.5 is not one of them"),
        ("zero_shot", {"task": "RACE-high"}, "task='RACE-high'"),
    ],
)
def test_points_of_no_measure_are_refused(store, name, change, words):
    spec = spec_of(store)
    values = fake_values(spec, 3.5)
    own = {"num_samples": 2, "keep_ratio": 0.25, "rule": "ratio", "mode": None}
    row = next(r for r in values["measures"][name] if all(r.get(key, at) == at for key, at in own.items()))
    values["measures"][name].append(row | change)
    path = store.put(spec, values)
    assert words in refusal(lambda: store.get(spec), path)


def test_a_cut_that_was_not_found_leaves_a_gap_and_half_of_one_is_damage(store):
    spec = spec_of(store)
    values = fake_values(spec, 3.5)
    rows = values["measures"]["adaptive"]
    for gone in (("cut",), ("one cut", "layers")):
        left = [row for row in rows if row["rule"] not in gone or row["share"] != 1 / 8]
        store.put(spec, values | {"measures": values["measures"] | {"adaptive": left}})
        assert store.get(spec) is not None
    left = [row for row in rows if row["rule"] != "one cut"]
    path = store.put(spec, values | {"measures": values["measures"] | {"adaptive": left}})
    said = refusal(lambda: store.get(spec), path)
    assert "(without rule='one cut' share=0.0625; rule='one cut' share=0.125; rule='one cut' share=0.25)" in said


def test_a_discrete_mixture_may_have_been_measured_at_more(store):
    spec = spec_of(store, "moe16-fine-k4")
    store.put(spec, fake_values(spec, 3.5))
    assert len(store.get(spec).measure("dials")) == 16  # eight are asked for


def test_a_measure_of_another_kind_of_model_is_refused(store):
    spec, other = spec_of(store, "dense"), spec_of(store, "infinity")
    values = fake_values(spec, 3.5)
    values["measures"]["dials"] = fake_values(other, 3.5)["measures"]["dials"]
    path = store.put(spec, values)
    assert f"'dials' {POINTS} (a model with ffn='dense' has no dial" in refusal(lambda: store.get(spec), path)


def test_a_diverged_run_needs_no_course_of_training(store):
    spec = spec_of(store)
    broken = {"diverged": "the loss is nan at step 1", "measures": {}, "curve": {"tokens": [], "loss": []}}
    store.put(spec, fake_values(spec, 3.5, **broken))
    assert store.get(spec).diverged
    path = store.put(spec, fake_values(spec, 3.5, **broken | {"curve": {"tokens": 3}}))
    assert "no course of 'tokens'" in refusal(lambda: store.get(spec), path)


@pytest.mark.parametrize(
    ("keys", "value", "words"),
    [
        ("sha256", None, "no SHA-256"),
        ("vocab_size", "300", "no size of the vocabulary"),
        ("splits", {}, "no documents and tokens of the split 'train'"),
        ("splits", [], "no documents and tokens of the split 'train'"),
        ("splits.val", None, "no documents and tokens of the split 'val'"),
        ("splits.val.tokens", "200", "no documents and tokens of the split 'val'"),
        ("splits.train.documents", 0, "no documents and tokens of the split 'train'"),
    ],
)
def test_damaged_words_on_the_data_are_named(store, keys, value, words):
    path, spec = store.folder / "data.json", spec_of(store)
    store.put(spec, fake_values(spec, 3.5))
    data = copy.deepcopy(DATA)
    set_at(data, keys, value)
    write_json(path, data)
    for ask in (lambda: store.data, lambda: store.claim_data(DATA), lambda: _setting(store)):
        assert f"{DAMAGED} ({words})" in refusal(ask, path)


def test_a_run_that_says_other_counts_of_its_data_is_refused(store):
    spec = spec_of(store)
    path = store.put(spec, fake_values(spec, 3.5, data=DATA | {"vocab_size": 301}))
    assert "was trained on other data" in refusal(lambda: store.get(spec), path)


ROWS = [
    {"arm": "infinity", "precision": "bf16", "unit": "tokens/s", "median": 1e4, "q1": 8e3, "q3": 2e4},
    {"arm": "infinity", "precision": "fp32", "unit": "ms", "median": 3.0, "q1": 2.5, "q3": 3.5},
    {"arm": "infinity", "precision": "fp32", "unit": "ms", "median": 2.0, "q1": 1.5, "q3": 2.5}
    | {"num_samples": 1, "keep_ratio": 0.25},
]


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        ("rows", None),
        ("rows", []),
        ("rows", {}),
        ("rows.0", "infinity"),
        ("rows.0.arm", None),
        ("rows.0.unit", None),
        ("rows.0.unit", "s"),
        ("rows.0.median", None),
        ("rows.0.median", 0),
        ("rows.1.median", "3.0"),
        ("rows.0.q1", 0.0),
        ("rows.1.q3", float("nan")),
        ("rows.0.precision", None),
        ("rows.2.num_samples", None),
        ("rows.2.keep_ratio", "1/4"),
    ],
)
def test_damaged_speeds_are_named(store, mini, keys, value):
    fill(store, {"infinity": 3.4, "infinity-keep4": 3.4}, mini.tokens, seeds=1)
    path = store.folder.parent.parent / "variants.json"
    values = copy.deepcopy({"rows": ROWS})
    write_json(path, values)
    assert speeds(store)["infinity"] == {"train_us": Time(100, 50, 125), "decode_ms": Time(3, 2.5, 3.5)}
    set_at(values, keys, value)
    write_json(path, values)
    said = refusal(lambda: render_section("controls", store, draw=False), path)
    assert f"{DAMAGED}: restore it, or make it again with `infmoe bench variants --out {path}`" in said


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        ("rows", {}),
        ("rows", "fast"),
        ("rows.0", 3),
        ("rows.0.arm", []),
        ("rows.0.median", "10.0"),
        ("rows.0.median", 0.0),
        ("rows.0.q3", float("inf")),
        ("rows.0.keep_ratio", "1/4"),
        ("rows.0.keep_ratio", None),
        ("summary", [1]),
        ("summary.forward_speedup_min", None),
        ("summary.forward_speedup_min", -1.0),
        ("summary.train_speedup_min", "2.5"),
    ],
)
def test_a_damaged_bench_of_the_kernel_is_named(store, keys, value):
    path = store.folder.parent.parent / "ffn.json"
    values = ffn_result()
    write_json(path, values)
    assert "3.50×" in render_section("figure4", store, draw=False).body
    set_at(values, keys, value)
    write_json(path, values)
    with pytest.raises(InfMoEError) as error:
        render_section("figure4", store, draw=False)
    assert str(error.value).startswith(f"{path} is damaged: make it again with `infmoe bench ffn --out ")


@pytest.mark.parametrize("made", ["by hand", {}, None])
def test_figure_4_without_provenance_names_the_command_that_makes_its_file(store, made):
    path = store.folder.parent.parent / "ffn.json"
    write_json(path, ffn_result() | {"provenance": made})
    assert render_section("figure4", store, draw=False).command == f"infmoe bench ffn --out {path}"


def test_every_file_that_the_page_counts_is_checked(store, mini):
    fill(store, {"infinity": 3.4}, mini.tokens, seeds=1)
    assert _setting(store).startswith("3 runs. ")
    # of a seed beyond those that are asked for: no table shows it, but it counts
    spec = spec_of(store, seed=9, lr=store.lr(arm_named("infinity")))
    path = store.put(spec, fake_values(spec, 3.5, provenance={"machine": "a processor"}))
    assert "no 'machine.cpu'" in refusal(lambda: _setting(store), path)


def test_a_run_without_a_commit_is_counted(store, mini):
    fill(store, {"infinity": 3.4}, mini.tokens, seeds=1)
    for run in _files(store)[0]:
        run.values["provenance"]["training"]["commit"] = None  # trained outside of a source tree
        store.put(run.spec, run.values)
    text = _setting(Store(store.folder.parent, mini))
    assert "torch: 2." in text
    assert "commits" not in text


def test_the_committed_runs_are_what_their_names_say():
    store = Store(ROOT / "results" / "reproduce", SCALES["tiny"])
    runs, strangers = _files(store)
    there = {path.name for path in (store.folder / "runs").glob("*.json")}
    assert {run.path.name for run in runs} | {path.name for path in strangers} == there
    assert len(runs) > 100
