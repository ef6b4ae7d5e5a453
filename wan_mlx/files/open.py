"""`open_weights` opens a weight file of any format: headers are read immediately, tensors on demand.

The content decides the format: safetensors (`safetensors`), an index JSON over shards, torch's zip format (`pth`) or
GGUF (`gguf`). To add a format, add a module with a subclass of `WeightsFile`, and a line in `_FORMATS`.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from pathlib import Path, PurePath

from ..errors import NoFile, WeightsError, nearest, some
from .base import MAX_HEADER_BYTES, JoinedFile, WeightsFile, check_names
from .gguf import GGUFFile
from .pth import TorchFile
from .safetensors import SafetensorsFile, read_object

ENDINGS = (".safetensors", ".gguf", ".pth", ".pt", ".ckpt", ".bin", ".json")  # of files that may be meant


def open_weights(path: str | Path) -> WeightsFile:
    """Open a weight file: .safetensors, an index JSON over shards, .gguf or torch's .pth; the name does not matter.

    Reads only headers, and runs no code from the file.

    Raises:
        WeightsError: the file is missing, of another kind, truncated, damaged or hostile; one line.
    """
    path = Path(path)
    head = _head(path)
    if (unfinished := Path(f"{path}.aria2")).exists():
        raise WeightsError(f"{path}: its download has not finished: aria2 keeps {unfinished.name} beside it until then")
    kind = format_of(head)
    if kind is None:
        raise WeightsError(f"{path}: {_looks_like(head)}")
    return kind(path)


class ShardedFile(JoinedFile):
    """Several files under one index JSON (``{"weight_map": {tensor: file name}}``)."""

    def __init__(self, path: Path):
        owners = _read_weight_map(path)
        names = sorted(set(owners.values()))
        missing = [name for name in names if not (path.parent / name).is_file()]
        if missing:
            raise WeightsError(f"{path}: missing {some(missing)}; the index needs {len(names)} files beside it")
        indexes = [name for name in names if format_of(_head(path.parent / name)) is ShardedFile]
        if indexes:
            raise WeightsError(f"{path}: the shard {some(indexes)} is an index itself")
        shards = {name: open_weights(path.parent / name) for name in names}
        _check_shards(path, owners, shards)
        super().__init__(path, {key: shards[name] for key, name in owners.items()})


def _read_weight_map(path: Path) -> dict[str, str]:
    """The index's tensor → file name; each file must lie in the index's own folder."""
    size = os.stat(path).st_size
    if size > MAX_HEADER_BYTES:
        raise WeightsError(f"{path}: {size:,} bytes of JSON; an index has at most {MAX_HEADER_BYTES:,}")
    owners = read_object(path, path.read_bytes(), "JSON").get("weight_map")
    if not isinstance(owners, dict) or not owners:
        raise WeightsError(f"{path}: JSON without a weight_map; expected the index of a sharded checkpoint")
    check_names(path, owners)
    for name in owners.values():
        plain = isinstance(name, str) and name.isprintable() and 0 < len(name) <= 255 and not set(name) & set("/\\")
        if not plain or name in (".", ".."):
            raise WeightsError(f"{path}: the shard name {str(name)[:80]!r} is not a plain file name in its own folder")
    return owners


def _check_shards(path: Path, owners: dict[str, str], shards: dict[str, WeightsFile]) -> None:
    lacking = [f"{key} ({name})" for key, name in owners.items() if key not in shards[name].tensors]
    extra = [f"{key} ({name})" for name, shard in shards.items() for key in shard.tensors if owners.get(key) != name]
    problems = [f"shards lack {some(lacking)}"] * bool(lacking) + [f"shards also hold {some(extra)}"] * bool(extra)
    if problems:
        raise WeightsError(f"{path}: the index does not match its shards: {'; '.join(problems)}")


def _head(path: Path) -> bytes:
    """The first bytes of a regular, non-empty file."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise WeightsError(f"{path}: a folder; expected one weight file, it holds {some(_names(path), 3)}")
        if not stat.S_ISREG(mode):
            raise WeightsError(f"{path}: not a regular file")
        with open(path, "rb") as file:
            head = file.read(512)
    except (FileNotFoundError, NotADirectoryError):
        if not path.parent.is_dir():
            raise NoFile(f"{path}: no such file, and no folder {path.parent}") from None
        weights = [name for name in _names(path.parent) if PurePath(name).suffix in ENDINGS]
        raise NoFile(f"{path}: no such file{nearest(path.name, weights, 3, stems=True)}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise WeightsError(f"{path}: cannot be opened ({error})") from None
    if not head:
        raise WeightsError(f"{path}: an empty file; download it again")
    return head


Format = type[GGUFFile] | type[TorchFile] | type[SafetensorsFile] | type[ShardedFile]  # take a path

# In this order: the length at the start of a safetensors header may begin with a brace, like an index.
_FORMATS: tuple[tuple[Format, Callable[[bytes], bool]], ...] = (
    (GGUFFile, lambda head: head.startswith(b"GGUF")),
    (TorchFile, lambda head: head.startswith(b"PK\x03\x04")),
    (SafetensorsFile, lambda head: head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER_BYTES),
    (ShardedFile, lambda head: head.lstrip().startswith(b"{")),
)


def format_of(head: bytes) -> Format | None:
    """The format of a file with these first bytes, 16 or more; None if it is no weight file."""
    return next((kind for kind, begins in _FORMATS if begins(head)), None)


def _looks_like(head: bytes) -> str:
    """The end of an error message: the kind of a file that is no weight file, and the expected ones."""
    if head[8:9] == b"{":
        length = int.from_bytes(head[:8], "little")
        return f"a safetensors header of {length:,} bytes; at most {MAX_HEADER_BYTES:,} are allowed"
    if head.startswith(b"version https://git-lfs"):
        found = "a git-lfs pointer, not the file itself (run `git lfs pull`, or download it again)"
    elif head.lstrip()[:14].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        found = "an HTML page, not weights (a download that needs a login or another address)"
    elif head[257:262] == b"ustar":
        found = "a tar archive"
    elif re.match(rb"\x80[\2-\5]", head):
        found = (
            "a bare pickle or torch's format before 1.6 (with torch, re-save it: "
            "torch.save(torch.load(old, map_location='cpu', weights_only=True), new))"
        )
    elif head.startswith(b"SQLite format 3\0"):
        found = "a database, in which Draw Things keeps its models (download this one as safetensors or GGUF)"
    elif not head.strip(b"\0"):
        found = "zeros where its header should be (of a download that has not finished; download it again)"
    elif head.startswith(b"PK"):
        found = "an empty or split zip archive"
    else:
        found = f"an unknown format (it begins with {head[:8].hex(' ')})"
    return f"{found}; expected safetensors, its index JSON, a GGUF, or a .pth by torch.save"


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []
