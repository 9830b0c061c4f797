"""Held-out loss against a plain computation, and what may not change it.

Losses are compared to 1e-4, not tighter: batches of other sizes round differently, and where a score lies at
the threshold of the top-N such a difference may select another unit.
"""

import math

import numpy as np
import pytest
import torch

from infmoe.data import TokenData
from infmoe.errors import InfMoEError
from infmoe.eval.heldout import HeldOut, evaluate_loss, window_losses
from infmoe.layers import NoiseKey, Routing

TOLERANCE = 1e-4
ROUTINGS = [
    Routing(num_samples=1, keep_ratio=1 / 8),
    Routing(num_samples=4, keep_ratio=0.25),
    Routing(mode="mu", keep_ratio=0.25),
    Routing(num_samples=2, mode="antithetic"),
]


def plain_loss(model, tokens, window: int, seed: int, routing: Routing) -> float:
    """One window's loss, token by token, in float64; the dials go in by name."""
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor([tokens]),
            routing=Routing(key=NoiseKey(seed=seed, stream=torch.tensor([window]))),
            num_samples=routing.num_samples,
            keep_ratio=routing.keep_ratio,
            routing_mode=routing.mode,
        ).logits[0]
    losses = []
    for row, target in zip(logits.double().numpy(), tokens[1:], strict=False):
        top = row.max()
        losses.append(top + math.log(np.exp(row - top).sum()) - row[target])
    return sum(losses) / len(losses)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_loss_equals_a_plain_computation(opened, held_out, routing):
    result = evaluate_loss(opened.model, held_out, routing, seed=5)
    pairs = zip(held_out.tokens_NT.tolist(), held_out.window_N.tolist(), strict=True)
    plain = [plain_loss(opened.model, tokens, window, 5, routing) for tokens, window in pairs]
    np.testing.assert_allclose(result.window_losses.numpy(), plain, atol=TOLERANCE)
    assert result.loss == pytest.approx(np.mean(plain), abs=TOLERANCE)
    assert result.loss_se == pytest.approx(np.std(plain, ddof=1) / len(plain) ** 0.5, rel=1e-2)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_batch_size_and_order_change_nothing(opened, held_out, routing):
    whole = evaluate_loss(opened.model, held_out, routing, batch_size=16)
    shuffled_N = torch.randperm(len(held_out.tokens_NT))
    shuffled = HeldOut(held_out.tokens_NT[shuffled_N], held_out.window_N[shuffled_N])
    for batch_size in (1, 3):
        other = evaluate_loss(opened.model, held_out, routing, batch_size=batch_size)
        torch.testing.assert_close(other.window_losses, whole.window_losses, atol=TOLERANCE, rtol=0)
        assert other.routing() == pytest.approx(whole.routing(), abs=1e-3)
        other = evaluate_loss(opened.model, shuffled, routing, batch_size=batch_size)
        torch.testing.assert_close(other.window_losses, whole.window_losses[shuffled_N], atol=TOLERANCE, rtol=0)


def test_the_seed_matters_where_something_is_drawn(opened, held_out):
    def losses(mode, seed):
        return evaluate_loss(opened.model, held_out, Routing(mode=mode), seed=seed).window_losses

    assert torch.equal(losses("sample", 0), losses("sample", 0))
    assert (losses("sample", 0) - losses("sample", 1)).abs().min() > 0
    assert torch.equal(losses("mu", 0), losses("mu", 1))


def test_windows_have_noise_of_their_own(opened, held_out):
    same = held_out.tokens_NT[:1].expand(4, -1)
    result = evaluate_loss(opened.model, HeldOut(same, torch.arange(4)), Routing(num_samples=1))
    assert len(set(result.window_losses.tolist())) == 4


def test_dials_reach_the_model(opened, held_out):
    one = evaluate_loss(opened.model, held_out, Routing(num_samples=1, keep_ratio=0.125)).routing()
    eight = evaluate_loss(opened.model, held_out, Routing(num_samples=8, keep_ratio=0.125)).routing()
    assert one["union_ratio"] == pytest.approx(0.125)
    assert 0.125 < eight["union_ratio"] < 1 - (1 - 0.125) ** 8 + 0.05
    assert 0 < one["entropy"] <= 1
    everything = evaluate_loss(opened.model, held_out, Routing(keep_ratio=1.0)).routing()
    assert everything["union_ratio"] == pytest.approx(1.0)
    assert everything["entropy"] == pytest.approx(1.0)


def test_figures_are_those_of_all_windows(opened, held_out):
    result = evaluate_loss(opened.model, held_out, Routing(keep_ratio=0.25), seed=3, batch_size=7)
    key = NoiseKey(seed=3, stream=held_out.window_N)
    _, layers = window_losses(opened.model, held_out.tokens_NT, Routing(keep_ratio=0.25, key=key))
    expected = tuple(layer.summary()["union_ratio"] for layer in layers)
    assert result.union_ratios() == pytest.approx(expected, abs=1e-3)
    assert result.routing()["union_ratio"] == pytest.approx(np.mean(expected), abs=1e-3)


def test_windows_are_spread_over_the_split(tiny_run):
    data = TokenData.open(tiny_run.data)
    available = data.num_windows("val", 32)
    held_out = HeldOut.from_data(data, 32, 10)
    assert held_out.window_N.tolist() == [i * available // 10 for i in range(10)]
    assert held_out.tokens_NT[3].tolist() == data.window("val", int(held_out.window_N[3]), 32).tolist()
    everything = HeldOut.from_data(data, 32, 10 * available)
    assert everything.window_N.tolist() == list(range(available))


def test_a_split_without_two_windows_is_refused(tiny_run):
    data = TokenData.open(tiny_run.data)
    with pytest.raises(InfMoEError, match="2 are needed: give other --data with more text or a larger --val-fraction"):
        HeldOut.from_data(data, data.info("val").tokens, 10)
