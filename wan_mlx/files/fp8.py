"""fp8 weights as published for ComfyUI and LightX2V, with scales applied: a tensor reads as its true values.

Plain files hold only fp8. Scaled files hold one scale for each fp8 weight, of one value or one for each output row, and
``weight = fp8 × scale``, in two dialects (ComfyUI's ``QUANTIZATION.md`` and ``convert_old_quants``):
``<layer>.scale_weight`` and a marker ``scaled_fp8``; or ``<layer>.weight_scale``, with each layer's format as JSON in
``<layer>.comfy_quant`` or in the header under ``_quantization_metadata``. A scale without an fp8 weight, or a weight
without its scale, is an error, so that it cannot cause a wrong picture.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import WeightsError, some
from ..storage import parse_json
from .base import ByteRange, JoinedFile, WeightsFile

FP8 = ("F8_E4M3", "F8_E5M2")
# ComfyUI's names of the supported formats; others (nvfp4, mxfp8, int8_tensorwise …) are refused by name.
FORMATS = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
_HARMLESS = {"format", "full_precision_matrix_mult", "orig_dtype", "orig_shape"}  # do not change the weight's value
_SCALE = re.compile(r"(.+)\.(?:scale_weight|weight_scale)")
_FORMAT = re.compile(r"(.+)\.comfy_quant")
_MARKER = re.compile(r"(?:.+\.)?scaled_fp8")
# Scales of activations, which are not quantised here.
_ACTIVATION = re.compile(r".+\.(?:scale_input|input_scale)")
_PARTS = (_SCALE, _FORMAT, _MARKER, _ACTIVATION)
_MAX_FORMAT_BYTES = 4096


class Fp8File(WeightsFile):
    """A weight file whose fp8 tensors read as numbers: bfloat16 or float16, which are exact, or, if scaled, float32.

    ``tensors`` keeps the stored dtypes and omits the scales.
    """

    def __init__(self, file: WeightsFile):
        _check_formats(file)
        self.scales = {key: _read_scale(file, key, scale) for key, scale in _scale_keys(file).items()}
        super().__init__(file.path, {k: file.tensors[k] for k in without_scales(file.tensors)}, file.metadata)
        self.file, self.is_lazy = file, file.is_lazy

    def read(self, key: str) -> mx.array:
        self._info(key)
        return self._true(key, self.file.read(key), self.scales.get(key))

    def read_now(self, key: str) -> mx.array:
        self._info(key)
        return self._true(key, self.file.read_now(key), self.scales.get(key))

    def byte_range(self, key: str) -> ByteRange | None:
        return None if self._info(key).dtype in FP8 else self.file.byte_range(key)

    def rows(self, key: str, indices: np.ndarray) -> mx.array:
        scale = self.scales.get(key)
        values = self.file.rows(key, indices)
        return self._true(key, values, scale[indices] if scale is not None and len(scale) > 1 else scale)

    def _true(self, key: str, values: mx.array, scale: np.ndarray | None) -> mx.array:
        """Raw bytes → their numbers, exactly; lazy, on any stream."""
        if self.tensors[key].dtype == "F8_E4M3":
            values = mx.from_fp8(values, dtype=mx.bfloat16)
        elif self.tensors[key].dtype == "F8_E5M2":  # float16 without its last byte
            values = (values.astype(mx.uint16) << 8).view(mx.float16)
        return values if scale is None else values.astype(mx.float32) * mx.array(scale)


def fold(file: WeightsFile) -> WeightsFile:
    """``file`` with its fp8 tensors as numbers, or itself if it has none.

    Raises:
        WeightsError: an unsupported format, a scale without its weight or not finite, a weight without its scale.
    """
    keys = file.tensors
    has_fp8 = any(info.dtype in FP8 for info in keys.values())
    return Fp8File(file) if has_fp8 or len(without_scales(keys)) < len(keys) else file


def without_scales(keys: Iterable[str]) -> list[str]:
    """The keys without those of fp8 scales and formats."""
    return [key for key in keys if not any(pattern.fullmatch(key) for pattern in _PARTS)]


def _check_formats(file: WeightsFile) -> None:
    """Every layer's declared format must be a supported fp8, and match its weight."""
    for layer, declared in _formats(file):
        name = declared.get("format") if isinstance(declared, dict) else None
        if name not in FORMATS:
            raise WeightsError(
                f"{file.path}: {layer} is stored as {str(name)[:40]!r}, which is not supported; "
                f"expected {' or '.join(FORMATS)} (or give the bf16, fp16 or GGUF file)"
            )
        if extra := sorted(declared.keys() - _HARMLESS):
            raise WeightsError(f"{file.path}: {layer} is {name} with {extra[0][:40]!r}, which is not supported")
        weight = file.tensors.get(f"{layer}.weight")
        if weight is not None and weight.dtype != FORMATS[name]:
            raise WeightsError(f"{file.path}: {layer} is declared {name}, but its weight is {weight.dtype}")


def _formats(file: WeightsFile) -> Iterator[tuple[str, Any]]:
    """Each layer and its declared format, from the header and from tensors."""
    if "_quantization_metadata" in file.metadata:
        layers = _json(file, "_quantization_metadata", file.metadata["_quantization_metadata"]).get("layers", {})
        if not isinstance(layers, dict):
            raise WeightsError(f"{file.path}: _quantization_metadata without a dict of layers")
        for layer, declared in layers.items():
            # Of a whole model's file only this network's layers count.
            if not isinstance(file, JoinedFile) or f"{layer}.weight" in file.tensors:
                yield repr(layer[:200])[1:-1], declared
    for key, info in file.tensors.items():
        if match := _FORMAT.fullmatch(key):
            if info.dtype != "U8" or info.nbytes > _MAX_FORMAT_BYTES:
                raise WeightsError(f"{file.path}: {key} is {info.nbytes:,} bytes of {info.dtype}, expected JSON in U8")
            with mx.stream(mx.cpu):
                yield match[1], _json(file, key, np.array(file.read(key)).tobytes())


def _json(file: WeightsFile, what: str, text: str | bytes) -> dict:
    try:
        value = parse_json(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise WeightsError(f"{file.path}: {what} is not a JSON object; download it again")
    return value


def _scale_keys(file: WeightsFile) -> dict[str, str]:
    """Key of each fp8 weight → key of its scale."""
    keys, found = file.tensors, dict[str, str]()
    for key in keys:
        match = _SCALE.fullmatch(key)
        if match is None:
            continue
        weight = f"{match[1]}.weight"
        if weight not in keys:
            raise WeightsError(f"{file.path}: {key} is the scale of {weight}, which the file lacks")
        if keys[weight].dtype not in FP8:
            raise WeightsError(
                f"{file.path}: {key} is the scale of {weight}, which is {keys[weight].dtype}; only fp8 with scales is "
                "supported (or give the bf16, fp16 or GGUF file)"
            )
        if weight in found:
            raise WeightsError(f"{file.path}: {weight} has two scales, {found[weight]} and {key}")
        found[weight] = key
    if found or any(_MARKER.fullmatch(key) for key in keys):
        lost = [key for key in without_scales(keys) if keys[key].dtype in FP8 and key not in found]
        if lost:
            raise WeightsError(f"{file.path}: {len(lost)} fp8 weights of a scaled file have no scale: {some(lost, 3)}")
    return found


def _read_scale(file: WeightsFile, weight: str, key: str) -> np.ndarray:
    """float32 (1, 1, …) or (rows, 1, …), as many axes as the weight."""
    shape, info = file.tensors[weight].shape, file.tensors[key]
    rows = math.prod(info.shape)
    if rows != 1 and info.shape != shape[:1] + (1,) * (len(info.shape) - 1):
        raise WeightsError(f"{file.path}: {key} has shape {info.shape}; expected 1 value, or 1 for each row of {shape}")
    if info.dtype not in ("F32", "F16", "BF16", "F64"):
        raise WeightsError(f"{file.path}: {key} is {info.dtype}, expected a float")
    with mx.stream(mx.cpu):
        scale = np.array(file.read(key).astype(mx.float32)).reshape(-1)
    if not (np.isfinite(scale) & (scale > 0)).all():
        bad = scale[~(np.isfinite(scale) & (scale > 0))][0]
        raise WeightsError(f"{file.path}: {key} holds {bad}, expected numbers above 0; download the file again")
    return scale.reshape((rows,) + (1,) * (len(shape) - 1))
