"""Models from ModelScope (modelscope.cn), through the ``modelscope`` package, which is an extra."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import WeightsError, install_command
from .download import RemoteFile, one_line


def cache() -> Path:
    """ModelScope's cache folder."""
    return Path(os.environ.get("MODELSCOPE_CACHE") or os.path.expanduser("~/.cache/modelscope"))


def list_files(repo: str, revision: str | None) -> dict[str, RemoteFile]:
    """Path → file of a repository.

    Raises:
        WeightsError: the package is not installed, or the repository cannot be listed.
    """
    try:
        from modelscope.hub.api import HubApi
    except ImportError as error:
        raise WeightsError(f"ModelScope needs its package: {install_command('modelscope')}") from error
    try:
        entries = HubApi().get_model_files(repo, revision=revision, recursive=True)
    except Exception as error:  # of many kinds: its own, and its HTTP client's
        raise WeightsError(f"{repo} cannot be listed on ModelScope: {one_line(error)}") from error
    return {e["Path"]: RemoteFile(e["Path"], int(e["Size"])) for e in entries if e.get("Type", "blob") != "tree"}


def fetch(repo: str, revision: str | None, files: Iterable[RemoteFile]) -> Path:
    """Download ``files``, which `list_files` found; returns their folder.

    Raises:
        WeightsError: the download failed, or a file's size differs from the listing.
    """
    from modelscope import snapshot_download

    files = list(files)
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=[file.path for file in files]))
    except Exception as error:
        raise WeightsError(f"{repo} cannot be fetched from ModelScope: {one_line(error)}") from error
    for file in files:
        path = folder / file.path
        size = path.stat().st_size if path.is_file() else None
        if size != file.size:
            found = "is missing" if size is None else f"has {size:,} bytes"
            raise WeightsError(f"{path} {found}, expected {file.size:,} bytes; remove it and fetch it again")
    return folder
