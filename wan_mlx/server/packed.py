"""Folders that are sent packed, as a zip: their files, unpacked beside it, as carefully as files are decoded."""

from __future__ import annotations

import shutil
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from .library import is_plain

FOLDER_ENDING = ".folder"
MOST_FILES, MOST_UNPACKED = 16, 1 << 30


def is_packed(path: Path) -> bool:
    return zipfile.is_zipfile(path)


def unpacked(path: Path) -> Path:
    """The folder of a zip's files, which have the ending `FOLDER_ENDING` in its place.

    Raises:
        ValueError: it is damaged or locked, or holds too much, or what is no plain file.
    """
    folder = path.with_suffix(FOLDER_ENDING)
    try:
        with zipfile.ZipFile(path) as packed:
            members = [one for one in packed.infolist() if not one.is_dir() and not _is_of_mac(one.filename)]
            names = [PurePosixPath(one.filename).name for one in members]
            if not 1 <= len(members) <= MOST_FILES or len({*names}) < len(names):
                raise ValueError(f"{path.name} holds {len(members)} files, expected 1 to {MOST_FILES} of different "
                                 "names")  # fmt: skip
            if (size := sum(one.file_size for one in members)) > MOST_UNPACKED:
                raise ValueError(f"{path.name} has {size:,} bytes unpacked, expected at most {MOST_UNPACKED:,}")
            for name in names:
                if not is_plain(name):
                    raise ValueError(f"{path.name} holds {name!r}, expected a file's plain name")
            folder.mkdir(mode=0o700)
            for one, name in zip(members, names, strict=True):
                with packed.open(one) as source, (folder / name).open("xb") as output:
                    shutil.copyfileobj(source, output)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise ValueError(f"{path.name} cannot be unpacked: {error}") from None
    return folder


def _is_of_mac(name: str) -> bool:
    """Whether the Finder has packed it beside the files that were meant."""
    return name.startswith("__MACOSX/") or PurePosixPath(name).name.startswith("._") or name.endswith(".DS_Store")
