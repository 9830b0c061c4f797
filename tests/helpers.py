"""Shared by the tests: small layers and models, and the tools to compare runs that a top-N may tell apart.

Top-N is a step function: two mathematically equal computations may round a score to different sides of the
threshold. Equalities are therefore stated so: a unit may flip only where its score lies within
`FLIP_TOLERANCE` * rms(scores) of the threshold, and with the selection replayed the outputs agree to 1e-5.

B batch rows, T tokens, K samples, U units.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from infmoe.hf import InfMoEConfig, InfMoEForCausalLM
from infmoe.layers import FFN_CLASSES, ConditionalFFN, NoiseKey, Routing
from infmoe.ops.masked_ffn import eager

FLIP_TOLERANCE = 1e-5
VARIANTS = tuple(FFN_CLASSES)


def make_layer(ffn: str, hidden_size: int = 16, intermediate_size: int = 48, **options: Any) -> ConditionalFFN:
    """A small layer in eval mode; `infinity` gets a small index unless told otherwise."""
    if ffn == "infinity":
        options.setdefault("z_dim", 8)
    return FFN_CLASSES[ffn](hidden_size, intermediate_size, **options).eval()


def tiny_config(ffn: str = "infinity", **overrides: Any) -> InfMoEConfig:
    """Two layers of width 32 with 61 words."""
    options: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "max_position_embeddings": 32,
        "initializer_range": 0.2,
        "ffn": ffn,
    }
    if ffn == "infinity":
        options["z_dim"] = 8
    return InfMoEConfig(**(options | overrides))


def tiny_model(ffn: str = "infinity", **overrides: Any) -> InfMoEForCausalLM:
    """A model of `tiny_config` in eval mode, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return InfMoEForCausalLM(tiny_config(ffn, **overrides)).eval()


def tokens(batch_size: int, length: int, vocab_size: int = 61, seed: int = 0) -> Tensor:
    """Random token ids, int64, (B, T)."""
    return torch.randint(vocab_size, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def key(batch_size: int, seed: int = 7) -> NoiseKey:
    """A noise key with another stream for each row."""
    return NoiseKey(seed=seed, step=3, stream=torch.arange(batch_size) + 11)


def routing(batch_size: int, **dials: Any) -> Routing:
    """A routing with that key."""
    return Routing(key=key(batch_size), **dials)


@dataclass
class Flips:
    """How many of the units looked at were selected otherwise than in the recording."""

    flipped: int = 0
    units: int = 0

    def check(self, max_share: float = 1e-3) -> None:
        """Fail if nothing was replayed, or if more than `max_share` of the units flipped."""
        assert self.units > 0, "nothing was replayed"
        assert self.flipped <= max_share * self.units, f"{self.flipped} of {self.units} units flipped"


@contextmanager
def backend_of_the_environment(name: str) -> Iterator[None]:
    """Within, calls that name no backend themselves use this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INFMOE_BACKEND", name)
        yield


@contextmanager
def _select_by(function: Callable[..., Tensor]) -> Iterator[None]:
    original = eager.select
    eager.select = function
    try:
        with backend_of_the_environment("eager"):
            yield
    finally:
        eager.select = original


@contextmanager
def record_selections() -> Iterator[list[Tensor]]:
    """Within, every selection is appended to the list: one (B, T, K, U) tensor per call, in call order."""
    recorded: list[Tensor] = []
    original = eager.select

    def record(scores_BTKU: Tensor, num_kept: tuple[int, ...]) -> Tensor:
        kept_BTKU = original(scores_BTKU, num_kept)
        recorded.append(kept_BTKU.clone())
        return kept_BTKU

    with _select_by(record):
        yield recorded


@contextmanager
def replay_selections(recorded: list[Tensor], pick: Callable[[int], Tensor] | None = None) -> Iterator[Flips]:
    """Within, selections are those recorded; counts the flips and fails where one is not near the threshold.

    Args:
        recorded: from `record_selections`.
        pick: which recorded selection the i-th call takes; None: the i-th.
    """
    flips = Flips()
    original = eager.select
    calls = 0

    def replay(scores_BTKU: Tensor, num_kept: tuple[int, ...]) -> Tensor:
        nonlocal calls
        kept_BTKU = recorded[calls] if pick is None else pick(calls)
        calls += 1
        own_BTKU = original(scores_BTKU, num_kept)
        assert kept_BTKU.shape == own_BTKU.shape
        count_flips(scores_BTKU, own_BTKU, kept_BTKU, flips)
        return kept_BTKU

    with _select_by(replay):
        yield flips


def count_flips(scores_BTKU: Tensor, own_BTKU: Tensor, other_BTKU: Tensor, flips: Flips) -> None:
    """Add the units in which two selections differ; fail where such a unit is not near the threshold."""
    scores_BTKU = scores_BTKU.detach()
    threshold_BTK1 = scores_BTKU.masked_fill(own_BTKU == 0, torch.inf).amin(dim=-1, keepdim=True)
    rms_BTK1 = scores_BTKU.square().mean(dim=-1, keepdim=True).sqrt()
    flipped_BTKU = own_BTKU != other_BTKU
    distance_BTKU = (scores_BTKU - threshold_BTK1).abs() / rms_BTK1
    flips.flipped += int(flipped_BTKU.sum())
    flips.units += flipped_BTKU.numel()
    far = distance_BTKU[flipped_BTKU]
    assert bool((far <= FLIP_TOLERANCE).all()), f"a unit flipped {float(far.max()):.2e} rms off the threshold"
