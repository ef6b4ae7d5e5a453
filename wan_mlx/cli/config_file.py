"""``--config FILE``: the settings of an earlier video, or of a JSON file, as flags; those on the command line win."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import options
from ..errors import UsageError
from ..presets import BUNDLED, PRESETS
from .flags import arguments

log = logging.getLogger(__name__)

# Options that a recipe sets, and notes on a run that are no options.
OF_RECIPE = ("steps", "guidance_scale", "shift", "solver")
NOTES = ("checkpoint", "fps", "versions", "forwards", "quantized", "original_prompt", "extended_by")
IN_MEMORY = re.compile(r", sha256 [0-9a-f]{64}$")  # as `types.describe_source` ends


def config_arguments(path: Path, given: Mapping[str, Any]) -> list[str]:
    """Arguments that make what ``path`` says, to be put before those of the command line.

    Args:
        path: a video, picture or .npz of ours, or a JSON object of settings or flags.
        given: the flags that the command line gives.

    Raises:
        UsageError: it cannot be read, or holds what no flag sets; names the nearest.
        ValueError: a video without settings.
    """
    if path.suffix.lower() == ".json":
        try:
            settings = json.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            raise UsageError(f"--config {path} cannot be read: {error}") from error
        if not isinstance(settings, dict):
            raise UsageError(f"--config {path} holds a {type(settings).__name__}, expected an object of settings")
    else:
        from ..media.write import read_settings

        settings = read_settings(path)
    try:
        return arguments(as_options(settings, path, given))
    except UsageError as error:
        raise UsageError(f"--config {path}: {error}") from error


def as_options(settings: Mapping[str, Any], path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """A video's settings as options. What is no setting of ours passes as it is: it may be a flag."""
    bound = OF_RECIPE if settings.get("recipe") else ()
    found = {name: value for name, value in settings.items() if name not in (*NOTES, *bound)}
    if found.get("task") in {preset.task for preset in PRESETS.values()}:  # of the model; the flag names a preset
        del found["task"]
    for option in options.of(options.REQUEST):
        if option.place == "file":
            _check_paths(found.get(option.name), path)
    if found.get("video") is None:
        found.pop("strength", None)
    if isinstance(found.get("dtype"), str):  # a run that went on in another: "bfloat16, float32 from step 3"
        said = found["dtype"]
        found["dtype"], *others = said.split(", ")
        if others:
            log.warning("%s was made in %s; now all of it is in %s", path, said, found["dtype"])
    if stopped := found.pop("stopped_after", None):
        log.warning("%s was stopped after %s steps; now all are made", path, stopped)
    if (bundled := settings.get("checkpoint")) in BUNDLED and bundled != found.get("model"):
        found["preset"], found["model"] = found.get("model"), bundled
    loras = found.get("loras")
    if isinstance(loras, list) and any(isinstance(lora, Mapping) for lora in loras):
        del found["loras"]
        if "loras" not in given:
            names = ", ".join(f"{lora['file']} at {lora['strength']:g}" for lora in loras)
            raise UsageError(f"{path} was made with {names}; give it with --lora FILE:STRENGTH")
    if isinstance(draft := found.get("draft"), str):
        if "taehv" not in given:
            raise UsageError(f"{path} is a draft by {draft}; give that with --taehv")
        found["draft"] = True
    return found


def _check_paths(source: Any, path: Path) -> None:
    for one in source if isinstance(source, list) else [source]:
        if one is not None and (not isinstance(one, str) or IN_MEMORY.search(one)):
            raise UsageError(f"{path} was made from a source that was in memory ({one}); give it as a file")
