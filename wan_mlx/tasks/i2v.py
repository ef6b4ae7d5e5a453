"""Image to video: the first frame is given.

Follows the official ``wan/image2video.py``, with its mask for any number of frames.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import mlx.core as mx
import numpy as np

from ..geometry import WAN_2_1, Geometry
from ..media.read import in_chunks, read_image, to_float
from ..resize import resize_bicubic
from ..types import Conditioning, Encoders, Request
from . import t2v


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
    """The request with the proportions of its image and about the requested area.

    Raises:
        ValueError: the image is missing, cannot be read, or is too narrow.
    """
    if request.image is None:
        raise ValueError("image to video needs an image, none was given")
    height, width = read_image(request.image).shape[:2]
    width, height = output_size((width, height), request.width * request.height, request.geometry)
    return replace(request, width=width, height=height)


def condition(request: Request, encoders: Encoders) -> Conditioning:
    """Texts, noise, CLIP features of ``request.image``, and the latents of a video that starts with it.

    Raises:
        ValueError: the image cannot be read.
    """
    return condition_on_frames(request, encoders, {0: read_image(request.image)})


def condition_on_frames(request: Request, encoders: Encoders, known: Mapping[int, np.ndarray]) -> Conditioning:
    """Condition on given frames, by their number.

    Args:
        request: its ``width`` and ``height`` are the size that frames are resized to.
        encoders: all three are used.
        known: frame number → uint8 (H, W, 3), all of one size; all other frames are grey for the VAE.
    """
    base = t2v.condition(request, encoders)
    images = {number: to_float(image) for number, image in known.items()}
    features = encoders.encode_images(mx.array(np.stack(list(images.values()))))
    grey = np.zeros((request.height, request.width, 3), np.float32)
    resized = {number: resize_bicubic(image, *grey.shape[:2]) for number, image in images.items()}
    frames = (resized.get(number, grey) for number in range(request.num_frames))
    (latents,) = encoders.encode_videos([in_chunks(frames, request.geometry)])
    mask = _mask(request.num_frames, known, request.geometry.temporal)
    mask = mx.broadcast_to(mask, (*latents.shape[:-1], mask.shape[-1]))
    return replace(base, condition=mx.concatenate([mask, latents], axis=-1), image_features=features)


def _mask(num_frames: int, known: Mapping[int, np.ndarray], temporal: int) -> mx.array:
    """float32 (t, 1, 1, temporal): 1 where a frame is given. A latent frame's channels are its frames; the first frame
    is repeated ``temporal`` times."""
    given = [float(number in known) for number in range(num_frames)]
    return mx.array([given[0]] * (temporal - 1) + given).reshape(-1, 1, 1, temporal)
