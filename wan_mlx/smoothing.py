"""A video file made smoother: more frames a second, those between by RIFE, with its sound and its settings."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .errors import MemoryPlanError, size
from .events import Finished, Listener, Note, Progress, StageEnded
from .lasting import computes
from .mac import awake
from .media.interpolate import (
    Between,
    asked_fps,
    even_moments,
    even_rate,
    frames_at,
    interpolate,
    moments_of,
    near_rate,
    told_in,
)
from .media.read import Clip, open_video
from .media.sound import fits_mp4, sound_of
from .media.write import VideoWriter, check_output, read_settings
from .planning.machine import available_memory
from .planning.peak_memory import rife
from .planning.plan import FILL
from .progress_bars import progress_of
from .storage import place_of
from .weights.rife import NAME, find_rife, load_rife

# A first pass over the file finds the time of each of its frames.
STAGE = "smoothing"


@computes
def smooth(
    source: str | Path,
    output: str | Path | None = None,
    fps: float | None = None,
    times: int | None = None,
    weights: str | Path = NAME,
    overwrite: bool = False,
    progress: bool | Listener = True,
    hub: str = "huggingface",
) -> Path:
    """Write a video file with more frames a second: RIFE makes those between, two frames in memory at a time.

    Its own frames stay as they are decoded. Over a cut between scenes nothing is blended. An ``.mp4`` keeps the sound,
    copied as it is, where that fits into one; settings embedded by wan_mlx stay, and tell what was added.

    Args:
        source: any video or animation; also one whose frames do not come evenly.
        output: the file to write, whose ending picks the format, as `Video.save`; "in_32fps.mp4" if it is left out.
        fps: frames per second that it is to have, above those of ``source``.
        times: or how many times as many; without either, 2.
        weights: "rife" for RIFE 4.25, which is downloaded (23 MB); or a file of it, or one on a hub.
        overwrite: replace an existing file.
        progress: show how far it is; or a function, which then hears of it.
        hub: where from: "huggingface" or "modelscope".

    Returns:
        the path of the file.

    Raises:
        ValueError: no such file, no video, a single frame; the rate is not above its own; the output exists.
        WeightsError: the weights cannot be had or used.
        MemoryPlanError: frames of this size do not fit into memory.
    """
    return smooth_file(source, output, fps, times, weights, overwrite, progress_of(progress), hub).output


def smooth_file(
    source: str | Path, output: str | Path | None, fps: float | None, times: int | None, weights: str | Path,
    overwrite: bool, listener: Listener, hub: str,
) -> Finished:  # fmt: skip
    """As `smooth`; returns what can be told of it."""
    started, path = time.perf_counter(), Path(source)
    if output is not None:
        check_output(output, overwrite)  # before a film is decoded
    clip = open_video(path)
    if clip.num_frames < 2:
        raise ValueError(f"{path} has one frame, which has none to move to; expected a video")
    starts = clip.times[:, 0]
    even = even_rate(starts)
    rate = even or near_rate(clip.num_frames / float(clip.times[-1, 1]))
    asked = asked_fps(rate, fps, times, str(path))
    place = path.with_name(f"{path.stem}_{float(asked):.4g}fps.mp4") if output is None else Path(output)
    if place_of(place) == place_of(path):
        raise ValueError(f"output {place} is the video itself; choose another name")
    check_memory(clip)
    sound = _sound(path, place, listener)
    settings = told_in(_settings(path), asked, Path(weights).name)
    writer = VideoWriter(place, float(asked), (clip.width, clip.height), settings, overwrite, sound=sound)
    between = Between(load_rife(find_rife(weights, hub, listener)))
    total = frames_at(clip.num_frames, rate, asked) if even else len([*moments_of(starts, asked)])
    moments = even_moments(rate, asked) if even else moments_of(starts, asked)
    mx.reset_peak_memory()
    began = time.perf_counter()
    with awake(), writer:
        done = 0
        for frames in interpolate(_frames(clip), moments, between):
            writer.write(frames)
            done += len(frames)
            listener(Progress(STAGE, done, total))
    report = StageEnded(STAGE, time.perf_counter() - began, mx.get_peak_memory())
    told = f"{clip.num_frames} frames at {float(rate):.4g} fps, {done} at {float(asked):.4g}"
    if between.cuts:
        told += f"; {between.cuts} cut{'s' * (between.cuts > 1)} between scenes, over which nothing is blended"
    listener(Note(f"{told}; peak {size(report.peak_bytes)}"))
    return Finished(place, time.perf_counter() - started, reports=[report])


def check_memory(clip: Clip) -> None:
    """Raise MemoryPlanError if frames of this size do not fit."""
    needed, there = rife(clip.width, clip.height), available_memory()
    if needed > FILL * there:
        raise MemoryPlanError(
            f"{clip.name} is {clip.width}x{clip.height}: RIFE needs about {size(needed)} for it, and {size(there)} are "
            "free; close other programs, or make the video smaller first"
        )


def _frames(clip: Clip) -> Iterator[np.ndarray]:
    """Each frame as a chunk (1, H, W, 3)."""
    return (frame[None] for frame in clip.read(range(clip.num_frames)))


def _sound(source: Path, output: Path, listener: Listener) -> Path | None:
    """The file whose sound the output gets, if it has sound that fits; what is left out is told."""
    codec = sound_of(source)
    if codec is None:
        return None
    if output.suffix.lower() == ".mp4" and fits_mp4(source):
        return source
    listener(Note(f"the sound ({codec}) is left out: {output.suffix} holds none such", important=True))
    return None


def _settings(source: Path) -> dict[str, Any]:
    """Those that wan_mlx embedded; empty if another program made the file."""
    try:
        found = read_settings(source)
    except ValueError:
        return {}
    return found if "versions" in found else {}
