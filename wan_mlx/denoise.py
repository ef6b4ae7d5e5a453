"""The sampling loop: the only one in the package."""

from __future__ import annotations

import time
from collections.abc import Iterator

import mlx.core as mx

from .guidance import Model, guided_velocity
from .schedulers import Scheduler
from .types import Conditioning, SamplingError, Step


def denoise(model: Model, conditioning: Conditioning, scheduler: Scheduler, guidance_scale: float) -> Iterator[Step]:
    """Walk from noise to clean latents, yielding a `Step` after each step, evaluated.

    Args:
        model: (latents float32 (1, t, h, w, C), timestep, context) → velocity.
        conditioning: noise to start from, and the texts.
        scheduler: solver with its sigma grid; its history changes as the loop goes.
        guidance_scale: 1 turns guidance off.

    Raises:
        SamplingError: the latents stopped being finite; says at which step.
    """
    latents = conditioning.noise
    total = len(scheduler.timesteps)
    for index, timestep in enumerate(scheduler.timesteps.tolist()):
        started = time.perf_counter()
        velocity = guided_velocity(model, latents, float(timestep), conditioning, guidance_scale)
        latents = scheduler.step(index, velocity, latents)
        mx.eval(latents, scheduler.denoised)
        if not mx.isfinite(latents).all().item():
            raise SamplingError(
                f"the latents are not finite (NaN or infinite) after step {index + 1} of {total} at timestep "
                f"{timestep}; try --dtype float32, or check that the weights are whole"
            )
        yield Step(
            index=index,
            total=total,
            timestep=float(timestep),
            sigma=float(scheduler.sigmas[index]),
            latents=latents,
            denoised=scheduler.denoised,
            seconds=time.perf_counter() - started,
        )
