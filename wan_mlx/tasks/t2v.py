"""Text to video: noise and two texts, the base of every other task. It may also start from a video.

The official code has no video to video; this follows Diffusers' ``WanVideoToVideoPipeline``, on the official sigma
grid. Unlike there the source is sampled at the model's frame rate and cropped, not squeezed, and the number of steps
is rounded, not truncated.

With a mask only its white is made anew. Elsewhere the latents are locked: before each step they are the source's, under
the starting noise of that step's level, and in the end the source's themselves, as in Diffusers' inpainting pipelines.
"""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np

from ..media.read import Clip, at_rate, in_chunks, open_video, to_float
from ..noise import latent_noise
from ..types import Conditioning, Encoders, Request
from .canvas import check_mask, drawn, white_squares

OFF = 0.01  # by which a mask's proportions may differ from its video's


def fit(request: Request) -> Request:
    """The request, shortened to the length of its video, if it has one."""
    if request.video is None:
        if request.src_mask is not None:
            raise ValueError("a mask says what to make anew in a video, but no video was given; give one")
        return request
    if request.begin and request.cache.startswith("magcache"):
        raise ValueError(
            "magcache has constants for runs from noise alone, not from a video; use teacache or easycache"
        )
    if request.begin and request.cfg_zero is not None:
        raise ValueError("cfg_zero leaves the first steps from noise at zero; a run from a video does not make them")
    clip, geometry = open_video(request.video, request.model_fps), request.geometry
    if request.src_mask is not None:
        _open_mask(request, clip)
    num_frames = geometry.num_frames(geometry.latent_frames(len(at_rate(clip, request.model_fps, request.num_frames))))
    return replace(request, num_frames=num_frames, source_sizes={"video": (clip.width, clip.height)})


def condition(request: Request, encoders: Encoders, extra_latents: int = 0) -> Conditioning:
    """Encode prompt and negative prompt in one pass over the text encoder's weights, and draw the noise, with
    ``extra_latents`` latent frames more than the video's."""
    texts = [request.prompt, request.negative_prompt][: request.passes]
    context, *negative = encoders.encode_text(texts)
    t, h, w = request.latent_shape
    source_latents, remade = _source(request, encoders)
    return Conditioning(
        noise=latent_noise(
            (t + extra_latents, h, w), encoders.latent_channels, request.seed, of=request.noise_size
        ),
        context=context,
        negative_context=negative[0] if negative else None,
        source_latents=source_latents,
        remade=remade,
    )


def encodes(request: Request) -> list[int]:
    """Lengths of the videos that are encoded."""
    return [request.num_frames] if _reads_video(request) else []


def _reads_video(request: Request) -> bool:
    """At full strength nothing of a video without a mask remains, so it is not read; VACE has a mask of its own."""
    return request.video is not None and (request.begin > 0 or request.src_mask is not None)


def _source(request: Request, encoders: Encoders) -> tuple[mx.array | None, mx.array | None]:
    """The video's latents, and where it is made anew: `Conditioning.source_latents` and ``remade``."""
    if request.video is None or not _reads_video(request):
        return None, None
    clip = open_video(request.video, request.model_fps)
    numbers = at_rate(clip, request.model_fps, request.num_frames)
    remade = None if request.src_mask is None else _remade(request, _open_mask(request, clip), numbers)
    frames = (to_float(drawn(frame, request)) for frame in clip.read(numbers))
    (latents,) = encoders.encode_videos([in_chunks(frames, request.geometry)])
    return latents, remade


def _open_mask(request: Request, video: Clip) -> Clip:
    mask = open_video(request.src_mask, request.model_fps)
    check_mask(mask, video)
    if abs(mask.width * video.height / (mask.height * video.width) - 1) > OFF:
        raise ValueError(f"mask {mask.name} is of {mask.width}x{mask.height} pixels, expected {video.width}x"
                         f"{video.height} as its video, or their proportions")  # fmt: skip
    return mask


def _remade(request: Request, mask: Clip, numbers: list[int]) -> mx.array:
    """bool (1, t, h, w, 1), of a still (1, 1, h, w, 1): the latents of which any pixel in any frame is white."""
    chosen = numbers if mask.num_frames > 1 else [0]
    squares = np.stack([white_squares(frame[..., 0] > 127, request) for frame in mask.read(chosen)])
    later = squares[1:].reshape(-1, request.geometry.temporal, *squares.shape[1:]).any(axis=1)
    return mx.array(np.concatenate([squares[:1], later])[None, ..., None])
