"""Parameter counts against the paper's Table 1, and the counts against the model that is really built."""

import pytest
import torch
from helpers import VARIANTS, tiny_config, tiny_model, tokens
from torch.utils.flop_counter import FlopCounterMode

from infmoe.errors import InfMoEError
from infmoe.hf import InfMoEConfig, model_cost
from infmoe.layers import PerLayer, Routing

SHAPES = {
    "small": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "medium": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
}
# Active and total, in millions; the paper rounds to 124/181, 129/186, 350/556 and 362/568.
TABLE_1 = [
    ("small", "dense", 124.4, 124.4),
    ("small", "switch", 124.4, 181.1),
    ("small", "moe", 124.4, 181.1),
    ("small", "infinity", 129.2, 185.8),
    ("medium", "dense", 354.8, 354.8),
    ("medium", "switch", 354.8, 556.2),
    ("medium", "moe", 354.8, 556.2),
    ("medium", "infinity", 367.4, 568.8),
]


@pytest.mark.parametrize(("size", "ffn", "active", "total"), TABLE_1)
def test_table_1(size, ffn, active, total):
    shape = SHAPES[size]
    width = 4 * shape["hidden_size"] * (1 if ffn == "dense" else 2)
    options = {"dense": {}, "switch": {}, "moe": {"num_experts": 4}, "infinity": {"z_dim": 256}}[ffn]
    cost = model_cost(InfMoEConfig(ffn=ffn, intermediate_size=width, **shape, **options))
    assert round(cost.active / 1e6, 1) == active
    assert round(cost.total / 1e6, 1) == total
    assert cost.active <= cost.total <= cost.total_with_wz


@pytest.mark.parametrize("ffn", VARIANTS)
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_counted(ffn, tied):
    cost = model_cost(tiny_config(ffn, tie_word_embeddings=tied))
    model = tiny_model(ffn, tie_word_embeddings=tied)
    assert cost.total_with_wz == sum(p.numel() for p in model.parameters())
    extra = {"dense": 0, "switch": 2 * 32 * 2, "moe": 2 * 32 * 4, "infinity": 2 * 8 * 96}[ffn]
    assert cost.total == cost.total_with_wz - extra
    # beside the FFN nothing is read twice: at batch 1, all but the rows of the tables that are not looked up
    assert cost.weights_executed <= cost.total_with_wz
    assert all(isinstance(count, int) for count in cost.as_dict().values())


@pytest.mark.parametrize("ffn", ["dense", "infinity"])
def test_executed_flops_are_what_torch_counts(ffn):
    config = tiny_config(ffn, num_samples=3) if ffn == "infinity" else tiny_config(ffn)
    model, ids = tiny_model(ffn, **({"num_samples": 3} if ffn == "infinity" else {})), tokens(1, 32)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        model(ids)  # the first call of all times the backends
        with FlopCounterMode(display=False) as counter:
            model(ids)
    # torch counts the whole square of the attention, the cost half of it
    square = config.num_hidden_layers * 2 * 2 * config.hidden_size * 32
    assert counter.get_total_flops() / 32 == model_cost(config).flops_executed + square / 2


def test_the_dials_change_the_cost():
    config = tiny_config()
    one = model_cost(config, Routing(num_samples=1))
    eight = model_cost(config, Routing(num_samples=8))
    assert one.active < eight.active == eight.total
    assert one.active_union < eight.active_union < eight.total_with_wz
    mixed = model_cost(config, Routing(num_samples=PerLayer([1, 8])))
    assert mixed.active == (one.active + eight.active) // 2
    measured = model_cost(config, union_ratios=(1.0, 1.0))
    assert measured.active_union == measured.total_with_wz
    assert measured.ffn_flops_ideal == measured.ffn_flops_executed


@pytest.mark.parametrize(
    ("ffn", "dials"),
    [("infinity", {"keep_ratio": (0.5, 0.125), "num_samples": (1, 3)}), ("moe", {"num_experts_per_tok": (4, 1)})],
)
def test_a_config_with_values_for_each_layer_costs_what_they_do_in_a_call(ffn, dials):
    given = Routing(**{name: PerLayer(values) for name, values in dials.items()})
    cost = model_cost(tiny_config(ffn, **dials))
    assert cost == model_cost(tiny_config(ffn), given)
    assert cost != model_cost(tiny_config(ffn))


@pytest.mark.parametrize("ffn", ["dense", "switch", "moe"])
def test_dials_that_the_variant_lacks_have_no_cost(ffn):
    with pytest.raises(InfMoEError, match="num_samples"):
        model_cost(tiny_config(ffn), Routing(num_samples=2))
