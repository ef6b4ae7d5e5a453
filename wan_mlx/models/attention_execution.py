"""How self-attention runs on this machine: queries, keys and values one by one, attention in dispatches."""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx

from ..cuda.forward import fill_last_tile
from . import chips, kernels
from .attention import SelfAttention, split_heads
from .pieces import Pacer, in_dispatches
from .rope import RopeTable, rows_of

# Without a fused kernel the scores are a real array; this many are computed at a time (256 MB in float32).
UNFUSED_SCORES = 1 << 26
FUSED_HEAD_DIMS = (64, 72, 80, 96, 128)

# Arrays as wide as the tokens (L, D) alive at once while queries, keys and values are computed: the tokens, their norm,
# and for queries and keys the projection and its rotation, since keys are submitted before queries are done.
# Queries are done, and keys nearly, when values are computed. Measured on an H200 over a streamed 14B: 6.9; where keys
# wait for queries (`Pacer.settle`): 5.9. Without the kernels one more for the norm.
TOKENS_ALIVE, TOKENS_ALIVE_SETTLED, TOKENS_ALIVE_OPERATIONS = 6.9, 5.9, 0.8


def queries_keys_values(
    layer: SelfAttention, x: mx.array, rope: RopeTable, pace: Pacer
) -> tuple[mx.array, mx.array, mx.array]:
    """Same as `SelfAttention.queries_keys_values`, one after the other, with the last tile filled on CUDA."""
    # While values are computed, queries and keys are waited for: their sources are freed before attention.
    q = rotated(layer, "q", x, rope, pace)
    fill = has_fused_kernel(q.dtype, q.shape[-1])
    pace(q)
    pace.settle()
    k = rotated(layer, "k", x, rope, pace)
    k = fill_last_tile(k) if fill else k
    pace.small(k)
    pace.settle()
    v = in_dispatches(layer.v, x, pace, lambda y, tokens: split_heads(y, layer.heads))
    v = fill_last_tile(v) if fill else v
    pace(v)
    pace.settle()
    return q, k, v


def rotated(layer: SelfAttention, name: str, x: mx.array, rope: RopeTable, pace: Pacer) -> mx.array:
    """Queries ("q") or keys ("k") of x (B, L, D): (B, L, heads, head_dim)."""
    weight = layer[f"norm_{name}"].weight

    def rotate(y: mx.array, tokens: slice) -> mx.array:
        return kernels.norm_and_rotate(y, weight, layer.heads, rows_of(rope, tokens), layer.eps)

    return in_dispatches(layer[name], x, pace, rotate)


def has_fused_kernel(dtype: mx.Dtype, head_dim: int) -> bool:
    """Whether MLX computes attention without storing the scores, on the default device."""
    if mx.default_device().type != mx.DeviceType.gpu or head_dim not in FUSED_HEAD_DIMS:
        return False
    return mx.metal.is_available() or dtype in (mx.float16, mx.bfloat16)


def attention(q: mx.array, k: mx.array, v: mx.array, pace: Callable[..., None]) -> mx.array:
    """Same as `attention.attention`, in dispatches of bounded size; ``pace`` is called after each, if several."""
    batch, rows, heads, head_dim = q.shape
    work_per_row = batch * k.shape[1]
    if fused := has_fused_kernel(q.dtype, head_dim):
        limit, work_per_row = chips.dispatch_flop(), 4.0 * work_per_row * head_dim
    else:
        limit = UNFUSED_SCORES
    heads_at_once = max(1, min(heads, int(limit / (work_per_row * rows))))
    rows_at_once = max(1, min(rows, int(limit / (work_per_row * heads_at_once))))
    if fused:  # as many dispatches, all alike
        rows_at_once = math.ceil(rows / math.ceil(rows / rows_at_once))
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
