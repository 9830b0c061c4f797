"""The table and the picture of zero-shot scores."""

import math

import pytest

pytest.importorskip("lm_eval", reason="the `eval` extra is not installed")

from infmoe.eval import plots
from infmoe.eval.zero_shot import show

TASKS = {"BoolQ": 0.5, "ARC-e": 0.25}


def result(points, own, seeds=1):
    """Scores that nobody made: accuracy 0.3 and more, a step more from point to point."""
    rows = []
    for i, point in enumerate(points):
        values = {"num_samples": None, "num_experts_per_tok": None, "keep_ratio": None, "mode": None} | point
        tasks = {
            name: {
                "task": {"BoolQ": "boolq", "ARC-e": "arc_easy"}[name],
                "chance": chance,
                "items": 40,
                "items_cut": 7 if name == "BoolQ" else 0,
                "passages": 31 if name == "BoolQ" else 40,
                "acc_norm": None if name == "BoolQ" else 0.4,
                "acc_norm_se": None if name == "BoolQ" else 0.05,
                "acc": 0.3 + 0.01 * i,
                "acc_se": 0.02,
                "margin": 0.01 * i - 1.5,
                "margin_se": 0.25,
                "acc_by_seed": [0.3 + 0.01 * (i + seed) for seed in range(seeds)],
                "margin_by_seed": [0.01 * (i + seed) - 1.5 for seed in range(seeds)],
            }
            | ({"acc_within_noise": True, "margin_within_noise": False} if i else {})
            | ({"margin_change": 0.01 * i, "margin_change_se": 0.002} if i else {})
            for name, chance in TASKS.items()
        }
        average = {"average": 0.3 + 0.01 * i, "average_by_seed": [0.3 + 0.01 * (i + s) for s in range(seeds)]}
        rows.append(values | {"label": f"point {i}", "tasks": tasks} | average)
    nothing = {"num_samples": None, "num_experts_per_tok": None, "keep_ratio": None, "mode": None}
    return {"points": rows, "own": nothing | own, "seeds": list(range(seeds))} | {
        "checkpoint": "run-7/step_9",
        "notes": {},
        "unfinished": [],
        "window": 128,
        "limit": 40,
    }


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws, and gives the figure back."""
    figures = []
    save = plots.save
    monkeypatch.setattr(plots, "save", lambda fig, path: figures.append(fig) or save(fig, path))

    def draw(scored):
        path = show.plot(scored, tmp_path / "picture.png")
        assert path.stat().st_size > 10_000
        return figures[-1]

    return draw


def lines_of(ax, style):
    """The lines over the dial in one style, as lists of y."""
    return [list(line.get_ydata()) for line in ax.lines if line.get_linestyle() == style and len(line.get_ydata()) > 1]


def test_each_dial_has_a_panel_of_accuracy_margin_and_change(drawn):
    sampled = [{"num_samples": k, "keep_ratio": r} for k in (1, 2, 4) for r in (0.125, 0.25)]
    mean = [{"mode": "mu", "keep_ratio": r} for r in (0.125, 0.25)]
    scored = result([*sampled, *mean], {"num_samples": 2, "keep_ratio": 0.25})
    fig = drawn(scored)
    assert len(fig.axes) == 6
    k_acc, keep_acc, k_margin, keep_margin, k_change, keep_change = fig.axes
    for ax in (k_acc, k_margin, k_change):
        assert ax.get_xlabel() == "samples per token, K"
        assert ax.get_title() == "at keep ratio = 1/4, dashed: z = μ"
        assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "2", "4"]
    for ax in (keep_acc, keep_margin, keep_change):
        assert ax.get_xlabel().startswith("keep ratio")
        assert ax.get_xscale() == "log"
        assert ax.get_title() == "at K = 2, dashed: z = μ"
        assert [label.get_text() for label in ax.get_xticklabels()] == ["1/8", "1/4"]
    assert k_acc.get_ylabel() == "accuracy (%)"
    assert "(nats)" in k_margin.get_ylabel()
    # points 1, 3, 5 have keep ratio 1/4; points 2 and 3 K = 2; 6 and 7 are z = mu
    assert lines_of(k_acc, "-") == [pytest.approx([31, 33, 35])] * 2
    assert lines_of(k_acc, "--") == [pytest.approx([37, 37])] * 2
    assert lines_of(keep_acc, "-") == [pytest.approx([32, 33])] * 2
    assert lines_of(keep_acc, "--") == [pytest.approx([36, 37])] * 2
    assert lines_of(k_margin, "-") == [pytest.approx([-1.49, -1.47, -1.45])] * 2
    assert lines_of(k_change, "-") == [pytest.approx([0.01, 0.03, 0.05])] * 2
    assert lines_of(keep_change, "--") == [pytest.approx([0.06, 0.07])] * 2
    assert "point 0, item by item" in k_change.get_ylabel()
    assert fig.get_suptitle().startswith("Zero-shot, run-7: 40 items a task")
    assert sorted(line[0] for line in lines_of(k_acc, ":")) == [25, 50]  # chance
    assert [line[0] for line in lines_of(k_margin, ":")] == [0]
    assert [text.get_text() for text in fig.legends[0].get_texts()] == list(TASKS)


def test_schedules_are_drawn_over_the_tasks(drawn):
    schedule = {"num_samples": 1, "keep_ratio": (0.25, 0.125)}
    fig = drawn(result([{"num_samples": 1, "keep_ratio": 0.25}, schedule], {"num_samples": 1, "keep_ratio": 0.25}))
    assert [label.get_text() for label in fig.axes[0].get_xticklabels()] == list(TASKS)
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["point 0", "point 1"]
    # one in every point is no dial that was varied
    every = [schedule, schedule | {"num_samples": 2}]
    assert drawn(result(every, schedule)).axes[0].get_xlabel() == "samples per token, K"


def test_long_labels_keep_the_columns():
    scored = result([{"num_samples": 1}, {"num_samples": 2}], {"num_samples": 2})
    scored["points"][1]["label"] = "K=1 keep=" + "|".join(["3/16"] * 8)
    lines = show.table(scored).splitlines()
    ends = {line.index("±") for line in lines if line.startswith(("point 0", "K=1"))}
    assert len(ends) == 1


def test_the_bars_are_the_intervals(drawn):
    fig = drawn(result([{"num_experts_per_tok": k} for k in (1, 2)], {"num_experts_per_tok": 2}))
    accuracy, margin, change = fig.axes
    assert accuracy.get_xlabel() == "experts per token, k"
    (bars,) = accuracy.containers[0][2]
    assert bars.get_segments()[0][:, 1] == pytest.approx([30 - 1.96 * 2, 30 + 1.96 * 2])
    (bars,) = margin.containers[0][2]
    assert bars.get_segments()[1][:, 1] == pytest.approx([-1.49 - 1.96 * 0.25, -1.49 + 1.96 * 0.25])
    (bars,) = change.containers[0][2]
    assert [list(bar[:, 1]) for bar in bars.get_segments()] == [
        pytest.approx([0, 0]),
        pytest.approx([0.01 - 1.96 * 0.002, 0.01 + 1.96 * 0.002]),
    ]


def test_the_spread_over_seeds_is_a_pale_bar(drawn):
    fig = drawn(result([{}], {}, seeds=5))
    pale = [c for c in fig.axes[0].collections if c.get_alpha() == 0.3]
    assert [list(bar.get_segments()[0][:, 1]) for bar in pale] == [pytest.approx([30, 34])] * 2
    assert "pale: 5 seeds" in fig.get_suptitle()
    assert not [c for c in drawn(result([{}], {})).axes[0].collections if c.get_alpha() == 0.3]


def test_one_point_is_drawn_over_the_tasks(drawn):
    fig = drawn(result([{}], {}))
    for ax in fig.axes:
        assert [label.get_text() for label in ax.get_xticklabels()] == list(TASKS)
    assert not fig.legends


def test_the_table_says_what_is_missing_and_how_seeds_spread():
    scored = result([{"num_samples": 1}, {"num_samples": 2}, {"mode": "mu"}], {"num_samples": 2}, seeds=3)
    for figures in scored["points"][2]["tasks"].values():  # draws nothing
        figures |= {"acc_by_seed": [0.3], "margin_by_seed": [-1.5]}
    scored["points"][2]["average_by_seed"] = [0.3]
    scored["unfinished"] = ["OBQA"]
    lines = show.table(scored).splitlines()
    assert "3 seeds" in lines[1]
    (one, two) = [line for line in lines if line.startswith("  over seeds, accuracy")]
    assert one.split()[3:] == ["30.0", "to", "32.0"] * 3
    assert two.split()[3:] == ["31.0", "to", "33.0"] * 3
    (margin, _) = [line for line in lines if line.startswith("  over seeds, margin")]
    assert margin.split()[3:] == ["-1.500", "to", "-1.480"] * 2
    assert lines[-1] == "note: not scored, or not at every point: OBQA"
    per_char = [line.split() for line in lines if line.startswith("  per character")]
    assert per_char == [["per", "character", "–", "40.0", "±", "5.0"]] * 3
    assert "note: items that share a passage count as one draw in every error: BoolQ 40 on 31" in lines
    assert any(line.startswith("note: margins of BoolQ: each right answer weighs the same") for line in lines)


def test_a_task_that_stopped_half_way_is_shown_where_it_was_scored():
    scored = result([{"num_samples": 1}, {"num_samples": 2}], {"num_samples": 2})
    del scored["points"][1]["tasks"]["ARC-e"]
    assert show.finished(scored) == ["BoolQ"]
    lines = show.table(scored).splitlines()
    assert next(line for line in lines if line.startswith("point 0")).split()[2:8] == ["30.0", "±", "2.0"] * 2
    assert next(line for line in lines if line.startswith("point 1")).split()[2:6] == ["31.0", "±", "2.0", "–"]
    for row in scored["points"]:  # nothing at every point: no mean
        row["tasks"].pop("BoolQ", None)
        del row["average"], row["average_by_seed"]
    lines = show.table(scored).splitlines()
    assert next(line for line in lines if line.startswith("point 0")).split()[2:] == ["30.0", "±", "2.0", "–"]
    assert not [line for line in lines if line.startswith("point 1")]


def test_the_table_says_what_was_cut_left_out_and_compared():
    text = show.table(result([{"num_samples": 1}, {"num_samples": 2}, {"num_samples": 4}], {"num_samples": 1}))
    assert "note: longer than the window of 128 tokens, so without their beginning: BoolQ 7 of 40" in text
    assert "note: 40 items of each task at most, chosen by a hash" in text
    assert "changes are against point 0, each judged alone at 95 %: of 8, about 0 pass" in text
    alone = show.table(result([{"num_samples": 1}], {"num_samples": 1}) | {"limit": None, "window": 128})
    assert "changes are against" not in alone
    assert "chosen by a hash" not in alone


def test_what_is_not_known_is_a_dash_and_not_drawn(drawn):
    scored = result([{"num_samples": 1}, {"num_samples": 2}], {"num_samples": 2})
    unknown = {"margin": None, "margin_se": None, "margin_change": None, "margin_change_se": None, "acc_se": None}
    for row in scored["points"]:
        row["tasks"]["BoolQ"] |= {name: None for name in unknown if name in row["tasks"]["BoolQ"]}
    scored["points"][1]["tasks"]["BoolQ"] |= {"acc_within_noise": None, "margin_within_noise": None}
    lines = show.table(scored).splitlines()
    assert [line.split()[2:5] for line in lines if line.startswith("point")] == [["30.0", "±", "–"], ["31.0", "±", "–"]]
    assert [line.split()[1] for line in lines if line.startswith("  margin")] == ["–", "–"]
    (change,) = [line for line in lines if line.startswith("  change")]
    assert change.split()[4:7] == ["–", "/", "–"]
    assert any("too few items for an error" in line and line.endswith("BoolQ") for line in lines)
    assert any("of 2, about 0 pass" in line for line in lines)
    for ax in drawn(scored).axes[1:]:
        (boolq, *_) = lines_of(ax, "-")
        assert all(math.isnan(y) for y in boolq[-1:])
