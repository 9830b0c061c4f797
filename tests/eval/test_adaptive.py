"""Cuts by score and by mass, fewer samples for sure tokens: what they keep, and how each is found."""

import dataclasses
import statistics

import pytest
import torch
from helpers import make_layer, tiny_model, tokens

from infmoe.errors import InfMoEError
from infmoe.eval import adaptive
from infmoe.eval.adaptive import calibrate_cut, calibrate_mass, calibrate_sigma_to_mu, layer_ratios, routers_sigma_to_mu
from infmoe.eval.heldout import HeldOut, evaluate_loss
from infmoe.layers import PerLayer, Routing
from infmoe.ops.masked_ffn import eager, naive

WINDOWS = HeldOut(tokens(6, 32), torch.arange(6))


RULES = {"score_cut": (naive.select_cut, eager.mean_cut_mask), "score_mass": (naive.select_mass, eager.mean_mass_mask)}


@pytest.mark.parametrize(
    ("rule", "at"),
    [*(("score_cut", at) for at in (-100.0, -0.3, 0.0, 0.7, 100.0)), *(("score_mass", at) for at in (1e-6, 0.4, 1.0))],
)
def test_the_masks_are_those_of_the_reference_with_their_gradients(rule, at):
    torch.manual_seed(0)
    scores = torch.randn(2, 3, 2, 24)
    scores[0, 0] -= 10.0  # no score is positive
    scores[0, 1, 0, 1:4] = scores[0, 1, 0].max()  # ties
    scores.requires_grad_()
    weight = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    select, mean_mask = RULES[rule]
    kept = select(scores, at)
    assert kept.any(dim=-1).all()  # never none
    expected = naive.mean_mask(scores, kept, weight)
    found = mean_mask(scores, at, weight[:, None])
    torch.testing.assert_close(found.mask_BTU, expected)
    grad = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(found.mask_BTU, scores, grad), torch.autograd.grad(expected, scores, grad), strict=True
    ):
        torch.testing.assert_close(a, b)
    assert found.counts_U.sum() == (kept * (weight[:, None, :, None] != 0)).sum()


def test_the_fewest_units_that_hold_the_mass_are_kept():
    scores = torch.tensor([4.0, -9.0, 1.0, 3.0, 2.0, 0.0]).view(1, 1, 1, 6)
    for mass, kept in (
        (0.4, [4]),
        (0.41, [4, 3]),
        (0.7, [4, 3]),
        (0.71, [4, 3, 2]),
        (0.91, [4, 3, 2, 1]),
        (1.0, [4, 3, 2, 1]),
    ):
        for select in (naive.select_mass, lambda *a: eager.mean_mass_mask(*a, torch.ones(1, 1, 1)).mask_BTU != 0):
            found = select(scores, mass).view(6)
            assert sorted(scores.view(6)[found].tolist()) == sorted(kept), mass
    torch.manual_seed(0)
    many = torch.randn(1, 1, 1, 50_000)  # a running sum in float32 would stop before the smallest
    assert torch.equal(naive.select_mass(many, 1.0).view(-1), many.view(-1) > 0)
    assert torch.equal(eager.mean_mass_mask(many, 1.0, torch.ones(1, 1, 1)).mask_BTU.view(-1) != 0, many.view(-1) > 0)


@pytest.mark.parametrize("backend", ["eager", "fused", "sparse"])
@pytest.mark.parametrize("options", [{}, {"hidden_act": "swiglu"}, {"block_size": 4}], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_every_backend_runs_the_cut(backend, options, rule):
    torch.manual_seed(0)
    layer = make_layer("infinity", **options)
    select = RULES[rule][0]
    x = torch.randn(2, 5, 16)
    routing = Routing(num_samples=2, **{rule: 0.4})
    with torch.no_grad():
        out = layer(x, dataclasses.replace(routing, backend=backend))
        expected = layer(x, routing)
        indices = layer._draw(x, routing, layer._dials(routing, 2))
        scores = layer._scores(indices.z_BTKZ)
        mask = naive.mean_mask(scores, select(scores, 0.4), torch.full((2, 2), 0.5))
        h = layer.act(layer.w1(x)) * (layer.w3(x) if layer.w3 is not None else 1.0)
        y = layer.w2(h * mask.repeat_interleave(layer.block_size, dim=-1))
    torch.testing.assert_close(out.y_BTD, expected.y_BTD, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.y_BTD, y, rtol=1e-4, atol=1e-5)
    assert out.stats.counts_U.sum() == select(scores, 0.4).sum()


@pytest.mark.parametrize("backend", ["eager", "fused", "sparse"])
@pytest.mark.parametrize("tokens_in_a_row", [1, 40])
def test_sure_tokens_run_their_first_sample_and_others_all(backend, tokens_in_a_row):
    torch.manual_seed(0)
    layer = make_layer("infinity").eval()
    with torch.no_grad():
        layer.router.sigma.weight.mul_(30.0)  # tokens differ in how sure the router is of them
    x = torch.randn(4, tokens_in_a_row, 16)
    indices = layer._draw(x, Routing(), layer._dials(Routing(num_samples=3), 4))
    spread = indices.sigma_BTZ.square().mean(-1).sqrt() / indices.mu_BTZ.square().mean(-1).sqrt()
    bound = float(spread.detach().median()) * 1.001
    sure = spread < bound
    assert sure.any()
    assert not sure.all()

    def run(**dials):
        with torch.no_grad():
            return layer(x, Routing(num_samples=3, backend=backend, **dials))

    mixed, three, every = run(min_sigma_to_mu=bound), run(), run(min_sigma_to_mu=1e6)
    with torch.no_grad():
        one = layer(x, Routing(num_samples=1, backend=backend))
    torch.testing.assert_close(mixed.y_BTD[sure], one.y_BTD[sure], rtol=1e-5, atol=1e-6)
    assert torch.equal(mixed.y_BTD[~sure], three.y_BTD[~sure])
    torch.testing.assert_close(every.y_BTD, one.y_BTD, rtol=1e-5, atol=1e-6)
    assert torch.equal(run(min_sigma_to_mu=0.0).y_BTD, three.y_BTD)
    assert one.stats.union <= mixed.stats.union < three.stats.union
    torch.testing.assert_close(every.stats.union, one.stats.union)


def test_rows_keep_their_own_number_of_samples_where_sure_tokens_take_one():
    torch.manual_seed(0)
    layer = make_layer("infinity").eval()
    with torch.no_grad():
        layer.router.sigma.weight.mul_(30.0)
    x = torch.randn(2, 20, 16)

    def run(rows, num_samples, **dials):
        with torch.no_grad():
            return layer(x[rows], Routing(num_samples=num_samples, **dials)).y_BTD

    indices = layer._draw(x, Routing(), layer._dials(Routing(num_samples=3), 2))
    bound = float((indices.sigma_BTZ.norm(dim=-1) / indices.mu_BTZ.norm(dim=-1)).detach().median())
    both = run([0, 1], (1, 3), min_sigma_to_mu=bound)
    torch.testing.assert_close(both[:1], run([0], 1))
    torch.testing.assert_close(both[1:], run([1], 3, min_sigma_to_mu=bound))
    assert not torch.allclose(both[1:], run([1], 3), atol=1e-4)
    assert not torch.allclose(both[1:], run([1], 1), atol=1e-4)


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


def test_layers_keep_what_one_cut_leaves_them():
    model = tiny_model(num_hidden_layers=3)
    with torch.no_grad():
        model.transformer.h[1].mlp.w_z.weight.mul_(4.0)  # its scores are larger, and so more of them pass the cut
    ratios = layer_ratios(model, WINDOWS, 0.25, num_samples=2).values
    assert sum(ratios) / 3 == pytest.approx(0.25, rel=0.02)
    assert ratios[1] > 1.5 * max(ratios[0], ratios[2])
    model(WINDOWS.tokens_NT[:1], keep_ratio=PerLayer(ratios))
    with pytest.raises(InfMoEError, match="no scores to cut"):
        layer_ratios(tiny_model("moe"), WINDOWS, 0.25)


@pytest.mark.parametrize("per_layer", [True, False])
@pytest.mark.parametrize("share", [0.05, 0.4])
def test_a_calibrated_mass_keeps_its_share(share, per_layer):
    model = tiny_model(num_samples=2)
    with torch.no_grad():
        model.transformer.h[1].mlp.w_z.weight *= 1.5  # which changes nothing: a mass is a share
    mass = calibrate_mass(model, WINDOWS, share, per_layer=per_layer)
    layers = evaluate_loss(model, WINDOWS, Routing(score_mass=mass)).layers
    kept = [float(s.counts_U.sum() / s.tokens / len(s.counts_U)) / 2 for s in layers]
    assert (kept if per_layer else [sum(kept) / 2]) == pytest.approx([share] * (2 if per_layer else 1), rel=0.01)
    assert isinstance(mass, PerLayer) == per_layer
    with pytest.raises(InfMoEError, match=r"no more than 0\.[345]\d\d have positive scores"):
        calibrate_mass(model, WINDOWS, 0.9)


def unsure_model(**options):
    """Its tokens differ in how sure the router is of them."""
    model = tiny_model(**options)
    with torch.no_grad():
        for block in model.transformer.h:
            block.mlp.router.sigma.weight.mul_(30.0)
    return model


@pytest.mark.parametrize("keep_ratio", [None, 0.05])
def test_a_calibrated_bound_gives_the_mean_number_of_samples(keep_ratio):
    model = unsure_model(num_samples=2)
    bounds = calibrate_sigma_to_mu(model, WINDOWS, 1.5, num_samples=4, keep_ratio=keep_ratio)
    routing = Routing(num_samples=4, keep_ratio=keep_ratio, min_sigma_to_mu=bounds)
    for found, bound in zip(routers_sigma_to_mu(model, WINDOWS, routing), bounds.values, strict=True):
        assert len(found) == WINDOWS.tokens_NT.numel()
        assert 1 + 3 * float((found >= bound).float().mean()) == pytest.approx(1.5, abs=0.03)
    for mean, end in ((1.0, max), (4.0, min)):
        ends = calibrate_sigma_to_mu(model, WINDOWS, mean, num_samples=4)
        first = routers_sigma_to_mu(model, WINDOWS, Routing(num_samples=4))[0]
        assert ends.values[0] == pytest.approx(float(end(first.tolist())))


def test_a_bound_that_means_nothing_is_refused():
    for bad in ({"mean_samples": 0.5, "num_samples": 4}, {"mean_samples": 1.0, "num_samples": 1}):
        with pytest.raises(InfMoEError, match="the mean must lie between"):
            calibrate_sigma_to_mu(tiny_model(), WINDOWS, **bad)
    with pytest.raises(InfMoEError, match="there is no sigma to look at"):
        calibrate_sigma_to_mu(tiny_model(routing_mode="mu"), WINDOWS, 1.5, num_samples=2)
    with pytest.raises(InfMoEError, match="there is no sigma to look at"):
        routers_sigma_to_mu(tiny_model(), WINDOWS, Routing(mode="mu"))
    alike = tiny_model()
    with torch.no_grad():
        for block in alike.transformer.h:
            for linear in (block.mlp.router.sigma, block.mlp.router.mu):
                linear.weight.zero_()
                linear.bias.fill_(1.0)
    with pytest.raises(InfMoEError, match=r"as sure of many tokens, and 4\.00 is as near as it gets"):
        calibrate_sigma_to_mu(alike, WINDOWS, 2.0, num_samples=4)


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


@pytest.mark.parametrize(
    "dial", [{"score_cut": 0.3}, {"score_mass": 0.6}, {"min_sigma_to_mu": 4.0, "num_samples": 3}], ids=str
)
def test_generation_takes_it_by_name_and_caches(dial):
    model, ids = unsure_model(), tokens(2, 5)
    once = model.generate(ids, max_new_tokens=6, do_sample=False, **dial)
    plain = {name: value for name, value in dial.items() if name == "num_samples"}
    assert not torch.allclose(model(ids, **dial).logits, model(ids, **plain).logits, atol=1e-5)  # it is not ignored
    whole = ids
    for _ in range(6):
        whole = torch.cat([whole, model(whole, **dial).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(once, whole)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"score_cut": float("nan")}, "finite"),
        ({"score_cut": (0.1, 0.2)}, "for the whole batch"),
        ({"score_cut": 0.1, "keep_ratio": 0.5}, "score_cut takes the place of keep_ratio: give one of them"),
        ({"score_cut": 0.1, "score_mass": 0.5}, "score_mass takes the place of score_cut: give one of them"),
        ({"score_mass": 0.0}, r"\(0, 1\]"),
        ({"score_mass": 1.5}, r"\(0, 1\]"),
        ({"score_mass": PerLayer([(0.1, 0.2)])}, "for the whole batch"),
        ({"min_sigma_to_mu": -0.1}, "0 or more"),
        ({"min_sigma_to_mu": (0.1, 0.2)}, "for the whole batch"),
        ({"min_sigma_to_mu": float("inf")}, "finite"),
    ],
)
def test_bad_cuts_are_refused(fields, named):
    with pytest.raises(InfMoEError, match=named):
        Routing(**fields)


def test_where_a_cut_means_nothing_it_is_refused():
    x = torch.randn(1, 3, 16)
    for dial in RULES:
        with pytest.raises(InfMoEError, match=f"{dial} keeps no fixed ratio, which mask_scale='fixed' scales by"):
            make_layer("infinity", mask_scale="fixed")(x, Routing(**{dial: 0.1}))
        with pytest.raises(InfMoEError, match=r"'triton' (can't|has no)"):
            make_layer("infinity")(x, Routing(backend="triton", **{dial: 0.1}))
        with pytest.raises(InfMoEError, match=f"what {dial} keeps .* give union_ratio"):
            make_layer("infinity").cost(Routing(**{dial: 0.1}))
    for dial in (*RULES, "min_sigma_to_mu"):
        for ffn in ("dense", "switch", "moe"):
            with pytest.raises(InfMoEError, match=f"no dial '{dial}'"):
                make_layer(ffn)(x, Routing(**{dial: 0.1}))
    with pytest.raises(InfMoEError, match="ask at a fixed num_samples"):
        make_layer("infinity").cost(Routing(min_sigma_to_mu=0.1), union_ratio=0.5)
    with pytest.raises(InfMoEError, match="give num_samples of 2 or more"):
        make_layer("infinity")(x, Routing(min_sigma_to_mu=0.1, num_samples=1))
    with pytest.raises(InfMoEError, match="leave min_sigma_to_mu out"):
        make_layer("infinity")(x, Routing(min_sigma_to_mu=0.1, mode="mu"))
    with pytest.raises(InfMoEError, match="leave min_sigma_to_mu out"):
        make_layer("infinity", sigma_activation="none")(x, Routing(min_sigma_to_mu=0.1))
    layer = make_layer("infinity", num_samples=1)
    half, whole = (layer.cost(Routing(score_cut=0.1), union_ratio=u).flops_ideal for u in (0.5, 1.0))
    assert half < whole
    with pytest.raises(InfMoEError, match="no scores"):
        calibrate_cut(tiny_model("dense"), WINDOWS, 0.5)
    with pytest.raises(InfMoEError, match=r"in \(0, 1\)"):
        calibrate_cut(tiny_model(), WINDOWS, 1.0)
