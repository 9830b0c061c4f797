"""∞-MoE's dials, modes and noise: for a call, a row, a layer."""

import pytest
import torch
from helpers import key, record_selections, replay_selections, routing
from infinity_helpers import D, expert, infinity_layer, inputs, recorded_indices, same_weights

from infmoe.errors import InfMoEError
from infmoe.layers import NoiseKey, PerLayer, Routing


@pytest.mark.parametrize("options", [{}, {"routing_mode": "mu"}, {"sigma_activation": "none"}])
def test_mu_is_deterministic_and_takes_no_samples(options):
    layer, x = infinity_layer(**options), inputs()
    mode = {} if options else {"mode": "mu"}
    first = layer.train()(x, Routing(**mode))
    assert torch.equal(first.y_BTD, layer(x, Routing(**mode)).y_BTD)
    assert torch.equal(first.y_BTD, layer(x, routing(3, **mode)).y_BTD)
    part, _ = expert(layer, x[1, 2], layer.router.mu(x[1, 2]), 0.25)
    torch.testing.assert_close(first.y_BTD[1, 2], part + layer.w2.bias, rtol=1e-4, atol=1e-5)
    assert float(first.stats.sigma) == 0
    assert float(first.stats.counts_U.sum()) == 15 * 12
    if options:
        with pytest.raises(InfMoEError, match="num_samples"):
            layer(x, Routing(num_samples=2))


@pytest.mark.parametrize("mode", ["sample", "antithetic"])
def test_without_sigma_there_is_no_mode_that_draws(mode):
    with pytest.raises(InfMoEError, match="sigma_activation='none'"):
        infinity_layer(sigma_activation="none")(inputs(), Routing(mode=mode))


def test_a_layer_that_routes_by_mu_may_be_told_to_sample():
    layer, x = infinity_layer(routing_mode="mu"), inputs()
    assert torch.equal(
        layer(x, routing(3, mode="sample", num_samples=2)).y_BTD,
        same_weights(layer, infinity_layer())(x, routing(3, num_samples=2)).y_BTD,
    )


@pytest.mark.parametrize("K", [1, 2, 3, 6])
def test_antithetic_samples_come_in_mirrored_pairs(K):
    layer, x = infinity_layer(), inputs()
    z, mu, _ = recorded_indices(layer, x, routing(3, mode="antithetic", num_samples=K))
    plain, _, _ = recorded_indices(layer, x, routing(3, num_samples=K))
    assert z.shape[2] == K
    for k in range(0, K, 2):
        torch.testing.assert_close(z[:, :, k], plain[:, :, k // 2])
        if k + 1 < K:
            torch.testing.assert_close(z[:, :, k] + z[:, :, k + 1], 2 * mu, rtol=1e-5, atol=1e-5)


def test_more_samples_leave_the_first_ones_as_they_are():
    layer, x = infinity_layer(), inputs()
    for mode in ("sample", "antithetic"):
        most = recorded_indices(layer, x, routing(3, mode=mode, num_samples=7)).z_BTKZ
        for K in (1, 2, 4):
            fewer = recorded_indices(layer, x, routing(3, mode=mode, num_samples=K)).z_BTKZ
            assert torch.equal(fewer, most[:, :, :K])


@pytest.mark.parametrize("mask_scale", ["none", "fixed", "rms"])
@pytest.mark.parametrize("mode", ["sample", "antithetic"])
def test_rows_with_their_own_dials_equal_each_alone(mask_scale, mode):
    layer, x, noise_key = infinity_layer(mask_scale=mask_scale), inputs(4), key(4)
    samples, ratios = (1, 4, 2, 4), (0.25, 0.5, 1.0, 0.1)
    together = layer(x, Routing(num_samples=samples, keep_ratio=ratios, key=noise_key, mode=mode))
    stats = []
    for b in range(4):
        alone = layer(
            x[b : b + 1],
            Routing(
                num_samples=samples[b],
                keep_ratio=ratios[b],
                mode=mode,
                key=NoiseKey(seed=noise_key.seed, step=noise_key.step, stream=noise_key.stream[b : b + 1]),
            ),
        )
        torch.testing.assert_close(together.y_BTD[b : b + 1], alone.y_BTD, rtol=1e-5, atol=1e-5)
        stats.append(alone.stats)
    for name, value in sum(stats[1:], stats[0])._asdict().items():
        torch.testing.assert_close(getattr(together.stats, name), value, rtol=1e-5, atol=1e-5)


def test_per_layer_dials_reach_their_layer():
    x = inputs()
    for index in (0, 1):
        layer = infinity_layer(layer_index=index)
        given = routing(3, num_samples=PerLayer([1, 5]), keep_ratio=PerLayer([(0.5, 0.25, 1.0), 0.1]))
        plain = routing(3, num_samples=(1, 5)[index], keep_ratio=((0.5, 0.25, 1.0), 0.1)[index])
        assert torch.equal(layer(x, given).y_BTD, layer(x, plain).y_BTD)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (Routing(num_samples=(1, 2)), "num_samples has 2 values for a batch of 3 rows"),
        (Routing(keep_ratio=(0.1, 0.2, 0.3, 0.4)), "keep_ratio has 4 values"),
        (Routing(key=NoiseKey(stream=torch.arange(2))), "2 streams"),
        (Routing(key=NoiseKey(position=torch.arange(4))), "positions"),
        (Routing(key=NoiseKey(position=torch.zeros(2, 5, dtype=torch.int64))), "positions"),
    ],
)
def test_dials_and_keys_that_do_not_fit_the_batch_are_refused(given, named):
    with pytest.raises(InfMoEError, match=named):
        infinity_layer()(inputs(), given)


def test_layers_steps_streams_and_positions_draw_their_own():
    x = inputs(1, 5)[:, :1].expand(3, 5, D)  # one token, fifteen times over
    layer, noise_key = infinity_layer(), key(3)
    base = recorded_indices(layer, x, routing(3)).z_BTKZ
    assert len(base.flatten(0, 2).unique(dim=0)) == 3 * 5 * 3
    for other in (
        recorded_indices(same_weights(layer, infinity_layer(layer_index=1)), x, routing(3)),
        recorded_indices(layer, x, Routing(key=NoiseKey(seed=8, step=3, stream=noise_key.stream))),
        recorded_indices(layer, x, Routing(key=NoiseKey(seed=7, step=4, stream=noise_key.stream))),
        recorded_indices(layer, x, Routing(key=NoiseKey(seed=7, step=3, stream=noise_key.stream + 50))),
        recorded_indices(
            layer,
            x,
            Routing(key=NoiseKey(seed=7, step=3, stream=noise_key.stream, position=torch.arange(5) + 9)),
        ),
    ):
        assert not torch.isclose(other.z_BTKZ, base).all(-1).any()


def test_training_draws_anew_and_evaluation_repeats():
    layer, x = infinity_layer().train(), inputs()
    first = layer(x).y_BTD
    assert not torch.equal(first, layer(x).y_BTD)
    torch.manual_seed(5)
    repeated = layer(x).y_BTD
    torch.manual_seed(5)
    assert torch.equal(layer(x).y_BTD, repeated)
    layer.eval()
    state = torch.get_rng_state()
    assert torch.equal(layer(x).y_BTD, layer(x).y_BTD)
    assert torch.equal(torch.get_rng_state(), state)
    # without a key the rows of a batch differ in training and share their noise in evaluation
    same = x[:1].expand(3, 5, D)
    assert not torch.equal(layer.train()(same).y_BTD[0], layer(same).y_BTD[1])
    torch.testing.assert_close(layer.eval()(same).y_BTD[0], layer(same).y_BTD[1], rtol=1e-6, atol=1e-6)


def test_the_noise_seed_is_the_evaluations():
    x = inputs()
    by_option = infinity_layer(noise_seed=5)
    by_key = same_weights(by_option, infinity_layer())(x, Routing(key=NoiseKey(seed=5))).y_BTD
    assert torch.equal(by_option(x).y_BTD, by_key)


def test_a_batch_and_its_rows_agree_up_to_counted_flips():
    layer, x, noise_key = infinity_layer(), inputs(6, 7), key(6)
    with record_selections() as recorded:
        together = layer(x, Routing(key=noise_key)).y_BTD
    with replay_selections(recorded, lambda b: recorded[0][b : b + 1]) as flips:
        for b in range(6):
            alone = NoiseKey(seed=noise_key.seed, step=noise_key.step, stream=noise_key.stream[b : b + 1])
            torch.testing.assert_close(
                layer(x[b : b + 1], Routing(key=alone)).y_BTD[0], together[b], rtol=1e-5, atol=1e-5
            )
    flips.check()
