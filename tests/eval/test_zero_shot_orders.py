"""Whole tasks at any batch size and in any order; mask units that differ from the plain scorer's, counted."""

import json
import random
import shutil

import pytest
import torch
from helpers import Flips, record_selections, replay_selections
from zero_shot_helpers import BENCH, model_of, opened_with, requests

pytest.importorskip("lm_eval", reason="the `eval` extra is not installed")

from infmoe.eval.zero_shot import harness, scoring
from infmoe.eval.zero_shot.items import score_items
from infmoe.eval.zero_shot.local import read_local
from infmoe.eval.zero_shot.tasks import columns_named
from infmoe.layers import NoiseKey, Routing
from infmoe.layers.point import Point

SAMPLED = Point(num_samples=4, keep_ratio=0.25)
# model, point, tolerance: what a unit that flips may move
CASES = [("dense", Point(), 1e-5), ("infinity", SAMPLED, 1e-3)]


@pytest.fixture(scope="module")
def shuffled(files):
    """The same items, in another order in their files."""
    folder = files.parent / "shuffled"
    shutil.copytree(files, folder)
    draw = random.Random(3)
    for path in folder.iterdir():
        lines = path.read_text().splitlines()
        step = 6 if path.suffix == ".txt" else 1
        groups = [lines[i : i + step] for i in range(0, len(lines), step)]
        draw.shuffle(groups)
        path.write_text("".join(f"{line}\n" for group in groups for line in group))
    return folder


def scored(lm, folder):
    """(task, the item's content) -> the item."""
    found = {}
    for column in columns_named("paper", local=True):
        task = read_local(column, folder)
        for doc, item in zip(
            task.docs, score_items(lm, column, harness.load_task(harness.local_config(task))).items, strict=True
        ):
            found[column.name, json.dumps(doc)] = item
    return found


def close_call(item, tolerance):
    """Whether the two likeliest answers lie so near to each other that rounding may swap them."""
    first, second = sorted(item.log_likelihoods, reverse=True)[:2]
    return first - second <= 2 * tolerance


@pytest.mark.parametrize(("ffn", "point", "tolerance"), CASES)
def test_whole_tasks_score_the_same_at_any_batch_size_and_in_any_order(
    ffn, point, tolerance, tiny_run, files, shuffled, monkeypatch
):
    lm = harness.InfMoELM(opened_with(model_of(ffn), tiny_run), batch_size=1)
    lm.point = point
    expected = scored(lm, files)
    assert len(expected) == 63
    original = harness.score
    draw = random.Random(5)

    def in_any_order(model, asked, *rest, **options):
        order = list(range(len(asked)))
        draw.shuffle(order)
        found = original(model, [asked[i] for i in order], *rest, **options)
        return [found[order.index(i)] for i in range(len(asked))]

    for batch_size in (7, 32):
        lm.rows = batch_size
        for folder, score in ((files, original), (files, in_any_order), (shuffled, original)):
            monkeypatch.setattr(harness, "score", score)
            found = scored(lm, folder)
            assert found.keys() == expected.keys()
            for key, item in found.items():
                assert item.log_likelihoods == pytest.approx(expected[key].log_likelihoods, abs=tolerance), key
                assert item.right == expected[key].right or close_call(item, tolerance), key


def test_another_seed_moves_whole_tasks(tiny_run, files):
    lm = harness.InfMoELM(opened_with(model_of("infinity"), tiny_run))
    lm.point = SAMPLED
    first = scored(lm, files)
    lm.seed = 1
    second = scored(lm, files)
    moved = sum(first[key].log_likelihoods != second[key].log_likelihoods for key in first)
    assert moved == len(first)


def requests_of_tasks(lm, folder, monkeypatch, limit=None):
    """What each task asks for, as token ids."""
    asked = []
    original = harness.score
    with monkeypatch.context() as patch:
        patch.setattr(
            harness, "score", lambda model, given, *r, **o: asked.append(given) or original(model, given, *r, **o)
        )
        for column in columns_named("paper", local=True):
            score_items(lm, column, harness.load_task(harness.local_config(read_local(column, folder)), limit))
    return asked


def compare_units(model, asked, batch_size):
    """Both scorers' masks, unit by unit; with the scorer's masks replayed, the plain one finds the same numbers.

    In the plain path of the layer on both sides: the kernels give no mask away.
    """
    window = model.config.max_position_embeddings
    routing = SAMPLED.routing()
    with record_selections() as recorded:
        found = scoring.score(model, asked, routing, seed=3, batch_size=batch_size)
    rows = sorted(scoring._rows(asked, window), key=lambda row: row.length, reverse=True)
    layers = len(model.transformer.h)
    assert len(recorded) == layers * -(-len(rows) // batch_size)
    total, sums = Flips(), [0.0] * len(asked)
    for number, row in enumerate(rows):
        batch, b = divmod(number, batch_size)
        at = n = len(row.trunk)
        for branch in row.branches:
            inner = len(branch.tokens) - 1
            places = [*range(n), *range(at, at + inner)]
            at += inner

            def pick(call, batch=batch, b=b, places=places):
                return recorded[batch * layers + call][b : b + 1, places]

            tokens = torch.tensor([[*row.trunk, *branch.tokens[:-1]]])
            key = NoiseKey(seed=3, stream=torch.tensor([row.stream]))
            given = Routing(num_samples=routing.num_samples, keep_ratio=routing.keep_ratio, key=key)
            with torch.no_grad(), replay_selections(recorded, pick) as flips:
                logits = model(input_ids=tokens, routing=given).logits[0, -branch.scored :].double()
            total.flipped += flips.flipped
            total.units += flips.units
            likelihoods = logits.log_softmax(-1)
            scored = branch.tokens[-branch.scored :]
            sums[branch.request] += float(sum(likelihoods[i, token] for i, token in enumerate(scored)))
    for result, plain in zip(found, sums, strict=True):
        assert result.log_likelihood == pytest.approx(plain, abs=2e-5 + 1e-6 * abs(plain))
    return total


@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_hardly_a_unit_differs_from_the_plain_scorers(batch_size, tiny_run, files, monkeypatch):
    model = model_of("infinity")
    lm = harness.InfMoELM(opened_with(model, tiny_run))
    of_tasks = [request for task in requests_of_tasks(lm, files, monkeypatch) for request in task]
    total = compare_units(model, [*of_tasks[::3], *requests(20)], batch_size)
    total.check(max_share=1e-5)
    assert total.units > 10**6


@pytest.mark.slow
@pytest.mark.skipif(not BENCH.is_dir(), reason="the real task files are not here")
def test_hardly_a_unit_differs_over_200_real_items_of_every_task(tiny_run, monkeypatch):
    model = model_of("infinity", max_position_embeddings=96)
    lm = harness.InfMoELM(opened_with(model, tiny_run))
    total = Flips()
    for asked in requests_of_tasks(lm, BENCH, monkeypatch, limit=200):
        assert len({request.stream for request in asked}) == 200
        for start in range(0, len(asked), 200):  # the masks of few requests at a time fit memory
            flips = compare_units(model, asked[start : start + 200], batch_size=16)
            total.flipped += flips.flipped
            total.units += flips.units
    print(f"{total.flipped} of {total.units} units differ")
    total.check(max_share=1e-5)
