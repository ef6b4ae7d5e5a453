"""``wan-mlx resume`` without a name: the unfinished runs of this folder, and how far each has come."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from ..errors import BusyError, WanError
from ..runs.folder import ENDING, RunFolder
from .terminal import write


def row_of(output: Path) -> dict[str, Any] | None:
    """The facts about the run that makes ``output``; None if it was cut before it began."""
    try:
        with RunFolder(output) as folder:
            record = folder.record()
            if record is None:
                return None
            settings, done = record["settings"], folder.steps_kept
    except (BusyError, WanError, ValueError) as error:
        return {"output": str(output), "error": str(error)}
    names = ("model", "width", "height", "num_frames", "seed", "prompt")
    return {"output": str(output), "done": done, "steps": record["steps"], **{name: settings[name] for name in names}}


def list_runs(as_json: bool) -> int:
    """Print them, or one JSON array."""
    folders = sorted(path for path in Path().glob(f"*{ENDING}") if path.is_dir() and not path.is_symlink())
    rows = [row for path in folders if (row := row_of(path.with_suffix("")))]
    if as_json:
        write(json.dumps(rows))
        return 0
    for row in rows:
        if "error" in row:
            write(f"{row['output']}: {row['error']}")
            continue
        write("{output}: {done} of {steps} steps, {model} {width}x{height}x{num_frames}, {prompt}".format(**row))
        write(f"  wan-mlx resume {shlex.quote(row['output'])}")
    if not rows:
        write(f"no run is unfinished in {Path.cwd()}")
    return 0
