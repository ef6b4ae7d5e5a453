"""``python -m wan_mlx.generate``: arguments → Request → file."""

from __future__ import annotations

import argparse
import re
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import wan_mlx

from .arguments import MODEL_HELP, NO_MEANING, NOT_YET, UsageError, build_parser

if TYPE_CHECKING:
    from .pipeline import WanPipeline
    from .types import Request

USAGE, FAILURE, INTERRUPTED = 2, 1, 130


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 (failure), 2 (usage) or 130 (interrupted)."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return run(build_parser().parse_args(argv))
    except KeyboardInterrupt:
        return fail("interrupted", INTERRUPTED)
    except Exception as error:
        if "--debug" in argv:
            raise
        return fail(*explain(error))


def explain(error: Exception) -> tuple[str, int]:
    """One line for the user, and the exit code."""
    from .types import WanError

    if isinstance(error, UsageError | ValueError):
        return str(error), USAGE
    if isinstance(error, WanError | ImportError):
        return str(error), FAILURE
    # A bug, or the machine's own failure.
    return f"{type(error).__name__}: {error} (run again with --debug for the traceback)", FAILURE


def run(args: argparse.Namespace) -> int:
    wan_mlx.check_backend()
    if args.version:
        import mlx.core as mx

        print(f"wan_mlx {wan_mlx.__version__}, mlx {mx.__version__}, python {sys.version.split()[0]}")
        return 0
    refuse_what_is_not_there(args)
    if args.model is None:
        raise UsageError(MODEL_HELP)
    if args.prompt is None:
        raise UsageError("--prompt is missing: say what the video should show")
    for flag, reason in NO_MEANING.items():
        if getattr(args, flag) is not None:
            note(f"--{flag} has no effect here: {reason}")

    from .media import check_output
    from .pipeline import WanPipeline
    from .recipes import recipe_notes
    from .weights.hub import survey

    if args.output:
        check_output(args.output, args.overwrite)  # before a download or an hour of work
    download = survey(args.model, args.source)
    if download:
        note(f"download  {download}")
        if args.dry_run and download.missing:
            return 0
    pipe = WanPipeline.from_pretrained(
        args.model,
        args.dtype,
        args.quantize,
        preset=args.task,
        progress=not args.quiet,
        vae_tiling=args.vae_tiling,
        source=args.source,
        loras=args.lora,
        prompt_cache=not args.no_prompt_cache,
    )
    request = request_from(pipe, args)
    output = Path(args.output or default_output(pipe.preset.name, request))
    describe(pipe, request, output)
    for line in recipe_notes([(pipe.checkpoint.path, {}), (pipe.checkpoint.files["transformer"], {})], request.recipe):
        note(f"          {line}")
    asked = (*(args.size or pipe.preset.size), args.frames or request.num_frames)
    if asked != (request.width, request.height, request.num_frames):
        note(f"          its proportions and length are the source's; {asked[0]}x{asked[1]} was taken as the area")
    if args.dry_run:
        return 0
    generate_to_file(pipe, request, output, args.overwrite)
    return 0


def refuse_what_is_not_there(args: argparse.Namespace) -> None:
    for flag in NOT_YET:
        if getattr(args, flag) is not None:
            raise UsageError(f"--{flag} is not supported yet")


def request_from(pipe: WanPipeline, args: argparse.Namespace) -> Request:
    width, height = args.size or (None, None)
    frames = 1 if args.frames is None and args.task == "t2i-14B" else args.frames
    return pipe.request(
        args.prompt,
        negative_prompt=args.negative_prompt,
        width=width,
        height=height,
        num_frames=frames,
        steps=args.steps,
        guidance_scale=args.guidance,
        shift=args.shift,
        solver=args.solver,
        seed=args.seed,
        image=args.image,
        last_image=args.last_image,
        src_video=args.src_video,
        src_mask=args.src_mask,
        src_ref_images=args.src_ref_images.split(",") if args.src_ref_images else (),
        context_scale=args.context_scale,
        cache=args.cache,
        guidance_range=args.guidance_range,
        cfg_zero=args.cfg_zero,
        skip_layers=args.slg[0],
        skip_range=args.slg[1] or (0.1, 1.0),
        recipe=args.recipe,
    )


def default_output(model: str, request: Request) -> str:
    words = re.sub(r"[^\w]+", "_", request.prompt).strip("_")[:50]
    ending = ".png" if request.num_frames == 1 else ".mp4"
    return f"{model}_{request.width}x{request.height}_{words}_{datetime.now():%Y%m%d_%H%M%S}{ending}"


def describe(pipe: WanPipeline, request: Request, output: Path) -> None:
    guidance = "off" if request.guidance_scale == 1 else f"{request.guidance_scale:g}"
    note(f"model     {pipe.checkpoint.path} ({pipe.preset.name} defaults, {pipe.dtype}"
         f"{f', {pipe.quantize}' if pipe.quantize else ''})")  # fmt: skip
    for path, strength in pipe.loras:
        note(f"lora      {path} at {strength:g}")
    note(f"prompt    {request.prompt}")
    note(f"video     {request.width}x{request.height}, {request.num_frames} frames at {request.fps} fps")
    note(f"sampling  {request.solver}, {request.steps} steps, shift {request.shift:g}, guidance {guidance}, "
         f"seed {request.seed}")  # fmt: skip
    for line in extras(request):
        note(line)
    note(f"output    {output}")


def extras(request: Request) -> list[str]:
    """Lines on what departs from plain guidance and from computing every forward."""
    lines = []
    if request.recipe:
        lines.append(f"          by the recipe {request.recipe}")
    if request.cache != "none":
        lines.append(f"cache     {request.cache}")
    if request.guidance_range != (0.0, 1.0):
        lines.append("          guidance only from {:g} to {:g} of the steps".format(*request.guidance_range))
    if request.cfg_zero is not None:
        lines.append(f"          CFG-Zero*, {request.cfg_zero} first steps without motion")
    if request.skip_layers:
        layers = ", ".join(map(str, request.skip_layers))
        lines.append("          layers {} skipped from {:g} to {:g} of the steps".format(layers, *request.skip_range))
    return lines


def generate_to_file(pipe: WanPipeline, request: Request, output: Path, overwrite: bool) -> None:
    """Run the pipeline and write frames as they are decoded; the file appears when it is whole."""
    from tqdm.auto import tqdm

    from .media import VideoWriter
    from .pipeline import latents_to_numpy
    from .types import Step

    started = time.perf_counter()
    step = None
    writer = VideoWriter(output, request.fps, (request.width, request.height), pipe.settings(request), overwrite)
    bar = tqdm(total=request.num_frames, desc="writing", leave=False, disable=not pipe.progress, delay=2)
    with writer, bar:
        for event in pipe.stages(request):
            if isinstance(event, Step):
                step = event
            elif hasattr(event, "dtype"):
                writer.write(event)
                bar.update(len(event))
        writer.latents = latents_to_numpy(step.latents)
    for report in pipe.reports:
        note(f"{report.name:<18}{report.seconds:9.1f} s   peak {report.peak_bytes / 2**30:6.2f} GiB")
    if pipe.forwards:
        note(f"{'forwards':<18}{pipe.forwards[0]:9} of {pipe.forwards[1]}")
    note(f"{'total':<18}{time.perf_counter() - started:9.1f} s")
    print(output)


def note(message: str) -> None:
    print(message, file=sys.stderr)


def fail(message: str, code: int) -> int:
    note(f"error: {message}")
    return code


if __name__ == "__main__":
    sys.exit(main())
