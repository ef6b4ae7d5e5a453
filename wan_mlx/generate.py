"""``python -m wan_mlx.generate``: arguments → Request → file.

Our own flags follow the Python API; every flag of the official ``generate.py`` is accepted too, with its meaning.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import wan_mlx

if TYPE_CHECKING:
    from .pipeline import WanPipeline
    from .types import Request

USAGE, FAILURE, INTERRUPTED = 2, 1, 130

DESCRIPTION = "Make a video with a Wan2.1 model, on Apple silicon or any other MLX backend."

EXAMPLES = """\
examples:
  python -m wan_mlx.generate --model nano --prompt "a red circle moves right on a blue background" --output demo.mp4
  python -m wan_mlx.generate --model ./Wan2.1-T2V-1.3B --prompt "a cat boxing" --output cat.mp4
  python -m wan_mlx.generate --model ./Wan2.1-T2V-1.3B --prompt "a cat boxing" --frames 1 --output cat.png
  python -m wan_mlx.generate --task t2v-1.3B --size 832*480 --ckpt_dir ./Wan2.1-T2V-1.3B --prompt "a cat boxing"
"""

MODEL_HELP = """\
which model? give --model one of
  nano                     bundled: shapes moving on plain backgrounds, 128x128, in seconds
  a folder                 ./Wan2.1-T2V-1.3B, downloaded from the hub
  Wan-AI/Wan2.1-T2V-1.3B   text to video, 480p (17.5 GB to download)
  Wan-AI/Wan2.1-T2V-14B    text to video, 480p and 720p (69 GB to download)
  Wan-AI/Wan2.1-I2V-14B-480P, -I2V-14B-720P, -FLF2V-14B-720P, -VACE-1.3B, -VACE-14B   from pictures and videos"""

# Flags of the official generate.py that mean nothing on one Mac. Each is accepted, with one line saying so.
NO_MEANING = {
    "offload_model": "weights are always dropped as soon as a stage is done",
    "t5_cpu": "the text encoder is always streamed from disk",
    "t5_fsdp": "there is one GPU",
    "dit_fsdp": "there is one GPU",
    "ulysses_size": "there is one GPU",
    "ring_size": "there is one GPU",
}
# Flags of what wan_mlx does not have yet: refused, so that nothing asked is silently left out.
NOT_YET = ("use_prompt_extend", "quantize", "memory")


class UsageError(Exception):
    """Raised by the parser instead of exiting, so that every usage error is one line."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UsageError(message)


def parse_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)[x*×](\d+)", text.strip().lower())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; expected WIDTHxHEIGHT in pixels, such as 832x480")
    return int(match[1]), int(match[2])


def build_parser() -> Parser:
    parser = Parser(
        prog="python -m wan_mlx.generate",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what to make")
    what.add_argument("--prompt", help="what the video should show")
    what.add_argument("--negative-prompt", metavar="TEXT", help="what to avoid (default: the model's own)")
    what.add_argument("--size", type=parse_size, metavar="WxH", help="pixels, multiples of 16 (default: the model's)")
    what.add_argument("--frames", "--frame_num", type=int, metavar="N", help="4n+1 (default 81: five seconds)")
    what.add_argument("--output", "--save_file", metavar="FILE", help=".mp4 .gif .webp .png .npz (default: by prompt)")
    what.add_argument("--overwrite", action="store_true", help="replace the output if it exists")

    sources = parser.add_argument_group("from which pictures or videos")
    sources.add_argument("--image", "--first_frame", metavar="FILE", help="first frame (i2v, flf2v)")
    sources.add_argument("--last-image", "--last_frame", metavar="FILE", help="last frame (flf2v)")
    sources.add_argument("--src_video", metavar="FILE", help="video to edit or follow (vace)")
    sources.add_argument("--src_mask", metavar="FILE", help="what to generate anew in it, white (vace)")
    sources.add_argument("--src_ref_images", metavar="FILES", help="pictures of what should appear, a,b,c (vace)")
    sources.add_argument("--context-scale", type=float, default=1.0, metavar="S", help="strength of the source (vace)")

    model = parser.add_argument_group("with which model")
    model.add_argument("--model", "--ckpt_dir", metavar="MODEL", help="nano (bundled), a model folder, or a hub id")
    model.add_argument("--task", help="take the sampling defaults of this official task, such as t2v-1.3B")
    model.add_argument("--dtype", default="bfloat16", help="of transformer and text encoder: bfloat16, float32")

    defaults = "Defaults are the model's own; for t2v-1.3B: 50 steps, shift 5, guidance 5."
    how = parser.add_argument_group("how to sample", defaults)
    how.add_argument("--steps", "--sample_steps", type=int, metavar="N", help="sampling steps")
    how.add_argument("--guidance", "--sample_guide_scale", type=float, metavar="G", help="guidance scale; 1 is off")
    how.add_argument("--shift", "--sample_shift", type=float, metavar="S", help="shift of the sigma schedule")
    how.add_argument("--solver", "--sample_solver", default="unipc", help="unipc (default), dpm++ or euler")
    how.add_argument("--seed", "--base_seed", type=int, metavar="N", help="same seed, same video (default: drawn)")

    run = parser.add_argument_group("how to run")
    run.add_argument("--dry-run", action="store_true", help="say what would run, and stop")
    run.add_argument("--quiet", action="store_true", help="no progress bars")
    run.add_argument("--debug", action="store_true", help="show a traceback when something fails")
    run.add_argument("--version", action="store_true", help="show versions and stop")

    official = parser.add_argument_group("accepted for the official command lines; without effect here")
    official.add_argument("--offload_model", metavar="BOOL", help=argparse.SUPPRESS)
    official.add_argument("--ulysses_size", metavar="N", help=argparse.SUPPRESS)
    official.add_argument("--ring_size", metavar="N", help=argparse.SUPPRESS)
    for flag in ("t5_fsdp", "t5_cpu", "dit_fsdp"):
        official.add_argument(f"--{flag}", action="store_true", default=None, help=argparse.SUPPRESS)
    official.description = " ".join(f"--{flag}" for flag in NO_MEANING)

    later = parser.add_argument_group("not there yet")
    later.add_argument("--quantize", metavar="MODE", help=argparse.SUPPRESS)
    later.add_argument("--memory", metavar="SIZE", help=argparse.SUPPRESS)
    later.add_argument("--use_prompt_extend", action="store_true", default=None, help=argparse.SUPPRESS)
    for flag in ("prompt_extend_method", "prompt_extend_model", "prompt_extend_target_lang"):
        later.add_argument(f"--{flag}", help=argparse.SUPPRESS)
    later.description = " ".join(f"--{flag}" for flag in NOT_YET)
    return parser


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

    if args.output:
        check_output(args.output, args.overwrite)  # before a download or an hour of work
    pipe = WanPipeline.from_pretrained(args.model, args.dtype, preset=args.task, progress=not args.quiet)
    request = request_from(pipe, args)
    output = Path(args.output or default_output(pipe.preset.name, request))
    describe(pipe, request, output)
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
    )


def default_output(model: str, request: Request) -> str:
    words = re.sub(r"[^\w]+", "_", request.prompt).strip("_")[:50]
    ending = ".png" if request.num_frames == 1 else ".mp4"
    return f"{model}_{request.width}x{request.height}_{words}_{datetime.now():%Y%m%d_%H%M%S}{ending}"


def describe(pipe: WanPipeline, request: Request, output: Path) -> None:
    guidance = "off" if request.guidance_scale == 1 else f"{request.guidance_scale:g}"
    note(f"model     {pipe.checkpoint.path} ({pipe.preset.name} defaults, {pipe.dtype})")
    note(f"prompt    {request.prompt}")
    note(f"video     {request.width}x{request.height}, {request.num_frames} frames at {request.fps} fps")
    note(f"sampling  {request.solver}, {request.steps} steps, shift {request.shift:g}, guidance {guidance}, "
         f"seed {request.seed}")  # fmt: skip
    note(f"output    {output}")


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
    note(f"{'total':<18}{time.perf_counter() - started:9.1f} s")
    print(output)


def note(message: str) -> None:
    print(message, file=sys.stderr)


def fail(message: str, code: int) -> int:
    note(f"error: {message}")
    return code


if __name__ == "__main__":
    sys.exit(main())
