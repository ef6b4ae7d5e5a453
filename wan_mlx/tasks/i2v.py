"""Image to video: the first frame is given, or the first and the last.

Follows the official ``wan/image2video.py``, with its mask for any number of frames, and
``wan/first_last_frame2video.py``. Wan2.2's models read no CLIP features.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping
from dataclasses import replace

import mlx.core as mx
import numpy as np

from ..geometry import WAN_2_1, Geometry
from ..media.read import cover, in_chunks, read_image, to_float
from ..resize import resize_bicubic
from ..types import Conditioning, Encoders, Request
from . import t2v
from .canvas import drawn


def output_size(image_size: tuple[int, int], area: int, geometry: Geometry = WAN_2_1) -> tuple[int, int]:
    """(width, height) in pixels, whole tokens, of about ``area`` and the proportions of ``image_size`` (width, height).

    Raises:
        ValueError: the image is so narrow that one side would be below one token.
    """
    width, height = image_size
    aspect = height / width
    # In the official order: rounded down to whole latents, then to whole patches.
    latents = geometry.side // geometry.spatial
    rows = int(math.sqrt(area * aspect) // geometry.spatial // latents)
    columns = int(math.sqrt(area / aspect) // geometry.spatial // latents)
    if not (rows and columns):
        raise ValueError(f"an image of {width}x{height} is too narrow for a video of {area} pixels; crop it")
    return columns * geometry.side, rows * geometry.side


def fit(request: Request) -> Request:
    """The request with the proportions of its image and about the requested area, unless ``fit`` keeps its size."""
    if request.image is None:
        raise ValueError("image to video needs an image: give it with --image FILE (in Python image=)")
    height, width = read_image(request.image).shape[:2]
    request = replace(request, source_sizes={"image": (width, height)})
    if request.fit != "official":
        return request
    width, height = output_size((width, height), request.width * request.height, request.geometry)
    return replace(request, width=width, height=height)


def fit_first_and_last(request: Request) -> Request:
    """The same for two images, of which the first gives the proportions."""
    for flag, image in (("image", request.image), ("last-image", request.last_image)):
        if image is None:
            raise ValueError(f"first and last frame to video needs both images: give the other with --{flag} FILE")
    if request.num_frames < (least := request.geometry.num_frames(latent_frames=2)):
        raise ValueError(f"frames is {request.num_frames}, expected room for a first and a last one; nearest: {least}")
    height, width = read_image(request.last_image).shape[:2]
    fitted = fit(request)
    return replace(fitted, source_sizes={**fitted.source_sizes, "last_image": (width, height)})


def condition(request: Request, encoders: Encoders) -> Conditioning:
    """Texts, noise, CLIP features of the given images, and the latents of a video that has them as its first and, if
    there are two, last frame, resized, and grey between."""
    official, first = request.fit == "official", read_image(request.image)
    known = {0: first if official else drawn(first, request)}
    if request.last_image is not None:
        last = read_image(request.last_image)
        # The official code intends to resize the last image to the first's size and crop it, but only crops or pads,
        # with width and height swapped. Here it is resized and cropped; images of one size come out the same.
        known[request.num_frames - 1] = cover(last, *first.shape[:2]) if official else drawn(last, request)
    base = t2v.condition(request, encoders)
    images = {number: to_float(image) for number, image in known.items()}
    pictures = mx.array(np.stack(list(images.values())))
    features = encoders.encode_images(pictures) if encoders.reads_images else None
    resized = {number: resize_bicubic(image, request.height, request.width) for number, image in images.items()}
    (latents,) = encoders.encode_videos([in_chunks(filled(resized, request), request.geometry)])
    return replace(base, condition=with_mask(latents, known, request), image_features=features)


def filled(known: Mapping[int, np.ndarray], request: Request) -> Iterator[np.ndarray]:
    """The frames float32 (H, W, 3) of a video in which those ``known`` are given; the others are grey."""
    grey = np.zeros((request.height, request.width, 3), np.float32)
    return (known.get(number, grey) for number in range(request.num_frames))


def with_mask(latents: mx.array, known: Container[int], request: Request) -> mx.array:
    """Latents (1, t, h, w, C) of such a video with the mask of its given frames before them (1, t, h, w, 4 + C)."""
    mask = _mask(request.num_frames, known, request.geometry.temporal)
    mask = mx.broadcast_to(mask, (*latents.shape[:-1], mask.shape[-1]))
    return mx.concatenate([mask, latents], axis=-1)


def encodes(request: Request) -> list[int]:
    """Lengths of the videos that are encoded: the images stand in one of the whole length."""
    return [request.num_frames]


def _mask(num_frames: int, known: Container[int], temporal: int) -> mx.array:
    """float32 (t, 1, 1, temporal): 1 where a frame is given. A latent frame's channels are its frames; the first frame
    is repeated ``temporal`` times."""
    given = [float(number in known) for number in range(num_frames)]
    return mx.array([given[0]] * (temporal - 1) + given).reshape(-1, 1, 1, temporal)
