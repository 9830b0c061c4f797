"""Fitted exponents, and the router's arithmetic."""

import pytest

from infmoe.bench import growth


def test_a_power_law_is_found_again():
    sizes = (64, 128, 256, 512)
    fit = growth.PowerLaw.fit(sizes, [3e-5 * n**1.25 for n in sizes])
    assert (fit.exponent, fit.scale) == (pytest.approx(1.25), pytest.approx(3e-5))
    assert fit.standard_error == pytest.approx(0, abs=1e-9)


def test_the_standard_error_by_hand():
    # log2 of the sizes 0, 1, 2; of the times 0, 1, 1: slope 1/2, residuals -1/6, 1/3, -1/6, one degree of freedom
    fit = growth.PowerLaw.fit((1, 2, 4), (1.0, 2.0, 2.0))
    assert fit.exponent == pytest.approx(0.5)
    assert fit.standard_error == pytest.approx((1 / 6 / 2) ** 0.5)


def test_growth_rows(axes):
    rows, summary = growth.growth(quick=True, axes=axes)
    assert [row["size"] for row in rows if row["axis"] == "num_samples"] == [1, 2, 4]
    for axis in ("tokens", "width", "num_samples"):
        assert f"exponent_{axis}" in summary
        assert summary[f"exponent_{axis}_se"] >= 0


def test_the_router_costs_three_quarters_of_a_dense_ffn():
    # by hand: 2 * 2 * 768 * 256 for the maps, 2 * 2 * 256 * 6144 for two samples, over 2 * 2 * 768 * 3072
    cost = growth.RouterCost.of(768, 6144, 256, 2)
    assert (cost.maps_flops, cost.scores_flops) == (786_432, 6_291_456)
    assert (cost.maps_flops + cost.scores_flops) / (cost.ffn_flops / 2) == pytest.approx(0.75)
    # the split is never cheaper; antithetic pairs are from K = 4 on
    for num_samples in (1, 2, 3, 4, 8):
        assert growth.RouterCost.of(768, 6144, 256, num_samples).split_products > num_samples
    assert [growth.RouterCost.of(768, 6144, 256, k).antithetic_products for k in (2, 4, 8)] == [2, 3, 5]


def test_router_rows_agree_with_the_layer(axes):
    from infmoe.layers import InfinityFFN

    rows, summary = growth.router_cost(quick=True, axes=axes)
    assert len(rows) == 6
    for row in rows:
        layer = InfinityFFN(axes.hidden_size, axes.width, z_dim=row["z_dim"], num_samples=row["num_samples"])
        cost = layer.cost()
        assert 1e6 * (row["maps_mflop"] + row["scores_mflop"]) == pytest.approx(cost.flops_router)
        assert 1e6 * row["ffn_mflop"] == pytest.approx(cost.flops_executed - cost.flops_router)
        assert 0 <= row["bf16_flips_per_row"] < 0.1 * axes.width
    assert "router_over_dense_ffn_z32_k2" in summary
