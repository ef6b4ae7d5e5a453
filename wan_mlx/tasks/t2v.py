"""Text to video: noise and two texts, which every other task starts from."""

from __future__ import annotations

from ..noise import latent_noise
from ..types import Conditioning, Encoders, Request


def condition(request: Request, encoders: Encoders, extra_latents: int = 0) -> Conditioning:
    """Encode prompt and negative prompt in one pass over the text encoder's weights, and draw the noise.

    ``extra_latents``: latent frames of noise beyond those of the video.
    """
    texts = [request.prompt]
    if request.guidance_scale != 1.0:
        texts.append(request.negative_prompt)
    context, *negative = encoders.encode_text(texts)
    t, h, w = request.latent_shape
    return Conditioning(
        noise=latent_noise((t + extra_latents, h, w), encoders.latent_channels, request.seed),
        context=context,
        negative_context=negative[0] if negative else None,
    )
