"""Intervals."""

import math

import numpy as np
import pytest

from infmoe.reproduce.statistics import Interval, interval, paired


def test_an_interval_of_three():
    found = interval([1.0, 2.0, 3.0])
    assert (found.mean, found.count) == (2.0, 3)
    assert found.half_width == pytest.approx(4.3027 / math.sqrt(3), rel=1e-3)
    assert (found.low, found.high) == (2.0 - found.half_width, 2.0 + found.half_width)
    assert found.text(1) == "2.0 ± 2.5"
    assert found.text(1, sign=True) == "+2.0 ± 2.5"


def test_one_value_has_no_interval():
    found = interval([1.5])
    assert found == Interval(1.5, None, 1)
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert found.text() == "1.500"


@pytest.mark.parametrize("n", [2, 3, 5, 8, 40])
def test_intervals_hold_the_mean_as_often_as_they_say(n):
    draws = np.random.default_rng(n).normal(size=(4000, n))
    held = [abs((found := interval(list(row))).mean) <= found.half_width for row in draws]
    assert 0.94 <= np.mean(held) <= 0.975


def test_differences_are_paired_by_seed():
    ours, theirs = {1: 1.0, 2: 2.0, 3: 3.0, 9: 0.0}, {1: 0.9, 2: 1.9, 3: 2.9, 7: 5.0}
    found = paired(ours, theirs)
    assert found.count == 3
    assert found.mean == pytest.approx(0.1)
    assert found.half_width == pytest.approx(0.0, abs=1e-9)
    assert paired({1: 1.0}, {2: 1.0}) is None
