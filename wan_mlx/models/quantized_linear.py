"""Linear layers with quantised weights, in the formats of `mlx.core.quantize`.

A mode is named as users type it: "q8", "q6", "q5", "q4" or "q3" (affine, one scale and bias per group of 64 inputs;
"q4-g32" and "q4-g128" for other groups), "mxfp8", "mxfp4" or "nvfp4".
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from .layers import with_side

# Scales and biases are float16 in any compute dtype: bfloat16's eight bits would lose as much as quantising a q8 weight
# does (relative error 0.0092 instead of 0.0057), and GGUF's are float16.
SCALES = mx.float16
AFFINE_BITS = (8, 6, 5, 4, 3)
AFFINE_GROUPS = (32, 64, 128)
DEFAULT_GROUP = 64
# Floating-point modes: bits, group.
FLOAT_MODES = {"mxfp8": (8, 32), "mxfp4": (4, 32), "nvfp4": (4, 16)}


@dataclass(frozen=True)
class Packing:
    """A format of `mlx.core.quantize`: ``bits`` per weight, and a scale for every ``group_size`` inputs of a row."""

    mode: str
    bits: int
    group_size: int

    @classmethod
    def parse(cls, name: str) -> Packing:
        """The format with the user's name ``name``; ValueError for an unknown one."""
        if name in FLOAT_MODES:
            return cls(name, *FLOAT_MODES[name])
        match = re.fullmatch(r"q(\d)(?:-g(\d+))?", name)
        bits, group = (int(match[1]), int(match[2] or DEFAULT_GROUP)) if match else (0, 0)
        if bits not in AFFINE_BITS or group not in AFFINE_GROUPS:
            raise ValueError(f"unknown quantisation {name!r}; expected one of {', '.join(MODE_NAMES)}")
        return cls("affine", bits, group)

    @property
    def name(self) -> str:
        """The name that `parse` takes."""
        if self.mode in FLOAT_MODES:
            return self.mode
        return f"q{self.bits}" + ("" if self.group_size == DEFAULT_GROUP else f"-g{self.group_size}")

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, int], mx.Dtype]]:
        """Shape and dtype of the arrays of a quantised matrix of ``shape`` (outputs, inputs).

        Raises:
            ValueError: the inputs are not whole groups.
        """
        rows, columns = shape
        if columns % self.group_size:
            raise ValueError(f"{columns} inputs are no multiple of {self.name}'s group of {self.group_size}")
        groups = (rows, columns // self.group_size)
        packed = {"weight": ((rows, columns * self.bits // 32), mx.uint32)}
        if self.mode == "affine":
            return {**packed, "scales": (groups, SCALES), "biases": (groups, SCALES)}
        return {**packed, "scales": (groups, mx.uint8)}

    def pack(self, weight: mx.array) -> dict[str, mx.array]:
        """Quantise a matrix (outputs, inputs), from float32."""
        arrays = mx.quantize(weight.astype(mx.float32), self.group_size, self.bits, self.mode)
        kept = self.shapes(weight.shape)
        return {key: array.astype(kept[key][1]) for key, array in zip(kept, arrays, strict=True)}

    def are_finite(self, arrays: dict[str, mx.array]) -> mx.array:
        """Whether all scales and biases are finite: a bool scalar."""
        if self.mode == "affine":
            return mx.isfinite(arrays["scales"]).all() & mx.isfinite(arrays["biases"]).all()
        # Scales are e8m0, whose NaN is 255, or nvfp4's e4m3, whose NaNs are 127 and 255.
        return (arrays["scales"] != 255).all() & ((arrays["scales"] != 127).all() if self.mode == "nvfp4" else True)

    def unpack(self, arrays: dict[str, mx.array], dtype: mx.Dtype) -> mx.array:
        """The matrix (outputs, inputs) of quantised ``arrays``."""
        scales, biases = arrays["scales"], arrays.get("biases")
        if biases is not None and dtype == mx.float32:
            scales, biases = scales.astype(dtype), biases.astype(dtype)
        return mx.dequantize(arrays["weight"], scales, biases, self.group_size, self.bits, self.mode, dtype=dtype)


MODE_NAMES = (*(f"q{bits}" for bits in AFFINE_BITS), *FLOAT_MODES)


class QuantizedLinear(nn.Module):
    """A linear layer with quantised weights, which it unpacks for every product; computes in its input's dtype.

    With more than 256 rows that is three to nine times faster on Metal than `mx.quantized_matmul`.
    """

    def __init__(self, in_dim: int, out_dim: int, bias: bool, packing: Packing):
        super().__init__()
        self.packing = packing
        for key, (shape, dtype) in packing.shapes((out_dim, in_dim)).items():
            setattr(self, key, mx.zeros(shape, dtype))
        if bias:
            self.bias = mx.zeros((out_dim,))

    def __call__(self, x: mx.array) -> mx.array:
        return with_side(self, x, self.product)

    def product(self, x: mx.array) -> mx.array:
        """The result without LoRAs beside the weights."""
        weight = self.unpacked(x.dtype)
        return mx.addmm(self.bias.astype(x.dtype), x, weight.T) if "bias" in self else x @ weight.T

    def unpacked(self, dtype: mx.Dtype) -> mx.array:
        """The weights (outputs, inputs); part of one call's graph, freed with it."""
        return self.packing.unpack(self, dtype)
