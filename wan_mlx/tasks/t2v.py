"""Text to video: noise and two texts."""

from __future__ import annotations

from ..noise import latent_noise
from ..types import Conditioning, Encoders, Request


def condition(request: Request, encoders: Encoders) -> Conditioning:
    """Encode prompt and negative prompt in one pass over the text encoder's weights, and draw the noise."""
    texts = [request.prompt]
    if request.guidance_scale != 1.0:
        texts.append(request.negative_prompt)
    context, *negative = encoders.encode_text(texts)
    return Conditioning(
        noise=latent_noise(request.latent_shape, encoders.latent_channels, request.seed),
        context=context,
        negative_context=negative[0] if negative else None,
    )
