"""Classifier-free guidance: two passes of batch one, combined in float32."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import lru_cache
from queue import SimpleQueue

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

    def velocity(context: mx.array) -> mx.array:
        result = model(latents, timestep, context).astype(mx.float32)
        mx.eval(result)  # the other pass must not hold this one's arrays
        return result

    if conditioning.negative_context is None or scale == 1.0:
        return velocity(conditioning.context)
    if mx.default_device().type == mx.DeviceType.cpu:
        cond, uncond = _at_once(velocity, conditioning.context, conditioning.negative_context)
    else:
        cond, uncond = velocity(conditioning.context), velocity(conditioning.negative_context)
    return uncond + scale * (cond - uncond)


def _at_once(velocity: Callable[[mx.array], mx.array], *contexts: mx.array) -> tuple[mx.array, mx.array]:
    """Both passes on the CPU, where MLX computes on one core per thread; to the same values as one after the other."""
    second: Future[mx.array] = Future()
    _second_thread().put((second, velocity, contexts[1]))
    try:
        return velocity(contexts[0]), second.result()
    finally:
        wait([second])  # Ctrl-C must not end the process under a thread that computes


@lru_cache(maxsize=1)
def _second_thread() -> SimpleQueue:
    """Jobs (future, function, argument) for a thread that lives as long as the process.

    MLX gives every thread a worker of its own that it can only take down with the process, so there is one thread for
    all runs, and a daemon, which is not taken down at all.
    """
    jobs: SimpleQueue = SimpleQueue()

    def work() -> None:
        while True:
            future, function, argument = jobs.get()
            try:
                future.set_result(function(argument))
            except BaseException as error:
                future.set_exception(error)
            del future, function, argument  # or the idle thread would keep the model alive

    threading.Thread(target=work, name="wan_mlx-guidance", daemon=True).start()
    return jobs
