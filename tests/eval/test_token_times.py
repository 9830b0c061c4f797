"""Times of single tokens: what is timed, and in which order."""

import io
import sys
import threading

import pytest
import torch
from helpers import tiny_model

from infmoe.errors import InfMoEError
from infmoe.eval.token_times import token_times
from infmoe.layers import Routing


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


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_stands_still_while_tokens_are_timed(monkeypatch):
    """What is drawn is drawn between the rounds: no thread shares the processor with what is timed."""
    model, screen, timed = tiny_model(), Terminal(), []
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(model, "generate", lambda *args, **kwargs: timed.append(threading.active_count()))
    threads = threading.active_count()
    token_times(model, [{}, {}], prompt_length=4, rounds=3, quiet=False)
    assert timed == [threads] * 8
    said = screen.getvalue()
    assert [said.find(f"timing, round {r} of 3") > 0 for r in (1, 2, 3)] == [True] * 3
    assert said.find("warming up") < said.find("round 1") < said.find("round 2") < said.find("round 3")
    screen.truncate(0)
    token_times(model, [{}], prompt_length=4, rounds=1)
    assert screen.getvalue() == ""
