"""The counter-based noise: purity, statistics, and values frozen for good."""

import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from infmoe.errors import InfMoEError
from infmoe.ops.noise import normal_noise


def noise(num_samples=2, dim=8, *, seed=1, step=0, layer=0, streams=(0,), positions=range(4), dtype=torch.int64):
    stream_B = torch.tensor(list(streams), dtype=dtype)
    position_BT = torch.tensor(list(positions), dtype=dtype).expand(len(stream_B), -1)
    return normal_noise(num_samples, dim, seed=seed, step=step, layer=layer, stream_B=stream_B, position_BT=position_BT)


def splitmix64(x):
    """The finalizer in Python's integers, as Steele, Lea and Flood give it."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return x ^ (x >> 31)


def reference(num_samples, dim, *, seed, step, layer, stream, position):
    """One token's noise, one value at a time."""
    golden = 0x9E3779B97F4A7C15
    key = 0
    for part in (seed, step, layer, stream, position):
        key = splitmix64(((key ^ (part % 2**64)) + golden) % 2**64)
    rows = []
    for k in range(num_samples):
        cosines, sines = [], []
        for pair in range(1, (dim + 1) // 2 + 1):
            bits = splitmix64((key + (k * 2**32 + pair) * golden) % 2**64)
            radius = math.sqrt(-2 * math.log(((bits >> 40) + 0.5) / 2**24))
            angle = 2 * math.pi * (bits % 2**24) / 2**24
            cosines.append(radius * math.cos(angle))
            sines.append(radius * math.sin(angle))
        rows.append((cosines + sines)[:dim])
    return torch.tensor(rows)


@given(
    st.integers(0, 2**63 - 1),
    st.integers(0, 2**40),
    st.integers(0, 1000),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 2**31),
    st.integers(1, 9),
)
def test_equals_the_algorithm_in_plain_integers(seed, step, layer, stream, position, dim):
    drawn = noise(3, dim, seed=seed, step=step, layer=layer, streams=[stream], positions=[position])
    expected = reference(3, dim, seed=seed, step=step, layer=layer, stream=stream, position=position)
    torch.testing.assert_close(drawn[0, 0], expected, rtol=1e-4, atol=1e-5)


def test_golden_values():
    """Frozen: another value here means that every checkpoint's evaluations change."""
    drawn = noise(2, 5, seed=1234, step=5, layer=3, streams=[0, 77], positions=[0, 1023])
    golden = torch.tensor(
        [
            -1.2071302,
            0.2668880,
            -1.2845458,
            -0.0852558,
            0.1019550,
            -0.4843577,
            -0.6391072,
            0.2588402,
            0.8435038,
            1.0577486,
            0.2312481,
            -0.9647121,
            1.4341528,
            -0.9102039,
            0.5660030,
            0.8552668,
            -1.1769328,
            0.6620945,
            -0.2393731,
            -0.5298325,
            -2.2955704,
            0.6496982,
            0.8622503,
            -1.3244770,
            0.5178445,
            -1.3425484,
            -0.0815340,
            -1.0933125,
            -1.2675231,
            1.2235523,
            -1.0480994,
            0.3204627,
            0.3511340,
            -0.0847743,
            0.5009642,
            0.8163009,
            0.3051372,
            -0.0510431,
            -1.2012408,
            0.4386358,
        ]
    ).view(2, 2, 2, 5)
    torch.testing.assert_close(drawn, golden, rtol=1e-5, atol=1e-6)


def test_a_row_alone_equals_the_row_in_a_batch():
    whole = noise(streams=[3, 1, 4, 1])
    for b, stream in enumerate([3, 1, 4, 1]):
        assert torch.equal(noise(streams=[stream])[0], whole[b])
    assert torch.equal(whole[1], whole[3])


def test_samples_nest():
    most = noise(8)
    for K in range(1, 8):
        assert torch.equal(noise(K), most[:, :, :K])


def test_a_cached_position_equals_its_place_in_the_full_sequence():
    whole = noise(positions=range(20), streams=[5, 6])
    for t in (0, 7, 19):
        assert torch.equal(noise(positions=[t], streams=[5, 6])[:, 0], whole[:, t])
    assert torch.equal(noise(positions=range(10, 20), streams=[5, 6]), whole[:, 10:])


def test_int32_and_tensor_keys_change_nothing():
    plain = noise(seed=9, step=2, streams=[1, 2])
    assert torch.equal(noise(seed=9, step=2, streams=[1, 2], dtype=torch.int32), plain)
    assert torch.equal(noise(seed=torch.tensor(9), step=torch.tensor(2), streams=[1, 2]), plain)


@pytest.mark.parametrize("which", ["stream", "position"])
def test_floats_are_refused(which):
    key = {"stream_B": torch.zeros(1, dtype=torch.int64), "position_BT": torch.zeros(1, 2, dtype=torch.int64)}
    name = "stream_B" if which == "stream" else "position_BT"
    key[name] = key[name].float()
    with pytest.raises(InfMoEError, match=which):
        normal_noise(1, 2, seed=0, step=0, layer=0, **key)


def test_the_bits_are_a_lawful_operator():
    zero, stream_B, position_BT = torch.tensor(0), torch.arange(2), torch.arange(6).view(2, 3)
    torch.library.opcheck(torch.ops.infmoe.noise_bits, (zero, zero, 1, stream_B, position_BT, 2, 4))


def test_shapes_to_the_edge():
    assert noise(1, 1).shape == (1, 4, 1, 1)
    assert noise(1, 3, positions=[]).shape == (1, 0, 1, 3)
    assert noise(1, 2).dtype == torch.float32


def many(**key):
    """256 thousand values."""
    return noise(4, 64, positions=range(1000), **key)


@pytest.mark.parametrize("seed", [0, 1, 2**62])
def test_moments_and_distribution_are_normal(seed):
    draws = many(seed=seed).flatten().double()
    n = draws.numel()
    assert abs(float(draws.mean())) < 4 / math.sqrt(n)
    assert abs(float(draws.var()) - 1) < 4 * math.sqrt(2 / n)
    assert abs(float((draws**3).mean())) < 4 * math.sqrt(15 / n)
    assert abs(float((draws**4).mean()) - 3) < 4 * math.sqrt(96 / n)
    # Kolmogorov-Smirnov; 1.95 / sqrt(n) has a probability of 0.001
    cdf = torch.special.ndtr(draws.sort().values)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((cdf - steps[:-1]).abs().max(), (steps[1:] - cdf).abs().max())
    assert float(distance) < 1.95 / math.sqrt(n)
    # the tails: as many beyond 3.5 as there should be
    expected = 2 * NormalDist().cdf(-3.5) * n
    assert abs(int((draws.abs() > 3.5).sum()) - expected) < 5 * math.sqrt(expected)


def correlation(a, b):
    return float(torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1])


NEIGHBOURS = {
    "position": lambda: (many()[:, 1:], many()[:, :-1]),
    "sample": lambda: (many()[:, :, 1:], many()[:, :, :-1]),
    "dimension": lambda: (many()[..., 1:], many()[..., :-1]),
    "cosine and sine": lambda: (many()[..., :32], many()[..., 32:]),
    "stream": lambda: (many(), many(streams=[1])),
    "negative stream": lambda: (many(streams=[1]), many(streams=[-1])),
    "seed": lambda: (many(), many(seed=2)),
    "step": lambda: (many(), many(step=1)),
    "layer": lambda: (many(), many(layer=1)),
    # coordinates that a sum or a xor of the parts would confuse
    "layer for step": lambda: (many(layer=1, step=2), many(layer=2, step=1)),
    "seed for step": lambda: (many(seed=1, step=2), many(seed=2, step=1)),
    "stream for position": lambda: (
        noise(4, 64, streams=range(1, 301), positions=[0]).transpose(0, 1),
        noise(4, 64, streams=[0], positions=range(1, 301)),
    ),
}


@pytest.mark.parametrize("pair", NEIGHBOURS)
def test_neighbours_are_uncorrelated(pair):
    a, b = NEIGHBOURS[pair]()
    bound = 4 / math.sqrt(a.numel())
    assert abs(correlation(a, b)) < bound
    assert abs(correlation(a.square(), b.square())) < bound
    # equal values come by chance only: 24 bits each
    assert int((a == b).sum()) <= 3


def test_no_token_and_no_sample_repeats_another():
    draws = noise(8, 2, streams=range(20), positions=range(500)).reshape(-1, 2)  # a pair: 48 bits
    assert len(draws.unique(dim=0)) == len(draws)


def test_draws_no_state_from_torch():
    state = torch.get_rng_state()
    many()
    assert torch.equal(torch.get_rng_state(), state)
