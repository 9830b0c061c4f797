"""What `infmoe reproduce` is asked for, shows beforehand, and refuses."""

import dataclasses
import json

import pytest
from fake_results import fake_values, fill
from reproduce_helpers import runs_of

from infmoe.data.manifest import Manifest
from infmoe.errors import InfMoEError
from infmoe.recipes import recipe
from infmoe.reproduce import command, plan, workers
from infmoe.reproduce.arms import arm_named
from infmoe.reproduce.command import describe_arms, describe_plan, only, repeats, run_request, smoke_settings
from infmoe.reproduce.plan import Group, RunSpec
from infmoe.train.config import apply_overrides


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": None}, "give --corpus FILES to train on, or --data DIR"),
        ({"corpus": "x"}, "one of the two"),
        ({"launch": '"accelerate launch'}, "--launch '\"accelerate launch' is no command (No closing quotation)"),
        ({"launch": " "}, "--launch is empty"),
        ({"hours": float("nan")}, "--hours nan is no time to stop after"),
        ({"hours": 0.0}, "--hours 0 is no time to stop after"),
        ({"hours": -1.0}, "--hours -1 is no time to stop after"),
        ({"name": "table4"}, "unknown table or figure 'table4'"),
        ({"scale": "huge"}, "unknown scale 'huge'; known: medium, small, tiny"),
        ({"name": "figure4", "arms": "moe"}, "figure4 trains no arms: leave --arms out"),
        ({"arms": "moe16,, infinity"}, "unknown arm ''; known: infinity, moe16"),
        ({"scale": "small", "data": None, "corpus": "x"}, "trains on prepared data: give --data DIR"),
        ({"scale": "small", "data": None, "corpus": "x"}, "--subset sample-350BT"),  # its longest run has 100B
        ({"name": "table5", "scale": "medium", "data": None, "corpus": "x"}, "--subset sample-350BT"),
    ],
)
def test_bad_requests_name_the_fix(request_, changes, words):
    with pytest.raises(InfMoEError) as error:
        run_request(dataclasses.replace(request_, **changes))
    assert words in str(error.value)


def test_several_workers_are_refused_where_there_are_no_locks(request_, monkeypatch):
    monkeypatch.setattr(command, "LOCKS", False)
    monkeypatch.setattr(workers, "start_workers", lambda *rest: pytest.fail("started"))
    with pytest.raises(InfMoEError, match="leave --jobs out"):
        run_request(dataclasses.replace(request_, jobs=2))


def test_data_that_is_read_more_than_once_is_said(mini, mini_data):
    tokens = Manifest.read(mini_data).splits["train"].tokens
    assert repeats(mini_data, [Group(("infinity",), tokens, (1, 1))]) is None
    note = repeats(mini_data, [Group(("moe",), 10, (1, 1)), Group(("infinity",), 2 * tokens, (1, 1))])
    assert f"has {tokens:,}: they read it 2.0 times" in note


def test_arms_may_be_picked_by_name_and_shown_as_training_commands(request_, in_process, capsys):
    assert run_request(dataclasses.replace(request_, arms="moe16, infinity", dry_run=True)) == 0
    both = [line for line in capsys.readouterr().out.splitlines() if line.startswith("infmoe train tiny/")]
    assert [line.split()[2] for line in both] == ["tiny/infinity", "tiny/moe16"]
    picked = dataclasses.replace(request_, arms=" moe16")
    assert run_request(dataclasses.replace(picked, dry_run=True)) == 0
    listed = capsys.readouterr().out
    assert "infinity" not in listed
    (command,) = [line for line in listed.splitlines() if line.startswith("infmoe train tiny/moe16 --data DIR --out")]
    assert "--set optim.lr=0.002" in command
    assert run_request(picked) == 0
    assert list(runs_of(request_)) == ["moe16-0.001024M-lr0.002-s1"]
    with pytest.raises(InfMoEError, match="unknown arm 'moe61'; did you mean 'moe16'"):
        run_request(dataclasses.replace(request_, arms="infinity,moe61"))
    assert picked.worker_words(request_.data)[-2:] == ["--arms", " moe16"]
    said = dataclasses.replace(request_, arms="moe16, infinity", seeds=2).label
    assert said == "infmoe reproduce table6 --scale tiny --seeds 2 --arms moe16,infinity --data DIR"


def test_a_plan_ends_with_what_it_takes_in_all_and_what_is_left(mini, store):
    arms, passes = ("infinity", "infinity-sandwich"), (1, 2)
    fill(store, dict.fromkeys(arms, 3.5), mini.tokens, seeds=1)
    wanted = [Group(arms, mini.tokens, (2, 2))]
    once = store.runs("infinity", mini.tokens)[0].cost["flops_executed"] * mini.tokens * 3
    # one seed of each arm is trained, and both learning rates of the one that is tuned, at half the length
    tuned = store.runs("infinity", mini.tokens)[0].cost["flops_executed"] * mini.tune_tokens * 3
    second = sum(run.cost["flops_executed"] * mini.tokens * 3 for run in store.runs("infinity-sandwich", mini.tokens))
    left = passes[0] * once + passes[1] * second
    assert describe_plan(store, wanted).splitlines()[-1] == (
        f"in all 6 runs, 0.00512M tokens, {2 * left + 2 * tuned:.2e} FLOPs of training; "
        f"to do 2 runs, 0.002048M tokens, {left:.2e} FLOPs of training"
    )


def test_every_length_and_rate_of_an_arm_has_its_command(mini, store):
    text = describe_arms(store, only(plan.groups("elastic", mini), ["infinity-sandwich-distill"]))
    assert [f"--out runs/infinity-sandwich-distill-{n}M " in text for n in (0.001024, 0.000512)] == [True, True]
    text = describe_arms(store, only(plan.groups("controls", mini), ["infinity", "infinity-lr2x"]))
    rates = {
        line.split("--out runs/")[1].split()[0]: line.split("optim.lr=")[1].split()[0] for line in text.splitlines()
    }
    assert float(rates["infinity-lr2x-0.001024M"]) == 2 * float(rates["infinity-0.001024M"])


def test_the_command_of_a_tuned_arm_names_what_it_starts_from(mini, store):
    text = describe_arms(store, only(plan.groups("elastic", mini), ["infinity-keep4", "infinity-keep4-tuned"]))
    base, tuned = text.splitlines()
    assert "--init" not in base
    (out,) = [word for word in base.split() if word.startswith("runs/")]
    assert f"--out runs/infinity-keep4-tuned-0.000204M --init {out} " in tuned


def test_picking_arms_changes_no_number_of_seeds(mini, store):
    fill(store, {"infinity": 3.0, "moe": 3.2}, mini.tokens, seeds=2)
    (group,) = only([Group(("infinity", "moe"), mini.tokens, (2, 4))], ["moe"])
    assert group.trained == ("moe",)
    assert store.seeds_wanted(group) == 2
    spec = store.runs("moe", mini.tokens)[1].spec
    store.put(spec, fake_values(spec, 3.9))
    assert store.seeds_wanted(group) == 3
    assert [spec.arm.name for spec in store.missing([group])] == ["moe"]


def test_three_steps_of_each_arm(request_, monkeypatch):
    monkeypatch.setitem(plan.EXPERIMENTS, "table6", lambda s: [Group(("infinity",), s.tokens, (1, 1))])
    assert run_request(dataclasses.replace(request_, smoke=True)) == 0
    record = json.loads((request_.out / "tiny" / "smoke-table6.json").read_text())
    assert [row["arm"] for row in record["rows"]] == ["infinity"]
    assert all(len(row["losses"]) == 3 for row in record["rows"])


@pytest.mark.parametrize("scale", ["tiny", "small", "medium"])
def test_three_steps_behind_a_launcher_have_rows_for_many_processes(request_, scale):
    spec = RunSpec(plan.SCALES[scale], arm_named("infinity"), 10**6, 1e-3, 1)
    launched = dataclasses.replace(request_, launch="accelerate launch -m infmoe")
    config = apply_overrides(recipe(spec.recipe), [*spec.overrides(), *smoke_settings(launched)])
    for processes in (1, 2, 8, 64):
        assert config.accumulation(processes) >= 1
    alone = apply_overrides(recipe(spec.recipe), [*spec.overrides(), *smoke_settings(request_)])
    assert alone.batch_tokens == 1024
