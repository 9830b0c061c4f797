"""Zero-shot scoring: against a plain scorer, against lm-eval's own model, over seeds and dials."""

import json
import random

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

pytest.importorskip("lm_eval", reason="the `eval` extra is not installed")

from zero_shot_helpers import (
    BENCH,
    model_of,
    opened_with,
    plain_score,
    plain_text_score,
    raw_items,
    requests,
)

from infmoe.cli import main
from infmoe.errors import InfMoEError
from infmoe.eval.zero_shot import harness, items, scoring
from infmoe.eval.zero_shot.local import read_local
from infmoe.eval.zero_shot.scoring import Request, score
from infmoe.eval.zero_shot.tasks import columns_named
from infmoe.hf import InfMoEForCausalLM
from infmoe.layers import Routing

WINDOW = 32
STREAM = 2736004131648271985


FFNS = {"dense": {}, "infinity": {}, "moe": {"intermediate_size": 96}, "switch": {}}


@pytest.mark.parametrize("ffn", FFNS)
def test_the_plain_scorer_agrees(ffn):
    model = model_of(ffn, **FFNS[ffn])
    asked = requests()
    found = score(model, asked, seed=3)
    for request, result in zip(asked, found, strict=True):
        expected = plain_score(model, request.context, request.continuation, request.stream, seed=3)
        assert result.log_likelihood == pytest.approx(expected, abs=1e-4 if ffn == "dense" else 1e-3)


@pytest.mark.parametrize("ffn", ["dense", "infinity"])
def test_batch_and_order_change_nothing(ffn):
    model = model_of(ffn)
    asked = requests()
    expected = [s.log_likelihood for s in score(model, asked, batch_size=1)]
    order = list(range(len(asked)))
    random.Random(1).shuffle(order)
    tolerance = 1e-5 if ffn == "dense" else 1e-3
    for batch_size in (7, 32):
        shuffled = score(model, [asked[i] for i in order], batch_size=batch_size)
        for i, result in zip(order, shuffled, strict=True):
            assert result.log_likelihood == pytest.approx(expected[i], abs=tolerance)


def test_an_items_stream_is_its_task_and_its_content():
    """By number, so that a score of today is a score of tomorrow."""

    def stream(task, doc, number=0):
        return harness.stream_of(type("I", (), {"task_name": task, "doc": doc, "doc_id": number}))

    assert stream("boolq", {"query": "q", "gold": 1}) == STREAM
    assert stream("boolq_local", {"gold": 1, "query": "q"}, 7) == STREAM
    others = [stream("arc_easy", {"query": "q", "gold": 1}), stream("boolq", {"query": "q", "gold": 0})]
    assert len({STREAM, *others}) == 3


def test_a_row_takes_no_more_branches_than_it_has_room_for():
    many = [Request((1, 2), tuple(range(3, 3 + WINDOW)), 1) for _ in range(20)]
    rows = scoring._rows(many, WINDOW)
    assert sum(len(row.branches) for row in rows) == 20
    assert 4 <= len(rows) <= 7
    assert max(row.length for row in rows) <= scoring._MAX_WINDOWS * WINDOW
    assert len({row.trunk for row in rows}) == 1


@pytest.mark.parametrize("ffn", ["dense", "infinity"])
def test_contexts_that_begin_alike_run_once(ffn):
    """WinoGrande's two sentences differ in a name; what stands before it is one trunk."""
    model = model_of(ffn)
    shared = tuple(range(1, 13))
    alike = [Request((*shared, *middle), (7, 8, 9), 5) for middle in ((20,), (21, 22), ())]
    apart = [Request(context, (7, 8), 6) for context in ((1, 2, 30, 31, 32), (1, 2, 40, 41, 42))]
    long = [Request((*range(40), name), (7,), 8) for name in (50, 51)]  # cut to the window, still alike
    asked = [*alike, *apart, *long]
    rows = scoring._rows(asked, WINDOW)
    assert [(len(row.trunk), len(row.branches)) for row in rows] == [(12, 3), (5, 1), (5, 1), (31, 2)]
    for request, result in zip(asked, score(model, asked, seed=2), strict=True):
        expected = plain_score(model, request.context, request.continuation, request.stream, seed=2)
        assert result.log_likelihood == pytest.approx(expected, abs=1e-4 if ffn == "dense" else 1e-3)


def test_the_seed_is_part_of_a_sampled_score_and_of_no_other():
    model, asked = model_of("infinity"), requests(8)
    by_seed = [[s.log_likelihood for s in score(model, asked, seed=seed)] for seed in (0, 0, 1)]
    assert by_seed[0] == by_seed[1]
    assert by_seed[0] != by_seed[2]
    mu = Routing(mode="mu")
    assert score(model, asked, mu, seed=0) == score(model, asked, mu, seed=1)


def test_the_dials_reach_the_model():
    model, asked = model_of("infinity"), requests(8)
    for routing in (Routing(num_samples=4), Routing(keep_ratio=0.5), Routing(mode="mu")):
        found = score(model, asked, routing)
        assert found != score(model, asked)
        first = asked[0]
        expected = plain_score(model, first.context, first.continuation, first.stream, routing=routing)
        assert found[0].log_likelihood == pytest.approx(expected, abs=1e-3)


def test_logits_are_made_for_a_few_positions_of_the_answers_at_a_time(monkeypatch):
    model, asked = model_of("dense"), requests()
    expected = score(model, asked)
    seen = []
    model.lm_head.register_forward_hook(lambda head, given, made: seen.append(tuple(made.shape)))
    assert score(model, asked) == expected
    whole = sum(rows for rows, _ in seen)
    assert whole == sum(len(request.continuation) for request in asked)
    seen.clear()
    monkeypatch.setattr(scoring, "_MAX_LOGITS", 320 * 5 + 319)
    few = score(model, asked)
    assert max(seen) == (5, 320)
    assert sum(rows for rows, _ in seen) == whole
    for one, other in zip(few, expected, strict=True):
        assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-5)
        assert one.greedy == other.greedy


def test_the_mask_is_made_where_the_model_is():
    branch_BT = torch.tensor([[-1, -1, 0, 1, -2]], device="meta")
    assert scoring._mask(branch_BT, torch.float32).device.type == "meta"
    seen = scoring._mask(torch.tensor([[-1, -1, 0, 1, -2]]), torch.float32)[0, 0] == 0
    rows = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [0, 0, 0, 0, 1]]
    assert seen.int().tolist() == rows


def test_greedy_is_what_generation_would_choose():
    model = model_of("dense")
    context = (5, 6, 7)
    with torch.no_grad():
        made = model.generate(torch.tensor([context]), max_new_tokens=4, do_sample=False, pad_token_id=0)[
            0, 3:
        ].tolist()
    other = [*made[:-1], (made[-1] + 1) % 320]
    found = score(model, [Request(context, tuple(made), 0), Request(context, tuple(other), 0)])
    assert [s.greedy for s in found] == [True, False]


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request((), (1,), 0), "a request has an empty context"),
        (Request((1,), (), 0, "boolq, item 'Cats'"), "boolq, item 'Cats' has an empty context or continuation"),
    ],
)
def test_what_can_t_be_scored_is_named(request_, words):
    with pytest.raises(InfMoEError) as error:
        score(model_of("dense"), [request_])
    assert words in str(error.value)


# ---- Through lm-eval ------------------------------------------------------------------------------------------------


def check_against_plain(model, tiny_run, folder, limit, tolerance):
    """Items, likelihoods and accuracy of every file, read by the tests' own readers."""
    lm = harness.InfMoELM(opened_with(model, tiny_run), batch_size=8)
    checked = 0
    for column in columns_named("paper", local=True):
        result = harness.run_task(lm, harness.load_task(harness.local_config(read_local(column, folder)), limit))
        raw = raw_items(column.task, folder / column.file)
        (samples,) = result["samples"].values()
        right = []
        for sample in samples:
            pairs, gold = raw[sample["doc_id"]]
            stream = harness.stream_of(type("I", (), {"task_name": column.task, "doc": sample["doc"], "doc_id": 0}))
            expected = [plain_text_score(model, lm.tokenizer, *pair, stream) for pair in pairs]
            found = [response[0] for response in sample["filtered_resps"]]
            assert found == pytest.approx(expected, abs=tolerance), (column.name, sample["doc_id"])
            assert items._item(sample, column).gold == gold
            right.append(max(range(len(found)), key=lambda i: found[i]) == gold)
            checked += 1
        (figures,) = result["results"].values()
        assert figures["acc,none"] == pytest.approx(sum(right) / len(right))
    return checked


@pytest.mark.parametrize(("ffn", "tolerance"), [("dense", 1e-4), ("infinity", 1e-3)])
def test_every_task_agrees_with_the_plain_scorer(ffn, tolerance, tiny_run, files):
    assert check_against_plain(model_of(ffn), tiny_run, files, None, tolerance) == 63


@pytest.mark.slow
@pytest.mark.skipif(not BENCH.is_dir(), reason="the real task files are not here")
@pytest.mark.parametrize(("ffn", "tolerance"), [("dense", 1e-4), ("infinity", 1e-3)])
def test_200_real_items_of_every_task_agree_with_the_plain_scorer(ffn, tolerance, tiny_run):
    assert check_against_plain(model_of(ffn, max_position_embeddings=96), tiny_run, BENCH, 200, tolerance) == 1400


def test_lm_evals_own_model_scores_gpt2_the_same(tiny_run, files):
    from lm_eval.models.huggingface import HFLM

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=2, n_positions=WINDOW, initializer_range=0.2)
    gpt2 = GPT2LMHeadModel(config).eval()
    ours = harness.InfMoELM(opened_with(InfMoEForCausalLM.from_gpt2(gpt2).eval(), tiny_run))
    tokenizer: PreTrainedTokenizerFast = ours.tokenizer
    gpt2.config.eos_token_id = ours.eot_token_id
    theirs = HFLM(pretrained=gpt2, tokenizer=tokenizer, max_length=WINDOW, batch_size=4)
    for column in columns_named("paper", local=True):
        config = harness.local_config(read_local(column, files))
        found, expected = (
            [
                s["filtered_resps"]
                for s in next(iter(harness.run_task(lm, harness.load_task(config))["samples"].values()))
            ]
            for lm in (ours, theirs)
        )
        for mine, its in zip(found, expected, strict=True):
            assert [r[0] for r in mine] == pytest.approx([r[0] for r in its], abs=1e-4), column.name
            assert [r[1] for r in mine] == [r[1] for r in its]


def test_empty_contexts_rolling_windows_and_generation(tiny_run):
    from lm_eval.api.instance import Instance

    model = model_of("infinity")
    lm = harness.InfMoELM(opened_with(model, tiny_run))

    def instance(kind, *arguments):
        return Instance(request_type=kind, doc={}, arguments=arguments, idx=0, metadata=("t", 4, 1))

    (found,) = lm.loglikelihood([instance("loglikelihood", "", "ab cde")])
    ids = lm.tok_encode("ab cde")
    stream = harness.stream_of(instance("loglikelihood", "", "ab cde"))
    assert found[0] == pytest.approx(plain_score(model, [lm.eot_token_id], ids, stream), abs=1e-3)
    text = "ab cde fgh " * 30
    (total,) = lm.loglikelihood_rolling([instance("loglikelihood_rolling", text)])
    assert -12.0 * len(lm.tok_encode(text)) < total < 0
    options = {"until": [" "], "max_gen_toks": 5}
    seen = []
    original = model.generate
    model.generate = lambda ids, **rest: seen.append(ids.shape[1]) or original(ids, **rest)
    (made,) = lm.generate_until([instance("generate_until", "ab cde " * 30, options | {"max_gen_toks": 256})])
    assert " " not in made
    assert seen == [16]  # half of the window is left to the prompt


def test_a_checkpoint_over_its_dials(tiny_run, files, tmp_path, capsys):
    words = ["evaluate", tiny_run.run, "--tasks", "paper", "--tasks-dir", files, "--num-samples", "1,2", "--seeds", 2]
    words += ["--out", tmp_path / "out", "--per-item", tmp_path / "items.jsonl", "--limit", 5]
    assert main([str(word) for word in words]) == 0
    out = capsys.readouterr().out
    assert "SAT-en" in out
    assert "RACE" not in out
    assert "paper, small infinity" in out
    result = json.loads((tmp_path / "out" / "zero_shot.json").read_text())
    assert [row["label"] for row in result["points"]] == ["K=1 keep=1/4", "K=2 keep=1/4"]
    lines = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    assert len(lines) == 7 * 2 * 2 * 5
    for place in (tiny_run.checkpoint, tiny_run.checkpoint / "items"):
        words[words.index("--per-item") + 1] = place / "items.jsonl"
        assert main([str(word) for word in words]) == 2
        assert "would not verify any more: choose another --per-item" in capsys.readouterr().err
        assert not (tiny_run.checkpoint / "items").exists()
    first = result["points"][0]["tasks"]["ARC-e"]
    mine = [i for i in lines if (i["task"], i["point"], i["seed"]) == ("ARC-e", "K=1 keep=1/4", 0)]
    margins = [
        i["log_likelihoods"][i["gold"]] - (sum(i["log_likelihoods"]) - i["log_likelihoods"][i["gold"]]) / 3
        for i in mine
    ]
    assert first["margin"] == pytest.approx(sum(margins) / 5)
    assert first["acc"] == sum(max(i["log_likelihoods"]) == i["log_likelihoods"][i["gold"]] for i in mine) / 5
    assert len(first["acc_by_seed"]) == 2
    assert "margin_change" not in first
    second = result["points"][1]["tasks"]["ARC-e"]
    assert second["margin_change"] == pytest.approx(second["margin"] - first["margin"])
    assert first["acc_seed_sd"] is not None
    assert result["unfinished"] == []
    assert (tmp_path / "out" / "zero_shot.png").stat().st_size > 10_000
    # the spread over seeds is in the table, not in the JSON alone
    text = out.splitlines()
    place = next(i for i, line in enumerate(text) if line.startswith("K=2 keep=1/4"))
    (accuracy,) = [line for line in text[place : place + 5] if line.startswith("  over seeds, accuracy")]
    values = [100 * value for value in result["points"][1]["tasks"]["BoolQ"]["acc_by_seed"]]
    assert accuracy.split()[3:6] == [f"{min(values):.1f}", "to", f"{max(values):.1f}"]
    means = [100 * value for value in result["points"][1]["average_by_seed"]]
    assert accuracy.split()[-3:] == [f"{min(means):.1f}", "to", f"{max(means):.1f}"]
    (margin,) = [line for line in text[place : place + 5] if line.startswith("  over seeds, margin")]
    values = result["points"][1]["tasks"]["BoolQ"]["margin_by_seed"]
    assert values[0] != values[1]
    assert margin.split()[3:6] == [f"{min(values):+.3f}", "to", f"{max(values):+.3f}"]
