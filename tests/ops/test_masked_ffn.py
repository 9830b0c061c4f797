"""The plain path against the reference, selection and mean mask, outputs and gradients."""

import math

import pytest
import torch
from helpers import Flips, count_flips
from hypothesis import given
from hypothesis import strategies as st

from infmoe.layers import InfinityFFN
from infmoe.ops.masked_ffn import eager, naive

SIZES = (1, 8, 9, 31, 100, 257, 1025, 3000)


def weights(num_samples_B: list[int]) -> torch.Tensor:
    K = max(num_samples_B)
    return torch.tensor([[1.0 / k if i < k else 0.0 for i in range(K)] for k in num_samples_B])


def both(scores, num_kept, weight_BK):
    """Mask and scores' gradient, by the reference and by the plain path."""
    B = scores.shape[0]
    grad = torch.randn(*scores.shape[:2], scores.shape[3], generator=torch.Generator().manual_seed(1))
    kept_B = torch.tensor(num_kept).expand(B)
    results = []
    for run in ("naive", "eager"):
        leaf = scores.clone().requires_grad_()
        if run == "naive":
            mask = naive.mean_mask(leaf, naive.select(leaf, kept_B), weight_BK)
        else:
            mask, _ = eager.mean_top_mask(leaf, num_kept, weight_BK[:, None])
        mask.backward(grad)
        results.append((mask.detach(), leaf.grad))
    return results


def assert_agree(scores, num_kept, weight_BK):
    (mask, grad), (mask_eager, grad_eager) = both(scores, num_kept, weight_BK)
    torch.testing.assert_close(mask_eager, mask, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad_eager, grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("U", SIZES)
@pytest.mark.parametrize("K", [1, 2, 3, 8])
def test_mask_and_gradient_equal_the_reference(U, K):
    scores = torch.randn(2, 5, K, U)
    assert_agree(scores, (max(1, round(0.25 * U)),), weights([K, K]))


@given(
    st.integers(1, 3),
    st.integers(0, 5),
    st.integers(1, 8),
    st.integers(1, 40),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_any_shape_ties_and_per_row_counts(B, T, K, U, ties, random):
    generator = torch.Generator().manual_seed(random.randrange(2**31))
    scores = torch.randn(B, T, K, U, generator=generator)
    if ties:
        scores = (scores * 2).round()
    num_kept = tuple(random.randint(1, U) for _ in range(B))
    samples = [random.randint(1, K) for _ in range(B - 1)] + [K]
    assert_agree(scores, num_kept, weights(samples))
    kept = eager.select(scores, num_kept)
    assert torch.equal(kept.bool(), naive.select(scores, torch.tensor(num_kept)))
    least = torch.tensor(num_kept).view(B, 1, 1).expand(B, T, K)
    assert bool((kept.sum(-1) >= least).all())
    if not ties:
        assert torch.equal(kept.sum(-1).long(), least)


@pytest.mark.parametrize("value", [0.0, -1.5, 3.0])
def test_rows_of_equal_scores_are_kept_whole(value):
    scores = torch.full((2, 3, 2, 17), value)
    assert bool((eager.select(scores, (4,)) == 1).all())
    assert_agree(scores, (4,), weights([2, 2]))


def test_times_kept_counts_the_samples_that_have_weight():
    scores = torch.randn(3, 4, 3, 20)
    weight_BK = weights([1, 3, 2])
    _, times_kept = eager.mean_top_mask(scores, (5, 2, 20), weight_BK[:, None])
    kept = naive.select(scores, torch.tensor([5, 2, 20]))
    expected = torch.stack([kept[b, :, :k].sum(1) for b, k in enumerate((1, 3, 2))]).float()
    assert torch.equal(times_kept, expected.reshape(12, 20))
    _, every_fifth = eager.mean_top_mask(scores, (5, 2, 20), weight_BK[:, None], count_every=5)
    assert torch.equal(every_fifth, expected.reshape(12, 20)[::5])


def test_nan_shows_in_its_row_and_nowhere_else():
    for num_nans in (1, 5, 20):  # fewer than are kept, and more
        scores = torch.randn(2, 3, 2, 20)
        clean = eager.mean_top_mask(scores, (4,), weights([2, 2])[:, None])[0]
        scores[1, 2, 0, :num_nans] = math.nan
        for run, mask in (
            ("eager", eager.mean_top_mask(scores, (4,), weights([2, 2])[:, None])[0]),
            ("naive", naive.mean_mask(scores, naive.select(scores, torch.tensor([4, 4])), weights([2, 2]))),
        ):
            bad = mask.isnan().any(-1)
            assert bad[1, 2], run
            assert mask[1, 2, :num_nans].isnan().all(), run
            assert int(bad.sum()) == 1, run
            torch.testing.assert_close(mask[~bad], clean[~bad], rtol=1e-6, atol=1e-6)


def test_infinite_scores_are_shown():
    scores = torch.randn(1, 2, 1, 20)
    scores[0, 0, 0, 3] = math.inf
    kept = eager.select(scores, (4,))
    assert kept[0, 0, 0, 3] == 1
    mask = eager.mean_top_mask(scores, (4,), torch.ones(1, 1, 1))[0]
    assert mask[0, 0, 3] == math.inf
    assert mask[0, 1].isfinite().all()
    scores[0, 0, 0, 3] = -math.inf  # not kept, but a divergence all the same
    assert not eager.mean_top_mask(scores, (4,), torch.ones(1, 1, 1))[0][0, 0].isfinite().all()
    whole = torch.full((1, 1, 1, 20), math.inf)
    assert (eager.mean_top_mask(whole, (4,), torch.ones(1, 1, 1))[0] == math.inf).all()


def test_nothing_but_kept_scores_gets_a_gradient():
    scores = torch.randn(1, 3, 2, 30, requires_grad=True)
    mask, times_kept = eager.mean_top_mask(scores, (7,), weights([2])[:, None])
    assert not times_kept.requires_grad
    mask.sum().backward()
    assert torch.equal(scores.grad != 0, eager.select(scores, (7,)) == 1)


def test_weights_may_differ_by_token():
    scores, weight_BTK = torch.randn(2, 3, 2, 12), torch.rand(2, 3, 2)
    mask, _ = eager.mean_top_mask(scores, (3,), weight_BTK)
    kept = naive.select(scores, torch.tensor([3, 3]))
    torch.testing.assert_close(mask, (scores * kept * weight_BTK[..., None]).sum(2), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("threads", [1, 2])
def test_kth_largest_equals_topk(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        scores = torch.randn(3, 300, 2, 50)  # enough rows that two threads share them
        scores[0, 0, 0, 0] = math.nan
        for num_kept in ([1], [13], [50], [4, 4, 50]):
            expected = [
                scores[b].topk(n).values[..., -1:] for b, n in enumerate(torch.tensor(num_kept).expand(3).tolist())
            ]
            out = eager.kth_largest(scores, num_kept)
            torch.testing.assert_close(out, torch.stack(expected), rtol=0, atol=0, equal_nan=True)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("num_kept", [[3], [1, 12]])
@pytest.mark.parametrize("shape", [(2, 12), (2, 3, 12), (2, 5, 3, 12), (2, 0, 3, 12)])
def test_kth_largest_is_a_lawful_operator(shape, num_kept):
    torch.library.opcheck(eager.kth_largest, (torch.randn(shape), num_kept))


def test_kth_largest_takes_what_is_not_contiguous():
    scores = torch.randn(4, 20, 3, 5).permute(0, 2, 3, 1)
    assert torch.equal(eager.kth_largest(scores, [6]), eager.kth_largest(scores.contiguous(), [6]))


def test_a_row_is_selected_alike_alone_and_in_a_batch():
    scores = torch.randn(5, 40, 2, 64)
    whole = eager.mean_top_mask(scores, (16,), torch.full((1, 1, 2), 0.5))[0]
    for b in range(5):
        alone = eager.mean_top_mask(scores[b : b + 1], (16,), torch.full((1, 1, 2), 0.5))[0]
        torch.testing.assert_close(alone[0], whole[b], rtol=1e-6, atol=1e-7)


def test_bfloat16_models_select_from_float32_scores(monkeypatch):
    layer = InfinityFFN(16, 64, z_dim=8).eval().to(torch.bfloat16)
    seen = []
    select = eager.select

    def spy(scores, num_kept):
        kept = select(scores, num_kept)
        seen.append((scores.detach(), num_kept, kept))
        return kept

    monkeypatch.setattr(eager, "select", spy)
    out = layer(torch.randn(2, 5, 16, dtype=torch.bfloat16))
    ((scores, num_kept, kept),) = seen
    assert out.y_BTD.dtype == torch.bfloat16
    assert scores.dtype == torch.float32
    assert torch.equal(kept.bool(), naive.select(scores, torch.tensor(num_kept)))


def test_the_flip_counter_refuses_a_flip_far_from_the_threshold():
    scores = torch.tensor([3.0, 2.0, 1.0, 0.0]).view(1, 1, 1, 4)
    own = eager.select(scores, (2,))
    flips = Flips()
    count_flips(scores, own, own, flips)
    flips.check()
    with pytest.raises(AssertionError, match="off the threshold"):
        count_flips(scores, own, torch.tensor([1.0, 0, 1, 0]).view(1, 1, 1, 4), flips)
    flips = Flips()
    near = torch.tensor([3.0, 2.0, 2.0 - 1e-6, 0.0]).view(1, 1, 1, 4)
    count_flips(near, eager.select(near, (2,)), torch.tensor([1.0, 1, 1, 0]).view(1, 1, 1, 4), flips)
    assert flips.flipped == 1
    with pytest.raises(AssertionError, match="flipped"):
        flips.check()
