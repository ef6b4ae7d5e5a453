"""Scaled dot-product attention in dispatches of bounded size."""

from __future__ import annotations

import mlx.core as mx

from .layers import Pacer

# macOS ends GPU work after about five seconds; 2 TFLOP is below one second on every M-series GPU. Elsewhere nothing
# does, and one dispatch is a tenth faster than several whose results are put together.
DISPATCH_FLOP = 2e12 if mx.metal.is_available() else 1e18
# Where no fused kernel exists the scores are a real array: this many at a time (256 MB in float32).
UNFUSED_SCORES = 1 << 26
FUSED_HEAD_DIMS = (64, 72, 80, 96, 128)
# cuDNN takes so many keys at a time. Where the last tile is not whole every tile takes longer, as if each were masked:
# 10.3 ms instead of 9.5 for 32,760 tokens on an H200.
KEY_TILE = 128
# How many keys may be appended for each that is there (`whole_tiles`).
MOST_APPENDED = 1 / 1024


def has_fused_kernel(dtype: mx.Dtype, head_dim: int) -> bool:
    """Whether MLX computes attention without storing the scores, on the default device."""
    if mx.default_device().type != mx.DeviceType.gpu or head_dim not in FUSED_HEAD_DIMS:
        return False
    return mx.metal.is_available() or dtype in (mx.float16, mx.bfloat16)


def keys_to_append(length: int, dtype: mx.Dtype, head_dim: int) -> int:
    """How many keys `whole_tiles` appends to so many."""
    missing = -length % KEY_TILE
    faster = mx.cuda.is_available() and has_fused_kernel(dtype, head_dim)
    return missing if faster and missing <= MOST_APPENDED * length else 0


def whole_tiles(x: mx.array) -> mx.array:
    """Keys or values with their mean appended up to whole tiles, where that is faster; (B, L, heads, head_dim).

    What is appended weighs next to nothing, whatever the queries: the mean key's product with a query is the mean of
    all keys' products, and the exponential of a mean is at most the mean of the exponentials. So it weighs no more than
    keys do on average, and n of them no more than n / L of all. By that share, at most, a result moves towards the mean
    value; bfloat16 rounds a number by up to twice `MOST_APPENDED` of it.
    """
    return append_mean(x, keys_to_append(x.shape[1], x.dtype, x.shape[-1]))


def append_mean(x: mx.array, count: int) -> mx.array:
    """x (B, L, heads, head_dim) with its mean over L appended ``count`` times: (B, L + count, heads, head_dim)."""
    if not count:
        return x
    batch, length, *rest = x.shape
    rows = x.flatten(2)
    mean = mx.full((1, length), 1 / length, x.dtype) @ rows  # summed in float32, as `mx.mean` is not on CUDA
    rows = mx.concatenate([rows, mx.broadcast_to(mean, (batch, count, rows.shape[-1]))], axis=1)
    return rows.reshape(batch, length + count, *rest)


def attention(q: mx.array, k: mx.array, v: mx.array, pace: Pacer) -> mx.array:
    """Attention without a mask (Wan needs none), softmax in float32, scale 1/sqrt(head_dim).

    Args:
        q: (B, Lq, heads, head_dim).
        k, v: (B, Lk, heads, head_dim).
        pace: called after each dispatch, when there are several.

    Returns:
        (B, Lq, heads * head_dim).
    """
    batch, rows, heads, head_dim = q.shape
    work_per_row = batch * k.shape[1]
    if has_fused_kernel(q.dtype, head_dim):
        limit, work_per_row = DISPATCH_FLOP, 4.0 * work_per_row * head_dim
    else:
        limit = UNFUSED_SCORES
    heads_at_once = max(1, min(heads, int(limit / (work_per_row * rows))))
    rows_at_once = max(1, min(rows, int(limit / (work_per_row * heads_at_once))))
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    groups = []
    for head in range(0, heads, heads_at_once):
        group = slice(head, head + heads_at_once)
        parts = []
        for row in range(0, rows, rows_at_once):
            part = mx.fast.scaled_dot_product_attention(
                q[:, group, row : row + rows_at_once], k[:, group], v[:, group], scale=head_dim**-0.5
            )
            parts.append(part.transpose(0, 2, 1, 3))
            if heads_at_once < heads or rows_at_once < rows:
                pace(parts[-1])
        groups.append(mx.concatenate(parts, axis=1) if len(parts) > 1 else parts[0])
    return (mx.concatenate(groups, axis=2) if len(groups) > 1 else groups[0]).flatten(2)
