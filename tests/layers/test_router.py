"""The Gaussian router (Eq. 5)."""

import math

import pytest
import torch

from infmoe.errors import InfMoEError
from infmoe.layers import GaussianRouter

D, Z = 32, 6


def make_router(**options):
    defaults = {
        "router_hidden_size": None,
        "sigma_activation": "softplus",
        "initial_sigma": 0.5,
        "min_sigma": 1e-4,
        "max_sigma": 10.0,
    }
    router = GaussianRouter(D, Z, **(defaults | options))
    with torch.no_grad():
        for tensor, mean, std in router.inits():
            torch.nn.init.normal_(tensor, mean, std) if std else torch.nn.init.constant_(tensor, mean)
    return router.requires_grad_(False)


@pytest.mark.parametrize("sigma_activation", ["softplus", "exp"])
@pytest.mark.parametrize("initial_sigma", [0.05, 0.5, 2.0])
def test_sigma_starts_where_it_should(sigma_activation, initial_sigma):
    router = make_router(sigma_activation=sigma_activation, initial_sigma=initial_sigma)
    sigma = router(torch.randn(4, 200, D), torch.zeros(4, 200, 1, Z)).sigma_BTZ
    assert float(sigma.log().mean().exp()) == pytest.approx(initial_sigma, rel=0.05)
    assert float(sigma.std()) < 0.2 * initial_sigma  # nearly even


def test_mu_starts_with_unit_variance():
    for width in (None, 64):
        mu = make_router(router_hidden_size=width)(torch.randn(4, 500, D), None).mu_BTZ
        assert float(mu.square().mean()) == pytest.approx(1.0, rel=0.35)


@pytest.mark.parametrize(("bias", "bound"), [(-100.0, 0.01), (100.0, 3.0)])
@pytest.mark.parametrize("sigma_activation", ["softplus", "exp"])
def test_sigma_is_clamped(bias, bound, sigma_activation):
    router = make_router(sigma_activation=sigma_activation, min_sigma=0.01, max_sigma=3.0)
    router.sigma.bias.fill_(bias)
    sigma = router(torch.randn(1, 3, D), torch.zeros(1, 3, 1, Z)).sigma_BTZ
    torch.testing.assert_close(sigma, torch.full_like(sigma, bound))


def test_z_is_mean_plus_sigma_times_noise():
    router, x, noise = make_router(), torch.randn(2, 3, D), torch.randn(2, 3, 4, Z)
    z, mu, sigma = router(x, noise)
    torch.testing.assert_close(mu, x @ router.mu.weight.T + router.mu.bias)
    for k in range(4):
        torch.testing.assert_close(z[:, :, k], mu + sigma * noise[:, :, k])
    assert router.noise_dim == Z


def test_without_noise_z_is_the_mean():
    z, mu, sigma = make_router()(torch.randn(2, 3, D), None)
    assert torch.equal(z, mu[:, :, None])
    assert sigma is None


def test_without_sigma_there_is_nothing_to_draw():
    router = make_router(sigma_activation="none")
    assert router.sigma is None
    assert router.noise_dim == 0
    assert router(torch.randn(1, 2, D), None).z_BTKZ.shape == (1, 2, 1, Z)


def test_the_hidden_layer_is_shared_and_gelu():
    router, x = make_router(router_hidden_size=12), torch.randn(2, 3, D)
    h = torch.nn.functional.gelu(x @ router.hidden.weight.T + router.hidden.bias)
    torch.testing.assert_close(router(x, None).mu_BTZ, h @ router.mu.weight.T + router.mu.bias)
    assert router.mu.in_features == router.sigma.in_features == 12
    assert router.num_flops(sampled=True) == 2 * D * 12 + 2 * 2 * 12 * Z
    assert make_router().num_flops(sampled=False) == 2 * D * Z


def test_gradients_reach_mu_and_sigma_through_the_draw():
    router = make_router().requires_grad_(True)
    router(torch.randn(2, 3, D), torch.randn(2, 3, 4, Z)).z_BTKZ.square().sum().backward()
    assert router.mu.weight.grad.abs().sum() > 0
    assert router.sigma.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"sigma_activation": "softplu"}, "did you mean 'softplus'"),
        ({"initial_sigma": 0.0}, "min_sigma"),
        ({"min_sigma": 0.0}, "min_sigma"),
        ({"initial_sigma": 20.0}, "max_sigma"),
        ({"initial_sigma": math.nan}, "initial_sigma"),
        ({"router_hidden_size": 0}, "router_hidden_size"),
        ({"router_hidden_size": -3}, "router_hidden_size"),
    ],
)
def test_bad_options_are_refused_by_name(options, named):
    with pytest.raises(InfMoEError, match=named):
        make_router(**options)


def test_an_index_needs_a_dimension():
    with pytest.raises(InfMoEError, match="z_dim"):
        GaussianRouter(
            D,
            0,
            router_hidden_size=None,
            sigma_activation="exp",
            initial_sigma=1.0,
            min_sigma=0.1,
            max_sigma=2.0,
        )
