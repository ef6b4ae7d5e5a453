"""Classifier-free guidance: two passes of batch one, combined in float32."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import mlx.core as mx

from .caching import COND, UNCOND, StepCache
from .distributed import Part
from .lasting import lasting_thread
from .models.execution import Shared
from .models.pieces import finished
from .parallel import Team
from .presets import EXPERTS
from .recipes import phase_of
from .types import Conditioning, Request

T = TypeVar("T")

# (latents, timestep, context, through=..., skip_layers=..., shared=..., among=...) → velocity; the last four as
# `Execution` takes them.
Model = Callable[..., mx.array]


@dataclass(frozen=True)
class Guidance:
    """How two passes make one velocity. Ranges are fractions of the steps, as in Diffusers' guiders: (a, b) of n steps
    goes from step ``a * n`` to before step ``b * n``, both rounded down.

    Attributes:
        scale: 1 turns guidance off.
        range: where guidance is on; other steps make only the pass with the prompt (arXiv 2404.07724).
        cfg_zero: CFG-Zero* (arXiv 2503.18886), unless it is None: before subtraction, the velocity without the prompt
            is scaled to its projection on the one with it; so many first steps have zero velocity, and make no pass.
        skip_layers: skip-layer guidance: blocks left out of the pass without the prompt.
        skip_range: where it is on.
    """

    scale: float = 1.0
    range: tuple[float, float] = (0.0, 1.0)
    cfg_zero: int | None = None
    skip_layers: tuple[int, ...] = ()
    skip_range: tuple[float, float] = (0.1, 1.0)

    @classmethod
    def of(cls, request: Request, expert: str = "", timestep: float = 0.0) -> Guidance:
        """The guidance of a request at a timestep, while an expert, a name in `presets.EXPERTS`, is at work."""
        low, high = request.guidance_scales
        scale, phase = high if expert == EXPERTS[0] else low, phase_of(request, timestep)
        return cls(
            scale=scale if phase is None or phase.guidance is None else phase.guidance,
            range=request.guidance_range,
            cfg_zero=request.cfg_zero,
            skip_layers=request.skip_layers,
            skip_range=request.skip_range,
        )

    def passes(self, index: int, total: int) -> tuple[int, ...]:
        """The passes of step ``index`` of ``total``: none, `COND`, or both."""
        if index < (self.cfg_zero or 0):
            return ()
        return (COND, UNCOND) if self.scale != 1.0 and _within(self.range, index, total) else (COND,)

    def skipped(self, branch: int, index: int, total: int) -> tuple[int, ...]:
        """The layers left out of a pass."""
        return self.skip_layers if branch == UNCOND and _within(self.skip_range, index, total) else ()

    def shares(self, index: int, total: int) -> bool:
        """Whether there are two passes, alike but for the text."""
        return len(self.passes(index, total)) > 1 and not self.skipped(UNCOND, index, total)

    def combine(self, cond: mx.array, uncond: mx.array) -> mx.array:
        """``uncond + scale * (cond - uncond)``, float32 (1, t, h, w, C)."""
        if self.cfg_zero is not None:
            uncond = projection(cond, uncond) * uncond
        return uncond + self.scale * (cond - uncond)


def zero_steps_of(task: str, of_picture: bool = False) -> int:
    """Default number of zero first steps in CFG-Zero*; the authors' scripts use two for Wan's text to video, and one
    where the first frame is given: by ``of_picture`` to a task that can do without."""
    return 1 if of_picture or task in ("i2v", "flf2v") else 2


def check_guidance(request: Request, num_layers: int) -> None:
    """Raise ValueError if the guidance options contradict each other, the steps or the model's ``num_layers``."""
    if request.passes == 1:
        for name, default in (("guidance_range", (0.0, 1.0)), ("cfg_zero", None), ("skip_layers", ())):
            if getattr(request, name) != default:
                raise ValueError(f"{name} is {getattr(request, name)}, but guidance is off at scale 1; "
                                 "give a scale above 1, or leave it out")  # fmt: skip
    made = request.steps_made
    for name in ("guidance_range", "skip_range"):
        span = getattr(request, name)
        if len(span) != 2 or not 0 <= span[0] < span[1] <= 1:
            raise ValueError(f"{name} is {span}, expected two fractions of the steps, 0 <= from < to <= 1")
        used = name == "guidance_range" or request.skip_layers
        if used and not any(_within(span, index, made) for index in range(made)):
            raise ValueError(f"{name} {span} holds none of the {made} steps; widen it, or leave it out")
    if request.cfg_zero is not None and not 0 <= request.cfg_zero < made:
        raise ValueError(f"cfg_zero is {request.cfg_zero} steps, expected 0 to {made - 1} of {made}")
    if wrong := [layer for layer in request.skip_layers if not 0 <= layer < num_layers]:
        raise ValueError(f"skip_layers names layer {wrong[0]}, expected 0 to {num_layers - 1}")


def projection(cond: mx.array, uncond: mx.array) -> mx.array:
    """The factor that brings ``uncond`` nearest to ``cond``: <cond, uncond> / (|uncond|^2 + 1e-8), one per sample."""
    axes = tuple(range(1, cond.ndim))
    along = (cond * uncond).sum(axes, keepdims=True)
    return along / ((uncond * uncond).sum(axes, keepdims=True) + 1e-8)


def guided_velocity(
    model: Model,
    latents: mx.array,
    timestep: float,
    conditioning: Conditioning,
    guidance: Guidance,
    index: int,
    total: int,
    cache: StepCache,
    team: Team | None = None,
) -> mx.array:
    """The velocity of step ``index`` of ``total``, float32 (1, t, h, w, C); without a negative context, of one pass.

    ``team``: the machines that share the passes.
    """
    passes = guidance.passes(index, total)
    if conditioning.negative_context is None:
        passes = tuple(branch for branch in passes if branch == COND)
    contexts = {COND: conditioning.context, UNCOND: conditioning.negative_context}
    shared = Shared() if team is None and len(passes) > 1 and guidance.shares(index, total) else None

    def velocity(branch: int, among: Part | None = None) -> mx.array:
        def forward(**hooks) -> mx.array:
            if among is not None:
                hooks["among"] = among
            if skipped := guidance.skipped(branch, index, total):
                hooks["skip_layers"] = skipped
            if shared:
                hooks["shared"] = shared
            hooks |= conditioning.of_pass(branch == UNCOND)
            return model(latents, timestep, contexts[branch], **hooks).astype(mx.float32)

        result = cache.velocity(branch, forward)
        finished(result)  # frees this pass's arrays before the other pass
        return result

    cache.begin_step(index, latents, passes)
    if not passes:
        return mx.zeros_like(latents)
    if team is not None:
        found = team.velocities(passes, cache, velocity, latents)
        return found[0] if len(found) == 1 else guidance.combine(*found)
    if len(passes) == 1:
        return velocity(COND)
    if mx.default_device().type == mx.DeviceType.cpu:
        return guidance.combine(*at_once(velocity, (COND,), (UNCOND,)))
    return guidance.combine(velocity(COND), velocity(UNCOND))


def plain_passes(conditioning: Conditioning, guidance: Guidance) -> int:
    """Passes of each step if guidance were on at all steps, or off at all."""
    return 2 if guidance.scale != 1.0 and conditioning.negative_context is not None else 1


def _within(span: tuple[float, float], index: int, total: int) -> bool:
    first, end = (int(fraction * total + 1e-6) for fraction in span)  # 0.29 of 100 is a little below 29
    return first <= index < end


def at_once(work: Callable[..., T], first: tuple, other: tuple) -> tuple[T, T]:
    """Both calls at once, on the CPU, where MLX uses one core per thread; same values as one after the other."""
    with lasting_thread() as thread:
        second = thread.start(partial(work, *other))
        try:
            return work(*first), second.result()
        finally:
            wait([second])  # Ctrl-C must not end the process while a thread computes
