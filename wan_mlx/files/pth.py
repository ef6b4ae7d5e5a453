"""Torch's zip archives (.pth, .pt, .bin, .ckpt), read without running their pickle.

``torch.save`` writes a zip: ``<name>/data.pkl`` is a pickled dict whose leaves call torch's rebuild functions, and
``<name>/data/<key>`` are the raw storages, uncompressed. A pickle is a program. Of the opcodes of Python's own
evaluator, `_Index` keeps the few that a dict of tensors needs, and gives them inert values: a global is only a name
from a fixed list, and nothing is imported, called or given attributes. The format follows ``torch/serialization.py``
(``_save``) and ``torch/_utils.py`` (``_rebuild_tensor_v2``, ``_rebuild_tensor_v3``).

`pickle.Unpickler`, in C, would not do: a dict key nested 200,000 deep overflows its stack (a segmentation fault), and
it allocates memory for any memo index.
"""

from __future__ import annotations

import io
import logging
import math
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..errors import WeightsError
from .base import ITEMSIZE, MAX_DIM, MAX_ENTRIES, MAX_NAME, MAX_NDIM, TensorInfo, WeightsFile, contiguous, stamp

log = logging.getLogger(__name__)

# Far above any published model (a 14B state dict has 1,300 tensors, 100 reads and 200 bytes of pickle for each), low
# enough that a hostile file costs seconds and megabytes at most.
MAX_PICKLE_BYTES = 64_000_000
MAX_READS = 4_000_000
MAX_DEPTH = 32
SMALL_TENSOR_BYTES = 2**24

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")

_DTYPES = {
    **{"torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"},
    **{f"torch.{sign}int{bits}": f"{sign.upper() or 'I'}{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
    **{"torch.bool": "BOOL", "torch.float8_e4m3fn": "F8_E4M3", "torch.float8_e5m2": "F8_E5M2"},
    "torch.float8_e8m0fnu": "F8_E8M0",
}
# An untyped storage's tensors have dtypes of their own.
_STORAGES: dict[str, str | None] = {
    **{"torch.DoubleStorage": "F64", "torch.FloatStorage": "F32", "torch.HalfStorage": "F16"},
    **{"torch.BFloat16Storage": "BF16", "torch.LongStorage": "I64", "torch.IntStorage": "I32"},
    **{"torch.ShortStorage": "I16", "torch.CharStorage": "I8", "torch.ByteStorage": "U8", "torch.BoolStorage": "BOOL"},
    **{"torch.UntypedStorage": None, "torch.storage.UntypedStorage": None},
}
# The allowed functions, and the numbers of arguments that torch passes.
_CALLS = {
    "collections.OrderedDict": (0,),
    "torch.Size": (1,),
    "torch._utils._rebuild_parameter": (3,),
    "torch._utils._rebuild_tensor_v2": (6, 7),
    "torch._utils._rebuild_tensor_v3": (7, 8),
}
_OPCODES = (
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE "
    "BINUNICODE8 BINBYTES SHORT_BINBYTES BINSTRING SHORT_BINSTRING EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 "
    "TUPLE2 TUPLE3 BINGET LONG_BINGET BINPUT LONG_BINPUT MEMOIZE SETITEM SETITEMS APPEND APPENDS GLOBAL STACK_GLOBAL "
    "BINPERSID REDUCE BUILD"
).split()


@dataclass(frozen=True)
class Storage:
    """The raw bytes of one or more tensors: a zip entry, and the start of its data in the file.

    ``start`` is None for a compressed entry, which must be read through ``zipfile``. ``dtype`` is None for an untyped
    storage.
    """

    entry: str
    nbytes: int
    dtype: str | None
    start: int | None


@dataclass(frozen=True)
class Tensor:
    """A view of a storage; ``offset`` and ``strides`` count elements."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class TorchFile(WeightsFile):
    """One .pth, .pt, .bin or .ckpt in torch's zip format; a tensor is read from the file on every `read`."""

    def __init__(self, path: Path):
        self._views = read_index(path, stamp(path))
        super().__init__(path, {key: TensorInfo(view.shape, view.dtype) for key, view in self._views.items()})

    def _strides(self, key: str) -> tuple[int, ...]:
        return self._views[key].strides

    def _is_plain(self, key: str) -> bool:
        return self._views[key].storage.start is not None and super()._is_plain(key)

    def _start(self, key: str) -> int:
        view = self._views[key]
        return (view.storage.start or 0) + view.offset * ITEMSIZE[view.dtype]

    def _open(self, key: str) -> BinaryIO:
        storage = self._views[key].storage
        if storage.start is not None:
            return super()._open(key)
        return cast(BinaryIO, zipfile.ZipFile(self.path).open(storage.entry))


@lru_cache(maxsize=8)
def read_index(path: Path, stamp: tuple[int, int]) -> dict[str, Tensor]:
    """Every tensor of the archive by name, in the file's order; reads no tensor data.

    Nested dicts and lists are joined with '.'; a wrapper such as ``{"state_dict": {...}, "epoch": 3}`` is removed if
    only one entry holds tensors. Kept while the file has this `stamp`, because a run opens each file several times.

    Raises:
        WeightsError: truncated or damaged zip, TorchScript, big-endian, or the pickle is not a dict of tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _flatten(_Index(path, archive).load())
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    except Exception as error:  # on damaged input zipfile and pickle raise many kinds: struct.error, IndexError …
        fault = f"damaged zip archive or pickle ({type(error).__name__}: {error})"
        if "not a zip file" in str(error):
            fault = f"the zip archive is cut short, its directory at the end is missing ({stamp[0]:,} bytes present)"
        raise WeightsError(f"{path}: {fault}; download it again") from None


class _Global(str):
    """A name that the pickle refers to; never imported."""


class _Allowed(dict):
    """The methods of `_OPCODES` by their codes."""

    def __missing__(self, code: int) -> Any:
        name = next((opcode.name for opcode in pickletools.opcodes if opcode.code == chr(code)), f"number {code}")
        raise WeightsError(f"its pickle uses the opcode {name}, which a state dict does not need")


class _Counted(io.BytesIO):
    """The pickle's bytes; a program has one read or more for each of its steps."""

    reads = 0

    def read(self, size: int | None = -1) -> bytes:
        self.reads += 1
        if self.reads > MAX_READS:
            raise WeightsError(f"its pickle takes more than {MAX_READS:,} reads")
        return super().read(size)


class _Index(pickle._Unpickler):
    """Evaluates the pickle of an open archive to inert values; its errors lack the path, which `read_index` adds.

    Nothing is looked up in a dict or set before it is known to be text or a number: hashing a tuple nested a million
    deep would overflow the C stack.
    """

    stack: list[Any]
    read: Callable[[int], bytes]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, path: Path, archive: zipfile.ZipFile):
        self.zip = archive
        self.file_size = path.stat().st_size
        self.entries = {info.filename: info for info in archive.infolist()}
        self.storages: dict[tuple[str, str | None], Storage] = {}
        if len(self.entries) != len(archive.infolist()):
            raise WeightsError("damaged zip archive (two entries have one name); download it again")
        # zipfile would allocate any size that the directory states.
        outside = [i.filename for i in archive.infolist() if i.header_offset + 30 + i.compress_size > self.file_size]
        if outside:
            raise WeightsError(f"damaged zip archive ({outside[0]!r} runs past the end); download it again")
        pickles = [name for name in self.entries if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise WeightsError(
                f"a zip archive with {len(pickles)} data.pkl entries; a file written by torch.save has one"
            )
        self.prefix = pickles[0].removesuffix("data.pkl")
        if self.prefix + "constants.pkl" in self.entries:
            raise WeightsError(
                "a TorchScript archive; expected a state dict, saved with torch.save(model.state_dict(), …)"
            )
        order = self._small_entry("byteorder", 16) if self.prefix + "byteorder" in self.entries else b"little"
        if order != b"little":
            raise WeightsError(f"byte order {order.decode('ascii', 'replace')!r}; only little-endian files can be read")
        super().__init__(_Counted(self._small_entry("data.pkl", MAX_PICKLE_BYTES)))

    def _small_entry(self, name: str, limit: int) -> bytes:
        info = self.entries[self.prefix + name]
        if info.file_size > limit:
            raise WeightsError(f"{name} is {info.file_size:,} bytes; a state dict needs less than {limit:,}")
        return self.zip.read(info)

    def find_class(self, module: str, name: str) -> _Global:
        found = _Global(f"{module}.{name}")
        if found == "torch._tensor._rebuild_from_type_v2":
            raise WeightsError("refused: it holds tensors of classes of their own, such as torchao's, whose reading is "
                               "a program; save it as safetensors (safe_serialization=True)")  # fmt: skip
        if not (found in _CALLS or found in _STORAGES or found in _DTYPES):
            raise WeightsError(f"refused: its pickle asks for {str(found)[:200]!r}, which a state dict does not need")
        return found

    def persistent_load(self, pid: Any) -> Storage:
        """The storage behind a persistent id ``('storage', type, key, location, count)``."""
        match pid:
            case ("storage", _Global() as kind, str(key), _, int(count)) if kind in _STORAGES:
                dtype = _STORAGES[kind]
            case _:
                raise WeightsError("its pickle refers to an outside object that is no storage")
        if (key, dtype) not in self.storages:
            self.storages[key, dtype] = self._locate(f"{self.prefix}data/{key}", dtype)
        storage = self.storages[key, dtype]
        expected = count * (ITEMSIZE[dtype] if dtype else 1)
        if expected != storage.nbytes:
            raise WeightsError(f"storage {key!r} is {storage.nbytes:,} bytes; the pickle says {expected:,}")
        return storage

    def _locate(self, entry: str, dtype: str | None) -> Storage:
        """Find the start of an entry's data: after its local header, which gives the length of its name and padding."""
        if entry not in self.entries:
            raise WeightsError(f"the archive lacks the storage {entry!r}; download it again")
        info, file = self.entries[entry], self.zip.fp
        assert file is not None, "the archive is open"
        self.zip.open(info).close()  # compares the local header with the directory
        file.seek(info.header_offset + 26)
        name_length, extra_length = struct.unpack("<HH", file.read(4))
        file.seek(name_length, io.SEEK_CUR)
        whole = _is_extra(file.read(extra_length))
        start = file.tell()
        if whole and start + info.compress_size <= self.file_size:
            if info.compress_type == zipfile.ZIP_STORED and info.file_size == info.compress_size:
                return Storage(entry, info.file_size, dtype, start)
            if info.compress_type == zipfile.ZIP_DEFLATED:
                return Storage(entry, info.file_size, dtype, None)
        raise WeightsError(f"damaged zip archive (the header of {entry!r} disagrees with the directory)")

    def load_frame(self) -> None:
        self.read(8)  # the bytes are all here, so a frame's length does not matter

    def load_setitem(self) -> None:
        self._set_items([self.stack.pop(-2), self.stack.pop()])

    def load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    def _set_items(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(pairs) % 2:
            raise WeightsError(f"damaged pickle (it sets items of a {type(target).__name__})")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, (str, int)):
                raise WeightsError(f"its pickle has a dict key that is a {type(key).__name__}; expected text")
            target[key] = value

    def load_build(self) -> None:
        """Drops the state of an OrderedDict, its attribute `_metadata` (module versions)."""
        self.stack.pop()
        if not isinstance(self.stack[-1], dict):
            raise WeightsError(
                f"its pickle sets the state of a {type(self.stack[-1]).__name__}; only a dict may have one"
            )

    def load_reduce(self) -> None:
        """The result of one of `_CALLS`."""
        args, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Global) or function not in _CALLS or not isinstance(args, tuple):
            raise WeightsError(f"its pickle calls a {type(function).__name__}; refused")
        if len(args) not in _CALLS[function]:
            raise WeightsError(
                f"its pickle calls {function} with {len(args)} arguments, which a state dict does not do"
            )
        if function == "collections.OrderedDict":
            return self.append({})
        if function in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"):
            return self.append(self._tensor(function.endswith("v3"), *args))
        if not (_is_counts(args[0]) if function == "torch.Size" else isinstance(args[0], Tensor)):
            raise WeightsError(f"its pickle calls {function} with a {type(args[0]).__name__}")
        self.append(args[0])

    def _tensor(self, has_dtype: bool, storage, offset, shape, strides, requires_grad, hooks, *rest) -> Tensor:
        if any(rest[has_dtype:]):
            raise WeightsError(
                "a tensor that is a conjugate or negative view; save it after .resolve_neg().resolve_conj()"
            )
        dtype = getattr(storage, "dtype", None)
        if has_dtype:
            dtype = _DTYPES.get(rest[0]) if isinstance(rest[0], _Global) else None
        if not isinstance(storage, Storage) or dtype is None or storage.dtype not in (None, dtype):
            raise WeightsError("the pickle builds a tensor from something that is not a storage of its dtype")
        if not _is_counts((offset,)) or not _is_counts(shape) or not _is_counts(strides) or len(shape) != len(strides):
            raise WeightsError("the pickle builds a tensor whose offset, shape or strides are not counts")
        if len(shape) > MAX_NDIM or any(n > MAX_DIM for n in shape):
            raise WeightsError(f"the pickle builds a tensor of shape {str(shape)[:80]}, which is out of bounds")
        size, elements = ITEMSIZE[dtype], math.prod(shape)
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if elements and (last + 1) * size > storage.nbytes:
            raise WeightsError(f"a tensor of shape {shape} runs outside its storage of {storage.nbytes:,} bytes")
        # Strides of 0 or a compressed entry can make a few bytes look like terabytes; real weights fit their file.
        if elements and max(elements, last + 1 - offset) * size > max(self.file_size, SMALL_TENSOR_BYTES):
            raise WeightsError(f"a tensor of shape {shape} is larger than its file ({self.file_size:,} bytes)")
        # torch allows any stride for a dimension of size 1.
        dense = contiguous(shape)
        strides = tuple(s if n > 1 and elements else d for n, s, d in zip(shape, strides, dense, strict=True))
        return Tensor(storage, dtype, offset, shape, strides)

    dispatch = _Allowed(
        {getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _OPCODES}
    )
    dispatch |= {pickle.FRAME[0]: load_frame, pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems}
    dispatch |= {pickle.BUILD[0]: load_build, pickle.REDUCE[0]: load_reduce}


def _is_counts(values: Any) -> bool:
    return isinstance(values, tuple) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _is_extra(extra: bytes) -> bool:
    """Whether a local header's extra field is a whole number of (id, length, data) records.

    A damaged length would otherwise shift the data unnoticed.
    """
    at = 0
    while at + 4 <= len(extra):
        at += 4 + int.from_bytes(extra[at + 2 : at + 4], "little")
    return at == len(extra)


def _flatten(root: Any) -> dict[str, Tensor]:
    """Tensors by their joined names; drops everything else."""
    if not isinstance(root, dict):
        raise WeightsError(f"holds a {type(root).__name__.lower()}; expected a dict of tensors")
    found: dict[tuple[str, ...], Tensor] = {}
    for count, (path, value) in enumerate(_walk(root)):
        if count > MAX_ENTRIES:
            raise WeightsError(f"its dict is too large: more than {MAX_ENTRIES:,} entries")
        if len(path) > MAX_DEPTH or sum(map(len, path)) > MAX_NAME:
            raise WeightsError(f"its dict is too deep: at most {MAX_DEPTH} levels and {MAX_NAME} letters a name")
        if isinstance(value, Tensor):
            found[path] = value
    if not found:
        raise WeightsError("holds no tensor; expected a dict of tensors")
    log.debug("%d tensors in %d entries", len(found), count)
    wrapped = len({path[0] for path in found}) == 1 and all(len(path) > 1 and path[0] in _WRAPPERS for path in found)
    named: dict[str, Tensor] = {}
    for path, tensor in found.items():
        name = ".".join(path[wrapped:])
        if name in named:
            raise WeightsError(f"two of its tensors are both named {name!r}")
        named[name] = tensor
    return named


def _walk(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value in nested dicts and lists, and its path, in order."""
    yield path, value
    if isinstance(value, (dict, list, tuple)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _walk(item, (*path, str(key)))
