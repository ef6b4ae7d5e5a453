"""Alibaba PAI's Fun models, made from Wan2.2. Fun-InP makes a video of its first frame, its last, both or none;
Fun-Control one that follows a control video, such as edges, depth or poses, and perhaps these frames and a picture of
what it should look like.

Follows VideoX-Fun's ``pipeline_wan2_2_fun_inpaint.py`` and ``pipeline_wan2_2_fun_control.py``, and its
``get_image_to_video_latent``, which stretches pictures with Pillow. Unlike there a size has the proportions of its
source, a control video is cropped, not stretched, and a last frame may be given alone.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import replace

import mlx.core as mx
import numpy as np
from PIL import Image

from ..media.read import at_rate, in_chunks, open_video, read_image, to_float
from ..types import Conditioning, Encoders, Request, Source
from . import i2v, t2v
from .canvas import drawn

# From this many pixels a latent on, the first frame's latents stay as they are given: the models of 5B.
KEPT_FROM = 16


def fit_frames(request: Request) -> Request:
    """The request with the proportions of its first or else last frame, if one is given, unless ``fit`` keeps its size.
    """
    request = replace(request, source_sizes=_sizes(image=request.image, last_image=request.last_image))
    _check_room(request)
    return _fitted(request, *request.source_sizes.values())


def fit_control(request: Request) -> Request:
    """The request with the proportions and at most the length of its control video."""
    if request.src_video is None:
        raise ValueError("Fun-Control needs a control video: give it with --src_video FILE (in Python src_video=)")
    if len(request.src_ref_images) > 1:
        raise ValueError(f"{len(request.src_ref_images)} reference images were given; Fun-Control takes one")
    clip, geometry = open_video(request.src_video, request.fps), request.geometry
    frames = len(at_rate(clip, request.fps, request.num_frames))
    (reference,) = request.src_ref_images or (None,)
    sizes = _sizes(image=request.image, last_image=request.last_image, reference_image=reference)
    request = replace(
        request,
        num_frames=geometry.num_frames(geometry.latent_frames(frames)),
        source_sizes={"src_video": (clip.width, clip.height), **sizes},
    )
    _check_room(request)
    return _fitted(request, (clip.width, clip.height))


def _sizes(**pictures: Source | None) -> dict[str, tuple[int, int]]:
    """(width, height) of the pictures that are given."""
    given = {name: read_image(picture) for name, picture in pictures.items() if picture is not None}
    return {name: (picture.shape[1], picture.shape[0]) for name, picture in given.items()}


def _check_room(request: Request) -> None:
    least = request.geometry.num_frames(latent_frames=2)
    if request.image is not None and request.last_image is not None and request.num_frames < least:
        raise ValueError(f"frames is {request.num_frames}, expected room for a first and a last one; nearest: {least}")


def _fitted(request: Request, *sizes: tuple[int, int]) -> Request:
    if request.fit != "official" or not sizes:
        return request
    width, height = i2v.output_size(sizes[0], request.width * request.height, request.geometry)
    return replace(request, width=width, height=height)


def encodes_frames(request: Request) -> list[int]:
    """The lengths of the videos that are encoded."""
    return [request.num_frames] * (request.image is not None or request.last_image is not None)


def encodes_control(request: Request) -> list[int]:
    """The same, with the control video, and a still for the reference image."""
    return [request.num_frames, *encodes_frames(request), *([1] * len(request.src_ref_images))]


def condition_frames(request: Request, encoders: Encoders) -> Conditioning:
    """Texts, noise, and the latents of a video that has the given frames, and grey between; zeros if none is given."""
    base = t2v.condition(request, encoders)
    known = _known(request)
    videos = [in_chunks(i2v.filled(known, request), request.geometry)] if known else []
    latents = encoders.encode_videos(videos)[0] if known else mx.zeros_like(base.noise)
    return _with_frames(base, request, known, latents)


def condition_control(request: Request, encoders: Encoders) -> Conditioning:
    """The same, with the latents of the control video, and those of the reference image; zeros if there is none."""
    base = t2v.condition(request, encoders)
    known, clip = _known(request), open_video(request.src_video, request.fps)
    numbers = at_rate(clip, request.fps, request.num_frames)
    videos: dict[str, Iterable[np.ndarray]] = {}
    videos["control"] = (to_float(drawn(frame, request)) for frame in clip.read(numbers))
    if known:
        videos["frames"] = i2v.filled(known, request)
    for image in request.src_ref_images:
        videos["reference"] = [to_float(_placed(image, request))]
    encoded = encoders.encode_videos([in_chunks(video, request.geometry) for video in videos.values()])
    latents = dict(zip(videos, encoded, strict=True))
    given = _with_frames(base, request, known, latents.get("frames", mx.zeros_like(base.noise)))
    assert given.condition is not None, "`_with_frames` puts it there"
    return replace(
        given,
        condition=mx.concatenate([latents["control"], given.condition], axis=-1),
        reference=latents.get("reference", mx.zeros_like(base.noise[:, :1])),
    )


def _known(request: Request) -> dict[int, np.ndarray]:
    """The frames that are given, float32 (H, W, 3) in [-1, 1], by their numbers."""
    given = {request.num_frames - 1: request.last_image, 0: request.image}
    return {number: to_float(_placed(source, request)) for number, source in given.items() if source is not None}


def _placed(source: Source, request: Request) -> np.ndarray:
    """A picture, uint8 (H, W, 3), of the video's size: stretched, or as ``fit`` has it."""
    image = read_image(source)
    if request.fit != "official":
        return drawn(image, request)
    return np.asarray(Image.fromarray(image).resize((request.width, request.height), Image.Resampling.BICUBIC))


def _with_frames(base: Conditioning, request: Request, known: Container[int], latents: mx.array) -> Conditioning:
    """``base`` with a mask of the frames ``known`` and their video's ``latents``, of which 5B's models keep the first.
    """
    kept = latents[:, :1] if 0 in known and request.geometry.spatial >= KEPT_FROM else None
    return replace(base, condition=i2v.with_mask(latents, known, request), first_latents=kept)
