"""VACE: a video is generated from a source video, a mask on it, and reference images; any may be missing.

Follows the official ``wan/vace.py`` and ``wan/utils/vace_processor.py``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import repeat

import mlx.core as mx
import numpy as np

from ..geometry import WAN_2_1, Geometry
from ..media.read import Clip, in_chunks, open_video, read_image, to_float
from ..resize import resize_bilinear
from ..types import Conditioning, Encoders, Request
from . import t2v
from .canvas import check_mask, drawn

log = logging.getLogger(__name__)


def output_shape(
    source: tuple[int, int, int], area: int, num_frames: int, geometry: Geometry = WAN_2_1
) -> tuple[int, int, int]:
    """(width, height, num_frames) of the output for a source video, computed as in the official code.

    Width and height keep the source's proportions; neither exceeds ``area`` nor enlarges the source. A shorter source
    gives a shorter video; a source smaller than ``area`` may give more frames than ``num_frames``, up to as many tokens
    as ``area`` and ``num_frames`` have.

    Args:
        source: (num_frames, height, width) of the source video.
        area, num_frames: as the geometry allows.

    Raises:
        ValueError: a side of the result would be below one token.
    """
    source_frames, height, width = source
    side, latent_frames = geometry.side, geometry.latent_frames(num_frames)
    patches = min(area / side**2, (height // side) * (width // side))
    rows = columns = 0
    if patches:
        tokens = latent_frames * area / side**2
        latent_frames = min(geometry.latent_frames(source_frames), int(tokens / patches))
        patches = min(patches, int(tokens / latent_frames))
        rows = round(math.sqrt(patches * height / width))
        columns = int(patches / rows) if rows else 0
    if not (rows and columns):
        raise ValueError(f"a source video of {width}x{height} pixels is too small or too narrow; crop or enlarge it")
    return columns * side, rows * side, geometry.num_frames(latent_frames)


def fit(request: Request) -> Request:
    """The request with the proportions and length of its source video, if it has one, or with ``fit`` its length alone.
    """
    if request.src_video is None and request.src_mask is None and not request.src_ref_images:
        raise ValueError("VACE needs a source video, a mask or reference images, none was given")
    for source in request.src_ref_images:
        read_image(source)
    clip, _ = _open_sources(request)
    if clip is None:
        return request
    request = replace(request, source_sizes={"src_video": (clip.width, clip.height)})
    if request.fit != "official":
        longest = request.geometry.num_frames(request.geometry.latent_frames(clip.num_frames))
        return replace(request, num_frames=min(request.num_frames, longest))
    shape = (clip.num_frames, clip.height, clip.width)
    area = request.width * request.height
    width, height, num_frames = output_shape(shape, area, request.num_frames, request.geometry)
    return replace(request, width=width, height=height, num_frames=num_frames)


def condition(request: Request, encoders: Encoders) -> Conditioning:
    """Texts, noise, and the control video: latents of the unchanged area, latents of the changed area, and the mask.

    The source is cropped to ``request``'s size and sampled down to its ``num_frames``, as set by `fit`. Reference
    images come first, one latent frame each, also in the noise.
    """
    size = request.height, request.width
    references = [letterbox(read_image(source), *size) for source in request.src_ref_images]
    if request.src_video is None:
        if request.src_mask is not None:
            log.warning("the mask is not used: without a source video all is generated, as in the official code")
        mask = np.full((request.num_frames, *size), 255, np.uint8)
        grey = repeat(np.zeros((*size, 3), np.float32), request.num_frames)
        videos: list[Iterable[np.ndarray]] = [grey]  # of both areas
    else:
        frames, mask = read_source(request)
        videos = [_where(frames, mask <= 127), _where(frames, mask > 127)]
    base = t2v.condition(request, encoders, len(references))
    to_encode = (*videos, *([reference] for reference in references))
    latents = encoders.encode_videos([in_chunks(video, request.geometry) for video in to_encode])
    stays, changes, of_references = latents[0], latents[len(videos) - 1], latents[len(videos) :]
    nothing = mask_to_latents(np.zeros((1, *size), np.uint8), request.geometry)
    context = [[latent, mx.zeros_like(latent), nothing] for latent in of_references]
    context.append([stays, changes, mask_to_latents(mask, request.geometry)])
    return replace(
        base,
        vace_context=mx.concatenate([mx.concatenate(parts, axis=-1) for parts in context], axis=1),
        context_scale=request.context_scale,
        trim_latents=len(references),
    )


def encodes(request: Request) -> list[int]:
    """Lengths of the videos that are encoded: what stays and what changes of a source, or grey for both, and each
    reference image; before any source is known, as with a video."""
    areas = 1 if request.has_sources and request.src_video is None else 2
    return [request.num_frames] * areas + [1] * len(request.src_ref_images)


def read_source(request: Request) -> tuple[np.ndarray, np.ndarray]:
    """The source video uint8 (T, H, W, 3) and its mask uint8 (T, H, W), white if missing, as `condition` uses them.

    A mask of one frame covers the whole video.
    """
    size, geometry = (request.height, request.width), request.geometry
    video, given_mask = _open_sources(request)
    assert video is not None, "`condition` reads one only where it is given"
    if request.num_frames > video.num_frames:
        raise ValueError(
            f"source video {video.name} has {video.num_frames} frames, expected at least {request.num_frames}; "
            f"nearest number of frames: {geometry.num_frames(geometry.latent_frames(video.num_frames))}"
        )
    numbers = spread(video.times, request.num_frames)
    mask = np.full((1, *size), 255, np.uint8)
    if given_mask is not None:
        chosen = numbers if given_mask.num_frames > 1 else [0]
        mask = np.stack([drawn(frame, request, "edge")[..., 0] for frame in given_mask.read(chosen)])
    mask = np.broadcast_to(mask, (request.num_frames, *size))
    return np.stack([drawn(frame, request) for frame in video.read(numbers)]), mask


def _open_sources(request: Request) -> tuple[Clip | None, Clip | None]:
    """The source video and its mask, those that are given."""
    sources = (request.src_video, request.src_mask)
    video, mask = (None if source is None else open_video(source) for source in sources)
    if video and mask:
        check_mask(mask, video)
    return video, mask


def spread(times: np.ndarray, count: int) -> list[int]:
    """Numbers of ``count`` frames, evenly spread over a video with frame ``times``, float32 (T, 2): start and end."""
    moments = np.linspace(0.0, float(times[-1].mean()), count)
    # The first frame that has not ended; at a boundary the earlier one, as in the official code.
    return np.searchsorted(times[:, 1], moments).clip(max=len(times) - 1).tolist()


def letterbox(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Fit an image into the middle of a white one: uint8 (H, W, 3) → float32 (height, width, 3) in [-1, 1]."""
    old_height, old_width = image.shape[:2]
    if (old_height, old_width) == (height, width):
        return to_float(image)
    scale = min(height / old_height, width / old_width)
    new_height, new_width = max(1, int(old_height * scale)), max(1, int(old_width * scale))
    top, left = (height - new_height) // 2, (width - new_width) // 2
    canvas = np.ones((height, width, 3), np.float32)
    canvas[top : top + new_height, left : left + new_width] = resize_bilinear(to_float(image), new_height, new_width)
    return canvas


def mask_to_latents(mask: np.ndarray, geometry: Geometry = WAN_2_1) -> mx.array:
    """uint8 (T, H, W) → float32 (1, t, h, w, channels) in [0, 1]; the channels are each latent's pixels, row by row."""
    num_frames, height, width = mask.shape
    latent_frames, h, w = geometry.latent_shape(width, height, num_frames)
    side = geometry.spatial
    # PyTorch's "nearest-exact": the frame at the middle of each latent frame.
    middles = np.arange(latent_frames, dtype=np.float32) + np.float32(0.5)
    numbers = np.floor(middles * np.float32(num_frames / latent_frames)).astype(int)
    squares = mask[numbers].reshape(latent_frames, h, side, w, side)
    channels = squares.transpose(0, 1, 3, 2, 4).reshape(1, latent_frames, h, w, side**2)
    return mx.array(channels.astype(np.float32) / np.float32(255))  # keeps grey levels, unlike in the latents


def _where(frames: np.ndarray, chosen: np.ndarray) -> Iterable[np.ndarray]:
    """Frames in [-1, 1], grey where ``chosen`` (T, H, W) is False, one at a time."""
    return (to_float(frame) * keep[..., None] for frame, keep in zip(frames, chosen, strict=True))

