"""The clerk: a process that answers what needs MLX or decodes files, so that no run and no server waits or dies of it.

A question is ``{"ask": number, "what": name, …}`` on standard input; the answer is ``{"answer": number, "value": …}``,
or ``"error"`` with a line and a ``"code"``.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from .. import options
from ..cli.config_file import as_options, obeyed, of_draft
from ..cli.flags import arguments as as_arguments
from ..cli.flags import given_flags, keywords, run_parser
from ..cli.jobs import asked_of, check_flags, check_needs, extension_of
from ..cli.terminal import explain, write
from ..errors import MemoryPlanError, UsageError, WanError
from ..hub.resolve import Places, is_cached, preset_of
from ..media.read import open_picture, open_video, read_image
from ..media.speech import sound_seconds
from ..media.write import read_settings
from ..models import chips
from ..pipeline import checked, plan
from ..planning.machine import available_memory
from ..planning.plan import Plan, Row
from ..presets import BUNDLED, PRESETS, find_preset
from ..recipes import RECIPES
from ..request_builder import build_request
from ..runs.folder import RunFolder
from ..runs.time_left import TimeLeft
from ..types import Request
from .child import follow
from .packed import FOLDER_ENDING, is_packed, unpacked

POSTER = 320  # pixels of its longer side
PICTURE_ENDINGS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tiff",
                   "AVIF": ".avif", "PPM": ".ppm"}  # fmt: skip
Answer = Any


def facts() -> Answer:
    """What this machine is."""
    name = chips.device_name() if mx.default_device().type == mx.DeviceType.gpu else "CPU"
    return {"device": name, "memory_bytes": available_memory()}


def check(given: Mapping[str, Any]) -> Answer:
    """Whether a request is right, as far as a released model's sizes tell; what is known of the video by then.

    Raises:
        ValueError, UsageError: it is not.
    """
    args = run_parser().parse_args(as_arguments(given))
    check_flags(args)
    check_needs(args, ["preview"])
    extension_of(args)
    model = keywords(args, options.MODEL)
    checked(model.pop("model"), model)
    if args.tiny_vae and args.model in BUNDLED:
        raise UsageError(f"tiny_vae is TAEHV, which is not for {args.model}'s latents; leave it out")
    preset = PRESETS.get(args.model)
    if preset is None or args.preset:
        return {}  # its files would tell
    planned(given)
    asked = keywords(args, options.REQUEST)
    of_model = (preset, preset.transformer, preset.geometry)
    request = build_request(*of_model, experts=preset.experts, draft=args.draft, **asked)
    return {"size": [request.width, request.height], "num_frames": request.num_frames, "fps": request.fps,
            "model_fps": request.model_fps, "steps": request.steps_of_clips}  # fmt: skip


def plan_of(given: Mapping[str, Any], known: Mapping[str, Any] | None = None, measures: bool = False) -> Answer:
    """What a video needs.

    Args:
        given: the options of its request.
        known: a finished video of the same model: its "options", and "step_seconds".
        measures: time the networks, if nothing else tells how fast they are.
    """
    found, video, seconds = planned(given), video_of(given), None
    rate, how = _rate(given, known, measures) if found.fits else (None, None)
    if rate is not None:
        seconds = TimeLeft(found, video.steps_made, rate=rate).seconds()
    return {
        "object": "plan", "model": given["model"], "size": f"{video.width}x{video.height}",
        "num_frames": video.num_frames, "seconds_of_video": round(video.num_frames / video.model_fps, 2),
        "steps": video.steps_made, "fits": found.fits, "peak_bytes": found.peak, "budget_bytes": found.budget,
        "seconds": seconds, "seconds_known_by": how if seconds is not None else None,
        "here": is_cached(given["model"]),
        "stages": [{"stage": row.stage, "how": row.how, "peak_bytes": row.peak} for row in found.rows],
        "advice": [_advice(text) for text in found.advice], "notes": [f"without {name}, which is not here yet"
                                                                      for name in found.without], "error": None,
    }  # fmt: skip


def _advice(text: str) -> dict[str, Any]:
    """A line of a plan's advice, and the options that it stands for."""
    return {"text": text, "options": {key: value for key, value in given_flags(text.split()).items()}}


def planned(given: Mapping[str, Any]) -> Plan:
    """The plan of a request."""
    return _planned_in(json.dumps(given, sort_keys=True), round(available_memory() / 2**28))


@lru_cache(maxsize=256)
def _planned_in(text: str, memory: int) -> Plan:
    """The plan of a request's options, as JSON; ``memory``: that is free, roughly, so that it is planned anew."""
    args = run_parser().parse_args(as_arguments(json.loads(text)))
    return plan(**keywords(args, options.MODEL), **asked_of(args))


def video_of(given: Mapping[str, Any]) -> Request:
    """A request with the model's defaults, of which neither the text nor the sources matter."""
    args = run_parser().parse_args(as_arguments(given))
    preset = find_preset(args.preset) if args.preset else PRESETS.get(args.model) or preset_of(args.model)
    preset = preset or PRESETS["t2v-1.3B"]
    of_model = (preset, preset.transformer, preset.geometry, "a video", preset.experts)
    return build_request(*of_model, planned=True, draft=args.draft, **asked_of(args))


def _rate(
    given: Mapping[str, Any], known: Mapping[str, Any] | None, measures: bool
) -> tuple[float | None, str | None]:
    """FLOP per second of denoising, and how that is known."""
    if known is not None:
        try:
            step = denoising(planned(known["options"])).flop / video_of(known["options"]).steps_made
            return step / known["step_seconds"], "history"
        except (WanError, ValueError):
            pass
    if (rate := chips.likely_rate()) is not None:
        return rate, "measured" if chips.measured()["tflops"] else "published"
    if measures and given["model"] in BUNDLED:
        return _measured_rate(given["model"]), "measured"
    return None, None


@lru_cache
def _measured_rate(model: str) -> float:
    row = denoising(plan(model, measure=True))
    return row.flop / (row.seconds or 1.0)


def denoising(found: Plan) -> Row:
    return next(row for row in found.rows if row.stage == "denoise")


def download_size(model: str) -> Answer:
    """What a model's files have in bytes, and how many are here; the hub is asked.

    Raises:
        WeightsError: it cannot be reached.
    """
    found = Places(model).downloads(options.named("source").left_out())
    return {"model": model, "bytes": sum(one.total for one in found), "bytes_here": sum(one.cached for one in found),
            "free_disk_bytes": min((one.free for one in found), default=None)}  # fmt: skip


def fits(models: list[str]) -> Answer:
    """Of each model with its defaults: whether it fits, its peak, what would help; and its recipes."""
    return {model: {**plan_of({"model": model}), "recipes": recipes_of(model)} for model in models}


def recipes_of(model: str) -> list[dict[str, Any]]:
    """The recipes for a released model, with the LoRAs that they go with; its own is not among them."""
    found = [recipe for recipe in RECIPES.values() if model in recipe.models and recipe.name != PRESETS[model].recipe]
    return [{"name": recipe.name, "about": recipe.about, "steps": recipe.steps, "files": list(recipe.files)}
            for recipe in found]  # fmt: skip


# Files


def look(path: str, may_be_folder: bool = True) -> Answer:
    """What a file that was sent is: decoded as a run would. A folder of several comes packed, or as one.

    Raises:
        ValueError: it is neither a picture, a video nor sound, nor a packed folder of these, or too large, or damaged.
    """
    file = Path(path)
    if may_be_folder and file.is_dir():
        return looked_into(file)
    try:
        with open_picture(file) as image:
            kind, still = str(image.format), getattr(image, "n_frames", 1) == 1
    except ValueError as error:
        if may_be_folder and is_packed(file):
            return looked_into(unpacked(file))
        try:
            clip = open_video(file)
        except ValueError:
            return _look_at_sound(file, error)
        ending = _video_ending(file)
    else:
        ending = PICTURE_ENDINGS[kind]
        if still:
            height, width, _ = read_image(file).shape
            return {"kind": "image", "ending": ending, "width": width, "height": height, "num_frames": 1,
                    "seconds": None}  # fmt: skip
        clip = open_video(file)
    return {"kind": "video", "ending": ending, "width": clip.width, "height": clip.height,
            "num_frames": clip.num_frames, "seconds": round(float(clip.times[-1, 1]), 3)}  # fmt: skip


def _look_at_sound(path: Path, error: ValueError) -> Answer:
    """What a file is that is no video: ``error`` tells what is wrong with it, unless it is sound."""
    try:
        seconds = sound_seconds(path)
    except ValueError:
        open_video(path)  # whose complaint is more likely to help
        raise error from None
    return {"kind": "audio", "ending": ".sound", "width": None, "height": None, "num_frames": None,
            "seconds": round(float(seconds), 3)}  # fmt: skip


def _video_ending(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(12)
    return ".mp4" if head[4:8] == b"ftyp" else ".webm" if head[:4] == b"\x1aE\xdf\xa3" else \
        ".avi" if head[:4] == b"RIFF" else ".mov"  # fmt: skip


def looked_into(folder: Path) -> Answer:
    """What a folder is, of which each file is looked at."""
    names = sorted(path.name for path in folder.iterdir())
    for name in names:
        look(str(folder / name), may_be_folder=False)
    return {"kind": "folder", "ending": FOLDER_ENDING, "files": names, "width": None, "height": None,
            "num_frames": None, "seconds": None}  # fmt: skip


def describe(paths: list[str]) -> Answer:
    """Size, length and settings of files, as far as they can be read: of each the error in their place otherwise."""
    return [_described(Path(path)) for path in paths]


def _described(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"settings": None, "made_with": None}
    try:
        made = read_settings(path)
    except ValueError:
        made = {}
    if "prompt" in made and "preview" not in made:
        found |= {"made_with": made, **wishes(made, path)}
        found |= {"width": made.get("width"), "height": made.get("height"), "num_frames": made.get("num_frames"),
                  "fps": made.get("fps")}  # fmt: skip
        return found
    try:
        about = look(str(path))
        found |= {name: about[name] for name in ("width", "height", "num_frames", "seconds")}
    except ValueError as error:
        found["error"] = str(error)
    return found


def wishes(made: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The settings of a video as options that may be asked for again, and a line about what has to be given apart."""
    left: list[str] = []
    rest = of_draft(made, full=False)
    for _ in range(8):
        try:
            found = given_flags(as_arguments(as_options(obeyed(rest, {}), path, {})))
            break
        except (UsageError, ValueError) as error:
            left.append(str(error))
            wrong = next((name for name in [*rest] if _is_place(name) and rest[name]), None)
            if wrong is None:
                return {"settings": None, "settings_note": left[0]}
            del rest[wrong]
    else:
        return {"settings": None, "settings_note": left[0]}
    found = {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}
    found = json.loads(json.dumps(found, default=str))
    for option in options.flags():
        if option.sets and (value := found.pop(option.key, None)):
            found |= zip(option.sets, value, strict=False)
    if isinstance(found.get("size"), list):
        found["size"] = "x".join(map(str, found["size"]))
    if found.get("width") and found.get("height"):
        found["size"] = f"{found.pop('width')}x{found.pop('height')}"
    return {"settings": found, "settings_note": "; ".join(left) or None}


def _is_place(name: str) -> bool:
    option = next((option for option in options.flags() if option.name == name), None)
    return option is not None and bool(option.place) and name != "model" or name in ("draft", "tiny_vae")


def poster(source: str, output: str) -> Answer:
    """A small picture of the first frame of a file, as WebP."""
    image = Image.fromarray(_frame(source, "first"))
    image.thumbnail((POSTER, POSTER))
    part = f"{output}.part"
    image.save(part, "WEBP", quality=80)
    os.replace(part, output)
    return True


def frame(source: str, which: str, output: str) -> Answer:
    """The first or the last frame of a file, whole, as PNG."""
    Image.fromarray(_frame(source, which)).save(output, "PNG")
    return True


def _frame(source: str, which: str) -> np.ndarray:
    clip = open_video(Path(source))
    return next(iter(clip.read([0 if which == "first" else clip.num_frames - 1])))


def forget(output: str) -> Answer:
    """Remove what is kept of an unfinished run.

    Raises:
        BusyError: it is at work.
    """
    with RunFolder(output) as folder:
        folder.delete()
    return True


ANSWERS: dict[str, Callable[..., Answer]] = {
    function.__name__: function
    for function in (facts, check, plan_of, download_size, fits, look, describe, poster, frame, forget)
}  # fmt: skip
OF_THE_HUB = ("download_size",)  # beside the others, which are not to wait for a network
SAYING = threading.Lock()


def main(words: list[str]) -> int:
    """Answer, in the library that is named."""
    (library,) = words
    os.chdir(library)
    logging.getLogger("wan_mlx").setLevel(logging.ERROR)
    questions: SimpleQueue[dict[str, Any]] = SimpleQueue()
    follow(questions.put)
    while True:
        question = questions.get()
        if question["what"] in OF_THE_HUB:
            threading.Thread(target=answer, args=(question,), daemon=True).start()
        else:
            answer(question)


def answer(question: dict[str, Any]) -> None:
    """Answer a question, whatever comes of it."""
    number, what = question.pop("ask"), question.pop("what")
    try:
        found = {"answer": number, "value": ANSWERS[what](**question)}
    except Exception as error:
        message, code = explain(error)
        kind = "does_not_fit" if isinstance(error, MemoryPlanError) else "invalid_value" if code == 2 else "failed"
        found = {"answer": number, "error": message, "code": kind}
    with SAYING:
        write(json.dumps(found, default=str))
