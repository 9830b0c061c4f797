"""The compiled selection from z and W_z, against float64 on its own choice."""

import pytest
import torch
from helpers import Flips, count_flips
from kernel_helpers import NEEDS_KERNELS, OPS, close, random

from infmoe.ops.masked_ffn import fused, naive

pytestmark = NEEDS_KERNELS


def unpack(packed_NKW, num_units):
    bits = (packed_NKW.unsqueeze(-1) >> torch.arange(8)) & 1
    return bits.flatten(-2)[..., :num_units].bool()


def selection_from_factors(B, T, K, Z, U, *, score_dtype, weight_dtype, with_bias, num_kept=None, mask_dtype=None):
    """Run `top_mask` forward and backward, and check everything against float64 on its own selection."""
    z, w_z = random(B, T, K, Z), random(U, Z, dtype=weight_dtype, seed=1)
    bias = random(U, seed=2) if with_bias else None
    num_kept = num_kept or (max(1, U // 4),)
    leaves = [t.requires_grad_() for t in (z, w_z, bias) if t is not None]
    weight_BTK = torch.rand(B, T, K, generator=torch.Generator().manual_seed(4))
    options = {"score_dtype": score_dtype, "mask_dtype": mask_dtype or torch.float32}
    mask, counts, *_ = fused.top_mask(z, w_z, bias, num_kept, weight_BTK, **options)
    grad = random(*mask.shape, seed=5).to(mask.dtype)
    mask.backward(grad)

    exact = [t.detach().to(score_dtype).double() for t in (z, w_z)]
    scores = exact[0] @ exact[1].T + (0 if bias is None else bias.detach().double())
    flat = (z.detach().reshape(B * T, K, Z), w_z.detach(), bias, score_dtype == torch.bfloat16, list(num_kept))
    packed = OPS.top_mask(*flat, weight_BTK.reshape(B * T, K), 1, False, False, True)[1]
    kept = unpack(packed, U).view(B, T, K, U)
    flips = Flips()
    count_flips(scores, naive.select(scores, torch.tensor(num_kept).expand(B)), kept, flips)
    flips.check(2e-3)
    assert torch.equal(counts, kept.flatten(0, 2).sum(0).float())

    close(mask.detach(), (scores * kept * weight_BTK[..., None]).sum(2), mask.dtype)
    on_scores = grad.double()[:, :, None] * kept * weight_BTK[..., None]
    expected = [on_scores @ exact[1], on_scores.flatten(0, 2).T @ exact[0].flatten(0, 2), on_scores.sum((0, 1, 2))]
    for leaf, gradient in zip(leaves, expected, strict=False):
        assert leaf.grad.dtype == leaf.dtype
        scale = float(gradient.abs().max())
        rounded = torch.bfloat16 in (leaf.dtype, mask.dtype)
        close(leaf.grad / scale, gradient / scale, torch.bfloat16 if rounded else torch.float32)


# 8 rows of z and fewer are multiplied row by row, more in tiles.
ROWS = [(1, 1, 1), (2, 2, 2), (1, 8, 1), (1, 3, 3), (3, 7, 2), (1, 33, 5)]


@pytest.mark.parametrize("Z", [1, 2, 7, 31, 32, 33, 64, 256])
@pytest.mark.parametrize("score_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("B", "T", "K"), ROWS)
def test_selection_from_factors_equals_the_product_and_its_selection(B, T, K, Z, score_dtype):
    for U in (8, 100, 257):
        selection_from_factors(B, T, K, Z, U, score_dtype=score_dtype, weight_dtype=torch.float32, with_bias=U == 100)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("score_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [2, 30])
def test_selection_from_factors_of_either_dtype(weight_dtype, score_dtype, mask_dtype, T):
    options = {"score_dtype": score_dtype, "weight_dtype": weight_dtype, "mask_dtype": mask_dtype}
    selection_from_factors(2, T, 2, 24, 333, with_bias=True, num_kept=(20, 300), **options)


@pytest.mark.parametrize("T", [1, 70])
def test_selection_from_factors_of_a_wide_layer(T):
    options = {"score_dtype": torch.float32, "weight_dtype": torch.float32, "with_bias": False}
    selection_from_factors(1, T, 2, 64, 6144, **options)


def test_more_samples_than_a_tile_has_rows():
    options = {"score_dtype": torch.bfloat16, "weight_dtype": torch.float32, "with_bias": True}
    selection_from_factors(1, 3, 64, 16, 5000, **options)


@pytest.mark.parametrize("T", [2, 20])
@pytest.mark.parametrize("score_dtype", [torch.float32, torch.bfloat16])
def test_a_diverged_index_shows_in_its_token_alone(T, score_dtype):
    z, w_z = random(1, T, 2, 8), random(50, 8, seed=1)
    for bad in (torch.nan, torch.inf):
        z_bad = z.clone()
        z_bad[0, 1, 0, 3] = bad
        z_bad.requires_grad_()
        mask = fused.top_mask(z_bad, w_z, None, (12,), torch.full((1, 1, 2), 0.5), score_dtype=score_dtype).mask_BTU
        assert mask[0, 1].isnan().all()
        assert int(mask.isnan().sum()) == 50
        mask.sum().backward()
        assert z_bad.grad[0, 1, 0].isnan().all()
        assert int(z_bad.grad.isnan().sum()) == 8


def test_statistical_selection_from_factors():
    z, w_z = random(2, 40, 2, 64), random(3000, 64, seed=1)
    mask, counts, *_ = fused.top_mask(z, w_z, None, (750,), torch.ones(1, 1, 1), selection="statistical")
    scores = z.double() @ w_z.double().T
    kept = naive.select_statistical(scores, torch.tensor([750, 750]))
    assert float(counts.sum()) == pytest.approx(float(kept.sum()), rel=1e-4)
    flipped = (mask.double() - (scores * kept).sum(2)).abs() > 1e-3
    assert float(flipped.double().mean()) < 1e-4


def test_nothing_is_packed_where_no_gradient_is_wanted():
    args = (random(3, 2, 8), random(20, 8), None, False, [5], torch.ones(3, 2), 1, False, False)
    assert OPS.top_mask(*args, False)[1].shape == (0, 2, 3)
    assert OPS.top_mask(*args, True)[1].shape == (3, 2, 3)
    assert torch.equal(OPS.top_mask(*args, False)[0], OPS.top_mask(*args, True)[0])
