"""The library: the folder that videos are made in, whose files the server may read, and no others."""

from __future__ import annotations

import os
import re
import sys
import unicodedata
from itertools import chain, count
from pathlib import Path
from typing import Any

from ..hub.model_folders import model_folders
from ..runs.queue import FOLDER, Queue
from ..storage import home_folder

KINDS = {".mp4": "video", ".gif": "animation", ".webp": "animation", ".png": "image"}
LONGEST_NAME = 60  # characters of a prompt in a file's name


def default_library() -> Path:
    """A folder of the user's Movies, on systems other than macOS of Videos.

    Raises:
        ValueError: there is no home folder.
    """
    home = home_folder()
    if home is None:
        raise ValueError("there is no home folder for the library; give one: --library FOLDER")
    return home / ("Movies" if sys.platform == "darwin" else "Videos") / "wan_mlx"


class Library:
    """A library with its queue.

    Attributes:
        folder: with the videos; what belongs to the queue is in a hidden folder of it.
        queue: of this library.
        uploads, previews, posters: in the hidden folder: pictures and videos that were sent, the forming videos, and
            small pictures of finished ones.
    """

    def __init__(self, folder: Path):
        self.queue = Queue(folder)
        self.folder = self.queue.library
        self.uploads, self.previews, self.posters = (
            self.folder / FOLDER / name for name in ("uploads", "previews", "posters")
        )
        for place in (self.uploads, self.previews, self.posters):
            place.mkdir(mode=0o700, exist_ok=True)

    @property
    def label(self) -> str:
        """The folder's name for people, without where it lies."""
        return "/".join(self.folder.parts[-2:]).lstrip("/")

    @property
    def changed_at(self) -> int:
        """Another number after every change of the folder; 0 while its disk is away."""
        try:
            return self.folder.stat().st_mtime_ns
        except OSError:
            return 0

    def file(self, name: str) -> Path:
        """A finished video or picture of that name, which lies in the folder itself.

        Raises:
            KeyError: there is none.
        """
        path = self.folder / name
        if not is_plain(name) or path.suffix.lower() not in KINDS or path.is_symlink() or not path.is_file():
            raise KeyError(name)
        return path

    def names(self) -> list[str]:
        """The names of all of them, the newest first."""
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                is_ours = is_plain(entry.name) and Path(entry.name).suffix.lower() in KINDS
                if is_ours and entry.is_file(follow_symlinks=False):
                    found.append((entry.stat(follow_symlinks=False).st_mtime, entry.name))
        return [name for _, name in sorted(found, reverse=True)]

    def new_name(self, prompt: str, ending: str) -> str:
        """A name that neither a file, an unfinished run nor a job has, made of the prompt."""
        words = re.sub(r"[^\w]+", "_", unicodedata.normalize("NFC", prompt)).strip("_")[:LONGEST_NAME].strip("_")
        while len(words.encode()) > 3 * LONGEST_NAME:
            words = words[:-1]
        for number in chain([0], count(2)):
            name = f"{words or 'video'}{f'_{number}' if number else ''}{ending}"
            taken = os.path.lexists(self.folder / name) or os.path.lexists(self.folder / f"{name}.wan")
            if not taken and self.queue.of_output(name) is None:
                return name
        raise AssertionError("count() does not end")

    def trash(self, path: Path) -> None:
        """Move a file of the library to the system's Trash.

        Raises:
            OSError: it cannot be moved there.
        """
        import send2trash

        try:
            send2trash.send2trash(str(path))
        except FileNotFoundError:
            pass

    def forget(self, id: str, output: str) -> None:
        """Remove what was kept of a job that is deleted, but its finished file."""
        for path in (self.previews / f"{id}.webp", self.previews / f"{id}.png"):
            path.unlink(missing_ok=True)
        for path in self.posters.glob(f"{output}-*.webp"):
            path.unlink(missing_ok=True)


def is_plain(name: str) -> bool:
    """Whether it is the name of a file in a folder, and not hidden."""
    return bool(name) and not name.startswith(".") and not re.search(r"[/\\\0]", name) and len(name.encode()) < 256


def plain(value: Any, folder: Path) -> Any:
    """JSON's value without any path of this machine: of those in ``folder`` what is below it, of others the name."""
    if isinstance(value, dict):
        return {name: plain(entry, folder) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry, folder) for entry in value]
    if not isinstance(value, str) or "/" not in value:
        return value
    value = re.sub(rf"(?:{re.escape(str(folder))}/)?{re.escape(FOLDER)}/uploads/(upload_[0-9a-f]+)\.\w+", r"\1", value)
    home = home_folder()
    for known in filter(None, (folder, *model_folders(), Path(sys.prefix), home)):
        if len(known.parts) > 1:
            value = value.replace(f"{known}/", "").replace(str(known), known.name)
    return re.sub(r"(?<![\w.:/])(?:/[^\s/:;,'\"()\[\]]+)+/([^\s/:;,'\"()\[\]]+)", r"\1", value)
