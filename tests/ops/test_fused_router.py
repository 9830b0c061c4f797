"""The router's spread and its noise, compiled, against their formulas."""

import pytest
import torch
import torch.nn.functional as F
from helpers import backend_of_the_environment
from kernel_helpers import DTYPES, NEEDS_KERNELS, close, random

from infmoe.ops.masked_ffn import fused
from infmoe.ops.noise import normal_noise

pytestmark = NEEDS_KERNELS


@DTYPES
@pytest.mark.parametrize("act", ["softplus", "exp"])
@pytest.mark.parametrize("Z", [1, 7, 16, 33])
def test_spread_and_its_gradients_equal_the_formula(act, dtype, Z):
    def plain(mu, raw, noise):
        sigma = (F.softplus(raw) if act == "softplus" else raw.exp()).clamp(0.05, 3.0)
        return mu.unsqueeze(2) + sigma.unsqueeze(2) * noise, sigma

    mu, raw = random(2, 5, Z, dtype=dtype), random(2, 5, Z, dtype=dtype, seed=1, scale=2.5)
    raw[0, 0, 0], raw[1, 1, 0] = 80.0, -200.0
    noise = random(2, 5, 3, Z, seed=2)
    results = []
    for run in (lambda *t: fused.spread(*t, act, 0.05, 3.0), plain):
        leaves = [t.clone().requires_grad_() for t in (mu, raw)]
        inputs = leaves if run is not plain else [leaf.float() for leaf in leaves]
        z, sigma = run(*inputs, noise)
        (z * random(*z.shape, seed=3)).sum().add((sigma * random(*sigma.shape, seed=4)).sum()).backward()
        results.append([z.detach(), sigma.detach(), *(leaf.grad for leaf in leaves)])
    for i, (got, want) in enumerate(zip(*results, strict=True)):
        assert got.dtype == want.dtype
        close(got, want, dtype if i > 1 else torch.float32)


@pytest.mark.parametrize("act", ["softplus", "exp"])
def test_a_diverged_router_shows_in_the_spread(act):
    raw = torch.zeros(1, 2, 4)
    raw[0, 1, 2] = torch.nan
    z, sigma = fused.spread(torch.zeros(1, 2, 4), raw, torch.ones(1, 2, 1, 4), act, 1e-4, 10.0)
    assert z[0, 1, 0, 2].isnan()
    assert sigma[0, 1, 2].isnan()
    assert int(z.isnan().sum()) == 1


@pytest.mark.parametrize("dim", [1, 2, 3, 15, 31, 32, 33, 64, 65, 257])
@pytest.mark.parametrize("num_samples", [1, 3])
def test_noise_equals_the_plain_path(dim, num_samples):
    key = {
        "seed": 5,
        "step": 2,
        "layer": 1,
        "stream_B": torch.tensor([3, -9]),
        "position_BT": torch.arange(40).view(2, 20),
    }
    drawn = normal_noise(num_samples, dim, **key)
    with backend_of_the_environment("eager"):
        plain = normal_noise(num_samples, dim, **key)
    torch.testing.assert_close(drawn, plain, rtol=0, atol=3e-6)


def test_noise_has_the_moments_of_a_normal_distribution():
    key = {"seed": 1, "step": 0, "layer": 0, "stream_B": torch.zeros(1, dtype=torch.int64)}
    draws = normal_noise(2, 101, **key, position_BT=torch.arange(4000)[None]).double().flatten()
    n = draws.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert float((draws**power).mean()) == pytest.approx(moment, abs=4 * (variance / n) ** 0.5)
    assert len(draws.unique()) > 0.97 * n


def test_noise_does_not_depend_on_threads_or_on_who_stands_beside():
    key = {"seed": 1, "step": 0, "layer": 0, "stream_B": torch.arange(3)}
    position_BT = torch.arange(3 * 500).view(3, 500)
    most = normal_noise(5, 33, **key, position_BT=position_BT)
    torch.set_num_threads(2)
    try:
        assert torch.equal(normal_noise(5, 33, **key, position_BT=position_BT), most)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(normal_noise(2, 33, **key, position_BT=position_BT[:, 7:9]), most[:, 7:9, :2])
