"""The kernels. `ops.py` launches them; nothing else should.

N tokens, K samples, U units (neurons, or blocks of BLOCK neurons), F = U * BLOCK neurons, D model width,
W = ceil(U / 8) packed bytes, S splits. A row of units is held as a tile of TILE_W bytes by 8 bits, in
registers, so that bit j of byte w is unit 8w + j without a shuffle.
"""

import triton
import triton.language as tl

_INF_BITS: tl.constexpr = tl.constexpr(0x7F800000)
_MANTISSA_AND_EXPONENT: tl.constexpr = tl.constexpr(0x7FFFFFFF)
# Steps of the search that interpolate (two of three); after them it only bisects, which ends in 32 steps.
_GUESSES: tl.constexpr = tl.constexpr(9)


@triton.jit
def _key(value, SHIFT: tl.constexpr):
    """int32 in the order of the floats; SHIFT drops bits that the row's dtype does not have."""
    bits = value.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & _MANTISSA_AND_EXPONENT)) >> SHIFT


@triton.jit
def _value(key, SHIFT: tl.constexpr):
    """The float32 that has this key."""
    whole = (key << SHIFT) | ((key >> 31) & ((1 << SHIFT) - 1))
    return (whole ^ ((whole >> 31) & _MANTISSA_AND_EXPONENT)).to(tl.float32, bitcast=True)


@triton.jit
def _upper_quantile(share):
    """x with P(standard normal >= x) = share, for share in [1e-11, 1); -inf from 1 on.

    Wichura's AS241 (PPND7), good to float32. A launch of its own on the host would cost more than this does.
    """
    centre = 0.5 - share
    r = 0.180625 - centre * centre
    top = ((59.109374720 * r + 159.29113202) * r + 50.434271938) * r + 3.3871327179
    below = ((67.187563600 * r + 78.757757664) * r + 17.895169469) * r + 1.0
    middle = centre * top / below

    r = tl.sqrt(-tl.log(tl.maximum(tl.minimum(share, 1.0 - share), 1e-11))) - 1.6
    top = ((0.17023821103 * r + 1.3067284816) * r + 2.7568153900) * r + 1.4234372777
    below = (0.12021132975 * r + 0.73700164250) * r + 1.0
    tail = tl.where(centre < 0.0, -top / below, top / below)

    inside = tl.where(tl.abs(centre) <= 0.425, middle, tail)
    return tl.where(share >= 1.0, float("-inf"), inside)


@triton.jit
def _separate(scores, largest, guess, num_kept, U, SHIFT: tl.constexpr):
    """A value that exactly the `num_kept` largest scores (and their ties) reach.

    count(>= low) >= num_kept > count(>= high) throughout. It ends as soon as the count is met, which is when
    the kept set is known, or when low and high are neighbours: then low is the num_kept-th largest, with ties.
    Near-Gaussian rows take about 6 counts of the row, any row at most 41 (25 in bfloat16).

    Args:
        scores: the row, -inf beyond U.
        largest: the largest magnitude; finite.
        guess: where to look first; any value is right, NaN too.
    """
    low, high = _key(-largest, SHIFT), _key(largest, SHIFT) + 1
    count_low = tl.full((), 0, tl.int32) + U
    count_high = tl.full((), 0, tl.int32)
    step = tl.full((), 0, tl.int32)
    while (count_low != num_kept) & (high > low + 1):
        between = _value(low, SHIFT)
        share = (count_low - num_kept).to(tl.float32) / (count_low - count_high).to(tl.float32)
        between += (_value(high, SHIFT) - between) * share
        key = _key(tl.where(step == 0, guess, between), SHIFT)
        middle = (low & high) + ((low ^ high) >> 1)  # the mean without overflow
        key = tl.where((step >= _GUESSES) | (step % 3 == 2), middle, key)
        key = tl.minimum(tl.maximum(key, low + 1), high - 1)
        count = tl.sum((scores >= _value(key, SHIFT)).to(tl.int32))
        enough = count >= num_kept
        low, high = tl.where(enough, key, low), tl.where(enough, high, key)
        count_low, count_high = tl.where(enough, count, count_low), tl.where(enough, count_high, count)
        step += 1
    return _value(low, SHIFT)


@triton.jit
def _act(x, ACT: tl.constexpr):
    """The activation and its derivative, float32. Comparisons are such that NaN stays NaN."""
    if ACT == "relu":
        value = tl.where(x < 0.0, 0.0, x)
        slope = tl.where(x <= 0.0, 0.0, 1.0)
    elif ACT == "silu":
        share = tl.sigmoid(x)
        value = x * share
        slope = share * (1.0 + x * (1.0 - share))
    elif ACT == "gelu":
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value = x * share
        slope = share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        tl.static_assert(ACT == "gelu_new")
        # 0.5 (1 + tanh u) = sigmoid(2u): one exp, and no cancellation for negative x
        x2 = x * x
        share = tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x2))
        value = x * share
        slope = share + value * (1.0 - share) * (1.5957691216057308 + 0.2140644488 * x2)
    return value, slope


@triton.jit
def select_kernel(
    scores_ptr,  # (N, K, U)
    num_kept_ptr,  # (N,) int32
    weight_ptr,  # (N, K) float32
    pre_ptr,  # (N, F)
    gate_ptr,  # (N, F)
    gated_ptr,  # (N, F), out
    mask_ptr,  # (N, U), out
    packed_ptr,  # (N, K, W) uint8, out
    weight_out_ptr,  # (N, K) float32, out
    K,
    U,
    ACT: tl.constexpr,
    HAS_PRE: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    STATISTICAL: tl.constexpr,
    BLOCK: tl.constexpr,
    SHIFT: tl.constexpr,
    TILE_W: tl.constexpr,
):
    """One token: every score is read once, the row stays in registers through search, packing and mean."""
    n = tl.program_id(0).to(tl.int64)
    W = (U + 7) // 8
    byte = tl.arange(0, TILE_W)
    bit = tl.arange(0, 8)[None, :]
    unit = byte[:, None] * 8 + bit
    inside = unit < U
    num_kept = tl.load(num_kept_ptr + n)
    quantile = _upper_quantile(num_kept.to(tl.float32) / U)

    mask = tl.zeros((TILE_W, 8), tl.float32)
    for k in range(K):
        row = n * K + k
        scores = tl.load(scores_ptr + row * U + unit, mask=inside, other=0.0).to(tl.float32)
        # As integers the magnitudes of infinity and NaN are the largest there are.
        largest_bits = tl.max(scores.to(tl.int32, bitcast=True) & _MANTISSA_AND_EXPONENT)
        poisoned = largest_bits >= _INF_BITS
        mean = tl.sum(scores) / U
        offset = tl.where(inside, scores - mean, 0.0)
        threshold = mean + tl.sqrt(tl.sum(offset * offset) / U) * quantile
        scores = tl.where(inside, scores, float("-inf"))
        if STATISTICAL:
            # Scores that are all equal are all kept; rounding may put their mean above them.
            spread = tl.max(scores) > tl.min(tl.where(inside, scores, float("inf")))
            threshold = tl.where(spread & (num_kept < U), threshold, float("-inf"))
        else:
            largest = tl.where(poisoned, 0, largest_bits).to(tl.float32, bitcast=True)
            threshold = _separate(scores, largest, threshold, num_kept, U, SHIFT)
        kept = ((scores >= threshold) | poisoned) & inside

        weight = tl.where(poisoned, float("nan"), tl.load(weight_ptr + row))
        mask += tl.where(kept, scores, 0.0) * weight
        tl.store(packed_ptr + row * W + byte, tl.sum(kept.to(tl.int32) << bit, axis=1).to(tl.uint8), mask=byte < W)
        tl.store(weight_out_ptr + row, weight)

    if HAS_MASK:
        tl.store(mask_ptr + n * U + unit, mask, mask=inside)
    if HAS_PRE:
        for b in range(BLOCK):
            neuron = (n * U + unit) * BLOCK + b
            hidden, _ = _act(tl.load(pre_ptr + neuron, mask=inside, other=0.0).to(tl.float32), ACT)
            if HAS_GATE:
                hidden *= tl.load(gate_ptr + neuron, mask=inside, other=0.0).to(tl.float32)
            tl.store(gated_ptr + neuron, hidden * mask, mask=inside)


@triton.jit
def select_backward_kernel(
    grad_ptr,  # (N, F); without pre (N, U)
    pre_ptr,  # (N, F)
    gate_ptr,  # (N, F)
    mask_ptr,  # (N, U)
    packed_ptr,  # (N, K, W) uint8
    weight_ptr,  # (N, K) float32, NaN where the row of scores was not finite
    grad_pre_ptr,  # (N, F), out
    grad_gate_ptr,  # (N, F), out
    gated_ptr,  # (N, F), out: the forward's result once more
    grad_scores_ptr,  # (N, K, U), out
    K,
    U,
    ACT: tl.constexpr,
    HAS_PRE: tl.constexpr,
    HAS_GATE: tl.constexpr,
    WANT_GATED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_W: tl.constexpr,
):
    """TILE_W * 8 units of one token. Elementwise but for the sum over a block's neurons: bound by memory."""
    n = tl.program_id(0).to(tl.int64)
    W = (U + 7) // 8
    byte = tl.program_id(1) * TILE_W + tl.arange(0, TILE_W)
    bit = tl.arange(0, 8)[None, :]
    unit = byte[:, None] * 8 + bit
    inside = unit < U

    if HAS_PRE:
        mask = tl.load(mask_ptr + n * U + unit, mask=inside, other=0.0).to(tl.float32)
        grad_mask = tl.zeros((TILE_W, 8), tl.float32)
        for b in range(BLOCK):
            neuron = (n * U + unit) * BLOCK + b
            grad = tl.load(grad_ptr + neuron, mask=inside, other=0.0).to(tl.float32)
            value, slope = _act(tl.load(pre_ptr + neuron, mask=inside, other=0.0).to(tl.float32), ACT)
            grad_hidden = grad * mask
            if HAS_GATE:
                gate = tl.load(gate_ptr + neuron, mask=inside, other=0.0).to(tl.float32)
                tl.store(grad_gate_ptr + neuron, grad_hidden * value, mask=inside)
                slope *= gate
                value *= gate
            tl.store(grad_pre_ptr + neuron, grad_hidden * slope, mask=inside)
            if WANT_GATED:
                tl.store(gated_ptr + neuron, value * mask, mask=inside)
            grad_mask += grad * value
    else:
        grad_mask = tl.load(grad_ptr + n * U + unit, mask=inside, other=0.0).to(tl.float32)

    for k in range(K):
        row = n * K + k
        packed = tl.load(packed_ptr + row * W + byte, mask=byte < W, other=0).to(tl.int32)
        kept = (packed[:, None] >> bit) & 1
        # the product, not `where`: 0 * NaN shows a divergence in the whole row
        grad_scores = kept.to(tl.float32) * (tl.load(weight_ptr + row) * grad_mask)
        tl.store(grad_scores_ptr + row * U + unit, grad_scores, mask=inside)


@triton.jit
def compact_kernel(mask_ptr, active_ptr, num_active_ptr, F, TILE_F: tl.constexpr):
    """One token: the neurons whose mask is not 0, in ascending order, so that the sums keep theirs."""
    n = tl.program_id(0).to(tl.int64)
    found = tl.full((), 0, tl.int32)
    for start in range(0, F, TILE_F):
        neuron = start + tl.arange(0, TILE_F)
        active = tl.load(mask_ptr + n * F + neuron, mask=neuron < F, other=0.0) != 0.0  # true for NaN
        position = found + tl.cumsum(active.to(tl.int32), 0) - 1
        tl.store(active_ptr + n * F + position, neuron, mask=active)
        found += tl.sum(active.to(tl.int32))
    tl.store(num_active_ptr + n, found)


@triton.jit
def sparse_ffn_kernel(
    x_ptr,  # (N, D)
    mask_ptr,  # (N, F) float32
    active_ptr,  # (N, F) int32
    num_active_ptr,  # (N,) int32
    w1_ptr,  # (F, D)
    b1_ptr,  # (F,)
    w3_ptr,  # (F, D)
    b3_ptr,  # (F,)
    w2t_ptr,  # (F, D)
    partial_ptr,  # (N, S, D) float32, out
    F,
    D,
    ACT: tl.constexpr,
    HAS_GATE: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """One token's share s of S of its active neurons: their rows of W1 (and W3) and of W2^T, and no others."""
    n = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    num_active = tl.load(num_active_ptr + n)
    share = tl.cdiv(num_active, SPLITS)
    end = tl.minimum((split + 1) * share, num_active)
    d = tl.arange(0, TILE_D)[None, :]
    x = tl.load(x_ptr + n * D + d, mask=d < D, other=0.0).to(tl.float32)
    y = tl.zeros((TILE_R, TILE_D), tl.float32)
    for start in range(split * share, end, TILE_R):
        row = start + tl.arange(0, TILE_R)
        live = row < end
        neuron = tl.load(active_ptr + n * F + row, mask=live, other=0)
        weights = neuron.to(tl.int64)[:, None] * D + d
        inside = live[:, None] & (d < D)
        # W2's rows are asked for together with W1's: where they lie does not depend on h.
        w1 = tl.load(w1_ptr + weights, mask=inside, other=0.0)
        w2t = tl.load(w2t_ptr + weights, mask=inside, other=0.0)
        pre = tl.sum(w1.to(tl.float32) * x, axis=1) + tl.load(b1_ptr + neuron, mask=live, other=0.0).to(tl.float32)
        hidden, _ = _act(pre, ACT)
        if HAS_GATE:
            w3 = tl.load(w3_ptr + weights, mask=inside, other=0.0)
            gate = tl.sum(w3.to(tl.float32) * x, axis=1)
            hidden *= gate + tl.load(b3_ptr + neuron, mask=live, other=0.0).to(tl.float32)
        hidden *= tl.load(mask_ptr + n * F + neuron, mask=live, other=0.0)
        y += hidden[:, None] * w2t.to(tl.float32)
    tl.store(partial_ptr + (n * SPLITS + split) * D + d, tl.sum(y, axis=0)[None, :], mask=d < D)


@triton.jit
def sum_splits_kernel(partial_ptr, b2_ptr, y_ptr, D, SPLITS: tl.constexpr, TILE_D: tl.constexpr):
    """y = the splits' sums, in a fixed order, and the bias."""
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * TILE_D + tl.arange(0, TILE_D)
    split = tl.arange(0, SPLITS)[:, None]
    partial = tl.load(partial_ptr + (n * SPLITS + split) * D + d[None, :], mask=d[None, :] < D, other=0.0)
    bias = tl.load(b2_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(y_ptr + n * D + d, tl.sum(partial, axis=0) + bias, mask=d < D)
