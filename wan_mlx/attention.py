"""Scaled dot-product attention in dispatches of bounded size."""

from __future__ import annotations

import mlx.core as mx

# macOS ends GPU work after about five seconds; 2 TFLOP is below one second on every M-series GPU.
DISPATCH_FLOP = 2e12
# Where no fused kernel exists the scores are a real array: this many at a time (256 MB in float32).
UNFUSED_SCORES = 1 << 26
FUSED_HEAD_DIMS = (64, 72, 80, 96, 128)


def has_fused_kernel(dtype: mx.Dtype, head_dim: int) -> bool:
    """Whether MLX computes attention without storing the scores, on the default device."""
    if mx.default_device().type != mx.DeviceType.gpu or head_dim not in FUSED_HEAD_DIMS:
        return False
    return mx.metal.is_available() or dtype in (mx.float16, mx.bfloat16)


def attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Attention without a mask (Wan needs none), softmax in float32, scale 1/sqrt(head_dim).

    Args:
        q: (B, heads, Lq, head_dim).
        k, v: (B, heads, Lk, head_dim).

    Returns:
        (B, Lq, heads * head_dim).
    """
    _, heads, rows, head_dim = q.shape
    if has_fused_kernel(q.dtype, head_dim):
        out = _fused(q, k, v, heads, rows)
    else:
        out = _unfused(q, k, v, heads, rows)
    return out.transpose(0, 2, 1, 3).flatten(2)


def _sdpa(q, k, v):
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5)


def _fused(q, k, v, heads, rows):
    flop_per_row = 4.0 * q.shape[0] * k.shape[2] * q.shape[3]
    heads_at_once = max(1, min(heads, int(DISPATCH_FLOP / (flop_per_row * rows))))
    rows_at_once = max(1, min(rows, int(DISPATCH_FLOP / flop_per_row)))
    groups = []
    for head in range(0, heads, heads_at_once):
        group = slice(head, head + heads_at_once)
        parts = [
            _sdpa(q[:, group, row : row + rows_at_once], k[:, group], v[:, group])
            for row in range(0, rows, rows_at_once)
        ]
        groups.append(mx.concatenate(parts, axis=2) if len(parts) > 1 else parts[0])
    return mx.concatenate(groups, axis=1) if len(groups) > 1 else groups[0]


def _unfused(q, k, v, heads, rows):
    rows_at_once = max(1, UNFUSED_SCORES // (q.shape[0] * heads * k.shape[2]))
    if rows_at_once >= rows:
        return _sdpa(q, k, v)
    parts = []
    for row in range(0, rows, rows_at_once):
        parts.append(_sdpa(q[:, :, row : row + rows_at_once], k, v))
        mx.eval(parts[-1])  # without it all scores would be alive at once
    return mx.concatenate(parts, axis=2)
