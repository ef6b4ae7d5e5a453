"""Models and LoRAs in the folders that ``WAN_MLX_MODELS`` names, such as ComfyUI's models folder: found by name."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePath

from ..errors import nearest, some
from .names import ADAPTER_CONFIG, WEIGHT_ENDINGS

log = logging.getLogger(__name__)

VARIABLE = "WAN_MLX_MODELS"
OF_A_FOLDER = {"config.json", "model_index.json", ADAPTER_CONFIG}  # one of them makes a folder a model, or a LoRA


def model_folders() -> list[Path]:
    """The folders, in their order; several are separated as those of ``PATH`` are."""
    named = os.environ.get(VARIABLE, "").split(os.pathsep)
    return [Path(folder).expanduser() for folder in named if folder.strip()]


def models_in(folder: Path) -> Iterator[Path]:
    """Weight files, and folders of a model or LoRA, at any depth; links are followed."""
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        here = Path(place)
        is_known = (real := os.path.realpath(here)) in seen
        seen.add(real)
        if is_known or (here != folder and OF_A_FOLDER & {*files}):
            folders.clear()  # what is in it is its own
            if not is_known:
                yield here
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (here / name for name in sorted(files) if name.endswith(WEIGHT_ENDINGS) and name[0] != ".")


def find_model(name: str) -> Path | None:
    """The file or folder of that name, or None; ``name`` may leave out a file's ending, and begin with folders.

    Raises:
        ValueError: several have it; lists them.
    """
    wanted = PurePath(name).parts
    if not wanted or PurePath(name).is_absolute() or ".." in wanted:
        return None
    exact, stems = dict[str, Path](), dict[str, Path]()
    folders = model_folders()
    for folder in folders:
        if not folder.is_dir():
            _tell_missing(folder)
    for path in (path for folder in folders for path in models_in(folder)):
        parts = path.parts[-len(wanted) :]
        if parts == wanted:
            exact.setdefault(os.path.realpath(path), path)
        elif path.suffix in WEIGHT_ENDINGS and (*parts[:-1], path.stem) == wanted:
            stems.setdefault(os.path.realpath(path), path)
    found = [*(exact or stems).values()]
    if len(found) > 1:
        raise ValueError(f"{name} may be one of {len(found)} files in {VARIABLE}: {some([*map(str, found)])}; give "
                         "more of its path")  # fmt: skip
    return found[0] if found else None


@lru_cache
def _tell_missing(folder: Path) -> None:
    """Once for each folder."""
    log.warning("%s names %s, and there is no such folder", VARIABLE, folder)


def nearest_model(name: str | Path) -> str:
    """The end of a message: "; nearest: ", and the name in the folders that is spelled nearly so; "" where none is."""
    return nearest(_named(Path(name)), [_named(path) for folder in model_folders() for path in models_in(folder)])


def _named(path: Path) -> str:
    return path.stem if path.suffix in WEIGHT_ENDINGS else path.name
