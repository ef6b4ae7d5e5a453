"""Animate: a person in a picture moves as one in a video does, or takes that one's place in it (Wan2.2 Animate-14B).

Follows the official ``wan/animate.py``, from a folder that the official preprocessing prepares. A video is made in
clips: each begins with the last frames of the one before, as they were decoded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..errors import some
from ..media.read import Clip, in_chunks, open_video, read_image, to_float
from ..noise import latent_noise
from ..resize import resize_bilinear
from ..types import PREPARED, Conditioning, Encoders, Request
from . import t2v
from .canvas import drawn

REFERENCE = "src_ref.png"
LAST_FRAMES = (1, 5)  # how many of a clip the next one may begin with
FACE_SIDE = 512


def fit(request: Request) -> Request:
    """The request with the size and length of its folder's video of poses, in as many clips as that takes."""
    if request.src_root_path is None:
        raise ValueError("Animate needs a folder that the official preprocessing prepared: give it with "
                         "--src_root_path DIR (in Python src_root_path=)")  # fmt: skip
    if request.refert_num not in LAST_FRAMES:
        raise ValueError(f"refert_num is {request.refert_num}, expected 1 or 5: so many frames of a clip begin the "
                         "next one")  # fmt: skip
    if request.num_frames <= request.refert_num:
        raise ValueError(f"frames is {request.num_frames}, expected more than refert_num, which is "
                         f"{request.refert_num}; nearest: {request.geometry.num_frames(3)}")  # fmt: skip
    clips = open_folder(request)
    poses = clips["src_pose"]
    try:
        request.geometry.check_size(poses.width, poses.height)
    except ValueError as error:
        raise ValueError(f"{poses.name} sets the size of the video: {error}; prepare the folder again") from None
    if poses.num_frames <= request.refert_num:
        raise ValueError(f"{poses.name} has {poses.num_frames} frames, expected more than the {request.refert_num} "
                         "that a clip begins with")  # fmt: skip
    new = request.num_frames - request.refert_num  # frames in each clip but the first
    return replace(
        request,
        width=poses.width,
        height=poses.height,
        num_frames=poses.num_frames,
        clip_frames=request.num_frames,
        clips=max(1, -(-(poses.num_frames - request.refert_num) // new)),
    )


def open_folder(request: Request) -> dict[str, Clip]:
    """The videos of a prepared folder, by their names without ending.

    Raises:
        ValueError: one is missing or cannot be read, or their sizes or lengths differ.
    """
    folder = Path(str(request.src_root_path))
    if not folder.is_dir():
        raise ValueError(f"src_root_path {folder} is no folder; expected one with {', '.join(_wanted(request))}")
    if missing := [name for name in _wanted(request) if not (folder / name).is_file()]:
        hint = " (src_bg.mp4 and src_mask.mp4 are prepared with --replace_flag)" * any("bg" in one for one in missing)
        raise ValueError(f"{folder} lacks {some(missing)}, which the official preprocessing writes{hint}")
    read_image(folder / REFERENCE)
    videos = [name for name in _wanted(request) if name != REFERENCE]
    clips = {name.removesuffix(".mp4"): open_video(folder / name, request.model_fps) for name in videos}
    poses = clips["src_pose"]
    for name, clip in clips.items():
        if clip.num_frames != poses.num_frames:
            raise ValueError(f"{clip.name} has {clip.num_frames} frames, expected {poses.num_frames} as {poses.name}")
        width, height = (FACE_SIDE,) * 2 if name == "src_face" else (poses.width, poses.height)
        if (clip.width, clip.height) != (width, height):
            wanted = f"{width}x{height}{'' if name == 'src_face' else f' as {poses.name}'}"
            raise ValueError(f"{clip.name} is of {clip.width}x{clip.height} pixels, expected {wanted}")
    return clips


def _wanted(request: Request) -> tuple[str, ...]:
    return PREPARED if request.replace_flag else PREPARED[:3]


def encodes(request: Request) -> list[int]:
    """Lengths of the videos that are encoded for each clip: the reference image, the poses, and what is known."""
    frames = request.clip_frames or request.num_frames
    return [1, frames, frames]


def last_frames(request: Request) -> int:
    """How many of a clip's last frames begin the next one."""
    return request.refert_num


def condition(request: Request, encoders: Encoders) -> Conditioning:
    """Texts, and of the first clip noise, and latents of the reference image, the poses and what is known; the face."""
    base = t2v.condition(request, encoders, extra_latents=1)
    picture = read_image(Path(str(request.src_root_path)) / REFERENCE)
    reference = to_float(letterbox(picture, request.height, request.width))
    features = encoders.encode_images(mx.array(reference)[None])
    (latents,) = encoders.encode_videos([in_chunks([reference], request.geometry)])
    given = mx.concatenate([mx.ones((*latents.shape[:-1], request.geometry.temporal)), latents], axis=-1)
    base = replace(base, image_features=features, trim_latents=1, condition=given)
    return _of_clip(request, encoders, base, 0, np.zeros((0, request.height, request.width, 3), np.float32))


def following(request: Request, encoders: Encoders, before: Conditioning, last: np.ndarray) -> Conditioning:
    """The same of the next clip, which begins with the ``last`` frames, float32 (n, H, W, 3) in [-1, 1]."""
    number, (_, *shape, channels) = before.clip + 1, before.noise.shape
    t, h, w = shape
    noise = latent_noise((t, h, w), channels, request.seed, earlier=number, of=request.noise_size)
    return _of_clip(request, encoders, replace(before, noise=noise), number, last)


def _of_clip(
    request: Request, encoders: Encoders, base: Conditioning, number: int, known: np.ndarray
) -> Conditioning:
    """``base`` with what is of clip ``number``; the first latent frame of its ``condition`` is the reference's."""
    clips, count = open_folder(request), request.clip_frames or request.num_frames
    first = number * (count - request.refert_num)
    numbers = bounced(request.num_frames, first, count)
    size = request.height, request.width
    poses = (to_float(drawn(frame, request)) for frame in _frames(clips["src_pose"], numbers))
    unknown: Iterable[np.ndarray] = repeat(np.zeros((*size, 3), np.float32), count - len(known))
    mask = np.zeros((count, *request.latent_shape[1:]), np.float32)
    if request.replace_flag:
        scenes = _frames(clips["src_bg"], numbers[len(known) :])
        unknown = (to_float(drawn(frame, request)) for frame in scenes)
        mask = np.stack([_background(drawn(frame, request), request) for frame in _frames(clips["src_mask"], numbers)])
    mask[: len(known)] = 1
    videos = [in_chunks(video, request.geometry) for video in (poses, chain(known, unknown))]
    pose, latents = encoders.encode_videos(videos)
    faces = (to_float(frame) for frame in _frames(clips["src_face"], numbers))
    face, blank = encoders.encode_face(faces, blank=base.negative_context is not None)
    assert base.condition is not None, "the reference image is there"
    given = mx.concatenate([_channels(mask, request), latents], axis=-1)
    return replace(
        base,
        condition=mx.concatenate([base.condition[:, :1], given], axis=1),
        pose=pose,
        face=face,
        negative_face=blank,
        trim_frames=len(known),
    )


def bounced(length: int, first: int, count: int) -> list[int]:
    """Numbers of the frames ``first`` to ``first + count`` of a video that goes back and forth after its ``length``."""
    period = max(1, 2 * (length - 1))
    places = (number % period for number in range(first, first + count))
    return [place if place < length else period - place for place in places]


def _frames(clip: Clip, numbers: Sequence[int]) -> Iterator[np.ndarray]:
    """Frames of a clip in any order, uint8 (H, W, 3)."""
    rising = sorted({*numbers})
    if rising == [*numbers]:
        yield from clip.read(rising)
        return
    held = dict(zip(rising, clip.read(rising), strict=True))
    yield from (held[number] for number in numbers)


def _background(mask: np.ndarray, request: Request) -> np.ndarray:
    """float32 (h, w), how far each latent is not the person: by the pixel at its corner, as in the official code."""
    side = request.geometry.spatial
    return 1 - mask[::side, ::side, 0].astype(np.float32) / 255


def _channels(mask: np.ndarray, request: Request) -> mx.array:
    """A mask (T, h, w) → (1, t, h, w, 4): a latent frame's channels are its frames, the first one repeated."""
    temporal = request.geometry.temporal
    mask = np.concatenate([mask[:1].repeat(temporal - 1, axis=0), mask])
    return mx.array(np.moveaxis(mask.reshape(-1, temporal, *mask.shape[1:]), 1, -1))[None]


def letterbox(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """An image as large as fits into the middle of a black one: uint8 (H, W, 3) → (height, width, 3)."""
    old_height, old_width = image.shape[:2]
    rows, columns = height, width
    if old_height / old_width > height / width:
        columns = int(height / old_height * old_width)
    else:
        rows = int(width / old_width * old_height)
    if not (rows and columns):
        raise ValueError(f"{REFERENCE} of {old_width}x{old_height} is too narrow for {width}x{height}; crop it")
    top, left = (height - rows) // 2, (width - columns) // 2
    canvas = np.zeros((height, width, 3), np.uint8)
    inside = resize_bilinear(image, rows, columns)
    canvas[top : top + rows, left : left + columns] = np.floor(inside + np.float32(0.5))
    return canvas
