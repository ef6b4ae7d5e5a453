"""One way to read every kind of weight file: what it holds is known from headers, a tensor is read when asked for.

`open_weights` decides the kind by content: safetensors (https://github.com/huggingface/safetensors, "Format"), an index
JSON over shards, torch's zip format (`pth`) or GGUF (`gguf`). Another kind is another subclass of `WeightsFile` and a
line in `open_weights` and ``_kind``.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from ..types import WeightsError
from .direct import PIECE, read_tensor
from .pth import ITEMSIZE, MAX_DIM, MAX_NDIM, open_storage, read_index

MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit

# numpy's dtype for the raw values; MLX's for what `read` returns where the two differ.
_NUMPY = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16},
    **{"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8},
    **{"U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8},
    **{"BOOL": np.uint8, "F8_E4M3": np.uint8, "F8_E5M2": np.uint8},
}
# One such tensor makes mx.load refuse the whole file.
_UNKNOWN_TO_MLX = {"F64", "F8_E5M2"}
# What becomes other values on the way (`_to_mlx`), so cannot be read into MLX's memory.
_CHANGED = {"F64", "BOOL"}
# What `WeightsFile.read` returns such tensors in, with their bytes as they are.
_AS_STORED = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "U8": mx.uint8, "U32": mx.uint32}
# GGUF's block formats: how many values a block has, and how many bytes.
BLOCKS = {
    **{"Q8_0": (32, 34), "Q5_1": (32, 24), "Q5_0": (32, 22), "Q4_1": (32, 20), "Q4_0": (32, 18), "IQ4_NL": (32, 18)},
    **{"Q6_K": (256, 210), "Q5_K": (256, 176), "Q4_K": (256, 144), "IQ4_XS": (256, 136), "Q3_K": (256, 110)},
    **{"Q2_K": (256, 84)},
}
# How many values at most are read in one piece when a row is not contiguous.
_PIECE = 2**20
# For how many streams a safetensors file keeps lazy arrays, and so stays open.
_MOST_POOLS = 8


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of a tensor; ``dtype`` is safetensors' name for it (F32, F8_E4M3 …) or ggml's (Q4_K …)."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        values, size = BLOCKS.get(self.dtype) or (1, ITEMSIZE[self.dtype])
        return math.prod(self.shape) // values * size


@dataclass(frozen=True)
class Spot:
    """Where in a file a tensor's bytes lie, just as its array wants them."""

    file: WeightsFile
    start: int
    nbytes: int
    dtype: mx.Dtype
    shape: tuple[int, ...]


class WeightsFile:
    """A source of named tensors. Nothing is cached: an array lives as long as the caller keeps it.

    Attributes:
        path: the file that was opened.
        metadata: safetensors' ``__metadata__``, else empty; of shards, the entries on which all agree.
        tensors: name → shape and dtype of every tensor, from headers only.
    """

    def __init__(self, path: Path, tensors: dict[str, TensorInfo], metadata: dict[str, str] | None = None):
        self.path = path
        odd = next((key for key in tensors if not key.isprintable()), None)
        if odd is not None:  # every message names keys, on one line
            raise WeightsError(f"{path}: damaged header (a tensor named {odd[:80]!r})")
        self.tensors = tensors
        self.metadata = metadata or {}
        self._stamp = _stamp(path)

    def read(self, key: str) -> mx.array:
        """The tensor in torch's shape and its own dtype: lazy from safetensors, read at once from a .pth.

        F64 comes as float32 (Metal has no float64), F8_E4M3 and F8_E5M2 as their raw uint8. A safetensors file that
        holds an F64 or F8_E5M2 tensor is read at once too, since MLX refuses it.

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
                self._fill(values, file, start)
        if values.size == math.prod(info.shape) and strides == contiguous(info.shape):
            return _to_mlx(values.reshape(info.shape), info.dtype)
        steps = [stride * values.itemsize for stride in strides]
        return _to_mlx(np.lib.stride_tricks.as_strided(values, info.shape, steps).copy(), info.dtype)

    def read_now(self, key: str) -> mx.array:
        """As `read`, but large tensors at once from every kind of file, with several threads."""
        return self.read(key)

    def rows(self, key: str, indices: np.ndarray) -> mx.array:
        """``tensor[indices]`` of a 2-D tensor, (len(indices), width) in the dtype of `read`; only those rows are read.

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
        """Whether `read` gives arrays that are read when they are evaluated."""
        return False

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors, this one or its shards."""
        return [self.path]

    def spot(self, key: str) -> Spot | None:
        """Where the tensor lies, if `read` gives its bytes as they are."""
        info = self._info(key)
        plain = info.dtype in _AS_STORED and self._strides(key) == contiguous(info.shape) and self._is_plain(key)
        return Spot(self, self._start(key), info.nbytes, _AS_STORED[info.dtype], info.shape) if plain else None

    def nbytes(self, key: str) -> int:
        """Bytes of the tensor as stored."""
        return self._info(key).nbytes

    def _strides(self, key: str) -> tuple[int, ...]:
        """In elements."""
        return contiguous(self.tensors[key].shape)

    def _start(self, key: str) -> int:
        """The position in the file of the tensor's first byte."""
        raise NotImplementedError

    def _is_plain(self, key: str) -> bool:
        """Whether the tensor's bytes lie in ``path`` from `_start` as they are."""
        return True

    def _read_direct(self, key: str, info: TensorInfo) -> mx.array:
        """The whole of a contiguous, plain tensor."""
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
        self.check_unchanged()  # every thread opened the file for itself
        return array

    @contextmanager
    def _open(self, key: str) -> Iterator[tuple[BinaryIO, int]]:
        """A seekable file, and the position in it of the tensor's first element."""
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

    def _fill(self, values: np.ndarray, file: BinaryIO, start: int) -> None:
        file.seek(start)
        rest = memoryview(values).cast("B")
        while rest:
            count = file.readinto(rest)
            if not count:
                raise WeightsError(f"{self.path}: ends {len(rest):,} bytes early; download it again")
            rest = rest[count:]

    def _fill_row(self, target: np.ndarray, file: BinaryIO, start: int, stride: int) -> None:
        if stride == 1:
            return self._fill(target, file, start)
        width = max(1, _PIECE // max(1, stride))
        for at in range(0, len(target), width):
            part = target[at : at + width]
            piece = np.empty((len(part) - 1) * stride + 1, target.dtype)
            self._fill(piece, file, start + at * stride * target.itemsize)
            part[:] = piece[:: stride or 1]

    def _info(self, key: str) -> TensorInfo:
        if key not in self.tensors:
            near = difflib.get_close_matches(key, self.tensors, n=3) or list(self.tensors)[:3]
            raise WeightsError(f"{self.path}: no tensor {key!r}; {_nearest(near)}")
        return self.tensors[key]

    def check_unchanged(self) -> None:
        """Raise WeightsError if the file has changed since it was opened."""
        if _stamp(self.path) != self._stamp:
            raise WeightsError(f"{self.path}: changed since it was opened; open it again")


class SafetensorsFile(WeightsFile):
    """One .safetensors file; tensors are handed out as MLX's lazy arrays."""

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
        # mx.load opens the file once for all its arrays, so one call serves a whole pass and a thousand lazy arrays do
        # not need a thousand open files. An array leaves the pool when handed out; those that stay hold no data.
        # An array is bound to the stream that was current when it was loaded, so there is a pool for each of the few
        # that take turns (`ahead`).
        # Equal streams have no equal hash.
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
            arrays = mx.load(str(self.path), format="safetensors")
        except (RuntimeError, ValueError) as error:
            raise WeightsError(f"{self.path}: MLX cannot read it ({error})") from None
        if arrays.keys() != self.tensors.keys():
            raise WeightsError(f"{self.path}: changed since it was opened; open it again")
        return arrays

    def _start(self, key: str) -> int:
        return self._starts[key]


class TorchFile(WeightsFile):
    """One .pth, .pt, .bin or .ckpt in torch's zip format; a tensor is read from the file on every `read`."""

    def __init__(self, path: Path):
        self._views = read_index(path)
        super().__init__(path, {key: TensorInfo(view.shape, view.dtype) for key, view in self._views.items()})

    def _strides(self, key: str) -> tuple[int, ...]:
        return self._views[key].strides

    def _is_plain(self, key: str) -> bool:
        return self._views[key].storage.start is not None

    def _start(self, key: str) -> int:
        view = self._views[key]
        return view.storage.start + view.offset * ITEMSIZE[view.dtype]

    @contextmanager
    def _open(self, key: str) -> Iterator[tuple[BinaryIO, int]]:
        view = self._views[key]
        with open_storage(self.path, view.storage) as (file, start):
            yield file, start + view.offset * ITEMSIZE[view.dtype]


class ShardedFile(WeightsFile):
    """Several files under one index JSON (``{"weight_map": {tensor: file name}}``)."""

    def __init__(self, path: Path):
        owners = _read_weight_map(path)
        names = sorted(set(owners.values()))
        missing = [name for name in names if not (path.parent / name).is_file()]
        if missing:
            raise WeightsError(f"{path}: missing {_some(missing)}; the index needs {len(names)} files beside it")
        indexes = [name for name in names if _kind(path.parent / name, _head(path.parent / name)) == "index"]
        if indexes:
            raise WeightsError(f"{path}: the shard {_some(indexes)} is an index itself")
        shards = {name: open_weights(path.parent / name) for name in names}
        _check_shards(path, owners, shards)
        metadata = [shard.metadata for shard in shards.values()]
        agreed = {k: v for k, v in metadata[0].items() if all(m.get(k) == v for m in metadata)}
        super().__init__(path, {key: shards[name].tensors[key] for key, name in owners.items()}, agreed)
        self._shards = {key: shards[name] for key, name in owners.items()}

    @property
    def files(self) -> list[Path]:
        return sorted({shard.path for shard in self._shards.values()})

    @property
    def is_lazy(self) -> bool:
        return any(shard.is_lazy for shard in self._shards.values())

    def read(self, key: str) -> mx.array:
        self._info(key)
        return self._shards[key].read(key)

    def read_now(self, key: str) -> mx.array:
        self._info(key)
        return self._shards[key].read_now(key)

    def rows(self, key: str, indices: np.ndarray) -> mx.array:
        self._info(key)
        return self._shards[key].rows(key, indices)

    def spot(self, key: str) -> Spot | None:
        self._info(key)
        return self._shards[key].spot(key)


def open_weights(path: str | Path) -> WeightsFile:
    """Open a weight file: .safetensors, an index JSON over shards, .gguf or torch's .pth; content decides, not name.

    Only headers are read, and no code in the file is run.

    Raises:
        WeightsError: the file is missing, not one of these, truncated, damaged or hostile; the message is one line.
    """
    from .gguf import GGUFFile

    kinds = {"safetensors": SafetensorsFile, "torch": TorchFile, "index": ShardedFile, "gguf": GGUFFile}
    path = Path(path)
    return kinds[_kind(path, _head(path))](path)


def _head(path: Path) -> bytes:
    """The first bytes of a regular, non-empty file."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise WeightsError(f"{path}: a folder; expected one weight file, {_nearest(_names(path))}")
        if not stat.S_ISREG(mode):
            raise WeightsError(f"{path}: not a regular file")
        with open(path, "rb") as file:
            head = file.read(512)
    except (FileNotFoundError, NotADirectoryError):
        if not path.parent.is_dir():
            raise WeightsError(f"{path}: no such file, and no folder {path.parent}") from None
        names = _names(path.parent)
        near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.4) or names
        raise WeightsError(f"{path}: no such file; {_nearest(near)}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise WeightsError(f"{path}: cannot be opened ({error})") from None
    if not head:
        raise WeightsError(f"{path}: an empty file; download it again")
    return head


def _kind(path: Path, head: bytes) -> str:
    """What a file is ("safetensors", "torch", "index" or "gguf"), by its first bytes."""
    if head.startswith(b"GGUF"):
        return "gguf"
    if head.startswith(b"PK\x03\x04"):
        return "torch"
    # Before the index: the first byte of a header's length may happen to be a brace.
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and length <= MAX_HEADER_BYTES:
        return "safetensors"
    text = head.lstrip()
    if text.startswith(b"{"):
        return "index"
    if head[8:9] == b"{":
        raise WeightsError(
            f"{path}: a safetensors header of {length:,} bytes; at most {MAX_HEADER_BYTES:,} are allowed"
        )
    raise WeightsError(
        f"{path}: {_looks_like(head, text)}; expected safetensors, its index JSON, a GGUF, or a .pth by torch.save"
    )


def _looks_like(head: bytes, text: bytes) -> str:
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the file itself (run `git lfs pull`, or download it again)"
    if text[:14].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "an HTML page, not weights (a download that needs a login or another address)"
    if head[257:262] == b"ustar":
        return "a tar archive"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return (
            "a bare pickle or torch's format before 1.6 (with torch, re-save it: "
            "torch.save(torch.load(old, map_location='cpu', weights_only=True), new))"
        )
    if head.startswith(b"PK"):
        return "an empty or split zip archive"
    return f"an unknown format (it begins with {head[:8].hex(' ')})"


def _read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str], dict[str, int]]:
    """The tensors, metadata and each tensor's position in a safetensors file, every number checked."""
    size = os.stat(path).st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length < 2 or 8 + length > size:
            raise WeightsError(
                f"{path}: cut short: its header needs {8 + length:,} bytes, {size:,} present; download it again"
            )
        header = _parse_json(path, file.read(length), "header")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise WeightsError(f"{path}: damaged header (__metadata__ is not a dict of text)")
    tensors, extents = {}, []
    for key, entry in header.items():
        tensors[key], begin, end = _parse_entry(path, key, entry)
        extents.append((begin, end, key))
    _check_extents(path, sorted(extents), size - 8 - length)
    return tensors, metadata, {key: 8 + length + begin for begin, _, key in extents}


def _parse_entry(path: Path, key: str, entry: Any) -> tuple[TensorInfo, int, int]:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise WeightsError(f"{path}: {key[:200]!r} has dtype {str(dtype)[:40]!r}; known are {', '.join(ITEMSIZE)}")
    if not _is_counts(shape) or len(shape) > MAX_NDIM or any(n > MAX_DIM for n in shape):
        raise WeightsError(f"{path}: {key[:200]!r} has shape {str(shape)[:80]}; expected a list of sizes below 2**31")
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise WeightsError(f"{path}: {key[:200]!r} has data_offsets {str(offsets)[:80]}; expected [begin, end]")
    info = TensorInfo(tuple(shape), dtype)
    if offsets[1] - offsets[0] != info.nbytes:
        size = offsets[1] - offsets[0]
        raise WeightsError(f"{path}: {key[:200]!r} is {size:,} bytes; {dtype} of shape {shape} needs {info.nbytes:,}")
    return info, *offsets


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _check_extents(path: Path, extents: list[tuple[int, int, str]], present: int) -> None:
    """The tensors must fill the data part exactly, one after the other."""
    expected = max((end for _, end, _ in extents), default=0)
    if present < expected:
        raise WeightsError(
            f"{path}: cut short: {expected:,} bytes of data expected, {present:,} present; download it again"
        )
    at = 0
    for begin, end, key in extents:
        if begin != at:
            fault = "overlaps the tensor before it" if begin < at else "leaves a gap before it"
            raise WeightsError(
                f"{path}: damaged header ({key[:200]!r} {fault}: it begins at {begin:,}, expected {at:,})"
            )
        at = end
    if present > expected:
        raise WeightsError(
            f"{path}: {present - expected:,} bytes too long: its tensors need {expected:,}; download it again"
        )


def _read_weight_map(path: Path) -> dict[str, str]:
    """The index's tensor → file name, the names checked to lie in the index's own folder."""
    size = os.stat(path).st_size
    if size > MAX_HEADER_BYTES:
        raise WeightsError(f"{path}: {size:,} bytes of JSON; an index has at most {MAX_HEADER_BYTES:,}")
    owners = _parse_json(path, path.read_bytes(), "JSON").get("weight_map")
    if not isinstance(owners, dict) or not owners:
        raise WeightsError(f"{path}: JSON without a weight_map; expected the index of a sharded checkpoint")
    for name in owners.values():
        if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\\0"):
            raise WeightsError(f"{path}: the shard name {str(name)[:80]!r} is not a plain file name in its own folder")
    return owners


def _check_shards(path: Path, owners: dict[str, str], shards: dict[str, WeightsFile]) -> None:
    lacking = [f"{key} ({name})" for key, name in owners.items() if key not in shards[name].tensors]
    extra = [f"{key} ({name})" for name, shard in shards.items() for key in shard.tensors if owners.get(key) != name]
    problems = [f"shards lack {_some(lacking)}"] * bool(lacking) + [f"shards also hold {_some(extra)}"] * bool(extra)
    if problems:
        raise WeightsError(f"{path}: the index does not match its shards: {'; '.join(problems)}")


def _parse_json(path: Path, data: bytes, what: str) -> dict[str, Any]:
    """A JSON object, stricter than ``json``: no name twice, no NaN, no half surrogates, so that MLX reads the same."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name occurs twice")
        for name in found:
            name.encode()
        return found

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not a number")

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: damaged {what} ({str(error)[:120]}); download it again") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{path}: damaged {what} (a {type(value).__name__}, expected an object); download it again")
    return value


def _to_mlx(values: np.ndarray, dtype: str) -> mx.array:
    if dtype == "BOOL":
        values = values != 0
    elif dtype == "F64":
        with np.errstate(over="ignore"):
            values = values.astype(np.float32)
    array = mx.array(values)
    if dtype == "BF16":
        # On the CPU and at once: GPU work must not stand between a file and its caller.
        array = array.view(mx.bfloat16, stream=mx.cpu)
        mx.eval(array)
    return array


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read any more ({error.strerror})") from None
    return status.st_size, status.st_mtime_ns


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _nearest(names: list[str]) -> str:
    return f"nearest are {', '.join(names[:3])}" if names else "nothing is near"


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
