"""Text or image to video with one model (Wan2.2 TI2V-5B): the first frame may be given.

Follows the official ``wan/textimage2video.py``: the given frame's latents stay without noise through all of sampling.
"""

from __future__ import annotations

import math
from dataclasses import replace

from PIL import Image

from ..geometry import Geometry
from ..media.read import cover, in_chunks, read_image, to_float
from ..types import Conditioning, Encoders, Request
from . import t2v
from .canvas import drawn


def output_size(image_size: tuple[int, int], area: int, geometry: Geometry) -> tuple[int, int]:
    """(width, height) in pixels, whole tokens, of at most ``area``, as near as can be to the proportions of
    ``image_size`` (width, height).

    Raises:
        ValueError: the image is so narrow that one side would be below one token.
    """
    ratio, side = image_size[0] / image_size[1], geometry.side

    def whole(pixels: float) -> int:
        return int(pixels // side * side)

    def off(size: tuple[int, int]) -> float:
        """How far its proportions are from the image's: 1 is not at all."""
        return max(ratio / (size[0] / size[1]), size[0] / size[1] / ratio)

    width = math.sqrt(area * ratio)
    first, second = whole(width), whole(area / width)  # the width is rounded first, or the height
    if not (first and second and whole(area / first) and whole(area / second)):
        wide, high = image_size
        raise ValueError(f"an image of {wide}x{high} is too narrow for a video of {area} pixels; crop it")
    sizes = (first, whole(area / first)), (whole(area / second), second)
    return sizes[0] if off(sizes[0]) < off(sizes[1]) else sizes[1]


def fit(request: Request) -> Request:
    """The request with the proportions of its image and about the requested area, unless ``fit`` keeps its size; or of
    the length of its video."""
    if request.image is None:
        return t2v.fit(request)
    if request.video is not None:
        raise ValueError("an image and a video were given; give the first frame, or a video to change")
    height, width = read_image(request.image).shape[:2]
    request = replace(t2v.fit(request), source_sizes={"image": (width, height)})
    if request.fit != "official":
        return request
    width, height = output_size((width, height), request.width * request.height, request.geometry)
    return replace(request, width=width, height=height)


def encodes(request: Request) -> list[int]:
    """Lengths of the videos that are encoded: the image alone, or the video to start from."""
    return t2v.encodes(request) if request.image is None else [1]


def condition(request: Request, encoders: Encoders) -> Conditioning:
    """Texts and noise as for text to video, and the latents of the first frame, if it is given."""
    base = t2v.condition(request, encoders)
    if request.image is None:
        return base
    image = read_image(request.image)
    if request.fit == "official":
        image = cover(image, request.height, request.width, Image.Resampling.LANCZOS)
    else:
        image = drawn(image, request)
    (latents,) = encoders.encode_videos([in_chunks([to_float(image)], request.geometry)])
    return replace(base, first_latents=latents)
