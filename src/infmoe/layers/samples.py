"""What a layer draws for its tokens: noise by the call's key, and the ways to spread K samples over it.

B batch rows, T tokens, K samples, Z index dimensions.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from infmoe.errors import InfMoEError
from infmoe.layers.routing import Mode, NoiseKey
from infmoe.ops.noise import normal_noise
from infmoe.ops.tracing import constant

_SCRAMBLE = 2601
_EDGE = 2.0**-24  # uniforms stay this far from 0 and 1: float32 has no more there, and the normals stay finite


def coordinates(
    key: NoiseKey, *, layer_index: int, batch_size: int, num_tokens: int, device: torch.device, positions: str
) -> dict[str, Any]:
    """What the noise of a call is a function of, as `normal_noise` takes it.

    Args:
        key: the call's.
        layer_index: the layer's place in the model.
        batch_size, num_tokens: B and T.
        device: where the noise is needed.
        positions: what the key's positions are called where they do not fit.

    Raises:
        InfMoEError: streams or positions that do not fit the batch.
    """
    stream_B = torch.zeros(1, dtype=torch.int64, device=device) if key.stream is None else key.stream.to(device)
    position_BT = torch.arange(num_tokens, device=device) if key.position is None else key.position.to(device)
    if stream_B.numel() not in (1, batch_size):
        raise InfMoEError(
            f"the noise key has {stream_B.numel()} streams, the batch {batch_size} rows: give one per row"
        )
    if position_BT.shape not in ((num_tokens,), (1, num_tokens), (batch_size, num_tokens)):
        raise InfMoEError(
            f"{positions} of shape {tuple(position_BT.shape)} do not fit a batch of {batch_size} rows of "
            f"{num_tokens} tokens: give one per token"
        )
    if stream_B.shape != (batch_size,):
        stream_B = stream_B.reshape(-1).expand(batch_size)
    if position_BT.shape != (batch_size, num_tokens):
        position_BT = position_BT.expand(batch_size, num_tokens)
    return {
        "seed": key.seed,
        "step": key.step,
        "layer": layer_index,
        "stream_B": stream_B,
        "position_BT": position_BT,
    }


def spread_samples(mode: Mode, num_samples: int, dim: int, coordinates: dict[str, Any]) -> Tensor:
    """K standard normal draws for every token, each by itself exactly normal; more of them begin with the fewer.

    Args:
        mode: "sample": independent. "antithetic": pairs eps, -eps. "qmc": a scrambled Sobol sequence, shifted for each
            token by its first independent draw (Cranley and Patterson), which is its first sample too.
        num_samples: K.
        dim: Z.
        coordinates: see `coordinates`.

    Returns:
        float32, shape (B, T, K, Z).
    """
    if mode == "sample":
        return normal_noise(num_samples, dim, **coordinates)
    if mode == "antithetic":
        noise_BTKZ = normal_noise(-(-num_samples // 2), dim, **coordinates)
        pairs = torch.stack([noise_BTKZ, -noise_BTKZ], dim=3).flatten(2, 3)
        return pairs[:, :, :num_samples]
    first_BT1Z = normal_noise(1, dim, **coordinates)
    if num_samples == 1:
        return first_BT1Z
    shift_BT1Z = torch.special.ndtr(first_BT1Z)
    points_KZ = _sobol(num_samples, dim).to(first_BT1Z.device)
    uniform = (shift_BT1Z + points_KZ).frac().clamp(_EDGE, 1.0 - _EDGE)
    return torch.cat([first_BT1Z, torch.special.ndtri(uniform)], dim=2)


@constant
def _sobol(num_samples: int, dim: int) -> Tensor:
    """What the points after the first add to it, modulo 1: float32, shape (K - 1, Z).

    Scrambled (with a seed fixed for good), because few points of the plain sequence move many dimensions in step.
    """
    return _table(num_samples, dim)


@lru_cache(maxsize=64)
def _table(num_samples: int, dim: int) -> Tensor:
    limit = torch.quasirandom.SobolEngine.MAXDIM
    if dim > limit:
        raise InfMoEError(f"mode 'qmc' takes at most {limit} index dimensions, got {dim}: use 'antithetic'")
    engine = torch.quasirandom.SobolEngine(dim, scramble=True, seed=_SCRAMBLE)
    points_KZ = engine.draw(num_samples, dtype=torch.float64)
    return (points_KZ[1:] - points_KZ[:1]).remainder(1.0).float()
