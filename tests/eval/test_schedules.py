"""Settings that differ from layer to layer: which a search finds, and what it searches on."""

from helpers import tiny_model

from infmoe.eval import frontier
from infmoe.eval.frontier import measure_frontier
from infmoe.eval.schedules import schedules
from infmoe.hf import model_cost
from infmoe.layers.point import Point


def test_a_schedule_that_is_given_is_measured_beside_those_that_are_found(tiny_run, monkeypatch):
    ladders = []

    def noted(model, start, dial, values, count, *, evaluate):
        ladders.append((start.num_samples, sorted(values)))
        return []

    monkeypatch.setattr(frontier, "schedules", noted)
    few = {"windows": 4, "rounds": 2, "quiet": True}
    rows = measure_frontier(tiny_run.run, num_samples="1,2|1", keep_ratio="1/2|1/8,1/8,1/2", **few)["points"]
    assert ladders == [(1, [1 / 8, 1 / 2])]
    assert {Point(1, (0.5, 0.125)), Point((2, 1), 0.5)} <= {Point.of(row) for row in rows}
    rows = measure_frontier(tiny_run.run, num_samples="2|1", keep_ratio="1/2|1/8", **few)["points"]
    assert len(ladders) == 1  # nothing to search
    assert [Point.of(row) for row in rows] == [Point(2, 0.25), Point((2, 1), (0.5, 0.125))]


def test_schedules_lower_the_cheapest_layer_first():
    """Layers of known prices: the walk must follow them."""
    model = tiny_model(num_hidden_layers=3)
    price = (1.0, 5.0, 0.1)  # nats per unit of the ratio that a layer gives up

    def evaluate(points):
        return [{"loss": 3.0 + sum(p * (0.5 - r) for p, r in zip(price, q.keep_ratio, strict=True))} for q in points]

    found = schedules(model, Point(1, 0.25), "keep_ratio", (0.125, 0.5, 0.25), 50, evaluate=evaluate)
    ratios = [p.keep_ratio for p in found]
    # from the dearest to the cheapest in FLOPs the walk is: layer 2 down, then layer 0, then layer 1
    walk = [(0.5, 0.5, 0.25), (0.5, 0.5, 0.125), (0.25, 0.5, 0.125), (0.125, 0.5, 0.125), (0.125, 0.25, 0.125)]
    assert ratios == walk[::-1]
    few = schedules(model, Point(1, 0.25), "keep_ratio", (0.125, 0.5, 0.25), 2, evaluate=evaluate)
    flops = [model_cost(model.config, p.routing()).flops_ideal for p in few]
    assert len(few) == 2
    assert flops == sorted(flops)
    assert schedules(model, Point(1, 0.25), "keep_ratio", (0.25,), 2, evaluate=evaluate) == []


def test_schedules_may_go_below_what_all_layers_are_measured_at(tiny_run, monkeypatch):
    ladders = []

    def noted(model, start, dial, values, count, *, evaluate):
        ladders.append(sorted(values))
        return []

    monkeypatch.setattr(frontier, "schedules", noted)
    measure_frontier(tiny_run.run, num_samples="1", mode="sample", windows=8, rounds=2, quiet=True)
    measure_frontier(tiny_run.run, num_samples="1", keep_ratio="1/8,1/2", windows=8, rounds=2, quiet=True)
    assert ladders == [[1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2], [1 / 8, 1 / 2]]


def test_schedules_have_no_two_rungs_that_keep_as_many_units(tmp_path):
    def evaluate(points):
        return [{"loss": -sum(q.keep_ratio)} for q in points]

    model = tiny_model(block_size=12)  # 8 units a layer: 1/16 keeps one, and so do 1/32 and 1/64
    ladder = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 2)
    found = schedules(model, Point(1, 0.5), "keep_ratio", ladder, 50, evaluate=evaluate)
    assert {ratio for point in found for ratio in point.keep_ratio} == {1 / 8, 1 / 2}


def test_schedules_are_searched_in_the_mode_that_was_asked_for(tiny_run):
    words = {"keep_ratio": "1/8,1/2", "mode": "mu", "num_schedules": 2, "windows": 4, "rounds": 2}
    points = [Point.of(row) for row in measure_frontier(tiny_run.run, quiet=True, **words)["points"]]
    assert any(isinstance(point.keep_ratio, tuple) for point in points)
    assert {(point.mode, point.num_samples) for point in points[1:]} == {("mu", None)}  # the first is the model's own


def test_schedules_are_judged_on_other_text_than_they_are_searched_on(tiny_run, monkeypatch):
    seen = []
    evaluate = frontier.evaluate_points

    def watch(model, held_out, points, **options):
        seen.append({tuple(window.tolist()) for window in held_out.tokens_NT})
        return evaluate(model, held_out, points, **options)

    monkeypatch.setattr(frontier, "evaluate_points", watch)
    measure_frontier(tiny_run.run, keep_ratio="1/8,1/2", num_schedules=1, windows=8, rounds=2, quiet=True)
    *searched, judged = seen
    assert searched
    assert not any(windows & judged for windows in searched)
