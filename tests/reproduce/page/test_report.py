"""The page of evidence."""

import copy
import dataclasses
import json
import re
from pathlib import Path

import pytest
from fake_results import DATA, TASKS, fake_values, ffn_result, fill, spec_of

from infmoe.cli import main
from infmoe.errors import InfMoEError
from infmoe.reproduce.arms import arm_named, titled
from infmoe.reproduce.page import accuracy, answers, curves, tables
from infmoe.reproduce.page.figures import Gallery
from infmoe.reproduce.page.report import SECTIONS, _setting, render_page, render_section, write_report
from infmoe.reproduce.page.tables import table1
from infmoe.reproduce.plan import (
    ELASTIC_EXPERTS,
    ELASTIC_K,
    ELASTIC_KEEP,
    ELASTIC_MORE,
    ELASTIC_TUNED,
    ELASTIC_UNSCALED,
    OTHER_RATES,
    PASSES,
    TIER1,
    TIER2,
    further_tokens,
    groups,
)
from infmoe.reproduce.store import Finished, Store

ROOT = Path(__file__).parents[3]


@pytest.fixture
def filled(store, mini):
    """Everything, as if it had been trained."""
    losses = {name: 3.5 + 0.01 * i for i, name in enumerate(dict.fromkeys((*TIER1, *TIER2)))}
    elastic = (*ELASTIC_KEEP, *ELASTIC_EXPERTS, *ELASTIC_UNSCALED, *ELASTIC_K, *ELASTIC_MORE, *PASSES)
    trained_for = dict.fromkeys((*elastic, *OTHER_RATES), 3.45)
    losses = trained_for | losses | {"infinity-elastic": 3.44, "infinity-keep4": 3.45, "infinity-keep16": 3.43}
    losses |= {f"infinity-z{z}": 3.6 - 0.001 * z for z in mini.z_dims[:-1]}
    fill(store, losses | {"infinity": 3.4, "moe": 3.6, "dense-swiglu": 3.3}, mini.tokens)
    planned = {(arm, group.tokens) for group in groups("elastic", mini) for arm in group.trained}
    for arm, passes in PASSES.items():
        if (arm, tokens := int(mini.tokens / passes)) in planned:
            fill(store, {arm: 3.6}, tokens)
    fill(store, dict.fromkeys(ELASTIC_TUNED, 3.4), further_tokens(mini))
    fill(store, dict.fromkeys(TIER1, 3.2) | {"infinity": 3.1}, mini.long_tokens)
    for tokens in set(mini.data_sizes) - {mini.tokens, mini.long_tokens}:
        fill(store, {"infinity": 3.5, "moe": 3.7}, tokens)
    return store


def test_the_page_says_what_the_results_say(filled, mini):
    (filled.folder.parent.parent / "ffn.json").write_text(json.dumps(ffn_result()))
    page = render_page(filled.folder.parent.parent)
    assert "on a CPU: at least 3.50 times | not testable at this scale" in page
    row = next(line for line in page.splitlines() if line.startswith("| ∞-MoE beats MoE, in held-out loss"))
    assert "-0.200 ± 0.001 nats (3 seeds) | holds |" in row
    row = next(line for line in page.splitlines() if line.startswith("| ∞-MoE beats dense, Switch"))
    assert "not testable at this scale" in row
    for text, arm, base in (
        ("the gate: a dense gate", "infinity-glu", "dense-wide"),
        ("the sparsity: top-N of that gate", "infinity-sigma0", "infinity-glu"),
        ("W_z at half the learning rate", "infinity-wz-lr-half", "infinity"),
    ):
        row = [line for line in page.splitlines() if line.startswith(f"| {text}")][-1]  # a claim may be before
        a, b = (filled.losses(name, mini.tokens)[1] for name in (arm, base))
        assert f"| {a - b:+.4f} ± 0.0000 |" in row, row
    row = next(line for line in page.splitlines() if "against dense SwiGLU" in line)
    assert "+0.100 ± 0.000 nats (3 seeds) | worse |" in row
    for name in (*TIER1, *TIER2):
        assert re.search(rf"^\| {re.escape(titled(name))} \|", page, re.M), name
    assert "two samples share 80% of their units" in page
    assert "not measured yet" not in page.lower()
    for picture in re.findall(r"!\[.*?\]\(\.\./results/(.*?)\)", page):
        assert (filled.folder.parent.parent / picture).stat().st_size > 10_000, picture


def test_tier_1_is_set_side_by_side_at_equal_learning_rates(store, mini):
    fill(store, {"infinity": 3.4, "moe": 3.6, "dense-wide": 3.5}, mini.tokens)
    assert "At equal learning rates" not in render_section("controls", store).body
    for seed in (1, 2, 3):
        spec = spec_of(store, "infinity-lr2x", seed, lr=4e-3)
        store.put(spec, fake_values(spec, 3.1 + 0.001 * seed))
        spec = spec_of(store, "dense-wide-lr0.5x", seed, lr=1e-3)
        store.put(spec, fake_values(spec, 3.3 + 0.001 * seed))
    body = render_section("controls", store).body
    lines = body[body.index("At equal learning rates") :].splitlines()
    head = next(line for line in lines if line.startswith("| arm"))
    assert [word in head for word in ("0.001", "0.002", "0.004")] == [True] * 3
    rows = {line.split(" | ")[0][2:]: line for line in lines[:8] if line.startswith("| ")}
    assert rows["infinity"] == "| infinity | – |  | 3.402 ± 0.002 (3) |  | 3.102 ± 0.002 (3) |  |"
    assert rows["dense-wide"] == "| dense-wide | 3.302 ± 0.002 (3) | – | 3.502 ± 0.002 (3) | -0.100 ± 0.000 | – | – |"
    assert rows["moe"] == "| moe | – | – | 3.602 ± 0.003 (3) | -0.200 ± 0.001 | – | – |"


def test_what_a_comparison_leaves_unequal_is_said(filled, mini):
    page = render_page(filled.folder.parent.parent)
    (row,) = [line for line in page.splitlines() if line.startswith("| the gate: a dense gate") and "nats" in line]
    gate, none = (filled.runs(name, mini.tokens)[0] for name in ("infinity-glu", "dense-wide"))
    assert f"{gate.cost['flops_executed'] / none.cost['flops_executed']:.2f} times the executed FLOPs" in row
    for run in filled.runs("infinity-sigma0", mini.tokens):
        filled.path(run.spec).unlink()
    page = render_page(filled.folder.parent.parent)
    (row,) = [
        line for line in page.splitlines() if line.startswith("| the sparsity: top-N") and "not measured yet" in line
    ]
    assert row.count(" – ") == 1


@pytest.mark.parametrize(("loss", "verdict"), [(3.4, "holds"), (4.9, "does not hold")])
def test_accuracy_is_judged_where_models_are_large_enough(store, mini, loss, verdict):
    losses = {"infinity": loss, "dense": 3.6, "switch": 3.6, "moe": 3.6}
    fill(store, losses, mini.tokens)
    text = "∞-MoE beats dense, Switch and MoE in zero-shot accuracy"
    (claim,) = [claim for claim in render_section("table1", store).claims if claim.text.startswith(text)]
    assert claim.verdict == "not testable at this scale"
    store.scale = dataclasses.replace(store.scale, name="small")
    section = table1(store, Gallery(store.folder))
    (claim,) = [claim for claim in section.claims if claim.text.startswith(text)]
    assert claim.verdict == verdict
    assert "at chance" not in section.body


@pytest.mark.parametrize(("at_16", "verdict"), [(3.5, "holds"), (3.9, "differs from point to point")])
def test_figure_3_claims_what_its_lengths_say(store, mini, at_16, verdict):
    for tokens in mini.data_sizes[:-1]:
        fill(store, {"infinity": 3.5, "moe": 3.7}, tokens)
    (claim,) = [claim for claim in render_section("figure3", store).claims if "held-out loss" in claim.text]
    assert claim.verdict == "not measured yet"
    fill(store, {"infinity": at_16, "moe": 3.7}, mini.data_sizes[-1])
    (claim,) = [claim for claim in render_section("figure3", store).claims if "held-out loss" in claim.text]
    assert verdict in claim.verdict


def test_files_that_no_table_asks_for_are_named_and_not_counted(filled):
    before = _setting(filled)
    stranger = filled.folder / "runs" / "infinity-7M-lr0.5-s1.json"
    stranger.write_text("{}")
    assert _setting(filled) == f"{before} Left out, because no table asks for them: {stranger.name}."


def _row(body, start):
    (row,) = [line for line in body.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_accuracies_stand_beside_the_papers_and_sat_is_never_race(filled, mini):
    body = render_section("table1", filled).body
    head = _row(body, "zero-shot accuracy, %")
    paper, ours = _row(body, "infinity, paper, small"), _row(body, "infinity, ours")
    assert paper[1:8] == ["59.6", "29.8", "54.2", "46.0", "18.9", "17.6", "52.3"]
    assert (paper[head.index("SAT-en")], paper[head.index("mean of the first six")]) == ("–", "37.7")
    assert (ours[head.index("RACE-high")], ours[head.index("SAT-en")]) == ("–", "43.5 ± 0.0")
    # fake accuracies: 0.5 - 0.05 loss + 0.01 for each task before it + 0.01 K + 0.1 keep ratio, loss 3.402
    assert ours[head.index("BoolQ")] == "37.5 ± 0.0"
    assert ours[head.index("mean of the first six")] == "40.0 ± 0.0"
    assert _row(body, "moe, ours")[-1] == "+5.5 ± 0.0"
    assert _row(body, "chance")[1:] == ["50", "25", "50", "25", "25", "25", "25", "25", "33.3", ""]
    margins = [line for line in body.splitlines() if line.startswith("| moe")][-1]
    assert [cell.strip() for cell in margins.strip("|").split("|")][1] == "0.398 ± 0.003"
    # the mean over tasks in deviations of an item: a standard error of 0.1 over 4 items, so 0.2
    assert margins.endswith("| 3.489 ± 0.013 | +1.226 ± 0.004 |")
    assert "9 items of each task, chosen by a hash" in body
    assert "a standard error of 2.0 points" in body
    page = render_page(filled.folder.parent.parent)
    row = next(line for line in page.splitlines() if "∞-MoE against MoE in the right answer's margin" in line)
    assert "+1.226 ± 0.004 standard deviations of the items (3 seeds) | better |" in row


def test_figure_2_shows_the_tasks_over_the_dials(filled):
    section = render_section("figure2", filled)
    head = _row(section.body, "∞-MoE, zero-shot")
    assert head[1:] == ["K = 1", "K = 2", "K = 3", "K = 4", "K = 8", "z = μ", "keep 1/16", "keep 1/8", "keep 1/2"]
    infinity, moe = (
        [line.strip("| ").split(" | ") for line in section.body.splitlines() if line.startswith(f"| mean: {what}")]
        for what in ("accuracy, %", "margin, nats")
    )
    assert [cell.split()[0] for cell in infinity[0][1:7]] == ["39.5", "40.5", "41.5", "42.5", "46.5", "38.5"]
    assert len(infinity[1]) == len(moe[1]) == 5
    assert section.pictures[-1][1].name == "figure2_zero_shot.png"
    assert section.pictures[-1][1].stat().st_size > 10_000
    (claim,) = [claim for claim in section.claims if "few samples (§5.1, in accuracy" in claim.text]
    assert claim.measured == "mean of six tasks: +4.5 ± 0.0 points"


def test_without_scores_the_rest_is_shown(store, mini):
    fill(store, {"infinity": 3.4, "moe": 3.6}, mini.tokens, tasks=False)
    table = render_section("table1", store)
    assert "Zero-shot accuracy and margins: not measured yet" in table.body
    assert "3.402" in table.body
    figure = render_section("figure2", store)
    assert "Zero-shot tasks over the dials: not measured yet." in figure.body
    assert [path.name for _, path in figure.pictures] == ["figure2.png"]


def test_without_results_every_part_says_so(store):
    page = render_page(store.folder.parent.parent)
    assert page.count("not measured yet") > 20
    assert "nan" not in page.lower().replace("finance", "")


def test_half_the_results_make_a_page_too(store, mini):
    fill(store, {"infinity": 3.4}, mini.tokens, seeds=1)
    page = render_page(store.folder.parent.parent)
    assert "3.401" in page
    for name in SECTIONS:
        render_section(name, store)


def test_the_rivals_alone_make_a_page_too(store, mini):
    fill(store, {"moe": 3.6}, mini.tokens, seeds=1)
    page = render_page(store.folder.parent.parent)
    assert "∞-MoE with d_z = 64, K = 2, keep ratio 0.25" in page
    assert "3.601" in page


def test_a_verdict_needs_an_interval_that_leaves_0_out(store, mini):
    fill(store, {"infinity": 3.4}, mini.tokens)
    for spec in store.tuning(arm_named("moe")):
        store.put(spec, fake_values(spec, 4.0))
    for seed, loss in ((1, 3.5), (2, 3.3), (3, 3.4)):
        spec = spec_of(store, "moe", seed, lr=1e-3)
        store.put(spec, fake_values(spec, loss))
    page = render_page(store.folder.parent.parent)
    row = next(line for line in page.splitlines() if line.startswith("| ∞-MoE beats MoE, in held-out loss"))
    assert "not decided: the interval contains 0" in row


def test_equal_budgets_take_the_arm_that_comes_nearest(store, mini, monkeypatch):
    fill(store, {"infinity": 3.4, "infinity-keep4": 3.45, "infinity-keep8": 3.5, "moe": 3.6}, mini.tokens)
    cost = {name: dict(store.runs(name, mini.tokens)[0].cost) for name in ("moe", "infinity", "infinity-keep4")}
    # the rival's ideal FLOPs, as much as K = 1 takes at a quarter; its executed ones, which no arm comes near
    cost["moe"] |= {"flops_ideal": 1000, "flops_executed": 500}
    cost["infinity"] |= {"flops_ideal": 1300, "flops_executed": 1100}
    cost["infinity-keep4"] |= {"flops_ideal": 1060, "flops_executed": 1000}
    counted = lambda run: cost.get(run.spec.arm.name, run.values["cost"])  # noqa: E731
    monkeypatch.setattr(Finished, "cost", property(counted))
    section = render_section("controls", store)
    (ideal,) = [c for c in section.claims if "against MoE (4" in c.text and "ideal FLOPs" in c.text]
    assert (ideal.verdict, ideal.reason) == ("better", "∞-MoE with K = 1, 1/4")
    assert ideal.measured.startswith("-0.15")
    (executed,) = [c for c in section.claims if "against MoE (4" in c.text and "executed FLOPs" in c.text]
    assert executed.verdict == "not run at this budget"
    assert "∞-MoE takes, of the rival's: 2.00 (K = 1, 1/4) … " in executed.reason
    rows = [line for line in section.body.splitlines() if line.startswith("| executed FLOPs per token")]
    assert rows == ["| executed FLOPs per token | – | none within a tenth | – | – | – | – |"]


def test_a_budget_is_met_by_the_tiers_of_stand_ins_in_turn(store, mini, monkeypatch):
    fill(store, {"infinity": 3.4, "infinity-keep4": 3.45, "infinity-z8": 3.5, "infinity-z16": 3.48}, mini.tokens)
    fill(store, {"dense-swiglu": 3.6, "infinity-glu": 3.3}, mini.tokens)
    flops = {"infinity": 1000, "infinity-keep4": 800, "infinity-z8": 640, "infinity-z16": 560}
    flops |= {"dense-swiglu": 610, "infinity-glu": 790}
    counted = lambda run: run.values["cost"] | {"flops_executed": flops[run.spec.arm.name]}  # noqa: E731
    monkeypatch.setattr(Finished, "cost", property(counted))
    section = render_section("controls", store, draw=False)
    table = section.body[section.body.index("**At equal budgets**") :]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| executed FLOPs per")]
    # z8 is nearer to it than z16, which fits too; the dense GLU is met by fewer samples before a smaller d_z is asked
    assert [row[1:4] for row in rows] == [
        ["K = 2, 1/4, d_z = 8", "dense-swiglu", "0.95"],
        ["K = 1, 1/4", "infinity-glu", "0.99"],
    ]
    (claim,) = [c for c in section.claims if "the dense GLU" in c.text and "executed FLOPs per" in c.text]
    assert (claim.verdict, claim.measured[:6]) == ("worse", "+0.150")


def test_the_gain_is_taken_apart_in_steps_that_add_up(store, mini, monkeypatch):
    monkeypatch.setattr(answers, "rates_of", lambda *_: "0.002")  # the grids of these arms end at other rates
    losses = {"dense-wide-lr0.5x": 3.7, "infinity-glu-lr0.5x": 3.5, "infinity-sigma0": 3.53, "infinity-keep4": 3.52}
    fill(store, losses | {"infinity": 3.5}, mini.tokens)
    body = render_section("controls", store, draw=False).body
    assert _row(body, "a dense gate of rank d_z")[1:] == ["-0.2000 ± 0.0000", "+100%"]
    assert _row(body, "its top quarter alone")[1:] == ["+0.0300 ± 0.0000", "-15%"]
    assert _row(body, "all of it: ∞-MoE against the plain layer")[1:] == ["-0.2000 ± 0.0000", "100%"]
    store.path(spec_of(store, "infinity-sigma0")).unlink()
    again = Store(store.folder.parent, mini)
    assert "over the seeds that every step has: 2" in render_section("controls", again, draw=False).body


def test_scores_near_guessing_are_counted(store, mini):
    fill(store, {"infinity": 3.4, "moe": 3.6}, mini.tokens, tasks=False)
    assert accuracy.near_guessing(store).startswith("models of this size are expected to score at chance")
    fill(Store(store.folder.parent, mini), {"infinity": 3.4}, mini.tokens, seeds=1)
    scored = Store(store.folder.parent, mini)
    own = {"num_samples": 2, "keep_ratio": 0.25}
    rows = [row for row in scored.runs("infinity", mini.tokens)[0].measure("zero_shot") if row.items() >= own.items()]
    rows.sort(key=lambda row: TASKS.index(row["task"]))
    for row, acc in zip(rows, (0.5, 0.28, 0.55, 0.3, 0.22, 0.4, 0.25), strict=False):
        row["acc"] = acc
    assert accuracy.near_guessing(scored).startswith("4 of the 7 accuracies scored at this scale lie within 2 standard")


def put_sigma(store, tokens, ends):
    """Runs of a length whose rms σ over rms μ ends so, one seed each; it begins at 0.3."""
    fill(store, {"infinity": 3.4}, tokens, seeds=len(ends))
    for run, end in zip(store.runs("infinity", tokens), ends, strict=True):
        dials = [row | {"sigma_to_mu": end} for row in run.values["measures"]["dials"]]
        store.put(run.spec, run.values | {"measures": run.values["measures"] | {"dials": dials}})


def sigma_claim(store):
    (claim,) = [c for c in render_section("controls", store, draw=False).claims if "σ stays alive" in c.text]
    return claim


@pytest.mark.parametrize(
    ("ends", "verdict"),
    [
        ([0.3] * 3, "alive"),
        ([0.1] * 3, "shrinks, and lives"),
        ([0.02] * 3, "dies"),
        ([0.02, 0.05, 0.08], "not decided: the interval contains 0.05"),
        ([0.02], "not decided: one seed"),
    ],
)
def test_what_becomes_of_sigma_is_said(ends, verdict, store, mini):
    put_sigma(store, mini.tokens, ends)
    assert sigma_claim(store).verdict == verdict


def test_sigma_is_judged_at_the_longest_training(store, mini):
    assert sigma_claim(store).verdict == "not measured yet"
    put_sigma(store, mini.tokens, [0.1] * 3)
    put_sigma(store, mini.long_tokens, [0.02] * 3)
    claim = sigma_claim(store)
    assert claim.verdict == "dies"
    assert "from 0.30 ± 0.00 to 0.10 ± 0.00 (3 seeds); at " in claim.measured
    assert "from 0.30 ± 0.00 to 0.02 ± 0.00 (3 seeds)" in claim.measured


def test_what_hardly_differing_samples_gain_is_void(store, mini):
    fill(store, {"infinity": 3.4}, mini.tokens)
    for share, verdict in ((0.8, "holds"), (0.95, "void: the samples hardly differ")):
        for run in store.runs("infinity", mini.tokens):
            dials = [row | {"overlap_ratio": share} for row in run.values["measures"]["dials"]]
            store.put(run.spec, run.values | {"measures": run.values["measures"] | {"dials": dials}})
        (claim,) = [c for c in render_section("figure2", store).claims if "gains from more samples" in c.text]
        (more,) = [c for c in render_section("elastic", store).claims if "more samples buy" in c.text]
        assert claim.verdict == more.verdict == verdict


def times(store, **arms):
    """`variants.json`: arm -> quartiles of tokens a second."""
    rows = [
        {"arm": arm.replace("_", "-"), "unit": "tokens/s", "precision": "bf16", "q1": low, "median": mid, "q3": high}
        for arm, (low, mid, high) in arms.items()
    ]
    (store.folder.parent.parent / "variants.json").write_text(json.dumps({"rows": rows}))


@pytest.mark.parametrize(
    ("fastest", "verdict"),
    [(2100.0, "worse"), (1700.0, "not decided: the sign hangs on the time"), (9000.0, "not run at this budget")],
)
def test_a_rival_gets_as_long_to_train(fastest, verdict, store, mini):
    fill(store, {"infinity": 3.4, "moe": 3.5}, mini.tokens)
    fill(store, {"infinity": 3.0, "moe": 3.1}, mini.long_tokens)
    # MoE passes ∞-MoE at 1.414 times its tokens
    low = fastest if fastest > 4000 else 1900.0 if fastest > 2000 else 1200.0
    times(store, infinity=(1000.0, 1000.0, 1000.0), moe=(low, (low + fastest) / 2, fastest))
    section = render_section("controls", store, draw=False)
    (claim,) = [c for c in section.claims if "(4 experts" in c.text and "training time" in c.text]
    assert claim.verdict == verdict
    assert claim.ours
    (flops,) = [c for c in section.claims if "(4 experts" in c.text and "executed training FLOPs" in c.text]
    ours, theirs = (store.runs(arm, mini.tokens)[0].cost["flops_executed"] for arm in ("infinity", "moe"))
    assert flops.reason.startswith(f"the rival on {ours / theirs:.2f} times the tokens")


def test_arms_that_do_the_same_work_say_how_far_times_can_be_trusted(filled):
    times(filled, infinity=(90.0, 100.0, 110.0), infinity_wz_decay0=(70.0, 80.0, 90.0))
    body = render_section("controls", filled, draw=False).body
    assert "2 arms that do the same work" in body
    assert "25% apart" in body
    assert "| 10000 (9091 … 11111) / – |" in body  # µs per token, its quartiles the other way round


def test_rates_that_a_grid_missed_are_named(store, mini):
    fill(store, {"infinity": 3.4, "moe": 3.6, "dense": 3.6}, mini.tokens)
    for arm, loss, lr in (("infinity-lr2x", 3.1, 4e-3), ("moe-lr2x", 3.7, 4e-3), ("dense-lr2x", 3.3, 4e-3)):
        for seed in (1, 2, 3):
            spec = spec_of(store, arm, seed, lr=lr)
            store.put(spec, fake_values(spec, loss))
    body = render_section("controls", store, draw=False).body
    assert "2 of 3 arms do better at the other rate" in body
    assert "infinity -0.302 ± 0.002 (0.004)" in body
    (dense,) = [
        c for c in render_section("table1", store, draw=False).claims if c.text == "∞-MoE beats dense, in held-out loss"
    ]
    assert "at learning rate 0.004: -0.200 ± 0.000 nats (3 seeds)" in dense.reason
    (switch,) = [
        c
        for c in render_section("table1", store, draw=False).claims
        if c.text == "∞-MoE beats Switch, in held-out loss"
    ]
    assert "at learning rate" not in switch.reason


def test_the_papers_own_table_and_counts_are_judged(store):
    claims = {claim.text: claim for claim in render_section("table1", store, draw=False).claims}
    (every,) = [claim for text, claim in claims.items() if "across all tasks" in text]
    assert every.verdict == "does not hold"
    assert "BoolQ 59.6 < 60.5 (small)" in every.measured
    assert "HellaSwag" not in every.measured
    (size,) = [claim for text, claim in claims.items() if "129M active" in text and "Table 1" in text]
    assert "129.2M of 185.8M" in size.measured
    assert "148.0M of 204.7M" in size.measured
    (work,) = [claim for text, claim in claims.items() if "about K r" in text]
    assert "0.44" not in work.verdict
    assert work.verdict == "holds of ideal FLOPs without the router"


def test_questions_of_ours_stand_apart_from_the_papers_claims(filled):
    page = render_page(filled.folder.parent.parent)
    papers, ours = page.index("**What the paper claims**"), page.index("**What the paper leaves out**")
    elastic = page.index("### Elastic compute")
    assert papers < page.index("| ∞-MoE beats MoE, in held-out loss") < ours
    assert ours < page.index("| whether the learned σ stays alive") < page.index("### Table 1")
    assert elastic < page.index("| `infinity-elastic`, at every ratio")
    assert page.count("| `infinity-elastic`, at every ratio") == 1


@pytest.mark.parametrize("name", SECTIONS)
def test_a_sections_command_trains_what_the_section_shows(name, filled, mini, monkeypatch):
    shown = set()
    runs = type(filled).runs

    def noted(self, arm, tokens):
        shown.add((arm, tokens))
        return runs(self, arm, tokens)

    assert filled.spread is not None  # which all arms say, as they say what of the scores is guessing
    for module in (accuracy, tables, curves):
        assert module.near_guessing(filled)
        monkeypatch.setattr(module, "near_guessing", lambda store: "")
    monkeypatch.setattr(type(filled), "runs", noted)
    render_section(name, filled, draw=False)
    trained = {(arm, group.tokens) for group in groups(name, mini) for arm in group.arms}
    if name == "table1":  # a note on other rates, where the controls have them
        trained |= {(arm, mini.tokens) for arm in OTHER_RATES}
    assert shown <= trained, sorted(shown - trained)


def test_check_fails_when_the_page_or_a_result_changes(filled, tmp_path, monkeypatch):
    results, page = filled.folder.parent.parent, tmp_path / "docs" / "evidence.md"
    assert not write_report(results, page)
    assert write_report(results, page, check=True)
    words = ["report", "--results", str(results), "--page", str(page), "--check"]
    assert main(words) == 0
    text = page.read_text()
    page.write_text(text.replace("3.4", "3.3", 1))
    assert main(words) == 2
    page.write_text(text)
    path = filled.path(spec_of(filled))
    values = json.loads(path.read_text())
    values["measures"]["held_out"][0]["loss"] += 0.05
    path.write_text(json.dumps(values))
    assert main(words) == 2
    assert page.read_text() == text


@pytest.fixture
def small(store, mini):
    """A store with two runs."""
    fill(store, {"infinity": 3.4, "moe": 3.6}, mini.tokens, seeds=1)
    return store


def test_a_page_elsewhere_links_to_its_pictures_and_so_does_one_of_linked_results(small, tmp_path):
    results = small.folder.parent.parent
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "here").symlink_to(results, target_is_directory=True)
    for given, page in (
        (results, tmp_path / "a" / "b" / "page.md"),
        (tmp_path / "links" / "here", tmp_path / "page.md"),
    ):
        assert not write_report(given, page)
        assert write_report(given, page, check=True)
        pictures = re.findall(r"!\[.*\]\((.+\.png)\)", page.read_text())
        assert pictures
        assert all((page.parent / picture).is_file() for picture in pictures)
    page.write_bytes(b"\xff\xfe")
    assert not write_report(results, page, check=True)


def test_results_whose_data_nothing_names_are_refused(small):
    (small.folder / "data.json").unlink()
    with pytest.raises(InfMoEError, match=r"data\.json is missing"):
        render_page(small.folder.parent.parent)


def test_runs_that_were_trained_twice_say_what_a_difference_is_worth(store, mini):
    fill(store, {"infinity": 3.4, "moe": 3.6}, mini.tokens, seeds=3)
    results = store.folder.parent.parent
    assert "once more" not in render_page(results)
    twice = Store(results / "reproduce" / "again", mini)
    twice.claim_data(DATA)
    twice.claim_tasks(store.tasks)
    for seed, gap in ((1, 0.03), (2, -0.04), (3, 0.0)):  # the last is the same run
        spec = spec_of(store, "moe", seed)
        values = copy.deepcopy(store.get(spec).values)
        values["measures"]["held_out"][0]["loss"] -= gap
        values["provenance"]["machine"]["cpu"] = "another kind"
        twice.put(spec, values)
    page = render_page(results)
    part = page[page.index("### The same runs once more") :]
    assert "2 runs were trained twice" in part
    assert "0.0354 nats apart (root mean square; 0.0400 at most)" in part
    assert f"smaller than {4.303 * 0.5**0.5 * 0.05:.3f} nats says nothing" in part
    rows = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| moe-")]
    assert [(row[0], row[1], row[-1]) for row in rows] == [
        (spec_of(store, "moe", seed).slug, "another kind", gap) for seed, gap in ((1, "+0.0300"), (2, "-0.0400"))
    ]
    twice.path(spec_of(store, "moe")).write_text("{}")
    with pytest.raises(InfMoEError, match=r"again.* is damaged"):
        render_page(results)
    (twice.folder / "data.json").write_text(json.dumps(DATA | {"sha256": "e" * 64}))
    with pytest.raises(InfMoEError, match=r"again/.*data\.json is of other data than"):
        render_page(results)


def test_one_seed_is_shown_and_decides_nothing(store, mini):
    fill(store, {"infinity": 3.4, "moe": 3.6}, mini.tokens, seeds=1)
    row = next(line for line in render_page(store.folder.parent.parent).splitlines() if "∞-MoE beats MoE, in" in line)
    assert "| -0.200 nats (one seed) | not decided: one seed |" in row


@pytest.mark.parametrize(("gap", "verdict"), [(-0.2, "holds (one seed)"), (-0.01, "not decided: one seed")])
def test_one_seed_is_held_against_the_spread_of_the_arms_that_have_more(store, mini, gap, verdict):
    for i, name in enumerate(dict.fromkeys((*TIER1, *TIER2))):
        if name not in ("infinity", "moe"):
            fill(store, {name: 3.6}, mini.tokens, seeds=0)
            for seed, loss in ((1, 3.6), (2, 3.6 + 0.02 * (-1) ** i)):
                spec = spec_of(store, name, seed, lr=2e-3 * arm_named(name).lr_factor)
                store.put(spec, fake_values(spec, loss))
    fill(store, {"infinity": 3.4, "moe": 3.4 - gap}, mini.tokens, seeds=1)
    assert store.difference("infinity", "moe", mini.long_tokens) is None
    found = store.difference("infinity", "moe", mini.tokens)
    assert found.half_width is None
    assert found.pooled == pytest.approx(store.spread.half_width())
    assert 0.01 < found.pooled < 0.2
    page = render_page(store.folder.parent.parent)
    row = next(line for line in page.splitlines() if "∞-MoE beats MoE, in" in line)
    assert f"| {gap:+.3f} nats (one seed, pooled ± {found.pooled:.3f}) | {verdict} |" in row
    assert f"{store.spread.arms} share no training with another" in page


def test_a_picture_that_is_missing_is_named(filled, tmp_path):
    results = filled.folder.parent.parent
    page = tmp_path / "evidence.md"
    write_report(results, page)
    (filled.folder / "controls.png").unlink()
    with pytest.raises(InfMoEError, match=r"controls.png is missing: run `infmoe report`"):
        write_report(results, page, check=True)


def test_a_damaged_bench_is_named(filled):
    path = filled.folder.parent.parent / "ffn.json"
    for text in ("{", "{}", '{"summary": {}}'):
        path.write_text(text)
        with pytest.raises(InfMoEError, match=r"ffn\.json is damaged"):
            render_section("figure4", filled)


def test_nothing_to_report_is_one_line(tmp_path):
    with pytest.raises(InfMoEError, match="holds no results: make some with `infmoe reproduce`"):
        render_page(tmp_path)


def test_the_committed_page_is_what_the_committed_results_say(tmp_path):
    assert (ROOT / "docs" / "evidence.md").read_text() == render_page(ROOT / "results", draw=False)


def test_the_data_is_described(store):
    assert f"{DATA['splits']['train']['tokens']:,} training tokens" in render_page(store.folder.parent.parent)
