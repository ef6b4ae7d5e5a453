"""Tasks: each turns a `Request` into the `Conditioning` of the sampling loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..presets import Preset, model_for
from ..types import SOURCE_FIELDS, Conditioning, Encoders, Request
from . import animate, canvas, fun, i2v, s2v, t2v, ti2v, vace

__all__ = ["TASKS", "Clips", "Task", "fit_sources", "notes"]


@dataclass(frozen=True)
class Clips:
    """How one kind of model makes a video in clips, of which each goes on from the one before.

    Attributes:
        following: Request, encoders, Conditioning of a clip, and its last frames float32 (n, H, W, 3) in [-1, 1] →
            Conditioning of the next.
        last_frames: Request → how many of a clip's last frames the next one is made from.
        before: Conditioning → latents to decode before the clip's, which then follow smoothly.
        latents_before: Request → how many these are at most.
    """

    following: Callable[[Request, Encoders, Conditioning, np.ndarray], Conditioning]
    last_frames: Callable[[Request], int]
    before: Callable[[Conditioning], mx.array] | None = None
    latents_before: Callable[[Request], int] = lambda request: 0


@dataclass(frozen=True)
class Task:
    """How one kind of model serves a request.

    Attributes:
        condition: Request and encoders → Conditioning.
        takes: the sources, and their scales, that it accepts; others are refused.
        fit: Request → the same with size and length taken from its sources.
        encodes: Request → the number of frames of each video that ``condition`` has encoded, for plans.
        clips: how a video is made in clips, if it is.
        planned: Request without sources → the same as it is planned.

    ``condition`` and ``fit`` raise ValueError if a source is missing, cannot be read or does not suit the request.
    """

    condition: Callable[[Request, Encoders], Conditioning]
    takes: tuple[str, ...]
    fit: Callable[[Request], Request]
    encodes: Callable[[Request], list[int]] = t2v.encodes
    clips: Clips | None = None
    planned: Callable[[Request], Request] = lambda request: request


TASKS: dict[str, Task] = {
    "t2v": Task(t2v.condition, ("video", "src_mask"), t2v.fit),
    "i2v": Task(i2v.condition, ("image",), i2v.fit, i2v.encodes),
    "flf2v": Task(i2v.condition, ("image", "last_image"), i2v.fit_first_and_last, i2v.encodes),
    "ti2v": Task(ti2v.condition, ("image", "video", "src_mask"), ti2v.fit, ti2v.encodes),
    "inp": Task(fun.condition_frames, ("image", "last_image"), fun.fit_frames, fun.encodes_frames),
    "control": Task(
        fun.condition_control, ("src_video", "src_ref_images", "image", "last_image"), fun.fit_control,
        fun.encodes_control,
    ),
    "animate": Task(
        animate.condition, ("src_root_path", "refert_num", "replace_flag"), animate.fit, animate.encodes,
        Clips(animate.following, animate.last_frames),
    ),
    "s2v": Task(
        s2v.condition, ("image", "audio", "pose_video", "num_clip", "infer_frames", "start_from_ref"), s2v.fit,
        s2v.encodes, Clips(s2v.following, s2v.last_frames, s2v.before, s2v.latents_before), s2v.planned,
    ),
    "vace": Task(vace.condition, ("src_video", "src_mask", "src_ref_images", "context_scale"), vace.fit, vace.encodes),
}


def fit_sources(request: Request, preset: Preset, planned: bool = False) -> Request:
    """The request with size and length taken from its sources.

    Args:
        preset: of the model that is asked.
        planned: for a plan, where all sources may be missing.

    Raises:
        ValueError: a source is missing, cannot be read, or does not belong to this task.
    """
    task = TASKS[request.task]
    absent: dict[str, Any] = {name: None for name in (*SOURCE_FIELDS, "num_clip")}
    absent |= {"src_ref_images": (), "context_scale": 1.0, "infer_frames": 80, "start_from_ref": False}
    absent |= {"refert_num": 1, "replace_flag": False}
    for name, nothing in absent.items():
        source = getattr(request, name)
        given = source is not None if nothing is None else source != nothing
        if given and name not in task.takes:
            users = [other for other, row in TASKS.items() if name in row.takes]
            raise ValueError(
                f"{name} was given to a {request.task} model, which takes {', '.join(task.takes)}; it is for "
                f"{', '.join(users)}: use --model {model_for(users, preset).name}"
            )
    if planned and not request.has_sources:
        return task.planned(request)
    fitted = task.fit(request)
    if request.fit != "official" and not fitted.source_sizes:
        raise ValueError(f"fit is {request.fit}, but there is no picture or video to fit; give one, or leave it out")
    return fitted


def notes(request: Request) -> list[str]:
    """Lines about sources that are not taken whole, or as they are."""
    return [*canvas.notes(request), *(s2v.notes(request) if request.audio is not None else [])]
