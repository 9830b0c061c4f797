"""Zero-shot tasks: names, files, limits, options, and what is said where something is wrong."""

import dataclasses
import json
import logging
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval", reason="the `eval` extra is not installed")

from zero_shot_helpers import (
    BENCH,
    model_of,
    opened_with,
    requests,
)

from infmoe.cli import main
from infmoe.errors import InfMoEError
from infmoe.eval.zero_shot import figures as figures_of
from infmoe.eval.zero_shot import harness, items, run
from infmoe.eval.zero_shot.local import read_local
from infmoe.eval.zero_shot.scoring import score
from infmoe.eval.zero_shot.tasks import ALL, COLUMNS, SAT, columns_named


def test_the_columns_are_the_papers():
    from infmoe.paper import TABLE1_TASKS

    assert tuple(column.name for column in COLUMNS) == TABLE1_TASKS
    local = columns_named("paper", local=True)
    assert local[-1] is SAT
    assert [c.name for c in columns_named("paper", local=False)][-1] == "RACE-high"
    assert columns_named("arc_easy, boolq", local=True) == [ALL["arc_easy"], ALL["boolq"]]
    with pytest.raises(InfMoEError, match="unknown task 'arc_esy'; did you mean 'arc_easy'"):
        columns_named("arc_esy", local=True)


def test_prompts_are_lm_evals(files):
    boolq = read_local(ALL["boolq"], files).docs[0]
    assert boolq["contexts"][0].endswith("?\nAnswer:")
    assert not boolq["contexts"][0].startswith("Passage")
    assert boolq["continuations"] == [" no", " yes"]
    arc = read_local(ALL["arc_easy"], files).docs[0]
    assert arc["contexts"][0].startswith("Question: ")
    assert arc["contexts"][0].endswith("\nAnswer:")
    winogrande = read_local(ALL["winogrande"], files).docs[0]
    assert len(winogrande["contexts"]) == 2
    assert len(winogrande["continuations"]) == 1


def test_repeated_and_empty_items_are_counted(tmp_path):
    docs = [
        {"query": "a", "choices": ["x", "y", "x", "z"], "gold": 2},
        {"query": "b", "choices": ["x", "y"], "gold": 1},
        {"query": "b", "choices": ["x", "y"], "gold": 1},
        {"query": "c", "choices": ["x", " "], "gold": 0},
    ]
    (tmp_path / "openbook_qa.jsonl").write_text("\n".join(map(json.dumps, docs)))
    task = read_local(ALL["openbookqa"], tmp_path)
    assert task.notes == {"repeated answers, scored once": 1, "repeated items": 1, "empty, left out": 1}
    assert task.docs[0]["choices"] == ["x", "y", "z"]
    assert task.docs[0]["gold"] == 0
    assert len(task.docs) == 3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot read"),
        ("", "holds no items"),
        ('{"query": "a"', ":1: no JSON"),
        ("[1]", ":1: no JSON object"),
        ('{"query": "a", "gold": 0}', ":1: no item of OBQA ('choices')"),
        ('{"query": "a", "choices": ["x", "y"], "gold": 2}', "label 2 is none of the 2 answers"),
        ('{"query": "a", "choices": ["x", "y"], "gold": true}', "label True is none"),
        ('{"query": "a", "choices": ["x"], "gold": 0}', "two answers at least"),
        ('{"query": "a", "choices": ["x", 3], "gold": 0}', "no item of OBQA"),
        (b"\xff\xfe", "is not UTF-8"),
        ('{"query": null, "choices": ["x", "y"], "gold": 0}', "query must be a text"),
        ('{"query": "a", "choices": "xy", "gold": 0}', "choices a list"),
        ('{"query": "a", "choices": ["x", "x"], "gold": 0}', "all answers are the same"),
    ],
)
def test_a_bad_file_is_one_line(content, words, tmp_path, tiny_run, capsys):
    path = tmp_path / "openbook_qa.jsonl"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["evaluate", str(tiny_run.run), "--tasks", "openbookqa", "--tasks-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(path) in error
    assert words in error


@pytest.mark.parametrize(
    ("lines", "words"), [(["a", "1", "b", "c", "d"], "no multiple of 6"), (["a", "x", "b", "c", "d", "e"], "no label")]
)
def test_a_bad_hellaswag_file_is_named(lines, words, tmp_path):
    (tmp_path / "hellaswag_val.txt").write_text("\n".join(lines))
    with pytest.raises(InfMoEError, match=words):
        read_local(ALL["hellaswag"], tmp_path)


def test_a_task_of_the_hub_that_can_t_be_reached_is_one_line(tiny_run, capsys, monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        for name in ("lm_eval", "datasets", "huggingface_hub.utils._http"):  # each would print a line of its own
            assert not logging.getLogger(name).isEnabledFor(logging.WARNING), name
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    assert main(["evaluate", str(tiny_run.run), "--tasks", "openbookqa"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "give --tasks-dir for local files" in error


@pytest.mark.parametrize("with_out", [True, False])
def test_results_so_far_are_shown_and_kept(with_out, tiny_run, files, tmp_path, monkeypatch, capsys):
    original = run.score_items

    def fails_at_the_third(model, column, *rest):
        if column.name == "WinoGrande" and model.point.num_samples == 2:
            raise InfMoEError("the Hub\nis gone")
        return original(model, column, *rest)

    monkeypatch.setattr(run, "score_items", fails_at_the_third)
    words = ["evaluate", tiny_run.run, "--tasks", "paper", "--tasks-dir", files, "--limit", 2, "--num-samples", "1,2"]
    words += ["--out", tmp_path / "out"] if with_out else []
    assert main([str(word) for word in words]) == 2
    out, err = capsys.readouterr()
    assert err.splitlines()[-1] == "error: the Hub is gone"
    head = next(line for line in out.splitlines() if "BoolQ" in line)
    assert head.split() == ["BoolQ", "HellaSwag", "WinoGrande", "mean"]
    (first, second) = [line for line in out.splitlines() if line.startswith(("K=1", "K=2"))]
    assert first.count("±") == 3
    assert second.count("±") == 2
    assert "–" in second
    assert "note: not scored, or not at every point: WinoGrande, ARC-e, ARC-c, OBQA, SAT-en" in out
    if with_out:
        assert (tmp_path / "out" / "zero_shot.png").stat().st_size > 10_000  # of what was finished
        kept = json.loads((tmp_path / "out" / "zero_shot.json").read_text())
        assert list(kept["points"][1]["tasks"]) == ["BoolQ", "HellaSwag"]
        assert list(kept["points"][0]["tasks"]) == ["BoolQ", "HellaSwag", "WinoGrande"]
        assert kept["unfinished"][0] == "WinoGrande"
        for row in kept["points"]:
            mean = (row["tasks"]["BoolQ"]["acc"] + row["tasks"]["HellaSwag"]["acc"]) / 2
            assert row["average"] == pytest.approx(mean)


def test_a_picture_that_fails_does_not_hide_what_failed(tiny_run, files, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "score_items", lambda *rest, original=run.score_items: next(steps)(original, *rest))
    steps = iter([lambda original, *rest: original(*rest), lambda *rest: raised(InfMoEError("the Hub is gone"))])

    def raised(error):
        raise error

    said = []
    with pytest.raises(InfMoEError, match="the Hub is gone"):
        run.evaluate_tasks(
            tiny_run.run,
            run.Settings("arc_easy,boolq", files, 4),
            out=tmp_path,
            say=said.append,
            show=lambda result: raised(OSError("no space left")),
        )
    assert said[-1] == "the results so far could not be written or drawn: no space left"
    assert json.loads((tmp_path / "zero_shot.json").read_text())["points"][0]["average"] >= 0


def test_a_failure_within_the_first_task_shows_the_points_before_it(tiny_run, files, tmp_path, monkeypatch, capsys):
    original = run.score_items

    def fails_at_the_second(model, column, *rest):
        if model.point.num_samples == 2:
            raise InfMoEError("the Hub is gone")
        return original(model, column, *rest)

    monkeypatch.setattr(run, "score_items", fails_at_the_second)
    words = ["evaluate", tiny_run.run, "--tasks", "paper", "--tasks-dir", files, "--limit", 2, "--num-samples", "1,2"]
    assert main([str(word) for word in [*words, "--out", tmp_path]]) == 2
    out, err = capsys.readouterr()
    assert err.splitlines()[-1] == "error: the Hub is gone"
    assert next(line for line in out.splitlines() if line.startswith("K=1")).count("±") == 1
    assert not any(line.startswith("K=2") for line in out.splitlines())
    kept = json.loads((tmp_path / "zero_shot.json").read_text())
    assert [list(row["tasks"]) for row in kept["points"]] == [["BoolQ"], []]


def test_a_damaged_file_is_found_before_anything_is_scored(tiny_run, files, tmp_path, monkeypatch, capsys):
    shutil.copytree(files, tmp_path / "files")
    (tmp_path / "files" / "winogrande.jsonl").write_text("{")
    monkeypatch.setattr(run, "score_items", lambda *rest: pytest.fail("scored"))
    words = ["evaluate", str(tiny_run.run), "--tasks", "paper", "--tasks-dir", str(tmp_path / "files")]
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "winogrande.jsonl:1: no JSON" in err


@pytest.mark.parametrize("option", ["--tasks-dir", "--data-dir"])
def test_tasks_are_scored_by_the_model_as_it_was_opened(option, tiny_run, files, capsys):
    words = ["evaluate", str(tiny_run.run), "--tasks", "arc_easy", option, str(files), "--limit", "4", "--json"]
    plain, other = [], []
    for result, how in ((plain, []), (other, ["--dtype", "bfloat16", "--device", "cpu", "--set", "noise_seed=3"])):
        assert main([*words, *how]) == 0
        result.append(json.loads(capsys.readouterr().out))
    assert (plain[0]["dtype"], plain[0]["overrides"]) == ("float32", [])
    assert (other[0]["device"], other[0]["dtype"], other[0]["overrides"]) == ("cpu", "bfloat16", ["noise_seed=3"])
    margins = [result["points"][0]["tasks"]["ARC-e"]["margin"] for (result,) in (plain, other)]
    assert margins[0] != margins[1]


@pytest.mark.parametrize("option", ["--tasks-dir", "--limit", "--seeds", "--per-item", "--out"])
def test_options_of_tasks_need_tasks(option, tiny_run, capsys):
    assert main(["evaluate", str(tiny_run.run), option, "3"]) == 2
    assert f"{option} goes with --tasks" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("--data", "x"), ("--windows", "7")])
def test_options_of_the_loss_are_refused_with_tasks(option, value, tiny_run, capsys):
    assert main(["evaluate", str(tiny_run.run), "--tasks", "paper", option, value]) == 2
    assert f"{option} is for the held-out loss" in capsys.readouterr().err


def test_a_diverged_model_is_named_and_not_scored():
    model = model_of("dense")
    torch.nn.init.constant_(model.transformer.h[0].ln_1.weight, float("nan"))
    with pytest.raises(InfMoEError, match="has no finite log-likelihood"):
        score(model, requests(2))


def test_a_switch_model_with_a_capacity_is_refused(tiny_run):
    model = model_of("switch", capacity_factor=1.0)
    with pytest.raises(InfMoEError, match="drops tokens by what stands beside them"):
        harness.InfMoELM(opened_with(model, tiny_run))
    with pytest.raises(InfMoEError, match="unknown model argument 'capacity_factor'"):
        harness.InfMoELM(opened_with(model, tiny_run), capacity_factor="null")


def test_lm_evals_command_line_opens_with_a_type_and_options(tiny_run, tmp_path):
    from lm_eval.api.registry import get_model

    saved = tmp_path / "switch"
    model_of("switch", capacity_factor=1.0).save_pretrained(saved)
    shutil.copyfile(tiny_run.checkpoint / "tokenizer.json", saved / "tokenizer.json")
    make = get_model("infmoe").create_from_arg_string
    with pytest.raises(InfMoEError, match=r"--model_args pretrained=DIR,capacity_factor=null"):
        make(f"pretrained={saved}")
    made = make(f"pretrained={saved},capacity_factor=null,balance_loss_weight=0.5,dtype=bfloat16")
    assert made.model.config.capacity_factor is None
    assert made.model.config.balance_loss_weight == 0.5
    assert made.model.dtype == torch.bfloat16
    with pytest.raises(InfMoEError, match="option of ffn='switch'"):
        make(f"pretrained={saved},rank_damping=0.5")
    with pytest.raises(InfMoEError, match="unknown dtype 'float16'"):
        make(f"pretrained={saved},dtype=float16")


def test_accuracy_per_character_is_lm_evals(tiny_run, files):
    lm = harness.InfMoELM(opened_with(model_of("dense"), tiny_run))
    for column in columns_named("arc_easy,hellaswag,openbookqa", local=True):
        result = harness.run_task(lm, harness.load_task(harness.local_config(read_local(column, files))))
        (figures,), (samples,) = result["results"].values(), result["samples"].values()
        scored = [items._item(sample, column) for sample in samples]
        assert sum(item.right for item in scored) / len(scored) == pytest.approx(figures["acc,none"])
        assert sum(item.right_norm for item in scored) / len(scored) == pytest.approx(figures["acc_norm,none"])


def test_lm_evals_own_command_line_runs(tiny_run, files, tmp_path):
    (tmp_path / "mini.yaml").write_text(
        f"task: mini\ndataset_path: json\ndataset_kwargs:\n  data_files: {files}/openbook_qa.jsonl\n"
        "test_split: train\noutput_type: multiple_choice\ndoc_to_text: query\ndoc_to_choice: choices\n"
        "doc_to_target: gold\nmetric_list:\n  - metric: acc\n"
    )
    words = [sys.executable, "-m", "infmoe.eval.lm_eval", "--model", "infmoe", "--tasks", "mini"]
    words += ["--include_path", str(tmp_path), "--limit", "4"]
    words += ["--model_args", f"pretrained={tiny_run.run},num_samples=2,keep_ratio=0.25"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "mini" in done.stdout


def test_lm_evals_command_line_knows_our_models(tiny_run, capsys, monkeypatch):
    from lm_eval.api.registry import get_model

    made = get_model("infmoe").create_from_arg_string(
        f"pretrained={tiny_run.run},num_samples=3,keep_ratio=0.125,seed=5"
    )
    assert (made.point.num_samples, made.point.keep_ratio, made.seed) == (3, 0.125, 5)
    with pytest.raises(InfMoEError, match="unknown model argument 'num_sample'; did you mean 'num_samples'"):
        get_model("infmoe").create_from_arg_obj({"pretrained": str(tiny_run.run), "num_sample": "1"})
    with pytest.raises(InfMoEError, match="one value for each dial"):
        get_model("infmoe").create_from_arg_obj({"pretrained": str(tiny_run.run), "num_samples": "1,2"})


def test_the_page_says_what_the_code_says():
    page = (Path(__file__).parents[2] / "docs" / "zero_shot.md").read_text()
    for c in ALL.values():
        error = 100 * (c.chance * (1 - c.chance) / c.items) ** 0.5
        file = f"`{c.file}`" if c.file else "none"
        row = (
            f"| {c.name} | `{c.task}` | {c.version} | {c.metric} | {c.chance:.0%} | {c.items} | {error:.1f} | {file} |"
        )
        assert row.replace("%", " %", 1) in page, row


@pytest.mark.skipif(not BENCH.is_dir(), reason="the real task files are not here")
@pytest.mark.parametrize("column", [c for c in ALL.values() if c.file], ids=lambda c: c.name)
def test_the_real_files_have_the_items_that_the_table_says(column):
    task = read_local(column, BENCH)
    assert len(task.docs) == column.items
    assert task.notes.get("repeated answers, scored once", 0) == {"arc_easy": 7, "arc_challenge": 4}.get(column.task, 0)


def test_per_character_figures_are_there_where_lm_eval_has_them(tiny_run, files):
    lm = harness.InfMoELM(opened_with(model_of("dense"), tiny_run))
    for column in columns_named("paper", local=True):
        config = harness.local_config(read_local(column, files))
        scored = items.score_items(lm, column, harness.load_task(config))
        figures = figures_of.summary(column, [scored], scored, "file", 1.0)
        has = "acc_norm,none" in next(iter(harness.run_task(lm, harness.load_task(config))["results"].values()))
        assert has == column.per_char == (figures["acc_norm"] is not None) == (figures["margin_norm"] is not None)


def test_a_limit_takes_a_random_part_that_is_the_same_for_all(tiny_run, files, tmp_path):
    docs = [{"query": f"item {i}", "gold": i % 3} for i in range(400)]
    chosen = harness.choose(docs, 100)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 100
    assert 150 < statistics.fmean(chosen) < 250
    # the same items wherever they stand, and fewer are a part of more
    assert {399 - i for i in harness.choose(docs[::-1], 100)} == set(chosen)
    assert set(harness.choose(docs, 10)) < set(chosen)
    assert harness.choose(docs, 999) == list(range(400))
    for limit in (1, 0, -1):
        with pytest.raises(InfMoEError, match="two items of each task or more"):
            harness.load_task("boolq", limit)

    lm = harness.InfMoELM(opened_with(model_of("dense"), tiny_run))
    (column,) = columns_named("arc_easy", local=True)
    task = read_local(column, files)
    config = harness.local_config(task)
    every = {item.number: item for item in items.score_items(lm, column, harness.load_task(config)).items}
    part = items.score_items(lm, column, harness.load_task(config, 4)).items
    assert [item.number for item in part] == harness.choose(task.docs, 4)
    for item in part:  # each is the item of its number
        assert item.log_likelihoods == pytest.approx(every[item.number].log_likelihoods, abs=1e-5)
        assert item.gold == every[item.number].gold


def test_items_longer_than_the_window_are_counted(tiny_run, files):
    lm = harness.InfMoELM(opened_with(model_of("dense"), tiny_run), batch_size=4)
    (column,) = columns_named("arc_easy", local=True)
    task = read_local(column, files)
    from lm_eval.api.instance import Instance

    from infmoe.eval.zero_shot.items import score_items

    scored = score_items(lm, column, harness.load_task(harness.local_config(task)))
    pairs = [[(doc["contexts"][0], answer) for answer in doc["continuations"]] for doc in task.docs]
    lengths = [max(len(lm.tok_encode(context + answer)) for context, answer in item) for item in pairs]
    assert scored.cut == sum(length > lm.model.config.max_position_embeddings + 1 for length in lengths) > 0
    twice = dataclasses.replace(task, docs=[*task.docs, *task.docs])
    assert score_items(lm, column, harness.load_task(harness.local_config(twice))).cut == 2 * scored.cut
    (column,) = columns_named("winogrande", local=True)
    short = harness.load_task(harness.local_config(read_local(column, files)))
    assert score_items(lm, column, short).cut == 0  # emptied for each task

    def cut(context):
        lm.cut_streams.clear()
        answers = [(context, " b"), (context, " cde")]
        made = [
            Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i, metadata=("t", 4, 1))
            for i, pair in enumerate(answers)
        ]
        lm.loglikelihood(made)
        return len(lm.cut_streams)

    window = lm.model.config.max_position_embeddings
    words = next(n for n in range(1, 999) if len(lm.tok_encode("ab " * n + "b")) > window + 1)
    assert [cut("a"), cut("ab " * 60 * words)] == [0, 1]  # an item, not its answers


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ({"seed": "abc"}, "seed must be an integer of at least 0"),
        ({"batch_size": "x"}, "batch_size must be an integer of at least 1"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"batch_size": -1}, "batch_size must be"),
    ],
)
def test_model_arguments_that_mean_nothing_are_refused(tiny_run, argument, named):
    with pytest.raises(InfMoEError, match=named):
        harness.InfMoELM(opened_with(model_of("dense"), tiny_run), **argument)


def test_sat_needs_its_file_and_a_tokenizer_must_be_whole(tiny_run, files, tmp_path, capsys):
    assert main(["evaluate", str(tiny_run.run), "--tasks", "sat_en"]) == 2
    assert "sat_en has a local file only" in capsys.readouterr().err
    copied = shutil.copytree(tiny_run.checkpoint, tmp_path / "copied")
    (copied / "tokenizer.json").write_text("{")
    assert main(["evaluate", str(copied), "--tasks", "arc_easy", "--tasks-dir", str(files)]) == 2
    error = capsys.readouterr().err
    assert "tokenizer.json is damaged" in error
    assert len(error.strip().splitlines()) == 1
