"""Score cuts: what they keep, and how one is found."""

import statistics

import pytest
import torch
from helpers import make_layer, tiny_model, tokens

from infmoe.errors import InfMoEError
from infmoe.eval import adaptive
from infmoe.eval.adaptive import calibrate_cut
from infmoe.eval.heldout import HeldOut, evaluate_loss
from infmoe.layers import PerLayer, Routing
from infmoe.ops.masked_ffn import eager, naive

WINDOWS = HeldOut(tokens(6, 32), torch.arange(6))


@pytest.mark.parametrize("cut", [-100.0, -0.3, 0.0, 0.7, 100.0])
def test_the_masks_are_those_of_the_reference_with_their_gradients(cut):
    torch.manual_seed(0)
    scores = torch.randn(2, 3, 2, 24, requires_grad=True)
    weight = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    kept = naive.select_cut(scores, cut)
    assert kept.any(dim=-1).all()  # never none
    expected = naive.mean_mask(scores, kept, weight)
    found = eager.mean_cut_mask(scores, cut, weight[:, None])
    torch.testing.assert_close(found.mask_BTU, expected)
    grad = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(found.mask_BTU, scores, grad), torch.autograd.grad(expected, scores, grad), strict=True
    ):
        torch.testing.assert_close(a, b)
    assert found.counts_U.sum() == (kept * (weight[:, None, :, None] != 0)).sum()


@pytest.mark.parametrize("backend", ["eager", "fused", "sparse"])
@pytest.mark.parametrize("options", [{}, {"hidden_act": "swiglu"}, {"block_size": 4}], ids=str)
def test_every_backend_runs_the_cut(backend, options):
    torch.manual_seed(0)
    layer = make_layer("infinity", **options)
    x = torch.randn(2, 5, 16)
    routing = Routing(score_cut=0.4, num_samples=2)
    with torch.no_grad():
        out = layer(x, Routing(score_cut=0.4, num_samples=2, backend=backend))
        expected = layer(x, routing)
        indices = layer._draw(x, routing, layer._dials(routing, 2))
        scores = layer._scores(indices.z_BTKZ)
        mask = naive.mean_mask(scores, naive.select_cut(scores, 0.4), torch.full((2, 2), 0.5))
        h = layer.act(layer.w1(x)) * (layer.w3(x) if layer.w3 is not None else 1.0)
        y = layer.w2(h * mask.repeat_interleave(layer.block_size, dim=-1))
    torch.testing.assert_close(out.y_BTD, expected.y_BTD, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.y_BTD, y, rtol=1e-4, atol=1e-5)
    assert out.stats.counts_U.sum() == naive.select_cut(scores, 0.4).sum()


def test_tokens_of_larger_scores_keep_more():
    torch.manual_seed(0)
    layer = make_layer("infinity", num_samples=1)
    x = torch.randn(1, 50, 16)
    unions = [layer(scale * x, Routing(score_cut=1.0, mode="mu")).stats.union.item() for scale in (0.5, 1.0, 2.0)]
    assert unions[0] < unions[1] < unions[2]
    fixed = [layer(scale * x, Routing(keep_ratio=0.25, mode="mu")).stats.union.item() for scale in (0.5, 1.0, 2.0)]
    assert fixed[0] == fixed[1] == fixed[2]


@pytest.mark.parametrize("per_layer", [True, False])
@pytest.mark.parametrize("share", [0.1, 0.4])
def test_a_calibrated_cut_keeps_its_share(share, per_layer):
    model = tiny_model(num_samples=2)
    with torch.no_grad():
        model.transformer.h[1].mlp.w_z.weight *= 1.5  # scores of another size than the first layer's
    cut = calibrate_cut(model, WINDOWS, share, per_layer=per_layer)
    assert isinstance(cut, PerLayer) == per_layer
    layers = evaluate_loss(model, WINDOWS, Routing(score_cut=cut)).layers
    kept = [float(s.counts_U.sum() / s.tokens / len(s.counts_U)) / 2 for s in layers]
    if per_layer:
        assert kept == pytest.approx([share] * 2, rel=0.01)
    else:
        assert sum(kept) / 2 == pytest.approx(share, rel=0.01)
        assert kept[0] + 0.01 < kept[1]  # larger scores, more units


@pytest.mark.parametrize("scale", [1e-4, 1e3])
def test_scores_of_any_size_can_be_cut(scale):
    model = tiny_model(num_samples=2)
    with torch.no_grad():
        for block in model.transformer.h:
            block.mlp.w_z.weight *= scale
    cut = calibrate_cut(model, WINDOWS, 0.2)
    layers = evaluate_loss(model, WINDOWS, Routing(score_cut=cut)).layers
    kept = [float(s.counts_U.sum() / s.tokens / len(s.counts_U)) / 2 for s in layers]
    assert kept == pytest.approx([0.2] * 2, rel=0.01)
    with pytest.raises(InfMoEError, match="ask for 1/96 or more"):
        calibrate_cut(model, WINDOWS, 0.005)
    with torch.no_grad():
        model.transformer.h[0].mlp.w_z.weight.zero_()
    with pytest.raises(InfMoEError, match="many scores are alike"):
        calibrate_cut(model, WINDOWS, 0.2)


@pytest.mark.parametrize("per_layer", [True, False])
@pytest.mark.parametrize(("part", "factor"), [(0.9, 1e-3), (0.1, 100.0)])
@pytest.mark.parametrize("share", [1 / 48, 1 / 16, 1 / 4, 0.9])
def test_scores_of_two_sizes_can_be_cut(share, part, factor, per_layer, monkeypatch):
    """A plateau lies between them, on which steps by quantiles stall."""
    model = tiny_model(num_samples=2)
    with torch.no_grad():
        for block in model.transformer.h:
            rows = block.mlp.w_z.weight
            rows[: int(part * len(rows))] *= factor
    rounds = []
    monkeypatch.setattr(
        adaptive, "_kept", lambda *a, original=adaptive._kept: rounds.append(original(*a)) or rounds[-1]
    )
    calibrate_cut(model, WINDOWS, share, per_layer=per_layer)
    kept = rounds[-1] if per_layer else [sum(rounds[-1]) / 2]
    assert kept == pytest.approx([share] * len(kept), rel=0.01)
    assert len(rounds) <= 40


def test_a_rare_share_is_found():
    search, normal = adaptive._Search(2e-4, 1.0), statistics.NormalDist()
    for _ in range(20):
        kept = 1.0 - normal.cdf(search.cut)
        if abs(kept / 2e-4 - 1.0) < 0.005:
            return
        search.step(kept)
    pytest.fail("no cut found")


@pytest.mark.parametrize("share", [0.05, 0.4, 0.5, 0.6])
@pytest.mark.parametrize("pull", [-8.0, -0.4, 0.4, 8.0])
def test_a_layer_whose_scores_move_with_the_layer_below_is_caught_up_with(share, pull, monkeypatch):
    """The second layer's scores hang on what the first keeps: what was too low a cut may be too high a round later."""
    normal, rounds = statistics.NormalDist(), []

    def kept(model, held_out, routing, *rest):
        first, second = routing.score_cut.values
        one = 1.0 - normal.cdf(first / 3.0)
        rounds.append([one, 1.0 - normal.cdf(second - pull * one)])
        return rounds[-1]

    monkeypatch.setattr(adaptive, "_kept", kept)
    calibrate_cut(tiny_model(), WINDOWS, share)
    assert rounds[-1] == pytest.approx([share] * 2, rel=0.01)
    assert len(rounds) <= 20


def test_generation_takes_a_cut_by_name_and_caches():
    model, ids = tiny_model(), tokens(2, 5)
    once = model.generate(ids, max_new_tokens=6, do_sample=False, score_cut=0.3)
    whole = ids
    for _ in range(6):
        whole = torch.cat([whole, model(whole, score_cut=0.3).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(once, whole)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"score_cut": float("nan")}, "finite"),
        ({"score_cut": (0.1, 0.2)}, "for the whole batch"),
        ({"score_cut": 0.1, "keep_ratio": 0.5}, "give one of them"),
    ],
)
def test_bad_cuts_are_refused(fields, named):
    with pytest.raises(InfMoEError, match=named):
        Routing(**fields)


def test_where_a_cut_means_nothing_it_is_refused():
    x = torch.randn(1, 3, 16)
    with pytest.raises(InfMoEError, match="mask_scale='fixed' scales by"):
        make_layer("infinity", mask_scale="fixed")(x, Routing(score_cut=0.1))
    with pytest.raises(InfMoEError, match=r"'triton' (can't|has no)"):
        make_layer("infinity")(x, Routing(score_cut=0.1, backend="triton"))
    for ffn in ("dense", "switch", "moe"):
        with pytest.raises(InfMoEError, match="no dial 'score_cut'"):
            make_layer(ffn)(x, Routing(score_cut=0.1))
    with pytest.raises(InfMoEError, match="union_ratio"):
        make_layer("infinity").cost(Routing(score_cut=0.1))
    layer = make_layer("infinity", num_samples=1)
    half, whole = (layer.cost(Routing(score_cut=0.1), union_ratio=u).flops_ideal for u in (0.5, 1.0))
    assert half < whole
    with pytest.raises(InfMoEError, match="no scores"):
        calibrate_cut(tiny_model("dense"), WINDOWS, 0.5)
    with pytest.raises(InfMoEError, match=r"in \(0, 1\)"):
        calibrate_cut(tiny_model(), WINDOWS, 1.0)
