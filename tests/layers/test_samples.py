"""How K samples are spread."""

import math

import pytest
import torch

from infmoe.errors import InfMoEError
from infmoe.layers import InfinityFFN, NoiseKey, Routing
from infmoe.layers.samples import _sobol, coordinates, spread_samples


def where(num_tokens=3000, stream=0, **key):
    return coordinates(
        NoiseKey(stream=torch.tensor([stream]), **key),
        layer_index=0,
        batch_size=1,
        num_tokens=num_tokens,
        device=torch.device("cpu"),
        positions="positions",
    )


MODES = ("sample", "antithetic", "qmc")


@pytest.mark.parametrize("mode", MODES)
def test_every_sample_by_itself_is_standard_normal(mode):
    draws_TKZ = spread_samples(mode, 8, 6, where())[0]
    for k in range(8):
        sorted_N = draws_TKZ[:, k].flatten().sort().values
        normal_N = torch.special.ndtr(sorted_N)
        n = len(normal_N)
        distance = (normal_N - (torch.arange(n) + 0.5) / n).abs().max().item()
        assert distance < 2.31 / math.sqrt(n), k  # Kuiper's statistic, the largest over all shifts, at 0.1 %


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dim", [1, 5])
def test_more_samples_begin_with_the_fewer(mode, dim):
    most = spread_samples(mode, 7, dim, where(50))
    assert most.shape == (1, 50, 7, dim)
    for k in range(1, 7):
        assert torch.equal(spread_samples(mode, k, dim, where(50)), most[:, :, :k])


def test_the_first_sample_is_the_same_in_every_mode():
    first = [spread_samples(mode, 4, 5, where(50))[:, :, 0] for mode in MODES]
    assert torch.equal(first[0], first[1])
    assert torch.equal(first[0], first[2])


@pytest.mark.parametrize(("num_samples", "gain"), [(2, 1.2), (8, 2.5), (16, 4)])
def test_qmc_means_are_closer_than_independent_ones(num_samples, gain):
    """The variance of the mean over K of a smooth function of z falls faster than 1 / K."""

    def spread(mode):
        draws = spread_samples(mode, num_samples, 4, where())
        return (draws + 0.3 * draws.sin()).mean(dim=2).var().item()

    assert gain * spread("qmc") < spread("sample")


def test_many_dimensions_do_not_move_in_step():
    points = _sobol(16, 64)
    assert points.dtype == torch.float32
    assert len({tuple(column) for column in points.T.tolist()}) == 64
    correlation = torch.corrcoef(points.T.double()).fill_diagonal_(0.0)
    assert correlation.abs().max() < 0.999


def test_tokens_and_streams_are_shifted_for_themselves():
    draws = spread_samples("qmc", 4, 3, where(40))
    assert len({tuple(row) for row in draws[0, :, 1].tolist()}) == 40
    assert not torch.equal(draws, spread_samples("qmc", 4, 3, where(40, stream=1)))
    assert torch.equal(draws, spread_samples("qmc", 4, 3, where(40)))


def test_a_layer_routes_by_them():
    torch.manual_seed(0)
    layer = InfinityFFN(16, 64, z_dim=4, initial_sigma=1.0).eval()
    x = torch.randn(2, 9, 16)
    out = {mode: layer(x, Routing(mode=mode, num_samples=4)).y_BTD for mode in MODES}
    assert not torch.equal(out["qmc"], out["sample"])
    assert not torch.equal(out["qmc"], out["antithetic"])
    one = [layer(x, Routing(mode=mode, num_samples=1)).y_BTD for mode in MODES]
    torch.testing.assert_close(one[0], one[2])
    assert torch.isfinite(layer(1e3 * x, Routing(mode="qmc", num_samples=64)).y_BTD).all()


def test_more_dimensions_than_the_sequence_has_are_refused():
    with pytest.raises(InfMoEError, match="at most 21201"):
        spread_samples("qmc", 2, 30000, where(1))
