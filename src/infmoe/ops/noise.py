"""Standard normal noise as a pure function of its coordinates, so that nothing about a batch can change it.

B batch rows, T tokens, K samples, Z index dimensions.

Each (seed, step, layer, stream, position) is hashed to a 64-bit key by chained splitmix64 finalizers; each
(sample, pair of dimensions) is a counter on that key's splitmix64 sequence, and Box-Muller turns its 64 bits
into two normals. Hence sample k is the same whatever K is, and a token's noise is the same whatever stands
beside it in the batch.
"""

import math

import torch
from torch import Tensor

from infmoe.errors import InfMoEError
from infmoe.ops import dispatch
from infmoe.ops.coordinates import NoiseCoordinates

# splitmix64 (Steele, Lea, Flood 2014) in two's complement: int64 multiplication wraps.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MUL1 = 0xBF58476D1CE4E5B9 - 2**64
_MUL2 = 0x94D049BB133111EB - 2**64
_SAMPLE_STRIDE = 2**32  # counters of one sample; samples never share a counter


def normal_noise(
    num_samples: int,
    dim: int,
    *,
    seed: int | Tensor,
    step: int | Tensor,
    layer: int,
    stream_B: Tensor,
    position_BT: Tensor,
) -> Tensor:
    """Independent standard normals for every token and sample.

    Args:
        num_samples: K; sample k does not depend on it.
        dim: Z, noise values per sample.
        seed, step: integers or 0-d int64 tensors.
        layer: the layer's index.
        stream_B: int64; rows of equal stream draw equal noise.
        position_BT: int64; the token's place in its sequence.

    Returns:
        float32 noise, shape (B, T, K, Z), on `position_BT`'s device.

    Raises:
        InfMoEError: streams or positions that are not integers.
    """
    key = noise_key(seed, step, layer, stream_B, position_BT)
    if position_BT.device.type == "cpu" and dispatch.use_kernels():
        return torch.ops.infmoe.normal_noise(*key, num_samples, dim)  # the same numbers, but for their last bits
    bits = _bits(*key, num_samples, (dim + 1) // 2)
    # 24 bits each fill a float32's mantissa; the half keeps the logarithm's argument above 0.
    radius = (((bits >> 40) & 0xFFFFFF).float() + 0.5).mul_(2.0**-24).log_().mul_(-2.0).sqrt_()
    angle = (bits & 0xFFFFFF).float().mul_(2.0**-24 * 2 * math.pi)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=-1)[..., :dim]


def noise_key(
    seed: int | Tensor, step: int | Tensor, layer: int, stream_B: Tensor, position_BT: Tensor
) -> NoiseCoordinates:
    """The coordinates of `normal_noise` as the operators take them: contiguous int64, on `position_BT`'s device.

    Raises:
        InfMoEError: streams or positions that are not integers.
    """
    for name, tensor in (("stream", stream_B), ("position", position_BT)):
        if tensor.dtype not in (torch.int64, torch.int32):
            raise InfMoEError(f"the noise key's {name} must be int64, got {tensor.dtype}")
    device = position_BT.device
    return (
        _as_int64(seed, device),
        _as_int64(step, device),
        layer,
        stream_B.to(device, torch.int64).contiguous(),
        position_BT.long().contiguous(),
    )


# An operator of its own: torch.compile folds what it can of integer arithmetic, and does not wrap around.
@torch.library.custom_op("infmoe::noise_bits", mutates_args=())
def _bits(
    seed: Tensor,
    step: Tensor,
    layer: int,
    stream_B: Tensor,
    position_BT: Tensor,
    num_samples: int,
    num_pairs: int,
) -> Tensor:
    """64 random bits for every token, sample and pair of dimensions: int64, shape (B, T, K, pairs)."""
    key = _mix(seed + _GOLDEN)
    key = _mix((key ^ step) + _GOLDEN)
    key = _mix((key ^ layer) + _GOLDEN)
    key_B1 = _mix((key ^ stream_B) + _GOLDEN)[:, None]
    key_BT = _mix((key_B1 ^ position_BT) + _GOLDEN)
    sample_K1 = torch.arange(num_samples, device=key_BT.device)[:, None]
    pair_P = torch.arange(1, num_pairs + 1, device=key_BT.device)
    counter_KP = (sample_K1 * _SAMPLE_STRIDE + pair_P) * _GOLDEN
    return _mix(key_BT[:, :, None, None] + counter_KP)


@_bits.register_fake
def _(
    seed: Tensor,
    step: Tensor,
    layer: int,
    stream_B: Tensor,
    position_BT: Tensor,
    num_samples: int,
    num_pairs: int,
) -> Tensor:
    return position_BT.new_empty((*position_BT.shape, num_samples, num_pairs))


def _as_int64(value: int | Tensor, device: torch.device) -> Tensor:
    if isinstance(value, int):
        return torch.full((), value, dtype=torch.int64, device=device)
    return value.to(device, torch.int64)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finalizer; the masks make the arithmetic shifts logical."""
    x = (x >> 30).bitwise_and_(2**34 - 1).bitwise_xor_(x).mul_(_MUL1)
    x = (x >> 27).bitwise_and_(2**37 - 1).bitwise_xor_(x).mul_(_MUL2)
    return (x >> 31).bitwise_and_(2**33 - 1).bitwise_xor_(x)
