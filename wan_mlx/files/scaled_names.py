"""Finds which tensors of a file are together one weight: its numbers of few bits, and their scales.

Names and formats, each of a layer ``<layer>.weight``:

- ComfyUI's old scaled fp8 (``convert_old_quants``): ``<layer>.scale_weight``, with a marker ``scaled_fp8``.
- ComfyUI's mixed formats (``QUANTIZATION.md``, ``mixed_precision_ops``): ``<layer>.weight_scale``, for nvfp4 also
  ``<layer>.weight_scale_2``, with the format as JSON in ``<layer>.comfy_quant``, or in the header under
  ``_quantization_metadata``. lightx2v's fp8 and int8 have the same names, without a format.
- optimum-quanto, Wan2GP: ``<layer>.weight._data`` and ``<layer>.weight._scale``.
- torchao (``flatten_tensor_state_dict``): ``<layer>._weight_qdata``, ``<layer>._weight_scale`` and, of integers,
  ``<layer>._weight_zero_point``, with each weight's class as JSON in the header.

Everything is decided from the header and from small tensors. A scale without its weight, a matrix that lost its scale,
and a format of another kind are errors, so that they cannot cause a wrong picture.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import WeightsError, some
from ..storage import parse_json
from .base import FP8, MICROSCALED, TensorInfo, WeightsFile

FLOATS = ("F32", "F16", "BF16", "F64")
# ComfyUI's names of the supported formats → ours.
FORMATS = {
    **{"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "int8_tensorwise": "I8"},
    **{"mxfp8": "mxfp8", "nvfp4": "nvfp4"},
}
SUPPORTED = "fp8, int8, mxfp8 or nvfp4 of ComfyUI, fp8 or int8 of lightx2v, optimum-quanto or torchao"
TORCHAO = ("Float8Tensor", "Int8Tensor")
# End of a tensor's name → what it is for its layer's weight.
ROLES = {
    **{".weight._data": "data", "._weight_qdata": "data"},
    **{".scale_weight": "scale", ".weight_scale": "scale", ".weight._scale": "scale", "._weight_scale": "scale"},
    **{".weight_scale_2": "second", "._weight_zero_point": "zero", ".comfy_quant": "format"},
    # Scales of activations, which are not quantised here.
    **dict.fromkeys((".scale_input", ".input_scale", ".output_scale", "._weight_act_quant_scale"), "unused"),
}
_ENDS = tuple(ROLES)
_MARKER = "scaled_fp8"
# End of a tensor's name → the format, which is refused.
REFUSED = {
    **dict.fromkeys((".absmax", ".SCB"), "bitsandbytes' nf4, fp4 or int8"),
    **{".weight._shift": "optimum-quanto's int4 or int2", ".weight_global_scale": "lightx2v's nvfp4"},
    **dict.fromkeys((".qweight", ".wscales"), "GPTQ's, AWQ's or Nunchaku's 4 bits"),
}
ROTATIONS = [4**power for power in range(1, 7)]  # numbers of inputs that are rotated together
_HARMLESS = {"format", "full_precision_matrix_mult", "orig_dtype", "orig_shape"}  # do not change the weight's value
_MAX_FORMAT_BYTES = 4096


@dataclass(frozen=True)
class Scaled:
    """The tensors of one weight.

    Attributes:
        form: of the numbers: "F8_E4M3", "F8_E5M2" or "I8" with a scale for all or for each row, or a name in
            `MICROSCALED`.
        data: key of the numbers.
        scale: key of their scales.
        second: key of nvfp4's scale for all.
        zero: key of what is subtracted from integers.
        rotated: how many inputs were rotated together before rounding (ComfyUI's "convrot"); 0: none.
    """

    form: str
    data: str
    scale: str
    second: str | None = None
    zero: str | None = None
    rotated: int = 0


def without_scales(keys: Iterable[str]) -> list[str]:
    """The keys without those of scales, formats and markers."""
    return [key for key in keys if _role(key)[0] in ("", "data")]


def find_scaled(file: WeightsFile) -> dict[str, Scaled]:
    """Name of each weight with scales → its tensors.

    Raises:
        WeightsError: a format that is not supported, tensors that do not fit together, a matrix without its scale.
    """
    _refuse_others(file)
    keys, found = file.tensors, dict[str, dict[str, str]]()
    for key in keys:
        role, weight = _role(key)
        if role in ("data", "scale", "second", "zero"):
            other = found.setdefault(weight, {}).setdefault(role, key)
            if other != key:
                raise WeightsError(f"{file.path}: {weight} has two tensors for its {role}, {other} and {key}")
    declared = {weight: (form, rotated) for weight, form, rotated in _formats(file)}
    scaled = {}
    for weight, parts in found.items():
        if "data" in parts and weight in keys:
            raise WeightsError(f"{file.path}: {weight} is stored twice, also as {parts['data']}")
        if "data" not in parts and weight not in keys:
            first = next(iter(parts.values()))
            raise WeightsError(f"{file.path}: {first} is the scale of {weight}, which the file lacks")
        parts.setdefault("data", weight)
        if "scale" in parts and not _is_dummy(file, parts):
            declared_form, rotated = declared.get(weight, (None, 0))
            scaled[weight] = Scaled(_form(file, weight, parts, declared_form), **parts, rotated=rotated)
            _check_shapes(file, weight, scaled[weight])
    numbers = [parts["data"] for parts in found.values() if keys[parts["data"]].dtype not in FLOATS]
    _check_none_lost(file, scaled, declared, numbers)
    return scaled


def _role(key: str) -> tuple[str, str]:
    """The role of a tensor, empty for a weight of its own, and the name of its weight."""
    if key == _MARKER or key.endswith(f".{_MARKER}"):
        return "marker", key
    if not key.endswith(_ENDS):  # at once: nearly every key of every file
        return "", key
    end = next(end for end in _ENDS if key.endswith(end))
    return ROLES[end], f"{key.removesuffix(end)}.weight"


def _refuse_others(file: WeightsFile) -> None:
    for end, what in REFUSED.items():
        if keys := [key for key in file.tensors if key.endswith(end)]:
            raise WeightsError(
                f"{file.path}: {what} ({some(keys, 1)}), which is not supported; expected {SUPPORTED} "
                "(or give the bf16, fp16 or GGUF file)"
            )
    for key in file.tensors:
        role, weight = _role(key)
        if role == "data" and weight in file.metadata:
            kind = _json(file, weight, file.metadata[weight]).get("_type")
            if kind not in TORCHAO:
                raise WeightsError(
                    f"{file.path}: {weight} is a torchao {str(kind)[:40]!r}, which is not supported; expected "
                    f"{' or '.join(TORCHAO)} (or give the bf16, fp16 or GGUF file)"
                )


def _formats(file: WeightsFile) -> Iterator[tuple[str, str, int]]:
    """Each weight whose format ComfyUI's metadata declare, our name of it, and how many inputs are rotated together."""
    for layer, declared in _declarations(file):
        entry = declared if isinstance(declared, dict) else {}
        inner = entry.get("params")  # some writers put the settings there
        entry = (inner if isinstance(inner, dict) else {}) | {k: v for k, v in entry.items() if k != "params"}
        name = str(entry.get("format"))
        if name not in FORMATS:
            raise WeightsError(
                f"{file.path}: {layer} is stored as {name[:40]!r}, which is not supported; "
                f"expected {' or '.join(FORMATS)} (or give the bf16, fp16 or GGUF file)"
            )
        form, rotated = FORMATS[name], entry.get("convrot_groupsize", 256) if entry.get("convrot") else 0
        known = {"group_size": MICROSCALED[form][0]} if form in MICROSCALED else {}
        if form == "I8" and type(rotated) is int and rotated in ROTATIONS:
            known = {"convrot": True, "convrot_groupsize": rotated}
        extra = sorted(k for k, value in entry.items() if k not in _HARMLESS and value and value != known.get(k))
        if extra:
            raise WeightsError(f"{file.path}: {layer} is {name} with {extra[0][:40]!r}, which is not supported")
        yield f"{layer}.weight", form, rotated


def _declarations(file: WeightsFile) -> Iterator[tuple[str, Any]]:
    """Each layer and its declared format, from the header and from tensors."""
    if "_quantization_metadata" in file.metadata:
        layers = _json(file, "_quantization_metadata", file.metadata["_quantization_metadata"]).get("layers", {})
        if not isinstance(layers, dict):
            raise WeightsError(f"{file.path}: _quantization_metadata without a dict of layers")
        for layer, declared in layers.items():  # of a whole model; plain floats need no format
            info = file.tensors.get(f"{layer}.weight")
            if info is not None and info.dtype not in FLOATS:
                yield layer, declared
    for key, info in file.tensors.items():
        role, weight = _role(key)
        if role == "format":
            if info.dtype != "U8" or info.nbytes > _MAX_FORMAT_BYTES:
                raise WeightsError(f"{file.path}: {key} is {info.nbytes:,} bytes of {info.dtype}, expected JSON in U8")
            with mx.stream(mx.cpu):
                yield weight.removesuffix(".weight"), _json(file, key, np.array(file.read(key)).tobytes())


def _json(file: WeightsFile, what: str, text: str | bytes) -> dict:
    try:
        value = parse_json(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise WeightsError(f"{file.path}: {what} is not a JSON object; download it again")
    return value


def _is_dummy(file: WeightsFile, parts: dict[str, str]) -> bool:
    """Whether a scale is 1 and belongs to plain floats, as some files of scaled fp8 have for layers left in float16."""
    data, scale = (file.tensors[parts[role]] for role in ("data", "scale"))
    if data.dtype not in FLOATS or scale.dtype not in FLOATS or math.prod(scale.shape) != 1:
        return False
    with mx.stream(mx.cpu):
        return file.read(parts["scale"]).item() == 1


def _form(file: WeightsFile, weight: str, parts: dict[str, str], declared: str | None) -> str:
    """The form of a weight, by the dtypes of its tensors."""
    data, scale = (file.tensors[parts[role]].dtype for role in ("data", "scale"))
    if scale == "U8" and declared in MICROSCALED:  # as older files store them
        scale = {"mxfp8": "F8_E8M0", "nvfp4": "F8_E4M3"}[declared]
    if (data, scale) == ("F8_E4M3", "F8_E8M0"):
        form = "mxfp8"
    elif (data, scale) == ("U8", "F8_E4M3") and "second" in parts:
        form = "nvfp4"
    elif data in (*FP8, "I8"):
        form = data
        if scale not in FLOATS:
            raise WeightsError(f"{file.path}: {parts['scale']} is {scale}, expected a float")
    else:
        raise WeightsError(
            f"{file.path}: {parts['scale']} is the {scale} scale of {weight}, which is {data}; expected {SUPPORTED} "
            "(or give the bf16, fp16 or GGUF file)"
        )
    if declared not in (None, form):
        raise WeightsError(f"{file.path}: {weight} is declared {declared}, but its tensors are {data} and {scale}")
    for role, of in (("second", "nvfp4"), ("zero", "I8")):
        if role in parts and form != of:
            raise WeightsError(f"{file.path}: {parts[role]} beside {weight}, which is {form}; only {of} has one")
    return form


def _check_shapes(file: WeightsFile, weight: str, part: Scaled) -> None:
    data, scale = file.tensors[part.data], file.tensors[part.scale]
    values = math.prod(scale.shape)
    if part.form in MICROSCALED:
        rows, columns = shape_of(part, data) if len(data.shape) == 2 else (0, 0)
        group = MICROSCALED[part.form][0]
        wanted = blocked_shape(rows, columns // group)
        if columns % group or not columns or scale.shape != wanted:
            raise WeightsError(
                f"{file.path}: {part.scale} has shape {scale.shape} for a {part.form} of shape {data.shape}; expected "
                f"whole groups of {group} and scales of shape {wanted}"
            )
    elif values != 1 and scale.shape not in (data.shape[:1], data.shape[:1] + (1,) * (len(data.shape) - 1)):
        raise WeightsError(
            f"{file.path}: {part.scale} has shape {scale.shape}; expected 1 value, or 1 for each row of {data.shape}"
        )
    if part.rotated and (len(data.shape) != 2 or data.shape[1] % part.rotated):
        raise WeightsError(f"{file.path}: {weight} of shape {data.shape} cannot be rotated in groups of {part.rotated}")
    for key, count, dtypes in ((part.second, 1, FLOATS), (part.zero, values, ("I8", "I32", *FLOATS))):
        info = file.tensors[key] if key else None
        if info is not None and (math.prod(info.shape) != count or info.dtype not in dtypes):
            raise WeightsError(
                f"{file.path}: {key} is {info.dtype} {info.shape}; expected {count} numbers for {weight}"
            )


def shape_of(part: Scaled, data: TensorInfo) -> tuple[int, ...]:
    """The weight's shape: two numbers of nvfp4 are one byte."""
    return (data.shape[0], 2 * data.shape[1]) if part.form == "nvfp4" else data.shape


def blocked_shape(rows: int, groups: int) -> tuple[int, int]:
    """The shape of block scales in tiles of 128 rows and 4 groups, the last ones padded."""
    return -(-rows // 128) * 128, -(-groups // 4) * 4


def _check_none_lost(
    file: WeightsFile, scaled: dict[str, Scaled], declared: Collection[str], numbers: list[str]
) -> None:
    """In a file with scales every fp8 matrix has one; ComfyUI's ModelSave stores biases and norms as plain fp8."""
    keys = file.tensors
    if not (scaled or declared or numbers or any(_role(key)[0] == "marker" for key in keys)):
        return
    matrices = [key for key, info in keys.items() if info.dtype in FP8 and len(info.shape) == 2 and not _role(key)[0]]
    kept = {part.data for part in scaled.values()}
    needed = dict.fromkeys((*numbers, *declared, *matrices))
    if lost := [key for key in needed if key not in kept]:
        raise WeightsError(f"{file.path}: {len(lost)} weights of a scaled file have no scale: {some(lost, 3)}")
