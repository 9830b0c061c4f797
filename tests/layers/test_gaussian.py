"""The closed forms against Monte Carlo."""

import math

import pytest
import torch

from infmoe.layers.gaussian import kept_second_moment, mean_mask_second_moment

N = 400_000


@pytest.mark.parametrize("keep_ratio", [1 / 32, 0.1, 0.25, 0.5, 0.9, 1.0])
def test_kept_second_moment(keep_ratio):
    m = torch.randn(N, dtype=torch.float64)
    cut = m.sort(descending=True).values[round(keep_ratio * N) - 1]
    kept = m.square() * (m >= cut)
    assert kept_second_moment(keep_ratio) == pytest.approx(float(kept.mean()), abs=5 * float(kept.std()) / N**0.5)


@pytest.mark.parametrize("keep_ratio", [0.0625, 0.25, 0.7, 1.0])
@pytest.mark.parametrize("num_samples", [1, 2, 3, 8])
@pytest.mark.parametrize("correlation", [0.1, 0.5, 0.8, 1.0])
def test_mean_mask_second_moment(keep_ratio, num_samples, correlation):
    shared, own = torch.randn(50_000, 1), torch.randn(50_000, num_samples)
    m = math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own
    cut = m.flatten().sort(descending=True).values[round(keep_ratio * m.numel()) - 1]
    square = (m * (m >= cut)).mean(dim=1).square().double()
    expected = mean_mask_second_moment(keep_ratio, num_samples, correlation)
    assert expected == pytest.approx(float(square.mean()), abs=5 * float(square.std()) / 50_000**0.5)


def test_the_forms_at_their_ends():
    assert kept_second_moment(0.25) == pytest.approx(0.4643, abs=1e-4)
    assert mean_mask_second_moment(0.25, 1, 0.3) == kept_second_moment(0.25)
    assert mean_mask_second_moment(0.25, 5, 1.0) == kept_second_moment(0.25)
    # everything kept: the variance of a mean of correlated normals
    assert mean_mask_second_moment(1.0, 4, 0.5) == pytest.approx((1 + 3 * 0.5) / 4, abs=1e-6)
