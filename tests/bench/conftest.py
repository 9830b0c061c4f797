"""Geometries so small that a whole measurement takes a second or two."""

import pytest

from infmoe.bench import decode, ffn, growth
from infmoe.hf import InfMoEConfig

TINY = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"intermediate_size": 96, "max_position_embeddings": 32}


@pytest.fixture
def ffn_shape() -> ffn.Shape:
    return ffn.Shape(hidden_size=32, width=96, num_tokens=24, z_dims=(16, 8), keep_ratios=(1 / 16, 1 / 4, 1.0))


@pytest.fixture
def decode_setting() -> decode.Setting:
    return decode.Setting(
        InfMoEConfig(**TINY, ffn="infinity", z_dim=8),
        InfMoEConfig(**TINY, ffn="dense"),
        InfMoEConfig(**TINY, ffn="dense"),
        InfMoEConfig(**TINY, ffn="moe"),
        dials=decode.ISSUE_DIALS,
        batch_sizes=(2, 4),
        prompt_length=8,
        roof_bytes=2**20,
    )


@pytest.fixture
def axes() -> growth.Axes:
    return growth.Axes(
        hidden_size=32,
        z_dim=8,
        num_tokens=16,
        width=96,
        token_axis=(8, 16, 32),
        width_axis=(32, 64, 128),
        sample_axis=(1, 2, 4),
    )
