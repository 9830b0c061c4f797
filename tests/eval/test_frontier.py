"""The frontier: what is measured, which schedules are found, and the command."""

import dataclasses
import json
import os
import re
import shlex
import shutil

import pytest
import torch
from helpers import tiny_model

from infmoe.checkpoint import resolve_checkpoint, verify
from infmoe.cli import main
from infmoe.errors import InfMoEError
from infmoe.eval import frontier
from infmoe.eval.frontier import check_budgets, mark_frontier, measure_frontier, schedules, token_times
from infmoe.hf import InfMoEForCausalLM, model_cost
from infmoe.hf.budget import Profile, profile_name
from infmoe.layers import Routing
from infmoe.layers.point import Point, ratio_text


@pytest.fixture(scope="module")
def profile_dir(tiny_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("profile")
    words = ["frontier", str(tiny_run.run), "--out", str(out), "--num-samples", "1,2", "--keep-ratio", "1/8,1/2"]
    assert main([*words, "--windows", "8", "--rounds", "2", "--schedules", "2", "--budgets", "3"]) == 0
    return out


def test_the_command_measures_every_point_and_schedule(profile_dir, opened):
    values = json.loads((profile_dir / profile_name(1)).read_text())
    points = [Point.of(row) for row in values["points"]]
    assert points[:5] == [Point(2, 0.25), Point(1, 0.125), Point(1, 0.5), Point(2, 0.125), Point(2, 0.5)]
    assert [type(p.keep_ratio) for p in points[5:]] == [tuple] * len(points[5:])
    assert all(p.num_samples == 1 for p in points[5:])
    searched, layered = points[5:-2], points[-2:]
    assert searched
    assert all(set(p.keep_ratio) == {0.125, 0.5} for p in searched)
    for p, ratio in zip(layered, (0.125, 0.5), strict=True):
        assert sum(p.keep_ratio) / len(p.keep_ratio) == pytest.approx(ratio, rel=0.02)
    assert [row["is_reference"] for row in values["points"]] == [True] + [False] * (len(points) - 1)
    for row in values["points"]:
        assert 0 < row["token_ms"] <= row["token_ms_p95"] < 1e4
        assert row["tokens_timed"] >= 2 * 15
    assert values["points"][0]["increase"] == 0.0
    assert (profile_dir / "frontier.png").stat().st_size > 10_000
    head, _, *table = (profile_dir / "frontier.md").read_text().partition("\n\n")[0].splitlines()
    cells = [line[2:-2].replace("\\|", "|").split(" | ") for line in (head, *table)]
    assert [row[0].rstrip(" *•") for row in cells[1:]] == [p.label() for p in points]
    assert cells[1][0].rstrip(" •").endswith("*")
    times = [float(row[cells[0].index("ms per token")]) for row in cells[1:]]
    assert times == pytest.approx([row["token_ms"] for row in values["points"]], abs=0.006)
    profile = Profile.load(profile_dir)
    profile.check(opened.model)
    assert [m.point for m in profile.points] == points
    budgets = values["budgets"]
    assert len(budgets) == 3
    assert all(row["steps"] >= 200 and 0 <= row["met"] <= 1 for row in budgets)
    assert {row["picked"] for row in budgets} <= {p.label() for p in points}


@pytest.fixture(scope="module")
def moe_dir(tmp_path_factory, tiny_run):
    """A mixture of experts beside the data of the tiny run."""
    folder = tmp_path_factory.mktemp("moe")
    config = InfMoEForCausalLM.from_pretrained(resolve_checkpoint(tiny_run.run, warn=print)).config
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    model = tiny_model("moe", **{name: getattr(config, name) for name in sizes}, num_experts=4)
    model.save_pretrained(folder)
    return folder


def test_the_frontier_of_a_mixture_of_experts(moe_dir, tiny_run, capsys):
    words = ["frontier", str(moe_dir), "--data", str(tiny_run.data), "--windows", "8", "--rounds", "2"]
    assert main([*words, "--num-experts-per-tok", "1,2,4", "--schedules", "2", "--budgets", "2"]) == 0
    values = json.loads((moe_dir / profile_name(1)).read_text())
    points = [Point.of(row) for row in values["points"]]
    assert points[:3] == [Point(num_experts_per_tok=k) for k in (2, 1, 4)]
    schedules_found = [set(point.num_experts_per_tok) for point in points[3:]]
    assert schedules_found
    assert all(len(found) > 1 and found <= {1, 2, 4} for found in schedules_found)
    assert values["budgets"][0]["picked"] in {point.label() for point in points}
    capsys.readouterr()
    generate = ["generate", str(moe_dir), "--max-new-tokens", "2", "--max-loss-increase", "100"]
    assert main([*generate, "--dtype", "float16"]) == 2
    assert "bfloat16" in capsys.readouterr().err
    assert main([*generate, "--device", "cuda:77"]) == 2
    assert "no device 'cuda:77'" in capsys.readouterr().err


def test_a_profile_of_another_option(tiny_run, moe_dir, tmp_path, capsys):
    """The α dial, from measuring to generating; what it prints runs."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_run.checkpoint / name, moe_dir)
    damped = ["--set", "rank_damping=0.25"]
    words = ["frontier", str(moe_dir), "--data", str(tiny_run.data), "--num-experts-per-tok", "2,4"]
    few = ["--windows", "4", "--rounds", "2", "--schedules", "0", "--out", str(tmp_path)]
    assert main([*words, *few, *damped]) == 0
    said = capsys.readouterr().out
    example = shlex.split(said.split("e.g. `")[1].split("`")[0])
    assert example[-2:] == damped
    assert main(example[1:]) == 0
    assert "the lowest loss" in capsys.readouterr().err
    assert main([word for word in example[1:] if word not in damped]) == 2
    assert f"measure this model with `infmoe frontier {moe_dir}" in capsys.readouterr().err


def test_a_profile_in_another_type(tiny_run, tmp_path, capsys):
    words = ["frontier", str(tiny_run.run), "--out", str(tmp_path), "--keep-ratio", "1/8,1/2", "--num-samples", "1"]
    assert main([*words, "--dtype", "bfloat16", "--windows", "8", "--rounds", "2", "--schedules", "0"]) == 0
    profile = Profile.load(tmp_path)
    assert profile.machine["dtype"] == "bfloat16"
    generate = ["generate", str(tiny_run.run), "--max-new-tokens", "2", "--profile", str(tmp_path)]
    assert main([*generate, "--max-loss-increase", "100", "--dtype", "bfloat16"]) == 0
    assert main([*generate, "--max-loss-increase", "100"]) == 2
    assert "dtype bfloat16 there, float32 here" in capsys.readouterr().err


def test_generate_picks_from_it(profile_dir, tiny_run, tmp_path, capsys):
    words = ["generate", str(tiny_run.run), "--max-new-tokens", "3", "--profile", str(profile_dir)]
    assert main([*words, "--max-loss-increase", "100"]) == 0
    assert "that lose at most 100 nats the quickest" in capsys.readouterr().err
    path = tmp_path / profile_name(1)
    path.write_text(json.dumps(json.loads((profile_dir / path.name).read_text()) | {"cached_tokens": [2, 3]}))
    longer = ["--profile", str(tmp_path), "--latency-budget-ms", "1e6", "--prompt", "a"]
    assert main([*words[:2], "--max-new-tokens", "5", *longer]) == 0
    assert re.search(r"\n100% of \d tokens met the budget\n", capsys.readouterr().err)  # all, to the end of the text
    assert main([*words[:2], "--max-new-tokens", "30", *longer]) == 2
    assert "says nothing of 31, which prompt and new tokens come to" in capsys.readouterr().err
    for more, named in (
        (["--latency-budget-ms", "1e-6"], "the nearest is"),
        (["--latency-budget-ms", "5", "--keep-ratio", "1/4"], "leave --keep-ratio out"),
        (["--latency-budget-ms", "5", "--max-loss-increase", "1"], "either"),
        ([], "--profile goes with"),
    ):
        assert main([*words, *more]) == 2
        assert named in capsys.readouterr().err


FEW = ("--num-samples", "1", "--keep-ratio", "1/8", "--windows", "4")


def test_a_checkpoint_stays_sealed_and_its_run_keeps_the_results(tiny_run, tmp_path, capsys):
    run = shutil.copytree(tiny_run.run, tmp_path / "run")
    checkpoint = run / "checkpoints" / tiny_run.checkpoint.name
    (tmp_path / "best").symlink_to(checkpoint)
    before = sorted(path.name for path in checkpoint.iterdir())
    assert main(["frontier", str(checkpoint), *FEW, "--rounds", "2", "--schedules", "0"]) == 0
    assert f"profile: {run / profile_name(1)}" in capsys.readouterr().out
    assert main(["sweep", str(tmp_path / "best"), *FEW, "--rounds", "4"]) == 0
    assert {"frontier.json", "frontier.png", "sweep.json", "sweep.png"} <= {path.name for path in run.iterdir()}
    verify(checkpoint)
    assert sorted(path.name for path in checkpoint.iterdir()) == before
    for place in (run, checkpoint, tmp_path / "best"):
        assert main(["generate", str(place), "--max-new-tokens", "2", "--latency-budget-ms", "1e6"]) == 0
    capsys.readouterr()
    for command in ("frontier", "sweep"):
        assert main([command, str(run), *FEW, "--out", str(checkpoint)]) == 2
        assert "is sealed by its manifest" in capsys.readouterr().err
        alone = shutil.copytree(checkpoint, tmp_path / command)
        assert main([command, str(alone), *FEW]) == 2
        assert "sealed checkpoint outside of a run: give --out" in capsys.readouterr().err
    verify(checkpoint)


def test_a_profile_is_not_replaced_by_that_of_another_way_to_open(tiny_run, tmp_path, capsys):
    run = shutil.copytree(tiny_run.run, tmp_path / "run")
    words = ["frontier", str(run), *FEW, "--rounds", "2", "--schedules", "0"]
    assert main(words) == 0
    before = (run / "frontier.json").read_bytes()
    for more, named in (
        (["--dtype", "bfloat16"], "profile with dtype float32: give --out another folder to keep it, or"),
        (["--set", "mask_scale=fixed"], "profile with mask_scale as saved: give --out another folder"),
    ):
        capsys.readouterr()
        assert main([*words, *more]) == 2
        assert f"error: {run / 'frontier.json'} is the checkpoint's {named}" in capsys.readouterr().err
        assert (run / "frontier.json").read_bytes() == before
    assert main([*words, "--dtype", "bfloat16", "--out", str(tmp_path / "beside")]) == 0
    assert main([*words, "--rows", "2", "--dtype", "bfloat16"]) == 0  # a file of its own
    assert main(words) == 0  # its own is measured anew
    assert main([*words, "--set", "mask_scale=fixed", "--out", str(run)]) == 0  # on purpose
    assert main(words) == 2
    assert "profile with mask_scale fixed: give" in capsys.readouterr().err


def test_the_commands_mistakes_are_one_line(tiny_run, capsys, tmp_path):
    for more, named in (
        (["--num-experts-per-tok", "2"], "no dial 'num_experts_per_tok'"),
        (["--num-samples", "0"], "--num-samples must be"),
        (["--keep-ratio", "2"], "--keep-ratio must lie"),
        (["--prompt-length", "31"], "--prompt-length must lie in 1 .. 29"),
        (["--data", str(tmp_path)], "data"),
    ):
        assert main(["frontier", str(tiny_run.run), "--out", str(tmp_path / "out"), *more]) == 2
        error = capsys.readouterr().err
        assert named in error
        assert len(error.splitlines()) == 1
    assert not (tmp_path / "out" / profile_name(1)).exists()


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


def test_every_round_is_timed_on_other_tokens_and_every_setting_on_the_same():
    model, seen = tiny_model(), []
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["input_ids"].tolist()), with_kwargs=True)
    settings = [{"routing": Routing(mode="mu", keep_ratio=0.25)} for _ in range(2)]
    state = torch.get_rng_state()
    token_times(model, settings, prompt_length=4, rounds=2)
    assert torch.equal(torch.get_rng_state(), state)
    turns = [seen[i : i + 17] for i in range(0, len(seen), 17)]  # the prompt and 16 tokens; two settings to warm up
    assert len(turns) == 6
    assert turns[2] == turns[3]
    assert turns[4] == turns[5]
    assert len({str(turn) for turn in turns}) == 3
    assert len({ids[0][0] for turn in turns for ids in turn[1:]}) > 9  # greedy text would soon repeat itself


def test_every_round_has_an_order_of_its_own(monkeypatch):
    model, turns = tiny_model(), []
    monkeypatch.setattr(model, "generate", lambda *args, which, **kwargs: turns.append(which))
    settings = [{"which": i} for i in range(6)]

    def rounds(seed):
        turns.clear()
        token_times(model, settings, prompt_length=4, rounds=8, seed=seed)
        assert turns[:6] == list(range(6))  # to warm up
        return [tuple(turns[i : i + 6]) for i in range(6, 54, 6)]

    orders = rounds(0)
    assert all(sorted(order) == list(range(6)) for order in orders)
    assert len(set(orders)) == 8
    neighbours = {order[i + 1] for order in orders for i in range(5) if order[i] == 0}
    assert len(neighbours) > 2  # forwards and backwards there are two
    assert rounds(0) == orders
    assert rounds(1_000_000) != orders


def test_token_times_are_of_single_tokens_at_any_number_of_rows():
    model = tiny_model()
    settings = [{"routing": Routing(num_samples=k, max_stats_tokens=1)} for k in (1, 2)]
    for rows in (1, 3):
        times = token_times(model, settings, rows=rows, prompt_length=4, rounds=2)
        assert [len(t) for t in times] == [32, 32], rows
        assert all(0 < ms < 1e4 for t in times for ms in t)
    with pytest.raises(InfMoEError, match="shorter --prompt-length"):
        token_times(model, settings, prompt_length=31, rounds=2)


def test_budgets_are_checked_through_generate(profile_dir, opened):
    profile = Profile.load(profile_dir)
    first, last = check_budgets(opened.model, profile, count=2, steps=16, prompt_length=8)
    quickest = min(profile.points, key=lambda p: p.token_ms_p95)
    best = min(profile.points, key=lambda p: p.loss)
    assert (first["picked"], last["picked"]) == (quickest.point.label(), best.point.label())
    assert last["budget_ms"] == max(p.token_ms_p95 for p in profile.points)
    assert first["steps"] == last["steps"] == 16
    assert last["regret"] is None or last["regret"] <= 0.0  # nothing has a lower loss
    slow = dataclasses.replace(profile, points=tuple(_timed(p, 1e5) for p in profile.points))
    assert [row["met"] for row in check_budgets(opened.model, slow, count=1, steps=16, prompt_length=8)] == [1.0]
    quick = dataclasses.replace(profile, points=tuple(_timed(p, 1e-5) for p in profile.points))
    (row,) = check_budgets(opened.model, quick, count=1, steps=16, prompt_length=8)
    assert (row["met"], row["regret"]) == (0.0, None)


def test_the_budgets_of_a_profile_are_tried_again(profile_dir, tiny_run, tmp_path, capsys):
    before = (profile_dir / "frontier.json").read_bytes()
    words = ["budgets", str(tiny_run.run), "--profile", str(profile_dir), "--count", "2", "--steps", "15"]
    assert main([*words, "--out", str(tmp_path)]) == 0
    first, last, where = capsys.readouterr().out.splitlines()
    values = json.loads((tmp_path / "budgets.json").read_text())
    assert [row["steps"] for row in values["budgets"]] == [15, 15]  # a turn of the context that is left
    profile = Profile.load(profile_dir)
    ends = [f(p.token_ms_p95 for p in profile.points) for f in (min, max)]
    for line, row, end in zip((first, last), values["budgets"], ends, strict=True):
        assert row["budget_ms"] == end
        assert line.startswith(f"budget {end:.2f} ms: met by {row['met']:.1%} of 15 tokens with {row['picked']};")
    assert where.endswith(f"profile: {os.path.relpath(profile.path)} of {profile.time}")
    assert profile.time == json.loads(before)["provenance"]["time"] == values["profile_time"]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 1
    assert (profile_dir / "budgets.json").is_file()  # beside the profile, which stays
    assert (profile_dir / "frontier.json").read_bytes() == before


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ([], "no profile at"),
        (["--profile", "PROFILE", "--rows", "2"], "frontier-rows2.json: make it with"),
        (["--profile", "PROFILE/frontier.json", "--rows", "2"], "measured with 1 row(s) at once, not 2"),
        (["--profile", "PROFILE", "--set", "mask_scale=rms"], "another configuration, than this"),
        (["--profile", "PROFILE", "--dtype", "bfloat16"], "dtype float32 there, bfloat16 here"),
        (["--count", "1"], "--count"),
    ],
)
def test_budgets_without_a_profile_that_fits(profile_dir, tiny_run, tmp_path, capsys, more, named):
    run = shutil.copytree(tiny_run.run, tmp_path / "run")
    words = [word.replace("PROFILE", str(profile_dir)) for word in more]
    assert main(["budgets", str(run), "--out", str(tmp_path / "out"), *words]) == 2
    assert named in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def _timed(point, ms):
    return dataclasses.replace(point, token_ms=ms, token_ms_p95=ms)


def test_the_frontier_is_what_no_other_point_beats():
    rows = [{"token_ms": t, "loss": x} for t, x in ((1, 5), (2, 4), (3, 4), (2, 4), (4, 1), (5, 2))]
    mark_frontier(rows)
    assert [row["on_frontier"] for row in rows] == [True, True, False, True, True, False]


def test_points_survive_a_file():
    for point in (Point(2, 0.25), Point(1, (0.25, 1 / 16)), Point(num_experts_per_tok=(1, 2)), Point(mode="mu")):
        assert Point.of(json.loads(json.dumps(vars(point)))) == point
    assert Point(1, (0.25, 1 / 16)).label() == "K=1 keep=1/4|1/16"
    assert Point(num_experts_per_tok=(1, 2)).label() == "k=1|2"
    assert ratio_text([0.3, 0.5]) == "0.3|1/2"


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
