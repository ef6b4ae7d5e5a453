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
        two float32 arrays (L, 1, head_dim / 2), one angle per pair of channels, tokens in (time, height, width) order.
    """
    angles = []
    for axis, dim in enumerate(axis_dims(head_dim)):
        frequency = THETA ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
        angle = np.outer(np.arange(grid[axis], dtype=np.float64), frequency)
        shape = [1, 1, 1, dim // 2]
        shape[axis] = grid[axis]
        angles.append(np.broadcast_to(angle.reshape(shape), (*grid, dim // 2)))
    angle = np.concatenate(angles, axis=-1).reshape(-1, 1, head_dim // 2)
    cos, sin = mx.array(np.cos(angle).astype(np.float32)), mx.array(np.sin(angle).astype(np.float32))
    mx.eval(cos, sin)
    return cos, sin


@mx.compile
def _rotate(even, odd, even_scale, odd_scale, cos, sin):
    a = even.astype(mx.float32) * even_scale
    b = odd.astype(mx.float32) * odd_scale
    return (a * cos - b * sin).astype(even.dtype), (a * sin + b * cos).astype(even.dtype)


def scale_and_rotate(x: mx.array, scale: mx.array, table: tuple[mx.array, mx.array]) -> mx.array:
    """Apply the query/key norm's weight and the rotation in one pass, in float32 inside.

    Wan rotates neighbouring channels (0,1), (2,3), ...; the result is laid out as two halves (all first members,
    then all second members). Queries and keys are permuted alike, so their products are unchanged.

    Args:
        x: (B, L, heads, head_dim).
        scale: (heads, head_dim).
        table: from `rope_table`.

    Returns:
        (B, L, heads, head_dim) in x's dtype.
    """
    pair = _rotate(x[..., 0::2], x[..., 1::2], scale[..., 0::2], scale[..., 1::2], *table)
    return mx.concatenate(pair, axis=-1)
