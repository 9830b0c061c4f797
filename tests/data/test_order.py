"""The order of samples: a shuffle without a list."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infmoe.data import DataOrder
from infmoe.errors import InfMoEError


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 10**6))
def test_each_epoch_reads_every_window_once(size: int, seed: int, epoch: int) -> None:
    samples = np.arange(epoch * size, (epoch + 1) * size)
    assert sorted(DataOrder(size, seed).indices(samples)) == list(range(size))


def test_scalar_and_vector_agree_across_epochs() -> None:
    order = DataOrder(37, seed=5)
    assert [order.index(sample) for sample in range(100)] == order.indices(np.arange(100)).tolist()


def test_epochs_differ() -> None:
    order = DataOrder(1000, seed=1)
    first, second = order.indices(np.arange(2000)).reshape(2, 1000)
    # Two independent shuffles agree in one place on average.
    assert (first == second).sum() < 10


def test_seeds_differ() -> None:
    samples = np.arange(1000)
    assert (DataOrder(1000, 1).indices(samples) == DataOrder(1000, 2).indices(samples)).sum() < 10


def test_the_order_stays_what_it_was() -> None:
    # A change here would make resumed runs read other data than the runs they resume.
    assert DataOrder(10, seed=0).indices(np.arange(20)).tolist() == [
        5,
        3,
        6,
        2,
        0,
        8,
        4,
        9,
        1,
        7,
        7,
        6,
        8,
        3,
        5,
        2,
        9,
        1,
        0,
        4,
    ]


def test_every_window_is_equally_likely_to_come_first() -> None:
    first = np.array([DataOrder(7, seed).index(0) for seed in range(2100)])
    counts = np.bincount(first, minlength=7)
    # 300 expected, standard deviation 16: five of them either side
    assert counts.min() > 220
    assert counts.max() < 380


def test_neighbours_are_torn_apart() -> None:
    windows = DataOrder(100_000, seed=3).indices(np.arange(100_000))
    # Of random neighbours one in 500 is within 100 of the other.
    assert (np.abs(np.diff(windows)) <= 100).mean() < 0.004


def test_the_order_reaches_beyond_32_bits() -> None:
    size = 10**13
    windows = DataOrder(size, seed=0).indices(np.arange(1000))
    assert windows.min() >= 0
    assert size // 2 < windows.max() < size


def test_batches_follow_one_another() -> None:
    batches = [DataOrder.samples(step, 4).tolist() for step in range(3)]
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_no_windows_are_refused() -> None:
    with pytest.raises(InfMoEError, match="at least one"):
        DataOrder(0)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(InfMoEError, match="seed"):
        DataOrder(5, seed)
