"""Intervals."""

import math

import numpy as np
import pytest

from infmoe.reproduce.statistics import Interval, interval, paired, spread


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


def test_a_spread_leaves_out_what_arms_and_seeds_make_of_a_loss():
    noise = np.random.default_rng(0).normal(size=(40, 3), scale=0.02)
    arms, seeds = np.linspace(3.0, 4.0, 40)[:, None], np.array([0.0, 0.3, -0.2])
    found = spread((arms + seeds + noise).tolist())
    assert (found.arms, found.seeds, found.degrees) == (40, 3, 78)
    assert found.deviation == pytest.approx(0.02, rel=0.15)
    assert spread((arms + seeds).tolist()).deviation == pytest.approx(0.0, abs=1e-9)


def test_few_arms_say_nothing_of_the_spread():
    assert spread([]) is None
    assert spread([[3.0, 3.1, 3.2]] * 5) is None
    assert spread([[3.0, 3.1, 3.2]] * 6) is not None


@pytest.mark.parametrize("count", [1, 3])
def test_a_spread_holds_the_difference_of_two_arms_as_often_as_it_says(count):
    draws = np.random.default_rng(count)
    held = []
    for _ in range(1500):
        width = spread(draws.normal(size=(12, 3)).tolist()).half_width(count)
        held.append(abs(np.mean(draws.normal(size=count) - draws.normal(size=count))) <= width)
    assert 0.935 <= np.mean(held) <= 0.97
