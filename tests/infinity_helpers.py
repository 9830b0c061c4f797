"""A small ∞-MoE layer, what goes in, and its formulas by hand."""

import torch
from helpers import make_layer

from infmoe.ops.noise import normal_noise

D, WIDTH, Z = 16, 48, 8


def infinity_layer(**options):
    options = {"initializer_range": 0.3, "num_samples": 3} | options
    return make_layer("infinity", D, WIDTH, **options).requires_grad_(False)


def inputs(batch_size=3, length=5):
    return torch.randn(batch_size, length, D, generator=torch.Generator().manual_seed(4))


def draw(layer, x_D, noise_key, b, t, k):
    """z of one token's k-th sample, by hand."""
    eps = normal_noise(
        k + 1,
        layer.router.z_dim,
        seed=noise_key.seed,
        step=noise_key.step,
        layer=layer.layer_index,
        stream_B=noise_key.stream[b : b + 1],
        position_BT=torch.tensor([[t]]),
    )[0, 0, k]
    mu = layer.router.mu(x_D)
    return mu + torch.nn.functional.softplus(layer.router.sigma(x_D)) * eps


def expert(layer, x_D, z_Z, keep_ratio):
    """f(x, z) of Eq. 7 for one token, without the output's bias, and how many units it kept."""
    scores = layer.w_z.weight @ z_Z
    if layer.w_z.bias is not None:
        scores = scores + layer.w_z.bias
    num_kept = max(1, round(keep_ratio * len(scores)))
    threshold = sorted(scores.tolist(), reverse=True)[num_kept - 1]
    mask = torch.tensor([m if m >= threshold else 0.0 for m in scores.tolist()])
    mask_F = mask.repeat_interleave(layer.block_size)
    h = layer.act(layer.w1.weight @ x_D + layer.w1.bias)
    if layer.w3 is not None:
        h = h * (layer.w3.weight @ x_D + layer.w3.bias)
    return layer.w2.weight @ (h * mask_F), int((mask != 0).sum())


def recorded_indices(layer, x, given):
    seen = []
    hook = layer.router.register_forward_hook(lambda module, args, out: seen.append(out))
    layer(x, given)
    hook.remove()
    return seen[0]


def same_weights(source, target):
    target.load_state_dict(source.state_dict())
    return target
