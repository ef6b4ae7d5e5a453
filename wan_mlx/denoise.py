"""The sampling loop, the only one in the package, and what goes into it and comes out of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import mlx.core as mx

from .caching import StepCache
from .errors import SamplingError
from .guidance import Guidance, Model, guided_velocity, plain_passes
from .schedulers import Scheduler
from .types import Conditioning, RunState, Step

# Timestep → the model that serves it, and how it is guided. Of several experts one is there at a time.
Serving = Callable[[float], tuple[Model, Guidance]]


def always(model: Model, guidance: Guidance) -> Serving:
    """One model serves every timestep."""
    return lambda timestep: (model, guidance)


def denoise(
    serving: Serving,
    conditioning: Conditioning,
    scheduler: Scheduler,
    cache: StepCache | None = None,
    first: int = 0,
    state: Mapping[str, mx.array] | None = None,
) -> Iterator[Step]:
    """Walk from noise to clean latents, yielding a `Step` after each step, evaluated.

    Args:
        serving: asked before each step for the model, (latents float32 (1, t, h, w, C), timestep, context) → velocity,
            and for the passes that a step makes and how they are combined. `Transformer`'s ``through`` and
            ``skip_layers`` are given only where a cache or the guidance uses them.
        conditioning: what to start from, and the texts.
        scheduler: solver with its sigma grid; its history changes as the loop goes.
        cache: decides which forwards are not computed; its state changes as the loop goes. None: all are.
        first, state: go on at step ``first`` with the `Step.state` of the step before it, as if there had been no
            break, bit for bit.

    Raises:
        SamplingError: the latents stopped being finite; says at which step.
        ValueError: ``state`` is not what step ``first`` of this solver needs.
    """
    latents = scheduler.start(conditioning.noise, conditioning.source_latents)
    mx.eval(latents)  # two threads may be about to read it
    total = len(scheduler.timesteps)
    cache = cache or StepCache(total)
    if first:
        if state is None:
            raise ValueError(f"step {first} needs the state of the step before it")
        latents = state["latents"]
        scheduler.load_state(first, part_of(state, "solver"))
        cache.load_state(part_of(state, "cache"))
    for index in range(first, total):
        timestep = float(scheduler.timesteps[index])
        started = time.perf_counter()
        computed = cache.computed if index else 0
        model, guidance = serving(timestep)
        velocity = guided_velocity(model, latents, timestep, conditioning, guidance, index, total, cache)
        del model  # the next step's may be another, and is loaded when this one is gone
        latents = scheduler.step(index, velocity, latents)
        state = {
            "latents": latents,
            "denoised": scheduler.denoised,
            **named("solver", scheduler.state()),
            **named("cache", cache.state()),
        }
        mx.eval(state)
        if not mx.isfinite(latents).all().item():
            raise SamplingError(
                f"the latents are not finite (NaN or infinite) after step {index + 1} of {total} at timestep "
                f"{timestep:g}; try --dtype float32, or check that the weights are whole"
            )
        yield Step(
            index=index,
            total=total,
            timestep=timestep,
            sigma=float(scheduler.sigmas[index]),
            latents=latents,
            denoised=scheduler.denoised,
            forwards=cache.computed - computed,
            passes=plain_passes(conditioning, guidance),
            seconds=time.perf_counter() - started,
            state=state,
        )
        if cache.large:
            state.clear()


def named(owner: str, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """The arrays of one part of the loop's state, under names that tell whose they are: "solver.x0_1"."""
    return {f"{owner}.{name}": array for name, array in arrays.items()}


def part_of(state: Mapping[str, mx.array], owner: str) -> dict[str, mx.array]:
    """What `named` put into the state for ``owner``."""
    return {name.removeprefix(f"{owner}."): a for name, a in state.items() if name.startswith(f"{owner}.")}


def with_condition(model: Model, conditioning: Conditioning) -> Model:
    """The model with what stays the same at every step filled in: (latents, timestep, context) → velocity."""
    if conditioning.vace_context is not None:
        return partial(model, vace_context=conditioning.vace_context, vace_scale=conditioning.context_scale)
    return partial(model, condition=conditioning.condition, image_features=conditioning.image_features)


def step_reached(scheduler: Scheduler, reached: RunState) -> Step:
    """The last step of ``reached``, as `denoise` yielded it; it took no time now."""
    index, state = reached.steps - 1, reached.state
    timestep, sigma = float(scheduler.timesteps[index]), float(scheduler.sigmas[index])
    return Step(index, len(scheduler.timesteps), timestep, sigma, state["latents"], state["denoised"], state=state)


def without_references(step: Step, count: int) -> Step:
    """The step of the video alone, without the first ``count`` latent frames."""
    return replace(step, latents=step.latents[:, count:], denoised=step.denoised[:, count:])
