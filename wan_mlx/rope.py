"""Rotary position embedding over (time, height, width), as Wan splits the head's channels among the three axes."""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx
import numpy as np

THETA = 10000.0


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that rotate with time, height and width; the remainder goes to time."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


@lru_cache(maxsize=4)
def rope_table(grid: tuple[int, int, int], head_dim: int) -> tuple[mx.array, mx.array]:
    """Cosines and sines for every token of a patch grid.

    Built in float64: at hundreds of positions, float32 angles are already visibly wrong.

    Args:
        grid: patches along (time, height, width).
        head_dim: channels of one head.

    Returns:
        cosines (L, 1, head_dim / 2, 1) and signed sines (L, 1, head_dim / 2, 2), float32: for every pair of channels
        (a, b) its angle's cosine, and (-sine, sine). Tokens are in (time, height, width) order.
    """
    angles = []
    for axis, dim in enumerate(axis_dims(head_dim)):
        frequency = THETA ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
        angle = np.outer(np.arange(grid[axis], dtype=np.float64), frequency)
        shape = [1, 1, 1, dim // 2]
        shape[axis] = grid[axis]
        angles.append(np.broadcast_to(angle.reshape(shape), (*grid, dim // 2)))
    angle = np.concatenate(angles, axis=-1).reshape(-1, 1, head_dim // 2, 1)
    sin = np.concatenate([-np.sin(angle), np.sin(angle)], axis=-1)
    tables = mx.array(np.cos(angle).astype(np.float32)), mx.array(sin.astype(np.float32))
    mx.eval(tables)
    return tables


@mx.compile
def _rotate(x, swapped, scale, swapped_scale, cos, sin):
    a = x.astype(mx.float32) * scale
    b = swapped.astype(mx.float32) * swapped_scale
    return (a * cos + b * sin).astype(x.dtype)


def scale_and_rotate(x: mx.array, scale: mx.array, table: tuple[mx.array, mx.array]) -> mx.array:
    """Apply the query/key norm's weight and the rotation in one pass, in float32 inside.

    Wan rotates neighbouring channels: (a, b) becomes (a cos - b sin, b cos + a sin), the pair times the cosine plus
    the swapped pair times (-sin, sin). The swap is a view, so nothing is copied.

    Args:
        x: (B, L, heads, head_dim).
        scale: (heads, head_dim).
        table: from `rope_table`.

    Returns:
        (B, L, heads, head_dim) in x's dtype.
    """
    pairs, scales = x.reshape(*x.shape[:-1], -1, 2), scale.reshape(*scale.shape[:-1], -1, 2)
    return _rotate(pairs, pairs[..., ::-1], scales, scales[..., ::-1], *table).reshape(x.shape)
