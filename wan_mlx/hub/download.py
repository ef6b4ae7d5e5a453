"""Downloads from the Hugging Face hub into its cache: interrupted files are resumed, and checked by the hub's hashes.

huggingface_hub (2.4) forgets an unfinished file when the process ends; these files have up to 35 GB. So bytes are
fetched here, into ``blobs/<etag>.incomplete`` of the same cache, and huggingface_hub then adopts the finished blob:
names, tokens, proxies, endpoints and the cache's layout stay its own.
"""

from __future__ import annotations

import hashlib
import logging
import re
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import WeightsError
from ..storage import publish, sha256

log = logging.getLogger(__name__)

CHUNK = 2**16
WORKERS = 4
# Seconds to wait after each connection error; starts anew when bytes have arrived.
WAITS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository; ``etag`` is its SHA-256, git's hash of a small file, or None if unknown."""

    path: str
    size: int
    etag: str | None = None


class _Stopped(Exception):
    """Another file failed, or Ctrl-C was pressed."""


def fetch_files(repo: str, commit: str, files: list[RemoteFile], advance: Callable[[int, RemoteFile], None]) -> None:
    """Download ``files`` into huggingface_hub's cache, a few at a time.

    Args:
        advance: called with the number of new bytes and their file; a file's first call includes those of an earlier
            try.

    Raises:
        WeightsError: a file failed again and again, or does not match the hub's hash. Received bytes are kept.
        Exception: huggingface_hub's own, for a file that is missing or not accessible.
    """
    stop = threading.Event()

    def told_of(file: RemoteFile) -> Callable[[int], None]:
        return lambda count: advance(count, file)

    with ThreadPoolExecutor(WORKERS) as pool:
        jobs = [pool.submit(_fetch, repo, commit, file, told_of(file), stop) for file in files]
        try:
            wait(jobs, return_when=FIRST_EXCEPTION)
        finally:  # also after Ctrl-C: running downloads end at their next chunk
            if not all(job.done() for job in jobs):
                stop.set()
            pool.shutdown(cancel_futures=True)
    errors = [error for job in jobs if not job.cancelled() and (error := job.exception())]
    if errors:
        raise next((error for error in errors if not isinstance(error, _Stopped)), errors[0])


def bytes_here(repo: str, commit: str, file: RemoteFile) -> int:
    """Number of a file's bytes in the cache, finished or not."""
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(repo, file.path, revision=commit), str):
        return file.size
    if file.etag is None:
        return 0
    blob = _cache("", repo) / "blobs" / file.etag
    here = blob if blob.exists() else _unfinished(blob)
    return min(here.stat().st_size, file.size) if here.exists() else 0


def _cache(folder: str, repo: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / folder / repo_folder_name(repo_id=repo, repo_type="model")


def _unfinished(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.incomplete")


def _fetch(repo: str, commit: str, file: RemoteFile, advance: Callable[[int], None], stop: threading.Event) -> None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.utils import WeakFileLock

    name, url = f"{repo}: {file.path}", hf_hub_url(repo, file.path, revision=commit)
    remote = _persist(lambda: get_hf_file_metadata(url), lambda: 0, name, stop)
    if not remote.etag or not re.fullmatch(r"[\w-]+", remote.etag):  # the etag becomes a file name
        raise WeightsError(f"{name}: {url} answers with the ETag {remote.etag!r}, so it is no hub; see HF_ENDPOINT")
    if remote.size is not None and remote.size != file.size:
        raise WeightsError(f"{name} has {remote.size:,} bytes, expected {file.size:,}, as the hub lists it")
    blob, locks = _cache("", repo) / "blobs" / remote.etag, _cache(".locks", repo)
    blob.parent.mkdir(parents=True, exist_ok=True)
    locks.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(locks / f"{blob.name}.lock"):  # as in huggingface_hub, so that two processes take turns
        if blob.exists():
            advance(file.size)
        else:
            with open(_unfinished(blob), "ab") as output:
                if output.tell() > file.size:
                    _empty(output)
                advance(output.tell())
                if output.tell() < file.size:
                    rest = partial(_fetch_rest, url, name, file.size, output, advance, stop)
                    _persist(rest, output.tell, name, stop)
            if file.etag and re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", file.etag):  # a mirror may answer with its own
                _check_hash(_unfinished(blob), name, file.etag)
            publish(_unfinished(blob), blob)
    hf_hub_download(repo, file.path, revision=commit)  # finds the blob and links to it


def _fetch_rest(
    url: str, name: str, size: int, output: BinaryIO, advance: Callable[[int], None], stop: threading.Event
) -> None:
    """Append the bytes behind those in ``output``, up to ``size``."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    start = output.tell()
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    # From the hub's own address each time: its redirects expire after an hour.
    with get_session().stream(
        "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, follow_redirects=True
    ) as response:
        hf_raise_for_status(response)
        if start and response.status_code != 206:  # the server sends the whole file again
            _empty(output)
            advance(-start)
        for chunk in response.iter_bytes(CHUNK):
            if stop.is_set():
                raise _Stopped(f"{name}: stopped")
            if output.tell() + len(chunk) > size:
                _empty(output)
                raise WeightsError(f"{name}: the server sends more than the {size:,} bytes that the hub lists")
            try:
                output.write(chunk)
                output.flush()
            except OSError as error:
                raise WeightsError(
                    f"{name}: cannot be written ({error.strerror or error}); what has arrived is kept, "
                    "so the same command goes on from there"
                ) from error
            advance(len(chunk))
    if output.tell() < size:
        raise ConnectionError("the server ended early")


def _empty(output: BinaryIO) -> None:
    output.seek(0)
    output.truncate()


def _check_hash(path: Path, name: str, expected: str) -> None:
    """Compare with the hub's hash, SHA-256 of a large file and git's of a small one; a damaged file is removed."""
    if len(expected) == 40:
        data = path.read_bytes()
        found = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    else:
        found = sha256(path)
    if found != expected:
        path.unlink()
        raise WeightsError(
            f"{name} arrived damaged: its hash is {found[:12]}…, expected {expected[:12]}…; "
            "it was removed, fetch it again"
        )


def _persist(attempt: Callable[[], Any], position: Callable[[], int], name: str, stop: threading.Event) -> Any:
    """Repeat ``attempt()`` while the network fails; each advance of ``position`` resets the waits."""
    waits = list(WAITS)
    while True:
        before = position()
        try:
            return attempt()
        except Exception as error:
            if not is_transient(error):
                raise
            waits = list(WAITS) if position() > before else waits
            reason = one_line(error)
            if not waits:
                raise WeightsError(
                    f"{name}: cut off at {position():,} bytes ({reason}); what has arrived is kept, "
                    "so the same command goes on from there"
                ) from error
            log.warning("%s: cut off at %d bytes (%s); trying again", name, position(), reason)
            if stop.wait(waits.pop(0)):
                raise _Stopped(f"{name}: stopped") from error


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    # HTTPError is the base of the HTTP client's errors.
    return isinstance(error, HTTPError | ConnectionError | TimeoutError) and not isinstance(error, OfflineModeIsEnabled)


def one_line(error: Exception) -> str:
    """The first meaningful line of an error's text, shortened."""
    return next((line.strip()[:200] for line in str(error).splitlines() if line.strip()), type(error).__name__)
