"""Zero-shot scores on the page of evidence."""

import dataclasses

import pytest
from fake_results import TASKS, fill
from reproduce_helpers import cells_of

from infmoe.reproduce.page import accuracy
from infmoe.reproduce.page.figures import Gallery
from infmoe.reproduce.page.report import render_page, render_section
from infmoe.reproduce.page.tables import table1
from infmoe.reproduce.store import Store


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


def test_accuracies_stand_beside_the_papers_and_sat_is_never_race(filled, mini):
    body = render_section("table1", filled).body
    head = cells_of(body, "zero-shot accuracy, %")
    paper, ours = cells_of(body, "infinity, paper, small"), cells_of(body, "infinity, ours")
    assert paper[1:8] == ["59.6", "29.8", "54.2", "46.0", "18.9", "17.6", "52.3"]
    assert (paper[head.index("SAT-en")], paper[head.index("mean of the first six")]) == ("–", "37.7")
    assert (ours[head.index("RACE-high")], ours[head.index("SAT-en")]) == ("–", "43.5 ± 0.0")
    # fake accuracies: 0.5 - 0.05 loss + 0.01 for each task before it + 0.01 K + 0.1 keep ratio, loss 3.402
    assert ours[head.index("BoolQ")] == "37.5 ± 0.0"
    assert ours[head.index("mean of the first six")] == "40.0 ± 0.0"
    assert cells_of(body, "moe, ours")[-1] == "+5.5 ± 0.0"
    assert cells_of(body, "chance")[1:] == ["50", "25", "50", "25", "25", "25", "25", "25", "33.3", ""]
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
    head = cells_of(section.body, "∞-MoE, zero-shot")
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
