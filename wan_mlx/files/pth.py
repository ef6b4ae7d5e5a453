"""Torch's zip archives (.pth, .pt, .bin, .ckpt), read without running their pickle.

``torch.save`` writes a zip: ``<name>/data.pkl`` is a pickled dict whose leaves call torch's rebuild functions, and
``<name>/data/<key>`` are the raw storages, uncompressed. A pickle is a program, so this module has its own evaluator of
the few opcodes that a dict of tensors needs. It works on inert values: a global is only a name from a fixed list, and
nothing is imported, called or given attributes. The format follows ``torch/serialization.py`` (``_save``) and
``torch/_utils.py`` (``_rebuild_tensor_v2``, ``_rebuild_tensor_v3``).

`pickle.Unpickler` with an allow-list in ``find_class`` would be shorter and also stops code, but a small file could
still end the process: it hashes dict keys of any kind, so a tuple nested 200,000 deep overflows the C stack (a
segmentation fault), it allocates memory for any memo index, and BUILD sets attributes of any object.
"""

from __future__ import annotations

import logging
import math
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..errors import WeightsError
from .base import ITEMSIZE, MAX_DIM, MAX_ENTRIES, MAX_NAME, MAX_NDIM, TensorInfo, WeightsFile, contiguous, stamp

log = logging.getLogger(__name__)

# Far above any published model (a 14B state dict has 1,300 tensors, 40 opcodes and 200 bytes of pickle for each), low
# enough that a hostile file costs seconds and megabytes at most.
MAX_PICKLE_BYTES = 64_000_000
MAX_OPCODES = 4_000_000
MAX_DEPTH = 32
SMALL_TENSOR_BYTES = 2**24

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")

# torch's names of the dtypes; for older ones also the typed storage's class.
_DTYPES = {
    **{"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "bool": "BOOL"},
    **{f"{sign}int{bits}": f"{sign.upper() or 'I'}{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
    **{"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"},
}
_STORAGES = {
    **{"DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16"},
    **{"LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8"},
    **{"ByteStorage": "U8", "BoolStorage": "BOOL"},
}


@dataclass(frozen=True)
class Storage:
    """The raw bytes of one or more tensors: a zip entry, and the start of its data in the file.

    ``start`` is None for a compressed entry, which must be read through ``zipfile``. ``dtype`` is None for an untyped
    storage, whose tensors have their own.
    """

    entry: str
    nbytes: int
    dtype: str | None
    start: int | None


@dataclass(frozen=True)
class TorchTensor:
    """A view of a storage; ``offset`` and ``strides`` count elements."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _Global:
    """A name that the pickle refers to; never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class TorchFile(WeightsFile):
    """One .pth, .pt, .bin or .ckpt in torch's zip format; a tensor is read from the file on every `read`."""

    def __init__(self, path: Path):
        self._views = _read_index(path, stamp(path))
        super().__init__(path, {key: TensorInfo(view.shape, view.dtype) for key, view in self._views.items()})

    @classmethod
    def begins(cls, head: bytes) -> bool:
        return head.startswith(b"PK\x03\x04")

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


@lru_cache(maxsize=8)
def _read_index(path: Path, stamp: tuple[int, int]) -> dict:
    """`read_index`, cached while the file has this `stamp`, because a run opens each file several times."""
    return read_index(path)


def read_index(path: Path) -> dict[str, TorchTensor]:
    """Every tensor of the archive by name, in the file's order; reads no tensor data.

    Nested dicts and lists are joined with '.'; a wrapper such as ``{"state_dict": {...}, "epoch": 3}`` is removed if
    only one entry holds tensors.

    Raises:
        WeightsError: truncated or damaged zip, TorchScript, big-endian, or the pickle is not a dict of tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _Archive(path, archive).tensors()
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    except zipfile.BadZipFile as error:
        if "not a zip file" in str(error):
            size = path.stat().st_size
            raise WeightsError(
                f"{path}: the zip archive is cut short, its directory at the end is missing ({size:,} bytes present); "
                "download it again"
            ) from None
        raise WeightsError(f"{path}: damaged zip archive ({error}); download it again") from None
    except (
        Exception
    ) as error:  # on damaged input zipfile raises many kinds: struct.error, ValueError, RuntimeError
        raise WeightsError(
            f"{path}: damaged zip archive ({type(error).__name__}: {error}); download it again"
        ) from None


@contextmanager
def open_storage(path: Path, storage: Storage) -> Iterator[tuple[BinaryIO, int]]:
    """A seekable file, and the position of the storage's first byte in it."""
    if storage.start is not None:
        with open(path, "rb", buffering=0) as file:
            yield file, storage.start
        return
    try:
        with zipfile.ZipFile(path) as archive, archive.open(storage.entry) as file:
            yield cast(BinaryIO, file), 0
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError) as error:
        raise WeightsError(f"{path}: {storage.entry} does not decompress ({error}); download it again") from None


class _Archive:
    """An open zip archive while its index is built; its errors lack the path, which `read_index` adds."""

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

    def tensors(self) -> dict[str, TorchTensor]:
        root = _evaluate(self._small_entry("data.pkl", MAX_PICKLE_BYTES), self._storage, self._tensor)
        if not isinstance(root, dict):
            raise WeightsError(f"holds a {_kind(root)}; expected a dict of tensors")
        return _flatten(root)

    def _small_entry(self, name: str, limit: int) -> bytes:
        info = self.entries[self.prefix + name]
        if info.file_size > limit:
            raise WeightsError(f"{name} is {info.file_size:,} bytes; a state dict needs less than {limit:,}")
        return self.zip.read(info)

    def _storage(self, pid: Any) -> Storage:
        """The storage behind a persistent id ``('storage', type, key, location, count)``."""
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and isinstance(pid[1], _Global)):
            raise WeightsError(f"the pickle refers to an outside object of an unknown kind ({_kind(pid)})")
        _, kind, key, _, count = pid
        dtype = _STORAGES.get(kind.name)
        if dtype is None and kind.name != "UntypedStorage":
            raise WeightsError(f"{kind} is not a type of storage")
        if not isinstance(key, str) or not _is_count(count):
            raise WeightsError("the pickle names a storage without a key and a count")
        if (key, dtype) not in self.storages:
            self.storages[key, dtype] = self._locate(f"{self.prefix}data/{key}", dtype)
        storage = self.storages[key, dtype]
        expected = count * (ITEMSIZE[dtype] if dtype else 1)
        if expected != storage.nbytes:
            raise WeightsError(f"storage {key!r} is {storage.nbytes:,} bytes; the pickle says {expected:,}")
        return storage

    def _locate(self, entry: str, dtype: str | None) -> Storage:
        """Find the start of an entry's data: after its local header, which gives the length of its name and padding."""
        info = self.entries.get(entry)
        if info is None:
            raise WeightsError(f"the archive lacks the storage {entry!r}; download it again")
        damaged = WeightsError(f"damaged zip archive (the header of {entry!r} disagrees with the directory)")
        file = self.zip.fp
        assert file is not None, "the archive is open"
        file.seek(info.header_offset)
        header = file.read(30)
        if len(header) < 30:
            raise damaged
        signature, _, flags, method, _, _, _, _, name_length, extra_length = struct.unpack("<4sHHHIIIIHH", header)
        name, extra = file.read(name_length), file.read(extra_length)
        start = info.header_offset + 30 + name_length + extra_length
        expected_name = entry.encode("utf-8" if flags & 0x800 else "cp437")
        if (signature, name, method) != (b"PK\x03\x04", expected_name, info.compress_type) or not _is_extra(extra):
            raise damaged
        if start + info.compress_size > self.file_size or flags & 0x1:
            raise damaged
        if method == zipfile.ZIP_STORED and info.file_size == info.compress_size:
            return Storage(entry, info.file_size, dtype, start)
        if method == zipfile.ZIP_DEFLATED:
            return Storage(entry, info.file_size, dtype, None)
        raise damaged

    def _tensor(self, storage: Any, dtype: str | None, offset: Any, shape: Any, strides: Any) -> TorchTensor:
        dtype = dtype or getattr(storage, "dtype", None)
        if not isinstance(storage, Storage) or dtype is None or storage.dtype not in (None, dtype):
            raise WeightsError("the pickle builds a tensor from something that is not a storage of its dtype")
        if not _is_count(offset) or not _is_counts(shape) or not _is_counts(strides) or len(shape) != len(strides):
            raise WeightsError("the pickle builds a tensor whose offset, shape or strides are not counts")
        if len(shape) > MAX_NDIM or any(n > MAX_DIM for n in shape):
            raise WeightsError(f"the pickle builds a tensor of shape {_shape(shape)}, which is out of bounds")
        size, elements = ITEMSIZE[dtype], math.prod(shape)
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if elements and (last + 1) * size > storage.nbytes:
            raise WeightsError(
                f"a tensor of shape {_shape(shape)} runs outside its storage of {storage.nbytes:,} bytes"
            )
        # Strides of 0 or a compressed entry can make a few bytes look like terabytes; real weights fit their file.
        if elements and max(elements, last + 1 - offset) * size > max(self.file_size, SMALL_TENSOR_BYTES):
            raise WeightsError(f"a tensor of shape {_shape(shape)} is larger than its file ({self.file_size:,} bytes)")
        # torch allows any stride for a dimension of size 1.
        dense = contiguous(shape)
        strides = tuple(s if n > 1 and elements else d for n, s, d in zip(shape, strides, dense, strict=True))
        return TorchTensor(storage, dtype, offset, shape, strides)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_counts(value: Any) -> bool:
    return isinstance(value, tuple) and all(map(_is_count, value))


def _is_extra(extra: bytes) -> bool:
    """Whether a local header's extra field is a whole number of (id, length, data) records.

    A damaged length would otherwise shift the data unnoticed.
    """
    at = 0
    while at + 4 <= len(extra):
        at += 4 + int.from_bytes(extra[at + 2 : at + 4], "little")
    return at == len(extra)


def _shape(shape: tuple[int, ...]) -> str:
    return str(list(shape)) if len(shape) <= MAX_NDIM else f"of {len(shape)} dimensions"


def _kind(value: Any) -> str:
    return (
        str(value)[:200]
        if isinstance(value, _Global)
        else "tensor"
        if isinstance(value, TorchTensor)
        else type(value).__name__
    )


_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINSTRING", "SHORT_BINSTRING"),
}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    **{"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False},
    **{"EMPTY_DICT": dict, "EMPTY_LIST": list},
}
_MARKED = ("TUPLE", "SETITEMS", "APPENDS")  # pop everything above the last mark
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _evaluate(data: bytes, storage_of, tensor_of) -> Any:
    """The value of a pickle, built only from inert parts."""
    stack: list[Any] = []
    below: list[list[Any]] = []  # a mark saves the stack, so that nothing below it can be reached
    memo: dict[Any, Any] = {}

    def take(count: int) -> list[Any]:
        if count > len(stack):
            raise IndexError
        taken = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return taken

    try:
        for count, (opcode, arg, _) in enumerate(pickletools.genops(data)):
            name = opcode.name
            if count > MAX_OPCODES:
                raise WeightsError(f"its pickle has more than {MAX_OPCODES:,} steps")
            marked: list[Any] = []
            if name in _MARKED:
                marked, stack = stack, below.pop()
            if name in _LITERALS:
                stack.append(arg)
            elif name in _CONSTANTS:
                stack.append(_CONSTANTS[name]())
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[arg])
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[arg] = stack[-1]
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name == "MARK":
                below.append(stack)
                stack = []
            elif name in _TUPLES:
                stack.append(tuple(take(_TUPLES[name])))
            elif name == "TUPLE":
                stack.append(tuple(marked))
            elif name in ("SETITEM", "SETITEMS"):
                pairs = take(2) if name == "SETITEM" else marked
                _set_items(stack[-1], pairs)
            elif name in ("APPEND", "APPENDS"):
                values = take(1) if name == "APPEND" else marked
                _extend(stack[-1], values)
            elif name == "GLOBAL":
                stack.append(_global(*str(arg).split(" ", 1)))
            elif name == "STACK_GLOBAL":
                stack.append(_global(*take(2)))
            elif name == "BINPERSID":
                stack.append(storage_of(*take(1)))
            elif name == "REDUCE":
                function, arguments = take(2)
                stack.append(_call(function, arguments, tensor_of))
            elif name == "BUILD":
                # The state of an OrderedDict is its attribute `_metadata` (module versions), which is not needed.
                take(1)
                if not isinstance(stack[-1], dict):
                    raise WeightsError(f"its pickle sets the state of a {_kind(stack[-1])}; only a dict may have one")
            elif name == "STOP":
                return stack[-1]
            elif name not in ("PROTO", "FRAME"):
                raise WeightsError(f"its pickle uses the opcode {name}, which a state dict does not need")
    except (IndexError, KeyError):
        raise WeightsError("damaged pickle (it takes a value or a mark that is not there)") from None
    except ValueError as error:  # pickletools: an unknown opcode, an argument cut short, text that is not UTF-8
        raise WeightsError(f"damaged pickle ({error})") from None
    raise WeightsError("damaged pickle (it has no end)")


def _global(module: Any, name: Any) -> _Global:
    if not isinstance(module, str) or not isinstance(name, str):
        raise WeightsError(f"damaged pickle (a {_kind(module)} and a {_kind(name)} where a global's names belong)")
    if (module, name) in _CALLS or (module == "torch" and (name in _STORAGES or name in _DTYPES)):
        return _Global(module, name)
    if module in ("torch", "torch.storage") and name == "UntypedStorage":
        return _Global(module, name)
    asked = f"{module}.{name}"[:200]
    raise WeightsError(f"refused: its pickle asks for {asked!r}, which a state dict does not need")


def _set_items(target: Any, pairs: list[Any]) -> None:
    if not isinstance(target, dict) or len(pairs) % 2:
        raise WeightsError(f"damaged pickle (it sets items of a {_kind(target)})")
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        # Only these types: hashing a tuple nested a million deep would overflow the C stack.
        if not isinstance(key, (str, int)):
            raise WeightsError(f"its pickle has a dict key that is a {_kind(key)}; expected text")
        target[key] = value


def _extend(target: Any, values: list[Any]) -> None:
    if not isinstance(target, list):
        raise WeightsError(f"damaged pickle (it appends to a {_kind(target)})")
    target.extend(values)


def _call(function: Any, args: Any, tensor_of) -> Any:
    """The result of one of the allowed functions."""
    if not isinstance(function, _Global) or not isinstance(args, tuple):
        raise WeightsError(f"its pickle calls a {_kind(function)}; refused")
    evaluate, counts = _CALLS.get((function.module, function.name), (_global, ()))
    if len(args) not in counts:
        raise WeightsError(f"its pickle calls {function} with {len(args)} arguments, which a state dict does not do")
    return evaluate(tensor_of, *args)


def _rebuild_v2(tensor_of, storage, offset, shape, strides, requires_grad, hooks, metadata=None):
    if metadata:
        raise WeightsError("a tensor that is a conjugate or negative view; save it after .resolve_neg().resolve_conj()")
    return tensor_of(storage, None, offset, shape, strides)


def _rebuild_v3(tensor_of, storage, offset, shape, strides, requires_grad, hooks, dtype, metadata=None):
    if metadata or not isinstance(dtype, _Global) or dtype.module != "torch" or dtype.name not in _DTYPES:
        raise WeightsError("the pickle builds a tensor without a dtype")
    return tensor_of(storage, _DTYPES[dtype.name], offset, shape, strides)


def _parameter(_, tensor, requires_grad, hooks):
    if not isinstance(tensor, TorchTensor):
        raise WeightsError(f"its pickle makes a parameter of a {_kind(tensor)}; expected a tensor")
    return tensor


def _size(_, shape):
    if not _is_counts(shape):
        raise WeightsError("its pickle makes a torch.Size of something that is not counts")
    return shape


# The allowed functions: name → stand-in, and number of arguments that torch passes.
_CALLS: dict[tuple[str, str], tuple[Callable[..., Any], tuple[int, ...]]] = {
    ("collections", "OrderedDict"): (lambda _: {}, (0,)),
    ("torch._utils", "_rebuild_tensor_v2"): (_rebuild_v2, (6, 7)),
    ("torch._utils", "_rebuild_tensor_v3"): (_rebuild_v3, (7, 8)),
    ("torch._utils", "_rebuild_parameter"): (_parameter, (3,)),
    ("torch", "Size"): (_size, (1,)),
}


def _flatten(root: dict) -> dict[str, TorchTensor]:
    """Tensors by their joined names; drops everything else."""
    found: dict[tuple[str, ...], TorchTensor] = {}
    visited = ignored = 0
    pending: list[tuple[tuple[str, ...], Any]] = [((), root)]
    while pending:
        path, value = pending.pop()
        visited += 1
        if len(path) > MAX_DEPTH or sum(map(len, path)) > MAX_NAME:
            raise WeightsError(f"its dict is too deep: at most {MAX_DEPTH} levels and {MAX_NAME} letters a name")
        if isinstance(value, TorchTensor):
            found[path] = value
        elif isinstance(value, (dict, list, tuple)):
            items = list(value.items() if isinstance(value, dict) else enumerate(value))
            if visited + len(pending) + len(items) > MAX_ENTRIES:
                raise WeightsError(f"its dict is too large: more than {MAX_ENTRIES:,} entries")
            pending.extend(((*path, str(key)), item) for key, item in reversed(items))
        else:
            ignored += 1
    if not found:
        raise WeightsError("holds no tensor; expected a dict of tensors")
    log.debug("%d tensors, %d other values ignored", len(found), ignored)
    heads = {path[0] for path in found}
    wrapped = len(heads) == 1 and heads <= set(_WRAPPERS) and all(len(path) > 1 for path in found)
    named: dict[str, TorchTensor] = {}
    for path, tensor in found.items():
        name = ".".join(path[1:] if wrapped else path)
        if name in named:
            raise WeightsError(f"two of its tensors are both named {name!r}")
        named[name] = tensor
    return named
