"""GGUF blocks → MLX's quantised format without unpacking: same integers, and a scale and bias for every 32 of them.

ggml's ``x = d * q`` (Q8_0, Q4_0, Q5_0, around zero) and ``x = d * q + m`` (Q4_1, Q5_1) are exactly MLX's affine mode;
scales stay float16. Q4_K and Q5_K multiply two scales, whose product is rounded to float16 here: relative error at most
2⁻¹². Block layouts follow ggml's ``ggml-common.h``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import mlx.core as mx
import numpy as np

from ..errors import WeightsError
from ..files.base import BLOCKS
from ..models.quantized_linear import Packing

# (integers uint8 (n, values), scales, biases (n, groups)) of blocks uint8 (n, bytes).
Parts = tuple[np.ndarray, np.ndarray, np.ndarray]
Split = Callable[[np.ndarray], Parts]


def _halves(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 at byte ``at`` of each block, as float32 (n, 1)."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _simple(blocks: np.ndarray, bits: int, has_min: bool) -> Parts:
    """Blocks of one scale for 32 values, which are around zero, or from a minimum on."""
    d = _halves(blocks, 0)
    m = _halves(blocks, 2) if has_min else -(2 ** (bits - 1)) * d
    data = blocks[:, 4 if has_min else 2 :]
    if bits == 8:
        return data ^ 128, d, m  # two's complement, shifted by 128
    halves = data[:, -16:]  # all low halves, then all high ones
    integers = np.concatenate([halves & 15, halves >> 4], axis=1)
    if bits == 5:
        integers |= np.unpackbits(np.ascontiguousarray(data[:, :4]), axis=1, bitorder="little") << 4
    return integers, d, m


def _super(blocks: np.ndarray, bits: int) -> Parts:
    """K blocks: eight groups of 32 values, with scales and mins of six bits, which two float16 multiply."""
    first, second, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([first & 63, (high & 15) | (first >> 6) << 4], axis=1)
    mins = np.concatenate([second & 63, (high >> 4) | (second >> 6) << 4], axis=1)
    # Each 32 bytes have 32 values in the low halves, the next 32 in the high ones.
    halves = blocks[:, -128:].reshape(-1, 4, 1, 32)
    integers = np.concatenate([halves & 15, halves >> 4], axis=2).reshape(-1, 256)
    if bits == 5:  # bit g of byte i is the fifth bit of value i of group g
        fifth = (blocks[:, 16:48].reshape(-1, 1, 32) >> np.arange(8, dtype=np.uint8).reshape(1, 8, 1)) & 1
        integers |= (fifth << 4).reshape(-1, 256)
    return integers, _halves(blocks, 0) * scales.astype(np.float32), -_halves(blocks, 2) * mins.astype(np.float32)


# GGUF type → function that splits its blocks: those stored exactly in MLX's format, and those that only round a scale.
EXACT: dict[str, Split] = {
    "Q8_0": partial(_simple, bits=8, has_min=False),
    "Q5_0": partial(_simple, bits=5, has_min=False),
    "Q5_1": partial(_simple, bits=5, has_min=True),
    "Q4_0": partial(_simple, bits=4, has_min=False),
    "Q4_1": partial(_simple, bits=4, has_min=True),
}
NEARLY_EXACT: dict[str, Split] = {"Q5_K": partial(_super, bits=5), "Q4_K": partial(_super, bits=4)}
# GGUF type → nearest packing. Types without such a function are quantised again from their values, with enough bits
# that the second rounding adds little to the first.
PACKINGS = {
    **{"Q8_0": "q8-g32", "Q5_0": "q5-g32", "Q5_1": "q5-g32", "Q4_0": "q4-g32", "Q4_1": "q4-g32"},
    **{"Q5_K": "q5-g32", "Q4_K": "q4-g32"},
    **{"Q6_K": "q8-g32", "IQ4_NL": "q5-g32", "IQ4_XS": "q5-g32", "Q3_K": "q5-g32", "Q2_K": "q4-g32"},
}


def repack(blocks: np.ndarray, kind: str) -> dict[str, mx.array]:
    """Blocks as stored, uint8 (rows, bytes of a row), of a ``kind`` in `EXACT` or `NEARLY_EXACT` → MLX's arrays."""
    rows = len(blocks)
    integers, scales, biases = {**EXACT, **NEARLY_EXACT}[kind](blocks.reshape(-1, BLOCKS[kind][1]))
    with np.errstate(over="ignore"):
        scales, biases = (a.astype(np.float16).reshape(rows, -1) for a in (scales, biases))
    if not (np.isfinite(scales).all() and np.isfinite(biases).all()):
        raise WeightsError(f"a {kind} block holds a scale that is not finite or too large; download it again")
    weight = _pack(integers.reshape(rows, -1), Packing.parse(PACKINGS[kind]).bits)
    return {"weight": mx.array(weight), "scales": mx.array(scales), "biases": mx.array(biases)}


def _pack(integers: np.ndarray, bits: int) -> np.ndarray:
    """uint8 (rows, n) → uint32 (rows, n * bits / 32), the lowest bits first."""
    if bits == 8:
        return np.ascontiguousarray(integers).view(np.uint32)
    if bits == 4:
        return (integers[:, ::2] | integers[:, 1::2] << 4).view(np.uint32)
    stream = np.unpackbits(integers[..., None], axis=2, count=bits, bitorder="little")
    return np.packbits(stream.reshape(len(integers), -1), axis=1, bitorder="little").view(np.uint32)
