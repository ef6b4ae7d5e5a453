"""Text to video: noise and two texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from ..noise import latent_noise
from ..types import Conditioning, Request


def condition(
    request: Request, encode_text: Callable[[Sequence[str]], list[mx.array]], latent_channels: int
) -> Conditioning:
    """Encode prompt and negative prompt in one pass over the text encoder's weights, and draw the noise.

    Args:
        request: what was asked.
        encode_text: texts → one (1, 512, text_dim) each.
        latent_channels: C.
    """
    texts = [request.prompt]
    if request.guidance_scale != 1.0:
        texts.append(request.negative_prompt)
    context, *negative = encode_text(texts)
    return Conditioning(
        noise=latent_noise(request.latent_shape, latent_channels, request.seed),
        context=context,
        negative_context=negative[0] if negative else None,
    )
