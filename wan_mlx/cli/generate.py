"""One command, one video or a series of stills; and ``--resume``, which goes on with one that was cut."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from .. import __version__, options
from ..distributed import opened_group
from ..errors import UsageError, size
from ..events import Finished
from ..media.write import ENDINGS, check_output
from ..pipeline import plan
from ..planning.machine import mlx_version
from ..request_builder import size_of
from ..runs.folder import ENDING, RunFolder
from ..runs.job import Job
from ..runs.record import check_identity, check_same, model_of, request_of, seed_of_made, with_dtype
from ..storage import no_file
from .flags import free_on_resume, keywords
from .interrupt import Interrupts
from .jobs import (
    asked_of,
    check_flags,
    check_needs,
    default_output,
    extend,
    extension_of,
    is_series,
    jobs_from,
    make,
    open_model,
    request_from,
    watch,
)
from .summary import (
    describe,
    loras_of,
    names_differ,
    recipe_notes,
    strength_notes,
    tell_downloads,
    tell_notes,
    tell_watching,
)
from .terminal import FAILURE, Terminal, write


def run(args: argparse.Namespace, say: Terminal, interrupts: Interrupts) -> int:
    """Carry out the flags; returns the exit code."""
    is_chosen = args.model is not None or args.high_noise is not None
    check_flags(args)
    if not is_chosen:
        say.note(f"model     {args.model}, which comes with the package: a first look; larger ones: wan-mlx models")
    if args.plan:
        return show_plan(args, say)
    if args.output:
        # Before a download or an hour of work; of a series the names are not known yet.
        check_output(args.output, args.overwrite or is_series(args))
    model = keywords(args, options.MODEL)
    if args.dry_run and tell_downloads(model, say):
        return 0
    extension = extension_of(args)
    pipe = open_model(model, say)
    request = request_from(pipe, args)
    word, said = request.prompt, pipe.unknown_words(request)
    if args.is_bare and said and word.isascii() and len(word.split()) == 1:
        raise UsageError(f"{word!r} is no command, and {said[0]}; as a prompt: wan-mlx -p {shlex.quote(word)}")
    output = Path(args.output) if args.output else default_output(request)
    jobs, made = jobs_from(pipe, args, request, output), list[Job]()
    if is_series(args) and not args.overwrite:  # a series goes on where it was cut
        made = [job for job in jobs if seed_of_made(pipe, job.request, job.output, extension=extension) is not None]
        jobs = [job for job in jobs if job not in made]
    for job in jobs:
        if not (is_series(args) and RunFolder(job.output).is_unfinished):
            job.check_output()
    describe(pipe, request, say, {job.output: job.request.seed for job in [*made, *jobs]})
    tell_watching(pipe, jobs[0].previews if jobs else None, say)
    experts = [part.file for part in pipe.checkpoint.of_kind("transformer")]
    loras = [path for own in loras_of(pipe).values() for path, _ in own]
    distilled = [pipe.checkpoint.path, *experts, *loras]
    for line in recipe_notes(distilled, request.recipe, pipe.preset, args.steps):
        say.note(f"          {line}")
    for line in strength_notes([lora for own in loras_of(pipe).values() for lora in own], request, pipe.preset):
        say.note(f"          {line}")
    for line in names_differ(pipe):
        say.note(f"          {line}")
    asked = size_of(pipe.preset, pipe.geometry, args.size, args.width, args.height)
    if isinstance(args.size, str):
        say.note(f"          {args.size} is {asked[0]}x{asked[1]} for {pipe.preset.name}")
    if asked != (request.width, request.height):
        say.note(f"          the size follows your source; {asked[0]}x{asked[1]} set the area")
    if (args.num_frames or request.num_frames) != request.num_frames:
        say.note(f"          its length is the source's; {args.num_frames} frames were asked for")
    if args.dry_run:
        tell_notes(pipe, request, say)
        if extension:
            say.note(f"extend    the prompt by {extension.model or 'the default language model'}")
        return 0
    for job in made:
        say.note(f"{job.output} is made already")
        say(Finished(job.output))
    if extension and jobs:
        extend(extension, jobs, say)
    with pipe.keep_loaded() if len(jobs) > 1 else nullcontext():
        free = free_on_resume() if is_series(args) else None
        return max([make(job, say, interrupts, free=free) for job in jobs], default=0)


def resume(args: argparse.Namespace, given: Mapping[str, Any], say: Terminal, interrupts: Interrupts) -> int:
    """``--resume FILE``: go on with the run that was making FILE, as it was asked for; returns the exit code."""
    if args.plan:
        raise UsageError("--plan does not go with --resume: the plan of a run that goes on is the one it has")
    output = Path(args.resume.removesuffix(ENDING) if args.resume.endswith(ENDING) else args.resume)
    folder = RunFolder(output)

    def there() -> int:
        say.note(f"{output} is finished already")
        say(Finished(output))
        return 0

    if not folder.path.is_dir():
        if output.is_file():
            return there()
        raise ValueError(no_file("there is no unfinished run:", output, (*ENDINGS, ENDING)))
    with folder:
        record = folder.record()
        if folder.is_finished() or (record is None and output.is_file()):
            folder.delete()
            return there()
        if record is None:
            raise ValueError(f"the run of {output} was cut before it began; start it again without --resume")
        folder.state()  # which is refused if damaged, before any work
        # Other numbers are the way out of NaN, and only there.
        check_same(given, record, free_on_resume() | ({"dtype"} if record.get("not_finite") else set()))
        check_needs(args, [name for name, value in {**record["model"], **record}.items() if value])
        model = model_of(record)
        model |= {name: value for name, value in given.items() if name in model}
        pipe, request = open_model(model, say), request_of(record)
        if model["dtype"] != record["model"]["dtype"] and not args.dry_run:
            folder.amend(**with_dtype(record, model["dtype"], folder.steps_done))
        for difference in check_identity(record, pipe, folder):
            say.note(difference, important=True)
        job = Job(pipe, request, output, overwrite=args.overwrite or record["overwrite"])
        seen = record["preview"] or {}
        watch([job], args.preview or seen.get("path"), given.get("preview_every", seen.get("every", 1)))
        describe(pipe, request, say, {output: request.seed})
        tell_watching(pipe, job.previews, say)
        say.note(f"goes on   {folder.steps_done} of {request.steps_of_clips} steps are done")
        return 0 if args.dry_run else make(job, say, interrupts, folder)


def show_version() -> int:
    """``--version``."""
    write(f"wan_mlx {__version__}, mlx {mlx_version()}, python {sys.version.split()[0]}")
    return 0


def show_plan(args: argparse.Namespace, say: Terminal) -> int:
    """``--plan``: print it; 1 if it does not fit."""
    options_given = {**keywords(args, options.MODEL), **asked_of(args)}
    if "parallel" not in args.given and opened_group() is None:  # several machines are told of where they are asked for
        del options_given["parallel"]
    planned = partial(plan, **options_given, kept=is_series(args))
    found = planned()
    if found.fits:
        say.note(f"it fits in {size(found.peak)}; to tell the time, its parts are timed for some seconds ...")
        found = planned(measure=True)
    for line in str(found).splitlines():
        (say.note if say.as_json else write)(line)
    return 0 if found.fits else FAILURE
