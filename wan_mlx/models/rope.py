"""Rotary position embedding over (time, height, width), with Wan's split of the head's channels among the axes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

import mlx.core as mx
import numpy as np

THETA = 10000.0
# Cosines and sines from `rope_table`.
RopeTable = tuple[mx.array, mx.array]


@lru_cache(maxsize=4)
def rope_table(grid: tuple[int, int, int], head_dim: int) -> RopeTable:
    """Cosines and sines for every token of a patch grid, which begins at (0, 0, 0); as `rope_of`."""
    time, height, width = (tuple(range(side)) for side in grid)
    return rope_of((time, height, width), head_dim)


def rope_of(positions: tuple[Sequence[int], Sequence[int], Sequence[int]], head_dim: int) -> RopeTable:
    """Cosines and sines for every token of a grid, whose rows along (time, height, width) are at ``positions``.

    Built in float64: at hundreds of positions, float32 angles are already visibly wrong.

    Returns:
        cosines (L, 1, 1, head_dim / 2) and signed sines (L, 1, 2, head_dim / 2), float32: for every pair of channels
        (a, b) its angle's cosine, and (-sine, sine). Tokens are in (time, height, width) order.
    """
    angles, spatial = [], 2 * (head_dim // 6)  # channels that rotate with height, and with width
    grid = [len(places) for places in positions]
    for axis, dim in enumerate((head_dim - 2 * spatial, spatial, spatial)):
        frequency = THETA ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
        angle = np.outer(np.asarray(positions[axis], dtype=np.float64), frequency)
        shape = [1, 1, 1, dim // 2]
        shape[axis] = grid[axis]
        angles.append(np.broadcast_to(angle.reshape(shape), (*grid, dim // 2)))
    angle = np.concatenate(angles, axis=-1).reshape(-1, 1, 1, head_dim // 2)
    sin = np.concatenate([-np.sin(angle), np.sin(angle)], axis=-2)
    return mx.array(np.cos(angle).astype(np.float32)), mx.array(sin.astype(np.float32))


def joined(tables: Sequence[RopeTable]) -> RopeTable:
    """The table of tokens that follow each other."""
    return mx.concatenate([cosines for cosines, _ in tables]), mx.concatenate([sines for _, sines in tables])


def rows_of(table: RopeTable, tokens: slice) -> RopeTable:
    """The table of some tokens."""
    cosines, sines = table
    return cosines[tokens], sines[tokens]


# The parameters whose rows produce rotated queries and keys.
ROTATED = re.compile(r"(?:vace_)?blocks\.\d+\.self_attn\.(?:q|k|norm_q|norm_k)\.\w+")


@lru_cache(maxsize=8)
def _halves(dim: int, head_dim: int) -> mx.array:
    return mx.array(np.arange(dim).reshape(-1, head_dim // 2, 2).swapaxes(1, 2).flatten())


def row_order(name: str, dim: int, head_dim: int) -> mx.array | None:
    """The order, int (dim,), of the rows of parameter ``name`` in the transformer; None for the published order.

    Wan rotates neighbouring channels of a head. With two halves (first channels of all pairs, then second ones), the
    rotation reads and writes contiguous memory, in a third of the time. Queries and keys are reordered alike, so their
    products, and everything after them, are unchanged.
    """
    return _halves(dim, head_dim) if ROTATED.fullmatch(name) else None


@mx.compile
def _rotate(x, swapped, scale, swapped_scale, cos, sin):
    a = x.astype(mx.float32) * scale
    b = swapped.astype(mx.float32) * swapped_scale
    return (a * cos + b * sin).astype(x.dtype)


def scale_and_rotate(x: mx.array, scale: mx.array, table: RopeTable) -> mx.array:
    """Apply the query/key norm's weight and the rotation in one pass, computed in float32.

    A pair (a, b) becomes (a cos - b sin, b cos + a sin): the pair times the cosine plus the swapped pair times
    (-sin, sin). The swap is a view, so nothing is copied. x is (B, L, heads, head_dim), each head's channels in halves
    (see `row_order`), and scale (heads, head_dim) likewise.
    """
    pairs, scales = x.reshape(*x.shape[:-1], 2, -1), scale.reshape(*scale.shape[:-1], 2, -1)
    return _rotate(pairs, pairs[..., ::-1, :], scales, scales[..., ::-1, :], *table).reshape(x.shape)


def norm_and_rotate(x: mx.array, weight: mx.array, heads: int, table: RopeTable, eps: float) -> mx.array:
    """Queries or keys (B, L, D) → normed over all heads and rotated (B, L, heads, D / heads).

    ``weight`` is the norm's (D,), in the order of x's channels, each head's in halves.
    """
    x = mx.fast.rms_norm(x, None, eps).reshape(*x.shape[:2], heads, -1)
    return scale_and_rotate(x, weight.reshape(heads, -1), table)
