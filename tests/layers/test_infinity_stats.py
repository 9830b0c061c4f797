"""∞-MoE's routing statistics."""

import itertools
import math

import pytest
import torch
from helpers import key, record_selections, routing
from infinity_helpers import infinity_layer, inputs, recorded_indices

from infmoe.layers import NoiseKey, Routing


def brute_force_stats(kept_BTKU, samples):
    """Counts, union and overlap by loops over the tokens."""
    B, T, _, U = kept_BTKU.shape
    counts, union, overlap = [0.0] * U, 0.0, 0.0
    for b, t in itertools.product(range(B), range(T)):
        sets = [{u for u in range(U) if kept_BTKU[b, t, k, u] == 1} for k in range(samples[b])]
        for chosen in sets:
            for u in chosen:
                counts[u] += 1
        union += len(set().union(*sets)) / U
        pairs = [(p, q) for i, p in enumerate(sets) for q in sets[i + 1 :]]
        overlap += sum(len(p & q) / len(p) for p, q in pairs) / len(pairs) if pairs else 1.0
    return torch.tensor(counts), union, overlap


@pytest.mark.parametrize("samples", [(2, 2, 2), (1, 1, 1), (1, 4, 3)])
@pytest.mark.parametrize("keep_ratio", [0.25, (0.1, 0.5, 1.0)])
def test_statistics_equal_a_brute_force_count(samples, keep_ratio):
    layer, x = infinity_layer(), inputs()
    with record_selections() as recorded:
        stats = layer(x, routing(3, num_samples=samples, keep_ratio=keep_ratio)).stats
    counts, union, overlap = brute_force_stats(recorded[0], samples)
    assert torch.equal(stats.counts_U, counts)
    assert float(stats.union) == pytest.approx(union, rel=1e-5)
    assert float(stats.overlap) == pytest.approx(overlap, rel=1e-5)
    q = [c / float(counts.sum()) for c in counts.tolist() if c]
    entropy = -sum(p * math.log(p) for p in q)
    summary = stats.summary()
    assert summary["entropy"] == pytest.approx(entropy / math.log(layer.num_units), rel=1e-6)
    assert summary["effective_units"] == pytest.approx(math.exp(entropy), rel=1e-6)
    assert summary["dead_ratio"] == pytest.approx(float((counts == 0).float().mean()))
    assert summary["max_load"] == pytest.approx(float(counts.max() / counts.mean()), rel=1e-6)


def test_sigma_statistics_are_those_of_the_router():
    layer, x = infinity_layer(), inputs()
    _, mu, sigma = recorded_indices(layer, x, routing(3))
    stats = layer(x, routing(3)).stats
    assert stats.summary()["sigma"] == pytest.approx(float(sigma.mean()), rel=1e-5)
    ratio = (sigma.square().mean(-1) / mu.square().mean(-1)).sqrt().mean()
    assert stats.summary()["sigma_to_mu"] == pytest.approx(float(ratio), rel=1e-5)


def test_statistics_look_at_evenly_spaced_tokens():
    layer, x = infinity_layer(), inputs(3, 7)
    with record_selections() as recorded:
        stats = layer(x, routing(3, max_stats_tokens=6)).stats  # 21 tokens: every fourth
    assert float(stats.tokens) == 6
    assert torch.equal(stats.counts_U, recorded[0].flatten(0, 1)[::4].sum((0, 1)))


def test_statistics_add_up():
    layer, x = infinity_layer(), inputs(4)
    noise_key = key(4)
    whole = layer(x, Routing(key=noise_key)).stats
    halves = [
        layer(
            x[rows],
            Routing(key=NoiseKey(seed=noise_key.seed, step=noise_key.step, stream=noise_key.stream[rows])),
        ).stats
        for rows in (slice(0, 2), slice(2, 4))
    ]
    for name, value in (halves[0] + halves[1])._asdict().items():
        torch.testing.assert_close(value, getattr(whole, name), rtol=1e-5, atol=1e-5)
