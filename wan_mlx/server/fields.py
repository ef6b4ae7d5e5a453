"""Fields of a request over HTTP → options of a run, checked as far as that goes without MLX."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import PurePosixPath
from typing import Any

from .. import options
from ..cli.flags import arguments, build_parser
from ..errors import UsageError, nearest
from ..hub.model_folders import find_model
from ..hub.names import parse_location
from ..hub.resolve import preset_of
from ..option import REQUEST, Option
from ..presets import BUNDLED, PRESETS, Preset, find_preset
from .refused import Refused
from .schema import FIELDS, QUALITIES, SOURCES_OF, qualities_of, served

SAME = {"num_inference_steps": "steps", "input_reference": "image"}
LONGEST_TEXT = 100_000  # characters of a prompt
LATER = r"(:-?[\d.]+)?"  # a LoRA's strength


def options_of(fields: Mapping[str, Any], default_model: str, needs_prompt: bool = True) -> dict[str, Any]:
    """The options that a request's fields come to, by their keywords, as JSON has them.

    Args:
        fields: values as JSON has them, or text, as forms have it. Sources are names of files, by then.
        default_model: of a request without one; with a picture it is nano-i2v in nano's place.

    Raises:
        Refused: a field is not known, or a value is wrong; names the nearest.
    """
    known = {option.name: option for option in served()}
    given = {name: value for name, value in fields.items() if value is not None}
    for ours in (name for name in given if name not in known and name not in FIELDS):
        raise Refused(400, f"unknown field {ours!r}{nearest(ours, [*known, *FIELDS])}", param=ours)
    for other, name in SAME.items():
        if other in given:
            if name in given:
                raise Refused(400, f"{other} and {name} are both given, and are the same; leave one out", param=other)
            given[name] = given.pop(other)
    own = {name: given.pop(name) for name in FIELDS if name in given}
    given = {name: checked(known[name], value) for name, value in given.items()}
    if not given.get("model"):
        given["model"] = "nano-i2v" if default_model == "nano" and given.get("image") else default_model
    check_names(given)
    preset = preset_called(given)
    given |= own
    _fill_quality(given, preset)
    _fill_length(given, preset)
    if (low := given.pop("guidance_scale_2", None)) is not None:
        high = given.get("guidance_scale")
        if high is None:
            raise Refused(400, "guidance_scale_2 is given without guidance_scale, the high-noise expert's",
                          param="guidance_scale_2")  # fmt: skip
        given["guidance_scale"] = checked(known["guidance_scale"], f"{low},{high}")
    if preset is not None and preset.prompt and not given.get("prompt"):
        given["prompt"] = preset.prompt
    if not needs_prompt:
        given.setdefault("prompt", "x")
    if "prompt" not in given:
        raise Refused(400, "prompt is missing: say what the video should show", param="prompt")
    if preset is not None:
        _check_sizes(given, preset)
        _check_sources(given, preset)
    if not given["prompt"].strip() and not (given.get("extend_prompt") and given.get("image")):
        raise Refused(400, "prompt is empty; say what the video should show", param="prompt")
    try:
        parsed(given)
    except UsageError as error:
        raise Refused(400, str(error)) from error
    return given


def checked(option: Option, value: Any) -> Any:
    """The value of an option, of its type.

    Raises:
        Refused: it is of another, or beyond the limits.
    """
    name = option.name
    try:
        value = _from_text(option, value)
        if isinstance(value, str) and len(value) > LONGEST_TEXT:
            raise ValueError(f"it has {len(value):,} characters, expected at most {LONGEST_TEXT:,}")
        args = parsed({name: value})
        given = getattr(args, option.key, None)
        if option.of == REQUEST and option.limits and given is not None and not option.sets:
            option.check(given)
    except (UsageError, ValueError) as error:
        raise Refused(400, re.sub(r"^argument [^:]*: ", f"{name}: ", str(error)), param=name) from error
    return value


_parser = cache(build_parser)  # to build it takes longer than all else


def parsed(given: Mapping[str, Any]) -> argparse.Namespace:
    """The options as parsed flags.

    Raises:
        UsageError: a value is wrong, or two do not go together.
    """
    return _parser().parse_args(arguments(given))


def _from_text(option: Option, value: Any) -> Any:
    """A form's text as the option's type has it; what does not suit is left for the parser, which says so."""
    if isinstance(value, str):
        word = value.strip().lower()
        if word in ("true", "false") and (option.is_switch or bool in option.kinds):
            return word == "true"
        if option.repeats:
            return [line for line in value.split("\n") if line.strip()]
        if option.parse is None and {*option.kinds} & {int, float} and not {*option.kinds} & {bool, str}:
            return option.read(value)
    return value


def check_names(given: Mapping[str, Any]) -> None:
    """Refuse names of models and LoRAs that are places on this machine: they are names on a hub, or in the folders of
    ``WAN_MLX_MODELS``."""
    for option in served():
        if option.place != "name" or option.name not in given:
            continue
        value = given[option.name]
        for one in value if isinstance(value, list) else str(value).split("\n"):
            if not isinstance(one, str) or (one and not is_name(one, option.name in options.LORAS)):
                near = nearest(str(one), PRESETS) if option.name == "model" else ""
                code = "unknown_model" if option.name == "model" else ""
                raise Refused(400, f"{option.name} is {str(one)[:200]!r}, expected a name of GET /v1/models, or "
                                   f"owner/name on a hub{near}", code, option.name)  # fmt: skip


def is_name(name: str, may_have_strength: bool = False) -> bool:
    """Whether it is a released model, a name on a hub, or one in the folders of ``WAN_MLX_MODELS``."""
    if may_have_strength and (match := re.fullmatch(rf"(.+?){LATER}", name)):
        name = match[1]
    if name in PRESETS or name in BUNDLED:
        return True
    if name.startswith(("/", "~", ".")) or "\\" in name or "\0" in name or ".." in PurePosixPath(name).parts:
        return False
    try:
        return find_model(name) is not None or parse_location(name) is not None
    except (ValueError, OSError):
        return False


def preset_called(given: Mapping[str, Any]) -> Preset | None:
    """The released model that a request is for; None where its name does not tell."""
    name = given.get("preset") or given["model"]
    try:
        return PRESETS.get(name) or (find_preset(name) if given.get("preset") else preset_of(name))
    except ValueError as error:
        raise Refused(400, str(error), param="preset") from error


def _fill_quality(given: dict[str, Any], preset: Preset | None) -> None:
    quality = given.pop("quality", None)
    if quality is None:
        return
    if not isinstance(quality, str) or quality not in QUALITIES:
        raise Refused(400, f"quality is {str(quality)[:100]!r}, expected {', '.join(QUALITIES)}"
                           f"{nearest(quality, QUALITIES)}", param="quality")  # fmt: skip
    if preset is not None and not given.get("steps") and not given.get("recipe"):
        given |= qualities_of(preset.name)[quality]


def _fill_length(given: dict[str, Any], preset: Preset | None) -> None:
    """``seconds`` as ``num_frames``; ``fps`` is left out where it is the model's own."""
    rate = preset.fps if preset else 16
    if given.get("fps") == rate:
        del given["fps"]
    seconds = given.pop("seconds", None)
    if seconds is None:
        return
    try:
        count = float(seconds) * rate
        if not 0 < count < 1e6 or isinstance(seconds, bool):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise Refused(400, f"seconds is {str(seconds)[:100]!r}, expected a number such as 4", param="seconds") from None
    if given.get("num_frames") is not None:
        raise Refused(400, "seconds and num_frames are both given; leave one out", param="seconds")
    geometry = preset.geometry if preset else PRESETS["t2v-1.3B"].geometry
    given["num_frames"] = geometry.nearest_frames(round(count))


def size_in(given: Mapping[str, Any], preset: Preset) -> tuple[int, int]:
    """Width and height that are asked for, before a source changes them."""
    size = options.named("size").meaning(given.get("size"))
    if isinstance(size, str):
        return preset.geometry.named_size(size, preset.size)
    if size:
        return int(size[0]), int(size[1])
    return int(given.get("width") or preset.size[0]), int(given.get("height") or preset.size[1])


def _check_sizes(found: Mapping[str, Any], preset: Preset) -> None:
    for name, other in (("width", "height"), ("height", "width")):
        if found.get(name) is not None and found.get(other) is None:
            raise Refused(400, f"{name} is given alone; expected {other}, too, or size", param=name)
    geometry = preset.geometry
    if preset.task == "s2v" and found.get("fit", "official") == "official":  # an area, which need be no video's size
        geometry = replace(geometry, together=1)
    try:
        geometry.check_size(*size_in(found, preset))
    except ValueError as error:
        raise Refused(400, str(error), param="size") from error
    if found.get("num_frames") is not None:
        try:
            preset.geometry.check_frames(int(found["num_frames"]))
        except ValueError as error:
            raise Refused(400, f"num_{error}", param="num_frames") from error


def _check_sources(found: Mapping[str, Any], preset: Preset) -> None:
    """Refuse sources that the model does not take."""
    every = {source for sources in SOURCES_OF.values() for source in sources}
    for name in every & {name for name, value in found.items() if value}:
        if name not in SOURCES_OF[preset.task]:
            takes = ", ".join(SOURCES_OF[preset.task])
            fits = [task for task, sources in SOURCES_OF.items() if name in sources]
            models = [other.name for other in PRESETS.values() if other.task in fits]
            raise Refused(400, f"{name} was given to {preset.name}, which takes {takes}; it is for {', '.join(models)}",
                          param=name)  # fmt: skip


def about(given: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of the video before it is made."""
    preset = preset_called(given)
    if preset is None:
        return {"model": given["model"]}
    frames = int(given.get("num_frames") or preset.num_frames)
    return {"model": given["model"], "size": list(size_in(given, preset)), "num_frames": frames, "fps": preset.fps,
            "steps": int(given.get("steps") or preset.usual_steps(*size_in(given, preset)))}  # fmt: skip
