"""The frontier: what is measured, which schedules are found, and the command."""

import json
import re
import shlex
import shutil

import pytest
from helpers import tiny_model

from infmoe.checkpoint import resolve_checkpoint, verify
from infmoe.cli import main
from infmoe.eval import frontier, token_times
from infmoe.eval.frontier import mark_frontier
from infmoe.hf import InfMoEForCausalLM
from infmoe.hf.budget import Profile, profile_name
from infmoe.layers.point import Point, ratio_text


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


SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")


@pytest.fixture(scope="module")
def moe_dir(tmp_path_factory, tiny_run):
    """A mixture of experts beside the data of the tiny run."""
    folder = tmp_path_factory.mktemp("moe")
    config = InfMoEForCausalLM.from_pretrained(resolve_checkpoint(tiny_run.run, warn=print)).config
    model = tiny_model("moe", **{name: getattr(config, name) for name in SIZES}, num_experts=4)
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
    assert main([*generate, "--device", "meta"]) == 2
    assert "device 'meta' holds shapes without numbers" in capsys.readouterr().err


@pytest.mark.parametrize("timed", [(), ("--prompt-length", "1")])
def test_a_profile_of_another_option(monkeypatch, timed, tiny_run, moe_dir, tmp_path, capsys):
    """The α dial, from measuring to generating; what it prints runs."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_run.checkpoint / name, moe_dir)
    monkeypatch.setattr(token_times, "NEW_TOKENS", 8)
    damped = ["--set", "rank_damping=0.25"]
    words = ["frontier", str(moe_dir), "--data", str(tiny_run.data), "--num-experts-per-tok", "2,4"]
    few = ["--windows", "4", "--rounds", "2", "--schedules", "0", "--out", str(tmp_path), *timed]
    assert main([*words, *few, *damped]) == 0
    said = capsys.readouterr().out
    example = shlex.split(said.split("e.g. `")[1].split("`")[0])
    assert " ".join(damped) in " ".join(example)
    assert ("--max-new-tokens" in example) == bool(timed)  # no more than the profile says something about
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


@pytest.mark.parametrize("ffn", ["dense", "switch"])
def test_a_model_without_dials_has_no_budgets(moe_dir, tiny_run, tmp_path, capsys, monkeypatch, ffn):
    config = InfMoEForCausalLM.from_pretrained(moe_dir).config
    tiny_model(ffn, **{name: getattr(config, name) for name in SIZES}).save_pretrained(tmp_path)
    words = ["frontier", str(tmp_path), "--data", str(tiny_run.data), "--windows", "4", "--rounds", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(frontier, "evaluate_points", lambda *args, **kwargs: pytest.fail("measured"))
        assert main([*words, "--budgets", "2"]) == 2
        assert capsys.readouterr().err == f"error: a budget turns dials, and ffn='{ffn}' has none: leave it out\n"
    assert main(words) == 0
    said = capsys.readouterr().out
    assert f"profile: {tmp_path / profile_name(1)}, of the one setting that there is" in said
    assert "generate" not in said
    assert main(["budgets", str(tmp_path)]) == 2
    assert "has none" in capsys.readouterr().err


def test_the_profile_is_there_before_budgets_are_tried(tiny_run, tmp_path, monkeypatch, capsys):
    def interrupted(model, profile, **_):
        assert Profile.load(tmp_path).points == profile.points
        assert {"frontier.md", "frontier.png"} <= {path.name for path in tmp_path.iterdir()}
        raise KeyboardInterrupt

    monkeypatch.setattr(frontier, "check_budgets", interrupted)
    words = ["frontier", str(tiny_run.run), *FEW, "--rounds", "2", "--schedules", "0", "--out", str(tmp_path)]
    assert main([*words, "--budgets", "2"]) == 130
    assert "budgets" not in json.loads((tmp_path / profile_name(1)).read_text())
    capsys.readouterr()
    assert main([*words, "--rows", "2"]) == 0  # the command line generates one row
    assert f"{profile_name(2)}, for `model.generate` with 2 prompts at once" in capsys.readouterr().out


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
    capsys.readouterr()
    assert main(words) == 0  # its own is measured anew
    kept = ", ".join(str(run / f"frontier.1.{end}") for end in ("json", "md", "png"))
    assert capsys.readouterr().err == f"kept what was there before: {kept}\n"
    assert (run / "frontier.1.json").read_bytes() == before
    assert (run / "frontier.json").read_bytes() != before
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
