"""Safetensors files (https://github.com/huggingface/safetensors, "Format"), every number of the header checked.

MLX loads the tensors, the library writes them. Each time MLX opens a file, its header is compared with the one checked.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard, cast

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, TensorSpec, serialize_file

from ..errors import WeightsError
from ..storage import parse_json
from .base import ITEMSIZE, MAX_DIM, MAX_ENTRIES, MAX_NDIM, TensorInfo, WeightsFile
from .parallel_read import PIECE

# One such tensor makes mx.load refuse the whole file.
_UNKNOWN_TO_MLX = {"F64", "F8_E5M2"}
_MOST_VALUES = 20 * MAX_ENTRIES  # in a header or an index
# Number of streams for which a safetensors file keeps lazy arrays, and so stays open.
_MOST_POOLS = 8


class SafetensorsFile(WeightsFile):
    """One .safetensors file; tensors are MLX's lazy arrays."""

    is_lazy = True

    def __init__(self, path: Path):
        tensors, metadata, self._starts = _read_header(path)
        super().__init__(path, tensors, metadata)
        self.is_lazy = _UNKNOWN_TO_MLX.isdisjoint(info.dtype for info in tensors.values())
        self._pools: dict[str, dict[str, mx.array]] = {}

    def read(self, key: str) -> mx.array:
        info = self._info(key)
        if not self.is_lazy:
            return super().read(key)
        self.check_unchanged()
        # mx.load opens the file once for all its arrays, so one call serves a whole pass, and a thousand lazy arrays do
        # not need a thousand open files. A returned array leaves the pool; those that stay hold no data.
        # An array is bound to the stream that was current when it was loaded, so each of the few streams in use
        # (`prefetch`) has its own pool; as text, because equal streams have different hashes.
        streams = f"{mx.default_stream(mx.default_device())} {mx.default_stream(mx.cpu)}"
        array = self._pools.get(streams, {}).pop(key, None)
        if array is None:
            arrays = self._load()
            array = arrays.pop(key)
            while len(self._pools) >= _MOST_POOLS and streams not in self._pools:
                self._pools.pop(next(iter(self._pools)), None)
            self._pools[streams] = arrays
        if tuple(array.shape) != info.shape:
            raise WeightsError(f"{self.path}: {key} has changed shape since it was opened; open it again")
        return array

    def read_now(self, key: str) -> mx.array:
        return super().read(key) if self._info(key).nbytes > PIECE else self.read(key)

    def _load(self) -> dict[str, mx.array]:
        try:
            arrays = cast(dict[str, mx.array], mx.load(str(self.path), format="safetensors"))
        except (RuntimeError, ValueError) as error:
            raise WeightsError(f"{self.path}: MLX cannot read it ({error})") from None
        if arrays.keys() != self.tensors.keys():
            raise WeightsError(f"{self.path}: changed since it was opened; open it again")
        return arrays

    def _start(self, key: str) -> int:
        return self._starts[key]


def load_arrays(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """MLX's lazy arrays of a file, and its metadata.

    Raises:
        WeightsError: the header is damaged.
        RuntimeError, ValueError: as MLX raises them.
    """
    _read_header(path)
    loaded = mx.load(str(path), format="safetensors", return_metadata=True)
    return cast(tuple[dict[str, mx.array], dict[str, str]], loaded)


def save_arrays(path: Path, arrays: Mapping[str, mx.array], metadata: dict[str, str]) -> None:
    """Write contiguous arrays out of the memory that holds them; the library sorts them by dtype, then by name.

    Raises:
        OSError: the file cannot be written.
    """
    with mx.stream(mx.cpu):
        data = {key: np.array(array.flatten().view(mx.uint8), copy=False) for key, array in arrays.items()}
    specs = {
        key: TensorSpec(
            dtype=str(array.dtype).rpartition(".")[2], shape=array.shape, data_ptr=data[key].ctypes.data,
            data_len=data[key].nbytes,
        )
        for key, array in arrays.items()
    }  # fmt: skip
    path.touch()
    mode = path.stat().st_mode
    try:
        serialize_file(specs, path, metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from None
    path.chmod(mode)  # the library makes another file, for its owner alone, and gives it the name
    with path.open("r+b") as file:  # it writes metadata in an order drawn anew; equal weights are to be equal files
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        file.seek(8)
        file.write(text)


def _read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str], dict[str, int]]:
    """The tensors, metadata and each tensor's position, every number checked."""
    size = os.stat(path).st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length < 2 or 8 + length > size:
            raise WeightsError(
                f"{path}: cut short: its header needs {8 + length:,} bytes, {size:,} present; download it again"
            )
        header = read_object(path, file.read(length), "header")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise WeightsError(f"{path}: damaged header (__metadata__ is not a dict of text)")
    entries = {key: _parse_entry(path, key, entry) for key, entry in header.items()}
    at = 0
    for begin, end, key in sorted((begin, end, key) for key, (_, begin, end) in entries.items()):
        if begin != at:
            fault = "overlaps the tensor before it" if begin < at else "leaves a gap before it"
            raise WeightsError(
                f"{path}: damaged header ({key[:200]!r} {fault}: it begins at {begin:,}, expected {at:,})"
            )
        at = end
    present = size - 8 - length
    if present != at:
        fault = "cut short" if present < at else "too long"
        raise WeightsError(f"{path}: {fault}: {at:,} bytes of data expected, {present:,} present; download it again")
    tensors = {key: info for key, (info, *_) in entries.items()}
    return tensors, metadata, {key: 8 + length + begin for key, (_, begin, _) in entries.items()}


def _parse_entry(path: Path, key: str, entry: Any) -> tuple[TensorInfo, int, int]:
    """A tensor, and where its data begin and end."""
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise WeightsError(f"{path}: {key[:200]!r} has dtype {str(dtype)[:40]!r}; known are {', '.join(ITEMSIZE)}")
    if not _is_counts(shape) or len(shape) > MAX_NDIM or any(n > MAX_DIM for n in shape):
        raise WeightsError(f"{path}: {key[:200]!r} has shape {reprlib.repr(shape)}; expected sizes below 2**31")
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise WeightsError(f"{path}: {key[:200]!r} has data_offsets {reprlib.repr(offsets)}; expected [begin, end]")
    info, size = TensorInfo(tuple(shape), dtype), offsets[1] - offsets[0]
    if size != info.nbytes:
        raise WeightsError(f"{path}: {key[:200]!r} is {size:,} bytes; {dtype} of shape {shape} needs {info.nbytes:,}")
    return info, offsets[0], offsets[1]


def _is_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def read_object(path: Path, data: bytes, what: str) -> dict[str, Any]:
    """A JSON object, ``what`` of a file."""
    if data.count(b",") + data.count(b":") > _MOST_VALUES:  # each costs far more memory and time than its bytes
        raise WeightsError(
            f"{path}: its {what} holds more than any model's: at most {_MOST_VALUES:,} values are allowed"
        )
    try:
        value = parse_json(data.decode("utf-8"))
    except ValueError as error:
        raise WeightsError(f"{path}: damaged {what} ({str(error)[:120]}); download it again") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{path}: damaged {what} (a {type(value).__name__}, expected an object); download it again")
    return value
