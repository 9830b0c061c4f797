"""How large the layers' outputs start, as docs/deviations.md says: at the tiny experiments' width, over unit inputs."""

import pytest
import torch
from helpers import make_layer

WIDTH, TOTAL, ACTIVE = 128, 1024, 512


def output_rms(ffn: str, neurons: int, initializer_range: float = 0.02, **options) -> float:
    """Of a new layer's output, over tokens and four draws of its weights."""
    squares = []
    for seed in range(4):
        torch.manual_seed(seed)
        layer = make_layer(ffn, WIDTH, neurons, initializer_range=initializer_range, **options)
        with torch.no_grad():
            squares.append(layer(torch.randn(1, 512, WIDTH)).y_BTD.square().mean())
    return float(torch.stack(squares).mean().sqrt())


@pytest.fixture(scope="module")
def active():
    """Of a dense layer of the width that a token's experts have."""
    return output_rms("dense", ACTIVE)


@pytest.mark.parametrize(("start", "share"), [(0.02, 1 / 5.5), (0.049, 1 / 2.4)])
def test_a_gated_layer_starts_smaller_than_a_plain_one(start, share):
    gated = output_rms("dense", TOTAL, start, hidden_act="swiglu")
    assert gated / output_rms("dense", TOTAL, start) == pytest.approx(share, rel=0.05)


def test_an_infinity_layer_starts_at_the_size_of_a_dense_one_of_its_total_width(active):
    ours = output_rms("infinity", TOTAL, z_dim=64)
    assert ours / output_rms("dense", TOTAL) == pytest.approx(1.0, rel=0.05)
    assert ours / active == pytest.approx((TOTAL / ACTIVE) ** 0.5, rel=0.05)


@pytest.mark.parametrize(("experts", "k"), [(4, 2), (16, 8)])
def test_a_mixture_starts_at_a_share_of_a_dense_layer_of_its_active_width(active, experts, k):
    chosen = {"num_experts": experts, "num_experts_per_tok": k}
    assert output_rms("moe", TOTAL, **chosen) / active == pytest.approx(1 / k, rel=0.05)
    assert output_rms("moe", TOTAL, **chosen, routed_scaling_factor=float(k)) / active == pytest.approx(1.0, rel=0.05)


def test_switch_starts_at_the_larger_of_two_probabilities_of_it(active):
    assert output_rms("switch", TOTAL, num_experts=2) / active == pytest.approx(0.57, rel=0.03)
