"""The sampling loop, the only one in the package, with its inputs and outputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from .caching import StepCache
from .errors import SamplingError
from .guidance import Guidance, Model, guided_velocity, plain_passes
from .parallel import Team
from .schedulers import Scheduler
from .types import Conditioning, Step

# Timestep → the model that serves it, and its guidance. Of several experts one is loaded at a time.
Serving = Callable[[float], tuple[Model, Guidance]]


def denoise(
    serving: Serving,
    conditioning: Conditioning,
    scheduler: Scheduler,
    cache: StepCache | None = None,
    first: int = 0,
    state: Mapping[str, mx.array] | None = None,
    wider: str = "float32",
    team: Team | None = None,
) -> Iterator[Step]:
    """Sample from noise to clean latents; yields an evaluated `Step` after each step.

    Args:
        serving: called before each step; returns the model, and the guidance, which gives the passes of a step and
            combines them.
        conditioning: starting latents and texts.
        scheduler: solver with its sigma grid; the loop changes its history.
        cache: decides which forwards are skipped; the loop changes its state. None: no forward is skipped.
        first, state: resume at step ``first`` with the `Step.state` of the step before it, bit for bit as if
            uninterrupted.
        wider: the dtype to advise where the latents are not finite; bfloat16 where the model computes in float16.
        team: the machines that make the steps together; all of them are in this loop.

    Raises:
        SamplingError: the latents are not finite; names the step.
        ValueError: ``state`` is not the state that step ``first`` of this solver needs.
    """
    # Of a grid that is made whole, the noise is the start, whatever is locked.
    latents = scheduler.start(conditioning.noise, conditioning.source_latents if scheduler.begin else None)
    latents = locked(conditioning, latents, scheduler.sigmas[0])
    mx.eval(latents)  # two threads may be about to read it
    total = len(scheduler.timesteps)
    cache = cache or StepCache(total)
    if first:
        if state is None:
            raise ValueError(f"step {first} needs the state of the step before it")
        latents = state["latents"]
        scheduler.load_state(first, part_of(state, "solver"))
        (cache.load_state if team is None else partial(team.load_state, cache))(part_of(state, "cache"))
    for index in range(first, total):
        timestep = float(scheduler.timesteps[index])
        started = time.perf_counter()
        computed = cache.computed if index else 0
        model, guidance = serving(timestep)
        velocity = guided_velocity(model, latents, timestep, conditioning, guidance, index, total, cache, team)
        del model  # the next step may load another expert; this one must be freed first
        latents = locked(conditioning, scheduler.step(index, velocity, latents), scheduler.sigmas[index + 1])
        latents = latents if team is None else team.same(latents)
        state = {
            "latents": latents,
            "denoised": locked(conditioning, scheduler.denoised, scheduler.sigmas[-1]),
            **named("solver", scheduler.state()),
            **named("cache", cache.state() if team is None else team.whole_state(cache)),
        }
        mx.eval(state)
        if not mx.isfinite(latents).all().item():
            raise SamplingError(
                f"the latents are not finite (NaN or infinite) after step {index + 1} of {total} at timestep "
                f"{timestep:g}; {'float16 ends at 65504: ' * (wider == 'bfloat16')}try --dtype {wider}, or check that "
                "the weights are whole"
            )
        forwards, passes = cache.computed - computed, plain_passes(conditioning, guidance)
        yield step_of(scheduler, index, state, forwards, passes, time.perf_counter() - started)
        if cache.large:
            state.clear()


def locked(conditioning: Conditioning, latents: mx.array, sigma: np.float32) -> mx.array:
    """The latents where the video is made anew; elsewhere its source's, under the starting noise of level ``sigma``,
    and the frames that are given."""
    if conditioning.remade is not None and conditioning.source_latents is not None:
        stays = float(sigma) * conditioning.noise + float(1 - sigma) * conditioning.source_latents
        latents = mx.where(conditioning.remade, latents, stays)
    if (given := conditioning.first_latents) is not None:
        latents = mx.concatenate([given, latents[:, given.shape[1] :]], axis=1)
    return latents


def named(owner: str, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """The arrays of one owner's state, with the owner in their names: "solver.x0_1"."""
    return {f"{owner}.{name}": array for name, array in arrays.items()}


def part_of(state: Mapping[str, mx.array], owner: str) -> dict[str, mx.array]:
    """The inverse of `named`: the arrays of ``owner``."""
    return {name.removeprefix(f"{owner}."): a for name, a in state.items() if name.startswith(f"{owner}.")}


def with_condition(model: Model, conditioning: Conditioning) -> Model:
    """The model with the constant inputs filled in: (latents, timestep, context) → velocity."""
    if conditioning.vace_context is not None:
        return partial(model, vace_context=conditioning.vace_context, vace_scale=conditioning.context_scale)
    if conditioning.audio is not None:
        return partial(model, **{name: getattr(conditioning, name) for name in ("reference", "motion", "pose")})
    given: dict[str, Any] = {name: getattr(conditioning, name) for name in ("condition", "image_features", "reference")}
    if conditioning.first_latents is not None:
        given["clean_frames"] = conditioning.first_latents.shape[1]
    if conditioning.pose is not None:
        given["pose"] = conditioning.pose
    return partial(model, **given)


def step_of(
    scheduler: Scheduler, index: int, state: dict[str, mx.array], forwards: int = 0, passes: int = 0, seconds: float = 0
) -> Step:
    """Step ``index``, which ended in ``state``; what it took is 0 where it was made earlier."""
    timestep, sigma = float(scheduler.timesteps[index]), float(scheduler.sigmas[index])
    latents, total = state["latents"], len(scheduler.timesteps)
    return Step(index, total, timestep, sigma, latents, state["denoised"], forwards, passes, seconds, state)


def without_references(step: Step, count: int) -> Step:
    """The step without its first ``count`` latent frames (reference images)."""
    return replace(step, latents=step.latents[:, count:], denoised=step.denoised[:, count:])
