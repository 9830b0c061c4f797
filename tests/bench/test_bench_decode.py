"""Decoding against its limits by bytes."""

import pytest

from infmoe.bench import decode
from infmoe.hf import model_cost
from infmoe.layers import Routing
from infmoe.ops.masked_ffn import compiled

SMALL = decode.small_setting(quick=True)


@pytest.mark.parametrize(
    ("dials", "limit"),
    [((2, 1 / 4), 1.52), ((1, 1 / 4), 1.84), ((1, 1 / 8), 2.14), ((1, 1 / 16), 2.33)],
)
def test_limits_by_bytes(dials, limit):
    executed, ideal = decode.byte_limit(SMALL.infinity, dials)
    assert round(executed / ideal, 2) == limit


def test_bytes_by_hand():
    # D = 768, F = 6144, Z = 64, 12 layers; the output layer is the embedding, a lookup reads one row of it
    maps, scores = 2 * (768 * 64 + 64), 64 * 6144
    neurons = 6144 * (2 * 768 + 1)
    attention = 768 * 4 * 768 + 4 * 768
    norms = 12 * 2 * 2 * 768 + 2 * 768
    always = 12 * (maps + scores + 768 + attention) + norms + 50257 * 768 + 768
    executed, ideal = decode.byte_limit(SMALL.infinity, (1, 1 / 16))
    assert executed == always + 12 * neurons
    assert ideal == always + 12 * neurons / 16
    assert decode.byte_limit(SMALL.infinity, (1, 1 / 16), (1.0,) * 12) == (executed, executed)


def test_dense_models_are_those_of_the_recipes():
    assert model_cost(SMALL.dense).total == 124_439_808  # GPT-2 small
    assert (SMALL.moe.ffn, SMALL.moe.num_experts, SMALL.moe.num_experts_per_tok) == ("moe", 4, 2)
    assert SMALL.wide.intermediate_size == SMALL.infinity.intermediate_size == 6144


@pytest.mark.skipif(not compiled.available(), reason="no compiled kernels, so no fused or sparse path")
def test_rows_and_summary(decode_setting):
    rows, summary = decode.decode_speed(quick=True, setting=decode_setting)
    for suffix in ("", "_bf16"):
        for key in ("k2_keep_1_4", "k1_keep_1_4", "k1_keep_1_8", "k1_keep_1_16"):
            assert summary[f"speedup_{key}{suffix}"] > 0
            assert summary[f"limit_{key}{suffix}"] > 1
        for key in ("reached_min", "batch_ratio_min", "read_roof_gb_per_s", "dense_ms", "moe_ms"):
            assert summary[key + suffix] > 0
    for row in rows:
        if row["batch"] == 1:
            assert row["gb_per_s"] == pytest.approx(row["mb"] / row["median"])
    fused = {row["mb"] for row in rows if row["arm"] == "fused" and row["dtype"] == "fp32" and row["batch"] == 1}
    assert fused == {4 * model_cost(decode_setting.infinity).weights_executed / 1e6}
    batches = {row["batch"] for row in rows}
    assert batches == {1, *decode_setting.batch_sizes}


def test_unions_lie_between_one_mask_and_independent_ones(decode_setting):
    from infmoe.bench.common import random_model

    model = random_model(decode_setting.infinity, decode.DTYPES["fp32"])
    for union in decode.measured_unions(model, (2, 1 / 4), 16):
        assert 0.25 < union < 1 - 0.75**2


def test_a_random_model_starts_as_the_model_does():
    import torch

    from infmoe.bench.common import random_model
    from infmoe.hf import InfMoEConfig, InfMoEForCausalLM

    config = InfMoEConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=512, z_dim=32)
    ours, theirs = random_model(config, torch.float32), InfMoEForCausalLM(config)
    assert ours.lm_head.weight is ours.transformer.wte.weight
    for (name, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(p.mean(), q.mean(), rtol=0.1, atol=0.03, msg=name)
        torch.testing.assert_close(p.std(), q.std(), rtol=0.1, atol=1e-3, msg=name)
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    assert not ours(input_ids=tokens, routing=Routing(num_samples=1)).logits.isnan().any()
