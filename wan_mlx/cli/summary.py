"""What a run is going to do, in lines for the terminal, before it starts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..caching import planned_forwards
from ..hub.resolve import Places
from ..presets import PARTS, of_same_shapes
from ..types import Request
from ..weights.lora import normalise_loras
from .terminal import note

if TYPE_CHECKING:
    from ..media.preview import PreviewFiles
    from ..pipeline import WanPipeline


def tell_downloads(args: argparse.Namespace) -> bool:
    """Say what must be fetched before the model can be opened, and how large it is; whether that is anything."""
    parts = {part: getattr(args, part) for part in PARTS if getattr(args, part) is not None}
    downloads = Places(args.model, parts, normalise_loras(args.loras)).downloads(args.source)
    missing = [download for download in downloads if download.missing]
    for download in missing:
        note(f"download  {download}")
    return bool(missing)


def describe(pipe: WanPipeline, request: Request, *outputs: Path) -> None:
    guidance = "off" if request.guidance_scale == 1 else f"{request.guidance_scale:g}"
    packed = "".join(f", {component.replace('_', ' ')} {mode}" for component, mode in pipe.quantized.items())
    note(f"model     {pipe.checkpoint.path} ({pipe.preset.name} defaults, {pipe.dtype}{packed})")
    for line in origins(pipe):
        note(f"          {line}")
    for path, strength in pipe.loras:
        note(f"lora      {path} at {strength:g}")
    note(f"prompt    {request.prompt}")
    note(f"video     {request.width}x{request.height}, {request.num_frames} frames at {request.fps} fps")
    note(f"sampling  {request.solver}, {request.steps} steps, shift {request.shift:g}, guidance {guidance}, "
         f"seed {request.seed}")  # fmt: skip
    for line in extras(request, pipe.preset.name):
        note(line)
    if request.video is not None:
        note(f"start     {request.video}, strength {request.strength:g}: the last {request.steps_made} of the steps")
    for output in outputs:
        note(f"output    {output}")


def tell_watching(pipe: WanPipeline, previews: PreviewFiles | None) -> None:
    if previews:
        often = f"every {previews.every} steps" if previews.every > 1 else "every step"
        note(f"preview   {previews.path}, {previews.sheet}, after {often}{' by TAEHV' if pipe.taehv else ''}")
    if pipe.draft:
        note(f"draft     decoded by {pipe.taehv.name} instead of the VAE")


def origins(pipe: WanPipeline) -> list[str]:
    """Parts that were given apart, and which other defaults would suit the same weights."""
    base = pipe.checkpoint.path
    lines = [
        f"{part.replace('_', ' ')} from {file}"
        for part, file in pipe.checkpoint.files.items()
        if file != base and base not in file.parents
    ]
    if pipe.guessed_preset:
        for other in of_same_shapes(pipe.preset):
            lines.append(f"{other.name} has weights of the same shapes; --task {other.name} takes its defaults")
    return lines


def extras(request: Request, model: str) -> list[str]:
    """Lines on what departs from plain guidance and from computing every forward."""
    lines = []
    if request.recipe:
        lines.append(f"          by the recipe {request.recipe}")
    if request.cache != "none":
        passes = 1 if request.guidance_scale == 1 else 2
        planned = planned_forwards(request.cache, request.steps_made, model, passes, request.begin)
        plain = request.guidance_range == (0.0, 1.0) and request.cfg_zero is None
        known = f", {planned} of {passes * request.steps_made} forwards" if planned and plain else ""
        lines.append(f"cache     {request.cache}{known}")
    if request.guidance_range != (0.0, 1.0):
        lines.append("          guidance only from {:g} to {:g} of the steps".format(*request.guidance_range))
    if request.cfg_zero is not None:
        lines.append(f"          CFG-Zero*, {request.cfg_zero} first steps without motion")
    if request.skip_layers:
        layers = ", ".join(map(str, request.skip_layers))
        lines.append("          layers {} skipped from {:g} to {:g} of the steps".format(layers, *request.skip_range))
    return lines
