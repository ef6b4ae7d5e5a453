"""The starting noise: PyTorch's stream of normal numbers, without PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

BLOCK = 16  # PyTorch transforms uniform to normal numbers sixteen at a time


def normal(shape: Sequence[int], seed: int, earlier: int = 0) -> np.ndarray:
    """Normal numbers, float32 ``shape``, as ``torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))``
    returns them after ``earlier`` calls for the same shape, of at least sixteen values.

    Follows ATen's ``normal_fill``; logarithm and sine may round differently, by less than 1e-6. Only the low 32 bits of
    the seed count, as in PyTorch.

    Raises:
        ValueError: the seed is not in [0, 2**64).
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}, expected 0 to 2**64 - 1; nearest: {0 if seed < 0 else 2**64 - 1}")
    # RandomState, not Generator: its stream is mt19937 with PyTorch's seeding, and will not change.
    draws = np.random.RandomState(seed & 0xFFFFFFFF)
    n = math.prod(shape)
    whole = n - n % BLOCK
    for _ in range(earlier):
        draws.randint(0, 2**32, n + BLOCK * (whole < n), dtype=np.uint32)
    values, uniform = np.empty(n, np.float32), _uniform24(draws, n)
    values[:whole] = _box_muller(uniform[:whole])
    if whole < n:  # an incomplete last block: the last sixteen are drawn anew
        values[-BLOCK:] = _box_muller(_uniform24(draws, BLOCK))
    return values.reshape(shape)


def latent_noise(
    latent_shape: tuple[int, int, int], channels: int, seed: int, earlier: int = 0, of: tuple[int, int] | None = None
) -> mx.array:
    """Noise to start from or to add later, float32 (1, t, h, w, C).

    Drawn as PyTorch draws (C, t, h, w), so a seed gives the same video in both. ``latent_shape`` is (t, h, w) and
    ``channels`` C; ``seed`` and ``earlier`` are as for `normal`. ``of``: (h, w) of a larger video, of whose noise this
    is the coarse part (`pooled`).
    """
    t, h, w = latent_shape
    noise = normal((channels, t, *(of or (h, w))), seed, earlier)
    noise = pooled(noise, h, w) if of else noise
    return mx.array(np.ascontiguousarray(np.moveaxis(noise, 0, -1)))[None]


def pooled(noise: np.ndarray, h: int, w: int) -> np.ndarray:
    """Noise (C, t, H, W) at half the size or less, (C, t, h, w): twice the mean of every 2 by 2 values of its middle,
    which is normal noise again, and low frequencies are those of the whole."""
    *_, height, width = noise.shape
    top, left = (height - 2 * h) // 2, (width - 2 * w) // 2
    middle = noise[..., top : top + 2 * h, left : left + 2 * w]
    return middle.reshape(*noise.shape[:2], h, 2, w, 2).mean(axis=(3, 5), dtype=np.float64).astype(np.float32) * 2


def _uniform24(draws: np.random.RandomState, n: int) -> np.ndarray:
    """float32 (n,) in [0, 1), of 24 bits."""
    bits = draws.randint(0, 2**32, n, dtype=np.uint32) & np.uint32(2**24 - 1)
    return bits.astype(np.float32) * np.float32(2**-24)


def _box_muller(uniform: np.ndarray) -> np.ndarray:
    """float32 (n,): in each block the first eight set the radius, the last eight the angle."""
    first, second = np.moveaxis(uniform.reshape(-1, 2, BLOCK // 2), 1, 0)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - first))
    angle = np.float32(2 * math.pi) * second
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()
