"""Files on disk: durable writes that appear whole, fingerprints that tell files apart, free space, where things lie."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import secrets
import shutil
import sys
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from .errors import WanError, closest

# Beginning of the names that unfinished files and folders have, each with letters drawn at random after it; and the
# file in such a folder by which it is known to be ours.
DRAWN, MARKER = ".wan_mlx-", ".wan_mlx-unfinished"
SAMPLES, SAMPLE_BYTES = 16, 1 << 16  # of a large file's fingerprint


def free_space(folder: Path) -> int:
    """Free bytes on the disk of a folder, which need not exist yet."""
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def no_file(what: str, path: Path, endings: Collection[str] = ()) -> str:
    """Why ``path`` is no file, with the nearest name in its folder that ends as it does, or on one of ``endings``; or
    with the only one."""
    if path.is_dir():
        return f"{what} {path} is a folder, expected a file"
    names = []
    with suppress(OSError):  # no folder, or one that may not be read
        names = sorted(os.listdir(path.parent))
    alike = [name for name in names if Path(name).suffix.lower() in (path.suffix.lower(), *endings)]
    near = closest(path.name, alike, stems=True) or (alike[0] if len(alike) == 1 else "")
    return f"{what} {path} does not exist, expected a file" + f"; nearest: {path.parent / near}" * bool(near)


def gigabytes(count: int) -> str:
    """1234567890 → "1.2 GB" (10⁹ bytes, as hubs and disks count), small sizes in MB, KB or bytes."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= size * 0.995:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def size_of_folder(folder: Path) -> int:
    """Bytes of the files in a folder, at any depth; links are not followed."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_symlink() and path.is_file())


def home_folder() -> Path | None:
    """The user's home folder; None if there is none, as in a container that does not know its user."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def cache_folder() -> Path:
    """Folder of things that can be made again: ``WAN_MLX_CACHE``, else the system's cache folder.

    Raises:
        FileNotFoundError: that is in the home folder, and there is none.
    """
    if folder := os.environ.get("WAN_MLX_CACHE"):
        return Path(folder)
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "wan_mlx"
    if (home := home_folder()) is None:
        raise FileNotFoundError("there is no home folder; WAN_MLX_CACHE can name another folder")
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "wan_mlx"


def place_of(path: Path) -> str:
    """One text for every spelling of a file's place: links are followed, and case ignored where the system does."""
    place = os.path.realpath(path)
    return unicodedata.normalize("NFC", place).casefold() if sys.platform == "darwin" else place


def parse_json(text: str | bytes) -> Any:
    """A JSON value from a file or a user.

    Raises:
        ValueError: it is none, is nested too deeply to be read, or a key is given twice, of which one would be ignored.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"the key {key!r} is given twice")
            found[key] = value
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("its lists and objects are nested too deeply") from None


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
def whole_file(path: Path, mode: int = 0o666) -> Iterator[Path]:
    """An empty file beside ``path`` to write to, which becomes ``path`` when the block ends without an error.

    Args:
        mode: permissions, less the umask.

    Raises:
        WanError: it cannot be written; says how much room the disk has.
    """
    temporary = path.with_name(f"{DRAWN}{secrets.token_hex(8)}{path.suffix}")
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))  # never through somebody's link
    except OSError as error:
        raise _not_written(path, error) from error
    try:
        yield temporary
        publish(temporary, path)
    except (OSError, RuntimeError) as error:  # MLX raises the latter
        raise _not_written(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def append(path: Path, data: bytes | memoryview) -> None:
    """Add to the end of a file that nobody else may read; the bytes are on the disk when this returns.

    Raises:
        WanError: as `whole_file`; or the path is a link.
    """
    try:
        with open(path, "ab", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o600)) as file:
            file.write(data)
        flush(path)
    except OSError as error:
        raise _not_written(path, error) from error


def _not_written(path: Path, error: Exception) -> WanError:
    free = free_space(path.parent)
    return WanError(f"{path} cannot be written ({error}); the disk has {free / 1e9:.2f} GB free")


@contextmanager
def new_folder(out: Path, replace: bool = False) -> Iterator[Path]:
    """A folder to write into, which becomes ``out`` when the block ends; if that fails, nothing is left.

    Until then it has a drawn name beside ``out``, and a marker that this process holds locked. The next call removes
    such a folder if its process was killed. Nothing else is ever removed but, with ``replace``, an ``out`` that exists.

    Raises:
        WanError: it cannot be written, or ``out`` appeared meanwhile; then both are kept, and it says where.
    """
    drawn = out.with_name(f"{DRAWN}{secrets.token_hex(4)}")
    try:
        drawn.mkdir(parents=True)
        _remove_leftovers(out.parent)
        with (drawn / "unlocked").open("x") as marker:
            _lock(marker)
            os.rename(marker.name, drawn / MARKER)
            yield drawn
            for path in [*drawn.rglob("*"), drawn]:
                flush(path)
            if os.path.lexists(out) and not (replace and out.is_dir() and not out.is_symlink()):
                kept = out.with_name(f"{out.name}-{drawn.name.removeprefix(DRAWN)}")
                _move(drawn, kept)
                raise WanError(f"{out} appeared meanwhile; it was left as it is, and the new folder is {kept}")
            _move(drawn, out)
    except OSError as error:
        raise _not_written(out, error) from error
    finally:  # after Ctrl-C too; once moved, this is the old folder
        _remove(drawn)


def _move(folder: Path, out: Path) -> None:
    """Give a finished folder its name, and its drawn name and the marker to a folder that has it."""
    if not os.path.lexists(out):
        os.rename(folder, out)
    else:
        (out / MARKER).touch()
        if not _exchange(folder, out):
            (out / MARKER).unlink()  # until the new one is in its place
            old = folder.with_name(f"{folder.name}-old")
            os.rename(out, old)
            try:
                os.rename(folder, out)
            except BaseException:
                os.rename(old, out)
                raise
            os.rename(old, folder)
            (folder / MARKER).touch()
    flush(out.parent)
    (out / MARKER).unlink()


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names at once, so that a kill leaves both; False where the system or the disk cannot."""
    library, names = ctypes.CDLL(None), (os.fsencode(one), os.fsencode(other))
    try:
        if sys.platform == "darwin":
            return library.renamex_np(*names, 2) == 0  # RENAME_SWAP
        return library.renameat2(-100, names[0], -100, names[1], 2) == 0  # AT_FDCWD, RENAME_EXCHANGE
    except AttributeError:
        return False


def _remove_leftovers(folder: Path) -> None:
    """Remove the unfinished folders of killed processes: those with a marker that nobody holds locked."""
    for place in folder.glob(f"{DRAWN}*"):
        try:
            if not place.is_symlink():
                with (place / MARKER).open("r+") as marker:
                    if _lock(marker):
                        _remove(place)
        except OSError:  # no marker, or somebody else's
            continue


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Within this block no other process has the folder locked; False if one has. True where it cannot be locked."""
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:  # some network file systems
            pass
        yield True
    finally:
        os.close(descriptor)


def _lock(file: IO) -> bool:
    """Lock a file until it is closed or the process ends; False where that cannot be, or another process holds it."""
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove(folder: Path) -> None:
    """Remove a folder of ours, the marker last: after a kill in between the next call removes the rest."""
    with suppress(OSError):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != MARKER:
                path.unlink()
    shutil.rmtree(folder, ignore_errors=True)


# Telling files apart

SAMPLED, SAMPLE = 4096, 4096  # of `sample_digest`: how many samples, and bytes of each


def sha256(path: Path, advance: Callable[[int], Any] = lambda count: None) -> str:
    """Of the whole file; ``advance`` hears how many more bytes were read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
            advance(len(piece))
    return digest.hexdigest()


def digest(arrays: Mapping[str, Any], about: Any = None) -> str:
    """SHA-256 over names, types, shapes and bits of contiguous arrays, and over ``about`` as JSON has it."""
    said = [about, *([name, str(array.dtype), list(array.shape)] for name, array in sorted(arrays.items()))]
    found = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for _, array in sorted(arrays.items()):
        found.update(memoryview(array))
    return found.hexdigest()


def shards_of(path: Path) -> list[Path]:
    """The files that an index of shards names; of any other file, the file itself."""
    if not path.name.endswith(".index.json"):
        return [path]
    names = set(parse_json(path.read_text(encoding="utf-8"))["weight_map"].values())
    return [path.parent / name for name in sorted(names)]


def fingerprint(path: Path) -> dict[str, Any]:
    """Tells a file from another, or from itself before a change, without reading gigabytes.

    ``sha256`` is over the whole of a file of up to 1 MiB. Of a larger one it is over 64 KiB at each of 16 even
    distances, and ``changed`` is its time of modification, as a change may lie between. An index of shards stands for
    its shards.
    """
    if (shards := shards_of(path)) != [path]:
        parts = [fingerprint(shard) for shard in shards]
        digest = hashlib.sha256("".join(part["sha256"] for part in parts).encode())
        size, changed = sum(part["size"] for part in parts), [part.get("changed") for part in parts]
        return {"size": size, "sha256": digest.hexdigest(), "changed": changed}
    status, digest = path.stat(), hashlib.sha256()
    with path.open("rb") as file:
        if status.st_size <= SAMPLES * SAMPLE_BYTES:
            return {"size": status.st_size, "sha256": hashlib.sha256(file.read()).hexdigest()}
        for i in range(SAMPLES):
            file.seek(i * (status.st_size - SAMPLE_BYTES) // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return {"size": status.st_size, "sha256": digest.hexdigest(), "changed": status.st_mtime_ns}


def sample_digest(path: Path) -> str:
    """SHA-256 over size and samples of a file: 4 KiB at each of 4096 even distances, the whole of one up to 16 MiB.

    It tells other weights from these, on whatever machine: of a released model every matrix is looked into.
    """
    found = hashlib.sha256()
    for shard in shards_of(path):
        size = shard.stat().st_size
        found.update(str(size).encode())
        with shard.open("rb") as file:
            if size <= SAMPLED * SAMPLE:
                found.update(file.read())
                continue
            for place in range(SAMPLED):
                file.seek(place * (size - SAMPLE) // (SAMPLED - 1))
                found.update(file.read(SAMPLE))
    return found.hexdigest()
