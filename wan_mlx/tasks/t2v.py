"""Text to video: noise and two texts, the base of every other task. It may also start from a video.

The official code has no video to video; this follows Diffusers' ``WanVideoToVideoPipeline``, on the official sigma
grid. Unlike there the source is sampled at the model's frame rate and cropped, not squeezed, and the number of steps
is rounded, not truncated.
"""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx

from ..media.read import at_rate, cover, in_chunks, open_video, to_float
from ..noise import latent_noise
from ..types import Conditioning, Encoders, Request


def fit(request: Request) -> Request:
    """The request, shortened to the length of its video, if it has one."""
    if request.video is None:
        return request
    if request.begin and request.cache.startswith("magcache"):
        raise ValueError(
            "magcache has constants for runs from noise alone, not from a video; use teacache or easycache"
        )
    if request.begin and request.cfg_zero is not None:
        raise ValueError("cfg_zero leaves the first steps from noise at zero; a run from a video does not make them")
    available = len(at_rate(open_video(request.video, request.fps), request.fps, request.num_frames))
    geometry = request.geometry
    return replace(request, num_frames=geometry.num_frames(geometry.latent_frames(available)))


def condition(request: Request, encoders: Encoders, extra_latents: int = 0) -> Conditioning:
    """Encode prompt and negative prompt in one pass over the text encoder's weights, and draw the noise, with
    ``extra_latents`` latent frames more than the video's."""
    texts = [request.prompt, request.negative_prompt][: request.passes]
    context, *negative = encoders.encode_text(texts)
    t, h, w = request.latent_shape
    return Conditioning(
        noise=latent_noise((t + extra_latents, h, w), encoders.latent_channels, request.seed),
        context=context,
        negative_context=negative[0] if negative else None,
        source_latents=_source_latents(request, encoders),
    )


def _source_latents(request: Request, encoders: Encoders) -> mx.array | None:
    # At full strength nothing of the video remains, so it is not read.
    if request.video is None or request.begin == 0:
        return None
    clip = open_video(request.video, request.fps)
    numbers = at_rate(clip, request.fps, request.num_frames)
    frames = (to_float(cover(frame, request.height, request.width)) for frame in clip.read(numbers))
    (latents,) = encoders.encode_videos([in_chunks(frames, request.geometry)])
    return latents
