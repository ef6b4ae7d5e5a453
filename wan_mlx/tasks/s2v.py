"""Speech to video (Wan2.2 S2V): a picture speaks or sings what is heard, perhaps in the poses of a video.

Follows the official ``wan/speech2video.py``: the video is made in clips of ``infer_frames``. Each is sampled from
a noise of its own seed, goes on from the last 73 frames before it, and hears its part of the sound. The first clip goes
on from nothing, and is shorter by 3 frames, or with ``start_from_ref`` goes on from the picture.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

import mlx.core as mx
import numpy as np
from PIL import Image

from ..geometry import Geometry
from ..media.interpolate import even_rate
from ..media.read import Clip, in_chunks, open_video, read_image, to_float
from ..media.speech import RATE, frames_spoken, read_sound, sound_notes, sound_seconds
from ..models.audio_encoder import frames_heard
from ..models.s2v import MOTION_FRAMES, MOTION_LATENTS
from ..noise import latent_noise
from ..types import Conditioning, Encoders, Request
from . import t2v
from .canvas import drawn

log = logging.getLogger(__name__)

FRAMES = 77  # of one clip alone
LEFT_OUT = 3  # of the first clip, which has nothing before it
AS_BEFORE = 6  # with ``start_from_ref`` so many frames before the first clip are the picture
# Of the audio encoder, of its features as the official code uses them, and of the video, a second.
STATES_RATE, FEATURES_RATE, FPS = 50, 30, 16
TRIES = 100
BLACK, GREY = -1.0, 0.0


def output_size(image_size: tuple[int, int], area: int, geometry: Geometry) -> tuple[int, int]:
    """(width, height) in pixels: those of ``image_size`` (width, height), or smaller where ``area`` is, each rounded up
    to what is allowed: the largest of a hundred scales at which that fits the area.

    Raises:
        ValueError: the image is so narrow that nothing would be left of it.
    """
    width, height = image_size
    pixels, side, below = width * height, geometry.side, geometry.side - 1
    least, most = 0.1, 1.0
    if pixels > area:
        # The smallest scale at which the area is enough whatever is added, and the one at which nothing is added.
        along = below * (width + height)
        least = (-along + math.sqrt(along**2 - 4 * pixels * (below**2 - area) / 2)) / (2 * pixels)
        most = math.sqrt(area / pixels)
    for number in range(TRIES):
        scale = most - (most - least) * number / TRIES
        columns, rows = (-(-int(length * scale) // side) * side for length in image_size)
        if rows * columns <= area:
            break
    else:
        columns, rows = (int(math.sqrt(area * ratio) // side * side) for ratio in (width / height, height / width))
        if columns >= width or rows >= height:
            columns, rows = width // side * side, height // side * side
    if not (rows and columns):
        raise ValueError(f"an image of {width}x{height} is too narrow for a video of {area} pixels; crop it")
    return columns, rows


def fit(request: Request) -> Request:
    """The request with a size that fits its picture, unless ``fit`` keeps its size, and the length of its sound."""
    for name, source in (("image", request.image), ("audio", request.audio)):
        if source is None:
            raise ValueError(f"speech to video needs a picture and its sound: give the {name} with --{name} FILE (in "
                             f"Python {name}=)")  # fmt: skip
    assert request.audio is not None, "it is given"
    if request.infer_frames % request.geometry.temporal:
        nearest = max(1, round(request.infer_frames / request.geometry.temporal)) * request.geometry.temporal
        raise ValueError(f"infer_frames is {request.infer_frames}, expected a multiple of {request.geometry.temporal}; "
                         f"nearest: {nearest}")  # fmt: skip
    if request.fps != request.model_fps:
        raise ValueError(f"fps is {request.fps}, but clips are made at {request.model_fps}; leave it out, and "
                         "smooth the finished video, which keeps its sound")  # fmt: skip
    if request.num_frames != FRAMES:
        log.warning("frames is %d, but a video of speech is as long as its sound; num_clip makes it shorter",
                    request.num_frames)  # fmt: skip
    if request.pose_video is not None:
        open_video(request.pose_video, request.fps)
    height, width = read_image(request.image).shape[:2]
    heard = _features_heard(len(read_sound(request.audio)))
    if not heard:
        raise ValueError(f"the sound of {request.audio} is shorter than a video's frame; give a longer one")
    clips = int(heard / (request.infer_frames * FEATURES_RATE / FPS)) + 1
    request = replace(request, source_sizes={"image": (width, height)})
    request = in_clips(request, min(clips, request.num_clip or clips))
    if request.fit != "official":
        return request
    width, height = output_size((width, height), request.width * request.height, request.geometry)
    return replace(request, width=width, height=height)


def planned(request: Request) -> Request:
    """The request without sources, for a plan: of a picture of its size, and as many clips as it asks for."""
    size = request.width, request.height
    width, height = output_size(size, size[0] * size[1], request.geometry) if request.fit == "official" else size
    return replace(in_clips(request, request.num_clip or 1), width=width, height=height)


def in_clips(request: Request, clips: int) -> Request:
    frames = clips * request.infer_frames - LEFT_OUT * (not request.start_from_ref)
    return replace(request, clips=clips, clip_frames=request.infer_frames, num_frames=frames)


def notes(request: Request) -> list[str]:
    """Lines about a sound that is not what the model is used to, or ends before the clips that are made of it."""
    path = request.speech
    assert path is not None, "`fit` refuses that"
    lines, frames = sound_notes(path), frames_spoken(path, request.fps)
    if frames < request.num_frames:
        seconds = f"{float(sound_seconds(path)):.3g} s"
        lines.append(f"{path.name} lasts {seconds}: an .mp4 has {frames} of the {request.num_frames} frames")
    return lines


def encodes(request: Request) -> list[int]:
    """Lengths of the videos that are encoded for a clip: the picture, the frames before it, and its poses."""
    before = [MOTION_FRAMES] * (request.clips > 1 or request.start_from_ref)
    return [1, *before, *([1 + request.infer_frames] * (request.pose_video is not None))]


def condition(request: Request, encoders: Encoders) -> Conditioning:
    """Texts and noise, what is heard, and the latents of the picture, of the poses, and of the frames before."""
    base = t2v.condition(request, encoders)
    assert request.audio is not None, "`fit` refuses that"
    states = encoders.encode_audio(mx.array(read_sound(request.audio)))
    picture = _picture(request)
    (reference,) = encoders.encode_videos([in_chunks([picture], request.geometry)])
    base = replace(
        base,
        audio=mx.array(_heard(np.array(states), request.clips * request.infer_frames))[None],
        reference=reference,
        trim_frames=1 + LEFT_OUT,  # the reference, after which the clip is decoded
    )
    first = _kept(request, picture) if request.start_from_ref or _needs_older(request) else None
    return _in_clip(base, request, encoders, first if request.start_from_ref else None, first)


def following(
    request: Request, encoders: Encoders, conditioning: Conditioning, frames: np.ndarray
) -> Conditioning:
    """That of the clip after another, with whose last frames, float32 (n, H, W, 3) in [-1, 1], decoding ended."""
    made = request.infer_frames - LEFT_OUT * (conditioning.motion is None)
    if made < MOTION_FRAMES:
        assert conditioning.last_frames is not None, "they are kept where they are needed"
        frames = np.concatenate([np.array(conditioning.last_frames)[made:], frames[-made:]])
    following = replace(conditioning, clip=conditioning.clip + 1)
    return _in_clip(following, request, encoders, frames, frames)


def last_frames(request: Request) -> int:
    """How many frames of a clip the next one goes on from."""
    return MOTION_FRAMES


def frames_kept(request: Request) -> int:
    """How many of the frames before a clip are kept beside it, for the next one to go on from as well."""
    return MOTION_FRAMES if request.clips > 1 and _needs_older(request) else 0


def latents_before(request: Request) -> int:
    """How many latent frames are decoded before a clip's."""
    return MOTION_LATENTS if request.clips > 1 or request.start_from_ref else 1


def before(conditioning: Conditioning) -> mx.array:
    """The latents that are decoded before the clip's."""
    found = conditioning.reference if conditioning.motion is None else conditioning.motion
    assert found is not None, "every clip has a reference"
    return found


def _in_clip(
    base: Conditioning, request: Request, encoders: Encoders, motion: np.ndarray | None, last: np.ndarray | None
) -> Conditioning:
    """``base`` for the clip that it names, with the latents of the frames before it, and of poses, if there are such.
    """
    clip, length = base.clip, request.infer_frames
    videos: dict[str, Iterable[np.ndarray]] = {}
    if motion is not None:
        videos["motion"] = motion
    if request.pose_video is not None:
        videos["pose"] = _poses(request, clip)
    encoded = encoders.encode_videos([in_chunks(video, request.geometry) for video in videos.values()])
    found = dict(zip(videos, encoded, strict=True))
    poses = found.get("pose")
    is_needed = _needs_older(request) and clip + 1 < request.clips
    return replace(
        base,
        motion=found.get("motion"),
        pose=None if poses is None else poses[:, 1:],
        noise=latent_noise(request.latent_shape, encoders.latent_channels, (request.seed + clip) % 2**64,
                           of=request.noise_size),
        heard=(clip * length, (clip + 1) * length),
        trim_frames=base.trim_frames if motion is None else MOTION_FRAMES,
        last_frames=mx.array(last) if is_needed and last is not None else None,
    )  # fmt: skip


def _needs_older(request: Request) -> bool:
    """Whether the 73 frames before a clip are of more clips than the last one."""
    return request.infer_frames - LEFT_OUT < MOTION_FRAMES


def _kept(request: Request, picture: np.ndarray) -> np.ndarray:
    """The frames before the first clip, float32 (73, H, W, 3): grey, and the last of them perhaps the picture."""
    frames = np.full((MOTION_FRAMES, *picture.shape), GREY, np.float32)
    if request.start_from_ref:
        frames[-AS_BEFORE:] = picture
    return frames


def _picture(request: Request) -> np.ndarray:
    """The picture, float32 (H, W, 3) in [-1, 1]: its shorter side is that of the video, whose middle it covers; what
    is beyond it is black."""
    image = read_image(request.image)
    if request.fit != "official":
        return to_float(drawn(image, request))
    rows, columns = _short_side(image.shape[:2], request)
    picture = np.asarray(Image.fromarray(image).resize((columns, rows), Image.Resampling.BILINEAR))
    return to_float(_centred(picture, request, 0))


def _poses(request: Request, clip: int) -> Iterator[np.ndarray]:
    """The poses of a clip, float32 (H, W, 3) in [-1, 1], its first one twice; after the last of the video, black."""
    source, length = open_video(request.pose_video, request.fps), request.infer_frames
    every = max(1, round(_rate(source) / FPS))
    first = min(clip * length * every, source.num_frames)
    numbers = range(first, source.num_frames, every)[:length]
    black = np.full((request.height, request.width, 3), BLACK, np.float32)
    shown = (_pose(frame, request) for frame in source.read(numbers))
    number = 0
    for number, frame in enumerate(shown, start=1):
        yield from [frame] * (2 if number == 1 else 1)
    yield from [black] * (length - number + (number == 0))


def _pose(frame: np.ndarray, request: Request) -> np.ndarray:
    rows, columns = _short_side(frame.shape[:2], request)
    pixels = frame.astype(np.float32) / 255 * 2 - 1
    channels = [Image.fromarray(channel).resize((columns, rows), Image.Resampling.BILINEAR)
                for channel in np.moveaxis(pixels, -1, 0)]  # fmt: skip
    return _centred(np.stack([np.asarray(channel) for channel in channels], axis=-1), request, GREY)


def _rate(clip: Clip) -> float:
    """Its frames a second, on average where they come unevenly."""
    starts = clip.times[:, 0]
    even = even_rate(starts)
    return float(even) if even else len(starts) / float(clip.times[-1, 1] - starts[0])


def _short_side(size: tuple[int, ...], request: Request) -> tuple[int, int]:
    """(height, width) of a picture of ``size`` whose shorter side is the video's shorter one."""
    short, (height, width) = min(request.height, request.width), size
    return (short, int(short * width / height)) if height <= width else (int(short * height / width), short)


def _centred(picture: np.ndarray, request: Request, beyond: float) -> np.ndarray:
    """The middle of a picture (H, W, 3), of the request's size; where it is smaller, ``beyond`` is at its sides."""
    for axis, wanted in enumerate((request.height, request.width)):
        there = picture.shape[axis]
        if there < wanted:
            sides = [(0, 0)] * 3
            sides[axis] = (wanted - there) // 2, (wanted - there + 1) // 2
            picture = np.pad(picture, sides, constant_values=beyond)
        else:
            first = round((there - wanted) / 2)
            picture = picture.take(range(first, first + wanted), axis)
    return picture


def states_heard(request: Request) -> int:
    """How many hidden states, 50 a second, the sound has, all of which is encoded, however much of it is used; without
    one, for a plan, those of the clips."""
    if request.audio is not None:
        return frames_heard(len(read_sound(request.audio)))
    return frames_heard(round(request.clips * request.infer_frames / FPS * RATE))


def _features_heard(samples: int) -> int:
    """Features of a sound of so many samples, 30 a second."""
    return int(frames_heard(samples) / float(STATES_RATE) * FEATURES_RATE)


def _heard(states: np.ndarray, frames: int) -> np.ndarray:
    """Hidden states (layers, n, width), 50 a second → (layers, frames, width), 16 a second; silence is all 0.

    Officially they come to 30 a second first, between their neighbours as PyTorch's ``align_corners`` has it; of those
    each frame takes the one nearest to it.
    """
    count = states.shape[1]
    features = int(count / float(STATES_RATE) * FEATURES_RATE)
    chosen = np.round(np.linspace(0, frames / FPS, frames, endpoint=False) * FEATURES_RATE).astype(int)
    chosen = chosen[chosen < features]
    step = np.float32(count - 1) / np.float32(features - 1) if features > 1 else np.float32(0)
    places = step * chosen.astype(np.float32)
    lower = places.astype(int)
    share = (places - lower.astype(np.float32))[:, None]
    upper = np.minimum(lower + 1, count - 1)
    heard = np.zeros((len(states), frames, states.shape[2]), np.float32)
    heard[:, : len(chosen)] = (1 - share) * states[:, lower] + share * states[:, upper]
    return heard
