"""Check sums of a model's files: SHA-256 in an MLX folder's config.json, CRC-32 in a .pth.

A run compares the SHA-256 of each file once, and remembers those that were right by size, time and inode; `inspect`
compares everything anew. Damage in the middle of a file shows in nothing else: it makes another picture.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import zipfile
import zlib
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import WanError, WeightsError
from ..events import Listener, Progress, unheard
from ..storage import parse_json, sha256, shards_of, whole_file
from .config_files import MLX_FORMAT, read_config

log = logging.getLogger(__name__)

REMEMBERED = "checked-files.json"
MOST_REMEMBERED = 1000
PATIENCE, INTERVAL = 2.0, 0.2  # seconds until progress is told, and between

# Hears how many more bytes were read; an exception of it stops the reading.
Advance = Callable[[int], None]


def check_once(files: Collection[Path], folder: Path | None, listener: Listener = unheard) -> None:
    """Compare the SHA-256 of those files that have changed since they were right.

    Args:
        files: of a model; an index stands for its shards.
        folder: of the remembered sums; None, or one that cannot be used: compare all.
        listener: hears the `Progress`, if it takes longer than `PATIENCE`.

    Raises:
        WeightsError: a file is damaged.
    """
    known = _remembered(folder)
    new = {}
    for file, digest in _recorded(files).items():
        status = file.stat()
        identity = [status.st_size, status.st_mtime_ns, status.st_ino, digest]
        if known.get(str(file.resolve())) != identity:
            new[file] = digest, identity
    faults = _run({file: partial(_sha256_fault, file, digest) for file, (digest, _) in new.items()}, listener)
    if faults:
        raise WeightsError(faults[0])
    if new and folder is not None:
        _remember(folder, known | {str(file.resolve()): identity for file, (_, identity) in new.items()})


def faults_of(files: Collection[Path], listener: Listener = unheard) -> list[str]:
    """Compare all check sums of files, of both kinds; a line for each file that is damaged. Else as `check_once`."""
    recorded = _recorded(files)
    checks = {file: partial(_sha256_fault, file, digest) for file, digest in recorded.items()}
    zips = (file for file in _shards(files) if file not in recorded and zipfile.is_zipfile(file))
    return _run(checks | {file: partial(_crc_fault, file) for file in zips}, listener)


def _shards(files: Collection[Path]) -> list[Path]:
    return [shard for file in files for shard in shards_of(file)]


def _recorded(files: Collection[Path]) -> dict[Path, str]:
    """The SHA-256 of files in MLX folders, from the config.json beside them."""
    found = {}
    for file in _shards(files):
        config = read_config(file.parent / "config.json")
        digests = (config.get("files") or {}) if config.get("format") == MLX_FORMAT else {}
        if file.name in digests:
            found[file] = str(digests[file.name])
    return found


def _sha256_fault(file: Path, digest: str, advance: Advance) -> str | None:
    try:
        found = sha256(file, advance)
    except OSError as error:
        return f"{file} cannot be read ({error.strerror or error})"
    if found == digest:
        return None
    return (
        f"{file} is not as it was converted: its SHA-256 begins with {found[:12]}, config.json has {digest[:12]!r}; "
        "convert or download it again"
    )


def _crc_fault(file: Path, advance: Advance) -> str | None:
    try:
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED:  # unpacking it compares them, and may never end here
                    continue
                with archive.open(entry) as data:
                    while piece := data.read(1 << 20):
                        advance(len(piece))
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        return f"{file} is damaged ({error}); download it again"
    return None


class _Stopped(Exception):
    """The check was interrupted."""


def _run(checks: Mapping[Path, Callable[[Advance], str | None]], listener: Listener) -> list[str]:
    """The faults that are found; every check reads its file, and tells its ``advance``."""
    total, done = sum(file.stat().st_size for file in checks), 0
    lock, stopped = threading.Lock(), threading.Event()

    def advance(count: int) -> None:
        nonlocal done
        if stopped.is_set():
            raise _Stopped
        with lock:
            done += count

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        jobs = [threads.submit(check, advance) for check in checks.values()]
        try:
            patience = PATIENCE
            while wait(jobs, patience).not_done:
                listener(Progress("checking files", done, total, "B"))
                patience = INTERVAL
        finally:  # after Ctrl-C: the threads end at their next piece
            stopped.set()
    return [fault for job in jobs if (fault := job.result())]


def _remembered(folder: Path | None) -> dict[str, Any]:
    """A file's place → size, time, inode and SHA-256 when it was right."""
    try:
        known = parse_json((folder / REMEMBERED).read_bytes()) if folder else {}
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(folder: Path, known: dict[str, Any]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / REMEMBERED) as path:
            path.write_text(json.dumps(dict([*known.items()][-MOST_REMEMBERED:])), encoding="utf-8")
    except (OSError, WanError) as error:
        log.info("files that were checked are not remembered: %s", error)
