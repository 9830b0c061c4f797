"""`Routing`, `NoiseKey` and `PerLayer`: what they refuse, and how they spread."""

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers import make_layer

from infmoe.errors import InfMoEError
from infmoe.layers import NoiseKey, PerLayer, Routing
from infmoe.layers.activations import ffn_width
from infmoe.layers.metrics import stats_stride
from infmoe.layers.samples import coordinates
from infmoe.ops.noise import normal_noise


@pytest.mark.parametrize(
    ("dials", "named"),
    [
        ({"num_samples": 0}, "num_samples"),
        ({"num_samples": 2.0}, "num_samples"),
        ({"num_samples": True}, "num_samples"),
        ({"num_samples": (2, 0)}, "num_samples"),
        ({"num_samples": PerLayer([2, (1, -1)])}, "num_samples"),
        ({"num_samples": [1, 2]}, "num_samples"),
        ({"keep_ratio": 0.0}, "keep_ratio"),
        ({"keep_ratio": 1.01}, "keep_ratio"),
        ({"keep_ratio": 25}, "keep_ratio"),
        ({"keep_ratio": float("nan")}, "keep_ratio"),
        ({"keep_ratio": "0.5"}, "keep_ratio"),
        ({"keep_ratio": (0.5, 2.0)}, "keep_ratio"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok"),
        ({"mode": "mean"}, "mode"),
        ({"mode": "mu", "num_samples": 2}, "num_samples"),
        ({"max_stats_tokens": 0}, "max_stats_tokens"),
    ],
)
def test_bad_values_are_refused_by_name(dials, named):
    with pytest.raises(InfMoEError, match=named):
        Routing(**dials)


@pytest.mark.parametrize(
    ("dials", "named"),
    [
        ({"num_samples": [1, 2]}, "num_samples takes one number, a tuple with one for each row .* or PerLayer"),
        ({"num_samples": np.arange(1, 9)}, "num_samples takes one number, a tuple"),
        ({"keep_ratio": PerLayer([[0.5, 0.25], 0.5])}, "keep_ratio takes one number, a tuple"),
        ({"score_cut": [0.5, 0.25]}, "score_cut takes one number, or PerLayer with one for each layer"),
    ],
)
def test_a_list_is_told_what_rows_and_layers_take(dials, named):
    with pytest.raises(InfMoEError, match=named):
        Routing(**dials)


@pytest.mark.parametrize("integer", [np.int64, np.int8, np.uint16])
@pytest.mark.parametrize("real", [np.float64, np.float32, Fraction])
def test_numbers_of_other_libraries_become_plain_ones(integer, real):
    given = Routing(
        num_samples=PerLayer([integer(2), (integer(1), 3)]),
        keep_ratio=(real(0.5), 1),
        num_experts_per_tok=integer(4),
    )
    assert given == Routing(num_samples=PerLayer([2, (1, 3)]), keep_ratio=(0.5, 1), num_experts_per_tok=4)
    first, (second, third) = given.num_samples.values
    numbers = (first, second, third, *given.keep_ratio, given.num_experts_per_tok)
    assert [type(number) for number in numbers] == [int, int, int, float, int, int]
    assert type(Routing(score_cut=real(0.25)).score_cut) is float


@pytest.mark.parametrize("dials", [{"num_samples": np.float64(2)}, {"keep_ratio": np.bool_(True)}])
def test_other_libraries_numbers_of_another_kind_are_refused(dials):
    with pytest.raises(InfMoEError, match=next(iter(dials))):
        Routing(**dials)


def test_a_layer_takes_other_libraries_numbers_too():
    layer = make_layer("infinity", num_samples=np.int64(3), keep_ratio=np.float32(0.5))
    assert (type(layer.num_samples), type(layer.keep_ratio), type(layer.trained_keep_ratio)) == (int, float, float)
    assert type(make_layer("moe", num_experts_per_tok=np.int64(1)).trained_experts_per_tok) is int


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_out_of_range_are_refused(seed):
    with pytest.raises(InfMoEError, match="noise seed"):
        NoiseKey(seed=seed)


def test_routing_is_a_value():
    with pytest.raises(AttributeError):
        Routing().num_samples = 3
    assert Routing(num_samples=2, keep_ratio=PerLayer([0.5, 1.0])) == Routing(
        num_samples=2, keep_ratio=PerLayer((0.5, 1.0))
    )


def test_at_layer_picks_each_layers_value():
    given = Routing(num_samples=PerLayer([1, (2, 3)]), keep_ratio=0.5)
    assert given.at_layer(0).num_samples == 1
    assert given.at_layer(1).num_samples == (2, 3)
    assert given.at_layer(1).keep_ratio == 0.5
    plain = Routing(num_samples=2)
    assert plain.at_layer(7) is plain
    with pytest.raises(InfMoEError, match="2 per-layer values"):
        given.at_layer(2)


def test_with_key_keeps_a_key_and_draws_only_in_training():
    device = torch.device("cpu")
    key = NoiseKey(seed=5)
    for training in (True, False):
        kept = Routing(key=key).with_key(seed=1, training=training, batch_size=2, device=device)
        assert kept.key is key
    state = torch.get_rng_state()
    assert Routing().with_key(seed=9, training=False, batch_size=2, device=device).key == NoiseKey(seed=9)
    assert torch.equal(torch.get_rng_state(), state)
    first, second = (Routing().with_key(seed=9, training=True, batch_size=2, device=device).key for _ in range(2))
    assert int(first.seed) != int(second.seed)
    assert torch.equal(first.stream, torch.arange(2))


def test_drawn_keys_follow_the_global_seed():
    def drawn():
        torch.manual_seed(3)
        return int(NoiseKey.draw(1, torch.device("cpu")).seed)

    assert drawn() == drawn()


def test_processes_of_one_seed_draw_streams_of_their_own():
    def drawn():
        torch.manual_seed(3)
        return NoiseKey.draw(4, torch.device("cpu"))

    alone, keys = drawn(), []
    for rank in range(3):
        torch.distributed.init_process_group("fake", rank=rank, world_size=3)
        keys.append(drawn())
        torch.distributed.destroy_process_group()
    assert len({int(key.seed) for key in keys}) == 1
    assert torch.equal(keys[0].stream, alone.stream)
    assert torch.cat([key.stream for key in keys]).unique().numel() == 12


def test_expand_rows_repeats_what_belongs_to_rows():
    given = Routing(
        num_samples=(1, 2),
        keep_ratio=PerLayer([0.5, (0.25, 1.0)]),
        num_experts_per_tok=3,
        key=NoiseKey(stream=torch.tensor([7, 8]), position=torch.arange(3)),
        token_ids=torch.tensor([[1, 2, 3], [4, 5, 6]]),
    )
    wide = given.expand_rows(2)
    assert wide.num_samples == (1, 1, 2, 2)
    assert wide.keep_ratio == PerLayer([0.5, (0.25, 0.25, 1.0, 1.0)])
    assert wide.num_experts_per_tok == 3
    assert wide.key.stream.tolist() == [7, 7, 8, 8]
    assert wide.key.position.tolist() == [0, 1, 2]
    assert wide.token_ids.tolist() == [[1, 2, 3]] * 2 + [[4, 5, 6]] * 2
    rows = NoiseKey(position=torch.tensor([[0, 1], [5, 6]]))
    assert Routing(key=rows).expand_rows(2).key.position.tolist() == [[0, 1]] * 2 + [[5, 6]] * 2


def test_expand_rows_leaves_what_stands_for_all_rows():
    given = Routing(
        num_samples=(3,), key=NoiseKey(stream=torch.tensor([7]), position=torch.arange(3)[None])
    ).expand_rows(2)
    assert given.num_samples == (3,)
    assert given.key.stream.tolist() == [7]
    assert given.key.position.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(("num_tokens", "most"), [(0, 5), (1, 1), (100, 7), (100, 100), (100, 99), (4096, 512)])
def test_stats_stride_looks_at_no_more_than_asked(num_tokens, most):
    stride = stats_stride(num_tokens, most)
    assert len(range(0, num_tokens, stride)) <= most
    assert stride == 1 or len(range(0, num_tokens, stride - 1)) > most
    assert stats_stride(num_tokens, None) == 1


def test_ffn_width_is_two_thirds_where_gated():
    assert ffn_width(96, gated=False) == 96
    assert ffn_width(96, gated=True) == 64
    assert ffn_width(100, gated=True, multiple_of=16) == 64
    assert ffn_width(1, gated=True) == 1
    assert ffn_width(3, gated=True, multiple_of=16) == 16


@pytest.mark.parametrize("number", [7, torch.tensor(7), torch.tensor(7, dtype=torch.int32)])
@pytest.mark.parametrize("stream", [None, torch.tensor([3, 4])])
@pytest.mark.parametrize("position", [None, torch.arange(5), torch.arange(10).view(2, 5)])
def test_a_key_spelled_out_draws_the_same_noise(number, stream, position):
    key = NoiseKey(seed=number, step=number, stream=stream, position=position)
    where = {
        "layer_index": 1,
        "batch_size": 2,
        "num_tokens": 5,
        "device": torch.device("cpu"),
        "positions": "positions",
    }
    spelled_out = key.at(torch.arange(5).expand(2, 5), 2)
    assert all(isinstance(getattr(spelled_out, f.name), torch.Tensor) for f in dataclasses.fields(NoiseKey))
    draws = [normal_noise(2, 4, **coordinates(k, **where)) for k in (key, spelled_out)]
    assert draws[0].equal(draws[1])
