"""GGUF files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): header, rows and blocks, read on demand.

The header is parsed here, and every count and offset is checked against the file before anything is allocated: the
``gguf`` package's own reader trusts them, and keeps an object for each of a tokenizer's 256,000 words. The package
converts blocks to numbers, and is only needed for files with blocks.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from ..errors import WeightsError, install_command
from .base import BLOCKS, MAX_DIM, MAX_ENTRIES, MAX_HEADER_BYTES, MAX_NAME, MAX_NDIM, TensorInfo, WeightsFile

# ggml's type numbers; types in neither BLOCKS nor PLAIN are refused by name.
TYPES = {
    **{0: "F32", 1: "F16", 30: "BF16", 28: "F64", 24: "I8", 25: "I16", 26: "I32", 27: "I64"},
    **{2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1"},
    **{10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 20: "IQ4_NL", 23: "IQ4_XS"},
    **{16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S", 29: "IQ1_M"},
    **{34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4"},
}
PLAIN = ("F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64")

# Types of metadata values: GGUF's number → struct's letter.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DEFAULT_ALIGNMENT, _MAX_ALIGNMENT = 32, 2**16
_MAX_STRINGS = 2_000_000  # in all lists; umT5's tokenizer has 256,384
_ROWS = 512  # of a tensor, converted at a time by one thread
# ComfyUI's converter reshapes tensors that no block divides, and stores the true shape under this name.
_TRUE_SHAPE = "comfy.gguf.orig_shape."


@dataclass(frozen=True)
class Array:
    """A list in the metadata, not read yet: type and number of its values, and their position in the file."""

    kind: int
    count: int
    position: int


@dataclass(frozen=True)
class _Stored:
    """A tensor as stored: its ggml type and shape, in torch's order, and its place behind the header."""

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return TensorInfo(self.shape, self.dtype).nbytes


class GGUFFile(WeightsFile):
    """One .gguf; every `read` reads a tensor and converts its blocks to numbers.

    Attributes:
        fields: the metadata: numbers and text as they are, lists as `Array`.
    """

    def __init__(self, path: Path):
        try:
            with open(path, "rb", buffering=2**20) as file:
                self.fields, tensors, self._stored, self._data = _Header(path, file).read()
        except OSError as error:
            raise WeightsError(f"{path}: cannot be read ({error.strerror or error})") from None
        super().__init__(path, tensors)
        blocks = sorted({info.dtype for info in tensors.values()}.intersection(BLOCKS))
        if blocks and find_spec("gguf") is None:
            raise WeightsError(f"{path}: {blocks[0]} blocks need the gguf package: {install_command('gguf')}")

    def values(self, name: str) -> list[Any]:
        array = self.fields.get(name)
        if not isinstance(array, Array):
            return super().values(name)
        self.check_unchanged()
        with open(self.path, "rb", buffering=2**20) as file:
            return _Header(self.path, file, array.position).values(array)

    def read(self, key: str) -> mx.array:
        """Like `WeightsFile.read`; blocks become float32.

        Raises:
            WeightsError: as there, or a block's scale is not finite.
        """
        info = self._info(key)
        if info.dtype not in BLOCKS:
            return super().read(key)
        return mx.array(self._numbers(key, self._blocks(key)).reshape(info.shape))

    def rows(self, key: str, indices: np.ndarray) -> mx.array:
        info = self._info(key)
        if info.dtype not in BLOCKS or len(info.shape) != 2:
            return super().rows(key, indices)
        if self._stored[key].shape != info.shape:  # rows begin within blocks
            return self.read(key)[mx.array(self._check_rows(key, indices))]
        wanted, inverse = np.unique(self._check_rows(key, indices), return_inverse=True)
        return mx.array(self._numbers(key, self._blocks(key, wanted))[inverse])

    def raw(self, key: str) -> np.ndarray:
        return self._blocks(key) if self.has_rows_of_blocks(key) else super().raw(key)

    def has_rows_of_blocks(self, key: str) -> bool:
        info = self._info(key)
        return info.dtype in BLOCKS and len(info.shape) == 2 and self._stored[key].shape == info.shape

    def _blocks(self, key: str, rows: np.ndarray | None = None) -> np.ndarray:
        """uint8 (rows, bytes of a row): all rows as stored, or those in ``rows``."""
        shape, (values, size) = self._stored[key].shape, BLOCKS[self.tensors[key].dtype]
        width = shape[-1] // values * size
        if rows is not None:
            return self._row_bytes(key, rows, width, width)
        count = math.prod(shape[:-1])
        return self._row_bytes(key, np.zeros(1, int), 0, count * width).reshape(count, width)

    def _numbers(self, key: str, blocks: np.ndarray) -> np.ndarray:
        """float32 (rows, width)."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        dtype = self.tensors[key].dtype
        values, size = BLOCKS[dtype]
        numbers = np.empty((len(blocks), blocks.shape[1] // size * values), np.float32)

        def fill(start: int) -> bool:
            rows = slice(start, start + _ROWS)
            with np.errstate(over="ignore", invalid="ignore"):
                numbers[rows] = dequantize(blocks[rows], GGMLQuantizationType[dtype])
            return bool(np.isfinite(numbers[rows]).all())

        with ThreadPoolExecutor(os.cpu_count()) as threads:  # numpy releases the interpreter lock while it computes
            finite = all(threads.map(fill, range(0, len(blocks), _ROWS)))
        if not finite:
            raise WeightsError(f"{self.path}: {key} holds a block whose scale is not finite; download it again")
        return numbers

    def _start(self, key: str) -> int:
        return self._data + self._stored[key].offset


class _Header:
    """A cursor over a GGUF header that never passes the file's end or the maximum header size."""

    def __init__(self, path: Path, file: BinaryIO, position: int = 0):
        self.path, self.file, self.position, self.texts = path, file, position, 0
        self.size = os.fstat(file.fileno()).st_size
        file.seek(position)

    def read(self) -> tuple[dict[str, Any], dict[str, TensorInfo], dict[str, _Stored], int]:
        """Metadata, each tensor as it is meant and as it is stored, and the start of the data."""
        self._check_magic()
        tensor_count, field_count = self._number("Q"), self._number("Q")
        fields = self._table("metadata field", field_count, lambda name: self._value(self._number("I"), name))
        if fields.get("split.count", 1) not in (0, 1):
            raise WeightsError(f"{self.path}: one of {fields['split.count']} parts; join them with gguf-split --merge")
        stored = self._table("tensor", tensor_count, self._tensor)
        data = self._data_start(fields, stored)
        tensors = {n: TensorInfo(self._true_shape(fields, n, entry.shape), entry.dtype) for n, entry in stored.items()}
        return fields, tensors, stored, data

    def _table(self, what: str, count: int, read: Callable[[str], Any]) -> dict[str, Any]:
        """Name → ``read(name)``, ``count`` times."""
        if count > MAX_ENTRIES:
            raise WeightsError(f"{self.path}: claims {count:,} {what}s; at most {MAX_ENTRIES:,} are allowed")
        found: dict[str, Any] = {}
        for _ in range(count):
            name = self._string()
            if not 0 < len(name) <= MAX_NAME or not name.isprintable() or name in found:
                fault = "occurs twice" if name in found else f"has no plain name of at most {MAX_NAME} letters"
                raise WeightsError(f"{self.path}: damaged header (the {what} {name[:40]!r} {fault})")
            found[name] = read(name)
        return found

    def values(self, array: Array) -> list[Any]:
        """The values of a list; the cursor must stand at the first."""
        if array.kind == _STRING:
            return [self._string() for _ in range(array.count)]
        letter = _SCALARS[array.kind]
        return list(struct.unpack(f"<{array.count}{letter}", self._take(array.count * struct.calcsize(letter))))

    def _check_magic(self) -> None:
        magic, version = self._take(4), self._number("I")
        if magic != b"GGUF":
            raise WeightsError(f"{self.path}: not a GGUF file (it begins with {magic.hex(' ')})")
        if version not in (2, 3):
            other = int.from_bytes(version.to_bytes(4, "little"), "big")
            what = "written on a big-endian machine" if other in (2, 3) else f"version {version}"
            raise WeightsError(f"{self.path}: a GGUF file {what}; expected little-endian version 2 or 3")

    def _take(self, count: int) -> bytes:
        self._check(count)
        data = self.file.read(count)
        if len(data) != count:
            raise WeightsError(f"{self.path}: cut short in its header; download it again")
        self.position += count
        return data

    def _check(self, count: int) -> None:
        """Raise unless the file and the header limit allow ``count`` more bytes."""
        if self.position + count > self.size:
            raise WeightsError(
                f"{self.path}: cut short or damaged: its header wants {count:,} bytes at {self.position:,}, the file "
                f"has {self.size:,}; download it again"
            )
        if self.position + count > MAX_HEADER_BYTES:
            raise WeightsError(f"{self.path}: a header of more than {MAX_HEADER_BYTES:,} bytes")

    def _number(self, letter: str) -> Any:
        return struct.unpack(f"<{letter}", self._take(struct.calcsize(f"<{letter}")))[0]

    def _string(self) -> str:
        data = self._take(self._number("Q"))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise WeightsError(f"{self.path}: damaged header (text that is not UTF-8)") from None

    def _value(self, kind: int, name: str) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise WeightsError(f"{self.path}: damaged header ({name[:80]!r} is of the unknown type {kind})")
        inner, count = self._number("I"), self._number("Q")
        if inner not in _SCALARS and inner != _STRING:
            raise WeightsError(f"{self.path}: {name[:80]!r} is a list of type {inner}; expected numbers or text")
        array = Array(inner, count, self.position)
        if inner == _STRING:
            self._check(8 * count)
            self.texts += count
            if self.texts > _MAX_STRINGS:
                raise WeightsError(f"{self.path}: its lists claim {self.texts:,} texts; at most {_MAX_STRINGS:,}")
            for _ in range(count):
                self._take(self._number("Q"))
        else:
            size = count * struct.calcsize(_SCALARS[inner])
            self._check(size)
            self.file.seek(size, os.SEEK_CUR)
            self.position += size
        return array

    def _tensor(self, name: str) -> _Stored:
        ndim = self._number("I")
        if ndim > MAX_NDIM:
            raise WeightsError(f"{self.path}: {name!r} has {ndim} dimensions; at most {MAX_NDIM} are allowed")
        shape = tuple(reversed([self._number("Q") for _ in range(ndim)]))
        if any(n > MAX_DIM for n in shape):
            raise WeightsError(f"{self.path}: {name!r} has shape {str(shape)[:80]}; expected sizes below 2**31")
        number, offset = self._number("I"), self._number("Q")
        dtype = TYPES.get(number, f"number {number}")
        if dtype not in PLAIN and dtype not in BLOCKS:
            known = ", ".join([*PLAIN[:3], *BLOCKS])
            raise WeightsError(f"{self.path}: {name!r} is of the GGUF type {dtype}, not supported; supported: {known}")
        values = BLOCKS[dtype][0] if dtype in BLOCKS else 1
        if (shape[-1] if shape else 1) % values:
            raise WeightsError(f"{self.path}: {name!r} has rows of {shape[-1:]} values; {dtype} needs whole {values}s")
        return _Stored(dtype, shape, offset)

    def _data_start(self, fields: dict[str, Any], stored: dict[str, _Stored]) -> int:
        """Start of the data, whose tensors must follow each other, each padded to the alignment."""
        alignment = fields.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
            raise WeightsError(f"{self.path}: damaged header (general.alignment {alignment}, expected a power of two)")

        def aligned(position: int) -> int:
            return -(-position // alignment) * alignment

        at = 0
        for name, entry in sorted(stored.items(), key=lambda item: item[1].offset):
            if entry.nbytes and entry.offset != aligned(at):
                fault = "overlaps the tensor before it" if entry.offset < at else "does not follow the tensor before it"
                raise WeightsError(
                    f"{self.path}: damaged header ({name!r} {fault}: it begins at {entry.offset:,}, "
                    f"expected {aligned(at):,})"
                )
            at = entry.offset + entry.nbytes if entry.nbytes else at
        data = aligned(self.position)
        if data + at > self.size:
            raise WeightsError(
                f"{self.path}: cut short: {data + at:,} bytes expected, {self.size:,} present; download it again"
            )
        return data

    def _true_shape(self, fields: dict[str, Any], name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        array = fields.get(_TRUE_SHAPE + name)
        if array is None:
            return shape
        if not isinstance(array, Array) or array.kind not in (4, 5, 10, 11) or array.count > MAX_NDIM:
            raise WeightsError(f"{self.path}: {_TRUE_SHAPE + name!r} is no list of sizes")
        self.position = self.file.seek(array.position)
        true = tuple(self.values(array))
        if any(n < 0 for n in true) or math.prod(true) != math.prod(shape):
            raise WeightsError(f"{self.path}: {name!r} has shape {shape}, which {_TRUE_SHAPE + name!r} makes {true}")
        return true
