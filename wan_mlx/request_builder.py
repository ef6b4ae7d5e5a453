"""What is asked for → a `Request` with every value filled in and checked."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .caching import resolve_cache
from .geometry import Geometry
from .guidance import check_guidance, zero_steps_of
from .models.configs import TransformerConfig
from .presets import Preset
from .recipes import find_recipe
from .schedulers import SOLVERS
from .tasks import fit_sources
from .types import Request, Source

MAX_RANDOM_SEED = 2**31
DEFAULT_STRENGTH = 0.7  # of video to video


def build_request(
    preset: Preset,
    config: TransformerConfig,
    geometry: Geometry,
    prompt: str,
    negative_prompt: str | None = None,
    width: int | None = None,
    height: int | None = None,
    num_frames: int | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    shift: float | None = None,
    solver: str | None = None,
    seed: int | None = None,
    image: Source | None = None,
    last_image: Source | None = None,
    src_video: Source | None = None,
    src_mask: Source | None = None,
    src_ref_images: Sequence[Source] = (),
    context_scale: float = 1.0,
    cache: str | None = None,
    guidance_range: tuple[float, float] = (0.0, 1.0),
    cfg_zero: bool | int | None = None,
    skip_layers: Sequence[int] = (),
    skip_range: tuple[float, float] = (0.1, 1.0),
    recipe: str | None = None,
    video: Source | None = None,
    strength: float | None = None,
) -> Request:
    """Fill in the preset's defaults and check every value.

    Args:
        preset: the model's defaults.
        config: the sizes of its transformer.
        geometry: of its latents and tokens.
        prompt: not empty.
        negative_prompt: what to avoid; "" for nothing.
        width, height: pixels, multiples of `Geometry.side` (16 for Wan2.1). Where the task follows the proportions of
            an image or a source video, they are the area.
        num_frames: 4n+1 for Wan2.1; a shorter source video makes it fewer.
        steps: at least 1.
        guidance_scale: 1 turns guidance off.
        shift: of the sigma schedule, > 0.
        solver: "unipc" (None), "dpm++", "euler" or "dmd".
        seed: >= 0; None or negative draws one.
        image, last_image: first frame (i2v, flf2v) and last frame (flf2v): a path, PIL image or uint8 (H, W, 3).
        src_video, src_mask, src_ref_images: what VACE edits, where (white), and after which pictures.
        context_scale: strength of VACE's hints.
        cache: a step cache, which leaves out forwards: "teacache:0.08", "magcache", "easycache:0.05"; see
            `wan_mlx.caching.FORMS`. None or "none" computes all.
        guidance_range: the part of the steps where guidance is on; elsewhere one pass is made instead of two.
        cfg_zero: CFG-Zero*, True or the number of first steps at which the velocity is zero.
        skip_layers, skip_range: skip-layer guidance: blocks left out of the pass without the prompt, and in which
            part of the steps.
        recipe: how to sample a distilled model or LoRA, a name in `wan_mlx.recipes.RECIPES`: it sets steps, noise
            levels, solver, shift and guidance together.
        video: what a text-to-video model starts from instead of noise alone: its first ``num_frames`` at 16 per
            second, cut to the size.
        strength: above 0 (the video as it was) to 1 (nothing of it is left): the last ``strength * steps`` steps
            are made. 0.7 if there is a video.

    Raises:
        ValueError: a value is wrong; names the nearest valid one. A source is missing, or not for this model.
    """
    width, height = width or preset.size[0], height or preset.size[1]
    defaults = preset.sampling_for(width, height)
    if recipe is not None:
        bound = find_recipe(recipe).fill(steps=steps, guidance_scale=guidance_scale, shift=shift, solver=solver)
        steps, guidance_scale, shift, solver = bound.values()
    request = Request(
        prompt=prompt,
        negative_prompt=preset.negative_prompt if negative_prompt is None else negative_prompt,
        width=width,
        height=height,
        num_frames=preset.num_frames if num_frames is None else num_frames,
        steps=defaults.steps if steps is None else steps,
        guidance_scale=defaults.guidance_scale if guidance_scale is None else guidance_scale,
        shift=defaults.shift if shift is None else shift,
        solver="unipc" if solver is None else solver,
        seed=secrets.randbelow(MAX_RANDOM_SEED) if seed is None or seed < 0 else seed,
        fps=preset.fps,
        task=preset.task,
        image=image,
        last_image=last_image,
        src_video=src_video,
        src_mask=src_mask,
        src_ref_images=tuple(src_ref_images),
        context_scale=context_scale,
        guidance_range=tuple(guidance_range),
        cfg_zero=zero_steps_of(preset.task) if cfg_zero is True else None if cfg_zero is False else cfg_zero,
        skip_layers=tuple(skip_layers),
        skip_range=tuple(skip_range),
        recipe=recipe,
        video=video,
        strength=(1.0 if video is None else DEFAULT_STRENGTH) if strength is None else strength,
        geometry=geometry,
    )
    check_request(request)
    check_guidance(request, config.num_layers)
    request = replace(request, cache=resolve_cache(cache, request.steps_made, preset.name, config))
    return fit_sources(request)


def check_request(request: Request) -> None:
    """Raise ValueError, with the nearest valid choice, if a value cannot be used."""
    if not request.prompt.strip():
        raise ValueError("the prompt is empty; say what the video should show")
    request.geometry.check_size(request.width, request.height)
    request.geometry.check_frames(request.num_frames)
    if request.steps < 1:
        raise ValueError(f"steps is {request.steps}, expected at least 1")
    if not request.shift > 0:
        raise ValueError(f"shift is {request.shift}, expected a number above 0")
    if not np.isfinite(request.guidance_scale):
        raise ValueError(f"guidance is {request.guidance_scale}, expected a finite number")
    if request.seed >= 2**64:
        raise ValueError(f"seed is {request.seed}, expected 0 to {2**64 - 1}; nearest: {2**64 - 1}")
    if request.solver not in SOLVERS:
        raise ValueError(f"unknown solver {request.solver!r}, expected one of {', '.join(SOLVERS)}")
    if not 0 < request.strength <= 1:
        nearest = "1" if request.strength > 1 else f"{1 / request.steps:g}"
        raise ValueError(f"strength is {request.strength}, expected above 0 and up to 1; nearest: {nearest}")
    if request.begin == request.steps:
        raise ValueError(
            f"strength {request.strength:g} of {request.steps} steps is not one step; "
            f"nearest: strength {1 / request.steps:.2g}"
        )
    if request.strength != 1 and request.video is None:
        raise ValueError(f"strength is {request.strength:g}, but there is no video to start from; give a video")
