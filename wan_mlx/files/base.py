"""The base class of weight files: headers list their tensors, and each tensor is read on demand."""

from __future__ import annotations

import io
import math
import os
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import mlx.core as mx
import numpy as np

from .. import mac
from ..errors import WeightsError, nearest
from .parallel_read import read_tensor

MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit, here an index's and a GGUF's too
# Far above any published model: tensors in a file, letters of a name, axes, and size of one axis.
MAX_ENTRIES, MAX_NAME, MAX_NDIM, MAX_DIM = 100_000, 1024, 16, 2**31 - 1

# By safetensors' names of the dtypes: numpy's for the raw values, and bytes of a value.
_NUMPY = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16},
    **{"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8},
    **{"U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8},
    **{"BOOL": np.uint8, "F8_E4M3": np.uint8, "F8_E5M2": np.uint8, "F8_E8M0": np.uint8},
}
ITEMSIZE = {name: np.dtype(dtype).itemsize for name, dtype in _NUMPY.items()}
FP8 = ("F8_E4M3", "F8_E5M2")
# Dtypes that `_to_mlx` converts, so they cannot be read into MLX's memory directly.
_CHANGED = {"F64", "BOOL"}
# Dtypes whose bytes `WeightsFile.read` returns unchanged, and MLX's names of them.
AS_STORED = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "U8": mx.uint8, "U32": mx.uint32}
# GGUF's block formats: values and bytes of a block.
BLOCKS = {
    **{"Q8_0": (32, 34), "Q5_1": (32, 24), "Q5_0": (32, 22), "Q4_1": (32, 20), "Q4_0": (32, 18), "IQ4_NL": (32, 18)},
    **{"Q6_K": (256, 210), "Q5_K": (256, 176), "Q4_K": (256, 144), "IQ4_XS": (256, 136), "Q3_K": (256, 110)},
    **{"Q2_K": (256, 84)},
}
# Formats whose numbers are one tensor and the scales of their groups another (`scaled`): values and bytes of a group.
MICROSCALED = {"mxfp8": (32, 33), "nvfp4": (16, 9)}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a header; ``dtype`` is safetensors' name for it (F32, F8_E4M3 …), ggml's (Q4_K …), mxfp8 or nvfp4."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        values, size = BLOCKS.get(self.dtype) or MICROSCALED.get(self.dtype) or (1, ITEMSIZE[self.dtype])
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

    A format is a subclass: it reads the header, and gives the start of each tensor's bytes. Features of one format
    (blocks, fields) have a default here, so that callers need not know the format of a file.

    Attributes:
        path: the file that was opened.
        metadata: safetensors' ``__metadata__``, else empty; of shards, the entries on which all agree.
        tensors: name → shape and dtype of every tensor, from headers only.
        fields: a GGUF's metadata, else empty: numbers and text as they are, lists as arguments of `values`.
        scales: of fp8, int8 and nvfp4 with scales, key → the scale, for all or each row, that `read` multiplies by.
        is_lazy: whether arrays from `read` are read when they are evaluated.
    """

    fields: Mapping[str, Any] = {}
    scales: Mapping[str, np.ndarray] = {}
    is_lazy = False
    _past_cache = False

    def __init__(self, path: Path, tensors: dict[str, TensorInfo], metadata: dict[str, str] | None = None):
        check_names(path, tensors)
        self.path = path
        self.tensors = tensors
        self.metadata = metadata or {}
        self._stamp = stamp(path)

    def read(self, key: str) -> mx.array:
        """The tensor in torch's shape and its own dtype: lazy from safetensors, read immediately from a .pth.

        F64 is returned as float32 (Metal has no float64), the F8 dtypes as raw uint8. A safetensors file with an F64 or
        F8_E5M2 tensor is read immediately too, since MLX refuses it.

        Raises:
            WeightsError: no such tensor, or the file is damaged or has changed since it was opened.
        """
        info = self._info(key)
        if info.nbytes and info.dtype not in _CHANGED and self._is_plain(key):
            return self._read_direct(key, info)
        return _to_mlx(self._values(key), info.dtype)

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
        info, (row_stride, stride) = self.tensors[key], self._strides(key)
        if stride != 1:
            return _to_mlx(self._values(key)[indices], info.dtype)
        wanted, inverse = np.unique(indices, return_inverse=True)
        size = ITEMSIZE[info.dtype]
        values = self._row_bytes(key, wanted, row_stride * size, info.shape[1] * size)
        return _to_mlx(values.view(_NUMPY[info.dtype])[inverse], info.dtype)

    def has_rows_of_blocks(self, key: str) -> bool:
        """Whether `raw` or `packed` can return the tensor: 2-D, in blocks, and each row made of whole blocks."""
        return False

    def raw(self, key: str) -> np.ndarray:
        """The blocks as stored: uint8 (rows, bytes of a row) of a 2-D tensor whose ``dtype`` is in `BLOCKS`.

        Raises:
            WeightsError: no such tensor, or its rows are not whole blocks.
        """
        raise WeightsError(f"{self.path}: {key} ({self._info(key).dtype}) is not made of rows of blocks")

    def packed(self, key: str, now: bool = False) -> dict[str, mx.array]:
        """MLX's arrays of a tensor stored in MLX's form, read as by `read`, or, with ``now``, by `read_now`.

        Raises:
            WeightsError: no such tensor, or of another form.
        """
        raise WeightsError(f"{self.path}: {key} ({self._info(key).dtype}) is not stored in MLX's form")

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
        if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
            raise ValueError(f"indices of shape {indices.shape} and dtype {indices.dtype}; expected 1-D integers")
        if indices.size and not (0 <= indices.min() and indices.max() < shape[0]):
            raise ValueError(f"row indices {indices.min()} to {indices.max()}; {key} has {shape[0]} rows, from 0")
        return indices

    def byte_range(self, key: str) -> ByteRange | None:
        """The place of the tensor's bytes, if `read` returns them unchanged."""
        info = self._info(key)
        plain = info.dtype in AS_STORED and self._is_plain(key)
        return ByteRange(self, self._start(key), info.nbytes, AS_STORED[info.dtype], info.shape) if plain else None

    def nbytes(self, key: str) -> int:
        """As stored."""
        return self._info(key).nbytes

    def _strides(self, key: str) -> tuple[int, ...]:
        """In elements."""
        return contiguous(self.tensors[key].shape)

    def _start(self, key: str) -> int:
        """Position of the tensor's first byte in the file."""
        raise NotImplementedError

    def _is_plain(self, key: str) -> bool:
        """Whether the tensor's bytes are stored in order and unchanged in ``path`` from `_start` on."""
        return self._strides(key) == contiguous(self.tensors[key].shape)

    def _values(self, key: str) -> np.ndarray:
        """The whole tensor, a view of the values that it spans."""
        shape, strides = self.tensors[key].shape, self._strides(key)
        span = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if math.prod(shape) else 0
        values = np.empty(span, _NUMPY[self.tensors[key].dtype])
        if span:
            with self._opened(key) as file:
                self.fill(values, file, self._start(key))
        return np.lib.stride_tricks.as_strided(values, shape, [stride * values.itemsize for stride in strides])

    def _row_bytes(self, key: str, rows: np.ndarray, stride: int, width: int) -> np.ndarray:
        """uint8 (len(rows), width): row ``i`` is ``width`` bytes, and ``i * stride`` bytes behind the first."""
        values = np.empty((len(rows), width), np.uint8)
        if values.size:
            with self._opened(key) as file:
                for target, row in zip(values, rows.tolist(), strict=True):
                    self.fill(target, file, self._start(key) + row * stride)
        return values

    def _read_direct(self, key: str, info: TensorInfo) -> mx.array:
        """A whole contiguous, plain tensor."""
        self.check_unchanged()
        dtype = "U8" if info.dtype.startswith("F8") else info.dtype
        try:
            array = read_tensor(self._open_unbuffered, self._start(key), dtype, info.shape, info.nbytes)
        except EOFError as error:
            raise WeightsError(f"{self.path}: ends {error.args[0]:,} bytes early; download it again") from None
        except OSError as error:
            raise WeightsError(f"{self.path}: {key} cannot be read ({error.strerror or error})") from None
        self.check_unchanged()  # every thread opened the file anew
        return array

    def _open(self, key: str) -> BinaryIO:
        """The file that `_start` is a position in, seekable."""
        return self._open_unbuffered()

    def _open_unbuffered(self) -> BinaryIO:
        file = open(self.path, "rb", buffering=0)
        if self._past_cache:
            mac.keep_out_of_cache(file)
        return file

    def read_past_cache(self) -> None:
        """From now on read without filling the system's cache, on macOS; so immediately, since MLX's reads fill it."""
        self._past_cache, self.is_lazy = True, False

    @contextmanager
    def _opened(self, key: str) -> Iterator[BinaryIO]:
        self.check_unchanged()
        try:
            with self._open(key) as file:
                yield file
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise WeightsError(f"{self.path}: {key} cannot be read ({getattr(error, 'strerror', error)})") from None

    def fill(self, values: np.ndarray | memoryview, file: BinaryIO, start: int) -> None:
        """Read as many bytes as ``values`` has; raises WeightsError if the file ends early."""
        file.seek(start)
        rest = memoryview(cast(memoryview, values)).cast("B")
        while rest:
            count = cast(io.RawIOBase, file).readinto(rest)  # unbuffered, or of a zip archive
            if not count:
                raise WeightsError(f"{self.path}: ends {len(rest):,} bytes early; download it again")
            rest = rest[count:]

    def _info(self, key: str) -> TensorInfo:
        if key not in self.tensors:
            raise WeightsError(f"{self.path}: no tensor {key!r}{nearest(key, self.tensors, 3)}")
        return self.tensors[key]

    def check_unchanged(self) -> None:
        """Raise WeightsError if the file has changed since it was opened."""
        if stamp(self.path) != self._stamp:
            raise WeightsError(f"{self.path}: changed since it was opened; open it again")


class JoinedFile(WeightsFile):
    """Tensors of one or several other files: the shards of an index, one network of several, a network with a module.

    Args:
        owners: name → the file that has the tensor.
    """

    def __init__(self, path: Path, owners: Mapping[str, WeightsFile]):
        files = list(dict.fromkeys(owners.values()))
        agreed = {k: v for k, v in files[0].metadata.items() if all(file.metadata.get(k) == v for file in files)}
        super().__init__(path, {key: file.tensors[key] for key, file in owners.items()}, agreed)
        self.is_lazy = any(file.is_lazy for file in files)
        self.scales = {key: scale for file in files for key, scale in file.scales.items()}
        self._owners = owners

    def _owner(self, key: str) -> WeightsFile:
        self._info(key)
        return self._owners[key]

    def read_past_cache(self) -> None:
        self.is_lazy = False
        for file in set(self._owners.values()):
            file.read_past_cache()

    def read(self, key: str) -> mx.array:
        return self._owner(key).read(key)

    def read_now(self, key: str) -> mx.array:
        return self._owner(key).read_now(key)

    def rows(self, key: str, indices: np.ndarray) -> mx.array:
        return self._owner(key).rows(key, indices)

    def has_rows_of_blocks(self, key: str) -> bool:
        return self._owner(key).has_rows_of_blocks(key)

    def raw(self, key: str) -> np.ndarray:
        return self._owner(key).raw(key)

    def packed(self, key: str, now: bool = False) -> dict[str, mx.array]:
        return self._owner(key).packed(key, now)

    def byte_range(self, key: str) -> ByteRange | None:
        return self._owner(key).byte_range(key)


def check_names(path: Path, names: Collection[str]) -> None:
    """Raise WeightsError if these are no names of a model's tensors."""
    if len(names) > MAX_ENTRIES:
        raise WeightsError(f"{path}: claims {len(names):,} tensors; at most {MAX_ENTRIES:,} are allowed")
    # Error messages contain names, and must be one line.
    odd = next((name for name in names if len(name) > MAX_NAME or not name.isprintable()), None)
    if odd is not None:
        raise WeightsError(f"{path}: damaged header (a tensor named {odd[:80]!r})")


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _to_mlx(values: np.ndarray, dtype: str) -> mx.array:
    if dtype == "BOOL":
        values = values != 0
    elif dtype == "F64":
        with np.errstate(over="ignore"):
            values = values.astype(np.float32)
    array = mx.array(np.asarray(values, order="C"))
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
