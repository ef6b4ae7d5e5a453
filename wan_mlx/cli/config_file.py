"""``--config FILE``: the settings of an earlier video, or of a JSON file, as flags; those on the command line win."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from .. import options
from ..errors import UsageError
from ..option import Option
from ..presets import BUNDLED, PRESETS
from ..storage import no_file, parse_json
from .flags import arguments

log = logging.getLogger(__name__)

# Options that a recipe sets, and notes on a run that are no options.
OF_RECIPE = ("steps", "guidance_scale", "shift", "solver", "phases")
NOTES = ("checkpoint", "model_fps", "versions", "forwards", "tokens", "quantized", "original_prompt", "extended_by",
         "source_sha256", "draft_of", "clips", "clip_frames")  # fmt: skip
PUBLISHED_TAEHV = ("taew2_1.safetensors", "taew2_2.safetensors")  # which are fetched where none is given
IN_MEMORY = re.compile(r", sha256 [0-9a-f]{64}$")  # as `types.describe_source` ends


def config_arguments(path: Path, given: Mapping[str, Any], from_draft: bool = False) -> list[str]:
    """The settings of ``path`` as arguments, to be put before those of the command line.

    Args:
        path: a video, picture or .npz of ours, or a JSON object of settings or flags.
        given: the flags that the command line gives.
        from_draft: it is a draft, and the settings are to be of the video that it is for.

    Raises:
        UsageError: it cannot be read, or holds a key that no flag sets; names the nearest.
        ValueError: a video without settings.
    """
    is_video = from_draft or path.suffix.lower() != ".json"
    flag = "--from-draft" if from_draft else "--config"
    settings = _settings_of(path, flag) if is_video else _read_json(path)
    if is_video and "prompt" not in settings:  # other programs write JSON into files, too
        raise UsageError(f"--config {path}: it was not made by wan_mlx; give the settings as flags, or in a .json file")
    if from_draft and not settings.get("draft_of"):
        raise UsageError(f"{flag} {path}: it is no draft; --config {path} takes its settings as they are")
    try:
        settings = of_draft(settings, full=from_draft)
        if settings.get("clip_frames"):  # its sound or its folder says how long it is
            settings = {name: value for name, value in settings.items() if name != "num_frames"}
        return arguments(as_options(obeyed(settings, given) if is_video else settings, path, given))
    except UsageError as error:
        raise UsageError(f"{flag} {path}: {error}") from error


def of_draft(settings: Mapping[str, Any], full: bool) -> dict[str, Any]:
    """A draft's settings as they were asked for: with the size and steps of the video that it is for, and, unless that
    is wanted in ``full``, ``draft``."""
    found = dict(settings)
    if of := found.pop("draft_of", None):
        found["width"], found["height"], found["steps"] = of
        tiny = found.pop("tiny_vae", None)
        found.pop("draft", None)
        if not full:
            found |= {"draft": True} | ({"tiny_vae": tiny} if tiny else {})
    return found


def _settings_of(path: Path, flag: str) -> dict[str, Any]:
    from ..media.write import ENDINGS, read_settings  # which needs numpy

    if flag == "--config" and path.suffix.lower() not in ENDINGS:
        raise UsageError(f"--config {path}: expected a file that ends on one of .json {' '.join(ENDINGS)}")
    return read_settings(path)


def read_text(path: Path, flag: str, endings: Collection[str] = ()) -> str:
    """The text of the file that ``flag`` names; a missing one may be meant for one that ends so.

    Raises:
        UsageError: it is missing, or cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UsageError(no_file(flag, path, endings)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{flag} {path} cannot be read: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    text = read_text(path, "--config")
    try:
        settings = parse_json(text)
    except ValueError as error:
        raise UsageError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise UsageError(f"--config {path} holds a {type(settings).__name__}, expected an object of settings")
    return settings


def obeyed(settings: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Of the settings that are embedded in a video or picture those that make the picture.

    The file may come from anybody: what names a place to read from, to download from or to write to is taken only from
    ``given``, the command line. Released models are known here, and sources by their bare names lie in this folder.

    Raises:
        UsageError: a place is named, and the command line does not give it.
    """
    found = dict(settings)
    known = {key: option for option in options.flags() for key in option.keys}
    for key, value in settings.items():
        option = known.get(key)
        if option is None or value in (None, []):
            continue
        if not (option.place or option.free or option.of == options.COMMAND):  # it makes the picture
            continue
        if option.key in given:
            del found[key]
        elif not (_is_known(option, value) or _are_loras(value)):
            raise UsageError(f"it asks for {option.flags[0]} {value!r}, which is not taken from a video or picture; "
                             f"give {option.flags[0]} yourself, if you want it")  # fmt: skip
    return found


def _is_known(option: Option, value: Any) -> bool:
    """Whether the named place is harmless: a released model, or sources in the folder that one is in."""
    if option is options.MODEL_NAME:
        return value in [*PRESETS]
    names = value if isinstance(value, list) else [value]
    return option.of == options.REQUEST and all(name == os.path.basename(str(name)) for name in names)


def _are_loras(value: Any) -> bool:
    """Whether it is the text of `describe_lora` for one or more."""
    return isinstance(value, list) and all(isinstance(lora, dict) and {"file", "strength"} <= {*lora} for lora in value)


def as_options(settings: Mapping[str, Any], path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """A video's settings as options. A setting that is not ours passes as it is: it may be a flag."""
    bound = OF_RECIPE if settings.get("recipe") else ()
    if "versions" in settings and not settings.get("interpolate"):  # a video's own rate is the model's
        bound = (*bound, "fps")
    found = {name: value for name, value in settings.items() if name not in (*NOTES, *bound)}
    if found.get("task") in [preset.task for preset in PRESETS.values()]:  # of the model; the flag names a preset
        del found["task"]
    for option in options.of(options.REQUEST):
        if option.place == "file":
            _check_paths(found.get(option.name))
    if found.get("video") is None and "video" not in given:
        found.pop("strength", None)
    if isinstance(found.get("dtype"), str):  # a run that went on in another: "bfloat16, float32 from step 3"
        said = found["dtype"]
        found["dtype"], *others = said.split(", ")
        if others:
            log.warning("%s was made in %s; now all of it is in %s", path, said, found["dtype"])
    if stopped := found.pop("stopped_after", None):
        log.warning("%s was stopped after %s steps; now all are made", path, stopped)
    bundled = settings.get("checkpoint")
    if bundled in [*BUNDLED] and bundled != found.get("model"):
        found["preset"], found["model"] = found.get("model"), bundled
    for key in options.LORAS:
        loras = found.get(key)
        if loras and _are_loras(loras):
            del found[key]
            if key not in given:
                names = ", ".join(f"{lora['file']} at {lora['strength']}" for lora in loras)
                flag = options.named(key).flags[0]
                raise UsageError(f"it was made with {names}; give it with {flag} FILE:STRENGTH")
    if isinstance(of_earlier := found.get("draft"), str):  # of earlier versions: decoded by this file
        found["tiny_vae"] = of_earlier
        del found["draft"]
    if isinstance(tiny := found.get("tiny_vae"), str):
        if "taehv" not in given and tiny not in PUBLISHED_TAEHV:
            raise UsageError(f"it was decoded by {tiny}; give that with --taehv")
        found["tiny_vae"] = True
    return found


def _check_paths(source: Any) -> None:
    for one in source if isinstance(source, list) else [source]:
        if one is not None and (not isinstance(one, str) or IN_MEMORY.search(one)):
            raise UsageError(f"it was made from a source that was in memory ({one}); give it as a file")
