"""Floats → GGUF's blocks, for the types that the ``gguf`` package can only read, by plain rounding.

llama.cpp searches for the scales that fit best, so its files are a little more exact than these. Block layouts follow
ggml's ``ggml-common.h``. Every function takes float32 (n, values of a block) and gives uint8 (n, bytes of a block).
"""

from __future__ import annotations

import numpy as np

# IQ4_NL's sixteen values, times the block's scale.
CODEBOOK = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


def _half(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, 1) as float16's bytes (n, 2), and as what they stand for."""
    half = values.astype(np.float16)
    return half.view(np.uint8), half.astype(np.float32)


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(a.shape, b.shape), np.float32), where=b != 0)


def _extreme(groups: np.ndarray) -> np.ndarray:
    """Of each group the value farthest from zero, with its sign: (n, groups, 1)."""
    return np.take_along_axis(groups, np.abs(groups).argmax(-1, keepdims=True), -1)


def _asymmetric(x: np.ndarray, size: int, levels: int, steps: int) -> tuple[np.ndarray, ...]:
    """Groups of ``size`` as ``d * scale * q - dmin * min``: d's and dmin's bytes, scale, min (n, groups), q."""
    groups = x.reshape(len(x), -1, size)
    low = np.minimum(groups.min(-1), 0)
    scale, minimum = (groups.max(-1) - low) / levels, -low
    d_bytes, d = _half(scale.max(-1, keepdims=True) / steps)
    dmin_bytes, dmin = _half(minimum.max(-1, keepdims=True) / steps)
    scale = np.clip(np.rint(_ratio(scale, d)), 0, steps)
    minimum = np.clip(np.rint(_ratio(minimum, dmin)), 0, steps)
    q = np.rint(_ratio(groups + (dmin * minimum)[..., None], (d * scale)[..., None]))
    integers = (a.astype(np.uint8) for a in (scale, minimum, np.clip(q, 0, levels).reshape(len(x), -1)))
    return d_bytes, dmin_bytes, *integers


def _six_bit_pairs(scale: np.ndarray, minimum: np.ndarray) -> np.ndarray:
    """Eight scales and eight minimums of six bits in twelve bytes."""
    first = scale[:, :4] | scale[:, 4:] >> 4 << 6
    second = minimum[:, :4] | minimum[:, 4:] >> 4 << 6
    return np.concatenate([first, second, scale[:, 4:] & 15 | (minimum[:, 4:] & 15) << 4], 1)


def _pairs_of_groups(q: np.ndarray) -> np.ndarray:
    """Nibbles (n, 256): in each 64 values the first 32 are low halves, the next 32 high ones."""
    pieces = q.reshape(len(q), -1, 2, 32)
    return (pieces[:, :, 0] | pieces[:, :, 1] << 4).reshape(len(q), -1)


def _quarters(q: np.ndarray) -> np.ndarray:
    """Two-bit values (n, 256): in each 128 values the four times 32 share 32 bytes."""
    pieces = q.reshape(len(q), 2, 4, 32)
    return np.bitwise_or.reduce(pieces << np.array([0, 2, 4, 6], np.uint8)[:, None], axis=2).reshape(len(q), -1)


def _bits(q: np.ndarray) -> np.ndarray:
    """One-bit values (n, 256): value i of group g is bit g of byte i."""
    pieces = q.reshape(len(q), 8, 32)
    return np.bitwise_or.reduce(pieces << np.arange(8, dtype=np.uint8)[:, None], axis=1)


def q2_k(x: np.ndarray) -> np.ndarray:
    d, dmin, scale, minimum, q = _asymmetric(x, 16, levels=3, steps=15)
    return np.concatenate([scale | minimum << 4, _quarters(q), d, dmin], 1)


def q3_k(x: np.ndarray) -> np.ndarray:
    groups = x.reshape(len(x), 16, 16)
    scale = _extreme(groups)[..., 0] / -4
    d_bytes, d = _half(np.abs(scale).max(-1, keepdims=True) / 31)
    scale = np.clip(np.rint(_ratio(scale, d)), -32, 31)
    q = np.clip(np.rint(_ratio(groups, (d * scale)[..., None])), -4, 3).reshape(len(x), -1) + 4
    q, scale = q.astype(np.uint8), (scale + 32).astype(np.uint8)
    low = scale[:, :8] & 15 | (scale[:, 8:] & 15) << 4
    high = (scale >> 4).reshape(-1, 4, 4) << np.array([0, 2, 4, 6], np.uint8)[:, None]
    return np.concatenate([_bits(q >> 2), _quarters(q & 3), low, np.bitwise_or.reduce(high, axis=1), d_bytes], 1)


def q4_k(x: np.ndarray) -> np.ndarray:
    d, dmin, scale, minimum, q = _asymmetric(x, 32, levels=15, steps=63)
    return np.concatenate([d, dmin, _six_bit_pairs(scale, minimum), _pairs_of_groups(q)], 1)


def q5_k(x: np.ndarray) -> np.ndarray:
    d, dmin, scale, minimum, q = _asymmetric(x, 32, levels=31, steps=63)
    return np.concatenate([d, dmin, _six_bit_pairs(scale, minimum), _bits(q >> 4), _pairs_of_groups(q & 15)], 1)


def q6_k(x: np.ndarray) -> np.ndarray:
    groups = x.reshape(len(x), 16, 16)
    scale = _extreme(groups)[..., 0] / -32
    d_bytes, d = _half(np.abs(scale).max(-1, keepdims=True) / 127)
    scale = np.clip(np.rint(_ratio(scale, d)), -128, 127)
    q = np.clip(np.rint(_ratio(groups, (d * scale)[..., None])), -32, 31).reshape(len(x), -1) + 32
    q = q.astype(np.uint8)
    pieces = (q & 15).reshape(len(x), 2, 2, 64)
    low = (pieces[:, :, 0] | pieces[:, :, 1] << 4).reshape(len(x), -1)
    return np.concatenate([low, _quarters(q >> 4), scale.astype(np.int8).view(np.uint8), d_bytes], 1)


def iq4_nl(x: np.ndarray) -> np.ndarray:
    d_bytes, d = _half(_extreme(x[:, None])[:, 0] / CODEBOOK[0])
    q = np.abs(_ratio(x, d)[..., None] - CODEBOOK).argmin(-1).astype(np.uint8)
    return np.concatenate([d_bytes, q[:, :16] | q[:, 16:] << 4], 1)


QUANTISERS = {
    "Q6_K": (256, q6_k), "Q5_K": (256, q5_k), "Q4_K": (256, q4_k), "Q3_K": (256, q3_k), "Q2_K": (256, q2_k),
    "IQ4_NL": (32, iq4_nl),
}  # fmt: skip


def quantise(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 (rows, width) → uint8 (rows, bytes of a row) of any GGUF type that is read here; F16 stays floats."""
    if dtype in QUANTISERS:
        size, quantiser = QUANTISERS[dtype]
        return quantiser(np.ascontiguousarray(values, np.float32).reshape(-1, size)).reshape(len(values), -1)
    import gguf

    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[dtype])
