"""``--config FILE``: the settings of an earlier video, or of a JSON file, as flags; those on the command line win."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..presets import BUNDLED

log = logging.getLogger(__name__)

# What a video's settings call what a flag sets.
FLAGS = {
    "prompt": "prompt", "negative_prompt": "negative_prompt", "num_frames": "frames", "steps": "steps",
    "guidance_scale": "guidance", "shift": "shift", "solver": "solver", "seed": "seed", "image": "image",
    "last_image": "last_image", "src_video": "src_video", "src_mask": "src_mask", "context_scale": "context_scale",
    "video": "video", "cache": "cache", "guidance_range": "guidance_range", "cfg_zero": "cfg_zero", "recipe": "recipe",
    "quantize": "quantize", "model": "model",
}  # fmt: skip
# What a recipe sets, and what is written of a run without being a setting.
OF_RECIPE = ("steps", "guidance_scale", "shift", "solver")
NOT_A_FLAG = ("checkpoint", "fps", "task", "versions", "forwards", "quantized", "original_prompt", "extended_by")


def config_arguments(path: Path, given: Mapping[str, Any]) -> list[str]:
    """Arguments that make what ``path`` says, to be put before those of the command line.

    Args:
        path: a video, picture or .npz of ours, or a JSON object of settings or flags.
        given: the flags that the command line gives.

    Raises:
        UsageError: it cannot be read, or holds what no flag sets; names the nearest.
        ValueError: a video without settings.
    """
    from .batch import line_flags
    from .flags import build_parser

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
        return line_flags(build_parser(), json.dumps(as_flags(settings, path, given)))
    except UsageError as error:
        raise UsageError(f"--config {path}: {error}") from error


def as_flags(settings: Mapping[str, Any], path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Flag → value. What is no setting of ours passes as it is: it may be a flag."""
    settings = dict(settings)
    flags: dict[str, Any] = {}
    bound = OF_RECIPE if settings.get("recipe") else ()
    if "width" in settings and "height" in settings:
        flags["size"] = f"{settings.pop('width')}x{settings.pop('height')}"
    if layers := settings.pop("skip_layers", None):
        first, last = settings.get("skip_range") or (0.1, 1.0)
        flags["slg"] = f"{','.join(map(str, layers))}:{first:g}-{last:g}"
    settings.pop("skip_range", None)
    if span := settings.pop("guidance_range", None):
        flags["guidance_range"] = f"{span[0]:g}-{span[1]:g}" if isinstance(span, list) else span
    if images := settings.pop("src_ref_images", None):
        flags["src_ref_images"] = images if isinstance(images, str) else ",".join(_a_path(i, path) for i in images)
    if "dtype" in settings:  # a run that went on in another says so: "bfloat16, float32 from step 3"
        flags["dtype"], *others = settings.pop("dtype").split(", ")
        if others:
            said = ", ".join([flags["dtype"], *others])
            log.warning("%s was made in %s; now all of it is in %s", path, said, flags["dtype"])
    if stopped := settings.pop("stopped_after", None):
        log.warning("%s was stopped after %s steps; now all are made", path, stopped)
    if (bundled := settings.get("checkpoint")) in BUNDLED and bundled != settings.get("model"):
        flags["task"], settings["model"] = settings.get("model"), bundled
    strength = settings.pop("strength", None)
    if settings.get("video") is not None and strength is not None:
        flags["strength"] = strength
    if (loras := settings.pop("loras", None)) and "lora" not in given:
        names = ", ".join(f"{lora['file']} at {lora['strength']:g}" for lora in loras)
        raise UsageError(f"{path} was made with {names}; give it with --lora FILE:STRENGTH")
    if draft := settings.pop("draft", None):
        if "taehv" not in given:
            raise UsageError(f"{path} is a draft by {draft}; give that with --taehv")
        flags["draft"] = True
    for name, value in settings.items():
        if name in NOT_A_FLAG or name in bound or value is None:
            continue
        if name in ("image", "last_image", "src_video", "src_mask", "video"):
            value = _a_path(value, path)
        flags[FLAGS.get(name, name)] = value
    return flags


def _a_path(source: Any, path: Path) -> str:
    if not isinstance(source, str):
        raise UsageError(f"{path} was made from a source that was in memory ({source}); give it as a file")
    return source
