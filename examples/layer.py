"""The layer alone: one call, two dials, what the router did."""

import torch

from infmoe import InfinityFFN, NoiseKey, Routing

torch.manual_seed(0)
# In a model of several layers each has its own index: layers of one index draw the same noise in eval mode.
ffn = InfinityFFN(hidden_size=64, intermediate_size=512, z_dim=16, layer_index=0)
x = torch.randn(4, 10, 64)  # (batch, tokens, width)

for num_samples, keep_ratio in ((1, 1 / 8), (2, 1 / 4), (8, 1 / 2)):
    out = ffn(x, Routing(num_samples=num_samples, keep_ratio=keep_ratio, key=NoiseKey(seed=0)))
    stats = out.stats.summary()
    print(
        f"K={num_samples} keep={keep_ratio:<6g} output rms {out.y_BTD.std():.4f}  "
        f"union {stats['union_ratio']:.2f}  overlap {stats['overlap_ratio']:.2f}  entropy {stats['entropy']:.3f}"
    )

# Rows of one batch may turn the dials differently; each gets what it would get alone.
mixed = ffn(x, Routing(num_samples=(1, 2, 4, 8), keep_ratio=(0.125, 0.25, 0.25, 0.5), key=NoiseKey(seed=0)))
alone = ffn(x[2:3], Routing(num_samples=4, keep_ratio=0.25, key=NoiseKey(seed=0)))
print("row 2 of a mixed batch equals the row alone:", torch.allclose(mixed.y_BTD[2:3], alone.y_BTD, atol=1e-5))

# A call counts its tokens from 0: where a sequence comes in parts, say where each part stands.
parts = [ffn(x[:, i : i + 1], Routing(key=NoiseKey(position=torch.tensor([i])))).y_BTD for i in range(10)]
whole = ffn(x, Routing(key=NoiseKey()))
print("token by token equals all at once:", torch.allclose(torch.cat(parts, dim=1), whole.y_BTD, atol=1e-5))
