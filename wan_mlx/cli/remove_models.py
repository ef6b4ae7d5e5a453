"""``wan-mlx models rm NAME``: delete what was downloaded of a model, or a folder that `convert` wrote."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from ..errors import UsageError
from ..hub.model_folders import find_model
from ..hub.names import parse_location
from ..hub.resolve import folders_of
from ..presets import BUNDLED, PRESETS
from ..storage import gigabytes, size_of_folder
from ..weights.convert import check_target
from .terminal import write


def folders_to_remove(name: str) -> list[Path]:
    """The folders that hold the model.

    Raises:
        UsageError: there is none, or it is not ours to delete.
        ValueError: a folder that `convert` did not write, or that holds more.
    """
    if name in BUNDLED:
        raise UsageError(f"{name} comes with the package, and is not deleted alone")
    here = Path(name).expanduser()
    here = here if here.exists() else find_model(name)
    if here is not None:
        if not here.is_dir():
            raise UsageError(f"{here} is a file of yours, which is not deleted here; delete it with: rm {here}")
        check_target(here, overwrite=True)
        return [here]
    preset, location = PRESETS.get(name), parse_location(name)
    repos = [*preset.repositories] if preset else [location.repo] if location else []
    if found := [folder for repo in repos for folder in folders_of(repo)]:
        return found
    raise UsageError(f"nothing of {name} is on this machine; `wan-mlx models` shows what is")


def remove(name: str, is_sure: bool) -> int:
    """Delete the model, once the user has agreed; 1 if not."""
    folders = folders_to_remove(name)
    for folder in folders:
        write(f"{gigabytes(size_of_folder(folder)):>9}  {folder}")
    if not is_sure:
        if not sys.stdin.isatty():
            raise UsageError(f"models rm {name} asks before it deletes, and there is no terminal; give --yes")
        write("Delete it? Other programs that use this folder lose it, too. [y/N]", to="stderr")
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            write("nothing was deleted", to="stderr")
            return 1
    for folder in folders:
        shutil.rmtree(folder)
    return 0
