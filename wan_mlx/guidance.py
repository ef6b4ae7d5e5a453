"""Classifier-free guidance: two passes of batch one, combined in float32."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from .types import Conditioning

# (latents, timestep, context) → velocity
Model = Callable[[mx.array, float, mx.array], mx.array]


def guided_velocity(
    model: Model, latents: mx.array, timestep: float, conditioning: Conditioning, scale: float
) -> mx.array:
    """``uncond + scale * (cond - uncond)``, float32 (1, t, h, w, C).

    Without a negative context, or at scale 1 where the two passes would cancel to ``cond``, one pass is made.
    """
    cond = model(latents, timestep, conditioning.context).astype(mx.float32)
    if conditioning.negative_context is None or scale == 1.0:
        return cond
    mx.eval(cond)  # the second pass must not hold the first one's arrays
    uncond = model(latents, timestep, conditioning.negative_context).astype(mx.float32)
    return uncond + scale * (cond - uncond)
