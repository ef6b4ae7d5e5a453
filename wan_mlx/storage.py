"""Files on disk: durable writes that appear whole, fingerprints that tell files apart, and free space."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import WanError

SAMPLES, SAMPLE_BYTES = 16, 1 << 16  # of a large file's fingerprint


def free_space(folder: Path) -> int:
    """Free bytes on the disk of a folder, which need not exist yet."""
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def gigabytes(count: int) -> str:
    """1234567890 → "1.2 GB" (10⁹ bytes, as hubs and disks count), small sizes in MB, KB or bytes."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= size * 0.995:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


# Durable writes


def flush(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk, past the system's caches and the drive's."""
    import fcntl  # not on Windows

    descriptor = os.open(path, os.O_RDONLY)
    try:
        if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: fsync leaves the bytes in the drive's cache
            try:
                fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
                return
            except OSError:  # not on every file system
                pass
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, path: Path) -> None:
    """Give a finished file its name, in place of a file that has it; both survive a power cut once this returns."""
    flush(temporary)
    os.replace(temporary, path)
    flush(path.parent)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to; the file appears as ``path`` when the block ends without an error.

    Raises:
        WanError: it cannot be written; says how much room the disk has.
    """
    temporary = path.with_name(f".wan_mlx-{secrets.token_hex(4)}-{path.name}")
    try:
        yield temporary
        publish(temporary, path)
    except (OSError, RuntimeError) as error:  # MLX raises the latter
        raise _not_written(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def append(path: Path, data: bytes | memoryview) -> None:
    """Add to the end of a file; the bytes are on the disk when this returns.

    Raises:
        WanError: as `whole_file`.
    """
    try:
        with path.open("ab") as file:
            file.write(data)
        flush(path)
    except OSError as error:
        raise _not_written(path, error) from error


def _not_written(path: Path, error: Exception) -> WanError:
    free = free_space(path.parent)
    return WanError(f"{path} cannot be written ({error}); the disk has {free / 1e9:.2f} GB free")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes ``out`` when the block ends; if that fails, nothing is left.

    It is ``{out}.partial`` until then. An ``out`` that exists is replaced; whoever calls this has asked.
    """
    partial, old = (out.with_name(f"{out.name}.{ending}") for ending in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            flush(path)
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(out, old)
        os.replace(partial, out)
        flush(out.parent)
    except BaseException:  # Ctrl-C too
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not out.exists():
            os.replace(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)


# Telling files apart


def sha256(path: Path) -> str:
    """Of the whole file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def shards_of(path: Path) -> list[Path]:
    """The files that an index of shards names; of any other file, the file itself."""
    if not path.name.endswith(".index.json"):
        return [path]
    names = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    return [path.parent / name for name in sorted(names)]


def fingerprint(path: Path) -> dict[str, Any]:
    """Tells a file from another without reading gigabytes: size, and SHA-256 of a small file or of samples of a large.

    ``sha256`` is over the whole of a file of up to 1 MiB, of a larger one over 64 KiB at each of 16 even distances, so
    a change in a few places between can go unnoticed. An index of shards stands for its shards.
    """
    if (shards := shards_of(path)) != [path]:
        parts = [fingerprint(shard) for shard in shards]
        digest = hashlib.sha256("".join(part["sha256"] for part in parts).encode())
        return {"size": sum(part["size"] for part in parts), "sha256": digest.hexdigest()}
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= SAMPLES * SAMPLE_BYTES:
            digest.update(file.read())
        else:
            for i in range(SAMPLES):
                file.seek(i * (size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return {"size": size, "sha256": digest.hexdigest()}
