"""The base class of weight files: headers list their tensors, and each tensor is read on demand."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import mlx.core as mx
import numpy as np

from ..errors import WeightsError, closest
from .parallel_read import read_tensor

MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit, here an index's and a GGUF's too
# Far above any published model: tensors in a file, letters of a name, axes, and size of one axis.
MAX_ENTRIES, MAX_NAME, MAX_NDIM, MAX_DIM = 100_000, 1024, 16, 2**31 - 1

# Bytes of a value, by safetensors' names of the dtypes.
ITEMSIZE = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}

# numpy's dtype for the raw values; MLX's for the result of `read` where the two differ.
_NUMPY = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16},
    **{"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8},
    **{"U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8},
    **{"BOOL": np.uint8, "F8_E4M3": np.uint8, "F8_E5M2": np.uint8},
}
# Dtypes that `_to_mlx` converts, so they cannot be read into MLX's memory directly.
_CHANGED = {"F64", "BOOL"}
# Dtypes whose bytes `WeightsFile.read` returns unchanged, and MLX's names of them.
_AS_STORED = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "U8": mx.uint8, "U32": mx.uint32}
# GGUF's block formats: values and bytes of a block.
BLOCKS = {
    **{"Q8_0": (32, 34), "Q5_1": (32, 24), "Q5_0": (32, 22), "Q4_1": (32, 20), "Q4_0": (32, 18), "IQ4_NL": (32, 18)},
    **{"Q6_K": (256, 210), "Q5_K": (256, 176), "Q4_K": (256, 144), "IQ4_XS": (256, 136), "Q3_K": (256, 110)},
    **{"Q2_K": (256, 84)},
}
# Largest number of values read in one piece when a row is not contiguous.
_PIECE = 2**20


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a header; ``dtype`` is safetensors' name for it (F32, F8_E4M3 …) or ggml's (Q4_K …)."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        values, size = BLOCKS.get(self.dtype) or (1, ITEMSIZE[self.dtype])
        return math.prod(self.shape) // values * size


@dataclass(frozen=True)
class ByteRange:
    """The place of a tensor's bytes in a file, where they are stored exactly as in its array."""

    file: WeightsFile
    start: int
    nbytes: int
    dtype: mx.Dtype
    shape: tuple[int, ...]


class WeightsFile:
    """A source of named tensors. Nothing is cached: an array lives as long as the caller keeps it.

    A format is a subclass: it checks whether a file `begins` like its own, reads the header, and gives the start of
    each tensor's bytes. Features of one format (blocks, fields) have a default here, so that callers need not know the
    format of a file.

    Attributes:
        path: the file that was opened.
        metadata: safetensors' ``__metadata__``, else empty; of shards, the entries on which all agree.
        tensors: name → shape and dtype of every tensor, from headers only.
        fields: a GGUF's metadata, else empty: numbers and text as they are, lists as arguments of `values`.
        scales: for scaled fp8, key → the scale that `read` multiplies by; else empty.
    """

    fields: Mapping[str, Any] = {}
    scales: Mapping[str, np.ndarray] = {}

    def __init__(self, path: Path, tensors: dict[str, TensorInfo], metadata: dict[str, str] | None = None):
        self.path = path
        odd = next((key for key in tensors if not key.isprintable()), None)
        if odd is not None:  # error messages contain keys, and must be one line
            raise WeightsError(f"{path}: damaged header (a tensor named {odd[:80]!r})")
        self.tensors = tensors
        self.metadata = metadata or {}
        self._stamp = stamp(path)

    @classmethod
    def begins(cls, head: bytes) -> bool:
        """Whether a file with these first bytes (16 or more) has this format."""
        raise NotImplementedError

    def read(self, key: str) -> mx.array:
        """The tensor in torch's shape and its own dtype: lazy from safetensors, read immediately from a .pth.

        F64 is returned as float32 (Metal has no float64), F8_E4M3 and F8_E5M2 as raw uint8. A safetensors file with an
        F64 or F8_E5M2 tensor is read immediately too, since MLX refuses it.

        Raises:
            WeightsError: no such tensor, or the file is damaged or has changed since it was opened.
        """
        info = self._info(key)
        strides = self._strides(key)
        if info.nbytes and info.dtype not in _CHANGED and strides == contiguous(info.shape) and self._is_plain(key):
            return self._read_direct(key, info)
        span = 1 + sum((n - 1) * stride for n, stride in zip(info.shape, strides, strict=True))
        values = np.empty(span if info.nbytes else 0, _NUMPY[info.dtype])
        if info.nbytes:
            with self._opened(key) as (file, start):
                self.fill(values, file, start)
        if values.size == math.prod(info.shape) and strides == contiguous(info.shape):
            return _to_mlx(values.reshape(info.shape), info.dtype)
        steps = [stride * values.itemsize for stride in strides]
        return _to_mlx(np.lib.stride_tricks.as_strided(values, info.shape, steps).copy(), info.dtype)

    def read_now(self, key: str) -> mx.array:
        """Like `read`, but large tensors are read immediately from every kind of file, with several threads."""
        return self.read(key)

    def rows(self, key: str, indices: np.ndarray) -> mx.array:
        """``tensor[indices]`` of a 2-D tensor, (len(indices), width) in the dtype of `read`; reads only those rows.

        Raises:
            ValueError: ``indices`` are not a list of row numbers.
            WeightsError: as `read`, or the tensor is not 2-D.
        """
        indices = self._check_rows(key, indices)
        info = self.tensors[key]
        wanted, inverse = np.unique(indices, return_inverse=True)
        values = np.empty((len(wanted), info.shape[1]), _NUMPY[info.dtype])
        row_stride, stride = self._strides(key)
        if values.size:
            with self._opened(key) as (file, start):
                for target, row in zip(values, wanted.tolist(), strict=True):
                    self._fill_row(target, file, start + row * row_stride * values.itemsize, stride)
        return _to_mlx(values[inverse], info.dtype)

    def has_rows_of_blocks(self, key: str) -> bool:
        """Whether `raw` can return the tensor: 2-D, in GGUF's blocks, and each row made of whole blocks."""
        return False

    def raw(self, key: str) -> np.ndarray:
        """The blocks as stored: uint8 (rows, bytes of a row) of a 2-D tensor whose ``dtype`` is in `BLOCKS`.

        Raises:
            WeightsError: no such tensor, or its rows are not whole blocks.
        """
        raise WeightsError(f"{self.path}: {key} ({self._info(key).dtype}) is not made of rows of blocks")

    def values(self, name: str) -> list[Any]:
        """A list from `fields`.

        Raises:
            WeightsError: there is none of that name, or it is not a list.
        """
        raise WeightsError(f"{self.path}: its metadata has no list {name}")

    def _check_rows(self, key: str, indices: np.ndarray) -> np.ndarray:
        shape = self._info(key).shape
        if len(shape) != 2:
            raise WeightsError(f"{self.path}: rows of {key} were asked for, but its shape is {shape}, not 2-D")
        indices = np.asarray(indices)
        height = shape[0]
        if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
            raise ValueError(f"indices of shape {indices.shape} and dtype {indices.dtype}; expected 1-D integers")
        if indices.size and not (0 <= indices.min() and indices.max() < height):
            raise ValueError(
                f"row indices {indices.min()} to {indices.max()}; {key} has rows 0 to {height - 1}"
                if height
                else f"row indices {indices.min()} to {indices.max()}; {key} has no rows"
            )
        return indices

    @property
    def is_lazy(self) -> bool:
        """Whether arrays from `read` are read when they are evaluated."""
        return False

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors, this one or its shards."""
        return [self.path]

    def byte_range(self, key: str) -> ByteRange | None:
        """The place of the tensor's bytes, if `read` returns them unchanged."""
        info = self._info(key)
        plain = info.dtype in _AS_STORED and self._strides(key) == contiguous(info.shape) and self._is_plain(key)
        return ByteRange(self, self._start(key), info.nbytes, _AS_STORED[info.dtype], info.shape) if plain else None

    def nbytes(self, key: str) -> int:
        """Bytes of the tensor as stored."""
        return self._info(key).nbytes

    def _strides(self, key: str) -> tuple[int, ...]:
        """In elements."""
        return contiguous(self.tensors[key].shape)

    def _start(self, key: str) -> int:
        """Position of the tensor's first byte in the file."""
        raise NotImplementedError

    def _is_plain(self, key: str) -> bool:
        """Whether the tensor's bytes are stored unchanged in ``path`` from `_start` on."""
        return True

    def _read_direct(self, key: str, info: TensorInfo) -> mx.array:
        """A whole contiguous, plain tensor."""
        self.check_unchanged()
        dtype = "U8" if info.dtype in ("F8_E4M3", "F8_E5M2") else info.dtype
        try:
            array = read_tensor(
                lambda: open(self.path, "rb", buffering=0), self._start(key), dtype, info.shape, info.nbytes
            )
        except EOFError as error:
            raise WeightsError(f"{self.path}: ends {error.args[0]:,} bytes early; download it again") from None
        except OSError as error:
            raise WeightsError(f"{self.path}: {key} cannot be read ({error.strerror or error})") from None
        self.check_unchanged()  # every thread opened the file anew
        return array

    @contextmanager
    def _open(self, key: str) -> Iterator[tuple[BinaryIO, int]]:
        """A seekable file, and the position of the tensor's first element in it."""
        with open(self.path, "rb", buffering=0) as file:
            yield file, self._start(key)

    @contextmanager
    def _opened(self, key: str) -> Iterator[tuple[BinaryIO, int]]:
        self.check_unchanged()
        try:
            with self._open(key) as place:
                yield place
        except OSError as error:
            raise WeightsError(f"{self.path}: {key} cannot be read ({error.strerror or error})") from None

    def fill(self, values: np.ndarray | memoryview, file: BinaryIO, start: int) -> None:
        """Read as many bytes as ``values`` has; raises WeightsError if the file ends early."""
        file.seek(start)
        rest = memoryview(cast(memoryview, values)).cast("B")
        while rest:
            count = cast(io.RawIOBase, file).readinto(rest)  # unbuffered, or of a zip archive
            if not count:
                raise WeightsError(f"{self.path}: ends {len(rest):,} bytes early; download it again")
            rest = rest[count:]

    def _fill_row(self, target: np.ndarray, file: BinaryIO, start: int, stride: int) -> None:
        if stride == 1:
            return self.fill(target, file, start)
        width = max(1, _PIECE // max(1, stride))
        for at in range(0, len(target), width):
            part = target[at : at + width]
            piece = np.empty((len(part) - 1) * stride + 1, target.dtype)
            self.fill(piece, file, start + at * stride * target.itemsize)
            part[:] = piece[:: stride or 1]

    def _info(self, key: str) -> TensorInfo:
        if key not in self.tensors:
            raise WeightsError(f"{self.path}: no tensor {key!r}; nearest are {closest(key, self.tensors, 3)}")
        return self.tensors[key]

    def check_unchanged(self) -> None:
        """Raise WeightsError if the file has changed since it was opened."""
        if stamp(self.path) != self._stamp:
            raise WeightsError(f"{self.path}: changed since it was opened; open it again")


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _to_mlx(values: np.ndarray, dtype: str) -> mx.array:
    if dtype == "BOOL":
        values = values != 0
    elif dtype == "F64":
        with np.errstate(over="ignore"):
            values = values.astype(np.float32)
    array = mx.array(values)
    if dtype == "BF16":
        # On the CPU and immediately: GPU work must not stand between a file and its caller.
        array = array.view(mx.bfloat16, stream=mx.cpu)
        mx.eval(array)
    return array


def stamp(path: Path) -> tuple[int, int]:
    """Size and modification time of a file, to notice changes."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read any more ({error.strerror})") from None
    return status.st_size, status.st_mtime_ns
