"""Weights as ComfyUI, lightx2v, optimum-quanto, Wan2GP and torchao store them in few bits: read as their true values.

Plain fp8 is only fp8. fp8 and int8 with scales are ``weight = scale × (number - zero point)``, with one scale for all
or one for each row. In mxfp8 and nvfp4, as comfy-kitchen writes them, 32 or 16 numbers of a row share a scale; the
scales are stored in the order of NVIDIA's tensor cores (cuBLAS, "1D Block Scaling Factors Layout"). Some int8 weights
were rotated before they were rounded ("convrot"), and are rotated back. `scaled_names` says which tensors belong
together.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from ..errors import WeightsError
from .base import FP8, MICROSCALED, ByteRange, TensorInfo, WeightsFile
from .scaled_names import Scaled, blocked_shape, find_scaled, shape_of, without_scales

Read = Callable[[str], mx.array]


class ScaledFile(WeightsFile):
    """A weight file whose tensors of few bits read as numbers: bfloat16 or float16, where exact, or else float32.

    ``tensors`` has weights by their names, with their forms as dtypes, and omits the scales.
    """

    def __init__(self, file: WeightsFile, parts: dict[str, Scaled]):
        self.file, self.parts, self.is_lazy = file, parts, file.is_lazy
        self.scales = {key: _scale(file, part) for key, part in parts.items() if part.form != "mxfp8"}
        self.zeros = {key: _small(file, part.zero, part.data) for key, part in parts.items() if part.zero}
        weights = {part.data: key for key, part in parts.items()}
        tensors = {}
        for key in without_scales(file.tensors):
            name, info = weights.get(key, key), file.tensors[key]
            part = parts.get(name)
            tensors[name] = info if part is None else TensorInfo(shape_of(part, info), part.form)
        super().__init__(file.path, tensors, file.metadata)

    def read_past_cache(self) -> None:
        self.is_lazy = False
        self.file.read_past_cache()

    def read(self, key: str) -> mx.array:
        return self._true(key, self.file.read)

    def read_now(self, key: str) -> mx.array:
        return self._true(key, self.file.read_now)

    def byte_range(self, key: str) -> ByteRange | None:
        return None if self._info(key).dtype in FP8 or key in self.parts else self.file.byte_range(key)

    def rows(self, key: str, indices: np.ndarray) -> mx.array:
        indices = self._check_rows(key, indices)
        if self.tensors[key].dtype in MICROSCALED:
            return self.read(key)[mx.array(indices)]
        return self._true(key, lambda source: self.file.rows(source, indices), indices)

    def has_rows_of_blocks(self, key: str) -> bool:
        return self._info(key).dtype == "mxfp8"

    def packed(self, key: str, now: bool = False) -> dict[str, mx.array]:
        self._info(key)
        return self._packed(key, self.file.read_now if now else self.file.read)

    def _packed(self, key: str, read: Read) -> dict[str, mx.array]:
        """A weight in MLX's arrays of mxfp8 or nvfp4; lazy, on any stream."""
        part, (rows, columns) = self.parts[key], self.tensors[key].shape
        numbers = read(part.data)
        if part.form == "nvfp4":  # the first of two numbers in the high half of a byte; MLX has it in the low half
            numbers = (numbers << 4) | (numbers >> 4)
        scales = unblocked(read(part.scale), rows, columns // MICROSCALED[part.form][0])
        return {"weight": numbers.view(mx.uint32), "scales": scales}

    def _true(self, key: str, read: Read, rows: np.ndarray | None = None) -> mx.array:
        """A tensor, or those ``rows`` of it that ``read`` returns, as its numbers; lazy, on any stream."""
        dtype, part = self._info(key).dtype, self.parts.get(key)
        if part is not None and dtype in MICROSCALED:
            arrays, exact = self._packed(key, read), mx.bfloat16 if dtype == "mxfp8" else mx.float32
            values = mx.dequantize(arrays["weight"], arrays["scales"], mode=dtype, dtype=exact)
        else:
            values = _decoded(read(part.data if part else key), dtype)
        scale, zero = (of.get(key) for of in (self.scales, self.zeros))
        if rows is not None:
            scale, zero = (array[rows] if array is not None and len(array) > 1 else array for array in (scale, zero))
        if zero is not None:
            values = values.astype(mx.float32) - mx.array(zero)
        if scale is not None:
            values = values.astype(mx.float32) * mx.array(scale)
        return _rotated_back(values, part.rotated) if part is not None and part.rotated else values


def fold(file: WeightsFile) -> WeightsFile:
    """``file`` with its tensors of few bits as numbers, or itself if it has none.

    Raises:
        WeightsError: an unsupported format, tensors that do not fit together, a scale that is not finite.
    """
    parts = find_scaled(file)
    has_fp8 = any(info.dtype in FP8 for info in file.tensors.values())
    is_changed = has_fp8 or len(without_scales(file.tensors)) < len(file.tensors)
    return ScaledFile(file, parts) if is_changed else file


def unblocked(scales: mx.array, rows: int, groups: int) -> mx.array:
    """Block scales, stored in tiles of 128 rows and 4 groups where rows 32 apart are neighbours, as (rows, groups)."""
    high, wide = blocked_shape(rows, groups)
    tiles = scales.reshape(high // 128, wide // 4, 32, 4, 4)
    return tiles.transpose(0, 3, 2, 1, 4).reshape(high, wide)[:rows, :groups]


def _decoded(values: mx.array, dtype: str) -> mx.array:
    """Raw bytes of fp8 → their numbers, exactly."""
    if dtype == "F8_E4M3":
        return mx.from_fp8(values, dtype=mx.bfloat16)
    if dtype == "F8_E5M2":  # float16 without its last byte
        return (values.astype(mx.uint16) << 8).view(mx.float16)
    return values


def _rotated_back(values: mx.array, group: int) -> mx.array:
    """Undo the rotation of each ``group`` inputs, by a regular Hadamard matrix (comfy-kitchen's "convrot").

    The matrix is the Kronecker product of matrices of 4, each its own inverse: half of (all ones - 2 × the exchange).
    """
    power = (group.bit_length() - 1) // 2
    turned = values.reshape(len(values), -1, *[4] * power)
    for axis in range(2, 2 + power):
        turned = turned.sum(axis, keepdims=True) / 2 - mx.take(turned, mx.array([3, 2, 1, 0]), axis)
    return turned.reshape(values.shape)


def _scale(file: WeightsFile, part: Scaled) -> np.ndarray:
    """The scale for all or for each row; of nvfp4 the second one."""
    key = part.second or part.scale
    scale = _small(file, key, part.data)
    fine = np.isfinite(scale) & (scale > 0)
    if not fine.all():
        raise WeightsError(f"{file.path}: {key} holds {scale[~fine][0]}, expected numbers above 0; download it again")
    return scale


def _small(file: WeightsFile, key: str, data: str) -> np.ndarray:
    """float32 (1, 1, …) or (rows, 1, …), as many axes as the weight's numbers."""
    with mx.stream(mx.cpu):
        values = np.array(file.read(key).astype(mx.float32))
    return values.reshape(-1, *[1] * (len(file.tensors[data].shape) - 1))
