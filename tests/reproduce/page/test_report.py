"""The page of evidence."""

import copy
import json
import re
from pathlib import Path

import pytest
from fake_results import DATA, fake_values, ffn_result, fill, spec_of

from infmoe.cli import main
from infmoe.errors import InfMoEError
from infmoe.reproduce.arms import arm_named, titled
from infmoe.reproduce.page import accuracy, curves, tables
from infmoe.reproduce.page.report import SECTIONS, _setting, render_page, render_section, write_report
from infmoe.reproduce.plan import (
    OTHER_RATES,
    TIER1,
    TIER2,
    groups,
)
from infmoe.reproduce.store import Store

ROOT = Path(__file__).parents[3]


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
    row = next(line for line in page.splitlines() if "against dense SwiGLU at equal" in line)
    assert "+0.100 ± 0.000 nats (3 seeds) | worse |" in row
    for name in (*TIER1, *TIER2):
        assert re.search(rf"^\| {re.escape(titled(name))} \|", page, re.M), name
    assert "two samples share 80% of their units" in page
    assert "not measured yet" not in page.lower()
    for picture in re.findall(r"!\[.*?\]\(\.\./results/(.*?)\)", page):
        assert (filled.folder.parent.parent / picture).stat().st_size > 10_000, picture


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
    if name == "controls":  # lengths between, where another table has them
        trained |= {(arm, tokens) for arm in TIER1 for tokens in mini.data_sizes}
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
