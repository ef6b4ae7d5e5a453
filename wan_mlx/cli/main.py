"""``python -m wan_mlx.generate``: arguments → Request → file."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import wan_mlx

from .. import options
from ..errors import UsageError
from .flags import MODEL_HELP, build_parser, given_flags
from .terminal import event, fail, hear, note, result, set_voice

if TYPE_CHECKING:
    from ..media.preview import PreviewFiles
    from ..pipeline import WanPipeline
    from ..prompts.extend import Extension
    from ..runs.folder import RunFolder
    from ..runs.interrupt import Interrupts
    from ..types import Request

USAGE, FAILURE, SUSPECT, INTERRUPTED = 2, 1, 3, 130
# What ``wan-mlx`` does besides: first argument → module whose ``main`` takes the rest.
COMMANDS = {"models": ".list_models", "doctor": ".doctor", "completion": ".completion",
            "convert": ".convert", "inspect": ".convert"}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0; 1: failed; 2: wrong usage; 3: the video was written, but it is black, flat or saturated; 130: interrupted.
    """
    from ..errors import Stopped
    from ..runs.interrupt import Interrupts

    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv and argv[0] in COMMANDS:
            command, *rest = argv
            rest = ["--inspect", *rest] if command == "inspect" else rest
            return importlib.import_module(COMMANDS[command], __package__).main(rest)
        argv = with_config(argv)
        args = build_parser().parse_args(argv)
        set_voice(args)
        with Interrupts() as interrupts:
            if args.prompts:
                return batch(args, argv, interrupts)
            return resume(args, given_flags(argv), interrupts) if args.resume else run(args, interrupts)
    except Stopped as stopped:
        return fail(f"interrupted{stopped.go_on}", stopped.code)
    except KeyboardInterrupt:
        return fail("interrupted", INTERRUPTED)
    except Exception as error:
        if "--debug" in argv:
            raise
        return fail(*explain(error))


def with_config(argv: list[str]) -> list[str]:
    """The command line with what ``--config FILE`` says put before it, so that the flags that are there win."""
    given = given_flags(argv)
    if "config" not in given:
        return argv
    from .config_file import config_arguments

    return [*config_arguments(Path(given["config"]), given), *argv]


def explain(error: Exception) -> tuple[str, int]:
    """One line for the user, and the exit code."""
    from ..errors import WanError, is_out_of_memory
    from ..media.checks import LESS_MEMORY

    if is_out_of_memory(error):
        return f"out of memory ({error}); {LESS_MEMORY}", FAILURE

    if isinstance(error, UsageError | ValueError):
        return str(error), USAGE
    if isinstance(error, WanError | ImportError):
        return str(error), FAILURE
    # A bug, or the machine's own failure.
    return f"{type(error).__name__}: {error} (run again with --debug for the traceback)", FAILURE


def run(args: argparse.Namespace, interrupts: Interrupts) -> int:
    wan_mlx.check_backend()
    if args.version:
        import mlx.core as mx

        print(f"wan_mlx {wan_mlx.__version__}, mlx {mx.__version__}, python {sys.version.split()[0]}")
        return 0
    check_flags(args)
    if args.plan:
        return show_plan(args)
    for option in options.flags():
        if option.no_effect and getattr(args, option.key) is not None:
            note(f"{option.flags[0]} has no effect here: {option.no_effect}")
    if args.prompt_extend_method == "dashscope":
        note("--prompt_extend_method dashscope has no effect here: prompts never leave this machine, a model here "
             "writes them out")  # fmt: skip

    from ..media.preview import open_previews
    from ..media.write import check_output
    from ..prompts.extend import Extension
    from ..recipes import recipe_notes
    from ..runs.folder import RunFolder
    from ..runs.record import make_record, seed_of_made
    from .summary import describe, tell_downloads, tell_watching

    if args.output:
        # Before a download or an hour of work; of a series the names are not known yet.
        check_output(args.output, args.overwrite or args.num_images is not None)
    if args.dry_run and tell_downloads(args):
        return 0
    extension = Extension.of(args)
    pipe = pipeline_from(args)
    request = request_from(pipe, args)
    output = Path(args.output or default_output(pipe.preset.name, request))
    jobs, made = outputs_of(request, output, args.num_images), []
    if args.num_images is not None and not args.overwrite:  # a series goes on where it was cut
        made = [path for one, path in jobs if seed_of_made(pipe, one, path, extension=extension) is not None]
        jobs = [(one, path) for one, path in jobs if path not in made]
    for _, path in jobs:
        check_output(path, args.overwrite)
    previews = open_previews(pipe, args.preview, args.preview_every, [path for _, path in jobs], args.overwrite)
    describe(pipe, request, *made, *(path for _, path in jobs))
    tell_watching(pipe, previews)
    experts = [part.file for part in pipe.checkpoint.of_kind("transformer")]
    distilled = [pipe.checkpoint.path, *experts, *(path for path, _ in pipe.loras)]
    for line in recipe_notes(distilled, request.recipe):
        note(f"          {line}")
    asked = args.size or pipe.preset.size
    if asked != (request.width, request.height):
        note(f"          its proportions are the source's; {asked[0]}x{asked[1]} was taken as the area")
    if (args.num_frames or request.num_frames) != request.num_frames:
        note(f"          its length is the source's; {args.num_frames} frames were asked for")
    if args.dry_run:
        if extension:
            note(f"extend    the prompt by {extension.model or 'the default language model'}")
        return 0
    for path in made:
        note(f"{path} is made already")
        result(path)
    if extension and jobs:
        jobs = list(zip(extend(extension, [one for one, _ in jobs]), (path for _, path in jobs), strict=True))
    codes = []
    with pipe.keep_loaded() if len(jobs) > 1 else nullcontext():
        for request, path in jobs:
            with RunFolder(path) as folder:
                refuse_unfinished(folder, args.overwrite)
                with keeping(folder):
                    folder.begin(make_record(pipe, request, vars(args)))
                    codes.append(generate_to_file(pipe, request, folder, args.overwrite, interrupts, previews))
    return max(codes, default=0)


def extend(extension: Extension, requests: list[Request]) -> list[Request]:
    """The requests with their prompts written out, and what they came to said."""
    note(f"extend    the prompt by {extension.model or 'the default language model'}")
    requests = extension(requests, partial(note, important=True))
    for request in requests:
        if request.original_prompt is not None:
            note(f"prompt    {request.prompt}")
            note(f"          written out by {request.extended_by} from: {request.original_prompt}")
    return requests


def batch(args: argparse.Namespace, argv: list[str], interrupts: Interrupts) -> int:
    """``--prompts FILE``: the other flags are the defaults of every line."""
    wan_mlx.check_backend()

    from .batch import run_batch

    if args.resume:
        raise UsageError("--resume does not go with --prompts: the same command again goes on with the batch")
    for flag in ("prompt", "output"):
        if getattr(args, flag) is not None:
            raise UsageError(f"--{flag} does not go with --prompts: it belongs into the lines of {args.prompts}")
    return run_batch(args, argv, interrupts)


def resume(args: argparse.Namespace, given: dict[str, object], interrupts: Interrupts) -> int:
    """``--resume FILE``: go on with the run that was making FILE; its flags are those it was started with."""
    wan_mlx.check_backend()

    from ..media.preview import open_previews
    from ..runs.folder import ENDING, RunFolder
    from ..runs.record import check_given, check_identity, flags_of, request_of, with_dtype
    from .summary import describe, tell_watching

    output = Path(args.resume.removesuffix(ENDING) if args.resume.endswith(ENDING) else args.resume)
    folder = RunFolder(output)
    if not folder.path.is_dir():
        if output.is_file():
            note(f"{output} is there, and no run of it is unfinished")
            result(output)
            return 0
        raise ValueError(f"there is no unfinished run of {output}: {folder.path} does not exist")
    with folder:
        record = folder.record()
        if folder.is_finished() or (record is None and output.is_file()):
            folder.delete()
            note(f"{output} is there, and no run of it is unfinished")
            result(output)
            return 0
        if record is None:
            raise ValueError(f"the run of {output} was cut before it began; start it again without --resume")
        # Other numbers are the way out of NaN, and only there.
        free = options.free_on_resume() | ({"dtype"} if folder.was_not_finite else set())
        check_given(given, record, free)
        stored = flags_of(record, build_parser().parse_args([]))
        for name in given:
            setattr(stored, name, getattr(args, name))
        pipe, request = pipeline_from(stored), request_of(record)
        if stored.dtype != record["flags"]["dtype"]:
            record = with_dtype(record, stored.dtype, folder.steps_done)
            if not args.dry_run:
                folder.amend(record)
        for difference in check_identity(record, pipe, folder):
            note(difference, important=True)
        previews = open_previews(pipe, stored.preview, stored.preview_every, [output], stored.overwrite)
        describe(pipe, request, output)
        tell_watching(pipe, previews)
        note(f"goes on   {folder.steps_done} of {request.steps_made} steps are done")
        if args.dry_run:
            return 0
        with keeping(folder):
            return generate_to_file(pipe, request, folder, stored.overwrite, interrupts, previews)


@contextmanager
def keeping(folder: RunFolder, quietly: bool = False) -> Iterator[None]:
    """If the run in this block ends before its time, say how to go on with it (unless ``quietly``).

    A run without a step leaves nothing.
    """
    from ..errors import Stopped

    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, Stopped)
        if not folder.steps_done and not (stopped and folder.is_unfinished):
            folder.delete()
            raise
        how = f"{folder.steps_done} steps are kept; go on with: {resume_command(folder)}"
        if folder.was_not_finite:
            how += " --dtype float32"
        if stopped:
            error.go_on = f"; {how}"
        elif not quietly:
            note(how, important=True)
        raise


def resume_command(folder: RunFolder) -> str:
    return f"python -m wan_mlx.generate --resume {shlex.quote(str(folder.output))}"


def refuse_unfinished(folder: RunFolder, overwrite: bool) -> None:
    """An earlier run's hour of work is not thrown away unasked."""
    if folder.is_unfinished and not overwrite:
        raise ValueError(
            f"there is an unfinished run of {folder.output}: go on with --resume {shlex.quote(str(folder.output))}, "
            "or start anew with --overwrite"
        )


def pipeline_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keywords for `WanPipeline.from_pretrained`."""
    return {**options.keywords(vars(args), options.MODEL), "progress": not (args.quiet or args.json)}


def pipeline_from(args: argparse.Namespace) -> WanPipeline:
    """The model that the flags name; downloaded if need be, and opened, not loaded."""
    from ..pipeline import WanPipeline
    from .summary import tell_downloads

    tell_downloads(args)
    return WanPipeline.from_pretrained(**pipeline_options(args))


def check_flags(args: argparse.Namespace) -> None:
    """Refuse what is not there, and what says too little."""
    if args.model is None:
        raise UsageError(MODEL_HELP)
    if args.prompt is None and not args.plan:
        raise UsageError("--prompt is missing: say what the video should show")


def show_plan(args: argparse.Namespace) -> int:
    """``--plan``: print it; 1 if it does not fit."""
    from ..planning.choose import plan

    width, height = args.size or (None, None)
    found = plan(
        args.model,
        width,
        height,
        1 if args.num_frames is None and args.preset == "t2i-14B" else args.num_frames,
        args.steps,
        args.memory,
        dtype=args.dtype,
        quantize=args.quantize,
        guidance_scale=args.guidance_scale,
        vae_tiling=args.vae_tiling,
        measure=True,
    )
    print(found)
    return 0 if found.fits else FAILURE


def request_from(pipe: WanPipeline, args: argparse.Namespace) -> Request:
    asked = options.keywords(vars(args), options.REQUEST)
    still = args.preset == "t2i-14B" or (args.num_images or 1) > 1
    if args.preset == "t2i-14B" and args.num_frames not in (None, 1):
        raise UsageError(f"--task t2i-14B makes stills, but --frames is {args.num_frames}; nearest: 1")
    if still and args.num_frames is None:
        asked["num_frames"] = 1
    return pipe.request(**asked)


def default_output(model: str, request: Request) -> str:
    words = re.sub(r"[^\w]+", "_", request.prompt).strip("_")[:50]
    ending = ".png" if request.num_frames == 1 else ".mp4"
    return f"{model}_{request.width}x{request.height}_{words}_{datetime.now():%Y%m%d_%H%M%S}{ending}"


def outputs_of(request: Request, output: Path, num_images: int | None) -> list[tuple[Request, Path]]:
    """Each still of ``--num-images`` and its file: "cat.png" becomes "cat_seed42.png", "cat_seed43.png", ..."""
    if num_images is None:
        return [(request, output)]
    requests = request.series(num_images)
    return [(one, output.with_name(f"{output.stem}_seed{one.seed}{output.suffix}")) for one in requests]


def generate_to_file(
    pipe: WanPipeline,
    request: Request,
    folder: RunFolder,
    overwrite: bool,
    interrupts: Interrupts,
    previews: PreviewFiles | None = None,
) -> int:
    """Make the video that ``folder`` is for, from where it is; returns the exit code."""
    from ..runs.run import make_file

    event("start", output=str(folder.output), settings=pipe.settings(request))
    listener = previews.watcher(request, interrupts, hear) if previews else hear
    made = make_file(pipe, request, folder, overwrite, interrupts, listener)
    for report in made.reports:
        note(f"{report.name:<18}{report.seconds:9.1f} s   peak {report.peak_bytes / 2**30:6.2f} GiB")
    if made.forwards:
        note(f"{'forwards':<18}{made.forwards[0]:9} of {made.forwards[1]}")
    if previews:
        note(f"{'previews':<18}{previews.seconds:9.1f} s   of denoise, {previews.count} times")
    note(f"{'total':<18}{made.seconds:9.1f} s")
    result(made.path, seconds=round(made.seconds, 3), complaint=made.complaint)
    if made.complaint:
        return fail(f"{made.path} was written, but {made.complaint}", SUSPECT)
    return 0

