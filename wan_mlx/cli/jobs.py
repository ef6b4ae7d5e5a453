"""From flags to jobs: the model is opened, the request built, the file named, and the job made."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

from .. import options
from ..errors import Stopped, UsageError, resume_command
from ..media.preview import PreviewFiles
from ..pipeline import WanPipeline
from ..presets import GIVEN_APART
from ..prompts.extend import Extension, check_prompt
from ..runs.folder import RunFolder
from ..runs.job import Job
from ..types import Request
from .flags import keywords
from .interrupt import Interrupts
from .summary import tell_downloads
from .terminal import SUSPECT, Terminal

SERIES = ("seeds", "num_videos", "num_images")  # keys of the options that ask for several


def check_flags(args: argparse.Namespace) -> None:
    """Refuse missing flags, incomplete ones, and those without effect; a model that is left out is nano, or the two
    experts that are given."""
    if args.model is None and args.high_noise and args.low_noise:
        args.model, args.high_noise = args.high_noise, None
    if args.model is None:
        if args.preset or any(getattr(args, part) for part in GIVEN_APART):
            raise UsageError("--model is missing: a preset, a folder, a file or a hub id, as in --model t2v-1.3B; "
                             "`wan-mlx models` lists those released")  # fmt: skip
        args.model = "nano-i2v" if args.image else "nano"
    if args.prompt is None and args.src_root_path:
        args.prompt = ""  # the model has its own
    if args.prompt is None and not args.plan:
        raise UsageError('--prompt is missing: say what the video should show, as in wan-mlx "a red circle"')
    if (args.width is None) != (args.height is None):
        alone, other = ("width", "height") if args.height is None else ("height", "width")
        raise UsageError(f"--{alone} is given alone; expected --{other}, too, or --size")
    if len(given := [f"--{key.replace('_', '-')}" for key in SERIES if getattr(args, key) is not None]) > 1:
        raise UsageError(f"{' and '.join(given)} are given; expected one of them")
    check_needs(args)


def is_series(args: argparse.Namespace) -> bool:
    """Whether several videos or stills of one prompt are asked for, whose names get their seeds."""
    return any(getattr(args, key) is not None for key in SERIES)


def check_needs(args: argparse.Namespace, there: Collection[str] = ()) -> None:
    """Refuse flags that have no effect without another; ``there``: keys of those that the run had from its start."""
    names = options.flag_names()
    for option in options.flags():
        given = getattr(args, option.key) != option.default
        if given and option.needs and not any(need in there or getattr(args, need) for need in option.needs):
            needed = " or ".join(names[need] for need in option.needs if need != "use_prompt_extend")
            raise UsageError(f"{option.flags[0]} has no effect without {needed}; give that, or leave it out")


def extension_of(args: argparse.Namespace) -> Extension | None:
    """The extension of prompts that is asked for, if one is.

    Raises:
        UsageError: a model or language without it.
    """
    model, language = args.prompt_extend_model, args.prompt_extend_target_lang
    if args.extend_prompt or args.use_prompt_extend:
        language = language or (None if args.extend_prompt else "zh")  # the official default
        return Extension(model, language, args.caffeinate)
    if model or language:
        raise UsageError("--extend-model and --extend-language do nothing alone, expected --extend-prompt, too")
    return None


def open_model(model: Mapping[str, Any], say: Terminal) -> WanPipeline:
    """The model; downloaded if need be, which is said before, and opened, not loaded."""
    tell_downloads(model, say)
    return WanPipeline.from_pretrained(**{**model, "progress": say})


def asked_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the request that flags come to, but the prompt."""
    asked = keywords(args, options.REQUEST)
    del asked["prompt"]
    still = args.preset == "t2i-14B" or (args.num_images or 1) > 1
    if args.preset == "t2i-14B" and args.num_frames not in (None, 1):
        raise UsageError(f"--task t2i-14B makes stills, but --frames is {args.num_frames}; nearest: 1")
    if still and args.num_frames is None:
        asked["num_frames"] = 1
    return asked


def request_from(pipe: WanPipeline, args: argparse.Namespace) -> Request:
    request = pipe.request(args.prompt, **asked_of(args))
    if extension_of(args) is None:
        check_prompt(request)
    return request


def jobs_from(pipe: WanPipeline, args: argparse.Namespace, request: Request, output: Path) -> list[Job]:
    """A job, or of a series one for each seed: "cat.png" becomes "cat_seed42.png", "cat_seed43.png", ..."""
    asked = {
        option.key: getattr(args, option.key)
        for option in options.flags()
        if option.of != options.MODEL and not (option.free or option.alone or option.no_effect)
    }
    jobs = [Job(pipe, request, output, asked, args.overwrite)]
    if is_series(args):  # each as if it had been asked for alone
        alone, jobs = {**asked, **dict.fromkeys(SERIES)}, []
        for one in _series(args, request):
            name = output.with_name(f"{output.stem}_seed{one.seed}{output.suffix}")
            jobs.append(Job(pipe, one, name, {**alone, "seed": one.seed}, args.overwrite))
    watch(jobs, args.preview, args.preview_every)
    return jobs


def _series(args: argparse.Namespace, request: Request) -> list[Request]:
    if args.seeds is not None:
        return [replace(request, seed=seed) for seed in args.seeds]
    return request.series(args.num_videos, "num_videos") if args.num_videos else request.series(args.num_images)


def watch(jobs: Sequence[Job], path: str | None, every: int) -> None:
    """Have the jobs keep the previews ``path`` up to date, if there is one; they are checked before any work.

    Raises:
        ValueError: as `PreviewFiles`, or no colours are known for the model's latents.
    """
    if path is not None and jobs:
        previews = PreviewFiles(path, every, jobs[0].overwrite, [job.output for job in jobs])
        _ = jobs[0].pipe.previewer
        for job in jobs:
            job.previews = previews


def default_output(request: Request) -> Path:
    """A name made of the prompt, with a number behind it where that is taken, also by an unfinished run."""
    words = re.sub(r"[^\w]+", "_", request.prompt).strip("_")[:50] or "video"
    ending = ".png" if request.num_frames == 1 else ".mp4"
    names = (Path(f"{words}{number and f'_{number}' or ''}{ending}") for number in chain([0], count(2)))
    return next(name for name in names if not (os.path.lexists(name) or os.path.lexists(RunFolder(name).path)))


def extend(extension: Extension, jobs: Sequence[Job], say: Terminal) -> None:
    """Have the prompts of the jobs, which are of one model, written out, and print them."""
    say.note(f"extend    the prompt by {extension.model or 'the default language model'}")
    requests = extension(jobs[0].pipe.preset, [job.request for job in jobs], partial(say.note, important=True))
    for job, request in zip(jobs, requests, strict=True):
        job.request = request
        if request.original_prompt is not None:
            say.note(f"prompt    {request.prompt}")
            source = f": {request.original_prompt}" if request.original_prompt.strip() else " the picture alone"
            say.note(f"          written out by {request.extended_by} from{source}")


def make(
    job: Job,
    say: Terminal,
    interrupts: Interrupts,
    folder: RunFolder | None = None,
    free: Collection[str] | None = None,
) -> int:
    """Make the job's file, or go on where ``folder`` is; if it ends before its time, say how to go on with it.

    Args:
        free: as for `Job.make`.

    Returns:
        the exit code.
    """
    try:
        with interrupts.stopping(job):
            made = job.make(say, free) if folder is None else job.go_on(folder, say)
    except BaseException as error:
        if job.kept is None:
            raise
        command = f"{resume_command(job.output)}{f' --dtype {job.pipe.wider_dtype}' * job.not_finite}"
        how = f"{job.kept} steps are kept; go on with: {command}"
        if isinstance(error, Stopped):
            raise Stopped(error.signum, f"; {how}", error.why) from error
        say.note(how, important=True)
        raise
    return say.fail(f"{made.output} was written, but {made.complaint}", SUSPECT) if made.complaint else 0
