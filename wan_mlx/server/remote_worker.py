"""The worker at the other end of ssh: it gets the sources first, and sends back what it has made."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import WanError
from ..runs.folder import ENDING
from ..storage import cache_folder
from .child import follow
from .machines import SOURCES, add_piece, pieces
from .worker import Said, Worker

FOLDER = "worker"  # in the cache
OLD = 14 * 86_400  # seconds after which what was cut is forgotten


class RemoteWorker(Worker):
    """Works in a folder of its own, of which nothing stays but runs that were cut."""

    def __init__(self):
        super().__init__()
        self.say = Sending(as_json=True)

    def hear(self, order: Mapping[str, Any]) -> None:
        if "file" in order:
            add_piece(order, Path(SOURCES) / Path(order["file"]).name)
        else:
            super().hear(order)

    def _make(self, order: Mapping[str, Any]) -> dict[str, Any]:
        ended = super()._make(order)
        if ended["state"] == "done":
            output = Path(order["output"])
            for line in pieces(output, output.name):
                self.say.tell("file", **line)
            output.unlink()
            for path in [*Path(SOURCES).glob(f"{order['make']}-*"), *Path("previews").glob(f"{order['make']}.*")]:
                path.unlink()
        return ended


class Sending(Said):
    """Says events, and before one of previews the files that it is about."""

    def __call__(self, event: Any) -> None:
        if event.kind == "preview":
            for path in (event.animation, event.sheet):
                for line in pieces(Path(path), f"previews/{Path(path).name}"):
                    self.tell("file", **line)
        super().__call__(event)


def main() -> int:
    """Work until standard input ends."""
    folder = cache_folder() / FOLDER
    for place in (folder / SOURCES, folder / "previews"):
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.chdir(folder)
    for path in [*Path(SOURCES).iterdir(), *Path(".").glob(f"*{ENDING}"), *Path(".").glob("*.mp4")]:
        if path.stat().st_mtime < time.time() - OLD:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
    try:
        os.nice(10)
    except OSError:
        pass
    worker = RemoteWorker()
    follow(worker.hear)
    try:
        worker.work()
    except WanError as error:
        worker.say.tell("died", message=str(error))
    return 0
