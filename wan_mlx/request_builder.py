"""The options of a call → a `Request` with every value filled in and checked."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import options
from .caching import resolve_cache
from .geometry import Geometry
from .guidance import check_guidance, zero_steps_of
from .models.configs import TransformerConfig
from .option import REQUEST
from .phases import check_steps, read_phases
from .presets import Preset
from .recipes import RECIPES, timesteps_of
from .tasks import fit_sources
from .types import Request

MAX_RANDOM_SEED = 2**31
FEWEST_OF_DRAFT = 8  # steps, if the video has as many
OF_RECIPE = ("steps", "guidance_scale", "shift", "solver", "phases")  # options that a recipe sets
# A preset's own recipe is taken if none of the former is given, and each of the latter is as if it were not.
OF_SAMPLING = (*OF_RECIPE, "recipe", "negative_prompt", "video")
OF_GUIDANCE = ("guidance_range", "cfg_zero", "skip_layers", "cache")
DEFAULT_STRENGTH = 0.7  # of video to video


def build_request(
    preset: Preset,
    config: TransformerConfig,
    geometry: Geometry,
    prompt: str,
    experts: int = 1,
    planned: bool = False,
    draft: bool = False,
    **given: Any,
) -> Request:
    """Fill in the preset's defaults and check every value.

    Args:
        preset: whose defaults are taken.
        config: the transformer's sizes.
        geometry: of the model's latents and tokens.
        prompt: may be empty only where it can be written out of a picture.
        experts: the number of the model's transformers.
        planned: for a plan, where all sources may be missing.
        draft: for a draft: half as wide and high, in a quarter of the steps.
        given: of `options.RequestOptions`; None is as if it were left out.

    Raises:
        TypeError: an option of no such name; names the nearest.
        ValueError: a value is wrong; names the nearest valid one. A source is missing, or not for this model.
    """
    if prompt is None or (isinstance(prompt, str) and not prompt.strip()):
        prompt = preset.prompt or prompt
    values = options.filled(REQUEST, {"prompt": prompt, **given})
    for option in options.of(REQUEST):
        option.check_type(values[option.name])
    given = {name: values[name] for name, value in given.items() if value is not None}
    usual = options.filled(REQUEST, {"prompt": prompt})
    said_how = any(name in given for name in OF_SAMPLING) or any(values[n] != usual[n] for n in OF_GUIDANCE)
    if preset.recipe and not said_how:
        given["recipe"] = preset.recipe
    if recipe := given.get("recipe"):
        options.named("recipe").check(recipe)
        RECIPES[recipe].check_model(preset)
        bound = {name: given.get(name) for name in OF_RECIPE}
        given |= RECIPES[recipe].fill(**bound)
    values |= {name: getattr(preset, name) for name in ("negative_prompt", "num_frames", "task")}
    values["model_fps"] = preset.fps
    sides = [given.pop(name, None) for name in ("size", "width", "height")]
    # Of a model that takes a size as an area it need not be one that videos have.
    sizes = replace(geometry, together=1)
    values["width"], values["height"] = size_of(preset, sizes, *sides)
    del values["size"]
    values |= {"strength": DEFAULT_STRENGTH if "video" in given else 1.0} | given
    sampling = vars(preset.sampling_for(values["width"], values["height"]))
    values |= sampling | given
    if values["seed"] is None or values["seed"] < 0:
        values["seed"] = secrets.randbelow(MAX_RANDOM_SEED)
    if isinstance(values["cfg_zero"], bool):
        zero_steps = zero_steps_of(values["task"], values["image"] is not None)
        values["cfg_zero"] = zero_steps if values["cfg_zero"] else None
    for name in ("src_ref_images", "guidance_range", "skip_layers", "skip_range"):
        values[name] = tuple(values[name])
    values["fps"], values["interpolate"] = _rate(preset.fps, values["fps"], values["interpolate"])
    values["guidance_scale"] = _guidance(values["guidance_scale"], experts)
    values["phases"] = ",".join(map(str, read_phases(values["phases"]))) or None
    request = Request(**values, geometry=geometry)
    full_steps = request.steps
    if draft and request.recipe is None:
        request = replace(request, steps=min(full_steps, max(FEWEST_OF_DRAFT, math.ceil(full_steps / 4))))
    check_request(request, may_be_empty=preset.cinematic and request.image is not None)
    check_guidance(request, config.num_layers)
    check_phases(request, experts)
    request = replace(request, cache=resolve_cache(request.cache, request.steps_made, preset.name, config))
    request = fit_sources(request, preset, planned)
    if request.interpolate and request.num_frames == 1:
        raise ValueError("one frame has none between; leave out fps and interpolate, or make a video")
    if request.interpolate and request.clips > 1:
        raise ValueError(f"a video of {request.clips} clips gets no frames between while it is made; leave out fps and "
                         "interpolate, and smooth it when it is made")  # fmt: skip
    return halved(request, full_steps) if draft else request


def _rate(model_fps: int, fps: int | None, interpolate: str | Path | None) -> tuple[int, str | None]:
    """The file's frames a second, and what makes those that the model does not, if there are such.

    Raises:
        ValueError: fewer are asked for than the model makes, or none beside them are to be made.
    """
    options.named("fps").check(fps)
    fps = fps or model_fps * (2 if interpolate else 1)
    if fps < model_fps:
        raise ValueError(f"fps is {fps}, but the model makes {model_fps} frames a second, and none is left out; "
                         f"nearest: {model_fps}")  # fmt: skip
    if fps == model_fps and interpolate:
        raise ValueError(f"fps is {fps}, the model's own, so that interpolate adds nothing; leave out one "
                         f"of the two; nearest: {2 * fps}")  # fmt: skip
    return fps, str(interpolate or "rife") if fps > model_fps else None


def halved(request: Request, steps: int) -> Request:
    """The draft of a video of so many ``steps``: of half its width and height, or a little less where that is no size.

    Raises:
        ValueError: nothing would be left.
    """
    width, height, side = request.width, request.height, request.geometry.side
    half = width // 2 // side * side, height // 2 // side * side
    if not all(half):
        raise ValueError(f"a draft is half as wide and high as its video, which is {width}x{height}, expected at least "
                         f"{2 * side}x{2 * side}")  # fmt: skip
    return replace(request, width=half[0], height=half[1], draft_of=(width, height, steps))


def size_of(
    preset: Preset, geometry: Geometry, size: str | tuple[int, int] | None, width: int | None, height: int | None
) -> tuple[int, int]:
    """The width and height that are asked for: by a size or its name, by sides, or else the model's own.

    Raises:
        ValueError: both are given.
    """
    if size is None:
        return (preset.size[0] if width is None else width), (preset.size[1] if height is None else height)
    if width is not None or height is not None:
        raise ValueError(f"size is {size!r}, and width or height is given too; leave one out")
    return geometry.named_size(size, preset.size) if isinstance(size, str) else (size[0], size[1])


def _guidance(scale: float | Sequence[float], experts: int) -> float | tuple[float, float]:
    """One scale, or the low-noise and the high-noise expert's where they differ."""
    if not isinstance(scale, Sequence):
        return scale
    low, high = scale
    if low == high:
        return low
    if experts == 1:
        raise ValueError(f"guidance_scale is {low:g},{high:g}, but this model has one transformer, not a low-noise and "
                         f"a high-noise expert; expected one number, such as {low:g}")  # fmt: skip
    return low, high


def check_phases(request: Request, experts: int) -> None:
    """Raise ValueError if the phases do not suit the steps or the model's number of transformers."""
    phases = read_phases(request.phases)
    if experts == 1 and any(phase.expert for phase in phases):
        raise ValueError(f"the phases {request.phases} name an expert, but this model has one transformer; leave "
                         "high and low out, or choose a model of two (t2v-A14B, i2v-A14B)")  # fmt: skip
    check_steps(phases, timesteps_of(request) if phases else ())
    if request.cache not in ("none", None) and len({phase.loras for phase in phases}) > 1:
        raise ValueError(f"the phases {request.phases} change the LoRAs, and what the cache {request.cache} keeps is "
                         "of those before; leave one of the two out")  # fmt: skip


def check_request(request: Request, may_be_empty: bool = False) -> None:
    """Raise ValueError, with the nearest valid choice, if a value cannot be used; ``may_be_empty``: the prompt."""
    if not (request.prompt or "").strip() and not may_be_empty:
        raise ValueError("the prompt is empty; say what the video should show")
    fitted = request.task == "s2v" and request.fit == "official"
    (replace(request.geometry, together=1) if fitted else request.geometry).check_size(request.width, request.height)
    request.geometry.check_frames(request.num_frames)
    least = {"strength": f"{1 / max(1, request.steps):g}"}
    for option in options.of(REQUEST):
        option.check(getattr(request, option.name, None), least.get(option.name))  # a size is its two sides there
    if request.begin == request.steps:
        raise ValueError(
            f"strength {request.strength:g} of {request.steps} steps is not one step; "
            f"nearest: strength {1 / request.steps:.2g}"
        )
    if request.strength != 1 and request.video is None:
        raise ValueError(f"strength is {request.strength:g}, but there is no video to start from; give a video")
