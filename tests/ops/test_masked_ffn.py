"""Selection and mean mask against the reference: the plain path, and the compiled one on scores it is given."""

import math

import pytest
import torch
from helpers import Flips, count_flips
from hypothesis import given
from hypothesis import strategies as st

from infmoe.layers import InfinityFFN, Routing
from infmoe.ops.masked_ffn import compiled, eager, fused, naive

SIZES = (1, 8, 9, 16, 17, 31, 100, 257, 1025, 3000)
needs_kernels = pytest.mark.skipif(not compiled.available(), reason="no compiled kernels here")
PATHS = ["eager", pytest.param("fused", marks=needs_kernels)]
BOTH = pytest.mark.parametrize("path", PATHS)


def run(path, scores, num_kept, weight_BTK, **options):
    function = eager.mean_top_mask if path == "eager" else fused.top_mask_of_scores
    return function(scores, num_kept, weight_BTK, **options)


def weights(num_samples_B: list[int]) -> torch.Tensor:
    """(B, 1, K), as a layer makes them."""
    K = max(num_samples_B)
    return torch.tensor([[1.0 / k if i < k else 0.0 for i in range(K)] for k in num_samples_B])[:, None]


def kept_by_reference(scores, num_kept, selection="exact"):
    choose = naive.select if selection == "exact" else naive.select_statistical
    return choose(scores.float(), torch.tensor(num_kept).expand(scores.shape[0]))


def by_reference(scores, num_kept, weight_B1K, grad_BTU):
    leaf = scores.float().requires_grad_()
    mask = naive.mean_mask(leaf, kept_by_reference(leaf, num_kept), weight_B1K[:, 0].expand(len(scores), -1))
    mask.backward(grad_BTU)
    return mask.detach(), leaf.grad


def assert_agrees(path, scores, num_kept, weight_B1K, **options):
    grad = torch.randn(*scores.shape[:2], scores.shape[3], generator=torch.Generator().manual_seed(1))
    expected, expected_grad = by_reference(scores, num_kept, weight_B1K, grad)
    leaf = scores.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    mask = run(path, leaf, num_kept, weight_B1K, **options).mask_BTU
    mask.backward(grad.to(mask.dtype))
    assert mask.shape == expected.shape
    assert leaf.grad.dtype == scores.dtype
    near = {"rtol": 1e-6, "atol": 1e-6, "equal_nan": True}
    rounded = {"rtol": 2**-7, "atol": 1e-6, "equal_nan": True}
    torch.testing.assert_close(mask.detach().float(), expected, **near if mask.dtype == torch.float32 else rounded)
    exact = mask.dtype == scores.dtype == torch.float32
    torch.testing.assert_close(leaf.grad.float(), expected_grad, **near if exact else rounded)


def kept_by(path, scores, num_kept, **options):
    """Which units each sample keeps, (B, T, K, U): a sample's gradient where it alone has weight."""
    leaf = scores.detach().clone().requires_grad_()
    kept = []
    for k in range(scores.shape[2]):
        weight = torch.zeros(1, 1, scores.shape[2])
        weight[..., k] = 1.0
        mask = run(path, leaf, num_kept, weight, **options).mask_BTU
        kept.append(torch.autograd.grad(mask.sum(), leaf)[0][:, :, k])
    return torch.stack(kept, dim=2) == 1


@BOTH
@pytest.mark.parametrize("U", SIZES)
@pytest.mark.parametrize("K", [1, 2, 3, 8])
def test_mask_and_gradient_equal_the_reference(path, U, K):
    scores = torch.randn(2, 5, K, U)
    assert_agrees(path, scores, (max(1, round(0.25 * U)),), weights([K, K]))


@BOTH
@pytest.mark.parametrize("K", [1, 4, 8])
def test_the_widest_rows_equal_the_reference(path, K):
    assert_agrees(path, torch.randn(2, 2, K, 16384), (4096,), weights([K, K]))
    assert_agrees(path, torch.randn(2, 2, K, 16383), (1024, 8191), weights([K, K]))


@needs_kernels
@pytest.mark.parametrize("K", [5, 6, 7, 64])
def test_the_kernels_take_any_number_of_samples(K):
    assert_agrees("fused", torch.randn(2, 3, K, 33), (7, 9), weights([K, K]))


@needs_kernels
@pytest.mark.parametrize("U", [8, 9, 100, 1025])
@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("K", [1, 2, 3])
def test_bfloat16_scores_and_masks_equal_the_rounded_reference(U, mask_dtype, dtype, K):
    scores = torch.randn(2, 5, K, U).to(dtype)  # bfloat16 scores tie
    assert_agrees("fused", scores, (max(1, U // 3), U), weights([K, K]), mask_dtype=mask_dtype)
    assert fused.top_mask_of_scores(scores, (1,), weights([K]), mask_dtype=mask_dtype).mask_BTU.dtype == mask_dtype


@BOTH
@given(
    st.integers(1, 3),
    st.integers(0, 5),
    st.integers(1, 8),
    st.integers(1, 40),
    st.booleans(),
    st.sampled_from([None, math.nan, math.inf, -math.inf]),
    st.randoms(use_true_random=False),
)
def test_any_shape_ties_per_row_counts_and_divergences(path, B, T, K, U, ties, bad, random):
    generator = torch.Generator().manual_seed(random.randrange(2**31))
    scores = torch.randn(B, T, K, U, generator=generator)
    if ties:
        scores = (scores * 2).round()
    num_kept = tuple(random.randint(1, U) for _ in range(B))
    samples = [random.randint(1, K) for _ in range(B - 1)] + [K]
    if bad is not None and T:
        scores[random.randrange(B), random.randrange(T), random.randrange(K), random.randrange(U)] = bad
    assert_agrees(path, scores, num_kept, weights(samples))
    if bad is None:
        kept = kept_by(path, scores, num_kept)
        assert torch.equal(kept, kept_by_reference(scores, num_kept))
        least = torch.tensor(num_kept).view(B, 1, 1).expand(B, T, K)
        assert bool((kept.sum(-1) >= least).all())
        if not ties:
            assert torch.equal(kept.sum(-1), least)


def spread_out(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def uniform(shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(3))


# Rows on which a guess of the threshold from mean and deviation goes wrong, each in its own way.
SKEWED = {
    "normal": spread_out,
    "exponential": lambda shape: -uniform(shape).clamp_min(1e-20).log(),
    "minus exponential": lambda shape: uniform(shape).clamp_min(1e-20).log(),
    "Cauchy": lambda shape: (math.pi * (uniform(shape) - 0.5)).tan(),
    "of many scales": lambda shape: (30 * spread_out(shape)).exp().clamp_max(1e38) * spread_out(shape).sign(),
    "two values": lambda shape: (uniform(shape) < 0.3).float() * 3 - 1,
    "two clusters": lambda shape: torch.where(uniform(shape) < 0.3, 100.0, -100.0) + spread_out(shape),
    "one outlier": lambda shape: spread_out(shape).index_fill_(-1, torch.tensor(shape[-1] // 2), 1e30),
    "one outlier below": lambda shape: spread_out(shape).index_fill_(-1, torch.tensor(0), -1e30),
    "few values": lambda shape: spread_out(shape).round(),
    "ascending": lambda shape: spread_out(shape).sort(dim=-1).values,
    "descending": lambda shape: spread_out(shape).sort(dim=-1, descending=True).values,
    "denormal": lambda shape: spread_out(shape) * 1e-40,
    "denormal and normal": lambda shape: torch.where(uniform(shape) < 0.5, 1e-42, 1.0) * spread_out(shape),
    "huge": lambda shape: (uniform(shape) - 0.5) * 3.4e38 * 2,
    "huge, of one sign": lambda shape: uniform(shape) * 3.4e38,
    "the largest float": lambda shape: torch.where(uniform(shape) < 0.5, 1.0, -1.0) * torch.finfo(torch.float32).max,
    "negative": lambda shape: -spread_out(shape).abs() - 1e-3,
    "far from 0": lambda shape: 1000 + spread_out(shape),
    "all but equal": lambda shape: 1000 + spread_out(shape) * 1e-3,
    "equal but for one": lambda shape: torch.ones(shape).index_fill_(-1, torch.tensor(shape[-1] - 1), 2.0),
    "zeros": torch.zeros,
    "zeros of both signs": lambda shape: torch.where(uniform(shape) < 0.5, 0.0, -0.0),
    "zeros of both signs among others": lambda shape: torch.where(uniform(shape) < 0.7, 0.0, -1.0) * spread_out(shape),
    "equal": lambda shape: torch.full(shape, -1.5),
}


@BOTH
@pytest.mark.parametrize("name", SKEWED)
def test_skewed_rows_are_cut_where_the_reference_cuts_them(path, name):
    for U in (1, 7, 16, 33, 500, 2048):
        scores = SKEWED[name]((1, 2, 2, U))
        for num_kept in sorted({1, 2, U // 16, U // 4, U // 2, U - 1, U} & set(range(1, U + 1))):
            kept = kept_by(path, scores, (num_kept,))
            assert torch.equal(kept, kept_by_reference(scores, (num_kept,))), (U, num_kept)
            mask = run(path, scores, (num_kept,), torch.tensor([[[1.0, 0.0]]])).mask_BTU
            assert torch.equal(mask, scores[:, :, 0] * kept[:, :, 0]), (U, num_kept)


@BOTH
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=70), st.data())
def test_any_finite_row_is_cut_where_the_reference_cuts_it(path, row, data):
    scores = torch.tensor(row).view(1, 1, 1, -1)
    num_kept = (data.draw(st.integers(1, len(row))),)
    assert torch.equal(kept_by(path, scores, num_kept), kept_by_reference(scores, num_kept))


@BOTH
@pytest.mark.parametrize("value", [0.0, -1.5, 3.0])
def test_rows_of_equal_scores_are_kept_whole(path, value):
    scores = torch.full((2, 3, 2, 17), value)
    assert bool(kept_by(path, scores, (4,)).all())
    assert_agrees(path, scores, (4,), weights([2, 2]))


@BOTH
@pytest.mark.parametrize("U", [40, 1000])
@pytest.mark.parametrize("name", ["normal", "exponential", "Cauchy", "negative", "two clusters", "far from 0"])
def test_statistical_selection_equals_the_reference(path, U, name):
    scores = SKEWED[name]((2, 8, 3, U))
    for num_kept in ((U // 4,), (1, U), (U // 2, U - 1)):
        flips = Flips()
        kept = kept_by(path, scores, num_kept, selection="statistical")
        count_flips(scores, kept_by_reference(scores, num_kept, "statistical"), kept, flips)
        flips.check()
    mask = run(path, scores, (U // 4,), weights([3]), selection="statistical").mask_BTU
    kept = kept_by(path, scores, (U // 4,), selection="statistical")
    torch.testing.assert_close(mask, (scores * kept).mean(2), rtol=1e-5, atol=1e-6)


@BOTH
def test_statistical_selection_keeps_the_share_of_normal_scores(path):
    for share in (1 / 16, 1 / 4, 1 / 2, 15 / 16):
        kept = kept_by(path, torch.randn(1, 100, 1, 4096) * 3 + 1, (round(4096 * share),), selection="statistical")
        assert float(kept.float().mean()) == pytest.approx(share, abs=0.003)


@BOTH
@pytest.mark.parametrize("value", [0.0, 0.1, -1e-30, 12345.678])
@pytest.mark.parametrize("U", [17, 48, 1000])
def test_statistical_selection_of_equal_scores_is_the_references(path, value, U):
    scores = torch.full((1, 2, 1, U), value)
    for num_kept in ((U // 4,), (3 * U // 4,)):
        kept = kept_by(path, scores, num_kept, selection="statistical")
        assert torch.equal(kept, kept_by_reference(scores, num_kept, "statistical"))


@BOTH
@pytest.mark.parametrize("count_every", [1, 2, 5, 100])
@pytest.mark.parametrize("U", [20, 33])
def test_the_statistics_look_at_the_samples_that_have_weight(path, count_every, U):
    scores, num_kept, samples = torch.randn(3, 4, 3, U), (5, 2, U), (1, 3, 2)
    mask, counts, union, overlap = run(path, scores, num_kept, weights(list(samples)), count_every=count_every)
    kept = kept_by_reference(scores, num_kept)
    looked = [(b, t) for b in range(3) for t in range(4)][::count_every]
    expected_counts, expected_union, expected_overlap = torch.zeros(U), 0.0, 0.0
    for b, t in looked:
        own = [set(kept[b, t, k].nonzero()[:, 0].tolist()) for k in range(samples[b])]
        for units in own:
            expected_counts[sorted(units)] += 1
        expected_union += len(set.union(*own)) / U
        pairs = [len(a & c) / len(a) for i, a in enumerate(own) for j, c in enumerate(own) if i != j]
        expected_overlap += sum(pairs) / len(pairs) if pairs else 1.0
    assert torch.equal(counts, expected_counts)
    assert float(union) == pytest.approx(expected_union, rel=1e-5)
    assert float(overlap) == pytest.approx(expected_overlap, rel=1e-5)
    assert counts.dtype == union.dtype == overlap.dtype == torch.float32
    assert union.shape == overlap.shape == ()
    assert not any(total.requires_grad for total in (counts, union, overlap))
    assert torch.equal(mask, run(path, scores, num_kept, weights(list(samples))).mask_BTU)


@BOTH
@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("num_bad", [1, 5, 20])
def test_a_divergence_shows_throughout_its_token_and_nowhere_else(path, mask_dtype, bad, num_bad):
    options = {"mask_dtype": mask_dtype} if path == "fused" else {}
    for selection in ("exact", "statistical"):
        for num_kept in ((4,), (20,)):
            scores = torch.randn(2, 3, 2, 20)
            clean = run(path, scores, num_kept, weights([2, 2]), selection=selection, **options).mask_BTU
            scores[1, 2, 0, :num_bad] = bad
            scores.requires_grad_()
            mask = run(path, scores, num_kept, weights([2, 2]), selection=selection, **options).mask_BTU
            assert mask[1, 2].isnan().all()
            assert torch.equal(mask.flatten(0, 1)[:5], clean.flatten(0, 1)[:5])
            mask.float().sum().backward()
            assert scores.grad[1, 2, 0].isnan().all()
            assert int(scores.grad.isnan().sum()) == 20


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_in_the_reference_too_every_gradient_of_a_diverged_sample_is_nan(bad):
    scores = torch.randn(2, 3, 2, 20)
    scores[1, 2, 0, 3] = bad
    scores.requires_grad_()
    mask = naive.mean_mask(scores, naive.select(scores, torch.tensor([4, 4])), torch.full((2, 2), 0.5))
    assert mask[1, 2].isnan().all()
    mask.sum().backward()
    assert scores.grad[1, 2, 0].isnan().all()
    assert int(scores.grad.isnan().sum()) == 20


@BOTH
def test_nothing_but_kept_scores_gets_a_gradient(path):
    scores = torch.randn(1, 3, 2, 30, requires_grad=True)
    run(path, scores, (7,), weights([2])).mask_BTU.sum().backward()
    assert torch.equal(scores.grad != 0, kept_by_reference(scores, (7,)))


@BOTH
def test_weights_may_differ_by_token(path):
    scores, weight_BTK = torch.randn(2, 3, 2, 12), torch.rand(2, 3, 2)
    mask = run(path, scores, (3,), weight_BTK).mask_BTU
    kept = kept_by_reference(scores, (3,))
    torch.testing.assert_close(mask, (scores * kept * weight_BTK[..., None]).sum(2), rtol=1e-6, atol=1e-6)


@BOTH
def test_a_sample_without_weight_changes_nothing(path):
    scores = torch.randn(2, 3, 3, 40)
    for k in range(3):
        weight = torch.full((1, 1, 3), 0.5)
        weight[..., k] = 0.0
        others = [i for i in range(3) if i != k]
        with_it = run(path, scores, (9,), weight)
        without = run(path, scores[:, :, others], (9,), weight[..., others])
        for name, value in with_it._asdict().items():
            torch.testing.assert_close(value, getattr(without, name), rtol=1e-6, atol=1e-7, msg=name)


@BOTH
def test_scores_need_not_be_contiguous(path):
    scores = torch.randn(4, 20, 3, 5).permute(0, 2, 3, 1)
    assert_agrees(path, scores, (6,), weights([5] * 4))
    assert_agrees(path, torch.randn(2, 3, 2, 60)[..., ::2], (6,), weights([2, 2]))
    assert_agrees(path, torch.randn(2, 3, 1, 30).expand(2, 3, 4, 30), (6,), weights([4, 4]))
    leaf = torch.randn(2, 3, 2, 30, requires_grad=True)
    run(path, leaf, (6,), weights([2, 2])).mask_BTU.sum().backward()  # its gradient has no strides at all
    assert torch.equal(leaf.grad != 0, kept_by_reference(leaf, (6,)))


@BOTH
@pytest.mark.parametrize("shape", [(2, 0, 3, 12), (0, 4, 3, 12), (0, 0, 1, 12)])
def test_no_tokens_give_an_empty_mask_and_no_counts(path, shape):
    scores = torch.randn(shape, requires_grad=True)
    mask, counts, union, overlap = run(path, scores, (4,), weights([shape[2]]))
    assert mask.shape == (shape[0], shape[1], 12)
    assert torch.equal(counts, torch.zeros(12))
    assert float(union) == float(overlap) == 0
    mask.sum().backward()
    assert scores.grad.shape == shape


@BOTH
def test_threads_change_nothing(path):
    scores, weight = torch.randn(3, 7, 3, 300), weights([1, 3, 2])
    alone = run(path, scores, (75, 10, 299), weight, count_every=2)
    before = torch.get_num_threads()
    try:
        for threads in (2, 3, 4):
            torch.set_num_threads(threads)
            together = run(path, scores, (75, 10, 299), weight, count_every=2)
            for name, value in alone._asdict().items():
                assert torch.equal(value, getattr(together, name)), name
    finally:
        torch.set_num_threads(before)


@needs_kernels
@pytest.mark.parametrize(
    ("num_kept", "message"), [((0,), "num_kept"), ((13,), "num_kept"), ((1, 2, 3), "num_kept"), ((), "num_kept")]
)
def test_the_kernels_refuse_numbers_that_make_no_sense(num_kept, message):
    with pytest.raises(RuntimeError, match=message):
        fused.top_mask_of_scores(torch.randn(2, 2, 2, 12), num_kept, weights([2]))


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


@BOTH
def test_a_row_is_selected_alike_alone_and_in_a_batch(path):
    scores = torch.randn(5, 40, 2, 64)
    whole = run(path, scores, (16,), weights([2])).mask_BTU
    for b in range(5):
        assert torch.equal(run(path, scores[b : b + 1], (16,), weights([2])).mask_BTU[0], whole[b])


def test_bfloat16_models_select_from_float32_scores(monkeypatch):
    layer = InfinityFFN(16, 64, z_dim=8).eval().to(torch.bfloat16)
    seen = []
    select = eager.select

    def spy(scores, num_kept):
        kept = select(scores, num_kept)
        seen.append((scores.detach(), num_kept, kept))
        return kept

    monkeypatch.setattr(eager, "select", spy)
    out = layer(torch.randn(2, 5, 16, dtype=torch.bfloat16), Routing(backend="eager"))
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
