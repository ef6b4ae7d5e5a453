"""Weights in few bits as other tools store them, written by the formats' definitions: no tool is needed."""

import json

import mlx.core as mx
import numpy as np
from crafted import entry, write_safetensors

DTYPES = {"F32": np.float32, "F16": np.float16, "U8": np.uint8, "I8": np.int8}
DTYPES |= dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0"), np.uint8)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def e4m3(code: int) -> float:
    """The value by the format's definition: bias 7, no infinities, NaN only at all ones."""
    code = int(code)
    sign, exponent, mantissa = -1 if code & 128 else 1, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def e5m2(code: int) -> float:
    code = int(code)
    sign, exponent, mantissa = -1 if code & 128 else 1, code >> 2 & 31, code & 3
    if exponent == 31:
        return sign * float("inf") if mantissa == 0 else float("nan")
    return sign * (mantissa / 4 * 2**-14 if exponent == 0 else (1 + mantissa / 4) * 2.0 ** (exponent - 15))


E4M3 = np.array([e4m3(code) for code in range(256)], np.float32)


def write(path, tensors, metadata=None):
    """``tensors``: name → (dtype, array)."""
    header, data = {"__metadata__": metadata} if metadata else {}, b""
    for name, (dtype, array) in tensors.items():
        raw = np.asarray(array, DTYPES[dtype])
        header[name] = entry(dtype, list(raw.shape), len(data), len(data) + raw.nbytes)
        data += raw.tobytes()
    return write_safetensors(path, header, data)


def json_tensor(value) -> tuple[str, np.ndarray]:
    return "U8", np.frombuffer(json.dumps(value).encode(), np.uint8)


def in_tiles(scales: np.ndarray) -> np.ndarray:
    """(rows, groups) → the tensor cores' order: tiles of 512, each of 128 rows and 4 groups, padded with zeros."""
    rows, groups = scales.shape
    high, wide = -(-rows // 128), -(-groups // 4)
    flat = np.zeros(high * wide * 512, np.uint8)
    for row in range(rows):
        for group in range(groups):
            tile = row // 128 * wide + group // 4
            flat[tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + group % 4] = scales[row, group]
    return flat.reshape(high * 128, wide * 4)


def to_e4m3(values: np.ndarray) -> np.ndarray:
    return np.array(mx.to_fp8(mx.array(values.astype(np.float32))))


def _largest(values: np.ndarray, by_row: bool) -> np.ndarray:
    return np.abs(values).max(axis=1, keepdims=True) if by_row else np.abs(values).max()


def _int8(values, by_row=True):
    scale = (_largest(values, by_row) / 127).astype(np.float32)
    numbers = np.round(values / scale).astype(np.int8)
    return ("I8", numbers), ("F32", scale), numbers * scale


def _fp8(values, by_row=True):
    scale = (_largest(values, by_row) / 448).astype(np.float32)
    codes = to_e4m3(values / scale)
    return ("F8_E4M3", codes), ("F32", scale), E4M3[codes] * scale


def _mxfp8(values):
    groups = values.reshape(len(values), -1, 32)
    exponents = np.ceil(np.log2(np.abs(groups).max(2, keepdims=True) / 448)).astype(np.int32)
    codes, factors = to_e4m3(groups / 2.0**exponents), 2.0 ** exponents.astype(np.float32)
    scales = in_tiles((exponents[..., 0] + 127).astype(np.uint8))
    return ("F8_E4M3", codes.reshape(values.shape)), ("F8_E8M0", scales), (E4M3[codes] * factors).reshape(values.shape)


def _nvfp4(values):
    groups, second = values.reshape(len(values), -1, 16), np.float32(np.abs(values).max() / (6 * 448))
    scales = to_e4m3(np.abs(groups).max(2) / 6 / second)
    factors = E4M3[scales][..., None] * second
    codes = np.abs(groups[..., None] / factors[..., None] - E2M1[[*range(8), 9, 10, 11, 12, 13, 14, 15]]).argmin(-1)
    codes = np.where(codes > 7, codes + 1, codes).astype(np.uint8)  # without minus zero
    flat = codes.reshape(values.shape)
    numbers = ("U8", flat[:, ::2] << 4 | flat[:, 1::2])
    true = E2M1[codes] * E4M3[scales][..., None] * second  # rounded once
    return numbers, ("F8_E4M3", in_tiles(scales)), second, true.reshape(values.shape)


def stored(layer: str, values: np.ndarray, form: str) -> tuple[dict, np.ndarray]:
    """The tensors of a matrix ``<layer>.weight``, and its true values."""
    weight, scale = f"{layer}.weight", f"{layer}.weight_scale"
    if form == "nvfp4":
        numbers, scales, second, true = _nvfp4(values)
        tensors = {weight: numbers, scale: scales, f"{layer}.weight_scale_2": ("F32", second)}
        return tensors | {f"{layer}.comfy_quant": json_tensor({"format": "nvfp4"})}, true
    kind = {"int8": lambda v: _int8(v, False), "mxfp8": _mxfp8, "fp8": lambda v: _fp8(v, False)}.get(
        form, _int8 if "int8" in form else _fp8
    )
    numbers, scales, true = kind(values)
    if form.startswith("quanto"):
        unused = {f"{layer}.{which}_scale": ("F32", np.ones(())) for which in ("input", "output")}
        return {f"{weight}._data": numbers, f"{weight}._scale": scales, **unused}, true
    if form.startswith("torchao"):
        tensors = {f"{layer}._weight_qdata": numbers, f"{layer}._weight_scale": scales}
        if "int8" in form:  # a zero point for each row, which torchao's asymmetric mapping makes
            zero = np.arange(len(values)).reshape(-1, 1) % 5 - 2
            tensors[f"{layer}._weight_zero_point"] = "I8", zero
            true = (numbers[1].astype(np.float32) - zero.astype(np.float32)) * scales[1]
        return tensors, true
    return {weight: numbers, scale: scales}, true


FORMS = ("fp8", "fp8 rows", "int8", "int8 rows", "mxfp8", "nvfp4", "quanto int8", "quanto fp8", "torchao int8",
         "torchao fp8")  # fmt: skip
